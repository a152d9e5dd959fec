"""Measures a run between two logs: the objective's terms, k, speed, waiting for data and memory, over all ranks.

Everything stays on the device until a log is due, and is read there at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..objectives.spread import quantiles

if TYPE_CHECKING:
    from ..models.distillation import DistillationOutput

GIB = 2**30


class Meter(TrainerCallback):
    """Sums what micro-batches give and, when a log is due, returns what they come to over all ranks.

    A term is averaged as the loss is: over the supervised tokens of a step, on whatever rank and in whatever
    micro-batch they are, and then over the steps. So the loss is the weighted sum of its terms. The last step before a
    save or the end is always logged: whatever is resumed, the log's lines then hold every step once.
    """

    def __init__(self) -> None:
        self._began_at = self._read_at = time.perf_counter()
        self._first_step = self._read_step = 0
        self._clear()

    def _clear(self) -> None:
        self._floats: dict[str, Tensor] = {}  # 0-dim: terms
        self._counts: dict[str, Tensor] = {}  # int64: tokens, and k in bins
        self._samples = 0
        self._waited = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clocks of an attempt, and the memory's high-water mark."""
        self._began_at = self._read_at = time.perf_counter()
        self._first_step = self._read_step = state.global_step
        self._clear()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a log where the run is saved or stopped."""
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def add(self, output: DistillationOutput, batch: dict[str, Any], supervised_in_step: Tensor | int) -> None:
        """Take in a micro-batch; `supervised_in_step` is the whole step's number of supervised tokens, all ranks'."""
        supervised = (batch["labels"][:, 1:] != -100).sum()
        share = supervised / supervised_in_step
        for name, value in output["terms"].items():
            _sum_up(self._floats, name, value.detach().float() * share)
        for name, counts_K in output["counts"].items():
            _sum_up(self._counts, name, counts_K)
        _sum_up(self._counts, "tokens", batch["attention_mask"].sum())
        _sum_up(self._counts, "supervised_tokens", supervised)
        self._samples += len(batch["labels"])

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; what is spent waiting for each counts as waiting for data."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - start
            yield batch

    def read(self, step: int, last_step: int) -> dict[str, float]:
        """What happened since the last reading, up to `step`, for the log; every rank has to ask at the same step."""
        now = time.perf_counter()
        seconds, steps = now - self._read_at, max(step - self._read_step, 1)
        ranks: list[dict[str, Any]] = gather_object([self._own() | {"data_wait": self._waited / seconds}])
        floats, counts = (_add_up([rank[kind] for rank in ranks]) for kind in ("floats", "counts"))
        values = {name: total / steps for name, (total,) in floats.items()}
        (tokens,), (supervised,) = counts.pop("tokens", [0]), counts.pop("supervised_tokens", [0])
        for name, counts_K in counts.items():
            values |= {f"{name}_{quantile}": value for quantile, value in quantiles(counts_K).items()}
        values |= {"tokens": tokens, "supervised_tokens": supervised, "tokens_per_second": tokens / seconds}
        values["samples_per_second"] = sum(rank["samples"] for rank in ranks) / seconds
        values["data_wait"] = max(rank["data_wait"] for rank in ranks)
        for name in ranks[0]["memory"]:
            values[name] = max(rank["memory"][name] for rank in ranks)
        values["seconds_left"] = (now - self._began_at) / max(step - self._first_step, 1) * (last_step - step)
        self._read_at, self._read_step = now, step
        self._clear()
        return {name: _short(value) for name, value in values.items()}

    def _own(self) -> dict[str, Any]:
        return {
            "floats": _to_host(self._floats),
            "counts": _to_host(self._counts),
            "samples": self._samples,
            "memory": peak_memory(),
        }


def peak_memory() -> dict[str, float]:
    """The most memory held so far in GiB: of this rank's GPU, allocated and reserved by torch; else of the process."""
    if torch.cuda.is_available():
        peaks = {
            "memory_gib": torch.cuda.max_memory_allocated(),
            "memory_reserved_gib": torch.cuda.max_memory_reserved(),
        }
        return {name: value / GIB for name, value in peaks.items()}
    if sys.platform == "win32":
        return {}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_gib": peak * (1 if sys.platform == "darwin" else 1024) / GIB}


def _sum_up(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _to_host(sums: dict[str, Tensor]) -> dict[str, list[float]]:
    """The values as lists, moved together."""
    if not sums:
        return {}
    flat = torch.cat([value.reshape(-1) for value in sums.values()]).tolist()
    places = torch.tensor([0, *(value.numel() for value in sums.values())]).cumsum(0).tolist()
    return {name: flat[start:end] for name, start, end in zip(sums, places, places[1:], strict=False)}


def _add_up(ranks: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """The ranks' sums; a rank that had no picture lacks the terms of pictures."""
    total: dict[str, list[float]] = {}
    for rank in ranks:
        for name, values in rank.items():
            before = total.get(name, [0] * len(values))
            total[name] = [one + other for one, other in zip(before, values, strict=True)]
    return total


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.7g}")
