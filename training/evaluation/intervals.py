"""95 % intervals of figures over questions that share pictures, and of paired differences between two systems.

Questions about one picture are not independent: a picture that is hard for one is often hard for the others. So what
is counted as drawn at random is the picture with its questions, a cluster (Miller, arXiv 2411.00640).

Shapes: S seeds, C clusters, K sums of a metric, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# A figure's value of a metric's sums: whatever comes before the last axis is kept, the K sums are used up.
Figure = Callable[[Floats], Floats]

LEVEL = 0.95
RESAMPLES = 2000
_BLOCK = 250  # resamples at a time: 10 MB for 40,000 clusters
_SEED = 20241100640
_WEE = 1e-12  # rounding of sums of scores between 0 and 1


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; `low` and `high` are None where the data cannot tell one, and `note` says why.

    `clusters` are the pictures (and the questions without one), `seeds` the training runs of the system, `how` the kind
    of interval: docs/evaluation.md has the formula of each.
    """

    value: float
    low: float | None
    high: float | None
    standard_error: float | None
    questions: int
    clusters: int
    seeds: int = 1
    how: str = ""
    note: str = ""

    @property
    def half_width(self) -> float | None:
        """Half of what lies between the interval's ends."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool | None:
        """Whether 0 lies outside; None without an interval."""
        return None if self.low is None or self.high is None else not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Sums:
    """What a metric adds up, `sums_SCK`, by seed and cluster; `questions` is how many questions there are of a seed."""

    sums_SCK: Floats
    questions: int

    def __post_init__(self) -> None:
        assert self.sums_SCK.ndim == 3
        assert min(self.sums_SCK.shape) > 0

    @property
    def seeds(self) -> int:
        """S."""
        return len(self.sums_SCK)

    @property
    def clusters(self) -> int:
        """C."""
        return len(self.sums_SCK[0])

    def value(self, figure: Figure) -> float:
        """The figure, the mean of all seeds'."""
        return float(figure(self.sums_SCK.sum(axis=1)).mean())


def estimate(sums: Sums, figure: Figure, *, mean: bool) -> Estimate:
    """A figure of one system, `mean` saying whether it is a mean over questions of scores between 0 and 1.

    Means have Wilson's interval at the effective number of questions that the clustered standard error stands for,
    other figures the bootstrap over clusters. With several seeds either has the two-level standard error.
    """
    value = sums.value(figure)
    if sums.clusters < 2:
        return _without(value, sums, "one picture: the spread between pictures cannot be told")
    if mean:
        return _wilson(value, sums, two_level(influence(sums, figure)))
    if sums.seeds > 1:
        return _t_interval(value, sums, two_level(pseudo_values(sums, figure)))
    return _bootstrap(value, sums, lambda weights: figure(_resampled(sums, weights)), "the pictures")


def difference(one: Sums, other: Sums, figure: Figure, *, mean: bool) -> Estimate:
    """A figure of one system minus that of another over the same clusters, paired, and by seed where there are several.

    Raises ValueError where clusters or seeds do not match.
    """
    if one.clusters != other.clusters or one.questions != other.questions:
        raise ValueError(f"{one.questions} questions on one side, {other.questions} on the other; pairs need the same")
    if other.seeds == 1 and one.seeds > 1:
        other = Sums(np.repeat(other.sums_SCK, one.seeds, axis=0), other.questions)
    elif one.seeds == 1 and other.seeds > 1:
        one = Sums(np.repeat(one.sums_SCK, other.seeds, axis=0), one.questions)
    if one.seeds != other.seeds:
        raise ValueError(
            f"{one.seeds} seeds on one side and {other.seeds} on the other; pairs need as many of both, or one of one"
        )
    value = one.value(figure) - other.value(figure)
    if one.clusters < 2:
        return _without(value, one, "one picture: the spread between pictures cannot be told")
    if mean or one.seeds > 1:
        values = influence if mean else pseudo_values
        return _t_interval(value, one, two_level(values(one, figure) - values(other, figure)))

    def resampled(weights: Floats) -> Floats:
        return figure(_resampled(one, weights)) - figure(_resampled(other, weights))

    return _bootstrap(value, one, resampled, "the differences")


