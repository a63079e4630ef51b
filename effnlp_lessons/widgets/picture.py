"""The base class of every explorer: controls above, one picture, one line of numbers below.

A change of a control runs one chain: control values -> `numbers` -> picture, alt text, line. What does
not change (axes, ticks, labels, curves) is drawn once and kept; an event draws the moving parts over it
("blitting"), which takes a fraction of the time of a full drawing. The picture is a single ipywidgets Image
that stays in the page, so nothing flickers and the page does not jump. No model runs in a handler: the
numbers are closed forms or recorded results.

The picture also works without a kernel (PNG and alt text are stored with the notebook's output), by
keyboard (stock ipywidgets controls) and for screen readers (the Image widget has no alt attribute; its
title, which it has, is what browsers take as the picture's name).
"""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import html
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ipywidgets
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from traitlets import Unicode

from effnlp_lessons.widgets.style import course_style, new_figure, png_bytes


class TitledImage(ipywidgets.Image):
    """An Image whose `tooltip` becomes the picture's title, and so its name for screen readers.

    NOTE the page (ipywidgets 8.1) sets a tooltip only where `description` is empty, and fails to show a
    widget that has a tooltip and no `description` at all, as a plain Image has.
    """

    description = Unicode("").tag(sync=True)

    def show(self, png: bytes, alt: str) -> None:
        """Exchange the picture and its alt text, in one message, so that the page loads one picture per event."""
        with self.hold_sync():
            self.value = png
            self.tooltip = alt


def in_turn(method: Callable[..., None]) -> Callable[..., None]:
    """Decorates a method of an explorer that handles an event: it waits until the event before is done.

    NOTE JupyterLab may deliver two messages of the page in two threads of the kernel at once: the first goes to the
    main thread, later ones to a subshell. Without a lock one event then draws into the picture of the other.
    """

    @functools.wraps(method)
    def waiting(self: Explorer, *args: Any) -> None:
        with self._turn:
            method(self, *args)

    return waiting


