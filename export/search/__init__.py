"""The precision of each part of a model, chosen by what calibration pairs show."""

from .calibration import Calibration, CalibrationError, read_calibration
from .mix_options import Mixing, MixOptions
from .mixes import Mix, find_mix
from .overflow import Overflow
from .variants import Variants

__all__ = [
    "Calibration",
    "CalibrationError",
    "Mix",
    "MixOptions",
    "Mixing",
    "Overflow",
    "Variants",
    "find_mix",
    "read_calibration",
]
