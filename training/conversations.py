"""LLaVA-format conversations -> token ids, labels on assistant turns, and pixels; and their collation.

Shapes: B samples, T tokens, P pictures of the batch, C channels, H height, W width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from switchkd.export.pixels import PictureError, Preprocessing, open_picture, to_pixels

PLACEHOLDER = "<image>"  # in LLaVA's JSON, whatever the tokenizer's own image token is
IGNORED = -100
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class DataError(ValueError):
    """A record that cannot be trained on; the message names the record, the reason and the remedy."""


@dataclass(frozen=True)
class Sample:
    """One conversation ready for the model: `input_ids_T`, `labels_T` (IGNORED where not supervised), a picture."""

    input_ids_T: list[int]
    labels_T: list[int]
    pixels_CHW: np.ndarray[Any, np.dtype[np.float32]] | None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read LLaVA JSON (a list) or JSONL (a record a line). Raises DataError naming the file and the reason."""
    records: list[dict[str, Any]]
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; give data.records a LLaVA-format JSON or JSONL file") from None
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON ({error}); expected a list of records, or a record a line") from None
    if not records:
        raise DataError(f"{path}: holds no records; there is nothing to train on")
    return records


def to_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn a LLaVA record into chat messages; the picture's place becomes an image part before the text.

    Raises DataError for an unknown speaker, or where placeholders and pictures do not match.
    """
    name = record.get("id", "record without id")
    pictures = 1 if record.get("image") else 0
    messages: list[dict[str, Any]] = []
    placeholders = 0
    for turn in record.get("conversations") or []:
        role = ROLES.get(turn.get("from", ""))
        if role is None:
            raise DataError(f"{name}: a turn is from {turn.get('from')!r}; known speakers are {', '.join(ROLES)}")
        text = turn.get("value") or ""
        here = text.count(PLACEHOLDER) if role == "user" else 0
        placeholders += here
        if here:
            text = text.replace(PLACEHOLDER, "").strip()
            messages.append({"role": role, "content": [{"type": "image"}, {"type": "text", "text": text}]})
        else:
            messages.append({"role": role, "content": text})
    if placeholders != pictures:
        raise DataError(
            f"{name}: {placeholders} {PLACEHOLDER} placeholders for {pictures} pictures; "
            "exactly one placeholder in a human turn is supported, or none without a picture"
        )
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise DataError(f"{name}: no assistant turn with text; there is nothing to learn from it")
    return messages


class ConversationEncoder:
    """Encodes conversations with a tokenizer's chat template; only assistant turns are supervised.

    The spans come from the template itself: an assistant turn is what rendering it adds to the rendering
    of everything before it with a generation prompt. Supervision ends with the first end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token: str,
        tokens_per_picture: int,
        max_length: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._image_token = image_token
        self._pictures_text = image_token * tokens_per_picture
        self._max_length = max_length

    def encode(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Token ids and labels [T] of a conversation, cut to `max_length`.

        Raises DataError where the chat template rewrites earlier turns, so that no span can be told.
        """
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:index], generation=True)
                spans.append((before, self._render(messages[: index + 1], generation=False)))
        whole = self._render(messages, generation=False)
        encoded = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids_T: list[int] = encoded["input_ids"]
        labels_T = [IGNORED] * len(ids_T)
        for before, until in spans:
            if not (until.startswith(before) and whole.startswith(until)):
                raise DataError(
                    "the chat template changes earlier turns when a turn is added, so assistant turns cannot be told "
                    "apart; use a template that only appends (ChatML does)"
                )
            self._supervise(ids_T, labels_T, encoded["offset_mapping"], len(before), len(until))
        return ids_T[: self._max_length], labels_T[: self._max_length]

    def encode_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers."""
        ids_T: list[int] = self._tokenizer(self._render(messages, generation=True), add_special_tokens=False)[
            "input_ids"
        ]
        return ids_T

    def _supervise(
        self, ids_T: list[int], labels_T: list[int], offsets_T: list[tuple[int, int]], start: int, end: int
    ) -> None:
        for token, (left, right) in enumerate(offsets_T):
            if left >= start and right <= end:
                labels_T[token] = ids_T[token]
                if ids_T[token] == self._tokenizer.eos_token_id:
                    return

    def _render(self, messages: list[dict[str, Any]], *, generation: bool) -> str:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        return str(text).replace(self._image_token, self._pictures_text)


class ConversationDataset(Dataset[Sample]):
    """LLaVA records with their pictures, encoded when they are asked for."""

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        pictures: Path,
        encoder: ConversationEncoder,
        preprocessing: Preprocessing,
    ) -> None:
        self._records = records
        self._pictures = pictures
        self._encoder = encoder
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self._records)

    def lengths(self) -> list[int]:
        """Each record's length in characters, near enough to group samples by; negative without a picture.

        The sign sorts text-only samples together, as LLaVA groups by modality.
        """
        signs = (1 if record.get("image") else -1 for record in self._records)
        sizes = (sum(len(turn.get("value") or "") for turn in record["conversations"]) for record in self._records)
        return [sign * size for sign, size in zip(signs, sizes, strict=True)]

    def __getitem__(self, index: int) -> Sample:
        record = self._records[index]
        ids_T, labels_T = self._encoder.encode(to_messages(record))
        if not record.get("image"):
            return Sample(ids_T, labels_T, None)
        try:
            picture = open_picture(self._pictures / record["image"])
        except PictureError as error:
            raise DataError(f"record {record.get('id', index)}: {error}") from None
        return Sample(ids_T, labels_T, to_pixels(picture, self._preprocessing))


def collator(padding_id: int) -> Callable[[Sequence[Sample]], dict[str, Tensor]]:
    """A collator that pads on the right: input_ids, attention_mask, labels [B, T]; pixel_values [P, C, H, W] if any."""

    def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
        length = max(len(sample.input_ids_T) for sample in samples)
        input_ids_BT = torch.full((len(samples), length), padding_id)
        labels_BT = torch.full((len(samples), length), IGNORED)
        attention_BT = torch.zeros(len(samples), length, dtype=torch.long)
        for row, sample in enumerate(samples):
            end = len(sample.input_ids_T)
            input_ids_BT[row, :end] = torch.tensor(sample.input_ids_T)
            labels_BT[row, :end] = torch.tensor(sample.labels_T)
            attention_BT[row, :end] = 1
        batch = {"input_ids": input_ids_BT, "attention_mask": attention_BT, "labels": labels_BT}
        pictures = [torch.from_numpy(sample.pixels_CHW) for sample in samples if sample.pixels_CHW is not None]
        return batch | ({"pixel_values": torch.stack(pictures)} if pictures else {})

    return collate
