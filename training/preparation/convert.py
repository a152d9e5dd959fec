"""Other formats and files -> LLaVA JSON and a folder of pictures: a record at a time, all of it or nothing.

What is written has hidden names until the last record: an interrupted run leaves nothing that looks finished.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from switchkd.export.contract.pixels import PictureError, open_header

from ..data.conversations import BrokenRecord, DataError, Reason
from ..data.records import read_records
from .layouts import Converted, to_llava

RECORDS = (".json", ".jsonl")
_READERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}  # of the datasets library
_A_FOLDER = 1000  # pictures


class Row(NamedTuple):
    """A record as it was found, or why it could not be read."""

    name: str
    content: dict[str, Any] | BrokenRecord


@dataclass
class Tally:
    """What became of the records: how many were written, refused for which reason, and of their pictures."""

    written: int = 0
    pictures_written: int = 0
    pictures_named: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first: str = ""

    @property
    def share_refused(self) -> float:
        """Share of the records that were refused."""
        refused = self.refused.total()
        return refused / max(1, refused + self.written)


def convert(
    sources: Sequence[str], out: Path, pictures: Path, *, split: str = "train", name: str | None = None
) -> Tally:
    """Write the records of files, saved data sets or the hub's as LLaVA JSON to `out`, their pictures to `pictures`.

    Refused records are listed in `refused_list(out)`. Raises DataError where a source cannot be read, where something
    would be overwritten, or where no record is left.
    """
    tally = Tally()
    with _Writer(out, pictures, tally) as writer:
        for source in sources:
            for row in tqdm(rows(source, split, name), desc=source, unit="record", disable=None):
                writer.add(row)
        if not tally.written:
            raise DataError(f"{', '.join(sources)}: no record can be converted. The first: {tally.first or 'none'}")
    return tally


def refused_list(out: Path) -> Path:
    """Where the records that were refused are listed."""
    return out.with_name(f"{out.stem}.refused.jsonl")


def rows(source: str, split: str, name: str | None) -> Iterator[Row]:
    """Every record of a source, one at a time. Raises DataError."""
    path = Path(source)
    if path.suffix.lower() in RECORDS:
        yield from _records(path)
        return
    from datasets.exceptions import DatasetsError  # as heavy as all the rest, and only needed here

    try:
        for number, content in enumerate(_table(path, split, name)):
            yield Row(f"{path.stem}-{number}", content)
    except (DatasetsError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{source}: cannot be read: {' '.join(str(error).split()):.300}") from None


def _records(path: Path) -> Iterator[Row]:
    records = read_records(path)
    for index in range(len(records)):
        content: dict[str, Any] | BrokenRecord
        try:
            content = records[index]
        except BrokenRecord as error:
            content = error
        yield Row(f"{path.stem}-{index}", content)


def _table(path: Path, split: str, name: str | None) -> Any:
    """A table of the datasets library, read piece by piece; pictures stay the bytes that they are."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are told below, in one line
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        files = sorted(map(str, path.rglob("*.parquet")))
        if not files:
            return _saved(path, split).decode(False)
        loaded = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    elif reader is not None:
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
        more = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
        loaded = datasets.load_dataset(reader, data_files=str(path), split="train", streaming=True, **more)
    elif path.is_file() or path.is_absolute() or len(path.parts) > 2:
        known = ", ".join([*RECORDS, *_READERS])
        raise DataError(f"{path}: neither a file of {known} nor a folder with a data set; unpack or fetch it first")
    else:
        loaded = datasets.load_dataset(str(path), name, split=split, streaming=True)
    return loaded.decode(False)


def _saved(folder: Path, split: str) -> Any:
    """What `save_to_disk` wrote."""
    import datasets

    if not any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        raise DataError(f"{folder}: holds no .parquet files, and no data set that the datasets library has saved")
    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{folder}: has no split {split!r}; there are: {', '.join(loaded)}; give --split")
        loaded = loaded[split]
    return loaded.to_iterable_dataset()


class _Writer(AbstractContextManager["_Writer"]):
    """Writes records, pictures and the list of refusals under hidden names, and names them when all went well."""

    def __init__(self, out: Path, pictures: Path, tally: Tally) -> None:
        if out.suffix.lower() not in RECORDS:
            raise DataError(f"--out is {out}, expected a name in .json (a list) or .jsonl (a record a line)")
        self._final = [pictures, refused_list(out), out]  # the records last: they name the rest
        self._partial = [path.with_name(f".{path.name}.partial") for path in self._final]
        self._pictures, self._refusals, self._records = self._partial
        self._tally = tally
        self._lines = out.suffix.lower() == ".jsonl"
        for path in (out, refused_list(out)):
            _check_free(path)
        self._clear()
        for path in self._final:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._records.open("w", encoding="utf-8", errors="replace")

    def add(self, row: Row) -> None:
        """Write a record, or why it is none."""
        try:
            if isinstance(row.content, BrokenRecord):
                raise row.content
            converted = to_llava(row.content, row.name)
            self._keep(converted)
            text = json.dumps(converted.record, ensure_ascii=False)
        except BrokenRecord as error:
            self._refuse(row.name, error)
            return
        before = "" if self._lines else ",\n" if self._tally.written else "[\n"
        self._file.write(before + text + ("\n" if self._lines else ""))
        self._tally.written += 1

    def _keep(self, converted: Converted) -> None:
        if converted.picture is None:
            self._tally.pictures_named += "image" in converted.record
            return
        try:
            with open_header(converted.picture) as picture:
                kind = str(picture.format).lower()
        except PictureError as error:
            raise BrokenRecord(Reason.UNREADABLE, str(error)) from None
        number = self._tally.pictures_written
        if number == 0:
            _check_free(self._final[0])
        name = f"{number // _A_FOLDER:06}/{number:09}.{'jpg' if kind == 'jpeg' else kind}"
        file = self._pictures / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(converted.picture)
        converted.record["image"] = name
        self._tally.pictures_written += 1

    def _refuse(self, name: str, error: BrokenRecord) -> None:
        self._tally.refused[error.reason] += 1
        self._tally.first = self._tally.first or f"{name}: {error}"
        with self._refusals.open("a", encoding="utf-8", errors="replace") as listed:
            row = {"record": name, "reason": error.reason, "detail": str(error)}
            listed.write(json.dumps(row, ensure_ascii=False) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._lines:
            self._file.write("\n]\n")
        self._file.close()
        if kind is None:
            for partial, final in zip(self._partial, self._final, strict=True):
                if partial.exists():
                    partial.rename(final)
        self._clear()

    def _clear(self) -> None:
        """Remove what an interrupted run has left."""
        for path in self._partial:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _check_free(path: Path) -> None:
    if path.exists():
        raise DataError(f"{path} exists, and nothing is overwritten; give another name, or move it away")
