"""Small tasks with one right answer, computed: arithmetic, numbers, words, Python expressions."""

import operator
import random
import zlib
from collections.abc import Callable, Sequence

from benchmarks.demo_model.language import Patterns, ask, listing, words

Turn = tuple[str, str]  # question, answer

HELD_OUT_IN = 20  # one arithmetic task in so many is never trained

SUM: Patterns = (
    "What is {t}?",
    "{t}",
    "{t} = ?",
    "[Calculate|Compute|Work out] {t}[.|, please.]",
    "How much is {t}?",
    "What's {t}?",
    "Tell me what {t} is.",
    "{t}=",
    "Give me the result of {t}.",
    "Do you know {t}?",
)
NAMES = words("""
Anna Ben Carla David Elena Felix Grace Hugo Iris Jan Kara Leo Mara Noah Olga Paul Rosa Sam Tina Victor Wanda Yusuf Zoe
Alice Bob Clara Daniel Emma Frank Hanna Igor Julia Karl Lena Max Nina Oscar Petra Ruth Simon Tom Ute Vera
""")
THINGS = words("""
apples books cards coins cups eggs keys lamps pens plates stones tickets flowers cookies stamps chairs boxes marbles
""")
WORDS = words("""
apple banana stone river light house table music paper green yellow window garden winter summer python snake block lease
router cloud mouse train bridge orange lemon chair school friend market bread butter coffee water silver golden forest
mountain valley ocean island planet rocket engine wheel pencil button pocket basket candle mirror carpet ladder hammer
needle thread cotton ribbon castle dragon knight wizard button tiger zebra horse sheep rabbit spider eagle parrot
salmon turtle dolphin monkey camel donkey cherry potato tomato pepper garlic onion carrot sugar honey cheese pasta
number letter signal memory server token cache prefix worker layer model tensor vector matrix string integer float
list tuple dict set function class method module object value index key loop branch error test file path folder
red blue pink black white brown cat dog sun moon star tree leaf root seed rain snow wind fire sand rock lake hill road
""")
WORDS = sorted(set(WORDS))

