"""One tiny checkpoint for the whole directory, and an engine over it for tests that need no real model."""

from pathlib import Path

import pytest

from engine.executors.simulated import SimulatedConfig, SimulatedExecutor
from router.tokenizer import Tokenizer, load_tokenizer
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return load_tokenizer(checkpoint)


def simulated(tokenizer: Tokenizer, num_blocks: int = 256) -> SimulatedExecutor:
    """Tokens that follow from the prompt alone, with the tokenizer's vocabulary, in no time."""
    config = SimulatedConfig(vocab_size=tokenizer.vocab_size, num_blocks=num_blocks)
    return SimulatedExecutor(config, lambda _seconds: None)
