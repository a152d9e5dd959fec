"""What a server does under load and under attack: answers, memory, leavers, signals, crashes, hostile pictures.

    python -m benchmarks.serve.stress BUNDLE [--requests 10000] [--only TRIAL]

Every trial starts a server of its own and prints a line; the exit code is 1 where one did not hold what it promises.
Questions carry a number, and the answer to each is compared with what the engine says to it alone.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from switchkd.export.contract.processor import this_machine

from .hostile_trials import hostile, own_addresses
from .load_trials import killed_engine, leavers, many_requests, refusals, slow_readers, terminated, too_many

Trial = Callable[[Path, int], Coroutine[Any, Any, tuple[bool, str]]]
TRIALS: dict[str, tuple[Trial, int]] = {  # each with how many it takes
    "many requests": (many_requests, 10_000),
    "too many": (too_many, 1_000),
    "refusals": (refusals, 1_000),
    "leavers": (leavers, 500),
    "slow readers": (slow_readers, 200),
    "SIGTERM": (terminated, 64),
    "kill -9 of the engine": (killed_engine, 64),
    "hostile pictures": (hostile, 0),
    "own addresses": (own_addresses, 0),
}


def main() -> int:
    """Run the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle folder named `bundle`")
    parser.add_argument("--requests", type=int, help="of the first trial (default: 10,000)")
    only = parser.add_argument("--only", metavar="TRIAL", action="append", choices=TRIALS)
    only.help = f"one of {', '.join(TRIALS)}; may be given several times"
    args = parser.parse_args()
    print(json.dumps(this_machine()))
    failed = 0
    for name in args.only or TRIALS:
        trial, size = TRIALS[name]
        good, said = asyncio.run(trial(args.bundle, (args.requests or size) if name == "many requests" else size))
        failed += not good
        print(f"{'held' if good else 'FAILED'}  {name}: {said}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
