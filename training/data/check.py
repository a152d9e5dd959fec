"""Checks the records of a training set before the first step: which can be trained on, and how long they are.

What is found is kept beside the run, so that a resumed run and the next stage on the same data take no time.

Shapes: N records of the files, M of them without fault, U pictures.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from switchkd.export.contract.pixels import Preprocessing

from ..recipe.recipe import DataRecipe
from .conversations import BrokenRecord, DataError, grouping_length, picture_of, to_messages
from .label_mask import ConversationEncoder
from .picture_check import Fault, check_pictures, in_parallel
from .records import Records, digest, read_records
from .sources import SOURCES, source_of

VERSION = 2  # of the rules for records; findings of other rules are not used again
NOT_COUNTED = -1  # tokens without a tokenizer
COLUMNS = ("length_N", "tokens_N", "kept_N", "source_N", "picture_N")
FIRST = 3  # broken records that an error names

Ints = npt.NDArray[np.int64]


class Finding(NamedTuple):
    """What one record is; `tokens` is its whole length, `kept` its supervised tokens within the longest allowed."""

    fault: Fault | None
    length: int
    tokens: int
    kept: int
    source: int
    picture: str | None


class Broken(NamedTuple):
    """A record that is left out."""

    file: str
    byte: int
    id: str | None
    reason: str
    detail: str


@dataclass(frozen=True)
class DataCheck:
    """All records, what each one is, and which are broken. `picture_N` is a place in `pictures`, −1 without one."""

    records: Records
    length_N: Ints
    tokens_N: Ints
    kept_N: Ints
    source_N: Ints
    picture_N: Ints
    pictures: list[str]
    broken: dict[int, Broken]

    @property
    def good_M(self) -> Ints:
        """The records that are trained on, in their order."""
        return np.setdiff1d(np.arange(len(self.records)), np.fromiter(self.broken, dtype=np.int64))

    @property
    def by_reason(self) -> dict[str, int]:
        """How many records are left out for which reason, the most frequent first."""
        return dict(Counter(row.reason for row in self.broken.values()).most_common())

    @property
    def share(self) -> float:
        """Share of broken records."""
        return len(self.broken) / len(self.records)

    def summary(self) -> str:
        """One line: how many of how many are left out, and why."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.by_reason.items())
        return f"{len(self.broken):,} of {len(self.records):,} records left out ({percent(self.share)}): {reasons}"

    def refuse_above(self, max_broken: float, listed: Path) -> None:
        """Raise DataError where more than the share `max_broken` is broken, or nothing is left."""
        if self.share <= max_broken and len(self.broken) < len(self.records):
            return
        first = "; ".join(
            row.detail if row.id is None or row.detail.startswith(row.id) else f"{row.id}: {row.detail}"
            for row in list(self.broken.values())[:FIRST]
        )
        raise DataError(
            f"{self.summary()}, more than max_broken {100 * max_broken:g} % or all. First: {first}. All of them: "
            f"{listed}. Mend or remove them, or allow more with max_broken of data"
        )


class RecordsUnderCheck(Dataset[Finding]):
    """Each record as it is found; with an encoder its tokens are counted, which takes most of the time."""

    def __init__(self, records: Records, encoder: ConversationEncoder | None) -> None:
        self._records = records
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Finding:
        """Look at one record."""
        try:
            record = self._records[index]
        except BrokenRecord as error:
            return Finding(_fault(error), 0, NOT_COUNTED, NOT_COUNTED, len(SOURCES) - 1, None)
        source = SOURCES.index(source_of(record))
        tokens, kept = NOT_COUNTED, NOT_COUNTED
        try:
            messages = to_messages(record)
            if self._encoder is not None:
                tokens, kept = self._encoder.measure(messages)
                if kept == 0:
                    raise self._encoder.cut_off(tokens)
        except BrokenRecord as error:
            return Finding(_fault(error), 0, tokens, kept, source, None)
        return Finding(None, grouping_length(record), tokens, kept, source, picture_of(record))


def _fault(error: BrokenRecord) -> Fault:
    return Fault(error.reason, str(error))


def check_data(
    data: DataRecipe,
    encoder: ConversationEncoder | None,
    memory: Path | None,
    preprocessing: Preprocessing | None = None,
) -> DataCheck:
    """Check all records and then their pictures; what is found is kept in the folder `memory`.

    Without an encoder tokens are not counted, and without `preprocessing` no picture is refused for what it becomes.
    Raises DataError for files that cannot be read at all.
    """
    files = tuple(Path(path) for path in data.records)
    kept = None if memory is None else memory / f"records-{_key(files, encoder)}.npz"
    check = _load(kept, files) if kept is not None and kept.is_file() else None
    if check is None:
        check = _check_records(read_records(*files), encoder)
        if kept is not None:
            _save(kept, check)
    faults = check_pictures(data, check.pictures, memory, preprocessing)
    affected = np.flatnonzero(np.isin(check.picture_N, list(faults))).tolist()
    broken = {number: _broken(check.records, number, faults[int(check.picture_N[number])]) for number in affected}
    return replace(check, broken=dict(sorted((check.broken | broken).items())))


def percent(share: float) -> str:
    """A share in words: two digits of a small one, so that it is no 0, and never a power of ten."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.4g} %"


def _check_records(records: Records, encoder: ConversationEncoder | None) -> DataCheck:
    columns = {name: array("q") for name in COLUMNS}
    pictures: dict[str, int] = {}
    broken: dict[int, Broken] = {}
    for number, finding in enumerate(in_parallel(RecordsUnderCheck(records, encoder), "checking records", "record")):
        picture = -1 if finding.picture is None else pictures.setdefault(finding.picture, len(pictures))
        row = (finding.length, finding.tokens, finding.kept, finding.source, picture)
        for name, value in zip(COLUMNS, row, strict=True):
            columns[name].append(value)
        if finding.fault is not None:
            broken[number] = _broken(records, number, finding.fault)
    arrays = {name: np.frombuffer(values, dtype=np.int64) for name, values in columns.items()}
    return DataCheck(records=records, **arrays, pictures=list(pictures), broken=broken)


def _broken(records: Records, number: int, fault: Fault) -> Broken:
    file, place = records.where(number)
    try:
        identity = records[number].get("id")
    except BrokenRecord:
        identity = None
    return Broken(str(file), place, None if identity is None else f"{identity!s:.80}", fault.reason, fault.detail)


def _key(files: tuple[Path, ...], encoder: ConversationEncoder | None) -> str:
    """Names what the findings depend on: what is in the files, how it is encoded, and the rules."""
    parts = [VERSION, digest(files), None if encoder is None else encoder.fingerprint]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _save(path: Path, check: DataCheck) -> None:
    """Write beside, then rename: the final name exists only when everything under it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {"pictures": check.pictures, "broken": [[number, *row] for number, row in check.broken.items()]}
    arrays = {name: getattr(check, name) for name in COLUMNS} | {"place_N3": check.records.place_N3}
    arrays |= {name: np.frombuffer(json.dumps(text).encode(), dtype=np.uint8) for name, text in texts.items()}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


def _load(path: Path, files: tuple[Path, ...]) -> DataCheck:
    with np.load(path, allow_pickle=False) as arrays:
        return DataCheck(
            records=Records(files, arrays["place_N3"]),
            **{name: arrays[name] for name in COLUMNS},
            pictures=json.loads(arrays["pictures"].tobytes()),
            broken={number: Broken(*row) for number, *row in json.loads(arrays["broken"].tobytes())},
        )
