"""Fewer keys than tokens, on a real head: what a query still finds when keys are mixed (notebook 09).

Linformer multiplies keys and values along the text by matrices of `slots` rows; memory-compressed attention takes one
slot for every few neighbours (`attention.linformer`, `attention.memory_compressed`). Beside these stand the best matrix
of the same rank, which has seen the weights, and weights that know nothing but the distance, one number for every
diagonal, as a random Synthesizer could learn them (`attention.synthesizer`).

The model runs once, when the explorer is made. Nothing is trained for fewer keys: what is shown is what mixing does to
a head that was trained with all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ipywidgets import IntSlider, Layout, ToggleButtons
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from effnlp_lessons.attention.linformer import pooling_projection
from effnlp_lessons.widgets.linear_state_explorer import TEXT, Projections, check_projections, read_projections
from effnlp_lessons.widgets.picture import Explorer
from effnlp_lessons.widgets.style import BLUE, GREY, VERMILION

NEIGHBOURS, RANDOM, RANK, DISTANCE = "mean of neighbours", "random mix", "best rank", "distance only"
WAYS = (NEIGHBOURS, RANDOM, RANK, DISTANCE)
HIGHEST = 1.6  # of the axis of errors; a larger one is cut off and its number printed


def mixed_weights(
    q: Float[Tensor, "length d_head"], k: Float[Tensor, "length d_head"], projection: Float[Tensor, "slots length"]
) -> Float[Tensor, "length length"]:
    """What each query gives to each token's value if keys and values are mixed by `projection` (Linformer, Eq. 7)."""
    return (q @ (projection @ k).T / q.shape[-1] ** 0.5).softmax(-1) @ projection


def random_projection(slots: int, length: int) -> Float[Tensor, "slots length"]:
    """Entries N(0, 1 / slots), always the same for one size (Johnson and Lindenstrauss; Linformer, Theorem 2)."""
    drawn = torch.randn(slots, length, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn / slots**0.5


def distance_weights(weights: Float[Tensor, "length length"]) -> Float[Tensor, "length length"]:
    """The mean of every diagonal, rows scaled to sum to 1: weights that do not look at the text."""
    length = len(weights)
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None] + length - 1
    total = torch.zeros(2 * length - 1, dtype=weights.dtype).index_add_(0, offset.flatten(), weights.flatten())
    mean = total / offset.flatten().bincount(minlength=2 * length - 1)
    fixed = mean[offset]
    return fixed / fixed.sum(-1, keepdim=True)


