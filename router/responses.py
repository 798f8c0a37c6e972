"""Response bodies of the two completion APIs, whole and in server-sent events.

A format is made for one response. What all its events share is encoded once; an event costs one JSON encoding of its
text. Used by `router.answer`, which decides what is sent when.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import msgspec

from engine.request import FinishReason
from router.choices import Choice, Piece
from router.generation import Timeline
from router.logprobs import IdNames, TokenNames, chat_logprobs, completion_logprobs, prompt_logprobs
from router.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """What every body and event of one response carries, and which extras the client asked for."""

    id: str
    created: int
    model: str
    logprobs: bool = False
    prompt_logprobs: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False  # in log probabilities
    echo: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    timeline: bool = False


class Format(Protocol):
    """One API's shapes. `tail` is JSON to add to an event: `,"usage":...` or nothing. With `extras` events tell more of
    their pieces than text."""

    extras: bool

    def around(self, index: int, tail: bytes) -> tuple[bytes, bytes]:
        """What comes before and after the text, as JSON, in the event of a piece that is neither the first nor the last
        of its choice. Not where there are extras."""
        ...

    def event(self, piece: Piece, tail: bytes) -> bytes:
        """The events of one piece, empty when it has nothing to tell."""
        ...

    def last_event(self, tail: bytes) -> bytes:
        """The event without choices that closes a stream."""
        ...

    def body(self, parts: Sequence[tuple[Choice, list[Piece]]], extra: dict[str, Any]) -> bytes: ...


def usage(choices: Sequence[Choice], num_hidden: int = 0) -> dict[str, Any]:
    """Token counts so far; a prompt counts once however many choices it has."""
    leaders = [choice for choice in choices if choice.leader is None]
    num_prompt = sum(choice.request.num_prompt_tokens for choice in leaders)
    num_output = sum(choice.num_tokens for choice in choices) - num_hidden
    cached = sum(choice.stream.timeline.cached_tokens for choice in leaders if choice.stream is not None)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timeline_body(timeline: Timeline) -> dict[str, Any]:
    """Points in time become seconds since the request was received."""
    points = {
        name: None if (point := getattr(timeline, name)) is None else point - timeline.received
        for name in ("dispatched", "first_token", "last_token")
    }
    rest = (name for name in timeline.__slots__ if name not in points and name != "received")
    return points | {name: getattr(timeline, name) for name in rest}


class CompletionFormat:
    """POST /v1/completions. With `echo` a choice's text begins with its prompt."""

    __slots__ = (
        "_envelope",
        "_head",
        "_hide_output",
        "_names",
        "_offsets",
        "_tokenizer",
        "extras",
    )

    def __init__(self, envelope: Envelope, tokenizer: Tokenizer, *, hide_output: bool = False) -> None:
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._names: TokenNames = IdNames() if envelope.tokens_as_ids else tokenizer
        self._hide_output = hide_output  # only the prompt is wanted
        self._head = _head(envelope, "text_completion")
        self.extras = envelope.logprobs or envelope.token_ids or hide_output
        self._offsets: dict[int, int] = {}  # choice index -> length of the token texts before

    def event(self, piece: Piece, tail: bytes) -> bytes:
        if piece.first or self.extras:
            envelope = self._envelope
            fields = self._choice(piece.choice, [piece], echo=envelope.echo and piece.first)
            if not (fields["text"] or piece.finish_reason or envelope.logprobs or envelope.token_ids):
                return b""
            return b"".join((self._head, b'"choices":[', _encode(fields), b"]", tail, b"}\n\n"))
        index, text, reason = piece.choice.index, piece.text, piece.finish_reason
        if not (text or reason):
            return b""
        before, after = self.around(index, tail, reason)
        return b"".join((before, _encode(text), after))

    def around(self, index: int, tail: bytes, reason: FinishReason | None = None) -> tuple[bytes, bytes]:
        before = b'%b"choices":[{"index":%d,"text":' % (self._head, index)
        return before, _after(b",", reason, tail)

    def last_event(self, tail: bytes) -> bytes:
        return b"".join((self._head, b'"choices":[]', tail, b"}\n\n"))

    def body(self, parts: Sequence[tuple[Choice, list[Piece]]], extra: dict[str, Any]) -> bytes:
        choices = [self._choice(choice, pieces, echo=self._envelope.echo) for choice, pieces in parts]
        return _body(self._envelope, "text_completion", choices, extra)

    def _choice(self, choice: Choice, pieces: Sequence[Piece], echo: bool) -> dict[str, Any]:
        envelope, hidden = self._envelope, self._hide_output
        text = "" if hidden else "".join(piece.text for piece in pieces)
        fields = {
            "index": choice.index,
            "text": (choice.prompt.text or "") + text if echo else text,
            "logprobs": self._logprobs(choice, [] if hidden else pieces, echo) if envelope.logprobs else None,
            "finish_reason": "length" if hidden else pieces[-1].finish_reason,
        }
        if envelope.prompt_logprobs and choice.stream is not None:
            fields["prompt_logprobs"] = prompt_logprobs(self._tokenizer, choice.stream.prompt_logprobs or [])
        if envelope.token_ids:
            fields["token_ids"] = [] if hidden else [token for piece in pieces for token in piece.token_ids]
            fields["prompt_token_ids"] = choice.prompt.token_ids if pieces[0].first else None
        return fields

    def _logprobs(self, choice: Choice, pieces: Sequence[Piece], echo: bool) -> dict[str, Any]:
        entries: list[Any] = [entry for piece in pieces for entry in piece.logprobs]
        if echo and choice.stream is not None:
            entries = [choice.prompt.token_ids[0], *(choice.stream.prompt_logprobs or []), *entries]
        offset = self._offsets.get(choice.index, 0)
        fields, self._offsets[choice.index] = completion_logprobs(self._names, entries, offset)
        return fields


