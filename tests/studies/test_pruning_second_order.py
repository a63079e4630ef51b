"""The study of second-order pruning: a small run against the functions that it uses, and what is recorded."""

import copy

import pytest
import torch

from effnlp_lessons.pruning.logic_problems import (
    every_mask,
    monk_training,
    share_right,
    sigmoid_network,
    squared_error,
    train_to_minimum_,
    xor,
)
from effnlp_lessons.pruning.obs import surgery_
from effnlp_lessons.studies import second_order as study
from effnlp_lessons.studies.runner import load_results

SHORT = study.MONK | {"problem": "monk 1", "hidden": 3, "training": 200, "retraining": 10, "share": 0.3, "fewest": 5}


@pytest.fixture(scope="module")
def monk():
    return study.run(SHORT, seed=0).numbers


@pytest.fixture(scope="module")
def few():
    return study.run(study.AT_A_MINIMUM | {"nets": 2}, seed=0).numbers["nets"]


@pytest.mark.parametrize(
    ("weights", "share", "fewest", "left"),
    [(9, 0.0, 1, [8, 7, 6, 5, 4, 3, 2, 1]), (20, 0.5, 3, [10, 5, 3]), (5, 1.0, 5, []), (2, 0.1, 0, [1, 0])],
)
def test_rounds(weights, share, fewest, left):
    counts = study.rounds_down(weights, share, fewest)
    assert [weights - sum(counts[: i + 1]) for i in range(len(counts))] == left


def test_a_method_that_is_none():
    with pytest.raises(ValueError, match="method must be one of"):
        study.step_of("random", sigmoid_network((2, 1), 0), xor(), 1e-4)


@pytest.mark.parametrize("method", study.METHODS)
def test_a_step_deletes_that_many_and_only_obs_adjusts(method):
    network, train = sigmoid_network((17, 3, 1), 0), monk_training(1, 0)
    before = copy.deepcopy(network.state_dict())
    masks, _ = study.step_of(method, network, train, 1e-4)(every_mask(network), 11)
    assert sum(int((~mask).sum()) for mask in masks.values()) == 11
    moved = {name: (p != before[name]) & masks[name] for name, p in network.named_parameters()}
    assert any(changed.any() for changed in moved.values()) == (method == study.OBS)
    for name, p in network.named_parameters():
        assert (p[~masks[name]] == 0).all()
        if method == study.MAGNITUDE:
            largest = torch.cat([before[n][~masks[n]].abs() for n in masks]).max()
            assert (before[name][masks[name]].abs() >= largest).all()


def test_a_run_of_curves_measures_what_it_says(monk):
    assert monk["left"] == [58, 41, 29, 20, 14, 10, 7, 5]
    assert set(monk["curves"]) == {m + r for m in study.METHODS for r in ("", study.RETRAINED)}
    network, train = sigmoid_network((17, 3, 1), 0), monk_training(1, 0)
    train_to_minimum_(network, train, weight_decay=1e-4, iterations=200)
    masks, errors, right = every_mask(network), [], []
    for count in (0, 17, 12):
        masks, _ = surgery_(network, train.inputs, masks, count)
        errors.append(squared_error(network, train).item())
        right.append(round(share_right(network, train), 1))
    curve = monk["curves"][study.OBS]
    assert curve["error"][:3] == pytest.approx(errors, rel=1e-3) and curve["train"][:3] == right
    for curve in monk["curves"].values():  # every curve begins with the whole network
        assert {key: values[0] for key, values in curve.items()} == {
            key: values[0] for key, values in monk["curves"][study.OBS].items()
        }
        assert all(len(values) == 8 for values in curve.values()) and curve["attributes"][0] == 123456


