"""The decoder's memory of one conversation: a key and a value a layer, kept as onnxruntime's own tensors."""

from collections.abc import Mapping

import numpy as np
from onnxruntime import OrtValue

from switchkd.export.contract.bundle import CacheShape


class KVCache:
    """Keys and values of every position decoded so far; they go from step to step without passing through numpy."""

    def __init__(self, shape: CacheShape, dtype: str) -> None:
        self._shape = shape
        empty = np.zeros((1, shape.kv_heads, 0, shape.head_dim), dtype=dtype)
        self.length = 0
        self.inputs: dict[str, OrtValue] = {name: OrtValue.ortvalue_from_numpy(empty) for name in shape.past_names()}

    def advance(self, outputs: Mapping[str, OrtValue], count: int) -> None:
        """Take over what the decoder gave back after reading `count` more positions."""
        names = zip(self._shape.past_names(), self._shape.present_names(), strict=True)
        self.inputs = {past: outputs[present] for past, present in names}
        self.length += count
