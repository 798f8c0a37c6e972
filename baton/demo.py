"""`baton demo`: a whole cluster on this machine, one answer through it, and what happened to that request.

Starts one router, one prefill worker and one decode worker on the CPU, streams an answer to a prompt long enough that
its KV moves in several pieces, shows the request's timeline, then serves until Ctrl-C or SIGTERM. The cluster's
processes belong to `LocalCluster`, which ends them however this ends.
"""

import asyncio
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from baton.demo_model import DEMO_NAME, demo_model
from baton.llm_remote import events, raise_for_error
from cluster.checkpoint import resolve_model
from cluster.launcher import LocalCluster
from cluster.spec import ClusterSpec
from cluster.spec_errors import SpecError
from cluster.spec_file import parse_spec
from cluster.supervisor import ClusterFailed
from engine.errors import InvalidRequest
from router.chat_template import load_chat_templates
from router.generation import DeadlineExceeded, GenerationFailed, Overloaded

ANSWER_TIMEOUT_S = 300.0
ANSWER_TOKENS = 96
CHUNK_TOKENS = 128  # small, so that the demo's prompt is computed, and its KV moved, in several chunks
FAILURES = (
    SpecError,
    ClusterFailed,
    InvalidRequest,
    Overloaded,
    DeadlineExceeded,
    GenerationFailed,
    OSError,  # a port that is taken, a connection that breaks, a timeout
    httpx.HTTPError,
    ValueError,
)
QUESTION = "In your own words, what does the text above say? Begin with the most important point."
TEXT = """\
Serving a large language model is two different jobs. Prefill reads the whole prompt at once: every token of it goes \
through every layer in a few large steps, and the processor's arithmetic is the limit. Decode then writes the answer \
one token at a time: every step reads all the weights and everything remembered so far, and memory is the limit. When \
both share a machine they disturb each other. A long prompt that arrives makes every running answer stutter, and many \
running answers make the next prompt wait.

So Baton gives each job a pool of workers of its own. A router sends a request to a prefill worker, chosen by how much \
of the prompt that worker has already in its cache and by how busy it is. What prefill computes for every token, its \
keys and values, is kept in blocks. A decode worker pulls those blocks over while prefill is still computing the rest, \
chunk by chunk, so that when the first token is there almost nothing is left to move. The first token goes to the \
client at once; the decode worker writes all others.

A block belongs to exactly one owner at any time. A block that moves is covered by a lease with an end, checked \
against the checksum announced for it, and given back on both sides however the request ends. When a worker dies, \
the router sends what was already written to another one, which goes on from there, and the reader never notices."""


def demo_command(
    model: Annotated[
        str | None,
        typer.Option(
            envvar="MODEL", help="Checkpoint to serve: a directory or a hub id. [default: Baton's own small one]"
        ),
    ] = None,
    port: Annotated[int, typer.Option(envvar="PORT", min=0, max=65535, help="HTTP port; 0: any free one.")] = 8000,
    once: Annotated[bool, typer.Option("--once", help="Show one answer and stop everything.")] = False,
) -> None:
    """Start a small cluster here, watch one request go through it, and keep it serving."""
    console = Console(highlight=False)
    try:
        path = resolve_model(model) if model else demo_model()
        asyncio.run(_demo(demo_spec(path, model, port), path, console, once=once))
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass
    except FAILURES as error:
        console.print(str(error) or type(error).__name__, style="red", markup=False)
        raise typer.Exit(1) from None
    console.print("\nEverything is stopped.")


def demo_spec(path: Path, model: str | None, port: int) -> ClusterSpec:
    return parse_spec(
        {
            "model": str(path),
            "name": "demo",
            "served_model_name": _public_name(model) if model else DEMO_NAME,
            "kv_cache": {"memory": "256MiB"},
            "prefill": {"replicas": 1, "scheduler": {"max_batch_tokens": CHUNK_TOKENS}},
            "decode": {"replicas": 1},
            # A handoff is to be seen, though an idle decode worker would prefill this by itself.
            "router": {"port": port, "local_prefill_max_tokens": 0},
        }
    )


