"""Measure the demo model, served by Baton on this machine: held-out losses, tasks with a right answer, fixed prompts.

    python -m benchmarks.demo_model evaluate corpus.json.gz model-directory evaluation.json

Questions come once in wordings that training never used, with sums of numbers it never added, and once in wordings
that it did use. Answers are greedy.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from baton import LLM, SamplingParams
from benchmarks.demo_model import corpus, json_tasks, library, library_wordings, tasks, windows
from benchmarks.demo_model.dialogues import Dialogue, Dialogues
from benchmarks.demo_model.facts import Fact
from benchmarks.demo_model.language import Patterns, ask
from benchmarks.demo_model.model import Llama, token_loss
from benchmarks.demo_model.prompts import PROMPTS, Conversation
from benchmarks.demo_model.tokenizer import ROLES, render
from router.tokenizer import Tokenizer, load_tokenizer

SEED = 20261125
LOSS_ROWS = 24
MAX_TOKENS = 256
Score = Callable[[str, str], float]  # answer, expected; 0 to 1


@dataclass(frozen=True, slots=True)
class Measure:
    name: str
    score: Score
    prompts: list[tuple[str, str]]  # rendered prompt, expected answer


def exact(answer: str, expected: str) -> float:
    return float(answer == expected)


def token_f1(answer: str, expected: str) -> float:
    """Of words, as in SQuAD (https://arxiv.org/abs/1606.05250)."""
    found, wanted = (Counter(re.findall(r"[\w.]+", text.lower())) for text in (answer, expected))
    common = (found & wanted).total()
    return 2 * common / (found.total() + wanted.total()) if common else 0.0


def same_shape(answer: str, expected: str) -> float:
    """Whether the answer is JSON with the keys and types of the expected one."""
    try:
        return float(_shape(json.loads(answer)) == _shape(json.loads(expected)))
    except ValueError:
        return 0.0


def is_json(answer: str, _expected: str) -> float:
    try:
        json.loads(answer)
    except ValueError:
        return 0.0
    return 1.0


def measures(dialogues: Dialogues, count: int, *, held_out: bool) -> Iterator[Measure]:
    """Questions in wordings that training never saw, or in those it knows."""
    rng = random.Random(SEED)
    known = [fact for fact in dialogues.library.trained if fact.summary and fact.common]
    asked: list[tuple[str, Score, Patterns, Callable[[Fact], str], Sequence[Fact]]] = [
        ("what a name does (F1)", token_f1, library_wordings.WHAT, library.what, known),
        ("what a name does, word for word", exact, library_wordings.WHAT, library.what, known),
        (
            "what a name does that was never asked for (F1)",
            token_f1,
            library_wordings.WHAT,
            library.what,
            dialogues.library.held_out,
        ),
        (
            "its arguments",
            exact,
            library_wordings.ARGUMENTS,
            library.arguments,
            [f for f in known if f.arguments is not None],
        ),
        ("an example of it", exact, library_wordings.EXAMPLE, library.example, [f for f in known if f.example]),
        ("its module", exact, library_wordings.KIND, library.kind, known),
    ]
    for name, score, patterns, reply, facts in asked:
        chosen = rng.sample(facts, min(count, len(facts)))
        turns = [(ask(rng, patterns, held_out=held_out, x=fact.name), reply(fact)) for fact in chosen]
        yield Measure(name, score, [_prompt(turn) for turn in turns])
    unknown = [dialogues.library.unknown(rng, held_out=held_out) for _ in range(count)]
    yield Measure("names that do not exist, refused", exact, [_prompt(turn) for turn in unknown])
    made: list[tuple[str, Score, Callable[[random.Random, bool], tuple[str, str]]]] = [
        ("sums", exact, tasks.arithmetic),
        ("word problems", exact, tasks.story),
        ("numbers: order, parity, largest", exact, tasks.numbers),
        ("letters of words", exact, tasks.word_task),
        ("Python expressions", exact, tasks.expression),
        ("JSON of given keys: valid", is_json, json_tasks.write),
        ("JSON of given keys: keys and types", same_shape, json_tasks.write),
        ("JSON by a schema: keys and types", same_shape, json_tasks.follow),
        ("JSON from a sentence", exact, json_tasks.extract),
    ]
    for name, score, make in made:
        yield Measure(name, score, [_prompt(make(rng, held_out)) for _ in range(count)])
    for name, kind in (("the right tool call", "tool"), ("a sentence of a text", "reading")):
        few = [dialogues.make(rng, kind, held_out=held_out) for _ in range(count)]
        yield Measure(name, exact, [_first_turn(dialogue) for dialogue in few])


def run(llm: LLM, tokenizer: Tokenizer, measure: Measure) -> tuple[float, int]:
    """The mean score, and how many answers were ended by the model itself."""
    prompts = [tokenizer.encode(prompt, add_special_tokens=False) for prompt, _ in measure.prompts]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), progress=False)
    answers = [output.outputs[0] for output in outputs]
    scores = [measure.score(each.text, wanted) for each, (_, wanted) in zip(answers, measure.prompts, strict=True)]
    return sum(scores) / len(scores), sum(each.finish_reason == "stop" for each in answers)


