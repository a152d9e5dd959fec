"""The wheel: what is in it, and that it answers from another directory with nothing else of ours in reach."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the tree as it stands, leaving no build folder behind in it."""
    folder = tmp_path_factory.mktemp("wheel")
    # setuptools writes build/ beside the sources; a redirected build base keeps tests that run side by side apart.
    (folder / "build.cfg").write_text(f"[build]\nbuild_base = {folder / 'build'}\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        env={**os.environ, "DIST_EXTRA_CONFIG": str(folder / "build.cfg")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    ours = [name for name in names if ".dist-info/" not in name]
    assert [name for name in ours if not name.startswith("switchkd/")] == []
    assert [name for name in ours if "test" in Path(name).name or "__pycache__" in name] == []
    assert "switchkd/__init__.py" not in ours
    built = {f"switchkd/{p.relative_to(ROOT).as_posix()}" for p in shipped_files()}
    assert built - set(ours) == set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def shipped_files() -> list[Path]:
    """Return the files that must reach a user: every module, every recipe, every stored model."""
    rooms = ("cli", "demo", "export", "recipes", "serve", "training")
    code = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    recipes = [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "training/world").glob("*.yaml")]
    pretrained = [path for path in (ROOT / "training/world/pretrained").rglob("*") if path.is_file()]
    return [path for path in code + recipes + pretrained if not any(part.startswith(".") for part in path.parts[-2:])]


def test_the_wheel_answers_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel],
        check=True,
        capture_output=True,
    )
    # -S leaves site-packages out, and with them the editable install of this very tree.
    done = subprocess.run(
        [sys.executable, "-S", "-m", "switchkd.cli.main", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: switchkd COMMAND")
    assert (target / "bin" / "switchkd").is_file()
