"""A student that never saw a 3: what it learned of 3s from soft targets, and what temperature does (notebook 01).

Digit 3 is left out of the transfer set (Hinton, Vinyals, Dean 2015, arXiv 1503.02531, sec. 3). A student of soft
targets still learned 3s from what the teacher says of other digits, but the bias of its class 3 is too low: no target
ever asked for a 3. Raising this one bias shows what was learned; raised too far, other digits are called 3.

Top left: the share of right answers against the raised bias. Top right: the size of the gradient (Eq. 2) against the
temperature, for a student whose logits are all equal; without the factor T^2 it falls like 1 / T^2. Below: one test
digit, what its target would be in the transfer set, and the student's answer at T = 1.

The logits come from a recorded study. What a control changes is looked up, or a softmax of ten numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ipywidgets import HBox, Label, Layout, SelectionSlider, ToggleButtons
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor
from torch.nn.functional import one_hot

from effnlp_lessons.datasets.digits import CLASSES, Digits, load_digits
from effnlp_lessons.distillation.hinton import soft_gradient, softened_probabilities
from effnlp_lessons.widgets.cost_explorer import percent
from effnlp_lessons.widgets.picture import Explorer
from effnlp_lessons.widgets.style import BLACK, BLUE, GREEN, GREY, PURPLE, VERMILION

OMITTED = 3
TEACHER, HARD = "teacher", "hard"
TEMPERATURES = {"1": 1.0, "2": 2.0, "4": 4.0, "8": 8.0, "20": 20.0}  # name of the student -> T of its targets
STUDENTS = (HARD, *TEMPERATURES)
SHIFTS = tuple(step / 4 for step in range(33))  # 0 to 8
LOOKALIKES = 3
LOOK = {"threes": (VERMILION, "o"), "others": (BLUE, "s"), "rescaled": (GREEN, "D"), "gradient": (PURPLE, "^")}
GRID = tuple(sorted({*TEMPERATURES.values(), *np.geomspace(1, 20, 20).tolist()}))  # temperatures of the curves

Logits = dict[str, Float[Tensor, "rows classes"]]


def check_logits(logits: Logits, digits: Digits) -> None:
    """Raise a ValueError unless `logits` has teacher and students with one finite row of ten for each digit.

    The teacher must be right on half of the images of every digit: with rows in another order it would not be.
    """
    if set(logits) != {TEACHER, *STUDENTS}:
        raise ValueError(f"logits must have the keys {(TEACHER, *STUDENTS)}, got {tuple(logits)}")
    expected = (len(digits), CLASSES)
    for name, rows in logits.items():
        if rows.shape != expected or not rows.is_floating_point():
            raise ValueError(f"logits[{name!r}] must be floats {expected}, got {rows.dtype} {tuple(rows.shape)}")
        if not rows.isfinite().all():
            raise ValueError(f"logits[{name!r}] must be finite, got {rows[~rows.isfinite()][0].item()}")
    right = logits[TEACHER].argmax(-1) == digits.labels
    for digit in range(CLASSES):
        share = right[digits.labels == digit].float().mean().item()
        if not share >= 0.5:
            raise ValueError(f"logits['teacher'] must be right on half of the {digit}s at least, got {percent(share)}")


def with_shift(logits: Float[Tensor, "*rows classes"], shift: float) -> Float[Tensor, "*rows classes"]:
    """The logits after the bias of class 3 has been raised by `shift`, as `shift_bias_` does it in the network."""
    shifted = logits.clone()
    shifted[..., OMITTED] += shift
    return shifted


def chosen_rows(teacher_logits: Float[Tensor, "rows classes"], digits: Digits) -> dict[str, int]:
    """Name -> row of the digits to look at, among those that the teacher names right.

    Three 3s by how far the teacher's logit of 3 stands above the next: the farthest, the median, the least. And the
    lookalikes: of each other digit the image whose logit of 3 comes closest to that of the digit; the three closest.
    """
    labels, rows = digits.labels, torch.arange(len(digits))
    right = teacher_logits.argmax(-1) == labels
    others = teacher_logits.clone()
    others[:, OMITTED] = -torch.inf
    above = teacher_logits[:, OMITTED] - others.amax(-1)
    threes = rows[right & (labels == OMITTED)]
    threes = threes[above[threes].argsort(stable=True)].tolist()
    chosen = {"clear 3": threes[-1], "median 3": threes[(len(threes) - 1) // 2], "doubtful 3": threes[0]}
    lacking = teacher_logits.gather(1, labels[:, None])[:, 0] - teacher_logits[:, OMITTED]
    nearest = []
    for digit in range(CLASSES):
        if digit != OMITTED:
            of_digit = rows[right & (labels == digit)]
            row = int(of_digit[lacking[of_digit].argmin()])
            nearest.append((lacking[row].item(), digit, row))
    return chosen | {f"{digit} like a 3": row for _, digit, row in sorted(nearest)[:LOOKALIKES]}


def along_shifts(logits: Float[Tensor, "rows classes"], digits: Digits) -> dict[str, list]:
    """What a student gets right and wrong at each of `SHIFTS`.

    Shares of right answers among "threes" and "others"; numbers of "errors", of "errors_on_threes", and of other
    digits "called_three".
    """
    threes, columns = digits.labels == OMITTED, {}
    for shift in SHIFTS:
        answers = with_shift(logits, shift).argmax(-1)
        right = answers == digits.labels
        at_shift = {
            "threes": right[threes].double().mean(),
            "others": right[~threes].double().mean(),
            "errors": (~right).sum(),
            "errors_on_threes": (~right[threes]).sum(),
            "called_three": (answers[~threes] == OMITTED).sum(),
        }
        for name, number in at_shift.items():
            columns.setdefault(name, []).append(number.item())
    return columns


def gradient_size(teacher_logits: Float[Tensor, "rows classes"], temperature: float) -> float:
    """Norm of (q - p) / T of one image (Eq. 2), mean over the images, for a student with equal logits: q = 1 / 10."""
    # `soft_gradient` is that of the mean over the images: times their number it is that of each
    each = soft_gradient(torch.zeros_like(teacher_logits), teacher_logits, temperature) * len(teacher_logits)
    return each.norm(dim=-1).mean().item()


def chance(probability: float, digits: int = 3) -> str:
    """0.12345 -> '0.123', 1e-6 -> 'below 0.001', 0.99999 -> 'above 0.999'; 0 and 1 stay as they are."""
    least = 10**-digits
    if probability in (0, 1):
        return f"{probability:.0f}"
    if probability < least / 2:
        return f"below {least:.{digits}f}"
    if probability >= 1 - least / 2:
        return f"above {1 - least:.{digits}f}"
    return f"{probability:.{digits}f}"


def dot(colour: str) -> dict[str, Any]:
    """The look of a marker on a curve."""
    return {"color": colour, "markeredgecolor": "white", "markersize": 10, "clip_on": False}


def with_article(digit: int) -> str:
    """8 -> 'an 8', 3 -> 'a 3'."""
    return f"{'an' if digit == 8 else 'a'} {digit}"


def _buttons(options: list, value: str) -> ToggleButtons:
    layout, style = Layout(width="max-content"), {"button_width": "92px"}
    return ToggleButtons(options=options, value=value, style=style, layout=layout)


class OmittedDigitExplorer(Explorer):
    """Raise the bias of the digit that a student never saw, and change the temperature of its targets.

    Args:
        logits: of "teacher" and the students "hard", "1", "2", "4", "8", "20", each (rows, 10), in the order of
            `digits`; None: the recorded ones of `studies.omitted_digit`.
        targets: the student at the start: "hard" or a temperature.
        shift: what is added to its bias of class 3 at the start, one of `SHIFTS`.
        image: the digit shown at the start, a name of `chosen_rows`; None: the closest lookalike.
        digits: that the logits belong to; None: the test digits.

    Raises:
        ValueError: logits of another form, a choice that is not offered.
        FileNotFoundError: no `logits`, and none recorded.
    """

    size = (9.0, 5.2)

    def __init__(
        self,
        logits: Logits | None = None,
        targets: str = "4",
        shift: float = 0.0,
        image: str | None = None,
        digits: Digits | None = None,
    ) -> None:
        if logits is None:
            from effnlp_lessons.studies.omitted_digit import load_logits  # needed without `logits` only

            logits = load_logits()
        digits = load_digits().subset("test") if digits is None else digits
        check_logits(logits, digits)
        self._logits, self._digits = {name: rows.detach().float() for name, rows in logits.items()}, digits
        self._rows = chosen_rows(self._logits[TEACHER], digits)
        image = list(self._rows)[-LOOKALIKES] if image is None else image
        for name, value, allowed in (
            ("targets", targets, STUDENTS),
            ("shift", shift, SHIFTS),
            ("image", image, tuple(self._rows)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        self._along_shifts = {student: along_shifts(self._logits[student], digits) for student in STUDENTS}
        of_others = self._logits[TEACHER][digits.labels != OMITTED]
        self._gradients = {temperature: gradient_size(of_others, temperature) for temperature in GRID}
        super().__init__(
            {
                "targets": _buttons(
                    [("hard labels", HARD), *((f"T = {name}", name) for name in TEMPERATURES)], targets
                ),
                "image": _buttons(list(self._rows), image),
                "shift": SelectionSlider(
                    options=[(f"{amount:.2f}", amount) for amount in SHIFTS],
                    value=shift,
                    description="bias of class 3 raised by",
                    style={"description_width": "initial"},
                    layout=Layout(width="640px"),
                ),
            }
        )

    def arrange(self) -> list[HBox]:
        # ToggleButtons put a description of their own above the buttons, not beside them
        names = {"targets": "student's targets", "image": "test digit"}
        rows = [[Label(words, layout=Layout(width="115px")), self.controls[name]] for name, words in names.items()]
        return [HBox(row, layout=Layout(flex_flow="row wrap")) for row in (*rows, [self.controls["shift"]])]

    # ------------------------------------------------------------------------ numbers

    def numbers(self, targets: str, shift: float, image: str) -> dict[str, Any]:
        """What the student gets right after the shift, one digit's target and answer, the size of the gradient.

        `right` and `curves` are shares, the latter along `SHIFTS`. `fewest` errors are made at the shift `fewest_at`;
        `too_far`: more errors than there, at a larger shift. `lost`: share of the other digits that were right
        without a shift and are not now. For hard labels `temperature`, `gradient` and `rescaled` are None.
        """
        row, temperature, place = self._rows[image], TEMPERATURES.get(targets), SHIFTS.index(shift)
        along, label = self._along_shifts[targets], self._digits.labels[row]
        errors, fewest = along["errors"], min(along["errors"])
        if temperature is None:
            target = one_hot(label, CLASSES).float()
        else:
            target = softened_probabilities(self._logits[TEACHER][row], temperature)
        shifted = with_shift(self._logits[targets][row], shift)
        gradient = None if temperature is None else self._gradients[temperature]
        return {
            "targets": targets,
            "temperature": temperature,
            "shift": shift,
            "image": image,
            "curves": {"threes": along["threes"], "others": along["others"]},
            "right": {"threes": along["threes"][place], "others": along["others"][place]},
            "lost": along["others"][0] - along["others"][place],
            "rows": len(self._digits),
            "errors": errors[place],
            "errors_on_threes": along["errors_on_threes"][place],
            "called_three": along["called_three"][place],
            "fewest": fewest,
            "fewest_at": SHIFTS[errors.index(fewest)],
            "too_far": errors[place] > fewest and fewest in errors[:place],
            "row": row,
            "label": int(label),
            "target": target.numpy(),
            "student": softened_probabilities(shifted, 1.0).numpy(),
            "answer": int(shifted.argmax()),
            "gradient": gradient,
            "rescaled": None if gradient is None else gradient * temperature**2,
        }

    # ------------------------------------------------------------------------ picture

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        figure.set_layout_engine("none")
        curves, gradient = figure.add_axes((0.07, 0.58, 0.47, 0.34)), figure.add_axes((0.675, 0.58, 0.31, 0.34))
        digit = figure.add_axes((18 / 900, 32 / 520, 140 / 900, 140 / 520))  # five dots a pixel
        target, answer = figure.add_axes((0.26, 0.062, 0.31, 0.32)), figure.add_axes((0.675, 0.062, 0.31, 0.32))
        self._heads = {}  # what changes above the charts, behind words that do not: short, for text is slow to draw
        for name, x, words in (
            ("threes", 0.09, "3s right"),
            ("others", 0.30, "other digits right"),
            ("rescaled", 0.64, "times T²"),
            ("gradient", 0.81, "without T²"),
            ("digit", 0.02, "Test digit"),
            ("answer", 0.635, "Student at T = 1 says"),
        ):
            y = 0.945 if name in LOOK else 0.415
            right = figure.text(x, y, words, fontsize=11).get_window_extent().x1
            self._heads[name] = figure.text((right + 7) / 900, y, "", fontsize=11, weight="bold")
            if name in LOOK:  # the legend
                colour, mark = LOOK[name]
                figure.add_artist(Line2D([x - 0.015], [y + 0.011], color=colour, marker=mark, markersize=8))
        self._heads["target"] = figure.text(0.22, 0.415, "", fontsize=11)
        self._draw_curves(curves)
        self._draw_gradient(gradient)
        digit.set_axis_off()
        frame = {"transform": None, "facecolor": "none", "edgecolor": GREY, "linewidth": 0.72}  # one dot wide
        figure.add_artist(Rectangle((16.5, 30.5), 143, 143, **frame))
        self._digit = digit.imshow(np.zeros((28, 28)), cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
        self._bars, self._amounts = {}, {}
        for name, axes in (("target", target), ("answer", answer)):
            axes.set(xlim=(-0.6, 9.6), ylim=(0, 1.13), xticks=range(CLASSES), ylabel="probability")
            axes.set_yticks((0, 0.5, 1), ("0", "0.5", "1"))
            axes.tick_params(axis="x", length=0, labelsize=10)
            axes.grid(False, axis="x")
            colours = [VERMILION if place == OMITTED else BLUE for place in range(CLASSES)]
            self._bars[name] = list(axes.bar(range(CLASSES), 0.5, color=colours, width=0.6))
            self._amounts[name] = axes.text(OMITTED, 0, "", ha="center", va="bottom", fontsize=9)
        bars = [bar for name in self._bars for bar in self._bars[name]]
        lines = [self._here, *self._lines.values(), *self._dots.values(), self._there, *self._sizes.values()]
        return [*lines, self._digit, *bars, *self._amounts.values(), *self._heads.values()]

    def _draw_curves(self, axes: Axes) -> None:
        axes.set(xlim=(-0.15, 8.15), ylim=(-3, 103), xlabel="bias of class 3 raised by")
        axes.set_yticks((0, 25, 50, 75, 100), ("0", "25", "50", "75", "100 %"))
        self._here = axes.vlines(0, -3, 103, color=BLACK, linewidth=1.2)
        kinds = {kind: LOOK[kind] for kind in ("threes", "others")}
        self._lines = {kind: axes.plot(SHIFTS, SHIFTS, color=colour)[0] for kind, (colour, _) in kinds.items()}
        self._dots = {kind: axes.plot([0], [0], mark, **dot(colour))[0] for kind, (colour, mark) in kinds.items()}

    def _draw_gradient(self, axes: Axes) -> None:
        """The size of the gradient with and without T^2 on log-log axes: 1 / T^2 is a straight line."""
        sizes = {
            "rescaled": [size * temperature**2 for temperature, size in self._gradients.items()],
            "gradient": list(self._gradients.values()),
        }
        low, high = min(map(min, sizes.values())), max(map(max, sizes.values()))
        axes.set(xscale="log", yscale="log", xlim=(0.9, 22.5), ylim=(low / 1.6, high * 1.6))
        axes.set(xlabel="temperature T", ylabel="norm of the gradient")
        axes.xaxis.set(major_locator=FixedLocator(list(TEMPERATURES.values())), minor_locator=NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        self._there = axes.vlines(1, *axes.get_ylim(), color=BLACK, linewidth=1.2)
        self._sizes = {}
        for kind in sizes:
            colour, mark = LOOK[kind]
            axes.plot(list(self._gradients), sizes[kind], color=colour)
            (self._sizes[kind],) = axes.plot([1], [1], mark, **dot(colour))

    def draw(self, numbers: dict[str, Any]) -> None:
        shift, temperature, heads = numbers["shift"], numbers["temperature"], self._heads
        bottom, top = self._here.axes.get_ylim()
        self._here.set_segments([[(shift, bottom), (shift, top)]])
        for kind in ("threes", "others"):
            self._lines[kind].set_ydata([100 * share for share in numbers["curves"][kind]])
            self._dots[kind].set_data([shift], [100 * numbers["right"][kind]])
            heads[kind].set_text(percent(numbers["right"][kind]))
        for artist in (self._there, *self._sizes.values()):
            artist.set_visible(temperature is not None)
        if temperature is not None:
            bottom, top = self._there.axes.get_ylim()
            self._there.set_segments([[(temperature, bottom), (temperature, top)]])
            for kind in ("rescaled", "gradient"):
                self._sizes[kind].set_data([temperature], [numbers[kind]])
        for kind in ("rescaled", "gradient"):
            heads[kind].set_text("" if temperature is None else f"{numbers[kind]:.3g}")
        self._digit.set_data(self._digits.images[numbers["row"]].numpy())
        heads["digit"].set_text(str(numbers["label"]))
        source = "Label" if temperature is None else f"Teacher at T = {temperature:g}"
        left_out = numbers["label"] == OMITTED
        heads["target"].set_text(f"{source}: {'no target, 3s are left out' if left_out else 'the target'}")
        heads["answer"].set_text(str(numbers["answer"]))
        for name, probabilities in (("target", numbers["target"]), ("answer", numbers["student"])):
            for bar, probability in zip(self._bars[name], probabilities, strict=True):
                bar.set_height(probability)
            probability = float(probabilities[OMITTED])
            self._amounts[name].set(
                y=probability + 0.01, text=chance(probability, 2).replace("below ", "<").replace("above ", ">")
            )

    # ------------------------------------------------------------------------ words

    def summary(self, numbers: dict[str, Any]) -> str:
        return f"{self._right(numbers)} {self._one_digit(numbers)} {self._size_of_gradient(numbers)}"

    def _right(self, numbers: dict[str, Any]) -> str:
        kind = "hard labels" if numbers["temperature"] is None else f"soft targets at T = {numbers['temperature']:g}"
        threes, others = numbers["right"]["threes"], numbers["right"]["others"]
        words = (
            f"Student of {kind}, bias of class 3 raised by {numbers['shift']:.2f}: {percent(threes)} of the 3s right, "
            f"{percent(others)} of the other digits; {numbers['errors']:,} errors in {numbers['rows']:,}, "
            f"{numbers['errors_on_threes']:,} of them on 3s. Other digits called 3: {numbers['called_three']:,}."
        )
        best = max(numbers["curves"]["threes"])
        if best < 0.1:
            words += f" No shift up to {SHIFTS[-1]:g} gets more than {percent(best)} of the 3s right."
        elif numbers["too_far"]:
            words += (
                f" This is beyond the fewest errors, {numbers['fewest']:,} at {numbers['fewest_at']:.2f}: the shift "
                f"costs {percent(numbers['lost'])} of the other digits."
            )
        return words

    def _one_digit(self, numbers: dict[str, Any]) -> str:
        label, target, student = numbers["label"], numbers["target"], numbers["student"]
        source = "label" if numbers["temperature"] is None else "teacher"
        of_itself = "" if label == OMITTED else f" and {chance(float(target[label]))} to {label}"
        never = " (no target: 3s are left out)" if label == OMITTED else ""
        return (
            f"The digit shown is {with_article(label)}: the {source} gives a probability of "
            f"{chance(float(target[OMITTED]))} to 3{of_itself}{never}; the student says {numbers['answer']} "
            f"and gives {chance(float(student[OMITTED]))} to 3."
        )

    def _size_of_gradient(self, numbers: dict[str, Any]) -> str:
        if numbers["temperature"] is None:
            return "Hard labels have no temperature."
        return f"Gradient of an untrained student: {numbers['gradient']:.3g}, times T² {numbers['rescaled']:.3g}."

    def describe(self, numbers: dict[str, Any]) -> str:
        first, last, curves = GRID[0], GRID[-1], numbers["curves"]
        threes, others = (f"{percent(curves[kind][0])} to {percent(curves[kind][-1])}" for kind in ("threes", "others"))
        start, end = self._gradients[first], self._gradients[last]
        return (
            "Four charts and a digit. Top left: right answers against the bias of class 3, raised by "
            f"{SHIFTS[0]:g} to {SHIFTS[-1]:g}: 3s go from {threes}, other digits from {others}, with a mark at "
            f"{numbers['shift']:.2f}. Top right: the norm of the gradient for a student with equal logits, from "
            f"T = {first:g} to {last:g}: {start:.3g} to {end:.3g} without T², {start * first**2:.3g} to "
            f"{end * last**2:.3g} times T². Below: the digit, the probabilities of its target, and the student's "
            f"at T = 1. {self.summary(numbers)}"
        )