COUNT: Patterns = (
    "How many letters [does the word {w} have|are in {w}|has {w}]?",
    "Count the letters of {w}.",
    "What is the length of the word {w}?",
    "How long is the word {w}?",
    "letters in {w}?",
    "Number of letters in {w}[?|, please.]",
    "Tell me how many letters {w} has.",
)
UPPER: Patterns = (
    "Write {w} in [upper case|capitals|capital letters].",
    "[Convert|Change|Put] {w} [to|into] [upper case|capitals].",
    "{w} in upper case[.|?]",
    "What is {w} in capitals?",
    "Make {w} upper case.",
    "Give me {w} in capital letters.",
    "Uppercase {w}.",
)
REVERSE: Patterns = (
    "[Reverse|Turn around] the word {w}.",
    "What is {w} [backwards|reversed|spelled backwards]?",
    "Write {w} backwards.",
    "{w} reversed?",
    "Spell the word {w} backwards.",
    "Reverse {w}.",
    "How is {w} written from right to left?",
)
SPELL: Patterns = (
    "Spell {w}.",
    "How [is|do you spell] {w}[| spelled]?",
    "Spell the word {w}[.|, please.]",
    "Give me the letters of {w} one by one.",
    "What letters is {w} made of?",
    "Split {w} into letters.",
)
FIRST: Patterns = (
    "What is the first letter of {w}?",
    "Which letter does {w} begin with?",
    "{w} begins with which letter?",
    "First letter of {w}?",
    "With what letter does the word {w} start?",
    "Name the letter at the beginning of {w}.",
)
LAST: Patterns = (
    "What is the last letter of {w}?",
    "Which letter does {w} end with?",
    "{w} ends with which letter?",
    "Last letter of {w}?",
    "With what letter does the word {w} end?",
    "Name the letter at the end of {w}.",
)
ORDER: Patterns = (
    "Sort [these|the] {what}: {l}.",
    "Put [these|the following] {what} in order: {l}.",
    "Sort {l}.",
    "[Order|Arrange] {l}.",
    "What is {l} in sorted order?",
    "Bring {l} into order.",
)
LARGEST: Patterns = (
    "[Which|What] is the {which} of {l}?",
    "Which of {l} is the {which}?",
    "[Find|Name] the {which} number: {l}.",
    "{which} of {l}?",
    "What is the {which} number in {l}?",
    "Out of {l}, which one is the {which}?",
)
EVEN: Patterns = (
    "Is {n} [even or odd|odd or even]?",
    "Is {n} an even number?",
    "[Even|Odd] or [odd|even]: {n}?",
    "Tell me whether {n} is odd or even.",
    "What is {n}, odd or even?",
    "Can {n} be divided by two?",
)
COMPARE: Patterns = (
    "[Which|What] is [larger|greater|more], {a} or {b}?",
    "Is {a} [larger|greater] than {b}?",
    "[Compare|Which of the two is larger:] {a} and {b}[.|?]",
    "{a} or {b}: which is more?",
    "Which number is bigger, {a} or {b}?",
    "Of {a} and {b}, which is the larger?",
)
NEXT: Patterns = (
    "What comes [next|after] {l}?",
    "Continue: {l}.",
    "{l}, ...?",
    "Go on with {l}.",
    "Which number follows {l}?",
    "What is the next number after {l}?",
)
EVALUATE: Patterns = (
    "What does [`{e}`|{e}] [give|return|evaluate to]?",
    "What is the [value|result] of `{e}`?",
    "Evaluate `{e}`.",
    "`{e}`?",
    "What do I get [from|for] `{e}`?",
    "What will Python [print|show] for `{e}`?",
    "In Python, what is `{e}`?",
    "Tell me the value of the expression `{e}`.",
)
STORY: Patterns = (
    "{n} has {a} {t} and [gets|buys|finds] {b} more. How many {t} does {n} have[| now]?",
    "{n} had {a} {t} and [was given|bought|found] {b}. How many are there now?",
    "There are {a} {t} on the table. {n} adds {b}. How many {t} are there?",
    "{n} owns {a} {t}, and then {b} more. How many {t} in all?",
    "If {n} has {a} {t} and takes another {b}, how many {t} does {n} have?",
)
STORY_LESS: Patterns = (
    "{n} has {a} {t} and [loses|gives away|sells] {b}. How many {t} does {n} have[| left]?",
    "{n} had {a} {t} and [lost|sold] {b}. How many are left?",
    "There are {a} {t} on the table. {n} takes {b}. How many {t} are left?",
    "{n} owned {a} {t} and gave away {b}. How many {t} remain?",
    "If {n} has {a} {t} and drops {b}, how many {t} remain?",
)


def is_held_out(task: str) -> bool:
    return zlib.crc32(task.encode()) % HELD_OUT_IN == 0


def arithmetic(rng: random.Random, held_out: bool = False) -> Turn:
    """A sum, difference, product, quotient or remainder of small numbers."""
    while True:
        digits = rng.choice((1, 2, 2, 3, 3))
        a, b = rng.randrange(10**digits), rng.randrange(10 ** rng.randint(1, digits))
        sign = rng.choice("+++--***/%")
        if sign == "*":
            a, b = rng.choice(((rng.randint(0, 12), rng.randint(0, 12)), (rng.randint(10, 99), rng.randint(2, 9))))
        elif sign in "/%":
            b = rng.randint(2, 12)
            a = b * rng.randint(1, 12) + (rng.randrange(b) if sign == "%" else 0)
        elif sign == "-" and a < b and rng.random() < 0.8:
            a, b = b, a
        if is_held_out(f"{a}{sign}{b}") == held_out:
            break
    results = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv, "%": operator.mod}
    result = results[sign](a, b)
    word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by", "%": "modulo"}[sign]
    shown = rng.choice((f"{a} {sign} {b}", f"{a} {sign} {b}", f"{a}{sign}{b}", f"{a} {word} {b}"))
    return ask(rng, SUM, held_out=held_out, t=shown), f"{a} {sign} {b} = {result}"