def no_difference(sums: Sums) -> Estimate:
    """What two systems differ by whose every score is the same: exactly 0, from 0 to 0."""
    return Estimate(0.0, 0.0, 0.0, 0.0, sums.questions, sums.clusters, sums.seeds, "paired", "every score is the same")


# --- what a cluster contributes ---


def influence(sums: Sums, figure: Figure) -> Floats:
    """By seed and cluster, values whose mean over clusters is a mean over questions, with its variance: y_SC.

    For sums of scores and counts (K = 2) it is the linearised ratio, y = m_s + C / n (sum_sc - n_c m_s), by which
    the standard error of the mean of y is Miller's clustered one.
    """
    score_SC, count_SC = sums.sums_SCK[..., 0], sums.sums_SCK[..., 1]
    mean_S1 = figure(sums.sums_SCK.sum(axis=1))[:, None]
    scale = sums.clusters / count_SC.sum(axis=1, keepdims=True)
    return np.asarray(mean_S1 + scale * (score_SC - count_SC * mean_S1))


def pseudo_values(sums: Sums, figure: Figure) -> Floats:
    """Jackknife pseudo-values by seed and cluster, for figures that are no means: C f - (C - 1) f without the cluster.

    As Dorfman, Berbaum & Metz (1992) do it for readers and cases.
    """
    total_S1K = sums.sums_SCK.sum(axis=1, keepdims=True)
    whole_S1, left_SC = figure(total_S1K), figure(total_S1K - sums.sums_SCK)
    return np.asarray(sums.clusters * whole_S1 - (sums.clusters - 1) * left_SC)


@dataclass(frozen=True)
class Spread:
    """The standard error of a mean over seeds and clusters, and how many of them the interval goes to each side."""

    standard_error: float
    quantile: float


def two_level(value_SC: Floats) -> Spread:
    """The spread of the mean of values by seed and cluster, where both are drawn at random and crossed.

    Every seed answers the same questions, as where several readers read the same cases. The two-way table has the mean
    squares MS_s between seeds, MS_c between clusters and MS_e of what is left, and the mean the two variances

        of seeds      max(MS_s - MS_e, 0) / (S C)
        of questions  MS_c / (S C)

    each with its own t quantile (S - 1 and C - 1 degrees of freedom); the interval's half-width is the root of the sum
    of the squares of the two half-widths (Howe 1974, JASA 69:789). The spread of two seeds is too often small by
    chance: with S = 2 MS_e is taken from MS_c in place of MS_s, with the same sum and more of the wide quantile.

    With one seed this is sqrt(MS_c / C): the clustered standard error of Miller, arXiv 2411.00640, with the
    factor C / (C - 1), so that clusters of one question each have the usual one.
    """
    seeds, clusters = value_SC.shape
    grand = value_SC.mean()
    between_clusters_C = value_SC.mean(axis=0) - grand
    ms_clusters = seeds * float(np.square(between_clusters_C).sum()) / (clusters - 1)
    of_questions = t_quantile(clusters - 1)
    if seeds == 1:
        return Spread(math.sqrt(ms_clusters / clusters), of_questions)
    between_seeds_S = value_SC.mean(axis=1) - grand
    ms_seeds = clusters * float(np.square(between_seeds_S).sum()) / (seeds - 1)
    rest_SC = value_SC - grand - between_clusters_C - between_seeds_S[:, None]
    ms_rest = float(np.square(rest_SC).sum()) / ((seeds - 1) * (clusters - 1))
    if seeds == 2:
        ms_clusters = max(ms_clusters - ms_rest, 0.0)
    else:
        ms_seeds = max(ms_seeds - ms_rest, 0.0)
    variance = ms_seeds + ms_clusters
    if variance <= _WEE**2:
        return Spread(0.0, of_questions)
    half = math.sqrt(t_quantile(seeds - 1) ** 2 * ms_seeds + of_questions**2 * ms_clusters)
    return Spread(math.sqrt(variance / (seeds * clusters)), half / math.sqrt(variance))


# --- intervals ---


def _without(value: float, sums: Sums, why: str) -> Estimate:
    return Estimate(value, None, None, None, sums.questions, sums.clusters, sums.seeds, "none", why)


