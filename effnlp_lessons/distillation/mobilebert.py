"""MobileBERT (Sun et al. 2020, arXiv 2004.02984): as deep as BERT-large, each block squeezed to a quarter of its width.

Between the blocks teacher and student are 512 wide and both have 4 heads, so that every feature map and attention map
of the one can be compared with the other's. Inside a block the student is 128 wide (bottleneck) and the teacher,
IB-BERT, 1024 (inverted bottleneck). A block of input x (batch, length, 512), from sec. 3.1 and 3.2:

    u = norm(W_in x)                          the residual stream inside the block
    q, k from s = norm(W_shared x), v from x  MobileBERT; TINY: all three from u; IB-BERT: all three from x
    a = norm(W_o attention(q, k, v) + u)
    a = norm(W_2 activation(W_1 a) + a)       `feed_forwards` times
    y = norm(W_out a + x)

NoNorm(h) = gamma * h + beta (Eq. 1) replaces the layer norm in the student, ReLU the GELU (sec. 3.3).

NOTE the paper prints 25.3M, 15.1M and 293M parameters. The released configurations, which these are, give 24.58M,
15.49M and 294.2M; no choice of heads that we tried gives the printed numbers.
NOTE padding: the released code multiplies a padded key's score by 0 and adds -6, so padding keeps a weight of about
e^-6, which suits quantization. Here padded keys get exactly 0, as in transformers.
NOTE the trigram also reads padding: the "next" of a text's last token is the embedding of the padding id, or zeros
where the batch ends. That is so in the released code and in transformers.
NOTE the released code computes GELU by its tanh approximation (`activation="gelu_tanh"`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.dense_attention import attention_scores, check_key_padding_mask, masked_softmax
from effnlp_lessons.transformer import ACTIVATIONS, EncoderOutput, initialise_

ATTENTION_INPUTS = ("shared", "bottleneck", "block")


@dataclass(frozen=True)
class MobileBertConfig:
    """Sizes of a MobileBERT or IB-BERT. The defaults are those of MobileBERT.

    `d_embedding` is the width of the token table, `d_model` of the maps between blocks, `d_bottleneck` of all inside
    a block. `attention_input` says what queries and keys, and what values read: "shared" a bottleneck of their own,
    and the block's input; "bottleneck" both the block's bottleneck; "block" both the block's input.
    `attention_dropout` acts on the attention weights.
    """

    vocab_size: int = 30_522
    max_length: int = 512
    segments: int = 2
    d_embedding: int = 128
    d_model: int = 512
    d_bottleneck: int = 128
    layers: int = 24
    heads: int = 4
    d_ff: int = 512
    feed_forwards: int = 4
    attention_input: str = "shared"
    activation: str = "relu"
    norm: str = "no_norm"
    norm_eps: float = 1e-12
    pooler: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value, smallest = getattr(self, field.name), 0 if field.name == "layers" else 1
            if field.type == "int" and (not isinstance(value, int) or value < smallest):
                raise ValueError(f"{field.name} must be an integer >= {smallest}, got {value!r}")
        if self.d_bottleneck % self.heads:
            raise ValueError(f"heads must divide d_bottleneck, got {self.heads} and {self.d_bottleneck}")
        if self.d_embedding >= self.d_model:
            raise ValueError(f"d_embedding must be below d_model, got {self.d_embedding} and {self.d_model}")
        for name, allowed in {
            "attention_input": ATTENTION_INPUTS,
            "activation": tuple(sorted(ACTIVATIONS)),
            "norm": ("no_norm", "layer_norm"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


MOBILEBERT = MobileBertConfig()
MOBILEBERT_TINY = MobileBertConfig(feed_forwards=2, attention_input="bottleneck")
IB_BERT_LARGE = MobileBertConfig(
    d_bottleneck=1_024, d_ff=4_096, feed_forwards=1, attention_input="block", activation="gelu", norm="layer_norm",
    dropout=0.1,
)  # fmt: skip


# --------------------------------------------------------------------------------------------- the parts


class NoNorm(nn.Module):
    """gamma * h + beta, element by element, no statistics (sec. 3.3, Eq. 1). gamma is `weight`, beta is `bias`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, h: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return h * self.weight + self.bias


