"""A server that speaks OpenAI's chat completions, asked several questions at once and patiently."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Self

import httpx
from PIL import Image

from switchkd.training.evaluation.kept_answers import Answer
from switchkd.training.evaluation.questions import EvaluationError, Question

KEYS = ("SWITCHKD_EVAL_API_KEY", "OPENAI_API_KEY")
TRIES = 8
LONGEST_WAIT = 300.0  # seconds, whatever Retry-After says
TIMEOUT = 600.0  # of one answer
_LATER = frozenset((408, 429, 500, 502, 503, 504))


class ServerError(EvaluationError):
    """A server that does not answer as asked; the message says what it said, and what to do."""


class ServerModel:
    """One model of a server; `connect` makes sure that it is there."""

    def __init__(self, address: str, name: str, at_once: int) -> None:
        self._address = address.rstrip("/")
        self._name = name
        self._at_once = at_once
        key = next((os.environ[variable] for variable in KEYS if os.environ.get(variable)), None)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT)

    @classmethod
    def connect(cls, address: str, name: str | None, at_once: int) -> Self:
        """Reach the server and choose its model: the one named, or the only one that it lists. Raises ServerError."""
        model = cls(address, name or "", at_once)
        listed = model._listed()
        if name is not None and (listed is None or name in listed):
            return model
        if name is None and listed is not None and len(listed) == 1:
            return cls(address, listed[0], at_once)
        names = "it lists none" if not listed else f"it has {', '.join(listed)}"
        wanted = "several models may be there" if name is None else f"there is no model {name!r}"
        raise ServerError(f"{address}: {wanted}; {names}; name one by --model, or as {address}#NAME")

    @property
    def name(self) -> str:
        """The model's name there."""
        return self._name

    def identity(self) -> Mapping[str, Any]:
        """Where it is and what it is called: its weights cannot be seen from here."""
        return {"kind": "server", "address": self._address, "model": self._name}

    def about(self) -> Mapping[str, Any]:
        """The same, for people."""
        return {"kind": "server", "given": self._address, "at_once": self._at_once, "template_sha256": None}

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[list[tuple[str, Answer]]]:
        """Answer several at once, each handed on as it comes. Raises ServerError."""
        ordered = sorted(questions, key=lambda question: (question.cluster, question.key))
        with ThreadPoolExecutor(self._at_once) as pool:
            try:
                asked = [pool.submit(self._ask, question, max_new_tokens) for question in ordered]
                for done in as_completed(asked):
                    yield [done.result()]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, question: Question, max_new_tokens: int) -> tuple[str, Answer]:
        messages = [_with_picture(message, question.picture) for message in question.messages]
        request = {"model": self._name, "messages": messages, "max_tokens": max_new_tokens, "temperature": 0}
        reply = self._send("POST", "/chat/completions", request)
        try:
            choice = reply["choices"][0]
            return question.key, Answer(choice["message"]["content"] or "", choice.get("finish_reason") == "length")
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"{self._address}: answered {reply!r:.200}, expected a chat completion") from None

    def _listed(self) -> list[str] | None:
        """The names of /models; None where the server has no such list."""
        try:
            reply = self._send("GET", "/models", None, tries=1)
        except ServerError as error:
            if isinstance(error.__cause__, httpx.HTTPStatusError) and error.__cause__.response.status_code == 404:
                return None
            raise
        return [str(model["id"]) for model in reply.get("data", []) if isinstance(model, dict) and "id" in model]

    def _send(self, method: str, route: str, body: Any, tries: int = TRIES) -> dict[str, Any]:
        """One request, sent again where the server is busy or away: after as long as it says, or 1, 2, 4 ... s."""
        for number in range(1, tries + 1):
            wait = min(2.0 ** (number - 1), LONGEST_WAIT)
            try:
                response = self._client.request(method, self._address + route, json=body)
                response.raise_for_status()
                return dict(response.json())
            except httpx.HTTPStatusError as error:
                if error.response.status_code not in _LATER or number == tries:
                    raise ServerError(_refusal(self._address, error.response)) from error
                wait = asked_wait(error.response, wait)
            except httpx.TransportError as error:
                if number == tries:
                    raise ServerError(
                        f"{self._address}: cannot be reached ({error}); is the server running?"
                    ) from error
            except ValueError as error:
                raise ServerError(
                    f"{self._address}: answered no JSON; is this the address that ends in /v1?"
                ) from error
            time.sleep(wait)
        raise AssertionError("the last try returns or raises")


def _refusal(address: str, response: httpx.Response) -> str:
    status, said = response.status_code, response.text[:300]
    with contextlib.suppress(ValueError, KeyError, TypeError):  # not OpenAI's form: the text as it is
        said = response.json()["error"]["message"]
    remedies = {
        401: f"put the key into the environment variable {KEYS[0]}",
        403: f"put a key that may into the environment variable {KEYS[0]}",
        404: "is this the address that ends in /v1, and the model's name there?",
        429: "ask fewer at once with --batch",
    }
    remedy = remedies.get(status, "the same command goes on behind the answers that are there")
    return f"{address}: HTTP {status}: {said.rstrip('.')}; {remedy}"


def asked_wait(response: httpx.Response, otherwise: float) -> float:
    """Seconds that Retry-After asks for, as a number or as a date."""
    asked = response.headers.get("Retry-After", "")
    if asked.isdigit():
        return min(float(asked), LONGEST_WAIT)
    try:
        until = email.utils.parsedate_to_datetime(asked).timestamp()
    except (TypeError, ValueError):
        return otherwise
    return min(max(until - time.time(), 0.0), LONGEST_WAIT)


def _with_picture(message: Mapping[str, Any], picture: Path | None) -> dict[str, Any]:
    """The message with the picture's bytes in its place, as a data: URI."""
    content = message["content"]
    if isinstance(content, str):
        return dict(message)
    parts = [part if part["type"] != "image" else _picture_part(picture) for part in content]
    return {**message, "content": parts}


def _picture_part(picture: Path | None) -> dict[str, Any]:
    assert picture is not None
    try:
        with Image.open(picture) as opened:
            kind = Image.MIME[opened.format or ""]
    except (OSError, KeyError) as error:  # what is no picture is not sent either
        raise ServerError(f"{picture}: no picture that can be sent ({error}); take it out of the data") from None
    content = base64.b64encode(picture.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{content}"}}
