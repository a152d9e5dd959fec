"""Why a question got no answer, one exception a reason; `reason` is the short name that metrics and callers see."""


class SchedulingError(Exception):
    """A question that was not answered, or not to its end."""

    reason = "failed"


class AnswerRefused(SchedulingError):
    """The engine cannot be asked this; the message says what to change."""

    reason = "refused"


class AnswerFailed(SchedulingError):
    """A fault of ours while the question was prepared or answered."""

    reason = "failed"


class QueueFull(SchedulingError):
    """As many questions wait as may; `retry_after` is in seconds."""

    reason = "queue_full"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlinePassed(SchedulingError):
    """The answer was not finished in time."""

    reason = "deadline_exceeded"


class EngineDied(SchedulingError):
    """The engine's process ended while the question waited or was answered."""

    reason = "engine_died"


class EngineNotReady(SchedulingError):
    """The engine's process is starting."""

    reason = "engine_not_ready"


class ShuttingDown(SchedulingError):
    """The server is ending."""

    reason = "shutting_down"