def _public_name(model: str) -> str:
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


async def _demo(spec: ClusterSpec, path: Path, console: Console, *, once: bool) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with LocalCluster(spec, progress=True) as cluster:
        model, chat = spec.public_model_name, has_chat_template(path)
        timeline, num_tokens = await show_answer(cluster.url, model, console, chat=chat)
        console.print(timeline_table(timeline, num_tokens))
        if once:
            return
        console.print(f"\nServing {model} at {cluster.url}\n", markup=False)
        console.print(curl_line(cluster.url, model, chat=chat), markup=False, soft_wrap=True)
        console.print("\nCtrl-C stops everything.", style="dim")
        await cluster.wait()


def has_chat_template(path: Path) -> bool:
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return bool(load_chat_templates(path, settings))


async def show_answer(url: str, model: str, console: Console, *, chat: bool) -> tuple[Mapping[str, Any], int]:
    """Stream one answer to the console; its timeline, and how many tokens it has."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    prompt = f"{TEXT}\n\n{QUESTION}"
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    timeline: dict[str, Any] = {}
    num_tokens = 0
    console.print(f"\n> {TEXT[:72]}... {QUESTION}\n", style="dim", markup=False)
    async with (
        asyncio.timeout(ANSWER_TIMEOUT_S),
        httpx.AsyncClient(base_url=url, timeout=ANSWER_TIMEOUT_S, trust_env=False) as client,
        client.stream("POST", _path(chat), json=body, headers={"x-baton-timeline": "1"}) as response,
    ):
        await raise_for_error(response)
        async for event in events(response):
            for choice in event["choices"]:
                text = choice["delta"].get("content") if chat else choice["text"]
                console.print(text or "", end="", markup=False, soft_wrap=True)
            timeline = event.get("timeline") or timeline
            num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    console.print("\n")
    return timeline, num_tokens


def timeline_table(timeline: Mapping[str, Any], num_tokens: int) -> Table:
    """A request's `timeline` (durations in seconds) for people."""
    table = Table(title="What happened to this request", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    workers = [timeline.get("prefill_worker"), timeline.get("decode_worker")]
    first, last = timeline.get("first_token") or 0.0, timeline.get("last_token") or 0.0
    num_blocks, exposed = timeline.get("transfer_blocks", 0), timeline.get("exposed_s", 0.0)
    table.add_row(
        "queued", _ms((timeline.get("dispatched") or 0.0) + timeline.get("queued_s", 0.0)), "router and worker"
    )
    table.add_row("prefill", _ms(timeline.get("prefill_s", 0.0)), f"by {workers[0] or workers[1] or '?'}")
    table.add_row("first token", _ms(first), "after the request came in")
    if num_blocks:
        size, seconds = timeline["transfer_bytes"], timeline["transfer_s"]
        table.add_row("KV moved", f"{num_blocks} blocks, {size / (1 << 20):.1f} MiB", f"over {timeline['transport']}")
        table.add_row("moving took", _ms(seconds), f"{size / max(seconds, 1e-9) / 1e9:.1f} GB/s of copying")
        hidden = max(0.0, 1 - exposed / max(seconds, exposed, 1e-9))
        table.add_row("hidden behind prefill", f"{hidden:.0%}", f"{_ms(exposed)} exposed")
    else:
        table.add_row("KV moved", "none", "the decode worker computed or had the whole prompt")
    rate = (num_tokens - 1) / (last - first) if last > first and num_tokens > 1 else 0.0
    table.add_row("decode", _ms(last - first), f"{num_tokens} tokens by {workers[1] or '?'}, {rate:.0f} tokens/s")
    return table


def curl_line(url: str, model: str, *, chat: bool) -> str:
    said: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Hello"}
    body = json.dumps({"model": model, **said, "max_tokens": 32, "stream": True})
    quoted = body.replace("'", "'\\''")
    return f"curl -N {url}{_path(chat)} -H 'content-type: application/json' -d '{quoted}'"


def _path(chat: bool) -> str:
    return "/v1/chat/completions" if chat else "/v1/completions"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
