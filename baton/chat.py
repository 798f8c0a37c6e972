"""`baton chat`: talk to a model in the terminal.

Owns the conversation's history. What the user sent stays in the history only if something was answered: a refused or
failed message leaves it as it was; a cancelled answer stays as far as it came.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Annotated, Any

import typer
from rich.console import Console

from baton.demo_model import DEMO_NAME, demo_model
from baton.llm import LLM
from baton.outputs import Message
from cluster.spec_errors import SpecError
from engine.errors import InvalidRequest
from engine.request import SamplingParams
from router.generation import DeadlineExceeded, GenerationFailed, Overloaded

DEFAULT_URL = "http://127.0.0.1:8000"
HELP = """\
/reset   forget the conversation
/help    this text
/exit    leave (as does Ctrl-D)
Ctrl-C   stop the answer"""
FAILURES = (InvalidRequest, Overloaded, DeadlineExceeded, GenerationFailed, ConnectionError, TimeoutError)


class Chat:
    """A conversation with `llm`. `write` gets the answer's text piece by piece."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, write: Callable[[str], Any]) -> None:
        self._llm = llm
        self._params = params
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._write = write
        self.messages: list[Message] = list(self._opening)

    def reset(self) -> None:
        self.messages = list(self._opening)

    def ask(self, text: str) -> None:
        """Send a message and write its answer. Raises one of FAILURES; KeyboardInterrupt ends the answer early."""
        question = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        try:
            with closing(self._llm.stream_chat(question, self._params)) as increments:
                for increment in increments:
                    pieces.append(increment.text)
                    self._write(increment.text)
        finally:
            self._write("\n")
            if answer := "".join(pieces):
                self.messages = [*question, {"role": "assistant", "content": answer}]


def talk(chat: Chat, read: Callable[[], str], console: Console) -> None:
    """Read, answer, repeat, until the input ends or /exit."""
    for line in _lines(read, console):
        match line.strip():
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                chat.reset()
                console.print("The conversation is forgotten.", style="dim")
            case "/help":
                console.print(HELP, style="dim")
            case command if command.startswith("/"):
                console.print(f"{command.split()[0]} is not a command; /help lists them", style="red", markup=False)
            case text:
                try:
                    chat.ask(text)
                except KeyboardInterrupt:
                    console.print("stopped", style="dim")
                except FAILURES as error:
                    console.print(str(error), style="red", markup=False)


def _lines(read: Callable[[], str], console: Console) -> Iterator[str]:
    while True:
        try:
            yield read()
        except KeyboardInterrupt:
            console.print()
        except EOFError:
            console.print()
            return


def chat_command(
    url: Annotated[
        str | None, typer.Option(help=f"Server to talk to. [default: {DEFAULT_URL}, if one is there]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Run this checkpoint (path or hub id) here; with --url: the model's name there.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    once: Annotated[str | None, typer.Option(metavar="PROMPT", help="Answer this and leave.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="BATON_API_KEY", help="The server's key.")] = None,
) -> None:
    """Chat with a model: on a running server, or run in this process with --model; with neither, a small one."""
    console = Console(stderr=True, highlight=False)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    try:
        with _open(model, url, api_key, console) as llm:
            chat = Chat(llm, params, system, _write)
            if once is not None:
                chat.ask(once)
                return
            console.print("/help lists the commands, Ctrl-D leaves", style="dim")
            import readline  # noqa: F401  (gives `input` line editing and history)

            talk(chat, lambda: input("> "), console)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (*FAILURES, SpecError, ValueError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None


def _open(model: str | None, url: str | None, api_key: str | None, console: Console) -> LLM:
    """What was asked for; when nothing was, the server on this machine, or else the model that comes with Baton."""
    if url is None and model is None:
        try:
            return LLM(url=DEFAULT_URL, api_key=api_key)
        except ConnectionError:
            console.print(f"No server at {DEFAULT_URL}: {DEMO_NAME} answers, in this process.", style="dim")
            model = str(demo_model())
    return LLM(model, url=url, api_key=api_key)


def _write(text: str) -> None:
    print(text, end="", flush=True)
