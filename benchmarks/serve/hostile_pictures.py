"""Pictures made to hurt whoever opens them: bombs, amplifiers, quadratic parsers, broken and misnamed files.

Every file is built here, byte by byte, small enough for a request; `fine` marks those that may well be answered.
"""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image, ImageCms

MOST = 14 * 2**20  # bytes of a file, so that it fits a request of 20 MiB in base64


@dataclass(frozen=True)
class HostilePicture:
    """A file with a name; `fine`: its first picture is harmless, so that an answer is right too."""

    name: str
    content: bytes
    fine: bool = False


def hostile_pictures() -> Iterator[HostilePicture]:
    """All of them, one after the other: together they are large."""
    for make in (_pngs, _gifs, _jpegs, _tiffs, _others, _odd_but_fine, _truncated):
        yield from make()


# --- PNG ---


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *before: bytes, rows: bytes | None = None, after: bytes = b"", kind: int = 2) -> bytes:
    """An RGB PNG (or of another `kind`) with chunks before and after its pixels, which are black unless given."""
    if rows is None:
        rows = zlib.compress(bytes((1 + 3 * width) * height))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join([header, *before, chunk(b"IDAT", rows), after, chunk(b"IEND", b"")])


def _zeros(mebibytes: int) -> bytes:
    return zlib.compress(bytes(mebibytes * 2**20), 9)


