"""Pictures become the same pixels as Hugging Face's processors make, and any picture of a person's is read."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.siglip import SiglipImageProcessorPil

from switchkd.export.contract.pixels import (
    MAX_PIXELS,
    PictureError,
    PictureTooLarge,
    Preprocessing,
    open_picture,
    read_pixels,
    to_pixels,
)

MODES = ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr"]
SIZES = [(24, 24), (37, 53), (101, 17), (1, 9), (300, 200)]


def picture(mode: str = "RGB", size: tuple[int, int] = (37, 53)) -> Image.Image:
    random = np.random.default_rng(size[0])
    blocks = random.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(blocks, "RGBA").convert(mode)


def siglip(**settings: Any) -> Any:
    return SiglipImageProcessorPil(
        **{"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **settings}
    )


def clip(edge: int = 24, crop: int = 24) -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": crop, "width": crop})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "processor",
    [siglip(), siglip(size={"height": 31, "width": 18}, resample=2), clip(), clip(23, 30), clip(31, 24)],
    ids=["siglip", "siglip-odd-bilinear", "clip", "clip-border", "clip-odd-cut"],
)
def test_equal_to_hugging_face(processor: Any, size: tuple[int, int], mode: str) -> None:
    image = picture(mode, size)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    got = to_pixels(image, Preprocessing.from_config(processor.to_dict()))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


def test_steps_that_are_switched_off() -> None:
    processor = siglip(do_resize=False, do_rescale=False, do_normalize=False)
    image = picture()
    got = to_pixels(image, Preprocessing.from_config({"image_processor": processor.to_dict()}))
    np.testing.assert_array_equal(got, np.asarray(image, dtype=np.float32).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"size": {"longest_edge": 4}}, "size"),
        ({"size": {"height": 4, "width": 4}, "do_pad": True}, "do_pad"),
        ({"size": 4, "image_mean": [0.5], "image_std": 1}, "image_mean"),
        ({"size": 4, "image_mean": 0, "image_std": 0}, "image_std"),
        ({"size": 4, "do_normalize": False, "resample": 9}, "resample"),
        ({"size": 4, "do_normalize": False, "do_center_crop": True}, "crop_size"),
    ],
)
def test_settings_that_cannot_be_followed(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(PictureError, match=word):
        Preprocessing.from_config(settings)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "WEBP"])
def test_lossless_formats(kind: str, tmp_path: Path) -> None:
    image = picture()
    path = tmp_path / "picture.dat"
    path.write_bytes(save(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    for source in (path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(np.asarray(open_picture(source)), np.asarray(image))


def test_turned_by_exif() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    opened = open_picture(save(picture(size=(37, 53)), "PNG", exif=exif))
    assert opened.size == (53, 37)
    np.testing.assert_array_equal(np.asarray(opened), np.rot90(np.asarray(picture(size=(37, 53))), -1))


def test_transparent_becomes_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert open_picture(save(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 0, 0, 0, 200, 0])
    assert open_picture(save(palette, "GIF", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    opened = open_picture(save(Image.fromarray(ramp), "PNG"))
    expected = np.rint(ramp / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(opened)[..., 0], expected)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    opened = open_picture(save(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert opened.getpixel((0, 0)) == (255, 0, 0)


def test_cmyk_jpeg() -> None:
    opened = open_picture(save(Image.new("RGB", (8, 8), (200, 100, 50)).convert("CMYK"), "JPEG", quality=100))
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened).astype(int) - (200, 100, 50)).max() < 6


def bomb(side: int = int(MAX_PIXELS**0.5) + 1) -> bytes:
    """A PNG header that promises more pixels than are allowed, with nearly no data behind it."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 64))]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a picture"),
        (b"hello, this is text", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
        (save(picture(), "PNG")[:600], "damaged"),
        (save(picture(), "JPEG")[:1000], "damaged"),
        (save(picture(), "JPEG")[:400], "cannot be opened"),
        (bomb(), "pixels; scale it down"),
    ],
    ids=["empty", "text", "postscript", "cut png", "cut jpeg", "cut jpeg header", "bomb"],
)
def test_refused_in_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=reason) as caught:
        open_picture(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(PictureError, match=reason):
        open_picture(content)


SMALL = Preprocessing.from_config({"size": {"height": 24, "width": 24}, "image_mean": 0.5, "image_std": 0.5})


def turned_jpeg() -> bytes:
    note = Image.Exif()
    note[0x0112] = 6
    return save(picture(), "JPEG", exif=note)


def animation() -> bytes:
    return save(picture("P"), "GIF", save_all=True, append_images=[Image.new("P", (37, 53), 7)])


@pytest.mark.parametrize(
    "content",
    [
        turned_jpeg(),
        save(picture("RGBA"), "PNG"),
        save(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16), "TIFF"),
        animation(),
        save(picture(), "MPO", save_all=True, append_images=[picture(), picture()]),
    ],
    ids=["turned", "clear", "16 bit", "animated", "several"],
)
def test_every_door_gives_the_same_pixels(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(content)
    by_path = read_pixels(path, SMALL)
    loaded = Image.open(path)
    loaded.load()
    for other in (str(path), content, Image.open(path), Image.open(io.BytesIO(content)), loaded):
        np.testing.assert_array_equal(read_pixels(other, SMALL), by_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (save(picture(), "PNG")[:600], "damaged"),
        (save(picture(), "JPEG")[:1000], "damaged"),
        (save(picture(), "BMP")[:1000], "damaged"),
        (save(picture(), "SGI"), "not a picture in a known format"),
        (bomb(), "more than 89,478,485 pixels"),
    ],
    ids=["cut png", "cut jpeg", "cut bitmap", "another format", "bomb"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_door_refuses_the_same(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(content)
    for source in (path, content, Image.open(path), Image.open(io.BytesIO(content))):
        with pytest.raises(PictureError, match=f": {reason}") as caught:
            read_pixels(source, SMALL)
        assert "\n" not in str(caught.value)


def test_a_picture_whose_file_is_closed_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture().save(path)
    with Image.open(path) as read, Image.open(path) as left:
        read.load()
    closed = Image.new("RGB", (4, 4))
    closed.close()
    with path.open("rb") as file:
        lent = Image.open(file)
    assert read_pixels(read, SMALL).shape == (3, 24, 24)  # it was read in time
    for late in (left, closed, lent):
        with pytest.raises(PictureError, match="its file is closed; ask before closing it"):
            read_pixels(late, SMALL)


def test_a_picture_larger_than_its_icon_says() -> None:
    data = bomb(20_000)
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(data), 22) + data
    with pytest.raises(PictureTooLarge, match="more than 89,478,485 pixels"):
        read_pixels(icon, SMALL)


@pytest.mark.parametrize(
    ("size", "shortest"), [((1, 20_000), 336), ((20_000, 1), 336), ((5_000_000, 1), 24), ((3, 900_000), 24)]
)
def test_what_resizing_makes_too_large_is_refused_before_it(
    size: tuple[int, int], shortest: int, tmp_path: Path
) -> None:
    path = tmp_path / "narrow.png"
    Image.new("1", size).save(path)
    narrow = Preprocessing.from_config({"size": {"shortest_edge": shortest}, "do_normalize": False})
    with pytest.raises(PictureTooLarge, match=rf"narrow\.png: {size[0]} x {size[1]} is too narrow: resized to "):
        read_pixels(path, narrow)
    # Where both edges are given the result is small, but not what lies between the two passes.
    if max(size) * 24 > MAX_PIXELS:
        with pytest.raises(PictureTooLarge, match="resized to 24 x 24"):
            read_pixels(path, SMALL)


def test_as_narrow_as_fits_is_resized() -> None:
    narrow = Preprocessing.from_config({"size": {"shortest_edge": 8}, "do_normalize": False})
    assert read_pixels(Image.new("RGB", (1, 20_000)), narrow).shape == (3, 160_000, 8)


@pytest.mark.parametrize("size", [{"height": 0, "width": 4}, {"height": 100_000, "width": 1000}, {"shortest_edge": -1}])
def test_a_size_that_no_picture_can_have(size: dict[str, int]) -> None:
    with pytest.raises(PictureError, match=r"size is .*, expected sides of 1 or more and at most 89,478,485 pixels"):
        Preprocessing.from_config({"size": size, "do_normalize": False})


def test_no_such_picture(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="no such file"):
        open_picture(tmp_path / "none.png")
    with pytest.raises(PictureError, match="is a folder"):
        open_picture(tmp_path)
