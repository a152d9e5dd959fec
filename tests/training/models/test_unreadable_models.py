"""Models that cannot be read, as people bring them: one line with the file or id and the way out, and exit code 2."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from switchkd.cli.main import main
from switchkd.training.models.chat_templates import difference
from switchkd.training.models.vlm import ModelError, load_tokenizer, load_vlm
from switchkd.training.recipe.recipe import Recipe
from switchkd.training.runs.stage_models import stage_distillation, stage_student

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 988097824\n"
WAY_OUT = (
    "is a Git-LFS pointer of 134 bytes, not the file that it stands for; fetch that with `git lfs install` and then"
)


@pytest.fixture
def models(ldpv2_checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path) -> dict[str, Any]:
    """Copies that a test may spoil: an encoder and a language model, a whole student, a teacher; and their folder."""
    parts = {name: ldpv2_checkpoint.parent / name for name in ("encoder", "language_model")}
    folders = parts | {"checkpoint": tiny_checkpoint, "teacher": tiny_checkpoint}
    copies = {name: str(shutil.copytree(folder, tmp_path / name)) for name, folder in folders.items()}
    return copies | {"folder": str(tmp_path)}


def recipe_of(models: dict[str, Any], *names: str) -> dict[str, Any]:
    stage = {"name": "dft", "train": ["projector"], "objective": {"name": "switch_kd"}, "training": {"use_cpu": True}}
    stage |= {"data": {"records": "none.json"}}
    model = {name: models[name] for name in names}
    return {"output": "out", "teacher": models["teacher"], "model": model, "stages": [stage]}


def said_of(models: dict[str, Any], *names: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `train` ends with, of a student put together from these of the models, with the teacher."""
    path = Path(models["folder"]) / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_of(models, *names)))
    assert main(["train", str(path), f"output={path.parent / 'out'}"]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


ROLES = ("encoder", "language_model", "checkpoint", "teacher")


def parts_with(role: str) -> tuple[str, ...]:
    return ("encoder", "language_model") if role in ("encoder", "language_model") else ("checkpoint",)


@pytest.mark.parametrize(
    ("role", "file"), [*((role, "model.safetensors") for role in ROLES), ("language_model", "tokenizer.json")]
)
def test_training_names_a_git_lfs_pointer(
    role: str, file: str, models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(models[role]) / file
    path.write_text(POINTER)
    said = said_of(models, *parts_with(role), capsys=capsys)
    assert said == f"switchkd: error: {path}: {WAY_OUT} `git lfs pull` in {models[role]}"


def test_export_and_import_name_a_git_lfs_pointer(
    models: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = Path(models["checkpoint"]) / "model.safetensors"
    weights.write_text(POINTER)
    assert main(["export", models["checkpoint"], str(tmp_path / "bundle")]) == 2
    assert f"error: {weights}: {WAY_OUT}" in capsys.readouterr().err
    part = tmp_path / "tinyllava/language_model"
    part.mkdir(parents=True)
    (part / "pytorch_model.bin").write_text(POINTER)
    assert main(["import", "tinyllava", str(part.parent), str(tmp_path / "imported")]) == 2
    assert f"error: {part / 'pytorch_model.bin'}: {WAY_OUT} `git lfs pull` in {part}" in capsys.readouterr().err


def test_pointers_that_nobody_reads_are_left_alone(models: dict[str, Any]) -> None:
    """`git lfs pull --include` fetches what is wanted, and leaves the rest as it is."""
    for name in ("pytorch_model.bin", "tf_model.h5", "consolidated.safetensors", "photo.png"):
        (Path(models["checkpoint"]) / name).write_text(POINTER)
    assert load_vlm(models["checkpoint"]).tokens_per_picture == 16


@pytest.mark.parametrize("role", ROLES)
def test_an_id_that_is_not_to_be_had_is_named(
    role: str, models: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = said_of(models | {role: "nobody/no-such-model"}, *parts_with(role), capsys=capsys)
    assert said.startswith("switchkd: error: nobody/no-such-model: cannot be loaded: ")
    assert said.endswith("; check its name, or give the folder of a copy where this machine has no way to the hub")


def test_an_encoder_without_its_picture_settings_is_refused_before_the_language_model_is_read(
    models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(models["encoder"]) / "preprocessor_config.json").unlink()
    (Path(models["language_model"]) / "model.safetensors").write_bytes(b"unread")
    said = said_of(models, "encoder", "language_model", capsys=capsys)
    assert said.startswith(f"switchkd: error: {models['encoder']}: no preprocessor_config.json there, which says how")


def test_weights_that_are_cut_off_are_told_in_one_line(
    models: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for role in ("language_model", "encoder", "checkpoint"):
        weights = Path(models[role]) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        said = said_of(models, *parts_with(role), capsys=capsys)
        assert said.startswith(f"switchkd: error: {models[role]}: cannot be loaded: ")
        assert said.endswith("; fetch or save it again")


def name_templates(folder: Path, **others: str) -> None:
    """Move a tokenizer's one template among several by name, as older releases of transformers saved them."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    named = {"tool_use": "{{ raise_exception('no tools') }}"} | others | {"rag": "{{ documents }}"}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": listed}))
    file.unlink()


def test_of_several_templates_the_default_is_taken(models: dict[str, Any]) -> None:
    folder = Path(models["language_model"])
    expected = load_tokenizer(folder)
    name_templates(folder, default=(folder / "chat_template.jinja").read_text())
    found = load_tokenizer(folder)
    assert found.chat_template == expected.chat_template
    assert found.eos_token == expected.eos_token
    checkpoint = Path(models["checkpoint"])
    before = load_vlm(checkpoint).processor.chat_template
    name_templates(checkpoint, default=(checkpoint / "chat_template.jinja").read_text())
    vlm = load_vlm(checkpoint)
    assert vlm.processor.chat_template == vlm.tokenizer.chat_template == before


def test_templates_without_a_default_are_refused(models: dict[str, Any]) -> None:
    name_templates(Path(models["language_model"]))
    with pytest.raises(ModelError, match=r"of its chat templates \('rag', 'tool_use'\) none is named 'default'"):
        load_tokenizer(models["language_model"])


def test_a_teacher_with_another_prompt_is_said_and_trains(models: dict[str, Any]) -> None:
    said: list[str] = []
    recipe = Recipe.from_dict(recipe_of(models, "checkpoint"))
    student = stage_student(recipe, recipe.stages[0], None)
    stage_distillation(recipe, recipe.stages[0], student, said.append)
    assert said == []
    template = Path(models["teacher"]) / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>' + message", "<|im_start|>the ' + message"))
    assert stage_distillation(recipe, recipe.stages[0], student, said.append).teacher is not None
    (line,) = said
    assert line.startswith("dft: the teacher has another prompt than the student, whose prompt it is given: ")
    assert "the student's reads '<|im_start|>user\\n<image>" in line
    assert "where the teacher's reads '<|im_start|>the user\\n<image>" in line


@pytest.mark.parametrize(
    ("theirs", "found"),
    [
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", None),
        (
            "{% for m in messages %}{{ m['role'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
            ("user", "user>"),
        ),
        ("{{ raise_exception('one turn alone') }}", ("userassistantuser", "")),
    ],
)
def test_where_prompts_part_is_shown(theirs: str, found: tuple[str, str] | None) -> None:
    ours = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    parted = difference(ours, theirs, {})
    if found is None:
        assert parted is None
    else:
        assert parted is not None
        assert (parted[0].endswith(found[0]), parted[1].endswith(found[1])) == (True, True)
