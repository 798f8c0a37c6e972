"""`LLM` with the engine in this process, against `transformers` on the same checkpoint."""

import json
import math
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from baton import LLM, InvalidRequest, SamplingParams
from baton.outputs import Job, RequestOutput
from engine.executors.base import TokenLogprobs
from router.params import choice_seed
from tests.cluster.conftest import LLAMA_CONFIG

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The river", "A request enters, its prompt is read once, and every token", [300, 301, 302] * 40, "x"]


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), kv_cache_memory="2MiB", threads=1, max_batch_tokens=64, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@torch.inference_mode()
def reference_tokens(reference: transformers.PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    for _ in range(num_tokens):
        ids = torch.cat([ids, reference(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_transformers_for_prompts_of_mixed_lengths(llm, reference):
    outputs = llm.generate(PROMPTS, GREEDY)
    for output in outputs:
        assert output.outputs[0].token_ids == reference_tokens(reference, output.prompt_token_ids, 12)
    assert [output.prompt_token_ids for output in outputs][2] == PROMPTS[2]


def test_one_prompt_as_text_or_ids_gives_a_list_of_one(llm):
    ids = llm.generate("The river", GREEDY)[0].prompt_token_ids
    assert llm.generate(ids, GREEDY) == llm.generate("The river", GREEDY)
    assert len(llm.generate(ids, GREEDY)) == 1
    assert llm.generate([]) == []


def test_prompts_may_have_parameters_of_their_own(llm):
    short, long = llm.generate(["a", "b"], [GREEDY, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)])
    assert [len(short.outputs[0].token_ids), len(long.outputs[0].token_ids)] == [12, 3]
    with pytest.raises(InvalidRequest, match="2 prompts came with 1"):
        llm.generate(["a", "b"], [GREEDY])


def test_the_same_seed_gives_the_same_text_alone_and_among_others(llm):
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True)
    alone = llm.generate("The river", params)[0]
    among = llm.generate(["x", "The river", *PROMPTS], params)[1]
    assert among == alone
    assert llm.generate("The river", SamplingParams(temperature=1.0, seed=8, max_tokens=16))[0] != alone


def test_each_of_n_choices_has_the_seed_the_http_front_would_give_it(llm):
    several = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=10, ignore_eos=True)
    choices = llm.generate("The river", several)[0].outputs
    assert [choice.index for choice in choices] == [0, 1, 2]
    for choice in choices:
        seed = choice_seed(3, choice.index)
        alone = llm.generate("The river", SamplingParams(temperature=1.0, seed=seed, max_tokens=10, ignore_eos=True))
        assert alone[0].outputs[0].token_ids == choice.token_ids
    assert len({tuple(choice.token_ids) for choice in choices}) == 3


def test_a_stop_string_ends_the_text_and_is_named(llm):
    whole = llm.generate("The river", GREEDY)[0].outputs[0]
    stop = whole.text[4:7]
    cut = llm.generate("The river", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=(stop, "zzz")))
    completion = cut[0].outputs[0]
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    shown = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=(stop,), include_stop_str_in_output=True)
    assert llm.generate("The river", shown)[0].outputs[0].text == whole.text[: whole.text.index(stop)] + stop


def test_a_stop_token_ends_the_text_and_is_named(llm):
    whole = llm.generate("The river", GREEDY)[0].outputs[0]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=(whole.token_ids[3],))
    completion = llm.generate("The river", params)[0].outputs[0]
    assert completion.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[3]) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", whole.token_ids[3])


def test_increments_add_up_to_the_whole(llm):
    params = SamplingParams(temperature=1.0, seed=1, n=2, max_tokens=20, logprobs=1, ignore_eos=True)
    whole = llm.generate("The river", params)[0].outputs
    increments = list(llm.stream("The river", params))
    for completion in whole:
        own = [increment for increment in increments if increment.index == completion.index]
        assert "".join(increment.text for increment in own) == completion.text
        assert [token for increment in own for token in increment.token_ids] == completion.token_ids
        assert [each for increment in own for each in increment.logprobs or []] == completion.logprobs
        assert [increment.finish_reason for increment in own if increment.finish_reason] == ["length"]


