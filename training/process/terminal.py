"""What a command puts on the terminal: its own lines, once for all processes, and no bars or warnings of libraries."""

from __future__ import annotations

import os
import sys

import torch
from transformers.utils import logging


def quiet_libraries() -> None:
    """Turn off transformers' weight-loading bars, and DeepSpeed's warning that there is no GPU."""
    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def speaks() -> bool:
    """Whether this is the process that speaks for all that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Write a line to standard error, once for all processes."""
    if speaks():
        sys.stderr.write(f"{text}\n")
