"""How k, the number of tokens that DBiLD compares, is spread over positions: counts that add up as sums do.

A mean hides what k does; quantiles do not add up over chunks, ranks and steps. Counts in bins do. There are 8 bins to
an octave, so that a quantile is exact below 12 and within 5 % above.

Shapes: N positions, K bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PER_OCTAVE = 8
BINS = 20 * PER_OCTAVE  # up to a million tokens
COUNTS = "_counts"  # ends the name of such counts among an objective's sums
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


def count_k(k_N: Tensor) -> Tensor:
    """Return counts_K, int64, of whole numbers: bin b holds 2^(b/8) up to 2^((b+1)/8). A k of 0 counts nowhere."""
    bins_N = (k_N.clamp(min=1).float().log2() * PER_OCTAVE).long().clamp(max=BINS - 1)
    # Unlike bincount, this does not wait for a GPU.
    counts_K = torch.zeros(BINS, dtype=torch.long, device=k_N.device)
    return counts_K.scatter_add_(0, bins_N, (k_N > 0).long())


def quantiles(counts_K: Sequence[float]) -> dict[str, float]:
    """Return the QUANTILES of what was counted, each the middle of the whole numbers of its bin; nothing: no entry."""
    total, found = sum(counts_K), {}
    for name, share in QUANTILES.items() if total else ():
        seen = 0.0
        for number, count in enumerate(counts_K):
            seen += count
            if seen >= share * total:
                lowest, end = (math.ceil(2 ** (edge / PER_OCTAVE)) for edge in (number, number + 1))
                found[name] = (lowest + max(lowest, end - 1)) / 2
                break
    return found
