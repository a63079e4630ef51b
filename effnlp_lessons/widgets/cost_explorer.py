"""Where one Transformer layer spends its work as the text grows (notebook 00).

In multiply-accumulates (MACs), attention's projections and the feed-forward grow with the length n, the
scores and their mixing with n²: 4 d² n, 2 d d_ff n and 2 n² d. So scores and mixing equal the feed-forward
at n = d_ff, which is 4 d in BERT's family (Devlin et al. 2018, arXiv 1810.04805), beyond the 512
positions it was trained for. On the clock they are equal at another length: the recorded times say where.

The MACs are the closed forms of `effnlp_lessons.measure`; the times come from a recorded study and are
only looked up here: no model runs when a knob is turned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from effnlp_lessons.measure import block_macs, crossing
from effnlp_lessons.transformer import BERT_BASE, BERT_LARGE, MINILM_L6
from effnlp_lessons.widgets.picture import Explorer
from effnlp_lessons.widgets.style import BLACK, BLUE, GREEN, GREY, VERMILION

MODELS = {"MiniLM-L6": MINILM_L6, "BERT-base": BERT_BASE, "BERT-large": BERT_LARGE}
PARTS = ("attention projections", "attention scores and mixing", "feed-forward")
SCORES, FEED_FORWARD = PARTS[1], PARTS[2]
LOOK = {PARTS[0]: (GREEN, "s"), PARTS[1]: (BLUE, "o"), PARTS[2]: (VERMILION, "^")}
# four steps an octave, 32 to 4,096: every landmark (512, 768, 1,024, 1,536, 3,072, 4,096) is a step
LENGTHS = tuple(step * 2**octave for octave in range(7) for step in (32, 40, 48, 56)) + (4_096,)

Times = dict[str, tuple[Sequence[int], Sequence[float], Sequence[float], Sequence[float]]]


def format_macs(macs: float) -> str:
    """37_748_736 -> '37.7 M', 1_207_959_552 -> '1.21 G'."""
    return f"{macs / 1e9:.3g} G" if macs >= 999.5e6 else f"{macs / 1e6:.3g} M"


def format_seconds(seconds: float) -> str:
    """0.00312 -> '3.12 ms'."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1e3:.3g} ms"


def percent(share: float) -> str:
    """0.3158 -> '31.6 %'."""
    return f"{100 * share:.1f} %"


def time_at(record: tuple, length: int) -> float | None:
    """Median seconds at `length`, between its recorded neighbours on log-log axes; None outside them."""
    lengths, median = np.asarray(record[0], float), np.asarray(record[1], float)
    if not lengths[0] <= length <= lengths[-1]:
        return None
    return float(np.exp(np.interp(np.log(length), np.log(lengths), np.log(median))))


def check_times(times: Times) -> None:
    """Raise a ValueError unless `times` has the three parts, each with four sequences of one size."""
    if set(times) != set(PARTS):
        raise ValueError(f"times must have the parts {sorted(PARTS)}, got {sorted(times)}")
    for part, record in times.items():
        if len(record) != 4 or len({len(column) for column in record}) != 1 or len(record[0]) < 2:
            raise ValueError(f"times[{part!r}] must be (lengths, median, low, high) of one size >= 2")
        if any(b <= a for a, b in zip(record[0], record[0][1:], strict=False)) or min(map(min, record)) <= 0:
            raise ValueError(f"times[{part!r}] must have rising lengths and positive seconds, got {record!r}")
        if list(record[0]) != list(times[SCORES][0]):
            raise ValueError(f"times[{part!r}] must have the lengths of {SCORES!r}, got {record[0]!r}")


