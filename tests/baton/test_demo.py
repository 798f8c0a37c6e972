"""The demo's one answer, and the table of that answer's timeline."""

import io
import json
import shlex

import pytest
from rich.console import Console

from baton.demo import TEXT, curl_line, demo_spec, has_chat_template, show_answer, timeline_table
from baton.demo_model import demo_model
from router.tokenizer import load_tokenizer
from tests.baton.conftest import simulated
from tests.baton.serving import serving


def test_the_demos_prompt_fills_several_blocks_and_chunks():
    spec = demo_spec(demo_model(), None, 0)
    num_tokens = len(load_tokenizer(demo_model()).encode(TEXT))
    assert num_tokens > 2 * spec.pool("prefill").max_batch_tokens
    assert num_tokens > 10 * spec.block_size
    assert spec.router.local_prefill_max_tokens == 0  # so they are handed over
    assert num_tokens < 1000


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
