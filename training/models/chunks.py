"""Logits of a few positions at a time, so that memory does not grow with supervised tokens times vocabulary.

Shapes: N positions; 0-dim terms.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..objectives import Terms

LOGITS_AT_ONCE = 2**25  # of one head: positions times vocabulary


def in_chunks(function: Callable[..., Terms], step: int, tensors: tuple[Tensor | None, ...], count: int) -> Terms:
    """Sum what the function gives for every `step` of `count` positions, the tensors' first dimension (or None)."""
    if count <= step:
        return function(*tensors)
    sums: Terms = {}
    for start in range(0, count, step):
        chunk = [None if tensor is None else tensor[start : start + step] for tensor in tensors]
        # Logits of one chunk at a time: the backward computes them again.
        sums = add(sums, checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False))
    return sums


def longest(tensors: tuple[Tensor | None, ...]) -> int:
    """Return how many positions the longest of these has."""
    return max(len(tensor) for tensor in tensors if tensor is not None)


def largest_of_ranks(count: int, device: torch.device) -> int:
    """Return the largest count of all ranks."""
    counts = torch.tensor(count, device=device)
    torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX)
    return int(counts)


def add(one: Terms, other: Terms) -> Terms:
    """Return the sums of terms by name; what only one has stays."""
    common = {name: one[name] + other[name] for name in one.keys() & other.keys()}
    return one | other | common
