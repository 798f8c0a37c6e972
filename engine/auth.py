"""The deployment's token on every internal plane: sent by clients, demanded by servers.

One token, read from a file by `baton/`, serves all planes. Without a token only loopback addresses
may be bound. The value itself never travels on a raw socket: see `challenge_response`.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

METADATA_KEY = "authorization"


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


def metadata(token: str) -> list[tuple[str, str]]:
    """gRPC call metadata that proves knowledge of the token."""
    return [(METADATA_KEY, f"Bearer {token}")] if token else []


def challenge_response(token: str, challenge: bytes) -> bytes:
    """Answer to a raw-socket server's random challenge: HMAC-SHA256 with the token."""
    return hmac.new(token.encode(), challenge, hashlib.sha256).digest()


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call that does not carry the token, in constant time."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode() if token else None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        sent = dict(details.invocation_metadata or ()).get(METADATA_KEY, "")
        if self._expected is None or hmac.compare_digest(str(sent).encode(), self._expected):
            return await continuation(details)

        async def refuse(_messages: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the deployment's token is missing or wrong")

        return grpc.stream_stream_rpc_method_handler(refuse)
