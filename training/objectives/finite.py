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
