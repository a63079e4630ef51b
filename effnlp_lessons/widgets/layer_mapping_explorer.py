"""Which teacher layer should each student layer learn from? (TinyBERT, Jiao et al. 2019, sec. 3.1; notebook 02)

A student of three layers learns from a teacher of six: student layer m is matched to teacher layer g(m), with
g(1) < g(2) < g(3). That makes 20 mappings, among them the paper's uniform (2, 4, 6), top (4, 5, 6) and bottom
(1, 2, 3). All were recorded, some seeds each. A mapping is chosen by its scores, measured again on held-out text.
Its training loss cannot choose: every mapping has targets of its own, and some are easier to come close to.

Two mappings are near ties where their seeds overlap: the range from the lowest to the highest seed of one meets that
of the other. The places that the overlap leaves open are then a range too, such as "2nd to 9th".

NOTE with as few as three seeds this is what the eye sees in the dots, not a test of significance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ipywidgets import Layout, ToggleButtons
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from effnlp_lessons.distillation.tinybert import layer_mapping
from effnlp_lessons.widgets.layer_mapping_picture import (
    AREA,
    BOX_WIDTH,
    LOSS,
    MEASURES,
    STUDENT_LAYERS,
    STUDENT_LEFT,
    TEACHER_LAYERS,
    TEACHER_LEFT,
    LayerMappingPicture,
    Layers,
    Standing,
    student_row,
    teacher_layer_at,
    teacher_row,
)
from effnlp_lessons.widgets.painted_image import PaintedImage
from effnlp_lessons.widgets.picture import Explorer, in_turn

Scores = Mapping[Layers, Mapping[str, Sequence[float]]]

MAPPINGS = tuple(itertools.combinations(range(1, TEACHER_LAYERS + 1), STUDENT_LAYERS))
STRATEGIES = {name: layer_mapping(STUDENT_LAYERS, TEACHER_LAYERS, name)[1:-1] for name in ("uniform", "top", "bottom")}
CONTROLS = tuple(f"layer_{m}" for m in range(1, STUDENT_LAYERS + 1))
GRAB = 20  # so near to a line or its boxes it is picked up


def ordinal(place: int) -> str:
    """1 -> '1st', 12 -> '12th', 22 -> '22nd'."""
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def in_words(layers: Sequence[int]) -> str:
    """(2, 4, 6) -> '2, 4 and 6'."""
    return " and ".join(filter(None, (", ".join(map(str, layers[:-1])), str(layers[-1]))))


def loss_in_words(loss: float) -> str:
    """1.3 -> '1.30', 0.04567 -> '0.0457', 120.2 -> '120'."""
    return f"{loss:#.3g}".rstrip(".")


def check_scores(scores: Scores) -> None:
    """Raise a ValueError unless `scores` has all 20 mappings, with equally many seeds (two or more) of each measure."""
    if not isinstance(scores, Mapping):
        raise ValueError(f"scores must be a dict of mappings, got {scores!r}")
    missing, unknown = [g for g in MAPPINGS if g not in scores], [g for g in scores if g not in MAPPINGS]
    if missing or unknown:
        raise ValueError(
            f"scores must have the {len(MAPPINGS)} rising mappings of three layers to 1 .. {TEACHER_LAYERS}: "
            f"{missing or 'none'} missing, {unknown or 'none'} not allowed"
        )
    seeds = {len(record.get(name, ())) for record in scores.values() for name in (*MEASURES, LOSS)}
    if len(seeds) > 1 or min(seeds) < 2:
        names = [*MEASURES, LOSS]
        raise ValueError(f"scores must have the same two or more seeds of each of {names}, got {sorted(seeds)} seeds")
    for g, name in itertools.product(MAPPINGS, (*MEASURES, LOSS)):
        most = math.inf if name == LOSS else 100
        if not all(0 <= value <= most and math.isfinite(value) for value in scores[g][name]):
            allowed = "finite and >= 0" if name == LOSS else "per cent, 0 to 100"
            raise ValueError(f"scores[{g}][{name!r}] must be {allowed}, got {scores[g][name]!r}")


def standings(values: Mapping[Layers, Sequence[float]], highest_first: bool) -> dict[Layers, Standing]:
    """Where each mapping stands: "seeds", "mean", "low", "high", "rank", "best", "worst", "near_ties".

    "rank" is by the mean and shared by equal means (1, 2, 2, 4). "near_ties" are the other mappings whose range of
    seeds meets this one's; "best" and "worst" are the ranks it would have as the first and as the last of them.
    """
    seeds = {g: [float(value) for value in values[g]] for g in values}
    # equal means may differ in the last bit when the same numbers come in another order
    mean = {g: round(math.fsum(seeds[g]) / len(seeds[g]), 9) for g in seeds}
    low, high = ({g: pick(seeds[g]) for g in seeds} for pick in (min, max))

    def standing(g: Layers) -> Standing:
        better = [h for h in seeds if (mean[h] > mean[g] if highest_first else mean[h] < mean[g])]
        above, below = [h for h in seeds if low[h] > high[g]], [h for h in seeds if high[h] < low[g]]
        ahead, behind = (above, below) if highest_first else (below, above)
        return {
            "seeds": seeds[g],
            "mean": mean[g],
            "low": low[g],
            "high": high[g],
            "rank": 1 + len(better),
            "best": 1 + len(ahead),
            "worst": len(seeds) - len(behind),
            "near_ties": tuple(h for h in seeds if h != g and h not in above and h not in below),
        }

    return {g: standing(g) for g in seeds}


def move_line(mapping: Layers, student_layer: int, teacher_layer: int) -> Layers:
    """The mapping after this student layer's line was moved to a teacher layer, pushing the others along.

    Every line ahead is pushed just so far that the mapping keeps rising; none is pulled. The line stops where those
    ahead of it have no room left: student layer m always learns from one of the teacher layers m .. m + 3.
    """
    m, room = student_layer, TEACHER_LAYERS - STUDENT_LAYERS
    target = min(max(teacher_layer, m), m + room)
    return tuple(
        max(g, target + k - m) if k > m else min(g, target + k - m) if k < m else target
        for k, g in enumerate(mapping, 1)
    )


def line_at(x: float, y: float, mapping: Layers) -> int | None:
    """The student layer whose line, or a box at its ends, is nearest to this place; None beyond `GRAB` pixels."""
    distances = []
    for m, g in enumerate(mapping, 1):
        xs = (STUDENT_LEFT, STUDENT_LEFT + BOX_WIDTH, TEACHER_LEFT, TEACHER_LEFT + BOX_WIDTH)
        corners = np.stack([xs, np.repeat((student_row(m), teacher_row(g)), 2)], 1)
        starts, ways = corners[:-1], np.diff(corners, axis=0)
        shares = (((x, y) - starts) * ways).sum(1) / (ways**2).sum(1)
        nearest = starts + shares.clip(0, 1)[:, None] * ways
        distances.append(np.linalg.norm(nearest - (x, y), axis=1).min())
    nearest = int(np.argmin(distances))
    return nearest + 1 if distances[nearest] <= GRAB else None


def recorded_scores() -> Scores:
    """The scores of the study `layer_mappings`."""
    from effnlp_lessons.studies import layer_mappings, runner

    return layer_mappings.scores(runner.load_results("layer_mappings"))


class LayerMappingExplorer(Explorer):
    """Drag the lines from three student layers to six teacher layers and see the recorded scores of that mapping.

    A line is picked up anywhere on it or on the boxes at its ends. While it is held, its end on the teacher's side
    follows the pointer's height, as long as the pointer is on the teacher's half. Lines never cross: the one that is
    dragged pushes the others along, and stops where they have no room left; dragged back, the others return. By
    keyboard on the picture: left and right (or space) choose a student layer, up and down move its line. The buttons
    do the same.

    Args:
        scores: for g(1), g(2), g(3) of all 20 mappings {"agreement": [per cent, one a seed], "accuracy": [per cent,
            one a seed], "loss": [training loss, one a seed]}; None: the recorded ones.
        mapping: g(1), g(2), g(3) at the start.

    Raises:
        ValueError: scores of another form; a mapping that is not rising or not within 1 .. 6.
        FileNotFoundError: without `scores`, if the study is not recorded.
    """

    size = (9.0, 5.0)

    def __init__(self, scores: Scores | None = None, mapping: Layers = STRATEGIES["uniform"]) -> None:
        scores = recorded_scores() if scores is None else scores
        check_scores(scores)
        if tuple(mapping) not in MAPPINGS:
            raise ValueError(f"mapping must be three rising layers in 1 .. {TEACHER_LAYERS}, got {mapping!r}")
        self._standings = {
            name: standings({g: scores[g][name] for g in MAPPINGS}, highest_first=name != LOSS)
            for name in (*MEASURES, LOSS)
        }
        self._lowest = min(MAPPINGS, key=lambda g: self._standings[LOSS][g]["mean"])  # the mapping of the lowest loss
        self._picture = LayerMappingPicture(self._standings, self._lowest)
        self._mapping: Layers = tuple(mapping)
        self._layer: int | None = None  # the student layer that was last picked up or chosen by keyboard
        self._held, self._start = False, self._mapping  # whether its line is held, and the mapping when it was picked
        self._message = ""
        super().__init__(
            {
                **{name: _layer_buttons(m, self._mapping[m - 1]) for m, name in enumerate(CONTROLS, 1)},
                "strategy": ToggleButtons(
                    options=list(STRATEGIES),
                    value=self._strategy(),
                    tooltips=[f"teacher layers {in_words(g)}" for g in STRATEGIES.values()],
                    description="strategy",
                    style={"button_width": "auto", "description_width": "initial"},
                    layout=Layout(width="max-content", margin="2px"),
                ),
            }
        )

    def make_image(self, width: int, height: int) -> PaintedImage:
        label = "lines from student to teacher layers: left and right choose a student layer, up and down move its line"
        return PaintedImage(width, height, label, self.act)

    # ------------------------------------------------------------------------ moving lines

    @property
    def mapping(self) -> Layers:
        """g(1), g(2), g(3) as shown."""
        return self._mapping

    def _strategy(self) -> str | None:
        return next((name for name, g in STRATEGIES.items() if g == self._mapping), None)

    def _put(self, mapping: Layers) -> None:
        """Show `mapping` in all controls; within `still`."""
        self._mapping = mapping
        for name, g in zip(CONTROLS, mapping, strict=True):
            self.controls[name].value = g
        self.controls["strategy"].value = self._strategy()

    def _move(self, start: Layers, layer: int, wanted: int) -> None:
        """Move a line from where it was in `start`, and say who was pushed or why it stopped."""
        wanted = min(max(wanted, 1), TEACHER_LAYERS)
        after = move_line(start, layer, wanted)
        pushed = [m for m in range(1, STUDENT_LAYERS + 1) if m != layer and after[m - 1] != start[m - 1]]
        self._message = ""
        if after[layer - 1] != wanted:
            self._message = f"Student layer {layer} stops at teacher layer {after[layer - 1]}: lines do not cross."
        elif pushed:
            who = f"layer {pushed[0]} is" if len(pushed) == 1 else f"layers {in_words(pushed)} are"
            self._message = f"Student {who} pushed along: lines do not cross."
        self._put(after)

    def settle(self, name: str) -> None:
        self._message, value = "", self.controls[name].value
        if name in CONTROLS:
            self._move(self._mapping, CONTROLS.index(name) + 1, value)
        else:
            self._put(STRATEGIES.get(value, self._mapping))

    @in_turn
    def act(self, events: list[list[Any]]) -> None:
        """What happened on the layers, as `PaintedImage` reports it."""
        with self.still():
            for kind, *what in events:
                if kind == "down":
                    layer = line_at(*what, self._mapping)
                    self._held, self._start, self._message = layer is not None, self._mapping, ""
                    self._layer = layer or self._layer
                elif kind == "move":
                    self._drag(*what)
                else:
                    self._press_key(*what)
        self.refresh()
        self.image.spoken = self._speak()

    def _drag(self, x: float, y: float) -> None:
        if self._held and 2 * x >= STUDENT_LEFT + BOX_WIDTH + TEACHER_LEFT:  # on the teacher's half
            self._move(self._start, self._layer, teacher_layer_at(y))

    def _press_key(self, key: str | None = None) -> None:
        """A key, or None where the picture is only reached."""
        self._message = ""
        if self._layer is None:
            self._layer = 1
        elif key in ("ArrowUp", "ArrowDown"):
            self._move(self._mapping, self._layer, self._mapping[self._layer - 1] + (1 if key == "ArrowUp" else -1))
        elif key in ("ArrowLeft", "ArrowRight"):
            self._layer = min(max(self._layer + (1 if key == "ArrowRight" else -1), 1), STUDENT_LAYERS)
        elif key is not None:
            self._layer = self._layer % STUDENT_LAYERS + 1

    # ------------------------------------------------------------------------ numbers

    def numbers(self, **_: Any) -> dict[str, Any]:
        """The mapping, its standing in each measure (see `standings`), and where the mapping of lowest loss stands."""
        return {
            "mapping": self._mapping,
            "strategy": self._strategy(),
            "layer": self._layer,
            "message": self._message,
            **{name: table[self._mapping] for name, table in self._standings.items()},
            "lowest_loss": {name: table[self._lowest] for name, table in self._standings.items()},
        }

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        self.image.area = AREA
        return self._picture.draw_static(figure)

    def draw(self, numbers: dict[str, Any]) -> None:
        strategy, loss = numbers["strategy"], numbers[LOSS]
        title = f"Teacher layers {in_words(numbers['mapping'])}" + (f": {strategy}" if strategy else "")
        loss_words = f"training loss: {loss_in_words(loss['mean'])}, {_from_below(loss['rank'])} of {len(MAPPINGS)}"
        scores = {}
        for name in MEASURES:
            own = numbers[name]
            ties = f"near ties {_open_places(own)}" if own["near_ties"] else "no near ties"
            spread = f"seeds {own['low']:.1f} to {own['high']:.1f} %, {ties}"
            scores[name] = f"{own['mean']:.1f} %, {self._rank(name, own)}", spread
        self._picture.draw(numbers, title, loss_words, scores)

    def _rank(self, name: str, standing: Standing) -> str:
        """ "5th of 20", and whether another mapping has the same mean."""
        sharing = sum(other["rank"] == standing["rank"] for other in self._standings[name].values()) > 1
        return f"{ordinal(standing['rank'])} of {len(MAPPINGS)}{' (shared)' * sharing}"

    def summary(self, numbers: dict[str, Any]) -> str:
        strategy, loss, lowest = numbers["strategy"], numbers[LOSS], numbers["lowest_loss"]
        named = f" ({strategy})" if strategy else ""
        sentences = [numbers["message"]] if numbers["message"] else []
        sentences.append(f"Student layers 1, 2 and 3 learn from teacher layers {in_words(numbers['mapping'])}{named}.")
        for name, title in MEASURES.items():
            own = numbers[name]
            sentences.append(
                f"{title.capitalize()}: {own['mean']:.1f} % (seeds {own['low']:.1f} to {own['high']:.1f} %), "
                f"{self._rank(name, own)}; {_near_ties(own)}."
            )
        places = " and ".join(f"{ordinal(lowest[name]['rank'])} in {name}" for name in MEASURES)
        mean, low, high = (loss_in_words(loss[part]) for part in ("mean", "low", "high"))
        sentences.append(
            f"Training loss: {mean} (seeds {low} to {high}), {_from_below(loss['rank'])} of {len(MAPPINGS)}; each "
            f"mapping has targets of its own. The mapping of the lowest loss is {places}."
        )
        return " ".join(sentences)

    def describe(self, numbers: dict[str, Any]) -> str:
        lines = ", ".join(f"{m} to {g}" for m, g in enumerate(numbers["mapping"], 1))
        return (
            f"Left: three student layers joined by lines to six teacher layers: {lines}. Right, for agreement and for "
            "accuracy: the seeds of all 20 mappings in the order of their means, and the means against the training "
            f"loss; this mapping and its near ties stand out. {self.summary(numbers)}"
        )

    def _speak(self) -> str:
        """The chosen line and the scores, for a screen reader."""
        now, m = self._numbers, self._layer
        line = f"Student layer {m} learns from teacher layer {self._mapping[m - 1]}." if m else ""
        scores = "; ".join(f"{name} {now[name]['mean']:.1f} %, {self._rank(name, now[name])}" for name in MEASURES)
        loss = f"loss {loss_in_words(now[LOSS]['mean'])}, {_from_below(now[LOSS]['rank'])}"
        return " ".join(filter(None, (now["message"], line, f"{scores.capitalize()}; {loss}.")))


def _from_below(rank: int) -> str:
    return "lowest" if rank == 1 else f"{ordinal(rank)} lowest"


def _open_places(standing: Standing) -> str:
    return f"{ordinal(standing['best'])} to {ordinal(standing['worst'])}"


def _near_ties(standing: Standing) -> str:
    """How many there are, and which places they leave open."""
    ties = len(standing["near_ties"])
    words = {0: "no near ties", 1: f"1 near tie leaves {_open_places(standing)} open"}
    return words.get(ties, f"{ties} near ties leave {_open_places(standing)} open")


def _layer_buttons(m: int, value: int) -> ToggleButtons:
    layers = range(m, m + TEACHER_LAYERS - STUDENT_LAYERS + 1)
    return ToggleButtons(
        options=[(str(g), g) for g in layers],
        value=value,
        tooltips=[f"student layer {m} learns from teacher layer {g}" for g in layers],
        description=f"student layer {m} learns from",
        style={"button_width": "30px", "description_width": "initial"},
        layout=Layout(width="max-content", margin="2px 14px 2px 0"),
    )
