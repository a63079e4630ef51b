"""What is left of a net, round by round, and does it learn? Tickets of LeNet-300-100 (notebook 06).

A slider goes down the ladder of Frankle and Carbin (2019): 100, 80, 64, ... 1.2 % of the weights. The picture of the
pixels shows how many of the 300 weights of each input are left. A weight whose pixel is white in every training digit
has no gradient: it stays as small as it began, and goes early. Beside it stands what the study `lottery_tickets`
recorded of the ticket and of its two controls: the same mask with weights drawn anew (its picture is the ticket's), and
the same first weights under a mask drawn at random in each layer.

NOTE the masks shown are those of one seed; the charts are of all seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ipywidgets import HBox, IntSlider, Label, Layout, ToggleButtons, Widget
from jaxtyping import Int, UInt8
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from effnlp_lessons.pruning.lottery import LAYERS, SIZES, masks_after, shuffled
from effnlp_lessons.pruning.lottery_training import digit_splits
from effnlp_lessons.pruning.masks import Masks
from effnlp_lessons.studies.lottery_tickets import (
    KINDS,
    MEASURES,
    REDRAWN,
    SHUFFLED,
    TICKET,
    by_round,
    control_seed,
    load_tickets,
)
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.widgets.lottery_ticket_picture import AREA, CHART, LABELS, SIDE, LotteryTicketPicture, x_of
from effnlp_lessons.widgets.painted_image import PaintedImage
from effnlp_lessons.widgets.picture import Explorer, in_turn

SHOWN = (TICKET, REDRAWN, SHUFFLED)
TITLES = {
    "end": "Accuracy after training",
    "at early stop": "Accuracy at early stop",
    "tenth": "Accuracy after a tenth",
    "early stop": "Step of early stop",
}
UNITS = {name: "steps" if name == "early stop" else "test digits right (%)" for name in MEASURES}
HIDDEN = 300
FLOOR = 60  # lowest accuracy (per cent) of the chart during training: what is below starts there

Removed = Mapping[str, UInt8[Tensor, "d_out d_in"]]


def check_recorded(
    summary: Mapping[str, Any], removed: Removed, right: Int[Tensor, "seeds kinds rounds points"]
) -> int:
    """The number of rounds; a ValueError unless masks and curves are those of the runs of `summary`."""
    runs = summary["runs"]
    rounds = len(runs[0]["left"]) - 1
    for name in LAYERS:
        if name not in removed or removed[name].numel() != SIZES[name] or removed[name].dtype != torch.uint8:
            raise ValueError(f"removed[{name!r}] must be uint8 of {SIZES.get(name)} weights")
        left = [round(100 * (removed[name] > r).double().mean().item(), 4) for r in range(rounds + 1)]
        if left != runs[0]["layers"][name]:
            raise ValueError(f"removed[{name!r}] must leave {runs[0]['layers'][name]} per cent, got {left}")
    if right.ndim != 4 or tuple(right.shape[:3]) != (len(runs), len(KINDS), rounds + 1):
        expected = (len(runs), len(KINDS), rounds + 1)
        raise ValueError(f"right must have the shape {expected} and points, got {tuple(right.shape)}")
    return rounds


class LotteryTicketExplorer(Explorer):
    """Go down the ladder with the slider, a click on the upper chart or the arrow keys, and choose what is trained.

    Args:
        summary: of the study `lottery_tickets`; None: the recorded one, with its masks and curves.
        removed, right: masks and curves as of `lottery_tickets.load_tickets`; given together with `summary`.
        round: at the start.
        kind: "ticket", "new weights" or "random mask" at the start.
        measure: what the upper chart shows at the start, one of `lottery_tickets.MEASURES`.

    Raises:
        ValueError: numbers that do not belong together; a choice that is not offered.
        FileNotFoundError: without numbers, if the study is not recorded.
    """

    size = (9.0, 5.1)
    scene = ("measure",)

    def __init__(
        self,
        summary: Mapping[str, Any] | None = None,
        removed: Removed | None = None,
        right: Int[Tensor, "seeds kinds rounds points"] | None = None,
        round: int = 0,
        kind: str = TICKET,
        measure: str = "end",
    ) -> None:
        if (summary is None) != (removed is None) or (removed is None) != (right is None):
            raise ValueError("summary, removed and right must be given together, or none of them")
        if summary is None:
            summary, (removed, right) = load_results("lottery_tickets"), load_tickets()
        rounds = check_recorded(summary, removed, right)
        if not 0 <= round <= rounds or kind not in SHOWN or measure not in MEASURES:
            raise ValueError(
                f"round must be in 0 .. {rounds}, kind in {SHOWN}, measure in {MEASURES}, "
                f"got {round}, {kind!r} and {measure!r}"
            )
        self._removed, self._runs = removed, summary["runs"]
        self._left = self._runs[0]["left"]
        self._along = {name: {k: _spreads(by_round(summary, k, name)) for k in SHOWN} for name in MEASURES}
        setting = self._runs[0]["setting"]
        self._steps = [
            min(step, setting["steps"])
            for step in range(setting["every"], setting["steps"] + setting["every"], setting["every"])
        ]
        self._curves = {k: _curves(right[:, KINDS.index(k)].double() / 10) for k in SHOWN}
        means = [value for curves in self._curves.values() for curve in curves.values() for value in curve["mean"]]
        self._inked = (digit_splits().train[0].amax(0) > 0).view(SIDE, SIDE).numpy()
        self._picture = LotteryTicketPicture(self._left, self._steps, self._inked, (FLOOR, max(*means, FLOOR) + 2))
        self._masks: dict[tuple[int, bool], Masks] = {}
        super().__init__(
            {
                "round": IntSlider(
                    value=round,
                    min=0,
                    max=rounds,
                    description="rounds of pruning",
                    style={"description_width": "initial"},
                    layout=Layout(width="420px", margin="2px 20px 2px 2px"),
                ),
                "kind": _buttons({k: k for k in SHOWN}, kind),
                "measure": _buttons({name: words.lower() for name, words in TITLES.items()}, measure),
            }
        )

    def arrange(self) -> list[Widget]:
        wrap = Layout(flex_flow="row wrap")
        named = [[Label(words, layout=Layout(width="64px")), self.controls[name]] for name, words in
                 (("kind", "train the"), ("measure", "chart of"))]  # fmt: skip
        return [HBox([self.controls["round"]], layout=wrap), *(HBox(row, layout=wrap) for row in named)]

    def make_image(self, width: int, height: int) -> PaintedImage:
        label = "rounds of pruning: left and right go to the round before and after, up and down choose what is trained"
        return PaintedImage(width, height, label, self.act)

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        return set() if numbers["round"] else {"kind"}

    # ------------------------------------------------------------------------ pointer and keys

    @in_turn
    def act(self, events: list[list[Any]]) -> None:
        """What happened on the upper chart, as `PaintedImage` reports it."""
        with self.still():
            for kind, *what in events:
                if kind in ("down", "move"):
                    self.controls["round"].value = self.round_at(what[0])
                elif kind == "key":
                    self._press_key(*what)
        self.refresh()
        self.image.spoken = self._speak()

    def round_at(self, x: float) -> int:
        """The round whose share of weights lies nearest to this place of the picture (pixels from its left)."""
        place, least = (x - CHART[0]) / CHART[2], self._left[-1]
        return min(range(len(self._left)), key=lambda r: abs(x_of(self._left[r], least) - place))

    def _press_key(self, key: str) -> None:
        number, kind = self.controls["round"], self.controls["kind"]
        if key in ("ArrowLeft", "ArrowRight"):
            step = 1 if key == "ArrowRight" else -1
            number.value = min(max(number.value + step, number.min), number.max)
        elif number.value:  # at round 0 there is one net only
            step = -1 if key == "ArrowUp" else 1
            kind.value = SHOWN[(SHOWN.index(kind.value) + step) % len(SHOWN)]

    # ------------------------------------------------------------------------ numbers

    def masks(self, number: int, kind: str) -> Masks:
        """The masks of a round: the ticket's, or the random one of the recorded control; of the first seed."""
        key = (number, kind == SHUFFLED and number > 0)
        if key not in self._masks:
            masks = masks_after(self._removed, number)
            self._masks[key] = shuffled(masks, control_seed(self._runs[0]["seed"], number)) if key[1] else masks
        return self._masks[key]

    def numbers(self, round: int, kind: str, measure: str) -> dict[str, Any]:
        """What is left at a round, and what was recorded of it.

        "left": per cent of all weights, "weights" how many; "layers", per cent by name. "pixels" (28, 28): how many of
        the 300 weights of each input the mask keeps, "bare": inputs without any, "inked": share of the kept weights of
        the first layer at pixels that have ink in some training digit, "inked pixels": how many these are. "shown": the
        kind chosen, at round 0 the ticket, which is the dense net. "values": by kind the measure's "mean", "lowest",
        "highest" over the seeds, where recorded; "dense": the same at round 0; "along": for all rounds. "curves":
        accuracy at every measurement, by kind.
        """
        shown = kind if round else TICKET
        pixels = self.masks(round, shown)["0.weight"].sum(0).view(SIDE, SIDE).numpy()
        along = self._along[measure]
        return {
            "round": round,
            "kind": kind,
            "shown": shown,
            "measure": measure,
            "title": TITLES[measure],
            "unit": UNITS[measure],
            "seeds": len(self._runs),
            "left": self._left[round],
            "weights": sum(int((r > round).sum()) for r in self._removed.values()),
            "layers": {name: self._runs[0]["layers"][name][round] for name in LAYERS},
            "pixels": pixels,
            "bare": int((pixels == 0).sum()),
            "inked": float(pixels[self._inked].sum() / max(pixels.sum(), 1)),
            "inked pixels": int(self._inked.sum()),
            "along": along,
            "dense": along[TICKET][0],
            "values": {k: along[k][round] for k in SHOWN if round in along[k]},
            "curves": {k: curves[round] for k, curves in self._curves.items() if round in curves},
        }

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        self.image.area = AREA
        return self._picture.draw_static(figure, numbers)

    def draw(self, numbers: dict[str, Any]) -> None:
        left = f"{numbers['left']:.2f} %" if numbers["round"] else "all"
        words = {
            "head": f"{_round_in_words(numbers['round'])}: {left} of the weights left",
            "whose": f"Weights left of each pixel: {_whose(numbers)}",
            "darkest": f"darkest: {numbers['pixels'].max()} of {HIDDEN} weights; no weight at {numbers['bare']} pixels",
            "inked": f"dots: never any ink; {100 * (1 - numbers['inked']):.1f} % of those left are there",
            "layers": f"by layer: {_layers_in_words(numbers)}",
            "during": f"During training, {_round_in_words(numbers['round']).lower()}",
        }
        self._picture.draw(numbers, words)

    def summary(self, numbers: dict[str, Any]) -> str:
        return (
            f"{_round_in_words(numbers['round'])}: {numbers['weights']:,} of {sum(SIZES.values()):,} weights left "
            f"({numbers['left']:.2f} %; by layer: {_layers_in_words(numbers)}). {self._recorded(numbers)}"
        )

    def _recorded(self, numbers: dict[str, Any]) -> str:
        dense = self._spread(numbers, numbers["dense"])
        if not numbers["round"]:
            return f"{numbers['title']} of the dense net: {dense}."
        parts = [f"{kind} {self._spread(numbers, value)}" for kind, value in numbers["values"].items()]
        return f"{numbers['title']}: {'; '.join(parts)}; dense net {dense}."

    def _spread(self, numbers: dict[str, Any], value: Mapping[str, float]) -> str:
        if numbers["measure"] == "early stop":
            return f"{value['mean']:,.0f} ({value['lowest']:,.0f} to {value['highest']:,.0f})"
        return f"{value['mean']:.1f} % ({value['lowest']:.1f} to {value['highest']:.1f})"

    def describe(self, numbers: dict[str, Any]) -> str:
        return (
            f"Left: 28 by 28 pixels, dark where many of a pixel's {HIDDEN} weights are left, of {_whose(numbers)}: at "
            f"most {numbers['pixels'].max()}, none at {numbers['bare']} pixels; {100 * numbers['inked']:.1f} % of "
            f"those left lie at the {numbers['inked pixels']} pixels that have ink in some training digit, the others "
            "have a dot. Right above: "
            f"{numbers['title'].lower()} against the weights left, from 100 to {self._left[-1]:.2f} %, for ticket, new "
            "weights and random mask, with a line at this round. Right below: accuracy during training at this round. "
            f"{self.summary(numbers)}"
        )

    def _speak(self) -> str:
        """The round and the kind chosen, for a screen reader."""
        now = self._numbers
        value = now["values"].get(now["shown"])
        words = f"{_round_in_words(now['round'])}, {now['left']:.2f} % left. "
        name = now["shown"] if now["round"] else "dense net"
        return words + (f"{name}: {self._spread(now, value)}." if value else f"{name}: not recorded.")


