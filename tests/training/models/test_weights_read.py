"""Encoders, language models, students and teachers whose weights do not fit their config are refused, by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipConfig, SiglipModel

from switchkd.training.models.vlm import ModelError, build_vlm, load_vlm

Tensors = dict[str, Tensor]


@pytest.fixture
def parts(ldpv2_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with copies of a checkpoint and of its encoder and language model, which a test may spoil."""
    for name in ("encoder", "language_model", "checkpoint"):
        shutil.copytree(ldpv2_checkpoint.parent / name, tmp_path / name)
    return tmp_path


def change(folder: Path, spoil: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    save_file(spoil(load_file(file)), file, metadata={"format": "pt"})


def without(end: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def having(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(3)}


@pytest.mark.parametrize(
    ("part", "spoil", "reason"),
    [
        ("encoder", without("layers.1.mlp.fc2.bias"), r"encoder: 1 weights are missing, .*layers\.1\.mlp\.fc2\.bias"),
        ("encoder", having("encoder.layers.3.mlp.fc2.bias"), "encoder: 1 weights are read by no part of the model"),
        (
            "encoder",
            lambda t: {n: torch.ones(7) if n.endswith("fc2.bias") else v for n, v in t.items()},
            "other shapes",
        ),
        ("language_model", without("layers.1.mlp.up_proj.weight"), "language_model: 1 weights are missing, the first"),
        ("language_model", having("layers.0.self_attn.k_norm.weight"), r"the first is \S*layers\.0\.self_attn\.k_norm"),
        ("checkpoint", having("language_model.model.layers.2.mlp.up_proj.weight"), "checkpoint: 1 weights are read by"),
        ("checkpoint", without("peg.bias"), r"checkpoint: 1 weights are missing, .*peg\.bias"),
    ],
)
def test_what_is_left_over_or_missing_is_named(
    parts: Path, part: str, spoil: Callable[[Tensors], Tensors], reason: str
) -> None:
    change(parts / part, spoil)
    with pytest.raises(ModelError, match=reason) as caught:
        load_vlm(parts / "checkpoint") if part == "checkpoint" else build_vlm(
            parts / "encoder", parts / "language_model"
        )
    assert "\n" not in str(caught.value)


def test_an_ldpv2_folder_whose_config_was_lost_is_no_mlp(parts: Path) -> None:
    config = json.loads((parts / "checkpoint" / "config.json").read_text())
    del config["projector_type"]
    (parts / "checkpoint" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"2 weights are read by no part of the model, .*projector\.peg\.bias"):
        load_vlm(parts / "checkpoint")


def test_a_whole_siglip_gives_its_vision_tower(parts: Path) -> None:
    vision = json.loads((parts / "encoder" / "config.json").read_text()) | {"vision_use_head": True}
    text: dict[str, Any] = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    model = SiglipModel(SiglipConfig(text_config=text | {"num_attention_heads": 2}, vision_config=vision))
    model.save_pretrained(parts / "encoder")
    tower: Any = build_vlm(parts / "encoder", parts / "language_model").model.model.vision_tower
    assert not hasattr(tower, "head")
    want = model.vision_model.encoder.layers[1].mlp.fc2.weight
    assert torch.equal(tower.encoder.layers[1].mlp.fc2.weight, want)


def test_a_head_that_nobody_reads_is_not_made_up(parts: Path) -> None:
    config = json.loads((parts / "checkpoint" / "config.json").read_text())
    del config["vision_config"]["vision_use_head"]  # transformers' default: with a head
    (parts / "checkpoint" / "config.json").write_text(json.dumps(config))
    load_vlm(parts / "checkpoint").save(parts / "again")
    assert (
        load_file(parts / "again" / "model.safetensors").keys()
        == load_file(parts / "checkpoint" / "model.safetensors").keys()
    )


def test_a_part_without_its_settings_is_refused_before_the_language_model_is_read(parts: Path) -> None:
    (parts / "language_model" / "model.safetensors").unlink()
    (parts / "encoder" / "preprocessor_config.json").rename(parts / "settings.json")
    with pytest.raises(ModelError, match=r"encoder: no preprocessor_config\.json there"):
        build_vlm(parts / "encoder", parts / "language_model")
    (parts / "settings.json").rename(parts / "encoder" / "preprocessor_config.json")
    for file in (parts / "language_model").glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match="language_model: no tokenizer there"):
        build_vlm(parts / "encoder", parts / "language_model")


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_of_several_named_templates_the_default_is_taken(parts: Path, name: str) -> None:
    folder = parts / "language_model"
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    several = [{"name": name, "template": template}, {"name": "rag", "template": "{{ 'no' }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": several}))
    if name == "default":
        assert build_vlm(parts / "encoder", folder).tokenizer.chat_template == template
    else:
        with pytest.raises(ModelError, match=r"chat templates \('rag', 'tool_use'\) none is named 'default'"):
            build_vlm(parts / "encoder", folder)
