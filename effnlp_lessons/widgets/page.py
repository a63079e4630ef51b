"""What a lecture notebook puts on the page beside text: library source, bars, curves and dots with spread, maps.

Every function displays one thing, with alt text, in the course's style. The numbers come from the caller.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from IPython.display import Markdown, display
from jaxtyping import Bool, Float, UInt8
from matplotlib.colors import ListedColormap
from matplotlib.ticker import FormatStrFormatter, LogLocator
from torch import Tensor

from effnlp_lessons.widgets.style import BLUE, GREY, PALETTE, course_style, new_figure, show


def show_source(item: Callable[..., Any]) -> None:
    """Display the library's own source of a function, class or Triton kernel, and where it stands."""
    item = getattr(item, "fn", item)  # a kernel keeps its function there
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
        ticks = x if len(x) < 6 else x[::2]
        axes.set_xticks(ticks, [f"{value:,g}" for value in ticks])
        axes.minorticks_off()
        values = [value for runs in series.values() for run in runs for value in run]
        decades = math.log10(max(values) / min(values))
        if decades < 1.5:  # powers of ten alone would be too few ticks
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5)))
            axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.legend()
    ends = ", ".join(
        f"{name} from {median(r[0] for r in runs):.3g} to {median(r[-1] for r in runs):.3g}"
        for name, runs in series.items()
    )
    show(figure, alt=f"{y_label} against {x_label}, {x[0]:,g} to {x[-1]:,g}: {ends}.", caption=caption)


def curves(
    x: Sequence[float],
    series: dict[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    caption: str,
    marks: dict[str, float] | None = None,
    points: bool = False,
    log_y: bool = False,
) -> None:
    """Display curves over one plain axis, one number a point.

    Args:
        series: `{name: [point]}`, each as long as `x`.
        marks: `{name: x}`, vertical lines with their names above.
        points: mark every point of a curve.
        log_y: a logarithmic vertical axis.

    Raises:
        ValueError: no series, or one of another length than `x`.
    """
    if not series or any(len(values) != len(x) for values in series.values()):
        raise ValueError(f"series must hold {len(x)} points each, as many as x")
    with course_style():
        figure = new_figure(7.5, 3.8)
        axes = figure.subplots()
        for place, (name, values) in enumerate(series.items()):
            color, style = PALETTE[place % len(PALETTE)], ("-", "--", ":", "-.")[place % 4]
            axes.plot(x, values, color=color, linestyle=style, marker="o" if points else None, markersize=4, label=name)
        for place, (name, at) in enumerate((marks or {}).items()):
            axes.axvline(at, color=GREY, linewidth=1)
            axes.annotate(f"{name} {at:.3g}", (at, 0.98 - 0.07 * (place % 4)), xycoords=("data", "axes fraction"),
                          xytext=(3, 0), textcoords="offset points", fontsize=8, va="top")  # fmt: skip
        axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if log_y else "linear")
        axes.legend(fontsize=8)
    ends = ", ".join(f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, values in series.items())
    at = "".join(f"; {name} at {value:.3g}" for name, value in (marks or {}).items())
    show(figure, alt=f"{y_label} against {x_label}, {x[0]:.3g} to {x[-1]:.3g}: {ends}{at}.", caption=caption)


def attention_maps(
    weights: Float[Tensor, "heads length length"],
    tokens: list[str],
    caption: str,
    titles: Sequence[str] | None = None,
) -> None:
    """Display one square per head: rows are queries, columns keys, dark is much weight (0 white, 1 dark).

    `titles` stand above the squares; default: head 0, head 1, ...

    Raises:
        ValueError: weights that are not (heads, length, length) for these tokens.
    """
    length = len(tokens)
    if weights.ndim != 3 or weights.shape[1:] != (length, length):
        raise ValueError(f"weights must be (heads, {length}, {length}), got {tuple(weights.shape)}")
    titles = [f"head {head}" for head in range(len(weights))] if titles is None else titles
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
            axes.set_title(titles[head], fontsize=9)
            axes.grid(visible=False)
            axes.set_xticks(shown, [tokens[i] for i in shown], rotation=90, fontsize=size)
            axes.set_yticks(shown, [tokens[i] for i in shown], fontsize=size)
            axes.tick_params(length=0)
    shares, keys = weights.mean(1).max(-1)  # each head's favourite key, and its mean share over the queries
    favourites = ", ".join(
        f"{title}: {tokens[key]} {100 * share:.0f} %" for title, share, key in zip(titles, shares, keys, strict=True)
    )
    show(
        figure,
        alt=f"Attention weights by head. Most looked-at token of each, mean share: {favourites}.",
        caption=caption,
    )


def images(pictures: dict[str, UInt8[Tensor, "height width"]], caption: str) -> None:
    """Display small pictures side by side, 0 white and 255 black, each under its name.

    Raises:
        ValueError: no pictures, or one that is not two-dimensional.
    """
    if not pictures or any(picture.ndim != 2 for picture in pictures.values()):
        raise ValueError("pictures must hold at least one tensor (height, width), and nothing else")
    with course_style():
        figure = new_figure(1.6 * len(pictures), 1.9)
        for axes, (name, picture) in zip(
            figure.subplots(1, len(pictures), squeeze=False)[0], pictures.items(), strict=True
        ):
            axes.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(name, fontsize=10)
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
    show(figure, alt=f"Small pictures: {', '.join(pictures)}.", caption=caption)


