"""The deployment's secrets, read from the files the spec names; a value is never in a spec, an argument or a log."""

import stat
from pathlib import Path

from cluster.spec import ClusterSpec
from cluster.spec_errors import SpecError


def read_token(spec: ClusterSpec) -> str:
    """The token of the internal ports, or an empty text when the spec names none. Raises SpecError."""
    return _read_secret("security.token_file", spec.security.token_file)


def read_api_key(spec: ClusterSpec) -> str:
    """The key clients of the HTTP port must send, or an empty text when the spec names none. Raises SpecError."""
    return _read_secret("router.api_key_file", spec.router.api_key_file)


def _read_secret(field: str, path: str | None) -> str:
    if path is None:
        return ""
    try:
        mode = Path(path).stat().st_mode
        secret = Path(path).read_bytes().strip().decode("latin-1")
    except OSError as error:
        raise SpecError([f"{field}: {path!r} cannot be read: {error.strerror}"]) from None
    if mode & stat.S_IRWXO:
        raise SpecError([f"{field}: {path!r} is open to every user of the machine; run: chmod o= {path}"])
    if not secret:
        raise SpecError([f"{field}: {path!r} is empty; allowed: a file with a secret in it"])
    if not secret.isascii() or not secret.isprintable():
        raise SpecError([f"{field}: {path!r} must hold printable ASCII characters only"])
    return secret
