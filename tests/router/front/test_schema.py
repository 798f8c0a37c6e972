"""How much a body may hold, against a twin that reads it byte by byte."""

import itertools
import random
import tracemalloc

import pytest

from engine.errors import InvalidRequest
from router import schema
from router.schema import MAX_DEPTH, MAX_STRINGS, check_nesting

WORDS = [b'"', b'""', b'"["', b"[", b"]", b"{", b"}", b"\\", b"\\\\", b'\\"', b"a", b",", b"[]", "é".encode()]


def outside_by_state(text: bytes) -> bytes:
    """The brackets outside strings, all made square, one state a byte."""
    found = bytearray()
    in_string = escaped = False
    for byte in text:
        if escaped and byte in b'\\"':
            escaped = False
            continue
        escaped = byte == ord("\\")
        if byte == ord('"'):
            in_string = not in_string
        elif not in_string and byte in b"[]{}":
            found.append(ord("[") if byte in b"[{" else ord("]"))
    return bytes(found)


def depth(brackets: bytes) -> int:
    depths = itertools.accumulate(1 if bracket == ord("[") else -1 for bracket in brackets)
    return max(depths)


def balanced(rng: random.Random, left: int) -> bytes:
    parts = []
    for _ in range(rng.randrange(1, 5)):
        inside = b"".join(rng.choices(WORDS, k=rng.randrange(5)))
        string = inside.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
        parts.append(b'"%b"' % string)
        parts.append(rng.choice([b"[%b]", b"{%b}"]) % (balanced(rng, left - 1) if left else b""))
    return b",".join(rng.sample(parts, len(parts)))


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, schema.PIECE_BYTES])
def test_brackets_are_those_outside_strings_wherever_the_text_is_cut(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(piece_bytes)
    monkeypatch.setattr(schema, "PIECE_BYTES", piece_bytes)
    for _ in range(4000):
        text = b"".join(rng.choices(WORDS, k=rng.randrange(30)))
        found = b"".join(brackets for brackets, _ in schema._outside_strings(text))
        assert found == outside_by_state(text), text


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_nesting_is_refused_exactly_beyond_the_limit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(limit)
    monkeypatch.setattr(schema, "MAX_DEPTH", limit)
    seen = set()
    for _ in range(2000):
        text = b"[" + balanced(rng, 2) + b"]"
        too_deep = depth(outside_by_state(text)) > limit
        seen.add(too_deep)
        try:
            check_nesting(text)
        except InvalidRequest:
            assert too_deep, text
        else:
            assert not too_deep, text
    assert True in seen


def test_a_body_of_quotes_is_looked_through_in_little_memory() -> None:
    body = b'{"a":[' + b"[]," * (MAX_DEPTH + 1) + b'"",' * MAX_STRINGS + b"1]}"
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="524288 strings"):
        check_nesting(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


def test_more_strings_than_a_parser_should_make_are_refused_however_flat() -> None:
    names = b",".join(b'"k%d":1' % i for i in range(MAX_STRINGS))
    check_nesting(b"{" + names + b"}")
    with pytest.raises(InvalidRequest, match="strings"):
        check_nesting(b"{" + names + b',"one":1}')
