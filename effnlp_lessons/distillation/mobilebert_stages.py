"""MobileBERT's staging (Sun et al. 2020, arXiv 2004.02984, sec. 3.6): which loss, and which parts move, when.

Three strategies (sec. 3.6): all in one loss (auxiliary), first all transfer and then L_PD (joint), first one block
after the other and then L_PD (progressive). Each is a list of `Stage`s; `transfer` runs such a list.

NOTE the released code optimizes with LAMB, for the transfer at three times the learning rate; here AdamW, any rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from effnlp_lessons.distillation.mobilebert import MobileBertMaskedLM
from effnlp_lessons.distillation.mobilebert_transfer import (
    IGNORE,
    attention_transfer,
    feature_map_transfer,
    pretraining_distillation,
)

STRATEGIES = ("auxiliary", "joint", "progressive")

# -------------------------------------------------------------------------------------------- the stages


@dataclass(frozen=True)
class Stage:
    """What is on for some steps, and how fast what learns; a rate is a multiplier, 0 for parameters that stay.

    `transfer_layers` are the blocks (from 0) whose feature-map and attention losses are on.
    """

    name: str
    steps: int
    transfer_layers: tuple[int, ...]
    pretraining: bool
    block_rates: tuple[float, ...]
    other_rate: float  # embeddings, pooler and head

    def rate(self, part: int | str) -> float:
        """The multiplier of a block (its index) or of the rest ("embeddings", "head")."""
        return self.block_rates[part] if isinstance(part, int) else self.other_rate


def stages(
    strategy: str, layers: int, *, transfer_steps: int, distillation_steps: int, lower_rate: float = 0.0
) -> list[Stage]:
    """The stages of a strategy (sec. 3.6); all three take transfer_steps + distillation_steps in all.

    auxiliary: one stage with all losses. joint: all blocks' transfer, then the pre-training distillation.
    progressive: block 0's transfer, block 1's, ..., then the pre-training distillation. While only transfer is on,
    the embeddings and the head stay as they were copied from the teacher (`copy_outer_layers_`), and in block l's
    stage the blocks above it stay as they are.

    Args:
        transfer_steps: the published 240,000, 10,000 a block; for progressive a multiple of `layers`.
        distillation_steps: the published 500,000.
        lower_rate: progressive: multiplier of the blocks already done. 0 freezes them. The paper also says to let
            them go on at a small rate, and the released code takes 0.1.

    Raises:
        ValueError: an unknown strategy, no layers, steps below 1 or not divisible, a rate outside [0, 1], a rate
            with another strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    numbers = {"layers": layers, "transfer_steps": transfer_steps, "distillation_steps": distillation_steps}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not 0 <= lower_rate <= 1:
        raise ValueError(f"lower_rate must be in [0, 1], got {lower_rate}")
    if lower_rate and strategy != "progressive":
        raise ValueError(f"lower_rate is for the progressive strategy, got {lower_rate} with {strategy!r}")
    every, ones = tuple(range(layers)), (1.0,) * layers
    if strategy == "auxiliary":
        return [Stage("all losses", transfer_steps + distillation_steps, every, True, ones, 1.0)]
    distillation = Stage("pre-training distillation", distillation_steps, (), True, ones, 1.0)
    if strategy == "joint":
        return [Stage("transfer of all blocks", transfer_steps, every, False, ones, 0.0), distillation]
    if transfer_steps % layers:
        raise ValueError(f"transfer_steps must be a multiple of layers={layers}, got {transfer_steps}")
    by_block = []
    for layer in range(layers):
        rates = tuple(lower_rate if below < layer else float(below == layer) for below in range(layers))
        by_block.append(Stage(f"transfer of block {layer}", transfer_steps // layers, (layer,), False, rates, 0.0))
    return [*by_block, distillation]


def released_schedule(step: int, steps: int) -> float:
    """The released code's learning rate inside a stage: up to about 1 in the first tenth, then down to 0.9.

    min(10 s, 0.9 + 0.1 sqrt(1 - s)) with s = step / steps; the first step of a stage has rate 0.
    """
    done = step / steps
    return min(10 * done, 0.9 + 0.1 * (1 - done) ** 0.5)


def copy_outer_layers_(student: MobileBertMaskedLM, teacher: MobileBertMaskedLM) -> None:
    """Start the student, in place, from all the teacher's weights outside the blocks (sec. 3.6).

    NOTE a layer norm's weights are not put into a NoNorm, which does something else: as in the released code, where
    the two have different names, the student's stays at gamma 1, beta 0.

    Raises:
        ValueError: models whose widths, layers, heads or vocabulary differ.
    """
    _check_pair(student, teacher)
    norm = "encoder.embeddings.norm."
    same_norm = type(student.encoder.embeddings.norm) is type(teacher.encoder.embeddings.norm)
    theirs = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if part_of(name) in ("embeddings", "head") and name in theirs and (same_norm or not name.startswith(norm)):
                parameter.copy_(theirs[name])


# ------------------------------------------------------------------------------------------ the training


class MaskedBatch(NamedTuple):
    """Token ids with masked words, True = a real token, and the words at the masked positions (-100 elsewhere)."""

    token_ids: Int[Tensor, "batch length"]
    key_padding_mask: Bool[Tensor, "batch length"]
    labels: Int[Tensor, "batch length"]


class TransferLosses(NamedTuple):
    """The losses of a stage; one number a block, and exactly 0 for what is off."""

    feature_maps: tuple[Tensor, ...]
    attention: tuple[Tensor, ...]
    pretraining: Tensor

    def total(self) -> Tensor:
        return sum(self.feature_maps) + sum(self.attention) + self.pretraining


def _check_pair(student: MobileBertMaskedLM, teacher: MobileBertMaskedLM) -> None:
    for name in ("vocab_size", "max_length", "segments", "d_embedding", "d_model", "layers", "heads"):
        ours, theirs = getattr(student.encoder.config, name), getattr(teacher.encoder.config, name)
        if ours != theirs:
            raise ValueError(f"student and teacher must have the same {name}, got {ours} and {theirs}")


def transfer_losses(
    student: MobileBertMaskedLM,
    teacher: MobileBertMaskedLM,
    batch: MaskedBatch,
    stage: Stage,
    *,
    alpha: float = 0.5,
    feature_map_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = feature_map_transfer,
) -> TransferLosses:
    """The losses that `stage` switches on; both models run no further than they need.

    Args:
        feature_map_loss: `feature_map_transfer`, or `split_feature_map_transfer` as released.

    Raises:
        ValueError: a teacher in training mode (its dropout would be on), models that do not fit each other.
    """
    _check_pair(student, teacher)
    if teacher.training:
        raise ValueError("teacher must be in evaluation mode: call teacher.eval()")
    ids, mask, labels = batch
    layers, on = student.encoder.config.layers, stage.transfer_layers
    blocks = layers if stage.pretraining else max(on, default=-1) + 1
    masked = labels != IGNORE
    with torch.no_grad():
        theirs = teacher.encoder(ids, mask, return_scores=True, blocks=blocks)
        target = teacher.logits(theirs.last[masked]) if stage.pretraining else None
    ours = student.encoder(ids, mask, return_scores=True, blocks=blocks)
    zero = torch.zeros((), dtype=ours.last.dtype, device=ids.device)
    maps, attention = [zero] * layers, [zero] * layers
    for layer in on:  # hidden[0] is the embeddings' output
        maps[layer] = feature_map_loss(ours.hidden[layer + 1], theirs.hidden[layer + 1], mask)
        attention[layer] = attention_transfer(ours.scores[layer], theirs.scores[layer], mask)
    pretraining = zero
    if stage.pretraining:
        logits = student.logits(ours.last[masked])
        pretraining = pretraining_distillation(logits, target, labels[masked], alpha)
    return TransferLosses(tuple(maps), tuple(attention), pretraining)


def part_of(parameter: str) -> int | str:
    """The part of the student a parameter's name belongs to: a block's index, "embeddings" or "head"."""
    if parameter.startswith("encoder.blocks."):
        return int(parameter.split(".")[2])
    return "embeddings" if parameter.startswith("encoder.embeddings.") else "head"


def parameter_groups(student: MobileBertMaskedLM, weight_decay: float = 0.01) -> list[dict]:
    """One optimizer group for each part and decay, marked with its "part"; vectors (biases, norms) do not decay."""
    groups: dict[tuple[int | str, float], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((part_of(name), decay), []).append(parameter)
    return [{"params": members, "weight_decay": decay, "part": part} for (part, decay), members in groups.items()]


def enter_stage_(optimizer: torch.optim.Optimizer, stage: Stage) -> None:
    """Let learn what the stage lets learn, in place; `optimizer` has the groups of `parameter_groups`.

    Parameters at rate 0 need no gradient and have none. An optimizer passes over those: neither the moments left from
    an earlier stage nor weight decay can move them, and the moments stay as they are.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(stage.rate(group["part"]) > 0)
            parameter.grad = None


def transfer(
    student: MobileBertMaskedLM,
    teacher: MobileBertMaskedLM,
    batch_at: Callable[[int], MaskedBatch],
    plan: Sequence[Stage],
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    alpha: float = 0.5,
    feature_map_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = feature_map_transfer,
    schedule: Callable[[int, int], float] = lambda step, steps: 1.0,
) -> list[list[float]]:
    """Run the stages of `plan` on the student, in place, with one AdamW; leaves both models in evaluation mode.

    Dropout is off in both, as in the released code, so nothing is drawn at random but by `batch_at`.

    Args:
        batch_at: the batch of a step, counted through all stages.
        learning_rate: the learning rate where a stage's multiplier is 1.
        clip: bound on the gradient's norm, 0 for none.
        schedule: factor on the learning rate by (step of the stage, steps of the stage); `released_schedule`.

    Returns:
        The total loss of every step (nats and squared errors added up), one list a stage.

    Raises:
        ValueError: models or stages that do not fit each other, a loss that is not finite.
    """
    teacher.eval()
    student.eval()
    layers = student.encoder.config.layers
    if any(len(stage.block_rates) != layers for stage in plan):
        raise ValueError(f"plan must be for {layers} layers, got {sorted({len(s.block_rates) for s in plan})}")
    optimizer = torch.optim.AdamW(parameter_groups(student, weight_decay), lr=learning_rate)
    losses: list[list[float]] = []
    done = 0
    try:
        for stage in plan:
            enter_stage_(optimizer, stage)
            losses.append([])
            for step in range(stage.steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * stage.rate(group["part"]) * schedule(step, stage.steps)
                options = {"alpha": alpha, "feature_map_loss": feature_map_loss}
                loss = transfer_losses(student, teacher, batch_at(done), stage, **options).total()
                if not torch.isfinite(loss):
                    raise ValueError(f"the loss is {loss.item()} at step {done}; try a lower learning rate")
                optimizer.zero_grad()
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(student.parameters(), clip)
                optimizer.step()
                losses[-1].append(loss.item())
                done += 1
    finally:
        student.requires_grad_(True)
    return losses
