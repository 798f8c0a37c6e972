"""The kernel that copies rows of bytes between two places in a device's memory, as a table says. CUDA only."""

from typing import Any

import torch
import triton
import triton.language as tl

from kv_transfer.copy_stream import WIDEST
from kv_transfer.transports import cuda_driver as driver

# What a program has in flight. With less than 32 KiB, one program for each multiprocessor is not enough. Twice as many
# programs copied no faster, and cost a matrix product beside them three times as much for each byte copied.
LARGE_CHUNK_BYTES = 32 << 10
SMALL_CHUNK_BYTES = 4 << 10  # for rows that do not fill a large one
WARP_BYTES = 2 << 10


class RowCopy:
    """Copies rows within one device's memory; a launch takes about 10 us of the host.

    What is compiled is launched directly: finding it by the arguments, as Triton does at every call, took 40 us. It
    is compiled and loaded when this is made, seconds the first time, for all but rows not aligned to 16 bytes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._compiled: dict[tuple[int, int], tuple[Any, tuple[int, ...]]] = {}
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with driver.context(device.index):
            for chunk_bytes in (SMALL_CHUNK_BYTES, LARGE_CHUNK_BYTES):
                self.launch(0, 0, 0, 0, WIDEST, chunk_bytes, stream.cuda_stream)

    def launch(self, source: int, sink: int, table: int, num_rows: int, unit: int, max_bytes: int, stream: int) -> None:
        """source, sink: addresses; table: of int64 [num_rows, 3]: offset in source, offset in sink, size, in bytes.

        `unit`, a power of two up to WIDEST, divides both addresses and all of the table; no row is longer than
        `max_bytes`. The device's context is the current one (`cuda_driver.context`); `stream` is a handle. Every
        multiprocessor is kept busy: on an H200 88 to 93 % of a plain copy's bandwidth.
        """
        chunk_bytes = LARGE_CHUNK_BYTES if max_bytes > LARGE_CHUNK_BYTES // 2 else SMALL_CHUNK_BYTES
        chunks_per_row = -(-max_bytes // chunk_bytes)
        num_chunks = num_rows * chunks_per_row
        num_programs = min(max(1, num_chunks), self._num_processors * LARGE_CHUNK_BYTES // chunk_bytes)
        kernel, constants = self._kernel(unit, chunk_bytes)
        kernel[num_programs, 1, 1](source, sink, table, num_chunks, chunks_per_row, *constants, stream=stream)

    def _kernel(self, unit: int, chunk_bytes: int) -> tuple[Any, tuple[int, ...]]:
        """With its constants, which every launch repeats."""
        found = self._compiled.get((unit, chunk_bytes))
        if found is None:
            word = min(unit, 8)
            constants = {"WORD": word, "STEP": unit // word, "CHUNK": chunk_bytes // word}
            pointer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[word]
            with torch.cuda.device(self._device):
                kernel = _copy_rows.warmup(
                    pointer, pointer, torch.int64, 1, 1, **constants, num_warps=chunk_bytes // WARP_BYTES, grid=(1,)
                )
            found = self._compiled[unit, chunk_bytes] = kernel, tuple(constants.values())
        return found


# Without specialization: what is compiled must serve any number of chunks.
@triton.jit(do_not_specialize=["num_chunks", "chunks_per_row"])
def _copy_rows(
    source,
    sink,
    table,
    num_chunks,
    chunks_per_row,
    WORD: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Program p takes chunks p, p + number of programs, ... of all rows. STEP words that lie together move at once."""
    words = tl.arange(0, CHUNK)
    chunk = tl.program_id(0)
    while chunk < num_chunks:
        row = table + (chunk // chunks_per_row).to(tl.int64) * 3
        start = (chunk % chunks_per_row).to(tl.int64) * CHUNK
        source_word = tl.multiple_of(tl.load(row) // WORD, STEP)
        sink_word = tl.multiple_of(tl.load(row + 1) // WORD, STEP)
        num_words = tl.multiple_of(tl.load(row + 2) // WORD - start, STEP)
        mask = words < num_words
        values = tl.load(source + source_word + start + words, mask=mask)
        tl.store(sink + sink_word + start + words, values, mask=mask)
        chunk += tl.num_programs(0)
