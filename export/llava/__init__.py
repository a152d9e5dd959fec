"""LLaVA as a checkpoint folder holds it: its projectors, and whether its weights are all there and all read."""

from .projectors import ProjectorError, check_projector, llava_class, tokens_per_picture
from .weights import misfit

__all__ = [
    "ProjectorError",
    "check_projector",
    "llava_class",
    "misfit",
    "tokens_per_picture",
]
