"""A model's answers over records, kept as they come, and what they are worth: metrics, intervals, differences."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers import generate_answers
    from .asking import Model, evaluate
    from .intervals import Estimate
    from .kept_answers import Answer, Results, read_results
    from .metrics import METRICS, Scored, default_metrics, metric_of
    from .questions import EvaluationError, Question, read_questions
    from .report import System, make_report, report_text, write_report

__all__ = [
    "METRICS",
    "Answer",
    "Estimate",
    "EvaluationError",
    "Model",
    "Question",
    "Results",
    "Scored",
    "System",
    "default_metrics",
    "evaluate",
    "generate_answers",
    "make_report",
    "metric_of",
    "read_questions",
    "read_results",
    "report_text",
    "write_report",
]

# Imported when they are asked for: a board without torch evaluates too, and answers.py alone needs it.
_PLACES = {
    "METRICS": ".metrics",
    "Answer": ".kept_answers",
    "Estimate": ".intervals",
    "EvaluationError": ".questions",
    "Model": ".asking",
    "Question": ".questions",
    "Results": ".kept_answers",
    "Scored": ".metrics",
    "System": ".report",
    "default_metrics": ".metrics",
    "evaluate": ".asking",
    "generate_answers": ".answers",
    "make_report": ".report",
    "metric_of": ".metrics",
    "read_questions": ".questions",
    "read_results": ".kept_answers",
    "report_text": ".report",
    "write_report": ".report",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name], __name__), name)
