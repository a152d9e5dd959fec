"""Supervised fine-tuning: cross-entropy with the labels, no teacher."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .objective import Objective, Positions, Terms


@dataclass(frozen=True)
class Sft(Objective):
    """Cross-entropy of the student's next-token distribution, softmax(z / ce_temperature)."""

    ce_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_ce_temperature(self.ce_temperature)

    def __call__(self, positions: Positions) -> Terms:
        """Return the summed cross-entropy as "loss" and "ce"."""
        ce = summed_cross_entropy(positions, self.ce_temperature)
        return {"loss": ce, "ce": ce.detach()}


def summed_cross_entropy(positions: Positions, temperature: float) -> Tensor:
    """Return −Σ_n log softmax(z_n / temperature)[label_n] in float32 (float64 for float64 logits)."""
    dtype = torch.promote_types(positions.student_NV.dtype, torch.float32)
    return cross_entropy(positions.student_NV.to(dtype) / temperature, positions.labels_N, reduction="sum")


def check_ce_temperature(ce_temperature: float) -> None:
    """Raise ValueError unless the temperature is above 0."""
    if not ce_temperature > 0:
        raise ValueError(f"ce_temperature is {ce_temperature}; it divides the logits and must be above 0 (usually 1)")


def check_weight(name: str, weight: float) -> None:
    """Raise ValueError for a negative weight of a term."""
    if not weight >= 0:
        raise ValueError(f"{name} is {weight}; a weight cannot be negative, 0 turns its term off")
