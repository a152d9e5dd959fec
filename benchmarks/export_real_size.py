"""What an export of a real shape takes: seconds, bytes, and the peak of memory, with random weights.

Run from the repository's root: python -m benchmarks.export_real_size --shape 0.5b --folder FOLDER
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.qwen2 import Qwen2Config
from transformers.models.siglip import SiglipImageProcessorPil, SiglipVisionConfig

from switchkd.export.assembly import export_checkpoint
from switchkd.export.precisions import PRECISIONS
from switchkd.training.model_sizes import PUBLISHED

GB = 1e9
_SO400M = PUBLISHED["google/siglip-so400m-patch14-384"]
_QWEN = {"vocab_size": 151_936, "max_position_embeddings": 32_768, "num_key_value_heads": 2, "rope_theta": 1e6}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "0.5b": (
        _SO400M,
        _QWEN | PUBLISHED["Qwen/Qwen2.5-0.5B-Instruct"],
    ),
    "1.5b": (
        _SO400M,
        _QWEN | PUBLISHED["Qwen/Qwen2.5-1.5B-Instruct"],
    ),
    "tiny": (
        _SO400M
        | {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"image_size": 56},
        _QWEN | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
}


def make_checkpoint(shape: str, path: Path) -> None:
    """Write a LLaVA checkpoint of this shape in bfloat16 with random weights, and the built-in world's tokenizer."""
    vision, text = SHAPES[shape]
    world = Path(str(files("switchkd.training.world"))) / "pretrained" / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(world)
    side = vision["image_size"] // vision["patch_size"]
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(vision_use_head=False, **vision),
        text_config=Qwen2Config(tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, **text),
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=side**2,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(path)
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size=size, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=(world / "chat_template.jinja").read_text(encoding="utf-8"),
    ).save_pretrained(path)


class Peaks:
    """The largest memory of this process by step: what it alone holds, and with the files it has mapped."""

    def __init__(self) -> None:
        self.step = "start"
        self.private: dict[str, int] = {}
        self.resident: dict[str, int] = {}

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Look twenty times a second, from a thread of its own."""
        stop = threading.Event()

        def look() -> None:
            while not stop.wait(0.05):
                fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
                for table, field in ((self.private, "RssAnon"), (self.resident, "VmRSS")):
                    table[self.step] = max(table.get(self.step, 0), 1024 * int(fields[field].split()[0]))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def measure(checkpoint: Path, out: Path, precisions: list[str], threads: int) -> dict[str, Any]:
    """Export in this process; returns what it took."""
    torch.set_num_threads(threads)
    peaks = Peaks()
    start = time.perf_counter()

    def progress(step: str, _done: int, _total: int) -> None:
        peaks.step = step
        print(f"{time.perf_counter() - start:7.0f} s  {step}", flush=True)

    with peaks.sampled():
        report = export_checkpoint(checkpoint, out, precisions=precisions, progress=progress)
    return {
        "seconds": report.seconds,
        "bytes": report.bytes,
        "private": peaks.private,
        "resident": peaks.resident,
        "logits": {name: record["logits"]["relative_rms"] for name, record in report.verification.items()},
    }


def show(found: dict[str, Any], checkpoint_bytes: int) -> None:
    """Print two Markdown tables."""
    print(f"\ncheckpoint {checkpoint_bytes / GB:.2f} GB, bfloat16\n")
    print("| step | seconds | private memory, GB | with mapped files, GB |\n|---|---|---|---|")
    for step, seconds in found["seconds"].items():
        private, resident = found["private"].get(step, 0), found["resident"].get(step, 0)
        print(f"| {step} | {seconds:.0f} | {private / GB:.2f} | {resident / GB:.2f} |")
    for name in ("private", "resident"):
        peak = max(found[name].values())
        print(f"\npeak, {name}: {peak / GB:.2f} GB, {peak / checkpoint_bytes:.2f} of the checkpoint")
    print("\n| precision | MB | logits off by |\n|---|---|---|")
    for precision, sizes in found["bytes"].items():
        print(f"| {precision} | {sum(sizes.values()) / 1e6:.0f} | {found['logits'][precision]:.1e} |")


def main() -> None:
    """Make a checkpoint, export it in a fresh process, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--folder", type=Path, help="where checkpoint and bundle are written for the while")
    parser.add_argument("--dtype", default=",".join(PRECISIONS), help="precisions (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write what was found here too")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")  # fresh: what making the weights took does not count
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoint, out = Path(folder) / "checkpoint", Path(folder) / "bundle"
        with context.Pool(1, maxtasksperchild=1) as pool:
            pool.apply(make_checkpoint, (args.shape, checkpoint))
            size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
            found = pool.apply(measure, (checkpoint, out, args.dtype.split(","), args.threads))
    show(found, size)
    if args.json:
        args.json.write_text(json.dumps({"checkpoint_bytes": size, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
