"""How the next token is chosen from the decoder's logits: greedy, or drawn by temperature, top k and nucleus.

Shapes in names: V vocabulary.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from switchkd.export.contract.generation_settings import GenerationSettings


class SamplingError(ValueError):
    """A sampling setting outside its range."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; what is None is as the bundle's generation_config.json says.

    Temperature 0 is greedy, and so is a bundle that says nothing of `do_sample`. `top_k` keeps so many of the likeliest
    tokens (0: all), `top_p` of those the likeliest that together reach it; `seed` repeats a draw.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            raise SamplingError(f"temperature is {self.temperature}, expected 0 (greedy) to 100; 0.7 is usual")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p}, expected more than 0 and at most 1 (every token)")
        if self.top_k is not None and self.top_k < 0:
            raise SamplingError(f"top_k is {self.top_k}, expected 0 (every token) or more")
        if self.seed is not None and self.seed < 0:
            raise SamplingError(f"seed is {self.seed}, expected 0 or more")

    def over(self, settings: GenerationSettings) -> Self:
        """Return the same with what is None filled in from a bundle's settings, of which these count if it draws."""
        theirs = Sampling(settings.temperature, settings.top_p, None, settings.top_k) if settings.do_sample else _GREEDY
        return type(self)(
            temperature=theirs.temperature if self.temperature is None else self.temperature,
            top_p=theirs.top_p if self.top_p is None else self.top_p,
            seed=self.seed,
            top_k=theirs.top_k if self.top_k is None else self.top_k,
        )


_GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0)


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model found a token that was written, and the likeliest ones in its place, the likeliest first.

    Natural logarithms of the probabilities over the whole vocabulary, before temperature, nucleus and rules.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprob(logits_V: npt.NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """Return it for one token, with the `top` likeliest."""
    scaled_V = logits_V.astype(np.float64) - float(logits_V.max())
    logprob_V = scaled_V - np.log(np.exp(scaled_V).sum())
    likeliest = np.argsort(-logprob_V, kind="stable")[:top].tolist() if top else []
    return TokenLogprob(token, float(logprob_V[token]), tuple((each, float(logprob_V[each])) for each in likeliest))


class Sampler:
    """Draws the tokens of one answer; its random numbers belong to that answer alone."""

    def __init__(self, sampling: Sampling, settings: GenerationSettings | None = None) -> None:
        self._sampling = sampling.over(settings or GenerationSettings())
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits_V: npt.NDArray[np.float32]) -> int:
        """Return one token id for float logits_V; nucleus sampling as in Holtzman et al. 2020 (arXiv 1904.09751)."""
        temperature, top_k, top_p = self._sampling.temperature, self._sampling.top_k, self._sampling.top_p
        assert temperature is not None
        assert top_p is not None
        if temperature == 0:
            return int(np.argmax(logits_V))
        # From the largest logit down, so that a tiny temperature makes zeros of all others, and no infinity.
        with np.errstate(over="ignore"):
            scaled_V = (logits_V.astype(np.float64) - float(logits_V.max())) / temperature
        if top_k and top_k < len(scaled_V):
            scaled_V[scaled_V < np.partition(scaled_V, -top_k)[-top_k]] = -np.inf
        probability_V = np.exp(scaled_V)
        probability_V /= probability_V.sum()
        nucleus = _nucleus(probability_V, top_p)
        kept = probability_V[nucleus]
        return int(self._random.choice(nucleus, p=kept / kept.sum()))


def _nucleus(probability_V: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.int64]:
    """The likeliest tokens, largest first, up to the one that brings their sum to `top_p`.

    A few hundred are enough as a rule: sorting a vocabulary of 150,000 takes longer than the token before it. Nothing
    is sorted where all are kept.
    """
    if top_p >= 1:
        return np.flatnonzero(probability_V)
    count = 256
    while True:
        order = np.arange(len(probability_V))
        if count < len(order):
            order = np.flatnonzero(probability_V >= np.partition(probability_V, -count)[-count])
        order = order[np.argsort(-probability_V[order], kind="stable")]
        upto = np.cumsum(probability_V[order])
        if upto[-1] >= top_p or len(order) == len(probability_V):
            return order[upto - probability_V[order] < top_p]
        count *= 16
