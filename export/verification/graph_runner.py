"""Runs a bundle's graphs with onnxruntime: do they load, carry the promised names, axes and shapes, and hold together?

Shapes in names: B batch, C channels, H height, W width, P pictures, N visual tokens, D hidden size, T new tokens,
R some of them (the last ones, where logits are asked for), V vocabulary.
"""

import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from ..contract.bundle import (
    DECODER,
    EMBED_TOKENS,
    FUSED,
    NUM_LOGITS_TO_KEEP,
    PORTABLE,
    VISION_ENCODER,
    Bundle,
    GraphFile,
    ModelFacts,
    TensorSpec,
    Variant,
)
from ..contract.integer_products import make_exact

MAX_PROMPT = 2048  # tokens that go in at once
MAX_PAST = 4096  # positions before them
REMEMBERED = 32  # prompts whose pictures' features are kept: megabytes each
_SHORT = 64  # new tokens
_ROUNDING = 0.2  # relative; another token's logits are off by their whole size

Array = npt.NDArray[Any]
Cache = list[Array]  # key and value of every layer, as CacheShape.past_names orders them

_ONNX_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
# onnxruntime's errors have no common base of their own.
_ORT_ERRORS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


class VerificationError(ValueError):
    """A graph that is not what the bundle promises; the subclasses say in which way."""


class GraphRunError(VerificationError):
    """onnxruntime cannot load or run the graph."""


class NamesError(VerificationError):
    """Inputs or outputs are missing, too many, or in another order."""


class AxesError(VerificationError):
    """An input or output has another type, another size, or a fixed axis that must be free."""


class ShapeError(VerificationError):
    """A result has another shape than promised, or is not finite."""


class ValuesError(VerificationError):
    """Results are further from the expected values than allowed."""


class ScoreError(VerificationError):
    """A quantised graph is further from the reference than it was at export."""


class TokensError(VerificationError):
    """Greedy answers differ where they must not."""


@dataclass(frozen=True)
class Greedy:
    """A greedy answer: its tokens (the end token included), and the logits that each was chosen from."""

    tokens: list[int]
    logits_TV: Array


