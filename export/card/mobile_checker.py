"""What onnxruntime's own mobile usability checker says about a graph: whether a phone's accelerator would take it.

The checker counts the nodes that NNAPI (Android) and CoreML (iOS) know, and in how many pieces they would cut the
graph. A graph that it does not recommend to them runs on the phone's CPU, as all graphs do.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from onnxruntime.tools.mobile_helpers import usability_checker

_COUNTS = re.compile(r"(\d+) partitions with a total of (\d+)/(\d+) nodes can be handled by the .+ EP\.")
_VERDICT = re.compile(r"Model should perform well with (.+?) (as is|if modified to have fixed input shapes): (\w+)")


@dataclass(frozen=True)
class Verdict:
    """The checker's answer (YES, MAYBE, NO) for an accelerator, and the nodes that it would take."""

    accelerator: str
    when: str  # "as is", or "if modified to have fixed input shapes"
    answer: str
    nodes: int
    of_nodes: int
    partitions: int

    def __str__(self) -> str:
        return (
            f"{self.accelerator} {self.when}: {self.answer} ({self.nodes} of {self.of_nodes} nodes, in "
            f"{self.partitions} partitions)"
        )


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def check_mobile(graph: Path) -> tuple[bool, list[Verdict]]:
    """Whether an accelerator may do well with the graph, and the verdict on each: as is, and with fixed shapes."""
    logger, said = logging.Logger("mobile usability", logging.INFO), _Lines()
    logger.addHandler(said)
    accelerated = usability_checker.analyze_model(graph, logger=logger)
    verdicts, counts = [], (0, 0, 0)
    for line in said.lines:
        if found := _COUNTS.fullmatch(line):
            counts = int(found[2]), int(found[3]), int(found[1])
        elif found := _VERDICT.fullmatch(line):
            verdicts.append(Verdict(found[1], found[2], found[3], *counts))
    return accelerated, verdicts
