"""Tokens per second of the portable and the fused decoder, side by side, with random weights.

Run from the repository's root: python -m benchmarks.decoders --dtype fp32,int8,q4
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
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

from switchkd.export.bundle import DECODER, CacheShape, ModelFacts
from switchkd.export.fused_decoder import FusedDecoder
from switchkd.export.graphs import PortableDecoder, quiet
from switchkd.export.onnx_graph import OnnxGraph, Storage
from switchkd.export.precisions import Precision, choose_precisions

from .measuring import describe_machine, spread, times_ms

MB = 1e6


class Decoder:
    """A decoder's file, open: reads a prompt into a fresh cache, and goes on from there."""

    def __init__(self, path: Path, cache: CacheShape, precision: Precision, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.past_names = cache.past_names()
        empty = np.zeros((1, cache.kv_heads, 0, cache.head_dim), dtype=precision.cache_dtype)
        self.empty = [OrtValue.ortvalue_from_numpy(empty) for _ in self.past_names]

    def read(self, embeds_1TD: np.ndarray, cache: list[Any]) -> list[Any]:
        """T more positions after the cache; returns the grown one, which never passes through numpy."""
        past, new = cache[0].shape()[2], embeds_1TD.shape[1]
        arrays = {
            "inputs_embeds": embeds_1TD,
            "attention_mask": np.ones((1, past + new), dtype=np.int64),
            "position_ids": np.arange(past, past + new, dtype=np.int64)[None],
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
    """Write both decoders in every precision as FORM_PRECISION.onnx."""
    model, facts = language_model(args)
    text: Any = model.config.text_config
    for form in (PortableDecoder(text, facts), FusedDecoder(text, facts)):
        form.write(model, folder / f"{form.form}.onnx")
        for precision in precisions:
            with quiet():
                graph = OnnxGraph.read(folder / f"{form.form}.onnx")
                precision.change(DECODER, graph)
                graph.write(folder / f"{form.form}_{precision.name}.onnx", Storage())
    return facts


def measure(
    args: argparse.Namespace, precisions: list[Precision], facts: ModelFacts, folder: Path
) -> Iterator[dict[str, Any]]:
    """Time the two forms in turns, one precision after the other."""
    random = np.random.default_rng(0)
    prompt_1TD = random.standard_normal((1, args.prompt, args.width), dtype=np.float32)
    answer_1TD = random.standard_normal((1, args.answer, args.width), dtype=np.float32)
    for precision in precisions:
        files = {form: folder / f"{form}_{precision.name}.onnx" for form in ("portable", "fused")}
        decoders = {form: Decoder(file, facts.cache, precision, args.threads) for form, file in files.items()}
        read = {form: decoder.read(prompt_1TD, decoder.empty) for form, decoder in decoders.items()}
        cpu = torch.device("cpu")
        reading = {form: partial(decoder.read, prompt_1TD, decoder.empty) for form, decoder in decoders.items()}
        writing = {form: partial(decoder.write, answer_1TD, read[form]) for form, decoder in decoders.items()}
        prefill, decode = (times_ms(works, args.repeats, cpu) for works in (reading, writing))
        for form, file in files.items():
            yield {
                "precision": precision.name,
                "form": form,
                "bytes": file.stat().st_size,
                "prefill": per_second(args.prompt, prefill[form]),
                "decode": per_second(args.answer, decode[form]),
                "prefill_gain": gain(prefill["portable"], prefill[form]),
                "decode_gain": gain(decode["portable"], decode[form]),
            }


def per_second(tokens: int, milliseconds: list[float]) -> dict[str, float]:
    """Tokens per second from the times of so many: median, least and most."""
    return spread([1000 * tokens / taken for taken in milliseconds])


def gain(portable_ms: list[float], other_ms: list[float]) -> float:
    """How many times as fast as the portable form: the median over the rounds, for whose load both forms paid."""
    return statistics.median(a / b for a, b in zip(portable_ms, other_ms, strict=True))


def show(row: dict[str, Any]) -> None:
    """Print one row of the table."""
    numbers = [
        f"{row[stage]['median']:.1f} ({row[stage]['min']:.1f}–{row[stage]['max']:.1f}), × {row[f'{stage}_gain']:.2f}"
        for stage in ("prefill", "decode")
    ]
    print(f"| {row['precision']} | {row['form']} | {row['bytes'] / MB:.0f} | {' | '.join(numbers)} |", flush=True)


def main() -> None:
    """Make the files, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, size in (("layers", 12), ("width", 896), ("heads", 14), ("kv-heads", 2), ("intermediate", 4864)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--prompt", type=int, default=770, help="tokens read at once (default: %(default)s)")
    parser.add_argument("--answer", type=int, default=16, help="tokens written one by one (default: %(default)s)")
    parser.add_argument("--dtype", default="fp32,int8,q4", help="precisions (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write what was found here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    precisions = choose_precisions(args.dtype.split(","))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        facts = make_files(args, precisions, Path(folder))
        print(f"{describe_machine(torch.device('cpu'))}, onnxruntime {onnxruntime.__version__}")
        print(f"{args.layers} layers, width {args.width}, {args.heads} heads ({args.kv_heads} for keys and values), ")
        print(f"vocabulary {args.vocab:,}; prompt of {args.prompt}, answer of {args.answer}; ", end="")
        print(f"median (least–most) of {args.repeats} in turns, × the portable form's rate in the same round\n")
        print("| precision | form | MB | prefill, tokens/s | decode, tokens/s |\n|---|---|---|---|---|")
        for row in measure(args, precisions, facts, Path(folder)):
            rows.append(row)
            show(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
