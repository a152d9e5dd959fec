"""The leading tokens of each position: the knee of the sorted logits says how many, and only those are sorted.

A row of a large vocabulary is searched in three steps: find a floor that no leading token can lie below, take the
survivors that reach it, and sort those. float32 on a CPU goes through numpy (`knee_cpu`), everything else is torch.

Shapes: N positions (rows), V vocabulary, K the widest row's number of leading tokens, S survivors of the widest row,
M survivors of all rows, T levels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import knee_cpu
from .finite import refuse_non_finite
from .knee_cpu import DENSE, first_lowest

# Up to this vocabulary sorting a whole row costs no more than the search for a floor (CPU, measured).
FULL_SORT_VOCABULARY = 8192
# Logits looked at together: bounds the float32 copy of half-precision logits.
ELEMENTS_AT_ONCE = 2**23
# One token in so many is sorted to guess where the knee is; what the guess leads to is then counted exactly.
SAMPLED = 32
# How many levels are counted besides the guessed knee. Fewer prove less, and so leave more tokens to sort.
LEVELS = 9


@dataclass(frozen=True)
class Leaders:
    """The top-k tokens of every row, in descending order of its logits, padded on the right to the widest row."""

    ids_NK: Tensor
    k_N: Tensor

    @property
    def valid_NK(self) -> Tensor:
        """True where a row really has a leading token, False in its padding."""
        return torch.arange(self.ids_NK.shape[1], device=self.k_N.device) < self.k_N[:, None]

    def rows(self, start: int, stop: int) -> "Leaders":
        """Rows `start` to `stop`, cut to their own widest row."""
        k_N = self.k_N[start:stop]
        width = int(k_N.max()) if len(k_N) else 0
        return Leaders(self.ids_NK[start:stop, :width], k_N)

    def padded(self, width: int) -> Tensor:
        """Return the ids padded to `width` with each row's first."""
        if self.ids_NK.shape[1] >= width:
            return self.ids_NK
        first_NP = self.ids_NK[:, :1].expand(-1, width - self.ids_NK.shape[1])
        return torch.cat([self.ids_NK, first_NP], dim=1)


def knee_k(sorted_logits_NV: Tensor, *, min_k: int = 3, max_k: int | None = None) -> Tensor:
    """Return k_N, the number of logits of each descending row up to and including its knee, within [min_k, max_k].

    Kneedle (Satopää et al. 2011) for a convex decreasing curve: with x = i/(V−1) and y the min–max-normalised logits,
    the knee is argmax of (1 − x) − y, the largest gap below the chord; k = argmax + 1. The first of equal gaps counts.
    A row without a gap, all-equal or nowhere below its chord but by rounding, gets min_k. Never more than V.
    """
    rows, vocabulary = sorted_logits_NV.shape
    if rows == 0 or vocabulary == 0:
        return torch.zeros(rows, dtype=torch.long, device=sorted_logits_NV.device)
    sorted_NV = accumulable(sorted_logits_NV)
    return _bounded(
        _first_lowest(sorted_NV, vocabulary, sorted_NV[:, :1] - sorted_NV[:, -1:]), min_k, max_k, vocabulary
    )


def _first_lowest(sorted_NS: Tensor, vocabulary: int, span_N1: Tensor) -> Tensor:
    if sorted_NS.device.type == "cpu":
        # torch's CPU argmin is not vectorised: numpy's takes a tenth of its time.
        return torch.from_numpy(first_lowest(sorted_NS.numpy(), vocabulary, span_N1.numpy()))
    found: Tensor = first_lowest(sorted_NS, vocabulary, span_N1)
    return found


def _bounded(knee_N: Tensor, min_k: int, max_k: int | None, vocabulary: int) -> Tensor:
    """Return the number of tokens up to the knee, within [min_k, max_k] and what the vocabulary holds."""
    return (knee_N + 1).clamp(min=min_k, max=max_k).clamp(max=vocabulary)


