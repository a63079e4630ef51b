"""Linear attention: a kernel instead of the softmax, so that a Transformer becomes an RNN (Katharopoulos et al. 2020).

"Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (arXiv 2006.16236). The softmax weighs
a key by exp(qᵀk / sqrt(d_head)). Weigh it by φ(q)ᵀφ(k) instead, φ(x) = elu(x) + 1 (Eq. 7), and the sum over the keys
no longer depends on the query, so that it is taken once (Eq. 5):
    o_i = φ(q_i)ᵀ S / φ(q_i)ᵀ z    with S = sum_j φ(k_j) v_jᵀ and z = sum_j φ(k_j)        n d m products, not n² d
The causal form has S_i and z_i, the sums over j <= i (Eqs. 8-12): a recurrent network with the state (S, z), d m + d
numbers whatever the length (Eqs. 16-20). Training sees all tokens at once and must not store n states: the gradients
are sums of the same kind (Eqs. 13-15), written out in `CausalProduct`.

NOTE queries are not divided by sqrt(d_head): inside φ a scale is not the temperature that it is in a softmax.
NOTE the released code adds 1e-6 to the denominator, which shrinks outputs where φ is small. Here nothing is added.
NOTE elu(x) + 1 is computed as exp(x) for x <= 0. In float32 the sum 1 + (exp(x) - 1) is zero from x = -17 on.
NOTE the paper's kernel goes through the tokens one by one. Here chunks of them are matrix products, the same sums.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from effnlp_lessons.attention.blocks import check_inputs, check_positive, without_padding
from effnlp_lessons.dense_attention import at_least_float32, check_key_padding_mask
from effnlp_lessons.transformer import SelfAttention, TransformerConfig

CHUNK = 64  # tokens; the fastest on a CPU for heads of 64
SMALLEST = 1e-30  # a denominator below it is that of a query without a key, whose output is 0


def feature_map(x: Float[Tensor, "... d_head"]) -> Float[Tensor, "... d_head"]:
    """φ(x) = elu(x) + 1 (Eq. 7), positive everywhere; float32 for float16 and bfloat16, else the dtype of `x`."""
    x = at_least_float32(x)
    return torch.relu(x) + x.clamp(max=0).exp_()


def hide_padding(k: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Features of keys with zeros for padding: such a key adds nothing to any sum."""
    return k if key_padding_mask is None else k.masked_fill(~key_padding_mask[:, None, :, None], 0.0)


# --------------------------------------------------------------------------------- sums over what came before


