"""From a LLaVA checkpoint folder to a verified ONNX bundle, and the torch-free contract by which a bundle is read."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assembly import ExportReport, export_checkpoint
    from .bnb_checkpoint import BnbReport, export_bnb
    from .contract import Bundle, BundleError
    from .graphs import ExportError
    from .verification import VerificationError
    from .verify_command import verify_bundle

__all__ = [
    "BnbReport",
    "Bundle",
    "BundleError",
    "ExportError",
    "ExportReport",
    "VerificationError",
    "export_bnb",
    "export_checkpoint",
    "verify_bundle",
]

# Imported when they are asked for: whoever reads a bundle has no torch, and a command's help is not to wait for it.
_PLACES = {
    "BnbReport": ".bnb_checkpoint",
    "Bundle": ".contract",
    "BundleError": ".contract",
    "ExportError": ".graphs",
    "ExportReport": ".assembly",
    "VerificationError": ".verification",
    "export_bnb": ".bnb_checkpoint",
    "export_checkpoint": ".assembly",
    "verify_bundle": ".verify_command",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name], __name__), name)
