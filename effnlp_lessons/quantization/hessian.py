"""Eigenvalues of a Hessian that is never written down: products H v by two backward passes, and iterations on them.

    H v = d(gᵀ v) / dw,   g = dL / dw           two backward passes (the idea of Pearlmutter 1994, Neural Computation 6)
    v <- H v / |H v|,     lambda = vᵀ H v       power iteration, as in Q-BERT (Shen et al. 2019, arXiv 1909.05840)
    v <- (H + c I) v / |(H + c I) v|            the same with a shift c: the largest eigenvalue by sign
    H Q = Q T + r eᵀ,     T tridiagonal         Lanczos: both ends of the spectrum at once

H has as many rows as the block has weights (1.8 million for a layer of MiniLM), so only v is ever held: one vector for
the whole block, all its weight matrices and biases together. Normalised tensor by tensor it would be another iteration.

NOTE power iteration finds the eigenvalue that is largest in absolute value. Where a fine-tuned model sits at a point of
negative curvature this is a negative one. `power_iteration` keeps its sign; `largest_eigenvalue` and `lanczos` look
for the largest by sign.
NOTE the model must be in evaluation mode: with dropout every forward pass has another Hessian. Attention must
be written out (`dense_attention`): torch's fused kernel for the CPU has no second derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# v -> H v, for a symmetric H; vectors of the whole block, flat
LinearMap = Callable[[Float[Tensor, " size"]], Float[Tensor, " size"]]


# ------------------------------------------------------------------------------- Hessian times a vector


def flatten(tensors: Sequence[Tensor]) -> Float[Tensor, " size"]:
    """All numbers of some tensors as one vector (a copy)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: Float[Tensor, " size"], like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `flatten`: pieces of `vector` in the shapes of `like` (views).

    Raises:
        ValueError: a vector of another size.
    """
    sizes = [tensor.numel() for tensor in like]
    if vector.ndim != 1 or len(vector) != sum(sizes):
        raise ValueError(f"vector must have shape ({sum(sizes)},), got {tuple(vector.shape)}")
    return [piece.view(tensor.shape) for piece, tensor in zip(vector.split(sizes), like, strict=True)]


class Hessian:
    """The Hessian of `loss` with respect to `parameters`, all of them one block, as a linear map v -> H v.

    The gradient is taken once, with its graph kept; every product then costs one backward pass through it. The graph
    lives as long as this object.

    Args:
        loss: a single number with its graph, in nats for cross-entropy. H is in that unit per weight squared.

    Raises:
        ValueError: a loss that is not a single number or has no graph, no parameters, or one that needs no gradient.
    """

    def __init__(self, loss: Float[Tensor, ""], parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(f"loss must be one number with a graph, got {tuple(loss.shape)}, {loss.requires_grad=}")
        if not self.parameters or not all(parameter.requires_grad for parameter in self.parameters):
            raise ValueError("parameters must be at least one tensor, all with requires_grad=True")
        # a weight that the loss does not read has gradient 0
        self.gradients = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)

    @property
    def size(self) -> int:
        """Number of weights in the block, and so rows of H."""
        return sum(parameter.numel() for parameter in self.parameters)

    def times(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v with v and the result in the shapes of the parameters.

        Raises:
            ValueError: `vectors` of other shapes.
            RuntimeError: an operation without a second derivative, such as torch's fused attention on the CPU.
        """
        wanted, given = ([tuple(tensor.shape) for tensor in row] for row in (self.parameters, vectors))
        if given != wanted:
            raise ValueError(f"vectors must have the shapes of the parameters, {wanted}, got {given}")
        pairs = [(g, v) for g, v in zip(self.gradients, vectors, strict=True) if g.requires_grad]
        if not pairs:  # the loss is linear in every weight
            return [torch.zeros_like(parameter) for parameter in self.parameters]
        gradients, weights = zip(*pairs, strict=True)
        try:
            # d(gᵀ v) / dw: a backward pass that starts from g, weighted with v
            products = torch.autograd.grad(
                gradients, self.parameters, weights, retain_graph=True, materialize_grads=True
            )
        except RuntimeError as error:
            if "is not implemented" in str(error):
                raise RuntimeError(
                    f"this model has an operation without a second derivative: write attention out, as "
                    f"`dense_attention` does ({error})"
                ) from error
            raise
        return list(products)

    def __call__(self, vector: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
        """H v for flat vectors."""
        return flatten(self.times(unflatten(vector, self.parameters)))


def hessian_vector_product(
    loss: Float[Tensor, ""], parameters: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """H v = d(gᵀ v)/dw by two backward passes; v and the result are lists in the shapes of `parameters`.

    The graph of `loss` is kept. For many products of one loss use `Hessian`, which takes the gradient once.

    Raises:
        ValueError, RuntimeError: as `Hessian` does; `vectors` of other shapes.
    """
    return Hessian(loss, parameters).times(vectors)


# -------------------------------------------------------------------------------------- power iteration


@dataclass(frozen=True)
class Eigenpairs:
    """What an iteration found, one entry an eigenvalue.

    Attributes:
        values: float64 (k,), estimates vᵀ H v.
        vectors: (k, size), of length 1.
        residuals: float64 (k,), |H v - lambda v|. H has an eigenvalue no further than this from `values`.
        iterations: products with H that each one took.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k size"]
    residuals: Float[Tensor, " k"]
    iterations: tuple[int, ...]


def _check(size: int, **counts: int) -> None:
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be >= 1, got {count}")


def _random_direction(size: int, dtype: torch.dtype, generator: torch.Generator, known: Tensor) -> Tensor:
    start = _orthogonal(torch.randn(size, dtype=dtype, generator=generator), known)
    return start / start.norm()


def _orthogonal(vector: Tensor, known: Float[Tensor, "k size"]) -> Tensor:
    """`vector` without its part in the span of the orthonormal rows of `known`; twice, against rounding."""
    for _ in range(2):
        vector = vector - known.T @ (known @ vector)
    return vector


def power_iteration(
    hvp: LinearMap,
    size: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    generator: torch.Generator,
    k: int = 1,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Eigenpairs:
    """The k eigenvalues of H + shift I that are largest in absolute value, with their signs; the shift is taken off.

    v <- (H + shift I) v / |(H + shift I) v|, from a random direction, the norm taken over the whole block. The value is
    the Rayleigh quotient vᵀ H v, so a negative eigenvalue stays negative. Each further pair is sought orthogonal to
    those before. It stops when the value changes by no more than `tolerance` of itself, or after `iterations` products.

    NOTE two eigenvalues of equal size and opposite sign do not converge: v turns between them, which the residual
    shows. A small change is no proof either: from a poor start the value can rest before it goes on rising.

    Args:
        hvp: v -> H v, H symmetric.
        tolerance: 0 for a fixed number of iterations.
        generator: draws the first directions.

    Raises:
        ValueError: sizes or counts below 1, k above `size`, a negative tolerance, products that are not finite.
    """
    _check(size, iterations=iterations, k=k)
    if k > size:
        raise ValueError(f"k must be at most the size, {size}, got {k}")
    if tolerance < 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    known, values, residuals, used = torch.zeros(0, size, dtype=dtype), [], [], []
    for _ in range(k):
        v, value = _random_direction(size, dtype, generator, known), None
        for count in range(1, iterations + 1):
            product = hvp(v)
            if not torch.isfinite(product).all():
                raise ValueError("hvp must give finite numbers: the loss or its gradient has overflowed")
            before, value = value, torch.dot(v.double(), product.double()).item()
            residual = (product - value * v).norm().item()
            step = _orthogonal(product + shift * v, known)
            length = step.norm()
            settled = before is not None and abs(value - before) <= tolerance * abs(value) and tolerance > 0
            if count == iterations or settled or length == 0:  # length 0: v lies where H + shift I is 0
                break
            v = step / length
        known = torch.cat([known, v[None]])
        values.append(value)
        residuals.append(residual)
        used.append(count)
    values, residuals = (torch.tensor(numbers, dtype=torch.float64) for numbers in (values, residuals))
    return Eigenpairs(values, known, residuals, tuple(used))


def largest_eigenvalue(
    hvp: LinearMap,
    size: int,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Eigenpairs:
    """The largest eigenvalue of H by sign, not by absolute value, by power iteration with a shift; one pair.

    Plain power iteration first. If it finds a lambda >= 0, that is the answer. If it finds a negative one, no other
    eigenvalue is further from 0, so H + |lambda| I has none below 0, and its largest is that of H plus |lambda|.

    NOTE the shift slows convergence, since eigenvalues keep their distances and all become larger: a top of 1 and a
    next of 0.5 shifted by 100 differ by half a per cent. Then the value changes little long before it has arrived, so
    look at the residual. `lanczos` needs far fewer products.

    Raises:
        ValueError: as `power_iteration` does.
    """
    options = {"iterations": iterations, "tolerance": tolerance, "generator": generator, "dtype": dtype}
    plain = power_iteration(hvp, size, **options)
    value = plain.values.item()
    return plain if value >= 0 else power_iteration(hvp, size, shift=-value, **options)


# ---------------------------------------------------------------------------------------------- Lanczos


def lanczos(
    hvp: LinearMap, size: int, *, steps: int = 30, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Eigenpairs:
    """Estimates of eigenvalues of H from `steps` products, in rising order: the first and last are the extreme ones.

    Each product is made orthogonal to all directions before it, which span the Krylov space of v, H v, H² v, ... In
    that basis H is tridiagonal, T; the eigenvalues of T ("Ritz values") lie within the spectrum of H, and those at its
    ends come out first. Only these are to be trusted, and only with a small residual. Memory: `steps` vectors.

    Returns:
        as many pairs as steps were made: fewer than `steps` if the space is used up, at most `size`.

    Raises:
        ValueError: sizes or counts below 1, products that are not finite.
    """
    _check(size, steps=steps)
    basis = torch.zeros(0, size, dtype=dtype)
    v, diagonal, beside = _random_direction(size, dtype, generator, basis), [], []
    for _ in range(min(steps, size)):
        product = hvp(v)
        if not torch.isfinite(product).all():
            raise ValueError("hvp must give finite numbers: the loss or its gradient has overflowed")
        basis = torch.cat([basis, v[None]])
        diagonal.append(torch.dot(v.double(), product.double()).item())
        rest = _orthogonal(product, basis)
        length = rest.norm().item()
        beside.append(length)
        if length <= math.sqrt(size) * torch.finfo(dtype).eps * product.norm().item():
            break  # H maps the space to itself: its Ritz values are eigenvalues
        v = rest / length
    # T of the directions found; what is left over after the last one is in no direction of them
    off = torch.tensor(beside[:-1], dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, small = torch.linalg.eigh(tridiagonal)
    # |H y - theta y| of a Ritz pair is the last entry of T's eigenvector times the left-over length
    residuals = beside[-1] * small[-1].abs()
    return Eigenpairs(values, small.T.to(dtype) @ basis, residuals, (len(diagonal),) * len(diagonal))
