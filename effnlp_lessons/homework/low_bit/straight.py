"""Exercise 1 of notebook 04: fake quantization whose gradient passes straight through, but not outside the range.

Jacob et al. 2017 (arXiv 1712.05877, sec. 3): the forward pass rounds. Bengio, Leonard, Courville 2013 (arXiv
1308.3432): the backward pass takes rounding for the identity. NOTE torch.fake_quantize_per_tensor_affine asks whether
the rounded code lies in the range, not the number; it lets half a step more through at each end.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def fake_quantize(x: Float[Tensor, "*shape"], scale: float, zero_point: int, bits: int) -> Float[Tensor, "*shape"]:
    """x on the grid S (q - Z), q = 0 .. 2^bits - 1; its gradient is 1 from the first to the last point, 0 outside."""
    low, high = _ends(scale, zero_point, bits)
    clipped = x.clamp(low, high)  # has the right gradient
    return clipped + (_on_grid(x, scale, zero_point, bits) - clipped).detach()


def _ends(scale: float, zero_point: int, bits: int) -> tuple[float, float]:
    return scale * (0 - zero_point), scale * (2**bits - 1 - zero_point)


def _on_grid(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    q = torch.clamp(torch.round(x / scale) + zero_point, 0, 2**bits - 1)
    return scale * (q - zero_point)


class _Grid:
    """The arguments of one call beside x, with what the mistakes ask of them."""

    def __init__(self, scale: float, zero_point: int, bits: int) -> None:
        self.scale, self.zero_point, self.top = scale, zero_point, 2**bits - 1
        self.low, self.high = _ends(scale, zero_point, bits)

    def inside(self, x: Tensor) -> Tensor:
        return (x >= self.low) & (x <= self.high)


def _exchange(
    factor: Callable[[Tensor, _Grid], Tensor | float], value: Callable[[Tensor, _Grid], Tensor] | None = None
) -> Answer:
    """The answer with another factor of the gradient, of (x, grid), or another value."""

    def answer(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
        grid = _Grid(scale, zero_point, bits)
        given = _on_grid(x, scale, zero_point, bits) if value is None else value(x, grid)
        return given.detach() + (x - x.detach()) * factor(x, grid)

    return answer


class _ForgetsWhatCameBefore(torch.autograd.Function):
    @staticmethod
    def forward(context, x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
        context.save_for_backward(_Grid(scale, zero_point, bits).inside(x))
        return _on_grid(x, scale, zero_point, bits)

    @staticmethod
    def backward(context, upstream: Tensor) -> tuple:
        (inside,) = context.saved_tensors
        return inside.to(upstream.dtype), None, None, None


def _value(fn: Answer, x: Tensor, *grid: object) -> Tensor:
    return fn(x, *grid).detach()


def _gradient(fn: Answer, x: Tensor, *grid: object) -> dict[str, object]:
    """The gradient at x where the output's is 1, 2, 3, ..., and whether there is a graph at all."""
    x = x.clone().requires_grad_()
    y = fn(x, *grid)
    if not y.requires_grad:
        return {"autograd knows a way to x": False, "gradient": torch.zeros_like(x)}
    upstream = torch.arange(1, x.numel() + 1, dtype=x.dtype).reshape(x.shape)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    return {"autograd knows a way to x": True, "gradient": gradient}


def _draw(place: str, dtype: torch.dtype = torch.float32) -> Callable[[Generator], tuple]:
    """Numbers "inside" the range, on both sides "outside", on its "ends", or "less than half a step" beyond."""

    def draw(generator: Generator) -> tuple:
        bits = whole_number(2, 5, generator)
        top, scale = 2**bits - 1, 2.0 ** -whole_number(1, 5, generator)
        zero_point = whole_number(1, top - 1, generator)
        shape = [whole_number(2, 3, generator), whole_number(3, 5, generator)]
        inside = top * (0.02 + 0.96 * torch.rand(shape, generator=generator, dtype=torch.float64))
        if place == "inside":
            return (scale * (inside - zero_point)).to(dtype), scale, zero_point, bits
        if place == "outside":
            beyond = 1 + top * torch.rand(shape, generator=generator, dtype=torch.float64)
        elif place == "ends":
            beyond = torch.zeros(shape, dtype=torch.float64)
        else:
            beyond = 0.05 + 0.4 * torch.rand(shape, generator=generator, dtype=torch.float64)
        which = torch.arange(inside.numel()).reshape(shape) % 3  # below, inside, above by turns
        codes = torch.where(which == 0, -beyond, torch.where(which == 1, inside, top + beyond))
        return (scale * (codes - zero_point)).to(dtype), scale, zero_point, bits

    return draw


