from pathlib import Path

import pytest

from cluster.devices import visible_gpus, workers_per_gpu


@pytest.mark.parametrize(
    ("named", "gpus"),
    [("0,1", ["0", "1"]), (" 2 , GPU-5 ", ["2", "GPU-5"]), ("", []), ("-1", []), ("1,-1,2", ["1"]), ("3,,4", ["3"])],
)
def test_cuda_visible_devices_says_which_gpus_there_are(named: str, gpus: list[str], tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": named}, tmp_path) == gpus


def test_without_it_the_device_files_are_counted(tmp_path: Path) -> None:
    for name in ("nvidia3", "nvidia11", "nvidiactl", "nvidia-uvm", "nvidia-caps", "null"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1"]  # CUDA counts those it sees from 0
    assert visible_gpus({}, tmp_path / "none") == []


@pytest.mark.parametrize(
    ("num_workers", "num_gpus", "expected"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (2, 8, 1), (3, 0, 3), (0, 1, 1)]
)
def test_the_fullest_gpu_counts(num_workers: int, num_gpus: int, expected: int) -> None:
    assert workers_per_gpu(num_workers, [str(gpu) for gpu in range(num_gpus)]) == expected
