"""What several tests of the simulator begin with."""

from pathlib import Path

import pytest


@pytest.fixture
def at_given_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests arrive when the trace says so, instead of at random within windows."""
    monkeypatch.setattr(
        "cluster.simulation.simulation.arrivals", lambda trace, _seed, _scale: [each.arrived for each in trace.requests]
    )


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    lines = [
        '{"timestamp": 0, "input_length": 1100, "output_length": 40, "hash_ids": [0, 1, 2]}',
        '{"timestamp": 0, "input_length": 700, "output_length": 20, "hash_ids": [0, 3]}',
        '{"timestamp": 3000, "input_length": 1700, "output_length": 30, "hash_ids": [0, 1, 4, 5]}',
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
