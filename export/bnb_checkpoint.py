"""A checkpoint in bitsandbytes' 4 or 8 bit for machines with a GPU: a Hugging Face folder, reloaded and compared."""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from .assembly import Progress, sample_source
from .contract.prompt import write_tokenizer
from .folders.out_folder import making
from .graphs.checkpoint import Checkpoint, open_checkpoint
from .graphs.tracing import ExportError, quiet
from .llava.projectors import llava_class
from .verification.graph_runner import ValuesError
from .verification.parity import MAX_NEW_TOKENS, Difference, Expected, SamplePrompt, record
from .verification.reference import TorchReference

# Matched from the beginning of a module's full name. These stay as they are: a picture's features and the choice among
# tokens suffer most, and save least.
KEPT = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
# A broken checkpoint is off by its whole signal; sound ones are bounded as the graphs of so many bits are.
LOGITS_RMS = {4: 0.6, 8: 0.3}
BLOCK = 64  # weights to a scale
FORMATS = {4: "nf4", 8: "int8"}

_CARD = Template("""\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, switchkd, bitsandbytes]
---

# A vision-language model in $format

The language model's layers are $format by bitsandbytes; vision encoder, projector, embeddings and `lm_head` are kept as
they were. $megabytes MB of weights in place of $before. Made by switchkd.

Compared with the original on a CPU, on $prompts prompts: the logits are off by $logits of their root mean square,
$equal of $prompts greedy answers of $tokens tokens are equal.

```python
from transformers import AutoProcessor
from $module import $class_name

model = $class_name.from_pretrained(".", device_map="auto")
processor = AutoProcessor.from_pretrained(".")
```
""")


@dataclass(frozen=True)
class BnbReport:
    """What was written: bytes of weights before and after, and how far the logits moved."""

    path: Path
    bytes: int
    bytes_before: int
    logits_rms: float
    equal_answers: int
    prompts: int
    note: str | None  # of what ends an answer


def export_bnb(checkpoint: Path, out: Path, bits: int, progress: Progress | None = None) -> BnbReport:
    """Write a checkpoint with its language model's layers in 4 bit (NF4) or 8 bit (LLM.int8), `bits`.

    Written apart, loaded again, compared, and only then renamed. Raises ExportError or ValuesError.
    """
    tell = progress or (lambda *_: None)
    with making(out, ExportError, last="config.json", apart_from=checkpoint) as folder:
        tell("ask the original", 0, 3)
        source = open_checkpoint(checkpoint)
        _check_widths(source, bits)
        prompts = sample_source(source)[:4]
        expected = record(TorchReference(source.model, source.ends.ids), prompts)
        source.release()
        tell("quantise", 1, 3)
        _write(source, folder, bits)
        tell("load and compare", 2, 3)
        reloaded = _load(source, folder, dtype=torch.float32)
        report = _compare(reloaded, source, folder, out, prompts, expected, LOGITS_RMS[bits])
        _write_card(folder, report, FORMATS[bits], type(reloaded))
    return report


def _check_widths(source: Checkpoint, bits: int) -> None:
    text = source.config.text_config
    for name in ("hidden_size", "intermediate_size"):
        if bits == 4 and getattr(text, name) % BLOCK:
            raise ExportError(
                f"{source.path}: {name} is {getattr(text, name)}, no multiple of {BLOCK}: bitsandbytes cannot run such "
                "layers in 4 bit on a CPU, so nothing could be compared; choose --bits 8"
            )


def _load(source: Checkpoint, path: Path, **options: Any) -> LlavaForConditionalGeneration:
    with quiet():
        model: LlavaForConditionalGeneration = llava_class(source.config).from_pretrained(
            path, use_safetensors=True, local_files_only=True, device_map="cpu", **options
        )
    model.eval()
    return model


def _write(source: Checkpoint, folder: Path, bits: int) -> None:
    """Quantise while loading, and save at once: a 4-bit model that has run on a CPU cannot be saved any more."""
    dtype = source.stored_dtype
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=KEPT,
    )
    # As it was read and checked: what the weights do not have, its config does not ask for.
    plain = copy.deepcopy(source.config)
    model = _load(source, source.path, config=plain, dtype=dtype, quantization_config=config)
    assert model.generation_config is not None  # transformers makes one of config.json where there is no file
    model.generation_config.eos_token_id = list(source.ends.ids)
    with quiet():
        model.save_pretrained(folder)
    for file in source.path.iterdir():
        settings = file.suffix in (".json", ".jinja", ".txt") and not file.name.endswith(".index.json")
        if settings and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    write_tokenizer(source.path, folder)


def _compare(
    model: LlavaForConditionalGeneration,
    source: Checkpoint,
    folder: Path,
    out: Path,
    prompts: list[SamplePrompt],
    expected: list[Expected],
    logits_rms: float,
) -> BnbReport:
    """What was kept must give the same numbers, what was quantised numbers within the bound."""
    quantised = [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
    if not quantised:
        raise ExportError(f"{source.path}: nothing of it was quantised; its language model has no linear layers")
    reference = TorchReference(model, source.ends.ids)
    kept, logits = Difference(), Difference()
    found = record(reference, prompts)
    for got, want in zip(found, expected, strict=True):
        assert got.values is not None  # a few prompts, compared closely
        assert want.values is not None
        kept.add(got.values.embeds_1TD, want.values.embeds_1TD)
        if got.values.features_PND is not None and want.values.features_PND is not None:
            kept.add(got.values.features_PND, want.values.features_PND)
        logits.add(got.values.logits_RV, want.values.logits_RV)
    kept.check(f"{source.path}: what is kept (pictures, embeddings)", 1e-4, 1e-4)
    logits.check(f"{source.path}: logits", float("inf"), logits_rms)
    if logits.relative_rms == 0:
        raise ValuesError(f"{source.path}: not one logit moved, so the quantised weights were not used")
    return BnbReport(
        path=out,
        bytes=_weight_bytes(folder),
        bytes_before=_weight_bytes(source.path),
        logits_rms=logits.relative_rms,
        equal_answers=sum(got.answer.tokens == want.answer.tokens for got, want in zip(found, expected, strict=True)),
        prompts=len(prompts),
        note=source.ends.note,
    )


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _write_card(folder: Path, report: BnbReport, name: str, kind: type[LlavaForConditionalGeneration]) -> None:
    text = _CARD.substitute(
        format=name,
        megabytes=f"{report.bytes / 1e6:.1f}",
        before=f"{report.bytes_before / 1e6:.1f}",
        logits=f"{report.logits_rms:.1e}",
        equal=report.equal_answers,
        prompts=report.prompts,
        tokens=MAX_NEW_TOKENS,
        class_name=kind.__name__,
        module="transformers" if kind is LlavaForConditionalGeneration else kind.__module__,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
