import time
import tomllib
from pathlib import Path

import pytest

from baton.compose import found_pool, make_executor
from baton.step_profiles import FOLDER, load_profile, profile_names
from cluster.spec_errors import SpecError
from cluster.spec_file import load_spec
from engine.executors.base import Batch, Chunk
from engine.request import RequestId
from engine.step_model import StepWork, num_pairs
from engine.step_profile import Step


def test_the_profile_of_an_h200_comes_with_baton() -> None:
    profile = load_profile("h200-llama-3-8b")
    assert profile.measured.device == "NVIDIA H200"
    assert profile.measured.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    # docs/performance.md, from the same measurements
    assert profile.step_seconds(StepWork(2048, num_pairs(2048, 0))) == pytest.approx(0.0448, rel=0.05)
    assert profile.step_seconds(StepWork(decodes=64, kv_tokens=64 * 2559)) == pytest.approx(0.0095, rel=0.05)
    assert profile.measured.transfer is not None
    assert profile.measured.transfer.seconds(1 << 30) == pytest.approx(0.659e-3, rel=0.05)


def test_an_installed_baton_has_the_profiles() -> None:
    """What the wheel takes from baton/ is listed."""
    listed = tomllib.loads((FOLDER.parent.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {file for pattern in listed["baton"] for file in FOLDER.parent.glob(pattern)}
    assert {FOLDER / f"{name}.json" for name in profile_names()} <= packed


@pytest.mark.parametrize("name", profile_names())
def test_committed_profiles_agree_with_their_own_measurements(name: str) -> None:
    """Half of all points within 3 %; single ones may wait for a host."""
    profile = load_profile(name)
    steps: list[Step] = [*profile.measured.prefill, *profile.measured.decode, *profile.measured.mixed]
    errors = sorted(abs(profile.step_seconds(step.work) / step.seconds - 1.0) for step in steps)
    assert errors[len(errors) // 2] < 0.03
    assert errors[-1] < 0.3


def test_a_file_is_a_profile_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(load_profile("h200-llama-3-8b").measured.to_json())
    assert load_profile(str(file)).measured == load_profile("h200-llama-3-8b").measured


def test_what_is_neither_a_name_nor_a_file_is_refused_with_the_names() -> None:
    with pytest.raises(SpecError, match="h200-llama-3-8b"):
        load_profile("h300")


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SpecError, match="is no step profile"):
        load_profile(str(tmp_path / "x.json"))


@pytest.mark.parametrize("profile", ["h200-llama-3-8b", "mine.json"])
def test_simulated_workers_take_the_time_of_the_profile_that_the_spec_names(tmp_path: Path, profile: str) -> None:
    """A file is looked for beside the spec."""
    (tmp_path / "mine.json").write_text(load_profile("h200-llama-3-8b").measured.to_json())
    (tmp_path / "spec.yaml").write_text(f"model: tiny\nengine: simulated\nsimulated: {{profile: {profile}}}\n")
    spec = load_spec(tmp_path / "spec.yaml")
    executor = make_executor(spec, found_pool(spec, "decode"))
    chunk = Chunk(RequestId("a"), range(300, 301), 15, [0])
    began = time.perf_counter()
    for step in [executor.submit(Batch([chunk])) for _ in range(2)]:
        step.result()
    assert (
        time.perf_counter() - began >= 2 * load_profile("h200-llama-3-8b").step_seconds(StepWork(0, 0, 1, 15)) > 0.008
    )
    executor.close()


def test_a_worker_whose_profile_is_missing_says_so(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("model: tiny\nengine: simulated\nsimulated: {profile: none.json}\n")
    spec = load_spec(tmp_path / "spec.yaml")
    with pytest.raises(SpecError, match=r"'none.json' is no file; allowed: a path, or one of h200-llama-3-8b"):
        make_executor(spec, found_pool(spec, "decode"))
