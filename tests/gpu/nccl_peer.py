"""One end of a handoff over NCCL, as a process of its own that a test tells what to do.

    python -m tests.gpu.nccl_peer source|sink

NCCL refuses two ranks on one device unless they seem to be on different hosts, which NCCL_HOSTID says (and
NCCL_SOCKET_IFNAME=lo): set for each process by the test. Commands are lines of JSON on stdin, so are the answers.
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.errors import TransferError
from engine.kv.device_memory import DeviceMemory
from engine.kv.layout import BlockId, KvLayout
from engine.message_server import MessageServer
from kv_transfer.fingerprint import fingerprint
from kv_transfer.sink import KvSink
from kv_transfer.source import KvSource, SourceConfig
from kv_transfer.transports.nccl import NcclSink
from kv_transfer.transports.nccl_communicator import Nccl
from kv_transfer.transports.nccl_server import NcclServer
from kv_transfer.transports.shared_memory import host_boot_id

TOKEN = "a token"
LLAMA_3_8B = KvLayout(32, 8, 128, 16, "bfloat16")
GROUPS = (8, 16, 24, 32)
NUM_BLOCKS = 1100
FIRST_TOKEN = 42
SEED = 7


def print_of(layout: KvLayout) -> str:
    return fingerprint("model", [layout], b"secret")


def content(layout: KvLayout, num_blocks: int, device: torch.device) -> torch.Tensor:
    """What every source holds, block after block: uint8 [num_blocks, block_bytes]."""
    random = torch.Generator(device).manual_seed(SEED)
    shape = (num_blocks, layout.block_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=random)


@dataclass
class Source:
    memory: DeviceMemory
    source: KvSource
    server: MessageServer
    released: list[str] = field(default_factory=list)
    _num_offers: int = 0

    @staticmethod
    async def start(
        device: torch.device,
        layout: KvLayout = LLAMA_3_8B,
        groups: tuple[int, ...] = GROUPS,
        num_blocks: int = NUM_BLOCKS,
        nccl: Nccl | None = None,
    ) -> "Source":
        memory = DeviceMemory(layout, num_blocks, device)
        memory.tensor[: memory.size].copy_(content(layout, num_blocks, device).flatten())
        if device.type == "cuda":
            torch.cuda.synchronize()
        server = MessageServer("127.0.0.1", token=TOKEN)
        released: list[str] = []
        source = KvSource(
            worker_id="prefill",
            epoch="1",
            memory=memory,
            layer_groups=groups,
            fingerprint=print_of(layout),
            link_address=server.address,
            transports=[NcclServer(memory, host="127.0.0.1", token=TOKEN, nccl=nccl)],
            on_released=lambda lease_id, _: released.append(lease_id),
            config=SourceConfig(lease_s=3.0),
        )
        source.register(server)
        await server.start()
        return Source(memory, source, server, released)

    def offer(self, num_tokens: int) -> bytes:
        """Of a prompt that is final already, in blocks that are not neighbours."""
        self._num_offers += 1
        count = self.memory.layout.num_blocks_for(num_tokens)
        block_ids = [BlockId(block) for block in source_blocks(count, self.memory.num_blocks)]
        opened = self.source.open(f"r{self._num_offers}", block_ids, num_tokens, count)
        assert opened is not None
        self.source.finish(opened[0], FIRST_TOKEN, False)
        return opened[1]

    async def close(self) -> None:
        await self.server.stop()
        await self.source.close()
        self.memory.close()


@dataclass
class Sink:
    memory: DeviceMemory
    sink: KvSink
    expected: torch.Tensor

    @staticmethod
    def start(
        device: torch.device, layout: KvLayout = LLAMA_3_8B, num_blocks: int = NUM_BLOCKS, nccl: Nccl | None = None
    ) -> "Sink":
        memory = DeviceMemory(layout, num_blocks, device)
        sink = KvSink(
            worker_id="decode",
            memory=memory,
            fingerprint=print_of(layout),
            token=TOKEN,
            transports=[NcclSink(TOKEN, device, nccl=nccl)],
            boot_id=host_boot_id(),
        )
        return Sink(memory, sink, content(layout, num_blocks, device))

    async def pull(self, offer: bytes, num_tokens: int) -> dict[str, Any]:
        """`exact`: every byte of the blocks is right, and no byte of another block was touched."""
        count = self.memory.layout.num_blocks_for(num_tokens)
        blocks = sink_blocks(count, self.memory.num_blocks)
        self.memory.tensor.zero_()
        if self.memory.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.monotonic()
        try:
            pulled = await self.sink.pull(offer, block_ids=blocks, num_held_tokens=0, deadline=start + 30)
        except TransferError as error:
            return {"error": str(error), "seconds": time.monotonic() - start}
        seconds = time.monotonic() - start
        ours = self.memory.tensor[: self.memory.size].view(self.memory.num_blocks, -1)
        exact = torch.equal(ours[blocks], self.expected[source_blocks(count, self.memory.num_blocks)])
        ours[blocks] = 0
        exact = exact and not bool(ours.any())
        return {"exact": exact, "token": pulled.first_token, "bytes": pulled.num_bytes, "seconds": seconds}

    async def close(self) -> None:
        await self.sink.close()
        self.memory.close()


def source_blocks(count: int, num_blocks: int) -> list[int]:
    assert num_blocks % 7, num_blocks
    return [7 * i % num_blocks for i in range(count)]


def sink_blocks(count: int, num_blocks: int) -> list[int]:
    assert num_blocks % 3, num_blocks
    return [(3 * i + 5) % num_blocks for i in range(count)]


def healthy(device: torch.device) -> bool:
    """The CUDA context still computes."""
    ones = torch.ones(512, 512, device=device)
    return bool(((ones @ ones) == 512).all())


async def answer(peer: Source | Sink, command: dict[str, Any], device: torch.device) -> dict[str, Any]:
    match command["do"], peer:
        case "offer", Source():
            return {"offer": peer.offer(command["tokens"]).hex()}
        case "released", Source():
            return {"released": len(peer.released)}
        case "pull", Sink():
            return await peer.pull(bytes.fromhex(command["offer"]), command["tokens"])
        case "health", _:
            return {"healthy": healthy(device)}
    raise AssertionError(command)


async def main(role: str) -> None:
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    peer = await Source.start(device) if role == "source" else Sink.start(device)
    say({"ready": True})
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            say(await answer(peer, json.loads(line), device))
    finally:
        await peer.close()


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
