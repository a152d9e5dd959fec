"""What a recipe's values have to be: each is taken as the type of its field says, and a path is expanded once.

YAML 1.1 reads `2e-5` as text, `no` as false and `~` as null; a quoted number is text as well.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the key, the value, the reason and the remedy."""


def check_keys(given: dict[str, Any], known: list[str], where: str) -> None:
    """Refuse unknown keys with the nearest known one."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            raise RecipeError(f"{where}: unknown key {key!r}; {hint}")


def typed_fields(kind: type, given: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of a dataclass's fields, each as its type takes it. Raises RecipeError."""
    types_of = typing.get_type_hints(kind)
    return {name: typed(value, types_of[name], f"{where}: {name}") for name, value in given.items()}


def takes_null(kind: Any) -> bool:
    """Whether a field of this type may be null."""
    return kind is Any or type(None) in _options(kind)


def typed(value: Any, kind: Any, where: str) -> Any:
    """`value` as a field of type `kind` takes it: text that is a number as a number, one text as a list of it.

    Raises RecipeError, which names `where`, where it is nothing of the kind.
    """
    options = [option for option in _options(kind) if option is not type(None)]
    if (value is None and takes_null(kind)) or any(dataclasses.is_dataclass(option) for option in options):
        return value
    if isinstance(value, (int, float)) and any((typing.get_origin(option) or option) is dict for option in options):
        options = [option for option in options if option is not str]  # the text is JSON there, and a number is none
    names = [option for option in options if _is_names(option)]
    if names:
        return _name(value, [str(name) for option in names for name in _names(option)], where)
    for option in sorted(options, key=_strictest):
        found = _taken(value, option, where)
        if found is not None:
            return found
    wanted = " or ".join(dict.fromkeys(_called(option) for option in sorted(options, key=_strictest)))
    raise RecipeError(f"{where} is {value!r}, expected {wanted}")


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _strictest(kind: Any) -> int:
    """In which order a value is tried: nearly everything can be a text."""
    order = [bool, int, float, dict, str, list]
    base = typing.get_origin(kind) or kind
    return order.index(base) if base in order else 0


def _is_names(kind: Any) -> bool:
    is_enum = isinstance(kind, type) and issubclass(kind, enum.Enum)
    return is_enum or (typing.get_origin(kind) is typing.Literal and all(map(_is_text, typing.get_args(kind))))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _names(kind: Any) -> list[Any]:
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    return [member.value for member in kind]


def _name(value: Any, names: list[str], where: str) -> str:
    if value is False and "no" in names:
        return "no"
    text = str(getattr(value, "value", value))
    if text not in names:
        near = difflib.get_close_matches(text, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
        raise RecipeError(f"{where} is {value!r}; {hint}")
    return text


def _taken(value: Any, kind: Any, where: str) -> Any:
    """The value as this one type takes it, None where it does not."""
    base = typing.get_origin(kind) or kind
    if base is bool:
        return _bool(value)
    if base in (int, float):
        return _number(value, whole=base is int)
    if base is str:
        return _text(value)
    if base is dict:
        return value if isinstance(value, dict) else None
    if base in (list, tuple):
        if not isinstance(value, (list, tuple, str)):
            return None
        item = (typing.get_args(kind) or (Any,))[0]
        return base(typed(each, item, where) for each in ([value] if isinstance(value, str) else value))
    return value


def _text(value: Any) -> str | None:
    """Text, and what YAML has made a number of."""
    return str(value) if isinstance(value, (str, int, float, os.PathLike)) and not isinstance(value, bool) else None


def _bool(value: Any) -> bool | None:
    if isinstance(value, str):
        return _BOOLS.get(value.strip().lower())
    return bool(value) if isinstance(value, int) and value in (0, 1) else None


def _number(value: Any, whole: bool) -> float | None:
    """The number, as int where it is one: 100 steps are not 100.0."""
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text):
            return None
        value = int(text) if text.lstrip("+-").replace("_", "").isdigit() else float(text)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        return None
    if not whole or isinstance(value, int):
        return value
    return int(value) if math.isfinite(value) and value == int(value) else None


def numbers_within(value: Any) -> Any:
    """Values without types of their own (a scheduler's settings): text that is a number becomes one."""
    if isinstance(value, dict):
        return {key: numbers_within(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers_within(item) for item in value]
    number = _number(value, whole=False) if isinstance(value, str) else None
    return value if number is None else number


def _called(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    names |= {list: "a list", tuple: "a list", dict: "keys and values"}
    base = typing.get_origin(kind) or kind
    return names.get(base, str(base))


def expanded(path: str, where: str) -> str:
    """A path with `~` as the home folder. Raises RecipeError for what would become a folder of an odd name."""
    full = os.path.expanduser(path)  # noqa: PTH111 pathlib refuses an unknown user in a way of its own
    if full.startswith("~"):
        raise RecipeError(f"{where} is {path!r}, and there is no such user; a folder of that name is ./{path}")
    variable = _VARIABLE.search(full)
    if variable is not None and not Path(full).exists():
        raise RecipeError(
            f"{where} is {path!r}, and {variable[0]} is not filled in here; write the path out, or give it on the "
            "command line, where the shell fills it in (root=$DIR; `{root}` in the recipe stands for it)"
        )
    return full
