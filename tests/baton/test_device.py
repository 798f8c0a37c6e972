import pytest
import torch

from baton.compose import found_pool
from baton.device import find_device
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
