"""What was trained is never thrown away: a run goes on with other habits, and says what makes it another one."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from switchkd.cli.main import main
from switchkd.training.process.stopping import EXIT_STOPPED
from switchkd.training.recipe.recipe import RecipeError, load_recipe
from switchkd.training.runs.digest_memory import DigestMemory
from switchkd.training.runs.progress import training_rows
from switchkd.training.runs.stages import check_kept, finished_stages

AtMicroBatch = Callable[[int, Callable[[], object]], None]


def run(recipe: Path, *changes: str) -> int:
    return main(["train", str(recipe), *changes])


def stamps(folder: Path) -> dict[str, int]:
    """When each file was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def root(
    one_stage_recipe: Callable[..., Path], tiny_checkpoint: Path, ten_records: Path, tmp_path_factory: Any
) -> Path:
    """A folder with data, a model, the recipe and its finished stage of two steps."""
    root: Path = tmp_path_factory.mktemp("kept") / "run"
    shutil.copytree(ten_records, root / "world")
    shutil.copytree(tiny_checkpoint, root / "model")
    path = one_stage_recipe(root / "r.yaml", tiny_checkpoint, max_steps=2)
    given = yaml.safe_load(path.read_text())
    given |= {
        "root": str(root),
        "output": "{root}/out",
        "teacher": "{root}/model",
        "model": {"checkpoint": "{root}/model"},
    }
    given["stages"][0]["data"] = {"records": "{root}/world/train.json", "pictures": "{root}/world/pictures"}
    path.write_text(yaml.safe_dump(given))
    assert run(path) == 0
    return root


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    """The folder at another place, with the files' own times."""
    return shutil.copytree(root, tmp_path / "moved")


def recipe_of(folder: Path) -> tuple[Path, str]:
    return folder / "r.yaml", f"root={folder}"


@pytest.mark.parametrize(
    "changes",
    [
        ["logging_steps=5", "save_steps=1", "save_total_limit=3", "run_name=x", "report_to=tensorboard"],
        ["per_device_train_batch_size=3", "gradient_accumulation_steps=1", "gradient_checkpointing=true"],
        ["dataloader_num_workers=2", "dataloader_pin_memory=false", "deepspeed=zero2", "num_train_epochs=9"],
    ],
)
def test_habits_leave_a_finished_stage_finished(changes: list[str], root: Path, capsys: Any) -> None:
    before = stamps(root / "out/dft")
    assert run(*recipe_of(root), *(f"stages.dft.training.{change}" for change in changes)) == 0
    assert "(already finished)" in capsys.readouterr().err
    assert stamps(root / "out/dft") == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["seed=4"], "seed was 0 and is 4"),
        (["stages.dft.training.learning_rate=2e-3"], "stages.dft.training.learning_rate was 0.001 and is 0.002"),
        (["stages.dft.training.gradient_accumulation_steps=2"], "stages.dft.batch of a process was 3 and is 2"),
        (["stages.dft.objective.lambda_vsd=0.5"], "stages.dft.objective.lambda_vsd was 1 and is 0.5"),
        (["stages.dft.objective={name: kd}"], 'stages.dft.objective.name was "switch_kd" and is "kd".'),
        (["stages.dft.data.max_length=500"], "stages.dft.data.max_length was null and is 500"),
        (["teacher.dtype=bfloat16"], "teacher.dtype was null and is "),
        (
            ["stages.dft.train=[projector]", "model.drop_first_patch=true"],
            "model.drop_first_patch was false and is true, stages.dft.train was "
            '["encoder", "projector", "language_model"] and is ["projector"]',
        ),
    ],
)
def test_another_value_is_named_and_everything_kept(changes: list[str], said: str, root: Path, capsys: Any) -> None:
    if changes[0].startswith("teacher."):
        changes = [f"teacher={{checkpoint: '{root}/model', dtype: bfloat16}}"]
    before = stamps(root)
    assert run(*recipe_of(root), *changes) == 2
    error = capsys.readouterr().err
    assert f"out/dft is finished, and not by this recipe: {said}" in error
    assert "put the old values back, choose another folder (output=FOLDER), or remove" in error
    assert stamps(root) == before
    assert finished_stages(load_recipe(root / "r.yaml", [f"root={root}", *changes])) == []


