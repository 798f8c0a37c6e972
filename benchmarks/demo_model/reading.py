"""Dialogues over a text: what it says, what it says about something, which of its sentences comes first.

Answers are sentences of the text, so that a small model can find them there.
"""

import random
import re
from collections.abc import Sequence

from benchmarks.demo_model.language import Patterns, say
from benchmarks.demo_model.tasks import Turn

MAX_TEXT = 4000
GIST: Patterns = (
    "In your own words, what does the text above say? Begin with the most important point.",
    "What does the text above say?",
    "[Summarize|Sum up] the text[| above].",
    "What is the [text|passage] above about?",
    "What is the main point[| of the text]?",
    "[Give|Tell] me the gist of [it|the text].",
    "What is [said here|this about]?",
    "Say in one sentence what the text says.",
    "Shorten the text to a sentence.",
    "What do we learn from the text?",
)
FIRST: Patterns = (
    "What is the first sentence[| of the text]?",
    "How does the text begin?",
    "[Quote|Repeat] the first sentence.",
    "Which sentence comes first?",
    "With which sentence does it begin?",
    "Give me the opening sentence.",
)
LAST: Patterns = (
    "What is the last sentence[| of the text]?",
    "How does the text end?",
    "[Quote|Repeat] the last sentence.",
    "Which sentence comes last?",
    "With which sentence does it end?",
    "Give me the closing sentence.",
)
ABOUT: Patterns = (
    "What does the text say about {w}?",
    "What is said about {w}?",
    "[Find|Quote] the sentence about {w}.",
    "In the text above, what about {w}?",
    "And {w}?",
    "What do we read about {w}?",
    "Which sentence speaks of {w}?",
)


def sentences(text: str) -> list[str]:
    flat = " ".join(text.split())
    return [each for each in re.split(r"(?<=[a-z)`'\"][.!?]) (?=[A-Z`'\"])", flat) if len(each) > 15]


def reading(
    rng: random.Random, texts: Sequence[str], own: str, gist: Sequence[str], *, held_out: bool = False
) -> list[Turn]:
    """Questions about one of `texts`, or about `own`, whose `gist` was written by hand."""
    is_own = rng.random() < 0.12
    text = own if is_own else rng.choice(texts)
    parts = sentences(text)
    if is_own and rng.random() < 0.6:
        return [(f"{text}\n\n{say(rng, GIST, held_out=held_out)}", " ".join(gist))]
    turns: list[Turn] = []
    for _ in range(rng.randint(1, 3)):
        question, reply = _turn(rng, parts, held_out, gist=None if is_own else parts[0])
        turns.append((question if turns else f"{text}\n\n{question}", reply))
    return turns


def _turn(rng: random.Random, parts: Sequence[str], held_out: bool, gist: str | None) -> Turn:
    kind = rng.random()
    if kind < 0.3 and gist:
        return say(rng, GIST, held_out=held_out), gist
    if kind < 0.4:
        return say(rng, FIRST, held_out=held_out), parts[0]
    if kind < 0.5:
        return say(rng, LAST, held_out=held_out), parts[-1]
    sentence = rng.choice(parts)
    words = [word for word in re.findall(r"[A-Za-z_]{5,}", sentence) if sum(word in each for each in parts) == 1]
    if not words:
        return say(rng, FIRST, held_out=held_out), parts[0]
    return say(rng, ABOUT, held_out=held_out, w=rng.choice(words)), sentence
