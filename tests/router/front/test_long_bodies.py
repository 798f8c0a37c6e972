"""Long bodies keep nobody waiting: their work is done in threads, and what no model could take is refused unread."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

import router.http
import router.prompts
from engine.request import FinishReason
from router.chat_template import ChatTemplates
from router.generation import Delta
from router.http import MAX_INLINE_BYTES
from router.prefix_ids import PrefixIds
from router.schema import MAX_DEPTH, MAX_NESTED_VALUES
from router.tokenizer import Tokenizer
from tests.router.front.fakes import running, saying

BIG = 1 << 17  # a context that the longest prompts here fit into
PADDING = "x" * MAX_INLINE_BYTES


class Recorder:
    """Lets functions do what they do, and remembers by name which ran on the event loop, and which in a thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here: set[str] = set()
        self.in_threads: set[str] = set()
        self._loop = threading.get_ident()
        self._monkeypatch = monkeypatch

    def watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            (self.here if threading.get_ident() == self._loop else self.in_threads).add(name)
            return original(*args, **kwargs)

        self._monkeypatch.setattr(owner, name, watched)


@pytest.fixture
async def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder(monkeypatch)
    for owner, name in (
        (router.http, "decode_body"),
        (ChatTemplates, "render"),
        (PrefixIds, "find"),
        (PrefixIds, "keep"),
        (Tokenizer, "encode"),
        (Tokenizer, "decode"),
        (Tokenizer, "token_string"),
        (router.prompts, "check_ids"),
    ):
        recorder.watch(owner, name)
    return recorder


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def calling(*arguments: str) -> dict[str, Any]:
    calls = [{"function": {"name": "f", "arguments": text}} for text in arguments]
    return {"messages": [{"role": "assistant", "content": "x", "tool_calls": calls}]}


CASES: list[tuple[str, dict[str, Any], dict[str, Any], set[str]]] = [
    (
        "/v1/chat/completions",
        chat("hi"),
        chat("hi", user=PADDING),
        {"decode_body", "render", "find", "keep"},
    ),
    ("/v1/completions", {"prompt": "hi"}, {"prompt": "hi", "user": PADDING}, {"decode_body", "encode"}),
    (
        "/v1/completions",
        {"prompt": [5, 6], "echo": True},
        {"prompt": [5] * MAX_INLINE_BYTES, "echo": True},
        {"decode_body", "check_ids", "decode"},
    ),
    (
        "/tokenize",
        {"prompt": "hi", "return_token_strs": True},
        {"prompt": PADDING + "x", "return_token_strs": True},
        {"decode_body", "encode", "token_string"},
    ),
    ("/detokenize", {"tokens": [5]}, {"tokens": [5] * MAX_INLINE_BYTES}, {"decode_body", "decode"}),
]


@pytest.mark.parametrize(("path", "short", "long", "steps"), CASES)
async def test_a_short_body_is_served_on_the_loop_and_a_long_one_in_threads(
    tokenizer: Tokenizer,
    recorder: Recorder,
    path: str,
    short: dict[str, Any],
    long: dict[str, Any],
    steps: set[str],
) -> None:
    end = [Delta([5], [], FinishReason.LENGTH)]
    async with running(tokenizer, lambda _request: end, max_model_len=BIG) as server:
        recorder.here.clear()
        assert (await server.post(path, short))[0] == 200
        assert steps <= recorder.here
        assert not recorder.in_threads
        recorder.here.clear()
        assert (await server.post(path, long))[0] == 200
    assert steps <= recorder.in_threads
    assert not steps & recorder.here


@pytest.mark.parametrize(
    "body",
    [
        chat("x" * 10_000, user=PADDING),
        chat("x", tools=[{"k" * 10_000: 1}], user=PADDING),
        chat("x", tools=[{"u": [1] * 10_000}], user=PADDING),
        {"messages": [{"role": "user", "content": ""}] * 3000},
    ],
)
async def test_a_conversation_that_no_context_could_hold_is_refused_before_it_is_rendered(
    tokenizer: Tokenizer, recorder: Recorder, body: dict[str, Any]
) -> None:
    async with running(tokenizer, saying(tokenizer, "a")) as server:
        status, _, answer = await server.post("/v1/chat/completions", body)
        assert (await server.post("/tokenize", body))[0] == 400
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["param"] == "messages"
    assert "render" not in recorder.here | recorder.in_threads


async def test_ids_that_no_context_could_hold_are_refused_unread(tokenizer: Tokenizer, recorder: Recorder) -> None:
    async with running(tokenizer, saying(tokenizer, "a")) as server:
        for prompt in ([5] * 10_000, [[5] * 10_000]):
            _, _, answer = await server.post("/v1/completions", {"prompt": prompt, "truncate_prompt_tokens": 1})
            assert answer["error"]["code"] == "context_length_exceeded"
            assert "10000 token ids are too many: 256 fit, more than 8192 are not read" in answer["error"]["message"]
    assert "check_ids" not in recorder.here | recorder.in_threads


async def test_too_many_messages_are_refused_whatever_the_context_holds(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "a"), max_model_len=BIG) as server:
        _, _, answer = await server.post("/v1/chat/completions", {"messages": chat("hi")["messages"] * 4097})
    assert answer["error"]["message"] == "messages must hold 1 to 4096 messages, not 4097"


@pytest.mark.parametrize("num_texts", [1, 2])
async def test_arguments_of_tool_calls_hold_together_what_a_body_may_hold(tokenizer: Tokenizer, num_texts: int) -> None:
    def nested(depth: int) -> str:
        return '{"a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}"

    def wide(num_values: int) -> str:
        return '{"a":[' + "[]," * (num_values - 3) + "[]]}"

    share = MAX_NESTED_VALUES // num_texts
    async with running(tokenizer, saying(tokenizer, "a"), max_model_len=BIG) as server:
        path = "/v1/chat/completions"
        assert (await server.post(path, calling(*[nested(MAX_DEPTH)] * num_texts)))[0] == 200
        assert (await server.post(path, calling(*[wide(share)] * num_texts)))[0] == 200
        deep = await server.post(path, calling("{}", nested(MAX_DEPTH + 1)))
        many = await server.post(path, calling(*[wide(share + 1)] * num_texts))
    assert [answer[0] for answer in (deep, many)] == [400, 400]
    errors = [answer[2]["error"] for answer in (deep, many)]
    assert [error["param"] for error in errors] == ["messages", "messages"]
    assert errors[0]["message"] == "arguments of tool calls must not be nested deeper than 64 levels"
    assert errors[1]["message"].startswith("arguments of tool calls must hold at most 262144 arrays and objects")
