"""The router's prefix index: store, find and remove, and bytes a block, against their targets.

Sequences: each worker in turn stores a sequence of so many blocks, whose first quarter is one of four that all share;
those sequences are looked up, and what one worker holds but for those quarters is removed. Lengths: every worker holds
blocks of its own and a random part of one chain of 2,048 blocks, which is looked up: as many places where somebody's
part ends as there are workers, the worst case. Events come as lists, as they do in frames, and requests know their
hashes as arrays. Trace: the prompts of a Mooncake trace, each stored on a random worker;
what one worker holds is removed. Bytes are the growth of the process's resident memory while the index fills from
hashes that are made and dropped a worker at a time. Memory is had as by a router of `baton up`: in huge pages where
there are any.

    python -m benchmarks.prefix_index --workers 64 1024 --blocks 1000000 --trace conversation_trace.jsonl
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil

from benchmarks._arguments import positive
from cluster.launcher import ROUTER_ENVIRON
from router.prefix_index import PrefixIndex

FIND_TARGETS_US = {128: 10, 512: 20, 2048: 25}
STORE_TARGET = 2.5e6
BYTES_TARGET = 150

_UINT64 = (1 << 64) - 1


def percentiles(index: PrefixIndex, queries: list[list[int]], count: int) -> tuple[float, float]:
    """p50 and p99 of `find`, in us."""
    times = []
    arrays, found = [np.array(query, np.uint64) for query in queries], np.zeros(index.num_slots)
    for i in range(count):
        start = time.perf_counter()
        index.find(arrays[i % len(arrays)], found)
        times.append(time.perf_counter() - start)
    times.sort()
    return times[count // 2] * 1e6, times[count * 99 // 100] * 1e6


def removal(index: PrefixIndex, slot: int, removed: Iterable[list[int]]) -> str:
    """The speed of events that remove these blocks, all of which the slot holds."""
    before, start = index.num_blocks(slot), time.perf_counter()
    for hashes in removed:
        index.apply(slot, (), hashes)
    return f"{(before - index.num_blocks(slot)) / (time.perf_counter() - start) / 1e6:.2f} M blocks/s"


def sequences(num_workers: int, num_blocks: int, length: int) -> None:
    rng = random.Random(0)
    index = PrefixIndex()
    slots = [index.open() for _ in range(num_workers)]
    prefixes = [[rng.getrandbits(64) for _ in range(length // 4)] for _ in range(4)]
    queries: list[list[int]] = []
    removed: list[list[int]] = []
    store_s = 0.0
    for number in range(num_blocks // length):
        sequence = rng.choice(prefixes) + [rng.getrandbits(64) for _ in range(length - length // 4)]
        start = time.perf_counter()
        index.apply(slots[number % num_workers], sequence)
        store_s += time.perf_counter() - start
        if len(queries) < 500:
            queries.append(sequence)
        if number % num_workers == 0:
            removed.append(sequence[: length // 4 - 1 : -1])  # leaves first
    p50, p99 = percentiles(index, queries, 5000)
    target = FIND_TARGETS_US[length]
    print(f"{num_workers} workers, {number + 1} sequences of {length} blocks")
    print(f"  find: p50 {p50:.1f} us ({p50 / target:.2f} of the target), p99 {p99:.1f} us", end="")
    print(f"; store {(number + 1) * length / store_s / 1e6:.2f} M blocks/s; remove {removal(index, slots[0], removed)}")


def lengths(num_workers: int, num_blocks: int) -> None:
    rng = random.Random(0)
    index = PrefixIndex()
    shared = [rng.getrandbits(64) for _ in range(2048)]
    each = num_blocks // num_workers
    process = psutil.Process()
    before, store_s = process.memory_info().rss, 0.0
    for _ in range(num_workers):
        slot = index.open()
        own = [rng.getrandbits(64) for _ in range(each)]
        start = time.perf_counter()
        index.apply(slot, own)
        store_s += time.perf_counter() - start
        index.apply(slot, shared[: rng.randrange(1, 2048)])
    size = (process.memory_info().rss - before) / index.num_hashes
    rate = num_workers * each / store_s
    print(f"{num_workers} workers hold as many lengths of a chain, {index.num_hashes} blocks")
    print(f"  store {rate / 1e6:.2f} M blocks/s ({rate / STORE_TARGET:.2f} of the target; more is better)")
    print(f"  {size:.0f} bytes a block ({size / BYTES_TARGET:.2f} of the target)")
    for length, target in FIND_TARGETS_US.items():
        p50, p99 = percentiles(index, [shared[:length]], 5000)
        print(f"  find {length}: p50 {p50:.1f} us ({p50 / target:.2f} of the target), p99 {p99:.1f} us")
    print(f"  remove {removal(index, slot, [own[::-1]])}")


def replay(trace: Path, num_workers: int) -> None:
    """Blocks of the trace, 512 tokens each, as 32 blocks of 16 tokens; no evictions."""
    rng = random.Random(0)
    index = PrefixIndex()
    slots = [index.open() for _ in range(num_workers)]
    with trace.open(encoding="utf-8") as lines:
        prompts = [json.loads(line)["hash_ids"] for line in lines]
    queries = [[hash((block, i)) & _UINT64 for block in prompt for i in range(32)] for prompt in prompts[:2000]]
    holders = [rng.choice(slots) for _ in queries]
    start = time.perf_counter()
    for slot, query in zip(holders, queries, strict=True):
        index.apply(slot, query)
    rate = sum(map(len, queries)) / (time.perf_counter() - start)
    p50, p99 = percentiles(index, queries, len(queries))
    print(f"{trace.name}, {len(queries)} prompts on {num_workers} workers, {index.num_hashes} blocks")
    of_one = (query for slot, query in zip(holders, queries, strict=True) if slot == slots[0])
    stored = dict.fromkeys(block for query in of_one for block in query)
    leaves_first = list(stored)[::-1]
    print(f"  store {rate / 1e6:.2f} M blocks/s; find p50 {p50:.1f} us, p99 {p99:.1f} us", end="")
    print(f"; remove {removal(index, slots[0], [leaves_first])}")


def main() -> None:
    default = Path(__file__).parents[2] / "shared/traces/mooncake_conversation_trace.jsonl"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=positive, nargs="+", default=[64, 1024])
    parser.add_argument("--blocks", type=positive, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--trace", type=Path, default=default if default.exists() else None)
    options = parser.parse_args()
    if options.trace is not None and not options.trace.is_file():
        parser.error(f"--trace: there is no file {options.trace}")
    if min(options.blocks) < max(FIND_TARGETS_US):
        parser.error(f"--blocks: at least {max(FIND_TARGETS_US)}, the longest sequence")
    if options.trace is not None:
        for num_workers in options.workers:
            replay(options.trace, num_workers)
    for num_blocks in options.blocks:
        for num_workers in options.workers:
            for length in FIND_TARGETS_US:
                sequences(num_workers, num_blocks, length)
            lengths(num_workers, num_blocks)


if __name__ == "__main__":
    if not ROUTER_ENVIRON.keys() <= os.environ.keys():  # as a router is started
        argv = [sys.executable, "-m", "benchmarks.prefix_index", *sys.argv[1:]]
        os.execve(sys.executable, argv, {**os.environ, **ROUTER_ENVIRON})
    main()
