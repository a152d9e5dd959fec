"""SHA-256 of large files, remembered beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from switchkd.export.folders.digests import sha256

_BLOB = re.compile(r"[0-9a-f]{64}")


class DigestMemory:
    """SHA-256 of files that may be large: one is read whole once, and again when its size or its time has changed.

    What was read is kept in the file `memory`, so that a teacher of 60 GB is not read at every start. A hub cache names
    its large files by their SHA-256 already; those are not read at all.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        try:
            self._known: dict[str, list[int | str]] = json.loads(memory.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):  # a memory that is damaged is none
            self._known = {}

    def knows(self, path: Path) -> bool:
        """Whether the file need not be read. Raises OSError."""
        return self._remembered(path.resolve()) is not None

    def sha256(self, path: Path) -> str:
        """The SHA-256 of a file, in hexadecimal. Raises OSError."""
        real = path.resolve()
        digest = self._remembered(real)
        if digest is None:
            facts = real.stat()  # before the reading: what is written meanwhile has another time
            digest = sha256(real)
            self._known[str(real)] = [facts.st_size, facts.st_mtime_ns, digest]
        return digest

    def _remembered(self, real: Path) -> str | None:
        if real.parent.name == "blobs" and _BLOB.fullmatch(real.name):
            return real.name
        facts = real.stat()
        known = self._known.get(str(real), [])
        return str(known[2]) if known[:2] == [facts.st_size, facts.st_mtime_ns] else None

    def text(self) -> str:
        """All that is known, as it is to be kept in the file."""
        return json.dumps(self._known, indent=1) + "\n"
