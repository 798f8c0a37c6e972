"""`baton simulate` and `baton plan` as a user meets them."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml

from baton.cli import main
from baton.step_profiles import load_profile
from cluster.simulation.setup import make_pool
from cluster.spec_file import load_spec

SPEC = {"model": "m", "kv_cache": {"memory": "4GiB"}, "prefill": {"replicas": 2}, "decode": {"replicas": 2}}


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return path


def baton(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["baton", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_simulate_reports_and_draws(
    spec_file: Path,
    trace_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    args = ("simulate", spec_file, "--trace", trace_file, "--bound", "--json", out, "--plot", picture, "--routers", 2)
    assert baton(monkeypatch, *args) == 0
    report = json.loads(out.read_text())
    assert (report["requests"], report["finished"], report["goodput"]) == (3, 3, 1.0)
    assert report["goodput_bound"] == report["goodput_bound_separate"] == 1.0
    assert report["pools"]["prefill"]["gpus"] == 2
    assert 0 < report["ttft_s"]["p50"] < 0.5
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "100.0% of 3 requests" in capsys.readouterr().out


def test_the_table_shows_tenants_by_the_names_that_they_have(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "[bold].jsonl"
    tenants = (*("", "a[/x]", "\x1b[2J", "often") * 2, *map(str, range(14)))
    lines = [
        {"timestamp": 0, "input_length": 9, "output_length": 2, "hash_ids": [number], "tenant": tenant}
        for number, tenant in enumerate(tenants)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    assert baton(monkeypatch, "simulate", spec_file, "--trace", trace) == 0
    shown = capsys.readouterr().out
    for text in ("[bold] x 1", "no tenant", "tenant a[/x]", "tenant '\\x1b[2J'", "tenant often", "and 6 more"):
        assert text in shown
    assert "tenant 9" not in shown


def test_memory_holds_as_many_tokens_whatever_the_engine(
    tmp_path: Path, trace_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """131,072 bytes a token, as the default profile says, whose model is Llama-3-8B in 16 bits."""
    spec_file, out = tmp_path / "spec.yaml", tmp_path / "out.json"
    for engine in ("torch", "simulated"):
        spec_file.write_text(yaml.safe_dump(SPEC | {"engine": engine}))
        assert baton(monkeypatch, "simulate", spec_file, "--trace", trace_file, "--json", out) == 0
        pools = json.loads(out.read_text())["pools"]
        assert {pools[role]["kv_tokens"] for role in ("prefill", "decode")} == {(4 << 30) // 131_072}


def test_what_is_longer_than_max_model_len_is_refused(
    spec_file: Path, trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requests have 1140, 720 and 1730 tokens with their answers."""
    out = tmp_path / "out.json"
    for max_model_len, refused in ((1730, 0), (1729, 1), (1139, 2)):
        spec_file.write_text(yaml.safe_dump(SPEC | {"max_model_len": max_model_len}))
        assert baton(monkeypatch, "simulate", spec_file, "--trace", trace_file, "--json", out) == 0
        report = json.loads(out.read_text())
        reasons = {f"prompt and answer are longer than {max_model_len:,} tokens": refused} if refused else {}
        assert (report["finished"], report["rejects"]) == (3 - refused, reasons)


def test_simulation_loads_neither_torch_nor_ray_nor_matplotlib(spec_file: Path, trace_file: Path) -> None:
    code = (
        "import sys\nfrom baton.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert not {'torch', 'ray', 'matplotlib'} & set(sys.modules), sorted(sys.modules)\n"
    )
    args = ["simulate", str(spec_file), "--trace", str(trace_file)]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("gpus", [(), ("--gpus", 2)], ids=["the spec's", "given"])
