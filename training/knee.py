"""The leading tokens of each position: the knee of the sorted logits says how many, and only those are sorted.

Shapes: N positions (rows), V vocabulary, K the widest row's number of leading tokens, S survivors of the coarse search.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Up to this vocabulary a full sort costs no more than the histogram that avoids it (CPU, measured).
FULL_SORT_VOCABULARY = 2048
# Logits looked at together: bounds the temporaries, and on a CPU keeps them near the cache.
ELEMENTS_AT_ONCE = 2**22


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


def knee_k(sorted_logits_NV: Tensor, *, min_k: int = 3, max_k: int | None = None) -> Tensor:
    """Return k_N, the number of logits of each descending row up to and including its knee, within [min_k, max_k].

    Kneedle (Satopää et al. 2011) for a convex decreasing curve: with x = i/(V−1) and y the min–max-normalised logits,
    the knee is argmax of (1 − x) − y, the largest gap below the chord; k = argmax + 1. The first of equal gaps counts.
    A row of all-equal logits has no gap and gets min_k. Never more than V.
    """
    rows, vocabulary = sorted_logits_NV.shape
    if rows == 0 or vocabulary == 0:
        return torch.zeros(rows, dtype=torch.long, device=sorted_logits_NV.device)
    sorted_NV = accumulable(sorted_logits_NV)
    gap_NV = _gap_below_chord(sorted_NV, sorted_NV[:, :1], sorted_NV[:, -1:], vocabulary)
    return _bounded(_first_largest(gap_NV) + 1, min_k, max_k, vocabulary)


def _gap_below_chord(sorted_NS: Tensor, highest_N1: Tensor, lowest_N1: Tensor, vocabulary: int) -> Tensor:
    """Return how far the first S of `vocabulary` sorted logits lie below the chord from highest to lowest."""
    # In logits, not divided by highest − lowest: the same argmax, and an all-equal row needs no exception.
    x_S = torch.arange(sorted_NS.shape[1], device=sorted_NS.device, dtype=sorted_NS.dtype) / max(vocabulary - 1, 1)
    return torch.addcmul(highest_N1, x_S, lowest_N1 - highest_N1) - sorted_NS


def _first_largest(x_NS: Tensor) -> Tensor:
    """Return each row's argmax, the first of equals."""
    # torch's CPU argmax is not vectorised: numpy's takes a tenth of its time.
    return torch.from_numpy(x_NS.numpy().argmax(axis=1)) if x_NS.device.type == "cpu" else x_NS.argmax(dim=1)


def _bounded(k_N: Tensor, min_k: int, max_k: int | None, vocabulary: int) -> Tensor:
    """Clamp the knee's k to [min_k, max_k] and to what the vocabulary holds."""
    return k_N.clamp(min=min_k, max=max_k).clamp(max=vocabulary)


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
        block_NV = accumulable(logits_NV[start : start + step])
        highest_N1, lowest_N1 = _finite_ends(block_NV, first_row=start)
        if window is not None and window < vocabulary:
            sorted_NS, ids_NS = _top(block_NV, window)
            k_N = knee_k(sorted_NS, min_k=min_k, max_k=max_k)
        elif vocabulary <= FULL_SORT_VOCABULARY:
            sorted_NS, ids_NS = sort_descending(block_NV)
            k_N = knee_k(sorted_NS, min_k=min_k, max_k=max_k)
        else:
            ids_NS, knee_N = _sort_to_the_knee(block_NV, highest_N1, lowest_N1, min_k)
            k_N = _bounded(knee_N, min_k, max_k, vocabulary)
        blocks.append(Leaders(ids_NS[:, : int(k_N.max())], k_N))
    width = max(block.ids_NK.shape[1] for block in blocks)
    ids = [torch.nn.functional.pad(block.ids_NK, (0, width - block.ids_NK.shape[1])) for block in blocks]
    return Leaders(torch.cat(ids), torch.cat([block.k_N for block in blocks]))


def refuse_non_finite(logits_NV: Tensor) -> None:
    """Raise ValueError naming the first row that holds NaN or inf."""
    if logits_NV.numel():
        _finite_ends(logits_NV.detach(), first_row=0)


