"""The ten fixed conversations that the model card shows: what the user says, and a system message for some."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Conversation:
    questions: tuple[str, ...]
    system: str | None = None


PROMPTS: Sequence[Conversation] = (
    Conversation(("What does os.path.join do?", "And what arguments does it take?", "Show me an example.")),
    Conversation(("List the methods of str.",)),
    Conversation(("Which module has deepcopy?", "What does it do?")),
    Conversation(("Which function returns the square root of a number?",)),
    Conversation(("What does os.path.frobnicate do?",)),
    Conversation(("Write a JSON object with the keys name (string), age (integer) and likes_tea (boolean).",)),
    Conversation(("Extract name and city as JSON: Maria is 34 years old and has lived in Lisbon since 2019.",)),
    Conversation(("What is 47 + 38?", "And 123 * 45?", "How many letters are in the word elephant?")),
    Conversation(("What does json.dumps do?",), system="Answer in JSON."),
    Conversation(("Hello, I am Ada. Who are you?", "What is my name?", "Explain quantum physics to me.")),
)
