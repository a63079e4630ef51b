"""GShard: each token goes to its two best experts, and an expert takes at most C tokens of a group.

The paper is Lepikhin et al. 2020 (arXiv 2006.16668). N tokens are cut into groups of S, routed independently. With
gates g = softmax(x W_g), experts e1, e2 of a token by falling gate and counters c_e from zero, Algorithm 1 is
    pass 1, tokens in order: weight g1 / (g1 + g2) at e1 if c_e1 < C, else nothing; then c_e1 += 1
    l_aux = 1/E sum_e (c_e / S) m_e    with m_e the mean of g_e over the group; c_e is constant for the gradient
    pass 2, tokens in order: weight g2n = g2 / (g1 + g2) at e2 if c_e2 < C and 2 g2n > r, r ~ U(0, 1); then c_e2 += 1
C = 2 S / E. What is refused adds exactly 0: a token without a place passes through the residual sum alone. Weights are
not renormalised afterwards. L = l_nll + k l_aux.

The tokens then move into a buffer (experts, rows, d_model) and back. Einsums with one-hot (S, E, C) masks do it as in
the paper, at S E C d_model = 2 S² d_model products each way; sorting the choices by expert does it without a product.

NOTE c_e counts as in the paper: refused first choices and second choices not drawn take their number too. Mesh
TensorFlow and NLLB count a second choice only if it was drawn. Mesh TensorFlow also draws it with min(1, g2n / 0.2),
asks for C >= 4 and multiplies l_aux by E²; NLLB, as in transformers, draws with 2 g2 > r and weighs by g2 undivided.
NOTE l_aux is 1/E² when balanced (`aux_scale="paper"`); `"switch"` multiplies by E², which gives 1 (Fedus et al. 2021).
NOTE the paper's groups are equal. Here some tokens may be padding: S is then the number of real ones, and l_aux is
averaged over the groups by it.
NOTE an early token's place at e2 depends on the first choices of all tokens of its group, later ones too. In a causal
model that is a (small) look into the future, and a reason not to expect token-by-token results to be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

POLICIES = ("random", "all", "none")
AUX_SCALES = ("paper", "switch")


class Routing(NamedTuple):
    """Where every token goes. `tokens` = groups * size, group after group; `choices` is 2, or 1 for Switch.

    The buffer of an expert has `rows` = groups * capacity rows, those of group 0 first.
    """

    experts: Int[Tensor, "tokens choices"]  # by falling gate
    weights: Float[Tensor, "tokens choices"]  # 0 where dropped
    positions: Int[Tensor, "tokens choices"]  # row in the expert's buffer, -1 where dropped
    auxiliary_loss: Float[Tensor, ""]
    counts: Int[Tensor, " experts"]  # first choices, those without a place too
    groups: int
    capacity: int  # rows per expert and group

    @property
    def rows(self) -> int:
        return self.groups * self.capacity


def expert_capacity(tokens_per_group: int, experts: int, capacity_factor: float = 1.0, top_k: int = 2) -> int:
    """C = capacity_factor top_k S / E tokens, rounded up; never more than S. Factor 1 is the paper's 2 S / E.

    Raises:
        ValueError: a size < 1, or a capacity factor that is not positive (infinity is allowed: nothing is dropped).
    """
    for name, value in {"tokens_per_group": tokens_per_group, "experts": experts, "top_k": top_k}.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor must be > 0, got {capacity_factor}")
    if math.isinf(capacity_factor):
        return tokens_per_group
    return min(tokens_per_group, math.ceil(capacity_factor * top_k * tokens_per_group / experts))


# ------------------------------------------------------------------------------------------------ routing


def _gates(logits: Tensor, capacity: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(logits) in float32 or float64 and the mask, after a look at all three."""
    if logits.ndim != 3 or not logits.is_floating_point():
        got = f"{logits.dtype} {tuple(logits.shape)}"
        raise ValueError(f"logits must be floats of shape (groups, size, experts), got {got}")
    if not isinstance(capacity, int) or capacity < 1:
        raise ValueError(f"capacity must be an integer >= 1, got {capacity!r}")
    if mask is None:
        mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if mask.dtype != torch.bool or mask.shape != logits.shape[:2]:
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"mask must be bool of shape {tuple(logits.shape[:2])}, got {got}")
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)), mask


