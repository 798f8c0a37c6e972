import json
from pathlib import Path

import pytest

from baton.tokenizer import checkpoint_tokenizer
from tests.cluster.conftest import LLAMA_CONFIG


def test_random_weights_are_served_with_the_tokenizer_that_is_there_or_with_bytes(
    checkpoint: Path, tmp_path: Path
) -> None:
    ours, theirs = (checkpoint_tokenizer(checkpoint, load) for load in ("auto", "dummy"))
    assert ours.encode("The river") == theirs.encode("The river")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    assert len(checkpoint_tokenizer(tmp_path, "dummy").encode("The river")) == 9
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        checkpoint_tokenizer(tmp_path, "auto")
