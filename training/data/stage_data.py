"""A stage's data: checked by one process for all before the first step; a picture lost later does not end the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from switchkd.export.contract.pixels import Preprocessing

from ..models.alignment import IGNORED
from ..recipe.recipe import DataRecipe, StageRecipe
from .check import Broken, DataCheck, Ints, check_data
from .conversations import BrokenRecord, DataError, Reason
from .dataset import ConversationDataset, Sample
from .label_mask import ConversationEncoder
from .picture_check import root_of
from .records import Records

WAITS = (0.5, 3.0)  # seconds before a record is tried again: a network disk may only be slow
FEW = 1000  # samples; among fewer a share of lost ones says nothing
_MOST_WORKERS = 1024
_SEEN, _LOST, _REFUSED = 0, 1, 2
# What a disk that is slow or failing may look like. Anything else the record says of itself, however often it is read.
_OF_THE_DISK = frozenset((Reason.UNREADABLE, Reason.MISSING, Reason.NOT_A_RECORD))

T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """What of the records is trained on, small enough to be told to every process; `left_out` counts by reason."""

    records: Records
    length_M: Ints
    left_out: dict[str, int]
    listed: Path


def stage_dataset(
    stage: StageRecipe,
    encoder: ConversationEncoder,
    preprocessing: Preprocessing,
    memory: Path,
    announce: Callable[[str], None],
) -> StageDataset:
    """The stage's records without the broken ones, which are listed in the folder `memory`, counted and announced.

    Raises DataError with the first of them where there are more than `max_broken`.
    """
    listed = memory / f"{stage.name}.skipped.jsonl"

    def select() -> Selection:
        check = check_data(stage.data, encoder, memory, preprocessing)
        list_broken(listed, check)
        check.refuse_above(stage.data.max_broken, listed)
        if check.broken:
            announce(f"{stage.name}: {check.summary()}; all of them: {listed}")
        good_M = check.good_M
        return Selection(check.records.only(good_M), check.length_N[good_M], check.by_reason, listed)

    return StageDataset(on_one_rank(select), stage.data, encoder, preprocessing)


def list_broken(listed: Path, check: DataCheck) -> None:
    """Write every broken record as a line of JSON."""
    listed.parent.mkdir(parents=True, exist_ok=True)
    rows = (json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in check.broken.values())
    listed.write_text("".join(rows), encoding="utf-8", errors="replace")


def on_one_rank(work: Callable[[], T]) -> T:
    """What `work` returns on the first process, told to all others; they raise the DataError that it raises there.

    The others wait for as long as it takes: in a group of its own, as the run's own would give up after half an hour.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    told: list[Any] = [None, None]
    group = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    if dist.get_rank() == 0:
        try:
            told[0] = work()
        except DataError as error:
            told[1] = str(error)
    dist.broadcast_object_list(told, src=0, group=group)
    dist.destroy_process_group(group)
    if told[1] is not None:
        raise DataError(told[1])
    return told[0]  # type: ignore[no-any-return]


class StageDataset(ConversationDataset):
    """The selected records; one that cannot be read after all is replaced by a sample that nothing is learned from."""

    def __init__(
        self, selection: Selection, data: DataRecipe, encoder: ConversationEncoder, preprocessing: Preprocessing
    ) -> None:
        super().__init__(selection.records, root_of(data), encoder, preprocessing, selection.length_M.tolist())
        self.selection = selection
        self.max_broken = data.max_broken
        # Seen, lost and refused by worker, a row each, so that nobody waits for a lock; in memory that workers share.
        self._counts = torch.zeros(1 + _MOST_WORKERS, 3, dtype=torch.int64).share_memory_()

    def __getitem__(self, index: int) -> Sample:
        """The sample, or one without label and picture in place of one that is lost or refused."""
        worker = get_worker_info()
        row = self._counts[0 if worker is None else 1 + worker.id]
        row[_SEEN] += 1
        for wait in (*WAITS, None):
            try:
                return super().__getitem__(index)
            except (BrokenRecord, OSError) as error:
                refused = isinstance(error, BrokenRecord) and error.reason not in _OF_THE_DISK
                if wait is not None and not refused:
                    time.sleep(wait)
                    continue
                row[_REFUSED if refused else _LOST] += 1
                self._list(index, error)
                break
        return Sample([0], [IGNORED], None, f"{self.selection.records.name(index)}, lost", lost=True)

    def left_out(self) -> dict[str, dict[str, int]]:
        """For the stage's card: how many records were left out, by reason."""
        return {"left_out": self.selection.left_out}

    @property
    def seen(self) -> int:
        """Samples that this process and its workers were asked for."""
        return int(self._counts[:, _SEEN].sum())

    @property
    def lost(self) -> int:
        """How many of them were replaced."""
        return int(self._counts[:, _LOST].sum())

    @property
    def refused(self) -> int:
        """How many were as they are read, but cannot be trained on; the check before the first step let them pass."""
        return int(self._counts[:, _REFUSED].sum())

    def _list(self, index: int, error: Exception) -> None:
        file, place = self.selection.records.where(index)
        reason = str(error.reason) if isinstance(error, BrokenRecord) else "cannot be read"
        row = Broken(str(file), place, None, reason, str(error))._asdict() | {"while": "training"}
        self.selection.listed.parent.mkdir(parents=True, exist_ok=True)
        with self.selection.listed.open("a", encoding="utf-8", errors="replace") as listed:
            listed.write(json.dumps(row, ensure_ascii=False) + "\n")


class LostSamples(TrainerCallback):
    """Ends training where more than the allowed share of samples was lost, and says at the end how many were."""

    def __init__(self, dataset: StageDataset, announce: Callable[[str], None]) -> None:
        self._dataset = dataset
        self._announce = announce

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count. Raises DataError above the share, and for a single one that is refused."""
        if self._dataset.refused:
            raise DataError(
                f"step {state.global_step}: {self._dataset.refused:,} samples cannot be trained on, though they could "
                f"before training; they are at the end of {self._dataset.selection.listed}. Were the records changed "
                "meanwhile? Start the stage anew where they were"
            )
        lost, seen, share = self._dataset.lost, self._dataset.seen, self._dataset.max_broken
        if lost > share * max(seen, FEW):
            raise DataError(
                f"step {state.global_step}: {lost:,} of {seen:,} samples could not be read, more than max_broken "
                f"{100 * share:g} %, though they could before training; they are at the end of "
                f"{self._dataset.selection.listed}. See to the disk, then run the same command to go on"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say how many were lost."""
        if self._dataset.lost:
            self._announce(
                f"{self._dataset.lost:,} samples could not be read while training and were left out; "
                f"they are at the end of {self._dataset.selection.listed}"
            )
