"""Reads a prompt with its pictures: encodes those that are new, and leaves out what it remembers of the beginning.

Shapes in names: T prompt tokens, N visual tokens of a picture, D hidden width, V vocabulary.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from switchkd.export.contract.bundle import ModelFacts

from .decoder import Decoder, Floats
from .kv_cache import KVCache
from .picture_encoder import OpenPicture, PictureEncoder
from .prefix_cache import Prefix, PrefixCache, prefixes

# Positions read at once. onnxruntime's attention computes the scores of all of them with all before and among them,
# those that causality forbids too: of 770 read in one piece that is half of its work, in four parts a fifth.
AT_ONCE = 256


@dataclass(frozen=True)
class Reading:
    """A prompt on its way: its pieces' ends that are still to be read, and the features_ND of the pictures in them."""

    prompt: Sequence[int]
    to_read: Sequence[Prefix]
    features: Sequence[Floats]
    cache: KVCache


class PromptReader:
    """Prompt and pictures into a KVCache; what was made of their beginnings is kept."""

    def __init__(self, model: ModelFacts, encoder: PictureEncoder, decoder: Decoder, kept: PrefixCache) -> None:
        self._model, self._encoder, self._decoder, self._prefixes = model, encoder, decoder, kept

    def look(self, prompt: Sequence[int], pictures: Sequence[OpenPicture], room: int) -> Generator[None, None, Reading]:
        """Encode the pictures of a prompt, one a step, but for those in a beginning that is remembered.

        `room` positions are what prompt and answer take at most.
        """
        model = self._model
        keys = [picture.key for picture in pictures]
        pieces = prefixes(prompt, keys, model.image_token_id, model.tokens_per_picture) if self._prefixes.keeps else []
        cache = self._decoder.new_cache(room, self._prefixes.longest(pieces))
        to_read = [piece for piece in pieces if piece.end > cache.length]
        known = len(pieces) - len(to_read)
        features = []
        for picture in pictures[known:]:
            features.append(self._encoder.encode(picture))
            yield
        return Reading(prompt, to_read, features, cache)

    def read(self, reading: Reading) -> Generator[None, None, Floats]:
        """Read what is left of the prompt, AT_ONCE positions a step, and return logits_V of the token after it."""
        cache = reading.cache
        embeddings_TD = self._decoder.embed(reading.prompt[cache.length :])
        if reading.features:
            places_T = np.array(reading.prompt[cache.length :]) == self._model.image_token_id
            embeddings_TD[places_T] = np.concatenate(reading.features)
        start = cache.length
        for piece in reading.to_read:
            yield from self._read_on(embeddings_TD[cache.length - start : piece.end - start], cache)
            self._prefixes.keep(piece, cache)
            yield
        return (yield from self._read_on(embeddings_TD[cache.length - start :], cache))

    def _read_on(self, embeddings_TD: Floats, cache: KVCache) -> Generator[None, None, Floats]:
        # In parts of about one length: a single position left over would be read as a written token is.
        *before, last = np.array_split(embeddings_TD, -(-len(embeddings_TD) // AT_ONCE))
        for part_TD in before:
            self._decoder.read(part_TD, cache)
            yield
        return self._decoder.read(last, cache)
