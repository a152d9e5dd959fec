"""The leading tokens of each position on a CPU: what `knee` does to every logit, through numpy.

numpy's sorts, comparisons and counts use the whole vector unit, where torch's take three to ten times as long on a CPU.
Rows are taken in slices that fit its cache; sharing the slices out among threads gained nothing.

Shapes: N positions (rows) or those of one slice, V vocabulary, K the widest row's number of leading tokens,
S survivors of the widest row, M survivors of all rows, T levels.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Result = TypeVar("Result")

# Logits that are worked on at a time: half a megabyte.
ELEMENTS_IN_CACHE = 2**17
# numpy finds the true entries of a mask without branches if they are more than a tenth of it, and then in half the
# time. So at least this part of a row survives: sorting more than needed costs less.
DENSE = 1 / 9


def first_lowest(sorted_NS: Any, vocabulary: int, span_N1: Any) -> Any:
    """Return the knee of descending logits, numpy's or torch's: the argmin of z_i + i/(V−1)·span, first of equals.

    That is the largest gap below the chord. In logits, not divided by highest − lowest: the same place, and an
    all-equal row needs no exception. Where nothing lies further below the chord than rounding reaches, it is the first.
    """
    rows, width = sorted_NS.shape
    if isinstance(sorted_NS, torch.Tensor):
        x_S: Any = torch.arange(width, dtype=sorted_NS.dtype, device=sorted_NS.device)
        row_N: Any = torch.arange(rows, device=sorted_NS.device)
        eps = torch.finfo(sorted_NS.dtype).eps
    else:
        x_S, row_N = np.arange(width, dtype=sorted_NS.dtype), np.arange(rows)
        eps = np.finfo(sorted_NS.dtype).eps
    height_NS = x_S / max(vocabulary - 1, 1) * span_N1
    height_NS += sorted_NS
    knee_N = height_NS.argmin(1)
    highest_N, span_N = sorted_NS[:, 0], span_N1[:, 0]
    # The chord is at the height of its first point. Three roundings of the span and one of the sum make a height.
    rounding_N = eps * (abs(highest_N) + 2 * span_N)
    return knee_N * (height_NS[row_N, knee_N] < highest_N - rounding_N)


def sorted_values(logits_NV: Floats) -> Floats:
    """Return every row's logits in descending order."""
    result = np.empty(logits_NV.shape, dtype=logits_NV.dtype)

    def of(rows: slice) -> None:
        _sort_descending(logits_NV[rows], result[rows])

    _over_rows(of, *logits_NV.shape)
    return result


def _sort_descending(logits_NV: Floats, result_NV: Floats) -> Floats:
    # numpy sorts upwards.
    np.negative(logits_NV, out=result_NV)
    result_NV.sort(axis=1)
    return np.negative(result_NV, out=result_NV)


def count_from(logits_NV: Floats, level_NT: Floats) -> Ints:
    """Return [N, T], how many logits of each row reach each of its levels."""
    count_NT = np.empty(level_NT.shape, dtype=np.int64)

    def of(rows: slice) -> None:
        reached_V = np.empty(logits_NV.shape[1], dtype=bool)
        # Row by row: along an axis numpy counts ten times as slowly.
        for row in range(*rows.indices(len(logits_NV))):
            for t, level in enumerate(level_NT[row]):
                count_NT[row, t] = np.count_nonzero(np.greater_equal(logits_NV[row], level, out=reached_V))

    _over_rows(of, *logits_NV.shape)
    return count_NT


