"""LLaVA-format record files, JSON lists or JSONL, of any size: in memory is only where each record is.

A record is read from its file when it is asked for, so that the workers of a DataLoader share one small array and the
system's page cache, and a file of a gigabyte is never held (benchmarks/data_loading.py measures it).
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from switchkd.export.folders.digests import sha256

from .conversations import BrokenRecord, DataError, Reason

WINDOW = 8 * 2**20  # bytes of a JSON list that are looked at together
LONGEST_RECORD = 64 * 2**20  # bytes; what ends nowhere within them is not JSON
_BETWEEN = frozenset(" \t\r\n,")
_MARK = b"\xef\xbb\xbf"  # of UTF-8, at a file's beginning
_MARKS = frozenset(_MARK.decode("latin-1"))
_LIST_OF_RECORDS = re.compile(rb"\s*\[\s*(\{|$)")
# What begins like these is no JSON, whatever it is called; and the way out.
_OTHER_FILES = (
    (b"PAR1", "a Parquet file", "`switchkd data convert {path} --out FILE.json` makes LLaVA JSON of it"),
    (b"ARROW1", "an Arrow file", "`switchkd data convert {path} --out FILE.json` makes LLaVA JSON of it"),
    (b"\x1f\x8b", "compressed by gzip", "records are read in place: unpack it (gunzip -k {path})"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "records are read in place: unpack it (unzstd {path})"),
    (b"\xfd7zXZ\0", "compressed by xz", "records are read in place: unpack it (unxz -k {path})"),
    (b"BZh", "compressed by bzip2", "records are read in place: unpack it (bunzip2 -k {path})"),
    (b"PK\x03\x04", "a ZIP archive", "records are read in place: unpack it (unzip {path})"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file it stands for (git lfs pull)"),
)
# Lax about control characters in texts: the check of the texts themselves names those that do harm.
_DECODER = json.JSONDecoder(strict=False)


class Records(Sequence[dict[str, Any]]):
    """The records of one or several files, read when they are asked for; `place_N3` holds file, first byte, bytes."""

    def __init__(self, files: tuple[Path, ...], place_N3: npt.NDArray[np.int64]) -> None:
        self.files = files
        self.place_N3 = place_N3

    def __len__(self) -> int:
        return len(self.place_N3)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | Records:
        """Read a record. Raises BrokenRecord where there is none to read."""
        if isinstance(index, slice):
            return self.only(np.arange(len(self))[index])
        file, start, size = self.place_N3[index].tolist()
        # Opened each time: nothing to pass to workers, and nothing that goes stale on a network disk.
        with self.files[file].open("rb", buffering=0) as source:
            source.seek(start)
            text = source.read(size)
        try:
            record = _DECODER.decode(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise BrokenRecord(Reason.NOT_A_RECORD, f"{self.name(index)}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise BrokenRecord(
                Reason.NOT_A_RECORD, f"{self.name(index)}: a {type(record).__name__}, expected an object"
            )
        return record

    def only(self, indices: npt.NDArray[np.int64]) -> Records:
        """The records of these indices, in this order."""
        return Records(self.files, self.place_N3[indices])

    def where(self, index: int) -> tuple[Path, int]:
        """The record's file and its first byte there."""
        file, start, _ = self.place_N3[index].tolist()
        return self.files[file], start

    def name(self, index: int) -> str:
        """Where a record is, for those without an id of their own."""
        file, start = self.where(index)
        return f"{file.name} at byte {start}"


def read_records(*files: Path) -> Records:
    """Find the records of LLaVA JSON (a list) or JSONL (a record a line). Raises DataError with file and reason."""
    places = array("q")  # as compact while it grows as it is in the end
    for number, path in enumerate(files):
        before = len(places)
        for start, size in _scan(path):
            places.extend((number, start, size))
        if len(places) == before:
            raise DataError(f"{path}: holds no records; there is nothing to train on")
    return Records(files, np.frombuffer(places, dtype=np.int64).reshape(-1, 3))


def digest(files: Sequence[Path]) -> str:
    """A hash of what is in the files. Raises DataError for a file that is not there."""
    hashes = []
    for path in files:
        _check_file(path)
        hashes.append(sha256(path))
    return " ".join(hashes)


def check_is_text(path: Path) -> None:
    """Raise DataError with the way out for a file of another kind than JSON: columns, archives, compressed ones."""
    with path.open("rb") as source:
        head = source.read(64)
    for beginning, what, remedy in _OTHER_FILES:
        if head.startswith(beginning):
            raise DataError(f"{path}: {what}, expected LLaVA-format JSON or JSONL; {remedy.format(path=path)}")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; give data.records a LLaVA-format JSON or JSONL file")


def _scan(path: Path) -> Iterator[tuple[int, int]]:
    """First byte and bytes of every record."""
    _check_file(path)
    check_is_text(path)
    with path.open("rb") as source:
        head = source.read(4096).removeprefix(_MARK).lstrip()
    return _scan_lists(path) if head.startswith(b"[") else _scan_lines(path)


def _scan_lines(path: Path) -> Iterator[tuple[int, int]]:
    start = 0
    with path.open("rb") as source:
        for line in source:
            mark = len(_MARK) if line.startswith(_MARK) else 0
            if _LIST_OF_RECORDS.match(line, mark):
                raise DataError(
                    f"{path}: a list of records begins at byte {start + mark}, in a file with a record a line; "
                    "give the two as files of their own"
                )
            if line[mark:].strip():
                yield start + mark, len(line) - mark
            start += len(line)


def _scan_lists(path: Path) -> Iterator[tuple[int, int]]:
    """The records of a list and of whatever follows it: further lists, or a record a line (`cat a.json b.jsonl`)."""
    # Read as Latin-1 a byte is a character, so that places are bytes; what JSON is made of is ASCII in UTF-8 too.
    inside = False
    with path.open("rb") as source:
        first, text, place = 0, "", 0  # the byte of the text's beginning, what is looked at, and where
        while True:
            while place < len(text) and (text[place] in _BETWEEN or (not inside and text[place] in _MARKS)):
                place += 1
            if text[place : place + 1] == ("]" if inside else "["):
                inside, place = not inside, place + 1
                continue
            try:
                _, end = _DECODER.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                more = source.read(WINDOW).decode("latin-1")
                if not more and not inside and place == len(text):
                    return
                if not more or len(text) - place > LONGEST_RECORD:
                    raise _not_json(path, first + place, error) from None
                first, text, place = first + place, text[place:] + more, 0
            else:
                if not inside and text[place] != "{":
                    raise DataError(f"{path}: neither a record nor a list of records at byte {first + place}")
                yield first + place, end - place
                place = end


def _not_json(path: Path, place: int, error: BaseException) -> DataError:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(
        f"{path}: not valid JSON in the record at byte {place} ({reason}); "
        "expected a list of records, or a record a line (was the file cut off?)"
    )
