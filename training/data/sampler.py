"""Samples grouped by length and modality, as LLaVA does: little padding, and batches in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

GROUP = 20  # batches that are sorted together


class LengthGroupedSampler(Sampler[int]):
    """Yields every index once an epoch, neighbours in a batch of about the same length, whole batches shuffled.

    With `drop_last` the short batch at the end is left out.

    The Trainer's own grouping goes from long to short within 50 batches, so that for a while every batch is of one
    sort. The order depends on seed and epoch alone, so a resumed run goes on with the same samples.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, drop_last: bool = False) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._drop_last = drop_last
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths) - (len(self._lengths) % self._batch_size if self._drop_last else 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        size = self._batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), size * GROUP):
            group = sorted(order[start : start + size * GROUP], key=self._lengths.__getitem__)
            batches += [group[place : place + size] for place in range(0, len(group), size)]
        # The one short batch stays at the end: anywhere else it would shift the borders of all that follow.
        whole = len(order) // size
        short = [] if self._drop_last else range(whole, len(batches))
        for number in [*torch.randperm(whole, generator=generator).tolist(), *short]:
            yield from batches[number]
