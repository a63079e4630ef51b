"""The study of movement pruning: a small run against the functions that it uses, and what is recorded."""

import pytest
import torch
from safetensors.torch import load, load_file

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.distillation.hinton import label_objective
from effnlp_lessons.layers import block_linears
from effnlp_lessons.pruning.masks import share_left
from effnlp_lessons.pruning.movement import movement_layers, movement_masks, prepare_movement, to_dense, train_movement
from effnlp_lessons.studies import movement
from effnlp_lessons.studies.movement import DENSE, HARD, LEVELS, MAGNITUDE, METHODS, SHOWN, SOFT
from effnlp_lessons.studies.runner import Run, load_results
from effnlp_lessons.studies.transfer_set import Rows, labelled_rows
from effnlp_lessons.training import TrainingPlan

TINY = movement.COMMON | {"labels": 96, "epochs": 1, "tested": 60}


def test_a_small_run_measures_what_it_says():
    outcome = movement.run(TINY | {"methods": [HARD], "levels": [15]}, seed=2)
    data = reviews.load_reviews()
    train = ReviewExamples(data.subset("train"))
    model = prepare_movement(movement.pretrained_classifier(2), "hard")
    assert tuple(movement_layers(model)) == block_linears(movement.pretrained_classifier(2))
    assert not any(p.requires_grad for p in model.encoder.embeddings.parameters())
    rows = Rows(train, labelled_rows(96, 2, len(train.lengths)))
    plan = movement.pruning_plan(TINY, HARD, 15)
    train_movement(model, rows, label_objective, TrainingPlan(1, 32, 2e-4, bfloat16=True, seed=2), plan)
    with torch.autocast("cpu", torch.bfloat16):
        right = accuracy(to_dense(model), ReviewExamples(data.subset("test"), 60))
    left = 100 * share_left(movement_masks(model))
    assert outcome.numbers["models"] == [
        {"method": HARD, "level": 15, "left": round(left, 3), "right": round(right, 2)}
    ] and left == pytest.approx(15, abs=0.01)
    # the sample is of this model
    sample, layer = load(outcome.files[movement.FILE]), movement_layers(model)[SHOWN["attention, query"]]
    chosen = torch.randperm(layer.weight.numel(), generator=torch.Generator().manual_seed(0))[: movement.SAMPLE]
    for kind, whole in (("weight", layer.weight.half()), ("score", layer.score.half()), ("mask", layer.mask())):
        assert torch.equal(sample[f"{HARD}/15/attention, query/{kind}"], whole.flatten()[chosen])
    before = movement.pretrained_classifier(2).get_submodule(SHOWN["attention, query"]).weight
    assert torch.equal(sample["before/attention, query/weight"], before.flatten()[chosen].half())


def test_each_method_and_the_dense_model(tmp_path):
    setting = TINY | {"methods": [DENSE], "levels": [100]}
    dense = movement.run(setting, seed=0)
    assert dense.numbers["models"][0]["left"] == 100
    distilled = movement.run(setting | {"distilled": True}, seed=0)
    assert set(load(dense.files[movement.FILE])) == {
        f"before/{title}/{kind}" for title in SHOWN for kind in ("weight", "mask")
    }
    soft = movement.run(TINY | {"methods": [MAGNITUDE, SOFT], "levels": [3]}, seed=0)
    left = {model["method"]: model["left"] for model in soft.numbers["models"]}
    assert left[MAGNITUDE] == pytest.approx(3, abs=0.01) and 0.5 <= left[SOFT] <= 100  # measured, not nominal
    runs = [Run(setting, 0, 1.0, dense), Run(setting | {"distilled": True}, 0, 1.0, distilled), Run(TINY, 0, 1.0, soft)]
    assert movement.finish(runs, tmp_path)["shipped"]["seed"] == 0
    shipped = load_file(tmp_path / movement.FILE)
    assert set(shipped) == set(load(dense.files[movement.FILE])) | set(load(soft.files[movement.FILE]))


def test_methods_at_a_share_kept_and_at_a_penalty():
    for level in LEVELS:
        assert movement.pruning_plan(TINY, MAGNITUDE, level).final == movement.pruning_plan(TINY, HARD, level).final
        assert movement.pruning_plan(TINY, HARD, level).final == level / 100
    penalties = [movement.pruning_plan(TINY, SOFT, level).penalty for level in LEVELS]
    assert penalties == sorted(penalties) and movement.pruning_plan(TINY, SOFT, 3).final == 0.1


def test_results_by_model():
    setting = {"distilled": False}
    runs = [
        {"setting": setting, "seed": 1, "models": [{"method": HARD, "level": 3, "left": 3.0, "right": 70.0}]},
        {"setting": setting, "seed": 0, "models": [{"method": HARD, "level": 3, "left": 3.1, "right": 71.0}]},
        {
            "setting": {"distilled": True},
            "seed": 0,
            "models": [{"method": HARD, "level": 3, "left": 3.2, "right": 72.0}],
        },
    ]
    assert movement.by_model({"runs": runs}) == {(HARD, 3): {"left": [3.1, 3.0], "right": [71.0, 70.0]}}
    assert movement.by_model({"runs": runs}, True) == {(HARD, 3): {"left": [3.2], "right": [72.0]}}


# ---------------------------------------------------------------------------------------------- recorded


@pytest.fixture(scope="module")
def recorded():
    return movement.by_model(load_results("movement"))


def test_every_method_stands_at_every_level_and_the_share_is_measured(recorded):
    assert set(recorded) == {(DENSE, 100)} | {(method, level) for method in METHODS for level in LEVELS}
    for (method, level), entry in recorded.items():
        assert len(entry["right"]) == 3
        if method != SOFT:
            assert entry["left"] == pytest.approx([level] * len(entry["left"]), abs=0.01)


def test_at_three_per_cent_movement_beats_magnitude_on_every_seed(recorded):
    magnitude, hard = (recorded[method, 3]["right"] for method in (MAGNITUDE, HARD))
    assert all(h > m + 1 for h, m in zip(hard, magnitude, strict=True))
    # and both are below the dense model
    assert all(h < d for h, d in zip(hard, recorded[DENSE, 100]["right"], strict=True))


def test_the_shipped_weights_are_those_of_the_recorded_methods():
    shipped = movement.shipped()
    for title in SHOWN:
        before = shipped[f"before/{title}/weight"]
        assert before.shape == (movement.SAMPLE,)
        for method in METHODS:
            for level in LEVELS:
                mask = shipped[f"{method}/{level}/{title}/mask"]
                if method != SOFT:  # a sample of a matrix of which exactly this share stays: four standard errors
                    share, error = level / 100, (level / 100 * (1 - level / 100) / movement.SAMPLE) ** 0.5
                    assert mask.double().mean().item() == pytest.approx(share, abs=4 * error)
                assert (shipped[f"{method}/{level}/{title}/weight"] != before).double().mean() > 0.5
