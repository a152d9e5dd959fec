"""Table 1 of the paper: which public sets the data is mixed from, and how far a record tells where it is from.

LLaVA's mix (llava_v1_5_mix665k.json) names no sources. The picture's folder tells most of them; under coco/ five sets
lie together, and there the answer-format prompts of LLaVA-1.5 (arXiv 2310.03744, table 7) tell all but two apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .conversations import BrokenRecord, picture_of


@dataclass(frozen=True)
class Source:
    """One line of the report: sets that records cannot be told apart from each other, and table 1's samples."""

    name: str
    table_thousands: int | None
    told_by: str


LCS = Source("LCS", 558, "numbered folder, no set's name")
VQA = Source("VQAv2 + OKVQA", 83 + 9, "coco/, asks for a single word or phrase; the two cannot be told apart")
A_OKVQA = Source("A-OKVQA", 50, "coco/, asks for the option's letter")
REFCOCO = Source("RefCOCO", 30, "coco/, asks about a region")
LLAVA = Source("LLaVA", 158, "coco/, none of these prompts")
GQA = Source("GQA", 72, "gqa/")
OCRVQA = Source("OCRVQA", 80, "ocr_vqa/")
TEXTCAPS = Source("TextCaps", 22, "textvqa/")
VG = Source("VG", 86, "vg/")
SHAREGPT = Source("ShareGPT", 40, "no picture")
OTHER = Source("other", None, "none of the above")

SOURCES = (LCS, VQA, GQA, A_OKVQA, OCRVQA, TEXTCAPS, REFCOCO, VG, LLAVA, SHAREGPT, OTHER)
_FOLDERS = {"gqa": GQA, "ocr_vqa": OCRVQA, "textvqa": TEXTCAPS, "vg": VG}
_NUMBERED = re.compile(r"\d{5}")  # 00453/004539375.jpg
# In the order of precedence: A-OKVQA's records may hold questions of VQAv2 about the same picture.
_PROMPTS = (
    ("answer with the option's letter", A_OKVQA),
    ("description for this region", REFCOCO),
    ("region this sentence describes", REFCOCO),
    ("single word or phrase", VQA),
)


def source_of(record: dict[str, Any]) -> Source:
    """Where a record is from, as far as it tells."""
    try:
        picture = picture_of(record)
    except BrokenRecord:
        return OTHER
    if picture is None:
        return SHAREGPT
    folder = picture.partition("/")[0]
    if folder == "coco":
        return _of_coco(record)
    return _FOLDERS.get(folder, LCS if _NUMBERED.fullmatch(folder) else OTHER)


def _of_coco(record: dict[str, Any]) -> Source:
    turns = record.get("conversations")
    asked = " ".join(
        str(turn.get("value"))
        for turn in (turns if isinstance(turns, list) else [])
        if isinstance(turn, dict) and turn.get("from") == "human"
    ).lower()
    return next((source for prompt, source in _PROMPTS if prompt in asked), LLAVA)
