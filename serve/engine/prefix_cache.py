"""What a language model made of pictures, kept: the next question about them is read from behind the last one.

A prompt is always read in the same pieces, from the end of one picture to the end of the next, whether a piece is
known or not. So an answer is the same to the last bit whatever was asked before it, in every precision.

Shapes in names: T prompt tokens.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .kv_cache import KVCache, Positions
from .prefix_folder import PrefixFolder

PREFIX_MEMORY = 128  # MiB


@dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt, up to the end of a picture: where it ends, and the key of its tokens and pictures."""

    end: int
    key: bytes


def prefixes(prompt: Sequence[int], pictures: Sequence[bytes], image_token: int, tokens: int) -> list[Prefix]:
    """Return the prefixes of prompt_T that end with a picture, the shortest first, but not the whole prompt.

    `pictures` are keys of its pictures, each of which takes `tokens` image tokens.
    """
    ids_T = np.array(prompt, dtype=np.int64)
    ends = np.flatnonzero(ids_T == image_token)[tokens - 1 :: tokens] + 1
    found, digest, start = [], hashlib.sha256(), 0
    for end, picture in zip(ends.tolist(), pictures, strict=True):
        digest.update(ids_T[start:end].tobytes() + picture)
        start = end
        if end < len(ids_T):
            found.append(Prefix(end, digest.digest()))
    return found


class PrefixCache:
    """KV caches of prefixes within a budget of memory; what was not used for the longest time goes first.

    Threads may share it.
    """

    def __init__(self, budget: int, folder: PrefixFolder | None = None) -> None:
        """Keep at most `budget` bytes, and whatever is kept in a folder too; without either nothing is."""
        self.keeps = bool(budget) or folder is not None
        self._budget, self._folder = budget, folder
        self._kept: OrderedDict[bytes, Positions] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def longest(self, candidates: Sequence[Prefix]) -> Positions | None:
        """Return what was made of the longest of these prefixes that is known, or None. Raises PrefixFolderError."""
        for prefix in reversed(candidates):
            with self._lock:
                if prefix.key in self._kept:
                    self._kept.move_to_end(prefix.key)
                    return self._kept[prefix.key]
            if self._folder is not None and (positions := self._folder.read(prefix.key)) is not None:
                self._remember(prefix, positions)
                return positions
        return None

    def keep(self, prefix: Prefix, cache: KVCache) -> None:
        """Remember a prefix's cache as it is now. Raises PrefixFolderError."""
        if self._folder is None and cache.nbytes > self._budget:
            return
        positions = cache.frozen()
        self._remember(prefix, positions)
        if self._folder is not None:
            self._folder.write(prefix.key, positions)

    def _remember(self, prefix: Prefix, positions: Positions) -> None:
        if positions.nbytes > self._budget:
            return
        with self._lock:
            if prefix.key not in self._kept:
                self._kept[prefix.key] = positions
                self._bytes += positions.nbytes
            self._kept.move_to_end(prefix.key)
            while self._bytes > self._budget:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= dropped.nbytes
