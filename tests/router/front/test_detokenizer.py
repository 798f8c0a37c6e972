"""Incremental text equals text decoded in one go, and stop strings are found wherever the tokens are cut."""

from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from engine.request import FinishReason, SamplingParams
from router.chat_template import ChatTemplates
from router.detokenizer import StopMatcher, StopStrings, TextStream, parse_rules
from router.tokenizer import Tokenizer

BYTE_LEVEL_WORDS = ["a", "b", "ab", "Ġ", "Ġa", "ĠĠ", "ðŁ", "ĺ", "Ģ", "ĺĢ", "Ã", "©", "ÿ", "Ċ", "c"]
SENTENCE_WORDS = [
    "a",
    "b",
    "ab",
    "▁",
    "▁a",
    "▁▁",
    "é",
    "<0xF0>",
    "<0x9F>",
    "<0x98>",
    "<0x80>",
    "<0xC3>",
    "<0xA9>",
    "<0x0A>",
]


def make(words: Sequence[str], decoder: decoders.Decoder) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    backend.decoder = decoder
    backend.add_tokens([AddedToken("<s>", special=True), AddedToken(" x y", special=False), AddedToken("é€")])
    return Tokenizer(backend, ChatTemplates({}, {}, None))  # type: ignore[arg-type]


REPLACE, FALLBACK, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
LLAMA = make(SENTENCE_WORDS, decoders.Sequence([REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 0)]))
GEMMA = make(SENTENCE_WORDS, decoders.Sequence([REPLACE, FALLBACK, FUSE]))
BYTES = make(BYTE_LEVEL_WORDS, decoders.ByteLevel())
TOKENIZERS = {"llama": LLAMA, "gemma": GEMMA, "bytes": BYTES}

ids = st.lists(st.integers(0, max(len(SENTENCE_WORDS), len(BYTE_LEVEL_WORDS)) + 4), max_size=24)


def cut(token_ids: list[int], seed: int) -> list[list[int]]:
    """Cut into deltas, a different way for each seed."""
    deltas: list[list[int]] = [[]]
    for i, token_id in enumerate(token_ids):
        deltas[-1].append(token_id)
        if (seed >> (i % 16)) & 1:
            deltas.append([])
    return deltas


