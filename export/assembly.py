"""From a checkpoint folder to a bundle folder: write every file, verify every graph, and only then give it its name."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .bundle import (
    CHAT_TEMPLATE,
    DECODER,
    FUSED,
    GRAPHS,
    MANIFEST,
    PORTABLE,
    TOKENIZER,
    Bundle,
    FileFacts,
    GraphFile,
    Manifest,
    ModelFacts,
    sha256,
)
from .card import write_card
from .checkpoint import Checkpoint, open_checkpoint
from .fused_decoder import FusedDecoder
from .graphs import EmbedTokens, ExportError, GraphDescription, PortableDecoder, VisionEncoder, quiet
from .onnx_graph import OnnxGraph, Storage
from .parity import SamplePrompt, compare, record, sample_prompts
from .precisions import PRECISIONS, Precision, choose_precisions
from .reference import TorchReference
from .verification import GraphRunner, exercise

DEFAULT_PRECISIONS = ("fp32", "int8")
# What `--decoder` names. With both, the portable one has the name by which transformers.js finds it.
DECODERS = {PORTABLE: (PORTABLE,), FUSED: (FUSED,), "both": (PORTABLE, FUSED)}
# transformers.js takes the tokenizer's class by name; transformers 5 writes names that it does not know.
_TOKENIZER_CLASSES = {"qwen2": "Qwen2Tokenizer"}

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


@dataclass(frozen=True)
class ExportReport:
    """What an export made: the verified bundle, bytes by graph and precision, measured parity, seconds by step."""

    path: Path
    bytes: dict[str, dict[str, int]]
    verification: dict[str, Any]
    seconds: dict[str, float]


class _Steps:
    """Tells how far the export is, and keeps the seconds of every step."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress = total, progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step under its name."""
        if self.progress is not None:
            self.progress(name, len(self.seconds), self.total)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    precisions: Sequence[str] = DEFAULT_PRECISIONS,
    decoder: str = PORTABLE,
    storage: Storage | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a LlavaForConditionalGeneration folder as a verified bundle at `out`, the first precision its default.

    `decoder` is one of DECODERS. `storage` says which graphs get their weights in files of their own; by default those
    that must. The checkpoint is only read. Everything is written beside `out` and renamed at the end, so that a
    failure leaves nothing under the final name. Raises ExportError, VerificationError, or PromptError.
    """
    chosen = choose_precisions(list(precisions))
    if decoder not in DECODERS:
        raise ExportError(f"decoder {decoder!r} is unknown; choose from {', '.join(DECODERS)}")
    forms = DECODERS[decoder]
    check_place(checkpoint, out)
    steps = _Steps(total=1 + len(GRAPHS) + len(forms) + (1 + len(forms)) * len(chosen), progress=progress)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.partial-") as holder:
        bundle = Path(holder) / out.name
        (bundle / "onnx").mkdir(parents=True)
        with steps.step("load checkpoint"):
            source = open_checkpoint(checkpoint)
        manifest = _write_bundle(source, bundle, forms, chosen, storage or Storage(), steps)
        sizes = {variant: manifest.graph_bytes(*found) for variant, found in manifest.variants().items()}
        bundle.rename(out)
    return ExportReport(out, sizes, dict(manifest.verification), steps.seconds)


def check_place(checkpoint: Path, out: Path) -> None:
    """Raise ExportError where `out` cannot be made; make the folder around it."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ExportError(f"{out}: exists already; remove it or choose another place")
    if out.resolve().is_relative_to(checkpoint.resolve()):
        raise ExportError(f"{out}: lies inside the checkpoint, which is never written to; choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)


def sample_source(source: Checkpoint) -> list[SamplePrompt]:
    """The prompts that a bundle of this checkpoint is compared on, without making the bundle."""
    facts = source.facts()
    with tempfile.TemporaryDirectory() as folder:
        _write_settings(source, facts, Path(folder))
        manifest = Manifest(model=facts, graphs=(), files={}, source={}, verification={})
        return sample_prompts(Bundle.of(Path(folder), "", manifest))


def _describe(config: Any, facts: ModelFacts, forms: tuple[str, ...]) -> list[GraphDescription]:
    """The graphs of a LlavaConfig, the decoder in these forms; raises ExportError for a form that it cannot have."""
    text = config.text_config
    graphs: list[GraphDescription] = [VisionEncoder(config.vision_config, facts), EmbedTokens(text, facts)]
    if PORTABLE in forms:
        graphs.append(PortableDecoder(text, facts))
    if FUSED in forms:
        graphs.append(FusedDecoder(text, facts))
        if PORTABLE in forms:
            graphs[-1].stem = f"{DECODER}_{FUSED}"
    return graphs


def _write_bundle(
    source: Checkpoint,
    bundle: Path,
    forms: tuple[str, ...],
    chosen: list[Precision],
    storage: Storage,
    steps: _Steps,
) -> Manifest:
    facts = source.facts()
    descriptions = _describe(source.config, facts, forms)
    manifest = Manifest(model=facts, graphs=(), files={}, source=_provenance(source), verification={})
    _write_settings(source, facts, bundle)
    with tempfile.TemporaryDirectory(dir=bundle.parent) as traced:
        for description in descriptions:
            with steps.step(f"export {description.stem or description.name}"):
                description.write(source.model, _onnx(Path(traced), description))
        with steps.step("ask PyTorch"):
            prompts = sample_prompts(Bundle.of(bundle, "", manifest))
            expected = record(TorchReference(source.model, facts.eos_token_ids), prompts)
        # From here on the model is in the files and in the answers: its memory goes to the graphs.
        source.release()
        graphs = _write_graphs(Path(traced), descriptions, bundle, chosen, storage, steps)
    _write_json(bundle / "config.json", {**_config(source), "transformers.js_config": _transformers_js(graphs)})
    manifest = replace(manifest, graphs=graphs, files=_hash_files(bundle))
    (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    verification: dict[str, Any] = {}
    for variant, (name, form) in manifest.variants().items():
        with steps.step(f"verify {variant}"):
            runner = GraphRunner(Bundle.open(bundle, name).in_form(form))
            verification[variant] = {
                "runs": exercise(runner),
                **compare(runner, prompts, expected, PRECISIONS[name].bounds),
            }
    manifest = replace(manifest, verification=verification)
    write_card(Bundle.open(bundle), manifest)
    manifest = replace(manifest, files=_hash_files(bundle))
    (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _write_graphs(
    traced: Path,
    descriptions: list[GraphDescription],
    bundle: Path,
    chosen: list[Precision],
    storage: Storage,
    steps: _Steps,
) -> tuple[GraphFile, ...]:
    """Make every precision from the traced float32 files, one graph at a time."""
    graphs = []
    for precision in chosen:
        with steps.step(f"write {precision.name}"), quiet():
            for description in descriptions:
                graph = OnnxGraph.read(_onnx(traced, description))
                precision.change(description.name, graph)
                file = f"onnx/{description.stem or description.name}{precision.suffix}.onnx"
                data = tuple(f"onnx/{name}" for name in graph.write(bundle / file, storage))
                inputs, outputs = description.tensors(precision.cache_dtype)
                graphs.append(
                    GraphFile(description.name, precision.name, description.form, file, data, inputs, outputs)
                )
    return tuple(graphs)


def _onnx(folder: Path, description: GraphDescription) -> Path:
    return folder / f"{description.stem or description.name}.onnx"


def _transformers_js(graphs: tuple[GraphFile, ...]) -> dict[str, Any]:
    """What transformers.js must be told: how many data files a graph has, and which caches are not float32."""
    return {
        "use_external_data_format": {Path(graph.file).name: len(graph.data) for graph in graphs if graph.data},
        "kv_cache_dtype": {
            graph.precision: dtype
            for graph in graphs
            if graph.name == DECODER and (dtype := graph.inputs[-1].dtype) != "float32"
        },
    }


def _write_settings(source: Checkpoint, facts: ModelFacts, bundle: Path) -> None:
    """Copy the checkpoint's small files, completed by what transformers.js looks for in them."""
    shutil.copyfile(source.path / TOKENIZER, bundle / TOKENIZER)
    generation = {**source.generation_config, "eos_token_id": list(source.eos_token_ids)}
    _write_json(bundle / "generation_config.json", generation)
    _write_json(bundle / "processor_config.json", _processor_config(source, facts))
    _write_json(bundle / "preprocessor_config.json", {**source.image_processor, "processor_class": "LlavaProcessor"})
    tokenizer = {**source.tokenizer_config, "chat_template": source.chat_template}
    language = source.config.text_config.model_type
    tokenizer["tokenizer_class"] = _TOKENIZER_CLASSES.get(language, tokenizer.get("tokenizer_class"))
    _write_json(bundle / "tokenizer_config.json", tokenizer)
    (bundle / CHAT_TEMPLATE).write_text(source.chat_template, encoding="utf-8")


def _config(source: Checkpoint) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    # The graphs are a plain LLaVA's, whatever class the weights need; transformers.js chooses by this name.
    config["architectures"] = ["LlavaForConditionalGeneration"]
    for part in (config, config["vision_config"], config["text_config"]):
        part.pop("_name_or_path", None)  # where the machine that put the model together had its parts
    return config


def _processor_config(source: Checkpoint, facts: ModelFacts) -> dict[str, Any]:
    """The checkpoint's, with the tokens of a picture counted so that transformers and transformers.js agree.

    Both count patches and add `num_additional_image_tokens`, but only transformers takes one away under "default".
    """
    vision = source.config.vision_config
    return {
        "processor_class": "LlavaProcessor",
        **source.processor_config,
        "image_token": facts.image_token,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": facts.tokens_per_picture - (vision.image_size // vision.patch_size) ** 2,
        "vision_feature_select_strategy": "full",
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _hash_files(bundle: Path) -> dict[str, FileFacts]:
    files = sorted(file for file in bundle.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {file.relative_to(bundle).as_posix(): FileFacts(file.stat().st_size, sha256(file)) for file in files}


def _provenance(source: Checkpoint) -> dict[str, Any]:
    """Where the bundle comes from: the checkpoint's weights by hash (no paths of this machine), and the tools."""
    weights = sorted(source.path.glob("*.safetensors"))
    return {
        "vision_model": source.config.vision_config.model_type,
        "projector": source.projector,
        "language_model": source.config.text_config.model_type,
        "parameters": source.model.num_parameters(),
        "weights": {file.name: sha256(file) for file in weights},
        "made_with": {name: version(name) for name in ("switchkd", "torch", "transformers", "onnx", "onnxruntime")},
    }