def converse(llm: LLM, prompt: Conversation) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for question in prompt.questions:
        messages.append({"role": "user", "content": question})
        answer = llm.chat(messages, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), progress=False)[0].outputs[0]
        ended = "" if answer.finish_reason == "stop" else " ... [goes on]"
        messages.append({"role": "assistant", "content": answer.text + ended})
    return messages


@torch.inference_mode()
def losses(content: dict[str, Any], tokenizer_file: Path, model_path: Path) -> dict[str, float]:
    """Mean loss for each token, of the weights as they are saved."""
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(tokenizer_file))
    model = Llama(torch.Generator())
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(model_path.glob("*.safetensors")):
        weights |= {name.removeprefix("model."): weight.float() for name, weight in load_file(file).items()}
    model.load_state_dict(weights)
    dialogues = Dialogues(content)
    sets = {
        "documents": windows.document_rows(content, backend, held_out=True)[:LOSS_ROWS],
        "held-out wordings": windows.dialogue_rows(dialogues, backend, -1, LOSS_ROWS, held_out=True),
        "known wordings": windows.dialogue_rows(dialogues, backend, -2, LOSS_ROWS),
    }
    return {name: sum(_row_loss(model, row) for row in rows) / len(rows) for name, rows in sets.items()}


def _row_loss(model: Llama, row: Any) -> float:
    marked = torch.from_numpy(row.astype("int64"))[None]
    ids = marked & (windows.LEARNT - 1)
    targets = torch.where(marked >= windows.LEARNT, ids, -1)[:, 1:]
    return token_loss(model(ids[:, :-1]), model.embed_tokens.weight, targets).item()


def _prompt(turn: tuple[str, str]) -> tuple[str, str]:
    return render([{"role": "user", "content": turn[0]}]) + ROLES["assistant"], turn[1]


def _first_turn(dialogue: Dialogue) -> tuple[str, str]:
    place = next(place for place, each in enumerate(dialogue.messages) if each["role"] == "assistant")
    before = render(dialogue.messages[:place], dialogue.tools) + ROLES["assistant"]
    whole = render(dialogue.messages[: place + 1], dialogue.tools)
    return before, whole[len(before) :].removesuffix("<|end|>")


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shape(each) for key, each in value.items()}
    return [_shape(each) for each in value[:1]] if isinstance(value, list) else type(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=100, help="prompts of each measure")
    args = parser.parse_args()
    content = corpus.load(args.corpus)
    found: dict[str, Any] = {"losses": losses(content, args.model / "tokenizer.json", args.model)}
    num_prompts = num_closed = 0
    tokenizer = load_tokenizer(args.model)
    with LLM(str(args.model), device="cpu", kv_cache_memory="512MiB") as llm:
        for wordings in ("held-out", "known"):
            scores = found[f"{wordings} wordings"] = {}
            for measure in measures(Dialogues(content), args.count, held_out=wordings == "held-out"):
                scores[measure.name], closed = run(llm, tokenizer, measure)
                num_prompts, num_closed = num_prompts + len(measure.prompts), num_closed + closed
                print(f"{scores[measure.name]:6.1%}  {wordings}: {measure.name}", flush=True)
        found |= {"count": args.count, "num_closed": num_closed, "num_answers": num_prompts}
        found["conversations"] = [converse(llm, prompt) for prompt in PROMPTS]
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{num_closed / num_prompts:6.1%}  turns closed; losses {found['losses']}")
