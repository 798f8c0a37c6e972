"""The model that comes with Baton: the files, the same tokens as `transformers`, and that it speaks."""

import json

import pytest
import torch
import transformers

from baton import LLM, SamplingParams
from baton.demo_model import demo_model
from benchmarks.demo_model.prompts import PROMPTS
from router.prompts import render_messages
from router.tokenizer import load_tokenizer

QUESTIONS = (
    "What does os.path.join do?",
    "Write a JSON object with the keys name (string) and age (integer).",
    "What is 12 + 30?",
    "Hello!",
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def llm():
    with LLM(str(demo_model()), device="cpu", dtype="float32", kv_cache_memory="16MiB", threads=1) as opened:
        yield opened


def answers(llm, conversations):
    return [output.outputs[0] for output in llm.chat(conversations, SamplingParams(temperature=0, max_tokens=96))]


def test_the_files_are_small_enough_for_a_repository():
    sizes = [file.stat().st_size for file in demo_model().iterdir()]
    assert max(sizes) < 16e6
    assert sum(sizes) <= 50e6


def test_the_card_shows_every_fixed_conversation():
    card = (demo_model() / "README.md").read_text(encoding="utf-8")
    assert len(PROMPTS) == 10
    for question in (question for prompt in PROMPTS for question in prompt.questions):
        assert f"    user: {question}\n    assistant: " in card


@torch.inference_mode()
def test_transformers_gives_the_same_tokens(llm):
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model())
    for prompt in QUESTIONS:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        expected = model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()
        output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=24))[0]
        assert output.prompt_token_ids + output.outputs[0].token_ids == expected


def test_tools_and_their_results_are_rendered_as_transformers_does():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Rome?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}],
        },
        {"role": "tool", "content": '{"temperature": 21}'},
    ]
    reference = transformers.AutoTokenizer.from_pretrained(demo_model())
    expected = reference.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True, tokenize=False)
    text = render_messages(load_tokenizer(demo_model()), messages, tools=[TOOL])
    assert text == expected
    assert json.dumps(TOOL["function"]) in text
    assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>' in text
    assert text.endswith('<|tool|>{"temperature": 21}<|end|><|assistant|>')


def test_it_says_something_true_and_closes_its_turns(llm):
    said = answers(llm, [[{"role": "user", "content": prompt}] for prompt in QUESTIONS])
    assert [each.finish_reason for each in said] == ["stop"] * len(QUESTIONS)
    assert "joins two or more pathname components" in said[0].text
    assert json.loads(said[1].text).keys() == {"name", "age"}
    assert "42" in said[2].text


def test_it_knows_what_it_refers_to(llm):
    first = {"role": "user", "content": "What does os.path.join do?"}
    reply = {"role": "assistant", "content": answers(llm, [[first]])[0].text}
    follow_up = {"role": "user", "content": "And what arguments does it take?"}
    assert "os.path.join(a, *p)" in answers(llm, [[first, reply, follow_up]])[0].text
