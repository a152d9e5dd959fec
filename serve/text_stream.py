"""Token ids to text while they come, never cutting a character in two."""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Turns the tokens of one answer into pieces of text; special tokens give none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """Return the text that became certain with this token: "" while a character is incomplete."""
        self._ids.append(token)
        piece = self._decode.step(self._tokenizer, token) or ""
        self.text += piece
        return piece

    def finish(self) -> str:
        """Return what was held back, without the character that the last token left incomplete."""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        piece = whole.removeprefix(self.text).rstrip("\N{REPLACEMENT CHARACTER}") if whole != self.text else ""
        self.text += piece
        return piece