def _round_in_words(number: int) -> str:
    return f"Round {number}" if number else "Before pruning"


def _layers_in_words(numbers: dict[str, Any]) -> str:
    return ", ".join(
        f"{LABELS[name]} {f'{share:.1f}' if share < 100 else 100} %" for name, share in numbers["layers"].items()
    )


def _whose(numbers: dict[str, Any]) -> str:
    if not numbers["round"]:
        return "dense net"
    return {TICKET: "ticket", REDRAWN: "ticket's mask", SHUFFLED: "random mask"}[numbers["shown"]]


def _spreads(values: Mapping[int, list[float]]) -> dict[int, dict[str, float]]:
    """Mean, lowest and highest over the seeds, by round."""
    return {r: {"mean": sum(v) / len(v), "lowest": min(v), "highest": max(v)} for r, v in values.items()}


def _curves(accuracy: Tensor) -> dict[int, dict[str, list[float]]]:
    """(seeds, rounds, points) to mean, lowest and highest over the seeds; rounds without a training are left out."""
    found = {}
    for number in range(accuracy.shape[1]):
        of_round = accuracy[:, number]
        if (of_round >= 0).all():
            parts = {"mean": of_round.mean(0), "lowest": of_round.amin(0), "highest": of_round.amax(0)}
            found[number] = {name: value.tolist() for name, value in parts.items()}
    return found


def _buttons(options: Mapping[str, str], value: str) -> ToggleButtons:
    style = {"button_width": "auto", "description_width": "initial"}
    layout = Layout(width="max-content", margin="2px")
    return ToggleButtons(
        options=[(words, name) for name, words in options.items()], value=value, style=style, layout=layout
    )
