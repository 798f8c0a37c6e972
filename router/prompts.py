"""From a request's text, ids or messages to checked prompt token ids.

Long texts are tokenized in threads, never on the event loop, and of a `long` body all else is done there too; texts,
ids and conversations too long for any prompt are refused unread.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from engine.errors import InvalidRequest
from router.generation import ModelCard
from router.prefix_ids import PrefixIds
from router.schema import ChatBody, TokenizeBody, check_nesting
from router.threads import Threads
from router.tokenizer import Tokenizer

MAX_PROMPTS = 128
MAX_MESSAGES = 4096
MAX_CHARS_PER_TOKEN = 32  # more characters, or ids, than this for each token of the context are refused unread
MAX_INLINE_CHARS = 4096  # tokenized on the loop: 0.1 ms, four times that by the slow encoder; a thread costs 0.2 ms
MAX_TEMPLATE_STRING = 1024
MAX_TEMPLATE_KWARGS = 64
MAX_TEMPLATE_NAME = 64
RESERVED_KWARGS = frozenset(  # what the renderer gives a template, and what would go around it
    {
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "continue_final_message",
        "documents",
        "eos_token",
        "messages",
        "pad_token",
        "raise_exception",
        "strftime_now",
        "tokenize",
        "tools",
        "unk_token",
    }
)
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

_Called = tuple[dict[str, Any], str]  # a function that a message called, and where that is


class Prompt(msgspec.Struct, frozen=True, gc=False):
    token_ids: tuple[int, ...]
    text: str | None  # as the client wrote it; None where it wrote ids, or not all of it is left


class PromptEncoder:
    """Raises InvalidRequest for what cannot be a prompt; `param` says where it was."""

    def __init__(self, tokenizer: Tokenizer, card: ModelCard, threads: Threads) -> None:
        self._tokenizer = tokenizer
        self._card = card
        self._threads = threads
        self._max_chars = card.max_model_len * MAX_CHARS_PER_TOKEN
        self._prefixes = PrefixIds(tokenizer)

    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        self._check_length(text, param)
        if len(text) <= MAX_INLINE_CHARS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await self._threads.run(partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens))

    async def prompts(
        self, prompt: str | Sequence[str | int | list[int]], *, add_special_tokens: bool, long: bool
    ) -> list[Prompt]:
        """The prompts of a completion request: one text, one list of ids, or a list of texts or lists of ids."""
        find = partial(self._entries, prompt)
        entries = await self._threads.run(find) if long else find()
        long = long or sum(len(entry) for entry in entries if isinstance(entry, str)) > MAX_INLINE_CHARS
        makers = [partial(self._prompt, entry, add_special_tokens) for entry in entries]
        return [await self._threads.run(make) if long else make() for make in makers]

    async def chat(
        self, fields: ChatBody | TokenizeBody, *, add_special_tokens: bool, long: bool, owner: str = ""
    ) -> Prompt:
        """The prompt of a conversation, through the model's chat template. Owners share nothing that can be timed."""

        def begin() -> tuple[str, Sequence[int], str]:
            if long:  # a short body cannot hold too much
                self._check_conversation(fields)
            text = _render(self._tokenizer, fields)
            self._check_length(text, "messages")
            known, rest = ((), text) if add_special_tokens else self._prefixes.find(owner, text)
            return text, known, rest

        def end() -> Prompt:
            ids = (*known, *new)
            if not ids:
                raise InvalidRequest("messages make an empty prompt", param="messages")
            if not add_special_tokens:
                self._prefixes.keep(owner, text, ids)
            return Prompt(ids, text)

        text, known, rest = await self._threads.run(begin) if long else begin()
        new = await self.encode(rest, add_special_tokens=add_special_tokens, param="messages")
        return await self._threads.run(end) if long else end()

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, long: bool) -> str:
        decode = partial(self._tokenizer.decode, token_ids, skip_special_tokens=skip_special_tokens)
        return await self._threads.run(decode) if long else decode()

    def _check_length(self, prompt: str | Sequence[Any], param: str) -> None:
        if len(prompt) > self._max_chars:
            message = f"{len(prompt)} characters are more than any prompt of this model can hold ({self._max_chars})"
            if not isinstance(prompt, str):
                fit = self._card.max_model_len
                message = f"{len(prompt)} token ids are too many: {fit} fit, more than {self._max_chars} are not read"
            raise InvalidRequest(message, param=param, code="context_length_exceeded")

    def _check_conversation(self, fields: ChatBody | TokenizeBody) -> None:
        if _is_larger([fields.messages, fields.tools], self._max_chars):
            message = f"messages and tools hold more than any prompt of this model can ({self._max_chars} characters)"
            raise InvalidRequest(message, param="messages", code="context_length_exceeded")

    def _entries(self, prompt: str | Sequence[str | int | list[int]]) -> Sequence[str | int | list[int]]:
        if isinstance(prompt, str):
            entries: Sequence[str | int | list[int]] = [prompt]
        elif prompt and isinstance(prompt[0], int):
            self._check_length(prompt, "prompt")
            entries = [_only_ids(prompt)]
        else:
            entries = prompt
        if not 1 <= len(entries) <= MAX_PROMPTS:
            raise InvalidRequest(f"prompt must hold 1 to {MAX_PROMPTS} prompts, not {len(entries)}", param="prompt")
        if len({type(entry) for entry in entries}) > 1:
            raise InvalidRequest("prompt must hold texts or lists of token ids, not both", param="prompt")
        return entries

    def _prompt(self, entry: str | int | list[int], special: bool) -> Prompt:
        assert not isinstance(entry, int), entry
        if not entry:
            raise InvalidRequest("prompt must not be empty", param="prompt", code="empty_prompt")
        self._check_length(entry, "prompt")
        if isinstance(entry, str):
            return Prompt(tuple(self._tokenizer.encode(entry, add_special_tokens=special)), entry)
        check_ids(entry, self._card.vocab_size, "prompt")
        return Prompt(tuple(entry), None)


