"""Checkpoints in other projects' layouts into the standard folder, tensor for tensor."""

from .llava_original import import_llava
from .standard_folder import Imported, Sources
from .tinyllava import import_tinyllava

__all__ = [
    "Imported",
    "Sources",
    "import_llava",
    "import_tinyllava",
]
