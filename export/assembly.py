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
    GRAPHS,
    MANIFEST,
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
from .graphs import ExportError, GraphDescription, describe
from .parity import compare
from .precisions import Precision, choose_precisions
from .reference import TorchReference
from .verification import GraphRunner, exercise

DEFAULT_PRECISIONS = ("fp32", "int8")
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
    progress: Progress | None = None,
) -> ExportReport:
    """Export a LlavaForConditionalGeneration folder as a verified bundle at `out`, the first precision its default.

    The checkpoint is only read. Everything is written beside `out` and renamed at the end, so that a failure leaves
    nothing under the final name. Raises ExportError, VerificationError, or PromptError.
    """
    chosen = choose_precisions(list(precisions))
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ExportError(f"{out}: exists already; remove it or choose another place")
    if out.resolve().is_relative_to(checkpoint.resolve()):
        raise ExportError(f"{out}: lies inside the checkpoint, which is never written to; choose another place")
    out.parent.mkdir(parents=True, exist_ok=True)
    steps = _Steps(total=1 + len(GRAPHS) + 2 * len(chosen), progress=progress)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.partial-") as holder:
        bundle = Path(holder) / out.name
        (bundle / "onnx").mkdir(parents=True)
        with steps.step("load checkpoint"):
            source = open_checkpoint(checkpoint)
        manifest = _write_bundle(source, bundle, chosen, steps)
        sizes = {
            precision.name: {
                graph.name: manifest.files[graph.file].bytes
                for graph in manifest.graphs
                if graph.precision == precision.name
            }
            for precision in chosen
        }
        bundle.rename(out)
    return ExportReport(out, sizes, dict(manifest.verification), steps.seconds)


def _write_bundle(source: Checkpoint, bundle: Path, chosen: list[Precision], steps: _Steps) -> Manifest:
    facts = source.facts()
    _write_settings(source, facts, bundle)
    graphs = _write_graphs(source, facts, bundle, chosen, steps)
    manifest = Manifest(
        model=facts, graphs=graphs, files=_hash_files(bundle), source=_provenance(source), verification={}
    )
    (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    reference = TorchReference(source.model, facts.eos_token_ids)
    verification: dict[str, Any] = {}
    for precision in chosen:
        with steps.step(f"verify {precision.name}"):
            runner = GraphRunner(Bundle.open(bundle, precision.name))
            verification[precision.name] = {
                "runs": exercise(runner),
                **compare(runner, reference, precision.bounds),
            }
    manifest = replace(manifest, verification=verification)
    write_card(Bundle.open(bundle), manifest)
    manifest = replace(manifest, files=_hash_files(bundle))
    (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _write_graphs(
    source: Checkpoint, facts: ModelFacts, bundle: Path, chosen: list[Precision], steps: _Steps
) -> tuple[GraphFile, ...]:
    """Trace each graph once, then make every precision from the float32 files."""
    with tempfile.TemporaryDirectory(dir=bundle.parent) as traced:
        descriptions = describe(source.config, facts)
        for description in descriptions:
            with steps.step(f"export {description.name}"):
                description.write(source.model, _onnx(Path(traced), description))
        graphs = []
        for precision in chosen:
            with steps.step(f"write {precision.name}"):
                for description in descriptions:
                    file = f"onnx/{description.name}{precision.suffix}.onnx"
                    precision.write(description.name, _onnx(Path(traced), description), bundle / file)
                    inputs, outputs = description.tensors
                    graphs.append(GraphFile(description.name, precision.name, description.form, file, inputs, outputs))
    return tuple(graphs)


def _onnx(folder: Path, description: GraphDescription) -> Path:
    return folder / f"{description.name}.onnx"


def _write_settings(source: Checkpoint, facts: ModelFacts, bundle: Path) -> None:
    """Copy the checkpoint's small files, completed by what transformers.js looks for in them."""
    shutil.copyfile(source.path / TOKENIZER, bundle / TOKENIZER)
    _write_json(bundle / "config.json", _config(source))
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
