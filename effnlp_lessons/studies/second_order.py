"""Which weights can go? Magnitude, Optimal Brain Damage and Optimal Brain Surgeon on their own problems and on digits.

XOR: 2-2-1 networks of 9 weights, biases counted, from many starts: trained to a minimum with a small weight decay, or
without and stopped as soon as E is below a limit. Each method deletes one weight, and beside it all nine are tried in
turn: which could have gone? Then all are deleted one after the other.
MONK's problems: 17-h-1 networks, one weight at a time. Digits: 49-20-10 networks on images of 7x7, the mean of 4x4
pixels; several weights a round. Each method with and without retraining after every round.

Hassibi and Stork report that for XOR only their method deletes the right weight, and in every case. One network shows
little: `first_deletions` counts over many starts, how often each method takes a weight that can go, and what is left of
the answers before any retraining. And "only": magnitude mostly takes such a weight too.

NOTE the control "OBS, others as they were" deletes what OBS deletes and adjusts nothing: what is the choice worth, and
what the adjustment?
NOTE networks are trained, and retrained, with a small weight decay, and alpha of OBS is the same number: alpha I is the
second derivative of the decay. Without decay (XOR stopped early) alpha is a choice. Second derivatives are computed
anew before every round, with or without retraining.
NOTE the decay brings many starts of XOR to the same few minima, up to exchanged units and signs: so many networks are
not so many cases. Stopped early they all differ.
NOTE of the digits, the second derivatives for OBS are taken on 400 of the 4,000 training images, drawn with the seed:
4,000 rows X for 1,210 weights. OBD uses all images.
NOTE a seed draws the start, and in MONK's problems the training cases too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from effnlp_lessons.datasets.digits import load_digits
from effnlp_lessons.pruning.logic_problems import (
    Patterns,
    attributes_left,
    every_mask,
    monk_all,
    monk_training,
    share_right,
    sigmoid_network,
    squared_error,
    train_to_minimum_,
    train_until_,
    xor,
)
from effnlp_lessons.pruning.masks import Masks, apply_masks_
from effnlp_lessons.pruning.obd import Step, damage_, delete_lowest_, in_rounds
from effnlp_lessons.pruning.obs import inverse_hessian, inverted_hessian, surgery_
from effnlp_lessons.studies.runner import Outcome, Study

MAGNITUDE, OBD, OBD_LM = "magnitude", "OBD", "OBD, Levenberg-Marquardt"
OBS, OBS_CHOICE = "OBS", "OBS, others as they were"
METHODS = (MAGNITUDE, OBD, OBD_LM, OBS, OBS_CHOICE)
XOR, XOR_EARLY = "xor at a minimum", "xor stopped early"
RETRAINED = " + retraining"  # what is added to a method's name
ALPHAS = (1e-8, 1e-6, 1e-4, 1e-2, 1.0)  # the paper's range, and beyond
SOLVED = 5e-3  # a squared error of XOR below this counts as solved: 0.07 a pattern


def step_of(method: str, network: nn.Sequential, train: Patterns, alpha: float, rows: int | None = None) -> Step:
    """(masks, count) -> (masks, predicted rise of E): deletes by this method in `network`, in place.

    Args:
        rows: how many patterns, from the first, OBS takes its gradients on; None: all.

    Raises:
        ValueError: a method that is not in `METHODS`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    inputs, targets = train.inputs, train.targets

    def by_magnitude(masks: Masks, count: int) -> tuple[Masks, float]:
        sizes = {name: p.detach().abs() for name, p in network.named_parameters() if name in masks}
        return delete_lowest_(network, sizes, masks, count), float("nan")

    def by_surgery(masks: Masks, count: int) -> tuple[Masks, float]:
        before = copy.deepcopy(network.state_dict())
        some = inputs[:rows]
        many = len(some) * targets.shape[1] > sum(int(mask.sum()) for mask in masks.values())
        new, predicted = surgery_(network, some, masks, count, alpha, inverted_hessian if many else inverse_hessian)
        if method == OBS_CHOICE:
            network.load_state_dict(before)
            apply_masks_(network, new)
        return new, 2 * predicted  # E is twice the error of the paper

    if method == MAGNITUDE:
        return by_magnitude
    if method in (OBD, OBD_LM):
        return lambda masks, count: damage_(network, inputs, targets, masks, count, method == OBD_LM)
    return by_surgery


