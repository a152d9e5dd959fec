"""The bundle's contract, free of torch: what manifest.json says, and how a bundle folder is read and refused.

docs/bundle.md describes the same in words. Nothing here trusts the folder: every path, name and number is checked
before anything is opened.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

from .json_fields import BundleError as BundleError  # as a name of this module too
from .json_fields import Reader, parse_object
from .onnx_wire import OnnxWireError, read_names
from .pixels import PictureError, Preprocessing

FORMAT = "switchkd-bundle"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
VISION_ENCODER, EMBED_TOKENS, DECODER = GRAPHS = ("vision_encoder", "embed_tokens", "decoder_model_merged")
PORTABLE = "portable"  # plain operators: any padding, any chunks, any batch
FUSED = "fused"  # a decoder in ONNX Runtime's own operators: faster, with limits that docs/bundle.md names
FORMS = (PORTABLE, FUSED)
EXACT = "fp32"  # the precision of the weights as trained

NUM_LOGITS_TO_KEEP = "num_logits_to_keep"  # transformers.js looks for this name, and then asks for one

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer.json"
# What a bundle needs besides its graphs; anything else in the folder is for people or other runtimes.
REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "preprocessor_config.json",
    CHAT_TEMPLATE,
)
# Operators that every ONNX Runtime carries; any other domain would need code from elsewhere.
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
# Pickles and what may hold them: loading one would run it. Nothing here does, and a bundle has no use for them.
_PICKLES = frozenset([".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"])


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
    """One way to run a bundle: a precision, the form of its decoder, and who reads prompts if not that decoder."""

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
    prefill: str | None = None  # the precision whose decoder reads prompts for others, see `prefill_of`

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions in the order of the export; the first is the default."""
        return tuple(dict.fromkeys(graph.precision for graph in self.graphs))

    def forms(self, precision: str) -> tuple[str, ...]:
        """The forms in which a precision has the decoder; the first is the default."""
        return tuple(graph.form for graph in self.graphs if graph.name == DECODER and graph.precision == precision)

    def cache_dtype(self, precision: str) -> str | None:
        """The type of a precision's KV cache, as numpy names it; None where it has no decoder."""
        first = self.model.cache.past_names()[0]
        decoders = (graph for graph in self.graphs if graph.name == DECODER and graph.precision == precision)
        return next((tensor.dtype for graph in decoders for tensor in graph.inputs if tensor.name == first), None)

    def prefill_of(self, precision: str) -> str | None:
        """The precision whose decoder reads prompts in this one's place, or None.

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
        for graph in self.graphs:
            mine = graph.precision == precision or (graph.precision == prefill and graph.name == DECODER)
            if mine and (graph.name != DECODER or graph.form == form):
                sizes[graph.name] += sum(self.files[name].bytes for name in (graph.file, *graph.data))
        return sizes

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
        if manifest.prefill is not None and manifest.prefill not in manifest.precisions:
            raise BundleError(
                f"{MANIFEST}: prefill is {manifest.prefill!r}, but its precisions are "
                f"{', '.join(manifest.precisions)}; export again"
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
    )


def _read_file(facts: Reader) -> FileFacts:
    return FileFacts(facts.count("bytes"), facts.text("sha256"))


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A bundle folder that was found complete, opened for one precision and one form of the decoder."""

    path: Path
    precision: str
    manifest: Manifest
    preprocessing: Preprocessing
    chat_template: str
    special_tokens: Mapping[str, str]
    form: str | None = None  # of the decoder; None: the one that the manifest lists first

    @classmethod
    def open(cls, path: str | Path, precision: str | None = None, *, check_hashes: bool = False) -> Self:
        """Read and check a bundle folder; `precision=None` takes the first that was exported.

        Sizes are always compared with the manifest, contents (SHA-256) and files that it does not list with
        `check_hashes`. No graph is loaded before every check has passed. Raises BundleError.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if precision is None and manifest.precisions:
            precision = manifest.precisions[0]
        if precision not in manifest.precisions:
            have = ", ".join(manifest.precisions) or "none"
            raise BundleError(f"{path}: holds no graphs in {precision!r}, only {have}; choose one of them or export it")
        _check_files(path, manifest, check_hashes)
        _check_unlisted(path, manifest, check_hashes)
        bundle = cls.of(path, precision, manifest)
        for name in GRAPHS:
            bundle.graph(name)  # raises where it is not there
        for graph in manifest.graphs:
            if graph.precision in (precision, manifest.prefill_of(precision)):
                _check_graph(path, graph)
        return bundle

    @classmethod
    def of(cls, path: Path, precision: str, manifest: Manifest) -> Self:
        """A bundle of this manifest with its settings read, its files unchecked; raises BundleError."""
        return cls(
            path=path,
            precision=precision,
            manifest=manifest,
            preprocessing=_read_preprocessing(path),
            chat_template=_read_text(path / CHAT_TEMPLATE),
            special_tokens=_read_special_tokens(path),
        )

    @property
    def model(self) -> ModelFacts:
        """What a runtime must know about the model besides its graphs."""
        return self.manifest.model

    @property
    def tokenizer_path(self) -> Path:
        """The file that `tokenizers.Tokenizer.from_file` reads."""
        return self.path / TOKENIZER

    @property
    def cache_dtype(self) -> str:
        """The type of the KV cache, as numpy names it; precisions differ in it."""
        dtype = self.manifest.cache_dtype(self.precision)
        assert dtype is not None
        return dtype

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms in which the decoder is there, the default first."""
        return self.manifest.forms(self.precision)

    def in_form(self, form: str) -> Self:
        """The same with the decoder in another form; raises BundleError where it is not among `forms`."""
        if form not in self.forms:
            have = ", ".join(self.forms)
            raise BundleError(f"{self.path}: holds no {form} decoder in {self.precision}, only {have}; export it")
        return replace(self, form=form)

    def prefill(self) -> Self | None:
        """The same in the precision whose decoder reads prompts, or None where this one's reads its own."""
        precision = self.manifest.prefill_of(self.precision)
        if precision is None or (self.form is not None and self.form not in self.manifest.forms(precision)):
            return None
        return replace(self, precision=precision)

    def graph(self, name: str, precision: str | None = None) -> GraphFile:
        """The entry of a graph (one of GRAPHS), in the bundle's precision unless another is named."""
        precision = precision or self.precision
        for graph in self.manifest.graphs:
            formed = name != DECODER or self.form in (None, graph.form)
            if graph.name == name and graph.precision == precision and formed:
                return graph
        raise BundleError(f"{self.path / MANIFEST}: lists no {name} in {precision}; export again")

    def graph_path(self, name: str, precision: str | None = None) -> Path:
        """The ONNX file of a graph (one of GRAPHS), in the bundle's precision unless another is named."""
        return self.path / self.graph(name, precision).file


