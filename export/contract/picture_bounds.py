"""What opening a stranger's picture may take: Pillow's readers follow a file wherever it leads, step by step."""

import io
import os
import sys
from collections.abc import Callable
from typing import IO, Any

from PIL import Image, PngImagePlugin, TiffImagePlugin

HEADER_READS = 5_000  # a header has some dozens of parts; XMP in a GIF or notes of a camera may make it a thousand
HEADER_BYTES = 2**22  # a profile for print has 2 MB
DECODING_READS = 5_000
BYTES_A_READ = 2_048  # of a large file, while it is decoded: PNG's pieces, of three reads, have 8 KB
MOST_EXIF = 2**19  # bytes; a JPEG holds 64 KB of it, if it goes by the book
MOST_TEXT = 2**22  # bytes of a PNG's texts, unpacked
_UNIT = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}  # bytes, by TIFF type


class TooManyParts(ValueError):
    """A picture in more parts than one is read in: a million of them would take minutes."""


class BoundedFile(io.BytesIO):
    """A picture file in memory that can be read so many times, and so much of it as a header. Raises TooManyParts."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._length = len(content)
        self._reads = HEADER_READS
        self._bytes = HEADER_BYTES

    def allow_decoding(self) -> None:
        """Let the pixels be read, now that the header has been."""
        self._reads = DECODING_READS + self._length // BYTES_A_READ
        self._bytes = sys.maxsize  # blocks are asked for beyond the end

    def read(self, size: int | None = -1, /) -> bytes:
        """Read as files do; what is read as a whole at once is no header."""
        self._reads -= 1
        self._bytes -= max(0, size or 0)
        if self._reads < 0 or self._bytes < 0:
            raise TooManyParts("it is in too many parts, or too large ones")
        return super().read(size)


def bound_pillow() -> None:
    """Let Pillow take little more memory for the notes in pictures than they have bytes, in the whole process.

    It is for processes that strangers send pictures to. Tags of EXIF may all mean the same bytes, of which Pillow keeps
    a copy each: 1 MB becomes 5 GB.
    """
    PngImagePlugin.MAX_TEXT_MEMORY = MOST_TEXT
    directory: Any = TiffImagePlugin.ImageFileDirectory_v2
    if directory.load is not _load_directory:
        _originals["directory"], directory.load = directory.load, _load_directory
        exif: Any = Image.Exif
        _originals["exif"], exif.load = exif.load, _load_exif


_originals: dict[str, Callable[..., None]] = {}


def _load_exif(exif: Image.Exif, data: bytes | None) -> None:
    if data is not None and len(data) > MOST_EXIF:
        raise ValueError(f"EXIF of {len(data):,} bytes")
    _originals["exif"](exif, data)


def _load_directory(directory: Any, file: IO[bytes]) -> None:
    start = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(start)
    if not directory._bigtiff:
        order: Any = "little" if directory.prefix == b"II" else "big"
        entries = file.read(2 + 12 * int.from_bytes(file.read(2), order))
        wanted = sum(
            _UNIT.get(int.from_bytes(entries[place + 2 : place + 4], order), 0)
            * int.from_bytes(entries[place + 4 : place + 8], order)
            for place in range(0, len(entries) - 11, 12)
        )
        file.seek(start)
        if wanted > 2 * length:  # writers may let a few tags share theirs
            raise ValueError(f"tags of {wanted:,} bytes in {length:,}")
    _originals["directory"](directory, file)