class Explorer(ipywidgets.VBox):
    """Base class. A subclass builds its controls, passes them to `__init__`, and defines:

    - `numbers(**values)`: the dict of everything the picture says, from the values of the controls;
    - `draw_static(figure, numbers)`: draw what stays; return the artists that move, lowest first;
    - `draw(numbers)`: put the numbers into the artists that move (set_data, set_text, set_visible ...);
    - `describe(numbers)`: the alt text;
    - `summary(numbers)`: the line below the picture, plain text.

    `__init__` draws at once: set your own attributes before `super().__init__(controls)`. Fix the limits of
    the axes in `draw_static`, since artists that move are drawn over what stays.

    It may set `size` (inches, 100 dots each), `scene` (names of the controls that change what stays, so
    that the picture is drawn anew), and define `idle(numbers)`, the names of the controls that change
    nothing at the moment: they are greyed out. Sliders and toggle buttons work by keyboard; on a closed
    drop-down list JupyterLab takes arrows and letters for its own commands, so avoid it for a few choices.

    For more than that there are `arrange()`, the rows of controls; `make_image(width, height)`, for a picture
    that takes the pointer (`painted_image`); `settle(name)`, called before the numbers, in which one control
    may change others; and `refresh()`, to be called when something else than a control has changed. A handler of
    other events than those of controls is decorated with `in_turn`.
    """

    size: tuple[float, float] = (9.0, 3.6)
    scene: tuple[str, ...] = ()

    def __init__(self, controls: dict[str, ipywidgets.ValueWidget]) -> None:
        """Show `controls` (name -> widget, in this order) and the picture of their present values."""
        unknown = set(self.scene) - set(controls)
        if unknown:
            raise ValueError(f"scene must name controls among {sorted(controls)}, got {sorted(unknown)}")
        self.controls = controls
        rows = self.arrange()
        self.image = self.make_image(*(round(100 * inches) for inches in self.size))
        self.line = ipywidgets.HTML()
        for row in rows:
            row.add_class("explorer-controls")
        self.line.add_class("explorer-line")
        super().__init__([*rows, self.image, self.line])
        self._numbers: dict[str, Any] = {}
        self._drawn_scene: tuple | None = None
        self._settling = False
        self._turn = threading.RLock()
        self.refresh()
        for name, control in controls.items():
            control.observe(functools.partial(self._on_change, name), names="value")

    # ------------------------------------------------------------------------ what a subclass defines
    # the base class has no picture of its own: calling one of these on it is a mistake of the subclass

    def numbers(self, **values: Any) -> dict[str, Any]:
        raise NotImplementedError

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        raise NotImplementedError

    def draw(self, numbers: dict[str, Any]) -> None:
        raise NotImplementedError

    def describe(self, numbers: dict[str, Any]) -> str:
        raise NotImplementedError

    def summary(self, numbers: dict[str, Any]) -> str:
        raise NotImplementedError

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        """Names of the controls that change nothing in this state."""
        return set()

    def arrange(self) -> list[ipywidgets.Widget]:
        """The rows above the picture: here one, in which the controls wrap."""
        return [ipywidgets.HBox(list(self.controls.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))]

    def make_image(self, width: int, height: int) -> ipywidgets.Widget:
        """The widget of the picture: it has `value`, the PNG, and `show(png, alt)`."""
        image = TitledImage(
            format="png",
            width=str(width),  # the room is kept before the first picture has arrived
            height=str(height),
            layout=ipywidgets.Layout(margin="0"),
        )
        image.add_class("explorer-picture")
        return image

    def settle(self, name: str) -> None:
        """Control `name` has a new value: put the others in agreement. What changes here is no further event."""

    # ------------------------------------------------------------------------ what can be read

    @property
    def values(self) -> dict[str, Any]:
        """The values of the controls by name."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def state(self) -> dict[str, Any]:
        """The numbers that the picture shows now (a copy)."""
        return copy.deepcopy(self._numbers)

    @property
    def alt(self) -> str:
        """The picture in words."""
        return self.describe(self._numbers)

    @property
    def pixels(self) -> np.ndarray:
        """The picture shown now, uint8 (height, width, 4)."""
        return np.array(self.figure.canvas.buffer_rgba())

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.values.items())
        return f"{type(self).__name__}({settings})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The live widget and, for readers without a kernel, the picture as PNG with its alt text."""
        data = super()._repr_mimebundle_(**kwargs)
        data["image/png"] = base64.b64encode(self.image.value).decode()
        return data, {"image/png": {"alt": self.alt}}

    # ------------------------------------------------------------------------ the chain of one event

    @in_turn
    def _on_change(self, name: str, change: dict) -> None:
        if self._settling:
            return
        with self.still():
            self.settle(name)
        self.refresh()

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """In this block a control may change without an event."""
        with self._turn:
            self._settling = True
            try:
                yield
            finally:
                self._settling = False

    @in_turn
    def refresh(self) -> None:
        """Compute the numbers anew and show them."""
        values = self.values
        self._numbers = self.numbers(**values)
        idle = self.idle(self._numbers)
        for name, control in self.controls.items():
            control.disabled = name in idle
        scene = tuple(values[name] for name in self.scene)
        if scene != self._drawn_scene:
            self._draw_what_stays()
            self._drawn_scene = scene
        self._draw_what_moves()
        self.image.show(png_bytes(np.asarray(self.figure.canvas.buffer_rgba())), self.alt)
        words = html.escape(self.summary(self._numbers), quote=False)
        self.line.value = f'<div style="line-height: 1.4">{words}</div>'

    def _draw_what_stays(self) -> None:
        self.figure = new_figure(*self.size)
        with course_style():
            self.moving = self.draw_static(self.figure, self._numbers)
            for place, artist in enumerate(self.moving):
                artist.set_animated(True)  # left out of the full drawing
                artist.set_in_layout(False)  # the axes keep their place whatever the numbers are
                artist.set_zorder(1_000 + place)  # as in the full drawing: above all that stays
            self.figure.canvas.draw()
        self._background = self.figure.canvas.copy_from_bbox(self.figure.bbox)

    def _draw_what_moves(self) -> None:
        canvas = self.figure.canvas
        canvas.restore_region(self._background)
        with course_style():
            self.draw(self._numbers)
            for artist in self.moving:
                artist.draw(canvas.get_renderer())
