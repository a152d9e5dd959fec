"""One record of another format -> a LLaVA record and its picture: OpenAI, ms-swift, LLaMA-Factory, TRL, the Cauldron.

Nothing of a record's content is dropped: what has no place in LLaVA's format is refused by the name of its key.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..data.conversations import PLACEHOLDER, BrokenRecord, Reason, to_messages
from ..data.record_keys import SYSTEM_KEYS, carries, unread_keys, unread_turn_keys

Turns = list[dict[str, str]]
_SPEAKERS = {
    **dict.fromkeys(("user", "human"), "human"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "gpt"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_PICTURE_KEYS = ("image", "images")
_FURTHER_PICTURE_KEYS = ("picture", "image_path", "image_paths", "image_url", "image_urls")  # beside these, its origin
_FILE_KEYS = ("path", "image", "url", "image_url", "file_name")  # of a picture that is an object, or of a part
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URI = re.compile(r"data:[^,]*;base64,")


class Converted(NamedTuple):
    """A LLaVA record, and the bytes of its picture where they are not in a file that the record names."""

    record: dict[str, Any]
    picture: bytes | None


class _Reader:
    """Reads one record: `pictures` are found on the way, `used` are the keys that were understood."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row = {key: value for key, value in row.items() if isinstance(value, (int, float)) or carries(value)}
        self.pictures: list[str | bytes] = []
        self.used: set[str] = set()

    def take(self, key: str) -> Any:
        self.used.add(key)
        return self.row.get(key)

    def text(self, key: str) -> str:
        value = self.take(key)
        if value is not None and not isinstance(value, str):
            raise BrokenRecord(Reason.CONVERSATION, f"{key} is {value!r:.40}, expected text")
        return value or ""


def to_llava(row: Mapping[str, Any], name: str) -> Converted:
    """Return a record in LLaVA's format; `name` is its id where it has none. Raises BrokenRecord."""
    reader = _Reader(row)
    turns = _turns(reader)
    for key in _PICTURE_KEYS:
        reader.pictures += _pictures(reader.take(key))
    for key in _FURTHER_PICTURE_KEYS:
        found = reader.take(key)
        reader.pictures = reader.pictures or _pictures(found)
    record: dict[str, Any] = {"id": reader.row.get("id", name)}
    for key in SYSTEM_KEYS:
        if text := reader.text(key):
            record[key] = text
    rest = {key: value for key, value in reader.row.items() if key not in reader.used}
    if unread := unread_keys(rest | {"conversations": turns}):
        raise BrokenRecord(Reason.KEY, f"content under {', '.join(unread)}, which has no place in LLaVA's format")
    plain = {key: value for key, value in rest.items() if isinstance(value, (str, int, float)) and key != "id"}
    bytes_of = _place(record, turns, reader.pictures)
    record |= {"conversations": turns} | plain
    to_messages(record)  # what training would not read is told here
    return Converted(record, bytes_of)


def _place(record: dict[str, Any], turns: Turns, pictures: list[str | bytes]) -> bytes | None:
    """Name the record's picture, and give it a place in the first question where it has none, as ms-swift does."""
    if not pictures:
        return None
    if len(pictures) > 1:
        raise BrokenRecord(Reason.SEVERAL, f"names {len(pictures)} pictures; one a record is supported")
    questions = [turn for turn in turns if turn["from"] == "human"]
    if questions and not any(PLACEHOLDER in turn["value"] for turn in questions):
        questions[0]["value"] = f"{PLACEHOLDER}\n{questions[0]['value']}"
    (picture,) = pictures
    # A name until the picture has a file of its own; whoever writes the file puts the real one there.
    record["image"] = picture if isinstance(picture, str) else "picture"
    return None if isinstance(picture, str) else picture


def _turns(reader: _Reader) -> Turns:
    for keys, read in _LAYOUTS:
        if all(key in reader.row for key in keys):
            return read(reader)
    raise BrokenRecord(
        Reason.CONVERSATION,
        f"no format that is known has its keys ({', '.join(map(str, reader.row))}); known are "
        + "; ".join(" with ".join(keys) for keys, _ in _LAYOUTS),
    )


def _chat(key: str) -> Callable[[_Reader], Turns]:
    return lambda reader: [_turn(turn, reader) for turn in _rows(reader.take(key))]


def _query(reader: _Reader) -> Turns:
    return [*_history(reader), *_asked(reader.text("query"), reader.text("response"))]


