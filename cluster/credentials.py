"""The deployment's secrets, read from the files the spec names; a value is never in a spec, an argument or a log."""

import stat
from pathlib import Path

from cluster.spec import ClusterSpec
from cluster.spec_errors import SpecError


def read_token(spec: ClusterSpec) -> str:
    """The token of the internal ports, or an empty text when the spec names none. Raises SpecError."""
    field, path = "security.token_file", spec.security.token_file
    return "" if path is None else _checked(field, path, _read(field, path).strip())


def read_api_keys(spec: ClusterSpec) -> tuple[str, ...]:
    """The keys of the tenants of the HTTP port, none when the spec names no file. Raises SpecError.

    One to a line; empty lines and those that begin with # do not count.
    """
    field, path = "router.api_key_file", spec.router.api_key_file
    if path is None:
        return ()
    lines = [line.strip() for line in _read(field, path).splitlines()]
    keys = [line for line in lines if line and not line.startswith(b"#")]
    if len(set(keys)) < len(keys):  # two tenants would be one
        raise SpecError([f"{field}: {path!r} has the same key twice; allowed: a different key on each line"])
    return tuple(_checked(field, path, key) for key in keys or [b""])


def check_secrets(spec: ClusterSpec) -> None:
    """Before processes start that would each fail by themselves. Raises SpecError with all problems."""
    problems = []
    for read in (read_token, read_api_keys):
        try:
            read(spec)
        except SpecError as error:
            problems += error.problems
    if problems:
        raise SpecError(problems)


def _read(field: str, path: str) -> bytes:
    try:
        mode = Path(path).stat().st_mode
        content = Path(path).read_bytes()
    except OSError as error:
        raise SpecError([f"{field}: {path!r} cannot be read: {error.strerror}"]) from None
    if mode & stat.S_IRWXO:
        raise SpecError([f"{field}: {path!r} is open to every user of the machine; run: chmod o= {path}"])
    return content


def _checked(field: str, path: str, content: bytes) -> str:
    secret = content.decode("latin-1")
    if not secret:
        raise SpecError([f"{field}: {path!r} is empty; allowed: a file with a secret in it"])
    if not secret.isascii() or not secret.isprintable():
        raise SpecError([f"{field}: {path!r} must hold printable ASCII characters only"])
    return secret
