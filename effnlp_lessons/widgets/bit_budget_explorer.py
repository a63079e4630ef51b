"""Which layers should get 3 bits, which 2, under a budget of bytes? (Q-BERT, Shen et al. 2019; notebook 04)

The six layers of the teacher take 2 or 3 bits a weight each. The budget allows three of them 3 bits: 20 choices use it
up. The accuracy of all 64 choices was recorded, after quantization without any training. The student looks for a good
choice; the curvature of each layer, by which Q-BERT chooses, is shown when it is asked for.

One accuracy has a standard error, sqrt(p (1 - p) / sentences), of nearly a point: other choices within two of it are
near ties, and the places that they leave open are a range, such as "2nd to 9th".

NOTE all choices are measured on the same sentences, so their differences are somewhat surer than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ipywidgets import HBox, Layout, ToggleButton, ToggleButtons, Widget
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from effnlp_lessons.studies import bit_budget
from effnlp_lessons.studies.bit_budget import CHOICES, EQUAL_SIZE, HIGH, LAYERS, LOW, Bits
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.widgets.bit_budget_picture import AREA, BitBudgetPicture, in_three_digits, layer_at
from effnlp_lessons.widgets.layer_mapping_explorer import in_words, ordinal
from effnlp_lessons.widgets.painted_image import PaintedImage
from effnlp_lessons.widgets.picture import Explorer, in_turn

CONTROLS = tuple(f"layer_{layer}" for layer in range(1, LAYERS + 1))


def check_recorded(accuracy: Mapping[Bits, float], omega: Sequence[float], sentences: int) -> None:
    """Raise a ValueError unless there are an accuracy of all 64 choices, a sensitivity of all layers, and sentences."""
    if not isinstance(accuracy, Mapping) or set(accuracy) != set(CHOICES):
        raise ValueError(f"accuracy must have the {len(CHOICES)} choices of {LOW} or {HIGH} bits for {LAYERS} layers")
    for bits, value in accuracy.items():
        if not 0 <= value <= 100:
            raise ValueError(f"accuracy[{bits}] must be per cent, 0 to 100, got {value!r}")
    if len(omega) != LAYERS or not all(value >= 0 and math.isfinite(value) for value in omega):
        raise ValueError(f"omega must be {LAYERS} finite numbers >= 0, got {omega!r}")
    if sentences < 1:
        raise ValueError(f"sentences must be >= 1, got {sentences}")


def recorded() -> dict[str, Any]:
    """ "accuracy", "omega" and "sentences" of the study `bit_budget`, those of all its seeds together."""
    summary = load_results("bit_budget")
    return {
        "accuracy": bit_budget.accuracies(summary),
        "omega": bit_budget.pooled_omega(summary),
        "sentences": sum(run["sentences"]["test"] for run in summary["runs"]),
    }


class BitBudgetExplorer(Explorer):
    """Click layers to give them 3 bits or 2, and see the bytes, the recorded accuracy and its place among 20.

    By keyboard on the picture: left and right choose a layer, up and down give it 3 or 2 bits, space changes it. The
    buttons do the same. A choice over the budget is shown as such, and has no place; so has one below it.

    Args:
        accuracy: per cent of all 64 choices, {(2, 3, 2, 2, 3, 3): 81.2, ...}, layer 1 first; None: the recorded ones.
        omega: sensitivity of every layer; None: the recorded ones.
        sentences: how many an accuracy was measured on; None: as many as were recorded.
        bits: of the layers at the start.

    Raises:
        ValueError: numbers of another form; bits that are not 2 or 3 for each of six layers.
        FileNotFoundError: without numbers, if the study is not recorded.
    """

    size = (9.0, 5.0)

    def __init__(
        self,
        accuracy: Mapping[Bits, float] | None = None,
        omega: Sequence[float] | None = None,
        sentences: int | None = None,
        bits: Bits = (LOW,) * LAYERS,
    ) -> None:
        given = {"accuracy": accuracy, "omega": omega, "sentences": sentences}
        found = recorded() if None in given.values() else {}
        accuracy, omega, sentences = (found[k] if v is None else v for k, v in given.items())
        check_recorded(accuracy, omega, sentences)
        if tuple(bits) not in CHOICES:
            raise ValueError(f"bits must be {LOW} or {HIGH} for each of {LAYERS} layers, got {bits!r}")
        self._accuracy, self._omega, self._sentences = dict(accuracy), list(omega), sentences
        self._bytes = {choice: bit_budget.size_of(choice) for choice in CHOICES}
        self._budget = self._bytes[EQUAL_SIZE[0]]
        equal = sorted(EQUAL_SIZE, key=lambda choice: -self._accuracy[choice])
        self._chosen = bit_budget.hessian_choice(omega)
        self._reverse = bit_budget.hessian_choice(omega, reverse=True)
        self._picture = BitBudgetPicture(
            self._accuracy, self._bytes, equal, self._budget, self._omega, self._chosen, self._reverse
        )
        self._bits: Bits = tuple(bits)
        self._layer: int | None = None  # the layer that was last clicked or chosen by keyboard
        super().__init__(
            {
                **{name: _layer_buttons(m, self._bits[m - 1]) for m, name in enumerate(CONTROLS, 1)},
                "sensitivity": ToggleButton(
                    value=False,
                    description="show the sensitivity",
                    tooltip="show how curved the loss is in each layer, and which choice follows from it",
                    layout=Layout(width="max-content", margin="2px 14px 2px 0"),
                ),
                "choice": ToggleButtons(
                    options=[("the Hessian's choice", self._chosen), ("its reverse", self._reverse)],
                    value=None,
                    tooltips=["more bits to the most sensitive layers", "more bits to the least sensitive layers"],
                    description="take",
                    style={"button_width": "auto", "description_width": "initial"},
                    layout=Layout(width="max-content", margin="2px"),
                ),
            }
        )

    def arrange(self) -> list[Widget]:
        wrap = Layout(flex_flow="row wrap")
        layers = HBox([self.controls[name] for name in CONTROLS], layout=wrap)
        return [layers, HBox([self.controls["sensitivity"], self.controls["choice"]], layout=wrap)]

    def make_image(self, width: int, height: int) -> PaintedImage:
        label = "bits of six layers: left and right choose a layer, up and down give it 3 or 2 bits, space changes it"
        return PaintedImage(width, height, label, self.act)

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        return set() if numbers["sensitivity"] else {"choice"}

    # ------------------------------------------------------------------------ choosing bits

    @property
    def bits(self) -> Bits:
        """Bits of layers 1 .. 6 as shown."""
        return self._bits

    def _put(self, bits: Bits) -> None:
        """Show `bits` in all controls; within `still`."""
        self._bits = bits
        for name, k in zip(CONTROLS, bits, strict=True):
            self.controls[name].value = k
        # these buttons must not tell before they are asked
        named = self.controls["sensitivity"].value and bits in (self._chosen, self._reverse)
        self.controls["choice"].value = bits if named else None

    def _give(self, layer: int, change: Callable[[int], int]) -> None:
        """Change one layer's bits by `change(bits)`."""
        place = layer - 1
        self._put((*self._bits[:place], change(self._bits[place]), *self._bits[place + 1 :]))

    def settle(self, name: str) -> None:
        value = self.controls[name].value
        if name in CONTROLS:
            self._give(CONTROLS.index(name) + 1, lambda _: value)
        else:
            self._put(value if name == "choice" and value is not None else self._bits)

    @in_turn
    def act(self, events: list[list[Any]]) -> None:
        """What happened on the layers, as `PaintedImage` reports it."""
        with self.still():
            for kind, *what in events:
                if kind == "down":
                    layer = layer_at(*what)
                    if layer is not None:
                        self._layer = layer
                        self._give(layer, _other)
                elif kind in ("key", "focus"):
                    self._press_key(*what)
        self.refresh()
        self.image.spoken = self._speak()

    def _press_key(self, key: str | None = None) -> None:
        """A key, or None where the picture is only reached."""
        if self._layer is None:
            self._layer = 1
        elif key in ("ArrowLeft", "ArrowRight"):
            self._layer = min(max(self._layer + (1 if key == "ArrowRight" else -1), 1), LAYERS)
        elif key in ("ArrowUp", "ArrowDown"):
            self._give(self._layer, lambda _: HIGH if key == "ArrowUp" else LOW)
        elif key is not None:
            self._give(self._layer, _other)

    # ------------------------------------------------------------------------ numbers

    def numbers(self, **values: Any) -> dict[str, Any]:
        """Of the choice shown: "bits", "bytes", "budget", "fits", "accuracy" (per cent), "standard_error" (points).

        "rank", "best", "worst" and "near_ties" where it uses up the budget, else None and (): the place among the 20,
        the places that near ties leave open, and the choices within two standard errors. "sensitivity" is None until
        it is asked for: then "omega", "order" (layers, most sensitive first), and for the Hessian's "choice" and its
        "reverse" the bits, accuracy and rank, and the "mean" accuracy of the 20.
        """
        bits, own = self._bits, self._accuracy[self._bits]
        error, equal = bit_budget.standard_error(own, self._sentences), bits in EQUAL_SIZE
        others = {b: self._accuracy[b] for b in EQUAL_SIZE if b != bits} if equal else {}
        ties = tuple(b for b, accuracy in others.items() if abs(accuracy - own) <= 2 * error)
        ahead, behind = (sum(sign * (a - own) > 2 * error for a in others.values()) for sign in (1, -1))
        return {
            "bits": bits,
            "layer": self._layer,
            "bytes": self._bytes[bits],
            "budget": self._budget,
            "fits": self._bytes[bits] <= self._budget,
            "accuracy": own,
            "standard_error": error,
            "rank": bit_budget.rank(bits, self._accuracy) if equal else None,
            "best": 1 + ahead if equal else None,
            "worst": len(EQUAL_SIZE) - behind if equal else None,
            "near_ties": ties,
            "sensitivity": self._sensitivity() if values["sensitivity"] else None,
        }

    def _sensitivity(self) -> dict[str, Any]:
        def of(bits: Bits) -> dict[str, Any]:
            return {"bits": bits, "accuracy": self._accuracy[bits], "rank": bit_budget.rank(bits, self._accuracy)}

        return {
            "omega": list(self._omega),
            "order": sorted(range(1, LAYERS + 1), key=lambda layer: -self._omega[layer - 1]),
            "choice": of(self._chosen),
            "reverse": of(self._reverse),
            "mean": sum(self._accuracy[bits] for bits in EQUAL_SIZE) / len(EQUAL_SIZE),
        }

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        self.image.area = AREA
        return self._picture.draw_static(figure)

    def draw(self, numbers: dict[str, Any]) -> None:
        spread = f"standard error {numbers['standard_error']:.1f} points"
        if numbers["near_ties"]:
            spread += f", near ties {ordinal(numbers['best'])} to {ordinal(numbers['worst'])}"
        words = {
            "title": _layers_in_words(numbers["bits"]),
            "accuracy": f"{numbers['accuracy']:.1f} %, {self._place(numbers)}",
            "spread": spread,
            "bytes": f"{numbers['bytes']:,} of {numbers['budget']:,} bytes",
            "budget": _against_budget(numbers),
        }
        self._picture.draw(numbers, words)

    def _place(self, numbers: dict[str, Any]) -> str:
        if numbers["rank"] is None:
            return "no place: over the budget" if not numbers["fits"] else "no place: below the budget"
        sharing = sum(self._accuracy[bits] == numbers["accuracy"] for bits in EQUAL_SIZE) > 1
        return f"{ordinal(numbers['rank'])} of {len(EQUAL_SIZE)}{' (shared)' * sharing}"

    def summary(self, numbers: dict[str, Any]) -> str:
        sentences = [
            f"{_layers_in_words(numbers['bits'])}: {numbers['bytes']:,} of {numbers['budget']:,} bytes, "
            f"{_against_budget(numbers)}.",
            f"Accuracy {numbers['accuracy']:.1f} % of {self._sentences:,} sentences (standard error "
            f"{numbers['standard_error']:.1f} points), {self._place(numbers)}{_near_ties(numbers)}.",
        ]
        found = numbers["sensitivity"]
        if found:
            choice, reverse = found["choice"], found["reverse"]
            sentences.append(
                f"Layers from the most to the least sensitive: {', '.join(map(str, found['order']))}. The Hessian's "
                f"choice, 3 bits for {_high_layers(choice['bits'])}: {choice['accuracy']:.1f} %, "
                f"{ordinal(choice['rank'])} of {len(EQUAL_SIZE)}; its reverse: {reverse['accuracy']:.1f} %, "
                f"{ordinal(reverse['rank'])}; mean of the {len(EQUAL_SIZE)}: {found['mean']:.1f} %."
            )
        return " ".join(sentences)

    def describe(self, numbers: dict[str, Any]) -> str:
        each = ", ".join(f"layer {m} {k} bits" for m, k in enumerate(numbers["bits"], 1))
        bars = ""
        if numbers["sensitivity"]:
            values = ", ".join(
                f"layer {m} {in_three_digits(v)}" for m, v in enumerate(numbers["sensitivity"]["omega"], 1)
            )
            bars = f" Below the layers the sensitivity of each: {values}."
        return (
            f"Left: six layers as stacks of bits: {each}; below them a gauge of the bytes with the budget.{bars} "
            f"Right: the accuracy of the {len(EQUAL_SIZE)} choices that use up the budget, best first, and of all "
            f"{len(CHOICES)} choices against their bytes; this choice stands out. {self.summary(numbers)}"
        )

    def _speak(self) -> str:
        """The chosen layer and the numbers, for a screen reader."""
        now, m = self._numbers, self._layer
        layer = f"Layer {m} has {self._bits[m - 1]} bits." if m else ""
        words = f"{_against_budget(now).capitalize()}; accuracy {now['accuracy']:.1f} %, {self._place(now)}."
        return " ".join(filter(None, (layer, words)))


