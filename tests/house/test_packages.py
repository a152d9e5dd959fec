"""How the rooms are packaged: the import names, what each extra declares, and which modules get loaded when."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cli", "demo", "export", "recipes", "serve", "training")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Import names that differ from the distribution's name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "huggingface_hub": "huggingface-hub",
    "onnx_ir": "onnx-ir",
    "prometheus_client": "prometheus-client",
}
HEAVY = ("torch", "transformers", "numpy", "onnxruntime", "PIL", "jinja2")
# Each room may use its own extra; the front door runs whichever room is there.
EXTRAS_OF_ROOM = {
    "cli": ("train", "export", "serve", "demo"),
    "demo": ("demo", "serve"),
    "export": ("export",),
    "serve": ("serve",),
    "training": ("train",),
}


def python(*words: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python away from the root, with the blocked packages made impossible to import."""
    code = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", code + "\n".join(words)],
        cwd=Path(sys.executable).parent,
        capture_output=True,
        text=True,
        check=False,
    )


def folders_with_modules() -> Iterator[str]:
    """Yield the import name of every folder below the rooms that holds an __init__.py."""
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("__init__.py")):
            yield "switchkd." + ".".join(path.parent.relative_to(ROOT).parts)


def path_of(package: str) -> Path:
    """Return the folder of an import name."""
    return ROOT.joinpath(*package.split(".")[1:])


def third_party_imports(room: str) -> Iterator[tuple[str, str]]:
    """Yield (file:line, root package) for every unguarded import of something that is neither ours nor Python's."""
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            else:
                continue
            for root in {name.partition(".")[0] for name in names}:
                if root != "switchkd" and root not in sys.stdlib_module_names:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", root


def declared(extra: str) -> set[str]:
    """Return the normalised names of an extra's requirements."""
    requirements = PROJECT["project"]["optional-dependencies"][extra]
    return {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in requirements}


def test_every_package_folder_is_in_the_wheel_list() -> None:
    assert sorted(folders_with_modules()) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_every_package_says_in_a_sentence_what_it_is_for() -> None:
    silent = []
    for package in folders_with_modules():
        text = ast.get_docstring(ast.parse((path_of(package) / "__init__.py").read_text(encoding="utf-8"))) or ""
        if "\n" in text or not text.endswith("."):
            silent.append(package)
    assert silent == []


def test_every_package_hands_on_the_names_that_it_lists() -> None:
    packages = [name for name in folders_with_modules() if not name.startswith(("switchkd.cli", "switchkd.recipes"))]
    done = python(
        "import importlib",
        f"for package in {packages!r}:",
        "    module = importlib.import_module(package)",
        "    for name in getattr(module, '__all__', ()):",
        "        if getattr(module, name).__class__.__name__ == 'module': print(package, name)",
        "    print(package, len(getattr(module, '__all__', ())))",
    )
    assert done.returncode == 0, done.stderr
    counts = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert [package for package, names in counts.items() if names == "0"] == ["switchkd.demo"]
    assert set(counts) == set(packages)  # and no module under a name of something in it


def test_rooms_hand_their_names_on_when_they_are_asked_for() -> None:
    """A command's help is not to wait for torch, and a device has none."""
    done = python(
        "import switchkd.training, switchkd.export",
        f"print([name for name in {HEAVY!r} if name in sys.modules])",
        "from switchkd.training import build_objective, dbild, knee_k",
        "from switchkd.training.objectives import OBJECTIVES",
        "from switchkd.export import export_checkpoint",
        "from switchkd.serve import Engine",
        "print(dbild.__name__, knee_k.__name__, type(build_objective('sft')) is OBJECTIVES['sft'])",
        "print(export_checkpoint.__module__, Engine.__module__)",
        "switchkd.training.no_such_name",
    )
    assert done.stdout.splitlines() == [
        "[]",
        "dbild knee_k True",
        "switchkd.export.assembly switchkd.serve.engine.engine",
    ]
    assert "AttributeError: module 'switchkd.training' has no attribute 'no_such_name'" in done.stderr


def test_the_map_shows_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    inside = [
        name.removeprefix("switchkd.").replace(".", "/") for name in folders_with_modules() if name.count(".") == 2
    ]
    assert inside
    for room in inside:
        sentence = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")))
        assert f"| [{room}/]({room}) | {sentence} |" in text


@pytest.mark.parametrize("room", sorted(EXTRAS_OF_ROOM))
def test_a_room_imports_only_what_its_extra_declares(room: str) -> None:
    allowed = set().union(*(declared(extra) for extra in EXTRAS_OF_ROOM[room]))
    undeclared = [
        f"{place} imports {root}"
        for place, root in third_party_imports(room)
        if DISTRIBUTIONS.get(root, root).lower() not in allowed
    ]
    assert undeclared == []


def test_typings_shows_every_room_to_type_checkers() -> None:
    for room in ROOMS:
        link = ROOT / "typings" / "switchkd" / room
        assert link.is_symlink(), f"{link} must be a symlink"
        assert link.readlink() == Path("../..") / room


def test_serve_needs_no_torch() -> None:
    done = python("import switchkd.serve", blocked=("torch", "transformers", "accelerate", "onnx", "gradio"))
    assert done.returncode == 0, done.stderr


def test_the_shared_modules_need_no_torch() -> None:
    done = python(
        "import switchkd.export, switchkd.export.contract, switchkd.export.folders",
        blocked=("torch", "transformers", "accelerate", "onnx", "onnxruntime"),
    )
    assert done.returncode == 0, done.stderr


def test_every_module_imports_and_none_by_its_bare_root() -> None:
    modules = [
        "switchkd." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]
    done = python(
        "import importlib",
        f"for name in {modules!r}: importlib.import_module(name)",
        f"print([name for name in {ROOMS!r} if name in sys.modules])",
    )
    assert done.returncode == 0, done.stderr
    # stdout holds this list and nothing else: importing a module prints nothing.
    assert done.stdout == "[]\n"


def test_no_bare_root_was_loaded_by_the_tests() -> None:
    assert [room for room in ROOMS if room in sys.modules] == []


def test_recipes_are_readable_as_package_data() -> None:
    done = python(
        "from importlib import resources",
        "print(resources.files('switchkd.recipes').joinpath('__init__.py').is_file())",
    )
    assert done.stdout == "True\n", done.stderr


def test_constraints_hold_every_direct_requirement() -> None:
    pinned = {
        line.partition("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    }
    wanted = set().union(*(declared(extra) for extra in ("train", "export", "serve", "demo", "dev")))
    assert sorted(wanted - pinned - {"switchkd", "setuptools"}) == []
