"""LLaVA-format conversations -> token ids, labels on assistant turns, and pixels; and their collation.

Shapes: B samples, T tokens, P pictures of the batch, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from switchkd.export.control_tokens import ControlTokens
from switchkd.export.pixels import PictureError, PictureTooLarge, Preprocessing, read_pixels
from switchkd.export.prompt import PromptError, adds_special_tokens, render_chat

from .record_keys import SYSTEM_KEYS, unread_keys, unread_turn_keys

PLACEHOLDER = "<image>"  # in LLaVA's JSON, whatever the tokenizer's own image token is
IGNORED = -100
NO_TOKEN = -1
_OTHER_PLACEHOLDER = re.compile(r"^\s*<(video|audio)>\s*$", re.MULTILINE)  # as LLaVA-NeXT and ms-swift write it
_DAMAGED = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class DataError(ValueError):
    """Data that cannot be trained on; the message names it, the reason and the remedy."""


class Reason(StrEnum):
    """Why a record cannot be trained on: what is counted."""

    NOT_A_RECORD = "not a record"
    CONVERSATION = "no conversation"
    KEY = "content under a key that is not read"
    SPEAKER = "unknown speaker"
    TEXT = "damaged text"
    PLACEHOLDERS = "image tokens do not match"
    SEVERAL = "several pictures"
    NO_ANSWER = "empty answer"
    TEMPLATE = "refused by the chat template"
    CUT = "picture or every answer cut off"
    OUTSIDE = "picture outside the folder"
    MISSING = "picture missing"
    UNREADABLE = "picture unreadable"
    TOO_LARGE = "picture too large"
    TOO_SMALL = "picture too small"
    TOO_NARROW = "picture too narrow"


class BrokenRecord(DataError):
    """A record that is left out of training; `reason` is what it is counted under."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


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


def picture_of(record: dict[str, Any]) -> str | None:
    """The record's picture as it names it, a list of one included; None without. Raises BrokenRecord for several."""
    image = record.get("image")
    if isinstance(image, list):
        if len(image) > 1:
            raise BrokenRecord(
                Reason.SEVERAL, f"{_name(record)}: names {len(image)} pictures; one a record is supported"
            )
        image = image[0] if image else None
    if image is not None and not isinstance(image, str):
        raise BrokenRecord(Reason.NOT_A_RECORD, f"{_name(record)}: image is {image!r}, expected the path of a file")
    return _sound(record, image) if image else None


def to_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn a LLaVA record into chat messages; the picture's place becomes an image part before the text.

    A key `system` becomes a system turn. An assistant turn that nobody asked for is left out at the beginning, as LLaVA
    does. Raises BrokenRecord for content under a key that is not read, for a turn that cannot be read or learned from,
    or where placeholders and pictures do not match.
    """
    name = _name(record)
    if unread := unread_keys(record):
        raise _unread(record, unread, "the record")
    pictures = 0 if picture_of(record) is None else 1
    messages: list[dict[str, Any]] = []
    placeholders = 0
    for role, text in _turns(record):
        _check_places(name, role, text)
        if role == "assistant" and not any(message["role"] == "user" for message in messages):
            continue
        if role == "assistant" and not text.strip():
            raise BrokenRecord(Reason.NO_ANSWER, f"{name}: an answer is empty; it would teach to say nothing")
        placeholders += text.count(PLACEHOLDER)
        if PLACEHOLDER in text:
            text = text.replace(PLACEHOLDER, "").strip()
            messages.append({"role": role, "content": [{"type": "image"}, {"type": "text", "text": text}]})
        else:
            messages.append({"role": role, "content": text})
    if placeholders != pictures:
        raise BrokenRecord(
            Reason.PLACEHOLDERS,
            f"{name}: {placeholders} {PLACEHOLDER} placeholders for {pictures} pictures; "
            "exactly one placeholder in a human turn is supported, or none without a picture",
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise BrokenRecord(
            Reason.NO_ANSWER, f"{name}: no assistant turn after a question; there is nothing to learn from it"
        )
    return messages


def _check_places(name: str, role: str, text: str) -> None:
    """Raise BrokenRecord for a picture's place that is not the human's, and for one of video or sound."""
    if PLACEHOLDER in text and role != "user":
        raise BrokenRecord(
            Reason.PLACEHOLDERS, f"{name}: {PLACEHOLDER} in a turn of the {role}; it belongs to the human"
        )
    other = _OTHER_PLACEHOLDER.search(text) if role == "user" else None
    if other is not None and f"</{other[1]}>" not in text:  # with its end it is HTML
        raise BrokenRecord(
            Reason.PLACEHOLDERS, f"{name}: <{other[1]}> stands for what is not read; pictures alone are supported"
        )


def _turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BrokenRecord(
            Reason.CONVERSATION, f"{_name(record)}: conversations is not a list of turns, each with from and value"
        )
    read = []
    for turn in turns:
        speaker, text = turn.get("from"), turn.get("value")
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if unread := unread_turn_keys(turn, learned=role == "assistant"):
            raise _unread(record, unread, "a turn")
        if role is None:
            raise BrokenRecord(
                Reason.SPEAKER, f"{_name(record)}: a turn is from {speaker!r}; known speakers are {', '.join(ROLES)}"
            )
        if text is not None and not isinstance(text, str):
            raise BrokenRecord(Reason.CONVERSATION, f"{_name(record)}: a turn's value is {text!r:.40}, expected text")
        read.append((role, _sound(record, text or "")))
    return _with_system(record, read)


def _with_system(record: dict[str, Any], turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns, with what the record says of the system in front, unless they begin with the same."""
    for key in SYSTEM_KEYS:
        text = record.get(key)
        if text is not None and not isinstance(text, str):
            raise BrokenRecord(Reason.KEY, f"{_name(record)}: {key} is {text!r:.40}, expected text")
        if not text or turns[0] == ("system", text):
            continue
        if turns[0][0] == "system":
            raise BrokenRecord(
                Reason.KEY, f"{_name(record)}: {key} says otherwise than the system turn before it; keep one of them"
            )
        turns = [("system", _sound(record, text)), *turns]
    return turns


