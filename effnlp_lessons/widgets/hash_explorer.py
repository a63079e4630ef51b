"""Which keys a query meets when vectors are hashed: buckets, sorted chunks, rounds (notebook 09).

LSH attention (Kitaev et al. 2020, arXiv 2001.04451; `attention.lsh`) sorts vectors by the bucket of a random rotation
and lets a chunk of the sorted list see itself and the chunk before it. Two vectors at a small angle share a bucket
often, but not always: wherever the borders of the buckets fall, they part some neighbours. Another round has other
borders. Each of the vectors here looks for its strongest key, and the picture shows what one round tears apart
and a later one brings together again.

The vectors lie on a circle, where the buckets can be seen as arcs, or they are the keys of a head of MiniLM. The model
runs once, when the explorer is made; a control looks up its keys.

NOTE the Reformer shares one projection between queries and keys, MiniLM does not: here its keys stand for both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from ipywidgets import HBox, IntSlider, Layout, ToggleButtons, Widget
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from torch import Tensor

from effnlp_lessons.attention.lsh import draw_rotations, lsh_buckets, lsh_pairs, unit_keys
from effnlp_lessons.attention.patterns import captured_mass, pairs
from effnlp_lessons.dense_attention import masked_softmax
from effnlp_lessons.widgets.hash_picture import APART, RESCUED, TOGETHER, HashPicture
from effnlp_lessons.widgets.linear_state_explorer import Projections, read_projections
from effnlp_lessons.widgets.picture import Explorer

TEXT = (
    "The first hour is slow and the jokes are old, but when the two sisters finally meet in the empty theatre, "
    "nobody around me moved. I cried, I laughed, and I will see it again."
)
CIRCLE, KEYS = "circle", "keys of MiniLM"
SHORTEST, LONGEST = 10, 48  # tokens; the list has room for no more
MOST_BUCKETS, MOST_ROUNDS, MOST_SEED = 32, 8, 99
SHARPNESS = 16.0  # length of the vectors on the circle: scores are 16 times the cosine


def circle_vectors(length: int) -> Float[Tensor, "length 2"]:
    """`length` vectors of length `SHARPNESS` at random angles, the same ones every time."""
    angles = 2 * math.pi * torch.rand(length, generator=torch.Generator().manual_seed(0))
    return SHARPNESS * torch.stack([angles.cos(), angles.sin()], dim=-1)


def spread_directions(x: Float[Tensor, "length d_head"]) -> Float[Tensor, "length 2"]:
    """`x` in its two directions of largest spread (principal components), scaled into the square from -1 to 1."""
    centred = x - x.mean(0)
    flat = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    return flat / flat.abs().max().clamp(min=1e-12)


class HashExplorer(Explorer):
    """Choose buckets, rounds, chunk and rotations; see who meets whom, and which strongest keys are missed.

    Args:
        text: 10 to 48 tokens with [CLS] and [SEP]; the circle has as many vectors.
        vectors: "circle" or "keys of MiniLM".
        layer, head: of MiniLM, from 0.
        buckets: even, 2 to 32.
        rounds: of hashing, 1 to 8; a round keeps its rotation when others are added.
        seed: from which the rotations are drawn, 0 to 99.
        chunk: tokens in a chunk, 2 to the number of tokens: then nothing is hashed; None: two mean buckets.
        read: gives the `Projections` of a text.

    Raises:
        ValueError: a choice that is not offered; a text of another length; keys that are not finite.
    """

    size = (9.0, 5.3)
    scene = ("vectors",)

    def __init__(
        self,
        text: str = TEXT,
        vectors: str = CIRCLE,
        layer: int = 0,
        head: int = 0,
        buckets: int = 8,
        rounds: int = 1,
        seed: int = 0,
        chunk: int | None = None,
        read: Callable[[str], Projections] = read_projections,
    ) -> None:
        given = read(text)
        self._tokens, self._keys = given.tokens, given.k
        length = len(self._tokens)
        if not SHORTEST <= length <= LONGEST:
            raise ValueError(f"text must have {SHORTEST} to {LONGEST} tokens with [CLS] and [SEP], got {length}")
        if self._keys.ndim != 4 or self._keys.shape[2] != length or not torch.isfinite(self._keys).all():
            got = tuple(self._keys.shape)
            raise ValueError(f"keys must be finite and (layers, heads, {length}, d_head), got {got}")
        layers, heads = self._keys.shape[:2]
        for name, value, allowed in (
            ("vectors", vectors, (CIRCLE, KEYS)),
            ("layer", layer, range(layers)),
            ("head", head, range(heads)),
            ("buckets", buckets, range(2, MOST_BUCKETS + 1, 2)),
            ("rounds", rounds, range(1, MOST_ROUNDS + 1)),
            ("seed", seed, range(MOST_SEED + 1)),
            ("chunk", chunk, (None, *range(2, length + 1))),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be in {allowed}, got {value!r}")
        if chunk is None:
            chunk = -(-2 * length // buckets)  # sec. 2: buckets = 2 length / chunk
        self._picture = HashPicture(MOST_ROUNDS)
        self._chosen = functools.lru_cache(maxsize=128)(self._look_up)
        super().__init__(
            {
                "vectors": ToggleButtons(
                    options=(CIRCLE, KEYS),
                    value=vectors,
                    style={"button_width": "auto"},
                    layout=Layout(width="max-content", margin="2px 16px 2px 0"),
                ),
                "layer": _slider("layer", layer, 0, layers - 1, "230px"),
                "head": _slider("head", head, 0, heads - 1, "230px"),
                "buckets": _slider("buckets", buckets, 2, MOST_BUCKETS, "220px", step=2),
                "rounds": _slider("rounds", rounds, 1, MOST_ROUNDS, "210px"),
                "seed": _slider("rotations", seed, 0, MOST_SEED, "220px"),
                "chunk": _slider("chunk", chunk, 2, length, "210px"),
            }
        )

    def arrange(self) -> list[Widget]:
        rows = (("vectors", "layer", "head"), ("buckets", "rounds", "seed", "chunk"))
        return [HBox([self.controls[name] for name in row], layout=Layout(flex_flow="row wrap")) for row in rows]

    def idle(self, numbers: dict[str, Any]) -> set[str]:
        without_head = {"layer", "head"} if numbers["circle"] else set()
        return without_head | (set() if numbers["hashed"] else {"buckets", "rounds", "seed"})

    # ------------------------------------------------------------------------ numbers

    def _look_up(self, vectors: str, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors, where they are shown, and the weights of full attention over them."""
        qk = circle_vectors(len(self._tokens)) if vectors == CIRCLE else self._keys[layer, head].float()
        points = qk / SHARPNESS if vectors == CIRCLE else spread_directions(unit_keys(qk))
        others = ~torch.eye(len(qk), dtype=torch.bool)
        scores = qk @ unit_keys(qk).T
        return qk, points, masked_softmax(scores[None, None], others)[0, 0]

    def numbers(
        self, vectors: str, layer: int, head: int, buckets: int, rounds: int, seed: int, chunk: int
    ) -> dict[str, Any]:
        """What is met, and what of it counts. "hashed" is False where one chunk holds all: then every pair is met.

        "bucket of" and "order" (rounds, length): each vector's bucket, and the vectors as sorted by it. "met" (queries,
        keys): how often, `lsh_pairs`; "pairs" are met at least once; "scores per query" are computed, also for those
        met twice. "mass": share of the full attention's "weights" on the pairs that are met. "strongest": the key of
        the largest weight for each query; "together": of how many queries it shares a bucket in one of the first 1, 2,
        ... rounds; "status" by query: 0 in the first, 1 in a later one ("rescued"), 2 in none ("apart"); "found": how
        many meet it, in the bucket or beside it in the chunks.
        """
        circle = vectors == CIRCLE
        qk, points, weights = self._chosen(vectors, 0 if circle else layer, 0 if circle else head)
        length, d_head = qk.shape
        hashed = chunk < length
        bucket_of = torch.zeros(1, length, dtype=torch.long)
        if hashed:
            # all rounds are drawn, so that the first ones stay what they are when another is added
            rotations = draw_rotations(MOST_ROUNDS, d_head, buckets, torch.Generator().manual_seed(seed))
            bucket_of = lsh_buckets(qk, rotations[:rounds])
        met = lsh_pairs(bucket_of[None, None], chunk)[0, 0]
        strongest = weights.argmax(-1)
        shared = (bucket_of == bucket_of[:, strongest]).cummax(0).values  # in one of the rounds so far
        status = torch.where(shared[0], TOGETHER, torch.where(shared[-1], RESCUED, APART))
        return {
            "vectors": vectors,
            "circle": circle,
            "layer": layer,
            "head": head,
            "buckets": buckets,
            "rounds": rounds,
            "seed": seed,
            "chunk": chunk,
            "hashed": hashed,
            "length": length,
            "tokens": [str(place) for place in range(length)] if circle else self._tokens,
            "points": points.numpy(),
            "bucket of": bucket_of.numpy(),
            "order": bucket_of.argsort(dim=-1, stable=True).numpy(),
            "chunks": -(-bucket_of.numel() // chunk),
            "weights": weights.numpy(),
            "met": met.numpy(),
            "pairs": pairs(met > 0),
            "pairs per query": pairs(met > 0) / length,
            "scores per query": 2 * chunk * rounds if hashed else length,
            "mass": captured_mass(weights[None], met[None] > 0).item(),
            "strongest": strongest.numpy(),
            "together": shared.sum(1).tolist(),
            "rescued": int((status == RESCUED).sum()),
            "apart": int((status == APART).sum()),
            "status": status.numpy(),
            "found": int((met[torch.arange(length), strongest] > 0).sum()),
        }

    # ------------------------------------------------------------------------ picture and words

    def draw_static(self, figure: Figure, numbers: dict[str, Any]) -> list[Artist]:
        return self._picture.draw_static(figure, numbers)

    def draw(self, numbers: dict[str, Any]) -> None:
        self._picture.draw(numbers)

    def summary(self, numbers: dict[str, Any]) -> str:
        length, rounds = numbers["length"], len(numbers["bucket of"])
        source = "circle" if numbers["circle"] else f"keys of layer {numbers['layer']}, head {numbers['head']}"
        if not numbers["hashed"]:
            return (
                f"{length} vectors, {source}: one chunk holds all of them, so nothing is hashed and all "
                f"{length * (length - 1):,} pairs are met."
            )
        sentences = [
            f"{length} vectors, {source}; {numbers['buckets']} buckets, {rounds} round{'s' * (rounds > 1)}, chunks of "
            f"{numbers['chunk']}.",
            f"A query meets {numbers['pairs per query']:.1f} of {length - 1} keys, for which "
            f"{numbers['scores per query']} scores are computed (dense {length}), and with them "
            f"{100 * numbers['mass']:.1f} % of its weight.",
            f"The first round puts {numbers['together'][0]} of {length} vectors into the bucket of their strongest key",
        ]
        if rounds == 1:
            sentences[-1] += f" and {numbers['apart']} into another."
        else:
            sentences[-1] += f"; later rounds rescue {numbers['rescued']}, and {numbers['apart']} stay apart."
        met_anyway = f"In the chunks {numbers['found']} meet their strongest key."
        return " ".join([*sentences, met_anyway])

    def describe(self, numbers: dict[str, Any]) -> str:
        where = "on a circle, a ring for each round" if numbers["circle"] else "in two directions, coloured by round 1"
        return (
            f"Left the vectors {where}, a colour for each bucket; below them the list sorted by bucket, a row for each "
            f"round, in {numbers['chunks']} chunk{'s' * (numbers['chunks'] > 1)}. Right a square of queries by keys: "
            f"pairs that are met blue, the others striped. {self.summary(numbers)}"
        )


def _slider(words: str, value: int, least: int, most: int, width: str, step: int = 1) -> IntSlider:
    return IntSlider(
        value,
        least,
        most,
        step,
        description=words,
        style={"description_width": "initial"},
        layout=Layout(width=width, margin="2px 8px 2px 0"),
    )
