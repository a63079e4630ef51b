"""Exercise 1 of notebook 06: the masks after one more round, each matrix at its own rate.

Frankle and Carbin (2019, arXiv 1803.03635): 20 % of the remaining weights of every matrix, 10 % of the output layer's;
biases are never pruned. NOTE torch.nn.utils.prune counts a share of the remaining weights, too, when it is repeated.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number
from effnlp_lessons.homework.second_order.magnitude import keep_top

Weights = dict[str, Float[Tensor, "*shape"]]
Masks = dict[str, Bool[Tensor, "d_out d_in"]]


def one_round(trained: Weights, masks: Masks, rate: float, output: str) -> Masks:
    """The masks after a round: each matrix loses `rate` of its remaining weights, the one named `output` half of that.

    The smallest |w| go, as `keep_top` counts. `trained` holds the biases, too: they get no mask.
    """
    return {
        name: keep_top(trained[name].abs(), rate / 2 if name == output else rate, mask) for name, mask in masks.items()
    }


def _exchange(
    rate: Callable[[float, bool], float] = lambda rate, is_output: rate / 2 if is_output else rate,
    prune: Callable[[Tensor, float, Tensor], Tensor] = lambda weight, rate, mask: keep_top(weight.abs(), rate, mask),
) -> Answer:
    """The answer with another rate of a matrix, or another way to prune it."""

    def answer(trained: Weights, masks: Masks, rate_: float, output: str) -> Masks:
        return {name: prune(trained[name], rate(rate_, name == output), mask) for name, mask in masks.items()}

    return answer


def _of_the_original(weight: Tensor, rate: float, mask: Tensor) -> Tensor:
    return keep_top(weight.abs(), min(1.0, rate * mask.numel() / int(mask.sum())), mask)


def _all_candidates(weight: Tensor, rate: float, mask: Tensor) -> Tensor:
    return mask & keep_top(weight.abs(), rate, torch.ones_like(mask))


def _all_candidates_counted_right(weight: Tensor, rate: float, mask: Tensor) -> Tensor:
    return mask & keep_top(weight.abs(), rate * int(mask.sum()) / mask.numel(), torch.ones_like(mask))


def _anew(weight: Tensor, rate: float, mask: Tensor) -> Tensor:
    return keep_top(weight.abs(), rate, torch.ones_like(mask))


def _one_threshold(rate_of_output: float) -> Answer:
    """All matrices in one order."""

    def answer(trained: Weights, masks: Masks, rate: float, output: str) -> Masks:
        names = [name for name in masks if rate_of_output or name != output]
        sizes = [masks[name].numel() for name in names]
        scores = torch.cat([trained[name].abs().flatten() for name in names])
        there = torch.cat([masks[name].flatten() for name in names])
        parts = keep_top(scores, rate, there).split(sizes)
        new = {name: part.view(masks[name].shape) for name, part in zip(names, parts, strict=True)}
        if output not in new:
            new[output] = keep_top(trained[output].abs(), rate / 2, masks[output])
        return {name: new[name] for name in masks}

    return answer


def _with_biases(trained: Weights, masks: Masks, rate: float, output: str) -> Masks:
    new = one_round(trained, masks, rate, output)
    for name, values in trained.items():
        if name not in masks:
            new[name] = keep_top(values.abs(), rate, torch.ones_like(values, dtype=torch.bool))
    return new


def _in_turn(rounds: int) -> Callable[..., Masks]:
    """Rounds one after the other; the weights grow and shrink in between, and pruned ones are 0."""

    def observe(fn: Answer, trained: Weights, masks: Masks, rate: float, output: str) -> Masks:
        generator = torch.Generator().manual_seed(0)
        for _ in range(rounds):
            masks = fn(trained, masks, rate, output)
            factors = {name: 0.5 + torch.rand(w.shape, generator=generator) for name, w in trained.items()}
            trained = {name: w * factors[name] * masks.get(name, 1) for name, w in trained.items()}
        return masks

    return observe


def _draw(gone: float, bias: float = 0.3) -> Callable[[Generator], tuple]:
    """A net of three layers that has lost the share `gone` of each matrix; biases of size `bias`."""

    def draw(generator: Generator) -> tuple:
        sizes = [whole_number(4, 6, generator) for _ in range(4)]
        trained, masks = {}, {}
        for name, d_in, d_out, scale in zip(("first", "second", "output"), sizes, sizes[1:], (1, 2, 3), strict=False):
            count = d_in * d_out
            mask = (torch.randperm(count, generator=generator) >= round(gone * count)).view(d_out, d_in)
            trained[f"{name}.weight"] = scale * torch.randn(d_out, d_in, generator=generator) * mask
            trained[f"{name}.bias"] = bias * torch.randn(d_out, generator=generator)
            masks[f"{name}.weight"] = mask
        while True:
            rate = round(whole_number(15, 50, generator) / 100, 2)
            counts = [int(mask.sum()) for mask in masks.values()]
            if all(abs(rate * share * count % 1 - 0.5) > 0.05 for count in counts for share in (1, 0.5)):
                return trained, masks, rate, "output.weight"

    return draw


ONE_ROUND = Exercise(
    id="tickets.one_round",
    title="one round of pruning",
    minutes=15,
    difficulty=1,
    reference=one_round,
    properties=(
        Property("the first round", _draw(0.0), times=1),
        Property("a round after others", _draw(0.4), times=2),
        Property("biases of tiny size stay out of it", _draw(0.2, bias=1e-6), times=1),
        Property("three rounds in turn", _draw(0.0), _in_turn(3), times=1),
    ),
    mistakes=(
        Mistake(
            "The output layer at the full rate",
            "It is pruned at half the rate: it has few weights, and each class hangs on them.",
            _exchange(lambda rate, is_output: rate),
        ),
        Mistake(
            "The output layer is not pruned",
            "Some codes leave it alone. The paper prunes it at half the rate.",
            _exchange(lambda rate, is_output: 0.0 if is_output else rate),
        ),
        Mistake(
            "Half the rate for the hidden layers",
            "It is the output layer that is pruned at half the rate.",
            _exchange(lambda rate, is_output: rate if is_output else rate / 2),
        ),
        Mistake(
            "The output layer at twice the rate",
            "It is the output layer that is pruned at half the rate of the others, rate / 2.",
            _exchange(lambda rate, is_output: 2 * rate if is_output else rate),
        ),
        Mistake(
            "The rate is taken of the original weights, not of the remaining ones",
            "At 20 % of the original nothing is left after five rounds. 20 % of the remaining leave 0.8, 0.64, 0.51, "
            "... keep_top counts what its mask keeps.",
            _exchange(prune=_of_the_original),
        ),
        Mistake(
            "Pruned weights are candidates",
            "They are 0, so they are the smallest, and are removed once more in the place of others. Give keep_top the "
            "old mask.",
            _exchange(prune=_all_candidates),
        ),
        Mistake(
            "Pruned weights are candidates, with the right number",
            "They are 0, so they are the smallest, and are removed once more in the place of others. Give keep_top the "
            "old mask.",
            _exchange(prune=_all_candidates_counted_right),
        ),
        Mistake(
            "The round begins with a full mask",
            "What was pruned before is gone for good. Give keep_top the old mask.",
            _exchange(prune=_anew),
        ),
        Mistake(
            "One threshold for all matrices",
            "In this protocol every matrix has its own order and loses its own share.",
            _one_threshold(1.0),
        ),
        Mistake(
            "One threshold for the hidden matrices",
            "In this protocol every matrix has its own order and loses its own share.",
            _one_threshold(0.0),
        ),
        Mistake(
            "Biases are pruned",
            "They are few and cheap, and a layer does without them badly. Only what has a mask is pruned.",
            _with_biases,
        ),
        Mistake(
            "The weights are sorted with their signs",
            "The smallest |w| go. Large negative weights are large.",
            _exchange(prune=lambda weight, rate, mask: keep_top(weight, rate, mask)),
        ),
        Mistake(
            "The largest weights go",
            "The smallest |w| go.",
            _exchange(prune=lambda weight, rate, mask: keep_top(-weight.abs(), rate, mask)),
        ),
    ),
    hints=(
        "Go through the masks, and not through the weights: what has no mask is not pruned.",
        "keep_top(scores, rate, mask) counts the share of what `mask` keeps, and leaves out what is gone. What are the "
        "scores of magnitude pruning? Which of the matrices gets another rate?",
        "A neighbour: three shelves, the books that are there, and what they are worth; a fifth of each shelf goes to "
        "the market, a tenth of the last.\n"
        "  for shelf, there in on_shelf.items():\n"
        "      share = 0.1 if shelf == 'last' else 0.2\n"
        "      still[shelf] = keep_top(worth[shelf], share, there)\n"
        "Books that are gone are in `there` as False. In the second week they are not counted.",
    ),
)