def test_a_run_that_was_moved_is_the_same_run(copied: Path, capsys: Any) -> None:
    assert run(*recipe_of(copied)) == 0
    assert "(already finished)" in capsys.readouterr().err
    shutil.move(copied / "model", copied.parent / "model")  # the same files, elsewhere
    shutil.move(copied / "world/train.json", copied.parent / "renamed.json")
    elsewhere = [f"teacher={copied.parent}/model", f"model.checkpoint={copied.parent}/model"]
    elsewhere.append(f"stages.dft.data.records={copied.parent}/renamed.json")
    assert run(*recipe_of(copied), *elsewhere) == 0
    assert run(*recipe_of(copied)) == 0  # and where they are gone, nothing says that they differ


def test_changed_files_are_named_with_both_digests(copied: Path, capsys: Any) -> None:
    train, weights = copied / "world/train.json", copied / "model/model.safetensors"
    records, healthy = train.read_text(), weights.read_bytes()
    train.write_text(json.dumps([*json.loads(records), json.loads(records)[0]]))
    before = stamps(copied / "out/dft")
    assert run(*recipe_of(copied)) == 2
    error = capsys.readouterr().err
    size = len(records.encode())
    assert f"not by this recipe: stages.dft.data.records: train.json had {size:,} bytes of 20" in error
    assert f"and now train.json had {train.stat().st_size:,} bytes of 20" in error
    train.write_text(records)  # written anew, and the same
    assert run(*recipe_of(copied)) == 0
    weights.write_bytes(healthy[:-1] + bytes([healthy[-1] ^ 1]))
    assert run(*recipe_of(copied)) == 2
    error = capsys.readouterr().err
    for key in ("model.checkpoint", "teacher.checkpoint"):
        assert f"{key}: model.safetensors had {len(healthy):,} bytes" in error
    assert stamps(copied / "out/dft") == before


def test_an_older_versions_stage_is_known_by_its_fingerprint(copied: Path, capsys: Any) -> None:
    from switchkd.training.runs.stage_identity import _old_fingerprint

    recipe = load_recipe(copied / "r.yaml", [f"root={copied}"])
    kept = copied / "out/dft/stage.json"
    facts = {"fingerprint": _old_fingerprint(recipe, recipe.stages[0]), "seconds": 1.0, "steps": 2}
    kept.write_text(json.dumps(facts))
    assert run(*recipe_of(copied)) == 0
    assert "is of an older version, which kept nothing to tell whether data and models are the same" in (
        capsys.readouterr().err
    )
    assert run(*recipe_of(copied), "seed=1") == 2
    assert "an older version of switchkd made it and kept no values to name what differs" in capsys.readouterr().err


def test_the_old_fingerprint_is_the_one_that_was_kept() -> None:
    """Of world/student_sft, as written by the version before stages kept their values."""
    from switchkd.training.runs.stage_identity import _old_fingerprint

    recipe = load_recipe("world/student_sft", ["root=here"])
    assert [_old_fingerprint(recipe, stage)[:16] for stage in recipe.stages] == [
        "6b34221f02db0947",
        "d2c3fa64d036e216",
    ]


def test_an_empty_folder_of_that_name_is_nobodys(root: Path) -> None:
    recipe = load_recipe(root / "r.yaml", [f"root={root}", f"output={root}/other"])
    (root / "other/dft").mkdir(parents=True)
    check_kept(recipe)
    shutil.copytree(root / "out/dft", root / "other/.dft.checkpoints")
    check_kept(recipe)
    with pytest.raises(
        RecipeError, match=r"other/.dft.checkpoints is begun, and not by this recipe: seed was 0 and is 9"
    ):
        check_kept(load_recipe(root / "r.yaml", [f"root={root}", f"output={root}/other", "seed=9"]))
    shutil.rmtree(root / "other")


