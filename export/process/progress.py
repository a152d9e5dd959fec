"""Steps of a long command: how far it is, how long each step took, and how long the pairs of one will still take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]  # what is being done, steps done, steps in all


class Steps:
    """Tells how far a command is, and keeps the seconds of every step."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress = total, progress
        self.seconds: dict[str, float] = {}
        self._name, self._first = "", 0.0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step under its name."""
        self._name = name
        self._tell(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def pairs_done(self, done: int, pairs: int) -> None:
        """Tell how far a step is that takes pair after pair."""
        now = time.perf_counter()
        if done == 1:  # what came before it in the step was something else
            self._first = now
            self.say(f"{done} of {pairs} pairs")
            return
        left = (now - self._first) / (done - 1) * (pairs - done)
        self.say(f"{done} of {pairs} pairs, {left:.0f} s left")

    def say(self, what: str) -> None:
        """Tell what is being done within a step."""
        self._tell(f"{self._name}: {what}")

    def _tell(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, len(self.seconds), self.total)
