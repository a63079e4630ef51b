"""Folding batch normalisation into the layer before it (Jacob et al. 2017, arXiv 1712.05877, sec. 3.2).

    gamma (w x + b - mean) / sqrt(var + eps) + beta  =  w_fold x + b_fold
    w_fold = gamma w / sqrt(var + eps),    b_fold = beta + gamma (b - mean) / sqrt(var + eps)

A normalisation that stayed would be floating-point arithmetic between two integer layers. It is folded before the
weights are quantized: afterwards each row would be rescaled, and its codes would no longer be whole numbers.

In inference, mean and variance are the running ones, constants. In quantization-aware training the weights that are
quantized must be the folded ones too. There the fold uses the statistics of the batch: the layer runs once to get
them, and once more with the folded, fake-quantized weights. Call `fold_statistics` with the batch's mean and its biased
variance for this; its result is differentiable.

NOTE a Transformer normalises each token by its own mean and variance (layer norm). These are not known before the
input is, so they cannot be folded: see `ibert`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


def fold_statistics(
    linear: nn.Linear,
    batch_norm: nn.BatchNorm1d,
    mean: Float[Tensor, " out"],
    variance: Float[Tensor, " out"],
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]:
    """Weight and bias of `linear` followed by `batch_norm` with these statistics; differentiable.

    Raises:
        ValueError: widths that do not fit.
    """
    if not linear.out_features == batch_norm.num_features == len(mean) == len(variance):
        raise ValueError(
            f"widths must agree: linear {linear.out_features}, batch_norm {batch_norm.num_features}, "
            f"mean {len(mean)}, variance {len(variance)}"
        )
    factor = torch.rsqrt(variance + batch_norm.eps)
    shift = -mean if linear.bias is None else linear.bias - mean
    if batch_norm.weight is None:  # affine=False
        return factor[:, None] * linear.weight, factor * shift
    factor = batch_norm.weight * factor
    return factor[:, None] * linear.weight, batch_norm.bias + factor * shift


def fold_batch_norm(linear: nn.Linear, batch_norm: nn.BatchNorm1d) -> nn.Linear:
    """One new linear layer that equals `linear` followed by `batch_norm` in evaluation mode.

    Raises:
        ValueError: widths that do not fit, a `batch_norm` that keeps no running statistics.
    """
    if batch_norm.running_mean is None or batch_norm.running_var is None:
        raise ValueError("batch_norm must keep running statistics (track_running_stats=True)")
    with torch.no_grad():
        weight, bias = fold_statistics(linear, batch_norm, batch_norm.running_mean, batch_norm.running_var)
        folded = torch.nn.utils.skip_init(
            nn.Linear, linear.in_features, linear.out_features, dtype=weight.dtype, device=weight.device
        )
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
    return folded.train(linear.training)
