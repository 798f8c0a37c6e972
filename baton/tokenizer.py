"""Which tokenizer a model is served with."""

from pathlib import Path

from cluster.spec import Load
from engine.model_config import load_model_config
from router.byte_tokenizer import byte_tokenizer
from router.tokenizer import Tokenizer, load_tokenizer


def checkpoint_tokenizer(path: Path, load: Load) -> Tokenizer:
    """The checkpoint's; for random weights that come without one, bytes as tokens. Raises ValueError."""
    if load == "dummy" and not (path / "tokenizer.json").is_file():
        return byte_tokenizer(load_model_config(path).vocab_size)
    return load_tokenizer(path)
