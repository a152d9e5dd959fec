"""Graphs run and compared: with the PyTorch model, with one another, and with the clock."""

from .graph_runner import GraphRunner, VerificationError, exercise
from .parity import Pairs, compare, record
from .reference import TorchReference
from .speed import measure_speed, measure_variants

__all__ = [
    "GraphRunner",
    "Pairs",
    "TorchReference",
    "VerificationError",
    "compare",
    "exercise",
    "measure_speed",
    "measure_variants",
    "record",
]
