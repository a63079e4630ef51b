"""The study of one-shot pruning: a small run against the functions that it uses, and what is recorded."""

import pytest
import torch

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.layers import block_linears, block_of_name
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.pruning.layerwise_obs import calibration_batches, prune_layerwise
from effnlp_lessons.pruning.masks import apply_masks_, share_left
from effnlp_lessons.studies import layerwise_obs
from effnlp_lessons.studies.layerwise_obs import ADJUSTED, CHOSEN, GLOBAL, KINDS, LOCAL, SEEN, WAYS
from effnlp_lessons.studies.runner import load_results

TINY = {"sentences": 6, "sparsities": ["70", "2:4"], "errors_at": None, "blocks": 1, "tested": 24}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher()


@pytest.fixture(scope="module")
def first_block(teacher):
    return tuple(name for name in block_linears(teacher) if block_of_name(name) == 0)


def test_sparsity_in_words():
    assert layerwise_obs.rate_of("60") == 0.6 and layerwise_obs.rate_of("2:4") == (2, 4)
    for word in ("half", "2:4:8", "2:x", ""):
        with pytest.raises(ValueError, match="sparsity must be per cent"):
            layerwise_obs.rate_of(word)


def test_masks_by_magnitude(teacher, first_block):
    whole = tuple(block_linears(teacher))
    local = layerwise_obs.magnitude_masks(teacher, LOCAL, 0.7, whole)
    over_all = layerwise_obs.magnitude_masks(teacher, GLOBAL, 0.7, whole)
    assert len(local) == len(over_all) == 36
    # one rounding for each of the 36 matrices, or one for all
    assert abs(share_left(local) - 0.3) < 36 / 10_616_832 and abs(share_left(over_all) - 0.3) < 1 / 10_616_832
    shares = [share_left({name: mask}) for name, mask in over_all.items()]
    assert max(shares) > min(shares) + 0.1
    pairs = layerwise_obs.magnitude_masks(teacher, LOCAL, (2, 4), first_block)
    assert all((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all() for mask in pairs.values()) and len(pairs) == 6
    for way, rate in ((GLOBAL, (2, 4)), (ADJUSTED, 0.5)):
        with pytest.raises(ValueError, match="no masks by"):
            layerwise_obs.magnitude_masks(teacher, way, rate, first_block)


def test_a_small_run_measures_what_it_says(teacher, first_block):
    numbers = layerwise_obs.run(TINY, seed=0).numbers
    again = layerwise_obs.run(TINY | {"sparsities": ["70"]}, seed=0).numbers["right"]
    assert again == {way: {"70": right["70"]} for way, right in numbers["right"].items()}
    assert list(numbers["right"]) == [ADJUSTED, CHOSEN, LOCAL, GLOBAL]
    assert set(numbers["right"][LOCAL]) == {"70", "2:4"} and set(numbers["right"][GLOBAL]) == {"70"}
    data = reviews.load_reviews()
    train, tested = ReviewExamples(data.subset("train")), ReviewExamples(data.subset("test"), 24)
    order = torch.randperm(len(train.lengths), generator=torch.Generator().manual_seed(0))
    seen = [train.token_ids[row] for row in order[0:12:2]]
    assert numbers["tokens"] == sum(map(len, seen))
    pruned, masks = prune_layerwise(teacher, calibration_batches(seen), 0.7, first_block)
    apply_masks_(teacher_of_its_own := load_teacher(), masks)
    with torch.autocast("cpu", torch.bfloat16):
        assert numbers["right"][ADJUSTED]["70"] == pytest.approx(accuracy(pruned, tested), abs=0.01)
        assert numbers["right"][CHOSEN]["70"] == pytest.approx(accuracy(teacher_of_its_own, tested), abs=0.01)
        assert numbers["teacher"] == pytest.approx(accuracy(teacher, tested), abs=0.01)


def test_what_has_no_randomness_is_measured_once():
    numbers = layerwise_obs.run(TINY | {"sparsities": ["50"], "tested": 8}, seed=1).numbers
    assert set(numbers["right"]) == {ADJUSTED, CHOSEN} and "teacher" not in numbers and "errors" not in numbers


def test_errors_of_the_layers_on_what_was_seen_and_on_what_was_not(teacher, first_block):
    train = ReviewExamples(reviews.load_reviews().subset("train"), 40).token_ids
    same = layerwise_obs.layer_errors(teacher, train[:20], train[:20], 0.6, first_block)
    assert same[ADJUSTED] == same[SEEN] and set(same) == {LOCAL, CHOSEN, ADJUSTED, SEEN}
    other = layerwise_obs.layer_errors(teacher, train[:20], train[20:], 0.6, first_block)
    assert other[SEEN] == same[SEEN]
    for kind in KINDS:
        assert 0 < same[ADJUSTED][kind][0] < min(same[CHOSEN][kind][0], same[LOCAL][kind][0]) < 1
        assert same[SEEN][kind][0] < other[ADJUSTED][kind][0]
    # 20 sentences are too few: they fit the query's weights to themselves
    assert other[ADJUSTED]["query"][0] > other[LOCAL]["query"][0]


def test_reading_a_summary():
    one = {"right": {LOCAL: {"50": 80.0}, ADJUSTED: {"50": 85.0}}, "errors": {ADJUSTED: {"query": [0.1, 0.3]}}}
    two = {"right": {ADJUSTED: {"50": 84.0}}, "errors": {ADJUSTED: {"query": [0.2, 0.2]}}}
    summary = {"runs": [one, two]}
    assert layerwise_obs.accuracies(summary, ADJUSTED) == {"50": [85.0, 84.0]}
    assert layerwise_obs.accuracies(summary, LOCAL) == {"50": [80.0]}
    assert layerwise_obs.accuracies(summary, GLOBAL) == {}
    assert layerwise_obs.mean_errors(summary)[ADJUSTED]["query"] == pytest.approx(0.2)
    assert layerwise_obs.mean_errors({"runs": [{"right": {}}]}) == {}
    with pytest.raises(ValueError, match="way must be one of"):
        layerwise_obs.accuracies(summary, SEEN)


# ------------------------------------------------------------------------------------------------- recorded


def test_everything_was_recorded():
    summary = load_results("layerwise_obs")
    for way in WAYS:
        found = layerwise_obs.accuracies(summary, way)
        assert {"50", "60", "70"} <= set(found) and ("2:4" in found) == (way != GLOBAL)
        assert all(len(right) == (3 if way in (CHOSEN, ADJUSTED) else 1) for right in found.values())


def test_adjusting_what_stays_is_worth_more_than_the_choice_alone_on_every_sample():
    summary = load_results("layerwise_obs")
    adjusted, chosen, local = (layerwise_obs.accuracies(summary, way) for way in (ADJUSTED, CHOSEN, LOCAL))
    for sparsity in ("70", "2:4"):
        assert min(adjusted[sparsity]) > local[sparsity][0]
        assert all(a > c for a, c in zip(adjusted[sparsity], chosen[sparsity], strict=True))


def test_recorded_errors_of_the_layers():
    errors = layerwise_obs.mean_errors(load_results("layerwise_obs"))
    for kind in KINDS:
        assert errors[SEEN][kind] < errors[ADJUSTED][kind] < errors[CHOSEN][kind] < errors[LOCAL][kind]
