"""TernaryBERT: weights of 2 bits, activations of 8, learnt from the model's own full precision (Zhang et al. 2020).

arXiv 2009.12812. Teacher and start of the student are the same fine-tuned model. The student keeps its weights w in
float32 ("latent"), computes with their ternary values w_hat = alpha b (`ternary`), and updates w:

    forward: y = Q(x) w_hat + bias        backward: dL/dw := dL/dw_hat    (straight-through)

Matrices of the Transformer have one alpha each, by TWN or LAT; the word embeddings one a row. Q is 8-bit min-max with
a zero point, over the whole tensor as it comes, clipped at +-2.5 with gradient 0 beyond; it stands before every linear
layer and on both sides of both products of attention. The head, the positions, the segments, norms and biases stay in
float32. The loss has no labels: mean squared errors of all L + 1 hidden states and of the attention scores of all L
layers, plus the soft cross-entropy of the logits, all with weight 1 (`tinybert.stage_loss`).

NOTE LAT's d is the square root of Adam's second moment, plus 1e-8. The optimizer is made inside `training.train`, so
each module keeps the same average itself: pass `update_curvature_` as `after_step`. Adam's correction for its start
would scale all d alike, which changes nothing.
NOTE the released code clips latent weights at +-2.5 as well; ours are not clipped. Its linear layers quantize their
inputs with a symmetric grid, and the released file quantizes the embeddings again with one alpha for all rows: it is
not the model that was trained. It also stores ternary weights as float32; `freeze` and `packing` make them 2 bits.
NOTE the grid of Q always holds 0 (`affine_quantizer`); in the released one the smallest number is exact instead.
NOTE ranges are taken from the batch, padding included: a sentence's logits depend a little on its neighbours.
NOTE under bfloat16 autocast the weights are still made ternary in float32; the products then round.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.dense_attention import attention_scores, check_key_padding_mask, masked_softmax
from effnlp_lessons.distillation.tinybert import LAYER_LOSSES, Apprentice, LayerLosses, stage_loss
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.layers import with_layers
from effnlp_lessons.measure import transformer_parameters
from effnlp_lessons.quantization.post_training import QuantizedEmbedding, QuantizedLinear
from effnlp_lessons.quantization.quantizers import QuantizedMatrix, affine_quantizer
from effnlp_lessons.quantization.ternary import METHODS, Method, ternarize_matrix
from effnlp_lessons.transformer import FeedForward, SelfAttention, TransformerConfig

BITS, CLIP, SECOND_MOMENT_DECAY = 8, 2.5, 0.999


# ---------------------------------------------------------------------------------- straight-through rounding


class _StraightThrough(torch.autograd.Function):
    """The second argument forward; backward its gradient goes to the first, where |first| < clip."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, clip: float | None) -> Tensor:
        if clip is not None:
            ctx.save_for_backward(x.abs() < clip)
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        for inside in ctx.saved_tensors:
            gradient = gradient * inside
        return gradient, None, None


