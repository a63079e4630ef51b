"""The one look of the course's pictures: fonts, lines, a colour-blind-safe palette, how a figure is shown.

The palette is Okabe and Ito's (2008, "Color Universal Design"). Figures are made by matplotlib's object
API, never by pyplot, and look the same on every machine: the style starts from matplotlib's defaults,
so a personal matplotlibrc changes nothing.

    with course_style():
        figure = new_figure(6, 3)
        axes = figure.subplots()
        ...
    show(figure, alt="Accuracy falls from 87 to 70 % at 4 bits.", caption="Accuracy against bits.")
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib.style
import numpy as np
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#6B6B6B"  # for what stands behind the data: limits, notes; 5.3 : 1 against white
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.labelcolor": "#262626",
    "axes.labelsize": 10,
    "axes.prop_cycle": matplotlib.rcsetup.cycler("color", PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "font.size": 10,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "xtick.color": GREY,
    "xtick.labelcolor": "#262626",
    "xtick.labelsize": 9,
    "ytick.color": GREY,
    "ytick.labelcolor": "#262626",
    "ytick.labelsize": 9,
}


@contextmanager
def course_style() -> Iterator[None]:
    """Matplotlib's defaults plus the course's style, inside the block only."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(width: float = 8.0, height: float = 3.6) -> Figure:
    """An empty figure with an Agg canvas, `width` x `height` inches at 100 dots an inch, unknown to pyplot.

    Raises:
        ValueError: a width or height that is not positive.
    """
    for name, value in (("width", width), ("height", height)):
        if not value > 0:
            raise ValueError(f"{name} must be a positive number of inches, got {value!r}")
    with course_style():
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
    return figure


def png_bytes(pixels: np.ndarray) -> bytes:
    """The PNG file of `pixels`, uint8 (height, width, 4 or 3), without alpha, date or program name."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def figure_png(figure: Figure) -> bytes:
    """The PNG file of a figure: the same figure gives the same bytes."""
    with course_style():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return png_bytes(np.asarray(canvas.buffer_rgba()))


def show(figure: Figure, alt: str, caption: str) -> None:
    """Display a figure in a notebook as PNG, its alt text in `metadata["image/png"]["alt"]`, a caption below.

    Args:
        alt: what a reader who cannot see the picture needs to know, in a sentence or two.
        caption: what to see in the picture; Markdown.

    Raises:
        ValueError: an empty `alt` or `caption`.
    """
    for name, text in (("alt", alt), ("caption", caption)):
        if not text.strip():
            raise ValueError(f"{name} must say something about the figure, got {text!r}")
    data = {"image/png": base64.b64encode(figure_png(figure)).decode(), "text/plain": alt}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)
    display({"text/markdown": f"*{caption}*", "text/plain": caption}, raw=True)
