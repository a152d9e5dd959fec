"""The language model of a bundle: embeddings in, the logits of the next token out, memory in a KVCache.

Shapes in names: T positions given at once, D hidden width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from switchkd.export.contract.bundle import DECODER, EMBED_TOKENS, FUSED, NUM_LOGITS_TO_KEEP, Bundle

from .graph_session import GraphSession, MissingOperatorError
from .kv_cache import GrowingCache, KVCache, Positions, SharedCache

Floats = npt.NDArray[np.float32]


class Decoder:
    """Token embeddings and decoder of a bundle; holds no conversation, so many can share it.

    `reader`, the same bundle in another precision, reads prompts: its decoder is in memory too then, and both write the
    same cache.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None, reader: Bundle | None = None) -> None:
        self._embed = GraphSession(bundle, EMBED_TOKENS, threads)
        self._decode = _open_decoder(bundle, threads)
        self._prefill = self._decode if reader is None else _open_decoder(reader, threads)
        self._cache_shape, self._cache_dtype = bundle.model.cache, bundle.cache_dtype

    @property
    def form(self) -> str:
        """Which of the bundle's decoders runs."""
        return self._decode.form

    def new_cache(self, room: int, start: Positions | None = None) -> KVCache:
        """A memory for one conversation of at most `room` positions, empty or with those to start from."""
        if self.form == FUSED:
            return SharedCache(self._cache_shape, self._cache_dtype, room, start)
        return GrowingCache(self._cache_shape, self._cache_dtype, start)

    def embed(self, tokens: Sequence[int]) -> Floats:
        """Return embeddings_TD of token ids."""
        ids = self._embed.value("input_ids", np.array([tokens]))
        embeddings_TD: Floats = self._embed.run({"input_ids": ids})["inputs_embeds"].numpy()[0]
        return embeddings_TD

    def read(self, embeddings_TD: Floats, cache: KVCache) -> Floats:
        """Read T more positions into the cache and return logits_V of the token after them."""
        past, new = cache.length, len(embeddings_TD)
        session = self._decode if new == 1 else self._prefill
        arrays: dict[str, npt.NDArray[Any]] = {
            "inputs_embeds": embeddings_TD[None],
            "attention_mask": np.ones((1, past + new)),
            "position_ids": np.arange(past, past + new)[None],
            NUM_LOGITS_TO_KEEP: np.array(1),
        }
        feeds = {name: session.value(name, array) for name, array in arrays.items() if session.takes(name)}
        outputs = session.run({**feeds, **cache.inputs}, cache.outputs, give_back=new > 1)
        cache.advance(outputs, new)
        logits_V: Floats = outputs["logits"].numpy()[0, -1].astype(np.float32)
        return logits_V


def _open_decoder(bundle: Bundle, threads: int | None) -> GraphSession:
    """Open the fused decoder where a bundle has both and onnxruntime its operators; a form that was chosen is kept."""
    if bundle.form is None and FUSED in bundle.forms[1:]:
        try:
            return GraphSession(bundle.in_form(FUSED), DECODER, threads)
        except MissingOperatorError:  # a build made small: what is listed first needs less
            pass
    return GraphSession(bundle, DECODER, threads)
