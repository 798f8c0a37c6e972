"""Ids and chat prompts equal those of transformers."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.errors import InvalidRequest
from router.chat_template import ChatTemplates
from router.tokenizer import load_tokenizer
from tests.checkpoints import make_tokenizer

TEXTS = [
    "The river",
    " and  the sea\n\n",
    "Grüße 🙂 你好",
    "<|user|>\nhi<|end|>",
    "a" * 500,
    "def f(x): return {'a': 1}",
]
CHAT = [
    {"role": "system", "content": "You are <b>terse</b>."},
    {"role": "user", "content": "What's the weather in Köln?  "},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "n": 1}}}],
    },
    {"role": "tool", "content": '{"t": 3}'},
    {"role": "assistant", "content": "Cold"},
]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "It's <hot>", "parameters": {"b": [1, None]}}}
]

TEMPLATES = {
    "chatml": (
        "{%- for message in messages %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "tools": (
        "{{ bos_token }}{% set ns = namespace(last=0) %}\n"
        "{% if tools is not none %}\n"
        "    {% for tool in tools %}\n{{ tool | tojson(indent=2) }}\n{% endfor %}{{ tools | tojson }}\n"
        "{% endif %}\n"
        "{% for message in messages[::-1] %}{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}"
        "{% break %}{% endif %}{% endfor %}{{ ns.last }}\n"
        "{% for message in messages %}\n"
        "  {%- if message.tool_calls is defined and message.tool_calls %}"
        "{% for call in message.tool_calls %}{{ call.function.name }}:{{ call.function.arguments | tojson }}"
        "{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }};{% endfor %}{% endfor %}\n"
        "  {%- elif message['content'] is string %}{{ message['content'].strip().split('?')[0] }}|"
        "{{ message.get('name', 'nobody') }}{% endif %}\n"
        "{% endfor %}"
        "{% macro end(text, times=2) %}{{ text * times }}{% endmacro %}{{ end('=') }}{{ eos_token }}"
    ),
    "generation": (
        "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content }}{% endgeneration %}{%- else -%}{{ message.content }}{% endif %}\n"
        "{% endfor %}"
    ),
    "kwargs": (
        "{% if enable_thinking is defined and enable_thinking is false %}quiet"
        "{% else %}{{ messages|length }}{% endif %}"
    ),
}


def rewrite(checkpoint: Path, **settings: Any) -> None:
    file = checkpoint / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bos_token": "<|system|>", "add_bos_token": True},
        {"bos_token": "<|system|>", "add_bos_token": True, "add_eos_token": True},
        {"bos_token": "<|begin|>"},  # not in tokenizer.json: gets an id of its own
        {"unk_token": "e", "added_tokens_decoder": {"2": {"content": "<|system|>", "special": False}}},
        {"additional_special_tokens": ["<|new|>"]},
    ],
)
def test_ids_equal_those_of_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_tokenizer(tmp_path, 512)
    rewrite(tmp_path, **changes)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "<|new|>x", "<|begin|>x"]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompted", [True, False])
def test_chat_prompts_equal_those_of_transformers(tmp_path: Path, name: str, prompted: bool) -> None:
    make_tokenizer(tmp_path, 512)
    rewrite(tmp_path, chat_template=TEMPLATES[name], bos_token="<|begin|>")
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for tools in (None, TOOLS):
        for kwargs in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            expected = theirs.apply_chat_template(
                CHAT, tools=tools, tokenize=False, add_generation_prompt=prompted, **kwargs
            )
            text = ours.chat.render(CHAT, tools=tools, add_generation_prompt=prompted, kwargs=kwargs)
            assert text == expected


@pytest.mark.parametrize("name", ["chatml", "generation"])
@pytest.mark.parametrize("content", ["Cold", "Cold, ", "  "])
def test_a_final_message_is_continued_as_by_transformers(tmp_path: Path, name: str, content: str) -> None:
    make_tokenizer(tmp_path, 512)
    rewrite(tmp_path, chat_template=TEMPLATES[name])
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [*CHAT[:2], {"role": "assistant", "content": content}]
    expected = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert ours.chat.render(chat, add_generation_prompt=False, continue_final_message=True) == expected


def test_templates_are_found_in_every_place(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 512)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    rewrite(tmp_path, chat_template=named)
    chat = load_tokenizer(tmp_path).chat
    assert chat.render(CHAT) == "plain"
    assert chat.render(CHAT, tools=TOOLS) == "with tools"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert load_tokenizer(tmp_path).chat.render(CHAT) == "from json"
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert load_tokenizer(tmp_path).chat.render(CHAT) == "from a file"


def render(source: str, **kwargs: Any) -> str:
    templates = ChatTemplates({"default": source}, {}, lambda: datetime(2026, 11, 23))
    return templates.render([{"role": "user", "content": "x"}], kwargs=kwargs)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}", "fuel"),
        ("{{ messages.foo.bar }}", "undefined"),
        ("{% if %}", "does not parse"),
        ("{{ strftime_now(3) }}", "refused"),
    ],
)
def test_a_template_that_fails_is_the_requests_error(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as error:
        render(source)
    assert error.value.param == "messages"


def test_a_template_reaches_no_python_objects() -> None:
    for source in ("{{ messages.__class__ }}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception.__globals__ }}"):
        try:
            text = render(source)
        except InvalidRequest:
            continue
        assert text == ""


def test_dates_come_from_the_given_clock() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "23 Nov 2026"


def test_a_checkpoint_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_every_token_has_the_bytes_it_adds_to_a_text(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    text = "Grüße 🙂 <|user|>"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(511_000) == b""
