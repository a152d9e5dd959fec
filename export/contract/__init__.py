"""The contract: what every room reads of a bundle folder, its files, pictures and prompts, without torch."""

from .bundle import Bundle, read_manifest
from .json_fields import BundleError
from .manifest import GraphFile, Manifest, ModelFacts
from .pixels import Picture, PictureError, Preprocessing, read_pixels
from .prompt import Message, PromptEncoder, PromptError, read_tokenizer

__all__ = [
    "Bundle",
    "BundleError",
    "GraphFile",
    "Manifest",
    "Message",
    "ModelFacts",
    "Picture",
    "PictureError",
    "Preprocessing",
    "PromptEncoder",
    "PromptError",
    "read_manifest",
    "read_pixels",
    "read_tokenizer",
]
