"""The small problems on which second-order pruning was shown: XOR, and the MONK's problems (Thrun et al. 1991).

A MONK's case has six attributes a1 .. a6 with 3, 3, 2, 3, 4, 2 values, so 432 cases, or 17 inputs with one input a
value. Three rules say which cases are positive:

    M1: a1 = a2 or a5 = 1                                        216 of 432
    M2: exactly two of the six attributes have the value 1       142
    M3: (a5 = 3 and a4 = 1) or (a5 != 4 and a2 != 3)             228, and one training label in twenty is wrong

A small network of sigmoid units learns them, in float64 and from all patterns at once. Optimal Brain Surgeon (Hassibi
and Stork 1993) counts biases as weights: a 2-2-1 network has 9. `every_mask` makes masks of both, or of weights alone.

NOTE the cases and labels follow from the rules. The training sets have the sizes of the original ones (124, 169, 122
cases) but are drawn here with a seed: they are not the original samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor, nn

from effnlp_lessons.pruning.masks import Masks, masked

ATTRIBUTES = (3, 3, 2, 3, 4, 2)  # values of a1 .. a6
TRAINING_CASES = {1: 124, 2: 169, 3: 122}
NOISE = {1: 0.0, 2: 0.0, 3: 0.05}  # share of training labels that are turned over


@dataclass(frozen=True)
class Patterns:
    """Inputs and the outputs that a network should give for them, row by row."""

    inputs: Float64[Tensor, "patterns inputs"]
    targets: Float64[Tensor, "patterns outputs"]

    def __len__(self) -> int:
        return len(self.inputs)


# ---------------------------------------------------------------------------------------- the problems


def xor(low: float = 0.0, high: float = 1.0) -> Patterns:
    """The four patterns of exclusive or; `low` and `high` are the targets for false and true."""
    inputs = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    true = (inputs.sum(1, keepdim=True) == 1).double()
    return Patterns(inputs, low + (high - low) * true)


def monk_cases() -> Int64[Tensor, "432 6"]:
    """All cases; the values of an attribute are 1, 2, ... as in the rules."""
    return torch.tensor(list(product(*(range(1, values + 1) for values in ATTRIBUTES))))


def monk_rule(problem: int, cases: Int64[Tensor, "cases 6"]) -> Bool[Tensor, " cases"]:
    """Which cases are positive under the rule of MONK's problem 1, 2 or 3.

    Raises:
        ValueError: another problem.
    """
    _check_problem(problem)
    a1, a2, _, a4, a5, _ = cases.unbind(1)
    if problem == 1:
        return (a1 == a2) | (a5 == 1)
    if problem == 2:
        return (cases == 1).sum(1) == 2
    return ((a5 == 3) & (a4 == 1)) | ((a5 != 4) & (a2 != 3))


def one_hot(cases: Int64[Tensor, "cases 6"]) -> Float64[Tensor, "cases 17"]:
    """One input for each value of each attribute: 3 + 3 + 2 + 3 + 4 + 2 of them."""
    columns = [nn.functional.one_hot(a - 1, values) for a, values in zip(cases.unbind(1), ATTRIBUTES, strict=True)]
    return torch.cat(columns, dim=1).double()


def monk_all(problem: int) -> Patterns:
    """All 432 cases with the labels of the rule: what a network is tested on. The training cases are among them."""
    cases = monk_cases()
    return Patterns(one_hot(cases), monk_rule(problem, cases).double()[:, None])


def monk_training(problem: int, seed: int) -> Patterns:
    """124, 169 or 122 of the 432 cases, none twice; in problem 3, 6 of the 122 labels are turned over.

    Raises:
        ValueError: a problem other than 1, 2, 3.
    """
    everything, generator = monk_all(problem), torch.Generator().manual_seed(seed)
    count = TRAINING_CASES[problem]
    rows = torch.randperm(len(everything), generator=generator)[:count]
    targets = everything.targets[rows]
    wrong = torch.randperm(count, generator=generator)[: round(NOISE[problem] * count)]
    targets[wrong] = 1 - targets[wrong]
    return Patterns(everything.inputs[rows], targets)


def attributes_left(masks: Masks) -> tuple[int, ...]:
    """Numbers of the attributes, 1 to 6, that can still reach the output of a network with one hidden layer.

    Args:
        masks: of `sigmoid_network((17, hidden, 1))`: "0.weight" (hidden, 17) and "2.weight" (1, hidden).
    """
    alive = masks["2.weight"].any(0)  # hidden units that the output reads
    inputs = masks["0.weight"][alive].any(0)
    return tuple(a for a, columns in enumerate(inputs.split(ATTRIBUTES), start=1) if columns.any())


def _check_problem(problem: int) -> None:
    if problem not in TRAINING_CASES:
        raise ValueError(f"problem must be 1, 2 or 3, got {problem}")


# ----------------------------------------------------------------------------------------- the network


def sigmoid_network(sizes: Sequence[int], seed: int, spread: float = 1.0) -> nn.Sequential:
    """Linear layers with a sigmoid after each, in float64: Linear "0", Sigmoid "1", Linear "2", ...

    Weights and biases are uniform in ±spread sqrt(3 / inputs), from `seed`.

    Raises:
        ValueError: fewer than two sizes, or one below 1.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be at least two numbers >= 1, got {tuple(sizes)}")
    generator, layers = torch.Generator().manual_seed(seed), []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        linear = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float64)
        bound = spread * math.sqrt(3 / inputs)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
        layers += [linear, nn.Sigmoid()]
    return nn.Sequential(*layers)


