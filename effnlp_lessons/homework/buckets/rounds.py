"""Exercise 3 of notebook 09: several rounds as one softmax (Kitaev et al. 2020, arXiv 2001.04451, appendix A)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Exercise, Mistake, Property, whole_number


def combine_rounds(
    outputs: Float[Tensor, "rounds length d_head"], sizes: Float[Tensor, "rounds length"]
) -> Float[Tensor, "length d_head"]:
    """Outputs of all rounds joined into one softmax; `sizes` are each round's log-sum-exp, -inf without a key.

    A token without a key in any round gets zeros.
    """
    total = sizes.logsumexp(dim=0)
    weights = (sizes - total.where(total > -torch.inf, 0.0)).exp()
    return (weights[..., None] * outputs).sum(dim=0)


def _weighted(weights_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, sizes: (weights_of(sizes)[..., None] * outputs).sum(dim=0)


def _draw(empty: str = "none", shift: float = 0.0) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        rounds, length = whole_number(2, 4, generator), whole_number(4, 7, generator)
        outputs = torch.randn(rounds, length, 3, generator=generator, dtype=torch.float64)
        sizes = 2 * torch.randn(rounds, length, generator=generator, dtype=torch.float64) + shift
        if empty != "none":
            sizes[0, 0] = -torch.inf
            outputs[0, 0] = 0
        if empty == "all":
            sizes[:, 1] = -torch.inf
            outputs[:, 1] = 0
        return outputs, sizes

    return draw


def _as_one_softmax(generator: Generator) -> tuple:
    scores = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 5, 4, 3, generator=generator, dtype=torch.float64)
    return (scores.softmax(-1)[..., None] * values).sum(2), scores.logsumexp(-1)


COMBINE_ROUNDS = Exercise(
    id="buckets.combine_rounds",
    title="several rounds, one softmax",
    minutes=20,
    difficulty=2,
    reference=combine_rounds,
    properties=(
        Property("two halves of one softmax give the whole", _as_one_softmax),
        Property("any rounds", _draw()),
        Property("a round without any key for a token counts nothing", _draw("one")),
        Property("large scores: no overflow", _draw(shift=900.0)),
        Property("no key in any round: zeros, not NaN", _draw("all")),
    ),
    mistakes=(
        Mistake(
            "The plain mean of the rounds",
            "A round that found the important key must count more. Its log-sum-exp says how much it found.",
            lambda outputs, sizes: outputs.mean(dim=0),
        ),
        Mistake(
            "The rounds are added",
            "The weights of all rounds together must sum to 1. You add outputs that each sum to 1 already.",
            lambda outputs, sizes: outputs.sum(dim=0),
        ),
        Mistake(
            "Weights over the tokens",
            "The weights must sum to 1 over the rounds of one token, so softmax runs over the first dimension.",
            _weighted(lambda sizes: sizes.softmax(dim=1)),
        ),
        Mistake(
            "The exponential overflows",
            "exp of a size of 900 is infinite, and infinite divided by infinite is NaN. Subtract the logsumexp first.",
            _weighted(lambda sizes: sizes.exp() / sizes.exp().sum(dim=0)),
        ),
        Mistake(
            "NaN for a token without any key",
            "If no round has a key, -inf minus -inf is NaN. Such a token gets zeros.",
            _weighted(lambda sizes: sizes.softmax(dim=0)),
        ),
        Mistake(
            "The largest round wins alone",
            "The other rounds hold keys too. Their share is exp of their size, divided by the sum.",
            _weighted(lambda sizes: ((sizes == sizes.amax(dim=0)) & (sizes > -torch.inf)).double()),
        ),
        Mistake(
            "The sizes themselves as weights",
            "Sizes are logarithms. Their exponentials are the sums over keys, and these are in proportion.",
            _weighted(lambda sizes: (finite := sizes.nan_to_num(neginf=0.0)) / finite.sum(dim=0)),
        ),
    ),
    hints=(
        "Round r holds the sum of exp over its keys, as a logarithm. What share has it of the sum over all rounds?",
        "The share is exp(size - logsumexp over the rounds). Both are finite or -inf. When is the difference NaN? "
        "Exchange that logsumexp for 0 before you subtract.",
        "A neighbour: two classes with mean marks 2.0 and 3.0, and the logarithms of their sizes. Mean of all pupils:\n"
        "  logs = torch.tensor([20.0, 10.0]).log()\n"
        "  share = (logs - logs.logsumexp(0)).exp()       [2/3, 1/3]\n"
        "  (share * torch.tensor([2.0, 3.0])).sum()       2.33",
    ),
)
