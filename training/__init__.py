"""Training: pictures and conversations in, a standard Hugging Face checkpoint folder out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import ConversationEncoder
    from .evaluation import generate_answers
    from .models import Distillation, Vlm, build_vlm, load_vlm
    from .objectives import Objective, build_objective
    from .objectives.dbild import dbild
    from .objectives.knee import knee_k
    from .recipe import Recipe, load_recipe
    from .runs import run_recipe

__all__ = [
    "ConversationEncoder",
    "Distillation",
    "Objective",
    "Recipe",
    "Vlm",
    "build_objective",
    "build_vlm",
    "dbild",
    "generate_answers",
    "knee_k",
    "load_recipe",
    "load_vlm",
    "run_recipe",
]

# Imported when they are asked for, so that a command's help does not wait for torch.
_PLACES = {
    "ConversationEncoder": ".data",
    "Distillation": ".models",
    "Objective": ".objectives",
    "Recipe": ".recipe",
    "Vlm": ".models",
    "build_objective": ".objectives",
    "build_vlm": ".models",
    "dbild": ".objectives.dbild",
    "generate_answers": ".evaluation",
    "knee_k": ".objectives.knee",
    "load_recipe": ".recipe",
    "load_vlm": ".models",
    "run_recipe": ".runs",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name], __name__), name)
