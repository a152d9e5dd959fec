"""Conversations -> token ids, and labels that are there on assistant turns alone.

Shapes: T tokens.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from switchkd.export.contract.control_tokens import ControlTokens
from switchkd.export.contract.pixels import Preprocessing
from switchkd.export.contract.prompt import PromptError, adds_special_tokens, render_chat

from ..models.alignment import IGNORED
from ..models.vlm import Vlm
from .conversations import BrokenRecord, DataError, Reason

NO_TOKEN = -1


class ConversationEncoder:
    """Encodes conversations with a tokenizer's chat template; only assistant turns are supervised.

    The spans come from the template itself: an assistant turn is what rendering it adds to the rendering
    of everything before it with a generation prompt. Supervision ends with the first end-of-sequence token. Control
    tokens are those that the template writes; the same characters in a turn's text are text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token: str,
        tokens_per_picture: int,
        max_length: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._control = ControlTokens(_backend(tokenizer), image_token)
        self._image_token = image_token
        self._image_token_id = tokenizer.get_vocab().get(image_token, NO_TOKEN)
        self._tokens_per_picture = tokens_per_picture
        self._pictures_text = image_token * tokens_per_picture
        self._max_length = max_length

    def encode(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Token ids and labels [T] of a conversation, cut to `max_length`.

        Raises BrokenRecord where the chat template refuses the turns or rewrites earlier ones, so that no span can be
        told, and where the cut leaves no answer or a part of a picture.
        """
        ids_T, labels_T = self._whole(messages)
        if self._supervised(ids_T, labels_T) == 0:
            raise self.cut_off(len(ids_T))
        return ids_T[: self._max_length], labels_T[: self._max_length]

    def measure(self, messages: list[dict[str, Any]]) -> tuple[int, int]:
        """Tokens of the whole conversation, and how many are supervised once it is cut (0: `encode` raises `cut_off`).

        Raises BrokenRecord as `encode` does otherwise.
        """
        ids_T, labels_T = self._whole(messages)
        return len(ids_T), self._supervised(ids_T, labels_T)

    def cut_off(self, tokens: int) -> BrokenRecord:
        """What is said of a conversation of which the cut leaves nothing to learn from."""
        return BrokenRecord(
            Reason.CUT,
            f"cut from {tokens} tokens to max_length {self._max_length} it loses every answer, or part of its picture; "
            "raise max_length of data",
        )

    @property
    def max_length(self) -> int | None:
        """The longest conversation in tokens; longer ones are cut."""
        return self._max_length

    @property
    def fingerprint(self) -> str:
        """A hash of what the encoding depends on: vocabulary, chat template, tokens a picture, longest length."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        rules = [self._tokenizer.chat_template, self._pictures_text, self._max_length, self._tokenizer.eos_token_id]
        return hashlib.sha256(json.dumps([vocabulary, rules, self._control.tokens]).encode()).hexdigest()

    def _supervised(self, ids_T: list[int], labels_T: list[int]) -> int:
        """Supervised tokens of the first `max_length`; none where a picture is not whole there."""
        if self._image_token_id in ids_T[len(ids_T) if self._max_length is None else self._max_length :]:
            return 0
        return sum(label != IGNORED for label in labels_T[: self._max_length])

    def _whole(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        messages = self._control.shield(messages)
        whole = self._render(messages, generation=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:index], generation=True)
                last = index + 1 == len(messages)  # most often, and a rendering is what takes the time
                spans.append((before, whole if last else self._render(messages[: index + 1], generation=False)))
        encoded = self._control.encode(whole, add_special_tokens=adds_special_tokens(whole, self._tokenizer.bos_token))
        ids_T: list[int] = encoded.ids
        self._check_pictures(messages, ids_T)
        labels_T = [IGNORED] * len(ids_T)
        for before, until in spans:
            if not (until.startswith(before) and whole.startswith(until)):
                raise BrokenRecord(
                    Reason.TEMPLATE,
                    "the chat template changes earlier turns when a turn is added, so assistant turns cannot be told "
                    "apart; use a template that only appends (ChatML does)",
                )
            if str(self._tokenizer.eos_token or "") not in until[len(before) :]:  # so it is with LLaVA-1.5's own
                raise BrokenRecord(
                    Reason.TEMPLATE,
                    f"the chat template ends no answer with {self._tokenizer.eos_token}, so that the student would "
                    "never learn to stop; write {{ eos_token }} behind the assistant's text in chat_template.jinja",
                )
            self._supervise(ids_T, labels_T, encoded.offsets, len(before), len(until))
        return ids_T, labels_T

    def encode_prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers."""
        text = self._render(self._control.shield(messages), generation=True)
        adds = adds_special_tokens(text, self._tokenizer.bos_token)
        ids_T: list[int] = self._control.encode(text, add_special_tokens=adds).ids
        return ids_T

    def _supervise(
        self, ids_T: list[int], labels_T: list[int], offsets_T: list[tuple[int, int]], start: int, end: int
    ) -> None:
        for token in range(bisect_left(offsets_T, (start, start)), len(ids_T)):
            if offsets_T[token][1] > end:
                return
            labels_T[token] = ids_T[token]
            if ids_T[token] == self._tokenizer.eos_token_id:
                return

    def _check_pictures(self, messages: list[dict[str, Any]], ids_T: list[int]) -> None:
        pictures = sum(
            part["type"] == "image"
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
        )
        found, expected = ids_T.count(self._image_token_id), pictures * self._tokens_per_picture
        if found != expected:
            raise BrokenRecord(
                Reason.PLACEHOLDERS,
                f"{found} image tokens where its pictures take {expected}; its text holds {self._image_token}, or the "
                "chat template has no place for a picture",
            )

    def _render(self, messages: list[dict[str, Any]], *, generation: bool) -> str:
        # Parts, never bare text: LLaVA-1.5's own templates read nothing else, and drop bare text without a word.
        spelled = [
            message | {"content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in messages
        ]
        try:
            # The text of transformers' apply_chat_template, in half of its time.
            text = render_chat(
                self._tokenizer.get_chat_template(),
                spelled,
                add_generation_prompt=generation,
                special_tokens=self._tokenizer.special_tokens_map,
            )
        except PromptError as error:
            raise BrokenRecord(Reason.TEMPLATE, str(error)) from None
        return text.replace(self._image_token, self._pictures_text)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise DataError(
            f"the tokenizer is a {type(tokenizer).__name__}, which does not say where in the text a token is; save it "
            "with a tokenizer.json (a fast tokenizer)"
        )
    return backend


def model_inputs(vlm: Vlm, max_length: int | None = None) -> tuple[ConversationEncoder, Preprocessing]:
    """How conversations become a model's token ids, cut to `max_length`, and how pictures become its pixels."""
    encoder = ConversationEncoder(vlm.tokenizer, vlm.processor.image_token, vlm.tokens_per_picture, max_length)
    return encoder, vlm.preprocessing
