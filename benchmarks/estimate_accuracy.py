"""How near `switchkd estimate` comes to the memory that `switchkd train` takes, on a CPU with models of random weights.

    python -m benchmarks.estimate_accuracy                 # four cases, some minutes
    python -m benchmarks.estimate_accuracy --width 256     # smaller models, quicker and less exact

Each case is a real run of the command in a process of its own; measured is the peak of its resident memory (Linux),
less that of the same run with models of next to nothing: Python, torch and the data. Estimated are weights, gradients,
optimizer and a step's tensors, without the allowance for CUDA. The models are so large that tensors are what counts.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from benchmarks.measuring import MIB, describe_machine
from switchkd.training.estimate.estimate import Cluster, Estimator
from switchkd.training.models.vlm import build_vlm
from switchkd.training.recipe.recipe import Recipe
from switchkd.training.world.dataset import WorldSettings, write_world
from switchkd.training.world.encoder_pretraining import write_image_processor
from switchkd.training.world.scenes import PICTURE_SIDE
from switchkd.training.world.vocabulary import train_tokenizer, world_texts

PATCH = 6  # pixels: (72 / 6)² = 144 visual tokens
LAYERS = 6
CASES = [(objective, checkpointing) for objective in ("sft", "switch_kd") for checkpointing in (False, True)]


def write_models(folder: Path, width: int) -> None:
    """Write an encoder, a student's language model and a teacher that is half as wide again."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": LAYERS if width > 64 else 2, "num_attention_heads": 4}
    vision = SiglipVisionConfig(
        **sizes,
        hidden_size=width,
        intermediate_size=4 * width,
        image_size=PICTURE_SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    SiglipVisionModel(vision).save_pretrained(folder / "encoder")
    write_image_processor(folder / "encoder")
    tokenizer = train_tokenizer(world_texts(random.Random(0), 50))
    for name, wide in (("language_model", width), ("larger", width * 3 // 2)):
        text = Qwen2Config(
            **sizes,
            hidden_size=wide,
            intermediate_size=4 * wide,
            num_key_value_heads=2,
            vocab_size=16 * width,
            tie_word_embeddings=True,
        )
        Qwen2ForCausalLM(text).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    build_vlm(folder / "encoder", folder / "larger").save(folder / "teacher")


def say_the_same(path: Path) -> None:
    """Give every record the longest one's conversation, every other one a turn less.

    The estimate is for a batch of the longest, with some padding: attention without any takes no mask, and less memory.
    """
    records = json.loads(path.read_text())
    longest = max((record["conversations"] for record in records), key=lambda turns: len(str(turns)))
    same = [record | {"conversations": longest[: len(longest) - 2 * (i % 2)]} for i, record in enumerate(records)]
    path.write_text(json.dumps(same))


def recipe_of(folder: Path, world: Path, objective: str, checkpointing: bool, rows: int) -> dict[str, Any]:
    """A recipe of one stage and two steps: the second has gradients, moments and activations together."""
    training = {
        "per_device_train_batch_size": rows,
        "gradient_checkpointing": checkpointing,
        "max_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "optim": "adamw_torch_fused",
    }
    stage = {
        "name": "stage",
        "train": ["encoder", "projector", "language_model"],
        "objective": {"name": objective},
        "data": {"records": [str(world / "train.json")], "pictures": str(world / "pictures"), "check": "headers"},
        "training": training,
    }
    model = {"encoder": str(folder / "encoder"), "language_model": str(folder / "language_model")}
    return {"output": str(folder / "out"), "model": model, "teacher": str(folder / "teacher"), "stages": [stage]}


def measured_mib(recipe: dict[str, Any], folder: Path) -> float:
    """Peak of the resident memory of `switchkd train`, in MiB."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"output": tempfile.mkdtemp(dir=folder)}))
    # With a fixed threshold glibc gives freed tensors back at once; else what was freed early hides what is held later.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    # Not getrusage: its peak begins with that of the process that started this one.
    code = (
        "import sys; from switchkd.cli.main import main; code = main(['train', sys.argv[1]]); "
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, check=True, text=True, stdout=subprocess.PIPE
    )
    return int(done.stdout.split()[-1]) * 1024 / MIB


def estimated_mib(recipe: dict[str, Any]) -> float:
    """What `switchkd estimate` says, without the allowance for what only a GPU has, in MiB."""
    estimator = Estimator(Recipe.from_dict(recipe), Cluster(1, 1e15, 1.0, 1.0))
    parts = estimator.stages()[0].memory
    return (sum(parts.values()) - parts["allowance"]) / MIB


def main(words: list[str] | None = None) -> int:
    """Measure, estimate and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.estimate_accuracy", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--width", type=int, default=384, help="of the encoder and the student")
    parser.add_argument("--rows", type=int, default=6, help="conversations in the batch")
    parser.add_argument("--json", type=Path, help="write the records here")
    args = parser.parse_args(words)
    records = []
    with tempfile.TemporaryDirectory(prefix="switchkd-estimate-") as name:
        folder = Path(name)
        world = write_world(folder / "world", WorldSettings(32, 7, 7))
        say_the_same(world / "train.json")
        for width in (32, args.width):
            (folder / str(width)).mkdir()
            write_models(folder / str(width), width)
        for objective, checkpointing in CASES:
            tiny, large = (
                recipe_of(folder / str(w), world, objective, checkpointing, args.rows) for w in (32, args.width)
            )
            above = measured_mib(large, folder) - measured_mib(tiny, folder)
            estimated = estimated_mib(large) - estimated_mib(tiny)
            records.append(
                {
                    "objective": objective,
                    "checkpointing": checkpointing,
                    "measured_mib": above,
                    "estimated_mib": estimated,
                    "error": estimated / above - 1,
                }
            )
    print(
        f"\n{describe_machine(torch.device('cpu'))}; width {args.width}, {LAYERS} layers, {args.rows} rows, float32\n"
    )
    print("| objective | gradient checkpointing | measured MiB | estimated MiB | error |\n|---|---|---|---|---|")
    for each in records:
        print(
            f"| {each['objective']} | {'on' if each['checkpointing'] else 'off'} | {each['measured_mib']:.0f} "
            f"| {each['estimated_mib']:.0f} | {each['error']:+.1%} |"
        )
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
