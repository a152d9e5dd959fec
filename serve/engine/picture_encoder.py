"""Pictures to the visual features the language model reads, remembered by content.

Shapes in names: C channels, H height, W width, N visual tokens, D hidden width of the language model.
"""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from switchkd.export.contract.bundle import VISION_ENCODER, Bundle
from switchkd.export.contract.pixels import Picture as Picture  # as a name of this module too
from switchkd.export.contract.pixels import read_pixels

from .graph_session import GraphSession

Pixels = npt.NDArray[np.float32]
Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class OpenPicture:
    """A picture as the encoder takes it, whatever file it came from: pixels_CHW, and the key that they are known by."""

    pixels_CHW: Pixels
    key: bytes


class PictureEncoder:
    """The bundle's vision encoder with its projector; the features of the last `remember` pictures are kept."""

    def __init__(self, bundle: Bundle, threads: int | None = None, remember: int = 16) -> None:
        self._session = GraphSession(bundle, VISION_ENCODER, threads)
        self._preprocessing = bundle.preprocessing
        self._remember = remember
        self._known: OrderedDict[bytes, Features] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, picture: Picture) -> OpenPicture:
        """Read a picture: a path, a file's bytes or a Pillow image. Raises PictureError."""
        pixels_CHW = read_pixels(picture, self._preprocessing)
        return OpenPicture(pixels_CHW, hashlib.sha256(pixels_CHW.tobytes()).digest())

    def encode(self, picture: OpenPicture) -> Features:
        """Return features_ND; the same pixels again cost nothing."""
        key = picture.key
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        pixels = self._session.value("pixel_values", picture.pixels_CHW[None])
        # Between pictures its hundreds of megabytes are the decoder's, which never computes at the same time.
        results = self._session.run({"pixel_values": pixels}, give_back=True)
        features_ND: Features = results["image_features"].numpy()[0].astype(np.float32)
        with self._lock:
            self._known[key] = features_ND
            while len(self._known) > self._remember:
                self._known.popitem(last=False)
        return features_ND
