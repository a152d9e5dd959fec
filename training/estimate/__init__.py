"""What a recipe will take before it is run: parameters, memory, tokens, hours."""

from .estimate import Cluster, Estimator, StageEstimate

__all__ = [
    "Cluster",
    "Estimator",
    "StageEstimate",
]
