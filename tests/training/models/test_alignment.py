"""Two spellings of one conversation: other numbers of visual tokens, the same text in the same order."""

import pytest
import torch

from switchkd.training.models.alignment import at_supervised, respell, supervised

PICTURE, OTHER = 4, -100
# Two rows: text, two pictures of two tokens with text between and after; one picture and padding.
IDS = torch.tensor([[9, 4, 4, 8, 4, 4, 7, 6], [4, 4, 5, 6, 0, 0, 0, 0]])
MASK = torch.tensor([[1] * 8, [1, 1, 1, 1, 0, 0, 0, 0]])
LABELS = torch.tensor([[OTHER] * 6 + [7, 6], [OTHER, OTHER, 5, 6] + [OTHER] * 4])


def spelled(there: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return respell(IDS, MASK, LABELS, image_token=PICTURE, here=2, there=there)


def test_the_same_number_changes_nothing() -> None:
    for got, given in zip(spelled(2), (IDS, MASK, LABELS), strict=True):
        assert got is given


def test_more_and_fewer_visual_tokens() -> None:
    ids, mask, labels = spelled(3)
    assert ids.tolist() == [[9, 4, 4, 4, 8, 4, 4, 4, 7, 6], [4, 4, 4, 5, 6, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[1] * 10, [1] * 5 + [0] * 5]
    assert labels.tolist() == [[OTHER] * 8 + [7, 6], [OTHER] * 3 + [5, 6] + [OTHER] * 5]
    ids, mask, labels = spelled(1)
    assert ids.tolist() == [[9, 4, 8, 4, 7, 6, 0], [4, 5, 6, 0, 0, 0, 0]]
    assert mask.tolist() == [[1] * 6 + [0], [1] * 3 + [0] * 4]
    assert labels.tolist() == [[OTHER] * 4 + [7, 6, OTHER], [OTHER, 5, 6] + [OTHER] * 4]


@pytest.mark.parametrize("there", [1, 2, 5])
def test_supervised_positions_keep_their_order(there: int) -> None:
    ids, _, labels = spelled(there)
    assert labels[:, 1:][supervised(labels)].tolist() == [7, 6, 5, 6]
    # The hidden state that says a token stands one before it; marked here by the token it has read.
    read = at_supervised(ids[..., None].float(), labels)
    assert read.flatten().tolist() == [4, 7, 4, 5]
    assert torch.equal(at_supervised(ids[:1, :, None].float(), labels), read[:2])


def test_rows_without_pictures_stay_as_they_are() -> None:
    ids, mask, labels = (values[1:, 2:4] for values in (IDS, MASK, LABELS))
    respelled = respell(ids, mask, labels, image_token=PICTURE, here=2, there=7)
    assert [values.tolist() for values in respelled] == [[[5, 6]], [[1, 1]], [[5, 6]]]
