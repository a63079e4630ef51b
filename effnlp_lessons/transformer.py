"""The one Transformer of the course: an encoder and a decoder with two exchangeable parts.

A block mixes tokens (attention, by default) and then mixes channels (a feed-forward network). Every
lecture exchanges one of the two and leaves the rest alone, so that what changes is what is taught.
Sources: Vaswani et al. 2017 (arXiv 1706.03762), Devlin et al. 2018 (BERT, 1810.04805) for the encoder,
Radford et al. 2019 (GPT-2) for the decoder. The pre-trained weights are all-MiniLM-L6-v2 (Wang et al.
2020, arXiv 2002.10957; Reimers and Gurevych 2019, 1908.10084).

NOTE dropout acts on the embeddings and on each mixer's output, not on the attention weights: an
attention method then needs no dropout argument. Nothing differs in evaluation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.dense_attention import check_key_padding_mask, dense_attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Transformer. The defaults are those of MiniLM-L6.

    `segments` is the number of segment (token type) embeddings, 0 for none. `max_length` is the number of
    learned absolute positions, 0 for none: then a text may have any length, and a token mixer must know the
    order itself. `norm_first` puts the layer norms before the mixers (GPT-2) instead of after the residual
    sums (BERT).
    """

    vocab_size: int = 30_522
    max_length: int = 512
    d_model: int = 384
    layers: int = 6
    heads: int = 12
    d_ff: int = 1_536
    segments: int = 2
    pooler: bool = True
    norm_first: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value, smallest = getattr(self, field.name), 0 if field.name in ("layers", "segments", "max_length") else 1
            if field.type == "int" and (not isinstance(value, int) or value < smallest):
                raise ValueError(f"{field.name} must be an integer >= {smallest}, got {value!r}")
        if self.d_model % self.heads:
            raise ValueError(f"heads must divide d_model, got heads={self.heads}, d_model={self.d_model}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def d_head(self) -> int:
        return self.d_model // self.heads


MINILM_L6 = TransformerConfig()
BERT_BASE = TransformerConfig(d_model=768, layers=12, heads=12, d_ff=3_072)
BERT_LARGE = TransformerConfig(d_model=1_024, layers=24, heads=16, d_ff=4_096)
GPT2 = TransformerConfig(
    vocab_size=50_257, max_length=1_024, d_model=768, layers=12, heads=12, d_ff=3_072, segments=0,
    pooler=False, norm_first=True, activation="gelu_tanh", norm_eps=1e-5,
)  # fmt: skip


# ------------------------------------------------------------------------------------- the default mixers


class SelfAttention(nn.Module):
    """Multi-head self-attention, the default token mixer (Vaswani et al. 2017, sec. 3.2.2).

    `attention` is any method of one call shape, `attention(q, k, v, key_padding_mask)` on
    (batch, heads, length, d_head); None is dense attention. Every other token mixer of the course keeps
    this class's `forward`: `(x, key_padding_mask, state) -> (y, state)`.
    """

    def __init__(
        self, config: TransformerConfig, causal: bool = False, attention: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__()
        self.heads, self.causal, self.attention = config.heads, causal, attention
        self.query = nn.Linear(config.d_model, config.d_model)
        self.key = nn.Linear(config.d_model, config.d_model)
        self.value = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)

    def split_heads(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch heads length d_head"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        state: tuple[Tensor, Tensor] | None = None,
        return_scores: bool = False,
    ) -> tuple:
        """Mix the tokens. `state` holds the keys and values of earlier tokens (causal dense attention only).

        `key_padding_mask` covers the keys: the earlier tokens, if there are any, and those of `x`.

        Returns:
            (y, state), or (y, state, raw scores) with `return_scores`; `state` is None unless causal.
        """
        q, k, v = (self.split_heads(project(x)) for project in (self.query, self.key, self.value))
        if self.attention is not None:
            if return_scores or state is not None:
                raise ValueError("only dense attention hands out scores and keeps a state")
            mixed, scores, state = self.attention(q, k, v, key_padding_mask), None, None
        else:
            if state is not None and not self.causal:
                raise ValueError("state needs causal attention: a bidirectional encoder reads all tokens at once")
            if state is not None:
                k, v = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
            mixed, scores = dense_attention(q, k, v, key_padding_mask, causal=self.causal, return_scores=True)
            state = (k, v) if self.causal else None
        y = self.output(mixed.transpose(1, 2).flatten(2))
        return (y, state, scores) if return_scores else (y, state)


class FeedForward(nn.Module):
    """Two linear layers with an activation between, the default channel mixer (sec. 3.3, Eq. 2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.d_model, config.d_ff)
        self.contract = nn.Linear(config.d_ff, config.d_model)
        self.activation = ACTIVATIONS[config.activation]

    def forward(
        self, x: Float[Tensor, "batch length d_model"], key_padding_mask: Tensor | None = None
    ) -> Float[Tensor, "batch length d_model"]:
        return self.contract(self.activation(self.expand(x)))


# --------------------------------------------------------------------------------- blocks and the models

MixerFactory = Callable[[TransformerConfig, int], nn.Module]  # (config, layer index) -> mixer


class Block(nn.Module):
    """One layer: mix the tokens, mix the channels, each with a residual sum and a layer norm."""

    def __init__(self, config: TransformerConfig, token_mixer: nn.Module, channel_mixer: nn.Module) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.token_mixer, self.channel_mixer = token_mixer, channel_mixer
        self.token_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.channel_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        state: Any = None,
        return_scores: bool = False,
    ) -> tuple[Tensor, Any, Tensor | None]:
        mixer_input = self.token_norm(x) if self.norm_first else x
        if return_scores:
            y, state, scores = self.token_mixer(mixer_input, key_padding_mask, state, return_scores=True)
        else:
            (y, state), scores = self.token_mixer(mixer_input, key_padding_mask, state), None
        x = x + self.dropout(y)
        if self.norm_first:
            return x + self.dropout(self.channel_mixer(self.channel_norm(x), key_padding_mask)), state, scores
        x = self.token_norm(x)
        return self.channel_norm(x + self.dropout(self.channel_mixer(x, key_padding_mask))), state, scores


class Embeddings(nn.Module):
    """Sum of token, position and (with `segments`) segment embeddings; normed unless `norm_first`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_length, config.d_model) if config.max_length else None
        self.segments = nn.Embedding(config.segments, config.d_model) if config.segments else None
        self.norm = nn.Identity() if config.norm_first else nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        token_ids: Int[Tensor, "batch length"],
        segment_ids: Int[Tensor, "batch length"] | None = None,
        first_position: int = 0,
    ) -> Float[Tensor, "batch length d_model"]:
        if token_ids.ndim != 2 or token_ids.dtype not in (torch.int64, torch.int32):
            got = f"{token_ids.dtype} {tuple(token_ids.shape)}"
            raise ValueError(f"token_ids must be integers of shape (batch, length), got {got}")
        end = first_position + token_ids.shape[1]
        x = self.tokens(token_ids)
        if self.positions is not None:
            if end > self.config.max_length:
                raise ValueError(f"{end} tokens are more than the max_length of {self.config.max_length} positions")
            x = x + self.positions(torch.arange(first_position, end, device=token_ids.device))
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(token_ids) if segment_ids is None else segment_ids)
        elif segment_ids is not None:
            raise ValueError("segment_ids given, but this model has no segment embeddings (segments=0)")
        return self.dropout(self.norm(x))