def every_mask(network: nn.Module, biases: bool = True) -> Masks:
    """Masks that keep all parameters: what may be pruned. Without `biases` the weight matrices alone."""
    return {
        name: torch.ones_like(parameter, dtype=torch.bool)
        for name, parameter in network.named_parameters()
        if biases or parameter.ndim > 1
    }


def squared_error(network: nn.Module, patterns: Patterns) -> Float64[Tensor, ""]:
    """E = (1/P) Σ (d - x)², summed over outputs, averaged over the P patterns; with its graph."""
    return (patterns.targets - network(patterns.inputs)).square().sum() / len(patterns)


@torch.no_grad()
def share_right(network: nn.Module, patterns: Patterns) -> float:
    """Per cent of the patterns answered right: one output on the side of 1/2 of its target, or the highest of many."""
    outputs, targets = network(patterns.inputs), patterns.targets
    right = (outputs > 0.5) == (targets > 0.5) if targets.shape[1] == 1 else outputs.argmax(1) == targets.argmax(1)
    return 100 * right.double().mean().item()


def train_to_minimum_(
    network: nn.Module,
    patterns: Patterns,
    masks: Masks | None = None,
    weight_decay: float = 0.0,
    iterations: int = 1000,
) -> float:
    """Minimize E/2 + (weight_decay/2) |w|² in place by L-BFGS on all patterns; returns E, without the decay.

    Second-order pruning begins at a minimum, and with sigmoids and targets of 0 and 1 there is none without decay:
    the weights grow for ever. What `masks` has pruned stays 0.

    Raises:
        ValueError: a negative decay, fewer than one iteration, masks that do not fit.
    """
    if weight_decay < 0 or iterations < 1:
        raise ValueError(f"weight_decay must be >= 0 and iterations >= 1, got {weight_decay} and {iterations}")
    parameters = list(network.parameters())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=iterations,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        decay = sum(parameter.square().sum() for parameter in parameters)
        loss = (squared_error(network, patterns) + weight_decay * decay) / 2
        loss.backward()
        return loss

    # every direction of L-BFGS is made of gradients, so a weight whose gradients are all 0 does not move
    with masked(network, masks or {}) as keep:
        optimizer.step(objective)
        keep()
    return squared_error(network, patterns).item()


def train_until_(
    network: nn.Module, patterns: Patterns, error: float, steps: int = 2000, learning_rate: float = 0.05
) -> float:
    """Minimize E by Adam on all patterns, in place, and stop as soon as it is below `error`; returns E.

    No weight decay, and no minimum: the networks of two starts stay different.

    Raises:
        ValueError: fewer than one step, an error or learning rate not above 0.
    """
    if steps < 1 or error <= 0 or learning_rate <= 0:
        raise ValueError(f"steps, error, learning_rate must be above 0, got {steps}, {error}, {learning_rate}")
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    for _ in range(steps):
        loss = squared_error(network, patterns)
        if loss.item() < error:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return squared_error(network, patterns).item()
