"""What is minimised: one file an objective, and what they stand on (DBiLD, its knee, sums that stay finite)."""

from .finite import NonFiniteError
from .objective import Objective, Pictures, PictureView, Positions, Terms, Widths
from .registry import OBJECTIVES, build_objective

__all__ = [
    "OBJECTIVES",
    "NonFiniteError",
    "Objective",
    "PictureView",
    "Pictures",
    "Positions",
    "Terms",
    "Widths",
    "build_objective",
]
