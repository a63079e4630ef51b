"""Exercise 3 of notebook 07: heads and neurons that are really gone.

Michel, Levy and Neubig (2019, arXiv 1905.10650) for heads; Lagunas et al. (2021, arXiv 2109.04838) for both. A zero in
a dense matrix is multiplied like any other number: a layer gets faster when its matrices get smaller.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number

Block = dict[str, Float[Tensor, "*shape"]]

ROWS_BY_HEAD = ("query", "key", "value")


def attention(block: Block, x: Float[Tensor, "length d_model"], heads: int) -> Float[Tensor, "length d_model"]:
    """Self-attention with the block's "query", "key", "value" and "output": as many heads as it still has."""

    def project(name: str) -> Tensor:
        return (x @ block[f"{name}.weight"].T + block[f"{name}.bias"]).unflatten(1, (heads, -1)).transpose(0, 1)

    query, key, value = map(project, ROWS_BY_HEAD)
    weights = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(query.shape[-1]), dim=-1)
    return (weights @ value).transpose(0, 1).flatten(1) @ block["output.weight"].T + block["output.bias"]


def feed_forward(block: Block, x: Float[Tensor, "length d_model"]) -> Float[Tensor, "length d_model"]:
    """GELU network with the block's "expand" and "contract"."""
    hidden = F.gelu(x @ block["expand.weight"].T + block["expand.bias"])
    return hidden @ block["contract.weight"].T + block["contract.bias"]


