"""Bad input gets a 4xx that names the field, and the next request is served as if nothing had been."""

import asyncio
import gc
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.exchange import CONNECTION
from router.generation import ModelCard
from router.http import Front, FrontConfig
from router.metrics import Metrics
from router.schema import MAX_DEPTH, ChatBody, CompletionBody
from router.server import ServerConfig
from router.tokenizer import Tokenizer
from tests.router.front.fakes import MODEL, FakeGenerator, Running, read_answer, running, saying, until

HI = [{"role": "user", "content": "hi"}]
NESTED = b'{"prompt":"x","unknown":' + b"[" * 100 + b"]" * 100 + b"}"

BAD_COMPLETIONS: list[tuple[Any, str | None]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [512]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": ["x"] * 129}, "prompt"),
    ({"prompt": "x " * 5000}, "prompt"),
    ({"prompt": "x " * 200}, "prompt"),
    ({"prompt": "x", "max_tokens": 256}, "prompt"),
    ({"prompt": "x", "max_tokens": 2**63}, "prompt"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": "9"}, "max_tokens"),
    ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": -1}, "n"),
    ({"prompt": "x", "n": 10**9}, "n"),
    ({"prompt": ["x"] * 100, "n": 100}, "n"),
    ({"prompt": "x", "best_of": 3}, "best_of"),
    ({"prompt": "x", "temperature": -0.1}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_p": 1.1}, "top_p"),
    ({"prompt": "x", "top_k": -2}, "top_k"),
    ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
    ({"prompt": "x", "seed": 2**65}, "seed"),
    ({"prompt": "x", "seed": True}, "seed"),
    ({"prompt": "x", "seed": 10**400}, "seed"),
    ({"prompt": "x", "n": 10**400}, "n"),
    ({"prompt": "x", "stop": ["a"] * 100_000}, "stop"),
    ({"prompt": "x", "stop": ["a" * 2000]}, "stop"),
    ({"prompt": "x", "stop": ["a" * 1000] * 9}, "stop"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "stop": [1]}, "stop[0]"),
    ({"prompt": "x", "stop_token_ids": [512]}, "stop_token_ids"),
    ({"prompt": "x", "logit_bias": {"512": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {str(i): 1 for i in range(20_000)}}, "logit_bias"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logprobs": -1}, "logprobs"),
    ({"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
    ({"prompt": "x", "cache_salt": "s" * 1025}, "cache_salt"),
    ({"prompt": "x", "priority": 2**40}, "priority"),
    ({"prompt": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"prompt": "x", "kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ({"prompt": "x", "disaggregated_params": {"a": 1}}, "disaggregated_params"),
    ({"prompt": "x", "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ([1], None),
    (b"", None),
    (b"{", None),
    (b'{"prompt": "x"} trailing', None),
    (b'{"prompt": "\xff"}', None),
    (b'{"prompt": "x", "unknown": "\xff"}', None),
    (b'{"prompt": "\\ud800"}', None),
    (b'{"prompt": "x", "temperature": NaN}', None),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
    (NESTED, None),
    (NESTED.replace(b"[", b'{"a":[').replace(b"]", b"]}"), None),
    (b"[" * 1_000_000, None),
    (b'{"prompt":"x","u":[' + b"[]," * 300_000 + b"[]]}", None),
]

BAD_CHATS: list[tuple[Any, str | None]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": HI * 4097}, "messages"),
    ({"messages": [{"role": "god", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [*HI, {"role": "user"}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "x " * 300}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "messages[0].tool_calls"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
        "messages[0].tool_calls",
    ),
    ({"messages": HI, "max_completion_tokens": 0}, "max_tokens"),
    ({"messages": HI, "max_tokens": 300}, "messages"),
    ({"messages": HI, "top_logprobs": 2}, "top_logprobs"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    ({"messages": HI, "tools": []}, "tools"),
    ({"messages": HI, "tools": [{}], "tool_choice": "required"}, "tool_choice"),
    ({"messages": HI, "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"messages": HI, "response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"messages": HI, "chat_template": "{{ 1 }}"}, "chat_template"),
    ({"messages": HI, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"messages": HI, "chat_template_kwargs": {"x": [1]}}, "chat_template_kwargs"),
    ({"messages": HI, "chat_template_kwargs": {"raise_exception": "x"}}, "chat_template_kwargs"),
    ({"messages": HI, "chat_template_kwargs": {f"x{i}": 1 for i in range(65)}}, "chat_template_kwargs"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "[1]"}}]}]},
        "messages[0].tool_calls",
    ),
    ({"messages": HI, "chat_template_kwargs": {"x": "y" * 2000}}, "chat_template_kwargs"),
    ({"messages": HI, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]


async def still_serves(server: Running) -> None:
    status, _, body = await server.post("/v1/completions", {"prompt": "x", "model": MODEL})
    assert (status, body["choices"][0]["text"]) == (200, "fine")


@pytest.fixture
def own_garbage() -> Iterator[None]:
    """What other tests of the run left is not for this test's server to look through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("own_garbage")
@pytest.mark.parametrize(("path", "cases"), [("/v1/completions", BAD_COMPLETIONS), ("/v1/chat/completions", BAD_CHATS)])
async def test_a_bad_body_is_refused_and_names_the_field(
    tokenizer: Tokenizer, path: str, cases: list[tuple[Any, str | None]]
) -> None:
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        for body, param in cases:
            began = time.process_time()
            status, headers, answer = await server.post(path, body)
            spent = time.process_time() - began
            shown = str(body)[:80]
            assert status == 400, (shown, status, answer)
            assert set(answer["error"]) == {"message", "type", "param", "code"}, shown
            assert answer["error"]["type"] == "invalid_request_error"
            assert answer["error"]["param"] == param, (shown, answer)
            assert len(answer["error"]["message"]) < 400, shown
            assert "x-request-id" in headers
            assert spent < 0.5, (shown, spent)
        assert not server.generator.streams
        await still_serves(server)


async def test_a_prompt_that_does_not_fit_says_so_like_openai(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        _, _, answer = await server.post("/v1/completions", {"prompt": [5] * 250, "max_tokens": 7})
        fits = await server.post("/v1/completions", {"prompt": [5] * 250, "max_tokens": 6})
        by_default = await server.post("/v1/completions", {"prompt": [5] * 250})
        _, _, too_long = await server.post("/v1/completions", {"prompt": [5] * 256})
        cut = await server.post("/v1/completions", {"prompt": [5] * 999, "truncate_prompt_tokens": -1})
    assert answer["error"]["code"] == too_long["error"]["code"] == "context_length_exceeded"
    assert answer["error"]["message"].startswith(
        "This model's maximum context length is 256 tokens. However, you requested 257 tokens (250 in the prompt, 7 in"
    )
    assert (fits[0], by_default[0], cut[0]) == (200, 200, 200)
    lengths = [stream.request.params.max_tokens for stream in server.generator.streams]
    assert lengths == [6, 6, 16]
    assert server.generator.streams[-1].request.num_prompt_tokens == 240


async def test_nesting_up_to_the_limit_is_accepted_whatever_strings_hold(tokenizer: Tokenizer) -> None:
    def body(depth: int) -> bytes:
        brackets = json.dumps('["]}\\"{[' * 99).encode()
        inner = b"[" * depth + brackets + b"," + b"[]" + b"]" * depth
        return b'{"prompt":"x","unknown":' + inner + b',"other":' + brackets + b"}"

    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        accepted = await server.post("/v1/completions", body(MAX_DEPTH - 2))
        refused = await server.post("/v1/completions", body(MAX_DEPTH - 1))
    assert accepted[0] == 200
    assert "nested deeper than 64" in refused[2]["error"]["message"]


async def test_an_unknown_model_path_or_method_has_its_status(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        model = await server.post("/v1/completions", {"prompt": "x", "model": "gpt-4"})
        path = await server.get("/v2/nothing")
        method = await server.get("/v1/completions")
        options = await server.get("/v1/models", method="DELETE")
    assert (model[0], model[2]["error"]["code"], model[2]["error"]["param"]) == (404, "model_not_found", "model")
    assert (path[0], json.loads(path[2])["error"]["code"]) == (404, "not_found")
    assert (method[0], method[1]["allow"]) == (405, "post")
    assert (options[0], options[1]["allow"]) == (405, "get, head")


async def test_a_body_over_the_limit_is_refused_by_its_announced_length(tokenizer: Tokenizer) -> None:
    config = FrontConfig(max_body_bytes=100_000)
    async with running(tokenizer, saying(tokenizer, "fine"), config=config) as server:
        status, headers, answer = await server.post("/v1/completions", b" " * 200_000 + b"{}")
        endless = await server.raw(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % 10**30)
        await still_serves(server)
    assert (status, headers["connection"], answer["error"]["code"]) == (413, "close", "body_too_large")
    assert endless[0] in (400, 413)


async def test_a_chunked_body_is_refused_as_soon_as_it_is_over_the_limit(tokenizer: Tokenizer) -> None:
    config = FrontConfig(max_body_bytes=100_000)
    async with running(tokenizer, saying(tokenizer, "fine"), config=config) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(7):
            writer.write(b"4000\r\n" + b" " * 0x4000 + b"\r\n")  # the body never ends
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
        writer.close()
        await still_serves(server)
    assert head.startswith(b"HTTP/1.1 413 ")


async def test_long_bodies_are_bounded_together_and_short_ones_get_by(tokenizer: Tokenizer) -> None:
    config = FrontConfig(max_body_bytes=300_000, max_bodies_bytes=300_000)
    long = b'{"prompt":"x","user":"' + b"u" * 250_000 + b'"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(long)
    async with running(tokenizer, saying(tokenizer, "fine"), config=config) as server:
        bodies = server.front._bodies
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head + long[:-1])
        await until(lambda: bodies.num_bytes == len(long) - 1 - bodies.free_bytes)
        status, headers, answer = await server.post("/v1/completions", long)
        other = await server.post("/tokenize", long)
        await still_serves(server)
        writer.write(long[-1:])
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()
        assert (await server.post("/v1/completions", long))[0] == 200
        assert bodies.num_bytes == 0
    assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
    assert (answer["error"]["type"], answer["error"]["code"]) == ("server_error", "overloaded")
    assert other[0] == 503


async def test_what_came_of_a_long_body_goes_with_its_client(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 200001\r\n\r\n" + b" " * 200_000)
        await until(lambda: server.front._bodies.num_bytes)
        writer.transport.abort()
        await until(lambda: server.metrics.responses)
        assert server.front._bodies.num_bytes == 0


async def test_a_body_that_does_not_come_is_given_up(tokenizer: Tokenizer) -> None:
    config = FrontConfig(body_timeout_s=0.05)
    async with running(tokenizer, saying(tokenizer, "fine"), config=config) as server:
        chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"
        announced = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{"
        answers = [await server.raw(data) for data in (chunked, announced)]
        await still_serves(server)
    assert [(status, headers["connection"]) for status, headers, _ in answers] == [(408, "close")] * 2


async def test_a_later_body_on_a_connection_that_does_not_come_is_given_up(tokenizer: Tokenizer) -> None:
    config = FrontConfig(body_timeout_s=0.05)
    async with running(tokenizer, saying(tokenizer, "fine"), config=config) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 14\r\n\r\n"
        writer.write(head + b'{"prompt":"x"}')
        first = await read_answer(reader)
        writer.write(head + b"{")
        second = await read_answer(reader)
        writer.close()
    assert (first[0], second[0]) == (200, 408)


async def test_a_client_that_leaves_before_its_body_is_whole_costs_nothing(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
        await writer.drain()
        writer.transport.abort()
        await until(lambda: server.metrics.responses)
        await still_serves(server)
    assert server.metrics.responses["/v1/completions", 499] == 1
    assert len(server.generator.streams) == 1


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x80\x04\x95pickle.\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_400_at_most(tokenizer: Tokenizer, garbage: bytes) -> None:
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(garbage)
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        await still_serves(server)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 "), answer


async def test_trailers_are_bounded_and_are_no_headers(tokenizer: Tokenizer) -> None:
    body = b'{"prompt":"x","max_tokens":2}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    chunked = head + b"%x\r\n%s\r\n0\r\n" % (len(body), body)
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        status, headers, _ = await server.raw(chunked + b"X-Request-Id: from-trailer\r\n\r\n")
        assert status == 200
        assert headers["x-request-id"] != "from-trailer"
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(chunked)
        with suppress(ConnectionError):
            for _ in range(200):  # 12.8 MB of one trailer, were it let in
                writer.write(b"X: " + b"y" * 65_536)
                await asyncio.wait_for(writer.drain(), 20)
            await asyncio.wait_for(reader.read(), 20)
        assert writer.is_closing() or reader.at_eof()
        writer.close()
        await still_serves(server)


async def test_a_compressed_body_is_refused_by_name(tokenizer: Tokenizer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}"
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        status, _, answer = await server.raw(head)
    assert status == 415
    assert b"content-encoding" in answer


async def test_a_large_head_is_refused(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        whole = await server.get("/v1/models", *[f"h{i}: {'v' * 1000}" for i in range(40)])
        path = await server.get("/" + "p" * 40_000)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HTTP/1.1\r\nh: " + b"v" * 200_000)  # and never ends
        with suppress(ConnectionResetError):  # where the client is still writing when the server has had enough
            answer = await asyncio.wait_for(reader.read(), 20)
            assert answer.startswith(b"HTTP/1.1 400 ")
        writer.close()
        await still_serves(server)
    assert (whole[0], path[0]) == (431, 431)


async def test_a_head_that_does_not_come_is_given_up(tokenizer: Tokenizer) -> None:
    limits = ServerConfig(idle_s=0.05, drain_s=1)
    async with running(tokenizer, saying(tokenizer, "fine"), limits=limits) as server:
        for start in (b"", b"GET /heal"):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(start)
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()


async def test_a_body_of_another_media_type_is_refused(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "fine")) as server:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: %s\r\ncontent-length: 14\r\n\r\n"
        form = await server.raw(head % b"application/x-www-form-urlencoded" + b'{"prompt":"x"}')
        charset = await server.raw(head % b"application/json; charset=utf-8" + b'{"prompt":"x"}')
        none = await server.raw(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 14\r\n\r\n{"prompt":"x"}')
    assert [answer[0] for answer in (form, charset, none)] == [415, 200, 200]


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.just(2**64)
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "name"]), st.just("user") | values, max_size=4),
    max_size=3,
)
NAMES = sorted({*CompletionBody.__struct_fields__, *ChatBody.__struct_fields__} - {"prompt", "messages"})


@given(
    prompt=st.one_of(st.text(max_size=9), st.lists(st.integers(-2, 600), max_size=4), values),
    messages=st.one_of(messages, values),
    fields=st.dictionaries(st.sampled_from(NAMES), values, max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_no_body_makes_a_server_error(tokenizer: Tokenizer, prompt: Any, messages: Any, fields: dict[str, Any]) -> None:
    front = Front(
        FakeGenerator(saying(tokenizer, "fine")),
        ModelCard(MODEL, 512, 256, (0,)),
        tokenizer,
        Metrics(MODEL),
        FrontConfig(),
    )

    async def status(path: str, body: dict[str, Any]) -> int:
        parts = [{"type": "http.request", "body": json.dumps(body).encode()}]
        statuses = []

        async def receive() -> dict[str, Any]:
            return parts.pop() if parts else await asyncio.Event().wait()  # type: ignore[return-value]

        async def send(message: dict[str, Any]) -> None:
            if "status" in message:
                statuses.append(message["status"])

        connection = SimpleNamespace(lost=False, on_lost=None, whole=False, write=lambda _part: True)
        extensions = {CONNECTION: connection}
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "extensions": extensions}
        await front(scope, receive, send)
        return statuses[0]

    for path, body in (
        ("/v1/completions", {"prompt": prompt, **fields}),
        ("/v1/chat/completions", {"messages": messages, **fields}),
        ("/tokenize", {"prompt": prompt, **fields}),
        ("/tokenize", {"messages": messages, **fields}),
        ("/detokenize", {"tokens": prompt}),
    ):
        assert asyncio.run(status(path, body)) in (200, 400, 404)
    front.close()
