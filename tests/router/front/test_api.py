"""What the API promises beyond the official client: vLLM's fields, disconnects, ids, metrics, the timeline."""

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from engine.request import FinishReason, Request
from router.generation import Delta, GenerationFailed, Overloaded
from router.http import FrontConfig, RandomBits
from router.server import BoundedProtocol, ServerConfig
from router.tokenizer import Tokenizer, load_tokenizer
from tests.checkpoints import make_tokenizer
from tests.router.front.fakes import MODEL, Running, Step, running, saying, until

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def events(raw: bytes) -> list[Any]:
    lines = [line.removeprefix(b"data: ") for line in raw.split(b"\n\n") if line]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


async def test_vllm_fields_reach_the_engine_and_unknown_ones_are_ignored(tokenizer: Tokenizer) -> None:
    body = {
        "prompt": "x",
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "stop_token_ids": [7],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logit_bias": {"5": -3},
        "priority": -4,
        "cache_salt": "salt",
        "temperature": None,
        "response_format": {"type": "text"},
        "foo": {"bar": [1]},
        "user": "u",
    }
    async with running(tokenizer, saying(tokenizer, "sea")) as server:
        status, _, _ = await server.post("/v1/completions", body)
        await server.post("/v1/completions", {"prompt": "x", "n": 2})
    requests = [stream.request for stream in server.generator.streams]
    first = requests[0]
    assert status == 200
    assert (first.priority, first.cache_salt, first.seed) == (-4, "salt", 7)
    params = first.params
    assert (params.top_k, params.min_p, params.repetition_penalty, params.min_tokens) == (0, 0.1, 1.2, 2)
    assert (params.stop_token_ids, params.ignore_eos, params.skip_special_tokens) == ((7,), True, False)
    assert (params.logit_bias, params.temperature, params.max_tokens) == ({5: -3.0}, 1.0, 16)
    assert len({request.id for request in requests[1:]}) == 2


async def test_each_prompt_of_a_batch_without_a_seed_draws_its_own(tokenizer: Tokenizer) -> None:
    numbers = iter(range(100))
    async with running(tokenizer, saying(tokenizer, "a"), draw_bits=lambda _bits: next(numbers)) as server:
        await server.post("/v1/completions", {"prompt": ["x", "x"]})
        await server.post("/v1/completions", {"prompt": ["x", "x"], "seed": 3})
    seeds = [stream.request.seed for stream in server.generator.streams]
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [3, 3]


async def test_special_tokens_are_shown_when_asked_for(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "a<|user|>b")) as server:
        hidden = await server.post("/v1/completions", {"prompt": "x"})
        shown = await server.post("/v1/completions", {"prompt": "x", "skip_special_tokens": False})
    assert hidden[2]["choices"][0]["text"] == "ab"
    assert shown[2]["choices"][0]["text"] == "a<|user|>b"