def quantize_activations(
    x: Float[Tensor, "*shape"], bits: int = BITS, clip: float | None = CLIP
) -> Float[Tensor, "*shape"]:
    """`x` on a grid of 2^bits points between its own smallest and largest number, one grid for the whole tensor.

    Clipped to -clip .. clip before; the gradient is 1 where |x| < clip and 0 elsewhere. None: no clip. The grid
    contains 0. float32 or float64; half precision becomes float32.

    Raises:
        ValueError: bits out of 2 .. 8, a clip that is not > 0, numbers that are not finite.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be > 0, got {clip}")
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    with torch.no_grad():
        clipped = x if clip is None else x.clamp(-clip, clip)
        grid = affine_quantizer(*torch.aminmax(clipped), bits)
        # grid(clipped), in place: S (clamp(round(x / S) + Z) - Z)
        q = (clipped / grid.scale).round_().add_(grid.zero_point).clamp_(grid.q_min, grid.q_max)
        quantized = q.sub_(grid.zero_point).mul_(grid.scale)
    return _StraightThrough.apply(x, quantized, clip)


class QuantizedInput(nn.Module):
    """A linear layer behind a quantizer: linear(Q(x)). `bits` None: the layer alone."""

    def __init__(self, linear: nn.Module, bits: int | None = BITS, clip: float | None = CLIP) -> None:
        super().__init__()
        self.linear, self.bits, self.clip = linear, bits, clip

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        return self.linear(x if self.bits is None else quantize_activations(x, self.bits, self.clip))


class _Latent:
    """What ternary modules share: a latent `weight`, the way it becomes ternary, and the curvature for LAT.

    `second_moment` (of the weight's shape; None with TWN) averages the squared gradient as Adam does.
    """

    weight: nn.Parameter
    second_moment: Tensor | None

    def _prepare(self, weight: Tensor, method: Method, granularity: str) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        self.weight = nn.Parameter(weight.detach().clone())
        self.method, self.granularity = method, granularity
        self.register_buffer("second_moment", None if method == "twn" else torch.zeros_like(self.weight))

    def ternary(self) -> QuantizedMatrix:
        """The codes and scales that the forward pass uses now."""
        d = None if self.second_moment is None else self.second_moment.sqrt() + 1e-8
        return ternarize_matrix(self.weight, self.method, self.granularity, d)


class TernaryLinear(_Latent, nn.Linear):
    """A linear layer with ternary weights, one alpha for the matrix; made from a copy of another's weights."""

    def __init__(self, linear: nn.Linear, method: Method = "twn") -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self._prepare(linear.weight, method, "tensor")
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        weight = _StraightThrough.apply(self.weight, self.ternary().dequantize(), None)
        return F.linear(x, weight, self.bias)


class TernaryEmbedding(_Latent, nn.Embedding):
    """A table of ternary rows, one alpha each. Only the rows that are looked up are made ternary."""

    def __init__(self, embedding: nn.Embedding, method: Method = "twn") -> None:
        super().__init__(*embedding.weight.shape, device="meta")
        self._prepare(embedding.weight, method, "row")

    def forward(self, token_ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape d_model"]:
        rows = F.embedding(token_ids, self.weight)
        if not token_ids.numel():
            return rows
        d = None if self.second_moment is None else self.second_moment[token_ids.flatten()].sqrt() + 1e-8
        ternary = ternarize_matrix(rows.flatten(0, -2), self.method, "row", d).dequantize()
        return _StraightThrough.apply(rows, ternary.view_as(rows), None)


class QuantizedAttention(SelfAttention):
    """Dense self-attention with both operands of q kᵀ and of weights · v quantized; hands out its raw scores."""

    def __init__(
        self, config: TransformerConfig, parts: dict[str, nn.Module], bits: int | None = BITS, clip: float | None = CLIP
    ) -> None:
        nn.Module.__init__(self)
        self.heads, self.causal, self.attention = config.heads, False, None
        self.query, self.key, self.value, self.output = (parts[n] for n in ("query", "key", "value", "output"))
        self.bits, self.clip = bits, clip

    def forward(
        self,
        x: Float[Tensor, "batch length d_model"],
        key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
        state: None = None,
        return_scores: bool = False,
    ) -> tuple:
        """As `SelfAttention.forward`; there is no state."""
        if state is not None:
            raise ValueError("a bidirectional encoder reads all tokens at once and keeps no state")
        check_key_padding_mask(key_padding_mask, *x.shape[:2])

        def quantize(values: Tensor) -> Tensor:
            return values if self.bits is None else quantize_activations(values, self.bits, self.clip)

        q, k, v = (quantize(self.split_heads(project(x))) for project in (self.query, self.key, self.value))
        scores = attention_scores(q, k)
        allowed = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        mixed = quantize(masked_softmax(scores, allowed)) @ v
        y = self.output(mixed.transpose(1, 2).flatten(2))
        return (y, None, scores) if return_scores else (y, None)


# ------------------------------------------------------------------------------------------- student and loss


def ternarize(
    model: SentenceClassifier, method: Method | None = "twn", *, bits: int | None = BITS, clip: float | None = CLIP
) -> SentenceClassifier:
    """A student with the model's weights as latent ones: ternary linear layers, pooler and token table.

    Args:
        model: a fine-tuned classifier; it is left as it is, and the student shares nothing with it.
        method: how weights become ternary: "twn", "lat" (approximate) or "lat exact". None: they stay as they are,
            only the activations are quantized.
        bits: of the activations; None leaves them in float32.
        clip: of the activations before they are quantized; None: their whole range.

    Raises:
        ValueError: a model with other mixers, another word for `method`.
    """
    student = copy.deepcopy(model).requires_grad_(True)
    encoder = student.encoder

    def linear(layer: nn.Linear) -> QuantizedInput:
        return QuantizedInput(layer if method is None else TernaryLinear(layer, method), bits, clip)

    for i, block in enumerate(encoder.blocks):
        mixer, feed_forward = block.token_mixer, block.channel_mixer
        if type(mixer) is not SelfAttention or mixer.attention is not None or mixer.causal:
            raise ValueError(f"block {i} must mix tokens by dense self-attention, got {type(mixer).__name__}")
        if type(feed_forward) is not FeedForward:
            raise ValueError(f"block {i} must mix channels by FeedForward, got {type(feed_forward).__name__}")
        parts = {name: linear(getattr(mixer, name)) for name in ("query", "key", "value", "output")}
        block.token_mixer = QuantizedAttention(encoder.config, parts, bits, clip)
        feed_forward.expand, feed_forward.contract = linear(feed_forward.expand), linear(feed_forward.contract)
    encoder.pooler = linear(encoder.pooler)
    if method is not None:
        encoder.embeddings.tokens = TernaryEmbedding(encoder.embeddings.tokens, method)
    return student


def ternary_modules(student: nn.Module) -> Iterator[tuple[str, TernaryLinear | TernaryEmbedding]]:
    """Name and module of everything that has ternary weights."""
    return ((name, m) for name, m in student.named_modules() if isinstance(m, TernaryLinear | TernaryEmbedding))


def update_curvature_(student: nn.Module, step: int = 0) -> None:
    """Average the squared gradients for LAT, in place: v <- 0.999 v + 0.001 g^2. For `after_step` of `train`.

    Takes the gradient as the optimizer saw it. Modules that use TWN, or got no gradient, are left alone.
    """
    for _, module in ternary_modules(student):
        g = module.weight.grad
        if module.second_moment is not None and g is not None:
            module.second_moment.mul_(SECOND_MOMENT_DECAY).addcmul_(g, g, value=1 - SECOND_MOMENT_DECAY)


def distillation_loss(teacher: SentenceClassifier) -> Callable[[SentenceClassifier, Any], Float[Tensor, ""]]:
    """The loss `loss(student, batch)` for `training.train`: hidden states, attention scores and logits.

    L = sum_{l=0..L} MSE(H_S, H_T) + sum_{l=1..L} MSE(A_S, A_T) + CE(softmax(z_T), z_S): TinyBERT's losses for a
    student of the teacher's own shape. `batch` is (token_ids, key_padding_mask, ...); labels are not read.
    """
    layer_losses = LayerLosses(teacher.encoder.config, teacher.encoder.config)  # of one width: nothing to project
    loss = stage_loss(teacher, (*LAYER_LOSSES, "prediction"))
    return lambda student, batch: loss(Apprentice(student, layer_losses), batch)


# ---------------------------------------------------------------------------------------- size, and the file


def size_in_bytes(config: TransformerConfig, scales: bool = True) -> dict[str, float]:
    """Bytes of an encoder with its pooler by arithmetic: "full" (float32) and "ternary".

    2 bits for every weight of the linear layers, the pooler and the token table, float32 for the rest.

    Args:
        scales: count alpha too, float32: one a word and one a matrix.
    """
    parameters, d = sum(transformer_parameters(config).values()), config.d_model
    per_block, pooler = 4 * d * d + 2 * d * config.d_ff, d * d if config.pooler else 0
    ternary = config.layers * per_block + pooler + config.vocab_size * d
    alphas = config.vocab_size + 6 * config.layers + bool(config.pooler) if scales else 0
    return {"full": 4 * parameters, "ternary": ternary / 4 + 4 * (parameters - ternary) + 4 * alphas}


def freeze(student: SentenceClassifier) -> SentenceClassifier:
    """A copy that computes the same from fixed codes and alphas, in evaluation mode: nothing latent is left.

    `packing.save_quantized` writes it with 2 bits a weight; `packing.load_quantized(student, file)` reads it back.
    """
    layers: dict[str, nn.Module] = {}
    for name, module in ternary_modules(student):
        linear = isinstance(module, TernaryLinear)
        layers[name] = (
            QuantizedLinear(module.ternary(), module.bias) if linear else QuantizedEmbedding(module.ternary())
        )
    return with_layers(student, layers).requires_grad_(False).eval()
