"""The decoder's memory of one conversation: a key and a value a layer, kept as onnxruntime's own tensors.

Shapes in names: K key-value heads, P positions, E width of a head.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from onnxruntime import OrtValue

from switchkd.export.contract.bundle import CacheShape


class KVCache(ABC):
    """Keys and values of every position decoded so far; they go from step to step without passing through numpy."""

    def __init__(self, shape: CacheShape, dtype: str) -> None:
        self._shape, self._dtype = shape, np.dtype(dtype)
        self.length = 0
        self.inputs: dict[str, OrtValue] = {}
        # Where the decoder is to write, if not into memory of its own.
        self.outputs: dict[str, OrtValue] = {}

    def advance(self, results: Mapping[str, OrtValue], count: int) -> None:  # noqa: ARG002
        """Take over what the decoder gave back after reading `count` more positions."""
        self.length += count

    @abstractmethod
    def frozen(self) -> "Positions":
        """What was read so far, which whatever is read from now on does not change."""

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values of the positions so far."""
        numbers = 2 * self._shape.layers * self._shape.kv_heads * self._shape.head_dim * self.length
        return numbers * self._dtype.itemsize


class Positions(NamedTuple):
    """What a decoder made of the first positions, to go on from as often as one likes: values [1, K, P, E] by input."""

    length: int
    nbytes: int
    values: Mapping[str, OrtValue]


class GrowingCache(KVCache):
    """For decoders of plain operators: every step gives new tensors, which are one position longer."""

    def __init__(self, shape: CacheShape, dtype: str, start: Positions | None = None) -> None:
        super().__init__(shape, dtype)
        if start is not None:
            self.length, self.inputs = start.length, dict(start.values)
            return
        empty = np.zeros((1, shape.kv_heads, 0, shape.head_dim), dtype=dtype)
        self.inputs = {name: OrtValue.ortvalue_from_numpy(empty) for name in shape.past_names()}

    def advance(self, results: Mapping[str, OrtValue], count: int) -> None:
        """Take the new tensors."""
        super().advance(results, count)
        names = zip(self._shape.past_names(), self._shape.present_names(), strict=True)
        self.inputs = {past: results[present] for past, present in names}

    def frozen(self) -> Positions:
        """The tensors as they are: nobody writes into them."""
        return Positions(self.length, self.nbytes, self.inputs)


class SharedCache(KVCache):
    """For fused decoders: one buffer for past and present, into which a step writes its own positions alone.

    GroupQueryAttention takes an output that lies where its input does for such a buffer, of which only the positions
    that its lengths say are read; nothing is copied from step to step.
    """

    def __init__(self, shape: CacheShape, dtype: str, room: int, start: Positions | None = None) -> None:
        """Make room for so many positions, those to start from among them."""
        super().__init__(shape, dtype)
        # The memory is the arrays' own, and zeros that nobody has written yet take none of it.
        self._buffers_1KPE: dict[str, npt.NDArray[np.generic]] = {
            name: np.zeros((1, shape.kv_heads, room, shape.head_dim), dtype=dtype) for name in shape.past_names()
        }
        self.inputs = {name: OrtValue.ortvalue_from_numpy(buffer) for name, buffer in self._buffers_1KPE.items()}
        names = zip(shape.past_names(), shape.present_names(), strict=True)
        self.outputs = {present: self.inputs[past] for past, present in names}
        if start is not None:
            self.length = start.length
            for name, buffer in self._buffers_1KPE.items():
                buffer[:, :, : start.length] = start.values[name].numpy()

    def frozen(self) -> Positions:
        """A copy of what was read so far."""
        values = {
            name: OrtValue.ortvalue_from_numpy(buffer[:, :, : self.length].copy())  # a view would hold all of it
            for name, buffer in self._buffers_1KPE.items()
        }
        return Positions(self.length, self.nbytes, values)
