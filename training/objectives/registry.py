"""The objectives by name, and the choice of one with its settings."""

import dataclasses
import difflib
from typing import Any

from .align_kd import AlignKd
from .bild import Bild
from .kd import Kd
from .llava_kd import LlavaKd
from .objective import Objective
from .sft import Sft
from .switch_kd import SwitchKd

OBJECTIVES: dict[str, type[Objective]] = {
    "sft": Sft,
    "kd": Kd,
    "bild": Bild,
    "llava_kd": LlavaKd,
    "align_kd": AlignKd,
    "switch_kd": SwitchKd,
}


def build_objective(name: str, **settings: Any) -> Objective:
    """Return the objective of that name; raises ValueError for an unknown name or setting, naming the nearest."""
    if name not in OBJECTIVES:
        raise ValueError(f"there is no objective {name!r}{nearest(name, OBJECTIVES)}")
    known = [field.name for field in dataclasses.fields(OBJECTIVES[name])]  # type: ignore[arg-type]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"objective {name!r} has no setting {setting!r}{nearest(setting, known)}")
    return OBJECTIVES[name](**settings)


def nearest(wrong: str, known: Any) -> str:
    """Return the end of an error: the nearest known name, or all of them."""
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"
