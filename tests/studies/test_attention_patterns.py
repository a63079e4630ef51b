"""The study of patterns on real heads: a small run against the functions that it uses, and the recorded summary."""

import pytest
import torch

from effnlp_lessons.attention.gallery import PATTERNS, ends
from effnlp_lessons.attention.longformer import window_mask
from effnlp_lessons.attention.patterns import best_mask, captured_mass, output_error, pairs, read_heads
from effnlp_lessons.datasets import tokenizer
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.studies import attention_patterns, pattern_speed
from effnlp_lessons.studies.runner import load_results

SETTING = {"text": "reviews", "length": 40, "passages": 2, "shares": [0.2]}


@pytest.fixture(scope="module")
def small():
    return attention_patterns.run(SETTING, seed=3).numbers["results"]["0.2"]


def test_numbers_are_the_means_over_the_passages(small):
    generator, encoder = torch.Generator().manual_seed(3), load_minilm()
    heads = []
    for _ in range(2):
        token_ids = attention_patterns.passage("reviews", 40, generator)
        heads.append([part.flatten(0, 1) for part in read_heads(encoder, token_ids)])
    mask = window_mask(40, small["window"]["size"])
    assert small["window"]["pairs"] == pairs(mask) <= 0.2 * 40**2 < pairs(window_mask(40, small["window"]["size"] + 1))
    mass = torch.stack([captured_mass(weights, mask) for weights, _ in heads]).mean(0)
    error = torch.stack([output_error(weights, values, mask) for weights, values in heads]).mean(0)
    best = torch.stack([captured_mass(weights, best_mask(weights, 320)) for weights, _ in heads]).mean(0)
    # the study keeps four digits
    assert small["window"]["mass"] == pytest.approx(mass.tolist(), abs=1e-4)
    assert small["window"]["error"] == pytest.approx(error.tolist(), abs=1e-4)
    assert small[attention_patterns.BEST]["mass"] == pytest.approx(best.tolist(), abs=1e-4)


def test_every_pattern_keeps_the_budget_and_none_beats_the_best(small):
    assert len(set(small) & set(PATTERNS)) >= 5
    for name, row in small.items():
        assert len(row["mass"]) == len(row["error"]) == 72 and row["pairs"] <= 320
        for mass, most in zip(row["mass"], small[attention_patterns.BEST]["mass"], strict=True):
            assert mass <= most + 1e-4, name


@pytest.mark.parametrize("text", ["plays", "reviews"])
def test_a_passage_is_full_random_and_repeats_with_its_seed(text):
    first, again, other = (
        attention_patterns.passage(text, 64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert first.shape == (1, 64) and torch.equal(first, again) and not torch.equal(first, other)
    vocabulary = tokenizer.load_tokenizer()
    assert [vocabulary.id_to_token(int(token)) for token in first[0, [0, -1]]] == ["[CLS]", "[SEP]"]


def test_over_heads_and_spread():
    runs = [
        {"results": {"0.5": {"a": {"size": 1, "pairs": 2, "mass": [0.0, x], "error": [1.0, 1.0]}}}} for x in (0.2, 0.4)
    ]
    table = attention_patterns.over_heads(runs, 0.5)
    assert table["a"]["mass"] == pytest.approx([0.0, 0.3]) and table["a"]["pairs"] == 2
    assert attention_patterns.spread([3, 1, 2, 4]) == (2.5, 1.5, 3.5)
    assert attention_patterns.spread([5, 1, 2, 4, 3]) == (3, 1.5, 4.5)
    assert attention_patterns.spread([7]) == (7, 7, 7)


# ----------------------------------------------------------------------------- what is recorded


def test_recorded_settings_are_those_of_the_study():
    for study in (attention_patterns.STUDY, pattern_speed.STUDY):
        runs = load_results(study.name)["runs"]
        recorded = [(run["setting"], run["seed"]) for run in runs]
        assert recorded == [(setting, seed) for setting in study.recorded for seed in study.seeds]


@pytest.mark.parametrize("share", [0.0625, 0.125, 0.25])
def test_recorded_masks_are_the_gallerys(share):
    budget = round(share * 512**2)
    for run in load_results("attention_patterns")["runs"]:
        for name, row in run["results"][str(share)].items():
            if name in PATTERNS:
                assert row["pairs"] == pairs(PATTERNS[name].mask(512, row["size"])) <= budget
            assert all(0 <= mass <= 1.0001 for mass in row["mass"])  # four digits


def test_what_the_notebook_says_of_the_recorded_heads_holds_in_every_run():
    """Tokens that all may see help from layer 1 on, and two columns alone keep nothing."""
    for run in load_results("attention_patterns")["runs"]:
        found = attention_patterns.over_heads([run], 0.125)
        middle = {name: attention_patterns.spread(row["error"])[0] for name, row in found.items()}
        assert middle["window + ends"] < 0.85 * middle["window"]
        assert middle[attention_patterns.COLUMNS] > 0.9
        assert min(middle, key=middle.get) == attention_patterns.BEST
        above = [found["window + ends"]["error"][head] < found["window"]["error"][head] for head in range(12, 72)]
        assert sum(above) > 50


def test_two_columns_are_the_first_and_the_last_token():
    assert ends(5).tolist() == [True, False, False, False, True]


# ----------------------------------------------------------------------------- the timed study


def test_a_small_timed_run_has_a_number_for_every_method():
    numbers = pattern_speed.run({"lengths": [64, 96], "runs": 2, "written_out": 64}, seed=0).numbers
    names = set(pattern_speed.methods(64))
    for column in ("seconds", "backward", "bytes"):
        assert set(numbers[column]) == names
        for name, values in numbers[column].items():
            missing = name == pattern_speed.WRITTEN_OUT
            assert len(values) == 2 and values[0] > 0
            assert (values[1] is None) if missing else values[1] > 0


def test_recorded_times_in_words_name_setting_and_both_times():
    def run(dense, window):
        names = dict.fromkeys(pattern_speed.SETTINGS, [1.0, 1.0])
        return {"lengths": [64, 128], "seconds": {pattern_speed.FUSED: [9.0, dense], **names, "window": [9.0, window]}}

    words = pattern_speed.times_in_words({"runs": [run(0.3, 0.01), run(0.2, 0.03), run(0.1, 0.02)]}, 128)
    assert words["window"] == "Recorded at 128 tokens with 128 tokens to each side: 20 ms, fused dense 200 ms."
    assert (
        set(words)
        == set(pattern_speed.SETTINGS)
        == set(pattern_speed.methods(64))
        - {
            pattern_speed.FUSED,
            pattern_speed.WRITTEN_OUT,
        }
    )