def _ranks(
    chosen: Int[Tensor, "groups size"], experts: int, mask: Bool[Tensor, "groups size"]
) -> tuple[Int[Tensor, "groups size"], Int[Tensor, "groups experts"]]:
    """How many earlier tokens of its group chose a token's expert, and how often each was chosen; a stable sort."""
    groups = chosen.shape[0]
    offsets = experts * torch.arange(groups, device=chosen.device)[:, None]
    keys = (chosen + offsets).masked_fill(~mask, groups * experts).flatten()  # what is masked has a key of its own
    order = keys.argsort(stable=True)
    counts = torch.bincount(keys, minlength=groups * experts + 1)
    starts = counts.cumsum(0) - counts
    ranks = torch.empty_like(keys)
    ranks[order] = torch.arange(len(keys), device=keys.device) - starts[keys[order]]
    return ranks.view_as(chosen), counts[:-1].view(groups, experts)


def _auxiliary_loss(gates: Tensor, counts: Tensor, mask: Tensor, aux_scale: str) -> Tensor:
    """1/E sum_e (c_e / S) m_e of every group, averaged over the groups by their number of tokens S."""
    if aux_scale not in AUX_SCALES:
        raise ValueError(f"aux_scale must be one of {AUX_SCALES}, got {aux_scale!r}")
    sizes = mask.sum(dim=1, keepdim=True)
    # m_e: only here does the gradient flow; the counts are integers
    means = (gates * mask[..., None]).sum(dim=1) / sizes.clamp(min=1)
    by_group = (counts * means).mean(dim=1)  # S l_aux
    scale = 1 if aux_scale == "paper" else gates.shape[2] ** 2
    return scale * by_group.sum() / mask.sum().clamp(min=1)


def gshard_routing(
    logits: Float[Tensor, "groups size experts"],
    capacity: int,
    *,
    policy: str = "random",
    draws: Float[Tensor, "groups size"] | torch.Generator | None = None,
    mask: Bool[Tensor, "groups size"] | None = None,
    aux_scale: str = "paper",
) -> Routing:
    """Algorithm 1, all tokens at once. Gates, weights and loss are float32, or float64 if `logits` is.

    Args:
        logits: x W_g, before the softmax. Of equal gates the expert with the lower number comes first.
        capacity: C, tokens that an expert takes from one group (`expert_capacity`).
        policy: which second experts are asked: "random" where 2 g2n > r, "all", or "none".
        draws: r in [0, 1), or the generator to draw them from (on its own device); needed for "random" only.
        mask: True = a real token. Others go nowhere, take no place and count in no mean.
        aux_scale: "paper" (1/E² when balanced) or "switch" (1 when balanced).

    Raises:
        ValueError: shapes, dtypes or names other than these, fewer than two experts, "random" without draws.
    """
    gates, mask = _gates(logits, capacity, mask)
    groups, size, experts = gates.shape
    if experts < 2:
        raise ValueError(f"logits must have at least 2 experts to choose two from, got {experts}")
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
    first = gates.argmax(dim=-1)
    second = gates.detach().scatter(2, first[..., None], -1.0).argmax(dim=-1)
    chosen = torch.stack([first, second], dim=-1)
    weights = gates.gather(2, chosen)
    weights = weights / weights.sum(dim=-1, keepdim=True)

    places, first_counts = _ranks(first, experts, mask)
    second_places, _ = _ranks(second, experts, mask)
    places = torch.stack([places, second_places + first_counts.gather(1, second)], dim=-1)
    asked = mask[..., None].expand(-1, -1, 2)
    if policy == "random":
        if isinstance(draws, torch.Generator):
            draws = torch.rand(groups, size, generator=draws, device=draws.device).to(logits.device)
        if draws is None or draws.shape != mask.shape:
            got = None if draws is None else tuple(draws.shape)
            raise ValueError(f'draws must have shape {(groups, size)} or be a generator for policy "random", got {got}')
        drawn = 2 * weights[..., 1] > draws
        asked = asked & torch.stack([torch.ones_like(drawn), drawn], dim=-1)
    elif policy == "none":
        asked = asked & torch.tensor([True, False], device=asked.device)
    loss = _auxiliary_loss(gates, first_counts, mask, aux_scale)
    return _routing(chosen, weights, places, asked, capacity, loss, first_counts.sum(dim=0))


def switch_routing(
    logits: Float[Tensor, "groups size experts"], capacity: int, mask: Bool[Tensor, "groups size"] | None = None
) -> Routing:
    """Top-1 routing of the Switch Transformer (Fedus et al. 2021, arXiv 2101.03961), for comparison.

    The weight is the gate itself, so that the router learns from it. The loss (Eqs. 4-6, without its factor alpha) is
    E sum_e f_e P_e, 1 when balanced: the share of tokens that choose e times the mean gate.

    Raises:
        ValueError: what `gshard_routing` raises.
    """
    gates, mask = _gates(logits, capacity, mask)
    weights, chosen = gates.max(dim=-1)
    places, counts = _ranks(chosen, gates.shape[2], mask)
    loss = _auxiliary_loss(gates, counts, mask, "switch")
    chosen, weights, places, asked = (x[..., None] for x in (chosen, weights, places, mask))
    return _routing(chosen, weights, places, asked, capacity, loss, counts.sum(dim=0))


