"""The questions of many callers before one engine: a bounded queue, deadlines, and an engine that is started again."""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal, Self

from .engine_process import EngineProcess
from .failures import (
    AnswerFailed,
    AnswerRefused,
    DeadlinePassed,
    EngineDied,
    EngineNotReady,
    QueueFull,
    SchedulingError,
    ShuttingDown,
)
from .messages import Ask, Cancel, Ended, EngineOpening, Failed, FromEngine, NotOpened, Opened, Piece, Question, Refused

log = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a dead engine is started again, doubled each time


@dataclass(frozen=True)
class Limits:
    """Answers under way at a time, questions that may wait, and seconds from a question to its answer's end."""

    parallel: int = 4
    queue: int = 128
    deadline: float = 300.0


class Answering(AsyncIterator[Piece]):
    """One accepted question: its answer's pieces as they come, or the SchedulingError that ended it."""

    def __init__(self, ident: int, question: Question, now: float, cancel: Callable[["Answering"], None]) -> None:
        self.ident = ident
        self.question: Question | None = question  # None once the engine has it: pictures are large
        self.accepted = now
        self.started: float | None = None  # when the engine was given it
        self.first_piece: float | None = None
        self.ended: Ended | None = None
        self.outcome: str | None = None  # None: not finished
        self.deadline: asyncio.TimerHandle | None = None
        self._cancel = cancel
        self._events: asyncio.Queue[Piece | Ended | SchedulingError] = asyncio.Queue()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        event = await self._events.get()
        if isinstance(event, Piece):
            return event
        self._events.put_nowait(event)  # whoever asks again gets the same
        if isinstance(event, Ended):
            raise StopAsyncIteration
        raise event

    def cancel(self) -> None:
        """Let go of the answer: the engine takes no further step for it. Nothing happens where it has ended."""
        self._cancel(self)

    def push(self, piece: Piece, now: float) -> None:
        """Hand a piece to the caller."""
        if self.outcome is None:
            self.first_piece = self.first_piece or now
            self._events.put_nowait(piece)

    def finish(self, event: Ended | SchedulingError, outcome: str) -> None:
        """End what the caller sees; what comes later is not for them."""
        if self.outcome is None:
            self.outcome = outcome
            if self.deadline is not None:
                self.deadline.cancel()
            self._events.put_nowait(event)