@pytest.mark.parametrize("kept", [None, "{", '{"seconds": 3}'])
def test_a_folder_that_is_no_stage_is_left_alone(kept: str | None, copied: Path, capsys: Any) -> None:
    stage = copied / "out/dft"
    (stage / "stage.json").unlink()
    if kept is not None:
        (stage / "stage.json").write_text(kept)
    before = stamps(stage)
    assert run(*recipe_of(copied)) == 2
    assert "out/dft is there and no stage of switchkd's (stage.json is missing or damaged)" in capsys.readouterr().err
    assert stamps(stage) == before


@pytest.mark.parametrize("settings", [{}, {"train_sampling_strategy": "group_by_length", "dataloader_drop_last": True}])
def test_stopped_it_goes_on_with_another_micro_batch(
    settings: dict[str, Any],
    one_stage_recipe: Callable[..., Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    at_micro_batch: AtMicroBatch,
    capsys: Any,
) -> None:
    """The samples of every step are the same, in whatever micro-batches, and so are the losses but for rounding."""
    straight, stopped = (
        one_stage_recipe(tmp_path / name / "r.yaml", tiny_checkpoint, num_train_epochs=2, **settings)
        for name in ("straight", "stopped")
    )
    plain = "stages.dft.objective={name: sft}"
    assert run(straight, plain) == 0
    at_micro_batch(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(stopped, plain, "stages.dft.training.logging_steps=50") == EXIT_STOPPED
    at_micro_batch(-1, lambda: None)
    work = tmp_path / "stopped/out/.dft.checkpoints"
    before = stamps(work)
    assert run(stopped, plain, "stages.dft.training.gradient_accumulation_steps=6") == 2
    error = capsys.readouterr().err
    assert ".dft.checkpoints is begun, and not by this recipe: stages.dft.batch of a process was 3 and is 6" in error
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(RecipeError, match="samples of a step was 3 and is 6"):
            check_kept(load_recipe(stopped, [plain]))
    assert stamps(work) == before
    # Three samples at once in place of one after the other, logged at every step from here.
    changes = [
        f"stages.dft.training.{key}" for key in ("per_device_train_batch_size=3", "gradient_accumulation_steps=1")
    ]
    assert run(stopped, plain, *changes, "stages.dft.training.save_steps=1") == 0
    ours, theirs = (training_rows(tmp_path / name / "out/dft/log.jsonl") for name in ("stopped", "straight"))
    last = 6 if settings else 8
    assert [row["step"] for row in ours] == list(range(2, last + 1))
    for own, other in zip(ours[1:], theirs[2:], strict=True):
        assert (own["tokens"], own["supervised_tokens"]) == (other["tokens"], other["supervised_tokens"])
        for name in ("loss", "grad_norm", "learning_rate"):
            assert own[name] == pytest.approx(other[name], rel=1e-3), (own["step"], name)
    weights = [load_file(tmp_path / name / "out/dft/model.safetensors") for name in ("stopped", "straight")]
    for name, value in weights[0].items():
        assert (value - weights[1][name]).abs().max() < 1e-3, name


def test_the_seed_of_the_data_alone_changes_the_order_of_each_sampler() -> None:
    from switchkd.training.data.sampler import LengthGroupedSampler

    orders = [
        list(LengthGroupedSampler(range(11), 4, seed, drop)) for seed, drop in ((0, False), (1, False), (0, True))
    ]
    assert orders[0] != orders[1]
    assert (len(orders[0]), len(orders[2])) == (11, 8)
    assert orders[0][:8] == orders[2]
    assert len(LengthGroupedSampler(range(11), 4, 0, True)) == 8


def test_a_large_file_is_read_once(tmp_path: Path) -> None:
    file, kept = tmp_path / "weights", tmp_path / "digests.json"
    file.write_bytes(b"one")
    memory = DigestMemory(kept)
    first = memory.sha256(file)
    kept.write_text(memory.text())
    again, facts = DigestMemory(kept), file.stat()
    assert again.knows(file)
    file.write_bytes(b"two")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert again.sha256(file) == first  # not read
    os.utime(file)
    assert not again.knows(file)
    assert again.sha256(file) != first
    # A hub cache's large files are named by their SHA-256.
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"three")
    (tmp_path / "link").symlink_to(blob)
    assert again.sha256(tmp_path / "link") == "ab" * 32
    kept.write_text("{")  # a damaged memory is none
    assert DigestMemory(kept).sha256(file) == again.sha256(file)
