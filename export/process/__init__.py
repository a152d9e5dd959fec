"""The running command: its memory, and how far it is."""

from .memory import return_freed_blocks
from .progress import Steps

__all__ = [
    "Steps",
    "return_freed_blocks",
]