@pytest.mark.parametrize("name", TOKENIZERS)
@given(token_ids=ids, seed=st.integers(0, 65535), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_pushed_text_is_the_decoded_text(name: str, token_ids: list[int], seed: int, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    stream = TextStream(tokenizer, SamplingParams(skip_special_tokens=skip))

    def push(delta: list[int]) -> str:
        return stream.decoder.push_token(delta[0]) if len(delta) == 1 else stream.push(delta)

    deltas = cut(token_ids, seed)
    text = "".join([push(delta) for delta in deltas]) + stream.finish()
    assert text == tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert stream.num_tokens == sum(len(delta) for delta in deltas if len(delta) != 1)


@given(prompt=st.lists(st.sampled_from([0, 1, 2, 4]), min_size=1, max_size=4), token_ids=ids)
@settings(max_examples=200, deadline=None)
def test_output_continues_its_prompt(prompt: list[int], token_ids: list[int]) -> None:
    stream = TextStream(LLAMA, SamplingParams(), prompt)
    assert LLAMA.decode(prompt) + stream.push(token_ids) + stream.finish() == LLAMA.decode([*prompt, *token_ids])


@pytest.mark.parametrize(("name", "words"), [("gemma", SENTENCE_WORDS), ("bytes", BYTE_LEVEL_WORDS)])
def test_output_is_not_joined_with_the_bytes_a_prompt_ends_in(name: str, words: list[str]) -> None:
    first, second = (words.index(word) for word in (("<0xC3>", "<0xA9>") if name == "gemma" else ("Ã", "©")))
    stream = TextStream(TOKENIZERS[name], SamplingParams(), [first])
    assert TOKENIZERS[name].decode([first, second]) == "é"
    assert stream.push([second]) + stream.finish() == "\ufffd"


def test_a_leading_space_is_dropped_only_where_the_text_begins() -> None:
    space_a = SENTENCE_WORDS.index("▁a")
    bos = len(SENTENCE_WORDS)
    assert TextStream(LLAMA, SamplingParams(), [0]).push([space_a]) == " a"
    assert TextStream(LLAMA, SamplingParams(), [bos]).push([space_a]) == "a"
    assert TextStream(LLAMA, SamplingParams()).push([space_a]) == "a"


@pytest.mark.parametrize("name", TOKENIZERS)
@given(token_ids=ids, skip=st.booleans())
@settings(max_examples=100, deadline=None)
def test_at_rest_a_token_adds_the_same_in_every_text(name: str, token_ids: list[int], skip: bool) -> None:
    """Lanes write again what a token added once."""
    decoder = TOKENIZERS[name].decoder(skip_special_tokens=skip)
    for token_id in token_ids:
        at_rest, text = decoder.at_rest, decoder.push_token(token_id)
        if at_rest and decoder.at_rest:
            fresh = TOKENIZERS[name].decoder(skip_special_tokens=skip, prompt=[0])
            assert fresh.at_rest
            assert fresh.pieces is decoder.pieces
            assert (fresh.push_token(token_id), fresh.at_rest) == (text, True)
    assert not (decoder.at_rest and decoder.finish())


def test_no_part_of_a_character_is_shown() -> None:
    stream = TextStream(BYTES, SamplingParams())
    emoji = [BYTE_LEVEL_WORDS.index(word) for word in ("ðŁ", "ĺ", "Ģ")]
    assert [stream.push([token_id]) for token_id in emoji] == ["", "", "😀"]
    assert stream.push(emoji[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_a_decoder_of_another_kind_is_refused_by_name() -> None:
    for decoder, name in (({"type": "WordPiece"}, "WordPiece"), (None, "none")):
        with pytest.raises(ValueError, match=name):
            parse_rules(decoder)


def brute_force(text: str, heeded: Sequence[bool], stops: Sequence[str], include: bool) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found and heeded[end - 1]:
            return text[: end if include else end - max(map(len, found))], True
    return text, False


texts = st.text(alphabet="ab", max_size=30)
stop_strings = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


@given(parts=st.lists(st.tuples(texts, st.booleans()), max_size=12), stops=stop_strings, include=st.booleans())
@settings(max_examples=1500, deadline=None)
def test_stops_are_found_as_by_brute_force(parts: list[tuple[str, bool]], stops: list[str], include: bool) -> None:
    matcher = StopMatcher(StopStrings(stops), include=include)
    text, heeded, shown, stopped = "", [], "", False
    for part, heed in parts:
        free, stopped = matcher.feed(part, heed=heed)
        text, shown = text + part, shown + free
        heeded += [heed] * len(part)
        expected, expected_stopped = brute_force(text, heeded, stops, include)
        assert stopped == expected_stopped
        if stopped:
            assert shown == expected
            return
        held = text[len(shown) :]
        assert text.startswith(shown)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops), "held without a reason"
    assert shown + matcher.finish() == text


@given(
    token_ids=ids,
    seed=st.integers(0, 65535),
    stops=st.lists(st.text(alphabet="ab 😀é\n", min_size=1, max_size=3), min_size=1, max_size=3),
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
    name=st.sampled_from(sorted(TOKENIZERS)),
)
@settings(max_examples=600, deadline=None)
def test_a_stopped_stream_is_the_same_however_tokens_are_cut(
    token_ids: list[int], seed: int, stops: list[str], min_tokens: int, include: bool, name: str
) -> None:
    tokenizer = TOKENIZERS[name]
    params = SamplingParams(stop=tuple(stops), min_tokens=min_tokens, max_tokens=64, include_stop_str_in_output=include)
    plain, text, heeded, num_used = TextStream(tokenizer, SamplingParams()), "", [], None
    for i, token_id in enumerate([*token_ids, None], start=1):
        new = plain.finish() if token_id is None else plain.push([token_id])
        text += new
        heeded += [min(i, len(token_ids)) > min_tokens] * len(new)
        if num_used is None and brute_force(text, heeded, stops, include)[1]:
            num_used = min(i, len(token_ids))
    stream = TextStream(tokenizer, params)
    shown = ""
    for delta in cut(token_ids, seed):
        shown += stream.push(delta)
        if stream.stopped:
            break
    shown += stream.finish()
    assert (shown, stream.stopped) == brute_force(text, heeded, stops, include)
    assert stream.num_tokens == (len(token_ids) if num_used is None else num_used)


def test_the_token_that_stopped_the_engine_is_counted_but_not_shown() -> None:
    for include, text in ((False, "a"), (True, "ab")):
        stream = TextStream(BYTES, SamplingParams(include_stop_str_in_output=include))
        assert stream.push([0, 1], FinishReason.STOP) == text
        assert stream.num_tokens == 2
    stream = TextStream(BYTES, SamplingParams())
    assert stream.push([0, 1], FinishReason.LENGTH) == "ab"


def test_held_text_is_shown_at_the_end_of_the_output() -> None:
    stream = TextStream(BYTES, SamplingParams(stop=("abc",)))
    assert stream.push([0]) == ""
    assert stream.push([1]) == ""
    assert stream.push([0, 1], FinishReason.LENGTH) == "abab"


def test_many_long_stop_strings_cost_constant_time_for_each_character() -> None:
    matcher = StopMatcher(StopStrings(["a" * length + "b" for length in range(1, 65)]), include=False)
    text = "a" * 20_000
    shown = matcher.feed(text, heed=True)[0] + matcher.finish()
    assert shown == text
