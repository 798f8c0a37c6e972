"""What the demo model is trained on: dialogues, their rendering, what is learnt of them, and what is held out."""

import json
import random
from dataclasses import asdict

import pytest
import transformers

from benchmarks.demo_model import corpus, facts, library, windows
from benchmarks.demo_model.dialogues import KINDS, Dialogues
from benchmarks.demo_model.language import NUM_HELD_OUT, does, listing, say
from benchmarks.demo_model.tokenizer import CALL, VOCAB_SIZE, render, save, train
from router.prompts import render_messages
from router.tokenizer import load_tokenizer

TEXT = "A block is owned by one. A lease has an end. Nobody copies a block that nobody owns."


@pytest.fixture(scope="module")
def content():
    known = [asdict(fact) for fact in facts.collect()]
    documents = [f"{fact['name']}\n{fact['summary']} {fact['returns']}" for fact in known]
    return {
        "documents": documents,
        "facts": known,
        "texts": [TEXT],
        "glossary": {"lease": "a promise"},
        "own_text": TEXT,
        "gist": ["Blocks are owned."],
    }


@pytest.fixture(scope="module")
def dialogues(content):
    return Dialogues(content)


@pytest.fixture(scope="module")
def trained(content):
    return train(content)


def test_the_template_renders_dialogues_alike_here_in_transformers_and_in_baton(dialogues, trained, tmp_path):
    save(trained, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    served = load_tokenizer(tmp_path)
    rng = random.Random(1)
    for kind in KINDS:
        for _ in range(20):
            made = dialogues.make(rng, kind)
            text = render(made.messages, made.tools)
            assert text == reference.apply_chat_template(made.messages, tools=made.tools, tokenize=False)
            assert text == render_messages(served, made.messages, tools=made.tools, add_generation_prompt=False)
            assert served.encode(text, add_special_tokens=False) == reference(text, add_special_tokens=False).input_ids


def test_a_tool_call_is_shown_in_the_text_of_an_answer(trained, tmp_path):
    save(trained, tmp_path)
    served = load_tokenizer(tmp_path)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    text = render_messages(served, [{"role": "user", "content": "1 + 1?"}, said], add_generation_prompt=False)
    assert served.vocab_size == VOCAB_SIZE
    shown = served.decode(served.encode(text, add_special_tokens=False))
    assert json.loads(shown.partition(CALL)[2].removesuffix("</tool_call>")) == {"name": "add", "arguments": {"a": 1}}


def test_exactly_what_the_assistant_says_is_learnt(dialogues, trained):
    rows = windows.dialogue_rows(dialogues, trained, 0, 2)
    ids, learnt = rows & (windows.LEARNT - 1), rows >= windows.LEARNT
    begins, end = trained.token_to_id("<|assistant|>"), trained.token_to_id("<|end|>")
    speaks = False
    for token_id, marked in zip(ids.ravel().tolist(), learnt.ravel().tolist(), strict=True):
        assert marked is speaks
        speaks = token_id == begins or (speaks and token_id != end)
    assert 0.2 < learnt.mean() < 0.7


def test_a_shard_is_the_same_every_time_and_no_other(dialogues, trained):
    first = windows.dialogue_rows(dialogues, trained, 7, 1)
    assert (windows.dialogue_rows(dialogues, trained, 7, 1) == first).all()
    assert (windows.dialogue_rows(dialogues, trained, 8, 1) != first).any()


def test_held_out_names_are_never_asked_about(dialogues):
    rng = random.Random(2)
    held_out = {fact.name for fact in dialogues.library.held_out}
    assert len(held_out) > 50
    picked = {dialogues.library.pick(rng).name for _ in range(20_000)}
    assert len(picked) > 3000
    assert not picked & held_out


def test_held_out_wordings_are_never_used_in_training():
    patterns = ("a {x}", "b {x}", "[c|d] {x}", "e {x}", "f {x}")
    rng = random.Random(3)
    used = {say(rng, patterns, x=1) for _ in range(200)}
    kept = {say(rng, patterns, held_out=True, x=1) for _ in range(200)}
    assert used == {"a 1", "b 1", "c 1", "d 1"}
    assert kept == {"e 1", "f 1"}
    assert len(kept) == NUM_HELD_OUT


def test_answers_are_the_docstrings_words(content):
    known = {entry["name"]: facts.from_json(entry) for entry in content["facts"]}
    assert library.what(known["os.path.join"]) == (
        "`os.path.join` joins two or more pathname components, inserting '/' as needed."
    )
    assert library.arguments(known["os.path.join"]) == "`os.path.join(a, *p)` takes `a` and `*p`."
    assert library.example(known["str.upper"]) == "`\"hello\".upper()` gives `'HELLO'`."
    assert library.where([known["copy.deepcopy"]]) == "`deepcopy` is in `copy`: `from copy import deepcopy`."
    assert set(known["str"].members) == {name for name in dir(str) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("Copy a file.", "`f` copies a file."),
        ("Return the size.", "`f` returns the size."),
        ("Returns the size.", "`f` returns the size."),
        ("Push an item.", "`f` pushes an item."),
        ("The size of it.", "`f`: The size of it."),
    ],
)
def test_a_docstring_becomes_a_sentence_about_its_name(sentence, told):
    assert does("f", sentence) == told


def test_a_listing_reads_as_people_write():
    assert [listing(each) for each in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


@pytest.mark.parametrize(
    ("licence", "taken"),
    [
        ("MIT", True),
        ("Apache Software License", True),
        ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", True),
        ("PSF-2.0", True),
        ("MPL-2.0", False),
        ("GPL-3.0-only", False),
        ("MIT AND LGPL-3.0", False),
        ("Proprietary", False),
    ],
)
def test_only_permissive_licences_are_taken(licence, taken):
    assert corpus.is_permissive(licence) is taken
