"""The generated modules are what protoc makes of the .proto files."""

from pathlib import Path

import pytest
from grpc_tools import protoc

PROTOS = Path(__file__).parent.parent / "protos"


@pytest.mark.parametrize("name", sorted(path.stem for path in PROTOS.glob("*.proto")))
def test_generated_code_is_up_to_date(name: str, tmp_path: Path) -> None:
    root = PROTOS.parent
    arguments = [
        "protoc",
        f"-I{root}",
        f"--python_out={tmp_path}",
        f"--pyi_out={tmp_path}",
        str(PROTOS / f"{name}.proto"),
    ]
    assert protoc.main(arguments) == 0
    for suffix in ("_pb2.py", "_pb2.pyi"):
        generated = (tmp_path / "protos" / f"{name}{suffix}").read_text()
        assert (PROTOS / f"{name}{suffix}").read_text() == generated, "run: make protos"