class GraphRunner:
    """The three graphs of a bundle in one precision, each result checked against the manifest's promise.

    With `prefill`, the same bundle in another precision, that one encodes pictures, and its decoder reads whatever is
    more than a token.
    """

    def __init__(self, bundle: Bundle, prefill: Bundle | None = None) -> None:
        self.bundle = bundle
        self._prefill = prefill or bundle
        self._sessions: dict[tuple[str, str], onnxruntime.InferenceSession] = {}
        self._features: dict[bytes, Array] = {}
        self.seconds = 0.0  # that the last run took, without the checks of what came out

    @classmethod
    def open(cls, path: Path, variant: Variant) -> Self:
        """Open one of `Manifest.variants` of a bundle folder; raises BundleError."""
        bundle = Bundle.open(path, variant.precision).in_form(variant.form)
        return cls(bundle, None if variant.prefill is None else bundle.prefill())

    @property
    def form(self) -> str:
        """The decoder's form."""
        return self.bundle.graph(DECODER).form

    def run(self, name: str, inputs: Sequence[Array]) -> list[Array]:
        """Run one graph on inputs in its own order; raises GraphRunError, NamesError, AxesError and ShapeError."""
        bundle = self._prefill if name == VISION_ENCODER else self.bundle
        return self._run(bundle.graph(name), inputs)

    def _run(self, graph: GraphFile, inputs: Sequence[Array]) -> list[Array]:
        feeds = {spec.name: array for spec, array in zip(graph.inputs, inputs, strict=True)}
        session = self._session(graph)
        start = time.perf_counter()
        try:
            outputs = session.run([spec.name for spec in graph.outputs], feeds)
        except _ORT_ERRORS as error:
            raise GraphRunError(f"{graph.file}: fails at {_shapes(feeds)}: {_one_line(error)}") from error
        self.seconds = time.perf_counter() - start
        results = [np.asarray(output) for output in outputs]
        _check_shapes(graph, list(inputs), results)
        return results

    def _session(self, graph: GraphFile) -> onnxruntime.InferenceSession:
        """Open a graph at its first use, and close the decoder for the encoder and the other way: both are large."""
        key = graph.name, graph.file
        if key not in self._sessions:
            apart = {VISION_ENCODER: DECODER, DECODER: VISION_ENCODER}.get(graph.name)
            for other in [other for other in self._sessions if other[0] == apart]:
                del self._sessions[other]
            self._sessions[key] = _open_session(self.bundle, graph)
            _check_interface(self._sessions[key], graph)
        return self._sessions[key]

    def encode(self, pixels_PCHW: Array) -> Array:
        """Pictures to features_PND, of late ones remembered: a prompt's pictures are asked for again and again."""
        key = hashlib.sha256(pixels_PCHW.tobytes()).digest()
        if key not in self._features:
            if len(self._features) == REMEMBERED:
                del self._features[next(iter(self._features))]
            self._features[key] = self.run(VISION_ENCODER, [pixels_PCHW])[0]
        return self._features[key]

    def encode_ahead(self, pictures: Iterable[Array]) -> None:
        """Encode and remember the pictures of up to REMEMBERED prompts, before the decoder takes the encoder's room."""
        for pixels_PCHW in pictures:
            self.encode(pixels_PCHW)

    def embed(self, ids_BT: Array) -> Array:
        """Token ids to embeds_BTD."""
        return self.run(EMBED_TOKENS, [ids_BT])[0]

    def empty_cache(self, batch: int = 1) -> Cache:
        """A cache of length zero."""
        cache = self.bundle.model.cache
        shape = (batch, cache.kv_heads, 0, cache.head_dim)
        return [np.zeros(shape, dtype=self.bundle.cache_dtype) for _ in cache.past_names()]

    def decode(
        self, embeds_BTD: Array, cache: Cache, mask_BS: Array | None = None, *, keep: int = 0
    ) -> tuple[Array, Cache]:
        """New tokens after a cache: logits of the last `keep` of them (0: logits_BTV of all) and the grown cache.

        `mask_BS` is zero at padding. Raises ShapeError for another number of rows, and what `run` raises.
        """
        batch, new = embeds_BTD.shape[:2]
        total = cache[0].shape[2] + new
        if mask_BS is None:
            mask_BS = np.ones((batch, total), dtype=np.int64)
        arrays = [embeds_BTD, mask_BS]
        if self.form == PORTABLE:  # the fused decoder counts by itself
            arrays.append(np.maximum(np.cumsum(mask_BS, axis=1) - 1, 0)[:, total - new :])
        arrays.append(np.array(keep, dtype=np.int64))
        graph = (self.bundle if new == 1 else self._prefill).graph(DECODER)
        logits_BRV, *grown = self._run(graph, [*arrays, *cache])
        if logits_BRV.shape[1] != (rows := min(keep or new, new)):
            raise ShapeError(
                f"{graph.file}: logits has {logits_BRV.shape[1]} rows for {NUM_LOGITS_TO_KEEP} "
                f"{keep} and {new} new tokens, expected {rows}"
            )
        return logits_BRV, grown

    def logits(self, embeds_1TD: Array, rows_R: Array) -> Array:
        """logits_RV at some places of a whole prompt, of which 2,048 tokens are read at a time."""
        cache, found = self.empty_cache(), []
        for start in range(0, embeds_1TD.shape[1], MAX_PROMPT):
            logits_1TV, cache = self.decode(embeds_1TD[:, start : start + MAX_PROMPT], cache)
            inside = (rows_R >= start) & (rows_R < start + MAX_PROMPT)
            found.append(logits_1TV[0, rows_R[inside] - start])
        return np.concatenate(found)

    def merge(self, ids: Sequence[int], pixels_PCHW: Array | None) -> Array:
        """embeds_1TD of a prompt, visual features in the places of its image tokens."""
        embeds_1TD = self.embed(np.array([ids], dtype=np.int64))
        if pixels_PCHW is not None:
            places_T = np.array(ids) == self.bundle.model.image_token_id
            embeds_1TD[0, places_T] = self.encode(pixels_PCHW).reshape(-1, embeds_1TD.shape[-1])
        return embeds_1TD

    def greedy(self, ids: Sequence[int], pixels_PCHW: Array | None, max_new_tokens: int) -> Greedy:
        """The most likely answer, token by token, ending with an end token or at `max_new_tokens`."""
        embeds_1TD, cache = self.merge(ids, pixels_PCHW), self.empty_cache()
        tokens: list[int] = []
        rows: list[Array] = []
        while True:
            logits_11V, cache = self.decode(embeds_1TD, cache, keep=1)
            rows.append(logits_11V[0, 0])
            tokens.append(int(rows[-1].argmax()))
            if tokens[-1] in self.bundle.model.eos_token_ids or len(tokens) == max_new_tokens:
                return Greedy(tokens, np.stack(rows))
            embeds_1TD = self.embed(np.array([tokens[-1:]], dtype=np.int64))


