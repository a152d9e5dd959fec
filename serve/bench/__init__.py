"""The bench: what a picture and a question take on this machine, stage by stage, beside what else could answer them."""

from .contender import Contender, ContenderError
from .report import Report, measure

__all__ = [
    "Contender",
    "ContenderError",
    "Report",
    "measure",
]
