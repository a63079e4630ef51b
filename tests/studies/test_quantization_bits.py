"""The study of bits and granularity: its thirds, a small run against the functions that it uses, its summary."""

import math

import pytest
import torch

from effnlp_lessons.classification import accuracy
from effnlp_lessons.layers import block_linears
from effnlp_lessons.measure import bytes_on_disk
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.quantization.nonuniform import lloyd_max, nearest_level
from effnlp_lessons.quantization.packing import quantized_bytes_on_disk
from effnlp_lessons.quantization.post_training import (
    quantize_embeddings,
    quantize_linears,
    quantized_layers,
    signal_to_noise,
)
from effnlp_lessons.quantization.ranges import aciq_gaussian, aciq_laplace, mean_squared_error, percentile
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
    named = {
        study.MIN_MAX: values.amax(-1),
        study.PERCENTILE: percentile(0.999)(values)[1],
        study.LEAST_ERROR: mean_squared_error(3)(values)[1],
        study.LAPLACE: aciq_laplace(3)(values)[1],
        study.GAUSSIAN: aciq_gaussian(3)(values)[1],
    }
    assert ends.keys() == named.keys() and all(torch.equal(ends[rule], named[rule]) for rule in named)


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
    # scales and the head of the file are the rest
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


def test_the_summary_pools_the_runs():
    results = load_results("bits_by_granularity")
    runs = results["runs"]
    assert sorted({run["seed"] for run in runs}) == [0, 1, 2]
    described = [model for setting in study.STUDY.recorded for model in setting["models"]]
    keys = (*study.spec(0), "embeddings", "layers")
    assert [{key: row[key] for key in keys if key in row} for row in results["models"]] == described
    assert results["models"] == study.pooled([(run["sentences"], r) for run in runs for r in run["results"]])
    for wanted in described:
        counts = [run["sentences"] for run in runs for r in run["results"] if r["model"] == wanted]
        assert sorted(counts) == [666, 667, 667]


def test_the_teacher_of_the_record_is_the_shipped_one(teacher):
    shipped = load_results("teacher")["shipped"]["test accuracy"]
    assert study.recorded(32)["accuracy"] == pytest.approx(shipped, abs=0.051)  # one sentence of 2,000
    assert study.recorded(32)["bytes"] == bytes_on_disk(teacher)


def test_recorded_sizes_and_noise_are_those_of_today(teacher):
    for options in ({"bits": 4, "granularity": 64, "grid": study.AFFINE, "embeddings": 8}, {"bits": 3}):
        row = study.recorded(**options)
        built = study.build(teacher, study.spec(**options))
        # the file's size does not depend on the numbers; the noise does, by rounding alone
        assert quantized_bytes_on_disk(built) == row["bytes"]
        assert study.noise(teacher, built) == pytest.approx(row["signal to noise"], abs=0.011)
    with pytest.raises(KeyError, match="'bits': 7"):
        study.recorded(7)


def accuracies(bits, grid=study.SYMMETRIC, ranges=study.MIN_MAX):
    return [study.recorded(bits, g, grid, ranges)["accuracy"] for g in (study.TENSOR, study.ROW)]


def test_what_the_lecture_says_of_bits_and_granularity():
    """Differences of several standard errors (about 1.3 points), on all sentences; and on each third."""
    teacher = study.recorded(32)["accuracy"]
    for granularity in study.GRANULARITIES[1:]:
        for grid in (study.SYMMETRIC, study.AFFINE):
            assert abs(study.recorded(8, granularity, grid)["difference"]) <= 0.2
    for grid in (study.SYMMETRIC, study.AFFINE):
        assert study.recorded(4, study.TENSOR, grid)["accuracy"] < teacher - 20
        assert study.recorded(4, 64, grid)["accuracy"] > teacher - 1
        assert study.recorded(2, study.ROW, grid)["accuracy"] < teacher - 20
    assert study.recorded(3, study.TENSOR)["accuracy"] + 10 < study.recorded(3)["accuracy"]
    assert study.recorded(3)["accuracy"] + 3 < study.recorded(3, grid=study.AFFINE)["accuracy"]
    for third in range(3):
        by_third = [study.recorded(3, g)["by third"][third] for g in (study.TENSOR, study.ROW, 64)]
        assert by_third == sorted(by_third)


def test_what_the_lecture_says_of_ranges():
    plain = accuracies(4)
    for rule in study.RULES:  # at 4 bits any clipping saves a grid for the whole tensor
        tensor, row = accuracies(4, ranges=rule)
        assert tensor > plain[0] + 25 and abs(row - plain[1]) < 2
    for rule in (study.LEAST_ERROR, study.LAPLACE, study.GAUSSIAN):
        tensor, row = accuracies(3, ranges=rule)
        assert tensor > accuracies(3)[0] + 10 and row > accuracies(3)[1] + 3
    # even levels for a whole tensor fail at 3 bits, as many chosen ones do not
    assert study.recorded(3, study.TENSOR, study.LLOYD_MAX)["accuracy"] > study.recorded(32)["accuracy"] - 2
    # less noise is not always more right: eight bits a tensor, four bits a group
    noise = [study.recorded(8, study.TENSOR)["signal to noise"], study.recorded(4, 64, study.AFFINE)["signal to noise"]]
    assert noise[0] < noise[1]


def test_sizes_fall_with_the_embeddings():
    sizes = [study.recorded(4, 64, study.AFFINE)["bytes"]]
    sizes += [study.recorded(4, 64, study.AFFINE, embeddings=bits)["bytes"] for bits in (8, 4, 3)]
    full = study.recorded(32)["bytes"]
    assert full / sizes[0] < 1.7 and full / sizes[1] > 4.8 and full / sizes[2] > 7
    assert study.recorded(4, 64, study.AFFINE, embeddings=8)["accuracy"] > study.recorded(32)["accuracy"] - 1
    assert study.recorded(4, 64, study.AFFINE, embeddings=3)["accuracy"] < study.recorded(32)["accuracy"] - 3
