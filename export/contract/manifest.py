"""What manifest.json says: a model's sizes, its graphs and files, and what may be run of them. Free of torch.

docs/bundle.md describes the same in words. Nothing here trusts the file: every name and number is checked.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from .json_fields import BundleError, Reader, parse_object

FORMAT = "switchkd-bundle"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
VISION_ENCODER, EMBED_TOKENS, DECODER = GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
PORTABLE = "portable"  # plain operators: any padding, any chunks, any batch
FUSED = "fused"  # a decoder in ONNX Runtime's own operators: faster, with limits that docs/bundle.md names
FORMS = (PORTABLE, FUSED)
EXACT = "fp32"  # the precision of the weights as trained

NUM_LOGITS_TO_KEEP = "num_logits_to_keep"  # transformers.js looks for this name, and then asks for one
# The weights of a graph's products of integers, the riskiest first; integer_products.py says why.
INT8, UINT8, INT7 = WEIGHTS = ("int8", "uint8", "int7")
# By precision, of bundles that were made before it was said.
_UNSAID_WEIGHTS = {"int8": INT8, "q8": INT8, "mixed": INT8, "uint8": UINT8}


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output: `dtype` as numpy names it, dimensions as numbers or as names of free axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphFile:
    """One ONNX file of a bundle with what goes in and out, in the graph's own order."""

    name: str
    precision: str
    form: str
    file: str  # relative to the bundle, with forward slashes
    data: tuple[str, ...]  # files with weights that are not inside `file`, likewise
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    integer_weights: str | None = None  # of its products of integers, as integer_products.py names them


