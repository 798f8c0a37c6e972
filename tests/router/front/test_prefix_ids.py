import json
import random
import shutil
from pathlib import Path

import pytest

from baton.demo_model import demo_model
from router.prefix_ids import MAX_LOOKS, MIN_CHARS, PrefixIds
from router.tokenizer import Tokenizer, load_tokenizer

WORDS = ["the ", "river", " is", "\n", "  wide", "é", "e", "\u0301", "\u212b", "<|", "|>", "42", ""]
NFC = {"type": "NFC"}
TWO_FORMS = {"type": "Sequence", "normalizers": [NFC, {"type": "NFKC"}]}


def with_normalizer(normalizer: object, path: Path) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(str(demo_model())) / name, path)
    described = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    (path / "tokenizer.json").write_text(json.dumps(described | {"normalizer": normalizer}), encoding="utf-8")
    return load_tokenizer(path)


@pytest.fixture(scope="module", params=[None, NFC, TWO_FORMS], ids=["no normalizer", "NFC", "two"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Qwen's has a normalizer: what stands between two special tokens is normalized by itself."""
    return with_normalizer(request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("kind", [{"type": "Prepend", "prepend": "▁"}, {"type": "Lowercase"}])
def test_where_a_normalizer_does_more_than_that_nothing_is_cut(tmp_path: Path, kind: dict[str, str]) -> None:
    assert not with_normalizer({"type": "Sequence", "normalizers": [NFC, kind]}, tmp_path).cut_tokens


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
