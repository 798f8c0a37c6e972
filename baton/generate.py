"""`baton generate`: continue every line of a JSONL file, offline, in bounded memory.

Owns the output file: one line for each line of the input, in its order, appended and flushed as soon as everything
before it is there. A line that cannot be answered gets an error record; a server that is gone ends the run, and
`--resume` goes on after the last record.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from rich.console import Console

from baton.batch_lines import Task, done_line, failed_line, parse_line, recorded_id
from baton.demo_model import demo_model
from baton.llm import LLM
from baton.outputs import Job, RequestOutput
from baton.progress import Count, throughput_bar
from cluster.spec_errors import SpecError
from engine.errors import InvalidRequest
from engine.request import SamplingParams
from router.generation import DeadlineExceeded, GenerationFailed

RECORDED = (InvalidRequest, DeadlineExceeded, GenerationFailed)  # failures of one line, not of the run


@dataclass(slots=True)
class Tally:
    num_done: int = 0
    num_failed: int = 0


def read_tasks(lines: Iterable[bytes], defaults: SamplingParams, skip: set[str | int]) -> Iterator[Task]:
    for number, line in enumerate(lines, start=1):
        if line.strip() and (task := parse_line(line, number, defaults)).id not in skip:
            yield task


def generate_lines(
    llm: LLM, tasks: Iterable[Task], output: BinaryIO, count: Count, clock: Callable[[], float]
) -> Tally:
    """Answer the tasks and write their lines in order. Raises what ends the run; what was written stays."""
    tally = Tally()
    open_tasks: dict[int, Task] = {}  # taken, not written; LLM.run bounds how many
    lines: dict[int, bytes] = {}  # of ended tasks that wait for an earlier one
    num_written = 0

    def jobs() -> Iterator[Job | Exception]:
        for place, task in enumerate(tasks):
            open_tasks[place] = task
            yield task.job

    with closing(llm.run(jobs())) as ends:
        for place, end in ends:
            task = open_tasks.pop(place)
            if isinstance(end, RequestOutput):
                lines[place] = done_line(task, end, llm.model, int(clock()))
                tally.num_done += 1
                count(end)
            elif isinstance(end, RECORDED):
                lines[place] = failed_line(task, end)
                tally.num_failed += 1
                count(None)
            else:
                raise end
            while num_written in lines:
                output.write(lines.pop(num_written))
                output.flush()
                num_written += 1
    return tally


def open_output(path: Path, resume: bool) -> tuple[BinaryIO, set[str | int]]:
    """The output to append to, and the ids it holds already. A torn last line is cut off."""
    if not resume:
        return path.open("xb"), set()
    output = path.open("a+b")
    try:
        output.seek(0)
        known: set[str | int] = set()
        end = 0
        for line in output:
            if not line.endswith(b"\n"):
                break
            known.add(recorded_id(line))
            end += len(line)
        output.truncate(end)
    except BaseException:
        output.close()
        raise
    return output, known


def generate_command(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT.jsonl", help="Lines with prompt or messages, or in OpenAI's batch format.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUTPUT.jsonl", help="File to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint (path or hub id) to run here; with --url: its name there. [default: Baton's own small one]"
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help="Server to ask, such as http://127.0.0.1:8000.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an output that exists.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens; a line's own fields go first.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many of the likeliest tokens; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Keep tokens this likely, relative to the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answers.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given again.")] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Requests that run at once. [default: 64; on a GPU, without --url, 256]")
    ] = None,
    kv_cache_memory: Annotated[
        str | None, typer.Option(help="Memory of the KV cache, without --url. [default: 1GiB; on a GPU what is free]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads, without --url. [default: all cores]")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="BATON_API_KEY", help="The server's key.")] = None,
) -> None:
    """Answer every line of a file, many at once, with one line each in the same order."""
    console = Console(stderr=True, highlight=False)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    try:
        params.check(vocab_size=1)
        with (
            source.open("rb") as lines,
            LLM(
                model if model or url else str(demo_model()),
                url=url,
                max_num_seqs=max_num_seqs,
                kv_cache_memory=kv_cache_memory,
                threads=threads,
                api_key=api_key,
            ) as llm,
        ):
            file, known = open_output(output, resume)
            with file, throughput_bar(console, _num_lines(source, len(known)), enabled=console.is_terminal) as count:
                tasks = read_tasks(lines, params, known)
                tally = generate_lines(llm, tasks, file, count, time.time)
    except FileExistsError:
        _fail(console, f"{output} exists: go on with it by --resume, or name another file", 2)
    except KeyboardInterrupt:
        _fail(console, f"stopped; --resume goes on after what {output} holds", 130)
    except ConnectionError as error:
        _fail(console, f"{error}; --resume goes on after what {output} holds", 1)
    except (InvalidRequest, SpecError, ValueError, OSError) as error:
        _fail(console, str(error), 1)
    else:
        console.print(f"{tally.num_done} answered, {tally.num_failed} failed: {output}", markup=False)


def _fail(console: Console, message: str, status: int) -> None:
    console.print(message, style="red", markup=False)
    raise typer.Exit(status) from None


def _num_lines(source: Path, num_known: int) -> int | None:
    if not source.is_file():
        return None
    with source.open("rb") as lines:
        return sum(1 for line in lines if line.strip()) - num_known
