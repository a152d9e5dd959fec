"""What an export of a real shape takes, and its verification: seconds, bytes, peaks of memory, with random weights.

Run from the repository's root: python -m benchmarks.export_real_size --shape 0.5b --folder FOLDER
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, Qwen2Config
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.siglip import SiglipImageProcessorPil, SiglipVisionConfig

from switchkd.cli.main import main as switchkd
from switchkd.export.assembly import DECODERS, export_checkpoint
from switchkd.export.llava.projectors import GRID, MLP, llava_class, tokens_per_picture
from switchkd.export.process.memory import return_freed_blocks
from switchkd.export.quantisation.precisions import PRECISIONS
from switchkd.training.models.vlm import make_processor, visual_settings
from switchkd.training.recipe.model_sizes import PUBLISHED

GB = 1e9
SIGLIP, CLIP = "google/siglip-so400m-patch14-384", "openai/clip-vit-large-patch14-336"
SIGLIP2_BASE = "google/siglip2-base-patch16-384"
_QWEN = {"vocab_size": 151_936, "max_position_embeddings": 32_768, "rope_theta": 1e6}
# HuggingFaceTB/SmolLM2-360M-Instruct, from its config.json on the hub.
_SMOLLM2 = {"vocab_size": 49_152, "max_position_embeddings": 8192, "rope_theta": 1e5, "hidden_size": 960} | {
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
}
_TINY_VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4} | {
    "image_size": 56
}
_TINY_TEXT = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Shape:
    """A vision encoder of PUBLISHED, a language model's class and sizes, and the projector between them."""

    vision: str
    language_model: type[Any]
    sizes: dict[str, Any]
    projector: str = MLP

    def config(self, *, tiny: bool) -> LlavaConfig:
        """The model's config; `tiny` keeps its kind, and makes it small."""
        sight = PUBLISHED[self.vision] | (_TINY_VISION if tiny else {})
        vision = (
            CLIPVisionConfig(**sight) if self.vision == CLIP else SiglipVisionConfig(**sight, vision_use_head=False)
        )
        sizes = self.sizes | (_TINY_TEXT if tiny else {})
        text = self.language_model(tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, **sizes)
        settings = visual_settings(vision, -2, False, self.projector, 2 if tiny else GRID)
        config = LlavaConfig(**settings, text_config=text, tie_word_embeddings=True)
        config.image_seq_length = tokens_per_picture(config)
        return config


_QWEN_HALF = _QWEN | PUBLISHED["Qwen/Qwen2.5-0.5B-Instruct"]
SHAPES = {
    "0.5b": Shape(SIGLIP, Qwen2Config, _QWEN_HALF),
    "1.5b": Shape(SIGLIP, Qwen2Config, _QWEN | PUBLISHED["Qwen/Qwen2.5-1.5B-Instruct"]),
    "clip": Shape(CLIP, Qwen2Config, _QWEN_HALF),
    "ldpv2": Shape(SIGLIP, Qwen2Config, _QWEN_HALF, "ldpv2"),
    "edge": Shape(SIGLIP2_BASE, Qwen2Config, _QWEN_HALF, "ldpv2"),
    "llama": Shape(SIGLIP, LlamaConfig, _SMOLLM2),
}


