from pathlib import Path

import msgspec
import pytest
import torch

from baton.compose import found_pool, make_executor
from baton.device import find_device
from baton.step_profiles import load_profile
from cluster.simulation.setup import make_pool
from cluster.spec import ROLES
from cluster.spec_errors import SpecError
from cluster.spec_file import parse_spec


@pytest.mark.parametrize(("sees", "found"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_where_torch_sees_one(sees: bool, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)
    assert find_device("auto") == found
    assert find_device("cpu") == "cpu"
    assert found_pool(parse_spec({"model": "tiny"}), "decode").device == found
    simulated = parse_spec({"model": "tiny", "engine": "simulated"})
    assert found_pool(simulated, "decode").device == "cpu"


@pytest.mark.parametrize(
    ("profile", "scheduler", "limits"),
    [
        (None, {}, [(512, 64), (512, 64)]),
        ("cpu.json", {}, [(512, 64), (512, 64)]),
        ("h200-llama-3-8b", {}, [(8192, 256), (1024, 256)]),
        ("h200-llama-3-8b", {"max_num_seqs": 16}, [(8192, 16), (1024, 16)]),
    ],
)
def test_simulated_workers_have_the_limits_of_the_device_of_their_profile(
    profile: str | None,
    scheduler: dict[str, int],
    limits: list[tuple[int, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a real cluster, where they compute on the CPU, and in a simulated one, which always has a profile."""
    monkeypatch.chdir(tmp_path)
    h200 = load_profile("h200-llama-3-8b")
    Path("cpu.json").write_text(msgspec.structs.replace(h200.measured, device="x86_64 CPU, 1 threads").to_json())
    fields = {"engine": "simulated", "simulated": {"profile": profile}, "scheduler": scheduler}
    spec = parse_spec({"model": "tiny", "kv_cache": {"memory": "1GiB"}} | fields)
    pools = [found_pool(spec, role) for role in ROLES]
    assert [pool.device for pool in pools] == ["cpu", "cpu"]
    assert [(pool.max_batch_tokens, pool.max_num_seqs) for pool in pools] == limits
    if profile is not None:
        simulated = [make_pool(spec, role, load_profile(profile)).scheduler for role in ROLES]
        assert [(config.max_batch_tokens, config.max_num_seqs) for config in simulated] == limits


def test_simulated_workers_of_a_profile_have_room_for_as_many_tokens_as_its_worker() -> None:
    profiled = {"engine": "simulated", "simulated": {"profile": "h200-llama-3-8b"}}
    for kv_cache, num_blocks in (({}, 893_504 // 16), ({"memory": "1GiB"}, 512), ({"num_blocks": 77}, 77)):
        spec = parse_spec({"model": "tiny", "kv_cache": kv_cache} | profiled)
        assert make_executor(spec, found_pool(spec, "decode")).memory.num_blocks == num_blocks
    unprofiled = parse_spec({"model": "tiny", "engine": "simulated", "kv_cache": {"memory": "1MiB"}})
    assert make_executor(unprofiled, found_pool(unprofiled, "decode")).memory.num_blocks == 256


def test_a_gpu_that_is_not_there_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match=r"device: 'cuda' is not allowed here: PyTorch .*; allowed: cpu"):
        found_pool(parse_spec({"model": "tiny", "device": "cuda"}), "prefill")


def test_what_is_no_kind_of_device_is_refused() -> None:
    with pytest.raises(SpecError, match="device: 'cuda:1' is not allowed; allowed: auto, cpu, cuda"):
        find_device("cuda:1")  # type: ignore[arg-type]


def test_gpus_that_torch_does_not_see_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    found_pool(parse_spec({"model": "tiny"}), "decode")
    assert "decode computes on the CPU: PyTorch sees none of the GPUs 0, 3" in caplog.text
    caplog.clear()
    found_pool(parse_spec({"model": "tiny", "device": "cpu"}), "decode")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found_pool(parse_spec({"model": "tiny"}), "decode")
    assert not caplog.text


def test_what_auto_turns_out_not_to_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match="'cuda_ipc' is not allowed where decode workers compute on device cpu"):
        found_pool(parse_spec({"model": "tiny", "transfer": {"transport": "cuda_ipc"}}), "decode")