def _other(bits: int) -> int:
    return HIGH + LOW - bits


def _high_layers(bits: Bits) -> str:
    """(2, 3, 2, 2, 3, 3) -> 'layers 2, 5 and 6'."""
    layers = [m for m, k in enumerate(bits, 1) if k == HIGH]
    return f"layer{'s' * (len(layers) > 1)} {in_words(layers)}"


def _layers_in_words(bits: Bits) -> str:
    """(2, 3, 2, 2, 3, 3) -> '3 bits for layers 2, 5 and 6'."""
    if len(set(bits)) == 1:
        return f"{bits[0]} bits for all layers"
    return f"{HIGH} bits for {_high_layers(bits)}"


def _against_budget(numbers: dict[str, Any]) -> str:
    """Whether the choice fits, and how far it is from using up the budget."""
    difference = numbers["bytes"] - numbers["budget"]
    if difference == 0:
        return "the budget is used up"
    return f"{abs(difference):,} bytes {'over' if difference > 0 else 'below'} the budget"


def _near_ties(numbers: dict[str, Any]) -> str:
    """How many there are, and which places they leave open."""
    if numbers["rank"] is None:
        return ""
    ties = len(numbers["near_ties"])
    if not ties:
        return "; no near ties"
    places = f"{ordinal(numbers['best'])} to {ordinal(numbers['worst'])} open"
    return f"; {ties} near tie{'s' * (ties > 1)} leave{'s' * (ties == 1)} {places}"


def _layer_buttons(layer: int, value: int) -> ToggleButtons:
    return ToggleButtons(
        options=[(str(k), k) for k in (LOW, HIGH)],
        value=value,
        tooltips=[f"layer {layer} gets {k} bits" for k in (LOW, HIGH)],
        description=f"layer {layer}",
        style={"button_width": "30px", "description_width": "initial"},
        layout=Layout(width="max-content", margin="2px 14px 2px 0"),
    )
