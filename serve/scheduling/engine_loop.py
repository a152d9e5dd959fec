"""The engine's process: answers under way take turns, one step each, and what is asked comes in between."""

import logging
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue

from switchkd.export.contract.bundle import BundleError
from switchkd.export.contract.picture_bounds import bound_pillow
from switchkd.export.contract.pixels import PictureError
from switchkd.export.contract.prompt import PromptError
from switchkd.export.process.memory import return_freed_blocks

from ..engine.conversation import ConversationError
from ..engine.engine import AnswerStream, Engine
from ..engine.prefix_folder import PrefixFolderError
from ..engine.sampling import SamplingError, TokenLogprob
from .messages import (
    Ask,
    Cancel,
    Ended,
    EngineOpening,
    Failed,
    FromEngine,
    NotOpened,
    Opened,
    Piece,
    Question,
    Refused,
    SaidToken,
    ToEngine,
)
from .stop_texts import StopTexts

log = logging.getLogger(__name__)
REFUSALS = (BundleError, ConversationError, PictureError, PrefixFolderError, PromptError, SamplingError)


def run_engine(connection: "Connection[FromEngine, ToEngine]", opening: EngineOpening) -> None:
    """Open the bundle and answer until the other end of the pipe closes: the whole life of the process."""
    # Whoever stops the server signals its whole group; what was accepted is answered first, then the pipe closes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=opening.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    return_freed_blocks()
    bound_pillow()
    try:
        engine = Engine.open(
            opening.bundle,
            opening.precision,
            opening.threads,
            prefill=opening.prefill,
            prefix_memory=opening.prefix_memory,
            prefix_folder=opening.prefix_folder,
        )
    except REFUSALS as error:
        connection.send(NotOpened(str(error)))
        return
    try:
        connection.send(Opened())
        EngineLoop(engine, connection).run()
    except BrokenPipeError:
        log.info("the server has gone")


@dataclass
class _Turn:
    """An answer that takes its turns."""

    ident: int
    stream: AnswerStream
    stops: StopTexts
    read: int = 0  # characters that the engine has written
    given: int = 0  # characters of them that were passed on
    settled: int = 0  # tokens whose text has been read
    said: int = 0  # tokens that were passed on
    ends: deque[int] = field(default_factory=deque)  # of the settled ones in between: where in the text each ends

    def heed(self, piece: str) -> None:
        """Note what the engine has just written."""
        self.read += len(piece)
        new = len(self.stream.settled_logprobs(self.settled))
        self.settled += new
        self.ends.extend([self.read] * new)

    def pass_on(self, text: str) -> Sequence[TokenLogprob]:
        """Note that a text is passed on, and return the tokens that it brings to their end."""
        self.given += len(text)
        start = self.said
        while self.ends and self.ends[0] <= self.given:
            self.ends.popleft()
            self.said += 1
        return self.stream.settled_logprobs(start)[: self.said - start]


@dataclass(frozen=True)
class _Prepared:
    """A question that was read, its pictures decoded, or what was wrong with it."""

    ident: int
    stream: Future[AnswerStream]


class EngineLoop:
    """Round robin over the answers under way; only the thread of `run` touches them, or writes to the pipe."""

    def __init__(self, engine: Engine, connection: "Connection[FromEngine, ToEngine]") -> None:
        self._engine = engine
        self._connection = connection
        self._inbox: SimpleQueue[ToEngine | _Prepared | None] = SimpleQueue()
        self._turns: deque[_Turn] = deque()
        self._questions: dict[int, Question] = {}  # being prepared
        # Decoding a large picture takes as long as dozens of steps, and lets go of the interpreter meanwhile.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")

    def run(self) -> None:
        """Answer until the pipe closes."""
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            while self._take_messages():
                if self._turns:
                    turn = self._turns.popleft()
                    if self._step(turn):
                        self._turns.append(turn)
        finally:
            self._preparing.shutdown(wait=False, cancel_futures=True)

    def _listen(self) -> None:
        while True:
            try:
                self._inbox.put(self._connection.recv())
            except (EOFError, OSError):
                self._inbox.put(None)
                return

    def _take_messages(self) -> bool:
        """Heed what has come, waiting for it where there is nothing else to do; False once the pipe is closed."""
        for message in self._arrived():
            match message:
                case Ask():
                    self._questions[message.ident] = message.question
                    future = self._preparing.submit(self._prepare, message.question)
                    future.add_done_callback(partial(self._is_prepared, message.ident))
                case Cancel():
                    self._cancel(message.ident)
                case _Prepared():
                    self._begin(message)
                case None:
                    return False
        return True

    def _arrived(self) -> Iterator[ToEngine | _Prepared | None]:
        if not self._turns:
            yield self._inbox.get()
        while True:
            try:
                yield self._inbox.get_nowait()
            except Empty:
                return

    def _prepare(self, question: Question) -> AnswerStream:
        return self._engine.stream(
            question.messages,
            question.pictures,
            max_new_tokens=question.max_new_tokens,
            sampling=question.sampling,
            logprobs=question.logprobs,
        )

    def _is_prepared(self, ident: int, stream: Future[AnswerStream]) -> None:
        self._inbox.put(_Prepared(ident, stream))

    def _begin(self, prepared: _Prepared) -> None:
        question = self._questions.pop(prepared.ident, None)
        if question is None:  # cancelled meanwhile
            return
        error = prepared.stream.exception()
        if error is None:
            self._turns.append(_Turn(prepared.ident, prepared.stream.result(), StopTexts(question.stop)))
        elif isinstance(error, REFUSALS):
            self._connection.send(Refused(prepared.ident, str(error)))
        else:
            # Its message may hold what was asked, which is not for a log.
            places = "".join(traceback.format_tb(error.__traceback__))
            log.error("a question could not be prepared: %s\n%s", type(error).__name__, places)
            self._connection.send(Failed(prepared.ident))

    def _cancel(self, ident: int) -> None:
        if self._questions.pop(ident, None) is not None:
            self._connection.send(Ended(ident, None))
        for turn in [turn for turn in self._turns if turn.ident == ident]:
            self._turns.remove(turn)
            self._end(turn, None)

    def _step(self, turn: _Turn) -> bool:
        """Take one step of an answer; False where it was the last."""
        try:
            piece = turn.stream.step()
        except PrefixFolderError as error:  # a disk that is full, say; the next answer may find room
            log.error("%s", error)
            self._connection.send(Failed(turn.ident))
            return False
        except StopIteration:
            self._pass_on(turn, turn.stops.finish())
            self._end(turn, turn.stream.answer.finish_reason)
            return False
        turn.heed(piece)
        self._pass_on(turn, turn.stops.push(piece))
        if turn.stops.found:
            self._end(turn, "stop")
        return not turn.stops.found

    def _pass_on(self, turn: _Turn, text: str) -> None:
        if text:
            self._connection.send(Piece(turn.ident, text, tuple(map(self._said, turn.pass_on(text)))))

    def _end(self, turn: _Turn, finish_reason: str | None) -> None:
        answer = turn.stream.answer
        tokens = len(answer.tokens)
        rest = tuple(map(self._said, (answer.logprobs or ())[turn.said :]))
        self._connection.send(Ended(turn.ident, finish_reason, answer.prompt_tokens, tokens, answer.seconds, rest))

    def _said(self, token: TokenLogprob) -> SaidToken:
        def text(ident: int) -> str:
            return self._engine.tokenizer.decode([ident], skip_special_tokens=False)

        top = tuple((text(ident), logprob) for ident, logprob in token.top)
        return SaidToken(text(token.token), token.logprob, top)
