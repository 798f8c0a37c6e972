import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import httpx
import pytest

from cluster.launcher import LocalCluster, commands, on_this_machine, router_url
from cluster.spec import ClusterSpec
from cluster.spec_errors import SpecError
from cluster.spec_file import load_spec, parse_spec
from cluster.supervisor import ClusterFailed, Ended
from tests.cluster.children import ends_within
from tests.cluster.conftest import LLAMA_CONFIG

FAKE = (sys.executable, "-m", "tests.cluster.fake_baton")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    return path


def spec_for(checkpoint: Path, **fields: object) -> ClusterSpec:
    run_dir = str(checkpoint.parent / "run")
    return parse_spec({"model": str(checkpoint), "router": {"port": 0}, "run_dir": run_dir} | fields)


async def test_a_cluster_comes_up_serves_and_leaves_no_process(checkpoint: Path) -> None:
    spec = spec_for(checkpoint, prefill={"replicas": 2})
    async with LocalCluster(spec, program=FAKE, grace_s=10) as cluster:
        pids = cluster.pids
        assert sorted(pids) == ["decode-0", "prefill-0", "prefill-1", "router"]
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(cluster.url)).json()["number"] == 4  # the third said that all three are attached
    assert all(ends_within(pid, 0) for pid in pids.values())
    assert cluster.pids == {}


async def test_a_process_that_ends_later_is_reported_and_started_again(checkpoint: Path) -> None:
    reports: asyncio.Queue[Ended] = asyncio.Queue()
    async with LocalCluster(spec_for(checkpoint), program=FAKE, grace_s=10, report=reports.put_nowait) as cluster:
        os.kill(cluster.pids["decode-0"], signal.SIGKILL)
        ended = await asyncio.wait_for(reports.get(), 20)
    assert (ended.command.name, ended.status) == ("decode-0", -signal.SIGKILL)


@pytest.mark.parametrize("name", ["router-0", "prefill-0", "decode-0"])
async def test_a_process_that_fails_at_start_is_quoted(checkpoint: Path, name: str) -> None:
    spec = spec_for(checkpoint, served_model_name=f"fail:{name}")
    with pytest.raises(ClusterFailed) as caught:
        await LocalCluster(spec, program=FAKE, grace_s=10).__aenter__()
    assert f"{name.removesuffix('-0') if name == 'router-0' else name} ended with status 1" in str(caught.value)
    assert "the checkpoint is made of cheese" in str(caught.value)


async def test_a_cluster_that_is_never_ready_is_given_up(checkpoint: Path) -> None:
    idle = (sys.executable, "-c", "import time; time.sleep(600)")
    cluster = LocalCluster(spec_for(checkpoint), program=idle, timeout_s=0.1)
    with pytest.raises(ClusterFailed, match="not ready after"):
        await cluster.__aenter__()
    assert cluster.pids == {}


