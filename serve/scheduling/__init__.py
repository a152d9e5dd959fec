"""Many callers and one engine, which runs in a process of its own: queue, turns, deadlines, restarts."""

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
from .messages import Ended, EngineOpening, Piece, Question, SaidToken
from .scheduler import Answering, Limits, Scheduler

__all__ = [
    "AnswerFailed",
    "AnswerRefused",
    "Answering",
    "DeadlinePassed",
    "Ended",
    "EngineDied",
    "EngineNotReady",
    "EngineOpening",
    "Limits",
    "Piece",
    "Question",
    "QueueFull",
    "SaidToken",
    "Scheduler",
    "SchedulingError",
    "ShuttingDown",
]
