"""Expressions that show what a name of the standard library does, and sentences where its docstring has none.

An expression's value is computed, never written down, so an example cannot be wrong for the Python that runs it.
"""

import importlib
import re

EXPRESSIONS = """
abs(-3)
all([True, False])
any([True, False])
ascii("é")
bin(10)
bool([])
bytes([104, 105])
bytes.decode(b"hi")
bytes.hex(b"hi")
callable(len)
chr(97)
complex(1, 2)
dict(a=1, b=2)
dict.get({"a": 1}, "b", 0)
dict.items({"a": 1})
dict.keys({"a": 1, "b": 2})
dict.pop({"a": 1}, "a")
dict.values({"a": 1, "b": 2})
dict.copy({"a": 1})
dict.fromkeys(["a", "b"], 0)
divmod(7, 3)
enumerate(["a", "b"])
eval("1 + 2")
filter(None, [0, 1, 2])
float("1.5")
float.is_integer(2.0)
format(3.14159, ".2f")
frozenset([1, 2])
getattr("abc", "upper")()
hasattr("abc", "upper")
hex(255)
int("42")
int.bit_length(10)
isinstance(1, int)
issubclass(bool, int)
len([1, 2, 3])
list("abc")
list.copy([1, 2])
list.count([1, 2, 1], 1)
list.index(["a", "b"], "b")
list.pop([1, 2, 3])
map(abs, [-1, 2])
max([3, 1, 2])
min([3, 1, 2])
oct(8)
ord("a")
pow(2, 10)
range(3)
repr("hi")
reversed([1, 2, 3])
round(3.14159, 2)
set([1, 1, 2])
set.difference({1, 2}, {2})
set.intersection({1, 2}, {2, 3})
set.issubset({1}, {1, 2})
set.union({1}, {2})
slice(1, 3)
sorted([3, 1, 2])
str(12)
str.capitalize("hello")
str.casefold("Hello")
str.center("a", 5, "*")
str.count("banana", "a")
str.encode("hi")
str.endswith("file.txt", ".txt")
str.find("hello", "l")
str.format("{} is {}", "x", 1)
str.index("hello", "e")
str.isalnum("a1")
str.isalpha("abc")
str.isdigit("123")
str.islower("abc")
str.isspace("  ")
str.isupper("ABC")
str.join(", ", ["a", "b"])
str.ljust("a", 3, ".")
str.lower("Hello")
str.lstrip("  a")
str.partition("key=value", "=")
str.removeprefix("unhappy", "un")
str.removesuffix("file.txt", ".txt")
str.replace("banana", "a", "o")
str.rfind("hello", "l")
str.rjust("a", 3, ".")
str.rpartition("a.b.c", ".")
str.rsplit("a.b.c", ".", 1)
str.rstrip("a  ")
str.split("a,b,c", ",")
str.splitlines("a\\nb")
str.startswith("hello", "he")
str.strip("  a  ")
str.swapcase("Hello")
str.title("hello world")
str.upper("hello")
str.zfill("42", 5)
sum([1, 2, 3])
tuple([1, 2])
tuple.count((1, 2, 1), 1)
tuple.index(("a", "b"), "b")
type(1)
zip([1, 2], ["a", "b"])
base64.b64encode(b"hi")
base64.b64decode(b"aGk=")
bisect.bisect_left([1, 3, 5], 3)
bisect.bisect_right([1, 3, 5], 3)
collections.Counter("banana")
collections.ChainMap({"a": 1}, {"b": 2})
collections.OrderedDict(a=1)
collections.defaultdict(list)
collections.deque([1, 2, 3])
copy.copy([1, 2])
copy.deepcopy([[1], [2]])
datetime.date(2024, 5, 17)
datetime.date.isoformat(datetime.date(2024, 5, 17))
datetime.date.weekday(datetime.date(2024, 5, 17))
datetime.datetime(2024, 5, 17, 12, 30)
datetime.timedelta(days=1, hours=2)
decimal.Decimal("0.1") + decimal.Decimal("0.2")
difflib.get_close_matches("appel", ["apple", "pear"])
fnmatch.fnmatch("a.txt", "*.txt")
fractions.Fraction(1, 3)
functools.reduce(int.__add__, [1, 2, 3])
hashlib.md5(b"hi").hexdigest()
heapq.nlargest(2, [1, 5, 3])
heapq.nsmallest(2, [4, 1, 3])
html.escape("<b>")
html.unescape("&lt;b&gt;")
ipaddress.ip_address("127.0.0.1")
itertools.accumulate([1, 2, 3])
itertools.chain([1, 2], [3])
itertools.combinations("abc", 2)
itertools.compress("abc", [1, 0, 1])
itertools.dropwhile(str.isdigit, "12ab")
itertools.islice("abcdef", 3)
itertools.pairwise([1, 2, 3])
itertools.permutations([1, 2])
itertools.product("ab", [1, 2])
itertools.repeat("a", 3)
itertools.starmap(pow, [(2, 3), (3, 2)])
itertools.takewhile(str.isdigit, "12ab")
itertools.zip_longest("ab", "c")
json.dumps({"a": [1, 2]})
json.loads("[1, 2, 3]")
keyword.iskeyword("for")
math.ceil(1.2)
math.comb(5, 2)
math.degrees(math.pi)
math.dist([0, 0], [3, 4])
math.factorial(5)
math.floor(1.8)
math.gcd(12, 18)
math.hypot(3, 4)
math.isclose(0.1 + 0.2, 0.3)
math.isqrt(17)
math.lcm(4, 6)
math.log2(8)
math.log10(1000)
math.pow(2, 3)
math.prod([2, 3, 4])
math.sqrt(16)
math.trunc(-1.5)
operator.add(1, 2)
operator.mul(3, 4)
os.path.abspath("/a/../b")
os.path.basename("/home/anna/notes.txt")
os.path.commonpath(["/a/b", "/a/c"])
os.path.dirname("/home/anna/notes.txt")
os.path.isabs("/tmp")
os.path.join("home", "anna", "notes.txt")
os.path.normpath("a//b/../c")
os.path.split("/home/anna/notes.txt")
os.path.splitext("notes.txt")
pathlib.PurePath.with_suffix(pathlib.PurePosixPath("a.txt"), ".md")
re.escape("a.b")
re.findall("[0-9]+", "a1b22")
re.fullmatch("[a-z]+", "abc")
re.match("[a-z]+", "abc1").group()
re.search("[0-9]+", "abc12").group()
re.split("[,;]", "a,b;c")
re.sub("[0-9]", "#", "a1b2")
shlex.quote("a b")
shlex.split("ls -l 'my file'")
statistics.mean([1, 2, 3])
statistics.median([1, 5, 3])
statistics.mode([1, 1, 2])
string.capwords("hello world")
struct.pack("<H", 1)
struct.unpack("<H", b"\\x01\\x00")
textwrap.dedent("  a\\n  b")
textwrap.shorten("hello wide world", 12)
textwrap.wrap("one two three", 7)
unicodedata.name("a")
urllib.parse.quote("a b")
urllib.parse.unquote("a%20b")
urllib.parse.urlencode({"q": "a b"})
urllib.parse.urljoin("http://a.org/b/", "c")
zlib.crc32(b"hi")
"""
LAZY = ("map", "filter", "zip", "enumerate", "reversed", "range", "itertools.")  # shown as the list they give

