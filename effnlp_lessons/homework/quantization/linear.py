"""Exercise 5 of notebook 03: a linear layer with ReLU on integers, with a zero point on both sides.

Jacob et al. 2017 (arXiv 1712.05877, sec. 2.2 to 2.4, Eq. 7 and 8). The library's layer has symmetric weights; here
every row of the weight has a zero point of its own.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int8, Int32
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number
from effnlp_lessons.homework.quantization.multiplier import fixed_point_multiplier
from effnlp_lessons.homework.quantization.requantize import requantize
from effnlp_lessons.quantization.quantizers import LinearQuantizer

Rescale = Callable[[Int32[Tensor, "batch out"]], Int32[Tensor, "batch out"]]


def integer_linear(
    x: Int8[Tensor, "batch in"],
    w: Int8[Tensor, "out in"],
    bias: Float[Tensor, " out"],
    x_grid: LinearQuantizer,
    w_grid: LinearQuantizer,
    y_grid: LinearQuantizer,
    rescale: Rescale,
) -> Int8[Tensor, "batch out"]:
    """Codes of ReLU(x w^T + bias), from codes.

    x_grid and y_grid have one scale and zero point, w_grid has (out, 1). `rescale` multiplies an int32 accumulator by
    M = S_x S_w / S_y, with the integers' rounding.
    """
    accumulator = _accumulator(x, w, x_grid.zero_point, w_grid.zero_point)
    # the bias is int32 with the scale S_x S_w and zero point 0
    accumulator = accumulator + torch.round(bias / (x_grid.scale * w_grid.scale.squeeze(1))).to(torch.int32)
    y = rescale(accumulator) + y_grid.zero_point
    return y.clamp(int(y_grid.zero_point), y_grid.q_max).to(torch.int8)  # the code of 0 is Z: that is the ReLU


def _accumulator(x: Tensor, w: Tensor, x_zero: Tensor, w_zero: Tensor) -> Int32[Tensor, "batch out"]:
    """sum_j (q_x - Z_x) (q_w - Z_w) = N Z_x Z_w - Z_x a_w - Z_w a_x + sum_j q_x q_w."""
    return (
        _product(x, w)
        - x_zero * w.sum(1, dtype=torch.int32)
        - w_zero.T * x.sum(1, keepdim=True, dtype=torch.int32)
        + x.shape[1] * x_zero * w_zero.T
    ).to(torch.int32)


def _product(x: Tensor, w: Tensor) -> Int32[Tensor, "batch out"]:
    return x.to(torch.int32) @ w.to(torch.int32).T


def _bias(bias: Tensor, x_grid: LinearQuantizer, w_grid: LinearQuantizer, y_grid: LinearQuantizer) -> Tensor:
    return torch.round(bias / (x_grid.scale * w_grid.scale.squeeze(1))).to(torch.int32)


def _relu(y: Tensor, grid: LinearQuantizer) -> Tensor:
    """Codes from the rescaled accumulator."""
    return (y + grid.zero_point).clamp(int(grid.zero_point), grid.q_max)


def _byte(q: Tensor) -> Int8[Tensor, "*shape"]:
    """The lowest eight bits as a signed number, as an integer conversion keeps them."""
    return ((q.to(torch.int64) + 128) % 256 - 128).to(torch.int8)


def _exchange(
    accumulate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _accumulator,
    bias_code: Callable[[Tensor, LinearQuantizer, LinearQuantizer, LinearQuantizer], Tensor] = _bias,
    finish: Callable[[Tensor, LinearQuantizer], Tensor] = _relu,
    late_bias: Callable[[Tensor, LinearQuantizer], Tensor | int] = lambda bias, y_grid: 0,
) -> Answer:
    """The answer with one step exchanged, for the mistakes.

    Args:
        accumulate: of (x, w, Z_x, Z_w).
        bias_code: what is added to the accumulator, of (bias, x_grid, w_grid, y_grid).
        finish: codes from (rescaled, y_grid).
        late_bias: what is added after rescaling, of (bias, y_grid).
    """

    def answer(x, w, bias, x_grid, w_grid, y_grid, rescale):
        accumulator = accumulate(x, w, x_grid.zero_point, w_grid.zero_point)
        accumulator = accumulator + bias_code(bias, x_grid, w_grid, y_grid)
        return _byte(finish(rescale(accumulator.to(torch.int32)) + late_bias(bias, y_grid), y_grid))

    return answer


def _terms(product: int = 1, a_w: int = 1, a_x: int = 1, both: int = 1) -> Callable[..., Tensor]:
    """The accumulator with its four terms multiplied."""

    def accumulate(x: Tensor, w: Tensor, x_zero: Tensor, w_zero: Tensor) -> Tensor:
        sum_w, sum_x = w.sum(1, dtype=torch.int32), x.sum(1, keepdim=True, dtype=torch.int32)
        corner = x.shape[1] * x_zero * w_zero.T
        return product * _product(x, w) - a_w * x_zero * sum_w - a_x * w_zero.T * sum_x + both * corner

    return accumulate


def _corner_once(x: Tensor, w: Tensor, x_zero: Tensor, w_zero: Tensor) -> Tensor:
    return _terms(both=0)(x, w, x_zero, w_zero) + x_zero * w_zero.T


def _sums_exchanged(x: Tensor, w: Tensor, x_zero: Tensor, w_zero: Tensor) -> Tensor:
    sum_w, sum_x = w.sum(1, dtype=torch.int32), x.sum(1, keepdim=True, dtype=torch.int32)
    return _product(x, w) - x_zero * sum_x - w_zero.T * sum_w + x.shape[1] * x_zero * w_zero.T


def _one_row_for_all(x: Tensor, w: Tensor, x_zero: Tensor, w_zero: Tensor) -> Tensor:
    return _accumulator(x, w, x_zero, w_zero[:1].expand_as(w_zero))


def _shifted_in_a_byte(x: Tensor, w: Tensor, x_zero: Tensor, w_zero: Tensor) -> Tensor:
    return _product(_byte(x.to(torch.int32) - x_zero), _byte(w.to(torch.int32) - w_zero))


def _summed_in_a_byte(x: Tensor, w: Tensor, x_zero: Tensor, w_zero: Tensor) -> Tensor:
    byte_product = _byte(_product(x, w)).to(torch.int32)
    return byte_product + _terms(product=0)(x, w, x_zero, w_zero)


class _Rescale:
    """Multiply the columns of an int32 accumulator by real numbers, in integers."""

    def __init__(self, multipliers: list[float]) -> None:
        self.stored = [fixed_point_multiplier(m, 31) for m in multipliers]

    def __call__(self, accumulator: Tensor) -> Tensor:
        if accumulator.dtype != torch.int32:
            raise TypeError(f"rescale takes an int32 accumulator, got {str(accumulator.dtype).removeprefix('torch.')}")
        if accumulator.ndim != 2 or accumulator.shape[1] != len(self.stored):
            raise ValueError(f"rescale takes (batch, {len(self.stored)}), got {tuple(accumulator.shape)}")
        columns = zip(accumulator.unbind(1), self.stored, strict=True)
        return torch.stack([requantize(column, m, n) for column, (m, n) in columns], dim=1)

    def __deepcopy__(self, memo: dict) -> "_Rescale":
        return self  # nothing in it changes

    def __repr__(self) -> str:
        return f"the multiplication by M of {len(self.stored)} columns"


def _draw(
    inputs: tuple[int, int],
    x_zero: bool = True,
    w_zero: bool = True,
    bias: bool = True,
    top: int = 127,
    outputs: tuple[int, int] = (2, 4),
) -> Callable[[Generator], tuple]:
    """Codes up to `top`, grids and a bias; with top 127 the outputs reach both ends. False: this part is 0."""

    def draw(generator: Generator) -> tuple:
        batch, out = whole_number(2, 4, generator), whole_number(*outputs, generator)
        size = whole_number(*inputs, generator)
        out += out == batch  # tensors of the wrong orientation do not fit

        def codes(*shape: int) -> Tensor:
            return torch.randint(-top, top + 1, shape, generator=generator, dtype=torch.int8)

        def grid(scale: Tensor, largest: int) -> LinearQuantizer:
            points = torch.randint(-largest, largest + 1, scale.shape, generator=generator, dtype=torch.int32)
            return LinearQuantizer(scale, points, -128, 127)

        def scales(*shape: int) -> Tensor:
            return (1 + 2 * torch.rand(shape, generator=generator, dtype=torch.float64)) / top

        x, w = codes(batch, size), codes(out, size)
        x_grid, w_grid = grid(scales(), 2 * top // 3 * x_zero), grid(scales(out, 1), 2 * top // 3 * w_zero)
        spread = (x_grid.dequantize(x) @ w_grid.dequantize(w).T).square().mean().sqrt()
        finest = 1.1 * x_grid.scale * w_grid.scale.max()  # M below 1, as in the paper
        y_grid = grid(torch.maximum(spread / 70, finest), 90)
        drawn = spread * torch.randn(out, generator=generator, dtype=torch.float64) * bias
        rescale = _Rescale((x_grid.scale * w_grid.scale[:, 0] / y_grid.scale).tolist())
        return x, w, drawn, x_grid, w_grid, y_grid, rescale

    return draw


INTEGER_LINEAR = Exercise(
    id="quantization.integer_linear",
    title="a linear layer on integers",
    minutes=30,
    difficulty=3,
    reference=integer_linear,
    properties=(
        Property("all zero points but the output's are 0, no bias", _draw((2, 5), False, False, False), times=1),
        Property("the inputs have a zero point", _draw((3, 6), True, False, False), times=1),
        Property("the weights have a zero point in every row", _draw((3, 6), False, True, False), times=1),
        Property("both have zero points", _draw((3, 9), bias=False), times=1),
        Property("a bias", _draw((3, 9), outputs=(5, 7)), times=2),
        Property("a bias beside small codes", _draw((3, 5), top=5), times=1),
        Property("a wide layer", _draw((200, 400), outputs=(5, 7)), times=1),
    ),
    mistakes=(
        Mistake(
            "The zero points of inputs and weights are not used",
            "You multiply codes as if code 0 were the number 0. The accumulator is sum (q_x - Z_x) (q_w - Z_w).",
            _exchange(_terms(a_w=0, a_x=0, both=0)),
        ),
        Mistake(
            "Z_x a_w is missing",
            "Multiply out (q_x - Z_x) (q_w - Z_w): there is a term -Z_x q_w, and its sum over the inputs is Z_x times "
            "the row sum of the weight's codes.",
            _exchange(_terms(a_w=0)),
        ),
        Mistake(
            "Z_w a_x is missing",
            "Multiply out (q_x - Z_x) (q_w - Z_w): there is a term -Z_w q_x, and its sum is Z_w times the sum of the "
            "input's codes. (It is absent with symmetric weights, as in the library.)",
            _exchange(_terms(a_x=0)),
        ),
        Mistake(
            "N Z_x Z_w is missing",
            "Both subtractions have taken Z_x Z_w away once too often, in each of the N terms of the sum: add it back.",
            _exchange(_terms(both=0)),
        ),
        Mistake(
            "Z_x Z_w is added once, not N times",
            "It stands in every one of the N terms of the sum; N is the number of inputs, x.shape[1].",
            _exchange(_corner_once),
        ),
        Mistake(
            "N Z_x Z_w has the wrong sign",
            "Minus times minus is plus.",
            _exchange(_terms(both=-1)),
        ),
        Mistake(
            "The zero points are added, not subtracted",
            "z = S (q - Z): the two terms with one zero point have a minus.",
            _exchange(_terms(a_w=-1, a_x=-1)),
        ),
        Mistake(
            "The two sums are exchanged",
            "Z_x belongs with the codes of the weight, and Z_w with those of the input: each zero point is multiplied "
            "by the other factor.",
            _exchange(_sums_exchanged),
        ),
        Mistake(
            "One zero point for all rows of the weight",
            "w_grid.zero_point is (out, 1): every output has its own.",
            _exchange(_one_row_for_all),
        ),
        Mistake(
            "The zero points are taken off in int8",
            "100 - (-90) is 190, which is no int8: it wraps around to -66. Convert to int32 before you subtract, or "
            "leave the codes and subtract the sums.",
            _exchange(_shifted_in_a_byte),
        ),
        Mistake(
            "The product is summed in int8",
            "An int8 matrix times an int8 matrix is int8 in PyTorch, and wraps around. Convert both to int32 first.",
            _exchange(_summed_in_a_byte),
        ),
        Mistake(
            "The bias has the output's scale",
            "bias / S_y fits after rescaling. The accumulator counts in S_x S_w.",
            _exchange(bias_code=lambda bias, x, w, y: torch.round(bias / y.scale).to(torch.int32)),
        ),
        Mistake(
            "The bias has the input's scale",
            "The accumulator is a sum of products of two codes: one unit of it is worth S_x S_w.",
            _exchange(bias_code=lambda bias, x, w, y: torch.round(bias / x.scale).to(torch.int32)),
        ),
        Mistake(
            "The bias has the weight's scale",
            "The accumulator is a sum of products of two codes: one unit of it is worth S_x S_w.",
            _exchange(bias_code=lambda bias, x, w, y: torch.round(bias / w.scale[:, 0]).to(torch.int32)),
        ),
        Mistake(
            "The bias is added as a real number",
            "It is cut to whole numbers there, and nearly vanishes: the accumulator counts in units of S_x S_w.",
            _exchange(bias_code=lambda bias, x, w, y: bias.to(torch.int32)),
        ),
        Mistake(
            "The bias is left out",
            "round(bias / (S_x S_w)), as int32, is added to the accumulator.",
            _exchange(bias_code=lambda bias, x, w, y: 0),
        ),
        Mistake(
            "The bias is added after rescaling",
            "Rounded to the coarse grid of the output it is one code off now and then. It is added to the accumulator, "
            "where a unit is far smaller.",
            _exchange(
                bias_code=lambda bias, x, w, y: 0,
                late_bias=lambda bias, y_grid: torch.round(bias / y_grid.scale).to(torch.int32),
            ),
        ),
        Mistake(
            "The output's zero point is not added",
            "The rescaled accumulator counts from the number 0, the codes of the output from Z_y: q_y = Z_y + M acc.",
            _exchange(finish=lambda y, grid: y.clamp(0, grid.q_max)),
        ),
        Mistake(
            "ReLU cuts at code 0",
            "Code 0 is not the number 0: that has the code Z_y. Clamp to Z_y .. 127.",
            _exchange(finish=lambda y, grid: (y + grid.zero_point).clamp(0, grid.q_max)),
        ),
        Mistake(
            "ReLU is missing",
            "Codes below Z_y stand for negative numbers. Clamp to Z_y .. 127.",
            _exchange(finish=lambda y, grid: (y + grid.zero_point).clamp(grid.q_min, grid.q_max)),
        ),
        Mistake(
            "Clamped before the zero point is added",
            "0 .. 127 are bounds for codes. Add Z_y first; otherwise the codes end at Z_y + 127, which is too low, or "
            "wraps around.",
            _exchange(finish=lambda y, grid: y.clamp(0, grid.q_max) + grid.zero_point),
        ),
        Mistake(
            "The upper end is not clamped",
            "ReLU alone lets 128 and more through, which wraps around to negative codes.",
            _exchange(finish=lambda y, grid: (y + grid.zero_point).clamp(min=int(grid.zero_point))),
        ),
    ),
    hints=(
        "Begin with (q_x - Z_x) (q_w - Z_w) and multiply out: four products. Sum each over the inputs. Which of the "
        "four sums needs a matrix product?",
        "The shapes: the product is (batch, out); w.sum(1) is (out,), a row sum for every output; x.sum(1, "
        "keepdim=True) is (batch, 1); w_grid.zero_point.T is (1, out). Sum with dtype=torch.int32. Then the bias in "
        "units of S_x S_w, rescale, Z_y, and last the clamp: which code is the number 0?",
        "A neighbour: two thermometers show codes; code 3 and code 5 are their zeros. Wanted is the sum of the "
        "products of the temperatures over two days, without correcting any single code.\n"
        "  codes (4, 1) and (7, 6):  the temperatures are (1, -2) and (2, 1), the sum is 2 - 2 = 0\n"
        "  product of codes           4 * 7 + 1 * 6 = 34\n"
        "  3 times the second's sum   3 * 13 = 39\n"
        "  5 times the first's sum    5 * 5 = 25\n"
        "  days times both zeros      2 * 3 * 5 = 30\n"
        "  34 - 39 - 25 + 30 = 0",
    ),
)
