"""The study of bits and granularity: its thirds, a small run against the functions that it uses, its summary."""

import math

import pytest
import torch

from effnlp_lessons.classification import accuracy
from effnlp_lessons.measure import bytes_on_disk
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.quantization.nonuniform import lloyd_max, nearest_level
from effnlp_lessons.quantization.post_training import (
    block_linears,
    quantize_embeddings,
    quantize_linears,
    quantized_layers,
    signal_to_noise,
)
from effnlp_lessons.quantization.ranges import mean_squared_error, percentile
from effnlp_lessons.studies import bits_by_granularity as study
from effnlp_lessons.studies.runner import load_results


@pytest.fixture(scope="module")
def teacher():
    return load_teacher()


def test_the_three_seeds_share_no_sentence_and_leave_none_out():
    rows = [study.third(seed) for seed in study.STUDY.seeds]
    assert [len(third) for third in rows] == [667, 667, 666]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(2000))
    shares = [study.test_sentences().labels[third].double().mean().item() for third in rows]
    assert max(shares) - min(shares) < 0.1  # no third is of one class
    assert torch.equal(study.third(1, 5), rows[1][:5])
    with pytest.raises(ValueError, match="seed must be 0, 1 or 2"):
        study.third(3)


def test_a_description_means_one_model(teacher):
    assert study.build(teacher, study.FLOAT) is teacher
    name = block_linears(teacher)[7]

    def same(wanted, expected):
        built, expected = quantized_layers(study.build(teacher, wanted)), quantized_layers(expected)
        assert built.keys() == expected.keys()
        for layer in (name, *(set(built) - set(block_linears(teacher)))):
            assert torch.equal(built[layer].codes, expected[layer].codes)
            assert torch.equal(built[layer].scale, expected[layer].scale)

    same(study.spec(8), quantize_linears(teacher, 8))
    affine = quantize_linears(teacher, 4, 64, symmetric=False)
    same(study.spec(4, 64, study.AFFINE), affine)
    same(study.spec(4, 64, study.AFFINE, embeddings=3), quantize_embeddings(affine, 3))
    same(study.spec(3, ranges=study.PERCENTILE), quantize_linears(teacher, 3, ranges=percentile(0.999)))
    names = [*block_linears(teacher), "encoder.pooler", "head"]
    same(study.spec(4, layers=study.ALL), quantize_linears(teacher, 4, names=names))


def test_every_rule_has_its_name():
    values = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0))
    ends = {rule: study.range_rule(rule, 3, True)(values)[1] for rule in (study.MIN_MAX, *study.RULES)}
    assert torch.equal(ends[study.MIN_MAX], values.amax(-1))
    assert torch.equal(ends[study.LEAST_ERROR], mean_squared_error(3)(values)[1])
    order = [ends[rule][0].item() for rule in (study.GAUSSIAN, study.LAPLACE, study.PERCENTILE, study.MIN_MAX)]
    assert order == sorted(order)  # 2.15 sigma, 3.90 * 0.8 sigma, 3.09 sigma, all: the middle two are near


def test_non_uniform_levels(teacher):
    model = study.with_levels(teacher, 2, study.LLOYD_MAX)
    name = block_linears(teacher)[0]
    weight = teacher.get_submodule(name).weight.detach()
    assert torch.equal(model.get_submodule(name).weight, nearest_level(weight, lloyd_max(weight, 2)[0]))
    assert len(model.get_submodule(name).weight.unique()) == 4
    assert torch.equal(model.get_submodule(name).bias, teacher.get_submodule(name).bias)
    assert torch.equal(model.encoder.pooler.weight, teacher.encoder.pooler.weight)
    for kind, count in ((study.POWERS, 7), (study.QUANTILES, 8)):
        assert len(study.levels_of(weight, 3, kind)) == count
    even = quantize_linears(teacher, 2, "tensor", ranges=mean_squared_error(2))
    assert study.noise(teacher, model) > study.noise(teacher, even)


def test_noise_is_that_of_all_layers_together(teacher):
    quantized = quantize_linears(teacher, 4)
    energy = {n: teacher.get_submodule(n).weight.detach().double().square().sum() for n in block_linears(teacher)}
    noise = sum(energy[n] / 10 ** (ratio / 10) for n, ratio in signal_to_noise(teacher, quantized).items())
    assert study.noise(teacher, quantized) == pytest.approx(10 * math.log10(sum(energy.values()) / noise), abs=1e-6)
    assert study.noise(teacher, teacher) == math.inf


def test_a_small_run(teacher):
    models = [study.FLOAT, study.spec(2, study.TENSOR), study.spec(8)]
    numbers = study.run({"models": models, "sentences": 40}, seed=1).numbers
    assert numbers["sentences"] == 40 and [r["model"] for r in numbers["results"]] == models
    rows = study.third(1, 40)
    labels = study.test_sentences().labels[rows]

    class Chosen:
        token_ids = [study.test_sentences().token_ids[i] for i in rows.tolist()]

    Chosen.labels = labels
    expected = [teacher, quantize_linears(teacher, 2, "tensor"), quantize_linears(teacher, 8)]
    for result, model in zip(numbers["results"], expected, strict=True):
        assert result["right"] == round(accuracy(model, Chosen) * 40 / 100)
        assert result["right"] - numbers["results"][0]["right"] == result["won"] - result["lost"]
    full, coarse, fine = numbers["results"]
    assert full["lost"] == full["won"] == 0 and full["bytes"] == bytes_on_disk(teacher)
    assert full["signal to noise"] is None and coarse["signal to noise"] < fine["signal to noise"] - 20
    weights = 6 * (4 * 384**2 + 2 * 384 * 1536)
    assert full["bytes"] - coarse["bytes"] == pytest.approx(weights * (4 - 2 / 8), rel=0.001)
    assert coarse["lost"] >= 5  # two bits for a whole tensor: chance


def test_pooling_by_hand():
    def result(right, lost, won, model=study.FLOAT):
        return {"model": model, "right": right, "lost": lost, "won": won, "signal to noise": 1.5, "bytes": 7}

    other = study.spec(4)
    [one, two] = study.pooled([(40, result(30, 2, 0)), (10, result(1, 1, 1, other)), (60, result(50, 0, 2))])
    assert one["accuracy"] == 80 and one["standard error"] == 4  # sqrt(0.8 * 0.2 / 100)
    assert one["difference"] == 0 and one["its standard error"] == 2  # four of a hundred differ: sqrt(0.04 / 100)
    assert one["by third"] == [75, 83.3] and one["bits"] == 32 and (one["signal to noise"], one["bytes"]) == (1.5, 7)
    assert two["accuracy"] == 10 and {key: two[key] for key in other} == other


def test_no_model_is_described_twice():
    for settings in (study.STUDY.recorded, study.STUDY.full):
        models = [repr(model) for setting in settings for model in setting["models"]]
        assert len(set(models)) == len(models)


# ------------------------------------------------------------------------------------------- what is recorded
