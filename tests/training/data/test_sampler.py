"""Length grouping: every sample once, like with like, in an order that depends on seed and epoch alone."""

import itertools
import random

import pytest

from switchkd.training.data.sampler import LengthGroupedSampler


@pytest.mark.parametrize("count", [1, 7, 64, 1000, 1003])
def test_every_sample_comes_once(count: int) -> None:
    lengths = [random.Random(0).randint(-50, 300) for _ in range(count)]
    sampler = LengthGroupedSampler(lengths, 8, seed=0)
    assert sorted(sampler) == list(range(count))
    assert len(sampler) == count


def test_batches_are_alike_inside_and_shuffled_among_themselves() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(20, 300) for _ in range(1603)]
    order = list(LengthGroupedSampler(lengths, 16, seed=0))
    batches = [[lengths[index] for index in order[start : start + 16]] for start in range(0, 1600, 16)]
    padding = sum(max(batch) * len(batch) - sum(batch) for batch in batches)
    unsorted = sum(max(lengths[s : s + 16]) * 16 - sum(lengths[s : s + 16]) for s in range(0, 1600, 16))
    assert padding < unsorted / 5
    means = [sum(batch) / len(batch) for batch in batches]
    rises = sum(a < b for a, b in itertools.pairwise(means))
    assert 30 < rises < 70  # neither sorted up nor down


def test_the_order_depends_on_seed_and_epoch() -> None:
    lengths = [random.Random(1).randint(20, 300) for _ in range(500)]

    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthGroupedSampler(lengths, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