def leading(
    logits_NV: Floats, floor_N1: Floats | None, span_N1: Floats | None, window: int, min_k: int, max_k: int | None
) -> tuple[Ints, Ints]:
    """Return each row's leading tokens, padded with its first, and their numbers.

    The knee is sought among the top `window`. At least so many logits reach `floor_N1`; or, with `span_N1`, highest
    minus lowest, all that can be the knee do. Without a floor one is found by sorting the values, which takes a third
    of the time of sorting them with their ids.
    """
    vocabulary = logits_NV.shape[1]

    def bounded(knee_N: Ints) -> Ints:
        return np.clip(knee_N + 1, min_k, max_k).clip(max=window)

    def of(rows: slice) -> tuple[Ints, Ints]:
        slice_NV = logits_NV[rows]
        if floor_N1 is None:
            sorted_NV = _sort_descending(slice_NV, np.empty_like(slice_NV))
            k_N = bounded(
                first_lowest(sorted_NV[:, :window], window, sorted_NV[:, :1] - sorted_NV[:, window - 1, None])
            )
            last_N1 = np.maximum(k_N, int(vocabulary * DENSE))[:, None] - 1
            ids_NS, _ = _sorted_from(slice_NV, np.take_along_axis(sorted_NV, last_N1, axis=1))
        else:
            ids_NS, count_N = _sorted_from(slice_NV, floor_N1[rows])
            sorted_NS = _at(slice_NV, ids_NS, count_N)[:, :window]
            span = sorted_NS[:, :1] - sorted_NS[:, -1:] if span_N1 is None else span_N1[rows]
            k_N = bounded(first_lowest(sorted_NS, window, span))
        return ids_NS[:, : k_N.max()], k_N

    parts = _over_rows(of, *logits_NV.shape)
    k_N = np.concatenate([k for _, k in parts])
    ids_NK = np.empty((len(k_N), k_N.max()), dtype=np.int64)
    start = 0
    for ids, k in parts:
        stop, width = start + len(ids), ids.shape[1]
        ids_NK[start:stop, :width] = ids
        np.copyto(ids_NK[start:stop], ids[:, :1], where=np.arange(ids_NK.shape[1]) >= k[:, None])
        start = stop
    return ids_NK, k_N


def _sorted_from(logits_NV: Floats, floor_N1: Floats) -> tuple[Ints, Ints]:
    """Return the ids of the logits that reach each row's floor, by descending logit, then ascending id; and how many.

    Behind the survivors of narrower rows are no valid ids.
    """
    rows, vocabulary = logits_NV.shape
    flat_M = np.flatnonzero(logits_NV >= floor_N1)
    # numpy's sort of integers is vectorised, its argsort hardly: so the order-preserving bits of the logit and below
    # them the token's id are packed into one. Adding 0 turns -0 into 0.
    bits_M = (logits_NV.reshape(-1)[flat_M] + np.float32(0)).view(np.int32)
    key_M = (~(bits_M ^ ((bits_M >> 31) & 0x7FFFFFFF))).astype(np.int64)
    key_M <<= 32
    start = np.searchsorted(flat_M, np.arange(rows + 1) * vocabulary)
    count_N = np.diff(start)
    if rows == 1:
        key_M |= flat_M
        keys_NS = key_M[None]
    else:
        width = int(count_N.max())
        key_M |= flat_M - np.repeat(np.arange(rows) * vocabulary, count_N)
        keys_NS = np.full((rows, width), np.iinfo(np.int64).max)
        keys_NS.reshape(-1)[np.arange(len(key_M)) + np.repeat(np.arange(rows) * width - start[:-1], count_N)] = key_M
    keys_NS.sort(axis=1)
    keys_NS &= 0xFFFFFFFF
    return keys_NS, count_N


def _at(logits_NV: Floats, ids_NS: Ints, count_N: Ints) -> Floats:
    """Return the logits of each row's first `count_N` ids; inf behind them, which is never a knee."""
    if len(ids_NS) == 1:
        only_NS: Floats = logits_NV[0].take(ids_NS)
        return only_NS
    sorted_NS: Floats = np.take_along_axis(logits_NV, np.minimum(ids_NS, logits_NV.shape[1] - 1), axis=1)
    sorted_NS[np.arange(ids_NS.shape[1]) >= count_N[:, None]] = np.inf
    return sorted_NS


def _over_rows(work: Callable[[slice], Result], rows: int, vocabulary: int) -> list[Result]:
    """Do the work on slices of the rows and return the results in order."""
    step = max(1, ELEMENTS_IN_CACHE // vocabulary)
    return [work(slice(start, min(start + step, rows))) for start in range(0, rows, step)]
