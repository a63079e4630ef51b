"""Experts as a channel mixer of the course's Transformer: GShard's layer, and Switch's for comparison.

Lepikhin et al. 2020 (arXiv 2006.16668) with the routing of `gshard.py`: every other feed-forward network becomes E of
them, of which a token uses two. All experts are stacked into tensors
(experts, d_model, d_ff), so that one batched product runs them all on buffers (experts, rows, d_model). At a fixed
capacity factor there are about 2 rows a token, however many experts there are: parameters grow, the cost does not.

NOTE groups are formed of the real tokens of a batch in their order: padding is taken out first, takes no place and
changes no result. N tokens make ceil(N / group) groups of equal size; the last one may lack a few tokens.
NOTE evaluation draws nothing: policy "random" becomes "all", every second expert with room is used. Mesh TensorFlow
draws in evaluation too. `eval_capacity_factor` may give more room than training does, as there (2 against 1.25).
NOTE the router computes in float32 whatever the experts do, or in float64 in a float64 model.
NOTE the weights are no nn.Linear: `transformer.initialise_` leaves them as drawn here, normal(0, 0.02), biases zero.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.architectures.gshard import (
    AUX_SCALES,
    POLICIES,
    Routing,
    combine,
    dispatch,
    expert_capacity,
    gshard_routing,
    switch_routing,
)
from effnlp_lessons.dense_attention import check_key_padding_mask
from effnlp_lessons.transformer import ACTIVATIONS, FeedForward, MixerFactory, TransformerConfig


class Experts(nn.Module):
    """E feed-forward networks as stacked weights, each on its own rows: y_e = act(x_e W_e + b_e) V_e + c_e.

    Raises:
        ValueError: `experts` < 1.
    """

    def __init__(self, config: TransformerConfig, experts: int, seed: int = 0) -> None:
        super().__init__()
        if experts < 1:
            raise ValueError(f"experts must be >= 1, got {experts}")
        generator = torch.Generator().manual_seed(seed)
        d_model, d_ff = config.d_model, config.d_ff
        self.expand = nn.Parameter(torch.empty(experts, d_model, d_ff).normal_(0, 0.02, generator=generator))
        self.expand_bias = nn.Parameter(torch.zeros(experts, d_ff))
        self.contract = nn.Parameter(torch.empty(experts, d_ff, d_model).normal_(0, 0.02, generator=generator))
        self.contract_bias = nn.Parameter(torch.zeros(experts, d_model))
        self.activation = ACTIVATIONS[config.activation]

    def __len__(self) -> int:
        return self.expand.shape[0]

    def forward(self, x: Float[Tensor, "experts rows d_model"]) -> Float[Tensor, "experts rows d_model"]:
        """Rows of `x[e]` through expert e."""
        hidden = self.activation(torch.baddbmm(self.expand_bias[:, None], x, self.expand))
        return torch.baddbmm(self.contract_bias[:, None], hidden, self.contract)

    @torch.no_grad()
    def copy_dense_(self, dense: FeedForward) -> Experts:
        """Make every expert a copy of one dense network, in place."""
        self.expand.copy_(dense.expand.weight.T)
        self.expand_bias.copy_(dense.expand.bias)
        self.contract.copy_(dense.contract.weight.T)
        self.contract_bias.copy_(dense.contract.bias)
        return self


class MoEFeedForward(nn.Module):
    """Channel mixer with experts behind GShard's top-2 router.

    After a call, `auxiliary_loss` is l_aux with its gradient, and `last_routing` tells where the real tokens went, in
    their order; its counts sum to their number, and what fills the last group up goes nowhere. Second experts are drawn
    from a generator of the layer's own.

    Args:
        experts: E >= 2.
        capacity_factor: 1 gives the paper's C = 2 S / E, infinity drops nothing.
        eval_capacity_factor: the same in evaluation; None = as in training.
        group: at most so many tokens are routed together; None = the whole batch.
        policy, aux_scale: of `gshard_routing`.
        seed: of the weights and the draws.

    Raises:
        ValueError: arguments other than these.
    """

    choices = 2

    def __init__(
        self,
        config: TransformerConfig,
        experts: int,
        *,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float | None = None,
        group: int | None = None,
        policy: str = "random",
        aux_scale: str = "paper",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if experts < self.choices:
            raise ValueError(f"experts must be >= {self.choices}, got {experts}")
        if group is not None and group < 1:
            raise ValueError(f"group must be >= 1 token, got {group}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
        if aux_scale not in AUX_SCALES:
            raise ValueError(f"aux_scale must be one of {AUX_SCALES}, got {aux_scale!r}")
        for factor in (capacity_factor, eval_capacity_factor):
            if factor is not None:
                expert_capacity(1, experts, factor)  # refuses what is not positive
        self.experts = Experts(config, experts, seed)
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.router = nn.Parameter(torch.empty(config.d_model, experts).normal_(0, 0.02, generator=self.generator))
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.group, self.policy, self.aux_scale = group, policy, aux_scale
        self.last_routing: Routing | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"last_routing": None}  # a copy has not run yet; a graph cannot be copied

    @property
    def auxiliary_loss(self) -> Tensor | None:
        return None if self.last_routing is None else self.last_routing.auxiliary_loss

    def route(
        self, logits: Float[Tensor, "groups size experts"], capacity: int, mask: Bool[Tensor, "groups size"]
    ) -> Routing:
        policy = "all" if self.policy == "random" and not self.training else self.policy
        return gshard_routing(
            logits, capacity, policy=policy, draws=self.generator, mask=mask, aux_scale=self.aux_scale
        )

    def mix(self, x: Float[Tensor, "tokens d_model"], routing: Routing) -> Float[Tensor, "tokens d_model"]:
        return combine(self.experts(dispatch(x, routing)), routing)

    def forward(
        self, x: Float[Tensor, "batch length d_model"], key_padding_mask: Bool[Tensor, "batch keys"] | None = None
    ) -> Float[Tensor, "batch length d_model"]:
        """Route the real tokens, run the experts; zeros for padding and for tokens without a place.

        The last `length` columns of `key_padding_mask` are those of `x`.

        Raises:
            ValueError: a mask that is not bool or too short.
        """
        real = None if key_padding_mask is None else key_padding_mask[..., -x.shape[1] :]
        check_key_padding_mask(real, *x.shape[:2])
        tokens = x.flatten(0, 1) if real is None else x[real]
        count = len(tokens)
        groups = max(1, -(-count // (self.group or max(1, count))))
        size = max(1, -(-count // groups))
        filled = torch.cat([tokens, tokens.new_zeros(groups * size - count, x.shape[2])])
        factor = self.capacity_factor
        if not self.training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        capacity = expert_capacity(size, len(self.experts), factor, self.choices)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = filled.to(wide) @ self.router.to(wide)
        mask = (torch.arange(groups * size, device=x.device) < count).view(groups, size)
        routing = self.route(logits.view(groups, size, -1), capacity, mask)
        y = self.mix(filled, routing)[:count].to(x.dtype)
        self.last_routing = routing
        return y.view_as(x) if real is None else x.new_zeros(x.shape).index_put((real,), y)


class SwitchFeedForward(MoEFeedForward):
    """The same layer with Switch's top-1 router (Fedus et al. 2021): y = p_e E_e(x), C = capacity_factor S / E.

    `auxiliary_loss` is that of `switch_routing`. Arguments and errors as in `MoEFeedForward`; one expert is allowed.
    """

    choices = 1

    def __init__(
        self,
        config: TransformerConfig,
        experts: int,
        *,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float | None = None,
        group: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            config, experts, capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor,
            group=group, policy="none", aux_scale="switch", seed=seed,
        )  # fmt: skip

    def route(
        self, logits: Float[Tensor, "groups size experts"], capacity: int, mask: Bool[Tensor, "groups size"]
    ) -> Routing:
        return switch_routing(logits, capacity, mask)


def moe_mixers(
    experts: int,
    *,
    capacity_factor: float = 1.0,
    eval_capacity_factor: float | None = None,
    group: int | None = None,
    policy: str = "random",
    aux_scale: str = "paper",
    seed: int = 0,
) -> MixerFactory:
    """`channel_mixer` of an Encoder or Decoder: experts in every other layer (1, 3, ...), dense in the others."""

    def mixer(config: TransformerConfig, layer: int) -> nn.Module:
        if layer % 2 == 0:
            return FeedForward(config)
        return MoEFeedForward(
            config, experts, capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor,
            group=group, policy=policy, aux_scale=aux_scale, seed=1_003 * seed + layer,
        )  # fmt: skip

    return mixer


def auxiliary_loss(model: nn.Module) -> Float[Tensor, ""]:
    """Sum of the `auxiliary_loss` that the layers of `model` left at their last call: L = l_nll + k times this.

    Raises:
        ValueError: no layer has one.
    """
    losses = [getattr(module, "auxiliary_loss", None) for module in model.modules()]
    losses = [loss for loss in losses if loss is not None]
    if not losses:
        raise ValueError("model has no layer with an auxiliary_loss, or it has not been called yet")
    return torch.stack(losses).sum()
