"""Pictures to the visual features the language model reads, remembered by content.

Shapes in names: C channels, H height, W width, N visual tokens, D hidden width of the language model.
"""

import hashlib
import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from switchkd.export.contract.bundle import VISION_ENCODER, Bundle
from switchkd.export.contract.pixels import Picture as Picture  # as a name of this module too
from switchkd.export.contract.pixels import read_pixels

from .graph_session import GraphSession

Pixels = npt.NDArray[np.float32]
Features = npt.NDArray[np.float32]


class PictureEncoder:
    """The bundle's vision encoder with its projector; the features of the last `remember` pictures are kept."""

    def __init__(self, bundle: Bundle, threads: int | None = None, remember: int = 16) -> None:
        self._session = GraphSession(bundle, VISION_ENCODER, threads)
        self._preprocessing = bundle.preprocessing
        self._remember = remember
        self._known: OrderedDict[bytes, Features] = OrderedDict()
        self._lock = threading.Lock()

    def pixels(self, picture: Picture) -> Pixels:
        """Read a picture (a path, a file's bytes or a Pillow image) as pixels_CHW; raises PictureError."""
        return read_pixels(picture, self._preprocessing)

    def encode(self, pixels_CHW: Pixels) -> Features:
        """Return features_ND; the same pixels again cost a hash, whatever file they came from."""
        key = hashlib.sha256(pixels_CHW.tobytes()).digest()
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        results = self._session.run({"pixel_values": self._session.value("pixel_values", pixels_CHW[None])})
        features_ND: Features = results["image_features"].numpy()[0].astype(np.float32)
        with self._lock:
            self._known[key] = features_ND
            while len(self._known) > self._remember:
                self._known.popitem(last=False)
        return features_ND
