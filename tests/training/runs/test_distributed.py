"""Two processes through the launchers' own commands: step by step what one process does, killed and resumed too."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from switchkd.cli.main import main
from switchkd.training.world.dataset import WorldSettings, write_world

RECORDS, OF_TEXT, BATCH = 24, 10, 4
STEPS = RECORDS // BATCH
TERMS = ("loss", "ce", "dbild", "vsd", "k_teacher")


def torchrun() -> list[str]:
    """What the console script of that name runs."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "-m"]


def deepspeed() -> list[str]:
    """The same of deepspeed."""
    program = [sys.executable, "-c", "from deepspeed.launcher.runner import main; main()"]
    return [*program, "--num_gpus", "2", "--master_port", free_port(), "--no_local_rank", "--module"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def recipe(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages, the second over the data once.

    Grouped by length, two of its batches are text alone, one is text on the first rank and pictures on the second, and
    the others are pictures.
    """
    folder = tmp_path_factory.mktemp("distributed")
    world = write_world(folder / "world", WorldSettings(24, 7, 7))
    records = json.loads((world / "train.json").read_text())[:RECORDS]
    for record in records[:OF_TEXT]:
        del record["image"]
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "").strip()
    (folder / "mixed.json").write_text(json.dumps(records))
    data = {"records": [str(folder / "mixed.json")], "pictures": str(world / "pictures")}
    training: dict[str, Any] = {"learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2, "save_total_limit": 20}
    training |= {"train_sampling_strategy": "group_by_length", "report_to": "none"}
    pt: dict[str, Any] = {"name": "pt", "train": ["projector"], "objective": {"name": "sft"}}
    pt |= {"training": training | {"max_steps": 2}}
    dft: dict[str, Any] = {
        "name": "dft",
        "train": ["encoder", "projector", "language_model"],
        "objective": {"name": "switch_kd"},
    }
    dft |= {"training": training | {"num_train_epochs": 1}}
    stages = [stage | {"data": data, "global_batch": BATCH} for stage in (pt, dft)]
    plain = {"output": "", "teacher": str(tiny_checkpoint), "model": {"checkpoint": str(tiny_checkpoint)}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain | {"stages": stages}))
    return folder / "recipe.yaml"


def words(recipe: Path, name: str, **training: Any) -> list[str]:
    """The command's words after `switchkd`; the output is `name` beside the recipe."""
    changes = [f"stages.{stage}.training.{key}={value}" for stage in ("pt", "dft") for key, value in training.items()]
    return ["train", str(recipe), f"output={recipe.parent / name}", *changes]


def launch(launcher: list[str], command: list[str], *, kill_after: Path | None = None) -> None:
    """Run the command to its end, or kill all of its processes when the file `kill_after` has appeared."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    said = Path(command[2].removeprefix("output=")).with_suffix(".txt")
    with said.open("a") as log:
        process = subprocess.Popen([*launcher, "switchkd.cli.main", *command], env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 400  # the first time, DeepSpeed compiles for a minute
    try:
        while process.poll() is None and not (kill_after is not None and kill_after.exists()):
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.02)
        assert (process.returncode or 0) == 0, said.read_text()
        assert (process.returncode is None) == (kill_after is not None), "it ended before it could be killed"
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
        process.wait()
    port = launcher[launcher.index("--master_port") + 1]
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink()  # 66 MiB a rank, which DeepSpeed's launcher leaves behind


def steps(folder: Path) -> list[dict[str, float]]:
    """The log's steps, each as it was done last."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if line]
    return list({row["step"]: row for row in rows if "loss" in row}.values())


def assert_same_run(recipe: Path, name: str) -> None:
    """Every step's loss and terms within 1e-5 of one process's, and the weights as far as that goes."""
    for stage, count in (("pt", 2), ("dft", STEPS)):
        one, two = (recipe.parent / run / stage for run in ("one", name))
        assert [row["step"] for row in steps(two)] == list(range(1, count + 1))
        for ours, theirs in zip(steps(two), steps(one), strict=True):
            for term in TERMS if stage == "dft" else TERMS[:2]:
                assert ours[term] == pytest.approx(theirs[term], rel=1e-5, abs=1e-5), (stage, ours["step"], term)
            assert ours["supervised_tokens"] == theirs["supervised_tokens"]
        weights = [load_file(folder / "model.safetensors") for folder in (two, one)]
        # AdamW's first steps are as large for a tiny gradient as for any, so rounding shows: 6 steps of 1e-3.
        torch.testing.assert_close(*weights, rtol=0, atol=5e-4)
        LlavaForConditionalGeneration.from_pretrained(two)


@pytest.fixture(scope="module")
def one(recipe: Path) -> Path:
    """One process's run."""
    assert main(words(recipe, "one", per_device_train_batch_size=4, use_cpu=True)) == 0
    return recipe


def test_accumulation_is_a_larger_batch(one: Path) -> None:
    assert main(words(one, "accumulated", per_device_train_batch_size=1, use_cpu=True)) == 0
    assert_same_run(one, "accumulated")


@pytest.mark.slow
def test_ddp_is_one_process(one: Path) -> None:
    launch(torchrun(), words(one, "ddp", per_device_train_batch_size=2))
    assert_same_run(one, "ddp")
    said = (one.parent / "ddp.txt").read_text()
    assert said.count("dft: switch_kd") == 1, "one rank alone is to speak"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_2_is_one_process_though_killed(one: Path) -> None:
    """Begun by torchrun, ended by the deepspeed launcher, and with accumulation on both ranks."""
    checkpoint = killed_and_resumed(one, deepspeed(), "zero2", per_device_train_batch_size=1, deepspeed="zero2")
    moments, weights = shares(checkpoint)
    trained = sum({value.data_ptr(): value.numel() for value in weights["module"].values()}.values())  # tied: once
    assert weights["ds_config"]["zero_optimization"]["stage"] == 2
    for share in moments:
        groups = share["optimizer_state_dict"]["base_optimizer_state"]["state"].values()
        moment = sum(state["exp_avg"].numel() for state in groups)
        assert trained / 2 <= moment < trained / 2 + 16, "a rank is to hold one half of the moments, and padding"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_3_is_one_process_though_killed(one: Path) -> None:
    """With every weight shared out, recomputed activations, and a rank without pictures beside one that has some."""
    config = yaml.safe_load((Path("recipes/deepspeed") / "zero3.yaml").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (one.parent / "zero3.yaml").write_text(yaml.safe_dump(config))
    settings = {"per_device_train_batch_size": 2, "gradient_checkpointing": True}
    checkpoint = killed_and_resumed(one, torchrun(), "zero3", deepspeed=one.parent / "zero3.yaml", **settings)
    _, weights = shares(checkpoint, "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert weights["ds_config"]["zero_optimization"]["stage"] == 3
    assert all(value.numel() == 0 for value in weights["module"].values()), "a rank is to hold no weight whole"


def killed_and_resumed(recipe: Path, again: list[str], name: str, **training: Any) -> Path:
    """Kill a run after its second step, run it `again`, compare it; returns a copy of what it went on from."""
    command = words(recipe, name, **training)
    work = recipe.parent / name / ".dft.checkpoints"
    launch(torchrun(), command, kill_after=work / "checkpoint-2" / "manifest.json")
    kept = shutil.copytree(work / "checkpoint-2", recipe.parent / f"{name}-checkpoint")
    began = len(steps(work))
    assert began < STEPS
    launch(again, command)
    assert_same_run(recipe, name)
    return kept


def shares(checkpoint: Path, weights: str = "mp_rank_00_model_states.pt") -> tuple[list[Any], Any]:
    """Each rank's optimizer state and a file of weights, in which nothing is of the teacher or frozen."""
    (folder,) = checkpoint.glob("global_step*")
    files = sorted(folder.glob("*_optim_states.pt"))
    assert len(files) == 2
    state = torch.load(folder / weights, weights_only=False)
    assert state["module"]
    assert not any("teacher" in name for name in state["module"])
    assert not state["frozen_param_fragments"]
    teacher = load_file(checkpoint / "model.safetensors")  # of the student's size here
    assert sum(file.stat().st_size for file in files) < 14 * sum(value.numel() for value in teacher.values())
    return [torch.load(file, weights_only=False) for file in files], state


LEAVES = """
import sys, weakref, torch
from torch import nn
from switchkd.training.recipe.arguments import leave_other_ranks

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
model.itself = [model]  # a cycle, as the Trainer has
alive = weakref.ref(model)
del model
assert alive() is not None
leave_other_ranks()
assert alive() is None, "it would end the connections itself, later, with Python's lock held"
assert not torch.distributed.is_initialized()
"""


def test_nothing_outlives_the_connections_to_other_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVES, str(tmp_path / "meet")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