def rounds_down(weights: int, share: float, fewest: int) -> list[int]:
    """How many weights to delete in each round: `share` of those left, at least one, until `fewest` are left."""
    counts = []
    while weights > fewest:
        counts.append(min(max(1, round(share * weights)), weights - fewest))
        weights -= counts[-1]
    return counts


def significant(number: float) -> float:
    """Four digits of it."""
    return float(f"{number:.4g}")


def pruned(
    trained: nn.Sequential, method: str, retrain: bool, train: Patterns, counts: list[int], setting: dict[str, Any]
) -> Iterator[tuple[nn.Sequential, Masks, float]]:
    """A copy of a trained network after every round, with its masks and the predicted rise of E."""
    network = copy.deepcopy(trained)
    step = step_of(method, network, train, setting["alpha"], setting.get("rows"))
    again = partial(train_to_minimum_, network, train, weight_decay=setting["decay"], iterations=setting["retraining"])
    for masks, predicted in in_rounds(step, every_mask(network), counts, again if retrain else None):
        yield network, masks, predicted


# -------------------------------------------------------------------------------------------------- XOR


def first_deletion(trained: nn.Sequential, patterns: Patterns, setting: dict[str, Any]) -> dict[str, Any]:
    """What each method deletes first, and every weight tried in turn.

    "first": {method: {"weight": its number, biases too, in the order of the parameters; "predicted": rise of E;
    "error": E afterwards, "right": per cent of the four patterns; "retrained": E after retraining}}. "tried": E after
    setting weight 0, 1, ... to 0 and retraining. "alphas": {alpha: {"weight", "error"}}, what OBS deletes with another
    alpha. Four gradients see four directions of nine; in the others alpha decides.
    """
    first: dict[str, Any] = {}
    for method in METHODS:
        network, masks, predicted = next(pruned(trained, method, False, patterns, [1], setting))
        gone = ~torch.cat([masks[name].flatten() for name, _ in network.named_parameters()])
        error, right = squared_error(network, patterns).item(), share_right(network, patterns)
        retrained = train_to_minimum_(network, patterns, masks, setting["decay"], setting["retraining"])
        first[method] = {
            "weight": int(gone.nonzero().item()),
            "predicted": None if method == MAGNITUDE else significant(predicted),
            "error": significant(error),
            "right": right,
            "retrained": significant(retrained),
        }
    tried = []
    for name, mask in every_mask(trained).items():
        for place in range(mask.numel()):
            network, masks = copy.deepcopy(trained), every_mask(trained)
            masks[name].view(-1)[place] = False
            error = train_to_minimum_(network, patterns, masks, setting["decay"], setting["retraining"])
            tried.append(significant(error))
    alphas = {}
    for alpha in ALPHAS:
        network, masks, _ = next(pruned(trained, OBS, False, patterns, [1], setting | {"alpha": alpha}))
        gone = ~torch.cat([masks[name].flatten() for name, _ in network.named_parameters()])
        error = significant(squared_error(network, patterns).item())
        alphas[f"{alpha:g}"] = {"weight": int(gone.nonzero().item()), "error": error}
    return {"first": first, "tried": tried, "alphas": alphas}


