"""From token ids to text, piece by piece: incremental decoding, and stop strings found in the decoded text.

Used by the HTTP handlers and by the Python API; knows nothing of HTTP. Invariants: what a decoder returned in all,
`finish` included, is what decoding prompt and output in one go adds to the decoded prompt, unless the prompt is of ids
that end in bytes, which no output is joined with; text once returned is never taken back; each token costs constant
time. Two kinds of tokenizers are decoded, as their tokenizer.json says: byte-level BPE, and SentencePiece-like with
byte fallback.
"""

import re
from codecs import utf_8_decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.request import FinishReason, SamplingParams

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class DecoderRules:
    """How token strings become text. `space_marker` None: the byte-level alphabet."""

    space_marker: str | None = None
    byte_fallback: bool = False
    num_stripped: int = 0  # spaces dropped from the beginning of a text


class Decoder(Protocol):
    """Turns one sequence of token ids into text."""

    @property
    def at_rest(self) -> bool:
        """Whether it holds nothing: what the next token adds then depends on it alone."""
        ...

    @property
    def pieces(self) -> object:
        """Of what each token is; the same object where the same tokens are the same."""
        ...

    def push(self, token_ids: Sequence[int]) -> str: ...

    def push_token(self, token_id: int) -> str:
        """`push` of one."""
        ...

    def finish(self) -> str: ...


class Detokenizer(Protocol):
    """What TextStream needs of a tokenizer."""

    def decoder(self, *, skip_special_tokens: bool, prompt: Sequence[int] = ()) -> Decoder:
        """A fresh decoder of what follows `prompt`."""
        ...


def parse_rules(decoder: Mapping[str, Any] | None) -> DecoderRules:
    """Read the `decoder` entry of a tokenizer.json. Raises ValueError for a kind that is not supported."""
    steps = [decoder] if decoder and decoder["type"] != "Sequence" else (decoder or {}).get("decoders", [])
    kinds = [step["type"] for step in steps]
    if kinds and kinds[0] == "ByteLevel" and set(kinds[1:]) <= {"Fuse"}:
        return DecoderRules()
    replace = next((step for step in steps if step["type"] == "Replace"), None)
    strip = next((step for step in steps if step["type"] == "Strip"), None)
    in_order = [kind for kind in ("Replace", "ByteFallback", "Fuse", "Strip") if kind in kinds] == kinds
    if not in_order or replace is None or replace["content"] != " " or "String" not in replace["pattern"]:
        raise ValueError(f"the tokenizer's decoder ({', '.join(kinds) or 'none'}) is not supported")
    if strip is not None and (strip["content"] != " " or strip["stop"] or "Fuse" not in kinds):
        raise ValueError("the tokenizer's decoder strips in a way that is not supported")
    return DecoderRules(replace["pattern"]["String"], "ByteFallback" in kinds, strip["start"] if strip else 0)


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table), inverted."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


class ByteLevelPieces(dict[int, str | bytes]):
    """Token id -> its text, or its bytes where those are no text by themselves; filled on first use. Ids that show
    nothing map to no text."""

    def __init__(self, token_string: Callable[[int], str | None]) -> None:
        super().__init__()
        self._token_string = token_string
        self._alphabet = byte_alphabet()

    def __missing__(self, token_id: int) -> str | bytes:
        string = self._token_string(token_id) or ""
        try:
            data = bytes([self._alphabet[character] for character in string])
        except KeyError:  # an added token is not written in the alphabet
            data = string.encode()
        try:
            piece: str | bytes = data.decode()
        except UnicodeDecodeError:
            piece = data
        self[token_id] = piece
        return piece


class SentencePieces(dict[int, str | int]):
    """Token id -> its text, or the byte that it stands for; filled on first use."""

    def __init__(self, token_string: Callable[[int], str | None], rules: DecoderRules) -> None:
        super().__init__()
        self._token_string = token_string
        self._rules = rules

    def __missing__(self, token_id: int) -> str | int:
        string = self._token_string(token_id) or ""
        byte = _BYTE_TOKEN.fullmatch(string) if self._rules.byte_fallback else None
        marker = self._rules.space_marker
        assert marker is not None, self._rules
        piece = int(byte[1], 16) if byte else string.replace(marker, " ")
        self[token_id] = piece
        return piece


class ByteLevelDecoder:
    """Joins bytes, and holds back those of a character that is not whole yet."""

    __slots__ = ("_held", "pieces")

    def __init__(self, pieces: ByteLevelPieces) -> None:
        self.pieces = pieces
        self._held = b""

    @property
    def at_rest(self) -> bool:
        return not self._held

    def push_token(self, token_id: int) -> str:
        if not self._held:
            piece = self.pieces[token_id]
            if isinstance(piece, str):
                return piece
        return self.push((token_id,))

    def push(self, token_ids: Sequence[int]) -> str:
        every = [self.pieces[token_id] for token_id in token_ids]
        data = self._held + b"".join([piece.encode() if isinstance(piece, str) else piece for piece in every])
        text, num_used = utf_8_decode(data, "replace", False)
        self._held = data[num_used:]
        return text

    def finish(self) -> str:
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")