def shrink_block(block: Block, heads: Bool[Tensor, " heads"], neurons: Bool[Tensor, " d_ff"]) -> Block:
    """The block without the heads and neurons that are not kept: smaller matrices, the same names.

    It gives what the whole block gives when the removed heads' and neurons' outputs are set to 0. Head h has the rows
    h d_head .. (h+1) d_head - 1 of query, key and value.
    """
    rows = heads.repeat_interleave(len(block["query.weight"]) // len(heads))
    return _cut(block, rows, neurons)


def _cut(block: Block, rows: Tensor, neurons: Tensor) -> Block:
    small = dict(block)
    for name in ROWS_BY_HEAD:
        small[f"{name}.weight"], small[f"{name}.bias"] = block[f"{name}.weight"][rows], block[f"{name}.bias"][rows]
    small["output.weight"] = block["output.weight"][:, rows]
    small["expand.weight"], small["expand.bias"] = block["expand.weight"][neurons], block["expand.bias"][neurons]
    small["contract.weight"] = block["contract.weight"][:, neurons]
    return small


def _rows(block: Block, heads: Tensor) -> Tensor:
    return heads.repeat_interleave(len(block["query.weight"]) // len(heads))


def _edit(change: Callable[[Block, Block, Tensor, Tensor], Block]) -> Answer:
    """The answer with other tensors, of (small, whole block, kept rows of the heads, neurons)."""

    def answer(block: Block, heads: Tensor, neurons: Tensor) -> Block:
        rows = _rows(block, heads)
        small = _cut(block, rows, neurons)
        return small | change(small, block, rows, neurons)

    return answer


def _whole(*names: str) -> Answer:
    """These tensors are not cut."""
    return _edit(lambda small, block, rows, neurons: {name: block[name] for name in names})


def _interleaved(block: Block, heads: Tensor, neurons: Tensor) -> Block:
    return _cut(block, heads.repeat(len(block["query.weight"]) // len(heads)), neurons)


def _first_ones(name: str) -> Answer:
    """The first columns, as many as are kept."""
    return _edit(lambda small, block, rows, neurons: {name: block[name][:, : small[name].shape[1]]})


def _zeroed(block: Block, heads: Tensor, neurons: Tensor) -> Block:
    rows = _rows(block, heads)
    zeroed = dict(block)
    for name, kept in [(one, rows) for one in ROWS_BY_HEAD] + [("expand", neurons)]:
        zeroed[f"{name}.weight"] = block[f"{name}.weight"] * kept[:, None]
        zeroed[f"{name}.bias"] = block[f"{name}.bias"] * kept
    zeroed["output.weight"] = block["output.weight"] * rows
    zeroed["contract.weight"] = block["contract.weight"] * neurons
    return zeroed


def _input_cut(small: Block, block: Block, rows: Tensor, neurons: Tensor) -> Block:
    return {f"{name}.weight": block[f"{name}.weight"][:, rows] for name in ROWS_BY_HEAD}


def _constants_kept(small: Block, block: Block, rows: Tensor, neurons: Tensor) -> Block:
    """The bias of a removed neuron still goes through GELU and the second matrix."""
    left = block["contract.weight"][:, ~neurons] @ F.gelu(block["expand.bias"][~neurons])
    return {"contract.bias": block["contract.bias"] + left}


def _value_constants_kept(small: Block, block: Block, rows: Tensor, neurons: Tensor) -> Block:
    left = block["output.weight"][:, ~rows] @ block["value.bias"][~rows]
    return {"output.bias": block["output.bias"] + left}


def _no_biases(small: Block, block: Block, rows: Tensor, neurons: Tensor) -> Block:
    return {name: torch.zeros_like(values) for name, values in small.items() if name.endswith("bias")}


def _scaled(small: Block, block: Block, rows: Tensor, neurons: Tensor) -> Block:
    """As dropout does it."""
    return {
        "output.weight": small["output.weight"] * len(rows) / int(rows.sum()),
        "contract.weight": small["contract.weight"] * len(neurons) / int(neurons.sum()),
    }


def _shapes(fn: Answer, *inputs: object) -> dict[str, list[int]]:
    return {name: list(values.shape) for name, values in fn(*inputs).items()}


def _shapes_of(*parts: str) -> Callable[..., dict[str, list[int]]]:
    def observe(fn: Answer, *inputs: object) -> dict[str, list[int]]:
        return {name: shape for name, shape in _shapes(fn, *inputs).items() if name.split(".")[0] in parts}

    return observe


def _outputs(part: str) -> Callable[..., Tensor]:
    """What the small block gives for fixed inputs."""

    def observe(fn: Answer, block: Block, heads: Tensor, neurons: Tensor) -> Tensor:
        small = fn(block, heads, neurons)
        width = len(block["output.bias"])
        x = torch.linspace(-1, 1, 3 * width, dtype=torch.float64).sin().view(3, width) * 2
        return attention(small, x, int(heads.sum())) if part == "attention" else feed_forward(small, x)

    return observe


def _draw(generator: Generator) -> tuple:
    """A block of a Transformer, and which of its heads and neurons are kept."""

    def kept(size: int) -> Tensor:
        mask = torch.zeros(size, dtype=torch.bool)
        mask[torch.randperm(size, generator=generator)[: whole_number(2, size - 2, generator)]] = True
        return mask

    heads, d_head, d_ff = whole_number(4, 5, generator), whole_number(2, 3, generator), whole_number(7, 11, generator)
    width = heads * d_head
    sizes = {name: (width, width) for name in (*ROWS_BY_HEAD, "output")}
    sizes |= {"expand": (d_ff, width), "contract": (width, d_ff)}
    block = {}
    for name, shape in sizes.items():
        block[f"{name}.weight"] = 0.6 * torch.randn(shape, generator=generator, dtype=torch.float64)
        block[f"{name}.bias"] = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    return block, kept(heads), kept(d_ff)


SHRINK_BLOCK = Exercise(
    id="movement.shrink_block",
    title="heads and neurons that are really gone",
    minutes=25,
    difficulty=3,
    reference=shrink_block,
    properties=(
        Property("the shapes of the feed-forward network", _draw, _shapes_of("expand", "contract"), times=1),
        Property("its output is that of the kept neurons", _draw, _outputs("feed-forward"), times=2),
        Property("the shapes of the attention", _draw, _shapes_of(*ROWS_BY_HEAD, "output"), times=1),
        Property("its output is that of the kept heads", _draw, _outputs("attention"), times=2),
    ),
    mistakes=(
        Mistake(
            "The bias of the first matrix is not cut",
            "A neuron is a row of the first matrix, a number of its bias, and a column of the second.",
            _whole("expand.bias"),
        ),
        Mistake(
            "The columns of the second matrix are not cut",
            "A neuron is a row of the first matrix, a number of its bias, and a column of the second.",
            _whole("contract.weight"),
        ),
        Mistake(
            "Rows of the second matrix are cut in the place of columns",
            "Rows are outputs, columns inputs. The neurons are the inputs of the second matrix; its outputs are the "
            "model's width, which stays.",
            _edit(
                lambda small, block, rows, neurons: {
                    "contract.weight": block["contract.weight"][: int(neurons.sum())],
                }
            ),
        ),
        Mistake(
            "The first columns of the second matrix stay",
            "The number is right. But the columns must be those of the kept neurons.",
            _first_ones("contract.weight"),
        ),
        Mistake(
            "A removed neuron's bias lives on in the output",
            "If only the row of the first matrix were 0, GELU(bias) would still reach the output, and you keep this "
            "constant. Asked is the block whose removed neurons give 0.",
            _edit(_constants_kept),
        ),
        Mistake(
            "A removed head's bias lives on in the output",
            "The attention weights of a head sum to 1, so its value bias is a constant of the output, and you keep it. "
            "Asked is the block whose removed heads give 0.",
            _edit(_value_constants_kept),
        ),
        Mistake(
            "Zeros, and nothing is removed",
            "The block computes the right thing, as slowly as before. Select the kept rows and columns: weight[kept].",
            _zeroed,
        ),
        Mistake(
            "The others are kept",
            "True means kept.",
            lambda block, heads, neurons: shrink_block(block, ~heads, ~neurons),
        ),
        Mistake(
            "The heads are interleaved",
            "Head h has d_head rows one after the other: heads.repeat_interleave(d_head). `repeat` gives every n-th "
            "row to a head.",
            _interleaved,
        ),
        Mistake(
            "The columns of the output matrix are not cut",
            "The heads' outputs are its inputs: it loses the same numbers as columns.",
            _whole("output.weight"),
        ),
        Mistake(
            "The first columns of the output matrix stay",
            "The number is right. But the columns must be those of the kept heads.",
            _first_ones("output.weight"),
        ),
        Mistake(
            "The biases of query, key and value are not cut",
            "Every row of a matrix has its number in the bias.",
            _whole("query.bias", "key.bias", "value.bias"),
        ),
        Mistake(
            "Query, key and value lose columns",
            "Their columns belong to the model's width, which stays. A head is made of rows.",
            _edit(_input_cut),
        ),
        Mistake(
            "The biases are gone",
            "The kept rows keep their biases, and the biases of the last matrices stay as they are.",
            _edit(_no_biases),
        ),
        Mistake(
            "What is left is scaled up",
            "That is dropout. The sum over the kept heads and neurons stays what it is.",
            _edit(_scaled),
        ),
    ),
    hints=(
        "Begin with the neurons. A neuron is a row of `expand`, a number of its bias, and a column of `contract`. Then "
        "write down the same for a head.",
        "weight[kept] takes rows, weight[:, kept] columns, for a bool tensor `kept`. For heads you need one value for "
        "each row of query: repeat_interleave. Two of the twelve tensors stay as they are. Which?",
        "A neighbour: a shop list and prices; two goods are dropped, and the sum of the others is the same.\n"
        "  kept   = torch.tensor([True, False, True])\n"
        "  prices = torch.tensor([2., 3., 5.])[kept]               [2., 5.]\n"
        "  amounts = torch.tensor([[1., 4., 2.]])[:, kept]         [[1., 2.]]\n"
        "  amounts @ prices                                        [12.], as with amounts [[1., 0., 2.]]\n"
        "  kept.repeat_interleave(2)      [True, True, False, False, True, True]\n"
        "  kept.repeat(2)                 [True, False, True, True, False, True]",
    ),
)
