"""Log probabilities in the shapes of the two APIs. Pure; used by `router.responses`."""

from collections.abc import Sequence
from typing import Any, Protocol

from engine.executors.base import TokenLogprobs

LOWEST = -9999.0  # JSON has no infinity; OpenAI writes this


class TokenNames(Protocol):
    """What a token is called: its bytes (the tokenizer), or its id."""

    def token_bytes(self, token_id: int) -> bytes: ...


class IdNames:
    """vLLM's `return_tokens_as_token_ids`: tells tokens apart whose bytes are no whole characters."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"token_id:%d" % token_id


def chat_logprobs(names: TokenNames, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_chat_token(names, entry.token_id, entry.logprob),
                "top_logprobs": [_chat_token(names, *alternative) for alternative in entry.top],
            }
            for entry in logprobs
        ]
    }


def completion_logprobs(
    names: TokenNames, logprobs: Sequence[TokenLogprobs | int], offset: int
) -> tuple[dict[str, Any], int]:
    """The arrays of a completion, and the offset behind them. A bare token id is the unscored first prompt token."""
    tokens: list[str] = []
    scores: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry in logprobs:
        token = token_text(names, entry if isinstance(entry, int) else entry.token_id)
        tokens.append(token)
        offsets.append(offset)
        offset += len(token)
        if isinstance(entry, int):
            scores.append(None)
            tops.append(None)
        else:
            scores.append(max(entry.logprob, LOWEST))
            tops.append({token_text(names, other): max(score, LOWEST) for other, score in entry.top})
            tops[-1].setdefault(token, scores[-1])  # type: ignore[union-attr, arg-type]
    return {"tokens": tokens, "token_logprobs": scores, "top_logprobs": tops, "text_offset": offsets}, offset


def prompt_logprobs(names: TokenNames, logprobs: Sequence[TokenLogprobs]) -> list[dict[int, Any] | None]:
    """vLLM's shape: nothing for the first prompt token, then the token and its alternatives by id."""
    entries: list[dict[int, Any] | None] = [None]
    for entry in logprobs:
        ranked = {other: (score, rank) for rank, (other, score) in enumerate(entry.top, start=1)}
        ranked.setdefault(entry.token_id, (entry.logprob, None))  # type: ignore[arg-type]
        entries.append(
            {
                token_id: {
                    "logprob": max(score, LOWEST),
                    "rank": rank,
                    "decoded_token": token_text(names, token_id),
                }
                for token_id, (score, rank) in ranked.items()
            }
        )
    return entries


def token_text(names: TokenNames, token_id: int) -> str:
    return names.token_bytes(token_id).decode("utf-8", "replace")


def _chat_token(names: TokenNames, token_id: int, logprob: float) -> dict[str, Any]:
    raw = names.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(raw)}
