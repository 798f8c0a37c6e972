"""The text the demo model is trained on, as one file: documents, facts, texts to read, Baton's glossary, the sources.

    python -m benchmarks.demo_model corpus corpus.json.gz

Taken from what is installed here: docstrings of Python's standard library, the language reference that comes with it
(pydoc_data), docstrings of this project's dependencies whose licence is permissive, and this repository's documents.
The same Python and the same versions of packages give the same file.
"""

import argparse
import ast
import gzip
import importlib
import importlib.metadata
import inspect
import json
import platform
import re
import sysconfig
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.demo_model import facts
from benchmarks.demo_model.reading import MAX_TEXT, sentences

ROOT = Path(__file__).parents[2]
PERMISSIVE = {
    *("mit", "psf-2.0", "zlib", "cc0-1.0", "bsl-1.0", "llvm-exception"),
    *("apache-2.0", "apache 2.0", "apache software"),
    *("0bsd", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd 2-clause", "2-clause bsd", "3-clause bsd"),
}
LEFT_OUT = {"test", "tests", "testing", "idlelib", "lib2to3", "turtledemo", "site-packages", "__pycache__", "_vendor"}
MAX_PACKAGE_CHARS = 1_500_000
MIN_DOC = 40
GIST = (
    "Prefill and decode are two different jobs, so Baton gives each a pool of workers of its own.",
    "A router chooses a prefill worker; a decode worker pulls the keys and values while prefill is still computing, "
    "and writes the rest of the answer.",
    "When a worker dies, another one goes on, and the reader never notices.",
)


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    version: str
    licence: str
    num_documents: int
    num_chars: int


def collect() -> dict[str, Any]:
    from baton.demo import TEXT  # here, for who only loads the file needs none of Baton

    version = platform.python_version()
    parts: list[tuple[str, str, str, list[str]]] = [
        ("Python's standard library (docstrings)", version, "PSF-2.0", [*_runtime(), *_stdlib()]),
        ("Python's language reference (pydoc_data)", version, "PSF-2.0", _topics()),
        ("Baton's documents", "this repository", "its own", [TEXT, *_own()]),
    ]
    for name, licence in _dependencies():
        parts.append((name, importlib.metadata.version(name), licence, _package(name)))
    parts = [part for part in parts if part[3]]
    return {
        "sources": [
            asdict(Source(name, version, licence, len(documents), sum(map(len, documents))))
            for name, version, licence, documents in parts
        ],
        "documents": [document for part in parts for document in part[3]],
        "facts": [asdict(fact) for fact in facts.collect()],
        "texts": _texts(parts[0][3]),
        "glossary": _glossary(),
        "own_text": TEXT,
        "gist": list(GIST),
    }


def save(content: dict[str, Any], file: Path) -> None:
    file.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))


def load(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    return content


def _runtime() -> Iterator[str]:
    """What `help` shows of the public names, C modules among them."""
    for name in [*facts.COMMON, *facts.OTHER]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
        entries = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
        entries += [entry for member, value in facts.public(name, module) for entry in _help(name, member, value)]
        yield "\n\n\n".join(entries)


def _help(module: str, name: str, value: Any) -> Iterator[str]:
    full = name if module == "builtins" else f"{module}.{name}"
    members = [(full, value)]
    if inspect.isclass(value):
        members += [(f"{full}.{each}", getattr(value, each, None)) for each in sorted(vars(value)) if each[0] != "_"]
    for called, member in members:
        doc = getattr(member, "__doc__", None)
        if isinstance(doc, str) and doc:
            shown = facts.arguments(member)
            yield f"{called}{'' if shown is None else '(' + ', '.join(shown) + ')'}\n{inspect.cleandoc(doc)}"


def _stdlib() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if not LEFT_OUT & set(file.relative_to(root).parts):
            yield from _docstrings(file, ".".join(file.relative_to(root).with_suffix("").parts))


def _topics() -> list[str]:
    topics = importlib.import_module("pydoc_data.topics").topics
    return [topics[name] for name in sorted(topics)]


def _own() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])]


def _dependencies() -> Iterator[tuple[str, str]]:
    """Those of pyproject.toml that are installed, with the licence they declare, if it is permissive."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = project["dependencies"] + [each for extra in project["optional-dependencies"].values() for each in extra]
    for name in sorted({re.split(r"[<>=\[ ]", each)[0] for each in listed}, key=str.lower):
        try:
            metadata: Any = importlib.metadata.metadata(name)  # an email.message.Message, whose `get` is not declared
        except importlib.metadata.PackageNotFoundError:
            continue
        classifiers = [
            each.rpartition(" :: ")[2] for each in metadata.get_all("Classifier") or [] if "Approved" in each
        ]
        licence = metadata.get("License-Expression") or metadata.get("License") or " OR ".join(classifiers)
        if is_permissive(licence):
            yield name, licence


def is_permissive(licence: str) -> bool:
    """Whether every part of a licence as packages declare it is one that allows all use."""
    parts = re.split(r"\s+(?:AND|OR|WITH)\s+", licence)
    return all(part.strip(" ()").lower().removesuffix(" license") in PERMISSIVE for part in parts)


def _package(name: str) -> list[str]:
    found: list[str] = []
    num_chars = 0
    for path in sorted(importlib.metadata.files(name) or (), key=str):
        if path.suffix == ".py" and not LEFT_OUT & set(path.parts) and ".." not in path.parts:
            documents = list(_docstrings(Path(str(path.locate())), ".".join(path.with_suffix("").parts)))
            num_chars += sum(map(len, documents))
            if num_chars > MAX_PACKAGE_CHARS:
                break
            found += documents
    return found


def _docstrings(file: Path, module: str) -> Iterator[str]:
    """All docstrings of a file, one document."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, FileNotFoundError):
        return
    entries = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) >= MIN_DOC and doc.isprintable() | ("\n" in doc):
                name = module.removesuffix(".__init__") if isinstance(node, ast.Module) else _signature(node)
                entries.append(f"{name}\n{doc}")
    if entries:
        yield "\n\n\n".join(entries)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return f"class {node.name}" if isinstance(node, ast.ClassDef) else f"def {node.name}({ast.unparse(node.args)})"


def _texts(documents: list[str]) -> list[str]:
    """Paragraphs of a few sentences, to ask questions about."""
    found: dict[str, None] = {}
    for document in documents:
        for entry in document.split("\n\n\n"):
            body = entry.partition("\n")[2]
            paragraphs = [
                " ".join(each.split()) for each in body.split("\n\n") if not re.search(r">>>|::|^\s*[-*|=]", each)
            ]
            text = "\n\n".join(each for each in paragraphs if len(each) > 60)
            if 150 < len(text) < MAX_TEXT and 2 <= len(sentences(text)) <= 20:
                found[text] = None
    return list(found)


def _glossary() -> dict[str, str]:
    rows = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    return {word: meaning for word, meaning in cells[2:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    save(collect(), parser.parse_args().output)
