"""A document that names a file of the repository names one that is there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TOP_LEVEL = sorted(path.name for path in ROOT.iterdir() if not path.name.startswith(".") or path.name == ".ci")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")


def named_paths(text: str, document: Path) -> Iterator[Path]:
    """Targets of relative links, and words in backticks that begin with a top-level name of the repository."""
    prose = FENCED.sub("", text)
    for target in LINK.findall(prose):
        if not re.match(r"[a-z]+:|#", target):
            yield (document.parent / target.partition("#")[0]).resolve()
    for code in CODE.findall(prose):
        for word in code.split():
            name = re.sub(r"(::\w+|:\d+|\.)$", "", word.rstrip(",;:)"))
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", name) and name.partition("/")[0] in TOP_LEVEL:
                yield ROOT / name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(document: Path) -> None:
    missing = [str(path) for path in named_paths(document.read_text(encoding="utf-8"), document) if not path.exists()]
    assert missing == []


def test_a_name_that_is_wrong_would_be_found() -> None:
    text = "See `cluster/nowhere.py`, [that](docs/none.md#part), `baton up spec.yaml` and [this](https://example.com)."
    assert list(named_paths(text, ROOT / "README.md")) == [ROOT / "docs/none.md", ROOT / "cluster/nowhere.py"]
