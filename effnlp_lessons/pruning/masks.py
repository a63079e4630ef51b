"""Masks: which weights stay, and how they stay away.

    a = (W ⊙ M) x,   M in {0, 1}        sparsity = 1 - |M|_0 / |M|

A mask is a bool tensor in the shape of its weight, True = kept; a model's masks are a dict by the name of the
parameter. Hassibi and Stork's three questions (1993) sort all of pruning: which weights go, how the others are
adjusted, and what it costs to find out. Magnitude pruning answers: the smallest |w|; not at all; nothing.

A rate is the share *of the weights that are still there* to remove, as in torch.nn.utils.prune: at 0.2, 0.8 of all are
left after one round and 0.64 after two. The number removed is round(rate * still there), exactly, ties by place.

NOTE state the denominator. 10 % of the 36 encoder matrices of MiniLM-L6 are 1.1 million weights; the embeddings, which
nobody prunes, hold 11.9 million: `shares_left` counts over both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.layers import block_linears

Masks = dict[str, Bool[Tensor, "*shape"]]
Scores = Mapping[str, Float[Tensor, "*shape"]]


def masked_product(
    weight: Float[Tensor, "d_out d_in"], mask: Bool[Tensor, "d_out d_in"], x: Float[Tensor, "*batch d_in"]
) -> Float[Tensor, "*batch d_out"]:
    """a = (W ⊙ M) x, the definition.

    Raises:
        ValueError: a mask of another shape than the weight, or not bool.
    """
    _check_mask("mask", mask, weight)
    return x @ (weight * mask).T


def prunable(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
    """The weight matrices that are pruned, by parameter name; biases, norms and embeddings are not.

    Args:
        names: names of linear layers; None: those in the blocks of a Transformer (no pooler, no head), and for a
            model without blocks all of its linear layers.

    Raises:
        ValueError: a name that is no linear layer, or no layer at all.
    """
    modules = dict(model.named_modules())
    if names is None:
        names = block_linears(model) or [n for n, module in modules.items() if isinstance(module, nn.Linear)]
    chosen = {}
    for name in names:
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(f"names: {name!r} is no nn.Linear of the model")
        chosen[f"{name}.weight" if name else "weight"] = modules[name].weight
    if not chosen:
        raise ValueError("the model has no linear layer to prune")
    return chosen


def magnitudes(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The score of magnitude pruning, |w|, for every prunable matrix."""
    return {name: weight.detach().abs() for name, weight in prunable(model, names).items()}


def full_masks(model: nn.Module, names: Iterable[str] | None = None) -> Masks:
    """Masks that keep everything."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable(model, names).items()}


# ---------------------------------------------------------------------------------------- which weights go


def keep_top(
    scores: Float[Tensor, "*shape"], rate: float, mask: Bool[Tensor, "*shape"] | None = None
) -> Bool[Tensor, "*shape"]:
    """Remove the round(rate * n) lowest of the n scores that `mask` still keeps; of equal ones the first.

    What `mask` has removed is no candidate and does not count: a pruned weight is 0, and would always be the lowest.

    Raises:
        ValueError: a rate outside 0 .. 1, scores that are not finite, a mask of another shape.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in 0 .. 1, got {rate}")
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    _check_mask("mask", mask, scores)
    there = scores[mask]
    if not torch.isfinite(there).all():
        raise ValueError("scores must be finite: NaN and infinity have no place in an order")
    count = round(rate * there.numel())
    kept = torch.ones_like(there, dtype=torch.bool)
    if count:
        threshold = there.kthvalue(count).values  # the largest of those that go; no order of all is needed
        kept = there > threshold
        equal = (there == threshold).nonzero().flatten()
        kept[equal[len(equal) - (there.numel() - count - int(kept.sum())) :]] = True
    new = mask.clone()
    new[mask] = kept
    return new


def local_masks(scores: Scores, rate: float | Mapping[str, float], masks: Masks | None = None) -> Masks:
    """Each matrix loses the same share (or its own, `{name: rate}`): one threshold a matrix."""
    rates = rate if isinstance(rate, Mapping) else dict.fromkeys(scores, rate)
    _check_names(rates, scores, "rate")
    return {
        name: keep_top(values, rates[name], None if masks is None else masks[name]) for name, values in scores.items()
    }


def global_masks(scores: Scores, rate: float, masks: Masks | None = None) -> Masks:
    """One threshold for all matrices together: a matrix of small weights loses more, and may lose everything."""
    flat = torch.cat([values.flatten() for values in scores.values()])
    there = None if masks is None else torch.cat([masks[name].flatten() for name in scores])
    kept = keep_top(flat, rate, there).split([values.numel() for values in scores.values()])
    return {name: part.view(values.shape) for (name, values), part in zip(scores.items(), kept, strict=True)}


