"""A model's answers over records, kept as they come, and what they are worth: metrics, intervals, differences."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import generate_answers
    from .intervals import Estimate
    from .metrics import METRICS, Scored, default_metrics, metric_of
    from .questions import EvaluationError, Question, read_questions

__all__ = [
    "METRICS",
    "Estimate",
    "EvaluationError",
    "Question",
    "Scored",
    "default_metrics",
    "generate_answers",
    "metric_of",
    "read_questions",
]

# Imported when they are asked for: a board without torch evaluates too, and answers.py alone needs it.
_PLACES = {
    "METRICS": ".metrics",
    "Estimate": ".intervals",
    "EvaluationError": ".questions",
    "Question": ".questions",
    "Scored": ".metrics",
    "default_metrics": ".metrics",
    "generate_answers": ".answers",
    "metric_of": ".metrics",
    "read_questions": ".questions",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name], __name__), name)
