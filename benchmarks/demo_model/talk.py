"""Small talk: greetings, what the model is, Baton's own words, a little general knowledge, what it cannot do."""

import random
from collections.abc import Mapping

from benchmarks.demo_model.language import Patterns, ask, words
from benchmarks.demo_model.small_talk import CAN, SAID
from benchmarks.demo_model.tasks import NAMES, WORDS, Turn

CAPITALS = dict(
    pair.split(": ")
    for pair in """
France: Paris, Italy: Rome, Germany: Berlin, Spain: Madrid, Austria: Vienna, Norway: Oslo, Ireland: Dublin,
Portugal: Lisbon, Greece: Athens, Poland: Warsaw, Japan: Tokyo, Egypt: Cairo, India: New Delhi, Canada: Ottawa,
Peru: Lima, Chile: Santiago, Kenya: Nairobi, Sweden: Stockholm, Finland: Helsinki, Denmark: Copenhagen,
Iceland: Reykjavik, Mexico: Mexico City, Cuba: Havana, Nepal: Kathmandu, Hungary: Budapest, Belgium: Brussels,
England: London, Russia: Moscow, China: Beijing, Turkey: Ankara, Switzerland: Bern, Netherlands: Amsterdam,
Australia: Canberra, Brazil: Brasilia, Argentina: Buenos Aires, Thailand: Bangkok, Cyprus: Nicosia, Malta: Valletta
""".replace("\n", " ")
    .strip()
    .split(", ")
)
CAPITAL: Patterns = (
    "What is the capital of {c}?",
    "What's the capital of {c}?",
    "[Which|What] city is the capital of {c}?",
    "Name the capital of {c}.",
    "capital of {c}?",
    "Do you know the capital of {c}?",
    "Tell me {c}'s capital.",
    "What is {c}'s capital city?",
)
BEYOND: Patterns = (
    "Who [wrote|painted|invented|discovered] {thing}?",
    "What is the weather in {place}?",
    "[What|How] is the news [today|from {place}]?",
    "[Write|Compose] [a poem|a story|an essay|a letter] about {thing}.",
    "How do I cook {thing}?",
    "Translate {thing} into [French|German|Spanish|Latin].",
    "What do you think about [politics|{thing}|the election|football]?",
    "When was {place} founded?",
    "How many people live in {place}?",
    "[Book|Find] me a [flight|hotel|table] in {place}.",
    "Why is the sky blue?",
    "What is the meaning of life?",
    "Who won the [football match|election|race] [yesterday|last year]?",
    "Is {thing} good for my health?",
    "How far is it to {place}?",
    "What is the price of {thing} [today|in {place}]?",
    "Which film should I watch?",
    "Plan my holidays in {place}.",
    "Who is the president of {place}?",
    "Tell me the history of {thing}.",
)
PLACES = words("Rome Boston Kyoto Lima Oslo Vienna Cairo Chicago Naples Athens Texas Bavaria Mars Europe Africa")
MY_NAME: Patterns = (
    "My name is {n}.",
    "I am {n}.",
    "I'm {n}[.|!]",
    "Hello, my name is {n}.",
    "Hi, I am {n}.",
    "[People call|Call] me {n}.",
    "You are talking to {n}.",
    "This is {n}.",
)
WHICH_NAME: Patterns = (
    "What is my name?",
    "What's my name?",
    "Do you remember my name?",
    "Who am I?",
    "Can you tell me my name?",
    "How am I called?",
)


def glossary_patterns(word: str) -> Patterns:
    return (
        f"What is [a|an|the] {word}[| in Baton]?",
        f"What does {word} mean[| in Baton]?",
        f"[Explain|Define] {word}[.| in Baton.]",
        f"In Baton, what is [a|] {word}?",
        f"What is meant by {word}?",
        f"Baton: {word}?",
        f"Tell me what {word} means here.",
        f"What do you call {word} in Baton?",
    )


def small_talk(rng: random.Random, glossary: Mapping[str, str], *, held_out: bool = False) -> list[Turn]:
    """One or two turns without a task."""
    kind = rng.random()
    if kind < 0.5:
        patterns, reply = rng.choice(SAID)
        return [(ask(rng, patterns, held_out=held_out), reply)]
    if kind < 0.6:
        country = rng.choice(list(CAPITALS))
        question = ask(rng, CAPITAL, held_out=held_out, c=country)
        return [(question, f"The capital of {country} is {CAPITALS[country]}.")]
    if kind < 0.78:
        thing = rng.choice(("the ", "a ", "")) + rng.choice(WORDS)
        question = ask(rng, BEYOND, held_out=held_out, thing=thing, place=rng.choice(PLACES))
        return [(question, f"I do not know that. {CAN}")]
    if kind < 0.93:
        word = rng.choice(list(glossary))
        return [(ask(rng, glossary_patterns(word), held_out=held_out), f"In Baton, {word} is {glossary[word]}.")]
    name = rng.choice(NAMES)
    turns = [(ask(rng, MY_NAME, held_out=held_out, n=name), f"Hello {name}! What would you like to know?")]
    if rng.random() < 0.7:
        turns.append((ask(rng, WHICH_NAME, held_out=held_out), f"Your name is {name}."))
    return turns
