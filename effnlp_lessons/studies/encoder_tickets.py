"""Tickets in a pre-trained encoder: theta_0 is what pre-training left (Chen et al. 2020, arXiv 2007.12223).

MiniLM-L3 is fine-tuned on some labelled reviews. Each round removes 10 % of the 18 matrices' weights, the smallest of
all matrices together, and puts the others back to their pre-trained values, pooler and head to their first ones;
optimizer and schedule begin anew. At some levels the ticket stands beside its mask with matrices drawn anew (normal,
0.02, as BERT begins), beside the pre-trained weights under a mask with as many random places in each matrix, beside
the pre-trained weights pruned once by their own magnitude, before any training, and beside late rewinding.

Late rewinding resumes the dense run from its step k under the ticket's mask: weights, moments, place in the data and
in the schedule are those of the checkpoint that the course's training loop wrote there.

NOTE the paper prunes the pooler of BERT too; MiniLM-L3 has none, its pooler is drawn anew and is not pruned. Embeddings
are neither pruned nor trained here. The shares are of 5,308,416 weights in the 18 matrices; the whole model has three
times as many parameters.
NOTE late rewinding takes the mask that was found by rewinding to step 0; it does not search for one of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.distillation.hinton import label_objective
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.pruning.lottery import find_tickets, overlap, rate_of_the_original, rewind_, shuffled
from effnlp_lessons.pruning.masks import Masks, full_masks, global_masks, magnitudes, masked, share_left
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.studies.transfer_set import Rows, labelled_rows
from effnlp_lessons.studies.well_read import PUBLISHED, start
from effnlp_lessons.training import Examples, TrainingPlan, train

TICKET, REDRAWN, SHUFFLED, ONE_SHOT = "ticket", "new weights", "random mask", "one shot"
LATE = "late rewinding"
KINDS = (TICKET, REDRAWN, SHUFFLED, ONE_SHOT, LATE)


def pretrained_classifier(seed: int) -> SentenceClassifier:
    """MiniLM-L3 with a pooler and a head from `seed`; its embeddings are not trained."""
    return SentenceClassifier(start(PUBLISHED, 3, seed, None, 0.0), classes=2, seed=seed)


def redrawn(weights: Mapping[str, Tensor], names: Iterable[str], seed: int) -> dict[str, Tensor]:
    """A copy of `weights` with new values in the named matrices, normal(0, 0.02) as BERT begins."""
    generator = torch.Generator().manual_seed(seed)
    return dict(weights) | {name: 0.02 * torch.randn(weights[name].shape, generator=generator) for name in names}


class _Reached(Exception):
    """The step of a checkpoint was passed."""


def checkpoint_at(model: nn.Module, examples: Examples, plan: TrainingPlan, step: int, file: Path) -> None:
    """Train `model` in place for the first steps of a plan, and leave the loop's checkpoint of `step` in `file`.

    Raises:
        ValueError: a step that is not in the middle of the plan.
    """

    def stop(model: nn.Module, done: int) -> None:
        if done > step:
            raise _Reached

    if step < 1:
        raise ValueError(f"step must be >= 1, got {step}")
    try:
        train(model, examples, label_objective, plan, checkpoint=file, checkpoint_every=step, after_step=stop,
              progress=False)  # fmt: skip
    except _Reached:
        return
    raise ValueError(f"step must come before the plan's last, got {step}")


@contextmanager
def masked_checkpoint(file: Path, masks: Masks) -> Iterator[Path]:
    """A copy of a checkpoint of the training loop with masked weights set to 0; deleted on exit."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for name, mask in masks.items():
        tensors[f"model.{name}"].masked_fill_(~mask, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        save_file(tensors, copy, metadata)
        yield copy


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """One seed: the ticket of every round, and the others at the rounds that `setting` names.

    `setting`: labels, epochs, learning_rate, rounds (of 10 % of the weights each), controls (a list of rounds), late
    (a list of rounds), rewind_to (the step k of late rewinding), tested (how many test sentences).

    Numbers: "left", per cent of the matrices' weights after each round; for each of `KINDS` "rounds" and "right", per
    cent of the test sentences right, one for each of these rounds; "steps" of a training; "blocks", per cent left in
    the matrices of each block, by round; "overlap", the Jaccard index of the ticket's mask and the one-shot mask, over
    all matrices, and "overlap by chance", that of the ticket's and the random mask.
    """
    data = reviews.load_reviews()
    everything = ReviewExamples(data.subset("train"))
    tested = ReviewExamples(data.subset("test"), setting["tested"])
    examples = Rows(everything, labelled_rows(setting["labels"], seed, len(everything.lengths)))
    plan = TrainingPlan(setting["epochs"], 32, setting["learning_rate"], bfloat16=True, seed=seed)
    model = pretrained_classifier(seed)
    theta_0 = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    full, by_magnitude = full_masks(model), magnitudes(model)

    def right_after(weights: Mapping[str, Tensor], masks: Masks, checkpoint: Path | None = None) -> float:
        rewind_(model, weights, masks)
        with masked(model, masks) as keep:
            train(model, examples, label_objective, plan, checkpoint=checkpoint, checkpoint_every=10**9,
                  after_step=keep, progress=False)  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16):
            return round(accuracy(model, tested), 2)

    rounds = iter(range(setting["rounds"] + 1))

    def prune(model: nn.Module, masks: Masks) -> Masks:
        return global_masks(magnitudes(model), rate_of_the_original(next(rounds)), masks)

    tickets = [
        (ticket.masks, ticket.result)
        for ticket in find_tickets(model, lambda masks: right_after(theta_0, masks), setting["rounds"], prune)
    ]
    found: dict[str, Any] = {kind: {"rounds": [], "right": []} for kind in KINDS}

    def note(kind: str, number: int, right: float) -> None:
        found[kind]["rounds"].append(number)
        found[kind]["right"].append(right)

    agree, chance = [], []
    for number, (masks, right) in enumerate(tickets):
        note(TICKET, number, right)
        once = global_masks(by_magnitude, 0.1 * number, full)
        drawn = 1_000 * (seed + 1) + number
        random = shuffled(masks, drawn)
        agree.append(_overlap(masks, once))
        chance.append(_overlap(masks, random))
        if number in setting["controls"]:
            note(REDRAWN, number, right_after(redrawn(theta_0, masks, drawn), masks))
            note(SHUFFLED, number, right_after(theta_0, random))
            note(ONE_SHOT, number, right_after(theta_0, once))
    if setting["late"]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "late.safetensors"
            rewind_(model, theta_0, full)
            checkpoint_at(model, examples, plan, setting["rewind_to"], file)
            for number in setting["late"]:
                masks = tickets[number][0]
                with masked_checkpoint(file, masks) as checkpoint:
                    note(LATE, number, right_after(theta_0, masks, checkpoint))
    blocks = [
        [
            round(100 * share_left({n: mask for n, mask in masks.items() if f"blocks.{block}." in n}), 2)
            for block in range(len(model.encoder.blocks))
        ]
        for masks, _ in tickets
    ]
    steps = -(-setting["labels"] // 32) * setting["epochs"]
    left = [round(100 * share_left(masks), 4) for masks, _ in tickets]
    return Outcome(
        {"left": left, "steps": steps} | found | {"blocks": blocks, "overlap": agree, "overlap by chance": chance}
    )


def _overlap(first: Masks, second: Masks) -> float:
    """The Jaccard index over all matrices together."""
    one, two = (torch.cat([masks[name].flatten() for name in first]) for masks in (first, second))
    return round(overlap({"all": one}, {"all": two})["all"], 4)


def right_by_round(summary: dict[str, Any], kind: str) -> dict[int, list[float]]:
    """Of a recorded summary: {round: per cent right, one a seed} of one of `KINDS`.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    found: dict[int, list[float]] = {}
    for run in summary["runs"]:
        for number, right in zip(run[kind]["rounds"], run[kind]["right"], strict=True):
            found.setdefault(number, []).append(right)
    return found


COMMON = {"epochs": 2, "learning_rate": 2e-4, "rewind_to": 5, "tested": 2_000}
# a few seconds, for a notebook: the masks are worth a look, after so few steps the accuracies are not
LIVE = COMMON | {"labels": 96, "epochs": 1, "rewind_to": 1, "tested": 200, "rounds": 3, "controls": [3], "late": []}
STUDY = Study(
    name="encoder_tickets",
    question="Are there tickets in a pre-trained encoder, and does it need the rounds, the mask, the weights?",
    run=run,
    recorded=(COMMON | {"labels": 1_500, "rounds": 8, "controls": [5, 7], "late": [7]},),
    full=(
        COMMON
        | {"labels": 7_070, "epochs": 3, "rewind_to": 20, "rounds": 9}
        | {"controls": list(range(1, 10)), "late": list(range(1, 10))},
    ),
    seeds=(0, 1, 2),
    minutes=12,
)
