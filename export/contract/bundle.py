"""The bundle's contract, free of torch: how a bundle folder is read and refused, and what its manifest says.

docs/bundle.md describes the same in words. Nothing here trusts the folder: every path, name and number is checked
before anything is opened.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self

from ..folders.digests import sha256
from .json_fields import BundleError, parse_object
from .manifest import (
    DECODER,
    EMBED_TOKENS,
    EXACT,
    FORMS,
    FUSED,
    GRAPHS,
    INT7,
    INT8,
    MANIFEST,
    NUM_LOGITS_TO_KEEP,
    PORTABLE,
    UINT8,
    VISION_ENCODER,
    WEIGHTS,
    CacheShape,
    FileFacts,
    GraphFile,
    Manifest,
    ModelFacts,
    TensorSpec,
    Variant,
    fused_tensors,
    portable_tensors,
)
from .onnx_wire import OnnxWireError, read_names
from .pixels import PictureError, Preprocessing
from .prompt import special_tokens

__all__ = [
    "CHAT_TEMPLATE",
    "DECODER",
    "DOMAINS",
    "EMBED_TOKENS",
    "EXACT",
    "FORMS",
    "FUSED",
    "GRAPHS",
    "INT7",
    "INT8",
    "MANIFEST",
    "NUM_LOGITS_TO_KEEP",
    "PORTABLE",
    "REQUIRED_FILES",
    "TOKENIZER",
    "UINT8",
    "VISION_ENCODER",
    "WEIGHTS",
    "Bundle",
    "BundleError",
    "CacheShape",
    "FileFacts",
    "GraphFile",
    "Manifest",
    "ModelFacts",
    "TensorSpec",
    "Variant",
    "fused_tensors",
    "portable_tensors",
    "read_manifest",
    "sha256",
]

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
        try:
            return cls._open(path, precision, check_hashes)
        except OSError as error:  # no right to look into it, a name that no file can have, a disk that fails
            raise BundleError(f"{path}: cannot be read ({error.strerror}); see to its disk and permissions") from error

    @classmethod
    def _open(cls, path: Path, precision: str | None, check_hashes: bool) -> Self:
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
        if (reader := bundle.prefill()) is not None:
            reader.graph(VISION_ENCODER)
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
        """The file that `read_tokenizer` reads."""
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
        """The same in the precision that reads pictures and prompts, or None where this one reads its own."""
        precision = self.manifest.prefill_of(self.precision)
        if precision is None or (self.form is not None and self.form not in self.manifest.forms(precision)):
            return None
        return replace(self, precision=precision)

    def graph(self, name: str, precision: str | None = None) -> GraphFile:
        """The entry of a graph (one of GRAPHS), in the bundle's precision unless another is named.

        The vision encoder is the reader's where the precision has none of its own.
        """
        precision = precision or self.precision
        if name == VISION_ENCODER:
            precision = self.manifest.encoder_of(precision)
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
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise BundleError(f"{path}: not a name in UTF-8, by which onnxruntime opens files; rename the folder") from None
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
    places = _places(path.resolve())
    for name in (MANIFEST, *manifest.files):
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\\" in name:
            raise BundleError(f"{path / MANIFEST}: lists {name!r}, which is outside the bundle; do not use this bundle")
        file = path / relative
        if not file.is_file():
            raise BundleError(f"{file}: missing; copy the bundle again or export again")
        if not any(file.resolve().is_relative_to(place) for place in places):
            raise BundleError(f"{file}: links to outside the bundle; do not use this bundle")
    for name, facts in manifest.files.items():
        file, size = path / name, (path / name).stat().st_size
        if size != facts.bytes:
            raise BundleError(f"{file}: {size:,} bytes, the manifest says {facts.bytes:,}; copy the bundle again")
        if check_hashes and sha256(file) != facts.sha256:
            raise BundleError(f"{file}: its SHA-256 is not the manifest's, so it was altered; copy the bundle again")


def _places(root: Path) -> list[Path]:
    """Where the files of a bundle may really lie: in its folder, or in the blobs of the hub's cache that it is in.

    That cache keeps a file once, under its hash, and links to it: snapshots/REVISION/NAME to blobs/HASH.
    """
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            return [root, folder.parent.parent / "blobs"]  # itself and not where a link of this name leads
    return [root]


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
    file = path / "tokenizer_config.json"
    return special_tokens(parse_object(_read_text(file), str(file)))
