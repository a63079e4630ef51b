"""The study of low rank on real heads: a small run against definitions, and what is recorded."""

import pytest
import torch

from effnlp_lessons import paths
from effnlp_lessons.attention.longformer import window_mask
from effnlp_lessons.attention.patterns import output_error, pairs, read_heads
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.studies import attention_spectrum as study
from effnlp_lessons.studies.attention_patterns import passage, spread
from effnlp_lessons.studies.runner import load_results

SETTING = {"text": "reviews", "length": 40, "shares": [0.1, 0.5, 1.0]}
METHODS = (study.BEST, study.RANDOM_OUTPUT, study.RANDOM, study.POOLING, study.WINDOW)
recorded = pytest.mark.skipif(
    not (paths.results_dir() / "attention_spectrum.json").exists(), reason="the study is not recorded"
)


@pytest.fixture(scope="module")
def small():
    return study.run(SETTING, seed=3).numbers


@pytest.fixture(scope="module")
def heads():
    """Weights and values of the same passage, by the function of the other study."""
    return [
        part.flatten(0, 1)
        for part in read_heads(load_minilm(), passage("reviews", 40, torch.Generator().manual_seed(3)))
    ]


def test_vectors_give_the_weights_that_the_encoder_hands_out(heads):
    q, k, v = study.read_vectors(load_minilm(), passage("reviews", 40, torch.Generator().manual_seed(3)))
    weights = (q @ k.mT / 32**0.5).softmax(-1)
    torch.testing.assert_close(weights, heads[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v, heads[1], rtol=1e-5, atol=1e-5)


def test_spectrum_is_that_of_the_singular_values(small, heads):
    singular = torch.linalg.svdvals(heads[0].double())
    for name, values in (("squares", singular**2), ("sum", singular)):
        assert small["ranks"][:2] == [1, 2] and small["ranks"][-1] == 40 and len(small["ranks"]) == study.STEPS
        for place, rank in enumerate(small["ranks"]):
            shares = values[:, :rank].sum(1) / values.sum(1)
            for quartile, found in zip(("median", "lower", "upper"), spread(shares.tolist()), strict=True):
                assert small["spectrum"][name][quartile][place] == pytest.approx(found, abs=2e-4)
        for head in (0, 30, 71):
            rank = small["rank of 90 %"][name][head]
            total = values[head].sum()
            assert values[head, : rank - 1].sum() < 0.9 * total < values[head, :rank].sum()


def test_errors_of_rank_k_and_of_the_window_are_those_of_their_definitions(small, heads):
    weights, values = (part.double() for part in heads)
    dense = weights @ values
    assert small["projected"] == [4, 20, 40] and set(small["errors"]) == set(METHODS)
    for place, rows in enumerate(small["projected"]):
        left, singular, right = torch.linalg.svd(weights)
        best = left[:, :, :rows] @ singular[:, :rows].diag_embed() @ right[:, :rows] @ values
        error = (best - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
        assert small["errors"][study.BEST]["error"]["median"][place] == pytest.approx(
            spread(error.tolist())[0], abs=1e-3
        )
        mask = window_mask(40, study.window_size(40, rows))
        error = output_error(weights, values, mask)
        assert small["errors"][study.WINDOW]["error"]["upper"][place] == pytest.approx(
            spread(error.tolist())[2], abs=1e-3
        )


@pytest.mark.parametrize(("length", "projected"), [(1, 1), (40, 1), (40, 4), (128, 32), (96, 95), (33, 33)])
def test_window_has_as_many_pairs_as_there_are_projected(length, projected):
    size = study.window_size(length, projected)
    assert pairs(window_mask(length, size)) <= length * projected
    assert size == length - 1 or pairs(window_mask(length, size + 1)) > length * projected


def test_with_all_columns_all_but_a_random_projection_are_exact(small):
    for name in METHODS:
        last = small["errors"][name]["error"]["upper"][-1]
        assert last > 0.3 if name in (study.RANDOM, study.RANDOM_OUTPUT) else last < 1e-3


def test_relative_errors():
    dense = torch.tensor([[[3.0, 4.0]], [[3.0, 4.0]], [[3.0, 4.0]]])
    found = torch.tensor([[[6.0, 8.0]], [[-4.0, 3.0]], [[0.0, 4.0]]])
    errors = study.relative_errors(found, dense)
    # twice the output: as far off as zeros, yet right up to a factor; a right angle: nothing of it
    assert errors["error"].tolist() == pytest.approx([1, 2**0.5, 0.6])
    assert errors["scaled"].tolist() == pytest.approx([0, 1, 0.6])


def test_a_run_repeats_with_its_seed_and_is_small(small):
    assert study.run(SETTING, seed=3).numbers == small != study.run(SETTING, seed=4).numbers
    assert len(str(small)) < 6_000


def test_over_passages_is_the_mean_of_the_runs_of_one_text_and_length():
    def run(text: str, value: float) -> dict:
        setting = {"text": text, "length": 8, "shares": [0.5]}
        return {"setting": setting, "seed": 0, "seconds": 1.0, "errors": {"a": [value, 1.0]}, "projected": [4]}

    summary = {"runs": [run("plays", 0.2), run("plays", 0.4), run("reviews", 9.0)]}
    found = study.over_passages(summary, "plays", 8)
    assert set(found) == {"errors", "projected"}
    assert found["errors"]["a"] == pytest.approx([0.3, 1.0]) and found["projected"] == [4]
    with pytest.raises(ValueError, match="no run on 'plays' of 9 tokens is recorded"):
        study.over_passages(summary, "plays", 9)


# ----------------------------------------------------------------------------- what is recorded


@recorded
def test_recorded_settings_are_those_of_the_study():
    runs = load_results("attention_spectrum")["runs"]
    found = [(run["setting"], run["seed"]) for run in runs]
    assert found == [(setting, seed) for setting in study.STUDY.recorded for seed in study.STUDY.seeds]


@recorded
def test_what_the_notebook_says_holds_in_every_recorded_run():
    """Low rank, and yet a softmax over random mixtures of keys finds nothing; pooling finds some, late."""
    for run in load_results("attention_spectrum")["runs"]:
        quarter = run["projected"].index(run["setting"]["length"] // 4)
        middle = {name: of["error"]["median"][quarter] for name, of in run["errors"].items()}
        scaled = {name: of["scaled"]["median"][quarter] for name, of in run["errors"].items()}
        squares, total = (run["spectrum"][name]["median"][study.STEPS // 4 - 1] for name in ("squares", "sum"))
        assert squares > 0.99 > 0.9 > total
        assert middle[study.BEST] < 0.1 and middle[study.RANDOM_OUTPUT] > 1 and middle[study.RANDOM] > 3
        assert scaled[study.RANDOM] > 0.9  # no factor saves it
        assert middle[study.BEST] < 0.2 * middle[study.POOLING] and 0.4 < middle[study.POOLING] < 0.8
        # a window of as many pairs is better than pooling where a quarter of the pairs reaches far
        if run["setting"]["length"] != 256:
            assert (middle[study.WINDOW] < middle[study.POOLING]) == (run["setting"]["length"] == 512)
