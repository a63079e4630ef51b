"""One state space model in three views: an equation in time, a recurrence, a convolution (notebook 13).

S4 (Gu et al. 2022, arXiv 2111.00396) is x' = A x + B u, y = C x in continuous time. A step Δ makes of it a recurrence,
x_k = Ā x_{k-1} + B̄ u_k (bilinear rule), and that is a convolution with K_i = C Āⁱ B̄. Recurrence and convolution are
equal; the equation in time is met up to an error of order Δ² for a smooth signal. Δ is how much of the model's time
passes with a sample: a smaller one stretches the kernel over more samples, and a signal sampled half as often needs 2Δ.

How C, the signals and the views are made stands in `three_views_numbers`. They are kept, so that a setting is computed
once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from ipywidgets import HBox, IntSlider, Layout, SelectionSlider, ToggleButtons, Widget
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from effnlp_lessons.widgets.picture import Explorer
from effnlp_lessons.widgets.three_views_numbers import (
    KINDS,
    LAGS,
    LEGS,
    LENGTH,
    PIECES,
    SIGNALS,
    make_model,
    pieces_of,
    run_views,
)
from effnlp_lessons.widgets.three_views_picture import ThreeViewsPicture

STATES = (4, 8, 16, 32)
RATES = {"full": 1, "half": 2, "quarter": 4}  # how many samples of the full rate become one
STEPS = tuple(round(0.01 * 2 ** (place / 4), 5) for place in range(17))  # Δ: four places double it
STAYS, FOLLOWS = "stays", "follows the rate"


class ThreeViewsExplorer(Explorer):
    """Change step, sampling rate, state and A of a model, and see kernel, state, and the output in three views.

    Args:
        kind: of A, one of `KINDS`.
        state: N, one of `STATES`.
        step: Δ at the full rate, one of `STEPS`, in units of the model's time.
        rate: "full" (128 samples), "half" or "quarter": how often the same signal is sampled.
        follows: whether Δ is doubled at half the rate, and four times as large at a quarter.
        signal: one of `SIGNALS`.
        position: the sample read last, from 1.

    Raises:
        ValueError: a choice that is not offered.
    """

    size = (9.0, 6.4)

    def __init__(
        self,
        kind: str = LEGS,
        state: int = 16,
        step: float = 0.04,
        rate: str = "full",
        follows: bool = False,
        signal: str = "steps",
        position: int = 64,
    ) -> None:
        for name, value, offered in (
            ("kind", kind, KINDS), ("state", state, STATES), ("step", step, STEPS), ("rate", rate, tuple(RATES)),
            ("follows", follows, (False, True)), ("signal", signal, SIGNALS),
        ):  # fmt: skip
            if value not in offered:
                raise ValueError(f"{name} must be one of {', '.join(map(str, offered))}, got {value!r}")
        count = LENGTH // RATES[rate]
        if position not in range(1, count + 1):
            raise ValueError(f"position must be in 1 .. {count}, got {position!r}")
        self._picture = ThreeViewsPicture()
        words, margin = {"description_width": "initial"}, "2px 16px 2px 2px"
        super().__init__(
            {
                "step": SelectionSlider(
                    options=[(f"{value:.4f}", value) for value in STEPS], value=step, description="step Δ",
                    style=words, layout=Layout(width="390px", margin=margin),
                ),
                "position": IntSlider(
                    position, 1, count, description="sample k", style=words, layout=Layout(width="430px", margin=margin)
                ),
                "rate": _buttons("sampling rate", tuple(RATES), rate),
                "follows": _buttons("model's step", (STAYS, FOLLOWS), FOLLOWS if follows else STAYS),
                "state": _buttons("state N", STATES, state),
                "kind": _buttons("A", KINDS, kind),
                "signal": _buttons("signal", SIGNALS, signal),
            }
        )  # fmt: skip

    def arrange(self) -> list[Widget]:
        rows = (("step", "position"), ("rate", "follows", "state"), ("kind", "signal"))
        wrap = Layout(flex_flow="row wrap")
        return [HBox([self.controls[name] for name in row], layout=wrap) for row in rows]

    def settle(self, name: str) -> None:
        # NOTE on the page (noUiSlider 15) the End key still goes to a slider's first largest value; all else follows
        if name == "rate":  # the reader stays at the same moment, as near as the samples allow
            slider, rate = self.controls["position"], RATES[self.controls["rate"].value]
            time = self._numbers["time"]
            slider.value = 1
            slider.max = LENGTH // rate
            slider.value = max(time // rate, 1)

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        return {"follows"} if numbers["every"] == 1 else set()

    # ------------------------------------------------------------------------ numbers

    def numbers(
        self, step: float, position: int, rate: str, follows: str, state: int, kind: str, signal: str
    ) -> dict[str, Any]:
        """The signal, the kernel and what the views give.

        Times and lags are in samples of the full rate. "every": how many of them one sample is; "model step": of the
        model's time in one sample; "delay": of one unit of the model's time. "pieces": the signal in continuous time,
        "samples" as the model reads it, "time": the end of the last one read. "kernel" by lag, its "peak" (largest
        value either way: place). Outputs "continuous" by piece, "recurrent" and "convolution" by sample, "full": by
        sample of the full rate with Δ as chosen. "x": the state at `position`. "past": (times, values) of the signal
        as x remembers it, from now back. Largest differences "apart": of recurrence and convolution; "error": of
        convolution and continuous view; "off": of convolution and "full" at the same times.
        """
        every = RATES[rate]
        model_step = step * every if follows == FOLLOWS else step
        count = LENGTH // every
        views = run_views(kind, state, model_step, signal, count)
        full = run_views(kind, state, step, signal, LENGTH).convolution
        pieces, x = pieces_of(signal), views.states[:, position - 1]
        delay, time = every / model_step, position * every
        times = time - delay * LAGS.numpy()
        begun = times >= 0
        return {
            "kind": kind,
            "state": state,
            "signal": signal,
            "rate": rate,
            "every": every,
            "step": step,
            "model step": model_step,
            "position": position,
            "time": time,
            "delay": delay,
            "pieces": pieces,
            "samples": pieces.reshape(count, -1).mean(1),
            "kernel": views.kernel,
            "peak": int(np.abs(views.kernel).argmax()),
            "continuous": views.continuous,
            "recurrent": views.recurrent,
            "convolution": views.convolution,
            "full": full,
            "x": x,
            "past": (times[begun], (make_model(kind, state).past.numpy() @ x)[begun]),
            "apart": _largest(views.recurrent - views.convolution),
            "error": _largest(views.continuous[PIECES // count - 1 :: PIECES // count] - views.convolution),
            "off": _largest(full[every - 1 :: every] - views.convolution),
        }

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        return self._picture.draw_static(figure)

    def draw(self, numbers: dict[str, Any]) -> None:
        words = {
            "heading": f"{_title(numbers)}, Δ = {numbers['model step']:.4f}",
            "kernel": f"largest {numbers['kernel'][numbers['peak']]:.3g} at lag {numbers['peak'] * numbers['every']}",
            "state": f"norm {np.linalg.norm(numbers['x']):.3g}",
            "unit": f"{numbers['delay']:.3g}",
            "recurrent": _apart(numbers["apart"]),
            "continuous": f"{numbers['error']:.3f}",
            "full": f"{numbers['off']:.3f}" if numbers["every"] > 1 else "",
        }
        self._picture.draw(numbers, words)

    def summary(self, numbers: dict[str, Any]) -> str:
        k, every, peak = numbers["position"], numbers["every"], numbers["peak"]
        count, follows = len(numbers["samples"]), numbers["model step"] > numbers["step"]
        step = f"Δ = {numbers['step']:.4f}"
        if every > 1:
            step += f" x {every} = {numbers['model step']:.4f}" if follows else ", unchanged"
        ago = f"{numbers['delay'] / every:.3g} samples" + (f" ({numbers['delay']:.3g} of the full rate)" * (every > 1))
        now = {
            "continuous": numbers["continuous"][numbers["time"] * PIECES // LENGTH - 1],
            "recurrent": numbers["recurrent"][k - 1],
            "convolution": numbers["convolution"][k - 1],
        }
        values = ", ".join(f"{name} {round(float(y), 3) + 0.0:.3f}" for name, y in now.items())  # never -0.000
        off = f", off the answer at the full rate by {numbers['off']:.3f}" if every > 1 else ""
        return (
            f"{_title(numbers)}, {numbers['signal']} at the {numbers['rate']} rate, {count} samples, {step}. One unit "
            f"of the model's time is {ago}. Kernel: largest {numbers['kernel'][peak]:.3g}, {peak} samples back. After "
            f"sample {k} of {count}: norm of x {np.linalg.norm(numbers['x']):.3g}; y {values}. Largest differences: "
            f"recurrent and convolution {_apart(numbers['apart'])}; convolution and continuous "
            f"{numbers['error']:.3f}{off}."
        )

    def describe(self, numbers: dict[str, Any]) -> str:
        return (
            "Top: the signal against time as a line, its samples as dots, and, back from the sample read last, the "
            "past as the state remembers it. Middle: the kernel against the lag, those lags filled that have a sample "
            "already, and the numbers of the state as bars. Bottom: the output against time, continuous as a line, "
            "recurrent as circles up to the sample read last, convolution as crosses, and as a dashed line the answer "
            f"at the full rate. {self.summary(numbers)}"
        )


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())


def _apart(value: float) -> str:
    """Rounding errors are not the same on every machine."""
    return "< 1e-10" if value < 1e-10 else f"{value:.1e}"


def _title(numbers: dict[str, Any]) -> str:
    return f"{numbers['kind']}, N = {numbers['state']}"


def _buttons(words: str, options: tuple, value: Any) -> ToggleButtons:
    return ToggleButtons(
        options=[(str(option), option) for option in options],
        value=value,
        description=words,
        style={"button_width": "auto", "description_width": "initial"},
        layout=Layout(width="max-content", max_width="100%", margin="2px 16px 2px 0"),
    )
