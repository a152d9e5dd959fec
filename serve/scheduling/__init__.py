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
from .messages import Ended, EngineOpening, Question
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
    "Question",
    "QueueFull",
    "Scheduler",
    "SchedulingError",
    "ShuttingDown",
]