class ChatFormat:
    """POST /v1/chat/completions. A choice's first event says the role, its last the reason it ended."""

    __slots__ = ("_envelope", "_head", "_names", "_tokenizer", "extras")

    def __init__(self, envelope: Envelope, tokenizer: Tokenizer) -> None:
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._names: TokenNames = IdNames() if envelope.tokens_as_ids else tokenizer
        self._head = _head(envelope, "chat.completion.chunk")
        self.extras = envelope.logprobs or envelope.token_ids

    def event(self, piece: Piece, tail: bytes) -> bytes:
        head, index = self._head, piece.choice.index
        if not (piece.first or self.extras or piece.finish_reason):
            before, after = self.around(index, tail)
            return b"".join((before, _encode(piece.text), after)) if piece.text else b""
        events = []
        if piece.first:
            delta = b'{"role":"assistant","content":""}'
            events.append(b'%s"choices":[{"index":%d,"delta":%s,%s' % (head, index, delta, _OPEN))
            if self._envelope.token_ids:
                events.append(b',"prompt_token_ids":%s' % _encode(piece.choice.prompt.token_ids))
            events.append(b"%s}\n\n" % tail)
        if piece.text or (self.extras and piece.token_ids):
            end = self._end(piece) if self.extras else _OPEN
            text = _encode(piece.text)
            events.append(b'%s"choices":[{"index":%d,"delta":{"content":%s},%s%s}\n\n' % (head, index, text, end, tail))
        if piece.finish_reason is not None:
            end = b'"logprobs":null,"finish_reason":"%s"}]' % piece.finish_reason.encode()
            events.append(b'%s"choices":[{"index":%d,"delta":{},%s%s}\n\n' % (head, index, end, tail))
        return events[0] if len(events) == 1 else b"".join(events)

    def around(self, index: int, tail: bytes) -> tuple[bytes, bytes]:
        before = b'%b"choices":[{"index":%d,"delta":{"content":' % (self._head, index)
        return before, _after(b"},", None, tail)

    def last_event(self, tail: bytes) -> bytes:
        return b"".join((self._head, b'"choices":[]', tail, b"}\n\n"))

    def body(self, parts: Sequence[tuple[Choice, list[Piece]]], extra: dict[str, Any]) -> bytes:
        envelope, choices = self._envelope, []
        for choice, pieces in parts:
            fields: dict[str, Any] = {
                "index": choice.index,
                "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None},
                "logprobs": None,
                "finish_reason": pieces[-1].finish_reason,
            }
            if envelope.logprobs:
                entries = [entry for piece in pieces for entry in piece.logprobs]
                fields["logprobs"] = chat_logprobs(self._names, entries)
            if envelope.token_ids:
                fields["token_ids"] = [token for piece in pieces for token in piece.token_ids]
            choices.append(fields)
        first = parts[0][0]
        if envelope.token_ids:
            extra = {"prompt_token_ids": first.prompt.token_ids, **extra}
        if envelope.prompt_logprobs and first.stream is not None:
            extra = {"prompt_logprobs": prompt_logprobs(self._tokenizer, first.stream.prompt_logprobs or []), **extra}
        return _body(envelope, "chat.completion", choices, extra)

    def _end(self, piece: Piece) -> bytes:
        scores = b"null"
        if self._envelope.logprobs:
            scores = _encode(chat_logprobs(self._names, piece.logprobs))
        ids = b',"token_ids":%s' % _encode(piece.token_ids) if self._envelope.token_ids else b""
        return b'"logprobs":%s,"finish_reason":null%s}]' % (scores, ids)


_OPEN = b'"logprobs":null,"finish_reason":null}]'


@lru_cache(64)  # all streams share one
def _after(closing: bytes, reason: FinishReason | None, tail: bytes) -> bytes:
    """What an event has after its text."""
    return b'%b"logprobs":null,"finish_reason":%b}]%b}\n\n' % (closing, _encode(reason), tail)


def _head(envelope: Envelope, kind: str) -> bytes:
    fields = {"id": envelope.id, "object": kind, "created": envelope.created, "model": envelope.model}
    return b"data: " + _encode(fields)[:-1] + b","


def _body(envelope: Envelope, kind: str, choices: list[dict[str, Any]], extra: dict[str, Any]) -> bytes:
    head = {"id": envelope.id, "object": kind, "created": envelope.created, "model": envelope.model}
    return _encode({**head, "choices": choices, **extra})
