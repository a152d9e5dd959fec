"""BiLD: the logits differences of a fixed number of leading tokens, both ways, without labels.

Source: BiLD (arXiv 2406.13555): top 8, temperature 3, forward KL.
"""

from dataclasses import dataclass

from .dbild import Direction, check_settings, dbild
from .objective import Objective, Positions, Terms
from .sft import check_weight, summed_cross_entropy


@dataclass(frozen=True)
class Bild(Objective):
    """λ_ce·CE + λ_bild·BiLD(teacher, student) over the top `k` of each; CE is off by default, as in the paper."""

    lambda_ce: float = 0.0
    lambda_bild: float = 1.0
    k: int = 8
    temperature: float = 3.0
    direction: Direction = "forward"

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.k, self.k, self.k, self.direction, "both")
        check_weight("lambda_ce", self.lambda_ce)
        check_weight("lambda_bild", self.lambda_bild)

    @property
    def needs_teacher(self) -> bool:
        """Always."""
        return True

    def __call__(self, positions: Positions) -> Terms:
        """Return "loss" and the unweighted sums "ce" and "bild"."""
        assert positions.teacher_NV is not None
        bild = dbild(
            positions.teacher_NV,
            positions.student_NV,
            temperature=self.temperature,
            window=self.k,
            min_k=self.k,
            max_k=self.k,
            direction=self.direction,
            reduction="sum",
        )
        ce = summed_cross_entropy(positions, 1.0)
        return {"loss": self.lambda_ce * ce + self.lambda_bild * bild, "ce": ce.detach(), "bild": bild.detach()}
