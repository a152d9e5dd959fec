"""What goes over the pipe between the server and an engine's process."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from switchkd.export.contract.prompt import Message

from ..engine.engine import Seconds
from ..engine.prefix_cache import PREFIX_MEMORY
from ..engine.sampling import Sampling


@dataclass(frozen=True)
class EngineOpening:
    """What an engine's process opens, with how many threads, what it keeps of pictures, and how much it logs."""

    bundle: Path
    precision: str
    threads: int | None = None
    log_level: str = "warning"
    prefix_memory: int = PREFIX_MEMORY
    prefix_folder: Path | None = None
    prefill: bool = True


@dataclass(frozen=True)
class Question:
    """What is asked: messages, the files of their pictures in order, and how to answer."""

    messages: Sequence[Message]
    pictures: Sequence[bytes] = ()
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # of every written token, with so many others; None: of none


# --- to the engine ---


@dataclass(frozen=True)
class Ask:
    """Answer this; what is said of it comes back under `ident`."""

    ident: int
    question: Question


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this answer any longer."""

    ident: int


# --- from the engine ---


@dataclass(frozen=True)
class Opened:
    """The engine takes questions now."""


@dataclass(frozen=True)
class NotOpened:
    """The bundle cannot be opened; the process ends."""

    message: str


@dataclass(frozen=True)
class SaidToken:
    """A written token as text, the natural logarithm of its probability, and the likeliest ones in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text, and the tokens whose text ends in it, where they were asked for."""

    ident: int
    text: str
    said: tuple[SaidToken, ...] = ()


@dataclass(frozen=True)
class Refused:
    """The question cannot be asked."""

    ident: int
    message: str


@dataclass(frozen=True)
class Failed:
    """The question could not be prepared or answered, and it was not its own fault."""

    ident: int


@dataclass(frozen=True)
class Ended:
    """An answer's end, for whatever reason (None: cancelled), what it took in tokens and where its time went."""

    ident: int
    finish_reason: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: Seconds = field(default_factory=Seconds)
    said: tuple[SaidToken, ...] = ()  # those that came with no piece: of a stop text, or of half a character


ToEngine = Ask | Cancel
FromEngine = Opened | NotOpened | Piece | Refused | Failed | Ended
