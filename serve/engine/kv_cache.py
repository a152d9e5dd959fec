"""The decoder's memory of one conversation: a key and a value a layer, kept as onnxruntime's own tensors."""

from collections.abc import Mapping
from copy import copy
from typing import Self

import numpy as np
from onnxruntime import OrtValue

from switchkd.export.contract.bundle import CacheShape


class KVCache:
    """Keys and values of every position decoded so far; they go from step to step without passing through numpy."""

    def __init__(self, shape: CacheShape, dtype: str) -> None:
        self._shape, self._dtype = shape, dtype
        empty = np.zeros((1, shape.kv_heads, 0, shape.head_dim), dtype=dtype)
        self.length = 0
        self.inputs: dict[str, OrtValue] = {name: OrtValue.ortvalue_from_numpy(empty) for name in shape.past_names()}

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        numbers = 2 * self._shape.layers * self._shape.kv_heads * self._shape.head_dim * self.length
        return numbers * np.dtype(self._dtype).itemsize

    def copy(self) -> Self:
        """A memory that goes on from here by itself; what both have read is not held twice, since nobody changes it."""
        twin = copy(self)
        twin.inputs = dict(self.inputs)
        return twin

    def advance(self, outputs: Mapping[str, OrtValue], count: int) -> None:
        """Take over what the decoder gave back after reading `count` more positions."""
        names = zip(self._shape.past_names(), self._shape.present_names(), strict=True)
        self.inputs = {past: outputs[present] for past, present in names}
        self.length += count
