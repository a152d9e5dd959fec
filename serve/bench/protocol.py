"""How the bench speaks to what it measures: a process that reads requests and writes what they took, a JSON line each.

The process loads its model and writes READY. A request is {"picture": path, "question": text, "tokens": most new
tokens}; its answer has the seconds of STAGES, as far as the process can tell them apart, and the new tokens.
"""

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Seconds of a request, in the order of its work. `first_token` is the sum of those before it, `token` is of one more.
STAGES = ("preprocess", "encode", "prefill", "first_token", "token", "whole")
TOKENS = "tokens"
PROMPT = "prompt_tokens"  # of a request, visual tokens among them
LOAD = "load"  # seconds until the model could answer
PEAK = "peak_mib"  # of the process's memory so far, with the pages of files that it has mapped
ABOUT = "about"  # what the process runs: names and versions, for the report

Answer = dict[str, Any]


def requests(load_seconds: float, about: dict[str, str]) -> Iterator[tuple[dict[str, Any], Callable[[Answer], None]]]:
    """Say that the model is loaded, then yield each request with what writes its answer, until the bench is done."""
    write({LOAD: load_seconds, ABOUT: about, PEAK: peak_mib()})
    for line in sys.stdin:
        yield json.loads(line), lambda answer: write(answer | {PEAK: peak_mib()})


def write(message: Answer) -> None:
    """Write a line to the bench."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def peak_mib() -> float:
    """Return the most memory that this process has had, in MiB."""
    if sys.platform == "win32":
        return float("nan")
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10