def story(rng: random.Random, held_out: bool = False) -> Turn:
    a, b = rng.randint(2, 60), rng.randint(1, 30)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    less = rng.random() < 0.5
    if less:
        a, b = max(a, b) + 1, min(a, b)
    result, sign = (a - b, "-") if less else (a + b, "+")
    question = ask(rng, STORY_LESS if less else STORY, held_out=held_out, n=name, t=thing, a=a, b=b)
    return question, f"{a} {sign} {b} = {result}, so there are {result} {thing}."


def numbers(rng: random.Random, held_out: bool = False) -> Turn:
    """Even and odd, comparisons, largest and smallest, sorting, the next of a row."""
    kind = rng.randrange(5)
    if kind == 0:
        n = rng.randrange(1000)
        return ask(rng, EVEN, held_out=held_out, n=n), f"{n} is {'odd' if n % 2 else 'even'}."
    if kind == 1:
        a, b = rng.sample(range(1000), 2)
        question = ask(rng, COMPARE, held_out=held_out, a=a, b=b)
        return question, f"{max(a, b)} is larger than {min(a, b)}."
    values = rng.sample(range(rng.choice((20, 100))), rng.randint(3, 5))
    shown = ", ".join(map(str, values))
    if kind == 2:
        which = rng.choice(("largest", "smallest"))
        value = max(values) if which == "largest" else min(values)
        return ask(rng, LARGEST, held_out=held_out, l=shown, which=which), f"The {which} is {value}."
    if kind == 3:
        question = ask(rng, ORDER, held_out=held_out, l=shown, what="numbers")
        return question, ", ".join(map(str, sorted(values)))
    start, step = rng.randint(0, 20), rng.choice((1, 1, 2, 2, 3, 5, 10))
    row = [start + step * place for place in range(4)]
    return ask(rng, NEXT, held_out=held_out, l=", ".join(map(str, row[:3]))), f"{row[3]}"


def word_task(rng: random.Random, held_out: bool = False) -> Turn:
    """Letters of a word, capitals, backwards, sorting words."""
    word = rng.choice(WORDS)
    quoted = rng.choice((word, word, f"'{word}'", f'"{word}"'))
    ways: Sequence[tuple[Patterns, Callable[[str], str]]] = (
        (COUNT, lambda w: f"`{w}` has {len(w)} letters."),
        (UPPER, str.upper),
        (REVERSE, lambda w: f"{' '.join(w)} -> {w[::-1]}"),
        (SPELL, lambda w: "-".join(w)),
        (FIRST, lambda w: f"`{w}` begins with {w[0]}."),
        (LAST, lambda w: f"`{w}` ends with {w[-1]}."),
    )
    if rng.random() < 0.1:
        chosen = rng.sample(WORDS, rng.randint(3, 4))
        question = ask(rng, ORDER, held_out=held_out, l=", ".join(chosen), what="words")
        return question, ", ".join(sorted(chosen))
    patterns, reply = rng.choice(ways)
    return ask(rng, patterns, held_out=held_out, w=quoted), reply(word)


