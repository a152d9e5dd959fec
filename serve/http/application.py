"""The routes, over engines that are scheduled elsewhere."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ..engine.sampling import Sampling, SamplingError
from ..scheduling import Answering, Piece, Question, Scheduler, SchedulingError
from .access import Access, Receive, Scope, Send
from .api_description import ANSWERED, ANY_ERROR, REQUEST_BODY, DescribedApplication, errors, json_response
from .api_errors import (
    ApiError,
    from_scheduling,
    from_validation,
    on_api_error,
    on_bug,
    on_http_error,
    on_scheduling_error,
)
from .chat_request import ChatRequest
from .chat_response import DONE, Completion, event
from .metrics import CountRequests, Metrics
from .picture_sources import PictureSources
from .remote_pictures import RemotePictures
from .request_body import read_json_body
from .settings import ServerSettings, is_loopback

Result = TypeVar("Result")
Responses = dict[int | str, dict[str, Any]]


@dataclass(frozen=True)
class Models:
    """The engines by the names that callers use; several names may mean one."""

    schedulers: Mapping[str, Scheduler]
    aliases: Mapping[str, str]
    created: int

    def find(self, name: str) -> Scheduler:
        """The engine of a name; raises ApiError (404)."""
        scheduler = self.schedulers.get(self.aliases.get(name, name))
        if scheduler is None:
            known = ", ".join(self.names())
            raise ApiError(404, f"there is no such model; there are {known}", param="model", code="model_not_found")
        return scheduler

    def names(self) -> list[str]:
        """What callers may ask for."""
        return [*self.aliases, *self.schedulers]

    def listing(self) -> dict[str, Any]:
        """The names, as OpenAI lists models."""
        facts = {"object": "model", "created": self.created, "owned_by": "switchkd"}
        data = [{"id": name, **facts} for name in self.names()]
        return {"object": "list", "data": data}

    def states(self) -> dict[str, str]:
        """How each engine is."""
        return {name: scheduler.state for name, scheduler in self.schedulers.items()}


@dataclass(frozen=True)
class _Wanted:
    """How an answer is to be sent."""

    model: str
    stream: bool
    includes_usage: bool
    logprobs: bool


class ClientLeft(Exception):
    """Nobody waits for the response any longer."""


def build_application(
    settings: ServerSettings,
    schedulers: Mapping[str, Scheduler],
    aliases: Mapping[str, str],
    metrics: Metrics,
    remote: RemotePictures | None = None,
) -> FastAPI:
    """Put the server together; `aliases` are further names of the schedulers, `remote` fetches pictures if any may."""
    models = Models(schedulers, aliases, int(time.time()))
    app = DescribedApplication(models.names(), has_key=settings.api_key is not None)
    pictures = PictureSources(settings.max_pictures, settings.max_pixels, settings.body_bytes, remote)
    metrics.watch(schedulers)
    _add_chat(app, models, pictures, settings.body_bytes)
    _add_watching(app, models, metrics)
    for kind, handler in (
        (ApiError, on_api_error),
        (SchedulingError, on_scheduling_error),
        (HTTPException, on_http_error),
        (ClientLeft, _on_client_left),
        (Exception, on_bug),
    ):
        app.add_exception_handler(kind, handler)
    # The last added is asked first.
    app.add_middleware(Access, key=settings.api_key, own_names_only=_own_names_only(settings))
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(CountRequests, metrics=metrics)
    return app


async def _on_client_left(request: Request, error: Exception) -> Response:
    del request, error
    return Response(status_code=499)  # for the log and the metrics: nobody reads it


def _own_names_only(settings: ServerSettings) -> bool:
    return settings.api_key is None and not settings.allow_without_key and is_loopback(settings.host)


def _add_watching(app: FastAPI, models: Models, metrics: Metrics) -> None:
    @app.get("/health", response_model=None, responses={200: json_response("Health", "The process lives.")})
    async def health() -> dict[str, str]:
        """The server's process lives."""
        return {"status": "ok"}

    ready_responses: Responses = {
        200: json_response("Readiness", "Every engine takes questions."),
        503: json_response("Readiness", "An engine starts, or the server ends."),
    }

    @app.get("/ready", responses=ready_responses)
    async def ready() -> JSONResponse:
        """Every engine takes questions, or 503."""
        states = models.states()
        is_ready = all(state == "ready" for state in states.values())
        return JSONResponse({"ready": is_ready, "models": states}, 200 if is_ready else 503)

    metrics_text = {"description": "Counters.", "content": {"text/plain": {"schema": {"type": "string"}}}}

    @app.get("/metrics", response_class=PlainTextResponse, responses={200: metrics_text, **errors(401, 403)})
    async def show_metrics() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_chat(app: FastAPI, models: Models, pictures: PictureSources, most_bytes: int) -> None:
    @app.get(
        "/v1/models", response_model=None, responses={200: json_response("Models", "The names."), **errors(401, 403)}
    )
    async def list_models() -> dict[str, Any]:
        """The names of what is served."""
        return models.listing()

    @app.post(
        "/v1/chat/completions", openapi_extra={"requestBody": REQUEST_BODY}, responses={200: ANSWERED, **ANY_ERROR}
    )
    async def complete(request: Request) -> Response:
        """Answer a chat, at once or as a stream."""
        wanted, answering = await accept(request)
        with ExitStack() as stack:
            stack.callback(answering.cancel)
            first = await _unless_gone(request, anext(answering, None))
            if wanted.stream:
                stack.pop_all()  # the stream cancels by itself
                return _AnswerStream(wanted, answering, first)
            pieces = await _unless_gone(request, _collect(answering))
        assert answering.ended is not None
        pieces = [*([] if first is None else [first]), *pieces]
        return JSONResponse(Completion(wanted.model, wanted.logprobs).whole(pieces, answering.ended))

    async def accept(request: Request) -> tuple[_Wanted, Answering]:
        """Submit what a request asks; its body and its pictures, which are large, are not kept here any longer."""
        try:
            chat = ChatRequest.model_validate_json(await read_json_body(request, most_bytes))
        except ValidationError as error:
            raise from_validation(error) from None
        scheduler = models.find(chat.model)
        scheduler.check_room()
        question = Question(
            chat.engine_messages(),
            await _unless_gone(request, pictures.read(chat.picture_urls())),
            max_new_tokens=chat.limit,
            sampling=_sampling(chat),
            stop=chat.stops,
            logprobs=chat.most_logprobs,
        )
        wanted = _Wanted(chat.model, bool(chat.stream), chat.includes_usage, bool(chat.logprobs))
        return wanted, scheduler.submit(question)


