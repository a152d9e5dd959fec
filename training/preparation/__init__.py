"""A training set before training: public data downloaded, other formats converted, the check's report."""

from .download import PUBLIC, Download, fetch

__all__ = [
    "PUBLIC",
    "Download",
    "fetch",
]
