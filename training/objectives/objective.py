"""What every objective is given, and what it gives back.

Shapes: N supervised positions, M those of them whose row has a picture (they come first), V vocabulary of the model.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Positions:
    """Logits at supervised positions: what each pathway says about the next token, and which token it is.

    `teacher_NV` is there if the objective `needs_teacher`. `switch_MV` is there if it `needs_switch` and some position
    has a picture whose encoder trains; it belongs to the first M positions.
    """

    labels_N: Tensor
    student_NV: Tensor
    teacher_NV: Tensor | None = None
    switch_MV: Tensor | None = None


class Objective(ABC):
    """A training objective: sums over the positions it is shown, so that chunks, batches and ranks add up."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's logits are needed."""
        return False

    @property
    def needs_switch(self) -> bool:
        """Whether the logits of the visual switch are needed."""
        return False

    @abstractmethod
    def __call__(self, positions: Positions) -> Terms:
        """Return "loss", with its graph, and the terms to log, all 0-dim sums over the positions; no position: 0."""
