"""Pictures that would take minutes or gigabytes to open are left after some thousand steps; others are as before."""

import io
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.serve.hostile_pictures import chunk, jpeg, png, segment, unfolding
from switchkd.export.contract.picture_bounds import HEADER_BYTES, HEADER_READS, BoundedFile, TooManyParts
from switchkd.export.contract.pixels import PictureError, open_header, open_picture

MEASURE = """
import json, resource, sys
from switchkd.export.contract.picture_bounds import bound_pillow
from switchkd.export.contract.pixels import PictureError, open_picture
bound_pillow()
bound_pillow()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    said = open_picture(open(sys.argv[1], "rb").read()).size
except PictureError as error:
    said = str(error)
print(json.dumps([said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def test_a_file_is_read_so_many_times() -> None:
    file = BoundedFile(bytes(10_000))
    for _ in range(HEADER_READS):
        file.read(1)
    with pytest.raises(TooManyParts):
        file.read(1)
    file.allow_decoding()
    assert file.read() == bytes(10_000 - HEADER_READS)
    large = BoundedFile(bytes(HEADER_BYTES + 1))
    assert len(large.read()) == HEADER_BYTES + 1  # at once: by a reader that is no header's
    large.seek(0)
    with pytest.raises(TooManyParts):
        large.read(HEADER_BYTES + 1)


@pytest.mark.parametrize(
    "content",
    [
        png(9, 9, chunk(b"tEXt", b"k\0") * 5_000),
        png(9, 9, after=chunk(b"tEXt", b"k\0") * 5_000),
        png(9, 9, chunk(b"IDAT", b"") * 5_000),
        jpeg(segment(0xE5, b"") * 5_000),
        jpeg(segment(0xE5, b""), b"x" * 6_000),
        b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1x" * 5_000 + b"\0",
        jpeg(*[segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 80),
    ],
)
def test_a_picture_of_too_many_parts_is_refused(content: bytes) -> None:
    with pytest.raises(PictureError, match="too many parts"):
        open_picture(content)


def test_many_parts_are_no_fault() -> None:
    """As cameras and editors write them."""
    profiles = [segment(0xE2, b"ICC_PROFILE\0\1\xff" + bytes(65_000))] * 30
    assert open_picture(jpeg(*profiles, *[segment(0xE1, b"Exif\0\0" + bytes(60))] * 50)).size == (16, 16)
    noise = Image.effect_noise((600, 600), 80)
    content = io.BytesIO()
    noise.save(content, "PNG")
    whole = content.getvalue()
    place = whole.index(b"IDAT") - 4
    data = b"".join(
        whole[start + 8 : start + 8 + int.from_bytes(whole[start : start + 4], "big")] for start in chunks(whole, place)
    )
    pieces = b"".join(chunk(b"IDAT", data[start : start + 1024]) for start in range(0, len(data), 1024))
    assert len(data) > 200 * 1024
    assert open_picture(whole[:place] + pieces + chunk(b"IEND", b"")).tobytes() == noise.convert("RGB").tobytes()


def chunks(whole: bytes, place: int) -> list[int]:
    """Where the IDAT chunks begin."""
    found = []
    while whole[place + 4 : place + 8] == b"IDAT":
        found.append(place)
        place += 12 + int.from_bytes(whole[place : place + 4], "big")
    return found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("png", [9, 9]),
        ("behind", [9, 9]),
        ("jpeg", [16, 16]),
        ("mpf", [16, 16]),
        ("large", [16, 16]),
        ("texts", "too much memory used in text"),
    ],
)
def test_notes_take_no_more_than_they_are(tmp_path: Path, name: str, said: list[int] | str) -> None:
    """They would take 5 GB, 0.3 GB and 60 MB."""
    bare = jpeg()
    start = 4 + int.from_bytes(bare[4:6], "big")  # without JFIF Pillow looks into EXIF for the resolution
    exif = segment(0xE1, b"Exif\0\0" + unfolding(65_000, 5_000))
    long = [segment(0xE1, b"Exif\0\0" * (number == 0) + bytes(60_000)) for number in range(20)]
    one_mebibyte = b"k\0\0" + compressed(2**20)
    content = {
        "png": png(9, 9, chunk(b"eXIf", unfolding(2**20, 5_000))),
        "behind": png(9, 9, after=chunk(b"eXIf", unfolding(2**20, 5_000))),
        "jpeg": bare[:2] + exif + bare[start:],
        "mpf": jpeg(segment(0xE2, b"MPF\0" + unfolding(65_000, 5_000))),
        "large": bare[:2] + b"".join(long) + bare[start:],
        "texts": png(9, 9, *[chunk(b"zTXt", one_mebibyte)] * 60),
    }[name]
    got, mebibytes = measured(tmp_path, content)
    assert said in got.lower() if isinstance(said, str) else got == said
    assert mebibytes < 20


def compressed(size: int) -> bytes:
    return zlib.compress(bytes(size))


def measured(folder: Path, content: bytes) -> tuple[Any, float]:
    """What a process with bounds says of a picture, and the MiB that it took."""
    (folder / "picture").write_bytes(content)
    words = [sys.executable, "-c", MEASURE, str(folder / "picture")]
    said, mebibytes = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    return said, mebibytes


def test_a_picture_is_turned_by_its_notes_within_bounds(tmp_path: Path) -> None:
    content, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a note" * 1000
    Image.new("RGB", (30, 20)).save(content, "JPEG", exif=exif)
    assert measured(tmp_path, content.getvalue())[0] == [20, 30]


def test_the_header_is_read_in_the_formats_that_are_named() -> None:
    content = io.BytesIO()
    Image.new("RGB", (9, 9)).save(content, "TIFF")
    assert open_header(content.getvalue()).format == "TIFF"
    with pytest.raises(PictureError, match="not a picture in a known format"):
        open_header(content.getvalue(), ("PNG", "JPEG"))
