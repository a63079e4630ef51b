import io
import statistics
import time
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


@pytest.fixture
def assert_fast() -> Callable:
    """Median processor time of `events` events, act(0), act(1), ..., is under 50 ms.

    The best of three rounds decides, so that a busy machine does not.
    """

    def check(name: str, act: Callable[[int], object], events: int = 8) -> None:
        medians = []
        for _ in range(3):
            seconds = []
            for turn in range(events):
                start = time.thread_time()
                act(turn)
                seconds.append(time.thread_time() - start)
            medians.append(statistics.median(seconds))
            if medians[-1] < 0.050:
                break
        print(f"{name}: " + ", ".join(f"{1e3 * median:.1f} ms" for median in medians))
        assert min(medians) < 0.050, name

    return check