@dataclass(frozen=True)
class CacheShape:
    """The KV cache: one key and one value of [batch, kv_heads, past, head_dim] for every layer."""

    layers: int
    kv_heads: int
    head_dim: int

    def past_names(self) -> list[str]:
        """Names of the decoder's cache inputs, key before value, layer by layer."""
        return [f"past_key_values.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]

    def present_names(self) -> list[str]:
        """Names of the decoder's cache outputs, in the order of `past_names`."""
        return [f"present.{layer}.{part}" for layer in range(self.layers) for part in ("key", "value")]


@dataclass(frozen=True)
class ModelFacts:
    """What a runtime must know about the model besides its graphs."""

    image_token: str
    image_token_id: int
    tokens_per_picture: int
    picture_shape: tuple[int, int, int]  # channels, height, width of pixel_values
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    hidden_size: int
    max_positions: int
    cache: CacheShape


def portable_tensors(
    graph: str, model: ModelFacts, cache_dtype: str = "float32"
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of a graph (one of GRAPHS) in the portable form, for a model of these sizes.

    The batch axis has the one name by which transformers.js knows it: it makes empty caches of it.
    """
    if graph == VISION_ENCODER:
        pixels = TensorSpec("pixel_values", "float32", ("pictures", *model.picture_shape))
        features = TensorSpec("image_features", "float32", ("pictures", model.tokens_per_picture, model.hidden_size))
        return (pixels,), (features,)
    embeds = TensorSpec("inputs_embeds", "float32", ("batch_size", "time", model.hidden_size))
    if graph == EMBED_TOKENS:
        return (TensorSpec("input_ids", "int64", ("batch_size", "time")),), (embeds,)
    cache = model.cache

    def layers(names: list[str], length: str) -> list[TensorSpec]:
        return [TensorSpec(name, cache_dtype, ("batch_size", cache.kv_heads, length, cache.head_dim)) for name in names]

    mask = TensorSpec("attention_mask", "int64", ("batch_size", "total"))  # total = past + time
    positions = TensorSpec("position_ids", "int64", ("batch_size", "time"))
    keep = TensorSpec(NUM_LOGITS_TO_KEEP, "int64", ())  # 0: a row of logits for every new token; n: for the last n
    logits = TensorSpec("logits", "float32", ("batch_size", "logits_time", model.vocab_size))
    return (
        (embeds, mask, positions, keep, *layers(cache.past_names(), "past")),
        (logits, *layers(cache.present_names(), "total")),
    )


def fused_tensors(
    model: ModelFacts, cache_dtype: str = "float32"
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of the decoder in the fused form, which counts positions itself."""
    inputs, outputs = portable_tensors(DECODER, model, cache_dtype)
    return tuple(tensor for tensor in inputs if tensor.name != "position_ids"), outputs


@dataclass(frozen=True)
class FileFacts:
    """Size and SHA-256 of one file as it was exported."""

    bytes: int
    sha256: str


class Variant(NamedTuple):
    """One way to run a bundle: a precision, the form of its decoder, and who reads prompts if it does not itself."""

    precision: str
    form: str
    prefill: str | None = None  # a precision; its decoder has the same form


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; `source` and `verification` are records for people and tools."""

    model: ModelFacts
    graphs: tuple[GraphFile, ...]
    files: Mapping[str, FileFacts]
    source: Mapping[str, Any]
    verification: Mapping[str, Any]
    prefill: str | None = None  # the precision that reads pictures and prompts for others, see `prefill_of`

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions in the order of the export; the first is the default.

        One that only reads for others has no embeddings, and cannot be asked for.
        """
        names = dict.fromkeys(graph.precision for graph in self.graphs)
        whole = {graph.precision for graph in self.graphs if graph.name == EMBED_TOKENS}
        return tuple(name for name in names if name in whole or name != self.prefill)

    def forms(self, precision: str) -> tuple[str, ...]:
        """The forms in which a precision has the decoder; the first is the default."""
        return tuple(graph.form for graph in self.graphs if graph.name == DECODER and graph.precision == precision)

    def cache_dtype(self, precision: str) -> str | None:
        """The type of a precision's KV cache, as numpy names it; None where it has no decoder."""
        first = self.model.cache.past_names()[0]
        decoders = (graph for graph in self.graphs if graph.name == DECODER and graph.precision == precision)
        return next((tensor.dtype for graph in decoders for tensor in graph.inputs if tensor.name == first), None)

    def prefill_of(self, precision: str) -> str | None:
        """The precision that reads pictures and prompts in this one's place, or None.

        The cache goes from one to the other, so its type must be equal. Float32 reads its own: it is chosen for being
        exact.
        """
        if self.prefill is None or precision in (self.prefill, EXACT):
            return None
        return self.prefill if self.cache_dtype(precision) == self.cache_dtype(self.prefill) else None

    def variants(self) -> dict[str, Variant]:
        """Everything that can be run, by its name in `verification` and for people."""
        found: dict[str, Variant] = {}
        for precision in self.precisions:
            forms, prefill = self.forms(precision), self.prefill_of(precision)
            for place, form in enumerate(forms):
                found[precision if place == 0 else f"{precision} {form}"] = Variant(precision, form)
            if prefill is not None and forms:  # once, in the form that is served
                served = FUSED if FUSED in forms else forms[0]
                found[f"{precision} after {prefill}"] = Variant(precision, served, prefill)
        return found

    def graph_bytes(self, precision: str, form: str | None = None, prefill: str | None = None) -> dict[str, int]:
        """Bytes of each graph of a variant, data files included; `form` is the decoder's (None: the default)."""
        form = form or next(iter(self.forms(precision)), None)
        sizes = dict.fromkeys(GRAPHS, 0)
        used: dict[str, list[str | None]] = {
            VISION_ENCODER: [prefill or self.encoder_of(precision)],
            EMBED_TOKENS: [precision],
            DECODER: [precision, prefill],
        }
        for graph in self.graphs:
            if graph.precision in used[graph.name] and (graph.name != DECODER or graph.form == form):
                sizes[graph.name] += sum(self.files[name].bytes for name in (graph.file, *graph.data))
        return sizes

    def encoder_of(self, precision: str) -> str:
        """The precision whose vision encoder this one has: its own, or where it has none that of its reader."""
        have = {graph.precision for graph in self.graphs if graph.name == VISION_ENCODER}
        reader = self.prefill_of(precision)
        return reader if reader in have and precision not in have else precision

    def to_json(self) -> str:
        """Write the manifest as the text of manifest.json."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read manifest.json; raises BundleError naming the field that is missing, wrong or of a newer format."""
        content = parse_object(text, MANIFEST)
        if content.get("format") != FORMAT:
            raise BundleError(f"{MANIFEST}: format is {content.get('format')!r}, expected {FORMAT!r}; export again")
        if content.get("format_version") != FORMAT_VERSION:
            raise BundleError(
                f"{MANIFEST}: format_version is {content.get('format_version')!r}, this switchkd reads "
                f"{FORMAT_VERSION}; export again, or install the switchkd that wrote it"
            )
        root = Reader(content, MANIFEST)
        files = root.object("files")
        manifest = cls(
            model=_read_model(root.object("model")),
            graphs=tuple(_read_graph(graph) for graph in root.objects("graphs")),
            files={name: _read_file(files.object(name)) for name in files.content},
            source=root.object("source").content,
            verification=root.object("verification").content,
            prefill=None if content.get("prefill") is None else root.text("prefill"),
        )
        decoders = dict.fromkeys(graph.precision for graph in manifest.graphs if graph.name == DECODER)
        if manifest.prefill is not None and manifest.prefill not in decoders:
            raise BundleError(
                f"{MANIFEST}: prefill is {manifest.prefill!r}, but its decoders are in {', '.join(decoders)}; "
                "export again"
            )
        return manifest


def _read_model(model: Reader) -> ModelFacts:
    cache = model.object("cache")
    return ModelFacts(
        image_token=model.text("image_token"),
        image_token_id=model.count("image_token_id"),
        tokens_per_picture=model.count("tokens_per_picture"),
        picture_shape=_read_picture_shape(model),
        eos_token_ids=model.counts("eos_token_ids"),
        vocab_size=model.count("vocab_size"),
        hidden_size=model.count("hidden_size"),
        max_positions=model.count("max_positions"),
        cache=CacheShape(
            layers=cache.count("layers"),
            kv_heads=cache.count("kv_heads"),
            head_dim=cache.count("head_dim"),
        ),
    )


def _read_picture_shape(model: Reader) -> tuple[int, int, int]:
    shape = model.counts("picture_shape")
    if len(shape) != 3:
        raise BundleError(f"{model.where}: picture_shape is {shape}, expected channels, height, width; export again")
    return shape[0], shape[1], shape[2]


def _read_graph(graph: Reader) -> GraphFile:
    name = graph.text("name")
    if name not in GRAPHS:
        raise BundleError(f"{graph.where}: name is {name!r}, expected one of {', '.join(GRAPHS)}; export again")
    form = graph.text("form")
    if form not in FORMS:
        raise BundleError(f"{graph.where}: form is {form!r}, this switchkd knows {', '.join(FORMS)}; update it")

    def tensors(key: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(tensor.text("name"), tensor.text("dtype"), tensor.dimensions("shape"))
            for tensor in graph.objects(key)
        )

    return GraphFile(
        name=name,
        precision=graph.text("precision"),
        form=form,
        file=graph.text("file"),
        data=graph.texts("data"),
        inputs=tensors("inputs"),
        outputs=tensors("outputs"),
        integer_weights=_read_integer_weights(graph),
    )


def _read_integer_weights(graph: Reader) -> str | None:
    """What the manifest says, or what a bundle has that was made before it said so: all of 8 bits."""
    if "integer_weights" not in graph.content:
        return _UNSAID_WEIGHTS.get(graph.text("precision"))
    weights = None if graph.content["integer_weights"] is None else graph.text("integer_weights")
    if weights not in (None, *WEIGHTS):
        raise BundleError(
            f"{graph.where}: integer_weights is {weights!r}, this switchkd knows {', '.join(WEIGHTS)}; update it"
        )
    return weights


def _read_file(facts: Reader) -> FileFacts:
    return FileFacts(facts.count("bytes"), facts.text("sha256"))
