"""At equal numbers of weights: what does it cost that they go in blocks, in heads and neurons, in whole layers?

Of the teacher's 36 encoder matrices half of the weights (or three quarters) are removed, in every matrix alike: any
weights, the smallest; two (three) of every four neighbours in a row; 32 x 32 blocks with the smallest sums of |w|; the
heads and neurons of every layer with the least importance (Michel et al. 2019), which makes the matrices smaller; or
three of the six layers, those with the least importance or the last three. Accuracy is measured at once, and after a
short fine-tuning in which what is gone stays away. "nothing removed" is fine-tuned too.

NOTE importance is measured on 256 of the sentences that the model is fine-tuned on; magnitude needs no sentence.
NOTE six layers cannot lose three quarters: they lose half or nothing here.
NOTE embeddings, pooler and head are not pruned; the embeddings are not trained. Training and measuring run under
bfloat16 autocast.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.distillation.hinton import label_objective
from effnlp_lessons.measure import count_parameters
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.pruning.importance import Importance, importance, shrink
from effnlp_lessons.pruning.masks import (
    Masks,
    apply_masks_,
    block_sums,
    keep_top,
    local_masks,
    magnitudes,
    masked,
    n_of_m,
    prunable,
    share_left,
    spread_blocks,
)
from effnlp_lessons.pruning.structured import remove_layers
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.studies.transfer_set import Rows
from effnlp_lessons.training import TrainingPlan, train

NOTHING, ANY, OF_FOUR, BLOCKS = "nothing removed", "any weights", "of every four", "32 x 32 blocks"
HEADS, LAYERS, LAST = "heads and neurons", "layers, by importance", "the last layers"
STRUCTURES = (NOTHING, ANY, OF_FOUR, BLOCKS, HEADS, LAYERS, LAST)
BLOCK = (32, 32)


def masks_of(model: nn.Module, structure: str, left: float) -> Masks:
    """The masks of a structure that keeps the size of the matrices, by magnitude, with a share `left` in each.

    Raises:
        ValueError: another structure, or a share that is not a number of quarters for `OF_FOUR`.
    """
    scores = magnitudes(model)
    if structure == ANY:
        return local_masks(scores, 1 - left)
    if structure == OF_FOUR:
        if 4 * left != round(4 * left):
            raise ValueError(f"left must be a number of quarters, got {left}")
        return {name: n_of_m(values, round(4 * left)) for name, values in scores.items()}
    if structure == BLOCKS:
        return {
            name: spread_blocks(keep_top(block_sums(values, BLOCK), 1 - left), BLOCK) for name, values in scores.items()
        }
    raise ValueError(f"structure must be one of {(ANY, OF_FOUR, BLOCKS)}, got {structure!r}")


def pruned(model: nn.Module, structure: str, left: float, found: Importance) -> tuple[nn.Module, Masks]:
    """A copy of the model without what goes, and the masks that hold it there; of a smaller model none.

    Raises:
        ValueError: a structure that is not in `STRUCTURES`.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {STRUCTURES}, got {structure!r}")
    layers = len(found.layers)
    if structure == HEADS:
        return shrink(model, found, round(left * len(found.heads[0])), round(left * len(found.neurons[0]))), {}
    if structure in (LAYERS, LAST):
        order = found.layers.argsort().tolist() if structure == LAYERS else list(range(layers))[::-1]
        return remove_layers(model, order[: layers - round(left * layers)]), {}
    model = remove_layers(model, [])
    masks = {} if structure == NOTHING else masks_of(model, structure, left)
    apply_masks_(model, masks)
    return model, masks


def left_in_matrices(model: nn.Module, masks: Masks, whole: int) -> float:
    """The share of the `whole` weights that is left in the matrices of the blocks, gone ones and zeros counted out."""
    there = sum(weight.numel() for weight in prunable(model).values())
    return (share_left(masks) if masks else 1.0) * there / whole


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """One structure: "before" and "after" fine-tuning, per cent of the test sentences right.

    `setting`: structure, left (share), sentences (to fine-tune on; 0: none), learning_rate, tested (None: all).

    Numbers: also "left" in the encoder's matrices (per cent, counted), "parameters" of the model as it is, and "layers"
    that are left of the teacher's (from 0), for whole layers.
    """
    data = reviews.load_reviews()
    train_set = ReviewExamples(data.subset("train"))
    tested = ReviewExamples(data.subset("test"), setting["tested"])
    order = torch.randperm(len(train_set.lengths), generator=torch.Generator().manual_seed(seed))
    teacher = load_teacher()
    found = importance(teacher, _batches(train_set, order[: setting["asked"]]))
    whole = sum(weight.numel() for weight in prunable(teacher).values())
    model, masks = pruned(teacher, setting["structure"], setting["left"], found)

    def right() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return round(accuracy(model, tested), 2)

    numbers: dict[str, Any] = {"before": right()}
    if setting["sentences"]:
        model.encoder.embeddings.requires_grad_(False)
        plan = TrainingPlan(1, 32, setting["learning_rate"], bfloat16=True, seed=seed)
        examples = Rows(train_set, order[: setting["sentences"]])
        with masked(model, masks) if masks else nullcontext() as keep:
            train(model, examples, label_objective, plan, after_step=keep, progress=False)
        numbers["after"] = right()
    numbers["left"] = round(100 * left_in_matrices(model, masks, whole), 4)
    numbers["parameters"] = count_parameters(model)
    return Outcome(numbers)


def _batches(examples: ReviewExamples, rows: Tensor, size: int = 32) -> list[tuple]:
    chosen = sorted(rows.tolist(), key=examples.lengths.__getitem__)
    return [examples.batch(chosen[i : i + size]) for i in range(0, len(chosen), size)]


def right_of(summary: dict[str, Any], when: str) -> dict[tuple[str, float], list[float]]:
    """{(structure, share left): per cent right, one a seed}, "before" or "after" the fine-tuning."""
    found: dict[tuple[str, float], list[float]] = {}
    for run in summary["runs"]:
        if when in run:
            found.setdefault((run["setting"]["structure"], run["setting"]["left"]), []).append(run[when])
    if not found:
        raise ValueError(f'when must be "before" or "after", got {when!r}')
    return found


COMMON = {"asked": 256, "sentences": 2_000, "learning_rate": 5e-5, "tested": None}
# a few seconds, for a notebook: no training
LIVE = COMMON | {"structure": HEADS, "left": 0.5, "asked": 64, "sentences": 0, "tested": 300}
STUDY = Study(
    name="pruning_structures",
    question="At equal numbers of weights, how much accuracy does structure cost, before and after fine-tuning?",
    run=run,
    recorded=tuple(
        COMMON | {"structure": structure, "left": left}
        for left, structures in (
            (1.0, (NOTHING,)),
            (0.5, STRUCTURES[1:]),
            (0.25, (ANY, OF_FOUR, BLOCKS, HEADS)),
        )
        for structure in structures
    ),
    full=tuple(
        COMMON | {"structure": structure, "left": left, "sentences": 7_072}
        for left in (0.75, 0.5, 0.25)
        for structure in STRUCTURES[1:5]
    ),
    seeds=(0, 1, 2),
    minutes=10,
)
