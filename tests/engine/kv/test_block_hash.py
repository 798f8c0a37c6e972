"""Block hashes: chained, unambiguous, and what their documentation says byte for byte."""

import struct

import pytest
from xxhash import xxh3_64_intdigest

from engine.kv.block_hash import block_hashes, bytes_to_tokens, chain_seed, sample_blocks, sampled, token_bytes


def test_each_link_hashes_the_one_before_and_its_own_tokens() -> None:
    seed, tokens = chain_seed("s", "m", "", ""), list(range(100, 111))
    expected, link = [], seed
    for start in (0, 4):
        link = xxh3_64_intdigest(struct.pack(">Q", link) + struct.pack("<4i", *tokens[start : start + 4]))
        expected.append(link)
    assert block_hashes(tokens, 4, seed) == expected


def test_a_chain_goes_on_from_any_of_its_links() -> None:
    tokens = list(range(64))
    hashes = block_hashes(tokens, 16, 7)
    assert block_hashes(tokens[32:], 16, hashes[1]) == hashes[2:]


def test_only_full_blocks_have_a_hash() -> None:
    assert [len(block_hashes(range(n), 8, 1)) for n in (0, 1, 7, 8, 15, 16)] == [0, 0, 0, 1, 1, 2]


def test_a_different_token_changes_its_block_and_all_that_follow() -> None:
    tokens = list(range(32))
    changed = [*tokens[:9], 77, *tokens[10:]]
    same = [a == b for a, b in zip(block_hashes(tokens, 8, 1), block_hashes(changed, 8, 1), strict=True)]
    assert same == [True, False, False, False]


def test_no_two_combinations_of_fields_start_the_same_chain() -> None:
    fields = [
        ("ab", "c", "", ""),
        ("a", "bc", "", ""),
        ("abc", "", "", ""),
        ("", "abc", "", ""),
        ("", "", "abc", ""),
        ("", "", "", "abc"),
        ("ab", "", "c", ""),
        ("ab", "", "", "c"),
        ("ab\0", "c", "", ""),
        ("ä", "\ud800", "", ""),
    ]
    assert len({chain_seed(*each) for each in fields}) == len(fields)


@pytest.mark.parametrize("token_id", [-1, 1 << 32])
def test_an_id_that_is_no_uint32_is_refused(token_id: int) -> None:
    with pytest.raises(OverflowError):
        block_hashes([token_id], 1, 0)


def test_tokens_survive_their_bytes() -> None:
    token_ids = (0, 1, 511_000, (1 << 32) - 1)
    data = token_bytes(token_ids)
    assert data[4:8] == b"\x01\0\0\0"
    assert bytes_to_tokens(data) == token_ids
    assert bytes_to_tokens(data[:-1]) == token_ids[:-1]
    assert bytes_to_tokens(b"") == ()


@pytest.mark.parametrize(
    ("block_size", "step"), [(16, 32), (48, 10), (512, 1), (2048, 1)], ids=["small", "uneven", "equal", "large"]
)
def test_a_sample_has_a_block_of_every_512_tokens_that_are_behind_others(block_size: int, step: int) -> None:
    hashes = list(range(5 * step + 1))
    assert sample_blocks(block_size) == step
    assert list(sampled(hashes, block_size)) == [step * place - 1 for place in range(1, 6)] + [5] * (step == 1)
    assert sampled(hashes, block_size, 2 * step * block_size - 1) == sampled(hashes, block_size)[1:]
    assert sampled(hashes, block_size, 2 * step * block_size) == sampled(hashes, block_size)[2:]
    assert sampled(hashes[: step - 1], block_size) == []
