"""The step profiles that come with Baton, in the folder `profiles` beside this module, and those of users."""

from pathlib import Path

from cluster.spec_errors import SpecError
from engine.step_profile import StepProfile

FOLDER = Path(__file__).parent / "profiles"


def profile_names() -> list[str]:
    """Those that come with Baton."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def load_profile(name_or_path: str, field: str = "simulated.profile") -> StepProfile:
    """By its name, or a file that `baton profile` wrote; `field` says it. Raises SpecError."""
    path = FOLDER / f"{name_or_path}.json" if name_or_path in profile_names() else Path(name_or_path).expanduser()
    try:
        return StepProfile.load(path)
    except FileNotFoundError:
        names = ", ".join(profile_names())
        raise SpecError([f"{field}: {name_or_path!r} is no file; allowed: a path, or one of {names}"]) from None
    except (OSError, ValueError) as error:
        raise SpecError([f"{field}: {error}"]) from error