def _pngs() -> Iterator[HostilePicture]:
    yield HostilePicture("PNG of 20,000 x 20,000", png(20_000, 20_000, rows=_zeros(64)))
    yield HostilePicture("PNG of 65,500 x 65,500", png(65_500, 65_500, rows=_zeros(64)))
    yield HostilePicture("PNG of 2,147,483,647 x 1", png(2**31 - 1, 1, rows=b""))
    yield HostilePicture("PNG of 1 x 25,000,000", png(1, 25_000_000, rows=_zeros(1)))
    yield HostilePicture("PNG of no width", png(0, 9, rows=b""))
    yield HostilePicture("PNG of no height", png(9, 0, rows=b""))
    yield HostilePicture("PNG that unpacks to more than its size", png(9, 9, rows=_zeros(200)), fine=True)
    bomb = b"key\0\0" + _zeros(100)
    yield HostilePicture("PNG, zTXt of 100 MB", png(9, 9, chunk(b"zTXt", bomb)), fine=True)
    yield HostilePicture("PNG, iTXt of 100 MB", png(9, 9, chunk(b"iTXt", b"key\0\1\0\0\0" + _zeros(100))), fine=True)
    yield HostilePicture("PNG, iCCP of 100 MB", png(9, 9, chunk(b"iCCP", bomb)), fine=True)
    texts = [chunk(b"zTXt", b"k%d\0\0" % number + _zeros(1)[:]) for number in range(63)]
    yield HostilePicture("PNG, 63 zTXt of 1 MB", png(9, 9, *texts), fine=True)
    yield HostilePicture("PNG, 63 zTXt of 1 MB behind", png(9, 9, after=b"".join(texts)), fine=True)
    yield HostilePicture("PNG, tEXt of 14 MB", png(9, 9, chunk(b"tEXt", b"key\0" + b"x" * MOST)), fine=True)
    tiny = chunk(b"tEXt", b"k\0")
    yield HostilePicture("PNG of a million chunks", png(9, 9, tiny * (MOST // len(tiny))))
    yield HostilePicture("PNG of a million chunks behind", png(9, 9, after=tiny * (MOST // len(tiny))))
    pieces = chunk(b"IDAT", b"") * (MOST // 12)
    yield HostilePicture("PNG of a million empty IDAT", png(9, 9, pieces))
    yield HostilePicture("PNG, eXIf that unfolds", png(9, 9, chunk(b"eXIf", unfolding(2**20, 5000))), fine=True)
    yield HostilePicture("PNG, eXIf behind that unfolds", png(9, 9, after=chunk(b"eXIf", unfolding(2**20, 5000))), True)
    profile = b"\nexif\n%8d\n" % (2**19) + unfolding(2**19, 5000).hex().encode()
    raw = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile))
    yield HostilePicture("PNG, EXIF as text that unfolds", png(9, 9, raw), fine=True)
    yield HostilePicture("PNG without pixels", png(9, 9, rows=b""))
    yield HostilePicture("PNG with a wrong sum", png(9, 9)[:-20] + b"\0\0\0\0" + png(9, 9)[-16:])
    yield HostilePicture("PNG of an unknown colour type", png(9, 9, kind=5))
    frames = chunk(b"acTL", struct.pack(">II", 100_000, 0))
    yield HostilePicture("APNG of 100,000 frames", png(9, 9, frames), fine=True)


def unfolding(size: int, tags: int) -> bytes:
    """EXIF whose tags all hold the same bytes: read one by one they are `tags` times as large."""
    length = size - 64 - 12 * tags
    directory = b"".join(struct.pack("<HHII", number, 7, length, 64 + 12 * tags) for number in range(1, tags + 1))
    return (b"II*\0" + struct.pack("<IH", 8, tags) + directory + bytes(4)).ljust(size, b"\0")


# --- GIF, JPEG, TIFF ---


def _gif(*blocks: bytes, width: int = 9, height: int = 9) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + b"".join(blocks) + b";"


def _gif_frame(width: int = 1, height: int = 1) -> bytes:
    return b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00"


def _gifs() -> Iterator[HostilePicture]:
    yield HostilePicture("GIF of 10,000 frames", _gif(*[_gif_frame()] * 10_000), fine=True)
    yield HostilePicture("GIF of a million frames", _gif(_gif_frame() * (MOST // 15)), fine=True)
    yield HostilePicture("GIF of 65,535 x 65,535", _gif(_gif_frame(), width=65_535, height=65_535))
    yield HostilePicture("GIF whose frame is 65,535 x 65,535", _gif(_gif_frame(65_535, 65_535)))
    comment = b"!\xfe" + (b"\xff" + b"x" * 255) * (MOST // 256) + b"\0"
    yield HostilePicture("GIF with a comment of 14 MB", _gif(comment, _gif_frame()))
    yield HostilePicture("GIF with a million comments", _gif(b"!\xfe\1x\0" * (MOST // 5), _gif_frame()))
    yield HostilePicture("GIF without a frame", _gif())
    yield HostilePicture("GIF of no size", _gif(_gif_frame(), width=0, height=0), fine=True)


def jpeg(*segments: bytes) -> bytes:
    """A small JPEG with segments in front."""
    whole = _saved(Image.new("RGB", (16, 16)), "JPEG")
    return whole[:2] + b"".join(segments) + whole[2:]


def segment(kind: int, content: bytes) -> bytes:
    """One segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, kind, len(content) + 2) + content


def _jpegs() -> Iterator[HostilePicture]:
    small = segment(0xE1, b"Exif\0\0" + unfolding(65_000, 5000))
    # Without JFIF in front Pillow looks for the resolution in EXIF.
    bare = _without_jfif(jpeg())
    yield HostilePicture("JPEG, EXIF that unfolds from 64 KB", bare[:2] + small + bare[2:], fine=True)
    large = unfolding(8 * 2**20, 5000)
    parts = [segment(0xE1, b"Exif\0\0" + large[start : start + 65_000]) for start in range(0, len(large), 65_000)]
    yield HostilePicture("JPEG, EXIF that unfolds from 8 MB", bare[:2] + b"".join(parts) + bare[2:], fine=True)
    index = segment(0xE2, b"MPF\0" + unfolding(65_000, 5000))
    yield HostilePicture("JPEG, MPF that unfolds", jpeg(index), fine=True)
    huge = [segment(0xE1, b"Exif\0\0" + bytes(65_000))] * (MOST // 65_010)
    yield HostilePicture("JPEG with 14 MB of EXIF", jpeg(*huge), fine=True)
    yield HostilePicture("JPEG of three million segments", jpeg(segment(0xE5, b"") * (MOST // 4)))
    yield HostilePicture("JPEG behind 14 MB of junk", jpeg(segment(0xE5, b""), b"x" * MOST))
    yield HostilePicture("JPEG behind 14 MB of FF", jpeg(b"\xff" * MOST))
    profile = [segment(0xE2, b"ICC_PROFILE\0\1\xff" + bytes(65_000))] * 200
    yield HostilePicture("JPEG, 13 MB of ICC", jpeg(*profile), fine=True)
    frame = jpeg()
    place = frame.index(b"\xff\xc0") + 5
    yield HostilePicture(
        "JPEG of 65,500 x 65,500", frame[:place] + struct.pack(">HH", 65_500, 65_500) + frame[place + 4 :]
    )
    yield HostilePicture("JPEG of no size", frame[:place] + bytes(4) + frame[place + 4 :])
    yield HostilePicture("JPEG of 4 components that says 3", frame[: place + 4] + b"\4" + frame[place + 5 :])


def _without_jfif(content: bytes) -> bytes:
    length = struct.unpack(">H", content[4:6])[0]
    return content[:2] + content[4 + length :]


def _tiffs() -> Iterator[HostilePicture]:
    directory = b"".join(
        struct.pack("<H", 1) + struct.pack("<HHII", 256, 4, 1, 9) + struct.pack("<I", 8 + 18 * number)
        for number in range(1, 1001)
    )
    yield HostilePicture("TIFF of 1,000 directories", b"II*\0" + struct.pack("<I", 8) + directory)
    yield HostilePicture("TIFF of three million strips", _strips(3_000_000))
    yield HostilePicture("TIFF that unfolds", unfolding(MOST, 5000))
    yield HostilePicture("BigTIFF", b"II+\0\x08\0\0\0" + bytes(100))
    yield HostilePicture("TIFF that is its own next directory", b"II*\0" + struct.pack("<IHI", 8, 0, 8))


def _strips(count: int) -> bytes:
    """A TIFF whose pixels lie in so many places."""
    tags = {
        256: (4, 1, 9),
        257: (4, 1, count),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, count, 200),
        278: (4, 1, 1),
        279: (4, 1, 9),
    }
    directory = b"".join(struct.pack("<HHII", tag, *value) for tag, value in tags.items())
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory).ljust(200, b"\0") + struct.pack("<I", 200) * count


# --- other formats, and none ---


def _others() -> Iterator[HostilePicture]:
    inside = png(8000, 8000, rows=zlib.compress(bytes(24_001 * 8000), 9))
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22)
    yield HostilePicture("ICO of 16 x 16 that holds 8,000 x 8,000", struct.pack("<HHH", 0, 1, 1) + entry + inside)
    yield HostilePicture("SVG", b"<svg xmlns='http://www.w3.org/2000/svg' width='1e9' height='1e9'/>")
    laughs = b"".join(b'<!ENTITY a%d "%s">' % (level, b"&a%d;" % (level - 1) * 10) for level in range(1, 12))
    yield HostilePicture(
        "SVG of a billion laughs", b'<!DOCTYPE svg [<!ENTITY a0 "ha">' + laughs + b"]><svg>&a11;</svg>"
    )
    yield HostilePicture("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n")
    yield HostilePicture("PDF", b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n")
    yield HostilePicture("ZIP", b"PK\3\4" + bytes(200))
    yield HostilePicture("HTML", b"<html><img src='file:///etc/passwd'></html>")
    yield HostilePicture("nothing", b"")
    yield HostilePicture("one byte", b"\x89")
    yield HostilePicture("14 MB of zeros", bytes(MOST))
    yield HostilePicture("14 MB of noise", random.Random(0).randbytes(MOST))
    yield HostilePicture("PPM of 100,000 x 100,000", b"P6 100000 100000 255\n" + bytes(100))
    yield HostilePicture("PPM with 14 MB of comment", b"P6\n#" + b"x" * MOST)
    yield HostilePicture("BMP of 60,000 x 60,000", _bmp(60_000, 60_000))
    yield HostilePicture("BMP of less than no height", _bmp(9, -(2**31)))
    yield HostilePicture("BMP of no size", _bmp(0, 0))
    yield HostilePicture("JPEG2000", b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100))
    yield HostilePicture("WebP of 16,383 x 16,383", _webp(16_383, 16_383))
    frames = [Image.new("RGB", (9, 9), (number, 0, 0)) for number in range(50)]
    yield HostilePicture(
        "WebP of 50 frames", _saved(frames[0], "WEBP", append_images=frames[1:], save_all=True), fine=True
    )
    avif = _saved(Image.new("RGB", (64, 64)), "AVIF")
    place = avif.index(b"ispe") + 8
    yield HostilePicture(
        "AVIF that says 65,500 x 65,500", avif[:place] + struct.pack(">II", 65_500, 65_500) + avif[place + 8 :]
    )
    for kind in ("JPEG", "GIF", "WEBP", "BMP"):
        magic = _saved(Image.new("RGB", (9, 9)), kind)[:12]
        yield HostilePicture(f"PNG that begins as {kind}", magic + png(9, 9)[len(magic) :])


def _bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 200, 0, 0, 54) + header + bytes(100)


def _webp(width: int, height: int) -> bytes:
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    inside = _saved(Image.new("RGB", (9, 9)), "WEBP")[12:]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + sizes + inside
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def _odd_but_fine() -> Iterator[HostilePicture]:
    """Odd files that people have: an answer is as good as a refusal."""
    grey = Image.linear_gradient("L")
    for mode in ("1", "L", "LA", "P", "I;16", "RGBA"):
        yield HostilePicture(
            f"PNG in {mode}",
            _saved(grey.convert("LA").convert(mode) if mode == "LA" else grey.convert(mode), "PNG"),
            True,
        )
    yield HostilePicture("JPEG in CMYK", _saved(Image.new("CMYK", (9, 9)), "JPEG"), True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield HostilePicture("JPEG with a profile", _saved(Image.new("RGB", (9, 9)), "JPEG", icc_profile=profile), True)
    yield HostilePicture("GIF that is a ZIP too", _gif(_gif_frame()) + b"PK\3\4" + bytes(99), True)
    yield HostilePicture("JPEG that is HTML too", jpeg(segment(0xFE, b"<script>alert(1)</script>")), True)
    yield HostilePicture("PNG with 14 MB behind its end", png(9, 9) + bytes(MOST), True)


def _truncated() -> Iterator[HostilePicture]:
    """Cut at every kilobyte."""
    noise = Image.frombytes("RGB", (120, 120), random.Random(0).randbytes(3 * 120 * 120))
    makers: dict[str, Callable[[], bytes]] = {
        "PNG": lambda: _saved(noise, "PNG"),
        "JPEG": lambda: _saved(noise, "JPEG", quality=95),
        "WEBP": lambda: _saved(noise, "WEBP", lossless=True),
        "GIF": lambda: _saved(noise, "GIF"),
        "AVIF": lambda: _saved(noise, "AVIF", quality=90),
        "BMP": lambda: _saved(noise, "BMP"),
    }
    for kind, make in makers.items():
        whole = make()
        for length in range(1024, len(whole), 1024):
            yield HostilePicture(
                f"{kind} cut at {length // 1024} kB", whole[:length], fine=len(whole) - length < 16
            )  # the last may be whole but for its sum