def _t_interval(value: float, sums: Sums, spread: Spread) -> Estimate:
    """Estimate ± t standard errors; t and not the normal quantile, which is too small for few pictures or seeds."""
    if spread.standard_error < _WEE:
        return _without(value, sums, "every picture shows the same, so that the spread cannot be told")
    half = spread.quantile * spread.standard_error
    how = "two-level t" if sums.seeds > 1 else "clustered t"
    return Estimate(
        value, value - half, value + half, spread.standard_error, sums.questions, sums.clusters, sums.seeds, how
    )


def _wilson(value: float, sums: Sums, spread: Spread) -> Estimate:
    """Wilson's interval (1927) of a mean of scores between 0 and 1, at the effective number of questions p (1-p) / SE².

    Estimate ± t SE goes beyond 1 and covers too little near 0 and 1, and there is nothing left of it at 0 and at 1.
    This one is the same in the middle (Franco, Little, Louis & Slud 2019, J. Surv. Stat. Methodol. 7:334).
    Where every score is 0, or every one 1, each cluster counts as one question.
    """
    t, inside = spread.quantile, value * (1 - value)
    how = "two-level Wilson" if sums.seeds > 1 else "clustered Wilson"
    shared = (sums.questions, sums.clusters, sums.seeds, how)
    if inside > _WEE and spread.standard_error < _WEE:
        return _without(value, sums, "every picture has the same mean, so that the spread cannot be told")
    at_edge = inside <= _WEE
    effective = sums.clusters if at_edge else inside / spread.standard_error**2
    middle = (value + t * t / (2 * effective)) / (1 + t * t / effective)
    half = t / (1 + t * t / effective) * math.sqrt(inside / effective + (t / (2 * effective)) ** 2)
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    note = "every score is the same: each picture counted as one question" if at_edge else ""
    return Estimate(value, min(low, value), max(high, value), spread.standard_error, *shared, note)


def _bootstrap(value: float, sums: Sums, figure: Callable[[Floats], Floats], what: str) -> Estimate:
    """The percentile bootstrap over clusters (Efron & Tibshirani 1993, chapter 13), with the same draws every time."""
    found_R = np.concatenate([figure(weights_RC) for weights_RC in _draws(sums.clusters)])
    if np.ptp(found_R) < _WEE:
        return _without(value, sums, f"{what} show no spread, so that resampling cannot tell how sure this is")
    outside = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(found_R, [outside, 100 - outside])
    error = float(found_R.std(ddof=1))
    return Estimate(value, float(low), float(high), error, sums.questions, sums.clusters, 1, "bootstrap over pictures")


def _resampled(sums: Sums, weights_RC: Floats) -> Floats:
    """The sums of resampled clusters, of a system with one seed."""
    return np.asarray(weights_RC @ sums.sums_SCK[0])


def _draws(clusters: int) -> Iterator[Floats]:
    """How often each resample has each cluster, some resamples at a time."""
    for block in range(RESAMPLES // _BLOCK):
        yield _draw(clusters, block).astype(np.float64)


@lru_cache(maxsize=RESAMPLES // _BLOCK)
def _draw(clusters: int, block: int) -> npt.NDArray[np.uint8]:
    """One block; kept, since every figure of a report asks for the same."""
    generator = np.random.default_rng([_SEED, block])
    chosen_RC = generator.integers(0, clusters, (_BLOCK, clusters))
    counts_RC = np.stack([np.bincount(row, minlength=clusters) for row in chosen_RC])
    return counts_RC.astype(np.uint8)  # some 20 at most


# --- Student's t, without scipy: it evaluates on boards too ---


@lru_cache(maxsize=4096)
def t_quantile(degrees: float, level: float = LEVEL) -> float:
    """The t that leaves (1 - level) / 2 above it, by bisection, to eight digits."""
    low, high = 0.0, 1.0
    while _t_tails(high, degrees) > 1 - level:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_tails(middle, degrees) > 1 - level else (low, middle)
    return high


def _t_tails(t: float, degrees: float) -> float:
    """P(|T| > t): the regularised incomplete beta function at d / (d + t²) with d / 2 and 1/2."""
    return _beta_share(degrees / (degrees + t * t), degrees / 2, 0.5)


def _beta_share(x: float, a: float, b: float) -> float:
    """I_x(a, b) by Gauss's continued fraction (Abramowitz & Stegun 26.5.8, evaluated as Lentz does)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the other side converges faster
        return 1 - _beta_share(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 500):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d, c = 1 / (1 + step * d), 1 + step / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * fraction / a
