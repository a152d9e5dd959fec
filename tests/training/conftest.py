"""Tiny LLaVA pairs with random weights, and batches for them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip import CLIPVisionConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.siglip import SiglipVisionConfig

from switchkd.training.runs.trainer import DistillationTrainer
from switchkd.training.world.dataset import WorldSettings, write_world

IMAGE_TOKEN = 4
Batch = dict[str, Tensor]


def make_llava(
    seed: int,
    *,
    vocabulary: int = 61,
    width: int = 16,
    layers: int = 2,
    heads: int = 2,
    encoder_width: int = 16,
    patch: int = 6,
    image_size: int = 12,
    encoder: str = "siglip",
    image_token: int = IMAGE_TOKEN,
    strategy: Literal["full", "default"] = "full",
    feature_layer: int | list[int] = -2,
    tied: bool = True,
    text_config: Callable[..., Any] = Qwen2Config,
) -> LlavaForConditionalGeneration:
    """A LLaVA of 12x12 pictures (4 visual tokens) in float64, so that comparisons can be tight."""
    vision: dict[str, Any] = {
        "hidden_size": encoder_width,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch,
    }
    text = text_config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False)
        if encoder == "siglip"
        else CLIPVisionConfig(**vision),
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).double()


def make_batch(seed: int, pictures: list[int], *, length: int = 14, visual_tokens: int = 4) -> Batch:
    """A batch of one row for every entry of `pictures`, which says how many pictures the row holds."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(pictures)
    ids_BT = torch.randint(5, 50, (rows, length), generator=generator)
    labels_BT = torch.full_like(ids_BT, -100)
    mask_BT = torch.ones_like(ids_BT)
    for row, count in enumerate(pictures):
        ids_BT[row, 1 : 1 + visual_tokens * count] = IMAGE_TOKEN
        start, stop = 2 + visual_tokens * count, length - row % 3
        labels_BT[row, start:stop] = ids_BT[row, start:stop]
        mask_BT[row, stop:] = 0
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    if sum(pictures):
        shape = (sum(pictures), 3, 12, 12)
        batch["pixel_values"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return batch


def split_rows(batch: Batch, pictures: list[int]) -> Iterator[Batch]:
    """A batch's rows as batches of one, each with its own pictures."""
    left = list(batch.get("pixel_values", []))
    for row, count in enumerate(pictures):
        one = {name: value[row : row + 1] for name, value in batch.items() if name != "pixel_values"}
        if count:
            one["pixel_values"] = torch.stack([left.pop(0) for _ in range(count)])
        yield one


@pytest.fixture
def rows() -> Callable[..., Iterator[Batch]]:
    return split_rows


@pytest.fixture
def llava() -> Callable[..., LlavaForConditionalGeneration]:
    return make_llava


@pytest.fixture
def batch() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture(scope="session")
def ten_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small picture world of ten records."""
    folder = write_world(tmp_path_factory.mktemp("data") / "world", WorldSettings(24, 7, 7))
    records = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(records[:10]))
    return folder


@pytest.fixture(scope="session")
def one_stage_recipe(ten_records: Path) -> Callable[..., Path]:
    """Writes a recipe of one stage, `dft`, 12 steps in 3 epochs; the checkpoint is its own teacher.

    An epoch is ten micro-batches of one record, three of them a step: its last step is of a single one.
    """

    def write(path: Path, checkpoint: Path, **training: Any) -> Path:
        chosen: dict[str, Any] = {
            "num_train_epochs": 3,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 3,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
            "logging_steps": 1,
            "save_steps": 4,
            "report_to": "none",
            "use_cpu": True,
        }
        stage = {
            "name": "dft",
            "train": ["encoder", "projector", "language_model"],
            "objective": {"name": "switch_kd"},
            "data": {"records": [str(ten_records / "train.json")], "pictures": str(ten_records / "pictures")},
            "training": chosen | training,
        }
        recipe = {"output": str(path.parent / "out"), "teacher": str(checkpoint), "stages": [stage]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe | {"model": {"checkpoint": str(checkpoint)}}))
        return path

    return write


@pytest.fixture
def at_micro_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Plans what happens before a micro-batch is computed, counted from here; a new plan replaces the old one."""
    plan: dict[str, Any] = {"left": -1}
    compute = DistillationTrainer.compute_loss

    def first_the_plan(self: DistillationTrainer, *arguments: Any, **settings: Any) -> Any:
        if plan["left"] == 0:
            plan["action"]()
        plan["left"] -= 1
        return compute(self, *arguments, **settings)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", first_the_plan)
    return lambda count, action: plan.update(left=count, action=action)
