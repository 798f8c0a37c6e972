"""`LLM(url=...)` against the real HTTP front over one engine, and against servers that misbehave."""

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from baton import LLM, InvalidRequest, SamplingParams
from baton.outputs import Conversation, Job
from baton.remote_messages import parse_output, request_body
from engine.executors.base import TokenLogprobs
from engine.executors.torch_executor import TorchConfig, TorchExecutor
from router.generation import DeadlineExceeded, GenerationFailed, Overloaded
from router.tokenizer import Tokenizer
from tests.baton.serving import Serving, serving

PROMPTS = ["The river", "A request enters, its prompt is read once", [300, 301, 302] * 30, "x"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where does the river go?"}]

App = Callable[[dict[str, Any], Callable[..., Any], Callable[[dict[str, Any]], Awaitable[None]]], Awaitable[None]]


@pytest.fixture(scope="module")
def server(checkpoint: Path, tokenizer: Tokenizer) -> Iterator[Serving]:
    executor = TorchExecutor(checkpoint, TorchConfig(num_blocks=256, num_threads=1))
    with serving(executor, tokenizer) as server:
        yield server
    executor.close()


@pytest.fixture(scope="module")
def remote(server: Serving) -> Iterator[LLM]:
    with LLM(url=server.url) as llm:
        yield llm


@pytest.fixture(scope="module")
def local(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), kv_cache_memory="2MiB", threads=1) as llm:
        yield llm


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=20),
        SamplingParams(temperature=1.0, seed=-5, n=3, max_tokens=12, top_k=50, top_p=0.9, min_p=0.01),
        SamplingParams(seed=9, max_tokens=12, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.5),
        SamplingParams(seed=1, max_tokens=12, logit_bias={70: 8.5, 71: -100.0}, min_tokens=4, ignore_eos=True),
        SamplingParams(seed=2, max_tokens=40, stop=("e", "qq"), include_stop_str_in_output=True, ignore_eos=True),
        SamplingParams(seed=2, max_tokens=40, stop_token_ids=tuple(range(60, 120)), skip_special_tokens=False),
    ],
)
def test_a_server_gives_what_the_engine_in_this_process_gives(local, remote, params):
    here, there = local.generate(PROMPTS, params), remote.generate(PROMPTS, params)
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.prompt_token_ids == ours.prompt_token_ids
        for mine, other in zip(ours.outputs, theirs.outputs, strict=True):
            fields = ("index", "text", "token_ids", "finish_reason")
            assert [getattr(other, field) for field in fields] == [getattr(mine, field) for field in fields]
    assert remote.chat(MESSAGES, params)[0].outputs[0].text == local.chat(MESSAGES, params)[0].outputs[0].text
    assert remote.chat(MESSAGES, params)[0].prompt_token_ids == local.chat(MESSAGES, params)[0].prompt_token_ids


def test_a_closed_llm_refuses(server):
    llm = LLM(url=server.url)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="the LLM was closed"):
        llm.generate(["a", "b"])
    with pytest.raises(RuntimeError, match="the LLM was closed"):
        list(llm.stream("a"))


def test_log_probabilities_come_over_the_wire(local, remote):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=2, ignore_eos=True)
    for ours, theirs in zip(
        local.generate(PROMPTS, params) + local.chat([MESSAGES], params),
        remote.generate(PROMPTS, params) + remote.chat([MESSAGES], params),
        strict=True,
    ):
        assert _scores(theirs.outputs[0].logprobs) == _scores(ours.outputs[0].logprobs)
        assert _scores(theirs.prompt_logprobs) == _scores(ours.prompt_logprobs)
        assert [entry and [token for token, _ in entry.top] for entry in theirs.prompt_logprobs] == [
            entry and [token for token, _ in entry.top] for entry in ours.prompt_logprobs
        ]


def _scores(logprobs: list[TokenLogprobs | None]) -> list[Any]:
    return [entry and (entry.token_id, pytest.approx(entry.logprob, abs=1e-5)) for entry in logprobs]


def test_streamed_increments_add_up_to_the_whole(remote):
    params = SamplingParams(seed=4, n=2, max_tokens=15, logprobs=1, ignore_eos=True)
    whole_text, whole_chat = remote.generate("The river", params)[0], remote.chat(MESSAGES, params)[0]
    for whole, stream in (
        (whole_text, remote.stream("The river", params)),
        (whole_chat, remote.stream_chat(MESSAGES, params)),
    ):
        increments = list(stream)
        for completion in whole.outputs:
            own = [increment for increment in increments if increment.index == completion.index]
            assert "".join(increment.text for increment in own) == completion.text
            assert [token for increment in own for token in increment.token_ids] == completion.token_ids
            assert [each for increment in own for each in increment.logprobs or []] == completion.logprobs
            assert own[-1].finish_reason == "length"


def test_what_the_server_refuses_is_an_invalid_request_that_says_which_prompt(remote):
    with pytest.raises(InvalidRequest, match=r"prompt 1: .*token id outside") as caught:
        remote.generate(["fine", [10**6]])
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="maximum context length") as caught:
        remote.generate("fine", SamplingParams(max_tokens=10**6))
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(InvalidRequest, match="temperature"):
        next(remote.stream("fine", SamplingParams(temperature=-1.0)))