class SentencePieceDecoder:
    """Joins text; a run of byte tokens is held back until it ends.

    A run that is not UTF-8 becomes one U+FFFD for each byte, so nothing of it is known before its end.
    """

    __slots__ = ("_num_stripped", "_run", "pieces")

    def __init__(self, pieces: SentencePieces, num_stripped: int) -> None:
        self.pieces = pieces
        self._run = bytearray()
        self._num_stripped = num_stripped  # leading spaces still to drop

    @property
    def at_rest(self) -> bool:
        return not (self._run or self._num_stripped)

    def push_token(self, token_id: int) -> str:
        return self.push((token_id,))

    def push(self, token_ids: Sequence[int]) -> str:
        texts = []
        for token_id in token_ids:
            piece = self.pieces[token_id]
            if isinstance(piece, int):
                self._run.append(piece)
            elif piece:
                if self._run:
                    texts.append(self._end_run())
                texts.append(piece)
        return self._strip("".join(texts))

    def finish(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        while self._num_stripped and text:
            if text[0] != " ":
                self._num_stripped = 0
                break
            text = text[1:]
            self._num_stripped -= 1
        return text


class StopStrings:
    """Several strings to look for at once (the automaton of Aho and Corasick, 1975). Immutable: choices share one.

    A state is the longest beginning of any string that the text so far ends with; `depth` is its length.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.fail = [0]
        self.length = [0]  # of the longest string that ends in this state
        for stop in stops:
            self.length[self._insert(stop)] = len(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        while state and character not in self.next[state]:
            state = self.fail[state]
        return self.next[state].get(character, 0)

    def _insert(self, stop: str) -> int:
        state = 0
        for character in stop:
            if character not in self.next[state]:
                self.next[state][character] = len(self.next)
                self.next.append({})
                self.depth.append(self.depth[state] + 1)
                self.fail.append(0)
                self.length.append(0)
            state = self.next[state][character]
        return state

    def _link(self) -> None:
        queue = [(state, 0) for state in self.next[0].values()]
        for state, fail in queue:  # grows while read: breadth first
            self.fail[state] = fail
            self.length[state] = self.length[state] or self.length[fail]
            queue += [(child, self.step(fail, character)) for character, child in self.next[state].items()]


class StopMatcher:
    """Finds the first stop string in a text that comes in parts.

    The match that ends first wins; of those that end together the longest. Text is held back exactly as long as it
    may be the beginning of a match, so where the text was cut into parts makes no difference.
    """

    def __init__(self, stops: StopStrings, *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._state = 0
        self._held = ""

    def feed(self, text: str, *, heed: bool) -> tuple[str, bool]:
        """The text that is free to go, and whether it ends at a match. Without `heed` matches are passed over."""
        stops, held, buffer, state = self._stops, len(self._held), self._held + text, self._state
        for place, character in enumerate(text, start=held + 1):
            state = stops.step(state, character)
            if length := stops.length[state]:
                if heed:
                    return buffer[: place if self._include else place - length], True
                while state and not stops.next[state]:  # passed over, and not the beginning of anything longer
                    state = stops.fail[state]
        self._state = state
        free = len(buffer) - stops.depth[state]
        self._held = buffer[free:]
        return buffer[:free], False

    def finish(self) -> str:
        """What was held back for a match that will not come."""
        held, self._held, self._state = self._held, "", 0
        return held


class TextStream:
    """The text of one choice. Push tokens until `stopped` or the last; `num_tokens` counts those that were used.

    `prompt` is what the output continues; without it the output is decoded as a text of its own. `stops` are those
    of `params`, for callers with many streams of the same parameters. Where it does not look for stops, tokens that
    are not the last may also go to `decoder` itself, and then nobody counts them here.
    """

    __slots__ = ("_include", "_matcher", "_min_tokens", "decoder", "num_tokens", "stopped")

    def __init__(
        self,
        tokenizer: Detokenizer,
        params: SamplingParams,
        prompt: Sequence[int] = (),
        *,
        stops: StopStrings | None = None,
    ) -> None:
        self.stopped = False  # a stop string was found
        self.num_tokens = 0
        self.decoder = tokenizer.decoder(skip_special_tokens=params.skip_special_tokens, prompt=prompt)
        self._min_tokens = params.min_tokens
        self._include = params.include_stop_str_in_output
        self._matcher = None
        if params.stop:
            self._matcher = StopMatcher(stops or StopStrings(params.stop), include=self._include)

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> str:
        """The text that these tokens set free. With a finish reason they are the last, and `finish` is included.

        The token that made the engine stop is counted but not shown, unless stop strings are shown too. After a
        stop string was found, the rest is ignored.
        """
        if finish_reason is None:
            if self._matcher is not None:
                return self._push(token_ids)
            self.num_tokens += len(token_ids)
            return self.decoder.push(token_ids)
        if finish_reason is FinishReason.STOP and not self._include and token_ids:
            text = self._push(token_ids[:-1])
            self.num_tokens += not self.stopped
        else:
            text = self._push(token_ids)
        return text + self.finish()

    @property
    def looks_for_stops(self) -> bool:
        return self._matcher is not None

    def finish(self) -> str:
        """What was held back. May find a stop string at the very end."""
        if self.stopped:
            return ""
        text = self.decoder.finish()
        if self._matcher is None:
            return text
        free, self.stopped = self._matcher.feed(text, heed=self.num_tokens > self._min_tokens)
        return free if self.stopped else free + self._matcher.finish()

    def _push(self, token_ids: Sequence[int]) -> str:
        if self._matcher is None:
            self.num_tokens += len(token_ids)
            return self.decoder.push(token_ids)
        texts = []
        for token_id in token_ids:
            if self.stopped:
                break
            self.num_tokens += 1
            heed = self.num_tokens > self._min_tokens
            text, self.stopped = self._matcher.feed(self.decoder.push_token(token_id), heed=heed)
            texts.append(text)
        return "".join(texts)
