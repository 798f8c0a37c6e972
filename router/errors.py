"""What a client is told when something fails: an HTTP status and the OpenAI error object.

Raised by the handlers and mapped in one place (`router.http`). Messages hold no addresses, paths or internal names;
what is not one of the known failures becomes a 500 that says nothing.
"""

from dataclasses import dataclass

import msgspec

from engine.errors import InvalidRequest
from router.generation import DeadlineExceeded, GenerationFailed, Overloaded

INVALID = "invalid_request_error"
SERVER = "server_error"


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


@dataclass(eq=False)
class ApiError(Exception):
    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def as_api_error(error: Exception) -> ApiError:
    """The answer for any exception of a handler. Unknown ones are bugs: log them."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, error.message, param=error.param, code=error.code)
        case Overloaded():
            status, kind = (503, SERVER) if error.unavailable else (429, "rate_limit_error")
            retry = (b"retry-after", b"%d" % max(1, round(error.retry_after)))
            code = "no_workers" if error.unavailable else "overloaded"
            return ApiError(status, str(error), kind, code=code, headers=(retry,))
        case DeadlineExceeded():
            return ApiError(504, "the request did not finish within its deadline", "timeout_error", code="timeout")
        case GenerationFailed():
            message = "the request failed on every worker that was tried"
            return ApiError(503, message, SERVER, code="generation_failed", headers=((b"retry-after", b"1"),))
        case _:
            return ApiError(500, "internal server error", SERVER, code="internal_error")