def initialise_(module: nn.Module, generator: torch.Generator) -> None:
    """Set every nn.Linear and nn.Embedding in `module` in place: weights normal(0, 0.02), biases zero (BERT)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding) and not part.weight.is_meta:
            with torch.no_grad():
                part.weight.normal_(0.0, 0.02, generator=generator)
                if isinstance(part, nn.Linear) and part.bias is not None:
                    part.bias.zero_()


class EncoderOutput(NamedTuple):
    last: Float[Tensor, "batch length d_model"]  # after the last block
    hidden: tuple[Tensor, ...]  # layers + 1 of them: the embeddings, then the output of every block
    pooled: Float[Tensor, "batch d_model"] | None  # tanh(W x_first + b), None without a pooler
    scores: tuple[Tensor, ...] | None  # per layer (batch, heads, length, length), raw, or None


def _make_blocks(
    config: TransformerConfig,
    causal: bool,
    attention: Callable[..., Tensor] | None,
    token_mixer: MixerFactory | None,
    channel_mixer: MixerFactory | None,
) -> nn.ModuleList:
    if attention is not None and token_mixer is not None:
        raise ValueError("give attention or token_mixer, not both: a token mixer brings its own attention")
    token_mixer = token_mixer or (lambda config, layer: SelfAttention(config, causal, attention))
    channel_mixer = channel_mixer or (lambda config, layer: FeedForward(config))
    pairs = ((token_mixer(config, i), channel_mixer(config, i)) for i in range(config.layers))
    return nn.ModuleList(Block(config, token, channel) for token, channel in pairs)


class Encoder(nn.Module):
    """A bidirectional encoder (BERT). Exchange its parts by one argument each:

    `attention`: a method `(q, k, v, key_padding_mask) -> mixed` for every layer;
    `token_mixer`, `channel_mixer`: a function `(config, layer) -> nn.Module`, called once per layer.
    Linear and embedding weights are drawn from `seed`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: Callable[..., Tensor] | None = None,
        token_mixer: MixerFactory | None = None,
        channel_mixer: MixerFactory | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.blocks = _make_blocks(config, False, attention, token_mixer, channel_mixer)
        self.last_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps) if config.norm_first else nn.Identity()
        self.pooler = nn.Linear(config.d_model, config.d_model) if config.pooler else None
        initialise_(self, torch.Generator().manual_seed(seed))

    def forward(
        self,
        token_ids: Int[Tensor, "batch length"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
        segment_ids: Int[Tensor, "batch length"] | None = None,
        return_scores: bool = False,
    ) -> EncoderOutput:
        """Encode a batch of token ids; `return_scores` also hands out every layer's raw attention scores.

        Raises:
            ValueError: ids that are not integers (batch, length), too many tokens, a mask of another
                shape or dtype, scores asked of a token mixer that has none.
        """
        x = self.embeddings(token_ids, segment_ids)
        check_key_padding_mask(key_padding_mask, *token_ids.shape)
        for block in self.blocks if return_scores else ():
            if "return_scores" not in inspect.signature(block.token_mixer.forward).parameters:
                raise ValueError(f"return_scores: {type(block.token_mixer).__name__} has no scores to hand out")
        hidden, scores = [x], []
        for block in self.blocks:
            x, _, raw = block(x, key_padding_mask, None, return_scores)
            hidden.append(x)
            scores.append(raw)
        last = self.last_norm(x)
        pooled = None if self.pooler is None else torch.tanh(self.pooler(last[:, 0]))
        return EncoderOutput(last, tuple(hidden), pooled, tuple(scores) if return_scores else None)


class DecoderState(NamedTuple):
    """What a decoder carries from one call to the next: its position and each layer's mixer state."""

    position: int
    layers: tuple


class DecoderOutput(NamedTuple):
    logits: Float[Tensor, "batch length vocab"]
    state: DecoderState


class Decoder(nn.Module):
    """A causal language model (GPT-2) from the encoder's parts; the output layer is the token table itself.

    Takes the same exchange arguments as `Encoder`. A method or mixer that is put in must be causal on its own.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        attention: Callable[..., Tensor] | None = None,
        token_mixer: MixerFactory | None = None,
        channel_mixer: MixerFactory | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.blocks = _make_blocks(config, True, attention, token_mixer, channel_mixer)
        self.last_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps) if config.norm_first else nn.Identity()
        initialise_(self, torch.Generator().manual_seed(seed))

    def forward(
        self,
        token_ids: Int[Tensor, "batch length"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        state: DecoderState | None = None,
    ) -> DecoderOutput:
        """Next-token logits (nats before softmax). Give back `state` to go on where the last call stopped.

        Raises:
            ValueError: a state from a token mixer that keeps none, and what `Encoder.forward` raises.
        """
        if state is not None and state.position > 0 and None in state.layers:
            raise ValueError("this decoder's token mixer keeps no state: give all tokens at once, without state")
        state = state or DecoderState(0, (None,) * self.config.layers)
        x = self.embeddings(token_ids, None, state.position)
        new_states = []
        for block, layer_state in zip(self.blocks, state.layers, strict=True):
            x, layer_state, _ = block(x, key_padding_mask, layer_state)
            new_states.append(layer_state)
        logits = F.linear(self.last_norm(x), self.embeddings.tokens.weight)
        return DecoderOutput(logits, DecoderState(state.position + token_ids.shape[1], tuple(new_states)))