@torch.inference_mode()
def test_log_probabilities_of_output_and_prompt_are_those_of_transformers(llm, reference):
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    output = llm.generate("The river carries", params)[0]
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1)
    scored: list[TokenLogprobs | None] = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
    assert scored[0] is None
    assert len(scored) == len(ids)
    for position, entry in enumerate(scored[1:], start=1):
        assert entry is not None
        assert entry.token_id == ids[position]
        assert entry.logprob == pytest.approx(expected[position - 1, ids[position]].item(), abs=1e-4)
        num_top = 2 if position < len(output.prompt_token_ids) else 3
        best = expected[position - 1].topk(num_top)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [score for _, score in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_chat_goes_through_the_checkpoints_template(llm, checkpoint):
    messages = [{"role": "user", "content": "Where does the river go?"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    output = llm.chat(messages, GREEDY)[0]
    assert output.prompt_token_ids == ids
    assert output == llm.generate(ids, GREEDY)[0]
    assert llm.chat([messages, messages], GREEDY) == [output, output]
    assert "".join(each.text for each in llm.stream_chat(messages, GREEDY)) == output.outputs[0].text


@pytest.mark.parametrize(
    ("prompts", "params", "message", "code"),
    [
        (["fine", ""], GREEDY, "prompt 1: prompt must not be empty", "empty_prompt"),
        ([[1], [2], [10**6]], GREEDY, "prompt 2: prompt holds a token id outside", "invalid_value"),
        (["fine"], SamplingParams(temperature=-1.0), "temperature must be between", "invalid_value"),
        (["fine"], SamplingParams(max_tokens=5000), "together more than the model's", "context_length_exceeded"),
    ],
)
def test_a_bad_request_is_refused_and_says_which_prompt(llm, prompts, params, message, code):
    with pytest.raises(InvalidRequest, match=message) as caught:
        llm.generate(prompts, params)
    assert caught.value.code == code
    assert llm.generate("The river", GREEDY)[0].outputs[0].token_ids


def test_a_stream_refuses_what_it_has_no_place_for(llm):
    with pytest.raises(InvalidRequest, match="not available with stream"):
        next(llm.stream("a", SamplingParams(prompt_logprobs=1)))


def test_a_stream_that_is_left_early_frees_what_it_held(llm):
    engine = llm._backend._engine
    increments = llm.stream("The river", SamplingParams(max_tokens=500, ignore_eos=True))
    next(increments)
    increments.close()
    llm.generate("x", GREEDY)  # commands run in order, so the cancel has run by now
    assert not engine.has_work
    engine.check_invariants()


def test_an_interrupted_run_frees_what_it_held(llm):
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)

    def jobs() -> Iterator[Job]:
        yield from [Job("a", GREEDY), *[Job("b", params)] * 5]

    results = llm.run(jobs())
    place, _ = next(results)
    assert place == 0
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    llm.generate("x", GREEDY)
    assert not llm._backend._engine.has_work


def test_jobs_are_taken_only_as_there_is_room_and_errors_keep_their_place(llm):
    num_taken = 0

    def jobs() -> Iterator[Job | Exception]:
        nonlocal num_taken
        for place in range(300):
            num_taken += 1
            yield InvalidRequest("no") if place % 50 == 7 else Job([place + 1], SamplingParams(max_tokens=1))

    ends: dict[int, object] = {}
    for place, end in llm.run(jobs()):
        assert num_taken <= len(ends) + 1 + llm._backend.max_in_flight
        ends[place] = end
    assert sorted(ends) == list(range(300))
    for place, end in ends.items():
        assert isinstance(end, InvalidRequest) if place % 50 == 7 else end.prompt_token_ids == [place + 1]


def test_random_jobs_from_several_threads_get_what_they_get_alone(llm):
    rng = random.Random(5)
    jobs = [
        (
            [rng.randrange(2, 400) for _ in range(rng.randrange(1, 60))],
            SamplingParams(seed=i, max_tokens=9, n=1 + i % 2),
        )
        for i in range(12)
    ]
    alone = [llm.generate(prompt, params)[0] for prompt, params in jobs]
    found: dict[int, RequestOutput] = {}

    def work(part: int) -> None:
        for i in range(part, len(jobs), 3):
            found[i] = llm.generate(*jobs[i])[0]

    threads = [threading.Thread(target=work, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[i] for i in range(len(jobs))] == alone


def test_an_engine_that_fails_fails_its_requests_and_later_ones(checkpoint, monkeypatch):
    with LLM(str(checkpoint), kv_cache_memory="1MiB", threads=1) as llm:
        monkeypatch.setattr(llm._backend._executor, "submit", lambda *_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                llm.generate(["a", "b"], GREEDY)
        with pytest.raises(ZeroDivisionError):
            list(llm.stream("a", GREEDY))


def test_a_closed_llm_refuses_and_closes_again(checkpoint):
    llm = LLM(str(checkpoint), kv_cache_memory="1MiB", threads=1)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a", GREEDY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(5), "prompts must be a text, token ids, or a list of these, not 5"),
        (lambda llm: llm.generate(["a", 5.5]), "prompt 1: a prompt must be a text or a list of token ids, not 5.5"),
        (lambda llm: llm.generate([1, "a"]), "a prompt must be a text or a list of token ids, not [1, 'a']"),
        (lambda llm: llm.generate("a", 5), "params must be SamplingParams, or a list of them, not 5"),
        (lambda llm: llm.generate(["a"], [5]), "params must be SamplingParams, not 5"),
        (lambda llm: list(llm.stream(5)), "a prompt must be a text or a list of token ids, not 5"),
        (lambda llm: list(llm.stream("a", 5)), "params must be SamplingParams, not 5"),
        (lambda llm: llm.chat(5), "messages must be a list of messages, or a list of such lists, not 5"),
        (lambda llm: llm.chat([[{}], [5]]), "prompt 1: messages must be a list of mappings, not [5]"),
        (lambda llm: list(llm.stream_chat("hi")), "messages must be a list of mappings, not 'hi'"),
    ],
)
def test_what_is_no_prompt_is_refused_in_words(checkpoint, call, message):
    with LLM(str(checkpoint), kv_cache_memory="1MiB", threads=1) as llm:
        with pytest.raises(InvalidRequest) as refused:
            call(llm)
        assert refused.value.message == message


def test_wrong_arguments_are_refused_in_words(checkpoint):
    with pytest.raises(ValueError, match="or the url of a server"):
        LLM()
    with pytest.raises(ValueError, match="kv_cache_memory must be a size"):
        LLM(str(checkpoint), kv_cache_memory="lots")


@pytest.mark.parametrize("where", [{"model": "m"}, {"url": "http://127.0.0.1:1"}])
@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0},
        {"threads": 100_000},
        {"threads": "x"},
        {"max_num_seqs": 0},
        {"max_num_seqs": -5},
        {"max_batch_tokens": True},
        {"max_model_len": -1},
        {"block_size": 1.5},
        {"timeout": -1},
        {"timeout": math.nan},
    ],
)
def test_limits_that_are_no_counts_are_refused_by_name(where, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: .* is not allowed; allowed: "):
        LLM(**where, **wrong)


def test_a_message_without_content_is_refused_by_name(llm):
    with pytest.raises(InvalidRequest) as caught:
        llm.chat([{"role": "user"}], GREEDY)
    assert caught.value.param == "messages[0].content"


def test_importing_baton_loads_no_torch():
    code = "import sys, baton; from baton import LLM, SamplingParams, RequestOutput; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_random_weights_need_no_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    with LLM(str(tmp_path), load="dummy", device="cpu", kv_cache_memory="1MiB", threads=1) as llm:
        text, ids = llm.generate(["The river", list(b"ids")], GREEDY)
        assert len(text.prompt_token_ids) == 9
        assert [len(output.outputs[0].token_ids) for output in (text, ids)] == [12, 12]
        assert text.outputs[0].text
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        LLM(str(tmp_path), device="cpu")
