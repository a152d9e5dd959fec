"""Student and teacher: put together, loaded, compared, joined by the visual switch; ways in from other layouts."""

from .distillation import Distillation
from .imports import Sources
from .llava_original import import_llava
from .tinyllava import import_tinyllava
from .vlm import ModelError, Vlm, build_vlm, load_vlm, train_only

__all__ = [
    "Distillation",
    "ModelError",
    "Sources",
    "Vlm",
    "build_vlm",
    "import_llava",
    "import_tinyllava",
    "load_vlm",
    "train_only",
]
