import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def shown() -> Callable:
    """What the page shows: the pixels in the PNG file that the Image widget holds, (height, width, 3)."""
    return lambda explorer: np.asarray(Image.open(io.BytesIO(explorer.image.value)).convert("RGB"))


@pytest.fixture
def drawn_anew() -> Callable:
    """The same figure drawn whole, nothing blitted, (height, width, 3)."""

    def draw(explorer) -> np.ndarray:
        for artist in explorer.moving:
            artist.set_animated(False)
        explorer.figure.canvas.draw()
        pixels = np.array(explorer.figure.canvas.buffer_rgba())[..., :3]
        for artist in explorer.moving:
            artist.set_animated(True)
        return pixels

    return draw
