"""Baton's public face. Importing it loads no torch; an `LLM` whose engine runs in this process does."""

from baton.llm import LLM
from baton.outputs import Completion, Increment, RequestOutput
from engine.errors import InvalidRequest
from engine.request import SamplingParams

__all__ = ["LLM", "Completion", "Increment", "InvalidRequest", "RequestOutput", "SamplingParams"]
