"""From what a person asks of a mix to the mix: pairs to calibrate and score on, the parts' methods, their graphs."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ..contract.bundle import Bundle
from ..graphs.tracing import ExportError, GraphDescription
from ..quantisation.precisions import AUTO, MIXED
from ..verification.graph_runner import GraphRunner
from ..verification.parity import MAX_NEW_TOKENS, Pairs
from .calibration import PAIRS, Calibration, Reference, answered_by, ask, read_calibration, score
from .mixes import Found, Say, find_mix
from .variants import FLOAT32, Variants

MAX_DROP = 1.0  # percentage points of accuracy


@dataclass(frozen=True)
class MixOptions:
    """Which mix, and pairs of questions and answers to calibrate and score precisions on."""

    parts: Mapping[str, str] | None = None  # of `mixed`
    max_drop: float | None = None  # of `auto`; None: MAX_DROP
    calibration: Path | None = None  # None: generated, where pairs are needed
    picture_root: Path | None = None  # None: where the calibration file is
    pairs: int = PAIRS

    def __post_init__(self) -> None:
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise ExportError(f"--max-drop is {self.max_drop}; give percentage points of accuracy from 0 to 100")
        if self.pairs < 2:
            raise ExportError(f"--calibration-pairs is {self.pairs}; give 2 or more: half calibrate, half score")
        if self.picture_root is not None and self.calibration is None:
            raise ExportError("--picture-root is for pictures of --calibration, which is not given; give it too")

    def steps(self, precisions: Collection[str]) -> int:
        """How many steps there are to do for these; raises ExportError where they and the options do not fit."""
        for name, option, value in ((MIXED, "--parts", self.parts), (AUTO, "--max-drop", self.max_drop)):
            if value is not None and name not in precisions:
                raise ExportError(f"{option} is for {name}, which --dtype does not name; add it, or leave {option} out")
        if MIXED in precisions and self.parts is None:
            raise ExportError(f"{MIXED} needs --parts; write one like decoder=q4,lm_head=int8, or let {AUTO} find one")
        if AUTO in precisions:
            return 2  # calibrate and search
        return int(MIXED in precisions or self.calibration is not None)

    def read(self, settings: Bundle) -> Calibration | None:
        """The pairs of the file, if there is one; raises CalibrationError."""
        if self.calibration is None:
            return None
        return read_calibration(settings, self.calibration, self.picture_root, self.pairs)


class Mixing:
    """Scores precisions on pairs that no graph was calibrated on, and makes the mix that was asked for."""

    def __init__(self, options: MixOptions, variants: Variants, calibration: Calibration, reference: Reference) -> None:
        self._options, self._variants = options, variants
        self._calibration, self._reference = calibration, reference
        self.parts = dict(options.parts or FLOAT32)
        self._found: Found | None = None

    @classmethod
    def prepare(cls, options: MixOptions, variants: Variants, calibration: Calibration | None) -> Self:
        """Let the float32 graphs answer the pairs, which are generated where there are none."""
        float32 = variants.runner(FLOAT32)
        if calibration is None:
            prompts = list(Pairs(variants.settings, options.pairs))
            calibration = answered_by(float32, prompts, MAX_NEW_TOKENS)
        variants.pairs = calibration.calibrate
        return cls(options, variants, calibration, ask(float32, calibration.score))

    def search(self, say: Say) -> None:
        """Find the parts' methods within the allowed drop of accuracy."""
        max_drop = MAX_DROP if self._options.max_drop is None else self._options.max_drop
        self._found = find_mix(self._variants, self._calibration.score, self._reference, max_drop, say)
        self.parts = self._found.parts

    def file(self, description: GraphDescription) -> Path:
        """The file of a graph in the mix."""
        return self._variants.file(description, self.parts)

    def record(self, precision: str, runner: GraphRunner) -> dict[str, Any]:
        """What the manifest says of a precision: its score, and of the mix what is in it and how it was found."""
        found = score(runner, self._calibration.score, self._reference)
        record: dict[str, Any] = {
            "calibration": {
                "source": self._calibration.source,
                "calibrated_on": len(self._calibration.calibrate),
                **asdict(found),
                "drop": found.drop(self._reference.score),
            }
        }
        if precision == MIXED:
            record |= {"parts": self.parts, "search": None if self._found is None else self._found.record()}
        return record
