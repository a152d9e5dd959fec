"""Tokens per second of the portable and the fused decoder, side by side, with random weights.

With --prefill, also of two decoders one after the other: one reads the prompt, the other writes the answer.

Run from the repository's root: python -m benchmarks.decoders --dtype q4,int8 --prefill int8
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime import OrtValue
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.qwen2 import Qwen2Config
from transformers.models.siglip import SiglipVisionConfig

from switchkd.export.contract.bundle import DECODER, CacheShape, ModelFacts
from switchkd.export.graphs.fused_decoder import FusedDecoder
from switchkd.export.graphs.onnx_graph import OnnxGraph, Storage
from switchkd.export.graphs.tracing import PortableDecoder, quiet
from switchkd.export.quantisation.precisions import Precision, choose_precisions
from switchkd.export.quantisation.weight_only import round_activations

from .measuring import describe_machine, spread, times_ms

MB = 1e6
WRITER = "_writer"  # a precision for which another one reads prompts


class Decoder:
    """A decoder's file, open: reads a prompt into a fresh cache, and goes on from there."""

    def __init__(self, path: Path, cache: CacheShape, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value.type for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.past_names = cache.past_names()
        dtype = np.float16 if self.inputs[self.past_names[0]] == "tensor(float16)" else np.float32
        empty = np.zeros((1, cache.kv_heads, 0, cache.head_dim), dtype=dtype)
        self.empty = [OrtValue.ortvalue_from_numpy(empty) for _ in self.past_names]

    def read(self, embeds_1TD: np.ndarray, cache: list[Any], keep: int = 1) -> list[Any]:
        """T more positions after the cache, logits of the last `keep` (0: all); returns the grown cache.

        It never passes through numpy.
        """
        past, new = cache[0].shape()[2], embeds_1TD.shape[1]
        arrays = {
            "inputs_embeds": embeds_1TD,
            "attention_mask": np.ones((1, past + new), dtype=np.int64),
            "position_ids": np.arange(past, past + new, dtype=np.int64)[None],
            "num_logits_to_keep": np.array(keep, dtype=np.int64),
        }
        feeds = {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items() if name in self.inputs}
        feeds |= dict(zip(self.past_names, cache, strict=True))
        grown: list[Any]
        _, *grown = self.session.run_with_ort_values(self.outputs, feeds)
        return grown

    def write(self, embeds_1TD: np.ndarray, cache: list[Any]) -> None:
        """The same positions one at a time."""
        for place in range(embeds_1TD.shape[1]):
            cache = self.read(embeds_1TD[:, place : place + 1], cache)


def language_model(args: argparse.Namespace) -> tuple[LlavaForConditionalGeneration, ModelFacts]:
    """A Qwen2 of the asked size inside a LLaVA, whose vision encoder is as good as nothing here."""
    text = Qwen2Config(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=12,
        vision_use_head=False,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))
    cache = CacheShape(args.layers, args.kv_heads, args.width // args.heads)
    return model.eval(), ModelFacts("<image>", 3, 4, (3, 24, 24), (2,), args.vocab, args.width, 4096, cache)


def make_files(args: argparse.Namespace, precisions: list[Precision], folder: Path) -> ModelFacts:
    """Write both decoders in every precision as FORM_PRECISION.onnx, and as the export does where another one reads."""
    model, facts = language_model(args)
    text: Any = model.config.text_config
    for form in (PortableDecoder(text, facts), FusedDecoder(text, facts)):
        form.write(model, folder / f"{form.form}.onnx")
        for precision in precisions:
            with quiet():
                graph = OnnxGraph.read(folder / f"{form.form}.onnx")
                precision.change(DECODER, graph)
                graph.write(folder / f"{form.form}_{precision.name}.onnx", Storage())
                if args.prefill not in (None, precision.name):
                    round_activations(graph)
                    graph.write(folder / f"{form.form}_{precision.name}{WRITER}.onnx", Storage())
    return facts


@dataclass(frozen=True)
class System:
    """What answers: the decoder that reads the prompt and the one that writes, which may be the same."""

    name: str
    form: str
    reader: Path
    writer: Path

    @property
    def bytes(self) -> int:
        """Of its files."""
        return sum(file.stat().st_size for file in {self.reader, self.writer})


def systems(names: list[str], prefill: str | None, folder: Path) -> list[System]:
    """Every precision alone, and after the one that reads prompts, in both forms."""

    def file(form: str, name: str) -> Path:
        return folder / f"{form}_{name}.onnx"

    forms = ("portable", "fused")
    alone = [System(name, form, file(form, name), file(form, name)) for name in names for form in forms]
    others = [name for name in names if name != prefill] if prefill else []
    return alone + [
        System(f"{name} after {prefill}", form, file(form, str(prefill)), file(form, f"{name}{WRITER}"))
        for name in others
        for form in forms
    ]


def measure(
    args: argparse.Namespace, precisions: list[Precision], facts: ModelFacts, folder: Path
) -> list[dict[str, Any]]:
    """Time all systems in turns: the prompt with all logits, with the last ones, and the answer."""
    random = np.random.default_rng(0)
    prompt_1TD = random.standard_normal((1, args.prompt, args.width), dtype=np.float32)
    answer_1TD = random.standard_normal((1, args.answer, args.width), dtype=np.float32)
    found = systems([precision.name for precision in precisions], args.prefill, folder)
    files = {file for system in found for file in (system.reader, system.writer)}
    opened = {file: Decoder(file, facts.cache, args.threads) for file in files}
    works: dict[str, dict[str, Any]] = {"every": {}, "last": {}, "decode": {}}
    for system in found:
        reader, writer = opened[system.reader], opened[system.writer]
        key = f"{system.name} {system.form}"
        works["every"][key] = partial(reader.read, prompt_1TD, reader.empty, keep=0)
        works["last"][key] = partial(reader.read, prompt_1TD, reader.empty, keep=1)
        works["decode"][key] = partial(writer.write, answer_1TD, reader.read(prompt_1TD, reader.empty))
    cpu = torch.device("cpu")
    reading = times_ms(
        {(f"{stage}/{key}"): work for stage in ("every", "last") for key, work in works[stage].items()},
        args.repeats,
        cpu,
    )
    writing = times_ms(works["decode"], args.repeats, cpu)
    return [row(system, args, reading, writing, found[0]) for system in found]


def row(
    system: System,
    args: argparse.Namespace,
    reading: dict[str, list[float]],
    writing: dict[str, list[float]],
    first: System,
) -> dict[str, Any]:
    """A system's rates, and how many times as fast as the first system's with every row of logits it was."""
    key, base = f"{system.name} {system.form}", f"{first.name} {first.form}"
    return {
        "decoder": system.name,
        "form": system.form,
        "bytes": system.bytes,
        **{stage: per_second(args.prompt, reading[f"{stage}/{key}"]) for stage in ("every", "last")},
        **{f"{stage}_gain": gain(reading[f"every/{base}"], reading[f"{stage}/{key}"]) for stage in ("every", "last")},
        "decode": per_second(args.answer, writing[key]),
        "decode_gain": gain(writing[base], writing[key]),
    }


def per_second(tokens: int, milliseconds: list[float]) -> dict[str, float]:
    """Tokens per second from the times of so many: median, least and most."""
    return spread([1000 * tokens / taken for taken in milliseconds])


def gain(first_ms: list[float], other_ms: list[float]) -> float:
    """How many times as fast as the first: the median over the rounds, for whose load both paid."""
    return statistics.median(a / b for a, b in zip(first_ms, other_ms, strict=True))


def show(row: dict[str, Any]) -> None:
    """Print one row of the table."""
    numbers = [
        f"{row[stage]['median']:.1f} ({row[stage]['min']:.1f}–{row[stage]['max']:.1f}), × {row[f'{stage}_gain']:.2f}"
        for stage in ("every", "last", "decode")
    ]
    print(f"| {row['decoder']} | {row['form']} | {row['bytes'] / MB:.0f} | {' | '.join(numbers)} |", flush=True)


def main() -> None:
    """Make the files, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, size in (("layers", 12), ("width", 896), ("heads", 14), ("kv-heads", 2), ("intermediate", 4864)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--prompt", type=int, default=770, help="tokens read at once (default: %(default)s)")
    parser.add_argument("--answer", type=int, default=16, help="tokens written one by one (default: %(default)s)")
    parser.add_argument("--dtype", default="fp32,int8,q4", help="precisions (default: %(default)s)")
    parser.add_argument("--prefill", metavar="PRECISION", help="one of --dtype that also reads prompts for the others")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write what was found here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    precisions = choose_precisions(args.dtype.split(","))
    if args.prefill not in (None, *args.dtype.split(",")):
        parser.error(f"--prefill {args.prefill} is not among --dtype {args.dtype}")
    with tempfile.TemporaryDirectory() as folder:
        facts = make_files(args, precisions, Path(folder))
        print(f"{describe_machine(torch.device('cpu'))}, onnxruntime {onnxruntime.__version__}")
        print(f"{args.layers} layers, width {args.width}, {args.heads} heads ({args.kv_heads} for keys and values), ")
        print(f"vocabulary {args.vocab:,}; prompt of {args.prompt}, answer of {args.answer}; ", end="")
        print(f"median (least–most) of {args.repeats} in turns;")
        print("× the first line's rate in the same round (a prompt's: with every row of logits)\n")
        print("| decoder | form | MB | prompt, every row, tokens/s | prompt, last row, tokens/s | answer, tokens/s |")
        print("|---|---|---|---|---|---|")
        rows = measure(args, precisions, facts, Path(folder))
        for each in rows:
            show(each)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
