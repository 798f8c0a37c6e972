"""The demo model's tokenizer: byte-level BPE, single digits, one token for each role; and its chat template.

    python -m benchmarks.demo_model tokenizer corpus.json.gz directory

Trained on the corpus and on generated dialogues. Written in Hugging Face's form.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks.demo_model import corpus
from benchmarks.demo_model.dialogues import Dialogues

SEED = 20261124
VOCAB_SIZE = 6144
MAX_MODEL_LEN = 2048
NUM_DIALOGUES = 40_000
BEGIN, END = "<|begin|>", "<|end|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant", "tool")}
SPECIAL = (BEGIN, END, *ROLES.values())  # their ids are their places
CALL, CALL_END = "<tool_call>", "</tool_call>"  # shown in answers, so that a client can find the call

# Roles are single tokens, so no white space is needed around the contents. No template trims a content.
CHAT_TEMPLATE = """\
{%- set ns = namespace(opening='') -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set ns.opening = messages[0].content -%}
{%- endif -%}
{%- if tools -%}
{%- set ns.opening = ns.opening + ('\\n\\n' if ns.opening else '') + 'Tools:' -%}
{%- for tool in tools -%}
{%- set ns.opening = ns.opening + '\\n' + (tool.function if tool.function is defined else tool) | tojson -%}
{%- endfor -%}
{%- endif -%}
{{- bos_token -}}
{%- if ns.opening -%}
{{- '<|system|>' + ns.opening + eos_token -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role != 'system' or not loop.first -%}
{{- '<|' + message.role + '|>' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>{"name": ' + call.function.name | tojson + ', "arguments": ' -}}
{{- (call.function.arguments if call.function.arguments is string else call.function.arguments | tojson) -}}
{{- '}</tool_call>' -}}
{%- endfor -%}
{{- eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""


def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
    """What the template gives without a generation prompt, in a fraction of its time."""
    opening = messages[0]["content"] if messages[0]["role"] == "system" else ""
    if tools:
        listed = "".join("\n" + json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        opening += f"{chr(10) * 2 if opening else ''}Tools:{listed}"
    parts = [BEGIN, f"{ROLES['system']}{opening}{END}" if opening else ""]
    for place, message in enumerate(messages):
        if place == 0 and message["role"] == "system":
            continue
        parts += [ROLES[message["role"]], message["content"]]
        for call in message.get("tool_calls", ()):
            called = {key: call["function"][key] for key in ("name", "arguments")}
            parts.append(f"{CALL}{json.dumps(called, ensure_ascii=False)}{CALL_END}")
        parts.append(END)
    return "".join(parts)


def train(content: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(content), trainer)
    tokenizer.add_tokens([AddedToken(each, special=False, normalized=False) for each in (CALL, CALL_END)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, SPECIAL.index(BEGIN))]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def save(tokenizer: Tokenizer, path: Path) -> None:
    """tokenizer.json and what `transformers` and Baton read beside it."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": BEGIN, "eos_token": END, "pad_token": END}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_MODEL_LEN,
    }
    ends = {"bos_token_id": SPECIAL.index(BEGIN), "eos_token_id": SPECIAL.index(END)}
    for name, content in (
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", names),
        ("generation_config.json", {**ends, "pad_token_id": ends["eos_token_id"]}),
    ):
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _texts(content: dict[str, Any]) -> Iterator[str]:
    yield from content["documents"]
    dialogues, rng = Dialogues(content), random.Random(SEED)
    for _ in range(NUM_DIALOGUES):
        for message in dialogues.make(rng).messages:
            yield message["content"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("output", type=Path, help="directory")
    args = parser.parse_args()
    save(train(corpus.load(args.corpus)), args.output)
