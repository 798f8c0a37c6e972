"""Router CPU per token and per request through sessions and dispatcher, with as many workers as one likes.

The workers run in a second process and send one frame per step for all their requests, over loopback, as fast as they
are told to. CPU time is the router process's own, all of its threads included; no HTTP front.

    python -m benchmarks.dispatch_overhead --help
"""

import argparse
import asyncio
import multiprocessing
import random
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection

import uvloop

from engine.message_server import MessageServer
from engine.message_stream import MessageStream
from engine.request import Request, RequestId, SamplingParams
from engine.session import SERVICE
from engine.wire import lone_tokens_to_bytes
from protos import worker_pb2 as pb
from router.dispatcher import Dispatcher, DispatcherConfig
from router.membership import Joined, Left
from router.policies import PrefixAware

MODEL = "model"


class SteppingWorker:
    """Every `step_s` one frame with one token of each running request."""

    def __init__(self, worker_id: str, role: str, step_s: float) -> None:
        self._worker_id, self._role, self._step_s = worker_id, role, step_s

    async def serve(self) -> MessageServer:
        server = MessageServer("127.0.0.1", token="")
        server.register(SERVICE, pb.Command.FromString, self._session)
        await server.start()
        return server

    async def _session(self, stream: MessageStream) -> None:
        running: dict[int, list[int]] = {}  # handle -> [next index, max_tokens]
        fresh: list[pb.Submit] = []

        def receive(command: pb.Command) -> None:
            if command.HasField("submit"):
                fresh.append(command.submit)
            elif command.HasField("cancel"):
                running.pop(command.cancel.handle, None)

        stream.deliver_to(receive)
        described = pb.Description(
            worker_id=self._worker_id,
            role=self._role,
            model=MODEL,
            fingerprint="f",
            block_size=16,
            num_blocks=100_000,
            max_model_len=100_000,
            max_batch_tokens=8192,
            max_num_seqs=4096,
        )
        frame = pb.Frame(description=described, kv_snapshot=pb.KvSnapshot())
        number = 0
        while not stream.over:
            frame.number = number
            frame.load.CopyFrom(pb.Load(num_running=len(running), num_free_blocks=100_000, progress=number))
            stream.send(frame)
            number += 1
            await asyncio.sleep(self._step_s)
            frame = self._step(running, fresh)

    def _step(self, running: dict[int, list[int]], fresh: list[pb.Submit]) -> pb.Frame:
        outputs, tokens = [], []
        for submit in fresh:
            if self._role == "prefill":
                outputs.append(pb.Output(handle=submit.handle, offer=b"x" * 64, index=0, token_ids=[1]))
            else:
                running[submit.handle] = [1 if submit.offer else 0, submit.params.max_tokens]
        for handle, state in list(running.items()):
            index, max_tokens = state
            state[0] += 1
            if index > 1 and index + 1 < max_tokens:
                tokens.append((handle, index, index))
                continue
            output = pb.Output(handle=handle, index=index, token_ids=[index], handoff_done=index == 1)
            if index + 1 == max_tokens:
                output.finish_reason = pb.FINISH_REASON_LENGTH
                del running[handle]
            outputs.append(output)
        fresh.clear()
        return pb.Frame(outputs=outputs, tokens=lone_tokens_to_bytes(tokens))


class Listed:
    """A membership that never changes."""

    def __init__(self, members: list[Joined]) -> None:
        self._members = members

    async def watch(self) -> AsyncIterator[Joined | Left]:
        for member in self._members:
            yield member


def run_workers(num_each: int, step_s: float, to_router: Connection) -> None:
    async def serve() -> None:
        members, servers = [], []
        for role in ("prefill", "decode"):
            for i in range(num_each):
                server = await SteppingWorker(f"{role}-{i}", role, step_s).serve()
                servers.append(server)
                members.append((f"{role}-{i}", role, server.address, 1))
        to_router.send(members)
        await asyncio.get_running_loop().run_in_executor(None, to_router.recv)
        for server in servers:
            await server.stop()

    asyncio.run(serve())


async def measure(members: list[Joined], num_requests: int, concurrency: int, isl: int, osl: int) -> None:
    config = DispatcherConfig()
    dispatcher = Dispatcher(
        Listed(members), PrefixAware(), config, model=MODEL, token="", secret="", router_id="r", clock=time.monotonic
    )
    running = asyncio.create_task(dispatcher.run())
    while sum(worker["usable"] for worker in dispatcher.status()["workers"]) < len(members):  # noqa: ASYNC110 - set-up
        await asyncio.sleep(0.05)
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(32_000) for _ in range(isl)) for _ in range(num_requests)]
    numbers = iter(range(num_requests))

    async def client() -> None:
        for number in numbers:
            request = Request(RequestId(str(number)), prompts[number], isl, SamplingParams(max_tokens=osl), seed=0)
            stream = dispatcher.start(request, time.monotonic() + 300)
            received = 0
            async for delta in stream:
                received += len(delta.token_ids)
            assert received == osl, received

    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    num_tokens = num_requests * osl
    print(
        f"{num_requests} requests of {isl} in, {osl} out, {concurrency} at once, {len(members)} workers: "
        f"{cpu / num_requests * 1e3:.3f} ms CPU a request, {cpu / num_tokens * 1e6:.1f} us CPU a token, "
        f"{num_requests / wall:.0f} requests/s, {num_tokens / wall:.0f} tokens/s"
    )
    await dispatcher.close()
    await running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="of each role")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--isl", type=int, default=865, help="prompt tokens")
    parser.add_argument("--osl", type=int, default=16, help="output tokens")
    parser.add_argument("--step-ms", type=float, default=5.0, help="pause between a worker's frames")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_workers, args=(options.workers, options.step_ms / 1e3, theirs), daemon=True)
    process.start()
    members = [Joined(*each) for each in ours.recv()]
    uvloop.run(measure(members, options.requests, options.concurrency, options.isl, options.osl))
    ours.send("stop")
    process.join(10)


if __name__ == "__main__":
    main()
