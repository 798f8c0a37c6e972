"""A wrong spec in words: one line a problem, with the field, the value given and what is allowed.

The allowed values are read off the spec's JSON schema, so the messages cannot drift from the checks.
"""

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

FIELDS_TOGETHER = "fields_together"  # type of the error whose lines are complete messages


class SpecError(Exception):
    """The spec cannot be used. `problems` holds one line for each thing to correct."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(problems)  # as it is made: so processes can hand it to each other
        self.problems = list(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


def explain(errors: Sequence[ErrorDetails], schema: Mapping[str, Any]) -> list[str]:
    """Pydantic's errors about a value of `schema`, as lines for people."""
    return [line for error in errors for line in _lines(error, schema)]


def _lines(error: ErrorDetails, schema: Mapping[str, Any]) -> list[str]:
    if error["type"] == FIELDS_TOGETHER:
        return error["msg"].splitlines()
    names = [str(part) for part in error["loc"]]
    path = ".".join(names) or "spec"
    if error["type"] in ("extra_forbidden", "invalid_key"):
        return [f"{path}: unknown field; {_known_fields(names[-1], find(schema, names[:-1]))}"]
    field = find(schema, names)
    if error["type"] == "missing":
        return [f"{path}: missing; needed: {field.get('description', allowed(field))}"]
    return [f"{path}: {reprlib.repr(error['input'])} is not allowed; allowed: {allowed(field)}"]


def _known_fields(name: str, section: Mapping[str, Any]) -> str:
    fields = list(section.get("properties", ()))
    close = difflib.get_close_matches(name, fields, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(fields)}"


def find(schema: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """The part of the spec's JSON schema about the field that `names` lead to, references resolved."""
    found = schema
    for name in names:
        found = _resolved(found, schema).get("properties", {}).get(name, {})
    return _resolved(found, schema)


def _resolved(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """`field` with its reference and its `null` alternative replaced by what they stand for."""
    for choice in field.get("anyOf", ()):
        if choice.get("type") != "null":
            field = {**field, **choice}
    if "$ref" in field:
        field = {**field, **schema["$defs"][field["$ref"].rpartition("/")[2]]}
    return field


def allowed(field: Mapping[str, Any]) -> str:
    """What a field that `find` gave takes."""
    null = ", or null" if any(choice.get("type") == "null" for choice in field.get("anyOf", ())) else ""
    return _allowed_value(field) + null


def _allowed_value(field: Mapping[str, Any]) -> str:
    if "x-allowed" in field:
        return str(field["x-allowed"])
    if "enum" in field:
        return "one of " + ", ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    kind = field.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(field)
    if kind == "object":
        return "a mapping with the fields " + ", ".join(field.get("properties", ()))
    return "text that is not empty" if kind == "string" else "another value"


def _bounds(field: Mapping[str, Any]) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    above = f" above {field['exclusiveMinimum']}" if "exclusiveMinimum" in field else ""
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f" of at least {low}"
    return above + (f" up to {high}" if high is not None else "")
