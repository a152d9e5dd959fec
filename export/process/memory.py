"""Freed memory: gives it back to the system, where the C library would keep it."""

import ctypes
import platform

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_BLOCK = 2**20  # bytes


def return_freed_blocks() -> None:
    """Let every block of 1 MiB and more go back to the system as soon as it is freed, for the rest of this process.

    glibc does so from 128 KiB on, but raises that to 32 MiB when larger blocks are freed. Weights and activations of
    a model of some 0.5 billion parameters are just below, and what lies between them in the heap keeps their pages:
    2 to 3 GB by the time that one precision is verified (benchmarks/README.md, export_real_size), and 0.4 GB when a
    bundle of that size has been opened. A size set by hand stays. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _BLOCK)
