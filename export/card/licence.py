"""What a checkpoint says about its licence, and the files that say it."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from ..graphs.tracing import ExportError

_FILES = re.compile(r"(LICEN[CS]E|COPYING|NOTICE)([._-].*)?", re.IGNORECASE)
_KEYS = ("license", "license_name", "license_link")  # as hubs read them


def stated_licence(checkpoint: Path) -> dict[str, Any]:
    """The licence in the front matter of a checkpoint's README.md, under hubs' own keys; empty where none is stated.

    Raises ExportError where the front matter cannot be read.
    """
    card = checkpoint / "README.md"
    if not card.is_file():
        return {}
    try:
        metadata = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"{card}: its front matter is not YAML ({reason}); correct it, or remove the file") from error
    return {key: metadata[key] for key in _KEYS if isinstance(metadata.get(key), str) and metadata[key].strip()}


def licence_files(checkpoint: Path) -> list[Path]:
    """The texts of licences that lie in a checkpoint folder."""
    return sorted(file for file in checkpoint.iterdir() if file.is_file() and _FILES.fullmatch(file.name))
