"""The folder that a command makes: decided before the work, whole or not there, and cleared away when that ends early.

What is being made lies in a hidden folder, in the one that is there already or else beside it. That folder holds a
lock for as long as its process lives, so that the next one can tell what was left behind from what is still at work.
"""

import glob
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

if sys.platform != "win32":
    import fcntl

LOCK = ".switchkd.lock"
# What ends a process from outside besides Ctrl-C, which Python turns into an exception by itself.
_SIGNALS = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]


@contextmanager
def making(out: Path, refuse: type[ValueError], *, last: str, apart_from: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends well, and is gone when it does not.

    `out` may be an empty folder, a mount point or a link to one of these: it stays what it is, and gets the content,
    `last` last, which is the file without which it is not taken for whole. Raises `refuse` before the block where `out`
    cannot be made: it holds something, lies in `apart_from`, cannot be written to, or another process is making it.
    """
    with _ended_by_exceptions():
        place = Path(os.path.realpath(out))  # a link stays, what it leads to is made
        if apart_from is not None and place.is_relative_to(os.path.realpath(apart_from)):
            raise refuse(f"{out}: lies inside the checkpoint, which is never written to; choose another place")
        try:
            there = place.is_dir()
            around = place if there else place.parent
            around.mkdir(parents=True, exist_ok=True)
            for folder in {around, place.parent}:  # the folder may have been made or removed in the meantime
                _clear_left_behind(folder, place.name, out, refuse)
            if any(place.iterdir()) if there else os.path.lexists(place):
                raise refuse(f"{out}: exists already; remove it or choose another place")
            holder = Path(tempfile.mkdtemp(dir=around, prefix=f".{place.name}.partial-"))
        except OSError as error:
            raise refuse(f"{out}: cannot be made ({error.strerror}); choose another place") from error
        try:
            with _locked(holder):
                made = holder / "made"
                made.mkdir()
                yield made
                if there:
                    for entry in sorted(made.iterdir(), key=lambda entry: entry.name == last):
                        entry.rename(place / entry.name)
                else:
                    made.rename(place)
        finally:
            shutil.rmtree(holder, ignore_errors=True)


def _clear_left_behind(around: Path, name: str, out: Path, refuse: type[ValueError]) -> None:
    """Remove what a process that is no more has left of `out`; raises `refuse` where one is still at work."""
    for holder in around.glob(f".{glob.escape(name)}.partial-*"):
        try:
            file = (holder / LOCK).open("r+b")
        except OSError:
            continue  # without a lock, or another user's: not surely ours to remove
        with file:
            free = _hold(file)
            if free:
                shutil.rmtree(holder, ignore_errors=True)
        if free is False:
            raise refuse(f"{out}: another process is making it just now; wait for it, or choose another place")


@contextmanager
def _locked(holder: Path) -> Iterator[None]:
    """Mark the folder as in use; the mark goes with the process, however that ends."""
    unnamed = holder / f"{LOCK}.new"
    with unnamed.open("w+b") as file:
        _hold(file)
        unnamed.rename(holder / LOCK)  # locked before anybody looks at it
        yield


def _hold(file: IO[bytes]) -> bool | None:
    """Lock a file: True if it is ours now, False if somebody else's, None where that cannot be known."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


@contextmanager
def _ended_by_exceptions() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the work as Ctrl-C does, so that it is cleared away, with a shell's exit code."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # Python lets no other one set handlers
        for number in _SIGNALS:
            # Who starts us with a signal ignored, such as nohup, wants it ignored.
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
