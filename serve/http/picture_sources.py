"""A request's pictures: from data: URIs or allowed addresses, their headers checked before anything is decoded."""

import asyncio
import base64
import binascii
from collections.abc import Sequence

from PIL import Image

from switchkd.export.contract.pixels import PictureError, open_header

from .api_errors import ApiError
from .remote_pictures import RemotePictureError, RemotePictures

# By what the file is, whatever it is called.
FORMATS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "BMP": "BMP", "AVIF": "AVIF"}
_OTHERS = ("TIFF", "ICO", "JPEG2000", "PPM", "DIB")  # that are known by how they begin
LONGEST_SIDE = 65_535  # what a JPEG can have; every row takes memory of its own


class PictureSources:
    """Turns picture URLs into the bytes of picture files, none of them beyond the limits."""

    def __init__(
        self, most_pictures: int, most_megapixels: float, most_bytes: int, remote: RemotePictures | None
    ) -> None:
        self._most_pictures = most_pictures
        self._most_bytes = most_bytes
        self._most_megapixels = most_megapixels
        self._remote = remote

    async def read(self, urls: Sequence[tuple[str, str]]) -> list[bytes]:
        """Return the pictures of (parameter, URL) in order. Raises ApiError (400) naming the parameter."""
        if len(urls) > self._most_pictures:
            message = f"{len(urls)} pictures are more than the {self._most_pictures} that one request may have"
            raise ApiError(400, f"{message}; send fewer", param="messages", code="too_many_pictures")
        pictures = []
        for parameter, url in urls:
            try:
                content = await self._content(url)
                # In a thread: a hostile header may take a while, and others are waiting.
                await asyncio.to_thread(self._check, content)
            except (PictureError, RemotePictureError) as error:
                raise ApiError(400, f"{parameter}: {error}", param=parameter, code="invalid_picture") from None
            pictures.append(content)
            if sum(map(len, pictures)) > self._most_bytes:  # only those from elsewhere can be
                message = f"{parameter}: the pictures are larger than {self._most_bytes:,} bytes together; send fewer"
                raise ApiError(400, message, param=parameter, code="too_many_pictures")
        return pictures

    async def _content(self, url: str) -> bytes:
        if url[:5].lower() == "data:":
            return await asyncio.to_thread(decode_data_uri, url)
        if self._remote is None:
            raise PictureError(
                "the picture is no data: URI, and this server fetches none; send data:image/...;base64,..., or start "
                "the server with --allow-remote-pictures"
            )
        try:
            return await self._remote.fetch(url)
        except RemotePictureError as error:
            raise PictureError(f"the picture {error}; send it as a data: URI") from None

    def _check(self, content: bytes) -> None:
        # Others are not opened at all: the header of a TIFF may be as large as the file, an icon is decoded with it.
        if (kind := other_format(content)) is not None:
            known = ", ".join(FORMATS.values())
            raise PictureError(f"the picture is {kind}, expected one of {known}; save it as PNG or JPEG")
        with open_header(content, tuple(FORMATS)) as picture:
            width, height = picture.size
        if max(width, height) > LONGEST_SIDE:
            raise PictureError(
                f"the picture has {width} x {height} pixels, a side more than {LONGEST_SIDE:,}; scale it down first"
            )
        if width * height > self._most_megapixels * 1e6:
            raise PictureError(
                f"the picture has {width} x {height} pixels, more than {self._most_megapixels:g} megapixels; scale it "
                "down first"
            )


def other_format(content: bytes) -> str | None:
    """The name of a picture's format where it is known and not taken, by its first bytes alone."""
    Image.init()
    for kind in _OTHERS:
        _, accept = Image.OPEN[kind]
        if accept is not None and len(content) > 16 and accept(content[:16]) is True:
            return kind
    return None


def decode_data_uri(url: str) -> bytes:
    """Return what a base64 data: URI holds, whatever type it declares. Raises PictureError."""
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise PictureError("the data: URI is not base64; send data:image/png;base64,... or the like")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(f"the data: URI's base64 is broken ({error}); send it whole, in one line") from None
