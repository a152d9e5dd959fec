"""A chat completion's answer, whole or as server-sent events, in the shape of OpenAI's."""

import json
import time
import uuid
from typing import Any

from ..scheduling import Ended

DONE = "data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # as OpenAI has it, since JSON knows no infinity


class Completion:
    """One answer's envelope: the same id, time and model in everything that is sent of it."""

    def __init__(self, model: str) -> None:
        self._facts = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, ended: Ended) -> dict[str, Any]:
        """The answer in one piece."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": _logprobs(ended), "finish_reason": ended.finish_reason}
        return {**self._facts, "object": "chat.completion", "choices": [choice], "usage": usage(ended)}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._facts, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, ended: Ended) -> dict[str, Any]:
        """The piece of a stream that says how many tokens it took."""
        return {**self._facts, "object": "chat.completion.chunk", "choices": [], "usage": usage(ended)}


def usage(ended: Ended) -> dict[str, int]:
    """The number of tokens of a prompt and its answer."""
    return {
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": ended.completion_tokens,
        "total_tokens": ended.prompt_tokens + ended.completion_tokens,
    }


def _logprobs(ended: Ended) -> dict[str, Any] | None:
    if ended.logprobs is None:
        return None
    content = [
        _token(said.text, said.logprob) | {"top_logprobs": [_token(text, logprob) for text, logprob in said.top]}
        for said in ended.logprobs
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # A token that is a part of a character has no text of its own.
    encoded = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": encoded}


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