def render_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    kwargs: dict[str, Any] | None = None,
) -> str:
    """Checked messages through the model's chat template. Raises InvalidRequest naming the field."""
    if not 1 <= len(messages) <= MAX_MESSAGES:
        message = f"messages must hold 1 to {MAX_MESSAGES} messages, not {len(messages)}"
        raise InvalidRequest(message, param="messages")
    if tools is not None and not tools:
        raise InvalidRequest("tools must not be an empty list", param="tools")
    called: list[_Called] = []
    known = [_template_message(message, place, called) for place, message in enumerate(messages)]
    if called:
        _parse_arguments(called)
    return tokenizer.chat.render(
        known,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        kwargs=_template_kwargs(kwargs),
    )


def _render(tokenizer: Tokenizer, fields: ChatBody | TokenizeBody) -> str:
    continues = bool(fields.continue_final_message)
    if continues and fields.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt exclude each other"
        raise InvalidRequest(message, param="continue_final_message")
    return render_messages(
        tokenizer,
        fields.messages or [],
        tools=fields.tools,
        add_generation_prompt=not continues and fields.add_generation_prompt is not False,
        continue_final_message=continues,
        kwargs=fields.chat_template_kwargs,
    )


def check_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise InvalidRequest(f"{param} holds a token id outside 0..{vocab_size - 1}", param=param)


def truncated(prompt: Prompt, keep: int, room: int) -> Prompt:
    """The last `keep` ids (-1: as many as there is `room` for)."""
    keep = room if keep == -1 else keep
    if keep < 1:
        raise InvalidRequest("truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens")
    ids = prompt.token_ids[-keep:]
    return prompt if len(ids) == len(prompt.token_ids) else Prompt(ids, None)


def _only_ids(entries: Sequence[str | int | list[int]]) -> list[int]:
    ids = [entry for entry in entries if isinstance(entry, int)]
    if len(ids) != len(entries):
        raise InvalidRequest("prompt mixes token ids with something else", param="prompt")
    return ids


def _template_message(message: Mapping[str, Any], place: int, called: list[_Called]) -> dict[str, Any]:
    """A checked message as templates know it: text contents, `system` for `developer`. The functions that it called
    are added to `called`, their arguments not parsed yet."""
    where = f"messages[{place}]"
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(sorted(ROLES))}", param=f"{where}.role")
    content = message.get("content")
    if content is None and role != "assistant":
        raise InvalidRequest(f"{where}.content is required", param=f"{where}.content")
    known: dict[str, Any] = {
        "role": "system" if role == "developer" else role,
        "content": _text(content, f"{where}.content"),
    }
    if message.get("tool_calls"):
        known["tool_calls"] = calls = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
        called += [(call["function"], f"{where}.tool_calls") for call in calls]
    return {**message, **known}


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a text or a list of parts", param=where)
    texts = []
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}[{place}] must be a part of type text", param=f"{where}[{place}]")
        texts.append(part["text"])
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
    ):
        raise InvalidRequest(f"{where} must be a list of calls, each with a function", param=where)
    return [{**call, "function": {**call["function"]}} for call in calls]


def _parse_arguments(called: Sequence[_Called]) -> None:
    """Clients send a call's arguments as JSON text; templates expect the object.

    No text is parsed that is deeper than a body may be, and all of them together hold no more than a body may.
    """
    texts = [text for function, _ in called if isinstance(text := function.get("arguments"), str)]
    check_nesting(",".join(texts).encode("utf-8", "replace"), "arguments of tool calls", "messages")
    for function, where in called:
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments else {}
            except ValueError:
                raise InvalidRequest(f"{where}: arguments is not valid JSON", param=where) from None
        if arguments is not None and not isinstance(arguments, dict):
            raise InvalidRequest(f"{where}: arguments must be a JSON object", param=where)
        function["arguments"] = arguments


def _is_larger(value: Any, limit: int) -> bool:
    """Whether the texts and names in a value, with one for every other value, are more than `limit` characters."""
    size, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            size += sum(map(len, value))
            value = value.values()
        elif not isinstance(value, str | list):
            continue
        size += len(value)
        if size > limit:
            return True
        if not isinstance(value, str):
            waiting.extend(value)
    return False


def _template_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    param = "chat_template_kwargs"
    if len(kwargs or {}) > MAX_TEMPLATE_KWARGS:
        raise InvalidRequest(f"{param} may hold at most {MAX_TEMPLATE_KWARGS} values", param=param)
    for name, value in (kwargs or {}).items():
        if name in RESERVED_KWARGS or len(name) > MAX_TEMPLATE_NAME or not name.isidentifier():
            raise InvalidRequest(f"{param}.{name[:MAX_TEMPLATE_NAME]} is not allowed", param=param)
        if not isinstance(value, str | int | float | None) or len(str(value)) > MAX_TEMPLATE_STRING:
            raise InvalidRequest(f"{param}.{name} must be a number, a truth value or a short text", param=param)
    return kwargs or {}