def pattern_maps(masks: dict[str, Bool[Tensor, "queries keys"]], caption: str, unit: str = "pairs") -> None:
    """Display one square per mask: rows are queries, columns keys, dark may attend; above it the share of pairs.

    Args:
        unit: what an entry of a mask stands for.

    Raises:
        ValueError: no masks, or one that is not bool and two-dimensional.
    """
    if not masks or any(mask.ndim != 2 or mask.dtype != torch.bool for mask in masks.values()):
        raise ValueError("masks must hold at least one bool tensor (queries, keys), and nothing else")
    columns = min(4, len(masks))
    rows = -(-len(masks) // columns)
    with course_style():
        figure = new_figure(2.4 * columns, 2.6 * rows + 0.2)
        grid = figure.subplots(rows, columns, squeeze=False)
        figure.supxlabel("key", fontsize=9)
        figure.supylabel("query", fontsize=9)
        for place, axes in enumerate(grid.flat):
            axes.set_visible(place < len(masks))
        for axes, (name, mask) in zip(grid.flat, masks.items(), strict=False):
            axes.imshow(mask.numpy(), cmap=ListedColormap(["white", BLUE]), vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(f"{name}: {_percent(mask)}", fontsize=9)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
            axes.grid(visible=False)
    shares = ", ".join(f"{name} {_percent(mask)} of all {unit}" for name, mask in masks.items())
    show(figure, alt=f"Masks, queries down and keys across: {shares}.", caption=caption)


def _percent(mask: Tensor) -> str:
    return f"{100 * mask.float().mean():.0f} %"


def dots(
    rows: dict[str, dict[str, tuple[float, float, float]]],
    *,
    grey: Sequence[str] = (),
    from_zero: bool = True,
    caption: str,
) -> None:
    """Display one panel per quantity and one line per row: a dot at the median, a bar from a low to a high value.

    Args:
        rows: `{row: {quantity: (median, low, high)}}`, drawn from the top; every row has the same quantities.
        grey: names of rows that stand for comparison.
        from_zero: begin the axes at 0; else at what is shown.

    Raises:
        ValueError: no rows, or rows with different quantities.
    """
    quantities = list(next(iter(rows.values()), {}))
    if not quantities or any(list(row) != quantities for row in rows.values()):
        raise ValueError("rows must hold at least one row, all with the same quantities")
    with course_style():
        figure = new_figure(9.0, 0.9 + 0.3 * len(rows))
        panels = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
        for axes, quantity in zip(panels, quantities, strict=True):
            for place, (name, row) in enumerate(rows.items()):
                middle, low, high = row[quantity]
                color = GREY if name in grey else BLUE
                axes.plot([low, high], [place, place], color=color, alpha=0.4, linewidth=5, solid_capstyle="butt")
                axes.plot(middle, place, "D" if name in grey else "o", color=color)
            axes.set_xlabel(quantity)
            if from_zero:
                axes.set_xlim(0, None)
            axes.grid(axis="y", visible=False)
        panels[0].set_yticks(range(len(rows)), rows)
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
    described = "; ".join(
        f"{name} " + ", ".join(f"{quantity} {row[quantity][0]:.2f}" for quantity in quantities)
        for name, row in rows.items()
    )
    show(figure, alt=f"Medians: {described}.", caption=caption)


def head_grid(names: Sequence[str], layers: int, caption: str) -> None:
    """Display one cell per head, rows are layers, coloured and lettered by `names`, one name per head.

    Raises:
        ValueError: as many names as no whole number of heads in each layer.
    """
    if layers < 1 or len(names) % layers or not names:
        raise ValueError(f"names must be {layers} layers of equally many heads, got {len(names)}")
    heads, kinds = len(names) // layers, sorted(set(names), key=lambda name: (-list(names).count(name), name))
    with course_style():
        figure = new_figure(9.0, 0.9 + 0.4 * layers)
        axes = figure.subplots()
        numbers = [[kinds.index(names[layer * heads + head]) for head in range(heads)] for layer in range(layers)]
        colors = ListedColormap([f"{PALETTE[kind % len(PALETTE)]}66" for kind in range(len(kinds))])
        axes.imshow(numbers, cmap=colors, vmin=-0.5, vmax=len(kinds) - 0.5, aspect="auto")
        for layer in range(layers):
            for head in range(heads):
                words = textwrap.fill(names[layer * heads + head], 8)
                axes.text(head, layer, words, ha="center", va="center", fontsize=7)
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers))
        axes.set(xlabel="head", ylabel="layer")
        axes.grid(visible=False)
        axes.tick_params(length=0)
    counts = ", ".join(f"{kind} {list(names).count(kind)}" for kind in kinds)
    show(figure, alt=f"A grid of {layers} layers and {heads} heads. Heads by name: {counts}.", caption=caption)