def read_manifest(path: Path) -> Manifest:
    """Read a bundle folder's manifest.json, or raise BundleError saying what stands there instead."""
    if not path.exists():
        raise BundleError(f"{path}: no such folder; make a bundle with `switchkd export CHECKPOINT {path}`")
    if not path.is_dir():
        raise BundleError(f"{path}: is a file, expected a bundle folder")
    if not (path / MANIFEST).is_file():
        checkpoint = (path / "config.json").is_file()
        remedy = "if this is a checkpoint, run `switchkd export` on it" if checkpoint else "export again"
        raise BundleError(f"{path / MANIFEST}: missing, so this is no complete bundle; {remedy}")
    try:
        return Manifest.from_json(_read_text(path / MANIFEST))
    except BundleError as error:
        raise BundleError(f"{path}/{error}") from error


def _check_files(path: Path, manifest: Manifest, check_hashes: bool) -> None:
    needed = [name for graph in manifest.graphs for name in (graph.file, *graph.data)]
    for name in [*REQUIRED_FILES, *needed]:
        if name not in manifest.files:
            raise BundleError(f"{path / MANIFEST}: does not list {name}, which every bundle needs; export again")
    root = path.resolve()
    for name, facts in manifest.files.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\\" in name:
            raise BundleError(f"{path / MANIFEST}: lists {name!r}, which is outside the bundle; do not use this bundle")
        file = path / relative
        if not file.is_file():
            raise BundleError(f"{file}: missing; copy the bundle again or export again")
        if not file.resolve().is_relative_to(root):
            raise BundleError(f"{file}: links to outside the bundle; do not use this bundle")
        size = file.stat().st_size
        if size != facts.bytes:
            raise BundleError(f"{file}: {size:,} bytes, the manifest says {facts.bytes:,}; copy the bundle again")
        if check_hashes and sha256(file) != facts.sha256:
            raise BundleError(f"{file}: its SHA-256 is not the manifest's, so it was altered; copy the bundle again")


def _check_unlisted(path: Path, manifest: Manifest, everything: bool) -> None:
    """Refuse what could be taken for a part of the bundle, or with `everything` any file that the manifest lacks.

    Hidden ones are a hub's or a version control's. Otherwise somebody's picture beside the bundle does no harm.
    """
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if any(part.startswith(".") for part in name.parts) or not (file.is_file() or file.is_symlink()):
            continue
        if name.suffix.lower() in _PICKLES:
            raise BundleError(f"{file}: {name.suffix} files can hold code and belong in no bundle; remove it")
        if name == Path(MANIFEST) or name.as_posix() in manifest.files:
            continue
        if everything or name.suffix.lower().startswith((".onnx", ".ort")):
            raise BundleError(f"{file}: the manifest does not list it; remove it, or copy the bundle again")


def _check_graph(path: Path, graph: GraphFile) -> None:
    """Refuse a graph with operators from elsewhere, or with weights in files that the manifest does not name for it."""
    file = path / graph.file
    try:
        names = read_names(file)
    except OnnxWireError as error:
        raise BundleError(f"{file}: not an ONNX graph ({error}); copy the bundle again") from error
    if strange := sorted(names.domains - set(DOMAINS)):
        raise BundleError(f"{file}: uses operators of {strange[0]!r}, which ONNX Runtime lacks; do not use this bundle")
    for name in sorted(names.locations):
        if (PurePosixPath(graph.file).parent / name).as_posix() not in graph.data or "\\" in name:
            raise BundleError(
                f"{file}: keeps weights in {name!r}, which the manifest does not list for it; do not use this bundle"
            )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read ({error}); copy the bundle again") from error


def _read_preprocessing(path: Path) -> Preprocessing:
    file = path / "preprocessor_config.json"
    try:
        return Preprocessing.from_config(parse_object(_read_text(file), str(file)))
    except PictureError as error:
        raise BundleError(f"{file}: {error}; export again") from error


def _read_special_tokens(path: Path) -> dict[str, str]:
    """Special tokens by the names that chat templates know, like `bos_token`."""
    file = path / "tokenizer_config.json"
    tokens = {}
    for key, value in parse_object(_read_text(file), str(file)).items():
        value = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(value, str):
            tokens[key] = value
    return tokens
