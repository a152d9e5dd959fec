"""Every way in which a request is not answered, in the shape of OpenAI's errors."""

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ..scheduling import (
    AnswerFailed,
    AnswerRefused,
    DeadlinePassed,
    EngineDied,
    EngineNotReady,
    QueueFull,
    SchedulingError,
    ShuttingDown,
)

STATUS_OF: dict[type[SchedulingError], int] = {
    AnswerRefused: 400,
    AnswerFailed: 500,
    QueueFull: 429,
    DeadlinePassed: 504,
    EngineDied: 503,
    EngineNotReady: 503,
    ShuttingDown: 503,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered: HTTP status, a message for people, the parameter at fault, a code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as a response."""
        return JSONResponse(self.body(), self.status, self.headers)


def from_scheduling(error: SchedulingError) -> ApiError:
    """What the engine or its queue said."""
    status = STATUS_OF[type(error)]
    headers = {"Retry-After": str(getattr(error, "retry_after", 1))} if status in (429, 503) else {}
    code = "invalid_value" if isinstance(error, AnswerRefused) else error.reason
    return ApiError(status, str(error), param="messages" if status == 400 else None, code=code, headers=headers)


def from_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request's JSON; nothing that was sent is repeated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = parameter(first["loc"]) or None
    message, code = first["msg"].removeprefix("Value error, "), "invalid_value"
    if first["type"] == "extra_forbidden":
        message, code = "not supported; leave it out", "unsupported_parameter"
    elif first["type"] == "missing":
        message, code = "missing; give it", "missing_required_parameter"
    elif first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {message}", code="invalid_json")
    return ApiError(400, f"{param or 'the request'}: {message}", param=param, code=code)


def parameter(location: tuple[int | str, ...]) -> str:
    """A place in the JSON as people write it; names in brackets are the validator's, for the kinds of a value."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("("):
            path += f".{part}" if path else part
    return path


async def on_api_error(_: Request, error: Exception) -> JSONResponse:
    """Answer with an ApiError."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_scheduling_error(_: Request, error: Exception) -> JSONResponse:
    """Answer with what the engine or its queue said."""
    assert isinstance(error, SchedulingError)
    return from_scheduling(error).response()


async def on_http_error(_: Request, error: Exception) -> JSONResponse:
    """Answer with what the router said: no such route, no such method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return ApiError(error.status_code, f"{error.detail}; see /openapi.json", headers=headers).response()


async def on_bug(_: Request, error: Exception) -> JSONResponse:
    """Answer where we failed; the traceback goes to the log."""
    return ApiError(500, f"a fault of the server ({type(error).__name__}); its log says where").response()
