"""Choosing tokens: greedy, temperature, nucleus, seeds, and settings out of range."""

from typing import Any

import numpy as np
import pytest

from switchkd.serve import Sampling, SamplingError
from switchkd.serve.engine.sampling import Sampler, _nucleus, token_logprob

LOGITS = np.log(np.array([0.5, 0.1, 0.3, 0.07, 0.03], dtype=np.float32))


def shares(sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.choose(LOGITS) for _ in range(draws)], minlength=len(LOGITS)) / draws


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert Sampler(Sampling()).choose(LOGITS) == 0
    assert Sampler(Sampling()).choose(np.array([1, 3, 3], dtype=np.float32)) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_sharpens_the_distribution(temperature: float) -> None:
    expected = np.exp(LOGITS / temperature) / np.exp(LOGITS / temperature).sum()
    np.testing.assert_allclose(shares(Sampling(temperature, seed=1)), expected, atol=0.015)


def test_nucleus_keeps_the_likeliest_tokens_that_reach_top_p() -> None:
    # 0.5 alone does not reach 0.7; with 0.3 it does.
    np.testing.assert_allclose(shares(Sampling(1.0, top_p=0.7, seed=1)), [0.625, 0, 0.375, 0, 0], atol=0.015)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("vocabulary", [3, 300, 5000])
def test_a_nucleus_is_that_of_the_whole_vocabulary_sorted(vocabulary: int, spread: float, top_p: float) -> None:
    """Many tokens are equally likely here, as quantised ones are: of those the first come first."""
    logits_V = np.round(np.random.default_rng(0).standard_normal(vocabulary) * spread, 1)
    probability_V = np.exp(logits_V) / np.exp(logits_V).sum()
    order = sorted(range(vocabulary), key=lambda token: (-probability_V[token], token))
    expected, reached = [], 0.0
    for token in order:
        if reached >= top_p:
            break
        expected.append(token)
        reached += probability_V[token]
    assert abs(len(_nucleus(probability_V, top_p)) - len(expected)) <= 1  # sums in another order, in the last digit
    assert _nucleus(probability_V, top_p)[: len(expected) - 1].tolist() == expected[:-1]


def test_without_a_nucleus_every_possible_token_can_come() -> None:
    assert _nucleus(np.array([0.25, 0.0, 0.5, 0.25]), 1.0).tolist() == [0, 2, 3]


def test_a_tiny_nucleus_and_a_tiny_temperature_are_greedy() -> None:
    assert shares(Sampling(5.0, top_p=1e-9, seed=1), 50)[0] == 1
    assert shares(Sampling(1e-6, seed=1), 50)[0] == 1
    assert shares(Sampling(1e-320, seed=1), 50)[0] == 1


def test_the_smallest_temperature_overflows_nothing(recwarn: pytest.WarningsRecorder) -> None:
    assert shares(Sampling(1e-320, seed=1), 50)[0] == 1
    assert not recwarn.list


def test_a_seed_repeats_its_draws_and_another_does_not() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(2.0, seed=seed))
        return [sampler.choose(LOGITS) for _ in range(40)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1, expected 0"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        Sampling(**settings)


def test_log_probabilities_are_of_the_whole_vocabulary() -> None:
    found = token_logprob(LOGITS + 50, token=3, top=2)
    assert found.token == 3
    assert found.logprob == pytest.approx(np.log(0.07), abs=1e-6)
    assert [token for token, _ in found.top] == [0, 2]
    np.testing.assert_allclose([value for _, value in found.top], np.log([0.5, 0.3]), atol=1e-6)
    assert token_logprob(LOGITS, 0, 0).top == ()
    assert token_logprob(np.array([-np.inf, 1e30, 0], dtype=np.float32), 1, 1).logprob == 0
