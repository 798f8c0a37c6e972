"""`baton status`: what a router says of itself and its workers, fetched and laid out for a terminal."""

from collections.abc import Mapping
from typing import Any

import httpx
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from router.cluster_view import DECODE, PREFILL

TIMEOUT_S = 5.0


def fetch_status(url: str, api_key: str | None) -> dict[str, Any]:
    """The answer of `url`/status. Raises ConnectionError with what to do about it."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url.rstrip('/')}/status", headers=headers, timeout=TIMEOUT_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConnectionError(
            f"no router answers at {url} ({error}); is the cluster up, and is this its URL?"
        ) from None
    if response.status_code in (401, 403):
        raise ConnectionError(f"{url} demands a key: give --api-key or set BATON_API_KEY")
    try:
        answer = response.json() if response.is_success else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or "workers" not in answer:
        raise ConnectionError(f"{url} is not a Baton router: GET /status gave {response.status_code}")
    return answer


def render_status(answer: Mapping[str, Any]) -> RenderableType:
    """Workers in a table, everything about the router above it. Fields a router does not give are left blank."""
    workers: list[Mapping[str, Any]] = sorted(answer["workers"], key=_place)
    ready = Text("ready", "green") if answer.get("ready") else Text("not ready", "red")
    queue, counters = answer.get("queue", {}), answer.get("counters", {})
    head = Text.assemble(
        ready,
        f", {sum(worker.get('role') == PREFILL for worker in workers)} prefill and "
        f"{sum(worker.get('role') == DECODE for worker in workers)} decode workers; requests: "
        f"{queue.get('running', 0)} running, {queue.get('waiting', 0)} waiting, {counters.get('requests', 0)} in all, "
        f"{counters.get('refused', 0)} refused",
    )
    return Group(head, _table(workers)) if workers else head


def _place(worker: Mapping[str, Any]) -> tuple[bool, str]:
    """Prefill first, then by name with numbers in order (prefill-10 after prefill-9)."""
    name, _, number = str(worker.get("id", "")).rpartition("-")
    return worker.get("role") != PREFILL, f"{name}-{number:0>8}"


def _table(workers: list[Mapping[str, Any]]) -> Table:
    table = Table(
        caption="to prefill: prompt tokens not computed yet; KV blocks: in use of all", caption_justify="left"
    )
    for title in ("worker", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("running", "waiting", "to prefill", "handoffs", "KV blocks"):
        table.add_column(title, justify="right")
    for worker in workers:
        loads = (
            worker.get(field, "") for field in ("num_running", "num_waiting", "num_waiting_tokens", "num_handoffs")
        )
        table.add_row(Text(str(worker.get("id", ""))), _state(worker), *map(str, loads), _blocks(worker))
    return table


def _state(worker: Mapping[str, Any]) -> Text:
    if not worker.get("attached"):
        return Text("not attached", "red")
    if worker.get("draining"):
        return Text("draining", "yellow")
    return Text("ready", "green") if worker.get("usable") else Text("not usable", "red")


def _blocks(worker: Mapping[str, Any]) -> str:
    total, free = worker.get("num_blocks"), worker.get("num_free_blocks")
    if not total or free is None:
        return ""
    return f"{total - free}/{total}"
