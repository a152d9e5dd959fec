"""From a checkpoint folder to a bundle folder: write every file, verify every graph, and only then give it its name."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .card.card import write_card
from .card.licence import licence_files, stated_licence
from .card.ort_files import check_ort_files, is_checked, write_ort_files
from .contract.bundle import (
    CHAT_TEMPLATE,
    DECODER,
    EMBED_TOKENS,
    EXACT,
    FUSED,
    GRAPHS,
    MANIFEST,
    PORTABLE,
    VISION_ENCODER,
    Bundle,
    FileFacts,
    GraphFile,
    Manifest,
    ModelFacts,
)
from .contract.prompt import write_tokenizer
from .folders.digests import sha256
from .folders.out_folder import making
from .graphs.checkpoint import Checkpoint, open_checkpoint
from .graphs.fused_decoder import FusedDecoder
from .graphs.onnx_graph import OnnxGraph, Storage
from .graphs.tracing import EmbedTokens, ExportError, GraphDescription, PortableDecoder, VisionEncoder, quiet
from .process.progress import Progress as Progress
from .process.progress import Steps
from .quantisation.precisions import AUTO, MIXED, Precision, choose_precisions, dtype_of, dtypes_of, precision_of
from .quantisation.weight_only import integer_weights, round_activations
from .search.calibration import Calibration
from .search.mix_options import Mixing, MixOptions
from .search.overflow import Overflow
from .search.variants import Variants
from .verification.graph_runner import GraphRunner, exercise
from .verification.parity import PAIRS, Expected, Pairs, SamplePrompt, check_pairs, compare, record, sample_prompts
from .verification.reference import TorchReference
from .verification.speed import measure_variants

DEFAULT_PRECISIONS = ("fp32", "int8")
# What `--decoder` names. With both, the portable one has the name by which transformers.js finds it.
DECODERS = {PORTABLE: (PORTABLE,), FUSED: (FUSED,), "both": (PORTABLE, FUSED)}
# transformers.js takes the tokenizer's class by name; transformers 5 writes names that it does not know.
_TOKENIZER_CLASSES = {"qwen2": "Qwen2Tokenizer"}


@dataclass(frozen=True)
class ExportReport:
    """What an export made: the verified bundle, bytes by graph and precision, measured parity, seconds by step.

    `notes` are lines about what the checkpoint's files ask for, for people.
    """

    path: Path
    bytes: dict[str, dict[str, int]]
    verification: dict[str, Any]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Plan:
    """What `export_checkpoint` was asked for, checked."""

    chosen: list[Precision]
    reader: Precision | None  # one that is not among them: it only reads pictures and prompts for others
    forms: tuple[str, ...]  # of the decoder
    prefill: str | None
    mix: MixOptions
    storage: Storage
    pairs: int
    ort: bool
    examples: Path | None
    mix_steps: int

    @property
    def writers(self) -> frozenset[str]:
        """The precisions for which `prefill` reads pictures and prompts."""
        dtype = precision_of(self.prefill).cache_dtype if self.prefill else None
        users = (each for each in self.chosen if each.cache_dtype == dtype)
        return frozenset(each.name for each in users if each.name not in (self.prefill, EXACT))

    @property
    def written(self) -> list[Precision]:
        """Those that have files of their own."""
        return self.chosen if self.reader is None else [*self.chosen, self.reader]

    def has(self, precision: Precision, graph: str) -> bool:
        """Whether a graph (one of GRAPHS) is written in a precision.

        One that only reads has no embeddings, and those it reads for have its vision encoder.
        """
        if precision is self.reader:
            return graph != EMBED_TOKENS
        return graph != VISION_ENCODER or self.reader is None or precision.name not in self.writers

    @property
    def halves(self) -> frozenset[str]:
        """The precisions that compute in float16."""
        return frozenset(each.name for each in self.written if each.cache_dtype == "float16")

    @property
    def steps(self) -> int:
        """How many steps there are to do."""
        trace = len(GRAPHS) - 1 + len(self.forms)
        write_and_verify = len(self.written) + len(self.forms) * len(self.chosen) + len(self.writers)
        always = 3  # load the checkpoint, ask PyTorch, measure the speed
        return always + trace + write_and_verify + bool(self.halves) + 2 * self.ort + self.mix_steps


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    precisions: Sequence[str] = DEFAULT_PRECISIONS,
    decoder: str = PORTABLE,
    prefill: str | None = None,
    mix: MixOptions | None = None,
    storage: Storage | None = None,
    pairs: int = PAIRS,
    ort: bool = False,
    examples: Path | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Export a LlavaForConditionalGeneration folder as a verified bundle at `out`, the first precision its default.

    `decoder` is one of DECODERS. `prefill` names the precision that reads pictures and prompts for others, as
    `Manifest.prefill_of` says; one that is not among `precisions` does nothing else. `mix` tells what `mixed` is made
    of, or `auto` found by. `storage` says which graphs get their weights in files of their own; by default those that
    must. Greedy answers are compared on so many `pairs`; with `ort` every graph is written as an .ort file too. The
    folder `examples` (an examples.json and pictures, for the demo) goes in as it is. The checkpoint is only read.
    Everything is written apart and renamed at the end, so that a failure leaves nothing under the final name. Raises
    ExportError, VerificationError, or PromptError.
    """
    chosen = choose_precisions(list(precisions))
    mix = mix or MixOptions()
    if decoder not in DECODERS:
        raise ExportError(f"decoder {decoder!r} is unknown; choose from {', '.join(DECODERS)}")
    reader = _reader(prefill, chosen)
    plan = _Plan(
        chosen,
        reader,
        DECODERS[decoder],
        prefill,
        mix,
        storage or Storage(),
        pairs,
        ort,
        examples,
        mix.steps(precisions),
    )
    _check_prefill(plan)
    check_pairs(pairs)
    if examples is not None and not examples.is_dir():
        raise ExportError(f"{examples}: no such folder; give one with pictures and an examples.json")
    steps = Steps(total=plan.steps, progress=progress)
    with making(out, ExportError, last=MANIFEST, apart_from=checkpoint) as bundle:
        (bundle / "onnx").mkdir()
        with steps.step("load checkpoint"):
            source = open_checkpoint(checkpoint)
        manifest = _write_bundle(source, bundle, plan, steps)
        sizes = {variant: manifest.graph_bytes(*found) for variant, found in manifest.variants().items()}
    return ExportReport(out, sizes, dict(manifest.verification), steps.seconds, source.notes)


