"""Do hashing and clustering find the keys that real heads attend to? All 72 heads of MiniLM-L6 on plays.

Every way to choose pairs is asked of every query: how many of its largest weights it finds (recall) and how much of
its attention weights (mass), against the pairs that it pays for. Beside it three choices of as many pairs, the same
number of keys for every query: at random, a window of the nearest in the text, and the best, which has seen the
weights. Nothing is trained.

Hashing: a pair is found if query and key share a bucket in at least one round (Reformer). Clustering: if one of the
centroids of a k-means on the text's queries and keys takes both (Routing Transformer, length / clusters tokens each).

NOTE both methods train a model with one vector for query and key. Here they are two, as the heads were trained
dense, and lie apart. Taking the mean key from all keys changes no softmax weight, for every score of a query falls by
the same number; the mean query has no such freedom, it is taken from the copy that is hashed alone. "centre":
"nothing", "keys", or "both" before hashing and clustering.
NOTE a bucket holds as many tokens as fall into it, so `work` is what a method pays if it computes its buckets whole.
Reformer cuts the sorted list into chunks of one size instead, which bounds the work and loses pairs of large buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from effnlp_lessons.attention.lsh import draw_rotations, lsh_buckets
from effnlp_lessons.attention.patterns import read_projections
from effnlp_lessons.attention.routing import routing_clusters, spherical
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.studies.attention_patterns import passage, spread
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.transformer import Encoder

CENTRES = ("nothing", "keys", "both")


# ------------------------------------------------------------------------------------------ what is chosen


class Chosen(NamedTuple):
    """The pairs that a method finds in the heads of a layer."""

    mask: Bool[Tensor, "heads length length"]
    work: Float[Tensor, " heads"]  # pairs computed, one found twice counted twice, as a share of length²


def queries_and_keys(encoder: Encoder, token_ids: Int[Tensor, "1 length"]) -> Iterator[tuple[Tensor, Tensor]]:
    """For every layer its heads' queries and keys, each (heads, length, d_head), on one text without padding."""
    q, k, _ = read_projections(encoder, token_ids)
    yield from zip(q, k, strict=True)


def centred(q: Tensor, k: Tensor, centre: str) -> tuple[Tensor, Tensor]:
    """q and k with their means over the text taken away, as `centre` says.

    Raises:
        ValueError: a centre that is none of `CENTRES`.
    """
    if centre not in CENTRES:
        raise ValueError(f"centre must be one of {CENTRES}, got {centre!r}")
    if centre == "both":
        q = q - q.mean(1, keepdim=True)
    return q, k if centre == "nothing" else k - k.mean(1, keepdim=True)


def hashed(
    q: Float[Tensor, "heads length d_head"],
    k: Float[Tensor, "heads length d_head"],
    rotations: Float[Tensor, "hashes d_head half_buckets"],
) -> Iterator[Chosen]:
    """Pairs in one bucket in the first round, in one of the first two, and so on: one `Chosen` for every round."""
    rounds = zip(lsh_buckets(q, rotations).unbind(1), lsh_buckets(k, rotations).unbind(1), strict=True)
    mask, work = torch.zeros(len(q), q.shape[1], q.shape[1], dtype=torch.bool), torch.zeros(len(q))
    for of_queries, of_keys in rounds:
        same = of_queries[:, :, None] == of_keys[:, None, :]
        mask, work = mask | same, work + same.float().mean((1, 2))
        yield Chosen(mask, work)