def accumulable(logits: Tensor) -> Tensor:
    """Return the logits in the dtype that sums are made in: float64 stays, everything else becomes float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def rank(logits_NV: Tensor, *, window: int | None = None, min_k: int = 3, max_k: int | None = None) -> Leaders:
    """Return the leading tokens of every row: its top k by logit, k from the knee of its (top `window`) sorted logits.

    Equal logits are taken in the order of their token ids. Raises ValueError naming the first row with NaN or inf.
    """
    rows, vocabulary = logits_NV.shape
    if rows == 0 or vocabulary == 0:
        nothing = torch.zeros(rows, dtype=torch.long, device=logits_NV.device)
        return Leaders(nothing.new_zeros(rows, 0), nothing)
    step = max(1, ELEMENTS_AT_ONCE // vocabulary)
    blocks = []
    for start in range(0, rows, step):
        block_NV = accumulable(logits_NV.detach()[start : start + step])
        blocks.append(_rank_block(block_NV, min(window or vocabulary, vocabulary), min_k, max_k, first_row=start))
    width = max(block.ids_NK.shape[1] for block in blocks)
    return Leaders(torch.cat([block.padded(width) for block in blocks]), torch.cat([block.k_N for block in blocks]))


def _rank_block(logits_NV: Tensor, window: int, min_k: int, max_k: int | None, *, first_row: int) -> Leaders:
    """Do `rank` for float32 or float64 logits; `window` is at most the vocabulary."""
    vocabulary = logits_NV.shape[1]
    floor_N1 = span_N1 = None
    if vocabulary <= FULL_SORT_VOCABULARY or window < vocabulary:
        refuse_non_finite(logits_NV, first_row)
    if vocabulary > FULL_SORT_VOCABULARY:
        if window == vocabulary:
            # Two passes: aminmax is ten times slower than both on a CPU. A NaN shows in either end.
            highest_N1, lowest_N1 = logits_NV.amax(1, keepdim=True), logits_NV.amin(1, keepdim=True)
            span_N1 = highest_N1 - lowest_N1
            if not bool(span_N1.isfinite().all()):
                refuse_non_finite(logits_NV, first_row)
            floor_N1 = _floor_below_knee(logits_NV, highest_N1, lowest_N1, min_k)
        elif window < vocabulary * DENSE:
            floor_N1 = _floor_of_top(logits_NV, window)
    if _through_numpy(logits_NV):
        floor, span = (None if x_N1 is None else x_N1.numpy() for x_N1 in (floor_N1, span_N1))
        ids_NK, k_N = map(torch.from_numpy, knee_cpu.leading(logits_NV.numpy(), floor, span, window, min_k, max_k))
        return Leaders(ids_NK, k_N)
    if floor_N1 is None:
        ordered = logits_NV.sort(dim=1, descending=True, stable=True)
        sorted_NS, ids_NS = ordered.values, ordered.indices
    else:
        sorted_NS, ids_NS = _sorted_from(logits_NV, floor_N1)
    sorted_NS = sorted_NS[:, :window]
    span_N1 = sorted_NS[:, :1] - sorted_NS[:, -1:] if span_N1 is None else span_N1
    k_N = _bounded(_first_lowest(sorted_NS, window, span_N1), min_k, max_k, window)
    leaders = Leaders(ids_NS[:, : int(k_N.max())], k_N)
    # The padding repeats each row's first token, so that it widens no range of logits.
    return Leaders(torch.where(leaders.valid_NK, leaders.ids_NK, leaders.ids_NK[:, :1]), k_N)


def _sorted_from(logits_NV: Tensor, floor_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of each row that reach its floor, in descending order, and their token ids.

    Equal logits come by ascending id. Rows with fewer than the widest are padded with id 0 and inf: never a knee.
    """
    row_M, id_M = (logits_NV >= floor_N1).nonzero(as_tuple=True)
    count_N = row_M.bincount(minlength=len(logits_NV))
    width = int(count_N.max())
    place_M = torch.arange(len(row_M), device=row_M.device) - (count_N.cumsum(0) - count_N)[row_M]
    values_NS = logits_NV.new_full((len(logits_NV), width), -torch.inf)
    values_NS[row_M, place_M] = logits_NV[row_M, id_M]
    ids_NS = torch.zeros_like(values_NS, dtype=torch.long)
    ids_NS[row_M, place_M] = id_M
    ordered = values_NS.sort(dim=1, descending=True, stable=True)
    padding_NS = torch.arange(width, device=count_N.device) >= count_N[:, None]
    return ordered.values.masked_fill_(padding_NS, torch.inf), ids_NS.gather(1, ordered.indices)


def _floor_of_top(logits_NV: Tensor, window: int) -> Tensor:
    """Return floors_N1 that at least `window` logits of each row reach."""
    sample_NS = _sorted_values(logits_NV[:, ::SAMPLED])
    at = _enough_of_sample(window, sample_NS.shape[1])
    floor_N1 = sample_NS[:, at : at + 1]
    if bool((_count_from(logits_NV, floor_N1) < window).any()):
        # The sample misled: once in thousands of rows where ids say nothing about logits.
        floor_N1 = logits_NV.topk(window, dim=1).values[:, -1:]
    return floor_N1