class Scheduler:
    """One engine's queue; everything here runs in the event loop's thread.

    `report` is called with every accepted question when nothing of it is left: neither waiting nor with the engine.
    """

    def __init__(self, opening: EngineOpening, limits: Limits, report: Callable[[Answering], None]) -> None:
        self.opening = opening
        self.limits = limits
        self.state: Literal["starting", "ready", "restarting", "closing"] = "starting"
        self.restarts = 0
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._report = report
        self._process: EngineProcess | None = None
        self._idents = itertools.count(1)
        self._waiting: deque[Answering] = deque()
        self._running: dict[int, Answering] = {}
        self._mean_seconds = 1.0  # of an answer, a moving mean

    @property
    def waiting(self) -> int:
        """How many questions wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many the engine has."""
        return len(self._running)

    @property
    def engine_pid(self) -> int | None:
        """The number of the engine's process."""
        return self._process.pid if self._process else None

    # --- for callers ---

    def check_room(self) -> None:
        """Raise what `submit` would, before a question's pictures are looked at."""
        if self.state == "closing":
            raise ShuttingDown("the server is shutting down; ask another one")
        if self.state != "ready":
            raise EngineNotReady("the engine is starting; ask again in a moment")
        if self.running >= self.limits.parallel and self.waiting >= self.limits.queue:
            turns = (self.waiting + self.running) / self.limits.parallel
            raise QueueFull(
                f"{self.waiting} questions are waiting, and no more may; ask again later",
                retry_after=min(60, max(1, round(turns * self._mean_seconds))),
            )

    def submit(self, question: Question) -> Answering:
        """Accept a question. Raises QueueFull, EngineNotReady or ShuttingDown."""
        self.check_room()
        loop = asyncio.get_running_loop()
        answering = Answering(next(self._idents), question, loop.time(), self._let_go)
        answering.deadline = loop.call_later(self.limits.deadline, self._expire, answering)
        self._waiting.append(answering)
        self._dispatch()
        return answering

    def stop_accepting(self) -> None:
        """Refuse new questions; those accepted are answered."""
        self.state = "closing"

    async def idle(self) -> None:
        """Wait until nothing waits and nothing is answered."""
        while self._waiting or self._running:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """End what is left with ShuttingDown, and the engine's process."""
        self.stop_accepting()
        self._lose_all(ShuttingDown("the server was shut down before the answer was finished; ask another one"))
        if self._process is not None:
            self._process.kill()

    # --- the engine's lives ---

    async def run(self) -> None:
        """Keep an engine running until `close`; `opened` is set when the first has read its bundle, or cannot."""
        pause = FIRST_PAUSE / 2
        while not self._is_closing():
            try:
                process = self._process = await EngineProcess.start(self.opening)
            except OSError as error:  # no memory for a further process, or too many of them
                log.error("the engine of %s cannot be started (%s)", self.opening.bundle, error.strerror)
                pause = min(2 * pause, LONGEST_PAUSE)
                await asyncio.sleep(pause)
                continue
            if self._is_closing():  # while it was started
                break
            served = 0
            async for message in process.messages():
                served += isinstance(message, Ended)
                self._take(message)
            process.kill()
            if self._is_closing() or (self.opened.done() and self.opened.exception()):
                break
            self.state = "restarting"
            self.restarts += 1
            self._lose_all(EngineDied("the engine's process ended before the answer was finished; ask again"))
            code = await process.exit_code()
            pause = FIRST_PAUSE if served else min(2 * pause, LONGEST_PAUSE)
            log.error("the engine of %s ended (code %s); started again in %.1f s", self.opening.bundle, code, pause)
            await asyncio.sleep(pause)
        self.close()

    def _is_closing(self) -> bool:
        return self.state == "closing"

    def _take(self, message: FromEngine) -> None:
        match message:
            case Opened():
                if self.state != "closing":
                    self.state = "ready"
                if not self.opened.done():
                    self.opened.set_result(None)
            case NotOpened():
                if not self.opened.done():
                    self.opened.set_exception(AnswerRefused(message.message))
                log.error("%s", message.message)
            case Piece():
                if (answering := self._running.get(message.ident)) is not None:
                    answering.push(message, asyncio.get_running_loop().time())
            case Refused():
                self._finish(message.ident, AnswerRefused(message.message))
            case Failed():
                self._finish(
                    message.ident, AnswerFailed("the question could not be answered; the server's log says why")
                )
            case Ended():
                self._finish(message.ident, message)

    def _finish(self, ident: int, event: Ended | SchedulingError) -> None:
        answering = self._running.pop(ident, None)
        if answering is None:  # given up by `close`, while this was under way
            return
        if isinstance(event, Ended):
            answering.ended = event
            seconds = asyncio.get_running_loop().time() - (answering.started or answering.accepted)
            self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
            answering.finish(event, event.finish_reason or "cancelled")
        else:
            answering.finish(event, event.reason)
        self._report(answering)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._process and self._waiting and self.running < self.limits.parallel:
            answering = self._waiting.popleft()
            assert answering.question is not None
            answering.started = asyncio.get_running_loop().time()
            self._running[answering.ident] = answering
            self._process.send(Ask(answering.ident, answering.question))
            answering.question = None

    def _expire(self, answering: Answering) -> None:
        limit = f"{self.limits.deadline:g} s"
        answering.finish(
            DeadlinePassed(f"the answer was not finished within {limit}; ask for fewer tokens, or later"),
            DeadlinePassed.reason,
        )
        self._withdraw(answering)

    def _let_go(self, answering: Answering) -> None:
        if answering.outcome is None:
            answering.finish(AnswerFailed("the answer was cancelled"), "cancelled")
            self._withdraw(answering)

    def _withdraw(self, answering: Answering) -> None:
        """Take a finished one out of the queue, or tell the engine, whose place is free when it says so."""
        if answering in self._waiting:
            self._waiting.remove(answering)
            self._report(answering)
        elif answering.ident in self._running and self._process is not None:
            self._process.send(Cancel(answering.ident))
            asyncio.get_running_loop().call_later(self.limits.deadline, self._check_withdrawn, answering)

    def _check_withdrawn(self, answering: Answering) -> None:
        """End an engine that takes longer over one step than a whole answer may: it would keep its places for ever."""
        if answering.ident in self._running and self._process is not None:
            log.error("the engine of %s does not move; it is started again", self.opening.bundle)
            self._process.kill()

    def _lose_all(self, error: SchedulingError) -> None:
        lost = [*self._running.values(), *self._waiting]
        self._running.clear()
        self._waiting.clear()
        for answering in lost:
            answering.finish(error, error.reason)
            self._report(answering)
