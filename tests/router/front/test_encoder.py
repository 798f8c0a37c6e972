"""The faster encoder gives the ids of `tokenizers`, or is not used."""

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre

from router import encoder
from router.encoder import make_encoder

CORPUS = [
    "The river isn't wide; we'll cross it slowly, under the old bridge. 12345 stones!\n\n",
    "def f(x_1, *args):\n    return {'a': x_1 + 6.75}  # done\r\n",
    "Grüße aus Köln, żółć, naïve café. Привет, мир! مرحبا 你好，世界。今天天气很好。안녕하세요 こんにちは 🙂👩\u200d👧",
]
SPECIAL = ["<|begin|>", "<|end|>"]
LLAMA_3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
ATOMS = [
    "\n",
    "\r\n",
    " ",
    "   ",
    "\t",
    "\u00a0",
    "\u2028",
    "'s",
    "'LL",
    "1",
    "1234",
    "é",
    "e\u0301",
    "世",
    "\x00",
    "_-<|",
]


def byte_level(*, ignore_merges: bool = False, regex: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    tokenizer.pre_tokenizer = last if regex is None else pre.Sequence([pre.Split(Regex(regex), "isolated"), last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, special=True), AddedToken("word", single_word=True)])
    begin = [("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=begin)
    return tokenizer


def normalized() -> Tokenizer:
    tokenizer = byte_level(regex=LLAMA_3.replace("{1,3}", ""))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def byte_fallback() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, max_token_length=16, show_progress=False)
    tokenizer.train_from_iterator(CORPUS[:2] * 4, trainer)
    return tokenizer


KINDS = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level(ignore_merges=True, regex=LLAMA_3),
    "qwen2": normalized,
    "sentencepiece": byte_fallback,
}


def random_text(rng: random.Random) -> str:
    joined, start = "".join(CORPUS), rng.randrange(200)
    pieces = [joined[start : start + rng.randrange(100)], *rng.choices(ATOMS, k=rng.randrange(12))]
    pieces += rng.choices([*SPECIAL, "<mask>", "word", " words"], k=rng.randrange(3))
    pieces += [chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(5)]
    rng.shuffle(pieces)
    return "".join(pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizers(kind: str) -> None:
    pytest.importorskip("fastokens")
    backend, rng = KINDS[kind](), random.Random(0)
    encode = make_encoder(backend)
    assert encode.__name__ == "encode_fast"
    for text in ["", *(random_text(rng) for _ in range(300)), "a" * 20_000, " \n" * 10_000]:
        for special in (True, False):
            assert encode(text, special) == backend.encode(text, add_special_tokens=special).ids


class Wrong:
    """Gives other ids than `tokenizers`."""

    @staticmethod
    def from_json_str(described: str) -> "Wrong":
        assert described
        return Wrong()

    def encode(self, _text: str, *, add_special_tokens: bool) -> Any:
        return type("Encoding", (), {"ids": [int(add_special_tokens)]})


class GivesUp(Wrong):
    """As when the bound on a pattern's matching is met."""

    @staticmethod
    def from_json_str(described: str) -> "GivesUp":
        assert described
        return GivesUp()

    def encode(self, _text: str, *, add_special_tokens: bool) -> Any:
        raise ValueError(f"match limit exceeded, {add_special_tokens}")


@pytest.mark.parametrize("library", [None, type("", (), {"Tokenizer": Wrong}), type("", (), {"Tokenizer": GivesUp})])
def test_another_encoder_steps_in(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    monkeypatch.setattr(encoder, "fastokens", library)
    backend = byte_level()
    assert make_encoder(backend)("The river", True) == backend.encode("The river").ids


def test_a_kind_that_the_faster_encoder_does_not_know_is_served() -> None:
    backend = byte_fallback()
    backend.normalizer = None
    backend.pre_tokenizer = pre.Metaspace()
    assert make_encoder(backend)("The river", True) == backend.encode("The river").ids
