"""Log probabilities in the shapes of the two APIs. Pure; used by `router.responses`."""

from collections.abc import Sequence
from typing import Any

from engine.executors.base import TokenLogprobs
from router.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no infinity; OpenAI writes this


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
    return {
        "content": [
            {
                **_chat_token(tokenizer, entry.token_id, entry.logprob),
                "top_logprobs": [_chat_token(tokenizer, *alternative) for alternative in entry.top],
            }
            for entry in logprobs
        ]
    }


def completion_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs | int], offset: int
) -> tuple[dict[str, Any], int]:
    """The arrays of a completion, and the offset behind them. A bare token id is the unscored first prompt token."""
    tokens: list[str] = []
    scores: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry in logprobs:
        token = token_text(tokenizer, entry if isinstance(entry, int) else entry.token_id)
        tokens.append(token)
        offsets.append(offset)
        offset += len(token)
        if isinstance(entry, int):
            scores.append(None)
            tops.append(None)
        else:
            scores.append(max(entry.logprob, LOWEST))
            tops.append({token_text(tokenizer, other): max(score, LOWEST) for other, score in entry.top})
            tops[-1].setdefault(token, scores[-1])  # type: ignore[union-attr, arg-type]
    return {"tokens": tokens, "token_logprobs": scores, "top_logprobs": tops, "text_offset": offsets}, offset


def prompt_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs]) -> list[dict[int, Any] | None]:
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
                    "decoded_token": token_text(tokenizer, token_id),
                }
                for token_id, (score, rank) in ranked.items()
            }
        )
    return entries


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(raw)}