def test_an_unknown_model_is_refused(server):
    with LLM("other", url=server.url) as llm, pytest.raises(InvalidRequest, match="does not exist") as caught:
        llm.generate("a")
    assert caught.value.code == "model_not_found"


def test_leaving_a_stream_early_ends_it_on_the_server(remote, server):
    increments = remote.stream("The river", SamplingParams(max_tokens=900, ignore_eos=True))
    next(increments)
    increments.close()
    remote.generate("x", SamplingParams(max_tokens=1))
    for _ in range(200):  # each request gives the server a turn to see the closed connection
        if not server.generator.streams:
            break
        remote.generate("x", SamplingParams(max_tokens=1))
    assert not server.generator.streams


def test_alternatives_are_known_by_id_where_the_server_says_so():
    job = Job("a", SamplingParams(logprobs=2))
    assert request_body(job, "m")[1]["return_tokens_as_token_ids"] is True
    logprobs = {
        "tokens": ["token_id:5"],
        "token_logprobs": [-1.5],
        "top_logprobs": [{"token_id:7": -0.5, "token_id:6": -1.0, "token_id:5": -1.5}],
    }
    choice = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": logprobs, "token_ids": [5]}
    body = {"choices": [{**choice, "prompt_token_ids": [1]}]}
    expected = [TokenLogprobs(5, -1.5, ((7, -0.5), (6, -1.0)))]
    assert parse_output(job, body).outputs[0].logprobs == expected
    chat = Job(Conversation(MESSAGES), SamplingParams(logprobs=1))
    assert request_body(chat, "m")[1] | {"logprobs": True, "top_logprobs": 1} == request_body(chat, "m")[1]
    content = [{"token": "token_id:5", "logprob": -1.5, "top_logprobs": [{"token": "token_id:7", "logprob": -0.5}]}]
    message = {"message": {"content": "x"}, "logprobs": {"content": content}}
    parsed = parse_output(chat, {"choices": [{"index": 0, "finish_reason": "stop", "token_ids": [5], **message}]})
    assert parsed.outputs[0].logprobs == [TokenLogprobs(5, -1.5, ((7, -0.5),))]


@contextmanager
def fake_server(app: App) -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


async def answer(send: Callable[..., Awaitable[None]], status: int, body: bytes, **headers: str) -> None:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def error_body(kind: str, code: str | None = None) -> bytes:
    return json.dumps({"error": {"message": "because", "type": kind, "param": None, "code": code}}).encode()


GOOD = json.dumps(
    {"choices": [{"index": 0, "text": "yes", "finish_reason": "stop", "token_ids": [1], "prompt_token_ids": [2]}]}
).encode()


def test_a_full_server_is_asked_again_when_it_says():
    answers = [429, 503, 429, 200]

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        status = answers.pop(0)
        await answer(send, status, GOOD if status == 200 else error_body("rate_limit_error"), retry_after="0")

    with fake_server(app) as url, LLM("m", url=url) as llm:
        assert llm.generate("a")[0].outputs[0].text == "yes"
    assert not answers


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (503, error_body("server_error", "no_workers"), Overloaded),
        (503, error_body("server_error", "generation_failed"), GenerationFailed),
        (500, b"oops", GenerationFailed),
        (504, error_body("timeout_error", "timeout"), DeadlineExceeded),
        (401, error_body("invalid_request_error", "invalid_api_key"), InvalidRequest),
        (200, b"<html>", ConnectionError),
        (200, b"{}", ConnectionError),
    ],
)
def test_failures_of_a_server_are_the_exceptions_of_the_engine(status, body, error):
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await answer(send, status, body, retry_after="0")

    with fake_server(app) as url, LLM("m", url=url) as llm:
        with pytest.raises(error):
            llm.generate("a")
        with pytest.raises(error):
            list(llm.stream("a"))


def test_a_stream_that_breaks_off_or_reports_an_error_raises():
    chunk = b'data: {"choices":[{"index":0,"text":"he","finish_reason":null}]}\n\n'
    bodies = [chunk, chunk + b"data: " + error_body("server_error") + b"\n\n"]

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await answer(send, 200, bodies.pop(0), content_type="text/event-stream")

    with fake_server(app) as url, LLM("m", url=url) as llm:
        for error in (ConnectionError, GenerationFailed):
            increments = llm.stream("a")
            assert next(increments).text == "he"
            with pytest.raises(error):
                next(increments)


def test_a_server_that_does_not_finish_in_time_is_a_deadline():
    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    with fake_server(app) as url, LLM("m", url=url, timeout=0.2) as llm, pytest.raises(DeadlineExceeded):
        llm.generate("a")


def test_no_server_is_a_connection_error_that_names_the_url():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=url):
        LLM(url=url)
    with LLM("m", url=url) as llm, pytest.raises(ConnectionError, match=url):
        llm.generate("a")


def test_the_key_is_sent():
    seen: list[bytes] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"])[b"authorization"])
        await answer(send, 200, b'{"data":[{"id":"m"}]}')

    with fake_server(app) as url, LLM(url=f"{url}/v1/", api_key="secret"):
        assert seen == [b"Bearer secret"]
