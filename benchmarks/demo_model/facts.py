"""What the demo model learns about Python's standard library: one `Fact` for each documented public name.

Read from the docstrings and signatures of the Python that runs this, so the facts are those of its version. A sentence
is taken as it stands in the docstring; what has none, or none short enough to learn, is left out.
"""

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from benchmarks.demo_model.examples import SUMMARIES, worked_example
from benchmarks.demo_model.language import words

MAX_SENTENCE = 220
MAX_EXAMPLE = 160
MAX_ARGUMENTS = 7
COMMON = words("""
builtins os os.path sys json re math random collections itertools functools datetime time string pathlib subprocess
shutil csv argparse logging threading asyncio typing dataclasses enum copy heapq bisect statistics hashlib base64
urllib.parse urllib.request socket tempfile glob io operator contextlib textwrap uuid decimal fractions pickle sqlite3
struct queue zipfile unittest collections.abc concurrent.futures
""")
OTHER = words("""
abc array ast asyncio.subprocess atexit binascii bz2 calendar cmath cmd code codecs colorsys compileall configparser
contextvars copyreg cProfile ctypes curses curses.ascii dbm difflib dis doctest email email.message email.mime.text
email.parser email.policy email.utils ensurepip errno faulthandler fcntl filecmp fileinput fnmatch ftplib gc getopt
getpass gettext graphlib grp gzip hmac html html.entities html.parser http http.client http.cookiejar http.cookies
http.server imaplib importlib importlib.metadata importlib.resources importlib.util inspect ipaddress keyword linecache
locale logging.config logging.handlers lzma mailbox marshal mimetypes mmap modulefinder multiprocessing
multiprocessing.shared_memory netrc numbers opcode optparse pdb pickletools pkgutil platform plistlib poplib
pprint profile pstats pty pwd py_compile pyclbr pydoc quopri readline reprlib resource rlcompleter runpy sched secrets
select selectors shelve shlex signal site smtplib socketserver stat stringprep symtable sysconfig syslog tabnanny
tarfile termios timeit token tokenize tomllib trace traceback tracemalloc tty turtle types unicodedata unittest.mock
urllib.error urllib.robotparser venv wave weakref webbrowser wsgiref wsgiref.simple_server wsgiref.util
xml.dom.minidom xml.etree.ElementTree xml.sax xml.sax.saxutils xmlrpc.client xmlrpc.server zipapp zipimport zlib
zoneinfo
""")


@dataclass(frozen=True, slots=True)
class Fact:
    name: str  # as one would write it: "os.path.join", "str.upper", "len"
    kind: str  # module, function, class, exception, method
    module: str
    owner: str  # the class of a method, else ""
    summary: str  # a sentence; "" when there is none
    arguments: tuple[str, ...] | None  # "a", "*p", "sep=None"; None when unknown
    returns: str  # the docstring's sentence about the result, or ""
    example: tuple[str, str] | None  # expression, what it gives
    members: tuple[str, ...]  # of a module: functions and classes; of a class: methods
    common: bool


def collect() -> list[Fact]:
    """All facts, in a fixed order."""
    facts: dict[str, Fact] = {}
    for name in [*COMMON, *OTHER]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                module = importlib.import_module(name)
            except ImportError:  # a module of another platform
                continue
        for fact in _module_facts(name, module):
            facts.setdefault(fact.name, fact)
    return list(facts.values())


def from_json(entry: dict[str, Any]) -> Fact:
    tuples = {key: tuple(entry[key]) if entry[key] is not None else None for key in ("arguments", "example")}
    return Fact(**{**entry, **tuples, "members": tuple(entry["members"])})


def _module_facts(name: str, module: ModuleType) -> Iterator[Fact]:
    common = name in COMMON
    found = dict(public(name, module))
    members = tuple(sorted(found))
    if name != "builtins":
        doc = inspect.getdoc(module) or ""
        sentence = SUMMARIES.get(name) or summary(doc, name)
        yield Fact(name, "module", name, "", sentence, None, "", None, members, common)
    for member, value in found.items():
        full = member if name == "builtins" else f"{name}.{member}"
        if inspect.isclass(value):
            yield from _class_facts(full, name, value, common)
        else:
            yield _one(full, "function", name, "", value, common)


def public(name: str, module: ModuleType) -> Iterator[tuple[str, Any]]:
    listed = getattr(module, "__all__", None)
    homes = {name, name.partition(".")[0], "_" + name, "builtins", "_io"}
    if name == "builtins":
        homes.add("io")
    for member in sorted(set(listed or vars(module))):
        value = getattr(module, member, None)
        if member.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        home = getattr(value, "__module__", None) or name
        if (listed is None and home not in homes) or (inspect.isclass(value) and home == "builtins" != name):
            continue  # imported there for its own use, or another name of a built-in
        yield member, value


