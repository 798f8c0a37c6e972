"""The kernel that copies rows of bytes between two places in a device's memory, as a table says. CUDA only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_BYTES = 32 << 10  # what a program has in flight: with less, one program per multiprocessor is not enough
MIN_CHUNK_BYTES = 4 << 10
WARP_BYTES = 4 << 10


def copy_rows(source: Tensor, sink: Tensor, table: Tensor, unit: int, max_bytes: int, num_processors: int) -> None:
    """source, sink uint8; table int64 [rows, 3]: offset in source, offset in sink, size; none longer than `max_bytes`.

    Everything is in bytes. `unit`, a power of two up to 16, divides both addresses and all of the table: more bytes
    than 16 at a time no thread can move, and fewer cost bandwidth. `num_processors` of the device are kept busy with
    CHUNK_BYTES each: on an H200 84 to 91 % of a plain copy's bandwidth. Twice as many programs copied no faster, and
    cost a matrix product beside them three times as much time for each byte copied.
    """
    word = min(unit, 8)
    chunk_bytes = min(CHUNK_BYTES, max(MIN_CHUNK_BYTES, triton.next_power_of_2(max_bytes)))
    chunk = chunk_bytes // word
    chunks_per_row = triton.cdiv(max_bytes // word, chunk)
    num_chunks = len(table) * chunks_per_row
    _copy_rows[(min(num_chunks, num_processors * CHUNK_BYTES // chunk_bytes),)](
        _words(source, word),
        _words(sink, word),
        table,
        num_chunks,
        chunks_per_row,
        WORD=word,
        STEP=unit // word,
        CHUNK=chunk,
        num_warps=chunk_bytes // WARP_BYTES,
    )


def _words(tensor: Tensor, word: int) -> Tensor:
    """What is left over at the end belongs to no row."""
    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor[: len(tensor) // word * word].view(types[word])


# Without specialization: it would compile again, in mid-service, for a number of chunks that happens to be special.
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
