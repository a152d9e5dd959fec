"""What `switchkd eval` can ask: a checkpoint folder, a bundle folder, a server; each as training/evaluation asks it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from switchkd.export.contract.bundle import CHAT_TEMPLATE, REQUIRED_FILES, Bundle
from switchkd.export.folders.digests import sha256
from switchkd.training.evaluation.asking import Model
from switchkd.training.evaluation.kept_answers import Answer
from switchkd.training.evaluation.questions import EvaluationError, Question

CHECKPOINT_BATCH, SERVER_BATCH = 16, 4
_MANIFEST, _CONFIG, _GENERATION = "manifest.json", "config.json", "generation_config.json"
# A checkpoint is its weights, and what turns text and pictures into its input; not its card or its logs.
_OF_A_CHECKPOINT = (
    *(_CONFIG, _GENERATION, "tokenizer.json", "tokenizer_config.json", "tokenizer.model", CHAT_TEMPLATE),
    *("preprocessor_config.json", "processor_config.json", "chat_template.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json"),
)


def is_address(word: str) -> bool:
    """Whether a MODEL is a server."""
    return word.startswith(("http://", "https://"))


def open_model(
    word: str, *, precision: str | None, served: str | None, batch: int | None, threads: int | None
) -> Model:
    """The model that a word of the command line names: URL[#NAME], CHECKPOINT, BUNDLE or BUNDLE:PRECISION.

    Nothing is loaded yet. Raises EvaluationError, BundleError, ServerError.
    """
    if batch is not None and batch < 1:
        raise EvaluationError(f"--batch is {batch}, expected 1 or more")
    if is_address(word):
        from .eval_server import ServerModel

        address, _, name = word.partition("#")
        return ServerModel.connect(address, name or served, batch or SERVER_BATCH)
    folder = Path(word)
    before, colon, after = word.rpartition(":")
    if colon and not folder.exists():
        folder, precision = Path(before), after
    if (folder / _MANIFEST).is_file():
        return BundleModel(folder, Bundle.open(folder, precision), threads)
    if not (folder / _CONFIG).is_file():
        found = "is a file" if folder.is_file() else "has no config.json" if folder.is_dir() else "is not there"
        raise EvaluationError(
            f"{folder}: {found}; give a checkpoint folder, a bundle folder (BUNDLE:PRECISION takes one of its "
            "precisions), a server's address (http://host:8000/v1) or a results folder"
        )
    return CheckpointModel(folder, batch or CHECKPOINT_BATCH)


class CheckpointModel:
    """A LlavaForConditionalGeneration folder, in float32, on the GPU if there is one."""

    def __init__(self, folder: Path, batch: int) -> None:
        self._folder = folder
        self._batch = batch

    @property
    def name(self) -> str:
        """The folder's name."""
        return self._folder.resolve().name

    def identity(self) -> Mapping[str, Any]:
        """Hashes of the files that make an answer."""
        weights = [path.name for path in self._folder.glob("*.safetensors")]
        return {
            "kind": "checkpoint",
            "dtype": "float32",
            "files": _digests(self._folder, [*weights, *_OF_A_CHECKPOINT]),
        }

    def about(self) -> Mapping[str, Any]:
        """Its place, its template's hash, its own generation settings."""
        template = str(self._vlm.tokenizer.chat_template)
        return {
            "kind": "checkpoint",
            "given": str(self._folder),
            "batch": self._batch,
            "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "generation_config": _generation(self._folder),
        }

    @cached_property
    def _vlm(self) -> Any:
        """The model, loaded when it is first needed: finished results need none. Raises EvaluationError."""
        from switchkd.training.models.vlm import ModelError, load_vlm
        from switchkd.training.process.terminal import quiet_libraries

        quiet_libraries()
        try:
            return load_vlm(self._folder)
        except ModelError as error:
            raise EvaluationError(str(error)) from None

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[list[tuple[str, Answer]]]:
        """Answer batch by batch."""
        import torch

        from switchkd.training.evaluation.answers import generate_batches

        self._vlm.model.to("cuda" if torch.cuda.is_available() else "cpu")
        prompts = [(question.messages, question.picture) for question in questions]
        for answered in generate_batches(self._vlm, prompts, batch=self._batch, max_new_tokens=max_new_tokens):
            yield [(questions[index].key, Answer(text, cut)) for index, text, cut in answered]


class BundleModel:
    """A bundle in one of its precisions, through the engine that serves it; no torch."""

    def __init__(self, folder: Path, bundle: Bundle, threads: int | None) -> None:
        self._folder = folder
        self._bundle = bundle
        self._threads = threads

    @property
    def name(self) -> str:
        """The folder's name and the precision."""
        return f"{self._folder.resolve().name}:{self._bundle.precision}"

    def identity(self) -> Mapping[str, Any]:
        """Hashes of the precision's graphs, of whoever reads prompts for it, and of the settings."""
        manifest, precision = self._bundle.manifest, self._bundle.precision
        used = (precision, manifest.prefill_of(precision))
        graphs = [graph for graph in manifest.graphs if graph.precision in used]
        files = [name for graph in graphs for name in (graph.file, *graph.data)]
        digests = _digests(self._folder, [*files, *REQUIRED_FILES])
        return {"kind": "bundle", "precision": precision, "files": digests}

    def about(self) -> Mapping[str, Any]:
        """Its place, its template's hash, its own generation settings."""
        return {
            "kind": "bundle",
            "given": str(self._folder),
            "template_sha256": hashlib.sha256(self._bundle.chat_template.encode()).hexdigest(),
            "generation_config": _generation(self._folder),
        }

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[list[tuple[str, Answer]]]:
        """Answer one by one, the questions about a picture together: later ones begin behind it."""
        from switchkd.serve import ConversationError, Engine, Sampling

        engine = Engine.open(self._folder, self._bundle.precision, self._threads)
        greedy = Sampling(temperature=0.0)
        for question in sorted(questions, key=lambda question: (question.cluster, question.key)):
            pictures = [] if question.picture is None else [question.picture]
            try:
                answer = engine.answer(question.messages, pictures, max_new_tokens=max_new_tokens, sampling=greedy)
            except ConversationError as error:
                raise EvaluationError(f"{question.name}: {error}") from None
            yield [(question.key, Answer(answer.text, answer.finish_reason == "length"))]


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: sha256(folder / name) for name in sorted(set(names)) if (folder / name).is_file()}


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / _GENERATION
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
