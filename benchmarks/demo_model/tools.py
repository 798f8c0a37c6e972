"""Dialogues with tools: a list of functions, a call of one of them, its result, and an answer that uses it."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.demo_model.json_tasks import CITIES, COLOURS, PRODUCTS
from benchmarks.demo_model.language import Patterns, ask
from benchmarks.demo_model.tasks import NAMES, WORDS

Message = dict[str, Any]
Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    names: tuple[str, ...]
    description: str
    parameters: dict[str, str]  # name -> JSON type
    questions: Patterns  # fields: the parameters
    values: Callable[[random.Random], Values]
    result: Callable[[random.Random, Values], Values]
    reply: str  # fields: parameters and result


def _nothing(_rng: random.Random) -> Values:
    return {}


TOOLS: Sequence[Tool] = (
    Tool(
        ("get_weather", "weather", "current_weather"),
        "The weather of a city.",
        {"city": "string"},
        (
            "What is the weather in {city}?",
            "How is the weather in {city}[| today]?",
            "Is it [warm|cold] in {city}?",
            "Weather in {city}?",
            "[Tell|Give] me the weather of {city}.",
            "How warm is it in {city}?",
            "Do I need a coat in {city}?",
        ),
        lambda r: {"city": r.choice(CITIES)},
        lambda r, _: {"temperature": r.randint(-5, 35), "sky": r.choice(("clear", "cloudy", "rainy", "sunny"))},
        "It is {sky} in {city}, with {temperature} degrees.",
    ),
    Tool(
        ("add", "add_numbers", "sum"),
        "Add two numbers.",
        {"a": "integer", "b": "integer"},
        (
            "What is {a} + {b}?",
            "Add {a} and {b}.",
            "How much is {a} plus {b}?",
            "{a} + {b} = ?",
            "Sum of {a} and {b}?",
            "Put {a} and {b} together.",
        ),
        lambda r: {"a": r.randint(0, 99999), "b": r.randint(0, 99999)},
        lambda _, v: {"result": v["a"] + v["b"]},
        "{a} + {b} = {result}",
    ),
    Tool(
        ("multiply", "multiply_numbers", "times"),
        "Multiply two numbers.",
        {"a": "integer", "b": "integer"},
        (
            "What is {a} * {b}?",
            "Multiply {a} by {b}.",
            "How much is {a} times {b}?",
            "{a} * {b} = ?",
            "Product of {a} and {b}?",
            "What do {a} times {b} make?",
        ),
        lambda r: {"a": r.randint(0, 9999), "b": r.randint(0, 9999)},
        lambda _, v: {"result": v["a"] * v["b"]},
        "{a} * {b} = {result}",
    ),
    Tool(
        ("get_time", "current_time", "clock"),
        "The time in a city.",
        {"city": "string"},
        (
            "What time is it in {city}?",
            "[Tell|Give] me the time in {city}.",
            "Time in {city}?",
            "How late is it in {city}?",
            "What is the local time of {city}?",
            "Is it late in {city}?",
        ),
        lambda r: {"city": r.choice(CITIES)},
        lambda r, _: {"time": f"{r.randint(0, 23):02}:{r.randint(0, 59):02}"},
        "It is {time} in {city}.",
    ),
    Tool(
        ("read_file", "open_file", "cat"),
        "Read a text file.",
        {"path": "string"},
        (
            "What is in {path}?",
            "Read {path}.",
            "Show me the file {path}.",
            "[Open|Print] {path}[.|, please.]",
            "What does {path} contain?",
            "Tell me the text of {path}.",
        ),
        lambda r: {"path": f"{r.choice(WORDS)}.{r.choice(('txt', 'md', 'log'))}"},
        lambda r, _: {"text": " ".join(r.sample(WORDS, 3))},
        "The file {path} says: {text}",
    ),
    Tool(
        ("search", "search_docs", "find_documents"),
        "Search the documentation.",
        {"query": "string"},
        (
            "Search [the docs |]for {query}.",
            "Find something about {query}.",
            "Look up {query}.",
            "[Is there|What is there] in the docs about {query}?",
            "Which page explains {query}?",
            "Documents on {query}?",
        ),
        lambda r: {"query": " ".join(r.sample(WORDS, r.randint(1, 2)))},
        lambda r, _: {"page": f"{r.choice(WORDS)}.html", "hits": r.randint(1, 9)},
        "I found {hits} hits; the best is {page}.",
    ),
    Tool(
        ("get_price", "price_of", "lookup_price"),
        "The price of a product.",
        {"product": "string"},
        (
            "[What does|How much does] the {product} cost?",
            "What is the price of the {product}?",
            "Price of the {product}?",
            "How expensive is the {product}?",
            "Tell me what a {product} costs.",
            "Is the {product} cheap?",
        ),
        lambda r: {"product": r.choice(PRODUCTS)},
        lambda r, _: {"price": r.randint(1, 999), "currency": r.choice(("EUR", "USD", "CHF"))},
        "The {product} costs {price} {currency}.",
    ),
    Tool(
        ("send_message", "send_mail", "notify"),
        "Send a message to somebody.",
        {"to": "string", "text": "string"},
        (
            "Send {to} the message '{text}'.",
            "Tell {to}: '{text}'",
            "Write '{text}' to {to}.",
            "Message to {to}: '{text}'",
            "Let {to} know: '{text}'",
            "Please send '{text}' to {to}.",
        ),
        lambda r: {"to": r.choice(NAMES), "text": " ".join(r.sample(WORDS, 3))},
        lambda *_: {"sent": True},
        "The message to {to} is sent.",
    ),
    Tool(
        ("set_light", "lamp", "switch_light"),
        "Set the colour of a light.",
        {"room": "string", "colour": "string"},
        (
            "Make the light in the {room} {colour}.",
            "Set the {room} light to {colour}.",
            "{colour} light in the {room}!",
            "I want {colour} light in the {room}.",
            "Turn the {room} lamp {colour}.",
            "Change the {room} light to {colour}.",
        ),
        lambda r: {"room": r.choice(("kitchen", "bath", "hall", "garden", "office")), "colour": r.choice(COLOURS)},
        lambda *_: {"ok": True},
        "The light in the {room} is {colour} now.",
    ),
    Tool(
        ("random_number", "roll_dice", "dice"),
        "A random number.",
        {},
        (
            "[Roll|Throw] the dice.",
            "Give me a random number.",
            "A random number, please.",
            "Pick a number by chance.",
            "Draw a random number.",
            "What do the dice say?",
        ),
        _nothing,
        lambda r, _: {"number": r.randint(1, 6)},
        "The number is {number}.",
    ),
)
NO_TOOL: Sequence[tuple[Patterns, str]] = (
    (
        ("Hello[!|]", "Hi[!|]", "Good morning.", "Hey there", "Greetings!", "Good day."),
        "Hello! Ask me about Python's standard library.",
    ),
    (
        ("Thank you.", "Thanks[!|]", "Great, thanks!", "Thank you very much.", "Many thanks!", "I thank you."),
        "You are welcome.",
    ),
)
WHICH: Patterns = (
    "[Which|What] tools do you have?",
    "What tools can you [use|call]?",
    "List your tools.",
    "Name the tools.",
    "Which functions can you call?",
    "What tools are there?",
)


def tool_dialogue(rng: random.Random, *, held_out: bool = False) -> tuple[list[Message], list[Any]]:
    """Messages and the tools they were sent with."""
    chosen = rng.sample(TOOLS, rng.randint(1, 3))
    names = [_name(rng, tool) for tool in chosen]
    listed = [_declared(tool, name) for tool, name in zip(chosen, names, strict=True)]
    messages: list[Message] = []
    kind = rng.random()
    if kind < 0.1:
        patterns, reply = rng.choice(NO_TOOL)
        messages = _plain(ask(rng, patterns, held_out=held_out), reply)
    elif kind < 0.18:
        text = ", ".join(f"`{name}`" for name in names)
        messages = _plain(ask(rng, WHICH, held_out=held_out), f"I can call {text}.")
    else:
        for _ in range(1 if rng.random() < 0.7 else 2):
            place = rng.randrange(len(chosen))
            messages += _called(rng, chosen[place], names[place], held_out)
    return messages, listed


def _name(rng: random.Random, tool: Tool) -> str:
    return rng.choice(tool.names) if rng.random() < 0.8 else f"{rng.choice(tool.names)}_{rng.choice(WORDS)}"


def _declared(tool: Tool, name: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in tool.parameters.items()},
        "required": list(tool.parameters),
    }
    function = {"name": name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _plain(question: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def _called(rng: random.Random, tool: Tool, name: str, held_out: bool) -> list[Message]:
    values = tool.values(rng)
    result = tool.result(rng, values)
    reply = tool.reply
    for key, value in {**values, **result}.items():
        reply = reply.replace("{" + key + "}", str(value))
    call = {"type": "function", "function": {"name": name, "arguments": values}}
    return [
        {"role": "user", "content": ask(rng, tool.questions, held_out=held_out, **values)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(result)},
        {"role": "assistant", "content": reply},
    ]
