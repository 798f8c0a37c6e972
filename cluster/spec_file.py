"""Specs as YAML: reading with errors in words, writing, and the full form with every default explained."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.spec import ClusterSpec
from cluster.spec_errors import SpecError, allowed, explain, find

PATH_FIELDS = (("run_dir",), ("router", "api_key_file"), ("security", "token_file"))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; here the second is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"field {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_spec(path: Path | str) -> ClusterSpec:
    """Read a spec. Paths in it are relative to the file. Raises SpecError."""
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise SpecError([f"{path}: cannot be read: {error.strerror}"]) from None
    except RecursionError:
        raise SpecError([f"{path}: lists or mappings are nested too deeply"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError([f"{path}: not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(data, dict):
        raise SpecError([f"{path}: must be a mapping of fields to values, such as: model: /path/to/checkpoint"])
    return parse_spec(_with_absolute_paths(data, path.resolve().parent))


def parse_spec(data: Mapping[str, Any]) -> ClusterSpec:
    """A spec from plain data. Raises SpecError."""
    try:
        return ClusterSpec.model_validate(dict(data))
    except ValidationError as error:
        raise SpecError(explain(error.errors(), ClusterSpec.model_json_schema())) from None


def plain_data(spec: ClusterSpec) -> dict[str, Any]:
    """What was set in `spec`, such that `parse_spec` gives it again."""
    return spec.model_dump(mode="json", exclude_unset=True)


def save_spec(spec: ClusterSpec, path: Path) -> None:
    path.write_text(yaml.safe_dump(plain_data(spec), sort_keys=False), encoding="utf-8")


def _with_absolute_paths(data: dict[str, Any], base: Path) -> dict[str, Any]:
    """A copy of `data` that means the same from any working directory."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for *sections, field in PATH_FIELDS:
        holder = data.get(sections[0]) if sections else data
        if isinstance(holder, dict) and isinstance(holder.get(field), str):
            holder[field] = str(base / Path(holder[field]).expanduser())
    simulated = data.get("simulated")
    profile = simulated.get("profile") if isinstance(simulated, dict) else None
    if isinstance(profile, str) and (base / Path(profile).expanduser()).is_file():  # else it is a name
        data["simulated"]["profile"] = str(base / Path(profile).expanduser())
    model = data.get("model")
    if isinstance(model, str) and model and (base / Path(model).expanduser()).is_dir():  # else it is a hub id
        data["model"] = str(base / Path(model).expanduser())
    return data


def explained_yaml(spec: ClusterSpec | None) -> str:
    """Every field with its value (the default where `spec` is None or silent), meaning and allowed values."""
    schema = ClusterSpec.model_json_schema()
    values = (spec or ClusterSpec(model="PATH-OR-HUB-ID")).model_dump(mode="json")
    return "\n".join(_explained(values, (), schema)) + "\n"


def _explained(values: Mapping[str, Any], names: tuple[str, ...], schema: Mapping[str, Any]) -> Iterator[str]:
    indent = "  " * len(names)
    for name, value in values.items():
        field = find(schema, (*names, name))
        if isinstance(value, dict):
            yield f"\n{indent}# {field['description']}\n{indent}{name}:"
            yield from _explained(value, (*names, name), schema)
        else:
            line = yaml.safe_dump({name: value}, width=1 << 16).rstrip("\n")
            yield f"{indent}{line}  # {field['description']} ({allowed(field)})"