def test_a_run_of_xor_tries_every_weight(few):
    assert [net["start"] for net in few] == [0, 1]
    for net in few:
        assert net["error"] < study.SOLVED and len(net["tried"]) == 9
        assert all(len(curve) == 8 for curve in net["curves"].values()) and len(net["curves"]) == 10
        for method, entry in net["first"].items():
            assert net["curves"][method][0] == entry["error"]
            if method != study.OBS:  # retraining begins where the trial of that weight began
                assert entry["retrained"] == pytest.approx(net["tried"][entry["weight"]], rel=1e-2)
        assert net["first"][study.OBS]["weight"] == net["first"][study.OBS_CHOICE]["weight"]


def test_counting_first_deletions(few):
    table = study.first_deletions(few)
    for method in study.METHODS:
        entries = [net["first"][method] for net in few]
        assert table[method]["networks"] == 2
        assert table[method]["four right"] == [entry["right"] for entry in entries].count(100.0)
        assert table[method]["mean error"] == pytest.approx((entries[0]["error"] + entries[1]["error"]) / 2)


def test_counting_by_alpha(few):
    table = study.choices_by_alpha(few)
    assert list(table) == ["1e-08", "1e-06", "0.0001", "0.01", "1"]
    for alpha, row in table.items():
        found = [net["alphas"][alpha] for net in few]
        assert row["mean error"] == pytest.approx((found[0]["error"] + found[1]["error"]) / 2)
        assert 0 <= row["right weight"] <= 2


def test_reading_a_summary(monk):
    summary = {"runs": [{"setting": SHORT, "seed": 0} | monk]}
    left, (values,) = study.curves_of(summary, "monk 1", study.OBS, "train")
    (fewest,) = study.fewest_weights(summary, "monk 1", study.OBS)
    assert values[left.index(fewest)] >= values[0]
    assert all(value < values[0] for n, value in zip(left, values, strict=True) if n < fewest)
    with pytest.raises(ValueError, match="problem must be one of monk 1, got 'digits'"):
        study.curves_of(summary, "digits", study.OBS, "train")


def test_a_run_can_be_repeated(monk):
    assert study.run(SHORT, seed=0).numbers == monk


def test_small_digits():
    train, test = study.small_digits(0)
    assert train.inputs.shape == (4000, 49) and test.targets.shape == (1000, 10)
    assert (train.targets.sum(1) == 1).all() and train.inputs.min() >= 0 and train.inputs.max() <= 1
    other, _ = study.small_digits(1)
    assert not torch.equal(train.inputs, other.inputs) and torch.equal(
        train.inputs.sort(0).values, other.inputs.sort(0).values
    )


# ------------------------------------------------------------------------------------------------- recorded


@pytest.fixture(scope="module")
def recorded():
    return load_results("second_order")


@pytest.mark.parametrize("problem", [study.XOR, study.XOR_EARLY])
def test_of_xor_obs_always_deletes_a_right_weight_and_magnitude_mostly_does(recorded, problem):
    nets = study.converged(recorded, problem)
    found = study.first_deletions(nets)
    assert len(nets) >= 20
    assert found[study.OBS]["right weight"] == found[study.OBS]["four right"] == len(nets)
    assert found[study.MAGNITUDE]["right weight"] > 0.8 * len(nets)  # so "only OBS" is not found
    assert found[study.OBD]["right weight"] < found[study.MAGNITUDE]["right weight"]
    # the choice alone is not what keeps the answers right
    assert found[study.OBS_CHOICE]["four right"] < 0.5 * len(nets)


@pytest.mark.parametrize("problem", ["monk 1", "monk 2", "digits"])
def test_without_retraining_the_update_saves_weights_and_with_it_the_methods_come_close(recorded, problem):
    tolerance = 1.0 if problem == "digits" else 0.0

    def middle(variant):
        fewest = sorted(study.fewest_weights(recorded, problem, variant, "train", tolerance))
        assert len(fewest) >= 5
        return fewest[len(fewest) // 2]

    assert middle(study.OBS) < 0.8 * min(middle(study.MAGNITUDE), middle(study.OBS_CHOICE))
    gap = middle(study.MAGNITUDE) - middle(study.OBS)
    assert abs(middle(study.MAGNITUDE + study.RETRAINED) - middle(study.OBS + study.RETRAINED)) < 0.5 * gap
