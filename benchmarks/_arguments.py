"""What the benchmarks' command lines have in common."""

import argparse


def positive(text: str) -> int:
    """A whole number of at least 1, as argparse's `type`."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed; allowed: at least 1")
    return number
