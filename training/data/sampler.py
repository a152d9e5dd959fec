"""The order of an epoch; grouped by length and modality as LLaVA does, it has little padding and random batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import TrainingArguments

from .dataset import ConversationDataset

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


def step_batch(args: TrainingArguments) -> int:
    """Samples of an optimizer step over all processes."""
    return int(args.train_batch_size * args.gradient_accumulation_steps * args.world_size)


def epoch_sampler(args: TrainingArguments, dataset: ConversationDataset) -> Sampler[int]:
    """The sampler that a stage asks for; the dataset knows its lengths without decoding pictures."""
    # Whole steps, and not whole micro-batches: so an epoch does not depend on how a step is put together.
    size, drop = step_batch(args), args.dataloader_drop_last
    count = len(dataset) - len(dataset) % size if drop else len(dataset)
    if args.train_sampling_strategy == "group_by_length":
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthGroupedSampler(dataset.lengths(), size, seed, drop)
    if args.train_sampling_strategy == "sequential":
        return SequentialSampler(range(count))
    return RandomSampler(dataset, num_samples=count)
