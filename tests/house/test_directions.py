"""Which room may import which, and how: read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cli", "demo", "export", "serve", "training")

# The rooms inside a room, from the top floor to the ground: each imports only from those below it. What lies at the
# root of a room, its doors and what they put together, stands above them all.
FLOORS: dict[str, tuple[str, ...]] = {
    "cli": (),
    "demo": (),
    "export": (
        "card",
        "search",
        "verification",
        "quantisation",
        "graphs",
        "contract",
        "llava",
        "folders",
        "process",
    ),
    "serve": ("bench", "http", "scheduling", "engine"),
    "training": (
        "ablation",
        "estimate",
        "world",
        "evaluation",
        "runs",
        "preparation",
        "importing",
        "data",
        "recipe",
        "models",
        "objectives",
        "process",
    ),
}
# What the rooms share. It runs on boards without torch, so it may import only itself.
SHARED = ("switchkd.export.contract", "switchkd.export.folders", "switchkd.export.process")
TORCH_FREE = ("export/__init__.py", "export/contract/", "export/folders/", "export/process/")
TORCH_AND_KIN = ("torch", "transformers", "accelerate", "deepspeed", "onnx", "onnxscript", "optimum", "datasets")

# room -> the modules of other rooms that it may import; a name allows what lies below it only where it ends in ".*"
OPEN_DOORS: dict[str, tuple[str, ...]] = {
    "training": (
        "switchkd.export.contract.control_tokens",  # a text is spelled in training as it is when the bundle answers
        "switchkd.export.contract.pixels",
        "switchkd.export.contract.prompt",
        "switchkd.export.folders.*",
        "switchkd.export.llava.*",  # both rooms load checkpoints, and refuse by one rule what does not fit
    ),
    "export": (),
    "serve": ("switchkd.export.contract.*", "switchkd.export.process.memory"),
    "demo": ("switchkd.serve",),
    "cli": ("switchkd.training.*", "switchkd.export.*", "switchkd.serve.*", "switchkd.demo.*"),
}


def broken_directions(root: Path) -> list[str]:
    """Return one line for every import below `root` that goes where its room may not."""
    broken = []
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            place = path.relative_to(root).as_posix()
            for line, target, is_relative in imports(path, root):
                reason = objection(room, place, target, is_relative)
                if reason:
                    broken.append(f"{place}:{line} imports {target}: {reason}")
    return broken


def objection(room: str, place: str, target: str, is_relative: bool) -> str | None:
    """Say why a file of a room may not import the target, or None where it may."""
    if target.partition(".")[0] in ROOMS:
        return "a bare root loads a second copy of the room"
    if (room in ("serve", "demo") or place.startswith(TORCH_FREE)) and target.partition(".")[0] in TORCH_AND_KIN:
        return "this code runs where torch is not installed"
    if not within(target, "switchkd"):
        return None
    if within(target, f"switchkd.{room}"):
        if not is_relative:
            return "imports inside a room are relative"
        if place.startswith(TORCH_FREE) and not any(within(target, name) for name in SHARED):
            return "the shared, torch-free files may import only one another"
        here, there = floor(room, place.split("/")), floor(room, target.split(".")[1:])
        return None if here <= there else "a room inside a room imports only from itself and the floors below it"
    if is_relative:
        return "a relative import may not leave its room"
    if place in ("cli/main.py", "cli/__init__.py"):
        return "the front door imports a room only when its command is called"
    if not any(passes(target, door) for door in OPEN_DOORS[room]):
        return f"{room} may import only {', '.join(OPEN_DOORS[room]) or 'itself'}"
    return None


def floor(room: str, parts: Sequence[str]) -> int:
    """Return how many floors of a room lie above a path or dotted name that begins with the room; the root is 0."""
    inside = parts[1] if len(parts) > 1 else None
    return FLOORS[room].index(inside) + 1 if inside in FLOORS[room] else 0


def imports(path: Path, root: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, absolute dotted target, relative or not) for each import of a file, literal dynamic ones too."""
    package = ("switchkd", *path.relative_to(root).parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    if path.name == "__init__.py":  # it hands names on when they are asked for, and shows them to type checkers
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and is_for_type_checkers(node))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from switchkd import export` names a module behind the import, `from .x import y` before it.
            names = [f"{module}.{alias.name}" for alias in node.names]
            for target in names if module in ("switchkd", ".".join(package)) else [module]:
                yield node.lineno, target, bool(node.level)
        elif isinstance(node, ast.Call) and node.args and called_name(node) in ("import_module", "__import__"):
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, argument.value, argument.value.startswith(".")


def is_for_type_checkers(node: ast.If) -> bool:
    """Tell whether a block never runs."""
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def called_name(call: ast.Call) -> str:
    """Return the last part of the name that is called."""
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def within(target: str, package: str) -> bool:
    """Tell whether a dotted name is the package or lies below it."""
    return target == package or target.startswith(package + ".")


def passes(target: str, door: str) -> bool:
    """Tell whether a door lets the target through."""
    return within(target, door.removesuffix(".*")) if door.endswith(".*") else target == door


def test_every_import_goes_where_its_room_may() -> None:
    assert broken_directions(ROOT) == []


def test_every_room_inside_a_room_has_its_floor() -> None:
    inside = {room: {path.parent.name for path in (ROOT / room).glob("*/__init__.py")} for room in ROOMS}
    assert {room: set(floors) for room, floors in FLOORS.items()} == inside


@pytest.mark.parametrize(
    ("place", "source", "reason"),
    [
        ("serve/engine/engine.py", "import torch", "torch is not installed"),
        ("serve/engine/engine.py", "def late():\n    import torch.nn.functional", "torch is not installed"),
        ("serve/engine/engine.py", "from transformers import AutoTokenizer", "torch is not installed"),
        ("serve/engine/engine.py", "import importlib\nimportlib.import_module('torch')", "torch is not installed"),
        ("serve/engine/engine.py", "from switchkd.training.recipe.recipe import Recipe", "serve may import only"),
        ("serve/engine/engine.py", "from switchkd.export.graphs import OnnxGraph", "serve may import only"),
        ("serve/engine/engine.py", "from switchkd import training", "serve may import only"),
        ("serve/engine/engine.py", "from switchkd.serve.engine.sampling import pick", "inside a room are relative"),
        ("serve/engine/engine.py", "from ...export.contract import Bundle", "may not leave its room"),
        ("serve/engine/engine.py", "from export.contract import Bundle", "bare root"),
        ("demo/app.py", "from switchkd.serve.engine.engine import Engine", "demo may import only switchkd.serve"),
        ("demo/app.py", "from switchkd.export.contract.bundle import Bundle", "demo may import only switchkd.serve"),
        ("demo/app.py", "import torch", "torch is not installed"),
        ("training/runs/trainer.py", "from switchkd.export.contract.bundle import Bundle", "training may import only"),
        ("training/runs/trainer.py", "from switchkd.serve import Engine", "training may import only"),
        ("training/world/scenes.py", "from ...serve import Engine", "may not leave its room"),
        ("export/graphs/tracing.py", "from switchkd.training.models.vlm import load", "export may import only itself"),
        ("export/graphs/tracing.py", "import switchkd.serve", "export may import only itself"),
        ("export/contract/bundle.py", "import torch", "torch is not installed"),
        ("export/contract/bundle.py", "from ..graphs import export", "may import only one another"),
        ("export/__init__.py", "from . import graphs", "may import only one another"),
        ("training/data/records.py", "from ..runs.stages import run_recipe", "the floors below it"),
        ("training/data/records.py", "def late():\n    from ..preparation import fetch", "the floors below it"),
        ("training/objectives/kd.py", "from ..data import collator", "the floors below it"),
        ("training/runs/stages.py", "from ..train_command import run", "the floors below it"),
        ("training/runs/__init__.py", "from .. import estimate", "the floors below it"),
        ("training/models/vlm.py", "from .. import Recipe", "the floors below it"),
        ("export/graphs/tracing.py", "from ..verification import GraphRunner", "the floors below it"),
        ("export/folders/digests.py", "from ..contract.bundle import Bundle", "the floors below it"),
        ("serve/engine/engine.py", "from ..ask_command import run", "the floors below it"),
        ("serve/scheduling/scheduler.py", "from ..http.metrics import Metrics", "the floors below it"),
        ("cli/main.py", "def late():\n    from switchkd.serve import Engine", "only when its command is called"),
    ],
)
def test_a_planted_wrong_import_is_found(tmp_path: Path, place: str, source: str, reason: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    (found,) = broken_directions(tmp_path)
    assert found.startswith(place)
    assert reason in found


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("serve/engine/engine.py", "import numpy\nfrom . import sampling\nfrom .sampling import pick"),
        ("serve/engine/engine.py", "from switchkd.export.contract.bundle import Bundle"),
        ("demo/app.py", "import gradio\nfrom switchkd.serve import Engine"),
        ("training/world/dataset.py", "import torch\nfrom ..recipe.recipe import Recipe\nfrom .scenes import draw"),
        ("training/data/conversations.py", "from switchkd.export.contract.pixels import to_pixels"),
        ("export/graphs/tracing.py", "import torch\nfrom ..contract.bundle import Bundle"),
        ("training/runs/stages.py", "from ..recipe import Recipe\nfrom .trainer import train"),
        ("training/__init__.py", "if TYPE_CHECKING:\n    from .runs import run_recipe"),
        ("training/train_command.py", "from .runs.stages import run_recipe"),
        ("export/__init__.py", "if TYPE_CHECKING:\n    from .assembly import export_checkpoint"),
        ("export/contract/prompt.py", "import jinja2\nfrom .pixels import PictureError"),
        ("cli/quickstart.py", "from switchkd.training.runs.trainer import train\nfrom .main import main"),
    ],
)
def test_a_right_import_is_left_alone(tmp_path: Path, place: str, source: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    assert broken_directions(tmp_path) == []
