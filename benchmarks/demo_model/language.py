"""Varied wording: patterns with choices, careless spelling of questions, and sentences about names."""

import random
import re
from collections.abc import Sequence

# A pattern is text with choices, "[a|b|]", and fields, "{name}". A list of patterns is one way of saying something
# each; the last of a list are kept for the held-out set.
Patterns = Sequence[str]
NUM_HELD_OUT = 2


def words(text: str) -> list[str]:
    return text.split()


_CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")
_VERBS = words("""
accept acquire add adjust allocate allow analyze append apply arrange assemble assert assign attach attempt bind block
break build bypass calculate call cancel change check choose clean clear clone close collect combine compare compile
complete compress compute concatenate configure connect construct convert copy count create cut decode decompress
decorate decrement decrypt define delete deliver deregister describe destroy detach detect determine disable discard
disconnect display divide do draw dump empty enable encode encrypt end ensure enter establish evaluate examine exchange
execute exit expand export extend extract feed fetch fill filter find finish flush fold force fork format forward
generate get give go grab group guess handle ignore implement import increment indicate initialize insert inspect
install interpret intern invert invoke issue iterate join jump keep kill launch leave list listen load lock log look
lookup make mangle map mark match measure merge modify move multiply negate normalize notify obtain open output pack
parse pause perform permit pick place plot pop prepare prepend present print process produce provide pull push put
query quit quote raise randomize read rebuild receive record redirect reduce refresh register release reload remove
rename render repeat replace report represent request reserve reset resize resolve restore resume retrieve return
reverse rewind rotate round run sample save scan schedule search seek select send separate serialize serve set shift
show shuffle shut signal simplify skip sleep sort specify split start stop store strip subtract support suspend swap
switch take tell terminate test toggle trace translate transform traverse truncate try turn undo unlink unlock unpack
unregister unset update use validate verify visit wait walk wrap write yield
""")
_THIRD_PERSON = {"do": "does", "go": "goes"} | {
    verb: verb[:-1] + "ies"
    if re.search(r"[^aeiou]y$", verb)
    else verb + ("es" if re.search(r"(s|sh|ch|x|z)$", verb) else "s")
    for verb in _VERBS
    if verb not in ("do", "go")
}


def say(rng: random.Random, patterns: Patterns, *, held_out: bool = False, **fields: object) -> str:
    """One of the patterns, its choices made and its fields filled in."""
    usable = patterns[-NUM_HELD_OUT:] if held_out else patterns[: len(patterns) - NUM_HELD_OUT]
    return _fill(rng, rng.choice(usable), fields)


def answer(rng: random.Random, pattern: str, **fields: object) -> str:
    return _fill(rng, pattern, fields)


def ask(rng: random.Random, patterns: Patterns, *, held_out: bool = False, **fields: object) -> str:
    """The same as `say`, as people type: with a greeting, no capitals, no question mark now and then."""
    text = say(rng, patterns, held_out=held_out, **fields)
    style = rng.random()
    if style < 0.12 and text[:1].isupper() and not text[:2].isupper():
        text = text[0].lower() + text[1:]
    if style < 0.2 and text.endswith(("?", ".")):
        text = text[:-1]
    if style > 0.97:
        text = rng.choice(("Please tell me: ", "Hi! ", "Hello, ", "Quick question: ", "OK, ", "Thanks. ")) + text
    elif style > 0.94 and text.endswith("?"):
        text = text[:-1] + rng.choice((", please?", " please?", " in Python?", ", thanks."))
    return text


def mention(rng: random.Random, name: str, *, callable_: bool) -> str:
    """A name as people write it."""
    forms = [name, name, name, f"`{name}`"]
    if callable_:
        forms += [f"{name}()", f"`{name}()`"]
    return rng.choice(forms)


def does(name: str, sentence: str) -> str:
    """ "Join two paths." -> "`os.path.join` joins two paths."; other sentences follow a colon."""
    first, _, rest = sentence.partition(" ")
    verb = first.lower()
    if verb in _THIRD_PERSON and rest:
        return f"`{name}` {_THIRD_PERSON[verb]} {rest}"
    if verb in _THIRD_PERSON.values() and rest:
        return f"`{name}` {verb} {rest}"
    return f"`{name}`: {sentence}"


def it_does(sentence: str) -> str:
    """The same about a name that was mentioned: "It joins two paths."."""
    text = does("it", sentence)
    return sentence if text.startswith("`it`:") else "It" + text[4:]


def to_do(sentence: str) -> str | None:
    """What one wants who needs it: "Join two paths." -> "join two paths", "Return the size." -> "get the size"."""
    first, _, rest = sentence.rstrip(".").partition(" ")
    verb = {"return": "get", "returns": "get"}.get(first.lower(), first.lower())
    return f"{verb} {rest}" if rest and verb in _THIRD_PERSON else None


def listing(words: Sequence[str], last: str = "and") -> str:
    """a, b and c"""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def ticked(words: Sequence[str]) -> list[str]:
    return [f"`{word}`" for word in words]


def with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _fill(rng: random.Random, pattern: str, fields: dict[str, object]) -> str:
    text = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), pattern)
    for name, value in fields.items():
        text = text.replace("{" + name + "}", str(value))
    return text