STRAIGHT_THROUGH = Exercise(
    id="low_bit.straight_through",
    title="fake quantization with a gradient",
    minutes=15,
    difficulty=2,
    reference=fake_quantize,
    properties=(
        Property("the values are on the grid", _draw("outside"), _value, times=1),
        Property("inside the range the gradient passes unchanged", _draw("inside"), _gradient, times=1),
        Property("outside the range it is 0, on both sides", _draw("outside"), _gradient, times=2),
        Property("the first and the last point of the grid are inside", _draw("ends"), _gradient, times=1),
        Property("less than half a step beyond is outside", _draw("less than half a step"), _gradient, times=1),
        Property("float64 stays float64", _draw("outside", torch.float64), _gradient, times=1),
    ),
    mistakes=(
        Mistake(
            "The gradient passes outside the range",
            "x + (on_grid - x).detach() has the gradient 1 everywhere. Beyond the ends the output does not move with "
            "x, and a number there would be pushed further out at every step. Clamp first.",
            _exchange(lambda x, grid: 1.0),
        ),
        Mistake(
            "The gradient of rounding",
            "It is 0 wherever it exists, so nothing learns. Whatever is rounded must stand inside .detach().",
            _exchange(lambda x, grid: 0.0),
        ),
        Mistake(
            "Nothing has a gradient",
            "Everything is detached. One term must stay outside: the one whose gradient is wanted, the clipped x.",
            lambda *inputs: fake_quantize(*inputs).detach(),
        ),
        Mistake(
            "The value is not quantized",
            "You detach the wrong way round: on_grid + (clipped - on_grid).detach() is the clipped x, and has the "
            "gradient of rounding, 0. Wanted is the value of on_grid with the gradient of clipped.",
            _exchange(lambda x, grid: 0.0, lambda x, grid: x.clamp(grid.low, grid.high)),
        ),
        Mistake(
            "The value is clipped, but not rounded",
            "The gradient is right. The value must lie on the grid: add (on_grid - clipped), without its gradient.",
            _exchange(lambda x, grid: grid.inside(x), lambda x, grid: x.clamp(grid.low, grid.high)),
        ),
        Mistake(
            "The mask is on the wrong side",
            "Your gradient is 0 inside the range, and passes outside.",
            _exchange(lambda x, grid: ~grid.inside(x)),
        ),
        Mistake(
            "Only the upper end is cut",
            "Numbers below the first point of the grid do not move the output either. Clamp at both ends.",
            _exchange(lambda x, grid: x <= grid.high),
        ),
        Mistake(
            "Only the lower end is cut",
            "Numbers above the last point of the grid do not move the output either. Clamp at both ends.",
            _exchange(lambda x, grid: x >= grid.low),
        ),
        Mistake(
            "The rounded code is tested, not the number",
            "A number less than half a step beyond the end still rounds to the last code. PyTorch's fake quantization "
            "lets its gradient pass; asked is the papers' rule: low <= x <= high.",
            _exchange(
                lambda x, grid: (
                    (torch.round(x / grid.scale) + grid.zero_point >= 0)
                    & (torch.round(x / grid.scale) + grid.zero_point <= grid.top)
                )
            ),
        ),
        Mistake(
            "The ends themselves are cut off",
            "The first and the last point of the grid belong to it: <= and not <. With a range taken from the "
            "minimum and maximum, the largest weight would never learn.",
            _exchange(lambda x, grid: (x > grid.low) & (x < grid.high)),
        ),
        Mistake(
            "The number is compared with codes",
            "0 .. 2^k - 1 are codes. The range of x goes from S (0 - Z) to S (2^k - 1 - Z).",
            _exchange(lambda x, grid: (x >= 0) & (x <= grid.top)),
        ),
        Mistake(
            "The gradient is multiplied by the scale",
            "Of rounding alone you took the derivative 1, but the division by S before it is missing: x goes down to "
            "codes and up again, S times 1 / S.",
            _exchange(lambda x, grid: grid.inside(x) * grid.scale),
        ),
        Mistake(
            "The gradient is divided by the scale",
            "Of rounding alone you took the derivative 1, but the multiplication by S after it is missing: x goes "
            "down to codes and up again, 1 / S times S.",
            _exchange(lambda x, grid: grid.inside(x) / grid.scale),
        ),
        Mistake(
            "What came from above is forgotten",
            "A backward pass multiplies: the gradient at x is the output's gradient times the mask. You return the "
            "mask alone.",
            _ForgetsWhatCameBefore.apply,
        ),
    ),
    hints=(
        "a + (b - a).detach() has the value of b and the gradient of a. Which value do you want, and which gradient?",
        "torch.clamp has just the gradient that is asked for: 1 between its bounds, the bounds included, and 0 "
        "outside. So: clipped = x.clamp(low, high), and everything that is rounded goes into .detach().",
        "A neighbour: a price, rounded to whole euros and at most 9. Its gradient is to be 1 up to 9, and 0 above.\n"
        "  x = torch.tensor([2.3, 8.8, 11.6], requires_grad=True)\n"
        "  paid   = torch.round(x).clamp(max=9)         [2., 9., 9.], with the gradient 0 everywhere\n"
        "  smooth = x.clamp(max=9)                      [2.3, 8.8, 9.], with the gradient [1., 1., 0.]\n"
        "  y = smooth + (paid - smooth).detach()        [2., 9., 9.], with the gradient [1., 1., 0.]",
    ),
)
