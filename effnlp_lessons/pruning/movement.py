"""Movement pruning: keep the weights that move away from zero while the model is fine-tuned (Sanh, Wolf, Rush 2020).

A pre-trained weight is large or small because of pre-training; the task only moves it a little. Magnitude asks where a
weight is, movement where it goes (arXiv 2005.07683). Every weight W_ij has a score S_ij, learned with it:

    a = (W ⊙ M) x,   M = Top_v(S), the share v of each matrix (hard),  or  M = [sigmoid(S) > tau] (soft)
    dL/dS_ij = (dL/da_i) W_ij x_j = (dL/dW'_ij) W_ij,   W' = M ⊙ W      (straight through the step of M)
    dL/dW_ij = (dL/dW'_ij) M_ij

The score's gradient leaves M out: a masked weight goes on being judged, and may return. Descent makes S grow where
dL/dW' and W have opposite signs, that is where the weight is pushed away from zero.

    v_t = v_f + (v_i - v_f) (1 - (t - t_i) / (N - t_i - t_f))^3,   v_i in the first t_i steps, v_f in the last t_f

drives v from 1 down, or tau from 0 up. Soft mode adds the penalty lambda_t mean_matrices(mean sigmoid(S)) to the loss,
lambda_t = lambda tau_t / tau_f: without it nothing asks a score to fall. Magnitude pruning is the special case S = |W|,
with nothing to learn.

NOTE scores begin at 0, all equal: a top share of them would be an arbitrary block of the matrix. At v = 1 nothing is
chosen, so `warm_up` lets the scores part first; what is still tied is decided by |W|.
NOTE in hard mode the order of the scores alone counts. From S = 0 Adam's steps are proportional to the scores' learning
rate, so that it changes no mask. In soft mode a score must fall to log(tau / (1 - tau)), and the rate decides how soon.
NOTE the paper writes S > tau; the released code compares sigmoid(S), and keeps at least 0.5 % of each matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.layers import with_layers
from effnlp_lessons.pruning.masks import Masks, prunable
from effnlp_lessons.training import Examples, History, TrainingPlan, bucketed_batches, learning_rate_at

MODES = ("magnitude", "hard", "soft")
LEAST = 0.005  # of each matrix stays in soft mode, whatever the scores


# ------------------------------------------------------------------------------------------ which weights stay


def top_share(
    score: Float[Tensor, "*shape"], share: float, weight: Float[Tensor, "*shape"] | None = None
) -> Bool[Tensor, "*shape"]:
    """Top_v: keep the highest of n scores, all but round((1 - share) n).

    Among equal scores those with the largest |weight| stay; without `weight` the last ones, as in `masks.keep_top`.

    Raises:
        ValueError: a share outside 0 .. 1, scores that are not finite, a weight of another shape.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in 0 .. 1, got {share}")
    _check_finite(score)
    if weight is not None and weight.shape != score.shape:
        raise ValueError(f"weight must have the shape of score {tuple(score.shape)}, got {tuple(weight.shape)}")
    values, total = score.detach(), score.numel()
    gone = round((1 - share) * total)
    if gone == 0:
        return torch.ones_like(values, dtype=torch.bool)
    # the largest score that goes; numpy finds it in a fifth of the time of torch.kthvalue
    threshold = np.partition(values.flatten().cpu().numpy(), gone - 1)[gone - 1].item()
    kept = (values > threshold).contiguous()
    missing = total - gone - int(kept.count_nonzero())
    if missing:
        equal = (values == threshold).flatten().nonzero().flatten()
        if weight is not None:
            equal = equal[weight.detach().flatten()[equal].abs().argsort(stable=True)]
        kept.view(-1)[equal[-missing:]] = True
    return kept