SUMMARIES = {
    "dict": "A mapping from keys to values.",
    "json": "Reading and writing JSON (JavaScript Object Notation).",
    "math": "Mathematical functions on real numbers.",
    "open": "Open a file and return a corresponding file object.",
    "os": "Access to the operating system: files, directories, processes and environment variables.",
    "range": "An object that produces a sequence of integers from start (inclusive) to stop (exclusive) by step.",
    "sys": "Access to variables and functions of the interpreter itself.",
    "zip": "Iterate over several iterables at once, giving tuples of one item of each.",
    "type": "The class of an object; with three arguments, a new class.",
    "collections.OrderedDict": "A dictionary that remembers the order of insertion.",
    "functools.partial": "A new function with some arguments of the given function filled in.",
    "random": "Random numbers and random choices.",
    "re": "Matching and searching text with regular expressions.",
    "str": "The text type: an immutable sequence of characters.",
    "string": "Constants and classes for working with text.",
    "itertools": "Building blocks for efficient loops: functions that create iterators.",
    "functools": "Tools for working with functions and callable objects.",
    "subprocess": "Start other programs, give them input and read their output.",
    "datetime": "Dates, times and the differences between them.",
    "time": "Clocks, sleeping, and conversions of times.",
    "collections": "Container types beside dict, list, set and tuple.",
    "pathlib": "Paths of files and directories as objects.",
    "threading": "Threads, and the locks and events with which they work together.",
    "asyncio": "Concurrent programs in one thread, with async and await.",
    "csv": "Reading and writing tables as comma-separated values.",
    "argparse": "A parser for the options and arguments of a command line.",
    "logging": "Messages about what a program does, with levels, handlers and formats.",
    "unittest": "A framework for tests: test cases, fixtures and a test runner.",
    "typing": "Names for type hints.",
    "io": "Streams of text and bytes, in files and in memory.",
    "os.path": "Functions on the names of files and directories: join, split, normalize, test.",
    "pickle": "Python objects to bytes and back.",
    "socket": "Network connections over sockets.",
    "tempfile": "Temporary files and directories that are removed after use.",
    "glob": "Find files whose names match a pattern.",
    "copy": "Shallow and deep copies of objects.",
    "heapq": "A queue that gives the smallest item first, kept in a list.",
    "bisect": "Find and insert in a sorted list by halving it.",
    "statistics": "Mean, median, variance and other statistics of numbers.",
    "hashlib": "Secure hashes such as SHA-256 and MD5.",
    "base64": "Bytes as text in Base16, Base32, Base64 and Base85.",
    "decimal": "Decimal numbers with exact arithmetic of chosen precision.",
    "fractions": "Exact fractions of two integers.",
    "uuid": "Universally unique identifiers.",
    "enum": "Enumerations: sets of names bound to constant values.",
    "dataclasses": "Classes that mostly hold data, with methods written for them.",
    "contextlib": "Tools for the with statement.",
    "textwrap": "Wrap, fill, indent and dedent text.",
    "struct": "Convert between Python values and packed bytes.",
    "queue": "Queues that threads may share.",
    "zipfile": "Read and write ZIP archives.",
    "sqlite3": "SQL databases in a file or in memory, with SQLite.",
    "operator": "Python's operators as functions.",
    "shutil": "Copy, move and remove files and whole directories.",
    "tuple": "An immutable sequence of items.",
    "list": "A mutable sequence of items.",
    "set": "A collection of unique items without order.",
}

