"""The study of quantization-aware training: a small run against the functions that it uses, and what is recorded."""

import pytest
import torch

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.layers import block_linears
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.quantization.lsq import LsqLinear
from effnlp_lessons.quantization.post_training import quantize_linears
from effnlp_lessons.quantization.qat import FakeQuantizedLinear
from effnlp_lessons.studies import qat_by_bits
from effnlp_lessons.studies.runner import load_results

TINY = {"sentences": 32, "epochs": 1, "learning_rate": 1e-4, "tested": 60}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher()


@pytest.mark.parametrize(
    ("way", "kind", "learned"),
    [
        (qat_by_bits.FAKE, FakeQuantizedLinear, None),
        (qat_by_bits.LEARNED, LsqLinear, True),
        (qat_by_bits.FIXED, LsqLinear, False),
    ],
)
def test_each_way_wraps_the_36_layers_of_the_blocks(teacher, way, kind, learned):
    model = qat_by_bits.prepared(teacher, way, 2)
    found = {name: part for name, part in model.named_modules() if isinstance(part, kind)}
    assert tuple(found) == block_linears(teacher) and len(found) == 36
    if learned is not None:
        assert all(part.step.requires_grad == learned for part in found.values())
        # a step size a row, as the fake-quantized weights have
        assert all(part.step.shape == (part.out_features,) for part in found.values())


def test_a_way_that_is_none(teacher):
    with pytest.raises(ValueError, match="way must be one of"):
        qat_by_bits.prepared(teacher, qat_by_bits.FLOAT, 4)


def test_a_small_run_measures_what_it_says(teacher):
    setting = TINY | {"way": qat_by_bits.FLOAT, "bits": [3], "epochs": 0}
    right = qat_by_bits.run(setting, seed=0).numbers["right"]
    assert set(right) == {"float", "3", f"3, {qat_by_bits.CLIPPED}"}
    test = ReviewExamples(reviews.load_reviews().subset("test"), 60)
    with torch.autocast("cpu", torch.bfloat16):
        assert right["float"] == pytest.approx(accuracy(teacher, test), abs=0.01)
        assert right["3"] == pytest.approx(accuracy(quantize_linears(teacher, 3, "row"), test), abs=0.01)
    # untrained, fake quantization is post-training quantization
    fake = qat_by_bits.run(TINY | {"way": qat_by_bits.FAKE, "bits": [3], "epochs": 0}, seed=0).numbers["right"]
    assert fake == {"3": right["3"]}


def test_a_run_can_be_repeated():
    setting = TINY | {"way": qat_by_bits.LEARNED, "bits": [2]}
    numbers = qat_by_bits.run(setting, seed=1).numbers
    assert numbers == qat_by_bits.run(setting, seed=1).numbers and set(numbers["right"]) == {"2"}


def recorded(way, bits, trained=True):
    """{seed: the best per cent of the test sentences right}, over the recorded learning rates."""
    best = {}
    for run in load_results("qat_by_bits")["runs"]:
        setting = run["setting"]
        if setting["way"] == way and (setting["epochs"] > 0) == trained and bits in run["right"]:
            best[run["seed"]] = max(best.get(run["seed"], 0.0), run["right"][bits])
    assert set(best) >= {0, 1, 2}
    return best


def test_training_through_the_grid_brings_more_than_training_on_every_seed():
    for bits, gain in (("3", 2), ("2", 15)):
        fake, control = recorded(qat_by_bits.FAKE, bits), recorded(qat_by_bits.FLOAT, bits)
        before = recorded(qat_by_bits.FLOAT, bits, trained=False)
        for seed in fake:
            assert fake[seed] > control[seed] + gain and fake[seed] > before[seed] + 5


def test_at_four_bits_there_is_nothing_to_gain():
    fake, before = recorded(qat_by_bits.FAKE, "4"), recorded(qat_by_bits.FLOAT, "4", trained=False)
    assert all(abs(fake[seed] - before[seed]) < 1 for seed in fake)


def test_at_two_bits_the_range_matters_more_than_learning_it():
    fake, first = recorded(qat_by_bits.FAKE, "2"), recorded(qat_by_bits.FIXED, "2", trained=False)
    learned, fixed = recorded(qat_by_bits.LEARNED, "2"), recorded(qat_by_bits.FIXED, "2")
    for seed in fake:
        # LSQ's steps before any training do no worse than minimum and maximum after it; trained, far better
        assert first[seed] > fake[seed] and fixed[seed] > fake[seed] + 5
        assert learned[seed] > first[seed] + 4
    # what learning the steps adds is not told apart from nothing
    assert abs(sum(learned.values()) - sum(fixed.values())) / len(fixed) < 1


def test_clipping_helps_at_two_bits_without_any_training():
    plain = recorded(qat_by_bits.FLOAT, "2", trained=False)
    clipped = recorded(qat_by_bits.FLOAT, f"2, {qat_by_bits.CLIPPED}", trained=False)
    assert all(clipped[seed] > plain[seed] + 15 for seed in plain)
