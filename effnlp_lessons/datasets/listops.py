"""ListOps: nested lists of digits, each with an operator, and the digit that the whole comes to.

Nangia and Bowman 2018 (arXiv 1804.06028), by the rules of the generator of Long Range Arena (Tay et al. 2020,
arXiv 2011.04006): a node is an operator with probability 0.25, and always a digit at the greatest depth; an operator
is one of four and has 2 to 10 arguments, all uniform. MIN and MAX are what they say, MED is the median without its
fraction, SM the sum modulo 10. Trees are kept if they are between two lengths and none is there twice. An example:
    [MAX 4 [MED 2 7 ] [SM 9 3 ] ]  is  4

NOTE the generator calls its 0.25 VALUE_P, but it is the probability of an operator.
NOTE its text puts every argument into further brackets, which the benchmark's pipeline takes out again, and renames
    the closing bracket to X. A token is one number here: 0 to 9 are the digits themselves, 10 to 13 the operators, 14
    the closing bracket.
NOTE digits are uniform, results are not: long trees come to 0 and to 9 most often, each in 15 to 17 of 100. So much
    is right without reading. `ListOps.majority_share` says how much it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

OPERATORS = ("MIN", "MAX", "MED", "SM")
TOKENS = (*"0123456789", *(f"[{name}" for name in OPERATORS), "]")  # a token's number is its place here
CLASSES = 10
OPERATOR_PROBABILITY = 0.25
PATIENCE = 100_000  # draws without a new tree, after which there are taken to be no more

Tree = int | tuple  # a digit, or (operator, argument, argument, ...)


def uniform_numbers(generator: torch.Generator) -> Iterator[float]:
    """Numbers from [0, 1) without end, drawn a block at a time."""
    while True:
        yield from torch.rand(4_096, generator=generator, dtype=torch.float64).tolist()


def draw_tree(
    uniform: Iterator[float], max_depth: int = 10, max_args: int = 10, max_length: float = math.inf, depth: int = 1
) -> tuple[Tree | None, int]:
    """Draw a tree of at most `max_depth` levels whose operators have 2 to `max_args` arguments; also its tokens.

    A digit is one token, an operator two beside those of its arguments. A tree that comes to `max_length` tokens is
    given up at once, None: it would not be kept, and some trees have thousands of them.

    Args:
        uniform: numbers from [0, 1), as of `uniform_numbers`.
        depth: level of the root.
    """
    if depth >= max_depth or next(uniform) > OPERATOR_PROBABILITY:
        return int(CLASSES * next(uniform)), 1
    tree, length = [OPERATORS[int(len(OPERATORS) * next(uniform))]], 2
    for _ in range(2 + int((max_args - 1) * next(uniform))):
        argument, tokens = draw_tree(uniform, max_depth, max_args, max_length, depth + 1)
        tree.append(argument)
        length += tokens
        if length >= max_length:
            return None, length
    return tuple(tree), length


def evaluate(tree: Tree) -> int:
    """The digit that a tree comes to.

    Raises:
        ValueError: an operator that is none of the four.
    """
    if isinstance(tree, int):
        return tree
    operator, *arguments = tree
    values = sorted(evaluate(argument) for argument in arguments)
    if operator == "MIN":
        return values[0]
    if operator == "MAX":
        return values[-1]
    if operator == "MED":  # of an even number of values the mean of the two in the middle, rounded down
        return (values[(len(values) - 1) // 2] + values[len(values) // 2]) // 2
    if operator == "SM":
        return sum(values) % 10
    raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, got {operator!r}")


def token_ids(tree: Tree) -> list[int]:
    """The tokens of a tree from left to right, places in `TOKENS`; an operator and its bracket are one of them."""
    if isinstance(tree, int):
        return [tree]
    operator, *arguments = tree
    inside = [token for argument in arguments for token in token_ids(argument)]
    return [CLASSES + OPERATORS.index(operator), *inside, len(TOKENS) - 1]


def to_text(ids: list[int] | Int64[Tensor, " length"]) -> str:
    """Tokens as they are read, with spaces between: [MAX 4 [MED 2 7 ] ]."""
    return " ".join(TOKENS[int(token)] for token in ids)


@dataclass(frozen=True)
class ListOps:
    """Trees as rows of tokens, and what they come to.

    Attributes:
        token_ids: places in `TOKENS`; 0 after the end of a row.
        key_padding_mask: True = a token of the tree.
        labels: digits.
    """

    token_ids: Int64[Tensor, "rows length"]
    key_padding_mask: Bool[Tensor, "rows length"]
    labels: Int64[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def majority_share(self) -> float:
        """The accuracy of giving the most frequent label always."""
        return self.labels.bincount().max().item() / len(self)

    def split(self, *rows: int) -> tuple[ListOps, ...]:
        """Cut into parts of so many rows, one after the other; no tree is in two of them.

        Raises:
            ValueError: if the parts do not sum to all rows.
        """
        if sum(rows) != len(self) or min(rows) < 1:
            raise ValueError(f"rows must be >= 1 and sum to {len(self)}, got {rows}")
        parts = (part.split(rows) for part in (self.token_ids, self.key_padding_mask, self.labels))
        return tuple(ListOps(*part) for part in zip(*parts, strict=True))


def make_listops(
    rows: int,
    generator: torch.Generator,
    *,
    min_length: int = 500,
    max_length: int = 2_000,
    max_depth: int = 10,
    max_args: int = 10,
) -> ListOps:
    """Draw distinct trees of more than `min_length` and fewer than `max_length` tokens, by default as Long Range Arena.

    There the set has 96,000 + 2,000 + 2,000 rows: draw all at once and `split` them.

    Args:
        max_depth: levels of a tree, the root's included.
        max_args: most arguments of an operator; the least are 2.

    Raises:
        ValueError: a number that is too small, or fewer distinct trees than `rows`.
    """
    for name, value, smallest in (
        ("rows", rows, 1), ("min_length", min_length, 0), ("max_length", max_length, min_length + 2),
        ("max_depth", max_depth, 1), ("max_args", max_args, 2),
    ):  # fmt: skip
        if value < smallest:
            raise ValueError(f"{name} must be >= {smallest}, got {value}")
    uniform, found, misses = uniform_numbers(generator), {}, 0
    while len(found) < rows:
        tree, length = draw_tree(uniform, max_depth, max_args, max_length)
        misses += 1
        if min_length < length < max_length and (ids := bytes(token_ids(tree))) not in found:
            found[ids], misses = evaluate(tree), 0
        if misses == PATIENCE:
            raise ValueError(f"rows must be <= {len(found)}, got {rows}: no other tree in {PATIENCE} draws")
    padded = pad_sequence([torch.tensor(list(ids)) for ids in found], batch_first=True)
    lengths = torch.tensor([len(ids) for ids in found])
    return ListOps(padded, torch.arange(padded.shape[1]) < lengths[:, None], torch.tensor(list(found.values())))
