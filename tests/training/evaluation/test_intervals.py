"""The intervals, by simulation with fixed seeds: they hold the truth as often as they say, false alarms are rare."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from switchkd.training.evaluation.intervals import Estimate, Floats, Sums, difference, estimate, t_quantile
from switchkd.training.evaluation.metrics import ratio

RUNS = 1000
COVERED = (0.93, 0.97)


def f1(sums: Floats) -> Floats:
    return np.asarray(2 * sums[..., 0] / np.maximum(2 * sums[..., 0] + sums[..., 1] + sums[..., 2], 1))


def of_means(score_SC: Any, count_C: Any) -> Sums:
    scores = np.asarray(score_SC, dtype=float)
    return Sums(np.stack([scores, np.broadcast_to(count_C, scores.shape)], axis=-1), int(np.sum(count_C)))


def covered(draw: Callable[[np.random.Generator], Estimate], truth: float, runs: int = RUNS) -> float:
    """How often the interval holds the truth."""
    rng = np.random.default_rng(20261127)
    found = [draw(rng) for _ in range(runs)]
    return float(np.mean([e.low is not None and e.high is not None and e.low <= truth <= e.high for e in found]))


@pytest.mark.parametrize("truth", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("clusters", [40, 150])
def test_accuracies_are_covered_where_questions_share_pictures(truth: float, clusters: int) -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        count_C = rng.integers(1, 6, clusters)
        ease_C = rng.beta(3 * truth, 3 * (1 - truth), clusters)  # of a picture, for all of its questions
        return estimate(of_means([rng.binomial(count_C, ease_C)], count_C), ratio, mean=True)

    low, high = COVERED
    assert low <= covered(draw, truth, 3000) <= high


def test_near_all_right_the_estimate_and_two_standard_errors_would_cover_too_rarely() -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        right_C = rng.binomial(1, 0.95, 20)
        found = estimate(of_means([right_C], np.ones(20)), ratio, mean=True)
        half = t_quantile(19) * (found.standard_error or 0)
        return replace(found, low=found.value - half, high=found.value + half)

    assert covered(draw, 0.95) < 0.75


def test_without_the_clusters_the_same_data_are_covered_far_too_rarely() -> None:
    """The planted fault: each question taken for a picture of its own."""

    def draw(rng: np.random.Generator) -> Estimate:
        ease_C = np.repeat(rng.beta(1.5, 1.5, 50), 6)
        return estimate(of_means([rng.binomial(1, ease_C)], np.ones(300)), ratio, mean=True)

    assert covered(draw, 0.5) < 0.85


def test_f1_is_covered_by_the_bootstrap_over_pictures() -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        ease_C = rng.beta(8, 2, 100)
        label_CQ, right_CQ = rng.random((100, 6)) < 0.5, rng.random((100, 6)) < ease_C[:, None]
        said_CQ = np.where(right_CQ, label_CQ, ~label_CQ)
        counts = [(said_CQ & label_CQ).sum(1), (said_CQ & ~label_CQ).sum(1), (~said_CQ & label_CQ).sum(1)]
        return estimate(Sums(np.stack(counts, axis=-1)[None].astype(float), 600), f1, mean=False)

    low, high = COVERED
    assert low <= covered(draw, 0.8) <= high


def paired(rng: np.random.Generator, better: float) -> tuple[Sums, Sums]:
    """Two systems over the same 200 pictures, the first right so much more often, on the same easy ones."""
    count_C = rng.integers(1, 4, 200)
    ease_C = rng.beta(6, 3, 200) * (1 - better)
    return of_means([rng.binomial(count_C, ease_C + better)], count_C), of_means(
        [rng.binomial(count_C, ease_C)], count_C
    )


def test_no_difference_raises_a_false_alarm_one_time_in_twenty() -> None:
    assert 0.93 <= covered(lambda rng: difference(*paired(rng, 0.0), ratio, mean=True), 0.0) <= 0.97


def test_a_planted_difference_is_found_and_told_in_its_direction() -> None:
    rng = np.random.default_rng(0)
    found = [difference(*paired(rng, 0.2), ratio, mean=True) for _ in range(200)]
    assert sum(bool(e.excludes_zero) and e.value > 0 for e in found) >= 190
    one, other = paired(rng, 0.2)
    there, back = (difference(*sides, ratio, mean=True) for sides in ((one, other), (other, one)))
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -(back.high or 0), -(back.low or 0)))


def test_pairing_is_what_makes_the_interval_narrow() -> None:
    rng = np.random.default_rng(1)
    ease_C = rng.beta(0.5, 0.5, 200)
    one, other = ((rng.random(200) < ease_C)[None], (rng.random(200) < ease_C)[None])
    both = difference(of_means(one, np.ones(200)), of_means(other, np.ones(200)), ratio, mean=True)
    apart = [estimate(of_means(side, np.ones(200)), ratio, mean=True).standard_error or 0 for side in (one, other)]
    assert (both.standard_error or 0) < 0.8 * float(np.linalg.norm(apart))


@pytest.mark.parametrize("of_seeds", [0.0, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("seeds", [3, 5])
def test_differences_over_seeds_and_questions_are_covered(seeds: int, of_seeds: float) -> None:
    assert 0.93 <= covered(lambda rng: over_seeds(rng, seeds, of_seeds), 0.1) <= 0.975


def test_two_seeds_are_covered_and_cost_width() -> None:
    for of_seeds in (0.0, 0.03, 0.1):
        assert covered(lambda rng, spread=of_seeds: over_seeds(rng, 2, spread), 0.1) >= 0.94  # type: ignore[misc]


def over_seeds(rng: np.random.Generator, seeds: int, of_seeds: float, truth: float = 0.1) -> Estimate:
    """The difference of two systems, by seed and by picture, and what is left."""
    count_C = rng.integers(1, 4, 200)
    mean_SC = truth + of_seeds * rng.normal(size=(seeds, 1)) + 0.3 * rng.normal(size=(1, 200))
    score_SC = mean_SC * count_C + 0.3 * np.sqrt(count_C) * rng.normal(size=(seeds, 200))
    return difference(of_means(score_SC, count_C), of_means(0 * score_SC, count_C), ratio, mean=True)


def test_one_seeds_interval_is_too_narrow_where_seeds_differ() -> None:
    """What the second level is for: the planted fault is to take one seed for the method."""
    assert covered(lambda rng: over_seeds(rng, 1, 0.1), 0.1) < 0.6


def test_f1_over_seeds_is_covered_by_pseudo_values() -> None:
    def draw(rng: np.random.Generator) -> Estimate:
        label_CQ, ease_C = rng.random((100, 6)) < 0.5, rng.beta(8, 2, 100)
        seeds = []
        for _ in range(3):
            right_CQ = rng.random((100, 6)) < (ease_C[:, None] + rng.normal(0, 0.02)).clip(0, 1)
            said_CQ = np.where(right_CQ, label_CQ, ~label_CQ)
            counts = [(said_CQ & label_CQ).sum(1), (said_CQ & ~label_CQ).sum(1), (~said_CQ & label_CQ).sum(1)]
            seeds.append(np.stack(counts, axis=-1))
        return estimate(Sums(np.stack(seeds).astype(float), 600), f1, mean=False)

    assert 0.93 <= covered(draw, 0.8, 500) <= 0.985


# --- values worked out by hand ---


def test_the_standard_error_is_the_clustered_one() -> None:
    # Four pictures of two questions, right 2, 1, 0, 1 of 2: mean 1/2, residuals by picture 1, 0, -1, 0.
    # SE² = 4/3 (1 + 1) / 8² = 1/24.
    found = estimate(of_means([[2, 1, 0, 1]], [2, 2, 2, 2]), ratio, mean=True)
    assert (found.value, found.questions, found.clusters) == (0.5, 8, 4)
    assert found.standard_error == pytest.approx((1 / 24) ** 0.5)
    # Wilson with t = 3.18245 of 3 degrees at n = p (1-p) / SE² = 6: 1/2 ± t/(1 + t²/6) sqrt(1/24 + t²/144).
    half = 3.18244630 / (1 + 3.18244630**2 / 6) * (1 / 24 + 3.18244630**2 / 144) ** 0.5
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_a_paired_difference_by_hand() -> None:
    # By picture +1, 0, +1, 0 of one question each: mean 1/2, variance 1/3, SE² = 1/12.
    found = difference(of_means([[1, 1, 1, 0]], np.ones(4)), of_means([[0, 1, 0, 0]], np.ones(4)), ratio, mean=True)
    assert found.value == 0.5
    assert found.standard_error == pytest.approx((1 / 12) ** 0.5)
    assert found.half_width == pytest.approx(3.18244630 * (1 / 12) ** 0.5)
    assert found.excludes_zero is False


def test_all_right_and_all_wrong_have_an_interval_that_says_how_little_is_known() -> None:
    for score in (0, 1):
        found = estimate(of_means([[3 * score] * 10], [3] * 10), ratio, mean=True)
        # At the edge Wilson's is n / (n + t²) with the ten pictures as n: 10 / (10 + 2.26216²) = 0.6615.
        assert (found.low, found.high) == pytest.approx((0.66148, 1) if score else (0, 1 - 0.66148), abs=1e-4)
        assert found.value == score
        assert "each picture counted as one question" in found.note


def test_one_picture_has_no_interval_and_says_why() -> None:
    alone = of_means([[3]], [4])
    for found in (
        estimate(alone, ratio, mean=True),
        estimate(alone, ratio, mean=False),
        difference(alone, of_means([[2]], [4]), ratio, mean=True),
    ):
        assert (found.low, found.high, found.excludes_zero) == (None, None, None)
        assert "one picture" in found.note


def test_a_collapsed_spread_is_told_and_not_taken_for_certainty() -> None:
    ones, none = of_means([[1] * 5], np.ones(5)), of_means([[0] * 5], np.ones(5))
    found = difference(ones, none, ratio, mean=True)
    assert (found.value, found.low) == (1, None)
    assert "every picture shows the same" in found.note
    halves = estimate(of_means([[1] * 5], np.full(5, 2)), ratio, mean=True)
    assert (halves.value, halves.low) == (0.5, None)
    assert "every picture has the same mean" in halves.note
    sure = estimate(of_means([[1] * 5], np.ones(5)), ratio, mean=False)
    assert (sure.value, sure.low) == (1, None)
    assert "resampling cannot tell" in sure.note


def test_the_bootstrap_draws_the_same_every_time() -> None:
    side = of_means([np.arange(20) % 3], np.full(20, 2))
    first, second = (estimate(side, ratio, mean=False) for _ in range(2))
    assert first == second
    assert first.low is not None
    assert first.low < first.value < (first.high or 0)


def test_one_system_of_a_single_seed_stands_against_several() -> None:
    several, one = (
        of_means([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], np.ones(4)),
        of_means([[0, 1, 0, 0]], np.ones(4)),
    )
    assert difference(several, one, ratio, mean=True).value == pytest.approx(0.75 - 0.25)
    assert difference(one, several, ratio, mean=True).seeds == 3
    with pytest.raises(ValueError, match="3 seeds on one side and 2 on the other"):
        difference(several, Sums(several.sums_SCK[:2], 4), ratio, mean=True)


def test_students_t_is_the_tables() -> None:
    for degrees, value in (
        (1, 12.706205),
        (2, 4.302653),
        (3.7, 2.867521),
        (10, 2.228139),
        (99, 1.984217),
        (1e6, 1.959966),
    ):
        assert t_quantile(degrees) == pytest.approx(value, abs=2e-6)
