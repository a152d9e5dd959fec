"""How the next token is chosen from the decoder's logits: greedy, or by temperature and nucleus.

Shapes in names: V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


class SamplingError(ValueError):
    """A sampling setting outside its range."""


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; `top_p` keeps the likeliest tokens that together reach it; `seed` repeats a draw."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise SamplingError(f"temperature is {self.temperature}, expected 0 (greedy) to 100; 0.7 is usual")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p}, expected more than 0 and at most 1 (every token)")
        if self.seed is not None and self.seed < 0:
            raise SamplingError(f"seed is {self.seed}, expected 0 or more")


class Sampler:
    """Draws the tokens of one answer; its random numbers belong to that answer alone."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits_V: npt.NDArray[np.float32]) -> int:
        """Return one token id for float logits_V; nucleus sampling as in Holtzman et al. 2020 (arXiv 1904.09751)."""
        if self._sampling.temperature == 0:
            return int(np.argmax(logits_V))
        # From the largest logit down, so that a tiny temperature cannot overflow.
        scaled_V = (logits_V.astype(np.float64) - float(logits_V.max())) / self._sampling.temperature
        probability_V = np.exp(scaled_V)
        probability_V /= probability_V.sum()
        order_V = np.argsort(-probability_V, kind="stable")
        before_V = np.cumsum(probability_V[order_V]) - probability_V[order_V]
        nucleus = order_V[before_V < self._sampling.top_p]
        kept = probability_V[nucleus]
        return int(self._random.choice(nucleus, p=kept / kept.sum()))