def n_of_m(scores: Float[Tensor, "d_out d_in"], n: int = 2, m: int = 4) -> Bool[Tensor, "d_out d_in"]:
    """Keep the n highest of every m neighbours in a row, "2:4"; of equal ones the last.

    Raises:
        ValueError: rows that are no multiple of m long, or n not in 0 .. m.
    """
    if not 0 <= n <= m or m < 1 or scores.ndim != 2 or scores.shape[1] % m:
        raise ValueError(f"n:m must be 0 <= n <= m with rows of a multiple of m, got {n}:{m}, {tuple(scores.shape)}")
    groups = scores.unflatten(1, (-1, m))
    lowest = groups.argsort(dim=-1, stable=True)[..., : m - n]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, lowest, False).flatten(1)


def block_sums(
    scores: Float[Tensor, "d_out d_in"], block: tuple[int, int]
) -> Float[Tensor, "row_blocks column_blocks"]:
    """The sum of the scores in every block of `block` = (rows, columns).

    Raises:
        ValueError: blocks that do not tile the matrix.
    """
    rows, columns = block
    if scores.ndim != 2 or min(block) < 1 or scores.shape[0] % rows or scores.shape[1] % columns:
        raise ValueError(f"block must tile the matrix {tuple(scores.shape)}, got {block}")
    return scores.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).sum(dim=(1, 3))


def spread_blocks(kept: Bool[Tensor, "row_blocks column_blocks"], block: tuple[int, int]) -> Bool[Tensor, "d_out d_in"]:
    """A mask of blocks as a mask of weights."""
    return kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


# ------------------------------------------------------------------------------------- how they stay away


def apply_masks_(model: nn.Module, masks: Masks) -> None:
    """Set every masked weight of `model` to 0, in place. Once is not enough if an optimizer follows: see `masked`.

    Raises:
        ValueError: a name that the model lacks, or a mask of another shape.
    """
    parameters = _parameters(model, masks)
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask, 0.0)  # not a product: -0.0 and NaN would stay


@contextmanager
def masked(model: nn.Module, masks: Masks) -> Iterator[Callable[..., None]]:
    """Training during which no masked weight moves: gives the function to call after every optimizer step.

        with masked(model, masks) as keep:
            train(model, examples, loss, plan, after_step=keep)

    On entry the weights are set to 0. Until exit their gradients are 0 when they arrive, so that they do not count in
    the norm for clipping. A zero gradient does not hold a weight that has momentum: `keep` sets it to 0 again, and so
    does exit.
    """
    apply_masks_(model, masks)
    parameters = _parameters(model, masks)
    # as products: at random places a product is many times faster than a fill
    factors = [(parameters[name], mask.to(parameters[name].dtype)) for name, mask in masks.items()]
    handles = [
        weight.register_hook(lambda gradient, factor=factor: gradient * factor)
        for weight, factor in factors
        if weight.requires_grad
    ]

    def keep(*_: object) -> None:
        with torch.no_grad():
            for weight, factor in factors:
                weight.mul_(factor)

    try:
        yield keep
    finally:
        for handle in handles:
            handle.remove()
        apply_masks_(model, masks)  # a product may leave -0.0


# ------------------------------------------------------------------------------------------------ counting


def share_left(masks: Masks) -> float:
    """Kept weights over all weights of the masked matrices; the sparsity is 1 minus this."""
    total = sum(mask.numel() for mask in masks.values())
    if not total:
        raise ValueError("masks must hold at least one weight")
    return sum(int(mask.sum()) for mask in masks.values()) / total


def shares_left(model: nn.Module, masks: Masks) -> dict[str, float]:
    """What is left, over three denominators: the masked matrices, the blocks with biases and norms, the whole model."""
    _parameters(model, masks)
    gone = sum(int((~mask).sum()) for mask in masks.values())
    blocks = sum(p.numel() for name, p in model.named_parameters() if "blocks." in name)
    shares = {"masked matrices": share_left(masks)}
    if blocks:
        shares["blocks, with biases and norms"] = 1 - gone / blocks
    return shares | {"whole model": 1 - gone / sum(p.numel() for p in model.parameters())}


def _check_mask(name: str, mask: Tensor, weight: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(f"{name} must be bool of shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}")


def _check_names(given: Iterable[str], wanted: Iterable[str], argument: str) -> None:
    missing = sorted(set(wanted) - set(given))
    if missing:
        raise ValueError(f"{argument} has no entry for {', '.join(missing)}")


def _parameters(model: nn.Module, masks: Masks) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters())
    _check_names(parameters, masks, "model")
    for name, mask in masks.items():
        _check_mask(name, mask, parameters[name])
    return parameters
