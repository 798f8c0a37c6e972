"""Chained hashes of full blocks: the name under which a prefix is cached. Used by workers and by the router.

h_i = xxh3-64(h_{i-1} followed by the tokens of block i as little-endian uint32). The chain starts from a seed made of
the deployment's secret, model, adapter and cache salt, so nothing is shared across them and nobody outside can
construct a collision; whoever reuses a block compares its tokens all the same.
"""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from struct import unpack
from typing import TYPE_CHECKING, TypeVar

from xxhash import xxh3_64_digest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TOKEN_BYTES = 4
SAMPLE_TOKENS = 512

S = TypeVar("S", Sequence[int], "npt.NDArray[np.uint64]")


@lru_cache(1024)
def chain_seed(secret: str, model: str, adapter: str, salt: str) -> int:
    """The link before the first block. Fields are length-prefixed, so no two combinations are the same bytes."""
    state = blake2b(digest_size=8, person=b"baton-block-hash")
    for field in (secret, model, adapter, salt):
        encoded = field.encode("utf-8", "surrogatepass")
        state.update(len(encoded).to_bytes(8, "little"))
        state.update(encoded)
    return int.from_bytes(state.digest(), "big")


def block_hashes(token_ids: Sequence[int], block_size: int, seed: int) -> list[int]:
    """One hash for each full block. `seed` is the link before: the chain's, or the hash of the block before."""
    links = packed_hashes(token_bytes(token_ids), block_size, seed)
    return list(unpack(f">{len(links) // 8}Q", links))


def packed_hashes(tokens: bytes, block_size: int, seed: int) -> bytes:
    """`block_hashes` of what `token_bytes` made, as big-endian uint64."""
    size = block_size * TOKEN_BYTES
    link = seed.to_bytes(8, "big")
    links: list[bytes] = []
    for start in range(0, len(tokens) - size + 1, size):
        link = xxh3_64_digest(link + tokens[start : start + size])
        links.append(link)
    return b"".join(links)


def sampled(hashes: S, block_size: int, num_tokens: int = 0) -> S:
    """Of every SAMPLE_TOKENS tokens, counted from the beginning, the hash of the block that ends them, of larger blocks
    each one's; without those among the first `num_tokens`. It is what is said of prompts that are not computed yet."""
    step = sample_blocks(block_size)
    return hashes[step - 1 :: step][num_tokens // (step * block_size) :]


def sample_blocks(block_size: int) -> int:
    """One block of so many is in a sample."""
    return max(1, SAMPLE_TOKENS // block_size)


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Raises OverflowError for an id that is no uint32: ids are checked before they are hashed."""
    return array("I", token_ids).tobytes()


def bytes_to_tokens(tokens: bytes) -> tuple[int, ...]:
    """What `token_bytes` was given; a part of a token at the end is left out."""
    return tuple(memoryview(tokens)[: len(tokens) // TOKEN_BYTES * TOKEN_BYTES].cast("I"))
