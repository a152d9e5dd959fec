"""Looks into an ONNX file without running, loading or trusting it: which operators it uses, and which files it names.

Reads the few fields of the protobuf that matter here (numbers from onnx.proto) and steps over all others, weights
included, so that a board needs neither the onnx package nor the time to read them. Spells fields, too.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Message -> field number -> the message inside.
_MESSAGES = {
    "Model": {7: "Graph", 8: "Opset", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 9: "Opset", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "External"},
}
# Message -> field number -> what its text is.
_TEXTS = {"Node": {7: "domain"}, "Opset": {1: "domain"}, "Function": {10: "domain"}, "External": {1: "key", 2: "value"}}
_DEEPEST = 40  # messages in messages; real graphs have a dozen


class OnnxWireError(ValueError):
    """A file that is no ONNX protobuf, or a cut one."""


@dataclass(frozen=True)
class OnnxNames:
    """What a graph asks of its surroundings: operator domains, and files that hold its weights."""

    domains: frozenset[str]
    locations: frozenset[str]


def read_names(path: Path) -> OnnxNames:
    """Return the domains and file names that an ONNX file mentions anywhere; raises OnnxWireError."""
    found: dict[str, set[str]] = {"domain": set(), "location": set()}
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise OnnxWireError("an empty file") from error
        with content:
            for kind, text in _texts(content, 0, len(content), "Model", 0):
                found[kind].add(text)
    return OnnxNames(frozenset(found["domain"]), frozenset(found["location"]))


def _texts(content: mmap.mmap, start: int, end: int, message: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield what the texts of a message and of those inside it are, and the texts."""
    if depth > _DEEPEST:
        raise OnnxWireError("messages too deep inside each other")
    inside, texts = _MESSAGES.get(message, {}), _TEXTS.get(message, {})
    while start < end:
        tag, start = _varint(content, start, end)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, start = _varint(content, start, end)
            continue
        if wire == 2:
            size, start = _varint(content, start, end)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise OnnxWireError(f"not a protobuf: wire type {wire}")
        stop = start + size
        if stop > end:
            raise OnnxWireError("it ends in the middle")
        if wire == 2 and inside.get(number) == "External":
            entry = dict(_texts(content, start, stop, "External", depth + 1))  # key and value in either order
            if entry.get("key") == "location":
                yield "location", entry.get("value", "")
        elif wire == 2 and number in inside:
            yield from _texts(content, start, stop, inside[number], depth + 1)
        elif wire == 2 and number in texts:
            yield texts[number], content[start:stop].decode(errors="replace")
        start = stop


def _varint(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if start + place >= end:
            raise OnnxWireError("it ends in the middle")
        byte = content[start + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, start + place + 1
    raise OnnxWireError("not a protobuf: a number of more than ten bytes")


def head(field_number: int, size: int) -> bytes:
    """How a protobuf announces a field of so many bytes that follow."""
    return _spelled(field_number << 3 | 2) + _spelled(size)


def field(field_number: int, content: bytes) -> bytes:
    """A field of bytes: a text, a message."""
    return head(field_number, len(content)) + content


def number(field_number: int, value: int) -> bytes:
    """A field of a whole number, 0 or more."""
    return _spelled(field_number << 3) + _spelled(value)


def _spelled(value: int) -> bytes:
    varint = bytearray()
    while value > 0x7F:
        varint.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*varint, value])
