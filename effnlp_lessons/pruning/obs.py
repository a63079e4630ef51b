"""Optimal Brain Surgeon: delete a weight, and adjust all the others for it (Hassibi and Stork 1993).

The second derivatives are not diagonal, and assuming so deletes the wrong weights. With the whole H, deleting weight q
is a minimization under a constraint, min ½ δᵀ H δ subject to e_qᵀ δ + w_q = 0, and its solution is

    δ = -(w_q / [H⁻¹]_qq) H⁻¹ e_q         L_q = w_q² / (2 [H⁻¹]_qq)

The q with the smallest L_q goes; δ moves every weight, and w_q to 0. For E = 1/(2P) Σ (t - o)² near a minimum
H = (1/P) Σ X Xᵀ, X the gradient of an *output* (one for each output and pattern), and H⁻¹ needs no inversion:

    H_0⁻¹ = I/α        H⁻¹ <- H⁻¹ - (H⁻¹ X Xᵀ H⁻¹) / (P + Xᵀ H⁻¹ X)

The denominator has P where the matrix inversion lemma has 1, since each term of H carries 1/P.

NOTE E is half of the error in `obd`, and so are H and L_q.
NOTE with fewer rows X than weights H has no inverse, and α, 1e-8 to 1e-4 in the paper, decides in the directions that
no X sees. αI is also the second derivative of a weight decay (α/2) |w|²: trained with it, αI + (1/P) Σ X Xᵀ is the
second derivative of what was minimized (as far as residuals may be left out), and the decay makes a minimum exist.
NOTE the rounding of the recursion grows as 1/α: in float64 relative 1e-12 at 1e-4, 1e-8 at 1e-8.
NOTE a weight that is already 0 would move with the next δ: its row and column are taken out of H first.
NOTE the paper computes H⁻¹ anew for every weight. `operate` can delete several with one H, exact for the quadratic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from effnlp_lessons.pruning.masks import Masks, apply_masks_

Inverse = Callable[[Float[Tensor, "patterns outputs weights"], float], Float[Tensor, "weights weights"]]


# ------------------------------------------------------------------------------------- the inverse Hessian


def output_gradients(
    network: nn.Module, inputs: Float[Tensor, "patterns d_in"], masks: Masks
) -> Float[Tensor, "patterns outputs weights"]:
    """X: the gradient of every output for every pattern with respect to the parameters that `masks` keeps.

    The gradient of the outputs, not of the error: no target is needed. Parameters are in the order of `masks`, flat.
    """
    named = dict(network.named_parameters())
    parameters = {name: named[name].detach() for name in masks}
    outputs = jacrev(lambda p, x: functional_call(network, p, (x,)))
    by_name = vmap(outputs, in_dims=(None, 0))(parameters, inputs)  # {name: (patterns, outputs, *shape)}
    return torch.cat([by_name[name][:, :, mask] for name, mask in masks.items()], dim=-1)


def inverse_hessian(
    gradients: Float[Tensor, "patterns outputs weights"], alpha: float = 1e-4
) -> Float[Tensor, "weights weights"]:
    """(αI + (1/P) Σ X Xᵀ)⁻¹ by one rank-one correction for each output and pattern.

    Raises:
        ValueError: alpha not above 0, no pattern or other than three dimensions.
    """
    _check(gradients, alpha)
    patterns, _, size = gradients.shape
    inverse = torch.eye(size, dtype=gradients.dtype) / alpha
    for x in gradients.flatten(0, 1):
        hx = inverse @ x
        inverse -= torch.outer(hx, hx) / (patterns + x @ hx)
    return inverse


def inverted_hessian(
    gradients: Float[Tensor, "patterns outputs weights"], alpha: float = 1e-4
) -> Float[Tensor, "weights weights"]:
    """The same by building H and inverting it (Cholesky): less work when there are more rows X than weights.

    Raises:
        ValueError: as `inverse_hessian`.
    """
    _check(gradients, alpha)
    rows = gradients.flatten(0, 1)
    hessian = rows.T @ rows / len(gradients) + alpha * torch.eye(rows.shape[1], dtype=rows.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def for_cross_entropy(
    gradients: Float[Tensor, "patterns outputs weights"], outputs: Float[Tensor, "patterns outputs"]
) -> Float[Tensor, "patterns outputs weights"]:
    """X / sqrt(o (1 - o)): with these rows H is that of the cross-entropy of sigmoid outputs, in nats, mean over P."""
    return gradients / (outputs * (1 - outputs)).sqrt()[..., None]


# ----------------------------------------------------------------------------------------------- surgery


def saliencies(
    weights: Float[Tensor, " weights"], inverse: Float[Tensor, "weights weights"]
) -> Float[Tensor, " weights"]:
    """L_q = w_q² / (2 [H⁻¹]_qq): the predicted rise of E when q is deleted and all others are adjusted."""
    return weights**2 / (2 * inverse.diagonal())


def deletion(
    weights: Float[Tensor, " weights"], inverse: Float[Tensor, "weights weights"], q: int
) -> Float[Tensor, " weights"]:
    """The weights after deleting q: w - (w_q / [H⁻¹]_qq) H⁻¹ e_q, with w_q exactly 0."""
    new = weights - weights[q] / inverse[q, q] * inverse[:, q]
    new[q] = 0.0  # already, up to rounding
    return new


def without(inverse: Float[Tensor, "weights weights"], q: int) -> Float[Tensor, "weights weights"]:
    """The inverse of H with row and column q taken out, from H⁻¹; row and column q are 0.

    H⁻¹ - H⁻¹ e_q e_qᵀ H⁻¹ / [H⁻¹]_qq: no later δ has a part along q.
    """
    smaller = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    smaller[q], smaller[:, q] = 0.0, 0.0
    return smaller


def operate(
    weights: Float[Tensor, " weights"], inverse: Float[Tensor, "weights weights"], count: int = 1
) -> tuple[Float[Tensor, " weights"], Bool[Tensor, " weights"], float]:
    """Delete `count` weights one after the other, each time the one with the smallest L_q, with one H.

    Returns:
        the weights, which are still there (True), and the sum of the L_q: ½ δᵀ H δ for all of the change.

    Raises:
        ValueError: a count outside 0 .. weights.
    """
    if not 0 <= count <= len(weights):
        raise ValueError(f"count must be in 0 .. {len(weights)} weights, got {count}")
    kept, predicted = torch.ones_like(weights, dtype=torch.bool), 0.0
    for _ in range(count):
        scores = saliencies(weights, inverse).masked_fill(~kept, torch.inf)
        q = int(scores.argmin())
        predicted += scores[q].item()
        weights, inverse = deletion(weights, inverse, q), without(inverse, q)
        kept[q] = False
    return weights, kept, predicted


def surgery_(
    network: nn.Module,
    inputs: Float[Tensor, "patterns d_in"],
    masks: Masks,
    count: int = 1,
    alpha: float = 1e-4,
    inverse: Inverse = inverse_hessian,
) -> tuple[Masks, float]:
    """Delete `count` parameters of a trained network and adjust the others, in place.

    Only parameters that `masks` names take part; those that it has removed stay 0. Returns the new masks and the
    predicted rise of E = 1/(2P) Σ (t - o)². For deleting and retraining in turn: `obd.in_rounds`.

    Raises:
        ValueError: a count outside 0 .. kept, alpha not above 0, masks that do not fit.
    """
    apply_masks_(network, masks)
    named = dict(network.named_parameters())
    weights = torch.cat([named[name].detach()[mask] for name, mask in masks.items()])
    h_inverse = inverse(output_gradients(network, inputs, masks), alpha)
    weights, kept, predicted = operate(weights, h_inverse, count)
    sizes = [int(mask.sum()) for mask in masks.values()]
    new = {}
    for (name, mask), values, stay in zip(masks.items(), weights.split(sizes), kept.split(sizes), strict=True):
        with torch.no_grad():
            named[name][mask] = values
        new[name] = mask.clone()
        new[name][mask] = stay
    return new, predicted


def _check(gradients: Tensor, alpha: float) -> None:
    if gradients.ndim != 3 or not len(gradients):
        raise ValueError(f"gradients must be (patterns, outputs, weights), got shape {tuple(gradients.shape)}")
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
