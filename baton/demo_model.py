"""The model that comes with Baton, for `baton demo`, `baton chat` and `baton generate` when they are given none.

Its files, and a card that says what it is and how it was made, are in the folder `demo_weights` beside this module.
"""

from pathlib import Path

DEMO_NAME = "baton-demo"


def demo_model() -> Path:
    """The directory of the checkpoint."""
    return Path(__file__).parent / "demo_weights"
