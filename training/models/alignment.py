"""Puts two models side by side that spell the same conversation with different numbers of visual tokens.

Both are compared at supervised positions, which are text: the n-th of one belongs to the n-th of the other, wherever
they stand in the sequence.

Shapes: B rows, T tokens of a row (another number after respelling).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

IGNORED = -100  # a label that is not supervised, as torch's cross_entropy has it


class Spelling(NamedTuple):
    """Rows of a batch as token ids, attention mask and labels (not shifted, IGNORED where nothing is learned)."""

    ids_BT: Tensor
    mask_BT: Tensor
    labels_BT: Tensor

    def rows(self, chosen: slice | Tensor) -> "Spelling":
        """Some of the rows, or all in another order."""
        return Spelling(*(values_BT[chosen] for values_BT in self))


def respell(ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor, *, image_token: int, here: int, there: int) -> Spelling:
    """Return ids, mask and labels with `there` image tokens a picture in place of `here`; text stays in its order.

    Rows are padded on the right, as they came. Text tokens keep their labels, so both have the same supervised tokens.
    """
    if here == there:
        return Spelling(ids_BT, mask_BT, labels_BT)
    rows, length = ids_BT.shape
    image_BT = ids_BT == image_token
    first_BT = image_BT & ((image_BT.cumsum(1) - 1) % here == 0)
    counts_BT = torch.where(image_BT, first_BT * there, 1)
    source_S = torch.arange(rows * length, device=ids_BT.device).repeat_interleave(counts_BT.flatten())
    lengths_B = counts_BT.sum(1)
    row_S = source_S // length
    column_S = torch.arange(len(source_S), device=ids_BT.device) - pad(lengths_B.cumsum(0), (1, 0))[row_S]

    def placed(values_BT: Tensor, filling: int) -> Tensor:
        result = values_BT.new_full((rows, int(lengths_B.max())), filling)
        result[row_S, column_S] = values_BT.flatten()[source_S]
        return result

    return Spelling(placed(ids_BT, 0), placed(mask_BT, 0), placed(labels_BT, IGNORED))


def with_blank_picture(ids_BT: Tensor, mask_BT: Tensor, labels_BT: Tensor, image_token: int, tokens: int) -> Spelling:
    """Return ids, mask and labels with one row more: `tokens` image tokens and one of text, none of it supervised."""
    wider = max(0, tokens + 1 - ids_BT.shape[1])
    filled = zip((ids_BT, mask_BT, labels_BT), (0, 0, IGNORED), strict=True)
    ids_BT, mask_BT, labels_BT = (pad(values_BT, (0, wider, 0, 1), value=value) for values_BT, value in filled)
    ids_BT[-1, :tokens] = image_token
    mask_BT[-1, : tokens + 1] = 1
    return Spelling(ids_BT, mask_BT, labels_BT)


def supervised(labels_BT: Tensor) -> Tensor:
    """Return [B, T − 1], true where the next token is one to be learned."""
    return labels_BT[:, 1:] != IGNORED


def at_supervised(hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """Return hidden_ND at the positions that say the supervised tokens; the first rows may be given alone."""
    return hidden_BTD[:, :-1][supervised(labels_BT)[: len(hidden_BTD)]]
