"""Student and teacher: put together, loaded, compared, and joined by the visual switch."""

from .distillation import Distillation
from .vlm import ModelError, Vlm, build_vlm, load_vlm, train_only

__all__ = [
    "Distillation",
    "ModelError",
    "Vlm",
    "build_vlm",
    "load_vlm",
    "train_only",
]
