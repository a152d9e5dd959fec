"""Looks at every picture once before training, in parallel, and remembers what it found while the file is the same.

Shapes: U pictures, each counted once however many records name it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from switchkd.export.contract.pixels import (
    PictureError,
    PictureTooLarge,
    Preprocessing,
    check_growth,
    decode,
    open_header,
)

from ..process.stopping import leave_stopping_to_the_trainer
from ..recipe.recipe import DataRecipe
from .conversations import Reason

MOST_WORKERS = 64
FEW = 2000  # what one process looks at before a second one is worth its start
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_PADDING = b"\0\n\r "  # what some programs leave after the end


class Fault(NamedTuple):
    """What is wrong: what it is counted under, and the words for this one."""

    reason: Reason
    detail: str


class Seen(NamedTuple):
    """A picture file as it was looked at; bytes and time of change say whether it still is the same (−1: no file)."""

    size: int
    time_ns: int
    fault: Fault | None


def locate(root: Path, name: str, *, follow_links: bool) -> tuple[Path, os.stat_result] | Fault:
    """The file in `root`, an absolute path, that a record names; a Fault where it leads out or cannot be reached."""
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root):
        return Fault(Reason.OUTSIDE, f"{name}: outside {root}; only pictures in data.pictures are read")
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return Fault(Reason.MISSING, f"{name}: not in {root}")
    except OSError as error:
        return Fault(Reason.UNREADABLE, f"{name}: {error.strerror}")
    real = path.resolve() if path.is_symlink() else _real(path.parent) / path.name
    if not follow_links and not real.is_relative_to(_real(root)):
        return Fault(
            Reason.OUTSIDE,
            f"{name}: a symbolic link leads out of {root}; if it is yours, set follow_links of data: true",
        )
    return path, status


@cache
def _real(folder: Path) -> Path:
    return folder.resolve()


def examine(path: Path, data: DataRecipe, preprocessing: Preprocessing | None = None) -> Fault | None:
    """Look at one picture file as `data.check` says; what is wrong with it, or None.

    With the model's `preprocessing` a picture is also refused that only this makes too large.
    """
    try:
        with open_header(path) as picture:
            fault = _odd_size(path, picture.size, data)
            if fault is None and preprocessing is not None:
                check_growth(picture.size, preprocessing, str(path))
            # Without the usual end a file is cut off, or only unusual: decoding tells.
            if fault is None and (data.check == "full" or not _ends_well(path, str(picture.format))):
                decode(picture, path)
    except PictureTooLarge as error:
        return Fault(Reason.TOO_LARGE, str(error))
    except PictureError as error:
        return Fault(Reason.UNREADABLE, str(error))
    return fault


def _odd_size(path: Path, size: tuple[int, int], data: DataRecipe) -> Fault | None:
    (short, long), text = sorted(size), f"{path}: {size[0]} x {size[1]}"
    if short * long > data.max_pixels:
        return Fault(Reason.TOO_LARGE, f"{text} is more than max_pixels {data.max_pixels:,}; scale it down")
    if short < data.min_side:
        return Fault(Reason.TOO_SMALL, f"{text}, a side below min_side {data.min_side}")
    if long > data.max_aspect * short:
        return Fault(Reason.TOO_NARROW, f"{text}, one side above max_aspect {data.max_aspect:g} times the other")
    return None


def _ends_well(path: Path, kind: str) -> bool:
    end = _ENDS.get(kind)
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 64))
        return end is not None and file.read().rstrip(_PADDING).endswith(end)


class PicturesUnderCheck(Dataset["Seen | None"]):
    """Each picture as it is found; None where it is as it was in `known_U2` (bytes, time of change)."""

    def __init__(
        self,
        data: DataRecipe,
        names: Sequence[str],
        known_U2: np.ndarray[Any, np.dtype[np.int64]],
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self._data = data
        self._preprocessing = preprocessing
        self._root = root_of(data)
        self._names = names
        self._known_U2 = known_U2

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Seen | None:
        """Look at one picture, unless it is known."""
        found = locate(self._root, self._names[index], follow_links=self._data.follow_links)
        if isinstance(found, Fault):
            return Seen(-1, -1, found)
        path, status = found
        if (status.st_size, status.st_mtime_ns) == tuple(self._known_U2[index]):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata of a picture that is read all the same
            return Seen(status.st_size, status.st_mtime_ns, examine(path, self._data, self._preprocessing))


def root_of(data: DataRecipe) -> Path:
    """The pictures' folder as an absolute path; links in it are kept."""
    return Path(os.path.abspath(data.pictures or "."))  # noqa: PTH100 - resolve() would follow links


