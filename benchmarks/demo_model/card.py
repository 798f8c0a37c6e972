"""Write the model card, README.md in the model's directory, from what training and evaluation measured.

python -m benchmarks.demo_model card corpus.json.gz train.json evaluation.json model-directory
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.demo_model import corpus, model, windows
from benchmarks.demo_model.tokenizer import VOCAB_SIZE

CARD = """\
# Baton's demo model

A Llama of {num_weights:.1f} million weights that speaks a little about Python's standard library. Baton's demo, its
chat and the benchmarks that need real text run on it when they are given no other model. It is not good for anything
else: it makes mistakes, it knows almost nothing beside what is listed here, and nothing it says should be relied on.

| | |
|---|---|
| architecture | `LlamaForCausalLM` |
| shape | {shape} |
| tokenizer | byte-level BPE, {vocab} tokens, digits one by one |
| context | {window} tokens |
| files | bfloat16 safetensors, {megabytes:.1f} MB |
| training | {training} |
| licence | as the rest of this repository; the licences of the text are below |

Made by `python -m benchmarks.demo_model` with `corpus`, `tokenizer`, `train`, `evaluate` and `card`, in this order,
from seeds. The corpus and the tokenizer are the same bytes for the same Python, packages and documents of Baton;
training follows the clock, so another run gives other weights. Its settings:
{settings}.

## Text

Documents, of which one in {held_out_documents} is held out:

| source | version | licence | characters |
|---|---|---|---|
{sources}

Dialogues are made from {num_facts} names of the standard library, from the documents' paragraphs, and from
generated tasks (arithmetic, words, Python expressions, JSON, tool calls), by seeded scripts that never stop, so that
no stretch of dialogues repeats. Loss is taken on what the assistant says. {held_out_facts} names are never asked about
in training, nor are sums of one in twenty pairs of numbers; the last two wordings of every kind of question are kept
for evaluation.

## Loss

Mean loss for each token during training (for dialogues: of the assistant's tokens):

| part of the run | training batch | held-out documents | held-out wordings | known wordings, new dialogues |
|---|---|---|---|---|
{curve}

Of the saved weights, which are those of the end, on {loss_rows} rows of {window} tokens: {losses}.
Text and wordings are few and come many times, so that the model learns them by heart: the losses of what it never saw
were lowest before the end, {best}.

## Tasks

Greedy answers of the saved weights to {count} questions of each kind, served by Baton on a CPU. In the first column
every question is worded in a way that was held out, and sums are of numbers that were; in the second, as in training.

| task | held-out wordings | known wordings |
|---|---|---|
{scores}

Scores are shares of answers that are exactly the expected one, but where a row says F1 (of words), or keys and types.
Where the columns differ, the model can do the task but did not recognise the question. It ended {num_closed} of
{num_answers} answers by itself within {max_tokens} tokens.

## Ten fixed conversations

Greedy, good and bad, as they come. Names and words that training never used (Maria, Ada, elephant) are often garbled.

{conversations}
"""


def card(content: dict[str, Any], train: dict[str, Any], found: dict[str, Any], path: Path) -> str:
    from benchmarks.demo_model.dialogues import Dialogues
    from benchmarks.demo_model.evaluate import LOSS_ROWS, MAX_TOKENS

    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    library = Dialogues(content).library
    settings = train["settings"]
    return CARD.format(
        num_weights=weights / 2e6,
        shape=f"{model.NUM_LAYERS} layers, hidden {model.HIDDEN}, {model.NUM_HEADS} heads, {model.NUM_KV_HEADS} KV "
        f"heads of {model.HEAD_DIM}, MLP {model.INTERMEDIATE}, tied embeddings",
        vocab=VOCAB_SIZE,
        window=windows.WINDOW,
        megabytes=weights / 1e6,
        training=f"{train['num_tokens'] / 1e6:.0f} million tokens in {train['num_steps']} steps, "
        f"{train['seconds'] / 60:.1f} minutes on one NVIDIA H200",
        settings=", ".join(
            f"{name} {settings[name]}" for name in ("minutes", "rows", "rate", "optimizer", "attention")
        ),
        held_out_documents=windows.HELD_OUT_IN,
        sources="\n".join(
            f"| {each['name']} | {each['version']} | {each['licence']} | {each['num_chars']:,} |"
            for each in content["sources"]
        ),
        num_facts=len(library.trained),
        held_out_facts=len(library.held_out),
        curve="\n".join(_curve(train)),
        loss_rows=LOSS_ROWS,
        best=" and ".join(_lowest(train, name) for name in ("documents", "held-out wordings")),
        losses=", ".join(f"{name} {loss:.3f}" for name, loss in found["losses"].items()),
        count=found["count"],
        scores="\n".join(
            f"| {name} | {score:.0%} | {found['known wordings'][name]:.0%} |"
            for name, score in found["held-out wordings"].items()
        ),
        max_tokens=MAX_TOKENS,
        num_closed=found["num_closed"],
        num_answers=found["num_answers"],
        conversations="\n\n".join(_conversation(*each) for each in enumerate(found["conversations"], start=1)),
    )


def _curve(train: dict[str, Any]) -> list[str]:
    names = ("documents", "held-out wordings", "known wordings")
    rows = []
    for check in train["held_out"]:
        batch = min(train["losses"], key=lambda each: abs(each["progress"] - check["progress"]))
        cells = [f"{check['progress']:.0%}", f"{batch['loss']:.3f}", *(f"{check[name]:.3f}" for name in names)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _lowest(train: dict[str, Any], name: str) -> str:
    check = min(train["held_out"], key=lambda each: each[name])
    return f"{name} {check[name]:.3f} at {check['progress']:.0%}"


def _conversation(number: int, messages: list[dict[str, str]]) -> str:
    lines = [f"{number}."]
    for message in messages:
        text = message["content"].replace("\n", "\n    ")
        lines.append(f"    {message['role']}: {text}")
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("corpus", "training", "evaluation", "model"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    training, evaluation = (json.loads(file.read_text(encoding="utf-8")) for file in (args.training, args.evaluation))
    text = card(corpus.load(args.corpus), training, evaluation, args.model)
    (args.model / "README.md").write_text(text, encoding="utf-8")
