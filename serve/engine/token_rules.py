"""Which tokens a bundle's generation_config.json forbids or makes less likely, given what was read and written so far.

The rules, their order and their meaning are those of transformers' `generate`, to which the prompt counts too: its
image tokens once for every visual token.

Shapes in names: V vocabulary.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from switchkd.export.contract.generation_settings import GenerationSettings

Floats = npt.NDArray[np.float32]


class TokenRules:
    """The rules for one answer; what is not set costs nothing."""

    def __init__(
        self, settings: GenerationSettings, prompt: Sequence[int], ends: Sequence[int], vocabulary: int
    ) -> None:
        self._settings, self._any = settings, bool(settings.rules)
        self._tokens = list(prompt)
        self._start = len(prompt)
        self._ends = list(ends)
        new = settings.min_new_tokens
        self._shortest = settings.min_length if new is None else len(prompt) + new
        self._suppressed = _rows(settings.suppress_tokens, vocabulary)
        self._suppressed_first = _rows(settings.begin_suppress_tokens, vocabulary)
        # A single end token cannot be a bad word, and a token that the model does not have never comes.
        self._bad_words = [
            word
            for word in settings.bad_words_ids
            if word not in {(end,) for end in ends} and len(_rows(word, vocabulary)) == len(word)
        ]
        self._seen_V = np.zeros(vocabulary, dtype=bool)
        self._followers: dict[tuple[int, ...], list[int]] = {}
        self._noted = 0

    def apply(self, logits_V: Floats, written: Sequence[int]) -> Floats:
        """Return the logits of the next token as the rules leave them; `written` is the answer so far."""
        if not self._any:
            return logits_V
        self._tokens += written[len(self._tokens) - self._start :]
        self._note()
        logits_V = logits_V.copy()
        if self._settings.repetition_penalty != 1:
            seen = np.flatnonzero(self._seen_V)
            found, penalty = logits_V[seen], np.float32(self._settings.repetition_penalty)
            logits_V[seen] = np.where(found < 0, found * penalty, found / penalty)
        for rows in self._forbidden():
            logits_V[rows] = -np.inf
        return logits_V

    def _note(self) -> None:
        """Remember the tokens that came since."""
        size = self._settings.no_repeat_ngram_size
        for place in range(self._noted, len(self._tokens)):
            self._seen_V[self._tokens[place]] = True
            if size and place + 1 >= size:
                before = tuple(self._tokens[place + 1 - size : place])
                self._followers.setdefault(before, []).append(self._tokens[place])
        self._noted = len(self._tokens)

    def _forbidden(self) -> Iterable[list[int]]:
        length = len(self._tokens)
        if (size := self._settings.no_repeat_ngram_size) and length + 1 >= size:
            yield self._followers.get(tuple(self._tokens[length + 1 - size :]), [])
        for word in self._bad_words:
            before = len(word) - 1
            if before <= length and tuple(self._tokens[length - before :]) == word[:-1]:
                yield [word[-1]]
        if length < self._shortest:
            yield self._ends
        yield self._suppressed
        if length == self._start:
            yield self._suppressed_first


def _rows(ids: Iterable[int], vocabulary: int) -> list[int]:
    """The ids that the model has."""
    return [token for token in ids if 0 <= token < vocabulary]
