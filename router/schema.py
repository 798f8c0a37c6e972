"""Request bodies of the public API: types, decoding, and the checks that need nothing but the body.

The vLLM request is the superset that clients send. Fields that nobody knows are ignored; fields whose silent loss
would change the answer (guided decoding, tool parsing, transfer parameters) are declared and refused.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec

from engine.errors import InvalidRequest

MAX_DEPTH = 64
MAX_NESTED_VALUES = 1 << 18
MAX_STRINGS = 1 << 19  # names among them: parsing the double takes half a second in one go
PIECE_BYTES = 1 << 18  # looked through in a millisecond

_PATH = re.compile(r"`(?:key|value)?`?[^`]*\$\.?([A-Za-z_][\w]*)?([^`]*)`$")
_NO_MARKS = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_AS_SQUARE = bytes.maketrans(b"{}", b"[]")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(msgspec.Struct, kw_only=True):
    """What both completion APIs take. None is "not given" everywhere."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int | None = None
    best_of: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None

    response_format: Any = None
    # Refused unless empty: see REFUSED.
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    use_beam_search: Any = None
    logits_processors: Any = None
    kv_transfer_params: Any = None
    disaggregated_params: Any = None


class CompletionBody(SamplingFields, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: Any = None
    prompt_embeds: Any = None


class ChatBody(SamplingFields, kw_only=True):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    echo: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: list[str] | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


_GUIDED = "guided decoding is not supported"
_INTERNAL = "is an internal field and not accepted from clients"
REFUSED: Mapping[str, str] = {
    "structured_outputs": _GUIDED,
    "guided_json": _GUIDED,
    "guided_regex": _GUIDED,
    "guided_choice": _GUIDED,
    "guided_grammar": _GUIDED,
    "bad_words": "is not supported",
    "allowed_token_ids": "is not supported",
    "use_beam_search": "is not supported",
    "logits_processors": "is not supported",
    "prompt_embeds": "is not supported",
    "suffix": "is not supported: this model cannot insert text before a suffix",
    "documents": "is not supported",
    "echo": "is not supported for chat",
    "functions": "is not supported; use tools",
    "function_call": "is not supported; use tool_choice",
    "audio": "is not supported",
    "chat_template": "is not accepted from clients",
    "kv_transfer_params": _INTERNAL,
    "disaggregated_params": _INTERNAL,
}

Body = TypeVar("Body")


def decode_body(body: bytes, kind: type[Body]) -> Body:
    """Parse a request body. Raises InvalidRequest that names the field at fault."""
    try:
        str(body, "utf-8")
    except UnicodeDecodeError as error:
        message = f"the body is not valid UTF-8 (byte {error.start})"
        raise InvalidRequest(message, code="invalid_json") from None
    check_nesting(body)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None


def refuse_unsupported(body: SamplingFields | TokenizeBody) -> None:
    """Raise InvalidRequest for the first field that asks for what is not there."""
    for name in _refused_fields(type(body)):
        if getattr(body, name):
            reason = REFUSED[name]
            message = f"{name}: {reason}" if reason is _GUIDED else f"{name} {reason}"
            raise InvalidRequest(message, param=name, code="unsupported_parameter")


@cache
def _refused_fields(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    # `echo` is refused where it is untyped: in chat.
    fields = (name for name in kind.__struct_fields__ if name in REFUSED)
    return tuple(name for name in fields if name != "echo" or kind is not CompletionBody)


def check_nesting(text: bytes, what: str = "the body", param: str | None = None) -> None:
    """Raise InvalidRequest when JSON has values nested deeper than MAX_DEPTH, or too many, in fields known or not.

    Strings are cut out, then innermost pairs of brackets removed again and again, all in time linear in the text, and
    in short steps: between them other threads have their turn.
    """
    few_strings = len(text) <= 2 * MAX_STRINGS or text.count(b'"') <= 2 * MAX_STRINGS
    if few_strings and text.count(b"[") + text.count(b"{") <= MAX_DEPTH:
        return
    found, num_brackets, num_quotes = [], 0, 0
    for brackets, quotes in _outside_strings(text):
        found.append(brackets)
        num_brackets += len(brackets)
        num_quotes += quotes
        if num_brackets > 2 * MAX_NESTED_VALUES or num_quotes > 2 * MAX_STRINGS:
            message = f"{what} must hold at most {MAX_NESTED_VALUES} arrays and objects, and {MAX_STRINGS} strings"
            raise InvalidRequest(message, param=param, code="invalid_json")
    left = b"".join(found)
    for _ in range(MAX_DEPTH):
        if b"[" * (MAX_DEPTH + 1) in left:
            break
        shorter = left.replace(b"[]", b"")
        if len(shorter) == len(left):
            return  # nothing left, or not balanced, which the parser reports
        left = shorter
    if left:
        message = f"{what} must not be nested deeper than {MAX_DEPTH} levels"
        raise InvalidRequest(message, param=param, code="invalid_json")


def _outside_strings(text: bytes) -> Iterator[tuple[bytes, int]]:
    """Of each piece of a JSON text, the brackets outside strings, all made square, and how many quotes it has."""
    escape, in_string = b"", False
    for start in range(0, len(text), PIECE_BYTES):
        piece = (escape + text[start : start + PIECE_BYTES]).replace(b"\\\\", b"").replace(b'\\"', b"")
        escape = b"\\" if piece.endswith(b"\\") else b""  # of what the next piece begins with
        marks = piece.translate(_AS_SQUARE, _NO_MARKS)
        # With nothing between them two quotes change nothing, whichever of them opens; each would cost an object.
        parts = marks.replace(b'""', b"").split(b'"')
        yield b"".join(parts[in_string::2]), marks.count(b'"')
        in_string ^= len(parts) % 2 == 0


def _wrong_field(message: str) -> InvalidRequest:
    """msgspec writes: Expected `int | null`, got `str` - at `$.messages[2].content`."""
    if missing := re.search(r"missing required field `(\w+)`", message):
        return InvalidRequest(f"{missing[1]} is required", param=missing[1], code="missing_required_parameter")
    place = _PATH.search(message)
    what = message.partition(" - at ")[0].replace(" | null", "").replace("`", "")
    param = f"{place[1]}{place[2]}" if place and place[1] else None
    return InvalidRequest(f"{param or 'body'}: {what}", param=param, code="invalid_type")
