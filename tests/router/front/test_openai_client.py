"""The official client works unchanged."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from engine.request import FinishReason, Request
from router.generation import DeadlineExceeded, Delta, GenerationFailed, Overloaded
from router.http import FrontConfig
from router.params import choice_seed
from router.tokenizer import Tokenizer
from tests.router.front.fakes import MODEL, Running, Step, running, saying, until

TEXT = "The river carries 🙂 the ice"


@asynccontextmanager
async def client_of(server: Running, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20, **options
    ) as client:
        yield client


async def test_a_completion_has_text_and_usage(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, TEXT)) as server, client_of(server) as client:
        answer = await client.completions.create(model=MODEL, prompt="hello", max_tokens=64)
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "length"
    num_prompt, num_output = len(tokenizer.encode("hello")), len(tokenizer.encode(TEXT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt, num_output)
    assert answer.usage.total_tokens == num_prompt + num_output
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer._request_id
    assert server.generator.streams[0].request.params.max_tokens == 64
    assert server.generator.streams[0].closed.is_set()


async def test_a_completion_streams_the_same_text(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, TEXT)) as server, client_of(server) as client:
        stream = await client.completions.create(model=MODEL, prompt="hello", stream=True)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all("\ufffd" not in chunk.choices[0].text for chunk in chunks)


@pytest.mark.parametrize("interval", [2, 3, 100])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stop", [None, "o th"])
async def test_events_of_several_tokens_tell_the_same(
    tokenizer: Tokenizer, interval: int, chat: bool, stop: str | None
) -> None:
    async def told(interval: int) -> tuple[str, str, int, list[int]]:
        config = FrontConfig(stream_interval=interval)
        async with running(tokenizer, saying(tokenizer, text), config=config) as server, client_of(server) as client:
            options = {"model": MODEL, "stream": True, "stop": stop, "stream_options": {"include_usage": True}}
            if chat:
                messages = [{"role": "user", "content": "hi"}]
                chunks = [chunk async for chunk in await client.chat.completions.create(messages=messages, **options)]
                texts = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
            else:
                chunks = [chunk async for chunk in await client.completions.create(prompt="hello", **options)]
                texts = [choice.text for chunk in chunks for choice in chunk.choices if choice.text]
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        return "".join(texts), reasons[0], chunks[-1].usage.completion_tokens, [len(text) for text in texts]

    text = "one two three four five six seven"
    every, together = await told(1), await told(interval)
    assert together[:3] == every[:3]
    assert together[3][0] == every[3][0], "the first token does not wait"
    assert len(together[3]) < len(every[3])


async def test_a_chat_streams_role_then_text_then_reason_then_usage(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, TEXT)) as server, client_of(server) as client:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(tokenizer.encode(TEXT))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert all(chunk.model == "tiny" for chunk in chunks)
    request = server.generator.streams[0].request
    assert tokenizer.decode(
        request.token_ids, skip_special_tokens=False
    ) == "<|user|>hi<|end|>\n<|assistant|>\n".replace("<|user|>", "<|user|>\n")
    assert request.params.max_tokens == 256 - len(request.token_ids)


async def test_a_chat_has_message_and_reason(tokenizer: Tokenizer) -> None:
    script = saying(tokenizer, TEXT + "<|end|>", FinishReason.STOP)
    async with running(tokenizer, script) as server, client_of(server) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "developer", "content": [{"type": "text", "text": "be"}]}], seed=5
        )
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(tokenizer.encode(TEXT)) + 1
    request = server.generator.streams[0].request
    assert tokenizer.decode(request.token_ids, skip_special_tokens=False).startswith("<|system|>\nbe<|end|>")
    assert request.seed == 5


async def test_continuous_usage_counts_up(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "one two three")) as server, client_of(server) as client:
        stream = await client.completions.create(
            model=MODEL, prompt="x", stream=True, stream_options={"continuous_usage_stats": True}
        )
        counts = [chunk.usage.completion_tokens async for chunk in stream]
    assert counts == list(range(1, len(tokenizer.encode("one two three")) + 1))


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_have_their_own_seeds_and_wait_for_the_first_token_of_the_first(
    tokenizer: Tokenizer, stream: bool
) -> None:
    gate, num_started = asyncio.Event(), []

    def script(_request: Request) -> list[Step]:
        num_started.append(len(server.generator.streams))
        ids = tokenizer.encode("abc")
        steps: list[Step] = [Delta([ids[0]], []), gate, Delta(ids[1:], [], FinishReason.LENGTH)]
        if len(num_started) == 3:
            gate.set()  # only reached when all choices have started
        return [first_gate, *steps] if len(num_started) == 1 else steps

    first_gate = asyncio.Event()
    async with running(tokenizer, script) as server, client_of(server) as client:
        call = asyncio.create_task(
            client.completions.create(model=MODEL, prompt="p", n=3, seed=-9, stream=stream)  # type: ignore[call-overload]
        )
        await until(lambda: server.generator.streams)
        assert len(server.generator.streams) == 1
        first_gate.set()
        answer = await call
        if stream:
            texts = ["", "", ""]
            async for chunk in answer:
                texts[chunk.choices[0].index] += chunk.choices[0].text
        else:
            texts = [choice.text for choice in answer.choices]
            assert [choice.index for choice in answer.choices] == [0, 1, 2]
            assert answer.usage.prompt_tokens == 1
            assert answer.usage.completion_tokens == 3 * len(tokenizer.encode("abc"))
    assert texts == ["abc"] * 3
    seeds = [stream.request.seed for stream in server.generator.streams]
    assert seeds == [choice_seed(-9, i) for i in range(3)]
    assert seeds[0] == (1 << 64) - 9
    assert all(stream.closed.is_set() for stream in server.generator.streams)


async def test_a_batch_of_prompts_keeps_their_order(tokenizer: Tokenizer) -> None:
    def script(request: Request) -> list[Step]:
        return [Delta([token], []) for token in request.token_ids] + [Delta([0], [], FinishReason.STOP)]

    async with running(tokenizer, script) as server, client_of(server) as client:
        answer = await client.completions.create(model=MODEL, prompt=["sea", "ice", "rain"], n=2)
        by_ids = await client.completions.create(model=MODEL, prompt=[tokenizer.encode("sea"), [5, 6]])
    assert [choice.text for choice in answer.choices] == ["sea", "sea", "ice", "ice", "rain", "rain"]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in by_ids.choices] == ["sea", tokenizer.decode([5, 6])]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_and_cancels_the_generation(tokenizer: Tokenizer, stream: bool) -> None:
    forever = asyncio.Event()

    def script(_request: Request) -> list[Step]:
        return [*(Delta([token], []) for token in tokenizer.encode("one two three four")), forever]

    async with running(tokenizer, script) as server, client_of(server) as client:
        answer = await client.chat.completions.create(  # type: ignore[call-overload]
            model=MODEL, messages=[{"role": "user", "content": "x"}], stop=["o th"], stream=stream
        )
        if stream:
            chunks = [chunk async for chunk in answer]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, reason) == ("one tw", "stop")
    assert server.generator.streams[0].closed.is_set()


async def test_chat_logprobs_align_with_tokens(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "é🙂")) as server, client_of(server) as client:
        arguments: Any = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "x"}],
            "logprobs": True,
            "top_logprobs": 2,
        }
        answer = await client.chat.completions.create(**arguments)
        stream = await client.chat.completions.create(**arguments, stream=True)
        chunks = [chunk async for chunk in stream]
    content = answer.choices[0].logprobs.content
    assert bytes(byte for entry in content for byte in entry.bytes) == "é🙂".encode()
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in content)
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == content


async def test_completion_logprobs_with_echo_cover_the_prompt(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, " sea")) as server, client_of(server) as client:
        answer = await client.completions.create(model=MODEL, prompt="the ice", echo=True, logprobs=1)
        scored = await client.completions.create(model=MODEL, prompt="the ice", echo=True, logprobs=0, max_tokens=0)
        stream = await client.completions.create(model=MODEL, prompt="the ice", echo=True, logprobs=1, stream=True)
        chunks = [chunk async for chunk in stream]
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "the ice sea"
    assert "".join(logprobs.tokens) == "the ice sea"
    assert logprobs.token_logprobs[0] is None
    assert set(logprobs.token_logprobs[1:]) == {-0.5}
    assert [answer.choices[0].text[offset:][:1] for offset in logprobs.text_offset] == [t[0] for t in logprobs.tokens]
    assert scored.choices[0].text == "the ice"
    assert len(scored.choices[0].logprobs.tokens) == len(tokenizer.encode("the ice"))
    assert scored.usage.completion_tokens == 0
    offsets = [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets == logprobs.text_offset
    assert "".join(chunk.choices[0].text for chunk in chunks) == "the ice sea"


async def test_models_are_listed_and_found(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "x")) as server, client_of(server) as client:
        listed = [model.id async for model in await client.models.list()]
        found = await client.models.retrieve(MODEL)
        with pytest.raises(openai.NotFoundError) as error:
            await client.models.retrieve("gpt-4")
    assert listed == [MODEL, "tiny"]
    assert found.id == MODEL
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("failure", "kind", "status", "retry"),
    [
        (Overloaded("the queue is full", retry_after=2.4), openai.RateLimitError, 429, "2"),
        (Overloaded("no workers", retry_after=0.2, unavailable=True), openai.InternalServerError, 503, "1"),
        (DeadlineExceeded(), openai.InternalServerError, 504, None),
        (GenerationFailed("worker 10.0.0.1 died"), openai.InternalServerError, 503, "1"),
        (RuntimeError("/secret/path"), openai.InternalServerError, 500, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_before_the_first_token_have_their_status(
    tokenizer: Tokenizer, failure: Exception, kind: type[openai.APIStatusError], status: int, retry: str, stream: bool
) -> None:
    async with running(tokenizer, lambda _: [failure]) as server, client_of(server) as client:
        with pytest.raises(kind) as error:
            await client.completions.create(model=MODEL, prompt="x", stream=stream)
    assert error.value.status_code == status
    assert error.value.response.headers.get("retry-after") == retry
    assert "10.0.0.1" not in str(error.value)
    assert "secret" not in str(error.value)


async def test_a_refusal_at_the_start_of_a_batch_closes_what_was_started(tokenizer: Tokenizer) -> None:
    forever = asyncio.Event()

    def script(_request: Request) -> list[Step]:
        server.generator.refuse = Overloaded("full", retry_after=1)
        return [forever]

    async with running(tokenizer, script) as server, client_of(server) as client:
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model=MODEL, prompt=["a", "b"])
    assert [stream.closed.is_set() for stream in server.generator.streams] == [True]


async def test_a_failure_in_mid_stream_is_an_error_event_and_an_abnormal_end(tokenizer: Tokenizer) -> None:
    def script(_request: Request) -> list[Step]:
        return [Delta(tokenizer.encode("some"), []), GenerationFailed("gone")]

    async with running(tokenizer, script) as server:
        async with client_of(server) as client:
            stream = aiter(await client.completions.create(model=MODEL, prompt="x", stream=True))
            first = await anext(stream)
            with pytest.raises(openai.APIError) as error:
                await anext(stream)
        status, _, raw = await server.post("/v1/completions", {"prompt": "x", "stream": True})
    assert first.choices[0].text == "some"
    assert error.value.code == "generation_failed"
    assert status == 200
    assert raw.endswith(b"\n\n<cut>")
    assert b"[DONE]" not in raw


async def test_an_api_key_is_demanded_when_configured(tokenizer: Tokenizer) -> None:
    config = FrontConfig(api_keys=("k1", "k2"))
    async with running(tokenizer, saying(tokenizer, "x"), config=config) as server:
        async with client_of(server) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.completions.create(model=MODEL, prompt="x")
            for key in ("k1", "k2"):
                await client.with_options(api_key=key).completions.create(model=MODEL, prompt="x")
        statuses = [
            (await server.get(path))[0] for path in ("/health", "/live", "/ready", "/metrics", "/v1/models", "/x")
        ]
        server.front.set_api_keys(["k3"])
        old = await server.get("/v1/models", "authorization: Bearer k1")
        new = await server.get("/v1/models", "authorization: bearer k3")
    assert statuses == [200, 200, 200, 401, 401, 401]
    assert (old[0], new[0]) == (401, 200)
    salts = {stream.request.cache_salt for stream in server.generator.streams}
    assert len(salts) == 2, "tenants share no prefix cache"
