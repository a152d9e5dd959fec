"""A model's answers over records."""

from .answers import generate_answers

__all__ = [
    "generate_answers",
]
