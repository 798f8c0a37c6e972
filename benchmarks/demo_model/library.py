"""Dialogues about the standard library: what a name does, takes, returns, where it is, what a module holds."""

import json
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.demo_model.facts import Fact
from benchmarks.demo_model.language import (
    Patterns,
    ask,
    does,
    it_does,
    listing,
    mention,
    ticked,
    to_do,
    with_article,
    words,
)
from benchmarks.demo_model.library_wordings import (
    ARGUMENTS,
    ARGUMENTS_NEXT,
    CONTENTS,
    DESCRIBE,
    EXAMPLE,
    EXAMPLE_NEXT,
    FIND,
    HAS,
    HOW,
    KIND,
    METHODS,
    RETURNS,
    RETURNS_NEXT,
    UNKNOWN,
    WHAT,
    WHAT_NEXT,
    WHERE,
    WHERE_NEXT,
)
from benchmarks.demo_model.tasks import Turn

MAX_LISTED = 40
HELD_OUT_IN = 40  # one name in so many is asked about in the held-out set alone


class Library:
    """Facts by name, and questions about them. `held_out` asks only what training never saw."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self._facts = {fact.name: fact for fact in facts}
        self._homes: dict[str, list[Fact]] = defaultdict(list)
        self._meanings: dict[str, set[str]] = defaultdict(set)
        for fact in facts:
            self._homes[fact.name.rpartition(".")[2]].append(fact)
            self._meanings[fact.summary].add(fact.name)
        kept = [fact for fact in facts if fact.summary or fact.arguments is not None or fact.members]
        self.trained = [fact for fact in kept if not _is_held_out(fact)]
        self.held_out = [fact for fact in kept if _is_held_out(fact) and fact.summary]
        self._weights = [_weight(fact) for fact in self.trained]
        self._cumulative: list[float] = []
        total = 0.0
        for weight in self._weights:
            total += weight
            self._cumulative.append(total)

    def pick(self, rng: random.Random) -> Fact:
        return rng.choices(self.trained, cum_weights=self._cumulative)[0]

    def dialogue(self, rng: random.Random, *, held_out: bool = False) -> list[Turn]:
        """One to four turns; later ones refer to the first or go on to another name."""
        kind = rng.random()
        if kind < 0.06:
            return [self.unknown(rng, held_out)]
        fact = self.pick(rng)
        if kind < 0.13:
            return [self._has(rng, fact, held_out)] if fact.members else [self._find(rng, fact, held_out)]
        turns = [self.first(rng, fact, held_out=held_out)]
        while rng.random() < 0.42 and len(turns) < 4:
            if rng.random() < 0.35:
                fact = self._neighbour(rng, fact)
                turns.append((ask(rng, WHAT_NEXT, held_out=held_out, x=_mention(rng, fact)), what(fact)))
            else:
                turns.append(self._next(rng, fact, held_out))
        return turns

    def first(self, rng: random.Random, fact: Fact, *, held_out: bool = False) -> Turn:
        """A question that names the fact."""
        makers: list[tuple[float, Callable[[], Turn]]] = [(0.6, lambda: self._kind(rng, fact, held_out))]
        ways: list[tuple[bool, float, Patterns, Callable[[Fact], str]]] = [
            (bool(fact.summary), 8, WHAT, what),
            (fact.arguments is not None, 2, ARGUMENTS, arguments),
            (bool(fact.returns), 2, RETURNS, returns),
            (fact.example is not None, 5, EXAMPLE, example),
            (bool(fact.members) and fact.kind == "class", 2, METHODS, members),
            (bool(fact.members) and fact.kind == "module", 3, CONTENTS, members),
            (bool(fact.summary), 1, DESCRIBE, as_json),
        ]
        for usable, weight, patterns, reply in ways:
            if usable:
                makers.append((weight, partial(self._named, rng, patterns, reply, fact, held_out)))
        if fact.kind not in ("module", "method") and fact.module != "builtins":
            makers.append((1.5, lambda: self._where(rng, fact, held_out)))
        if fact.summary and fact.kind != "module":
            makers.append((2.0, lambda: self._find(rng, fact, held_out)))
        weights = [weight for weight, _ in makers]
        return rng.choices(makers, weights)[0][1]()

    def _named(
        self, rng: random.Random, patterns: Patterns, reply: Callable[[Fact], str], fact: Fact, held_out: bool
    ) -> Turn:
        return ask(rng, patterns, held_out=held_out, x=_mention(rng, fact)), reply(fact)

    def _next(self, rng: random.Random, fact: Fact, held_out: bool) -> Turn:
        ways: list[tuple[Patterns, str]] = []
        if fact.arguments is not None:
            ways.append((ARGUMENTS_NEXT, arguments(fact)))
        if fact.returns:
            ways += [(RETURNS_NEXT, returns(fact))] * 2
        if fact.example:
            ways += [(EXAMPLE_NEXT, example(fact))] * 2
        if fact.kind not in ("module", "method"):
            ways.append((WHERE_NEXT, where([fact])))
        if not ways:
            other = self._neighbour(rng, fact)
            return ask(rng, WHAT_NEXT, held_out=held_out, x=_mention(rng, other)), what(other)
        patterns, reply = rng.choice(ways)
        return ask(rng, patterns, held_out=held_out), reply

    def _neighbour(self, rng: random.Random, fact: Fact) -> Fact:
        """Another name of the same module or class, else any."""
        home = self._facts.get(fact.owner or fact.module)
        for _ in range(4):
            if home and home.members:
                found = self._facts.get(f"{home.name}.{rng.choice(home.members)}")
                if found and found.summary and found is not fact and not _is_held_out(found):
                    return found
        while not (other := self.pick(rng)).summary:
            pass
        return other

    def _where(self, rng: random.Random, fact: Fact, held_out: bool) -> Turn:
        short = fact.name.rpartition(".")[2]
        homes = [each for each in self._homes[short] if each.kind not in ("module", "method")]
        return ask(rng, WHERE, held_out=held_out, s=mention(rng, short, callable_=fact.kind == "function")), where(
            homes
        )

    def _find(self, rng: random.Random, fact: Fact, held_out: bool) -> Turn:
        told = it_does(fact.summary) if fact.summary else ""
        names = sorted(self._meanings[fact.summary])
        if not told.startswith("It ") or len(names) > 3:
            return self._kind(rng, fact, held_out)
        wanted = to_do(fact.summary)
        if wanted and rng.random() < 0.5:
            question = ask(rng, HOW, held_out=held_out, kind=fact.kind, do=wanted)
            return question, f"Use {listing(ticked(names), 'or')}."
        question = ask(rng, FIND, held_out=held_out, kind=fact.kind, does=told[3:].rstrip("."))
        return question, f"That is {listing(ticked(names), 'or')}."

    def _kind(self, rng: random.Random, fact: Fact, held_out: bool) -> Turn:
        return ask(rng, KIND, held_out=held_out, x=mention(rng, fact.name, callable_=False)), kind(fact)

    def _has(self, rng: random.Random, fact: Fact, held_out: bool) -> Turn:
        other = self.pick(rng).name.rpartition(".")[2]
        member = rng.choice(fact.members) if rng.random() < 0.5 else other
        there = member in fact.members
        reply = f"Yes, `{fact.name}` has `{member}`." if there else f"No, `{fact.name}` has no `{member}`."
        return ask(rng, HAS, held_out=held_out, x=mention(rng, fact.name, callable_=False), m=member), reply

    def unknown(self, rng: random.Random, held_out: bool) -> Turn:
        """A name that looks real and is not."""
        while True:
            home, other = self.pick(rng), self.pick(rng)
            words = other.name.rpartition(".")[2].split("_")
            words = words if rng.random() < 0.5 else [rng.choice(SYLLABLES) + rng.choice(SYLLABLES), *words[:1]]
            rng.shuffle(words)
            short = "_".join(words)
            prefix = home.name if home.kind == "module" or home.members else home.owner or home.module
            name = short if prefix == "builtins" else f"{prefix}.{short}"
            if name not in self._facts and short not in self._facts.get(prefix, home).members:
                break
        return ask(rng, UNKNOWN, held_out=held_out, x=mention(rng, name, callable_=True)), no_such(name)


SYLLABLES = words("""
bar blo cro dra fla fro gri hap jun kel lom mip nor pla quo rin snu tor vex wig zan mor tel pex dro lin
""")


def what(fact: Fact) -> str:
    if not fact.summary:
        return kind(fact)
    if fact.kind in ("function", "method"):
        return does(fact.name, fact.summary)
    return f"`{fact.name}` is {with_article(fact.kind)}: {fact.summary}"


def arguments(fact: Fact) -> str:
    assert fact.arguments is not None
    if not fact.arguments:
        return f"`{fact.name}()` takes no arguments."
    names = [argument.partition("=")[0] for argument in fact.arguments if argument not in ("*", "/", "...")]
    return f"`{fact.name}({', '.join(fact.arguments)})` takes {listing(ticked(names))}."


def returns(fact: Fact) -> str:
    return fact.returns if fact.returns.startswith(("It ", "The ", "This ")) else it_does(fact.returns)


def example(fact: Fact) -> str:
    assert fact.example is not None
    code, result = fact.example
    return f"`{code}` gives `{result}`."


def where(homes: Sequence[Fact]) -> str:
    short = homes[0].name.rpartition(".")[2]
    modules = [fact.module for fact in homes][:4]
    if "builtins" in modules:
        return f"`{short}` is built in: nothing has to be imported."
    if len(modules) > 1:
        return f"There is a `{short}` in {listing(ticked(modules))}."
    return f"`{short}` is in `{modules[0]}`: `from {modules[0]} import {short}`."


def members(fact: Fact) -> str:
    shown = ticked(fact.members[:MAX_LISTED])
    rest = len(fact.members) - len(shown)
    what_ = "methods" if fact.kind == "class" else "names"
    text = listing(shown) if not rest else f"{', '.join(shown)} and {rest} more"
    return f"`{fact.name}` has {len(fact.members)} {what_}: {text}."


def kind(fact: Fact) -> str:
    place = f" of `{fact.owner}`" if fact.owner else ""
    if not place and fact.module not in ("builtins", fact.name):
        place = f" of the module `{fact.module}`"
    return f"`{fact.name}` is {with_article(fact.kind)}{place}."


def as_json(fact: Fact) -> str:
    entry: dict[str, object] = {"name": fact.name, "kind": fact.kind, "module": fact.module}
    if fact.arguments is not None:
        entry["arguments"] = list(fact.arguments)
    return json.dumps(entry)


def no_such(name: str) -> str:
    return f"I do not know anything named `{name}`."


def _mention(rng: random.Random, fact: Fact) -> str:
    text = mention(rng, fact.name, callable_=fact.kind in ("function", "method"))
    short = fact.name.rpartition(".")[2]
    style = rng.random()
    if fact.kind == "module":
        return rng.choice((text, text, f"the {fact.name} module", f"the module {fact.name}"))
    if style < 0.1 and fact.owner:
        return f"the {short} method of {fact.owner}"
    if style < 0.18 and fact.kind == "function" and fact.module != "builtins":
        return rng.choice((f"{short} of {fact.module}", f"{short} in {fact.module}", f"the function {fact.name}"))
    if style < 0.22 and fact.kind != "method":
        return f"the {fact.kind} {fact.name}"
    return text


def _is_held_out(fact: Fact) -> bool:
    return zlib.crc32(fact.name.encode()) % HELD_OUT_IN == 0 and not fact.members and fact.example is None


def _weight(fact: Fact) -> float:
    """How often a name comes up: well-known ones more."""
    weight = 1.0 if fact.common else 0.3
    if fact.kind in ("function", "module") or fact.module == "builtins":
        weight *= 2
    if fact.example:
        weight *= 2.5
    if not fact.summary:
        weight *= 0.2
    return weight
