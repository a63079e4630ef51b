"""Sparsely gated mixture of experts: a noisy gate sends each token to k of many networks (Shazeer et al. 2017).

"Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer" (arXiv 1701.06538). The output is
y = sum_i G(x)_i E_i(x) (Eq. 1), and only experts with a gate above zero are computed:
    H(x)_i = (x W_g)_i + eps_i softplus((x W_noise)_i), eps_i ~ N(0, 1)     G(x) = softmax(top k of H(x))    (Eqs. 3-5)
Left alone, such a gate comes to love the few experts that it trains most. Two losses w CV², the squared coefficient of
variation over the experts, hold against it: of the importance sum_x G(x) (Eqs. 6-7), and of the load (appendix A).
The load is a count, and a count has no gradient; but the noise makes it smooth. P(x, i) is the chance that expert i is
chosen if its noise alone is drawn anew, and Load_i = sum_x P(x, i) (Eqs. 8-11). With W_g = W_noise = 0 at the start,
training begins in balance. Appendix B gates twice: among groups, then among the experts of a chosen group.

NOTE the authors' code adds 0.01 to the size of the noise, which the paper does not; so do we (`NOISE_FLOOR`).
NOTE equal values of H go to the expert of the lower number. Without noise, a gate of zeros picks experts 0 .. k - 1.
NOTE there is no load without noise: P(x, i) would be a step. The authors' code divides by nearly zero there.
NOTE the experts are the two-layer feed-forward networks of a Transformer; the paper puts them between LSTM layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.architectures.experts import Experts
from effnlp_lessons.dense_attention import at_least_float32, check_key_padding_mask
from effnlp_lessons.transformer import TransformerConfig

NOISE_FLOOR = 0.01  # least standard deviation of the noise
CV_FLOOR = 1e-10  # added to the squared mean in CV², so that a batch without tokens has a loss of 0


class Gating(NamedTuple):
    """What a gate says of a batch of tokens; float32, or float64 if the tokens are."""

    gates: Float[Tensor, "tokens ... experts"]  # G(x): k of them above zero, with sum 1
    load: Float[Tensor, "... experts"] | None  # estimated tokens per expert, None without noise


def _check_k(name: str, k: int, experts: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= experts:
        raise ValueError(f"{name} must be an integer from 1 to the {experts} to choose from, got {k!r}")


# -------------------------------------------------------------------------------------------------- the gate


def kth_excluding(values: Float[Tensor, "tokens experts"], k: int) -> Float[Tensor, "tokens experts"]:
    """For every i the k-th largest value of its row without value i (appendix A); -inf where k is the whole row.

    That is the (k+1)-th largest of the row if value i is among the k largest, and the k-th largest if it is not.

    Raises:
        ValueError: a k below 1 or above the number of experts.
    """
    _check_k("k", k, values.shape[-1])
    if k == values.shape[-1]:
        return torch.full_like(values, -math.inf)
    largest = values.topk(k + 1, dim=-1).values
    kth, next_one = largest[:, k - 1 : k], largest[:, k:]
    return torch.where(values > next_one, next_one, kth)


def smooth_load(
    clean: Float[Tensor, "tokens experts"],
    deviation: Float[Tensor, "tokens experts"],
    noisy: Float[Tensor, "tokens experts"],
    k: int,
) -> Float[Tensor, " experts"]:
    """Estimated number of tokens of every expert, differentiable: Load_i = sum_x P(x, i) (Eqs. 8-10).

    P(x, i) = Φ((clean_i - kth_excluding(noisy, k, i)) / deviation_i), Φ the distribution function of N(0, 1): the
    chance that expert i is among the k if its noise is drawn anew and that of the others is kept.

    Args:
        clean: x W_g.
        deviation: standard deviation of the noise, above zero.
        noisy: H(x), `clean` with its noise.

    Raises:
        ValueError: a k below 1 or above the number of experts.
    """
    if k == clean.shape[-1]:  # every expert is chosen, whatever the noise
        return clean.new_full(clean.shape[1:], len(clean))
    return torch.special.ndtr((clean - kth_excluding(noisy, k)) / deviation).sum(dim=0)


def noisy_top_k_gating(
    x: Float[Tensor, "tokens d_model"],
    w_gate: Float[Tensor, "d_model experts"],
    w_noise: Float[Tensor, "d_model experts"],
    k: int,
    noise: Float[Tensor, "tokens experts"] | None = None,
) -> Gating:
    """Gates and load of noisy top-k gating (Eqs. 3-5 and 8-10), computed in float32 or float64.

    Args:
        noise: drawn from N(0, 1), in training; None gates without noise and gives no load.

    Raises:
        ValueError: shapes that do not fit, or a k below 1 or above the number of experts.
    """
    if x.ndim != 2 or w_gate.ndim != 2 or w_gate.shape != w_noise.shape or x.shape[1] != w_gate.shape[0]:
        shapes = f"x {tuple(x.shape)}, w_gate {tuple(w_gate.shape)}, w_noise {tuple(w_noise.shape)}"
        raise ValueError(f"x must be (tokens, d_model), w_gate and w_noise (d_model, experts), got {shapes}")
    experts = w_gate.shape[1]
    _check_k("k", k, experts)
    if noise is not None and tuple(noise.shape) != (len(x), experts):
        raise ValueError(f"noise must have shape {(len(x), experts)}, got {tuple(noise.shape)}")
    with torch.autocast(x.device.type, enabled=False):  # in bfloat16 many experts would tie
        x, w_gate, w_noise = at_least_float32(x), at_least_float32(w_gate), at_least_float32(w_noise)
        clean = noisy = x @ w_gate
        load = None
        if noise is not None:
            deviation = F.softplus(x @ w_noise) + NOISE_FLOOR
            noisy = clean + noise.to(clean.dtype) * deviation  # H(x), Eq. 4
            load = smooth_load(clean, deviation, noisy, k)
        # KeepTopK (Eq. 5): a softmax of the k largest alone is one with -inf for the others
        chosen = noisy.argsort(dim=-1, descending=True, stable=True)[:, :k]
        gates = torch.zeros_like(noisy).scatter(1, chosen, noisy.gather(1, chosen).softmax(dim=-1))
    return Gating(gates, load)


# ------------------------------------------------------------------------------------------------ the losses


def cv_squared(x: Tensor) -> Float[Tensor, ""]:
    """Squared coefficient of variation of all numbers in `x`: population variance / (mean² + 1e-10)."""
    x = at_least_float32(x)
    return x.var(correction=0) / (x.mean().square() + CV_FLOOR)


def importance_loss(gates: Float[Tensor, "tokens ... experts"], weight: float = 0.1) -> Float[Tensor, ""]:
    """weight CV(sum_x G(x))² (Eqs. 6-7): experts should have equal sums of gates."""
    return weight * cv_squared(gates.sum(dim=0))


def load_loss(load: Float[Tensor, "... experts"], weight: float = 0.1) -> Float[Tensor, ""]:
    """weight CV(Load)² (Eq. 11): experts should have equal numbers of tokens."""
    return weight * cv_squared(load)


# -------------------------------------------------------------------------------------------- the two levels


def hierarchical_gating(
    x: Float[Tensor, "tokens d_model"],
    primary: tuple[Float[Tensor, "d_model groups"], Float[Tensor, "d_model groups"]],
    secondary: tuple[Float[Tensor, "groups d_model experts"], Float[Tensor, "groups d_model experts"]],
    k: tuple[int, int],
    noise: tuple[Float[Tensor, "tokens groups"], Float[Tensor, "tokens groups experts"]] | None = None,
) -> Gating:
    """A gate over groups, and within each chosen group a gate over its experts (appendix B).

    gates (tokens, groups, experts): G_primary(x)_i G_i(x)_j (Eqs. 12, 13). A group's gate sees its tokens alone.
    load (groups, experts): Load_primary(X)_i Load_i(X_i)_j / |X_i| (Eq. 14), X_i the tokens that chose group i. The
    factor Load_primary is what carries a gradient to the primary gate.

    NOTE for a group that nobody chose the last fraction is 0 / 0. We put k / experts there, what an even gate gives:
    then the load loss can bring the group back.

    Args:
        primary, secondary: W_g and W_noise of each level.
        k: groups per token, and experts per chosen group.
        noise: drawn from N(0, 1) for each level, in training; None gates without noise and gives no load.

    Raises:
        ValueError: shapes that do not fit, a k below 1 or above what there is to choose from.
    """
    w_gate, w_noise = secondary
    if w_gate.ndim != 3 or w_gate.shape != w_noise.shape or w_gate.shape[0] != primary[0].shape[-1]:
        shapes = f"{tuple(w_gate.shape)} and {tuple(w_noise.shape)} for {primary[0].shape[-1]} groups"
        raise ValueError(f"secondary must be two tensors (groups, d_model, experts), got {shapes}")
    groups, _, experts = w_gate.shape
    _check_k("k[0]", k[0], groups)
    _check_k("k[1]", k[1], experts)
    if noise is not None and tuple(noise[1].shape) != (len(x), groups, experts):
        raise ValueError(f"noise[1] must have shape {(len(x), groups, experts)}, got {tuple(noise[1].shape)}")
    outer = noisy_top_k_gating(x, *primary, k[0], None if noise is None else noise[0])
    gates, loads = [], []
    for i in range(groups):
        members = outer.gates[:, i].nonzero().squeeze(1)  # X_i
        inner = noisy_top_k_gating(
            x[members], w_gate[i], w_noise[i], k[1], None if noise is None else noise[1][members, i]
        )
        product = outer.gates[members, i, None] * inner.gates
        gates.append(product.new_zeros(len(x), experts).index_copy(0, members, product))
        if noise is not None:
            share = inner.load / len(members) if len(members) else torch.full_like(inner.load, k[1] / experts)
            loads.append(outer.load[i] * share)
    return Gating(torch.stack(gates, dim=1), torch.stack(loads) if noise is not None else None)


# ---------------------------------------------------------------------------------------- the channel mixers


def mix_experts(
    experts: Experts, x: Float[Tensor, "tokens d_model"], gates: Float[Tensor, "tokens experts"]
) -> Float[Tensor, "tokens d_model"]:
    """y = sum_i G(x)_i E_i(x) (Eq. 1); each expert reads the tokens whose gate is above zero, as many as they are."""
    expert, token = gates.t().nonzero(as_tuple=True)  # sorted by expert
    rows = x[token].split(torch.bincount(expert, minlength=len(experts)).tolist())
    # taken apart once: the backward of one weights[e] after the other would fill a tensor of all experts for each
    weights = (experts.expand, experts.expand_bias, experts.contract, experts.contract_bias)
    outputs = []
    for part, (expand, expand_bias, contract, contract_bias) in zip(
        rows, zip(*(w.unbind() for w in weights), strict=True), strict=True
    ):
        hidden = experts.activation(torch.addmm(expand_bias, part, expand))
        outputs.append(torch.addmm(contract_bias, hidden, contract))
    output = torch.cat(outputs)
    weighted = output * gates[token, expert, None]
    return weighted.new_zeros(x.shape).index_add(0, token, weighted).to(output.dtype)


class SparselyGatedExperts(nn.Module):
    """Experts behind a gate of either kind: a channel mixer, the base of `NoisyTopKMoE` and `HierarchicalMoE`.

    There is no capacity: every token reaches its k experts. In training, noise is drawn from a generator of this
    module, seeded by `seed` (a second pass over the same tokens, as in checkpointing, draws other noise). In evaluation
    there is none. Padding takes no part: it reaches no expert, enters neither loss, and its output is 0.

    After a forward pass `last_gating` holds the gates (without gradient, real tokens only, in the order of
    `key_padding_mask`) and the load, and `auxiliary_loss` the sum of both losses; in evaluation, of the first alone.
    """

    def __init__(
        self, config: TransformerConfig, experts: int, importance_weight: float, load_weight: float, seed: int
    ) -> None:
        super().__init__()
        for name, weight in (("importance_weight", importance_weight), ("load_weight", load_weight)):
            if not weight >= 0:
                raise ValueError(f"{name} must be >= 0, got {weight}")
        self.experts = Experts(config, experts, seed)
        self.importance_weight, self.load_weight = importance_weight, load_weight
        self.generator = torch.Generator().manual_seed(seed)
        self.last_gating: Gating | None = None
        self.auxiliary_loss: Tensor | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"last_gating": None, "auxiliary_loss": None}  # a graph cannot be copied

    def draw_noise(self, *shape: int) -> Tensor:
        """The next numbers of N(0, 1), float32 on the CPU whatever the device: the same noise everywhere."""
        return torch.randn(*shape, generator=self.generator).to(next(self.parameters()).device)

    def gate(self, x: Float[Tensor, "tokens d_model"]) -> Gating:
        """The gates of real tokens, (tokens, experts) or (tokens, groups, experts)."""
        raise NotImplementedError  # NoisyTopKMoE and HierarchicalMoE each have their own

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """Mix the channels; `key_padding_mask` may cover earlier tokens too, and its last columns those of `x`.

        Raises:
            ValueError: a mask of another shape or dtype.
        """
        if key_padding_mask is not None and key_padding_mask.ndim == 2:
            key_padding_mask = key_padding_mask[:, -x.shape[1] :]
        check_key_padding_mask(key_padding_mask, *x.shape[:2])
        real = torch.ones_like(x[..., 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        tokens = x[real]
        gates, load = self.gate(tokens)
        self.auxiliary_loss = importance_loss(gates, self.importance_weight)
        if load is not None:
            self.auxiliary_loss = self.auxiliary_loss + load_loss(load, self.load_weight)
        self.last_gating = Gating(gates.detach(), None if load is None else load.detach())
        mixed = mix_experts(self.experts, tokens, gates.flatten(1))
        return mixed.new_zeros(x.shape).masked_scatter(real[..., None], mixed)


class NoisyTopKMoE(SparselyGatedExperts):
    """Noisy top-k gating over `experts` feed-forward networks, a channel mixer (sec. 2).

    Raises:
        ValueError: a k below 1 or above the number of experts, a negative weight.
    """

    def __init__(
        self,
        config: TransformerConfig,
        experts: int = 8,
        k: int = 2,
        importance_weight: float = 0.1,
        load_weight: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(config, experts, importance_weight, load_weight, seed)
        _check_k("k", k, experts)
        self.k = k
        self.w_gate = nn.Parameter(torch.zeros(config.d_model, experts))
        self.w_noise = nn.Parameter(torch.zeros(config.d_model, experts))

    def gate(self, x: Float[Tensor, "tokens d_model"]) -> Gating:
        noise = self.draw_noise(len(x), self.w_gate.shape[1]) if self.training else None
        return noisy_top_k_gating(x, self.w_gate, self.w_noise, self.k, noise)


class HierarchicalMoE(SparselyGatedExperts):
    """Gates of two levels over groups x experts feed-forward networks, a channel mixer (appendix B).

    Gates and load have the shape (..., groups, experts); network (i, j) is number i experts + j of `self.experts`.

    Args:
        experts: in each group.
        k: groups per token, and experts per chosen group.

    Raises:
        ValueError: a k below 1 or above what there is to choose from, a negative weight.
    """

    def __init__(
        self,
        config: TransformerConfig,
        groups: int = 4,
        experts: int = 4,
        k: tuple[int, int] = (2, 2),
        importance_weight: float = 0.1,
        load_weight: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(config, groups * experts, importance_weight, load_weight, seed)
        _check_k("k[0]", k[0], groups)
        _check_k("k[1]", k[1], experts)
        self.k = k
        self.primary_gate = nn.Parameter(torch.zeros(config.d_model, groups))
        self.primary_noise = nn.Parameter(torch.zeros(config.d_model, groups))
        self.secondary_gate = nn.Parameter(torch.zeros(groups, config.d_model, experts))
        self.secondary_noise = nn.Parameter(torch.zeros(groups, config.d_model, experts))

    def gate(self, x: Float[Tensor, "tokens d_model"]) -> Gating:
        groups, _, experts = self.secondary_gate.shape
        noise = None
        if self.training:
            noise = self.draw_noise(len(x), groups), self.draw_noise(len(x), groups, experts)
        primary, secondary = (self.primary_gate, self.primary_noise), (self.secondary_gate, self.secondary_noise)
        return hierarchical_gating(x, primary, secondary, self.k, noise)
