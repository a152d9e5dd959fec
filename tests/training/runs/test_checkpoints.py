"""Checkpoints outlive damage, disks that are full and kills: what can be used is found, and what cannot be is named."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from switchkd.cli.main import main
from switchkd.training.process.stopping import EXIT_STOPPED
from switchkd.training.recipe.recipe import DATA_CHECK
from switchkd.training.runs.checkpoints import MANIFEST, commit, fault, newest
from switchkd.training.runs.progress import training_rows
from switchkd.training.runs.saving_trainer import FAILED_SAVES
from switchkd.training.runs.trainer import DistillationTrainer

Recipe = Callable[..., Path]


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    """A run's folder with the checkpoints 3, 9 and 12, each with a folder in it, as DeepSpeed has."""
    for step in (3, 9, 12):
        checkpoint = tmp_path / "work" / f"checkpoint-{step}"
        (checkpoint / f"global_step{step}").mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(bytes(range(200)))
        (checkpoint / f"global_step{step}" / "shard.pt").write_bytes(bytes(100))
        commit(checkpoint)
    return tmp_path / "work"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: flip_a_byte(folder / "model.safetensors"), "model.safetensors has changed since it was saved"),
        (lambda folder: flip_a_byte(folder / "global_step12/shard.pt"), "global_step12/shard.pt has changed"),
        (lambda folder: (folder / "global_step12/shard.pt").unlink(), "global_step12/shard.pt is missing;"),
        (lambda folder: os.truncate(folder / "model.safetensors", 7), "model.safetensors has 7 bytes, and had 200"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing, so it was cut off while it was saved"),
        (lambda folder: os.truncate(folder / MANIFEST, 40), "manifest.json is damaged"),
        (
            lambda folder: (folder / MANIFEST).write_text('{"files": {"model.safetensors": 3}}'),
            "manifest.json is damaged",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    damage: Callable[[Path], object], reason: str, committed: Path
) -> None:
    said: list[str] = []
    assert newest(committed, said.append) == committed / "checkpoint-12"
    assert not said
    damage(committed / "checkpoint-12")
    assert newest(committed, said.append) == committed / "checkpoint-9"
    assert len(said) == 1
    assert f"checkpoint-12 cannot be used: {reason}" in said[0]
    assert said[0].endswith("; trying checkpoint-9")
    assert not (committed / "checkpoint-12").exists()
    (committed / "checkpoint-9" / MANIFEST).unlink()
    (committed / "checkpoint-3" / MANIFEST).unlink()
    assert newest(committed, said.append) is None
    assert said[-1].endswith("no older one is left, so the stage starts anew")


def test_every_single_flipped_bit_of_a_manifest_is_harmless_or_found(committed: Path) -> None:
    path = committed / "checkpoint-3" / MANIFEST
    whole = path.read_bytes()
    found = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found += fault(committed / "checkpoint-3") is not None  # and never another error
    assert found > len(whole) / 2  # white space and the like may differ
    path.write_bytes(whole)
    assert fault(committed / "checkpoint-3") is None


@pytest.fixture(scope="module")
def straight(tiny_checkpoint: Path, one_stage_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage's folder after a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    assert main(["train", str(one_stage_recipe(folder / "r.yaml", tiny_checkpoint))]) == 0
    return folder / "out/dft"


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tiny_checkpoint: Path,
    one_stage_recipe: Recipe,
    straight: Path,
    tmp_path: Path,
    at_micro_batch: Callable[[int, Callable[[], object]], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = one_stage_recipe(tmp_path / "r.yaml", tiny_checkpoint)
    at_micro_batch(13, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train", str(recipe)]) == EXIT_STOPPED
    checkpoints = tmp_path / "out/.dft.checkpoints"
    assert sorted(path.name for path in checkpoints.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    flip_a_byte(checkpoints / "checkpoint-6/optimizer.pt")
    assert main(["train", str(recipe)]) == 0
    assert "checkpoint-6 cannot be used: optimizer.pt has changed since it was saved" in capfd.readouterr().err
    assert same_weights(tmp_path / "out/dft", straight)
    assert not checkpoints.exists()


Seen = list[tuple[str, Path]]


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What this process does to its disk, in order: "sync", "rename" (to the path), "remove".

    Before a rename, "lost" names what it makes final and a failure of power would take: the renamed file or all of the
    renamed folder, and with a manifest everything beside it.
    """
    seen: Seen = []
    synced: dict[int, tuple[int, int]] = {}
    fsync, rmtree = os.fsync, shutil.rmtree

    def sync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size, found.st_mtime_ns
        seen.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve()))
        fsync(descriptor)

    def noting(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def renamed(source: Path, target: Path) -> None:
            final = [Path(source), *Path(source).rglob("*")]
            if Path(target).name == MANIFEST:
                final += Path(target).parent.rglob("*")
            for path, found in ((path, path.stat()) for path in final):
                if synced.get(found.st_ino) != (found.st_size, found.st_mtime_ns):
                    seen.append(("lost", path))
            seen.append(("rename", Path(target)))
            rename(source, target)

        return renamed

    def remove(path: Path, *arguments: Any, **settings: Any) -> None:
        if Path(path).exists():
            seen.append(("remove", Path(path)))
        rmtree(path, *arguments, **settings)

    monkeypatch.setattr(os, "fsync", sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, noting(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", remove)
    return seen


def test_nothing_has_its_final_name_or_is_thrown_away_before_all_of_it_is_on_the_disk(
    tiny_checkpoint: Path, one_stage_recipe: Recipe, tmp_path: Path, on_disk: Seen
) -> None:
    recipe = one_stage_recipe(tmp_path / "r.yaml", tiny_checkpoint, max_steps=4, save_steps=1)
    assert main(["train", str(recipe)]) == 0
    out, work = tmp_path / "out", tmp_path / "out/.dft.checkpoints"
    # What was found in the data can be found again, and is not waited for.
    seen = [(what, path) for what, path in on_disk if path.is_relative_to(out) and DATA_CHECK not in path.parts]
    assert [path for what, path in seen if what == "lost"] == []
    checkpoints = [work / f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    for checkpoint in checkpoints:
        committed = seen.index(("rename", checkpoint / MANIFEST))
        begun = next(at for at, (_, path) in enumerate(seen) if path.is_relative_to(checkpoint))
        # Its files' names in it, its own name, and then the manifest's.
        assert {("sync", checkpoint), ("sync", work)} <= set(seen[begun:committed])
        assert seen[committed + 1] == ("sync", checkpoint)
    # Two are kept: the one before the last goes when the third is there.
    removed = [path for what, path in seen if what == "remove" and path.parent == work]
    assert removed == checkpoints[:2]
    for older, newer in zip(checkpoints, checkpoints[2:], strict=False):
        assert seen.index(("remove", older)) > seen.index(("rename", newer / MANIFEST))
    finished = seen.index(("rename", out / "dft"))
    assert seen[finished + 1] == ("sync", out)
    first = seen.index(("rename", checkpoints[0] / MANIFEST))
    assert ("remove", work) not in seen[first:finished]
    assert ("remove", work) in seen[finished:]


@contextmanager
def no_file_larger_than(size: int | None) -> Iterator[None]:
    """A disk that is full for real, without being root: the kernel refuses to let a file grow. None: it is not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_checkpoint_before(
    tiny_checkpoint: Path,
    one_stage_recipe: Recipe,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = one_stage_recipe(tmp_path / "r.yaml", tiny_checkpoint, save_steps=1)
    weights = (straight / "model.safetensors").stat().st_size
    # Refused are: the weights, which safetensors writes; the moments, twice as large, which torch writes.
    limits = {3: weights // 2, 4: weights + 10_000}
    seen = {}
    save = DistillationTrainer._save_checkpoint

    def on_a_full_disk(self: DistillationTrainer, *arguments: Any) -> None:
        with no_file_larger_than(limits.get(self.state.global_step)):
            save(self, *arguments)
        folders = (tmp_path / "out/.dft.checkpoints").glob("checkpoint-*")
        seen[self.state.global_step] = {folder.name: fault(folder) for folder in folders}

    monkeypatch.setattr(DistillationTrainer, "_save_checkpoint", on_a_full_disk)
    assert main(["train", str(recipe)]) == 0
    said = re.findall(
        r"checkpoint-(\d) could not be written: .*; the checkpoint before is kept, and training goes on",
        capfd.readouterr().err,
    )
    assert said == ["3", "4"]
    assert seen[2] == seen[3] == seen[4] == {"checkpoint-1": None, "checkpoint-2": None}
    assert seen[5] == {"checkpoint-2": None, "checkpoint-5": None}
    assert same_weights(tmp_path / "out/dft", straight)

    shutil.rmtree(tmp_path / "out")
    limits = dict.fromkeys(range(3, 99), weights // 2)
    assert main(["train", str(recipe)]) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.search(
        rf"checkpoint-5 could not be written: .*, save {FAILED_SAVES} in a row that failed; make room", last
    )
    limits = {}
    assert main(["train", str(recipe)]) == 0
    assert same_weights(tmp_path / "out/dft", straight)


def test_a_full_disk_at_the_very_end_loses_nothing(
    tiny_checkpoint: Path,
    one_stage_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    recipe = one_stage_recipe(tmp_path / "r.yaml", tiny_checkpoint, max_steps=2)
    full = True
    save = DistillationTrainer.save_model

    def on_a_full_disk(self: DistillationTrainer, folder: str, **settings: Any) -> None:
        at_the_end = full and folder.endswith(".dft.partial")
        with no_file_larger_than(50_000 if at_the_end else None):
            save(self, folder, **settings)

    monkeypatch.setattr(DistillationTrainer, "save_model", on_a_full_disk)
    assert main(["train", str(recipe)]) == 2
    assert re.search(r"out/dft could not be written: .*; make room, and the same command", capfd.readouterr().err)
    assert not (tmp_path / "out/dft").exists()
    assert fault(tmp_path / "out/.dft.checkpoints/checkpoint-2") is None
    full = False
    assert main(["train", str(recipe)]) == 0
    assert [row["step"] for row in training_rows(tmp_path / "out/dft/log.jsonl")] == [1, 2]  # and no step more


@pytest.mark.slow
def test_killed_at_any_time_and_inside_of_saves() -> None:
    script = Path(__file__).parents[2] / "stress" / "kill_and_resume.py"
    # A process of its own: it forks, which one that has trained already must not.
    ended = subprocess.run([sys.executable, script, "--kills", "4"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counted = re.match(r"(\d+) kills, (\d+) of them inside a save; ([1-9]\d*) runs came to their end", ended.stdout)
    assert counted, ended.stdout
    assert int(counted[2]) >= 2
