"""Chat templates: a checkpoint's Jinja source turns messages into the text of a prompt, as `transformers` does.

Templates come with model files, so they are untrusted programs: they run in minijinja, which has no access to
Python objects' attributes, and on bounded fuel. A client never supplies one. Used by `router.tokenizer`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import minijinja

from engine.errors import InvalidRequest

FUEL = 5_000_000  # instructions of one rendering: over a thousand for each of 4096 messages
DEFAULT = "default"
TOOL_USE = "tool_use"

_GENERATION = re.compile(r"({%[-+]?\s*)(end)?generation(\s*[-+]?%})")
_CONTINUED = "CONTINUED_FINAL_MESSAGE "
_PARAM = "messages"


class _Refused(Exception):
    """The template called raise_exception."""


class ChatTemplates:
    """A checkpoint's templates by name. One that does not parse is known at load, and refused where it is used."""

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str], now: Callable[[], datetime]
    ) -> None:
        self._special_tokens = dict(special_tokens)
        self._sources = dict(sources)
        self.errors: dict[str, str] = {}  # template name -> why it does not parse
        self._environment = minijinja.Environment(trim_blocks=True, lstrip_blocks=True, fuel=FUEL, debug=False)
        self._environment.add_filter("tojson", _to_json)
        self._environment.add_global("raise_exception", _raise)
        self._environment.add_global("strftime_now", lambda form: now().strftime(form))
        for name, source in sources.items():
            try:
                self._environment.add_template(name, _GENERATION.sub(_as_condition, source))
            except minijinja.TemplateError as error:
                self.errors[name] = error.message

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises InvalidRequest when the template refuses these messages or cannot be used."""
        name = TOOL_USE if tools and TOOL_USE in self._sources else DEFAULT
        if name not in self._sources:
            raise InvalidRequest("the model has no chat template: use /v1/completions", param=_PARAM)
        if name in self.errors:
            raise InvalidRequest(
                f"the model's chat template {name!r} does not parse: {self.errors[name]}", param=_PARAM
            )
        if continue_final_message:
            messages = _marked(messages)
        try:
            text: str = self._environment.render_template(
                name,
                **{
                    **self._special_tokens,
                    **(kwargs or {}),
                    "messages": list(messages),
                    "tools": list(tools) if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                },
            )
        except Exception as error:  # the guard around code that comes with the checkpoint and runs on clients' input
            reason = error.message if isinstance(error, minijinja.TemplateError) else str(error)
            raise InvalidRequest(f"the model's chat template refused the messages: {reason}", param=_PARAM) from None
        return _cut_at_mark(text) if continue_final_message else text


def load_chat_templates(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Template sources by name; files of their own go before `settings` (tokenizer_config.json)."""
    found = settings.get("chat_template")
    if (legacy := path / "chat_template.json").is_file():
        found = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
    if isinstance(found, str):
        sources = {DEFAULT: found}
    elif isinstance(found, list):
        sources = {entry["name"]: entry["template"] for entry in found}
    else:
        sources = dict(found or {})
    if (single := path / "chat_template.jinja").is_file():
        sources[DEFAULT] = single.read_text(encoding="utf-8")
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        sources[file.stem] = file.read_text(encoding="utf-8")
    return sources


def _as_condition(tag: re.Match[str]) -> str:
    # The block marks the assistant's text for training; around it the output is the same.
    return f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    pair = (separators[0], separators[1]) if separators else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise _Refused(message)


def _marked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    final = messages[-1]
    if not isinstance(final.get("content"), str):
        raise InvalidRequest("continue_final_message needs a final message with text", param="continue_final_message")
    return [*messages[:-1], {**final, "content": final["content"] + _CONTINUED}]


def _cut_at_mark(text: str) -> str:
    place = text.rfind(_CONTINUED.strip())
    if place < 0:
        raise InvalidRequest("the model's chat template drops the final message", param="continue_final_message")
    # A template that trims messages has trimmed the mark's own space; then the message's end was to be trimmed too.
    return text[:place] if text.startswith(_CONTINUED, place) else text[:place].rstrip()
