"""What lies in a bundle beside its graphs: the card, the licence, files for phones."""

from .card import write_card
from .licence import licence_files, stated_licence
from .mobile_checker import check_mobile
from .ort_files import check_ort_files, write_ort_files

__all__ = [
    "check_mobile",
    "check_ort_files",
    "licence_files",
    "stated_licence",
    "write_card",
    "write_ort_files",
]
