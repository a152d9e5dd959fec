"""Texts that end an answer, found also where they come in several pieces."""

from collections.abc import Sequence


class StopTexts:
    """Passes an answer's pieces on up to the first stop text, which itself is never given."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Return what of the text so far can no longer be part of a stop text."""
        text = self._held + piece
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:  # the one that is whole first, so that the pieces make no difference
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was held back: the answer ended before it became a stop text."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the text's end are the beginning of the stop text."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
