"""`baton generate`: order, ids, error records, resuming, and the two line formats."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from baton import InvalidRequest, SamplingParams
from baton.batch_lines import failed_line, parse_line
from baton.generate import generate_command, generate_lines, open_output, read_tasks
from baton.llm import LLM
from baton.outputs import Conversation, Job

app = typer.Typer()
app.command()(generate_command)

DEFAULTS = SamplingParams(max_tokens=5, temperature=0.0)


@pytest.fixture(scope="module")
def llm(checkpoint: Path):
    with LLM(str(checkpoint), kv_cache_memory="2MiB", threads=1, max_num_seqs=4) as llm:
        yield llm


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def generate(checkpoint: Path, source: Path, output: Path, *options: str) -> Any:
    arguments = [str(source), "-o", str(output), "--model", str(checkpoint), "--kv-cache-memory", "2MiB"]
    return CliRunner().invoke(app, [*arguments, "--threads", "1", "--max-tokens", "5", "--temperature", "0", *options])


def test_every_line_is_answered_in_order_and_a_bad_one_does_not_stop_the_others(checkpoint, tmp_path, llm):
    source = write_lines(
        tmp_path / "in.jsonl",
        [
            {"id": "long", "prompt": "The river carries the blocks of ice", "max_tokens": 40, "ignore_eos": True},
            "not json\n",
            "\n",
            {"prompt": [300, 301]},
            {"id": 7, "messages": [{"role": "user", "content": "hi"}], "n": 2},
            {"id": "typo", "prompt": "a", "temprature": 1},
            {"id": "range", "prompt": "a", "top_p": 7.0},
            {"id": "none"},
            {"id": "last", "prompt": "x", "stop": "e", "seed": 3, "temperature": 1.0, "logprobs": 1},
        ],
    )
    result = generate(checkpoint, source, tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert "4 answered, 4 failed" in result.output
    records = read_lines(tmp_path / "out.jsonl")
    assert [record["id"] for record in records] == ["long", 2, 4, 7, "typo", "range", "none", "last"]
    by_id = {record["id"]: record for record in records}
    assert [name for name, record in by_id.items() if "error" in record] == [2, "typo", "range", "none"]
    assert by_id["typo"]["error"]["message"] == "Object contains unknown field temprature"
    assert by_id["range"]["error"]["param"] == "top_p"
    assert by_id["long"]["usage"]["completion_tokens"] == 40
    assert [choice["index"] for choice in by_id[7]["choices"]] == [0, 1]
    assert by_id[4]["choices"][0]["text"] == llm.generate([300, 301], DEFAULTS)[0].outputs[0].text
    assert by_id["last"]["choices"][0]["logprobs"]


def test_a_line_in_openais_batch_format_gets_a_record_in_that_format(checkpoint, tmp_path, llm):
    messages = [{"role": "user", "content": "hi"}]
    chat = {"model": "any", "messages": messages, "max_completion_tokens": 3, "user": "me", "top_k": -1}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "The river", "stop": ["q"]}},
        {"custom_id": "c", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}},
        {"custom_id": "d", "method": "POST", "url": "/v1/chat/completions", "body": {**chat, "guided_json": {"a": 1}}},
        {"custom_id": "e", "method": "POST", "url": "/v1/completions", "body": {"prompt": ["a", "b"]}},
    ]
    result = generate(checkpoint, write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    records = read_lines(tmp_path / "out.jsonl")
    assert [record["custom_id"] for record in records] == ["a", "b", "c", "d", "e"]
    assert [record["response"] is None for record in records] == [False, False, True, True, True]
    assert [record["error"] is None for record in records] == [True, True, False, False, False]
    body = records[0]["response"]["body"]
    assert records[0]["response"]["status_code"] == 200
    assert body["object"] == "chat.completion"
    assert body["usage"]["completion_tokens"] == 3
    short = SamplingParams(max_tokens=3, temperature=0.0)
    assert body["choices"][0]["message"]["content"] == llm.chat(messages, short)[0].outputs[0].text
    assert records[1]["response"]["body"]["choices"][0]["text"]
    assert records[3]["error"]["param"] == "guided_json"


def test_an_output_that_exists_is_not_touched_without_resume(checkpoint, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    output = write_lines(tmp_path / "out.jsonl", ["precious\n"])
    result = generate(checkpoint, source, output)
    assert result.exit_code == 2
    assert "--resume" in result.output
    assert output.read_text() == "precious\n"


def test_resume_goes_on_after_what_is_there_and_cuts_a_torn_line_off(checkpoint, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"id": f"r{i}", "prompt": f"prompt {i}"} for i in range(6)])
    assert generate(checkpoint, source, tmp_path / "whole.jsonl").exit_code == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    part = tmp_path / "part.jsonl"
    part.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    result = generate(checkpoint, source, part, "--resume")
    assert result.exit_code == 0, result.output
    assert "4 answered, 0 failed" in result.output
    assert part.read_bytes() == whole
    assert "0 answered" in generate(checkpoint, source, part, "--resume").output
    assert part.read_bytes() == whole


def test_resume_refuses_a_file_that_is_something_else(tmp_path):
    other = write_lines(tmp_path / "other.jsonl", [{"precious": 1}])
    with pytest.raises(InvalidRequest, match="not an output of baton generate"):
        open_output(other, resume=True)
    assert read_lines(other) == [{"precious": 1}]


def test_a_run_that_is_interrupted_keeps_what_was_written(tmp_path, llm):
    def lines():
        yield b'{"id": "first", "prompt": "a"}\n'
        for _ in range(40):
            yield b'{"prompt": "b", "max_tokens": 300, "ignore_eos": true}\n'

    def interrupt(_output: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "out.jsonl"
    written: list[str] = []

    def count(output: object) -> None:
        written.append(path.read_text())
        if len(written) == 2:
            interrupt(output)

    with path.open("wb") as output, pytest.raises(KeyboardInterrupt):
        generate_lines(llm, read_tasks(lines(), DEFAULTS, set()), output, count, lambda: 0.0)
    assert [record["id"] for record in read_lines(path)] == ["first"]
    llm.generate("x", DEFAULTS)
    assert not llm._backend._engine.has_work


def test_without_a_model_the_demos_answers(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": "What does len do?"}]}])
    options = ["--max-tokens", "4", "--temperature", "0", "--kv-cache-memory", "16MiB", "--threads", "1"]
    result = CliRunner().invoke(app, [str(source), "-o", str(tmp_path / "out.jsonl"), *options])
    assert result.exit_code == 0, result.output
    assert "len" in (tmp_path / "out.jsonl").read_text()


def test_no_server_is_refused_in_words(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    result = CliRunner().invoke(
        app, [str(source), "-o", str(tmp_path / "out.jsonl"), "--url", "http://127.0.0.1:9", "--model", "m"]
    )
    assert result.exit_code == 1
    assert "no server answers" in result.output


def test_fields_of_a_line_go_before_the_defaults():
    line = b'{"prompt": "a", "max_tokens": 9, "stop": "x", "logit_bias": {"5": 1}, "stop_token_ids": [3]}'
    task = parse_line(line, 1, DEFAULTS)
    expected = SamplingParams(max_tokens=9, temperature=0.0, stop=("x",), logit_bias={5: 1.0}, stop_token_ids=(3,))
    assert task.job == Job("a", expected)
    chat = parse_line(b'{"id": 0, "messages": [{"role": "user", "content": "a"}]}', 1, DEFAULTS)
    assert chat.id == 0
    assert chat.job == Job(Conversation([{"role": "user", "content": "a"}]), DEFAULTS)


@pytest.mark.parametrize(
    ("line", "param"),
    [
        (b'{"prompt": 5}', "prompt"),
        (b'{"prompt": "a", "messages": []}', "prompt"),
        (b'{"prompt": "a", "max_tokens": "9"}', "max_tokens"),
        (b'{"messages": "a"}', "messages"),
        (b'{"custom_id": "x", "url": "/v1/completions", "body": 5}', None),
        (b'{"custom_id": "x", "url": "/v1/chat/completions", "body": {"messages": [], "logprobs": true}}', "logprobs"),
        (b"[1]", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
    ],
)
def test_a_line_that_is_no_job_names_the_field(line, param):
    task = parse_line(line, 3, DEFAULTS)
    assert isinstance(task.job, InvalidRequest)
    assert task.job.param == param
    assert json.loads(failed_line(task, task.job))