def _unread(record: dict[str, Any], keys: list[str], where: str) -> BrokenRecord:
    return BrokenRecord(
        Reason.KEY,
        f"{_name(record)}: {where} has content under {', '.join(keys)}, which is not read; `switchkd data convert` "
        "knows other formats, or take the key out",
    )


def _sound(record: dict[str, Any], text: str) -> str:
    """The text, unless it holds NULs or halves of surrogate pairs: a file damaged on its way, or no text at all."""
    if _DAMAGED.search(text):
        raise BrokenRecord(
            Reason.TEXT, f"{_name(record)}: NUL or half a character in its text; the file is damaged there"
        )
    return text


def _name(record: dict[str, Any]) -> str:
    return f"{record.get('id', 'record without id')!s:.80}"


def grouping_length(record: dict[str, Any]) -> int:
    """The length to group a sound record by, without a tokenizer: characters, negative without a picture.

    The sign sorts text-only samples together, as LLaVA groups by modality. LLaVA counts words; characters follow tokens
    where there are no spaces too.
    """
    size = sum(len(turn.get("value") or "") for turn in record["conversations"])
    return size if record.get("image") else -size


class ConversationEncoder:
    """Encodes conversations with a tokenizer's chat template; only assistant turns are supervised.

    The spans come from the template itself: an assistant turn is what rendering it adds to the rendering
    of everything before it with a generation prompt. Supervision ends with the first end-of-sequence token. Control
    tokens are those that the template writes; the same characters in a turn's text are text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token: str,
        tokens_per_picture: int,
        max_length: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._control = ControlTokens(_backend(tokenizer), image_token)
        self._image_token = image_token
        self._image_token_id = tokenizer.get_vocab().get(image_token, NO_TOKEN)
        self._tokens_per_picture = tokens_per_picture
        self._pictures_text = image_token * tokens_per_picture
        self._max_length = max_length

    def encode(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Token ids and labels [T] of a conversation, cut to `max_length`.

        Raises BrokenRecord where the chat template refuses the turns or rewrites earlier ones, so that no span can be
        told, and where the cut leaves no answer or a part of a picture.
        """
        ids_T, labels_T = self._whole(messages)
        if self._supervised(ids_T, labels_T) == 0:
            raise self.cut_off(len(ids_T))
        return ids_T[: self._max_length], labels_T[: self._max_length]

    def measure(self, messages: list[dict[str, Any]]) -> tuple[int, int]:
        """Tokens of the whole conversation, and how many are supervised once it is cut (0: `encode` raises `cut_off`).

        Raises BrokenRecord as `encode` does otherwise.
        """
        ids_T, labels_T = self._whole(messages)
        return len(ids_T), self._supervised(ids_T, labels_T)

    def cut_off(self, tokens: int) -> BrokenRecord:
        """What is said of a conversation of which the cut leaves nothing to learn from."""
        return BrokenRecord(
            Reason.CUT,
            f"cut from {tokens} tokens to max_length {self._max_length} it loses every answer, or part of its picture; "
            "raise max_length of data",
        )

    @property
    def max_length(self) -> int | None:
        """The longest conversation in tokens; longer ones are cut."""
        return self._max_length

    @property
    def fingerprint(self) -> str:
        """A hash of what the encoding depends on: vocabulary, chat template, tokens a picture, longest length."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        rules = [self._tokenizer.chat_template, self._pictures_text, self._max_length, self._tokenizer.eos_token_id]
        return hashlib.sha256(json.dumps([vocabulary, rules, self._control.tokens]).encode()).hexdigest()

    def _supervised(self, ids_T: list[int], labels_T: list[int]) -> int:
        """Supervised tokens of the first `max_length`; none where a picture is not whole there."""
        if self._image_token_id in ids_T[len(ids_T) if self._max_length is None else self._max_length :]:
            return 0
        return sum(label != IGNORED for label in labels_T[: self._max_length])

    def _whole(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        messages = self._control.shield(messages)
        whole = self._render(messages, generation=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:index], generation=True)
                last = index + 1 == len(messages)  # most often, and a rendering is what takes the time
                spans.append((before, whole if last else self._render(messages[: index + 1], generation=False)))
        encoded = self._control.encode(whole, add_special_tokens=adds_special_tokens(whole, self._tokenizer.bos_token))
        ids_T: list[int] = encoded.ids
        self._check_pictures(messages, ids_T)
        labels_T = [IGNORED] * len(ids_T)
        for before, until in spans:
            if not (until.startswith(before) and whole.startswith(until)):
                raise BrokenRecord(
                    Reason.TEMPLATE,
                    "the chat template changes earlier turns when a turn is added, so assistant turns cannot be told "
                    "apart; use a template that only appends (ChatML does)",
                )
            if str(self._tokenizer.eos_token or "") not in until[len(before) :]:  # so it is with LLaVA-1.5's own
                raise BrokenRecord(
                    Reason.TEMPLATE,
                    f"the chat template ends no answer with {self._tokenizer.eos_token}, so that the student would "
                    "never learn to stop; write {{ eos_token }} behind the assistant's text in chat_template.jinja",
                )
            self._supervise(ids_T, labels_T, encoded.offsets, len(before), len(until))
        return ids_T, labels_T

    def encode_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers."""
        text = self._render(self._control.shield(messages), generation=True)
        adds = adds_special_tokens(text, self._tokenizer.bos_token)
        ids_T: list[int] = self._control.encode(text, add_special_tokens=adds).ids
        return ids_T

    def _supervise(
        self, ids_T: list[int], labels_T: list[int], offsets_T: list[tuple[int, int]], start: int, end: int
    ) -> None:
        for token in range(bisect_left(offsets_T, (start, start)), len(ids_T)):
            if offsets_T[token][1] > end:
                return
            labels_T[token] = ids_T[token]
            if ids_T[token] == self._tokenizer.eos_token_id:
                return

    def _check_pictures(self, messages: list[dict[str, Any]], ids_T: list[int]) -> None:
        pictures = sum(
            part["type"] == "image"
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
        )
        found, expected = ids_T.count(self._image_token_id), pictures * self._tokens_per_picture
        if found != expected:
            raise BrokenRecord(
                Reason.PLACEHOLDERS,
                f"{found} image tokens where its pictures take {expected}; its text holds {self._image_token}, or the "
                "chat template has no place for a picture",
            )

    def _render(self, messages: list[dict[str, Any]], *, generation: bool) -> str:
        # Parts, never bare text: LLaVA-1.5's own templates read nothing else, and drop bare text without a word.
        spelled = [
            message | {"content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in messages
        ]
        try:
            # The text of transformers' apply_chat_template, in half of its time.
            text = render_chat(
                self._tokenizer.get_chat_template(),
                spelled,
                add_generation_prompt=generation,
                special_tokens=self._tokenizer.special_tokens_map,
            )
        except PromptError as error:
            raise BrokenRecord(Reason.TEMPLATE, str(error)) from None
        return text.replace(self._image_token, self._pictures_text)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise DataError(
            f"the tokenizer is a {type(tokenizer).__name__}, which does not say where in the text a token is; save it "
            "with a tokenizer.json (a fast tokenizer)"
        )
    return backend


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
        return Sample(ids_T, labels_T, None if name is None else self._pixels(record, name), _name(record))

    def _pixels(self, record: dict[str, Any], name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        try:
            return read_pixels(self._pictures / name, self._preprocessing)
        except PictureTooLarge as error:
            raise BrokenRecord(Reason.TOO_LARGE, f"{_name(record)}: {error}") from None
        except PictureError as error:
            raise BrokenRecord(Reason.UNREADABLE, f"{_name(record)}: {error}") from None


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
