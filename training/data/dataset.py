"""Records and their pictures as what the model takes: samples, read when they are asked for, and their collation.

Shapes: B samples, T tokens, P pictures of the batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from switchkd.export.contract.pixels import PictureError, PictureTooLarge, Preprocessing, read_pixels

from ..models.alignment import IGNORED
from .conversations import BrokenRecord, Reason, grouping_length, name_of, picture_of, to_messages
from .label_mask import ConversationEncoder


@dataclass(frozen=True)
class Sample:
    """One conversation ready for the model: `input_ids_T`, `labels_T` (IGNORED where not supervised), a picture.

    `lost` marks what stands in for one that could not be read: it alone may have no label.
    """

    input_ids_T: list[int]
    labels_T: list[int]
    pixels_CHW: np.ndarray[Any, np.dtype[np.float32]] | None
    sample_id: str = "unnamed"  # for messages
    lost: bool = False


class ConversationDataset(Dataset[Sample]):
    """LLaVA records with their pictures, encoded when they are asked for."""

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        pictures: Path,
        encoder: ConversationEncoder,
        preprocessing: Preprocessing,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self._records = records
        self._lengths = lengths
        self._pictures = pictures
        self._encoder = encoder
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self._records)

    def lengths(self) -> Sequence[int]:
        """Each record's `grouping_length`: the ones that were handed in, or read from the records."""
        return [grouping_length(record) for record in self._records] if self._lengths is None else self._lengths

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        ids_T, labels_T = self._encoder.encode(to_messages(record))
        name = picture_of(record)
        return Sample(ids_T, labels_T, None if name is None else self._pixels(record, name), name_of(record))

    def _pixels(self, record: dict[str, Any], name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        try:
            return read_pixels(self._pictures / name, self._preprocessing)
        except PictureTooLarge as error:
            raise BrokenRecord(Reason.TOO_LARGE, f"{name_of(record)}: {error}") from None
        except PictureError as error:
            raise BrokenRecord(Reason.UNREADABLE, f"{name_of(record)}: {error}") from None


def collator(padding_id: int) -> Callable[[Sequence[Sample]], dict[str, Any]]:
    """A collator that pads on the right: input_ids, attention_mask, labels [B, T]; pixel_values [P, C, H, W] if any.

    `sample_ids`, a list of B names, and `lost`, as many truths, are for messages and not for the model.
    """

    def collate(samples: Sequence[Sample]) -> dict[str, Any]:
        length = max(len(sample.input_ids_T) for sample in samples)
        input_ids_BT = torch.full((len(samples), length), padding_id)
        labels_BT = torch.full((len(samples), length), IGNORED)
        attention_BT = torch.zeros(len(samples), length, dtype=torch.long)
        for row, sample in enumerate(samples):
            end = len(sample.input_ids_T)
            input_ids_BT[row, :end] = torch.tensor(sample.input_ids_T)
            labels_BT[row, :end] = torch.tensor(sample.labels_T)
            attention_BT[row, :end] = 1
        batch: dict[str, Any] = {"input_ids": input_ids_BT, "attention_mask": attention_BT, "labels": labels_BT}
        batch |= {"sample_ids": [sample.sample_id for sample in samples], "lost": [sample.lost for sample in samples]}
        pictures = [torch.from_numpy(sample.pixels_CHW) for sample in samples if sample.pixels_CHW is not None]
        return batch | ({"pixel_values": torch.stack(pictures)} if pictures else {})

    return collate