def _enough_of_sample(count: int, size: int) -> int:
    """Return the index in a sorted sample that `count` logits should lie above, but for four standard errors."""
    expected = count / SAMPLED
    return min(int(expected + 4 * expected**0.5) + 2, size - 1)


def _floor_below_knee(logits_NV: Tensor, highest_N1: Tensor, lowest_N1: Tensor, min_k: int) -> Tensor:
    """Return floors_N1 that each row's knee and its top min_k reach.

    The gap below the chord is the empirical distribution of the logits minus the uniform one. So if R logits reach a
    level t, the gap of every logit in [s, t) is at most highest − s − span·R/(V−1), and the largest gap of all is at
    least highest − t − span·R/(V−1). Counting at a few levels thus proves which stretches cannot hold the knee. Where
    the levels should be is guessed from a sample; a bad guess costs time and never changes the result.
    """
    vocabulary = logits_NV.shape[1]
    level_NT = _guess_levels(logits_NV, highest_N1, lowest_N1, min_k)
    count_NT = _count_from(logits_NV, level_NT)

    level_NT, highest_N1, lowest_N1 = level_NT.double(), highest_N1.double(), lowest_N1.double()
    chord_NT = highest_N1 - (highest_N1 - lowest_N1) * (count_NT.double() / (vocabulary - 1))
    least_N1 = (chord_NT - level_NT).amax(1, keepdim=True)
    most_NT = chord_NT - torch.cat([level_NT[:, 1:], lowest_N1], dim=1)
    # The gaps are compared in the logits' own dtype later, with its rounding.
    rounding_N1 = 8 * torch.finfo(logits_NV.dtype).eps * torch.maximum(highest_N1.abs(), lowest_N1.abs())
    holds_none_NT = (most_NT < least_N1 - rounding_N1) & (count_NT >= min(min_k, vocabulary))
    # The first level below which no stretch can; the row's lowest logit where there is none.
    proven_NT = holds_none_NT.flip(1).int().cumprod(1)
    at_N1 = level_NT.shape[1] - proven_NT.sum(1, keepdim=True)
    return torch.cat([level_NT, lowest_N1], dim=1).gather(1, at_N1).to(logits_NV.dtype)


def _guess_levels(logits_NV: Tensor, highest_N1: Tensor, lowest_N1: Tensor, min_k: int) -> Tensor:
    """Return descending levels [N, T]: the knee of a sample of each row, a first floor, and stretches down from it."""
    sample_NS = _sorted_values(logits_NV[:, ::SAMPLED])
    size = sample_NS.shape[1]
    span_N1 = highest_N1 - lowest_N1
    knee_N1 = _first_lowest(sample_NS, size, span_N1)[:, None]
    knee_level_N1 = sample_NS.gather(1, knee_N1)
    least_N1 = knee_level_N1 + span_N1 * (knee_N1 / (size - 1))

    # The first floor is twice as deep as the knee, where the gap is clearly smaller than the largest.
    first = max(int(size * DENSE) + 4, _enough_of_sample(min_k, size))
    level_N1 = sample_NS.gather(1, (2 * knee_N1).clamp(min=min(first, size - 1), max=size - 1))
    levels = [knee_level_N1, level_N1]
    falling_NS = -sample_NS
    while len(levels) < LEVELS + 1:
        above_N1 = torch.searchsorted(falling_NS, -level_N1)
        # A stretch can be as long as the gap at its upper end is smaller than the largest; the sample may err.
        smaller_N1 = level_N1 + span_N1 * (above_N1 / (size - 1)) - least_N1
        level_N1 = level_N1 - 0.75 * smaller_N1.clamp(min=0)
        levels.append(level_N1)
    return torch.cat(levels, dim=1).maximum(lowest_N1)


def _through_numpy(logits_NV: Tensor) -> bool:
    return logits_NV.device.type == "cpu" and logits_NV.dtype == torch.float32


def _sorted_values(logits_NV: Tensor) -> Tensor:
    """Return every row's logits in descending order."""
    if _through_numpy(logits_NV):
        return torch.from_numpy(knee_cpu.sorted_values(logits_NV.numpy()))
    return logits_NV.sort(dim=1, descending=True).values


def _count_from(logits_NV: Tensor, level_NT: Tensor) -> Tensor:
    """Return [N, T], how many logits of each row reach each of its levels."""
    if _through_numpy(logits_NV):
        return torch.from_numpy(knee_cpu.count_from(logits_NV.numpy(), level_NT.numpy()))
    return torch.stack([(logits_NV >= level_N1).sum(1) for level_N1 in level_NT[:, :, None].unbind(1)], dim=1)
