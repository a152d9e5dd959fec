"""LLaVA-format records -> chat messages, and what forbids to learn from one."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

from .record_keys import SYSTEM_KEYS, unread_keys, unread_turn_keys

PLACEHOLDER = "<image>"  # in LLaVA's JSON, whatever the tokenizer's own image token is
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


def picture_of(record: dict[str, Any]) -> str | None:
    """The record's picture as it names it, a list of one included; None without. Raises BrokenRecord for several."""
    image = record.get("image")
    if isinstance(image, list):
        if len(image) > 1:
            raise BrokenRecord(
                Reason.SEVERAL, f"{name_of(record)}: names {len(image)} pictures; one a record is supported"
            )
        image = image[0] if image else None
    if image is not None and not isinstance(image, str):
        raise BrokenRecord(Reason.NOT_A_RECORD, f"{name_of(record)}: image is {image!r}, expected the path of a file")
    return _sound(record, image) if image else None


def to_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Turn a LLaVA record into chat messages; the picture's place becomes an image part before the text.

    A key `system` becomes a system turn. An assistant turn that nobody asked for is left out at the beginning, as LLaVA
    does. Raises BrokenRecord for content under a key that is not read, for a turn that cannot be read or learned from,
    or where placeholders and pictures do not match.
    """
    name = name_of(record)
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
            Reason.CONVERSATION, f"{name_of(record)}: conversations is not a list of turns, each with from and value"
        )
    read = []
    for turn in turns:
        speaker, text = turn.get("from"), turn.get("value")
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if unread := unread_turn_keys(turn, learned=role == "assistant"):
            raise _unread(record, unread, "a turn")
        if role is None:
            raise BrokenRecord(
                Reason.SPEAKER, f"{name_of(record)}: a turn is from {speaker!r}; known speakers are {', '.join(ROLES)}"
            )
        if text is not None and not isinstance(text, str):
            raise BrokenRecord(Reason.CONVERSATION, f"{name_of(record)}: a turn's value is {text!r:.40}, expected text")
        read.append((role, _sound(record, text or "")))
    return _with_system(record, read)


def _with_system(record: dict[str, Any], turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The turns, with what the record says of the system in front, unless they begin with the same."""
    for key in SYSTEM_KEYS:
        text = record.get(key)
        if text is not None and not isinstance(text, str):
            raise BrokenRecord(Reason.KEY, f"{name_of(record)}: {key} is {text!r:.40}, expected text")
        if not text or turns[0] == ("system", text):
            continue
        if turns[0][0] == "system":
            raise BrokenRecord(
                Reason.KEY, f"{name_of(record)}: {key} says otherwise than the system turn before it; keep one of them"
            )
        turns = [("system", _sound(record, text)), *turns]
    return turns


def _unread(record: dict[str, Any], keys: list[str], where: str) -> BrokenRecord:
    return BrokenRecord(
        Reason.KEY,
        f"{name_of(record)}: {where} has content under {', '.join(keys)}, which is not read; `switchkd data convert` "
        "knows other formats, or take the key out",
    )


def _sound(record: dict[str, Any], text: str) -> str:
    """The text, unless it holds NULs or halves of surrogate pairs: a file damaged on its way, or no text at all."""
    if _DAMAGED.search(text):
        raise BrokenRecord(
            Reason.TEXT, f"{name_of(record)}: NUL or half a character in its text; the file is damaged there"
        )
    return text


def name_of(record: dict[str, Any]) -> str:
    """The record as messages name it: its id, cut to 80 characters."""
    return f"{record.get('id', 'record without id')!s:.80}"


def grouping_length(record: dict[str, Any]) -> int:
    """The length to group a sound record by, without a tokenizer: characters, negative without a picture.

    The sign sorts text-only samples together, as LLaVA groups by modality. LLaVA counts words; characters follow tokens
    where there are no spaces too.
    """
    size = sum(len(turn.get("value") or "") for turn in record["conversations"])
    return size if record.get("image") else -size