def check_pictures(
    data: DataRecipe, names: Sequence[str], memory: Path | None, preprocessing: Preprocessing | None = None
) -> dict[int, Fault]:
    """What is wrong with which of the pictures, by their place in `names`.

    What is found is kept in the folder `memory`, line by line, so that an interrupted check goes on and a second one
    only asks whether the files are the same.
    """
    known = _Known(None if memory is None else memory / f"pictures-{_key(data, preprocessing)}.jsonl")
    before = [known.pictures.get(name, Seen(-2, -2, None)) for name in names]
    known_U2 = np.array([seen[:2] for seen in before], dtype=np.int64).reshape(-1, 2)
    faults: dict[int, Fault] = {}
    found = in_parallel(PicturesUnderCheck(data, names, known_U2, preprocessing), "checking pictures", "picture")
    for number, seen in enumerate(found):
        if seen is not None and seen.size >= 0:
            known.keep(names[number], seen)
        fault = before[number].fault if seen is None else seen.fault
        if fault is not None:
            faults[number] = fault
    known.close()
    return faults


def in_parallel(dataset: Dataset[Any], title: str, unit: str) -> Iterator[Any]:
    """Every item of a dataset in order, made by a process for each core, with a progress bar on a terminal."""
    count = len(dataset)  # type: ignore[arg-type]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores, MOST_WORKERS, count // FEW)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=256,
        num_workers=workers if workers > 1 else 0,
        collate_fn=list,
        generator=torch.Generator(),  # the run's own random numbers are left alone
        worker_init_fn=leave_stopping_to_the_trainer,
    )
    with tqdm(total=count, desc=title, unit=unit, disable=None) as bar:
        for batch in loader:
            yield from batch
            bar.update(len(batch))


def _key(data: DataRecipe, preprocessing: Preprocessing | None) -> str:
    """Names what the findings depend on: the folder, the rules, the size asked for, and the version of what decodes."""
    rules = [data.check, data.max_pixels, data.min_side, data.max_aspect, data.follow_links]
    rules += [None if preprocessing is None else preprocessing.size]
    return hashlib.sha256(json.dumps([str(root_of(data)), rules, PIL.__version__]).encode()).hexdigest()[:16]


class _Known:
    """Findings on disk, a line each, the last one of a picture counting; a line that was cut off is left out."""

    def __init__(self, path: Path | None) -> None:
        self.pictures: dict[str, Seen] = {}
        self._file = None
        if path is None:
            return
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._read(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._file.write("\n")  # apart from a line that was cut off

    def _read(self, line: str) -> None:
        try:
            name, size, time_ns, reason, detail = json.loads(line)
        except ValueError:
            return
        self.pictures[name] = Seen(size, time_ns, None if reason is None else Fault(Reason(reason), detail))

    def keep(self, name: str, seen: Seen) -> None:
        """Write a finding down."""
        if self._file is not None:
            reason, detail = seen.fault or (None, None)
            self._file.write(json.dumps([name, seen.size, seen.time_ns, reason, detail]) + "\n")

    def close(self) -> None:
        """Let everything reach the file."""
        if self._file is not None:
            self._file.close()