class CausalProduct(torch.autograd.Function):
    """o_i = S_iᵀ q_i with S_i = S_0 + sum_{j <= i} k_j v_jᵀ; q, k, v are features, nothing is normalised.

    `apply(q, k, v, start, chunk, reverse)` on (..., length, d) and (..., length, m), `start` = S_0 (..., d, m), gives
    o (..., length, m) and the last S (..., d, m). `reverse` sums over j >= i. With upstream gradients g_i of o and G
    of the last S, and U_i = G + sum_{j >= i} q_j g_jᵀ:
        dq_i = S_i g_i (Eq. 13)    dk_i = U_i v_i (Eq. 14)    dv_i = U_iᵀ k_i (Eq. 15)    dS_0 = U_1
    Each is a `CausalProduct` again. S and U are computed anew, so nothing is kept but the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, start: Tensor, chunk: int, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, start)
        ctx.chunk, ctx.reverse = chunk, reverse
        lead = q.shape[:-2]
        q, k, v = (x.flatten(0, -3) for x in (q, k, v))
        state = start.flatten(0, -3).clone()
        output = v.new_empty(v.shape)
        starts = range(0, q.shape[1], chunk)
        with torch.autocast(q.device.type, enabled=False):  # a sum over thousands of tokens is no bfloat16 number
            for first in reversed(starts) if reverse else starts:
                here = slice(first, first + chunk)
                pairs = q[:, here] @ k[:, here].transpose(1, 2)  # inside the chunk: (chunk, chunk) products
                pairs = pairs.triu_() if reverse else pairs.tril_()
                # o = q S + (q kᵀ, causal) v, then S = S + kᵀ v
                output[:, here] = (q[:, here] @ state).baddbmm_(pairs, v[:, here])
                state.baddbmm_(k[:, here].transpose(1, 2), v[:, here])
        return output.unflatten(0, lead), state.unflatten(0, lead)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        q, k, v, start = ctx.saved_tensors
        chunk, same, other = ctx.chunk, ctx.reverse, not ctx.reverse
        dq, _ = CausalProduct.apply(g, v, k, start.transpose(-2, -1), chunk, same)
        dk, _ = CausalProduct.apply(v, g, q, g_state.transpose(-2, -1), chunk, other)
        dv, dstart = CausalProduct.apply(k, q, g, g_state, chunk, other)
        return dq, dk, dv, dstart, None, None


class LinearState(NamedTuple):
    """The sums over the tokens so far, float32 or float64: all that generation needs of them."""

    sums: Float[Tensor, "batch heads d_head d_value"]  # S = sum_j φ(k_j) v_jᵀ
    normaliser: Float[Tensor, "batch heads d_head"]  # z = sum_j φ(k_j)


def attend_features(
    q: Float[Tensor, "batch heads length features"],
    k: Float[Tensor, "batch heads length features"],
    v: Float[Tensor, "batch heads length d_head"],
) -> Float[Tensor, "batch heads length d_head"]:
    """o_i = φ(q_i)ᵀ S / φ(q_i)ᵀ z over all keys (Eq. 5), `q` and `k` being features already; 0 if all keys are."""
    with torch.autocast(q.device.type, enabled=False):
        denominator = q @ k.sum(dim=2)[..., None]
        return (q @ (k.transpose(-2, -1) @ v)) / denominator.clamp(min=SMALLEST)


def _recurrent_step(q: Tensor, k: Tensor, v: Tensor, state: LinearState) -> tuple[Tensor, LinearState]:
    """One token: S += φ(k) vᵀ, z += φ(k), o = φ(q)ᵀ S / φ(q)ᵀ z (Eqs. 18-20)."""
    with torch.autocast(q.device.type, enabled=False):
        state = LinearState(state.sums + k.transpose(-2, -1) * v, state.normaliser + k[:, :, 0])
        return (q @ state.sums) / (q @ state.normaliser[..., None]).clamp(min=SMALLEST), state


def attend_features_causal(
    q: Float[Tensor, "batch heads length features"],
    k: Float[Tensor, "batch heads length features"],
    v: Float[Tensor, "batch heads length d_head"],
    state: LinearState | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "batch heads length d_head"], LinearState]:
    """o_i = φ(q_i)ᵀ S_i / φ(q_i)ᵀ z_i over the keys so far (Eq. 9), and the sums after the last of them."""
    if state is not None and q.shape[2] == 1:
        return _recurrent_step(q, k, v, state)
    if state is None:
        start = q.new_zeros(*q.shape[:2], k.shape[3], v.shape[3] + 1)
    else:
        start = torch.cat([state.sums, state.normaliser[..., None]], dim=-1)
    # beside a value that is always 1, S gets z as its last column, and o its denominator
    product, sums = CausalProduct.apply(q, k, F.pad(v, (0, 1), value=1.0), start, chunk, False)
    output = product[..., :-1] / product[..., -1:].clamp(min=SMALLEST)
    return output, LinearState(sums[..., :-1], sums[..., -1])


# ------------------------------------------------------------------------------------------------ attention


def linear_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_value"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
) -> Float[Tensor, "batch heads length d_value"]:
    """Attention with weights φ(q)ᵀφ(k) / sum of them, every query over all keys (Eq. 5): time and memory O(length).

    Not causal: every output depends on every real token.

    Args:
        key_padding_mask: True = a real token. Padded keys add nothing to the sums.

    Returns:
        Zeros for padded queries and for a text without a real token; the dtype of `v`.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    check_inputs(q, k, v, key_padding_mask)
    output = attend_features(feature_map(q), hide_padding(feature_map(k), key_padding_mask), at_least_float32(v))
    return without_padding(output, key_padding_mask).to(v.dtype)


