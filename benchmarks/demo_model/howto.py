"""Dialogues about everyday tasks in Python and about words of the language."""

import random

from benchmarks.demo_model.language import Patterns, ask
from benchmarks.demo_model.tasks import Turn

# One task a line: ways to say it, and the answer.
HOW_TO = """
sort a list; put a list in order; order a list => `sorted([3, 1, 2])` gives `[1, 2, 3]`; `items.sort()` sorts in place.
sort a list in reverse; sort from high to low => `sorted([3, 1, 2], reverse=True)` gives `[3, 2, 1]`.
reverse a list; turn a list around => `[1, 2, 3][::-1]` gives `[3, 2, 1]`; `items.reverse()` reverses in place.
reverse a string; turn a string around; spell a string backwards => `"abc"[::-1]` gives `'cba'`.
get the length of a list; count the items of a list; find out how long a list is => `len([1, 2, 3])` gives `3`.
get the length of a string; count the characters of a string => `len("abc")` gives `3`.
add an item to a list; append to a list; put something at the end of a list => `items.append(4)` adds 4 at the end.
insert at the beginning of a list; put something first in a list => `items.insert(0, 4)` puts 4 first.
remove an item from a list; delete from a list => `items.remove(4)` removes the first 4; `items.pop()` the last item.
join two lists; concatenate lists; merge two lists => `[1, 2] + [3]` gives `[1, 2, 3]`.
get the first item of a list; access the first element => `items[0]` is the first item.
get the last item of a list; access the last element => `items[-1]` is the last item.
take a slice of a list; get a part of a list => `items[1:3]` gives the items at places 1 and 2.
remove duplicates; get the unique items of a list => `list(set([1, 1, 2]))` gives the unique items.
count how often items occur; count words; count occurrences => `collections.Counter("banana")` counts each item.
sum a list of numbers; add up numbers; add the numbers of a list => `sum([1, 2, 3])` gives `6`.
find the largest number; get the maximum of a list => `max([3, 1, 2])` gives `3`.
find the smallest number; get the minimum of a list => `min([3, 1, 2])` gives `1`.
check whether an item is in a list; test membership; look for an item in a list => `3 in [1, 2, 3]` gives `True`.
loop over a list; iterate over a list; go through the items of a list => `for item in items: print(item)`
loop with an index; number the items of a list => `for index, item in enumerate(items): print(index, item)`
repeat something ten times; write a loop over numbers => `for number in range(10): print(number)`
loop over two lists at once; go through two lists together => `for a, b in zip(first, second): print(a, b)`
make a list of squares; write a list comprehension => `[x * x for x in range(4)]` gives `[0, 1, 4, 9]`.
filter a list; keep only some items of a list => `[x for x in items if x > 0]` keeps the positive ones.
make a dictionary; create a dict => `ages = {"anna": 31, "ben": 27}`
get a value from a dictionary; look up a key => `ages["anna"]`, or `ages.get("anna", 0)` with a default.
loop over a dictionary; iterate over keys and values => `for key, value in ages.items(): print(key, value)`
check whether a key is in a dictionary; test for a key => `"anna" in ages` gives `True` or `False`.
merge two dictionaries; combine dicts => `{**first, **second}`, or `first | second`.
delete a key from a dictionary; remove an entry of a dict => `del ages["anna"]`, or `ages.pop("anna", None)`.
split a string; cut a string at commas; separate words => `"a,b,c".split(",")` gives `['a', 'b', 'c']`.
join strings; put strings together; make one string of a list => `", ".join(["a", "b"])` gives `'a, b'`.
replace text in a string; substitute a part of a string => `"banana".replace("a", "o")` gives `'bonono'`.
strip white space; remove spaces around a string; trim a string => `"  a  ".strip()` gives `'a'`.
make a string upper case; convert text to capitals => `"abc".upper()` gives `'ABC'`.
make a string lower case; convert text to small letters => `"ABC".lower()` gives `'abc'`.
check whether a string starts with something; test the beginning of a string => `"hello".startswith("he")` gives `True`.
find text in a string; search in a string => `"hello".find("l")` gives `2`; `"l" in "hello"` gives `True`.
put a value into a string; format a string; use an f-string => `f"x is {x}"` puts the value of x in the text.
convert a string to a number; parse an integer => `int("42")` gives `42`; `float("1.5")` gives `1.5`.
convert a number to a string; turn a number into text => `str(42)` gives `'42'`.
round a number; cut decimals => `round(3.14159, 2)` gives `3.14`.
compute a square root; take the square root of a number => `math.sqrt(16)` gives `4.0`.
raise a number to a power; compute a power => `2 ** 10` gives `1024`.
get the remainder of a division; compute modulo => `7 % 3` gives `1`.
make a random number; pick a random integer; roll a dice => `random.randint(1, 6)` gives a number from 1 to 6.
choose a random item; pick something by chance from a list => `random.choice(items)` gives one of the items.
shuffle a list; mix the items of a list => `random.shuffle(items)` shuffles the list in place.
read a file; get the text of a file; open a file for reading => `with open("notes.txt") as file: text = file.read()`
read a file line by line; go through the lines of a file => `with open("notes.txt") as file: lines = file.readlines()`
write a file; write text to a file; save text => `with open("notes.txt", "w") as file: file.write(text)`
append to a file; add a line to a file => `with open("notes.txt", "a") as file: file.write(text)`
check whether a file exists; find out if a file is there => `os.path.exists("notes.txt")` gives `True` or `False`.
delete a file; remove a file => `os.remove("notes.txt")` deletes it.
copy a file; duplicate a file => `shutil.copy("a.txt", "b.txt")` copies it.
rename a file; move a file => `os.rename("a.txt", "b.txt")` renames it.
list the files of a directory; see what is in a directory => `os.listdir(".")` gives the names.
create a directory; make a folder => `os.makedirs("data", exist_ok=True)` makes it.
get the current directory; find out where I am => `os.getcwd()` gives its path.
join paths; put a path together => `os.path.join("home", "anna")` gives `'home/anna'`.
get the extension of a file; split a file name => `os.path.splitext("notes.txt")` gives `('notes', '.txt')`.
read an environment variable; get an environment variable => `os.environ.get("HOME")` gives its value.
read JSON; parse JSON; turn JSON into a dict => `json.loads('{"a": 1}')` gives `{'a': 1}`.
write JSON; turn a dict into JSON; make JSON => `json.dumps({"a": 1})` gives `'{"a": 1}'`.
read a CSV file; parse CSV => `for row in csv.reader(open("table.csv")): print(row)`
use a regular expression; find numbers in text; match a pattern => `re.findall("[0-9]+", "a1b22")` gives `['1', '22']`.
get the current time; find out what time it is; get the date and time => `datetime.datetime.now()` gives it.
get today's date; find out the date => `datetime.date.today()` gives it.
measure time; time some code => `time.perf_counter()` before and after, and the difference in seconds.
wait a second; sleep; pause a program => `time.sleep(1)` waits one second.
run a command; start another program; call a shell command => `subprocess.run(["ls", "-l"])` runs it.
download a page; get a URL; make an HTTP request => `urllib.request.urlopen(url).read()` gives the bytes.
read the command line; get the arguments of a program => `sys.argv` holds them; `argparse` parses them.
end a program; leave a program; exit => `sys.exit()` ends it.
catch an exception; handle an error; use try => `try: risky()` and then `except ValueError: print("no")`.
raise an exception; signal an error => `raise ValueError("what is wrong")`
define a function; write a function; make a function => `def add(a, b): return a + b`
define a class; write a class; make a class => `class Point:` and then its methods, `def __init__(self, x, y):` first.
import a module; use a module => `import math`, and then `math.sqrt(16)`.
ask the user for input; read from the keyboard => `name = input("Name? ")` reads a line.
print something; show a value; print hello world; say hello => `print("hello world")` prints it.
write a condition; use if => `if x > 0: print("positive")` and then `else: print("not")`.
copy a list; duplicate a list => `items.copy()` copies it; `copy.deepcopy(items)` also what is inside.
swap two variables; exchange two values => `a, b = b, a` swaps them.
check the type of a value; find out the type of something => `type(x)` gives it; `isinstance(x, int)` tests it.
make a hash; compute SHA-256; hash some bytes => `hashlib.sha256(b"hi").hexdigest()` gives it.
make a unique id; create a UUID => `uuid.uuid4()` makes one.
log a message; write to a log => `logging.info("started")` logs it.
start a thread; run something in a thread => `threading.Thread(target=work).start()` starts it.
""".strip()
WORDS_OF_PYTHON = """
a list => A list is a mutable sequence of items, such as `[1, 2, 3]`.
a tuple => A tuple is an immutable sequence of items, such as `(1, 2)`.
a dictionary; a dict => A dict maps keys to values, such as `{"a": 1}`.
a set => A set holds unique items without order, such as `{1, 2}`.
a string => A string is an immutable sequence of characters, such as `"abc"`.
an integer; an int => An integer is a whole number of any size, such as `42`.
a float => A float is a number with a fraction, such as `1.5`.
a boolean; a bool => A boolean is `True` or `False`.
None => `None` is the one value that means nothing is there.
a function => A function is a named piece of code that takes arguments and returns a value; `def` defines it.
a method => A method is a function of a class, called on its objects.
a class => A class describes objects: their data and their methods.
an object; an instance => An object is a value of a class.
a module => A module is a file of Python code that others import.
a package => A package is a folder of modules.
a variable => A variable is a name for a value; `x = 1` makes one.
an argument; a parameter => An argument is a value that is given to a function when it is called.
a loop => A loop repeats code: `for` over items, `while` as long as a condition holds.
an iterator => An iterator gives one item after the other, when `next` is called.
an iterable => An iterable is what a for loop can go through: a list, a string, a file.
a generator => A generator is a function that yields its values one by one, with `yield`.
a decorator => A decorator is a function that wraps another one; it stands before it with `@`.
a lambda => A lambda is a small function without a name, such as `lambda x: x + 1`.
a list comprehension; a comprehension => A comprehension makes a list in one expression: `[x * x for x in items]`.
an exception => An exception is an error that is raised, and caught with `try` and `except`.
a context manager; with => A context manager sets up and cleans up around a `with` block.
a docstring => A docstring is a text at the beginning of a function, class or module that describes it.
a type hint => A type hint says of what type a value is, such as `x: int`.
slicing; a slice => A slice takes a part of a sequence, such as `items[1:3]`.
an f-string => An f-string is a text with values in it, such as `f"x is {x}"`.
recursion => Recursion is a function that calls itself.
inheritance => Inheritance makes a class from another one, whose methods it has.
a coroutine; async => A coroutine is a function that can wait, defined with `async def`.
a thread => A thread runs code beside other code of the same program.
the standard library => The standard library is the set of modules that come with Python.
pip => pip installs packages.
a virtual environment; venv => A virtual environment is a folder with its own Python packages.
a token => A token is a piece of text, often a word or a part of one; a model reads and writes tokens.
a language model; an LLM => A language model predicts the next token of a text, again and again.
JSON => JSON is a text format for data: objects, arrays, strings, numbers, true, false and null.
""".strip()
TASK: Patterns = (
    "How do I {t}?",
    "How do I {t}[?| in Python?]",
    "How can I {t}[?| in Python?]",
    "[Show me|Tell me|Explain] how to {t}[.|, please.]",
    "I want to {t}. How?",
    "[What is the way|Is there a way|What do I need] to {t}?",
    "How does one {t}?",
    "Code to {t}[.|?|, please.]",
    "{t}",
    "Python: {t}",
    "[Can|Could] you show me how to {t}?",
    "Write code to {t}.",
    "I have to {t}; what do I write?",
)
WORD: Patterns = (
    "What is {t}?",
    "What is {t}[?| in Python?]",
    "[Explain|Describe|Define] {t}[.| to me.]",
    "What does {t} mean[?| in Python?]",
    "What's {t}?",
    "[Can|Could] you explain {t}[?| to me?]",
    "Tell me what {t} is.",
    "I don't know what {t} is.",
    "[And what|So what] is {t}?",
    "In Python, what is {t}?",
    "What do programmers call {t}?",
)


def _table(text: str) -> list[tuple[list[str], str]]:
    rows = [line.split(" => ") for line in text.splitlines()]
    return [(asked.split("; "), reply) for asked, reply in rows]


_TASKS, _WORDS = _table(HOW_TO), _table(WORDS_OF_PYTHON)


def how_to(rng: random.Random, *, held_out: bool = False) -> list[Turn]:
    """One to three questions."""
    turns: list[Turn] = []
    while not turns or (rng.random() < 0.3 and len(turns) < 3):
        patterns, table = (TASK, _TASKS) if rng.random() < 0.7 else (WORD, _WORDS)
        asked, reply = rng.choice(table)
        turns.append((ask(rng, patterns, held_out=held_out, t=rng.choice(asked)), reply))
    return turns