def make_checkpoint(shape: str, tiny: bool, path: Path) -> None:
    """Write a LLaVA checkpoint of this shape in bfloat16 with random weights, and the built-in world's tokenizer."""
    config = SHAPES[shape].config(tiny=tiny)
    tokenizer = AutoTokenizer.from_pretrained(str(files("switchkd.training.world") / "pretrained" / "teacher"))
    config.image_token_id = tokenizer.get_vocab()["<image>"]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = llava_class(config)(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(path)
    vision: Any = config.vision_config
    side = vision.image_size
    pictures: Any
    if SHAPES[shape].vision == CLIP:
        pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    else:
        pictures = SiglipImageProcessorPil(
            size={"height": side, "width": side}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
    pictures.save_pretrained(path)
    make_processor(pictures, tokenizer, config).save_pretrained(path)


@dataclass
class Peaks:
    """The largest memory of this process by step: what it alone holds, and with the files it has mapped."""

    step: str = "start"
    private: dict[str, int] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Look twenty times a second, from a thread of its own."""
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(0.05):
                fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
                for table, name in ((self.private, "RssAnon"), (self.resident, "VmRSS")):
                    table[self.step] = max(table.get(self.step, 0), 1024 * int(fields[name].split()[0]))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def measure_export(checkpoint: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Export in this process, as the command does; returns what it took."""
    return_freed_blocks()
    torch.set_num_threads(args.threads)
    peaks = Peaks()
    start = time.perf_counter()

    def progress(what: str, _done: int, _total: int) -> None:
        step = what.partition(":")[0]  # behind it: how far the step is
        if step != peaks.step:
            peaks.step = step
            print(f"{time.perf_counter() - start:7.0f} s  {step}", flush=True)

    with peaks.sampled():
        report = export_checkpoint(
            checkpoint,
            out,
            precisions=args.dtype.split(","),
            decoder=args.decoder,
            pairs=args.pairs,
            progress=progress,
        )
    return {
        "seconds": report.seconds,
        "bytes": report.bytes,
        "private": peaks.private,
        "resident": peaks.resident,
        "verification": report.verification,
    }


def measure_verify(bundle: Path, pairs: int) -> dict[str, Any]:
    """Run `switchkd verify` in this process; returns its exit status and what it took."""
    peaks = Peaks("verify")
    start = time.perf_counter()
    with peaks.sampled():
        status = switchkd(["verify", str(bundle), "--pairs", str(pairs)])
    seconds = time.perf_counter() - start
    return {"status": status, "seconds": seconds, "private": peaks.private, "resident": peaks.resident}


def show_export(found: dict[str, Any], checkpoint_bytes: int) -> None:
    """Print two Markdown tables: the steps, and the precisions."""
    print(f"\ncheckpoint {checkpoint_bytes / GB:.2f} GB, bfloat16\n")
    print("| step | seconds | private memory, GB | with mapped files, GB |\n|---|---|---|---|")
    private, resident = found["private"], found["resident"]
    for step, seconds in found["seconds"].items():
        print(f"| {step} | {seconds:.0f} | {private.get(step, 0) / GB:.2f} | {resident.get(step, 0) / GB:.2f} |")
    print(f"\n{peaks_beside(found, checkpoint_bytes)}")
    print("\n| precision | MB | image features off by | logits off by | greedy answers equal |\n|---|---|---|---|---|")
    for variant, sizes in found["bytes"].items():
        record = found["verification"][variant]
        scores = [f"{record[part]['relative_rms']:.1e}" for part in ("image_features", "logits")]
        greedy = f"{record['greedy']['equal']} of {record['greedy']['prompts']}"
        print(f"| {variant} | {sum(sizes.values()) / 1e6:.0f} | {' | '.join(scores)} | {greedy} |")
    print(flush=True)


def peaks_beside(found: dict[str, Any], checkpoint_bytes: int) -> str:
    """The largest memory of all steps, also as a multiple of the checkpoint."""
    peaks = {name: max(found[name].values()) for name in ("private", "resident")}
    return "peak: " + ", ".join(
        f"{name} {peak / GB:.2f} GB = {peak / checkpoint_bytes:.2f} checkpoints" for name, peak in peaks.items()
    )


def main() -> int:
    """Make a checkpoint, export and verify it in fresh processes, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--tiny", action="store_true", help="the same kind of model, small: tries this script itself")
    parser.add_argument("--folder", type=Path, help="where checkpoint and bundle are written for the while")
    parser.add_argument("--checkpoint", type=Path, metavar="OUT", help="write the checkpoint there, and nothing else")
    parser.add_argument("--dtype", default=",".join(PRECISIONS), help="precisions (default: %(default)s)")
    parser.add_argument("--decoder", choices=list(DECODERS), default="portable", help="(default: %(default)s)")
    parser.add_argument(
        "--pairs",
        type=int,
        default=6,
        help="of pictures and questions to compare answers on (default: %(default)s; the command's own 200 take hours "
        "on two cores)",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write what was found here too")
    args = parser.parse_args()
    if args.checkpoint is not None:
        make_checkpoint(args.shape, args.tiny, args.checkpoint)
        return 0
    context = multiprocessing.get_context("spawn")
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoint, out = Path(folder) / "checkpoint", Path(folder) / "bundle"
        # A process for each: what making the weights took does not count, nor the export's memory for verification.
        with context.Pool(1, maxtasksperchild=1) as pool:
            pool.apply(make_checkpoint, (args.shape, args.tiny, checkpoint))
            size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
            found = pool.apply(measure_export, (checkpoint, out, args))
            show_export(found, size)
            verified = pool.apply(measure_verify, (out, args.pairs))
    print(
        f"`switchkd verify`, a process of its own: exit status {verified['status']}, {verified['seconds']:.0f} s, "
        + peaks_beside(verified, size)
    )
    if args.json:
        record = {"shape": args.shape, "checkpoint_bytes": size, "export": found, "verify": verified}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(verified["status"])


if __name__ == "__main__":
    sys.exit(main())