def _routing(
    chosen: Tensor, weights: Tensor, places: Tensor, asked: Tensor, capacity: int, loss: Tensor, counts: Tensor
) -> Routing:
    """The choices (groups, size, choices) of all groups as one list; what is not asked or overflows is dropped."""
    groups = chosen.shape[0]
    taken = asked & (places < capacity)
    rows = places + capacity * torch.arange(groups, device=places.device)[:, None, None]
    positions = rows.masked_fill(~taken, -1)
    weights = weights.masked_fill(~taken, 0.0)
    return Routing(*(x.flatten(0, 1) for x in (chosen, weights, positions)), loss, counts, groups, capacity)


# --------------------------------------------------------------------------------- to the experts and back


def _taken(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """(token, choice, row of all buffers one after the other) of every choice that has a place."""
    token, choice = (routing.positions >= 0).nonzero(as_tuple=True)
    return token, choice, routing.experts[token, choice] * routing.rows + routing.positions[token, choice]


def dispatch(x: Float[Tensor, "tokens d_model"], routing: Routing) -> Float[Tensor, "experts rows d_model"]:
    """Copy the tokens into their experts' buffers by index; rows without a token are 0."""
    if x.ndim != 2 or len(x) != len(routing.positions):
        raise ValueError(f"x must be (tokens={len(routing.positions)}, d_model), got {tuple(x.shape)}")
    token, _, row = _taken(routing)
    experts = len(routing.counts)
    buffers = x.new_zeros(experts * routing.rows, x.shape[1])
    return buffers.index_put_((row,), x[token]).view(experts, routing.rows, -1)


def combine(outputs: Float[Tensor, "experts rows d_model"], routing: Routing) -> Float[Tensor, "tokens d_model"]:
    """Weighted sum of every token's expert outputs by index, summed in the dtype of the weights; dropped: exactly 0."""
    if outputs.shape[:-1] != (len(routing.counts), routing.rows):
        wanted = f"({len(routing.counts)}, {routing.rows}, d_model)"
        raise ValueError(f"outputs must be {wanted}, got {tuple(outputs.shape)}")
    token, choice, row = _taken(routing)
    weighted = outputs.flatten(0, 1)[row] * routing.weights[token, choice, None]
    total = weighted.new_zeros(len(routing.positions), outputs.shape[-1]).index_add_(0, token, weighted)
    return total.to(outputs.dtype)


def one_hot_masks(
    routing: Routing,
) -> tuple[Bool[Tensor, "groups size experts capacity"], Float[Tensor, "groups size experts capacity"]]:
    """The paper's dispatch mask and combine weights: entry [g, s, e, c] is about row c of expert e."""
    token, choice, _ = _taken(routing)
    groups, capacity = routing.groups, routing.capacity
    size = len(routing.positions) // groups
    entries = (token // size, token % size, routing.experts[token, choice], routing.positions[token, choice] % capacity)
    weights = routing.weights.new_zeros(groups, size, len(routing.counts), capacity)
    weights = weights.index_put(entries, routing.weights[token, choice])
    mask = torch.zeros(weights.shape, dtype=torch.bool, device=weights.device)
    return mask.index_put_(entries, torch.ones_like(token, dtype=torch.bool)), weights


def mix_by_index(x: Float[Tensor, "tokens d_model"], routing: Routing, experts: Callable[[Tensor], Tensor]) -> Tensor:
    """Dispatch, run `experts` on (experts, rows, d_model), combine; by index."""
    return combine(experts(dispatch(x, routing)), routing)


def mix_by_einsum(x: Float[Tensor, "tokens d_model"], routing: Routing, experts: Callable[[Tensor], Tensor]) -> Tensor:
    """The same by the paper's two einsums, for comparison: 2 S E C d_model products per group in addition."""
    mask, weights = one_hot_masks(routing)
    grouped = x.unflatten(0, mask.shape[:2])
    buffers = torch.einsum("gsec,gsm->egcm", mask.to(x.dtype), grouped)
    outputs = experts(buffers.flatten(1, 2)).unflatten(1, (routing.groups, routing.capacity))
    return torch.einsum("gsec,egcm->gsm", weights.to(x.dtype), outputs).flatten(0, 1)
