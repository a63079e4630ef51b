"""Twenty rounds down the ladder: tickets of LeNet-300-100 and what else might do as well (Frankle and Carbin 2019).

Every seed draws its own first weights and order of digits. A ticket is trained from its first weights at every rung,
from 100 to 1.19 % of 266,200 weights. Beside it stand, with as many weights in each layer and the same digits in the
same order: the ticket's mask with weights drawn anew; its first weights under a mask drawn at random; and its first
weights under a mask that the dense net gives in one step, without the rounds between.

NOTE the early-stop step is that of the lowest validation loss, measured every 20 steps on 500 digits: from seed to
seed it varies by hundreds of steps, so one ratio of two of them says little. `early_stop_ratios` gives all.
NOTE the paper draws new weights three times a ticket, here once.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, UInt8
from safetensors.torch import load, load_file, save
from torch import Tensor

from effnlp_lessons import paths
from effnlp_lessons.pruning.lottery import (
    LAYERS,
    distances,
    find_tickets,
    lenet_300_100,
    magnitude_round,
    masks_after,
    overlap,
    overlap_by_chance,
    removal_rounds,
    shuffled,
)
from effnlp_lessons.pruning.lottery_training import Curve, TicketPlan, digit_splits, snapshot, train_masked
from effnlp_lessons.pruning.masks import Masks, keep_top, share_left
from effnlp_lessons.studies.runner import Outcome, Run, Study
from effnlp_lessons.training import write_atomically

TICKET, REDRAWN, SHUFFLED, ONE_SHOT = "ticket", "new weights", "random mask", "one shot"
KINDS = (TICKET, REDRAWN, SHUFFLED, ONE_SHOT)
FILE = "lottery_tickets.safetensors"
# of a curve: accuracies (per cent) after a tenth of the steps, at early stop and at the end; the step of early stop
MEASURES = ("tenth", "at early stop", "end", "early stop")


def measures(curve: Curve, steps: int) -> dict[str, float]:
    """The `MEASURES` of one training of so many steps: the tenth is the first measurement at or after it."""
    stop, tenth = curve.early_stop, next(i for i, step in enumerate(curve.step) if 10 * step >= steps)
    accuracy = [round(value, 2) for value in curve.accuracy]
    return {
        "tenth": accuracy[tenth],
        "at early stop": accuracy[stop],
        "end": accuracy[-1],
        "early stop": curve.step[stop],
    }


def control_seed(seed: int, number: int) -> int:
    """From which seed the controls of a round are drawn: the new weights, and the random mask."""
    return 1_000 * (seed + 1) + number


def one_shot(dense: Mapping[str, Tensor], masks: Masks) -> Masks:
    """The largest weights of the trained dense net, as many in each layer as `masks` keep."""
    rates = {name: 1 - int(mask.sum()) / mask.numel() for name, mask in masks.items()}
    return {name: keep_top(dense[name].abs(), rates[name]) for name in masks}


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Twenty rounds from one seed, with the controls at the rounds that `setting` names.

    `setting`: rounds, controls (a list of rounds), steps, every (steps between measurements).

    Numbers: for each of `KINDS` "rounds", and the `MEASURES`, one for each of these rounds; "left", per cent of the
    weights; "layers", per cent in each layer; "distance", `{layer: {"kept", "pruned"}}`, mean |theta - theta_0| of the
    weights trained in a round that its pruning keeps and removes. Files:
    the round of removal of every weight, and the right test digits at every measurement, by kind and round.
    """
    digits, plan = digit_splits(), TicketPlan(setting["steps"], every=setting["every"], seed=seed)
    model, other = lenet_300_100(seed), lenet_300_100(seed)
    start = snapshot(model)
    found: dict[str, Any] = {kind: {"rounds": [], **{name: [] for name in MEASURES}} for kind in KINDS}
    points = -(-plan.steps // plan.every)
    right = torch.full((len(KINDS), setting["rounds"] + 1, points), -1, dtype=torch.int16)
    masks, distance = [], {name: {"kept": [], "pruned": []} for name in LAYERS}

    def note(kind: str, number: int, curve: Curve) -> None:
        found[kind]["rounds"].append(number)
        for name, value in measures(curve, plan.steps).items():
            found[kind][name].append(value)
        counts = torch.tensor(curve.accuracy) / 100 * len(digits.test[1])
        right[KINDS.index(kind), number] = counts.round().to(torch.int16)

    def train(masks: Masks) -> tuple:
        return train_masked(model, masks, start, digits, plan)

    for ticket in find_tickets(model, train, setting["rounds"], magnitude_round):
        curve, end = ticket.result
        note(TICKET, ticket.round, curve)
        masks.append(ticket.masks)
        for name, parts in distances(start.weights, end.weights, ticket.masks, ticket.next_masks).items():
            for part, value in parts.items():
                distance[name][part].append(round(value, 5))
        if ticket.round == 0:
            dense = end.weights
        elif ticket.round in setting["controls"]:
            drawn = control_seed(seed, ticket.round)
            for kind, weights, mask in (
                (REDRAWN, snapshot(lenet_300_100(drawn)), ticket.masks),
                (SHUFFLED, start, shuffled(ticket.masks, drawn)),
                (ONE_SHOT, start, one_shot(dense, ticket.masks)),
            ):
                note(kind, ticket.round, train_masked(other, mask, weights, digits, plan)[0])
    numbers = found | {
        "left": [round(100 * share_left(m), 4) for m in masks],
        "layers": {name: [round(100 * share_left({name: m[name]}), 4) for m in masks] for name in LAYERS},
        "distance": distance,
    }
    stored = {f"removed.{name}": rounds for name, rounds in removal_rounds(masks).items()}
    return Outcome(numbers, {FILE: save(stored | {"right": right})})


def finish(runs: list[Run], artefacts: Path) -> dict[str, Any]:
    """Ship the rounds of removal of the first seed and the curves of all; add how far the masks of two seeds agree.

    "overlap": `{layer: the mean Jaccard index over the pairs of seeds, round by round}`; "by chance", what masks
    drawn at random would have. Only runs with as many rounds and steps as the first one count.
    """
    runs = sorted(runs, key=lambda run: run.seed)
    runs = [run for run in runs if run.setting == runs[0].setting]
    files, rounds = [load(run.outcome.files[FILE]) for run in runs], runs[0].setting["rounds"]
    removed = [{name: file[f"removed.{name}"] for name in LAYERS} for file in files]
    shares = {name: [n / 100 for n in runs[0].outcome.numbers["layers"][name]] for name in LAYERS}
    agree: dict[str, list[float]] = {name: [] for name in LAYERS}
    for number in range(rounds + 1):
        masks = [masks_after(one, number) for one in removed]
        pairs = [overlap(a, b) for a, b in combinations(masks, 2)]
        for name in LAYERS:
            agree[name].append(round(sum(pair[name] for pair in pairs) / len(pairs), 4) if pairs else 1.0)
    stored = {f"removed.{name}": rounds for name, rounds in removed[0].items()}
    content = save(stored | {"right": torch.stack([file["right"] for file in files])})
    write_atomically(artefacts / FILE, lambda path: path.write_bytes(content))
    return {
        "overlap": agree,
        "by chance": {name: [round(overlap_by_chance(p, p), 4) for p in shares[name]] for name in LAYERS},
        "shipped": {"seed": runs[0].seed, "seeds": [run.seed for run in runs], "bytes": len(content)},
    }


# --------------------------------------------------------------------------------------- reading what was recorded


def by_round(summary: dict[str, Any], kind: str, measure: str) -> dict[int, list[float]]:
    """{round: one value a seed} of one of `KINDS` and `MEASURES`.

    Raises:
        ValueError: a kind or a measure that is not recorded.
    """
    if kind not in KINDS or measure not in MEASURES:
        raise ValueError(f"kind must be one of {KINDS} and measure one of {MEASURES}, got {kind!r} and {measure!r}")
    found: dict[int, list[float]] = {}
    for run in summary["runs"]:
        for number, value in zip(run[kind]["rounds"], run[kind][measure], strict=True):
            found.setdefault(number, []).append(value)
    return found


def early_stop_ratios(summary: dict[str, Any], number: int, kind: str = TICKET, to: str = "dense") -> list[float]:
    """Early-stop step at a round over that of the dense net, or over that of another kind `to`; one ratio a seed."""
    steps = by_round(summary, kind, "early stop")[number]
    base = by_round(summary, TICKET, "early stop")[0] if to == "dense" else by_round(summary, to, "early stop")[number]
    return [a / b for a, b in zip(steps, base, strict=True)]


def load_tickets() -> tuple[dict[str, UInt8[Tensor, "d_out d_in"]], Int[Tensor, "seeds kinds rounds points"]]:
    """Of the recorded study: in which round each weight of the first seed was removed, and all curves.

    The first is as of `pruning.lottery.removal_rounds`; the second counts the right of 1,000 test digits at every
    measurement, in the order of `KINDS`, -1 where nothing was trained.

    Raises:
        FileNotFoundError: if the study was not recorded.
    """
    file = paths.checkpoints_dir() / FILE
    if not file.exists():
        raise FileNotFoundError(
            f"{file.name} is missing: record it with `python -m effnlp_lessons.studies lottery_tickets`"
        )
    stored = load_file(file)
    return {name: stored[f"removed.{name}"] for name in LAYERS}, stored["right"].int()


ROUNDS = 20
# a few seconds, for a notebook: nine rounds of a short training, and the controls where they end
LIVE = {"rounds": 9, "controls": [9], "steps": 200, "every": 20}
STUDY = Study(
    name="lottery_tickets",
    question="Do tickets train better than the same mask with new weights, or the same weights under another mask?",
    run=run,
    recorded=({"rounds": ROUNDS, "controls": list(range(1, ROUNDS + 1)), "steps": 1_400, "every": 20},),
    full=({"rounds": ROUNDS, "controls": list(range(1, ROUNDS + 1)), "steps": 14_000, "every": 100},),
    seeds=(0, 1, 2, 3, 4),
    minutes=10,
    finish=finish,
)
