"""`baton chat`: history, commands, cancelling, and what happens without a server."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from baton import InvalidRequest, SamplingParams
from baton.chat import Chat, chat_command, talk
from baton.outputs import Increment

app = typer.Typer()
app.command()(chat_command)


class EchoLLM:
    """Answers with the number of messages it got; some words make it fail."""

    def __init__(self) -> None:
        self.num_left_early = 0

    def stream_chat(self, messages: list[dict[str, Any]], _params: SamplingParams) -> Iterator[Increment]:
        try:
            word = messages[-1]["content"]
            if word == "refuse":
                raise InvalidRequest("no such thing")
            yield Increment(0, f"{len(messages)} ", [1])
            if word == "interrupt":
                raise KeyboardInterrupt
            yield Increment(0, word, [2], "stop")
        finally:
            self.num_left_early += 1


def run(lines: list[str | type[BaseException]], system: str | None = None) -> tuple[str, Chat]:
    text = io.StringIO()
    console = Console(file=text, width=200)
    chat = Chat(EchoLLM(), SamplingParams(), system, text.write)  # type: ignore[arg-type]
    pending = iter(lines)

    def read() -> str:
        line = next(pending, EOFError)
        if isinstance(line, str):
            return line
        raise line

    talk(chat, read, console)
    return text.getvalue(), chat


def test_every_question_carries_the_conversation_so_far():
    text, chat = run(["a", "b"], system="be brief")
    assert text.split() == ["2", "a", "4", "b"]
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[2]["content"] == "2 a"


def test_reset_forgets_all_but_the_system_prompt():
    text, _ = run(["a", "/reset", "b"], system="be brief")
    assert "2 b" in text


def test_a_cancelled_answer_stays_as_far_as_it_came():
    text, chat = run(["interrupt", "b"])
    assert "stopped" in text
    assert chat.messages[1]["content"] == "1 "
    assert "3 b" in text


def test_a_refused_question_is_shown_and_forgotten():
    text, chat = run(["refuse", "b"])
    assert "no such thing" in text
    assert "1 b" in text
    assert len(chat.messages) == 2


def test_commands_and_empty_lines_are_not_sent():
    text, chat = run(["", "  ", "/help", "/nonsense [x]", KeyboardInterrupt, "/exit", "never"])
    assert "/reset" in text
    assert "/nonsense is not a command" in text
    assert chat.messages == []


def test_once_answers_and_leaves(checkpoint: Path):
    arguments = ["--model", str(checkpoint), "--once", "hello", "--max-tokens", "4", "--seed", "1"]
    first, second = (CliRunner().invoke(app, arguments) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert first.stdout.strip()
    assert first.stdout == second.stdout


def test_without_a_server_the_message_says_where_it_looked():
    result = CliRunner().invoke(app, ["--url", "http://127.0.0.1:9", "--once", "hello"])
    assert result.exit_code == 1
    assert "http://127.0.0.1:9" in result.output


def test_without_server_and_model_the_demos_answers(monkeypatch):
    monkeypatch.setattr("baton.chat.DEFAULT_URL", "http://127.0.0.1:9")
    result = CliRunner().invoke(app, ["--once", "What does os.path.join do?", "--temperature", "0"])
    assert result.exit_code == 0, result.output
    assert "No server at http://127.0.0.1:9" in result.stderr
    assert "join" in result.stdout


def test_a_bad_option_is_refused_before_anything_is_sent(checkpoint: Path):
    result = CliRunner().invoke(app, ["--model", str(checkpoint), "--once", "hello", "--top-p", "3"])
    assert result.exit_code == 1
    assert "top_p must be between" in result.output


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./nothing"])
def test_a_model_that_is_not_there_is_said(model):
    result = CliRunner().invoke(app, ["--model", model, "--once", "hello"])
    assert result.exit_code == 1
    assert "is not a directory" in result.output.replace("\n", " ")
