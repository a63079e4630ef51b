"""The student's own plot: accuracy against cost of every model kept so far, in this notebook and in earlier ones.

    keep_model("08", "window 2", accuracy=53.0, examples=200, macs=..., bytes_on_disk=...)
    show_kept_models()

MACs are those of one review of `TOKENS` tokens, the mean of the course's reviews; 1 MAC = 2 FLOPs. The models last
between notebooks (`effnlp_lessons.progress`).
"""

from __future__ import annotations

import re
from math import sqrt
from typing import NamedTuple

from effnlp_lessons import progress
from effnlp_lessons.widgets.style import PALETTE, course_style, new_figure, show

TOKENS = 27


class KeptModel(NamedTuple):
    notebook: str  # its number, "08"
    name: str
    accuracy: float  # per cent of `examples` reviews of the dev split
    examples: int
    macs: int
    bytes_on_disk: int


_kept: dict[str, KeptModel] = {}  # of this kernel


def keep_model(notebook: str, name: str, *, accuracy: float, examples: int, macs: int, bytes_on_disk: int) -> None:
    """Put a model into the plot; one of the same notebook and name is replaced.

    Raises:
        ValueError: an accuracy outside 0 to 100, or a count below 1.
    """
    model = _checked(KeptModel(notebook, name, accuracy, examples, macs, bytes_on_disk))
    key = re.sub(r"\W+", "-", f"{notebook} {name}").strip("-")
    _kept[key] = model
    progress.store("models", key, model._asdict())


def _checked(model: KeptModel) -> KeptModel:
    if not 0 <= model.accuracy <= 100:
        raise ValueError(f"accuracy must be from 0 to 100 per cent, got {model.accuracy!r}")
    for name in ("examples", "macs", "bytes_on_disk"):
        if getattr(model, name) < 1:
            raise ValueError(f"{name} must be >= 1, got {getattr(model, name)!r}")
    return model


def kept_models() -> list[KeptModel]:
    """Every model kept, those of earlier notebooks too, in the order of their notebooks and names."""
    stored = {
        key: progress.load("models", key, lambda content: _checked(KeptModel(**content)))
        for key in progress.names("models")
        if key not in _kept
    }
    return sorted([*(model for model in stored.values() if model), *_kept.values()])


def show_kept_models() -> None:
    """Display accuracy against MACs, and against bytes on disk, one point a model, one colour a notebook.

    Raises:
        ValueError: if no model was kept.
    """
    models = kept_models()
    if not models:
        raise ValueError("no model was kept yet: call keep_model(...) first")
    notebooks = sorted({model.notebook for model in models})
    with course_style():
        figure = new_figure(9.0, 3.8)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, label, unit, cost in (
            (panels[0], f"million MACs, a review of {TOKENS} tokens", 1e6, lambda model: model.macs),
            (panels[1], "MB on disk", 1e6, lambda model: model.bytes_on_disk),
        ):
            for model in models:
                colour = PALETTE[notebooks.index(model.notebook) % len(PALETTE)]
                share = model.accuracy / 100
                spread = 100 * sqrt(share * (1 - share) / model.examples)  # standard error, in points
                x = cost(model) / unit
                axes.errorbar(x, model.accuracy, yerr=spread, fmt="o", color=colour, elinewidth=1, capsize=2)
                axes.annotate(f" {model.notebook} {model.name}", (x, model.accuracy), fontsize=7, va="center")
            largest = max(cost(model) for model in models) / unit
            axes.set(xlabel=label, xlim=(0, 1.8 * largest))  # room for the names
        panels[0].set_ylabel("dev accuracy (%)")
    words = "; ".join(
        f"{m.notebook} {m.name} {m.accuracy:.0f} %, {m.macs / 1e6:.0f} M MACs, {m.bytes_on_disk / 1e6:.0f} MB"
        for m in models
    )
    show(
        figure,
        alt=f"Accuracy against cost: {words}.",
        caption=(
            "Your models so far: up is better, left is cheaper. Bars: one standard error. They last between notebooks."
        ),
    )