def above(
    score: Float[Tensor, "*shape"], threshold: float, weight: Float[Tensor, "*shape"] | None = None
) -> Bool[Tensor, "*shape"]:
    """M = [sigmoid(S) > tau], but never less than `LEAST` of the weights, at least one; ties as in `top_share`.

    Raises:
        ValueError: a threshold outside 0 .. 1 (1 excluded), scores that are not finite.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in 0 .. 1, 1 excluded, got {threshold}")
    _check_finite(score)
    kept = torch.sigmoid(score.detach()) > threshold
    least = max(1, round(LEAST * score.numel()))
    return kept if int(kept.count_nonzero()) >= least else top_share(score, least / score.numel(), weight)


def _check_finite(score: Tensor) -> None:
    if not torch.isfinite(score.sum()) and not torch.isfinite(score).all():  # the sum alone is much cheaper
        raise ValueError("score must be finite: NaN and infinity have no place in an order")


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(context, weight: Tensor, score: Tensor, mask: Tensor) -> Tensor:
        context.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = context.saved_tensors
        # dL/dW = dL/dW' M,  dL/dS = dL/dW' W
        return gradient * mask, gradient * weight, None


def masked_weight(
    weight: Float[Tensor, "d_out d_in"], score: Float[Tensor, "d_out d_in"], mask: Bool[Tensor, "d_out d_in"]
) -> Float[Tensor, "d_out d_in"]:
    """W' = M ⊙ W, with the gradients of the paper: the weight's is gated by M, the score's is (dL/dW') W without M.

    Raises:
        ValueError: shapes that differ, or a mask that is not bool.
    """
    if not weight.shape == score.shape == mask.shape or mask.dtype != torch.bool:
        shapes = f"{tuple(weight.shape)}, {tuple(score.shape)}, {mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"weight, score and a bool mask must have one shape, got {shapes}")
    return _MaskedWeight.apply(weight, score, mask)


def cubic_level(step: float, steps: int, initial: float, final: float, warm_up: float, cool_down: float) -> float:
    """v_t: `initial` until step t_i = `warm_up`, `final` from step N - t_f = `steps` - `cool_down` on, a cubic between.

    It falls fast at first, while there is much to remove, and slowly towards the end.

    Raises:
        ValueError: a warm-up or cool-down below 0, or no step between them.
    """
    if warm_up < 0 or cool_down < 0 or warm_up + cool_down >= steps:
        raise ValueError(
            f"warm_up and cool_down must be >= 0 and leave steps between them, got {warm_up} and {cool_down} of {steps}"
        )
    # from 1 at t_i to 0 at N - t_f
    way_left = 1 - (step - warm_up) / (steps - warm_up - cool_down)
    return final + (initial - final) * min(max(way_left, 0.0), 1.0) ** 3


# ------------------------------------------------------------------------------------------------- the layer


class MovementLinear(nn.Linear):
    """A linear layer that uses W ⊙ M, with M from its scores and its level.

    Parameters: copies of those of the layer that it replaces, and `score`, zeros in the shape of the weight (none in
    magnitude mode). The buffer `level` is v, the share kept, in hard and magnitude mode, and tau in soft mode: the same
    in training and in evaluation.

    Raises:
        ValueError: a mode that is not in `MODES`.
    """

    def __init__(self, linear: nn.Linear, mode: str = "hard") -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.mode = mode
        self.weight, self.bias = _copy(linear.weight), None if linear.bias is None else _copy(linear.bias)
        self.score = None if mode == "magnitude" else nn.Parameter(torch.zeros_like(self.weight))
        self.register_buffer("level", torch.tensor(0.0 if mode == "soft" else 1.0, dtype=torch.float64))
        self.train(linear.training)

    def mask(self) -> Bool[Tensor, "d_out d_in"]:
        """M of the present scores and level."""
        if self.score is None:
            return top_share(self.weight.detach().abs(), self.level.item())
        return (above if self.mode == "soft" else top_share)(self.score, self.level.item(), self.weight)

    def masked(self) -> tuple[Tensor, Tensor | None]:
        """W' and the bias, as they are used, with the gradients of training."""
        if self.score is None:
            return self.weight * self.mask(), self.bias
        return masked_weight(self.weight, self.score, self.mask()), self.bias

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return F.linear(x, *self.masked())


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def prepare_movement(model: nn.Module, mode: str = "hard", names: Iterable[str] | None = None) -> nn.Module:
    """A copy of `model` with a `MovementLinear` for each layer named; by default the six of every block.

    Nothing is masked yet: the level is 1 (soft: 0).

    Raises:
        ValueError: a mode that is not in `MODES`; names that are no linear layers, or none at all.
    """
    layers = [name.removesuffix("weight").removesuffix(".") for name in prunable(model, names)]
    if layers == [""]:
        return MovementLinear(model, mode)
    return with_layers(model, {name: MovementLinear(model.get_submodule(name), mode) for name in layers})