async def test_a_worker_that_is_never_attached_keeps_nobody_from_serving(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.launcher.ATTACH_S", 0.3)
    spec = spec_for(checkpoint, served_model_name="unattached")
    async with LocalCluster(spec, program=FAKE, grace_s=10) as cluster, httpx.AsyncClient(trust_env=False) as client:
        workers = (await client.get(cluster.url)).json()["workers"]
    assert [worker["usable"] for worker in workers] == [True, False]


async def test_two_clusters_do_not_share_a_run_directory(checkpoint: Path) -> None:
    async with LocalCluster(spec_for(checkpoint), program=FAKE, grace_s=10):
        with pytest.raises(SpecError, match="in use by a running cluster"):
            await LocalCluster(spec_for(checkpoint), program=FAKE).__aenter__()


async def test_wait_returns_when_asked_to_stop(checkpoint: Path) -> None:
    cluster = LocalCluster(spec_for(checkpoint), program=FAKE)
    waiting = asyncio.create_task(cluster.wait())
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(waiting, 10)


async def test_a_user_s_own_files_in_the_run_directory_survive(checkpoint: Path) -> None:
    mine = [checkpoint.parent / "run" / name for name in ("logs/mine.log", "workers/mine.txt", "spec.yaml")]
    for path in mine:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text("precious")
    stale = checkpoint.parent / "run" / "workers" / "decode-0.lease"
    stale.write_text("stale")
    async with LocalCluster(spec_for(checkpoint, served_model_name="tiny"), program=FAKE, grace_s=10):
        assert stale.read_text() != "stale"
    assert [path.read_text() for path in mine] == ["precious"] * 3


def test_each_process_gets_the_spec_in_effect_and_its_threads(checkpoint: Path) -> None:
    spec = on_this_machine(spec_for(checkpoint, decode={"threads": 3}), {})
    prepared = {command.name: command for command in commands(spec, Path("/run/spec.yaml"), {"HOME": "/h"})}
    assert list(prepared) == ["router", "prefill-0", "decode-0"]
    assert prepared["decode-0"].argv[1:] == ("-m", "baton", "decode", "--spec", "/run/spec.yaml", "--index", "0")
    assert prepared["decode-0"].environ["OMP_NUM_THREADS"] == "3"
    assert prepared["router"].environ["HOME"] == "/h"
    assert prepared["router"].log == Path("/run/logs/router.log")
    assert prepared["router"].environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert "GLIBC_TUNABLES" not in prepared["decode-0"].environ
    mine = {"GLIBC_TUNABLES": "glibc.malloc.check=1"}
    assert commands(spec, Path("/run/spec.yaml"), mine)[0].environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


def gpus_of(spec: ClusterSpec, visible: str) -> dict[str, str | None]:
    environ = {"CUDA_VISIBLE_DEVICES": visible}
    spec = on_this_machine(spec, environ)
    prepared = commands(spec, Path("/run/spec.yaml"), environ)
    return {command.name: command.environ["CUDA_VISIBLE_DEVICES"] for command in prepared}


def test_workers_are_spread_over_the_gpus_of_the_machine(checkpoint: Path) -> None:
    spec = spec_for(checkpoint, prefill={"replicas": 2}, decode={"replicas": 3})
    assert gpus_of(spec, "1,3,GPU-7") == {
        "router": "1,3,GPU-7",
        "prefill-0": "1",
        "prefill-1": "3",
        "decode-0": "GPU-7",
        "decode-1": "1",
        "decode-2": "3",
    }
    mixed = spec_for(checkpoint, prefill={"device": "cpu"}, decode={"replicas": 2})
    assert gpus_of(mixed, "0,1") == {"router": "0,1", "prefill-0": "0,1", "decode-0": "0", "decode-1": "1"}


@pytest.mark.parametrize(("visible", "fraction"), [("0", 0.3), ("0,1", 0.45), ("0,1,2", 0.9), ("0,1,2,3", 0.9)])
def test_workers_on_one_gpu_share_its_memory(checkpoint: Path, visible: str, fraction: float) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": visible}
    spec = on_this_machine(spec_for(checkpoint, decode={"replicas": 2}), environ)
    assert spec.pool("decode", "cuda").gpu_memory_fraction == fraction
    given = on_this_machine(spec_for(checkpoint, gpu_memory_fraction=0.2), environ)
    assert given.pool("prefill", "cuda").gpu_memory_fraction == 0.2


def test_shares_beyond_a_whole_gpu_are_refused(checkpoint: Path) -> None:
    spec = spec_for(checkpoint, gpu_memory_fraction=0.5, decode={"gpu_memory_fraction": 0.6})
    assert on_this_machine(spec, {"CUDA_VISIBLE_DEVICES": "0,1"}).pool("decode").gpu_memory_fraction == 0.6
    with pytest.raises(SpecError, match=r"gpu_memory_fraction: 1\.10 in all for the workers on GPU 0"):
        on_this_machine(spec, {"CUDA_VISIBLE_DEVICES": "0"})


def test_workers_on_the_cpu_get_no_share_of_a_gpu(checkpoint: Path) -> None:
    spec = on_this_machine(spec_for(checkpoint, device="cpu"), {"CUDA_VISIBLE_DEVICES": "0"})
    assert spec.gpu_memory_fraction is None


def test_a_fixed_port_serves_one_worker_a_machine(checkpoint: Path) -> None:
    with pytest.raises(SpecError, match=r"prefill\.port: 7000 is not allowed with 2 workers"):
        on_this_machine(spec_for(checkpoint, prefill={"port": 7000, "replicas": 2}), {})


def test_what_is_left_open_is_decided_and_survives_the_file(checkpoint: Path) -> None:
    spec = on_this_machine(parse_spec({"model": str(checkpoint), "router": {"port": 0}}), {"XDG_RUNTIME_DIR": "/r"})
    assert spec.router.port > 0
    assert spec.run_dir == f"/r/baton/baton-{spec.router.port}"
    assert spec.public_model_name == "checkpoint"


async def test_the_spec_in_effect_is_written(checkpoint: Path) -> None:
    async with LocalCluster(spec_for(checkpoint), program=FAKE, grace_s=10) as cluster:
        assert load_spec(cluster.run_dir / "spec-in-effect.yaml") == cluster.spec


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8000"), ("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000")],
)
def test_the_url_reaches_the_router_from_this_machine(host: str, url: str) -> None:
    assert router_url(parse_spec({"model": "tiny", "router": {"host": host}})) == url


def test_an_unsupported_architecture_is_refused_by_name_before_any_process_starts(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    with pytest.raises(SpecError, match=r"'GPT2LMHeadModel' is not supported; supported are .*LlamaForCausalLM"):
        on_this_machine(spec_for(checkpoint), {})
