"""At equal numbers of weights: what does it cost that they go in blocks, in heads and neurons, in whole layers?

Half (or three quarters) of the weights in the teacher's 36 encoder matrices are removed: the smallest of each matrix,
wherever they are; two (three) of every four neighbours in a row; 32 x 32 blocks with the smallest sums of |w|; the
heads and neurons of every layer with the least importance (Michel et al. 2019) or, as the control, random ones; three
of the six layers, those with the least importance or, as the control, the last three. Accuracy is measured at once, and
after a short fine-tuning in which what is gone stays away. "nothing removed" is fine-tuned too.

NOTE importance is measured on sentences that the model is fine-tuned on; magnitude needs no sentence.
NOTE six layers cannot keep a quarter: here they lose half or nothing.
NOTE embeddings, pooler and head are not pruned; the embeddings are not trained. Training and measuring run under
bfloat16 autocast.
NOTE the teacher was trained on all labelled reviews, those of the fine-tuning too: it repairs and learns nothing new.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.distillation.hinton import label_objective
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.pruning.importance import Importance, importance, shrink
from effnlp_lessons.pruning.masks import (
    Masks,
    block_sums,
    full_masks,
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
from effnlp_lessons.training import Examples, TrainingPlan, train

NOTHING, ANY, OF_FOUR, BLOCKS = "nothing removed", "any weights", "of every four", "32 x 32 blocks"
HEADS, RANDOM_HEADS = "heads and neurons", "heads and neurons, at random"
LAYERS, LAST = "layers, by importance", "the last layers"
STRUCTURES = (ANY, OF_FOUR, BLOCKS, HEADS, RANDOM_HEADS, LAYERS, LAST)  # from free to rigid, each control behind
BLOCK = (32, 32)


def masks_of(model: nn.Module, structure: str, left: float) -> Masks:
    """The masks of a structure that keeps the size of the matrices, by magnitude, with a share `left` in each.

    Raises:
        ValueError: another structure, or for `OF_FOUR` a share that is no number of quarters.
    """
    scores = magnitudes(model)
    if structure == NOTHING:
        return full_masks(model)
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
    raise ValueError(f"structure must be one of {(NOTHING, ANY, OF_FOUR, BLOCKS)}, got {structure!r}")


def at_random(found: Importance, seed: int) -> Importance:
    """As many heads, neurons and layers with random importances."""
    generator = torch.Generator().manual_seed(seed)
    heads, neurons = (
        tuple(torch.rand(len(v), generator=generator) for v in part) for part in (found.heads, found.neurons)
    )
    return Importance(heads, neurons, torch.rand(len(found.layers), generator=generator))


def smaller(model: nn.Module, structure: str, left: float, found: Importance) -> nn.Module:
    """A copy with a share `left` of the heads and neurons of every layer, or of the layers.

    Raises:
        ValueError: another structure, or a share that is no number of heads, neurons or layers.
    """
    if structure not in (HEADS, RANDOM_HEADS, LAYERS, LAST):
        raise ValueError(f"structure must be one of {(HEADS, RANDOM_HEADS, LAYERS, LAST)}, got {structure!r}")
    layers = len(found.layers)
    counts = (layers,) if structure in (LAYERS, LAST) else (len(found.heads[0]), len(found.neurons[0]))
    kept = [round(left * count) for count in counts]
    if any(abs(n - left * count) > 1e-9 for n, count in zip(kept, counts, strict=True)):
        raise ValueError(f"left must be a whole number of {' and of '.join(map(str, counts))} parts, got {left}")
    if structure == LAYERS:
        return remove_layers(model, found.layers.argsort()[: layers - kept[0]].tolist())
    if structure == LAST:
        return remove_layers(model, range(kept[0], layers))
    return shrink(model, found, *kept)


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers: "right", `{"before": per cent, "after": per cent}` of the sentences, and "left", a number of weights.

    "left" is counted over the 36 matrices: the weights that are there, without those that are masked.
    `setting`: structure, left (share), sentences (to fine-tune on, for one epoch; 0: none, and no "after"), asked (how
    many of them for the importance), learning_rate; optionally `split` to measure on ("test"), and `tested`, how many
    sentences of it.
    """
    data, structure, left = reviews.load_reviews(), setting["structure"], setting["left"]
    everything = ReviewExamples(data.subset("train"))
    tested = ReviewExamples(data.subset(setting.get("split", "test")), setting.get("tested"))
    order = torch.randperm(len(everything.lengths), generator=torch.Generator().manual_seed(seed))
    model = load_teacher()
    model.encoder.embeddings.requires_grad_(False)
    if structure in (NOTHING, ANY, OF_FOUR, BLOCKS):
        masks = masks_of(model, structure, left)
    else:
        found = importance(model, batches(Rows(everything, order[: setting["asked"]])))
        if structure == RANDOM_HEADS:
            found = at_random(found, seed)
        model = smaller(model, structure, left, found)
        masks = full_masks(model)

    def right() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            return round(accuracy(model, tested), 2)

    with masked(model, masks) as keep:
        per_cent = {"before": right()}
        if setting["sentences"]:
            plan = TrainingPlan(1, 32, setting["learning_rate"], bfloat16=True, seed=seed)
            examples = Rows(everything, order[: setting["sentences"]])
            train(model, examples, label_objective, plan, after_step=keep, progress=False)
            per_cent["after"] = right()
    weights = sum(weight.numel() for weight in prunable(model).values())
    return Outcome({"right": per_cent, "left": round(share_left(masks) * weights)})


def batches(examples: Examples, size: int = 32) -> list[tuple]:
    """All examples in batches of similar length."""
    order = sorted(range(len(examples.lengths)), key=lambda i: examples.lengths[i])
    return [examples.batch(order[i : i + size]) for i in range(0, len(order), size)]


def right_of(summary: Mapping[str, Any], when: str) -> dict[tuple[str, float], list[float]]:
    """{(structure, share left): per cent right, one a seed}, "before" or "after" the fine-tuning.

    Raises:
        ValueError: another `when`.
    """
    if when not in ("before", "after"):
        raise ValueError(f'when must be "before" or "after", got {when!r}')
    found: dict[tuple[str, float], list[float]] = {}
    for one in sorted(summary["runs"], key=lambda one: one["seed"]):
        if when in one["right"]:
            key = one["setting"]["structure"], one["setting"]["left"]
            found.setdefault(key, []).append(one["right"][when])
    return found


COMMON = {"asked": 256, "sentences": 1_500, "learning_rate": 5e-5}
# a few seconds, for a notebook: no training
LIVE = COMMON | {"structure": HEADS, "left": 0.5, "asked": 64, "sentences": 0, "tested": 200}
STUDY = Study(
    name="pruning_structures",
    question="At equal numbers of weights, how much accuracy does structure cost, before and after fine-tuning?",
    run=run,
    recorded=tuple(
        COMMON | {"structure": structure, "left": left}
        for left, structures in ((1.0, (NOTHING,)), (0.5, STRUCTURES), (0.25, (ANY, HEADS)))
        for structure in structures
    ),
    full=tuple(
        COMMON | {"structure": structure, "left": left, "sentences": 7_072, "asked": 2_000}
        for left in (0.75, 0.5, 0.25)
        for structure in (ANY, OF_FOUR, BLOCKS, HEADS, RANDOM_HEADS)
    ),
    seeds=(0, 1, 2),
    minutes=8,
)
