"""The one image preprocessing of training, export and serving: any picture file in, the model's float pixels out.

Shapes in names: C channels, H height, W width, V values of a byte.
"""

import math
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from .picture_bounds import BoundedFile

# What a person's picture comes in. Pillow reads more, but some of it (EPS) starts other programs.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
# What transformers' classes do where a file says nothing; their names may end with Fast or Pil.
_CLIP_DEFAULTS: Mapping[str, Any] = {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "SiglipImageProcessor": {
        "size": {"height": 224, "width": 224},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "CLIPImageProcessor": _CLIP_DEFAULTS,
    "LlavaImageProcessor": _CLIP_DEFAULTS,
}
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb: 256 MB as RGB

Picture = str | Path | bytes | Image.Image  # a path, a file's bytes, or what Pillow opened or made

_TURNS = {  # what makes a picture upright, by the number that EXIF has for its orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_READ_AS = {*FORMATS, "MPO"}  # what Pillow calls them once opened: MPO is a JPEG with further pictures behind it
# What Pillow's readers raise on damaged data.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)


class PictureError(ValueError):
    """A picture that cannot be used, or preprocessing settings that cannot be followed."""


class PictureTooLarge(PictureError):
    """A picture of more pixels than are decoded."""


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes pixels: resize, centre crop, rescale, normalise, in this order (None skips the step)."""

    size: tuple[int, int] | int | None  # (height, width), or the shortest edge with the aspect ratio kept
    crop: tuple[int, int] | None  # (height, width)
    resample: int  # Pillow's number: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming
    rescale: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    def __post_init__(self) -> None:
        if self.resample not in set(Image.Resampling):
            raise PictureError(f"preprocessing: resample is {self.resample}, expected one of 0 to 5 as Pillow counts")
        for name, given in (("size", self.size), ("crop_size", self.crop)):
            height, width = given if isinstance(given, tuple) else (given or 0, given or 0)
            if given is not None and not (height > 0 and width > 0 and height * width <= MAX_PIXELS):
                raise PictureError(
                    f"preprocessing: {name} is {given}, expected sides of 1 or more and at most {MAX_PIXELS:,} pixels"
                )
        if (self.mean is None) != (self.std is None):
            raise PictureError("preprocessing: image_mean and image_std must be given together")
        if self.std is not None and min(self.std) <= 0:
            raise PictureError(f"preprocessing: image_std is {self.std}, expected positive numbers")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read preprocessor_config.json, or processor_config.json with its "image_processor" part.

        Raises PictureError where the settings ask for a step that is not implemented here.
        """
        config = complete(config.get("image_processor", config))
        if config.get("do_pad"):
            raise PictureError("preprocessing: do_pad is true, which is not supported; resize to a fixed size instead")
        normalise = config.get("do_normalize", True)
        return cls(
            size=_size(config.get("size")) if config.get("do_resize", True) else None,
            crop=_crop(config.get("crop_size")) if config.get("do_center_crop") else None,
            resample=int(config.get("resample", Image.Resampling.BICUBIC)),
            rescale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else None,
            mean=_per_channel(config.get("image_mean"), "image_mean") if normalise else None,
            std=_per_channel(config.get("image_std"), "image_std") if normalise else None,
        )

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Height and width of every result, or None where they depend on the picture."""
        return self.crop or (self.size if isinstance(self.size, tuple) else None)


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """An image processor's settings with the defaults of its class where the file is silent, as transformers has it."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    kind = kind.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    return {**_DEFAULTS.get(kind, {}), **config}


def _size(size: Any) -> tuple[int, int] | int:
    if isinstance(size, int):
        return size
    if isinstance(size, Mapping):
        given = {key: value for key, value in size.items() if value is not None}
        if set(given) == {"height", "width"}:
            return int(given["height"]), int(given["width"])
        if set(given) == {"shortest_edge"}:
            return int(given["shortest_edge"])
    raise PictureError(f"preprocessing: size is {size}, expected height and width, or shortest_edge")


def _crop(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    raise PictureError(f"preprocessing: crop_size is {size}, expected height and width")


def _per_channel(value: Any, name: str) -> tuple[float, float, float]:
    if isinstance(value, (int, float)):
        return float(value), float(value), float(value)
    if isinstance(value, Sequence) and len(value) == 3:
        return float(value[0]), float(value[1]), float(value[2])
    raise PictureError(f"preprocessing: {name} is {value}, expected one number or three")


def read_pixels(source: Picture, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Turn a picture by any door into the model's float32 pixels_CHW: always the same, or the same PictureError."""
    return to_pixels(open_picture(source), preprocessing, _name(source))


def open_picture(source: Picture) -> Image.Image:
    """Read any picture a person has as upright RGB: turned by its EXIF, alpha on white, 16 bit scaled, first frame.

    `source` is a path, the file's bytes, or a Pillow image, which stays open and in the frame where it is. Raises
    PictureError naming the file, the reason and the way out.
    """
    if isinstance(source, Image.Image):
        _check_opened(source)
        return decode(source, source)
    with open_header(source) as picture:
        return decode(picture, source)


def decode(picture: Image.Image, source: Picture) -> Image.Image:
    """Decode what `open_header` opened from `source`, as `open_picture` does. Raises PictureError."""
    name, closed = _name(source), isinstance(source, Image.Image) and _is_closed(source)
    try:
        picture.load()
        _check_size(picture.size, name)  # what is inside an icon may be larger than the icon says
        return to_rgb(_upright(picture))
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except _BROKEN as error:
        if closed or "closed image" in str(error):
            raise PictureError(f"{name}: its file is closed; ask before closing it, or give the file's path") from error
        raise PictureError(f"{name}: damaged ({_one_line(error)}); save it again as PNG or JPEG") from error


def open_header(source: str | Path | bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open a picture without decoding it: `format` and `size` are known. Raises PictureError as `open_picture` does."""
    name = _name(source)
    file = BoundedFile(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(file, formats=formats)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _too_large(name) from None
    except FileNotFoundError:
        raise PictureError(f"{name}: no such file; check the path") from None
    except IsADirectoryError:
        raise PictureError(f"{name}: is a folder; give a picture file") from None
    except PermissionError:
        raise PictureError(f"{name}: may not be read; check its permissions") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name}: not a picture in a known format; save it as PNG or JPEG") from None
    except _BROKEN as error:
        raise PictureError(f"{name}: cannot be opened ({_one_line(error)}); save it again as PNG or JPEG") from error
    # Warnings may be off in another thread of this process: the size is checked here too.
    try:
        _check_size(picture.size, name)
    except PictureTooLarge:
        picture.close()
        raise
    if isinstance(file, BoundedFile):
        file.allow_decoding()
    return picture


def _check_opened(picture: Image.Image) -> None:
    """Refuse of a Pillow image what is refused of a file, before anything of it is decoded."""
    if picture.format is not None and picture.format not in _READ_AS:
        raise PictureError(
            f"{_name(picture)}: not a picture in a known format ({picture.format}); save it as PNG or JPEG, or convert "
            "it to RGB yourself"
        )
    _check_size(picture.size, _name(picture))


def _is_closed(picture: Image.Image) -> bool:
    """Whether the file is closed that a Pillow image came from; it may have been read by then."""
    if not isinstance(picture, ImageFile.ImageFile):
        return False
    return picture.fp is None or bool(getattr(picture.fp, "closed", False))


def _name(source: Picture) -> str:
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "")) or "the picture"
    return "the picture" if isinstance(source, bytes) else str(source)


def _check_size(size: tuple[int, int], name: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise _too_large(name)


def _too_large(name: str) -> PictureTooLarge:
    return PictureTooLarge(f"{name}: more than {MAX_PIXELS:,} pixels; scale it down first")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _upright(picture: Image.Image) -> Image.Image:
    # Not by ImageOps, which writes the notes anew, of whatever size they are.
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except _BROKEN:
        turn = None  # the picture was read; only the note about its orientation is damaged
    return picture.copy() if turn is None else picture.transpose(turn)


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB with transparency on white, and deep greys scaled to 8 bit, not clipped."""
    if picture.mode == "RGB" and picture.info.get("transparency") is None:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        return _deep_grey(picture).convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    if "A" in picture.getbands() or "a" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _deep_grey(picture: Image.Image) -> Image.Image:
    grey_HW = np.nan_to_num(np.asarray(picture).astype(np.float64))
    low, high = min(0.0, float(grey_HW.min())), float(grey_HW.max())
    if picture.mode.startswith("I;16") or (low == 0 and 255 < high <= 65535):
        high = 65535.0
    elif low == 0 and 1 < high <= 255:
        high = 255.0
    scale = 255.0 / (high - low) if high > low else 0.0
    return Image.fromarray(np.clip(np.rint((grey_HW - low) * scale), 0, 255).astype(np.uint8))


def to_pixels(picture: Image.Image, preprocessing: Preprocessing, name: str = "the picture") -> npt.NDArray[np.float32]:
    """Turn a picture into the model's float32 pixels_CHW, equal to Hugging Face's Pillow image processors.

    Raises PictureError where the picture has an edge of zero, or grows beyond what is decoded.
    """
    if 0 in picture.size:
        raise PictureError(f"{name}: is {picture.width}x{picture.height}; it needs at least one pixel")
    check_growth(picture.size, preprocessing, name)
    picture = to_rgb(picture)
    if preprocessing.size is not None:
        picture = picture.resize(
            _resized(picture.size, preprocessing.size), resample=Image.Resampling(preprocessing.resample)
        )
    pixels_HWC: npt.NDArray[Any] = np.asarray(picture)
    if preprocessing.crop is not None:
        pixels_HWC = _center_crop(pixels_HWC, preprocessing.crop)
    # A byte has 256 values: looking them up takes an eighth of the time that reckoning with every pixel takes.
    values_CV = _values(preprocessing)
    return np.stack([np.take(values_CV[channel], pixels_HWC[:, :, channel]) for channel in range(3)])


def _values(preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """What each value of a byte becomes in each channel, values_CV."""
    values_VC: npt.NDArray[Any] = np.repeat(np.arange(256)[:, None], 3, axis=1)
    if preprocessing.rescale is not None:
        # In double precision first, as the Hugging Face processors do: single precision differs in the last bit.
        values_VC = values_VC.astype(np.float64) * preprocessing.rescale
    values_VC = values_VC.astype(np.float32)
    if preprocessing.mean is not None:
        mean_C = np.array(preprocessing.mean, dtype=np.float32)
        std_C = np.array(preprocessing.std, dtype=np.float32)
        values_VC = (values_VC - mean_C) / std_C
    return np.ascontiguousarray(values_VC.T)


def check_growth(size: tuple[int, int], preprocessing: Preprocessing, name: str) -> None:
    """Raise PictureTooLarge where a picture of this size, upright or turned, is of too many pixels once resized.

    A narrow one gets long where its shortest edge is what is asked for. On the way there it is as wide as the result
    and as high as before: Pillow resizes each row first.
    """
    if preprocessing.size is None:
        return
    wide, high = _resized(size, preprocessing.size)
    if max(wide * high, wide * size[1], high * size[0]) > MAX_PIXELS:
        raise PictureTooLarge(
            f"{name}: {size[0]} x {size[1]} is too narrow: resized to {wide} x {high} as the model wants it, it takes "
            f"more than {MAX_PIXELS:,} pixels on the way; crop it first"
        )


def _resized(have: tuple[int, int], size: tuple[int, int] | int) -> tuple[int, int]:
    """Width and height (Pillow's order) after resizing."""
    if isinstance(size, tuple):
        return size[1], size[0]
    long = int(size * max(have) / min(have))
    return (size, long) if have[0] <= have[1] else (long, size)


def _center_crop(pixels_HWC: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Cut `size` from the middle; a picture smaller than that gets a black border."""
    pads = [max(0, wanted - have) for wanted, have in zip(size, pixels_HWC.shape, strict=False)]
    # The odd pixel of the border goes in front when padding, behind when cutting: Hugging Face's rounding.
    before = [math.ceil(pad / 2) for pad in pads]
    starts = [(have - wanted) // 2 + front for have, wanted, front in zip(pixels_HWC.shape, size, before, strict=False)]
    padded_HWC = np.pad(pixels_HWC, [(before[0], pads[0] - before[0]), (before[1], pads[1] - before[1]), (0, 0)])
    top, left = max(0, starts[0]), max(0, starts[1])
    return padded_HWC[top : top + size[0], left : left + size[1]]