def _alpaca(reader: _Reader) -> Turns:
    question = "\n".join(part for part in (reader.text("instruction"), reader.text("input")) if part)
    return [*_history(reader), *_asked(question, reader.text("output"))]


def _completion(reader: _Reader) -> Turns:
    """TRL's: two texts, or two lists of messages."""
    if isinstance(reader.row["prompt"], str):
        return _asked(reader.text("prompt"), reader.text("completion"))
    return [*_chat("prompt")(reader), *_chat("completion")(reader)]


def _question(reader: _Reader) -> Turns:
    return _asked(reader.text("question"), reader.text("answer"))


def _texts(reader: _Reader) -> Turns:
    """The Cauldron's: questions about one picture, each with its answer."""
    turns = []
    for row in _rows(reader.take("texts")):
        turns += _asked(str(row.get("user") or ""), str(row.get("assistant") or ""))
    return turns


_LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[_Reader], Turns]], ...] = (
    (("conversations",), _chat("conversations")),
    (("messages",), _chat("messages")),
    (("conversation",), _chat("conversation")),
    (("query", "response"), _query),
    (("instruction", "output"), _alpaca),
    (("prompt", "completion"), _completion),
    (("texts",), _texts),
    (("question", "answer"), _question),
)


def _asked(question: str, answer: str) -> Turns:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _history(reader: _Reader) -> Turns:
    turns = []
    for pair in reader.take("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BrokenRecord(Reason.CONVERSATION, f"history holds {pair!r:.40}, expected pairs of texts")
        turns += _asked(*pair)
    return turns


def _rows(value: Any) -> list[Mapping[str, Any]]:
    """A list of objects; an object of lists, as some tables keep it, is one too."""
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not all(isinstance(row, Mapping) for row in value):
        raise BrokenRecord(Reason.CONVERSATION, f"its turns are {value!r:.60}, expected a list of objects")
    return value


def _turn(turn: Mapping[str, Any], reader: _Reader) -> dict[str, str]:
    said = {key: value for key, value in turn.items() if value is not None}
    role, content = ("from", "value") if "from" in said else ("role", "content")
    speaker = said.get(role)
    known = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    rest = {key: value for key, value in said.items() if key not in (role, content)}
    if unread := unread_turn_keys(rest, learned=known == "gpt"):
        raise BrokenRecord(Reason.KEY, f"a turn has content under {', '.join(unread)}, which has no place in LLaVA's")
    if known is None:
        raise BrokenRecord(Reason.SPEAKER, f"a turn is from {speaker!r}; known speakers are {', '.join(_SPEAKERS)}")
    return {"from": known, "value": _text(said.get(content), reader)}


def _text(content: Any, reader: _Reader) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise BrokenRecord(Reason.CONVERSATION, f"a turn says {content!r:.40}, expected text or a list of parts")
    pieces, seen = [], 0
    for part in content:
        kind = str(part.get("type")) if isinstance(part, Mapping) else None
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind in ("image", "image_url", "input_image"):
            reader.pictures += _pictures(part)
            seen += 1
        else:
            raise BrokenRecord(Reason.KEY, f"a part of a turn is {part!r:.60}, expected text or a picture")
    return f"{PLACEHOLDER}\n" * seen + "".join(pieces)


def _pictures(value: Any) -> list[str | bytes]:
    """Pictures by name or as bytes; a part that only marks a place holds none."""
    if value is None:
        return []
    if isinstance(value, list):
        return [picture for each in value for picture in _pictures(each)]
    if isinstance(value, Mapping):
        inside = value.get("bytes") or next((value[key] for key in _FILE_KEYS if value.get(key)), None)
        return _pictures(inside)
    if isinstance(value, bytes):
        return [value]
    if not isinstance(value, str):
        raise BrokenRecord(Reason.NOT_A_RECORD, f"a picture is {value!r:.40}, expected a file's name or its bytes")
    if found := _DATA_URI.match(value):
        try:
            return [base64.b64decode(value[found.end() :], validate=True)]
        except binascii.Error as error:
            raise BrokenRecord(Reason.UNREADABLE, f"a picture's base64 cannot be read ({error})") from None
    name = value.removeprefix("file://")
    if _ADDRESS.match(name):
        raise BrokenRecord(Reason.MISSING, f"{value:.80}: at an address; download the pictures and name the files")
    return [name] if name else []
