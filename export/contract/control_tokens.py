"""Who wrote a control token: what the chat template writes is a token, what a text writes is text.

An answer that explains `<|im_end|>`, or HTML with `</s>` in it, must neither end a turn nor begin one.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer

# Letters without case or decomposition, so that no normalizer changes them; drawn anew, so that no text can name them.
_LETTERS = [chr(code) for code in range(0x13000, 0x13400)]  # Egyptian hieroglyphs


class ControlTokens:
    """A tokenizer's special tokens but for the image token, kept apart from the same characters in a text.

    `shield` goes before the rendering of messages and `encode` behind it. In between a text's control tokens are
    stand-ins of the same length, so that a template trims and searches texts as ever, and offsets hold. Without control
    tokens in a text, the ids are those that the tokenizer gives.
    """

    def __init__(self, tokenizer: Tokenizer, image_token: str) -> None:
        tokenizer.no_truncation()  # both may be saved in tokenizer.json; a prompt is encoded whole and as it is
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        tokens = {token.content for token in added if token.special and token.content not in ("", image_token)}
        self._stand_ins = _stand_ins(sorted(tokens))
        self._swapped = self._stand_ins | {stand_in: token for token, stand_in in self._stand_ins.items()}
        self._in_texts = _any_of(self._stand_ins)
        self._of_texts = _any_of(self._stand_ins.values())
        self._in_prompts = _any_of(self._swapped)
        self._renamed: Tokenizer | None = None

    @property
    def tokens(self) -> list[str]:
        """The control tokens, in the order of their letters."""
        return list(self._stand_ins)

    def shield(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with stand-ins for the control tokens in their texts."""
        shielded: list[dict[str, Any]] = self._shield(messages)
        return shielded

    def spelled_together(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """A control token that parts of a message spell only together, which no stand-in hides; None mostly."""
        for message in messages:
            content = message.get("content")
            parts = [] if isinstance(content, str) or not isinstance(content, Sequence) else content
            texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
            together = self._in_texts.findall("".join(texts))
            if len(together) > sum(len(self._in_texts.findall(text)) for text in texts):
                return str(together[0])
        return None

    def encode(self, text: str, *, add_special_tokens: bool) -> Encoding:
        """Ids and offsets of a rendered text: the template's control tokens are one token each, stand-ins are text."""
        tokenizer = self._tokenizer
        if self._of_texts.search(text):
            # Template's and texts' change places, for a tokenizer that calls its control tokens by the stand-ins.
            text = self._in_prompts.sub(lambda found: self._swapped[found[0]], text)
            self._renamed = self._renamed or renamed(self._tokenizer, self._stand_ins)
            tokenizer = self._renamed
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _shield(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._in_texts.sub(lambda found: self._stand_ins[found[0]], value)
        if isinstance(value, Mapping):
            return {key: self._shield(part) for key, part in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
            return [self._shield(part) for part in value]
        return value


def renamed(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """The same tokenizer, ids and all, whose tokens `names` are called otherwise and so are no longer found in texts.

    A vocabulary that holds such a token as a piece (a unigram model's does) would find it without its being added.
    """
    plain = json.loads(tokenizer.to_str())
    for token in plain["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = plain["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): place for piece, place in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
    other = Tokenizer.from_str(json.dumps(plain))
    assert all(other.token_to_id(new) == tokenizer.token_to_id(old) for old, new in names.items())
    return other


def _stand_ins(tokens: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for token in tokens:
        while token not in found or list(found.values()).count(found[token]) > 1:
            found[token] = "".join(secrets.choice(_LETTERS) for _ in token)
    return found


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of the words at a place, as tokenizers do; nothing where there are none."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