def spherical_kmeans(
    x: Float[Tensor, "heads tokens d_head"], clusters: int, generator: torch.Generator, steps: int = 20
) -> Float[Tensor, "heads clusters d_head"]:
    """Centroids on the sphere by Lloyd's steps, from `clusters` tokens drawn at random, the same for all heads.

    `x` on the sphere. The method's moving averages (`attention.routing.Centroids`) approach it batch by batch; here
    there is one text, so it is done to the end. A centroid that loses all its tokens stays.

    Raises:
        ValueError: more clusters than tokens, or none.
    """
    if not 1 <= clusters <= x.shape[1]:
        raise ValueError(f"clusters must be from 1 to {x.shape[1]}, the number of tokens, got {clusters}")
    centroids = x[:, torch.randperm(x.shape[1], generator=generator)[:clusters]]
    for _ in range(steps):
        z = F.one_hot((x @ centroids.transpose(1, 2)).argmax(-1), clusters).to(x.dtype)
        empty = (z.sum(1) == 0)[..., None]
        centroids = torch.where(empty, centroids, spherical(z.transpose(1, 2) @ x))
    return centroids


def clustered(
    q: Float[Tensor, "heads length d_head"],
    k: Float[Tensor, "heads length d_head"],
    clusters: int,
    generator: torch.Generator,
) -> Chosen:
    """Pairs whose query and key are both among the length / clusters nearest of one centroid."""
    q, k = spherical(q), spherical(k)
    length = q.shape[1]
    centroids = spherical_kmeans(torch.cat([q, k], dim=1), clusters, generator)
    # (heads, clusters, length), 1 where a centroid takes a query or key
    of_queries, of_keys = (
        torch.zeros(len(x), clusters, length).scatter_(
            2, routing_clusters(x[None], centroids, length // clusters)[0], 1.0
        )
        for x in (q, k)
    )
    together = of_queries.transpose(1, 2) @ of_keys
    return Chosen(together > 0, together.mean((1, 2)))


# ---------------------------------------------------------------------------------------- what it is worth


class Truth:
    """The weights of a layer's heads, and what a number of keys from them is worth: the mass, and the top keys.

    Args:
        weights: rows sum to 1.
        tops: the recall is asked of the `top` largest weights of a query, for every top of these.
        generator: draws the random choice.
    """

    def __init__(
        self, weights: Float[Tensor, "heads length length"], tops: tuple[int, ...], generator: torch.Generator
    ) -> None:
        length = weights.shape[-1]
        places = torch.arange(length)
        best = weights.argsort(dim=-1, descending=True, stable=True)
        self.worth = [weights]  # of every pair; a sum over all keys of a query is 1
        for top in tops:
            self.worth.append(torch.zeros_like(weights).scatter_(2, best[..., :top], 1 / top))
        orders = {
            "random": torch.rand(length, length, generator=generator).argsort(dim=-1).expand_as(weights),
            "window": (places[:, None] - places).abs().argsort(dim=-1, stable=True).expand_as(weights),
            "best": best,
        }
        # for every order: the worth of the first 0, 1, 2, ... keys, the mean over the queries
        self.first = {
            name: torch.stack([F.pad(worth.gather(2, order).mean(1).cumsum(-1), (1, 0)) for worth in self.worth], dim=1)
            for name, order in orders.items()
        }

    def of(self, mask: Bool[Tensor, "heads length length"]) -> dict[str, Float[Tensor, "heads numbers"]]:
        """Mass, then the recalls: of the mask ("found"), and of three choices that have as many pairs or a few more."""
        length = mask.shape[-1]
        keys = (mask.sum((1, 2)) + length - 1) // length  # for every query, rounded up
        table = {"found": torch.stack([(worth * mask).sum(-1).mean(-1) for worth in self.worth], dim=1)}
        for name, worth in self.first.items():
            table[name] = worth[torch.arange(len(mask)), :, keys]
        return table


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """All ways to choose, on `setting["passages"]` passages: means over the passages, then over the heads.

    Numbers: "columns", what the numbers of a row are: mass and recalls; "results", `{centre: {method: row}}`, methods
    "8 buckets, 2 rounds" and "4 clusters". A row: "pairs" found and "work", as shares of length²; "found", "random",
    "window", "best": the columns' means over the heads; "low", "high": the quartiles of "found" over the heads.
    """
    generator = torch.Generator().manual_seed(seed)
    encoder, length, tops = load_minilm(), setting["length"], tuple(setting["tops"])
    collected: dict[tuple[str, str], list[dict[str, Tensor]]] = {}  # for every method, one table a passage and layer
    for _ in range(setting["passages"]):
        token_ids = passage("plays", length, generator)
        for q, k in queries_and_keys(encoder, token_ids):
            truth = Truth((q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1), tops, generator)
            # one draw for all centres
            rotations = {
                buckets: draw_rotations(max(setting["rounds"]), q.shape[-1], buckets, generator)
                for buckets in setting["buckets"]
            }
            start = int(torch.randint(2**31, (), generator=generator))
            for centre in CENTRES:
                methods = _methods(*centred(q, k, centre), rotations, setting, start)
                for name, chosen in methods:
                    table = truth.of(chosen.mask) | {"pairs": chosen.mask.float().mean((1, 2)), "work": chosen.work}
                    collected.setdefault((centre, name), []).append(table)
    results: dict[str, dict[str, Any]] = {centre: {} for centre in CENTRES}
    for (centre, name), tables in collected.items():
        results[centre][name] = _row(tables, setting["passages"])
    return Outcome({"columns": ["mass", *(f"top {top}" for top in tops)], "results": results})


def _methods(q: Tensor, k: Tensor, rotations: dict, setting: dict, start: int) -> Iterator[tuple[str, Chosen]]:
    for buckets, drawn in rotations.items():
        for hashes, chosen in enumerate(hashed(q, k, drawn), 1):
            if hashes in setting["rounds"]:
                yield f"{buckets} buckets, {hashes} round{'s' if hashes > 1 else ''}", chosen
    for clusters in setting["clusters"]:
        yield f"{clusters} clusters", clustered(q, k, clusters, torch.Generator().manual_seed(start))


def _row(tables: list[dict[str, Tensor]], passages: int) -> dict[str, Any]:
    """Tables of every passage and layer, in this order -> what is written down of a method."""
    # the mean over the passages of every head: (layers * heads, ...)
    heads = {
        name: torch.stack([table[name] for table in tables]).unflatten(0, (passages, -1)).mean(0).flatten(0, 1)
        for name in tables[0]
    }
    row = {name: [round(x, 3) for x in heads[name].mean(0).tolist()] for name in ("found", "random", "window", "best")}
    quartiles = [spread(column)[1:] for column in heads["found"].T.tolist()]
    low, high = ([round(x, 3) for x in side] for side in zip(*quartiles, strict=True))
    shares = {name: round(heads[name].mean().item(), 4) for name in ("pairs", "work")}
    return shares | row | {"low": low, "high": high}


def over_seeds(runs: list[dict[str, Any]], centre: str) -> dict[str, dict[str, Any]]:
    """Per method: the means of every number over the runs, and "seeds": smallest and largest mass found."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for one in runs:
        for name, row in one["results"][centre].items():
            rows.setdefault(name, []).append(row)
    table = {}
    for name, own in rows.items():
        mass = [row["found"][0] for row in own]
        means = {
            what: torch.tensor([row[what] for row in own], dtype=torch.float64).mean(0).tolist() for what in own[0]
        }
        table[name] = means | {"seeds": [min(mass), max(mass)]}
    return table


STUDY = Study(
    name="key_recall",
    question="How many of the keys that real heads attend to do hash buckets and clusters find, at which cost?",
    run=run,
    recorded=(
        {"length": 512, "passages": 3, "tops": [8, 16], "buckets": [8, 16, 32], "rounds": [1, 2, 4, 8],
         "clusters": [4, 8, 16]},
    ),
    full=(
        {"length": 512, "passages": 10, "tops": [8, 16], "buckets": [4, 8, 16, 32, 64], "rounds": [1, 2, 4, 8, 16],
         "clusters": [2, 4, 8, 16, 32]},
    ),
    seeds=(0, 1, 2),
    minutes=2,
)  # fmt: skip
