"""A matrix of recipes, run arm by arm, and its table."""

from .matrix import Arm, Matrix, load_matrix
from .report import collect, write_report

__all__ = [
    "Arm",
    "Matrix",
    "collect",
    "load_matrix",
    "write_report",
]
