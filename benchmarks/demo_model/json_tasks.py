"""JSON tasks: write an object of given keys and types, extract one from a sentence, read and change one."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.demo_model.language import Patterns, ask, listing, say, words
from benchmarks.demo_model.tasks import NAMES, WORDS, Turn

CITIES = words("""
Rome Paris London Berlin Madrid Vienna Prague Oslo Dublin Lisbon Athens Warsaw Tokyo Cairo Delhi Boston Chicago Toronto
Zurich Geneva Hamburg Munich Milan Naples Seville Krakow Bergen Kyoto Osaka Lima Quito Austin Denver Seattle
""")
COUNTRIES = words("""
Italy France Germany Spain Austria Norway Ireland Portugal Greece Poland Japan Egypt India Canada Peru Chile Kenya
Sweden Finland Denmark Iceland Mexico Brazil Cuba Nepal
""")
JOBS = words("teacher doctor baker painter engineer farmer nurse pilot cook lawyer writer student gardener driver")
COLOURS = words("red blue green yellow black white orange brown pink grey")
PRODUCTS = words("lamp chair table phone laptop bicycle watch camera guitar jacket backpack kettle printer clock")

Maker = Callable[[random.Random], Any]
KEYS: dict[str, tuple[str, Maker]] = {  # key -> JSON type, a value
    "name": ("string", lambda r: r.choice(NAMES)),
    "age": ("integer", lambda r: r.randint(18, 80)),
    "city": ("string", lambda r: r.choice(CITIES)),
    "country": ("string", lambda r: r.choice(COUNTRIES)),
    "job": ("string", lambda r: r.choice(JOBS)),
    "email": ("string", lambda r: f"{r.choice(NAMES).lower()}@example.com"),
    "active": ("boolean", lambda r: r.random() < 0.5),
    "married": ("boolean", lambda r: r.random() < 0.5),
    "in_stock": ("boolean", lambda r: r.random() < 0.5),
    "price": ("number", lambda r: r.randint(1, 99) + r.choice((0.5, 0.25, 0.99, 0.0))),
    "quantity": ("integer", lambda r: r.randint(1, 50)),
    "count": ("integer", lambda r: r.randint(0, 100)),
    "id": ("integer", lambda r: r.randint(1, 999)),
    "score": ("number", lambda r: r.randint(0, 9) + r.choice((0.5, 0.1, 0.8))),
    "product": ("string", lambda r: r.choice(PRODUCTS)),
    "colour": ("string", lambda r: r.choice(COLOURS)),
    "color": ("string", lambda r: r.choice(COLOURS)),
    "title": ("string", lambda r: f"The {r.choice(WORDS)} and the {r.choice(WORDS)}"),
    "year": ("integer", lambda r: r.randint(1950, 2025)),
    "date": ("string", lambda r: f"20{r.randint(10, 25)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"),
    "tags": ("array", lambda r: r.sample(WORDS, 2)),
    "scores": ("array", lambda r: [r.randint(0, 10) for _ in range(3)]),
    "word": ("string", lambda r: r.choice(WORDS)),
    "temperature": ("integer", lambda r: r.randint(-5, 35)),
}
WRITE: Patterns = (
    "Write [JSON|a JSON object] with the keys {k}.",
    "[Give|Show] me [JSON|a JSON object] with {k}.",
    "[Make|Create|Generate] a JSON object [with|that has] {k}.",
    "JSON object with the keys {k}[.|, please.]",
    "I need [JSON|an object in JSON] with the keys {k}.",
    "Answer with a JSON object that has {k}.",
    "Return JSON with the fields {k}.",
    "Write an example [JSON record|JSON object] with the fields {k}.",
    "Produce a JSON document whose keys are {k}.",
    "Please output an object in JSON form with {k}.",
)
WRITE_ABOUT: Patterns = (
    "Write [JSON|a JSON object] for {about} with the keys {k}.",
    "Describe {about} as JSON with {k}.",
    "[Give|Show] me a JSON object for {about}: {k}.",
    "JSON for {about} with {k}[.|, please.]",
    "[Make|Create] a JSON record of {about} with the fields {k}.",
    "Invent {about} and write JSON with {k}.",
    "Put {about} in JSON, keys {k}.",
)
WRITE_SOME: Patterns = (
    "Write a JSON array of {n} objects with the keys {k}.",
    "[Give|Show] me a JSON list of {n} objects with {k}.",
    "{n} JSON objects in a list, each with {k}.",
    "Make a list of {n} records in JSON with {k}.",
    "I need {n} objects with the keys {k} in a JSON array.",
    "Return an array of {n} JSON objects that have {k}.",
)
FOLLOW: Patterns = (
    "Write a JSON object that follows this schema: {s}",
    "Follow this JSON schema: {s}",
    "[Give|Show] me JSON that matches the schema {s}",
    "Schema: {s} Write an object.",
    "Answer in JSON with this schema: {s}",
    "Make an object that is valid for {s}",
)
EXTRACT: Patterns = (
    "Extract {k} as JSON: {t}",
    "[Read|Take] {k} from this [text|sentence] and answer in JSON: {t}",
    "{t} [Write|Give me] {k} as JSON.",
    "[Convert|Turn] this into JSON with the keys {k}: {t}",
    "{t} Extract {k} in JSON.",
    "Text: {t} JSON with {k}:",
    "Find {k} in the text and return JSON. {t}",
    "Which {k} are given here? Answer as a JSON object. {t}",
)
CONVERT: Patterns = (
    "[Convert|Turn] {p} [to|into] JSON.",
    "Write {p} as JSON.",
    "{p} as JSON[.|, please.]",
    "As a JSON object: {p}",
    "Make JSON [from|out of] {p}.",
    "Express {p} in JSON.",
)
VALUE: Patterns = (
    "What is the [value of|value for] {k} in {j}?",
    "{j} What is {k}?",
    "In {j}, what is {k}?",
    "Get {k} from {j}",
    "Which value has {k} in {j}?",
    "Read {k} out of {j}",
)
ADD: Patterns = (
    "Add the key {k} with the value {v} to {j}",
    "Add {k}: {v} to {j}",
    "{j} Add {k} with {v}.",
    "Set {k} to {v} in {j}",
    "Put {k} with the value {v} into {j}",
    "Extend {j} by {k} = {v}",
)
KEYS_OF: Patterns = (
    "[Which|What] keys does {j} have?",
    "[List|Name] the keys of {j}",
    "What are the keys of {j}?",
    "Keys in {j}?",
    "Which keys are there in {j}?",
    "Enumerate the keys of {j}",
)
PEOPLE: Patterns = (
    "{name} is {age} years old and lives in {city}.",
    "{name}, {age}, lives in {city}.",
    "{name} lives in {city} and is {age}.",
    "In {city} lives {name}, who is {age} years old.",
    "My name is {name}, I am {age} and I live in {city}.",
    "{name} ({age}) is from {city}.",
    "At the age of {age}, {name} moved to {city}.",
)
WORK: Patterns = (
    "{name} works as a {job} in {city}.",
    "{name} is a {job} from {city}.",
    "The {job} {name} lives in {city}.",
    "In {city}, {name} works as a {job}.",
    "{name} has been a {job} in {city} for years.",
    "You find the {job} {name} in {city}.",
)
SALES: Patterns = (
    "The {product} costs {price} and there are {quantity} of them.",
    "We have {quantity} of the {product} at {price}.",
    "{quantity} pieces of {product} for {price} each.",
    "A {product} is {price}; {quantity} are left.",
    "For {price} you get a {product}, and {quantity} are in stock.",
    "There are {quantity} of the {product}, {price} each.",
)
TEXTS: Sequence[tuple[tuple[str, ...], Patterns]] = (
    (("name", "age", "city"), PEOPLE),
    (("name", "job", "city"), WORK),
    (("product", "price", "quantity"), SALES),
)
ABOUT: dict[str, tuple[str, ...]] = {
    "a person": ("name", "age", "city", "job", "email", "country"),
    "a user": ("id", "name", "email", "active"),
    "a product": ("product", "price", "quantity", "in_stock", "colour"),
    "a book": ("title", "year", "price", "id"),
    "a city": ("city", "country", "temperature"),
    "a student": ("name", "age", "scores", "active"),
}


Field = tuple[str, str, Maker]  # key, JSON type, value
OF_TYPE: dict[str, Maker] = {
    "string": lambda r: r.choice(WORDS),
    "integer": lambda r: r.randint(0, 100),
    "number": lambda r: r.randint(0, 20) + r.choice((0.5, 0.25, 0.75)),
    "boolean": lambda r: r.random() < 0.5,
    "array": lambda r: r.sample(WORDS, 2),
}


def record(rng: random.Random, keys: Sequence[str]) -> dict[str, Any]:
    return {key: KEYS[key][1](rng) for key in keys}


def _fields(rng: random.Random, keys: Sequence[str], most: int, *, typed: bool) -> list[Field]:
    """Known keys, and where their types are told any word as a key."""
    chosen = rng.sample(keys, rng.randint(1, min(most, len(keys))))
    fields = [(key, *KEYS[key]) for key in chosen]
    if not typed:
        return fields
    made = []
    for field in fields:
        kind = rng.choice(tuple(OF_TYPE))
        word = rng.choice(WORDS) if rng.random() < 0.6 else "_".join(rng.sample(WORDS, 2))
        made.append((word, kind, OF_TYPE[kind]) if rng.random() < 0.3 and word not in KEYS else field)
    return list({key: (key, kind, make) for key, kind, make in made}.values())


def write(rng: random.Random, held_out: bool = False) -> Turn:
    """Write an object, or a list of some, of given keys, with or without their types."""
    about, known = rng.choice(list(ABOUT.items()))
    some, typed = rng.random() < 0.5, rng.random() < 0.5
    fields = _fields(rng, known if some else tuple(KEYS), 4, typed=typed)
    quote = '"' if rng.random() < 0.1 else ""
    named = listing([f"{quote}{key}{quote} ({kind})" if typed else f"{quote}{key}{quote}" for key, kind, _ in fields])
    if rng.random() < 0.12:
        number, word = rng.choice(((2, "two"), (3, "three")))
        question = ask(rng, WRITE_SOME, held_out=held_out, k=named, n=word)
        return question, json.dumps([{key: make(rng) for key, _, make in fields} for _ in range(number)])
    question = ask(rng, WRITE_ABOUT if some else WRITE, held_out=held_out, k=named, about=about)
    return question, json.dumps({key: make(rng) for key, _, make in fields})


def follow(rng: random.Random, held_out: bool = False) -> Turn:
    """Write an object that a schema allows."""
    fields = _fields(rng, tuple(KEYS), 4, typed=True)
    question = ask(rng, FOLLOW, held_out=held_out, s=json.dumps(schema(fields)))
    return question, json.dumps({key: make(rng) for key, _, make in fields})


def schema(fields: Sequence[Field]) -> dict[str, Any]:
    properties: dict[str, Any] = {key: {"type": kind} for key, kind, _ in fields}
    for key, kind, _ in fields:
        if kind == "array":
            properties[key]["items"] = {"type": "integer" if key == "scores" else "string"}
    return {"type": "object", "properties": properties, "required": [key for key, _, _ in fields]}


def extract(rng: random.Random, held_out: bool = False) -> Turn:
    keys, texts = rng.choice(TEXTS)
    values = record(rng, keys)
    asked = rng.sample(keys, rng.randint(2, len(keys)))
    text = say(rng, texts, held_out=held_out, **values)
    question = ask(rng, EXTRACT, held_out=held_out, k=listing(asked), t=text)
    return question, json.dumps({key: values[key] for key in asked})


def convert(rng: random.Random, held_out: bool = False) -> Turn:
    """Pairs, or a dict as Python shows it, to JSON."""
    values = record(rng, rng.sample(tuple(KEYS), rng.randint(1, 4)))
    if rng.random() < 0.5:
        shown = str(values)
    else:
        values = {key: value for key, value in values.items() if not isinstance(value, list | bool)} or {"count": 1}
        shown = rng.choice((", ", "; ", " ")).join(f"{key}={value}" for key, value in values.items())
    return ask(rng, CONVERT, held_out=held_out, p=shown), json.dumps(values)


def read(rng: random.Random, held_out: bool = False) -> Turn:
    """A value, the keys, or one more key of a given object."""
    keys = rng.sample(tuple(KEYS), rng.randint(2, 4))
    values = record(rng, keys)
    shown = json.dumps(values)
    kind = rng.randrange(3)
    key = rng.choice(keys)
    if kind == 0:
        value = values[key]
        told = value if isinstance(value, str) else json.dumps(value)
        return ask(rng, VALUE, held_out=held_out, k=key, j=shown), f"{key} is {told}."
    if kind == 1:
        return ask(rng, KEYS_OF, held_out=held_out, j=shown), f"The keys are {listing(keys)}."
    new = rng.choice([each for each in KEYS if each not in values])
    value = KEYS[new][1](rng)
    question = ask(rng, ADD, held_out=held_out, k=new, v=json.dumps(value), j=shown)
    return question, json.dumps({**values, new: value})


TASKS: Sequence[tuple[float, Callable[[random.Random, bool], Turn]]] = (
    (4, write),
    (2, follow),
    (4, extract),
    (1.5, convert),
    (2, read),
)


def json_task(rng: random.Random, *, held_out: bool = False) -> list[Turn]:
    make = rng.choices([each for _, each in TASKS], [weight for weight, _ in TASKS])[0]
    turns = [make(rng, held_out)]
    if rng.random() < 0.25:
        turns.append(make(rng, held_out))
    return turns
