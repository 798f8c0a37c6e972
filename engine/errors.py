"""The few ways things go wrong. A shortage is `None`, a bug is an assert; these are the rest."""


class InvalidRequest(Exception):
    """The client asked for something it may not have; nothing was changed.

    `param` names the request field at fault; `code` is the machine-readable OpenAI error code.
    The message is shown to the client, so it holds no addresses, paths or internal names.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class TransferError(Exception):
    """A handoff of KV blocks failed. `retryable`: another attempt may succeed."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class WorkerLost(Exception):
    """The session to a worker ended, or its worker stopped making progress."""
