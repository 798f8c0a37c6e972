"""The deployment's token on every internal plane: proved by clients, demanded by servers.

One token, read from a file by `baton/`, serves all planes. Without a token only loopback addresses
may be bound. The value itself never travels: see `challenge_response`.
"""

import hashlib
import hmac
import ipaddress


def is_loopback(host: str) -> bool:
    """True for localhost and literal loopback addresses; a name that would need resolving is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, token: str) -> None:
    """Raise ValueError when `host` is reachable from other machines and no token protects it."""
    if not token and not is_loopback(host):
        raise ValueError(
            f"host {host!r} is reachable from other machines, so every internal port demands the deployment's "
            "token: set security.token_file to a file that is not empty, or bind to 127.0.0.1"
        )


def challenge_response(token: str, challenge: bytes) -> bytes:
    """Answer to a server's random challenge: HMAC-SHA256 with the token."""
    return hmac.new(token.encode(), challenge, hashlib.sha256).digest()
