"""Linformer: keys and values are projected from n tokens to k rows (Wang et al. 2020, arXiv 2006.04768).

head = softmax(Q (E K)ᵀ / sqrt(d_head)) (F V), with learned E, F in R^{k x n} (sec. 4): n k pairs of a query and a row,
linear in n for a fixed k. The paper's reason is that the attention matrix P is nearly of low rank; what is computed
is another thing, a softmax over mixtures of keys. E and F can be shared: between the heads of a layer
("headwise"), between keys and values too ("key-value"), between the layers too ("layerwise"). Pooling is the
projection `pooling_projection`. Notebook 10 uses it, and the study `attention_spectrum`.

Causality: none. Every projected row is made of all tokens, so no mask over (n, k) can hide the future.
NOTE padding: the projected rows mix real and padded tokens, so a mask over them comes too late. The padded rows of K
and V are set to zero before E and F. A text of fewer than `max_length` tokens uses the first columns of E and F.
NOTE the theorem draws the entries of a random projection from N(0, 1 / k); then the projected keys are sqrt(n / k)
times as large as the keys. E and F start here from N(0, 1 / max_length), which keeps the size of independent keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.attention.blocks import check_inputs, check_positive, without_padding
from effnlp_lessons.dense_attention import check_key_padding_mask
from effnlp_lessons.transformer import MixerFactory, TransformerConfig

SHARING = ("none", "headwise", "key-value", "layerwise")


def _check_projection(name: str, projection: Tensor, heads: int, length: int) -> None:
    if projection.ndim != 3 or projection.shape[0] not in (1, heads):
        wanted = f"(1 or {heads} heads, projected, max_length)"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(projection.shape)}")
    if projection.shape[2] < length:
        raise ValueError(f"{name} is for at most {projection.shape[2]} tokens, got {length}")


def _project(
    projection: Float[Tensor, "heads_or_1 projected max_length"], x: Float[Tensor, "batch heads length d_head"]
) -> Float[Tensor, "batch heads projected d_head"]:
    """E x for every head, with the columns of E that the text has tokens for."""
    columns = projection[:, :, : x.shape[2]].to(x.dtype)
    if len(columns) == 1:
        return torch.einsum("kn,bhnd->bhkd", columns[0], x)
    return torch.einsum("hkn,bhnd->bhkd", columns, x)


def linformer_attention(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    project_keys: Float[Tensor, "heads_or_1 projected max_length"],
    project_values: Float[Tensor, "heads_or_1 projected max_length"],
) -> Float[Tensor, "batch heads length d_head"]:
    """softmax(q (E k)ᵀ / sqrt(d_head)) (F v) (sec. 4); not causal.

    Args:
        key_padding_mask: True = a real token; padded keys and values are zeros before the projections.
        project_keys: E, one for every head or one for all.
        project_values: F, likewise, with as many rows as E.

    Returns:
        Zeros for padded queries and for a text without a real token.

    Raises:
        ValueError: shapes that do not fit, or more tokens than a projection has columns.
    """
    check_inputs(q, k, v, key_padding_mask)
    _check_projection("project_keys", project_keys, q.shape[1], q.shape[2])
    _check_projection("project_values", project_values, q.shape[1], q.shape[2])
    if project_keys.shape[1] != project_values.shape[1]:
        rows = f"{project_keys.shape[1]} and {project_values.shape[1]}"
        raise ValueError(f"project_keys and project_values must have as many rows, got {rows}")
    k = _project(project_keys, without_padding(k, key_padding_mask))
    v = _project(project_values, without_padding(v, key_padding_mask))
    return without_padding(F.scaled_dot_product_attention(q, k, v), key_padding_mask)


def pooling_projection(length: int, projected: int) -> Float[Tensor, "1 projected length"]:
    """The projection that is mean pooling: row r is the mean of the r-th of `projected` stretches of tokens.

    Token i belongs to stretch floor(i projected / length); stretches differ by at most one token. A text
    of fewer than `length` tokens leaves the last rows empty.

    Raises:
        ValueError: a length below 1, `projected` that is not from 1 to `length`.
    """
    check_positive(length=length, projected=projected)
    if projected > length:
        raise ValueError(f"projected must be at most the length {length}, got {projected}")
    stretch = torch.arange(length) * projected // length
    member = (stretch == torch.arange(projected)[:, None]).float()
    return (member / member.sum(1, keepdim=True))[None]


def draw_projections(
    config: TransformerConfig, projected: int, max_length: int, sharing: str = "none", seed: int = 0
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """E and F of every layer; what is shared is the same parameter. Entries are drawn from N(0, 1 / max_length).

    Different matrices (projected, max_length), for L layers of h heads (sec. 4): "none" 2 L h, "headwise" 2 L,
    "key-value" L (E = F), "layerwise" 1.

    Raises:
        ValueError: sizes below 1, another word for `sharing`.
    """
    check_positive(projected=projected, max_length=max_length)
    if sharing not in SHARING:
        raise ValueError(f"sharing must be one of {', '.join(map(repr, SHARING))}, got {sharing!r}")
    generator = torch.Generator().manual_seed(seed)

    def draw() -> nn.Parameter:
        heads = config.heads if sharing == "none" else 1
        entries = torch.randn(heads, projected, max_length, generator=generator)
        return nn.Parameter(entries * max_length**-0.5)

    if sharing == "layerwise":
        return [(draw(),) * 2] * config.layers
    if sharing == "key-value":
        return [(draw(),) * 2 for _ in range(config.layers)]
    return [(draw(), draw()) for _ in range(config.layers)]


class LinformerAttention(nn.Module):
    """Attention over projected keys and values: a token mixer of an encoder (not causal).

    Give two layers, or keys and values, the same parameter and they share it. Give every layer its own and k may
    shrink in the higher ones (sec. 4, "nonuniform projected dimension"). Padded positions give zeros before the
    output projection.

    Raises:
        ValueError: projections that do not fit the heads, or each other.
    """

    def __init__(self, config: TransformerConfig, project_keys: nn.Parameter, project_values: nn.Parameter) -> None:
        super().__init__()
        _check_projection("project_keys", project_keys, config.heads, 0)
        _check_projection("project_values", project_values, config.heads, 0)
        self.heads = config.heads
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)
        self.project_keys, self.project_values = project_keys, project_values

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
        state: None = None,
    ) -> tuple[Float[Tensor, "batch length d_model"], None]:
        """Mix the tokens.

        Raises:
            ValueError: more tokens than the projections have columns, a mask that does not fit; a state, for this
                mixer keeps none.
        """
        if state is not None:
            raise ValueError("state must be None: this mixer keeps none")
        check_key_padding_mask(key_padding_mask, *x.shape[:2])
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        mixed = linformer_attention(
            q, k, v, key_padding_mask, project_keys=self.project_keys, project_values=self.project_values
        )
        return self.output(mixed.transpose(1, 2).flatten(2)), None


def linformer_mixers(
    config: TransformerConfig, projected: int, max_length: int, sharing: str = "none", seed: int = 0
) -> MixerFactory:
    """For `Encoder(config, token_mixer=linformer_mixers(config, ...))`: layers that share as `sharing` says.

    A second encoder from the same factory gets parameters of its own, with the same values.

    Raises:
        ValueError: what `draw_projections` raises.
    """
    projections = draw_projections(config, projected, max_length, sharing, seed)

    def mixer(config: TransformerConfig, layer: int) -> nn.Module:
        if layer == 0:  # a new model begins
            projections[:] = draw_projections(config, projected, max_length, sharing, seed)
        return LinformerAttention(config, *projections[layer])

    return mixer