def exercise(runner: GraphRunner, *, full: bool = False) -> int:
    """Run every graph over its free axes: pictures, batch, new tokens, and the positions before them.

    Without `full` one and two of pictures and batch, and short prompts. Returns the number of runs; raises what
    `GraphRunner.run` raises.
    """
    model = runner.bundle.model
    random = np.random.default_rng(0)
    pictures = (1, 2, 3, 4) if full else (1, 2)
    for count in pictures:
        runner.run(VISION_ENCODER, [random.uniform(-1, 1, (count, *model.picture_shape)).astype(np.float32)])
    runs = len(pictures)
    for batch, lengths in _shapes_to_run(model, full):
        if runner.form == FUSED and batch > 1:  # after a prompt it takes a batch's tokens one at a time
            lengths = (lengths[0], *(length for length in lengths[1:] if length == 1))
        cache = runner.empty_cache(batch)
        for new in lengths:
            embeds_BTD = runner.embed(random.integers(0, model.vocab_size, (batch, new)))
            logits_BTV, grown = runner.decode(embeds_BTD, cache)
            if 1 < new <= _SHORT:  # longer ones would take their time again and show nothing else
                _check_last_rows(runner, embeds_BTD, cache, logits_BTV)
            cache = grown
            runs += 2
    return runs


def _check_last_rows(runner: GraphRunner, embeds_BTD: Array, cache: Cache, logits_BTV: Array) -> None:
    """Raise ValuesError where the last one and two rows of logits are others than among all rows.

    Activations of 8 bit have one scale over all rows, so that fewer rows are rounded otherwise.
    """
    for keep in (1, 2):
        expected_BRV = logits_BTV[:, -keep:]
        logits_BRV, _ = runner.decode(embeds_BTD, cache, keep=keep)
        off = float(np.linalg.norm(logits_BRV - expected_BRV) / np.linalg.norm(expected_BRV))
        if off > _ROUNDING:
            raise ValuesError(
                f"{runner.bundle.graph(DECODER).file}: logits with {NUM_LOGITS_TO_KEEP} {keep} are {off:.2e} off the "
                f"last of all, allowed {_ROUNDING}; they are of other tokens"
            )


def _shapes_to_run(model: ModelFacts, full: bool) -> list[tuple[int, tuple[int, ...]]]:
    """Batch, and how many tokens go in one after the other."""
    shapes: list[tuple[int, tuple[int, ...]]] = [
        (1, (1,)),
        (1, (3, 1)),
        (2, (model.tokens_per_picture + 5, 4, 1, 1)),
    ]
    if full:
        shapes += [(batch, (33, 2, 1)) for batch in (3, 4)]
        prompt = min(MAX_PROMPT, model.max_positions)
        shapes.append((1, (prompt,)))
        # As many full prompts as make the longest past, and a token after it.
        past = min(MAX_PAST, model.max_positions - 1)
        whole, rest = divmod(past, prompt)
        shapes.append((1, (*[prompt] * whole, *[rest] * (rest > 0), 1)))
    return shapes


def _open_session(bundle: Bundle, graph: GraphFile) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # Threads that wait by spinning take the processor from whatever trains beside a verification.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The arena grows in powers of two and gives nothing back: 1.6 GB of a decoder of 2 GB.
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3  # errors reach us as exceptions; warnings would go to the terminal
    make_exact(options, graph.integer_weights, bundle.path / graph.file)
    try:
        return onnxruntime.InferenceSession(bundle.path / graph.file, options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise GraphRunError(f"{graph.file}: onnxruntime cannot load it: {_one_line(error)}") from error


def _check_interface(session: onnxruntime.InferenceSession, graph: GraphFile) -> None:
    for kind, found, promised in (
        ("inputs", session.get_inputs(), graph.inputs),
        ("outputs", session.get_outputs(), graph.outputs),
    ):
        names, expected = [value.name for value in found], [spec.name for spec in promised]
        if names != expected:
            raise NamesError(f"{graph.file}: its {kind} are {names}, expected {expected}")
        for value, spec in zip(found, promised, strict=True):
            have = TensorSpec(value.name, _ONNX_TYPES.get(value.type, value.type), tuple(value.shape))
            if have != spec:
                raise AxesError(
                    f"{graph.file}: {spec.name} is {have.dtype} {list(have.shape)}, "
                    f"expected {spec.dtype} {list(spec.shape)}; a number in place of a name is a frozen axis"
                )


def _check_shapes(graph: GraphFile, inputs: list[Array], outputs: list[Array]) -> None:
    sizes: dict[str, int] = {}
    for spec, array in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        expected = tuple(
            sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            for axis, size in zip(spec.shape, array.shape, strict=False)
        )
        if array.shape != expected or len(array.shape) != len(spec.shape) or array.dtype != spec.dtype:
            raise ShapeError(
                f"{graph.file}: {spec.name} came out as {array.dtype} {list(array.shape)}, expected "
                f"{spec.dtype} {list(spec.shape)} with {sizes}"
            )
    for spec, array in zip(graph.outputs, outputs, strict=True):
        if not np.isfinite(array).all():
            raise ShapeError(f"{graph.file}: {spec.name} holds numbers that are not finite at {sizes}")


def _shapes(feeds: dict[str, Array]) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in list(feeds.items())[:4])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
