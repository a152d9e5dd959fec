"""Token ids to text while they come, never cutting a character in two.

The decoded text of an answer is what the tokenizer's `decode` makes of all its tokens without special ones, less
U+FFFD at the end: there it stands for a character whose last bytes have not come. Pieces joined are that text.
"""

import re

from tokenizers import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # as tokenizers with byte fallback spell what has no token of its own


class TextStream:
    """Turns the tokens of one answer into pieces of text; special tokens give none.

    A run of byte tokens is held back until another token ends it: with byte fallback it is decoded as a whole, so that
    one wrong byte makes U+FFFD of every byte in it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        special = tokenizer.get_added_tokens_decoder().items()
        self._silent = {token for token, added in special if added.special}
        self._ids: list[int] = []  # of the text that may still change, behind one token before it
        self._before = self._given = ""  # what that one is decoded to; what was given of the text since
        self._pushed = 0
        self.settled = 0  # how many tokens have had all their text given
        self.text = ""

    def push(self, token: int) -> str:
        """Return the text that became certain with this token: "" while a character is incomplete."""
        self._pushed += 1
        spelling = self._tokenizer.id_to_token(token)
        if spelling is None or token in self._silent:  # a model may have more rows than its tokenizer has tokens
            return ""
        self._ids.append(token)
        if _BYTE.fullmatch(spelling):
            return ""
        text = self._tokenizer.decode(self._ids)
        piece = self._give(text.rstrip(_INCOMPLETE))
        if not text.endswith(_INCOMPLETE):
            # What comes changes nothing before it; some decoders treat the first token of all in another way.
            self._ids = [token]
            self._before, self._given = self._tokenizer.decode(self._ids), ""
            self.settled = self._pushed
        return piece

    def finish(self) -> str:
        """Return what was held back, without the character that the last token left incomplete."""
        self.settled = self._pushed
        return self._give(self._tokenizer.decode(self._ids).rstrip(_INCOMPLETE))

    def _give(self, text: str) -> str:
        """Return what a decoded text has after what was given, and note it as given."""
        piece = text[len(self._before) + len(self._given) :]
        self._given += piece
        self.text += piece
        return piece
