"""What a lecture notebook puts on the page beside text: library source, bars, curves with spread, attention maps.

Every function displays one thing, with alt text, in the course's style. The numbers come from the caller.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from IPython.display import Markdown, display
from jaxtyping import Float
from torch import Tensor

from effnlp_lessons.widgets.style import PALETTE, course_style, new_figure, show


def show_source(item: Callable[..., Any]) -> None:
    """Display the library's own source of a function or class, and where it stands."""
    place = f"{item.__module__.replace('.', '/')}.py"
    display(Markdown(f"`{place}`\n```python\n{inspect.getsource(item)}```"))


def bars(values: dict[str, float], unit: str, caption: str) -> None:
    """Display horizontal bars, one a part, the largest first, each with its number.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values must hold at least one part, got none")
    ordered = sorted(values.items(), key=lambda item: item[1])
    with course_style():
        figure = new_figure(7.5, 0.6 + 0.36 * len(ordered))
        axes = figure.subplots()
        drawn = axes.barh([name for name, _ in ordered], [value for _, value in ordered], color=PALETTE[0])
        axes.bar_label(drawn, fmt="%.2f", padding=4)
        axes.set(xlabel=unit, xlim=(0, 1.12 * max(values.values())))
        axes.grid(axis="y", visible=False)
    described = ", ".join(f"{name} {value:.2f}" for name, value in reversed(ordered))
    show(figure, alt=f"Bars in {unit}: {described}.", caption=caption)


def lines(
    x: Sequence[float], series: dict[str, list[list[float]]], *, x_label: str, y_label: str, caption: str
) -> None:
    """Display curves on log-log axes: the median of several runs, shaded from the smallest to the largest.

    Args:
        series: `{name: [run][point]}`, each run as long as `x`.

    Raises:
        ValueError: no series, or a run of another length than `x`.
    """
    if not series or any(len(run) != len(x) for runs in series.values() for run in runs):
        raise ValueError(f"series must hold runs of {len(x)} points each, as many as x")
    with course_style():
        figure = new_figure(7.5, 3.8)
        axes = figure.subplots()
        for (name, runs), color in zip(series.items(), PALETTE, strict=False):
            points = list(zip(*runs, strict=True))
            axes.plot(x, [median(p) for p in points], color=color, marker="o", markersize=4, label=name)
            axes.fill_between(x, [min(p) for p in points], [max(p) for p in points], color=color, alpha=0.2, lw=0)
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        axes.set_xticks(x[::2], [f"{value:,g}" for value in x[::2]])
        axes.minorticks_off()
        axes.legend()
    ends = ", ".join(
        f"{name} from {median(r[0] for r in runs):.3g} to {median(r[-1] for r in runs):.3g}"
        for name, runs in series.items()
    )
    show(figure, alt=f"{y_label} against {x_label}, {x[0]:,g} to {x[-1]:,g}: {ends}.", caption=caption)


def attention_maps(weights: Float[Tensor, "heads length length"], tokens: list[str], caption: str) -> None:
    """Display one square per head: rows are queries, columns keys, dark is much weight (0 white, 1 dark).

    Raises:
        ValueError: weights that are not (heads, length, length) for these tokens.
    """
    length = len(tokens)
    if weights.ndim != 3 or weights.shape[1:] != (length, length):
        raise ValueError(f"weights must be (heads, {length}, {length}), got {tuple(weights.shape)}")
    columns = min(4, len(weights))
    rows = -(-len(weights) // columns)
    with course_style():
        figure = new_figure(9.0, 2.3 * rows + 0.5)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        shown = range(0, length, -(-length // 25))  # every token's name up to 25 tokens, then fewer
        size = 8 if length <= 14 else 6
        figure.supxlabel("key (looked at)", fontsize=9)
        figure.supylabel("query (looks)", fontsize=9)
        for head, axes in enumerate(grid.flat):
            if head >= len(weights):
                axes.set_visible(False)
                continue
            axes.imshow(weights[head].numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
            axes.set_title(f"head {head}", fontsize=9)
            axes.grid(visible=False)
            axes.set_xticks(shown, [tokens[i] for i in shown], rotation=90, fontsize=size)
            axes.set_yticks(shown, [tokens[i] for i in shown], fontsize=size)
            axes.tick_params(length=0)
    shares, keys = weights.mean(1).max(-1)  # each head's favourite key, and its mean share over the queries
    favourites = ", ".join(
        f"head {head}: {tokens[key]} {100 * share:.0f} %"
        for head, (share, key) in enumerate(zip(shares, keys, strict=True))
    )
    show(
        figure,
        alt=f"Attention weights by head. Most looked-at token of each, mean share: {favourites}.",
        caption=caption,
    )