def _norm(width: int, config: MobileBertConfig) -> nn.Module:
    return NoNorm(width) if config.norm == "no_norm" else nn.LayerNorm(width, eps=config.norm_eps)


class NormedLinear(nn.Module):
    """norm(dropout(W x + b) + residual): what every line of a block is made of."""

    def __init__(self, d_in: int, d_out: int, config: MobileBertConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)
        self.dropout = nn.Dropout(dropout)
        self.norm = _norm(d_out, config)

    def forward(
        self, x: Float[Tensor, "batch length d_in"], residual: Float[Tensor, "batch length d_out"] | None = None
    ) -> Float[Tensor, "batch length d_out"]:
        y = self.dropout(self.linear(x))
        return self.norm(y if residual is None else y + residual)


def trigrams(x: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch length 3*width"]:
    """Every token's features beside its neighbours', in the order [next, current, previous] (sec. 3.4).

    Zeros stand beyond the two ends. A linear layer on this is a convolution with kernel 3 and padding 1, whose weight
    slices are [previous, current, next].
    """
    following = F.pad(x[:, 1:], (0, 0, 0, 1))
    previous = F.pad(x[:, :-1], (0, 0, 1, 0))
    return torch.cat([following, x, previous], dim=-1)


class TrigramEmbeddings(nn.Module):
    """A narrow token table, three neighbours side by side, a linear layer to `d_model` (sec. 3.4).

    Then positions, segments and norm as in BERT.
    """

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.d_embedding)
        self.combine = nn.Linear(3 * config.d_embedding, config.d_model)
        self.positions = nn.Embedding(config.max_length, config.d_model)
        self.segments = nn.Embedding(config.segments, config.d_model)
        self.norm = _norm(config.d_model, config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, token_ids: Int[Tensor, "batch length"], segment_ids: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length d_model"]:
        if token_ids.ndim != 2 or token_ids.dtype not in (torch.int64, torch.int32):
            got = f"{token_ids.dtype} {tuple(token_ids.shape)}"
            raise ValueError(f"token_ids must be integers of shape (batch, length), got {got}")
        length = token_ids.shape[1]
        if not 1 <= length <= self.config.max_length:
            raise ValueError(f"token_ids must hold 1 to {self.config.max_length} tokens a text, got {length}")
        x = self.combine(trigrams(self.tokens(token_ids)))
        x = x + self.positions(torch.arange(length, device=token_ids.device))
        x = x + self.segments(torch.zeros_like(token_ids) if segment_ids is None else segment_ids)
        return self.dropout(self.norm(x))


class BottleneckAttention(nn.Module):
    """Attention with one input for queries and keys and another for values; ends in W_o, residual and norm."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        inside = config.d_bottleneck
        d_query_key = config.d_model if config.attention_input == "block" else inside
        d_value = inside if config.attention_input == "bottleneck" else config.d_model
        self.heads = config.heads
        self.query = nn.Linear(d_query_key, inside)
        self.key = nn.Linear(d_query_key, inside)
        self.value = nn.Linear(d_value, inside)
        self.dropout = nn.Dropout(config.attention_dropout)
        self.output = NormedLinear(inside, inside, config)

    def forward(
        self,
        query_key_input: Float[Tensor, "batch length d_query_key"],
        value_input: Float[Tensor, "batch length d_value"],
        residual: Float[Tensor, "batch length d_bottleneck"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length d_bottleneck"], Float[Tensor, "batch heads length length"]]:
        """The mixed tokens, and the raw scores q kᵀ / sqrt(d_head) before mask and softmax."""
        projected = self.query(query_key_input), self.key(query_key_input), self.value(value_input)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        scores = attention_scores(q, k)
        allowed = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        mixed = self.dropout(masked_softmax(scores, allowed)) @ v
        return self.output(mixed.transpose(1, 2).flatten(2), residual), scores


class ResidualFeedForward(nn.Module):
    """norm(W_2 activation(W_1 a) + a), one of the stack (sec. 3.2)."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.d_bottleneck, config.d_ff)
        self.activation = ACTIVATIONS[config.activation]
        self.contract = NormedLinear(config.d_ff, config.d_bottleneck, config)

    def forward(self, a: Float[Tensor, "batch length d_bottleneck"]) -> Float[Tensor, "batch length d_bottleneck"]:
        return self.contract(self.activation(self.expand(a)), residual=a)


class BottleneckBlock(nn.Module):
    """One layer of MobileBERT or IB-BERT; the equations stand at the head of this module."""

    def __init__(self, config: MobileBertConfig) -> None:
        super().__init__()
        outside, inside = config.d_model, config.d_bottleneck
        self.attention_input = config.attention_input
        self.bottleneck = NormedLinear(outside, inside, config)
        self.shared_bottleneck = NormedLinear(outside, inside, config) if self.attention_input == "shared" else None
        self.token_mixer = BottleneckAttention(config)
        self.channel_mixer = nn.ModuleList(ResidualFeedForward(config) for _ in range(config.feed_forwards))
        self.output_bottleneck = NormedLinear(inside, outside, config, dropout=config.dropout)

    def forward(
        self, x: Float[Tensor, "batch length d_model"], key_padding_mask: Bool[Tensor, "batch length"] | None = None
    ) -> tuple[Float[Tensor, "batch length d_model"], Float[Tensor, "batch heads length length"]]:
        """The block's output and its raw attention scores."""
        u = self.bottleneck(x)
        if self.attention_input == "shared":
            query_key_input, value_input = self.shared_bottleneck(x), x
        else:
            query_key_input = value_input = u if self.attention_input == "bottleneck" else x
        a, scores = self.token_mixer(query_key_input, value_input, u, key_padding_mask)
        for feed_forward in self.channel_mixer:
            a = feed_forward(a)
        return self.output_bottleneck(a, residual=x), scores


# -------------------------------------------------------------------------------------------- the models


class MobileBert(nn.Module):
    """The encoder: `MobileBert(MOBILEBERT)`, `MobileBert(IB_BERT_LARGE)`. Weights are drawn from `seed`.

    NOTE without a pooler, as published, a classifier reads the first token of `last` as it is.
    """

    def __init__(self, config: MobileBertConfig = MOBILEBERT, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TrigramEmbeddings(config)
        self.blocks = nn.ModuleList(BottleneckBlock(config) for _ in range(config.layers))
        self.pooler = nn.Linear(config.d_model, config.d_model) if config.pooler else None
        initialise_(self, torch.Generator().manual_seed(seed))

    def forward(
        self,
        token_ids: Int[Tensor, "batch length"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
        segment_ids: Int[Tensor, "batch length"] | None = None,
        return_scores: bool = False,
        blocks: int | None = None,
    ) -> EncoderOutput:
        """Encode a batch of token ids: the call of `Encoder`, `hidden` being the feature maps of the transfer.

        Args:
            return_scores: also hand out every block's raw attention scores.
            blocks: stop after so many blocks; `last` is then the map after them, and nothing is pooled.

        Raises:
            ValueError: ids that are not integers (batch, length), too many tokens, a mask of another shape or
                dtype, more blocks than there are.
        """
        if blocks is not None and not 0 <= blocks <= len(self.blocks):
            raise ValueError(f"blocks must be from 0 to {len(self.blocks)}, got {blocks}")
        x = self.embeddings(token_ids, segment_ids)
        check_key_padding_mask(key_padding_mask, *token_ids.shape)
        hidden, scores = [x], []
        for block in self.blocks[:blocks]:
            x, raw = block(x, key_padding_mask)
            hidden.append(x)
            scores.append(raw if return_scores else None)
        complete = len(hidden) == len(self.blocks) + 1
        pooled = torch.tanh(self.pooler(x[:, 0])) if self.pooler is not None and complete else None
        return EncoderOutput(x, tuple(hidden), pooled, tuple(scores) if return_scores else None)


class MobileBertMaskedLM(nn.Module):
    """A MobileBERT with its masked-word head: transform, activation, layer norm, and a table as wide as `d_model`.

    The first `d_embedding` columns of that table are the token table, tied; the others are a free matrix, `extra`,
    of vocab_size * (d_model - d_embedding) parameters. The norm is a layer norm in the student too.
    """

    def __init__(self, encoder: MobileBert, *, seed: int = 0) -> None:
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        self.transform = nn.Linear(config.d_model, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.extra = nn.Linear(config.d_model - config.d_embedding, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        generator = torch.Generator().manual_seed(seed)
        initialise_(self.transform, generator)
        initialise_(self.extra, generator)

    def logits(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits (nats before softmax) from the map after the last block; give only the masked rows to save work."""
        x = self.norm(self.activation(self.transform(hidden)))
        table = self.encoder.embeddings.tokens.weight  # (vocab, d_embedding)
        # [table | extra] x + bias, without putting the two matrices together
        return F.linear(x[..., : table.shape[1]], table, self.bias) + self.extra(x[..., table.shape[1] :])

    def forward(
        self, token_ids: Int[Tensor, "batch length"], key_padding_mask: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length vocab"]:
        return self.logits(self.encoder(token_ids, key_padding_mask).last)


# ------------------------------------------------------------------------------- transformers' weights

# transformers' names, piece by piece -> ours, in this order
_NAMES = {
    "encoder.layer.": "blocks.",
    "mobilebert.": "encoder.",
    "embeddings.word_embeddings": "embeddings.tokens",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.token_type_embeddings": "embeddings.segments",
    "embeddings.embedding_transformation": "embeddings.combine",
    "embeddings.LayerNorm": "embeddings.norm",
    "bottleneck.input.": "bottleneck.",
    "bottleneck.attention.": "shared_bottleneck.",
    "output.bottleneck.": "output_bottleneck.",
    "attention.self.": "token_mixer.",
    "attention.output.": "token_mixer.output.",
    ".ffn.": ".channel_mixer.",
    "pooler.dense": "pooler",
    "cls.predictions.transform.dense": "transform",
    "cls.predictions.transform.LayerNorm": "norm",
    "cls.predictions.dense": "extra",
    "cls.predictions.bias": "bias",
}
_LEFT_OUT = ("position_ids", "cls.seq_relationship", "cls.predictions.decoder")  # a buffer, a head not taught, tied


def rename_mobilebert_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' `MobileBertModel` or `...ForMaskedLM` under our names; no tensor is copied.

    transformers keeps the last feed-forward apart from the others (`ffn`), and the head's free matrix transposed.
    """
    stacked = [int(number) for name in state for number in re.findall(r"\.ffn\.(\d+)\.", name)]
    last = max(stacked, default=-1) + 1
    renamed = {}
    for name, tensor in state.items():
        if any(part in name for part in _LEFT_OUT):
            continue
        for theirs, ours in _NAMES.items():
            name = name.replace(theirs, ours)
        name = re.sub(r"(blocks\.\d+)\.(intermediate|output)\.", rf"\1.channel_mixer.{last}.\2.", name)
        name = re.sub(r"(channel_mixer\.\d+)\.output\.", r"\1.contract.", name)
        name = name.replace("intermediate.dense", "expand").replace(".dense.", ".linear.").replace("LayerNorm", "norm")
        renamed[name] = tensor.T if name == "extra.weight" else tensor
    return renamed
