"""A stage's `training:` as `transformers.TrainingArguments`, with what every run here shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from .recipe import RecipeError, StageRecipe, check_keys, find_recipe


def training_arguments(stage: StageRecipe, work: Path, seed: int) -> TrainingArguments:
    """The stage's `transformers.TrainingArguments`; keys of `training:` are its names. Raises RecipeError."""
    try:
        return plain_arguments(stage.training | {"seed": seed}, work)
    except ValueError as error:
        raise RecipeError(f"stage {stage.name}: training: {error}") from None


def plain_arguments(training: dict[str, Any], work: Path) -> TrainingArguments:
    """`transformers.TrainingArguments` from their names, with what every run here shares. Raises ValueError."""
    check_keys(training, list(TrainingArguments.__dataclass_fields__), "training")
    shared: dict[str, Any] = {
        "output_dir": str(work),
        "remove_unused_columns": False,  # the collator takes samples, not columns
        "disable_tqdm": True,  # our own bar
        "save_total_limit": 2,
        "report_to": "none",
        # Memory pinning is for a GPU, and warns without one.
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    given = dict(training)
    if isinstance(given.get("deepspeed"), str) and not Path(given["deepspeed"]).is_file():
        given["deepspeed"] = yaml.safe_load(find_recipe(f"deepspeed/{given['deepspeed']}").read_text(encoding="utf-8"))
    return TrainingArguments(**(shared | given))
