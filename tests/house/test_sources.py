"""The habits that a program can hold: sizes, names, first lines, and no trace of anybody's machine."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = ("cli", "demo", "export", "recipes", "serve", "training", "tests", "benchmarks", "docs")
LONGEST_FILE = 500
MOST_MODULES = 14  # of a folder, besides its __init__.py: more is a sign that a wall is missing
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "tools"}
# Running a file in its folder puts that folder first on the path: a module named so would be taken for the library.
LIBRARIES = {
    "onnx",
    "onnxruntime",
    "datasets",
    "tokenizers",
    "torch",
    "transformers",
    "gradio",
    "accelerate",
    "optimum",
}
BINARY = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".safetensors", ".onnx", ".npz", ".ico", ".woff2"}
# Home folders and mounts of single machines. Written in pieces, so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(
    r"(?<![\w./~:-])/(?:"
    + "|".join(("home/" + r"\w", "Users/" + r"\w", "root/", "work/", "mnt/" + r"\w", "opt/"))
    + ")"
    r"|[A-Z]:\\\\?Users"
)
# What a text names of this repository: a path from its root, and a module by its import name.
OUR_PATHS = re.compile(
    rf"(?<![\w./-])(?:{'|'.join((*SOURCE_FOLDERS, 'typings'))})/(?:[\w.*-]+/)*(?:[\w*-]+\.(?:py|md|yaml|json|c|mjs)\b)?"
)
OUR_NAMES = re.compile(r"(?<![\w./-])switchkd(?:\.[a-zA-Z]\w*)+(?![\w.]*/)")


def source_files(root: Path) -> list[Path]:
    """Return every Python file of ours."""
    return sorted(path for folder in SOURCE_FOLDERS for path in (root / folder).rglob("*.py"))


def misnamed_modules(paths: list[Path]) -> list[str]:
    """Return the modules that are named after a library, or after nothing."""
    taken = LIBRARIES | set(metadata.packages_distributions()) | set(sys.stdlib_module_names) | EMPTY_NAMES
    allowed = {"__init__", "__main__", "conftest"}
    return [str(path) for path in paths if path.stem in taken - allowed]


def tracked_files() -> list[Path]:
    """Return every file that git holds or would add; all files of the tree where this is no git checkout."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listing.stdout.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def machine_paths(text: str) -> list[str]:
    """Return what looks like a path on one person's machine."""
    return [match.group() for match in MACHINE_PATHS.finditer(text)]


def broken_links(document: Path) -> list[str]:
    """Return the relative links and pictures of a Markdown file that lead nowhere."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    local = (target for target in targets if not re.match(r"[a-z]+:|#", target))
    return [target for target in local if not (document.parent / target.partition("#")[0]).exists()]


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in source_files(ROOT)}
    assert {str(path): length for path, length in lengths.items() if length >= LONGEST_FILE} == {}


def crowded_folders(paths: list[Path]) -> dict[str, int]:
    """Return the folders with more modules than a newcomer reads one by one, and how many those are."""
    modules = Counter(str(path.parent) for path in paths if path.name != "__init__.py")
    return {folder: count for folder, count in modules.items() if count > MOST_MODULES}


def dead_paths(text: str) -> list[str]:
    """Return the files, folders and modules of ours that a text names and that are not there."""
    named = {match.group().rstrip(".") for match in OUR_PATHS.finditer(text)}
    paths = {path for path in named if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())}
    return sorted(paths | {name for name in OUR_NAMES.findall(text) if not leads_somewhere(name)})


def leads_somewhere(name: str) -> bool:
    """Tell whether a dotted name is a module of ours or something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_folders_stay_small() -> None:
    assert crowded_folders(source_files(ROOT)) == {}
    planted = [Path("serve") / f"part_{number}.py" for number in range(15)]
    assert crowded_folders([*planted, Path("serve/__init__.py")]) == {"serve": 15}
    assert crowded_folders(planted[1:]) == {}


def test_every_file_says_what_it_is() -> None:
    silent = [p for p in source_files(ROOT) if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
    assert [str(path) for path in silent] == []


def test_modules_have_names_of_their_own() -> None:
    assert misnamed_modules(source_files(ROOT)) == []
    planted = [
        Path("export/onnx.py"),
        Path("serve/queue.py"),
        Path("training/utils.py"),
        Path("serve/sampling.py"),
    ]
    assert misnamed_modules(planted) == ["export/onnx.py", "serve/queue.py", "training/utils.py"]


def test_no_file_knows_a_machine() -> None:
    found = {
        str(path.relative_to(ROOT)): paths
        for path in tracked_files()
        if path.suffix not in BINARY and (paths := machine_paths(path.read_text(encoding="utf-8", errors="replace")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "path", ["/home" + "/ada/model", "/Users" + "/ada", "/root" + "/.cache", "C:\\" + "Users\\ada"]
)
def test_a_planted_machine_path_is_found(path: str) -> None:
    assert machine_paths(f"model = '{path}'")


def test_ordinary_paths_are_left_alone() -> None:
    assert (
        machine_paths("see docs/home/index.md, https://host/home/x, ./work/file, ./root/file and runs/quickstart") == []
    )


def test_paths_and_modules_that_texts_name_are_there() -> None:
    """In comments, messages, recipes and documents; the changelog tells of earlier houses, tests of the house plant."""
    dead = {
        str(path.relative_to(ROOT)): found
        for path in tracked_files()
        if path.suffix not in BINARY | {".json"}
        and path.name != "CHANGELOG.md"
        and path.parent != Path(__file__).parent
        and (found := dead_paths(path.read_text(encoding="utf-8")))
    }
    assert dead == {}


@pytest.mark.parametrize(
    "text",
    [
        "see export/verification.py.",
        "`training/no_such_room/` holds it",
        "(docs/no_such_page.md)",
        "per-file: training/no_such_room/*.py",
        "import switchkd.training.no_such_module",
        "from switchkd.training.data import nothing; switchkd.training.data.nothing",
    ],
)
def test_a_planted_dead_path_is_found(text: str) -> None:
    assert len(dead_paths(text)) == 1


def test_paths_of_others_are_left_alone() -> None:
    assert (
        dead_paths("runs/export/model, my-export/verification.py, https://host/docs/x, training/objectives/*.py") == []
    )
    assert (
        dead_paths("switchkd.training.load_vlm, switchkd.export.contract.Bundle, training/data/, benchmarks/step.py")
        == []
    )


def test_links_between_documents_lead_somewhere() -> None:
    documents = [path for path in tracked_files() if path.suffix == ".md" and "pretrained" not in path.parts]
    assert ROOT / "README.md" in documents
    assert {str(d.relative_to(ROOT)): links for d in documents if (links := broken_links(d))} == {}


def test_a_planted_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "here.md").write_text("x", encoding="utf-8")
    document = tmp_path / "README.md"
    document.write_text(
        '[a](here.md#part) [b](gone.md) <img src="gone.png"> [c](https://x.org) [d](#e)', encoding="utf-8"
    )
    assert broken_links(document) == ["gone.md", "gone.png"]
