"""Do workers decode pictures faster than a step uses them, and what do the records of a large file take in memory?

    python -m benchmarks.data_loading                      # samples/s by number of workers
    python -m benchmarks.data_loading --step 64 0.9        # beside a step of 64 samples a process in 0.9 seconds
    python -m benchmarks.data_loading --records 665000     # memory: records in a list, and found when asked for

Pictures are JPEGs of LLaVA's usual sizes, made here: photograph-like noise, quality 90, brought to 384 x 384 pixels.
Conversations have one to ten questions and 729 visual tokens. Files come from the page cache: a slow disk is not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.measuring import cpu_peak_mib, spread
from switchkd.export.contract.pixels import Preprocessing
from switchkd.training.data.dataset import ConversationDataset, collator
from switchkd.training.data.label_mask import ConversationEncoder
from switchkd.training.data.records import read_records
from switchkd.training.world.vocabulary import IMAGE_TOKEN, train_tokenizer

SIZES = ((640, 480), (640, 427), (500, 375), (1024, 768), (336, 500))  # COCO, GQA and VG, TextVQA, book covers
TOKENS = 729
HALF = (0.5, 0.5, 0.5)
SIGLIP = Preprocessing((384, 384), None, Image.Resampling.BICUBIC, 1 / 255, HALF, HALF)
SENTENCE = "what is the colour of this large thing beside a small red house on the left and how many are there"
WORDS = SENTENCE.split()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=None, help="worker counts to try")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1024, help="samples of one measurement")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step", type=float, nargs=2, metavar=("SAMPLES", "SECONDS"), help="what one process needs")
    parser.add_argument("--records", type=int, default=0, help="measure the memory of so many records instead")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="switchkd-data-") as folder:
        found = records_memory(Path(folder), args.records) if args.records else loading(Path(folder), args)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def loading(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Print and return samples/s by number of workers."""
    write_pictures(folder, args.pictures)
    rows = [record(number, f"{number % args.pictures}.jpg") for number in range(args.samples)]
    write_records(folder / "records.jsonl", rows)
    tokenizer = train_tokenizer([SENTENCE, "user\nassistant\n"], 300)
    encoder = ConversationEncoder(tokenizer, IMAGE_TOKEN, TOKENS, 2048)
    dataset = ConversationDataset(read_records(folder / "records.jsonl"), folder, encoder, SIGLIP)
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores; {args.samples} samples in batches of {args.batch}, {args.repeats} repeats")
    cpu_ms = cpu_ms_of(dataset, min(128, args.samples))
    print(f"one sample takes {cpu_ms:.1f} ms of a core, so that a core makes at most {1000 / cpu_ms:.0f} a second")
    print(f"{'workers':>8} {'samples/s, median':>18} {'least – most':>15} {'per worker':>11}")
    found: dict[str, Any] = {"cores": cores, "cpu_ms_per_sample": cpu_ms, "samples_per_second": {}}
    for workers in args.workers or sorted({0, 1, 2, cores}):
        rates = [rate(dataset, workers, args.batch) for _ in range(args.repeats)]
        found["samples_per_second"][workers] = spread(rates)
        median = statistics.median(rates)
        print(f"{workers:>8} {median:>18.1f} {min(rates):>7.1f} – {max(rates):<5.1f} {median / max(1, workers):>11.1f}")
    if args.step:
        need = args.step[0] / args.step[1]
        best = max(row["median"] / max(1, workers) for workers, row in found["samples_per_second"].items())
        workers = math.ceil(need / best)
        print(f"a step of {args.step[0]:g} samples in {args.step[1]:g} s needs {need:.1f} samples/s: {workers} workers")
        found |= {"needed_per_second": need, "workers_needed": workers}
    return found


def cpu_ms_of(dataset: ConversationDataset, count: int) -> float:
    """Processor time of a sample in this process: other work on the machine does not count, as it does in seconds."""
    dataset[0]
    began = time.process_time()
    for index in range(count):
        dataset[index]
    return 1000 * (time.process_time() - began) / count


def rate(dataset: ConversationDataset, workers: int, batch: int) -> float:
    """Samples a second over the whole dataset, from the first batch on: starting the workers does not count."""
    loader: DataLoader[Any] = DataLoader(dataset, batch, num_workers=workers, collate_fn=collator(0))
    batches = iter(loader)
    next(batches)
    began, count = time.perf_counter(), 0
    for tensors in batches:
        count += len(tensors["labels"])
    return count / (time.perf_counter() - began)


def write_pictures(folder: Path, count: int) -> None:
    """JPEGs that compress about as photographs do: smooth colours with a little noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        coarse = Image.fromarray(rng.integers(0, 255, (height // 40, width // 40, 3), dtype=np.uint8))
        smooth_HWC = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy_HWC = np.clip(smooth_HWC + rng.normal(0, 6, smooth_HWC.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy_HWC).save(folder / f"{number}.jpg", quality=90)


def record(number: int, image: str) -> dict[str, Any]:
    """A conversation of one to ten questions about a picture."""
    rng = random.Random(number)
    conversations = []
    for turn in range(rng.choice((1, 2, 5, 10))):
        question = ("<image>\n" if turn == 0 else "") + " ".join(rng.choices(WORDS, k=12))
        conversations.append({"from": "human", "value": question})
        conversations.append({"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.choice((1, 10, 60))))})
    return {"id": f"{number:012d}", "image": image, "conversations": conversations}


def write_records(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A record a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def records_memory(folder: Path, count: int) -> dict[str, Any]:
    """Print and return what the records of a JSON list take in memory, each way in a fresh process."""
    path = folder / "records.json"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(
                ("[" if number == 0 else ",\n") + json.dumps(record(number, f"coco/train2017/{number:012d}.jpg"))
            )
        file.write("]")
    write_records(folder / "few.json", [record(0, "0.jpg")])
    print(f"{count:,} records, a JSON list of {path.stat().st_size / 2**20:,.0f} MiB")
    found: dict[str, Any] = {"records": count, "file_mib": path.stat().st_size / 2**20}
    for name, prepare in (("a list of dicts", list_of_dicts), ("found when asked for", found_when_asked)):
        began = time.perf_counter()
        peak = cpu_peak_mib(prepare, (path,), (folder / "few.json",))
        found[name] = peak | {"seconds": time.perf_counter() - began}
        print(f"{name:<24} {peak['above_mib']:>8,.0f} MiB at the peak, {found[name]['seconds']:.1f} s")
    return found


def list_of_dicts(path: Path) -> Callable[[], Any]:
    """The obvious way."""
    return lambda: [json.loads(path.read_text(encoding="utf-8"))]


def found_when_asked(path: Path) -> Callable[[], Any]:
    """Ours."""
    return lambda: read_records(path)


if __name__ == "__main__":
    main()
