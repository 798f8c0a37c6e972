"""Typed, bounded reads of JSON files that come from strangers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 4 << 20


class ConfigFields:
    """Typed, bounded reads of a JSON object; errors name the file, the field and the value."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def refuse(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self.source}: {name} must be {wanted}, not {self.values.get(name)!r:.80}")

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refuse(name, f"an integer between {low} and {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.refuse(name, f"a number between {low:g} and {high:g}")
        return float(value)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        return self.number(name, low, high) if self.has(name) else None

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        value = self.values.get(name)
        value = default if value is None else value
        if value not in allowed:
            raise self.refuse(name, f"one of {', '.join(allowed)}")
        return str(value)


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes`. Raises ValueError naming the file."""
    try:
        if path.stat().st_size > max_bytes:
            raise ValueError(f"{path.name} is larger than {max_bytes} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} holds no {path.name}: it is not a Hugging Face checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must hold a JSON object")
    return value
