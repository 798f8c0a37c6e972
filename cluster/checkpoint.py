"""Where a model's files are: a directory as it is, or a Hugging Face hub id, downloaded once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.spec import Load
from cluster.spec_errors import SpecError
from engine.model_config import ModelConfig, load_model_config

TEXT_FILES = ["*.json", "*.jinja", "*.model"]
FILES: dict[Load, list[str]] = {
    "auto": [*TEXT_FILES, "*.safetensors"],
    "dummy": TEXT_FILES,
}  # no pickled weights, no code


def resolve_model(model: str, load: Load = "auto") -> Path:
    """The checkpoint's directory, with what `load` needs. Raises SpecError when neither disk nor hub has it."""
    if not model:
        raise SpecError(["model: '' is empty; needed: a checkpoint directory or a hub id"])
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SpecError([f"model: {model!r} is a directory without config.json; needed: a Hugging Face checkpoint"])
        return path.resolve()
    if path.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") > 1:
        raise SpecError([f"model: {model!r} is not a directory; needed: a checkpoint directory or a hub id"])
    return _download(model, FILES[load])


@contextmanager
def spec_errors(field: str = "model") -> Iterator[None]:
    """What is wrong with a checkpoint's files, or with asking for more than they give, is wrong with the spec."""
    try:
        yield
    except ValueError as error:
        raise SpecError([f"{field}: {error}"]) from error


def model_config(model: str, load: Load = "auto") -> ModelConfig:
    """What config.json says. Raises SpecError, naming an architecture that is not supported and those that are."""
    with spec_errors():
        return load_model_config(resolve_model(model, load))


def _download(model: str, files: list[str]) -> Path:
    from httpx import HTTPError  # here, for a local checkpoint needs neither
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=files))
    except HFValidationError:
        reason = "is neither a directory nor a valid hub id"
    except LocalEntryNotFoundError:
        reason = "is not a directory and not in the local hub cache, and the Hugging Face hub cannot be reached"
    except HfHubHTTPError as error:
        reason = f"is not a directory, and the Hugging Face hub refused it: {error.args[0].splitlines()[0]}"
    except (HTTPError, OSError) as error:
        reason = f"is not a directory, and downloading it from the Hugging Face hub failed: {error}"
    raise SpecError([f"model: {model!r} {reason}; needed: a checkpoint directory or a hub id"])
