"""A chat completion's answer, whole or as server-sent events, in the shape of OpenAI's."""

import json
import time
import uuid
from collections.abc import Sequence
from itertools import chain
from typing import Any

from ..scheduling import Ended, Piece, SaidToken

DONE = "data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # as OpenAI has it, since JSON knows no infinity


class Completion:
    """One answer's envelope: the same id, time and model in everything that is sent of it."""

    def __init__(self, model: str, logprobs: bool = False) -> None:
        self._tells_logprobs = logprobs
        self._facts = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Piece], ended: Ended) -> dict[str, Any]:
        """The answer at once."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        logprobs = self._logprobs([*chain.from_iterable(piece.said for piece in pieces), *ended.said])
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": ended.finish_reason}
        return {**self._facts, "object": "chat.completion", "choices": [choice], "usage": usage(ended)}

    def first_chunk(self) -> dict[str, Any]:
        """The beginning of a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece of a stream, with the tokens whose text ends in it."""
        return self._chunk({"content": piece.text}, self._logprobs(piece.said))

    def last_chunk(self, ended: Ended) -> dict[str, Any]:
        """The end of a stream, with the tokens whose text is not given."""
        return self._chunk({}, self._logprobs(ended.said) if ended.said else None, ended.finish_reason)

    def usage_chunk(self, ended: Ended) -> dict[str, Any]:
        """The piece of a stream that says how many tokens it took."""
        return {**self._facts, "object": "chat.completion.chunk", "choices": [], "usage": usage(ended)}

    def _chunk(
        self, delta: dict[str, str], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._facts, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, tokens: Sequence[SaidToken]) -> dict[str, Any] | None:
        if not self._tells_logprobs:
            return None
        content = [
            _token(said.text, said.logprob) | {"top_logprobs": [_token(text, logprob) for text, logprob in said.top]}
            for said in tokens
        ]
        return {"content": content, "refusal": None}


def usage(ended: Ended) -> dict[str, int]:
    """The number of tokens of a prompt and its answer."""
    return {
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": ended.completion_tokens,
        "total_tokens": ended.prompt_tokens + ended.completion_tokens,
    }


def _token(text: str, logprob: float) -> dict[str, Any]:
    # A token that is a part of a character has no text of its own.
    encoded = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": encoded}


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