def test_plan_prints_every_candidate_and_a_verdict(
    gpus: tuple[object, ...],
    spec_file: Path,
    trace_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "plan.json"
    row = {"timestamp": 0, "input_length": 3000, "output_length": 20}
    rows = [row | {"hash_ids": list(range(10 * number, 10 * number + 6))} for number in range(30)]
    trace_file.write_text("\n".join(json.dumps(row) for row in rows))
    if not gpus:
        spec_file.write_text(yaml.safe_dump(SPEC | {"prefill": {"replicas": 1}, "decode": {"replicas": 1}}))
    args = ("plan", spec_file, "--trace", trace_file, *gpus, "--slo", "ttft=0.3,tpot=0.05", "--json", out)
    assert baton(monkeypatch, *args) == 0
    candidates = json.loads(out.read_text())
    assert {(each["prefill_workers"], each["decode_workers"]) for each in candidates} == {(1, 1), (0, 2)}
    rates = [each["goodput_per_s_per_gpu"] for each in candidates]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0
    said = capsys.readouterr().out
    assert "at 3 draws of the arrivals, rates searched in steps of 5%:" in said
    assert [len(each["goodput_per_s_per_gpu_draws"]) for each in candidates] == [3, 3]
    assert "other TP sizes than 1 are not searched" in said
    assert "the trace has only 30 requests in 0 s: what it says of rates is mostly chance" in " ".join(said.split())
    assert {each["report"]["policy"] for each in candidates} == {"prefix_aware"}


def test_plan_on_many_requests_says_nothing_of_chance(
    spec_file: Path, trace_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"timestamp": 400 * number, "input_length": 600, "output_length": 2, "hash_ids": [2 * number, 2 * number + 1]}
        for number in range(100)
    ]
    trace_file.write_text("\n".join(json.dumps(row) for row in rows))
    assert baton(monkeypatch, "plan", spec_file, "--trace", trace_file, "--gpus", 1) == 0
    assert "chance" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--slo", "ttft=2"], "--slo: 'ttft=2' is not allowed; allowed: both once, in seconds, above 0"),
        (["--slo", "ttft=2,tpot=1,ttft=3"], "--slo: 'ttft=2,tpot=1,ttft=3' is not allowed"),
        (["--policy", "best"], "--policy: 'best' is not known; allowed: prefix_aware, round_robin"),
        (["--slo", "ttft=nan,tpot=1"], "--slo: 'ttft=nan,tpot=1' is not allowed"),
        (["--seed", "-1"], "Invalid value for '--seed'"),
        (["--rate-scale", "0"], "--rate-scale: 0 is not allowed"),
        (["--rate-scale", "nan"], "--rate-scale: nan is not allowed; allowed: from 0.001 to 1000000"),
        (["--rate-scale", "1e-308"], "--rate-scale: 1e-308 is not allowed"),
        (["--rate-scale", "1e300"], "--rate-scale: 1e+300 is not allowed"),
        (["--rate-scale", "inf"], "--rate-scale: inf is not allowed"),
        (["--slo", "ttft=inf,tpot=1"], "--slo: 'ttft=inf,tpot=1' is not allowed"),
        (["--bandwidth", "-1"], "--bandwidth: -1 is not allowed"),
        (["--bandwidth", "1e-6"], "--bandwidth: 1e-06 is not allowed; allowed: finite, at least 0.001"),
        (["--bandwidth", "nan"], "--bandwidth: nan is not allowed"),
        (["--json", "nowhere/out.json"], "--json: nowhere/out.json cannot be written"),
        (["--plot", "/"], "--plot: / cannot be written"),
        (["--block-size", "48"], "--block-size: 48 is not allowed"),
        (["--profile", "nowhere"], "--profile: 'nowhere' is no file"),
    ],
)
def test_a_wrong_option_is_named(
    spec_file: Path,
    trace_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    assert baton(monkeypatch, "simulate", spec_file, "--trace", trace_file, *args) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.foo", "x", "x.pgf"])
def test_a_plot_that_matplotlib_cannot_write_is_refused_before_the_work(
    spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pytest.importorskip("matplotlib")
    args = ("simulate", spec_file, "--trace", tmp_path / "nowhere", "--plot", tmp_path / name)
    assert baton(monkeypatch, *args) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{name} is not allowed; allowed: a file whose suffix says its format" in said
    assert ".png" in said


def test_one_request_cannot_be_planned_for(
    spec_file: Path, trace_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("plan", spec_file, "--trace", trace_file, "--gpus", 2, "--max-requests", 1)
    assert baton(monkeypatch, *args) == 2
    assert "holds one request" in capsys.readouterr().err


def test_as_many_routers_are_simulated_as_the_spec_has_processes(
    spec_file: Path, trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    spec_file.write_text(yaml.safe_dump(SPEC | {"router": {"workers": 3}}))
    for args, num_routers in ((), 3), (("--routers", 1), 1):
        assert baton(monkeypatch, "simulate", spec_file, "--trace", trace_file, "--json", out, *args) == 0
        assert json.loads(out.read_text())["routers"] == num_routers


@pytest.mark.filterwarnings("error")
def test_answers_of_one_token_are_drawn(
    spec_file: Path, trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    row = {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}
    trace_file.write_text("\n".join([json.dumps(row)] * 3))
    picture = tmp_path / "out.png"
    assert baton(monkeypatch, "simulate", spec_file, "--trace", trace_file, "--plot", picture) == 0
    assert picture.stat().st_size > 0


@pytest.mark.parametrize("engine", ["torch", "simulated"])
def test_what_a_spec_leaves_open_is_as_on_the_device_of_the_profile(
    tmp_path: Path, trace_file: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    spec, out = tmp_path / "short.yaml", tmp_path / "out.json"
    spec.write_text(f"model: m\nengine: {engine}\n")
    assert baton(monkeypatch, "simulate", spec, "--trace", trace_file, "--json", out) == 0
    pools = json.loads(out.read_text())["pools"]
    assert {pools[role]["kv_tokens"] for role in ("prefill", "decode")} == {893_440}  # 893,504 in blocks of 128
    pool = make_pool(load_spec(spec), "prefill", load_profile("h200-llama-3-8b"))
    assert (pool.scheduler.max_batch_tokens, pool.scheduler.max_num_seqs) == (8192, 256)


def test_a_spec_and_a_profile_without_kv_memory_and_a_bad_trace_are_named(
    tmp_path: Path, trace_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, profile = tmp_path / "short.yaml", tmp_path / "profile.json"
    spec.write_text("model: m\n")
    fields = msgspec.structs.replace(load_profile("h200-llama-3-8b").measured, kv_tokens=None)
    profile.write_text(fields.to_json())
    assert baton(monkeypatch, "simulate", spec, "--trace", trace_file, "--profile", profile) == 2
    assert "kv_cache.memory: must be set" in capsys.readouterr().err
    trace_file.write_text("{}\n")
    assert baton(monkeypatch, "simulate", spec, "--trace", trace_file) == 2
    assert "line 1: Object missing required field `timestamp`" in capsys.readouterr().err
