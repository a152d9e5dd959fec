"""Float32 graphs to the other precisions, one file a method, and the bounds that each has to keep."""

from .precisions import METHODS, PRECISIONS, Bounds, Precision, precision_of

__all__ = [
    "METHODS",
    "PRECISIONS",
    "Bounds",
    "Precision",
    "precision_of",
]