def _class_facts(full: str, module: str, cls: type, common: bool) -> Iterator[Fact]:
    methods = {}
    for member in sorted(dir(cls)):
        value = inspect.getattr_static(cls, member, None)
        owner = next((base for base in cls.__mro__ if member in vars(base)), object)
        if member.startswith("_") or owner in (object, BaseException, Exception):
            continue
        if inspect.isroutine(value) or isinstance(value, classmethod | staticmethod):
            methods[member] = (getattr(cls, member), owner is cls)
    kind = "exception" if issubclass(cls, BaseException) else "class"
    yield _one(full, kind, module, "", cls, common, tuple(methods))
    for member, (value, own) in methods.items():
        if own:
            yield _one(f"{full}.{member}", "method", module, full, value, common)


def _one(
    name: str, kind: str, module: str, owner: str, value: Any, common: bool, members: tuple[str, ...] = ()
) -> Fact:
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    doc = inspect.cleandoc(own) if isinstance(own, str) else ""
    short = name.rpartition(".")[2]
    sentence = SUMMARIES.get(name) or summary(doc, short)
    example = worked_example(name) or _example(doc, short)
    return Fact(name, kind, module, owner, sentence, arguments(value), _returns(doc), example, members, common)


def summary(doc: str, name: str) -> str:
    """The first sentence of the first paragraph that is one; a first line that shows the signature is skipped."""
    for paragraph in re.split(r"\n\s*\n", doc)[:3]:
        lines = [line for line in paragraph.splitlines() if not _is_signature(line.strip(), name)]
        text = " ".join(" ".join(lines).split())
        if not text or text.startswith((">>>", "*", "-", "=", "+")) or not re.match(r"[A-Z`'\"a-z]", text):
            continue
        text = re.sub(rf"^(?:\w+\.)*{re.escape(name)}(?: module)?(?:\([^)]*\))?\s*(?:--?|:)+\s*", "", text)
        sentence = _sentence(text)
        return sentence if 12 <= len(sentence) <= MAX_SENTENCE else ""
    return ""


def _is_signature(line: str, name: str) -> bool:
    return bool(re.match(rf"(?:\w+\.)*{re.escape(name)}\(.*(?:\)|,)\s*(?:->.*|:)?$", line)) or "->" in line[:60]


def _sentence(text: str) -> str:
    match = re.match(r"(.+?[^.\s](?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)\.)(?:\s+[A-Z`'\"(]|$)", text)
    sentence = (match[1] if match else text).strip().rstrip(":;,")
    sentence = sentence.replace("``", "`").replace(" -- ", " - ")
    if len(sentence) > 1 and sentence[0].islower() and not re.match(r"\w*[._(]", sentence):
        sentence = sentence[0].upper() + sentence[1:]
    return sentence if sentence.endswith((".", "!", "?", ")")) else sentence + "."


def arguments(value: Any) -> tuple[str, ...] | None:
    try:
        signature = inspect.signature(value)
    except (ValueError, TypeError, AttributeError):  # AttributeError: a default that is not there outside a terminal
        return None
    shown: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls", "type", "mcs") and not shown:
            continue
        text = str(parameter.replace(annotation=inspect.Parameter.empty)).replace("'", '"')
        if len(text) > 40 or " at 0x" in text or "<" in text:
            text = parameter.name + "=..."
        shown.append(text)
    return tuple(shown) if len(shown) <= MAX_ARGUMENTS else (*shown[:MAX_ARGUMENTS], "...")


def _returns(doc: str) -> str:
    body = doc.partition("\n\n")
    for text in (body[2], body[0]):
        flat = " ".join(text.split())
        match = re.search(
            r"(?:^|[.:] )((?:It |This |The (?:function|method) )?(?:[Rr]eturns?)\b [^.]{4,150}\.)(?:\s|$)", flat
        )
        if match:
            sentence = match[1]
            return sentence[0].upper() + sentence[1:]
    return ""


def _example(doc: str, name: str) -> tuple[str, str] | None:
    match = re.search(r">>> ?(.+)\n(?!>>>|\.\.\.)(\S.*)(?:\n|$)", doc)
    if not match or len(match[1]) + len(match[2]) > MAX_EXAMPLE or "Traceback" in match[2] or "0x" in match[2]:
        return None
    expression = re.sub(r"\s+#.*", "", match[1]).strip()
    return (expression, match[2].strip()) if name in expression else None