def _finite_ends(logits_NV: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """Return each row's highest and lowest logit, [N, 1]; raises ValueError as `rank` does."""
    # Two passes: aminmax is ten times slower than both on a CPU. A NaN shows in either end.
    highest_N1, lowest_N1 = logits_NV.amax(1, keepdim=True), logits_NV.amin(1, keepdim=True)
    good_N = (highest_N1.isfinite() & lowest_N1.isfinite()).squeeze(1)
    if not bool(good_N.all()):
        row = int(good_N.logical_not().nonzero()[0, 0])
        count = int(logits_NV[row].isfinite().logical_not().sum())
        raise ValueError(
            f"row {first_row + row} has {count} logits that are NaN or inf, so it has no knee; look for a too high "
            "learning rate or fp16 overflow, and leave tokens out by cutting the vocabulary, not by -inf"
        )
    return highest_N1, lowest_N1


def _top(logits_NV: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the top `window` logits of each row, descending, and their ids; equal ones by ascending id."""
    # topk leaves the order of equal logits open, so its ids are put in ascending order before a stable sort.
    ids_NS = logits_NV.topk(window, dim=1, sorted=False).indices.sort(dim=1).values
    sorted_NS, order_NS = sort_descending(logits_NV.gather(1, ids_NS))
    return sorted_NS, ids_NS.gather(1, order_NS)


def _sort_to_the_knee(logits_NV: Tensor, highest_N1: Tensor, lowest_N1: Tensor, min_k: int) -> tuple[Tensor, Tensor]:
    """Return each row's ids in descending order, sorted at least to its knee and to min_k, and its k_N.

    The gap below the chord is the empirical distribution of the scaled logits minus the uniform one, so a histogram
    bounds it in every bin: only logits from the lowest bin that can hold the largest gap upwards have to be sorted.
    """
    rows, vocabulary = logits_NV.shape
    bin_NV, count_NB = _histogram(logits_NV, highest_N1, lowest_N1)
    floor_N1 = _lowest_bin_needed(count_NB, vocabulary, min_k)

    row_M, id_M = (bin_NV >= floor_N1).nonzero(as_tuple=True)
    survivors_N = row_M.bincount(minlength=rows)
    place_M = torch.arange(len(row_M), device=row_M.device) - (survivors_N.cumsum(0) - survivors_N)[row_M]
    width = int(survivors_N.max())
    values_NS = logits_NV.new_full((rows, width), -torch.inf)
    values_NS[row_M, place_M] = logits_NV[row_M, id_M]
    ids_NS = torch.zeros_like(values_NS, dtype=torch.long)
    ids_NS[row_M, place_M] = id_M

    sorted_NS, order_NS = sort_descending(values_NS)
    padding_NS = torch.arange(width, device=row_M.device) >= survivors_N[:, None]
    gap_NS = _gap_below_chord(sorted_NS, highest_N1, lowest_N1, vocabulary).masked_fill(padding_NS, -torch.inf)
    return ids_NS.gather(1, order_NS), _first_largest(gap_NS) + 1


def _histogram(logits_NV: Tensor, highest_N1: Tensor, lowest_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin of every logit, from 0 at the row's lowest, and how many are in each bin."""
    rows, bins = len(logits_NV), _bins(logits_NV.shape[1])
    # A span below the smallest normal number would overflow the scale; such a row is flat, all of it in bin 0.
    scale_N1 = (bins - 1) / (highest_N1 - lowest_N1).clamp(min=torch.finfo(logits_NV.dtype).tiny * 2**13)
    bin_NV = ((logits_NV - lowest_N1) * scale_N1).to(torch.int32)
    first_bin_N1 = torch.arange(rows, device=bin_NV.device, dtype=torch.int32)[:, None] * bins
    count = (bin_NV + first_bin_N1).view(-1).bincount(minlength=rows * bins)
    return bin_NV, count.view(rows, bins)


def _bins(vocabulary: int) -> int:
    """Fine bins leave fewer logits to sort, but cost time of their own: a sixteenth of the vocabulary is a balance."""
    return min(2048, max(64, vocabulary // 16))


def _lowest_bin_needed(count_NB: Tensor, vocabulary: int, min_k: int) -> Tensor:
    """Return each row's lowest bin that can hold its largest gap or one of its top min_k logits."""
    from_here_NB = count_NB.flip(1).cumsum(1).flip(1)
    above_NB = from_here_NB - count_NB
    last = count_NB.shape[1] - 1
    bin_B = torch.arange(last + 1, device=count_NB.device)
    # Its highest logit, at index `above`, has y within the bin, and no other has a smaller index. One bin of slack on
    # each side is far more than the rounding of the bins.
    rank_NB = above_NB.double() / (vocabulary - 1)
    most_NB = 1 - (bin_B - 1) / last - rank_NB
    least_NB = 1 - (bin_B + 2) / last - rank_NB
    filled_NB = count_NB > 0
    best_N1 = least_NB.masked_fill(~filled_NB, -torch.inf).amax(1, keepdim=True)
    knee_N1 = (filled_NB & (most_NB >= best_N1)).int().argmax(1, keepdim=True)
    enough_N1 = (from_here_NB >= min(min_k, vocabulary)).sum(1, keepdim=True) - 1
    return torch.minimum(knee_N1, enough_N1)


def sort_descending(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return every row's logits in descending order and their token ids; equal logits by ascending id."""
    if logits_NV.device.type == "cpu" and logits_NV.dtype == torch.float32:
        # torch's CPU sort of (value, index) pairs is not vectorised, numpy's of integers is: 5-10 times faster. So the
        # order-preserving bits of the logit and its id are packed into one integer. Adding 0 turns -0 into 0.
        bits = (logits_NV + 0.0).numpy().view(np.int32)
        keys = (~(bits ^ ((bits >> 31) & 0x7FFFFFFF))).astype(np.int64)
        keys <<= 32
        keys |= np.arange(logits_NV.shape[1])
        keys.sort(axis=1)
        keys &= 0xFFFFFFFF
        ids_NV = torch.from_numpy(keys)
        return logits_NV.gather(1, ids_NV), ids_NV
    ordered = logits_NV.sort(dim=1, descending=True, stable=True)
    return ordered.values, ordered.indices