class ShorterKeysExplorer(Explorer):
    """Drag the number of mixed keys, and see a head's weights and the error of its output.

    Args:
        text: 2 to 48 tokens with [CLS] and [SEP].
        layer, head: of MiniLM, from 0.
        read: gives the `Projections` of a text.

    Raises:
        ValueError: a layer or head that is not there; a text, or projections, that `check_projections` refuses.
    """

    size = (9.0, 3.9)

    def __init__(
        self,
        text: str = TEXT,
        layer: int = 2,
        head: int = 9,
        read: Callable[[str], Projections] = read_projections,
    ) -> None:
        self._read = read(text)
        check_projections(self._read)
        layers, heads, length, _ = self._read.k.shape
        for name, value, count in (("layer", layer, layers), ("head", head, heads)):
            if value not in range(count):
                raise ValueError(f"{name} must be in 0 .. {count - 1}, got {value!r}")
        self._all_ways = functools.lru_cache(maxsize=256)(self._weigh)
        wide = Layout(width="300px", margin="2px 16px 2px 0")
        super().__init__(
            {
                "slots": IntSlider(length, 1, length, description="keys", layout=Layout(width="430px")),
                "way": ToggleButtons(options=WAYS, value=NEIGHBOURS, style={"button_width": "auto"}),
                "layer": IntSlider(layer, 0, layers - 1, description="layer", layout=wide),
                "head": IntSlider(head, 0, heads - 1, description="head", layout=wide),
            }
        )

    # ------------------------------------------------------------------------ numbers

    def _weigh(self, layer: int, head: int, slots: int) -> dict[str, tuple[np.ndarray, float]]:
        """For the softmax ("all keys") and every way its weights and the error of its output."""
        q, k, v = (part[layer, head].double() for part in self._read[1:])
        length = len(q)
        softmax = (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)
        u, s, vt = torch.linalg.svd(softmax)
        weights = {
            "all keys": softmax,
            NEIGHBOURS: mixed_weights(q, k, pooling_projection(length, slots)[0].double()),
            RANDOM: mixed_weights(q, k, random_projection(slots, length)),
            RANK: u[:, :slots] * s[:slots] @ vt[:slots],
            DISTANCE: distance_weights(softmax),
        }
        exact = softmax @ v
        return {name: (w.numpy(), float((w @ v - exact).norm() / exact.norm())) for name, w in weights.items()}

    def numbers(self, slots: int, way: str, layer: int, head: int) -> dict[str, Any]:
        """Weights and errors of a head with `slots` keys.

        "weights": (length, length) of the softmax, "mixed": of the chosen way; "errors": for each way
        ‖output - exact‖ / ‖exact‖ of the head's output; "macs": of scores and mixing, as a share of those with all
        keys (mixing keys and values by a full matrix would cost as much again; pooling only adds).
        """
        ways = self._all_ways(layer, head, slots)
        length = len(self._read.tokens)
        return {
            "weights": ways["all keys"][0],
            "mixed": ways[way][0],
            "errors": {name: ways[name][1] for name in WAYS},
            "way": way,
            "slots": slots,
            "length": length,
            "layer": layer,
            "head": head,
            "macs": 1.0 if way == DISTANCE else slots / length,
        }

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        return {"slots"} if numbers["way"] == DISTANCE else set()

    # ------------------------------------------------------------------------ picture

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
        blank = np.zeros_like(numbers["weights"])
        self._maps = []
        for axes in (left, middle):
            self._maps.append(axes.imshow(blank, cmap="Blues", vmin=0, vmax=0.5, interpolation="nearest"))
            axes.set(xticks=[], yticks=[], xlabel="key")
            axes.grid(visible=False)
        left.set(title="all keys", ylabel="query")
        middle.set(title="with mixed keys")
        self._bars = right.barh(range(len(WAYS)), [0] * len(WAYS), color=GREY)
        right.set(xlim=(0, HIGHEST + 0.3), title="error of the output", xlabel="0 exact, 1 as bad as zeros")
        right.set_yticks(range(len(WAYS)), WAYS)
        right.set_ylim(len(WAYS) - 0.5, -0.7)
        right.axvline(1, color=VERMILION, lw=1)
        right.grid(axis="y", visible=False)
        self._labels = [right.text(0, place, "", va="center", fontsize=9) for place in range(len(WAYS))]
        return [*self._maps, *self._bars, *self._labels]

    def draw(self, numbers: dict[str, Any]) -> None:
        for picture, weights in zip(self._maps, (numbers["weights"], numbers["mixed"]), strict=True):
            picture.set_data(weights)
        for bar, words, (name, error) in zip(self._bars, self._labels, numbers["errors"].items(), strict=True):
            bar.set_width(min(error, HIGHEST))
            bar.set_color(BLUE if name == numbers["way"] else GREY)
            words.set_text(f" {error:.2f}")
            words.set_x(min(error, HIGHEST))

    def describe(self, numbers: dict[str, Any]) -> str:
        errors = ", ".join(f"{name} {error:.2f}" for name, error in numbers["errors"].items())
        place = f"layer {numbers['layer']}, head {numbers['head']}"
        return (
            f"Attention weights of {place} with all {numbers['length']} keys and with {numbers['slots']} "
            f"({numbers['way']}). Error of the output: {errors}."
        )

    def summary(self, numbers: dict[str, Any]) -> str:
        error = numbers["errors"][numbers["way"]]
        if numbers["way"] == DISTANCE:
            return f"Weights that know only the distance, the same for every text: error {error:.2f}."
        share = f"{100 * numbers['macs']:.0f} % of the products of scores and mixing"
        return f"{numbers['slots']} of {numbers['length']} keys, {share}: error {error:.2f}."
