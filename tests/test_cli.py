"""The `baton` command as a user meets it: help, exit statuses, messages. What it starts is tested with the cluster."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from baton.cli import main
from baton.status import fetch_status, render_status
from cluster.spec import ClusterSpec
from cluster.spec_file import parse_spec

Run = Callable[..., tuple[int, str, str]]

STATUS = {
    "ready": True,
    "workers": [
        {
            "id": "decode-10",
            "role": "decode",
            "attached": True,
            "usable": True,
            "num_blocks": 100,
            "num_free_blocks": 75,
        },
        {"id": "decode-9", "role": "decode", "attached": True, "usable": True, "draining": True},
        {"id": "prefill-0", "role": "prefill", "attached": False, "usable": False},
    ],
    "queue": {"running": 3, "waiting": 2},
    "counters": {"requests": 17, "refused": 1},
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["baton", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text("model: /nowhere\nrouter: {port: 9000}\n")
    return path


@contextlib.contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server that gives every request the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body if self.path == "/status" else b"wrong path")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            serving.join()


def test_help_lists_every_command(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    commands = {line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.strip()}
    expected = {"up", "router", "prefill", "decode", "status", "chat", "generate", "spec", "demo", "version"}
    assert expected <= commands


@pytest.mark.parametrize(
    "command", ["up", "router", "prefill", "decode", "status", "chat", "generate", "spec", "demo", "version"]
)
def test_every_option_is_explained(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    unexplained = [line for line in out.splitlines() if line.startswith("  -") and len(line.split("  ")) < 3]
    assert unexplained == []


def test_help_loads_no_torch() -> None:
    code = """
import sys
from baton.cli import main
sys.argv = ["baton", "--help"]
try:
    main()
finally:
    heavy = {"torch", "transformers", "redis", "huggingface_hub"} & set(sys.modules)
    if heavy:
        sys.exit(f"loaded: {heavy}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_runs_too() -> None:
    done = subprocess.run([sys.executable, "-m", "baton", "version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(".") == 2


@pytest.mark.parametrize("command", [["up"], ["router", "--spec"], ["prefill", "--spec"], ["spec", "--check"]])
def test_a_wrong_spec_is_refused_with_status_2(run: Run, tmp_path: Path, command: list[str]) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("model: tiny\nrouter: {port: high, polcy: round_robin}\n")
    status, out, err = run(*command, str(path))
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        "baton: router.port: 'high' is not allowed; allowed: a whole number from 0 to 65535",
        "baton: router.polcy: unknown field; did you mean 'policy'? allowed: "
        + ", ".join(type(ClusterSpec(model="x").router).model_fields),
    ]


def test_a_spec_that_is_not_there_is_named(run: Run) -> None:
    status, _, err = run("up", "/nowhere/spec.yaml")
    assert (status, err) == (2, "baton: /nowhere/spec.yaml: cannot be read: No such file or directory\n")


def test_a_checkpoint_that_is_not_there_is_named_before_anything_starts(run: Run, spec_path: Path) -> None:
    status, _, err = run("up", str(spec_path))
    assert status == 2
    assert err.startswith("baton: model: '/nowhere' is not a directory")


def test_a_wrong_port_on_the_command_line_is_a_wrong_spec(run: Run, spec_path: Path) -> None:
    status, _, err = run("up", str(spec_path), "--port", "70000")
    assert (status, err) == (2, "baton: router.port: 70000 is not allowed; allowed: a whole number from 0 to 65535\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["up"],
        ["prefill"],
        ["decode", "--spec", "x", "--index", "-1"],
        ["spec", "--check"],
        ["spec", "--schema", "--print"],
        ["status", "spec.yaml", "--url", "http://localhost"],
        ["up", "x", "--nonsense"],
    ],
)
def test_wrong_usage_has_status_2(run: Run, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert err.startswith("Usage:")


def test_the_printed_defaults_are_a_whole_spec(run: Run) -> None:
    status, out, _ = run("spec")
    assert status == 0
    assert parse_spec(yaml.safe_load(out)) == ClusterSpec(model="PATH-OR-HUB-ID")


def test_a_spec_is_printed_with_its_values(run: Run, spec_path: Path) -> None:
    _, out, _ = run("spec", str(spec_path), "--print")
    assert yaml.safe_load(out)["router"]["port"] == 9000


def test_a_right_spec_is_said_to_be_right(run: Run, spec_path: Path) -> None:
    assert run("spec", str(spec_path), "--check") == (0, f"{spec_path} is right\n", "")


def test_checking_a_spec_says_what_this_machine_lacks_of_its_files(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("model: /nowhere\nengine: simulated\nsimulated: {profile: h100}\nsecurity: {token_file: token}\n")
    status, out, err = run("spec", str(path), "--check")
    assert (status, out) == (0, f"{path} is right\n")
    token, profile = err.splitlines()
    assert token == (
        f"baton: on this machine: security.token_file: '{tmp_path / 'token'}' cannot be read: No such file or directory"
    )
    assert profile.startswith(
        "baton: on this machine: simulated.profile: 'h100' is no file; allowed: a path, or one of"
    )


def test_the_schema_knows_the_fields_and_refuses_others(run: Run) -> None:
    _, out, _ = run("spec", "--schema")
    schema = json.loads(out)
    assert set(schema["properties"]) == set(ClusterSpec.model_fields)
    assert schema["additionalProperties"] is False


def test_status_is_printed_as_it_came(run: Run) -> None:
    with answering(200, json.dumps(STATUS).encode()) as url:
        status, out, _ = run("status", "--url", url, "--json")
    assert status == 0
    assert json.loads(out) == STATUS


def test_status_is_laid_out_for_people() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(render_status(STATUS))
    lines = captured.get().splitlines()
    head = "ready, 1 prefill and 2 decode workers; requests: 3 running, 2 waiting, 17 in all, 1 refused"
    assert " ".join(captured.get().split()).startswith(head)
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if "prefill-" in line or "decode-" in line]
    assert [row.split()[1] for row in rows] == ["prefill-0", "decode-9", "decode-10"]
    assert "not attached" in rows[0]
    assert "draining" in rows[1]
    assert "25/100" in rows[2]


def test_a_cluster_without_workers_has_no_table() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render_status({"ready": False, "workers": []}))
    assert captured.get().startswith("not ready, 0 prefill and 0 decode workers")


def test_nothing_at_the_url_is_a_failure_with_advice(run: Run) -> None:
    status, out, err = run("status", "--url", "http://127.0.0.1:1")
    assert (status, out) == (1, "")
    assert err.startswith("baton: no router answers at http://127.0.0.1:1")


def test_status_of_a_spec_asks_at_its_port(run: Run, tmp_path: Path) -> None:
    with answering(200, json.dumps(STATUS).encode()) as url:
        path = tmp_path / "spec.yaml"
        path.write_text(f"model: tiny\nrouter: {{port: {url.rpartition(':')[2]}}}\n")
        status, out, _ = run("status", str(path), "--json")
    assert (status, json.loads(out)) == (0, STATUS)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, b"{}", "demands a key"),
        (404, b"{}", "is not a Baton router"),
        (200, b"<html>", "is not a Baton router"),
        (200, b"[]", "is not a Baton router"),
        (200, b"{}", "is not a Baton router"),
    ],
)
def test_an_answer_that_is_no_status_is_a_failure(status: int, body: bytes, message: str) -> None:
    with answering(status, body) as url, pytest.raises(ConnectionError, match=message):
        fetch_status(url, None)