_WORKED: dict[str, tuple[str, str]] = {}


def worked_example(name: str) -> tuple[str, str] | None:
    """An expression that uses `name`, and the repr of its value."""
    if not _WORKED:
        _WORKED.update(_worked())
    return _WORKED.get(name)


def _worked() -> dict[str, tuple[str, str]]:
    found = {}
    for expression in EXPRESSIONS.strip().splitlines():
        name = expression.partition("(")[0]
        roots = set(re.findall(r"\b([a-z]\w*)\.", re.sub(r"'[^']*'|\"[^\"]*\"", "", expression)))
        parts = name.split(".")
        for length in range(1, len(parts)):
            try:
                importlib.import_module(".".join(parts[:length]))
            except ImportError:
                break
        space = {root: importlib.import_module(root) for root in roots if _is_module(root)}
        lazy = name.startswith(LAZY)
        shown = f"list({expression})" if lazy else _as_method(expression)
        found[name] = (shown, repr(eval(shown, space)))  # our own expressions
    return found


def _as_method(expression: str) -> str:
    """`str.upper("a")` is written `"a".upper()`."""
    match = re.match(r"(?:str|bytes)\.(\w+)\((b?\"[^\"]*\")(?:, )?(.*)\)$", expression)
    return f"{match[2]}.{match[1]}({match[3]})" if match else expression


def _is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