def causal_linear_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_value"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    chunk: int = CHUNK,
) -> Float[Tensor, "batch heads length d_value"]:
    """Attention with weights φ(q)ᵀφ(k) / sum of them, every query over the keys so far (Eq. 9).

    Strictly causal: no output depends on a later token. Time O(length), no tensor larger than the inputs: `chunk`
    tokens at a time are products of small matrices.

    Args:
        key_padding_mask: True = a real token. Padded keys add nothing to the sums.
        chunk: tokens, any number >= 1; it changes the speed, not the result.

    Returns:
        Zeros for padded queries and for queries before the first real token; the dtype of `v`.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, a chunk that is no integer >= 1.
    """
    check_inputs(q, k, v, key_padding_mask)
    check_positive(chunk=chunk)
    k = hide_padding(feature_map(k), key_padding_mask)
    output, _ = attend_features_causal(feature_map(q), k, at_least_float32(v), None, chunk)
    return without_padding(output, key_padding_mask).to(v.dtype)


def linear_step(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_value"],
    state: LinearState | None = None,
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
) -> tuple[Float[Tensor, "batch heads length d_value"], LinearState]:
    """Go on by one token, the recurrent network of Eqs. 16-20, or by several at once.

    Args:
        state: the sums over the earlier tokens; None at the start of a text.
        key_padding_mask: True = a real token, of the new tokens alone.

    Returns:
        (what `causal_linear_attention` gives for these tokens after the earlier ones, the new state).

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool.
    """
    check_inputs(q, k, v, key_padding_mask)
    if state is not None and state.sums.shape != (*k.shape[:2], k.shape[3], v.shape[3]):
        wanted = (*k.shape[:2], k.shape[3], v.shape[3])
        raise ValueError(f"state.sums must have shape {wanted}, got {tuple(state.sums.shape)}")
    k = hide_padding(feature_map(k), key_padding_mask)
    output, state = attend_features_causal(feature_map(q), k, at_least_float32(v), state)
    return without_padding(output, key_padding_mask).to(v.dtype), state


class LinearSelfAttention(SelfAttention):
    """Multi-head linear attention as a token mixer; the projections are those of `SelfAttention`.

    With `causal` it is strictly causal and keeps a `LinearState`: a `Decoder` then generates a token in the same time
    after any number of tokens. Without, every output depends on every token, and there is no state.
    """

    def __init__(self, config: TransformerConfig, causal: bool = False) -> None:
        super().__init__(config, causal)

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        state: LinearState | None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], LinearState | None]:
        """Mix the tokens; `key_padding_mask` covers the earlier tokens, if there are any, and those of `x`.

        Raises:
            ValueError: a state without `causal`, or a mask of another shape or dtype.
        """
        if state is not None and not self.causal:
            raise ValueError("state needs causal attention: a bidirectional encoder reads all tokens at once")
        if state is not None and key_padding_mask is not None:
            if key_padding_mask.ndim != 2 or key_padding_mask.shape[1] < x.shape[1]:
                wanted = f"({x.shape[0]}, earlier tokens + {x.shape[1]})"
                raise ValueError(f"key_padding_mask must have shape {wanted}, got {tuple(key_padding_mask.shape)}")
            key_padding_mask = key_padding_mask[:, -x.shape[1] :]  # the earlier tokens are in the sums already
        check_key_padding_mask(key_padding_mask, *x.shape[:2])
        q, k, v = (self.split_heads(project(x)) for project in (self.query, self.key, self.value))
        if self.causal:
            mixed, state = linear_step(q, k, v, state, key_padding_mask)
        else:
            mixed = linear_attention(q, k, v, key_padding_mask)
        return self.output(mixed.transpose(1, 2).flatten(2)), state