def _reader(prefill: str | None, chosen: Sequence[Precision]) -> Precision | None:
    """The precision that only reads for the chosen ones; raises ExportError for one that is unknown, or a mix."""
    if prefill is None or prefill in (each.name for each in chosen):
        return None
    if prefill in (MIXED, AUTO):
        raise ExportError(f"prefill {prefill!r}: a mix reads for others only where it is among --dtype; add it there")
    return precision_of(prefill)


def _check_prefill(plan: _Plan) -> None:
    """Raise ExportError where `prefill` would read no precision's prompts."""
    if plan.prefill is not None and not plan.writers:
        names = [precision.name for precision in plan.chosen]
        dtype = precision_of(plan.prefill).cache_dtype
        raise ExportError(
            f"prefill {plan.prefill!r} is of no use to {', '.join(names)}: it takes another precision with a {dtype} "
            f"KV cache, and {EXACT} reads its own prompts; add one like {'q4' if dtype == 'float32' else 'q4f16'}"
        )


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


def _write_bundle(source: Checkpoint, bundle: Path, plan: _Plan, steps: Steps) -> Manifest:
    facts = source.facts()
    descriptions = _describe(source.config, facts, plan.forms)
    manifest = Manifest(
        model=facts, graphs=(), files={}, source=_provenance(source), verification={}, prefill=plan.prefill
    )
    _write_settings(source, facts, bundle)
    if plan.examples is not None:
        shutil.copytree(plan.examples, bundle / "examples")
    settings = Bundle.of(bundle, "", manifest)
    calibration = plan.mix.read(settings)  # before anything that takes long
    with tempfile.TemporaryDirectory(dir=bundle.parent) as traced:
        for description in descriptions:
            with steps.step(f"export {description.stem or description.name}"):
                description.write(source.model, _onnx(Path(traced), description))
        with steps.step("ask PyTorch"):
            prompts = Pairs(settings, plan.pairs)
            expected = record(TorchReference(source.model, facts.eos_token_ids), prompts, steps.pairs_done)
        # From here on the model is in the files and in the answers: its memory goes to the graphs.
        source.release()
        variants = Variants(Path(traced), settings, descriptions)
        mixing = _mix(plan, variants, calibration, steps)
        overflow = None
        if plan.halves:
            with steps.step("look for large numbers"):
                overflow = Overflow.find(variants, descriptions, prompts, expected)
        graphs = _write_graphs(Path(traced), descriptions, bundle, plan, mixing, overflow, steps)
    if plan.ort:
        with steps.step("write .ort files"):
            write_ort_files(bundle, graphs)
    manifest = replace(manifest, graphs=graphs)
    _write_json(bundle / "config.json", {**_config(source), "transformers.js_config": _transformers_js(manifest)})
    manifest = replace(manifest, files=_hash_files(bundle))
    (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    verification = _verify(bundle, manifest, prompts, expected, mixing, plan.ort, steps)
    for variant, found in manifest.variants().items():
        if overflow is not None and found.precision in plan.halves:
            used = (each for each in descriptions if each.name != DECODER or each.form == found.form)
            verification[variant]["float32"] = overflow.record(_onnx(Path(), description) for description in used)
    manifest = replace(manifest, verification=verification)
    write_card(Bundle.open(bundle), manifest)
    manifest = replace(manifest, files=_hash_files(bundle))
    (bundle / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _verify(
    bundle: Path,
    manifest: Manifest,
    prompts: Pairs,
    expected: list[Expected],
    mixing: Mixing | None,
    ort: bool,
    steps: Steps,
) -> dict[str, Any]:
    """Run and compare every variant; returns what was measured. Raises VerificationError."""
    verification: dict[str, Any] = {}
    for variant, found in manifest.variants().items():
        with steps.step(f"verify {variant}"):
            runner = GraphRunner.open(bundle, found)
            verification[variant] = {
                "runs": exercise(runner),
                **compare(runner, prompts, expected, precision_of(found.precision).bounds, steps.pairs_done),
            }
            if mixing is not None:
                verification[variant] |= mixing.record(found.precision, runner)
    if ort:
        with steps.step("verify .ort files"):
            for found in manifest.variants().values():
                if is_checked(manifest, found):
                    check_ort_files(bundle, found, prompts.first[:3])
    with steps.step("measure speed"):
        for variant, speed in measure_variants(bundle, manifest, prompts.first[0]).items():
            verification[variant]["speed"] = speed
    return verification


def _mix(plan: _Plan, variants: Variants, calibration: Calibration | None, steps: Steps) -> Mixing | None:
    """Calibrate, and find a mix where none is named; None where no precision needs pairs."""
    mixed = any(precision.name == MIXED for precision in plan.chosen)
    if not mixed and calibration is None:
        return None
    with steps.step("calibrate"):
        mixing = Mixing.prepare(plan.mix, variants, calibration)
    if mixed and plan.mix.parts is None:
        with steps.step("search"):
            mixing.search(steps.say)
    return mixing


def _write_graphs(
    traced: Path,
    descriptions: list[GraphDescription],
    bundle: Path,
    plan: _Plan,
    mixing: Mixing | None,
    overflow: Overflow | None,
    steps: Steps,
) -> tuple[GraphFile, ...]:
    """Make every precision from the traced float32 files, one graph at a time."""
    graphs = []
    for precision in plan.written:
        with steps.step(f"write {precision.name}"), quiet():
            for description in descriptions:
                if not plan.has(precision, description.name):
                    continue
                mixed = mixing if precision.name == MIXED else None
                graph = OnnxGraph.read(mixed.file(description) if mixed else _onnx(traced, description))
                if overflow is not None:
                    graph.largest = overflow.largest[_onnx(traced, description).name]
                precision.change(description.name, graph)
                if description.name == DECODER and precision.name in plan.writers:
                    round_activations(graph)  # it will see one token at a time
                file = f"onnx/{description.stem or description.name}{precision.suffix}.onnx"
                data = tuple(f"onnx/{name}" for name in graph.write(bundle / file, plan.storage))
                inputs, outputs = description.tensors(precision.cache_dtype)
                graphs.append(
                    GraphFile(
                        description.name,
                        precision.name,
                        description.form,
                        file,
                        data,
                        inputs,
                        outputs,
                        integer_weights(graph),
                    )
                )
    return tuple(graphs)


def _onnx(folder: Path, description: GraphDescription) -> Path:
    return folder / f"{description.stem or description.name}.onnx"


def _transformers_js(manifest: Manifest) -> dict[str, Any]:
    """What transformers.js must be told: how many data files a graph has, and which caches are not float32."""
    graphs = manifest.graphs
    return {
        # Where nobody asks for one: a browser's own default may not be here.
        "dtype": dtypes_of(manifest, manifest.precisions[0]),
        "use_external_data_format": {Path(graph.file).name: len(graph.data) for graph in graphs if graph.data},
        "kv_cache_dtype": {
            dtype_of(graph.precision): dtype
            for graph in graphs
            if graph.name == DECODER and (dtype := graph.inputs[-1].dtype) != "float32"
        },
    }


def _write_settings(source: Checkpoint, facts: ModelFacts, bundle: Path) -> None:
    """Copy the checkpoint's small files, completed by what transformers.js looks for in them."""
    write_tokenizer(source.path, bundle)
    generation = {**source.generation_config, "eos_token_id": list(source.ends.ids)}
    _write_json(bundle / "generation_config.json", generation)
    _write_json(bundle / "processor_config.json", _processor_config(source, facts))
    _write_json(bundle / "preprocessor_config.json", {**source.image_processor, "processor_class": "LlavaProcessor"})
    tokenizer = json.loads((bundle / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["chat_template"] = source.chat_template
    language = source.config.text_config.model_type
    tokenizer["tokenizer_class"] = _TOKENIZER_CLASSES.get(language, tokenizer.get("tokenizer_class"))
    _write_json(bundle / "tokenizer_config.json", tokenizer)
    (bundle / CHAT_TEMPLATE).write_text(source.chat_template, encoding="utf-8")
    for file in licence_files(source.path):
        shutil.copyfile(file, bundle / file.name)


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
        "licence": {
            "stated": stated_licence(source.path),
            "files": [file.name for file in licence_files(source.path)],
        },
        "weights": {file.name: sha256(file) for file in weights},
        "made_with": {name: version(name) for name in ("switchkd", "torch", "transformers", "onnx", "onnxruntime")},
    }
