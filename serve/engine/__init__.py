"""The engine: one request at a time, from pictures and messages to a stream of text, on a bundle's graphs."""

from .engine import Answer, AnswerStream, Engine
from .sampling import Sampling

__all__ = [
    "Answer",
    "AnswerStream",
    "Engine",
    "Sampling",
]
