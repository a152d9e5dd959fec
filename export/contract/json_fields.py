"""Typed fields out of parsed JSON: what a manifest's reader takes, and the error that says where a wrong one stands."""

import json
from collections.abc import Iterator
from typing import Any


class BundleError(ValueError):
    """A bundle that is missing, incomplete or altered: the file, the reason and the remedy in one line."""


class Reader:
    """Takes typed fields out of parsed JSON, and says where in the file a wrong one stands."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise BundleError(f"{where}: is {_kind(content)}, expected an object; export again")
        self.content, self.where = content, where

    def _get(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        value = self.content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = _kind(value) if key in self.content else "missing"
            raise BundleError(f"{self.where}: {key} is {found}, expected {expected}; export again")
        return value

    def text(self, key: str) -> str:
        """Return a text field; raises BundleError, as all of these do."""
        return str(self._get(key, str, "text"))

    def count(self, key: str) -> int:
        """Return a number of zero or more."""
        value = int(self._get(key, int, "a number"))
        if value < 0:
            raise BundleError(f"{self.where}: {key} is {value}, expected zero or more; export again")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts."""
        values = self._get(key, list, "a list of texts")
        if not all(isinstance(value, str) for value in values):
            raise BundleError(f"{self.where}: {key} is {values}, expected a list of texts; export again")
        return tuple(values)

    def counts(self, key: str) -> tuple[int, ...]:
        """Return a list of numbers of zero or more."""
        values = self._get(key, list, "a list of numbers")
        if not all(isinstance(value, int) and value >= 0 for value in values):
            raise BundleError(f"{self.where}: {key} is {values}, expected a list of numbers; export again")
        return tuple(values)

    def dimensions(self, key: str) -> tuple[int | str, ...]:
        """Return a list of sizes and names of axes."""
        values = self._get(key, list, "a list of dimensions")
        if not all(isinstance(value, (int, str)) for value in values):
            raise BundleError(f"{self.where}: {key} is {values}, expected numbers and names; export again")
        return tuple(values)

    def object(self, key: str) -> "Reader":
        """Return a reader of an object inside."""
        return Reader(self._get(key, dict, "an object"), f"{self.where}: {key}")

    def objects(self, key: str) -> Iterator["Reader"]:
        """Yield a reader of every object in a list."""
        for index, value in enumerate(self._get(key, list, "a list")):
            yield Reader(value, f"{self.where}: {key}[{index}]")


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(type(value), repr(value))


def parse_object(text: str, name: str) -> dict[str, Any]:
    """Parse the JSON object in a file of this name; raises BundleError."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(f"{name}: not valid JSON ({error}); export again") from error
    return dict(Reader(content, name).content)
