"""What is not a finite number never reaches the weights: terms, loss and gradients are checked before the update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

NAMED = 5  # parameters that a message names


class NonFiniteError(ValueError):
    """A loss, a term, logits or a gradient with NaN or infinity; the message says in which."""


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Put `place` before the message of a NonFiniteError."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{place}: {error}") from None


@contextmanager
def before_the_update(step: int) -> Iterator[None]:
    """Say of a NonFiniteError which step it kept from happening."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(
            f"step {step}: {error}. This step has changed no weight, and the same command goes on from the last "
            "checkpoint; look at the samples, the learning rate and the precision before"
        ) from None


def refuse_non_finite(logits_NV: Tensor, first_row: int = 0, *, so: str = "it has no knee") -> None:
    """Raise NonFiniteError naming the first row that holds NaN or inf; `first_row` is the number of the first."""
    # NaN and inf never leave a sum. Large finite logits can overflow it, so a bad sum only asks for a closer look.
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    if logits_NV.numel() == 0 or bool(logits_NV.detach().sum(dtype=dtype).isfinite()):
        return
    bad_N = logits_NV.isfinite().logical_not().sum(1)
    if bool(bad_N.any()):
        row = int(bad_N.nonzero()[0, 0])
        raise NonFiniteError(
            f"row {first_row + row} has {int(bad_N[row])} logits that are NaN or inf, so {so}; look for a too high "
            "learning rate or fp16 overflow, and leave tokens out by cutting the vocabulary, not by -inf"
        )


def check_logits(teacher_NV: Tensor, student_NV: Tensor) -> None:
    """Raise NonFiniteError naming whose logits, and the first row of them, where one is NaN or infinite."""
    for whose, logits_NV in (("teacher", teacher_NV), ("student", student_NV)):
        with naming(f"the {whose}'s logits"):
            refuse_non_finite(logits_NV, so="it is no distribution")


def check_terms(loss: Tensor, terms: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError if the loss or a term, each 0-dim, is NaN or infinite; waits for the device once."""
    values = {**terms, "loss": loss}
    numbers = torch.stack([value.detach().float() for value in values.values()]).tolist()
    wrong = [f"{name} is {number}" for name, number in zip(values, numbers, strict=True) if not math.isfinite(number)]
    if wrong:
        raise NonFiniteError(", ".join(wrong))


def check_gradients(model: nn.Module) -> None:
    """Raise NonFiniteError naming parameters if the gradient's norm is NaN or infinite; waits for the device once."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = float(nn.utils.get_total_norm(gradients.values()))
    if math.isfinite(norm):
        return
    wrong = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    named = ", ".join(wrong[:NAMED]) or "none alone, but their sum"
    raise NonFiniteError(f"the norm of the gradient is {norm}, by the parameters {named}{more}")
