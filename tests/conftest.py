from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # it loads torch, onnxruntime and transformers, which few tests need
    from tests.exported import Exported


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Exported]":
    """By family. Exporting takes seconds, so a test run does it once."""
    from tests.exported import Exported

    made: dict[str, Exported] = {}

    def of(family: str) -> Exported:
        if family not in made:
            made[family] = Exported(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of
