"""Pictures to ask about."""

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