def _sampling(chat: ChatRequest) -> Sampling:
    try:
        return Sampling(chat.temperature, chat.top_p, chat.seed, chat.top_k)
    except SamplingError as error:
        raise ApiError(400, str(error), param=str(error).partition(" ")[0], code="invalid_value") from None


async def _collect(answering: Answering) -> Sequence[Piece]:
    return [piece async for piece in answering]


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for work as long as the caller waits; raises ClientLeft."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _AnswerStream(StreamingResponse):
    """An answer as server-sent events; however the response ends, nothing is written for nobody."""

    def __init__(self, wanted: _Wanted, answering: Answering, first: Piece | None) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(wanted, answering, first), headers=headers, media_type="text/event-stream")
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.cancel()


async def _events(wanted: _Wanted, answering: Answering, first: Piece | None) -> AsyncIterator[str]:
    completion = Completion(wanted.model, wanted.logprobs)
    yield event(completion.first_chunk())
    try:
        if first is not None:
            yield event(completion.chunk(first))
            async for piece in answering:
                yield event(completion.chunk(piece))
        assert answering.ended is not None
        yield event(completion.last_chunk(answering.ended))
        if wanted.includes_usage:
            yield event(completion.usage_chunk(answering.ended))
    except SchedulingError as error:
        yield event(from_scheduling(error).body())
    yield DONE
