"""Checkpoints that survive a kill, a full disk and a flipped byte.

A manifest with every file's size and SHA-256 is written last, when all of them are on the disk: a checkpoint without a
valid one does not exist.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from switchkd.export.folders.digests import sha256

MANIFEST = "manifest.json"
MAKE_ROOM = "make room, and the same command goes on from the last checkpoint"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written; the message names the folder, the reason and the remedy."""


@contextmanager
def writing(folder: Path, remedy: str = "") -> Iterator[None]:
    """Raise a CheckpointError for whatever goes wrong while `folder` is written, such as a full disk."""
    reason: object
    try:
        yield
        return
    except (OSError, SafetensorError) as error:
        reason = error
    except RuntimeError as error:
        # torch.save writes in C++, which knows no OSError; every other RuntimeError is none of ours.
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        reason = str(error).splitlines()[0]
    raise CheckpointError(f"{folder} could not be written: {reason}" + (f"; {remedy}" if remedy else ""))


@contextmanager
def room_for(folder: Path) -> Iterator[None]:
    """Raise a CheckpointError where a full disk ends what is done in `folder`, whoever was writing."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CheckpointError(f"{folder}: {error.strerror}; {MAKE_ROOM}") from error


def commit(folder: Path) -> None:
    """Make a checkpoint exist: put all of its files on the disk, then its manifest. Raises CheckpointError."""
    with writing(folder):
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        facts = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}
        sync_tree(folder)
        sync(folder.parent)
        write_atomically(folder / MANIFEST, json.dumps({"files": facts}, indent=1) + "\n")


def newest(work: Path, announce: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as it was committed; newer ones that are not are named, with why, and removed."""
    found = sorted(work.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.split("-")[1]))
    for place, checkpoint in reversed(list(enumerate(found))):
        reason = fault(checkpoint)
        if reason is None:
            return checkpoint
        previous = f"trying {found[place - 1].name}" if place else "no older one is left, so the stage starts anew"
        announce(f"{checkpoint} cannot be used: {reason}; {previous}")
        discard(checkpoint)
    return None


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint: the file's name and the reason; None where all are as they were committed."""
    name = MANIFEST
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
        for name, facts in files.items():
            size = (folder / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes, and had {facts['bytes']} when it was saved"
            if sha256(folder / name) != facts["sha256"]:
                return f"{name} has changed since it was saved (its SHA-256 is another)"
    except FileNotFoundError:
        return f"{name} is missing" + (", so it was cut off while it was saved" if name == MANIFEST else "")
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    except (AttributeError, KeyError, TypeError, ValueError):
        return f"{MANIFEST} is damaged"
    return None


def discard(folder: Path) -> None:
    """Remove a checkpoint, its manifest first: killed on the way, this leaves one that does not exist."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a file of which there is, at every moment, the old text or the new one. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def sync_tree(folder: Path) -> None:
    """Put everything under `folder` on the disk, and its names with it. Raises OSError."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Put a file's bytes, or a folder's names, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
