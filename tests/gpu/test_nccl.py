"""KV over NCCL between processes that share one GPU and name different hosts. Correctness: it runs over sockets."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

TOKENS = 16384  # 2 GiB of Llama-3-8B's KV: most of a second over sockets
START_S = 60.0
ANSWER_S = 20.0
SOON_S = 8.0  # beyond every deadline of a link (2 s) and a transfer (5 s) together
IN_MID_TRANSFER_S = 0.25


class Peer:
    """A process of `nccl_peer`. `tell` what to do, `hear` the answer."""

    def __init__(self, role: str, name: str) -> None:
        environment = dict(os.environ, NCCL_HOSTID=name, NCCL_SOCKET_IFNAME="lo")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.nccl_peer", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # NCCL may say something of its own
                self._answers.put(line)

    def tell(self, do: str, **what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
        self.process.stdin.flush()

    def hear(self, timeout: float = ANSWER_S) -> dict[str, Any]:
        return json.loads(self._answers.get(timeout=timeout))

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        self.tell(do, **what)
        return self.hear()

    def offer(self) -> dict[str, Any]:
        return {"offer": self.ask("offer", tokens=TOKENS)["offer"], "tokens": TOKENS}

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(15)
        finally:
            self.process.kill()
            self.process.wait()


@contextmanager
def started(*roles: str) -> Iterator[list[Peer]]:
    """Peers start together, which takes as long as one."""
    peers = [Peer(role, f"host-{i}") for i, role in enumerate(roles)]
    try:
        for peer in peers:
            assert peer.hear(START_S) == {"ready": True}
        yield peers
    finally:
        for peer in peers:
            if peer.process.poll() is None:
                peer.end()


def check_pull(answer: dict[str, Any]) -> None:
    assert answer.get("exact") is True, answer
    assert answer["token"] == 42


def until(condition: Callable[[], bool], timeout: float) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_kv_arrives_bit_exact_and_a_link_is_used_again() -> None:
    with started("source", "sink") as (source, sink):
        for _ in range(2):
            answer = sink.ask("pull", **source.offer())
            check_pull(answer)
            print(f"{answer['bytes'] / answer['seconds'] / 1e9:.2f} GB/s in {answer['seconds']:.2f} s")
        until(lambda: source.ask("released")["released"] == 2, SOON_S)
        sink.end()
        source.end()
        assert (source.process.returncode, sink.process.returncode) == (0, 0)


def test_a_source_that_is_killed_fails_its_pull_and_the_sink_pulls_from_another() -> None:
    with started("source", "source", "sink") as (doomed, other, sink):
        check_pull(sink.ask("pull", **doomed.offer()))
        sink.tell("pull", **doomed.offer())
        time.sleep(IN_MID_TRANSFER_S)
        doomed.process.kill()
        answer = sink.hear()
        assert "error" in answer, answer
        assert answer["seconds"] < SOON_S
        print(f"failed after {answer['seconds']:.2f} s: {answer['error']}")
        assert sink.ask("health") == {"healthy": True}
        check_pull(sink.ask("pull", **other.offer()))
        sink.end()
        assert sink.process.returncode == 0


def test_a_sink_that_is_killed_gives_its_blocks_back_and_the_source_serves_another() -> None:
    with started("source", "sink", "sink") as (source, doomed, other):
        doomed.tell("pull", **source.offer())
        time.sleep(IN_MID_TRANSFER_S + 1.0)  # the communicator has to be made first
        doomed.process.kill()
        until(lambda: source.ask("released")["released"] == 1, SOON_S)
        assert source.ask("health") == {"healthy": True}
        check_pull(other.ask("pull", **source.offer()))
        source.end()
        assert source.process.returncode == 0


@pytest.mark.parametrize("frozen", ["source", "sink"])
def test_a_peer_that_stands_still_is_given_up_and_works_again_later(frozen: str) -> None:
    with started("source", "sink", "sink") as (source, sink, other):
        check_pull(sink.ask("pull", **source.offer()))
        victim = source if frozen == "source" else sink
        sink.tell("pull", **source.offer())
        time.sleep(IN_MID_TRANSFER_S)
        victim.process.send_signal(signal.SIGSTOP)
        if frozen == "source":
            answer = sink.hear()
            assert "error" in answer, answer
            assert answer["seconds"] < SOON_S
            assert sink.ask("health") == {"healthy": True}
        else:
            until(lambda: source.ask("released")["released"] == 2, SOON_S)
            assert source.ask("health") == {"healthy": True}
            check_pull(other.ask("pull", **source.offer()))
        victim.process.send_signal(signal.SIGCONT)
        if frozen == "sink":
            assert "error" in sink.hear()
        check_pull(sink.ask("pull", **source.offer()))
