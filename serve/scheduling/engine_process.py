"""The server's end of an engine's process: started, talked to without ever waiting for it, and ended."""

import asyncio
import multiprocessing
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Self

from .engine_loop import run_engine
from .messages import EngineOpening, FromEngine, ToEngine


class EngineProcess:
    """One life of an engine. A thread writes to its pipe and another reads, so that the event loop never waits."""

    def __init__(self, opening: EngineOpening, loop: asyncio.AbstractEventLoop) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share the server's sockets and threads' locks
        ours, theirs = context.Pipe()
        self._connection: Connection[ToEngine, FromEngine] = ours
        self._process = context.Process(target=run_engine, args=(theirs, opening), name="engine", daemon=True)
        with _signals_held():
            self._process.start()
        theirs.close()  # the engine has the only one now: when it dies, ours says so
        self._loop = loop
        self._outbox: SimpleQueue[ToEngine | None] = SimpleQueue()
        self._inbox: asyncio.Queue[FromEngine | None] = asyncio.Queue()
        for work in (self._write, self._read):
            threading.Thread(target=work, daemon=True).start()

    @classmethod
    async def start(cls, opening: EngineOpening) -> Self:
        """Start a process; it says Opened or NotOpened when it has read its bundle."""
        return await asyncio.to_thread(cls, opening, asyncio.get_running_loop())

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Send without waiting; what a dead engine is sent is lost."""
        self._outbox.put(message)

    async def messages(self) -> AsyncIterator[FromEngine]:
        """What the engine says, until it is dead."""
        while (message := await self._inbox.get()) is not None:
            yield message

    def kill(self) -> None:
        """End the process at once; its pipe closes."""
        self._process.kill()
        self._outbox.put(None)

    async def exit_code(self) -> int | None:
        """What the process ended with, once it has closed its pipe (negative: by that signal)."""
        await asyncio.to_thread(self._process.join, 5)
        return self._process.exitcode

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:
                return  # the reader sees the end as well, and tells

    def _read(self) -> None:
        while True:
            try:
                message: FromEngine | None = self._connection.recv()
            except (EOFError, OSError):
                message = None
            try:
                self._loop.call_soon_threadsafe(self._inbox.put_nowait, message)
            except RuntimeError:  # the loop is closed: the server has ended
                return
            if message is None:
                return


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keep Ctrl-C from a process that starts, until it has said that it takes no notice of it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # started with the first process otherwise, it would let the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
