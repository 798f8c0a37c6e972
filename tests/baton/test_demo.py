"""The demo's checkpoint, its one answer, and the table of that answer's timeline."""

import io
import json
import shlex
import threading
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console

from baton import LLM, SamplingParams
from baton.demo import TEXT, curl_line, demo_spec, has_chat_template, show_answer, timeline_table
from baton.demo_checkpoint import cache_dir, ensure_demo_checkpoint, write_demo_checkpoint
from router.tokenizer import load_tokenizer
from tests.baton.conftest import simulated
from tests.baton.serving import serving


@pytest.fixture(scope="module")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_checkpoint(tmp_path_factory.mktemp("cache") / "baton" / "demo")


def test_the_checkpoint_is_the_same_bytes_every_time(demo_checkpoint, tmp_path):
    write_demo_checkpoint(tmp_path)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == sorted(file.name for file in demo_checkpoint.iterdir())
    assert "model.safetensors" in names
    for name in names:
        assert (tmp_path / name).read_bytes() == (demo_checkpoint / name).read_bytes(), name


@torch.inference_mode()
def test_transformers_loads_it_and_gives_the_same_greedy_tokens(demo_checkpoint):
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_checkpoint)
    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 15e6
    messages = [{"role": "user", "content": "How does argparse read options?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()
    with LLM(str(demo_checkpoint), kv_cache_memory="8MiB", threads=1) as llm:
        output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=24))[0]
    assert output.prompt_token_ids + output.outputs[0].token_ids == expected
    assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids)
    assert "\ufffd" not in output.outputs[0].text


def test_the_demos_prompt_fills_several_blocks_and_chunks(demo_checkpoint):
    spec = demo_spec(demo_checkpoint, None, 0)
    num_tokens = len(load_tokenizer(demo_checkpoint).encode(TEXT))
    assert num_tokens > 2 * spec.pool("prefill").max_batch_tokens
    assert num_tokens > spec.router.local_prefill_max_tokens + 10 * spec.block_size
    assert num_tokens < 1000


def test_starts_that_race_each_other_end_with_one_whole_checkpoint(tmp_path, monkeypatch):
    barrier = threading.Barrier(3)

    def write(path: Path) -> None:
        (path / "config.json").write_text("{}")
        barrier.wait(10)
        (path / "model.safetensors").write_text("weights")

    monkeypatch.setattr("baton.demo_checkpoint.write_demo_checkpoint", write)
    target = tmp_path / "baton" / "demo"
    threads = [threading.Thread(target=ensure_demo_checkpoint, args=(target,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [path.name for path in target.parent.iterdir()] == ["demo"]
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]


def test_a_start_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def write(path: Path) -> None:
        (path / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr("baton.demo_checkpoint.write_demo_checkpoint", write)
    with pytest.raises(OSError, match="disk full"):
        ensure_demo_checkpoint(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_follows_the_xdg_rules(tmp_path):
    assert cache_dir({"XDG_CACHE_HOME": str(tmp_path)}).parent == tmp_path / "baton"
    assert cache_dir({"XDG_CACHE_HOME": "relative"}) == cache_dir({})
    assert cache_dir({}).is_relative_to(Path.home() / ".cache" / "baton")


@pytest.mark.parametrize("chat", [True, False])
async def test_the_answer_is_streamed_and_its_timeline_comes_with_it(tokenizer, chat):
    executor = simulated(tokenizer)
    text = io.StringIO()
    with serving(executor, tokenizer) as server:
        timeline, num_tokens = await show_answer(server.url, "tiny", Console(file=text), chat=chat)
    executor.close()
    assert num_tokens == 96
    assert len(text.getvalue()) > 200
    assert 0 < timeline["first_token"] <= timeline["last_token"]
    assert {"prefill_s", "transfer_blocks", "exposed_s", "decode_worker"} <= timeline.keys()


def test_the_table_shows_what_moved_and_how_much_of_it_was_hidden():
    timeline = {
        "dispatched": 0.001,
        "first_token": 0.250,
        "last_token": 1.250,
        "queued_s": 0.004,
        "prefill_s": 0.24,
        "decode_s": 1.0,
        "prefill_worker": "prefill-0",
        "decode_worker": "decode-0",
        "transfer_blocks": 27,
        "transfer_bytes": 27 << 20,
        "transfer_s": 0.020,
        "exposed_s": 0.002,
        "transport": "shared_memory",
    }
    text = io.StringIO()
    Console(file=text, width=120).print(timeline_table(timeline, 96))
    for expected in ("5.0 ms", "240.0 ms", "250.0 ms", "27 blocks, 27.0 MiB", "90%", "2.0 ms exposed", "95 tokens/s"):
        assert expected in text.getvalue()
    text = io.StringIO()
    Console(file=text, width=120).print(timeline_table({"decode_worker": "decode-0"}, 0))
    assert "none" in text.getvalue()


def test_the_curl_line_is_one_shell_command():
    words = shlex.split(curl_line("http://127.0.0.1:8000", "it's", chat=False))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/completions"]
    assert json.loads(words[-1]) == {"model": "it's", "prompt": "Hello", "max_tokens": 32, "stream": True}


def test_a_checkpoint_without_a_chat_template_is_recognized(checkpoint, tmp_path):
    assert has_chat_template(checkpoint)
    assert not has_chat_template(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not has_chat_template(tmp_path)
