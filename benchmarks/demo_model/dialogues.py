"""The mixture of dialogues: which kinds there are, how often, and system messages, some of them to be obeyed."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.demo_model import facts
from benchmarks.demo_model.howto import how_to
from benchmarks.demo_model.json_tasks import json_task
from benchmarks.demo_model.language import Patterns, say
from benchmarks.demo_model.library import Library
from benchmarks.demo_model.reading import reading
from benchmarks.demo_model.talk import small_talk
from benchmarks.demo_model.tasks import NAMES, WORDS, Turn, task
from benchmarks.demo_model.tools import tool_dialogue


@dataclass(frozen=True, slots=True)
class Dialogue:
    kind: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


PLAIN_SYSTEM: Patterns = (
    "You are a helpful assistant.",
    "You are [Baton's demo model|a demo model|a small model].",
    "You know Python's standard library.",
    "Be helpful.",
    "You are a [programming|Python|coding] assistant.",
    "Answer the user's questions.",
    "You are a helpful, honest assistant.[ Be brief.|]",
    "You help people [with Python|to program].",
    "Help the user with [code|Python].",
)


@dataclass(frozen=True, slots=True)
class Style:
    """A system message and what it does to an answer. Fields: {w} and {n}, drawn for each dialogue."""

    patterns: Patterns
    change: Callable[[str, str, str], str]  # answer, word, name


STYLES: Sequence[Style] = (
    Style(
        (
            "Answer in JSON.",
            "[Always answer|Reply] in JSON [with the key|under the key] answer.",
            'Answer with a JSON object like {"answer": "..."}.',
            "Your answers are JSON objects with one key, answer.",
            "Reply in JSON only.",
            "Put every answer in a JSON object.",
        ),
        lambda text, *_: text if text[0] in "{[" else json.dumps({"answer": text}),
    ),
    Style(
        (
            "Answer in capitals.",
            "[Write|Reply|Answer] in upper case[.| only.]",
            "Use capital letters only.",
            "SHOUT.",
            "All answers in capital letters, please.",
            "Everything you write is in capitals.",
        ),
        lambda text, *_: text.upper(),
    ),
    Style(
        (
            "End every answer with {w}.",
            "[Finish|Close] each answer with the word {w}.",
            "The last word of every answer is {w}.",
            "Always add {w} at the end.",
            "Put the word {w} after each answer.",
            "Say {w} when you are done with an answer.",
        ),
        lambda text, word, _: f"{text} {word}",
    ),
    Style(
        (
            "Begin every answer with {w}:",
            "Start each answer with the word {w} and a colon.",
            "The first word of your answers is {w}, followed by a colon.",
            "Always begin with {w}:",
            "Put {w}: before each answer.",
            "Every reply starts with {w}:",
        ),
        lambda text, word, _: f"{word}: {text}",
    ),
    Style(
        (
            "The user is called {n}. Use the name.",
            "[Call|Address] the user {n}.",
            "You talk to {n}; say the name in each answer.",
            "Address the user as {n} in every answer.",
            "Begin every answer with the user's name, {n}.",
            "The user's name is {n}; begin with it.",
        ),
        lambda text, _, name: f"{name}, {text}",
    ),
    Style(
        (
            "Answer [briefly|shortly].",
            "Be [brief|terse|short].",
            "[Short|Brief] answers[.|, please.]",
            "Say as little as you can.",
            "Use few words.",
            "Keep it short.",
        ),
        lambda text, *_: short(text),
    ),
)
STYLED = ("library", "howto", "task", "talk")
KINDS = {"library": 50.0, "howto": 7.0, "task": 16.0, "json": 10.0, "talk": 6.0, "tool": 6.0, "reading": 6.0}


class Dialogues:
    def __init__(self, content: dict[str, Any]) -> None:
        self.library = Library([facts.from_json(entry) for entry in content["facts"]])
        self._texts: list[str] = content["texts"]
        self._glossary: dict[str, str] = content["glossary"]
        self._own_text: str = content["own_text"]
        self._gist: list[str] = content["gist"]

    def make(self, rng: random.Random, kind: str | None = None, *, held_out: bool = False) -> Dialogue:
        """A dialogue of a kind, by default of any. `held_out` uses only wordings that are never trained."""
        kind = kind or rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "tool":
            messages, tools = tool_dialogue(rng, held_out=held_out)
            if rng.random() < 0.3:
                messages = [_system(say(rng, PLAIN_SYSTEM, held_out=held_out)), *messages]
            return Dialogue(kind, messages, tools)
        turns = self._turns(rng, kind, held_out)
        if kind in ("library", "howto", "task") and rng.random() < 0.08:  # a change of subject, or a word of thanks
            turns += self._turns(rng, rng.choice(STYLED), held_out)
        return Dialogue(kind, _messages(rng, turns, held_out, styled=kind in STYLED))

    def _turns(self, rng: random.Random, kind: str, held_out: bool) -> list[Turn]:
        match kind:
            case "library":
                return self.library.dialogue(rng, held_out=held_out)
            case "task":
                return task(rng, held_out=held_out)
            case "howto":
                return how_to(rng, held_out=held_out)
            case "json":
                return json_task(rng, held_out=held_out)
            case "talk":
                return small_talk(rng, self._glossary, held_out=held_out)
            case _:
                return reading(rng, self._texts, self._own_text, self._gist, held_out=held_out)


def short(text: str) -> str:
    """An answer without what the question said already."""
    if text.startswith("`") and " is a" in text and ": " in text:
        return text.partition(": ")[2]
    for mark in (" gives ", " = "):
        if mark in text and "\n" not in text:
            return text.rpartition(mark)[2].rstrip(".") if ", so" not in text else text
    return text


def _messages(rng: random.Random, turns: Sequence[Turn], held_out: bool, *, styled: bool) -> list[dict[str, Any]]:
    chance = rng.random()
    opening = []
    if styled and chance < 0.14:
        style, word, name = rng.choice(STYLES), rng.choice(WORDS), rng.choice(NAMES)
        opening = [_system(say(rng, style.patterns, held_out=held_out, w=word, n=name))]
        turns = [(question, style.change(reply, word, name)) for question, reply in turns]
    elif chance < 0.4:
        opening = [_system(say(rng, PLAIN_SYSTEM, held_out=held_out))]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return opening + messages


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}
