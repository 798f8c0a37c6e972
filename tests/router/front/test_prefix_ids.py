import random
from pathlib import Path

import pytest

from baton.demo_model import demo_model
from router.prefix_ids import MAX_LOOKS, MIN_CHARS, PrefixIds
from router.tokenizer import Tokenizer, load_tokenizer

WORDS = ["the ", "river", " is", "\n", "  wide", "é", "<|", "|>", "42", ""]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(str(demo_model())))


def through(prefixes: PrefixIds, tokenizer: Tokenizer, text: str, owner: str = "") -> tuple[list[int], int]:
    """The ids, and how many of them were known."""
    known, rest = prefixes.find(owner, text)
    ids = [*known, *tokenizer.encode(rest, add_special_tokens=False)]
    prefixes.keep(owner, text, ids)
    return ids, len(known)


@pytest.mark.parametrize("seed", range(10))
def test_a_growing_chat_gets_the_ids_of_a_whole_encoding(tokenizer: Tokenizer, seed: int) -> None:
    rng, prefixes, cuts = random.Random(seed), PrefixIds(tokenizer), list(tokenizer.cut_tokens)
    assert cuts
    text, num_known = "".join(rng.choices(WORDS, k=MIN_CHARS)), 0
    for _ in range(20):
        for _ in range(rng.randrange(1, 5)):
            text += rng.choice(cuts) + "".join(rng.choices([*WORDS * 4, *cuts], k=rng.randrange(20)))
        ids, known = through(prefixes, tokenizer, text)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        num_known += known > 0
    assert num_known > 10


def test_owners_share_nothing(tokenizer: Tokenizer) -> None:
    prefixes, text = PrefixIds(tokenizer), "river " * MIN_CHARS + next(iter(tokenizer.cut_tokens))
    found = [through(prefixes, tokenizer, text, owner)[1] > 0 for owner in ("a", "b", "a")]
    assert found == [False, False, True]


def test_as_many_cuts_are_looked_at_as_turns_of_a_chat_may_add(tokenizer: Tokenizer) -> None:
    prefixes, cut = PrefixIds(tokenizer), next(iter(tokenizer.cut_tokens))
    text = "x" * MIN_CHARS + cut
    through(prefixes, tokenizer, text)
    found = [bool(prefixes.find("", text + num_more * ("y" + cut))[0]) for num_more in (MAX_LOOKS - 1, MAX_LOOKS)]
    assert found == [True, False]


def test_what_is_kept_is_bounded_and_the_least_recently_used_goes_first(tokenizer: Tokenizer) -> None:
    prefixes, cut = PrefixIds(tokenizer, max_chars=3 * MIN_CHARS), next(iter(tokenizer.cut_tokens))
    texts = [f"{name} " + "x" * MIN_CHARS + cut for name in "abc"]
    for number, known in ((0, False), (1, False), (1, True), (0, True), (0, True), (2, False)):
        assert (through(prefixes, tokenizer, texts[number])[1] > 0) == known
    assert [bool(prefixes.find("", text)[0]) for text in texts] == [True, False, True]
    through(prefixes, tokenizer, "y" * 4 * MIN_CHARS + cut)
    assert not prefixes.find("", "y" * 4 * MIN_CHARS + cut)[0]
