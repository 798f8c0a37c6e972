"""Progress bars of offline generation: weights loaded, then requests done and tokens a second."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from baton.outputs import RequestOutput

Count = Callable[[RequestOutput | None], None]


@contextmanager
def throughput_bar(console: Console, total: int | None, *, enabled: bool) -> Iterator[Count]:
    """Yields the function that counts a finished request (None: one that failed)."""
    bar = Progress(
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens, {task.fields[rate]:.0f}/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not enabled,
    )
    with bar:
        task = bar.add_task("generating", total=total, tokens=0, rate=0.0)
        num_tokens = 0

        def count(output: RequestOutput | None) -> None:
            nonlocal num_tokens
            if output is not None:
                num_tokens += sum(len(completion.token_ids) for completion in output.outputs)
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(task, advance=1, tokens=num_tokens, rate=num_tokens / elapsed if elapsed else 0.0)

        yield count


@contextmanager
def loading_bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yields the function that is told the bytes loaded and the bytes in all. Gone when done; terminals only."""
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda loaded, total: bar.update(task, completed=loaded, total=total)