async def test_token_ids_and_prompt_logprobs_are_returned_when_asked_for(tokenizer: Tokenizer) -> None:
    prompt, output = tokenizer.encode("the ice"), tokenizer.encode("sea")
    async with running(tokenizer, saying(tokenizer, "sea")) as server:
        extras = {"return_token_ids": True, "prompt_logprobs": 1}
        _, _, answer = await server.post("/v1/completions", {"prompt": "the ice", **extras})
        _, _, chat = await server.post("/v1/chat/completions", {**CHAT, **extras})
        _, _, raw = await server.post("/v1/completions", {"prompt": prompt, "return_token_ids": True, "stream": True})
        _, _, chat_raw = await server.post("/v1/chat/completions", {**CHAT, "return_token_ids": True, "stream": True})
    choice = answer["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (output, prompt)
    assert choice["prompt_logprobs"][0] is None
    entry = choice["prompt_logprobs"][1][str(prompt[1])]
    assert (entry["logprob"], entry["rank"]) == (-0.5, 1)
    assert len(choice["prompt_logprobs"]) == len(prompt)
    assert chat["choices"][0]["token_ids"] == output
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
    assert [token for event in events(raw) for token in event["choices"][0]["token_ids"]] == output
    assert events(raw)[0]["choices"][0]["prompt_token_ids"] == prompt
    assert events(chat_raw)[0]["prompt_token_ids"] == chat["prompt_token_ids"]
    assert [token for event in events(chat_raw) for token in event["choices"][0].get("token_ids", [])] == output


async def test_echo_shows_what_is_left_of_a_prompt(tokenizer: Tokenizer) -> None:
    text, ids = "the ice is wide", tokenizer.encode("the ice is wide")
    async with running(tokenizer, saying(tokenizer, "!")) as server:

        async def echoed(prompt: str | list[int], keep: int | None) -> str:
            body = {"prompt": prompt, "echo": True, "truncate_prompt_tokens": keep}
            _, _, answer = await server.post("/v1/completions", body)
            shown: str = answer["choices"][0]["text"]
            return shown

        whole = [await echoed(prompt, keep) for prompt in (text, ids) for keep in (None, -1, len(ids))]
        cut = [await echoed(prompt, 3) for prompt in (text, ids)]
    assert set(whole) == {text + "!"}
    assert set(cut) == {tokenizer.decode(ids[-3:]) + "!"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_before", [0, 1])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_cancels_its_generations(
    tokenizer: Tokenizer, stream: bool, num_before: int, n: int
) -> None:
    forever = asyncio.Event()

    def script(_request: Request) -> list[Step]:
        return [*(Delta([token], []) for token in tokenizer.encode("sea")[:num_before]), forever]

    async with running(tokenizer, script) as server:
        body = json.dumps({"prompt": "x", "stream": stream, "n": n}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        expected = n if num_before else 1
        await until(lambda: sum(s.num_yielded == num_before for s in server.generator.streams) == expected)
        writer.transport.abort()
        await until(lambda: server.metrics.responses)
        assert all(s.closed.is_set() for s in server.generator.streams)
        assert (server.metrics.num_running, server.metrics.num_waiting) == (0, 0)
        assert +server.metrics.finished == {"abort": expected}
    status = 200 if stream and num_before else 499
    assert server.metrics.responses["/v1/completions", status] == 1


async def test_a_request_that_outlives_its_deadline_is_ended_even_when_the_generator_forgets(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.answer.GRACE_S", 0.05)
    config = FrontConfig(request_timeout_s=0.0)
    async with running(tokenizer, lambda _: [asyncio.Event()], config=config) as server:
        status, _, answer = await server.post("/v1/completions", {"prompt": "x"})
    assert (status, answer["error"]["code"]) == (504, "timeout")
    assert server.generator.streams[0].closed.is_set()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_is_counted_as_the_end_of_the_choices_that_it_ends(tokenizer: Tokenizer, stream: bool) -> None:
    ends: Iterator[Step] = iter([Delta([6], [], FinishReason.STOP), GenerationFailed("x")])

    async with running(tokenizer, lambda _request: [Delta([5], []), next(ends)]) as server:
        await server.post("/v1/completions", {"prompt": "x"})
        await server.post("/v1/completions", {"prompt": "x", "stream": stream})
        server.generator.refuse = Overloaded("full", retry_after=1.0)
        await server.post("/v1/completions", {"prompt": "x", "stream": stream})
        shown = await scrape(server)
    for prefix in ("baton_", "vllm:"):
        counts = {end: shown[f"{prefix}request_success_total|{end}"] for end in ("stop", "length", "abort", "error")}
        assert counts == {"stop": 1, "length": 0, "abort": 0, "error": 1}


async def test_a_reader_that_stalls_is_cut_off(tokenizer: Tokenizer) -> None:
    def script(_request: Request) -> list[Step]:
        return [Delta(long, [])] * 10_000

    long = tokenizer.encode("sea " * 2000)
    limits = ServerConfig(stall_s=0.05, drain_s=1)
    async with running(tokenizer, script, limits=limits) as server:
        with server.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = b'{"prompt":"x","stream":true}'
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 28\r\n\r\n" + body)
            await until(lambda: server.generator.streams)
            async with asyncio.timeout(20):
                await server.generator.streams[0].closed.wait()
    assert server.generator.streams[0].num_yielded < 10_000


@pytest.mark.parametrize("stream", [False, True])
async def test_lone_tokens_and_others_are_one_text_and_the_gaps_between_them_add_up(
    tokenizer: Tokenizer, stream: bool
) -> None:
    ids = tokenizer.encode("Grüße, naïve 你好 🙂 and so on", add_special_tokens=False)
    gates = [asyncio.Event() for _ in range(3)]
    lone = [Delta([token], []) for token in ids[4:-1]]
    script: list[Step] = [Delta(ids[:1], []), gates[0], Delta(ids[1:2], []), gates[1], Delta(ids[2:4], []), *lone]
    script += [gates[2], Delta(ids[-1:], [], FinishReason.LENGTH)]
    async with running(tokenizer, lambda _request: script) as server:
        began = time.monotonic()
        asking = asyncio.create_task(server.post("/v1/completions", {"prompt": "x", "stream": stream}))
        for gate in gates:
            await asyncio.sleep(0.02)
            gate.set()
        answer = (await asking)[2]
        elapsed = time.monotonic() - began
        gap_s, num_gaps = server.metrics.inter_token.total, sum(server.metrics.inter_token.counts)
    events = [json.loads(line[6:]) for line in answer.decode().split("\n\n")[:-2]] if stream else [answer]
    assert "".join(event["choices"][0]["text"] for event in events) == tokenizer.decode(ids)
    assert num_gaps == len(script) - len(gates) - 1
    assert 0.03 < gap_s < elapsed


def test_random_bits_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    supplies = [random.Random(seed).randbytes(1024) for seed in range(3)]
    left = iter(supplies)
    monkeypatch.setattr("os.urandom", lambda size: next(left)[:size])
    draw = RandomBits()
    sizes = [8, 16] * 50  # 1,024 bytes end within one of 16: what is left of them is not used
    drawn = b"".join(draw(8 * size).to_bytes(size, "big") for size in sizes)
    assert drawn == (supplies[0][:1016] + supplies[1])[: len(drawn)]


async def test_request_ids_are_echoed_or_made_on_every_response(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "x")) as server:
        echoed = await server.get("/health", "x-request-id: my-id.42")
        on_error = await server.get("/nothing", "x-request-id: my-id.42")
        made = [
            (await server.get("/health", *headers))[1]["x-request-id"]
            for headers in ((), ("x-request-id: " + "a" * 129,), ("x-request-id: a b",), ("x-request-id: é",))
        ]
        body = await server.post("/v1/completions", {"prompt": "x", "request_id": "mine"})
        odd = await server.post("/v1/completions", {"prompt": "x", "request_id": 'no"pe\n'})
        named = await server.post("/v1/chat/completions", CHAT, 'x-request-id: my"id')
    assert echoed[1]["x-request-id"] == on_error[1]["x-request-id"] == "my-id.42"
    assert set(made) == {f"{11:032x}"}
    assert body[2]["id"] == "cmpl-mine"
    assert odd[2]["id"] == f"cmpl-{11:032x}"
    assert (named[1]["x-request-id"], named[2]["id"]) == ('my"id', 'chatcmpl-my"id')


async def test_the_timeline_comes_only_when_asked_for_and_in_seconds_since_arrival(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "x")) as server:
        _, _, plain = await server.post("/v1/completions", {"prompt": "x"})
        _, _, answer = await server.post("/v1/completions", {"prompt": "x"}, "x-baton-timeline: 1")
        _, _, raw = await server.post("/v1/chat/completions", {**CHAT, "stream": True}, "x-baton-timeline: 1")
    assert "timeline" not in plain
    assert answer["timeline"]["dispatched"] == 0.5
    assert answer["timeline"]["cached_tokens"] == 3
    assert "received" not in answer["timeline"]
    assert {"transfer_bytes", "exposed_s", "prefill_worker", "transport", "attempts"} <= set(answer["timeline"])
    assert events(raw)[-1]["timeline"] == answer["timeline"]
    assert raw.endswith(b"data: [DONE]\n\n")


async def test_tokenize_and_detokenize_have_vllms_shapes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Köln 🙂<|end|>")
    async with running(tokenizer, saying(tokenizer, "x")) as server:
        text = await server.post("/tokenize", {"prompt": "Köln 🙂<|end|>", "return_token_strs": True})
        chat = await server.post("/tokenize", {**CHAT, "model": MODEL})
        back = await server.post("/detokenize", {"tokens": ids})
        neither = await server.post("/tokenize", {})
        beyond = await server.post("/detokenize", {"tokens": [512]})
        template = await server.post("/tokenize", {**CHAT, "chat_template": "x"})
    assert text[2] == {
        "count": len(ids),
        "max_model_len": 256,
        "tokens": ids,
        "token_strs": [tokenizer.token_string(token) for token in ids],
    }
    assert tokenizer.decode(chat[2]["tokens"], skip_special_tokens=False).endswith("<|assistant|>\n")
    assert back[2] == {"prompt": "Köln 🙂<|end|>"}
    assert [answer[0] for answer in (neither, beyond, template)] == [400, 400, 400]


async def test_a_long_text_is_tokenized_off_the_loop_with_the_same_ids(tokenizer: Tokenizer) -> None:
    text = "the river " * 600
    async with running(tokenizer, saying(tokenizer, "x")) as server:
        _, _, answer = await server.post("/tokenize", {"prompt": text})
    assert answer["tokens"] == tokenizer.encode(text)


async def test_a_template_that_does_not_parse_is_named_in_a_400(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, 512)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    tokenizer = load_tokenizer(tmp_path)
    async with running(tokenizer, saying(tokenizer, "x")) as server:
        chat = await server.post("/v1/chat/completions", CHAT)
        completion = await server.post("/v1/completions", {"prompt": "x"})
    assert list(tokenizer.chat.errors) == ["default"]
    assert chat[0] == 400
    assert "'default' does not parse" in chat[2]["error"]["message"]
    assert completion[0] == 200


async def test_ready_follows_the_generator_and_live_does_not(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, saying(tokenizer, "x")) as server:
        ready = [(await server.get("/ready"))[0]]
        server.generator.ready = False
        ready.append((await server.get("/ready"))[0])
        live = [(await server.get(path))[0] for path in ("/health", "/live")]
        version = json.loads((await server.get("/version"))[2])
    assert (ready, live) == ([200, 503], [200, 200])
    assert version["version"]


async def scrape(server: Running) -> dict[str, float]:
    _, _, text = await server.get("/metrics")
    return {
        sample.name
        + "".join(f"|{value}" for key, value in sorted(sample.labels.items()) if key != "model_name"): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


async def test_metrics_are_encoded_beside_the_event_loop(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders: list[threading.Thread] = []

    def encode(metrics: Collector) -> bytes:
        encoders.append(threading.current_thread())
        return generate_latest(metrics)

    monkeypatch.setattr("router.http.exposition.choose_encoder", lambda _accept: (encode, "text/plain"))
    async with running(tokenizer, saying(tokenizer, "x")) as server:
        status, _, text = await server.get("/metrics")
    assert status == 200
    assert b"baton_num_requests_running" in text
    assert threading.current_thread() not in encoders
    assert len(encoders) == 1


async def test_metrics_count_what_happened_under_both_names(tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()
    ids = tokenizer.encode("one two")

    def script(_request: Request) -> list[Step]:
        steps: list[Step] = [Delta([token], []) for token in ids[:-1]]
        if server.generator.streams:
            steps.append(gate)
        return [*steps, Delta(ids[-1:], [], FinishReason.LENGTH)]

    async with running(tokenizer, script) as server:
        await server.post("/v1/completions", {"prompt": "x"})
        call = asyncio.create_task(server.post("/v1/completions", {"prompt": "x y", "stream": True}))
        await until(lambda: server.metrics.num_running)
        during = await scrape(server)
        stream = server.generator.streams[1]
        stream.timeline.transfer_bytes, stream.timeline.transfer_s, stream.timeline.exposed_s = 1 << 20, 0.25, 0.01
        stream.timeline.transport, stream.timeline.queued_s = "cuda_ipc", 0.25
        gate.set()
        await call
        await server.get("/nothing")
        after = await scrape(server)
    for prefix in ("baton_", "vllm:"):
        assert during[f"{prefix}num_requests_running"] == 1
        assert after[f"{prefix}num_requests_running"] == after[f"{prefix}num_requests_waiting"] == 0
        assert after[f"{prefix}time_to_first_token_seconds_count"] == 2
        assert after[f"{prefix}inter_token_latency_seconds_count"] == 2 * (len(ids) - 1)
        assert after[f"{prefix}e2e_request_latency_seconds_count"] == 2
        assert after[f"{prefix}request_queue_time_seconds_sum"] == 0.5 + (0.5 + 0.25)  # in the router and on a worker
        assert after[f"{prefix}request_success_total|length"] == 2
        assert after[f"{prefix}generation_tokens_total"] == 2 * len(ids)
        assert after[f"{prefix}prompt_tokens_total"] == 1 + len(tokenizer.encode("x y"))
        assert after[f"{prefix}request_generation_tokens_bucket|10.0"] == 2
        assert after[f"{prefix}request_generation_tokens_sum"] == 2 * len(ids)
    assert after["baton_kv_transfer_bytes_sum"] == after["baton_kv_transferred_bytes_total|cuda_ipc"] == 1 << 20
    assert after["baton_kv_transfer_bytes_per_second_sum|cuda_ipc"] == 4 << 20
    assert after["baton_kv_transfer_bytes_per_second_count|cuda_ipc"] == 1
    assert after["baton_kv_transfer_exposed_seconds_sum"] == 0.01
    assert after["baton_http_responses_total|/v1/completions|200"] == 2
    assert after["baton_http_responses_total|other|404"] == 1


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_small_writes_to_clients_are_not_delayed(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    seen = []
    made = BoundedProtocol.connection_made

    def connection_made(self: BoundedProtocol, transport: asyncio.Transport) -> None:
        made(self, transport)
        seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    async def serve_once() -> None:
        async with running(tokenizer, saying(tokenizer, "x")) as server:
            await server.get("/health")

    monkeypatch.setattr(BoundedProtocol, "connection_made", connection_made)
    run(serve_once())
    assert seen == [1]


async def test_one_connection_serves_many_requests_and_pipelined_ones(tokenizer: Tokenizer) -> None:
    limits = ServerConfig(idle_s=5, drain_s=1)
    async with running(tokenizer, saying(tokenizer, "x"), limits=limits) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
        for _ in range(3):
            assert (await asyncio.wait_for(reader.readuntil(b'{"status":"live"}'), 20)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_stopping_lets_a_running_stream_finish(tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()

    def script(_request: Request) -> list[Step]:
        return [Delta([5], []), gate, Delta([6], [], FinishReason.LENGTH)]

    async with running(tokenizer, script, limits=ServerConfig(drain_s=20)) as server:
        call = asyncio.create_task(server.post("/v1/completions", {"prompt": "x", "stream": True}))
        await until(lambda: server.metrics.num_running)
        asyncio.get_running_loop().call_later(0.05, gate.set)  # while the server is draining
    status, _, raw = await call
    assert status == 200
    assert raw.endswith(b"data: [DONE]\n\n")


async def test_these_tests_run_on_the_loop_that_serves() -> None:
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
