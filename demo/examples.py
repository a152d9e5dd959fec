"""Example pictures with questions for the demo: a folder with an examples.json."""

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = "examples.json"


class DemoError(ValueError):
    """Something a person asked of the demo that cannot be done."""


@dataclass(frozen=True)
class Example:
    """A picture file and a question about it."""

    picture: Path
    question: str


def read_examples(folder: Path, trusted: Collection[Path] = ()) -> list[Example]:
    """Read `folder/examples.json`, a list of {"picture": "a.png", "question": "..."} with paths inside the folder.

    Raises DemoError naming the file and the entry.
    """
    file = folder / EXAMPLES
    expected = 'expected a list of {"picture": "a.png", "question": "..."}'
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DemoError(f"{file}: no such file; {expected} there") from None
    except (OSError, ValueError) as error:
        raise DemoError(f"{file}: cannot be read ({error}); {expected}") from error
    if not isinstance(entries, list):
        raise DemoError(f"{file}: {expected}")
    return [_read_example(entry, folder, trusted, f"{file}, entry {number}") for number, entry in enumerate(entries, 1)]


def _read_example(entry: object, folder: Path, trusted: Collection[Path], where: str) -> Example:
    picture, question = (entry.get("picture"), entry.get("question")) if isinstance(entry, dict) else (None, None)
    if not isinstance(picture, str) or not isinstance(question, str):
        raise DemoError(f'{where}: expected {{"picture": "a.png", "question": "..."}}')
    path = (folder / picture).resolve()
    named = Path(os.path.normpath(folder / picture))
    if not path.is_relative_to(folder.resolve()) and named not in trusted:
        raise DemoError(f"{where}: {picture} is outside {folder}; put the picture into that folder")
    if not path.is_file():
        raise DemoError(f"{where}: {picture} is not in {folder}")
    return Example(path, question)