class CostExplorer(Explorer):
    """Drag the length and see which part of a layer the work goes to, in MACs or on the clock.

    Args:
        length: tokens at the start, one of `LENGTHS`.
        model: "MiniLM-L6", "BERT-base" or "BERT-large".
        view: "MACs" or "clock".
        times: seconds of one layer by part, `{part: (lengths, median, low, high)}`, or None.
        timed_model: the model that `times` belong to.

    Raises:
        ValueError: a length, model or view that is not offered; times of another shape.
    """

    size = (9.0, 3.9)
    scene = ("model", "view")

    def __init__(
        self,
        length: int = 128,
        model: str = "MiniLM-L6",
        view: str = "MACs",
        times: Times | None = None,
        timed_model: str = "MiniLM-L6",
    ) -> None:
        for name, value, allowed in (
            ("length", length, LENGTHS),
            ("model", model, tuple(MODELS)),
            ("view", view, ("MACs", "clock")),
            ("timed_model", timed_model, tuple(MODELS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if times is not None:
            check_times(times)
        self._times = {timed_model: times} if times is not None else {}
        super().__init__(
            {
                "length": ipywidgets.SelectionSlider(
                    options=[(f"{n:,}", n) for n in LENGTHS],
                    value=length,
                    description="tokens",
                    style={"description_width": "initial"},
                    layout=ipywidgets.Layout(width="380px"),
                ),
                "model": ipywidgets.ToggleButtons(
                    options=list(MODELS),
                    value=model,
                    style={"button_width": "100px"},
                    layout=ipywidgets.Layout(width="max-content"),
                ),
                "view": ipywidgets.ToggleButtons(
                    options=["MACs", "clock"],
                    value=view,
                    tooltips=["multiply-accumulates, counted", "seconds, recorded"],
                    style={"button_width": "65px"},
                    layout=ipywidgets.Layout(width="max-content", margin="2px 2px 2px 20px"),
                ),
            }
        )

    # ------------------------------------------------------------------------ numbers

    def numbers(self, length: int, model: str, view: str) -> dict[str, Any]:
        """Cost and share of each part at this length, and where scores and mixing overtake the feed-forward.

        `cost` (MACs or seconds), `total` and `share` are None where no time is recorded.
        """
        config, times = MODELS[model], self._times.get(model)
        on_the_clock = crossing(times[SCORES][0], times[SCORES][1], times[FEED_FORWARD][1]) if times else None
        if view == "MACs":
            macs = block_macs(config, length)
            cost = {part: macs[part] for part in PARTS}
        else:
            cost = {part: time_at(times[part], length) for part in PARTS} if times else None
            if cost and None in cost.values():
                cost = None
        total = sum(cost.values()) if cost else None
        return {
            "length": length,
            "model": model,
            "view": view,
            "cost": cost,
            "total": total,
            "share": {part: cost[part] / total for part in PARTS} if cost else None,
            "crossing": {"MACs": config.d_ff, "clock": on_the_clock},
            "interpolated": view == "clock" and cost is not None and length not in times[SCORES][0],
            "timed": times is not None,
            "positions": config.max_length,
        }

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        return {"length"} if numbers["view"] == "clock" and not numbers["timed"] else set()

    # ------------------------------------------------------------------------ picture

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        figure.set_layout_engine("none")  # fixed places: the axes stay put when model or view change
        curves, shares = figure.add_axes((0.08, 0.13, 0.42, 0.77)), figure.add_axes((0.65, 0.13, 0.34, 0.77))
        unit = "MACs" if numbers["view"] == "MACs" else "recorded time"
        curves.set_title(f"One layer of {numbers['model']}: {unit}")
        if numbers["view"] == "clock" and not numbers["timed"]:
            curves.set(xticks=[], yticks=[])
            words = f"not recorded:\nno times for {numbers['model']}"
            curves.text(0.5, 0.5, words, transform=curves.transAxes, ha="center")
        else:
            self._draw_curves(curves, numbers)
            self._draw_landmarks(curves, numbers)
        self._here = curves.vlines(1, 1, 1, color=BLACK, linewidth=1.2)
        self._dots = [
            curves.plot([1], [1], mark, color=colour, markeredgecolor="white", markersize=10)[0]
            for colour, mark in LOOK.values()
        ]
        shares.set(xlim=(0, 1.4), ylim=(2.6, -0.6), xlabel="share of the layer")
        shares.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0", "25", "50", "75", "100 %"))
        names = ("attention\nprojections", "attention\nscores and\nmixing", "feed-forward")
        shares.set_yticks(range(3), names)
        shares.tick_params(axis="y", length=0, pad=20)
        shares.grid(False, axis="y")
        for row, (colour, mark) in enumerate(LOOK.values()):  # the curves' legend too
            shares.plot(-0.07, row, mark, color=colour, markersize=8, clip_on=False)
        colours = [colour for colour, _ in LOOK.values()]
        self._bars = list(shares.barh(range(3), 0.5, color=colours, height=0.55))
        self._amounts = [shares.text(0, row, "", va="center") for row in range(3)]
        self._heading = shares.set_title("", y=1.0)
        return [self._here, *self._dots, *self._bars, *self._amounts, self._heading]

    def _draw_curves(self, axes: Axes, numbers: dict[str, Any]) -> None:
        """The cost of each part against the length, on log-log axes: n² is twice as steep as n."""
        write = format_macs if numbers["view"] == "MACs" else format_seconds
        axes.set(xscale="log", yscale="log", xlim=(28, 4_700), xlabel="length (tokens)")
        axes.xaxis.set(major_locator=FixedLocator([32 * 2**k for k in range(8)]), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda cost, _: write(cost)))
        for part, (colour, mark) in LOOK.items():
            if numbers["view"] == "MACs":
                config = MODELS[numbers["model"]]
                axes.plot(LENGTHS, [block_macs(config, n)[part] for n in LENGTHS], color=colour)
            else:
                lengths, median, low, high = self._times[numbers["model"]][part]
                axes.plot(lengths, median, mark + "-", color=colour, markersize=4)
                axes.fill_between(lengths, low, high, color=colour, alpha=0.25, linewidth=0)
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top * (top / bottom) ** 0.08)  # room for the landmarks' words

    def _draw_landmarks(self, axes: Axes, numbers: dict[str, Any]) -> None:
        """The model's last position, and where scores and mixing equal the feed-forward.

        Ring: in MACs; diamond: on the clock, shown there only, so that a reader can guess it first. The
        ring is on the curves in its own view, on the clock at the lower edge.
        """
        model, view, positions = numbers["model"], numbers["view"], numbers["positions"]
        lower_edge = axes.get_xaxis_transform()  # x in tokens, y in shares of the axes' height
        axes.axvline(positions, color=GREY, linewidth=1.2, linestyle=":")
        words = f"{model} has\n{positions} positions"
        axes.text(positions * 1.07, 0.985, words, transform=lower_edge, va="top", color=GREY, fontsize=9)
        for name, mark in (("MACs", "o"), ("clock", "D")):
            length = numbers["crossing"][name]
            if length is None or (name, view) == ("clock", "MACs"):
                continue
            words = f"in MACs: {length:,}" if name == "MACs" else f"on the clock: about {round(length, -1):,.0f}"
            if name != view:
                height, transform = 0.05, lower_edge
            else:
                height, transform = self.numbers(length, model, view)["cost"][FEED_FORWARD], axes.transData
            axes.plot(
                length, height, mark, transform=transform, markersize=12 if name == view else 8, color="none",
                markeredgecolor=BLACK, markeredgewidth=1.5, label=words,
            )  # fmt: skip
        axes.legend(
            title="scores and mixing\n= feed-forward", loc="upper left", fontsize=9, title_fontsize=9,
            alignment="left", borderpad=0, borderaxespad=0.3, handletextpad=0.3,
        )  # fmt: skip

    def draw(self, numbers: dict[str, Any]) -> None:
        length, cost, share = numbers["length"], numbers["cost"], numbers["share"]
        write = format_macs if numbers["view"] == "MACs" else format_seconds
        for artist in self.moving[:-1]:
            artist.set_visible(cost is not None)
        if cost is None:
            self._heading.set_text(f"{length:,} tokens: not recorded")
            return
        self._heading.set_text(
            f"{length:,} tokens: {write(numbers['total'])}"
            + (" MACs" if numbers["view"] == "MACs" else ", interpolated" if numbers["interpolated"] else "")
        )
        bottom, _ = self._here.axes.get_ylim()
        self._here.set_segments([[(length, bottom), (length, max(cost.values()))]])
        for part, dot, bar, amount in zip(PARTS, self._dots, self._bars, self._amounts, strict=True):
            dot.set_data([length], [cost[part]])
            bar.set_width(share[part])
            amount.set(x=share[part] + 0.03, text=f"{percent(share[part])}\n{write(cost[part])}")

    # ------------------------------------------------------------------------ words

    def summary(self, numbers: dict[str, Any]) -> str:
        head = f"{numbers['length']:,} tokens: "
        if numbers["cost"] is None:
            head += "not recorded."
        else:
            on_macs = numbers["view"] == "MACs"
            head += format_macs(numbers["total"]) + " MACs" if on_macs else format_seconds(numbers["total"])
            head += " a layer" + (" (interpolated between recorded lengths)" if numbers["interpolated"] else "")
            head += f"; {', '.join(f'{part} {percent(share)}' for part, share in numbers['share'].items())}."
        macs, clock = numbers["crossing"]["MACs"], numbers["crossing"]["clock"]
        if numbers["view"] == "MACs":
            return f"{head} Scores and mixing equal the feed-forward at {macs:,} tokens."
        where = "at no recorded length" if clock is None else f"at about {round(clock, -1):,.0f} tokens"
        return f"{head} Scores and mixing equal the feed-forward {where}; in MACs at {macs:,}."

    def describe(self, numbers: dict[str, Any]) -> str:
        what = "MACs" if numbers["view"] == "MACs" else "recorded time"
        return (
            f"Two charts for one layer of {numbers['model']}. Left: {what} of its three parts against the "
            f"length, 32 to 4,096 tokens, with a mark at {numbers['length']:,} and the model's "
            f"{numbers['positions']} positions shown. Right: the share of each part. {self.summary(numbers)}"
        )
