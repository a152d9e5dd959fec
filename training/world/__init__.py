"""The embedded default: a picture world with questions, its tiny base models, and recipes shrunk to them."""

from .bases import copy_parts, make_parts, stored_parts
from .dataset import WorldSettings, draw_world, write_world
from .dry_run import shrink
from .scoring import score_checkpoint

__all__ = [
    "WorldSettings",
    "copy_parts",
    "draw_world",
    "make_parts",
    "score_checkpoint",
    "shrink",
    "stored_parts",
    "write_world",
]
