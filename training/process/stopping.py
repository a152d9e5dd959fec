"""Stopping a run from outside: SIGTERM and Ctrl-C wait for the step in progress, so that it is saved and not lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from .terminal import speaks

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped, everything saved, run the same command to go on
# A launcher passes on what the terminal or the scheduler has sent to its workers already: both are one request.
ONE_REQUEST_SECONDS = 5.0


class Stopped(KeyboardInterrupt):
    """A run that was stopped from outside with everything saved; the message says where it stands."""


class StopRequest:
    """Takes SIGTERM and SIGINT while it is entered.

    Inside `held()` the first one is only noted in `requested`; anywhere else there is nothing to lose, and it raises
    Stopped. The second one ends the process as it would without us.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._held = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python lets no other one set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                # Who starts us with a signal ignored, such as nohup, wants it ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a request wait: whoever holds it looks at `requested` where it can stop."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def check(self) -> None:
        """Raise Stopped where a request came."""
        if self.requested:
            raise Stopped("stopped, and everything is saved; run the same command to go on")

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker, forked with this handler in it
            return
        if self.requested:
            launched = "LOCAL_RANK" in os.environ  # set by torchrun and deepspeed
            if launched and time.monotonic() - self._since < ONE_REQUEST_SECONDS:
                return
            signal.signal(number, self._before[signal.Signals(number)])
            signal.raise_signal(number)
            return
        self.requested, self._since = True, time.monotonic()
        if not self._held:
            self.check()
        if speaks():
            name = signal.Signals(number).name
            # Not sys.stderr: it may be in the middle of a write of its own.
            os.write(2, f"\n{name}: finishing this step and saving it; once more to end at once\n".encode())


def leave_stopping_to_the_trainer(worker: int, *, then: Any = None) -> None:
    """Start a data worker that outlives signals from outside and ends when its trainer says so; then call `then`.

    Ctrl-C reaches every process of the terminal, and schedulers send SIGTERM to all of a job's: without its workers
    the trainer could not finish the step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # where it is missing, only SIGINT is kept away
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if then is not None:
        then(worker)


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
