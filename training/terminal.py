"""Keeps the libraries' own bars and warnings out of a command's output, which shows progress of its own."""

from __future__ import annotations

import os

import torch
from transformers.utils import logging


def quiet_libraries() -> None:
    """Turn off transformers' weight-loading bars, and DeepSpeed's warning that there is no GPU."""
    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
