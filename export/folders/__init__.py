"""Folders of models as files, without torch: whole or not there, weights and not pointers, known by SHA-256."""

from .digests import sha256
from .lfs_pointers import pointer_fault
from .out_folder import making

__all__ = [
    "making",
    "pointer_fault",
    "sha256",
]
