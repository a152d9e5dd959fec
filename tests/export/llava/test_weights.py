"""What a checkpoint's files hold and what its model reads are the same, but for what no LLaVA reads: else a refusal."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.siglip import SiglipVisionConfig, SiglipVisionModel

from switchkd.export.graphs.checkpoint import open_checkpoint
from switchkd.export.graphs.tracing import ExportError
from switchkd.export.llava.weights import misfit


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def add(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = checkpoint / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def edit(file: Path, *keys: str, value: Any) -> None:
    content = place = json.loads(file.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("language_model.model.layers.0.self_attn.q_norm.weight", "1 weights are read by no part of the model, the"),
        ("language_model.model.layers.2.mlp.up_proj.weight", "correct config.json, or save the model again without"),
        ("vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias", r"the first is \S*encoder\.layers\.3\.mlp\.fc1"),
        ("image_newline", "the first is image_newline"),
        ("language_model.model.layers.0.self_attn.q_proj.lora_A.weight", "an adapter; merge it into the model"),
        ("multi_modal_projector.linear_3.weight", "linear_3.weight is no weight of the projector"),
    ],
)
def test_a_weight_that_no_part_reads_is_refused(checkpoint: Path, name: str, reason: str) -> None:
    add(checkpoint, {name: torch.ones(4)})
    with pytest.raises(ExportError, match=reason) as caught:
        open_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)


def test_fewer_layers_than_the_weights_have_is_another_model(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", "text_config", "num_hidden_layers", value=1)
    edit(checkpoint / "config.json", "text_config", "layer_types", value=None)
    with pytest.raises(ExportError, match=r"12 weights are read by no part of the model, .*layers\.1\.input_layernorm"):
        open_checkpoint(checkpoint)


def test_what_no_llava_reads_may_be_there(checkpoint: Path) -> None:
    edit(checkpoint / "config.json", "vision_config", "vision_use_head", value=True)
    vision = json.loads((checkpoint / "config.json").read_text())["vision_config"]
    head = SiglipVisionModel(SiglipVisionConfig(**vision)).state_dict()
    extra = {f"vision_tower.vision_model.{name}": tensor for name, tensor in head.items() if name.startswith("head.")}
    assert len(extra) == 11
    extra["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(16)[None]
    extra["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    add(checkpoint, extra)
    assert open_checkpoint(checkpoint).model.model.vision_tower.config.vision_use_head is False


def test_the_pooling_head_that_no_llava_reads_may_be_missing(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    del config["vision_config"]["vision_use_head"]  # transformers' default: with a head
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert not hasattr(open_checkpoint(checkpoint).model.model.vision_tower, "head")


def test_a_text_tower_belongs_to_an_encoder_alone() -> None:
    loading: dict[str, Any] = {
        "missing_keys": [],
        "mismatched_keys": [],
        "unexpected_keys": ["text_model.a", "head.probe"],
    }
    assert misfit(loading, encoder=True) is None
    assert "the first is text_model.a" in str(misfit(loading))
    loading["unexpected_keys"] += ["text_model.b", "lm_head.weight", "ahead.probe", "head.weight"]
    assert "3 weights are read by no part of the model, the first is ahead.probe" in str(misfit(loading, encoder=True))