def movement_layers(model: nn.Module) -> dict[str, MovementLinear]:
    """The layers of `prepare_movement` by name.

    Raises:
        ValueError: a model that has none.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, MovementLinear)}
    if not layers:
        raise ValueError("model must come from prepare_movement: it has no MovementLinear")
    return layers


def set_level_(model: nn.Module, level: float) -> None:
    """Set v (soft: tau) of every layer, in place. Errors as in `movement_layers`."""
    for layer in movement_layers(model).values():
        layer.level.fill_(level)


def movement_masks(model: nn.Module) -> Masks:
    """The mask of every matrix by the name of its parameter: what `masks.share_left` counts.

    Count masks, not zeros: a kept weight may be 0. Errors as in `movement_layers`.
    """
    return {f"{name}.weight" if name else "weight": layer.mask() for name, layer in movement_layers(model).items()}


def to_dense(model: nn.Module) -> nn.Module:
    """A copy with plain linear layers, masked weights 0, and the same outputs. Errors as in `movement_layers`."""
    dense = {}
    for name, layer in movement_layers(model).items():
        weight, bias = layer.masked()
        plain = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
        plain.weight, plain.bias = _copy(weight), None if bias is None else _copy(bias)
        dense[name] = plain
    return dense[""].train(model.training) if "" in dense else with_layers(model, dense)


# -------------------------------------------------------------------------------------------------- training


def score_penalty(model: nn.Module) -> Float[Tensor, ""]:
    """mean over matrices of mean sigmoid(S): 0.5 at the start.

    Raises:
        ValueError: a model without scores.
    """
    scores = [layer.score for layer in movement_layers(model).values() if layer.score is not None]
    if not scores:
        raise ValueError("model must have scores: in magnitude mode there are none")
    return torch.stack([torch.sigmoid(score).mean() for score in scores]).mean()


@dataclass(frozen=True)
class MovementPlan:
    """How to prune. `final` is v_f, the share kept of each matrix, and in soft mode tau_f.

    `warm_up` and `cool_down` are the shares of the steps before and after the cubic. `score_learning_rate` is the peak,
    with the same warm-up and decay as that of the weights; scores are not decayed towards 0. `penalty` is lambda.
    """

    final: float
    warm_up: float = 0.1
    cool_down: float = 0.2
    score_learning_rate: float = 1e-2
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.final <= 1:
            raise ValueError(f"final must be in 0 .. 1, 0 excluded, got {self.final}")
        if self.penalty < 0 or self.score_learning_rate <= 0:
            raise ValueError(f"penalty must be >= 0, score_learning_rate > 0, got {self}")
        cubic_level(0, 1, 1, self.final, self.warm_up, self.cool_down)


def train_movement(
    model: nn.Module,
    examples: Examples,
    loss: Callable[[nn.Module, Any], Tensor],
    plan: TrainingPlan,
    pruning: MovementPlan,
) -> History:
    """Train a model of `prepare_movement` in place while its masks close in; leaves it in evaluation mode at v_f.

    The batches, the optimizer and the random numbers are those of `training.train`. What is added: scores with a
    learning rate of their own, the level of every step, and the penalty. `History.loss` is without the penalty.

    Raises:
        ValueError: a model without such layers, a penalty in another mode than soft, a loss that is not finite.
    """
    layers = movement_layers(model)
    initial = next(iter(layers.values())).level.item()
    scores = [layer.score for layer in layers.values() if layer.score is not None]
    if pruning.penalty and any(layer.mode != "soft" for layer in layers.values()):
        raise ValueError(f"penalty must be 0 unless the mode is soft, got {pruning.penalty}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    learned = {id(score) for score in scores}
    weights = [p for p in parameters if id(p) not in learned]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": plan.weight_decay, "speed": 1.0},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0, "speed": 1.0},
        {"params": scores, "weight_decay": 0.0, "speed": pruning.score_learning_rate / plan.learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate)
    autocast = torch.autocast("cpu", torch.bfloat16) if plan.bfloat16 else nullcontext()
    history = History()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        generators = [torch.Generator().manual_seed(plan.seed * 100_003 + epoch) for epoch in range(plan.epochs)]
        epochs = [bucketed_batches(examples.lengths, plan.batch_size, generator) for generator in generators]
        batches = [batch for epoch in epochs for batch in epoch]
        steps = len(batches)
        schedule = (initial, pruning.final, pruning.warm_up * steps, pruning.cool_down * steps)
        model.train()
        for done, indices in enumerate(batches):
            level = cubic_level(done, steps, *schedule)
            set_level_(model, level)
            for group in optimizer.param_groups:
                group["lr"] = group["speed"] * learning_rate_at(done, steps, plan)
            with autocast:
                value = loss(model, examples.batch(indices))
            if not torch.isfinite(value):
                raise ValueError(f"the loss is {value.item()} at step {done}; try a lower learning rate")
            # lambda_t = lambda tau_t / tau_f
            strength = pruning.penalty * level / pruning.final
            optimizer.zero_grad()
            (value + strength * score_penalty(model) if strength else value).backward()
            if plan.clip:
                nn.utils.clip_grad_norm_(parameters, plan.clip)
            optimizer.step()
            history.loss.append(value.item())
    set_level_(model, pruning.final)
    model.eval()
    return history