def run_xor(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers: "nets", a list: "start" (its seed), "error" before, and if that is below `SOLVED` "first", "tried" and
    "alphas" (see `first_deletion`) and "curves", `{method, with or without retraining: E with 8, 7, ... 1 weights}`.
    """
    patterns, nets = xor(*setting["targets"]), []
    for start in range(seed * setting["nets"], (seed + 1) * setting["nets"]):
        network = sigmoid_network((2, 2, 1), start)
        if "stop" in setting:
            error = train_until_(network, patterns, setting["stop"])
        else:
            error = train_to_minimum_(network, patterns, weight_decay=setting["decay"])
        net: dict[str, Any] = {"start": start, "error": significant(error)}
        if error < SOLVED:
            net |= first_deletion(network, patterns, setting)
            net["curves"] = (
                {}
                if setting.get("first only")
                else {
                    method + RETRAINED * retrain: [
                        significant(squared_error(now, patterns).item())
                        for now, _, _ in pruned(network, method, retrain, patterns, [1] * 8, setting)
                    ]
                    for method in METHODS
                    for retrain in (False, True)
                }
            )
        nets.append(net)
    return Outcome({"nets": nets})


# --------------------------------------------------------------------------------- MONK's problems, digits


def small_digits(seed: int) -> tuple[Patterns, Patterns]:
    """4,000 and 1,000 digits of 7x7 inputs from 0 to 1, the training digits in the order of the seed."""

    def patterns(split: str) -> Patterns:
        digits = load_digits().subset(split)
        pooled = F.avg_pool2d(digits.images[:, None].double() / 255, 4).flatten(1)
        return Patterns(pooled, F.one_hot(digits.labels, 10).double())

    train, test = patterns("train"), patterns("test")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Patterns(train.inputs[order], train.targets[order]), test


def data_of(problem: str, seed: int) -> tuple[Patterns, Patterns]:
    """Training and test patterns of "monk 1", "monk 2", "monk 3" or "digits"."""
    if problem == "digits":
        return small_digits(seed)
    number = int(problem.removeprefix("monk "))
    return monk_training(number, seed), monk_all(number)


def run_curves(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers: "left", the number of weights before the first round and after each; "curves", `{method, with or without
    retraining: {"error", "train", "test": E and per cent right, one entry for each of "left"}}`, and for MONK's
    problems "attributes", which of a1 .. a6 still reach the output (125 for a1, a2, a5; 0 for none).
    """
    train, test = data_of(setting["problem"], seed)
    network = sigmoid_network((train.inputs.shape[1], setting["hidden"], train.targets.shape[1]), seed)
    train_to_minimum_(network, train, weight_decay=setting["decay"], iterations=setting["training"])
    weights = sum(p.numel() for p in network.parameters())
    counts = rounds_down(weights, setting["share"], setting["fewest"])

    def look(now: nn.Sequential, masks: Masks) -> dict[str, Any]:
        found = {"error": significant(squared_error(now, train).item())}
        found |= {"train": round(share_right(now, train), 1), "test": round(share_right(now, test), 1)}
        if setting["problem"] != "digits":
            found["attributes"] = int("".join(map(str, attributes_left(masks))) or 0)
        return found

    curves = {}
    for method in METHODS:
        for retrain in (False, True):
            seen = [look(network, every_mask(network))]
            seen += [look(now, masks) for now, masks, _ in pruned(network, method, retrain, train, counts, setting)]
            curves[method + RETRAINED * retrain] = {key: [entry[key] for entry in seen] for key in seen[0]}
    left = [weights - sum(counts[:done]) for done in range(len(counts) + 1)]
    return Outcome({"left": left, "curves": curves})


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """One seed of one problem; numbers as `run_xor` or `run_curves` gives them."""
    return run_xor(setting, seed) if setting["problem"] in (XOR, XOR_EARLY) else run_curves(setting, seed)


# -------------------------------------------------------------------------------- reading a recorded summary


def _runs(summary: dict[str, Any], problem: str) -> list[dict[str, Any]]:
    runs = [run for run in summary["runs"] if run["setting"]["problem"] == problem]
    if not runs:
        known = sorted({run["setting"]["problem"] for run in summary["runs"]})
        raise ValueError(f"problem must be one of {', '.join(known)}, got {problem!r}")
    return runs


def converged(summary: dict[str, Any], problem: str = XOR) -> list[dict[str, Any]]:
    """The networks of a recorded XOR problem that learned it, all seeds together (entries of `run_xor`'s "nets")."""
    return [net for run in _runs(summary, problem) for net in run["nets"] if "first" in net]


def first_deletions(nets: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{method: counts of networks, and the mean of E}, for the first weight that each method deletes from XOR.

    "right weight": one that can go, for E comes below `SOLVED` when the network is retrained without it; "solved": E is
    below `SOLVED` at once; "four right": every output is on its side of 1/2 at once; "retrained": solved after
    retraining from where the method left the weights; "mean error": E at once.
    """
    table = {}
    for method in METHODS:
        first = [net["first"][method] for net in nets]
        table[method] = {
            "networks": len(nets),
            "right weight": sum(net["tried"][entry["weight"]] < SOLVED for net, entry in zip(nets, first, strict=True)),
            "solved": sum(entry["error"] < SOLVED for entry in first),
            "four right": sum(entry["right"] == 100 for entry in first),
            "retrained": sum(entry["retrained"] < SOLVED for entry in first),
            "mean error": sum(entry["error"] for entry in first) / len(first),
        }
    return table


def choices_by_alpha(nets: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{alpha: "right weight": networks of which OBS deletes a weight that can go; "mean error": E at once}."""
    table = {}
    for alpha in nets[0]["alphas"]:
        found = [net["alphas"][alpha] for net in nets]
        right = sum(net["tried"][entry["weight"]] < SOLVED for net, entry in zip(nets, found, strict=True))
        table[alpha] = {"right weight": right, "mean error": sum(entry["error"] for entry in found) / len(found)}
    return table


def curves_of(summary: dict[str, Any], problem: str, variant: str, key: str) -> tuple[list[int], list[list[float]]]:
    """Weights left, and for each seed "error", "train", "test" or "attributes" there; `variant` is a method, or
    a method + `RETRAINED`."""
    runs = _runs(summary, problem)
    return runs[0]["left"], [run["curves"][variant][key] for run in runs]


def fewest_weights(
    summary: dict[str, Any], problem: str, variant: str, key: str = "train", tolerance: float = 0.0
) -> list[int]:
    """For each seed the smallest network of a curve that is no more than `tolerance` points worse than the whole one.

    NOTE chosen with a look at the whole curve: with key "test" it is not what somebody without test cases would find.
    """
    left, values = curves_of(summary, problem, variant, key)
    return [min(n for n, v in zip(left, row, strict=True) if v >= row[0] - tolerance) for row in values]


AT_A_MINIMUM = {"problem": XOR, "targets": [0, 1], "decay": 1e-5, "alpha": 1e-5, "retraining": 200}
STOPPED_EARLY = AT_A_MINIMUM | {"problem": XOR_EARLY, "decay": 0.0, "alpha": 1e-4, "stop": 1e-3}
MONK = {"decay": 1e-4, "alpha": 1e-4, "training": 1000, "retraining": 100, "share": 0.0, "fewest": 1}
DIGITS = {"problem": "digits", "hidden": 20, "decay": 1e-5, "alpha": 1e-5, "training": 400, "retraining": 20}
# a few seconds, for a notebook
LIVE = AT_A_MINIMUM | {"nets": 4, "first only": True}
STUDY = Study(
    name="second_order",
    question="Which weights can go: what do second derivatives know that magnitudes do not?",
    run=run,
    recorded=(
        AT_A_MINIMUM | {"nets": 15},
        STOPPED_EARLY | {"nets": 15},
        MONK | {"problem": "monk 1", "hidden": 3},
        MONK | {"problem": "monk 2", "hidden": 2},
        MONK | {"problem": "monk 3", "hidden": 2},
        DIGITS | {"share": 0.1, "fewest": 60, "rows": 400},
    ),
    full=(
        AT_A_MINIMUM | {"nets": 100},
        STOPPED_EARLY | {"nets": 100},
        MONK | {"problem": "monk 1", "hidden": 5},
        MONK | {"problem": "monk 2", "hidden": 5},
        MONK | {"problem": "monk 3", "hidden": 5},
        DIGITS | {"share": 0.02, "fewest": 20, "rows": 1000},
    ),
    seeds=(0, 1, 2, 3, 4),
    minutes=8,
)
