"""Which weights stay: the large ones, or those that the task moves away from zero? (Sanh et al. 2020; notebook 07)

Points are 4,000 weights of a matrix of MiniLM-L3, before and after it was fine-tuned on reviews and pruned. A slider
takes the share kept; the colour of a point says whether magnitude keeps this weight, movement, both or neither. Each
criterion had a training of its own, so the values after fine-tuning can be shown of either. Beside them stands the
accuracy that the study `movement` recorded.

NOTE the points are of one seed. The accuracies are means over the seeds that were recorded: how many, the line says.
NOTE counts are of the points. A criterion keeps its share of the whole matrix, of the points nearly so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ipywidgets import HBox, Label, Layout, SelectionSlider, ToggleButtons, Widget
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from effnlp_lessons.studies.movement import DENSE, HARD, LEVELS, MAGNITUDE, METHODS, SHOWN, SOFT, by_model, shipped
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.widgets.movement_picture import (
    BOTH,
    NAMES,
    NEITHER,
    ONLY_MAGNITUDE,
    ONLY_MOVEMENT,
    MovementPicture,
)
from effnlp_lessons.widgets.picture import Explorer

MOVEMENTS = (HARD, SOFT)
# what stands upright: words of the button
WHATS = {
    "magnitude": "after magnitude's training",
    "movement": "after movement's",
    "change": "change in movement's",
    "score": "movement's score",
}
UPRIGHT = {
    "magnitude": "weight after magnitude's training",
    "movement": "weight after movement's training",
    "change": "change of the weight in movement's training",
    "score": "score of movement",
}


def check_recorded(models: Mapping[tuple[str, int], Any], weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless every method has its accuracy and its weights at every level."""
    wanted = {(DENSE, 100)} | {(method, level) for method in METHODS for level in LEVELS}
    missing = sorted(wanted - set(models))
    if missing:
        raise ValueError(f"summary must have the models {missing}")
    for title in SHOWN:
        size = weights[f"before/{title}/weight"].shape if f"before/{title}/weight" in weights else None
        for method, level in sorted(wanted - {(DENSE, 100)}):
            for kind in ("weight", "mask", *(("score",) if method != MAGNITUDE else ())):
                name = f"{method}/{level}/{title}/{kind}"
                if name not in weights or weights[name].shape != size:
                    raise ValueError(f"weights must have {name!r}, one for each weight before")