def expression(rng: random.Random, held_out: bool = False) -> Turn:
    """A Python expression over literals and its value."""
    word, other = rng.sample(WORDS, 2)
    row = [rng.randrange(20) for _ in range(rng.randint(2, 5))]
    a, b = rng.randint(1, 30), rng.randint(2, 9)
    code = rng.choice(
        (
            f'len("{word}")',
            f'"{word}".upper()',
            f'"{word}".capitalize()',
            f'"{word}"[0]',
            f'"{word}"[-1]',
            f'"{word}"[:2]',
            f'"{word}" + "{other}"',
            f'"{word},{other}".split(",")',
            f'"-".join(["{word}", "{other}"])',
            f'"{word}".startswith("{rng.choice((word, other))[:2]}")',
            f'"{word[0]}" in "{rng.choice((word, other))}"',
            f"len({row})",
            f"sum({row})",
            f"max({row})",
            f"min({row})",
            f"sorted({row})",
            f"{row}[0]",
            f"{row}[-1]",
            f"{row}[1:]",
            f"{rng.choice(row)} in {row}",
            f"{a} // {b}",
            f"{a} % {b}",
            f"{a} * {b}",
            f"{a} > {b}",
            f"{a} == {rng.choice((a, b))}",
            f"list(range({rng.randint(2, 8)}))",
            f"[x * 2 for x in {row[:3]}]",
            f'{{"{word}": {a}, "{other}": {b}}}["{other}"]',
            f'"{word}" == "{rng.choice((word, other))}"',
            f"not {rng.choice((True, False))}",
            f"{rng.choice((True, False))} and {rng.choice((True, False))}",
            f"str({a}) + str({b})",
            f"int('{a}') + {b}",
            f"type({rng.choice((a, repr(word), row, 1.5, True))}).__name__",
            f"{b} ** 2",
            f"round({a}.{b}, 0)",
            f"tuple({row[:3]})",
        )
    )
    return ask(rng, EVALUATE, held_out=held_out, e=code), f"`{code}` gives `{eval(code)!r}`."  # our own expressions


def names_of(rng: random.Random, held_out: bool = False) -> Turn:
    """Some members of a well-known set."""
    what, all_of = rng.choice(
        (
            ("colours", ["red", "blue", "green", "yellow", "black", "white", "orange", "brown"]),
            ("fruits", ["apple", "banana", "cherry", "lemon", "orange", "pear", "plum", "grape"]),
            ("animals", ["cat", "dog", "horse", "sheep", "rabbit", "tiger", "mouse", "camel"]),
            ("vegetables", ["carrot", "onion", "potato", "tomato", "pepper", "garlic", "bean", "pea"]),
            ("planets", ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]),
            ("months", ["January", "February", "March", "April", "May", "June", "July", "August"]),
            ("days of the week", ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]),
        )
    )
    n = rng.randint(2, 5)
    chosen = all_of[:n]
    number = {2: "two", 3: "three", 4: "four", 5: "five"}[n]
    asked = f"{rng.choice((number, str(n)))} {what}"
    if rng.random() < 0.4:
        shown = "[" + ", ".join(f'"{each}"' for each in chosen) + "]"
        return ask(rng, AS_ARRAY, held_out=held_out, a=asked), shown
    return ask(rng, NAME_SOME, held_out=held_out, a=asked), f"{listing(chosen)}"


NAME_SOME: Patterns = (
    "[Name|List] {a}.",
    "[Can you name|Tell me] {a}[.|?]",
    "Give me {a}.",
    "{a}, please.",
    "Say {a}.",
    "I need {a}.",
)
AS_ARRAY: Patterns = (
    "[Write|Give me] {a} as a JSON [array|list].",
    "A JSON array of {a}[.|, please.]",
    "{a} as JSON.",
    "List {a} in JSON.",
    "Return a JSON array that holds {a}.",
    "Put {a} into a JSON list.",
)
TASKS: Sequence[tuple[float, Callable[[random.Random, bool], Turn]]] = (
    (6, arithmetic),
    (1.5, story),
    (2, numbers),
    (3, word_task),
    (4, expression),
    (1, names_of),
)


def task(rng: random.Random, *, held_out: bool = False) -> list[Turn]:
    """One to three tasks, often of one kind."""
    make = rng.choices([each for _, each in TASKS], [weight for weight, _ in TASKS])[0]
    turns = [make(rng, held_out)]
    while rng.random() < 0.4 and len(turns) < 4:
        turns.append(make(rng, held_out))
    return turns
