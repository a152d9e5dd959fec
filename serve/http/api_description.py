"""What /openapi.json says of the routes: the request, every kind of response, and the key."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from .access import WITHOUT_KEY
from .chat_request import ChatRequest

_SCHEMAS = "#/components/schemas/"
_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}
_ERROR_WORDS = {
    400: "The request is wrong; `param` says where.",
    401: "No key, or another one.",
    403: "A server without a key was called by a name that is not this machine's own.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not said to be JSON.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "A fault of the server.",
    503: "The engine starts or has died, or the server ends.",
    504: "The answer was not finished in time.",
}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(kind: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


_TOKEN = _object(token=_TEXT, logprob={"type": "number"}, bytes=_or_null(_list(_NUMBER)))
_TOKENS = _object(content=_list({"allOf": [_TOKEN, _object(top_logprobs=_list(_TOKEN))]}), refusal={"type": "null"})
_USAGE = _object(prompt_tokens=_NUMBER, completion_tokens=_NUMBER, total_tokens=_NUMBER)
_CHOICE = _object(
    index=_NUMBER,
    message=_object(role={"const": "assistant"}, content=_TEXT, refusal={"type": "null"}),
    logprobs=_or_null(_TOKENS),
    finish_reason={"enum": ["stop", "length"]},
)
_MODEL = _object(id=_TEXT, object={"const": "model"}, created=_NUMBER, owned_by=_TEXT)
_ANSWERS: dict[str, dict[str, Any]] = {
    "Error": _object(error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))),
    "Completion": _object(
        id=_TEXT,
        object={"const": "chat.completion"},
        created=_NUMBER,
        model=_TEXT,
        choices=_list(_CHOICE),
        usage=_USAGE,
    ),
    "Models": _object(object={"const": "list"}, data=_list(_MODEL)),
    "Health": _object(status={"const": "ok"}),
    "Readiness": _object(ready={"type": "boolean"}, models={"type": "object", "additionalProperties": _TEXT}),
}
REQUEST_BODY = {"required": True, "content": {"application/json": {"schema": {"$ref": f"{_SCHEMAS}ChatRequest"}}}}


def json_response(schema: str, description: str) -> dict[str, Any]:
    """A response in JSON, of one of the schemas here."""
    return {"description": description, "content": {"application/json": {"schema": {"$ref": _SCHEMAS + schema}}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The responses of some statuses."""
    return {status: json_response("Error", _ERROR_WORDS[status]) for status in statuses}


ANSWERED = json_response("Completion", "The answer, or a stream of `chat.completion.chunk` events ended by [DONE].")
ANSWERED["content"]["text/event-stream"] = {}  # OpenAPI 3.1 has no words for events
ANY_ERROR = errors(*_ERROR_WORDS)


class DescribedApplication(FastAPI):
    """An application whose document holds what its routes refer to: models by name, the key where one is asked for."""

    def __init__(self, models: Sequence[str], *, has_key: bool) -> None:
        super().__init__(title="switchkd", docs_url=None, redoc_url=None)  # their pages would load scripts
        self._models = models
        self._has_key = has_key

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI 3.1 document."""
        if self.openapi_schema is None:
            document = super().openapi()
            request = ChatRequest.model_json_schema(ref_template=_SCHEMAS + "{model}")
            if self._models:
                request["properties"]["model"]["enum"] = list(self._models)
            components = document.setdefault("components", {})
            components["schemas"] = {**request.pop("$defs"), "ChatRequest": request, **_ANSWERS}
            if self._has_key:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                for path in document["paths"].keys() - set(WITHOUT_KEY):
                    for operation in document["paths"][path].values():
                        operation["security"] = [{"key": []}]
        assert self.openapi_schema is not None
        return self.openapi_schema
