"""The state of linear attention, token by token, for a head of MiniLM on a short text (notebook 10).

Linear attention weighs a key by φ(q)ᵀφ(k) where the softmax takes exp(qᵀk / sqrt(d_head)) (Katharopoulos et al. 2020,
arXiv 2006.16236; `attention.linear`). All that it keeps of a text is S = sum φ(k_j) v_jᵀ and z = sum φ(k_j), of one
size whatever the length; the output is φ(q)ᵀS / φ(q)ᵀz. The softmax needs all keys and values again for every query.
The state is small, and so are the differences between its weights: they lie near one another where the softmax's have
peaks.

The model runs once, when the explorer is made; a control looks up its queries, keys and values.

NOTE MiniLM was trained with the softmax and sees both sides. Here its heads read from left to right, and φ is put in
without training: what is shown is how the readout works, not how well a trained linear head would do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from ipywidgets import HBox, IntSlider, Layout, ToggleButtons, Widget
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from effnlp_lessons.attention import patterns
from effnlp_lessons.attention.linear import feature_map
from effnlp_lessons.datasets.tokenizer import load_tokenizer
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.widgets.linear_state_picture import LinearStatePicture
from effnlp_lessons.widgets.pattern_picture import label
from effnlp_lessons.widgets.picture import Explorer

TEXT = (
    "The first hour is slow and the jokes are old, but when the two sisters finally meet in the empty theatre, "
    "nobody around me moved."
)
SHORTEST, LONGEST = 2, 48  # tokens; names still legible
ON, OFF = "with normaliser", "without"
BYTES = 4  # of a float32


class Projections(NamedTuple):
    """A text as queries, keys and values of every head."""

    tokens: list[str]
    q: Float[Tensor, "layers heads length d_head"]
    k: Float[Tensor, "layers heads length d_head"]
    v: Float[Tensor, "layers heads length d_head"]


@functools.cache
def read_projections(text: str) -> Projections:
    """Tokens of `text`, and queries, keys and values of every head of MiniLM on it; the model runs once."""
    encoding = load_tokenizer().encode(text)
    return Projections(encoding.tokens, *patterns.read_projections(load_minilm(), torch.tensor([encoding.ids])))


def check_projections(read: Projections) -> None:
    """Raise a ValueError unless q, k and v are of one text of 2 to 48 tokens, finite, with heads of at most 64."""
    length = len(read.tokens)
    if not SHORTEST <= length <= LONGEST:
        raise ValueError(f"the text must have {SHORTEST} to {LONGEST} tokens with [CLS] and [SEP], got {length}")
    for name, part in (("q", read.q), ("k", read.k), ("v", read.v)):
        if part.ndim != 4 or part.shape != (*read.k.shape[:2], length, read.k.shape[-1]) or part.shape[-1] > 64:
            raise ValueError(f"{name} must be (layers, heads, {length}, d_head <= 64), got {tuple(part.shape)}")
        if not torch.isfinite(part).all():
            raise ValueError(f"{name} must be finite")


class LinearStateExplorer(Explorer):
    """Go through a text and see S and z grow, what a query reads out of them, and the softmax beside it.

    Args:
        text: 2 to 48 tokens with [CLS] and [SEP].
        layer, head: of MiniLM, from 0.
        position: the token read last, from 0.
        normalised: whether the readout is divided by φ(q)ᵀz.
        read: gives the `Projections` of a text.

    Raises:
        ValueError: a choice that is not offered; a text, or projections, that `check_projections` refuses.
    """

    size = (9.0, 6.1)

    def __init__(
        self,
        text: str = TEXT,
        layer: int = 0,
        head: int = 0,
        position: int = 0,
        normalised: bool = True,
        read: Callable[[str], Projections] = read_projections,
    ) -> None:
        self._read = read(text)
        check_projections(self._read)
        layers, heads, length, d_head = self._read.k.shape
        for name, value, allowed in (
            ("layer", layer, range(layers)), ("head", head, range(heads)), ("position", position, range(length)),
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name} must be in 0 .. {allowed[-1]}, got {value!r}")
        self._head = functools.lru_cache(maxsize=128)(self._weigh)
        self._picture = LinearStatePicture(self._read.tokens, (d_head, d_head))
        super().__init__(
            {
                "position": _slider("token", position, length, "430px"),
                "layer": _slider("layer", layer, layers, "220px"),
                "head": _slider("head", head, heads, "220px"),
                "normaliser": ToggleButtons(
                    options=(ON, OFF),
                    value=ON if normalised else OFF,
                    description="read out",
                    style={"button_width": "auto", "description_width": "initial"},
                    layout=Layout(width="max-content", max_width="100%", margin="2px 16px 2px 0"),
                ),
            }
        )

    def arrange(self) -> list[Widget]:
        rows = (("position",), ("layer", "head", "normaliser"))
        wrap = Layout(flex_flow="row wrap")
        return [HBox([self.controls[name] for name in row], layout=wrap) for row in rows]

    # ------------------------------------------------------------------------ numbers

    def _weigh(self, layer: int, head: int) -> dict[str, np.ndarray]:
        """What does not depend on the token: features, values, all weights and outputs of one head."""
        q, k, v = (part[layer, head].double() for part in self._read[1:])
        length, d_head = q.shape
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        query, key = feature_map(q), feature_map(k)
        softmax = (q @ k.T / d_head**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        products = (query @ key.T).masked_fill(~seen, 0.0)
        shown = {"query": query, "key": key, "value": v, "softmax": softmax, "products": products}
        return {name: part.numpy() for name, part in shown.items()}

    def numbers(self, position: int, layer: int, head: int, normaliser: str) -> dict[str, Any]:
        """The state after a token and what its query reads out of it.

        "query", "key": φ(q), φ(k) of the token, "value" v, "update" φ(k) vᵀ; "state" S and "sums" z, of the tokens up
        to it. "denominator" φ(q)ᵀz. "weights" of every token so far and "outputs", both by "softmax" and "linear"; the
        linear ones undivided without normaliser. "cosine" and "error" (‖linear - softmax‖ / ‖softmax‖) of the outputs.
        "entropy": nats of either row of weights, "even" that of equal weights. "scales": what has the full colour.
        Bytes are of this head in float32.
        """
        parts, read = self._head(layer, head), position + 1
        query, key, value = (parts[name][position] for name in ("query", "key", "value"))
        keys, values = parts["key"][:read], parts["value"][:read]
        state, sums = keys.T @ values, keys.sum(0)
        denominator = float(query @ sums)
        normalised = normaliser == ON
        divisor = denominator if normalised else 1.0
        weights = {
            "softmax": parts["softmax"][position, :read],
            "linear": parts["products"][position, :read] / divisor,
        }
        outputs = {"softmax": weights["softmax"] @ values, "linear": query @ state / divisor}
        norms = {name: float(np.linalg.norm(output)) for name, output in outputs.items()}
        outermost = {name: float(np.abs(output).max()) for name, output in outputs.items()}
        if normalised:  # one scale for both
            outermost = dict.fromkeys(outermost, max(outermost.values()))
        whole = parts["key"].T @ parts["value"]
        length, d_head = parts["key"].shape
        return {
            "tokens": self._read.tokens,
            "position": position,
            "layer": layer,
            "head": head,
            "normalised": normalised,
            "query": query,
            "key": key,
            "value": value,
            "update": np.outer(key, value),
            "state": state,
            "sums": sums,
            "denominator": denominator,
            "weights": weights,
            "outputs": outputs,
            "cosine": float(outputs["linear"] @ outputs["softmax"]) / max(norms["linear"] * norms["softmax"], 1e-12),
            "error": float(np.linalg.norm(outputs["linear"] - outputs["softmax"])) / max(norms["softmax"], 1e-12),
            "norms": norms,
            "entropy": {name: _entropy(part) for name, part in weights.items()},
            "even": float(np.log(read)),
            "scales": {
                "state": float(np.abs(whole).max()),
                "sums": float(parts["key"].sum(0).max()),
                **outermost,
            },
            "state_bytes": BYTES * (d_head * d_head + d_head),
            "cache_bytes_per_token": BYTES * 2 * d_head,
            "cache_bytes": BYTES * 2 * d_head * read,
        }

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        return self._picture.draw_static(figure, numbers)

    def draw(self, numbers: dict[str, Any]) -> None:
        rows, columns = numbers["state"].shape
        divided = f"divided by φ(q)ᵀz = {numbers['denominator']:.3g}" if numbers["normalised"] else "not divided"
        words = {
            "heading": f"{_title(numbers)}: {_place(numbers, label)} is read",
            "state": f"state S: {rows} x {columns}, sum of {numbers['position'] + 1} φ(k) vᵀ",
            "outputs": f"{divided}\ncosine {numbers['cosine']:.2f}, error {_error(numbers)}",
            "update": _sizes(numbers),
            **{name: f"largest\n{part.max():.3g}" for name, part in numbers["weights"].items()},
        }
        self._picture.draw(numbers, words)

    def summary(self, numbers: dict[str, Any]) -> str:
        read, weights = numbers["position"] + 1, numbers["weights"]
        (rows, columns), cache = numbers["state"].shape, numbers["cache_bytes"]
        how = f"divided by φ(q)ᵀz = {numbers['denominator']:.3g}" if numbers["normalised"] else "not divided by φ(q)ᵀz"
        tops = ", ".join(f"{name} {_top(numbers, name)}" for name in weights)
        return (
            f"{_title(numbers)}: {_place(numbers)} is read. State: S of {rows} x {columns} and z of {rows} numbers, "
            f"{numbers['state_bytes']:,} bytes at every length; keys and values of {read} tokens: {cache:,} bytes. "
            f"Largest weight: {tops}. Entropy: softmax {numbers['entropy']['softmax']:.2f}, linear "
            f"{numbers['entropy']['linear']:.2f} of at most {numbers['even']:.2f} nats. Readout, {how}: cosine to "
            f"softmax's output {numbers['cosine']:.2f}, error {_error(numbers)}."
        )

    def describe(self, numbers: dict[str, Any]) -> str:
        return (
            "Left: the state S as a square of cells, vermilion above 0 and blue below, with φ(q) beside it, z on its "
            "other side, and under it what φ(q) reads out and softmax's output. Middle: the part that this token adds. "
            "Right: bytes against tokens, a level line for the state and a rising one for keys and values. Below: a "
            f"bar for every token so far, softmax's weights and the linear ones. {self.summary(numbers)}"
        )


def _entropy(weights: np.ndarray) -> float:
    """Nats of the weights, scaled to sum to 1."""
    shares = weights / weights.sum()
    return float(-(shares * np.log(np.maximum(shares, 1e-300))).sum())


def _title(numbers: dict[str, Any]) -> str:
    return f"Layer {numbers['layer']}, head {numbers['head']}"


def _place(numbers: dict[str, Any], write: Callable[[str], str] = str) -> str:
    position, tokens = numbers["position"], numbers["tokens"]
    return f"token {position + 1} of {len(tokens)}, “{write(tokens[position])}”,"


def _top(numbers: dict[str, Any], name: str) -> str:
    weights = numbers["weights"][name]
    return f"{weights.max():.3g} on “{numbers['tokens'][int(weights.argmax())]}”"


def _error(numbers: dict[str, Any]) -> str:
    return f"{numbers['error']:.2f}" if numbers["error"] < 100 else f"{numbers['error']:,.0f}"


def _sizes(numbers: dict[str, Any]) -> str:
    update, state = (float(np.linalg.norm(numbers[name])) for name in ("update", "state"))
    return f"size (norm) {update:.3g};\nS has {state:.3g} now"


def _slider(words: str, value: int, count: int, width: str) -> IntSlider:
    return IntSlider(
        value,
        0,
        count - 1,
        description=words,
        style={"description_width": "initial"},
        layout=Layout(width=width, margin="2px 12px 2px 2px"),
    )
