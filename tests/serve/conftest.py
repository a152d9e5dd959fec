"""Pictures to ask about, and a bundle that writes for long."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Three pictures of different sizes: smooth colours, so that no resampling rule matters much."""

    def wave(width: int, height: int, turns: float) -> Image.Image:
        x, y = np.meshgrid(np.linspace(0, turns, width), np.linspace(0, turns, height))
        channels = [np.sin(6 * x + phase) * np.cos(4 * y + phase) for phase in (0, 1, 2)]
        return Image.fromarray(((np.stack(channels, axis=-1) + 1) * 127).astype(np.uint8))

    return [wave(24, 24, 1.0), wave(40, 30, 2.0), wave(90, 120, 3.0)]


@pytest.fixture(scope="session")
def long_bundle(tiny_bundle: Path) -> Iterator[Path]:
    """The tiny bundle, as if its model could write on for minutes. Tests must not write into it."""
    with tempfile.TemporaryDirectory(prefix="long-bundle-") as folder:
        path = Path(folder) / "long"
        shutil.copytree(tiny_bundle, path)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["model"]["max_positions"] = 1_000_000
        (path / "manifest.json").write_text(json.dumps(manifest))
        yield path