class MovementExplorer(Explorer):
    """Choose the share kept, the kind of movement pruning, the matrix, and what stands upright.

    Args:
        summary: of the study `movement`; None: the recorded one, with its weights.
        weights: as of `studies.movement.shipped`; given together with `summary`.
        level: per cent kept at the start, one of `LEVELS`.
        movement: "hard" or "soft".
        matrix: one of `studies.movement.SHOWN`.
        what: "magnitude" or "movement", weights after that training; "change", after less before; or "score".

    Raises:
        ValueError: numbers that do not belong together; a choice that is not offered.
        FileNotFoundError: without numbers, if the study is not recorded.
    """

    size = (9.0, 4.8)
    scene = ("movement", "matrix", "what")

    def __init__(
        self,
        summary: Mapping[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        level: int = 15,
        movement: str = HARD,
        matrix: str = "feed-forward, expand",
        what: str = "change",
    ) -> None:
        if (summary is None) != (weights is None):
            raise ValueError("summary and weights must be given together, or neither of them")
        if summary is None:
            summary, weights = load_results("movement"), shipped()
        for name, value, offered in (
            ("level", level, LEVELS),
            ("movement", movement, MOVEMENTS),
            ("matrix", matrix, tuple(SHOWN)),
            ("what", what, tuple(WHATS)),
        ):
            if value not in offered:
                raise ValueError(f"{name} must be one of {offered}, got {value!r}")
        models = by_model(dict(summary))
        check_recorded(models, weights)
        self._models = {key: _spread(value) for key, value in models.items()}
        self._along = {m: {level: self._models[m, level] for level in LEVELS} for m in METHODS}
        self._weights = {name: _array(tensor) for name, tensor in weights.items()}
        self._picture = MovementPicture()
        super().__init__(
            {
                "level": SelectionSlider(
                    options=[(f"{share} %", share) for share in LEVELS],
                    value=level,
                    description="share kept",
                    style={"description_width": "initial"},
                    layout=Layout(width="300px", margin="2px 24px 2px 2px"),
                ),
                "movement": _buttons({name: name for name in MOVEMENTS}, movement),
                "matrix": _buttons({title: title for title in SHOWN}, matrix),
                "what": _buttons(WHATS, what),
            }
        )

    def arrange(self) -> list[Widget]:
        wrap = Layout(flex_flow="row wrap")

        def named(words: str, name: str, width: str = "64px") -> list[Widget]:
            return [Label(words, layout=Layout(width=width)), self.controls[name]]

        return [
            HBox([self.controls["level"], *named("movement", "movement", "76px")], layout=wrap),
            HBox(named("matrix", "matrix"), layout=wrap),
            HBox(named("upright", "what"), layout=wrap),
        ]

    # ------------------------------------------------------------------------ numbers

    def _height(self, matrix: str, movement: str, what: str, level: int) -> np.ndarray:
        method, kind = (MAGNITUDE if what == "magnitude" else movement), ("score" if what == "score" else "weight")
        height = self._weights[f"{method}/{level}/{matrix}/{kind}"]
        return height - self._weights[f"before/{matrix}/weight"] if what == "change" else height

    def numbers(self, level: int, movement: str, matrix: str, what: str) -> dict[str, Any]:
        """The points, who keeps them, and what was recorded.

        "before" and "height" (points,): from left to right, upright; "upright" in words. "groups": by name, which
        points; "counts", how many; "mean size", mean |weight before|, None of no points. "by chance": how many both
        would keep if one knew nothing of the other. "limits": heights at which the criterion cuts off what stands
        upright: for magnitude plus and minus its smallest |weight| kept, for scores the lowest kept. "right": by method
        "mean", "lowest", "highest" (per cent of the test sentences), "seeds", and "left", per cent; "along": the same
        at every level; "dense". "bounds" of the axes: of |x|, and (lowest, highest) upright, over all levels.
        """
        before, height = self._weights[f"before/{matrix}/weight"], self._height(matrix, movement, what, level)
        by_size = self._weights[f"{MAGNITUDE}/{level}/{matrix}/mask"]
        by_movement = self._weights[f"{movement}/{level}/{matrix}/mask"]
        groups = {
            NEITHER: ~by_size & ~by_movement,
            ONLY_MAGNITUDE: by_size & ~by_movement,
            ONLY_MOVEMENT: by_movement & ~by_size,
            BOTH: by_size & by_movement,
        }
        limits: list[float] = []
        if what == "magnitude" and by_size.any() and not by_size.all():
            limits = [float(np.abs(height[by_size]).min()) * sign for sign in (1, -1)]
        if what == "score" and by_movement.any() and not by_movement.all():
            limits = [float(height[by_movement].min())]
        heights = np.stack([self._height(matrix, movement, what, each) for each in LEVELS])
        wide = 1.05 * np.abs(before).max()
        if what in ("magnitude", "movement"):  # both are weights: one scale, so that no change is the diagonal
            wide = max(wide, 1.05 * np.abs(heights).max())
            low, high = -wide, wide
        else:
            margin = 0.05 * max(np.ptp(heights), 1e-3)
            low, high = heights.min() - margin, heights.max() + margin
        return {
            "level": level,
            "movement": movement,
            "matrix": matrix,
            "what": what,
            "upright": UPRIGHT[what],
            "before": before,
            "height": height,
            "groups": groups,
            "counts": {name: int(members.sum()) for name, members in groups.items()},
            "mean size": {n: float(np.abs(before[m]).mean()) if m.any() else None for n, m in groups.items()},
            "by chance": float(by_size.mean() * by_movement.mean() * len(before)),
            "limits": limits,
            "right": {method: self._models[method, level] for method in METHODS},
            "along": self._along,
            "dense": self._models[DENSE, 100],
            "bounds": (float(wide), (float(low), float(high))),
        }

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        return self._picture.draw_static(figure, numbers)

    def draw(self, numbers: dict[str, Any]) -> None:
        points = len(numbers["before"])
        counts = numbers["counts"]
        by_size, by_movement = (counts[group] + counts[BOTH] for group in (ONLY_MAGNITUDE, ONLY_MOVEMENT))
        words = {
            "title": f"{numbers['matrix'].capitalize()}: {points:,} weights",
            "kept": f"magnitude keeps {100 * by_size / points:.1f} % of these points, "
            f"movement ({numbers['movement']}) {100 * by_movement / points:.1f} %",
            "chance": f"by chance both would keep {numbers['by chance']:.0f}",
        }
        self._picture.draw(numbers, words)

    def summary(self, numbers: dict[str, Any]) -> str:
        found = numbers["counts"]
        return (
            f"{numbers['level']} % kept, {numbers['matrix']}, movement {numbers['movement']}. Of "
            f"{len(numbers['before']):,} weights both keep {found[BOTH]:,}, only magnitude {found[ONLY_MAGNITUDE]:,}, "
            f"only movement {found[ONLY_MOVEMENT]:,}, neither {found[NEITHER]:,}. Test sentences right: "
            f"{'; '.join(_recorded(NAMES[m], value) for m, value in numbers['right'].items())}; "
            f"{_recorded('dense', numbers['dense'])}."
        )

    def describe(self, numbers: dict[str, Any]) -> str:
        sizes = [f"{name} {size:.3f}" for name, size in reversed(numbers["mean size"].items()) if size is not None]
        return (
            f"Left: points, one a weight: from left to right its value before fine-tuning, upright "
            f"{numbers['upright']}; coloured by who keeps it{_limits_in_words(numbers)}. Mean size before: "
            f"{', '.join(sizes)}; by chance both would keep {numbers['by chance']:.0f}. Right: test sentences right "
            f"against the weights left, from 100 to 1 %, for magnitude, movement hard and movement soft, with a line "
            f"at this share and one for the dense model. {self.summary(numbers)}"
        )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.numpy() if tensor.dtype == torch.bool else tensor.float().numpy()


def _spread(value: Mapping[str, list[float]]) -> dict[str, float]:
    """The mean share left, and mean, lowest and highest accuracy over the seeds."""
    right, left = value["right"], value["left"]
    return {
        "left": sum(left) / len(left),
        "mean": sum(right) / len(right),
        "lowest": min(right),
        "highest": max(right),
        "seeds": len(right),
    }


def _recorded(name: str, value: Mapping[str, float]) -> str:
    several = value["seeds"] > 1
    seeds = f"{value['lowest']:.1f} to {value['highest']:.1f}, {value['seeds']} seeds" if several else "1 seed"
    left = "" if name == "dense" else f" with {value['left']:.1f} % left"
    return f"{name}{left} {value['mean']:.1f} % ({seeds})"


def _limits_in_words(numbers: dict[str, Any]) -> str:
    if not numbers["limits"]:
        return ""
    at = numbers["limits"][0]
    return f", with {'lines at plus and minus' if len(numbers['limits']) > 1 else 'a line at'} {at:.3f}, the cut"


def _buttons(options: Mapping[str, str], value: str) -> ToggleButtons:
    style = {"button_width": "auto", "description_width": "initial"}
    layout = Layout(width="max-content", margin="2px")
    return ToggleButtons(
        options=[(words, name) for name, words in options.items()], value=value, style=style, layout=layout
    )
