"""One run from its start to its card: stages, the loop, checkpoints that outlive faults, logs."""

from .checkpoints import CheckpointError
from .model_card import write_scores
from .stages import finished_stages, run_recipe
from .trainer import DistillationTrainer

__all__ = [
    "CheckpointError",
    "DistillationTrainer",
    "finished_stages",
    "run_recipe",
    "write_scores",
]
