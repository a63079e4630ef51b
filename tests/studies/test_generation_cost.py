"""The study of generation: every form computes its layer, bytes are those of the tensors, ratios are within a run."""

import pytest
import torch

from effnlp_lessons.attention.linear import LinearSelfAttention
from effnlp_lessons.studies import generation_cost
from effnlp_lessons.studies.generation_cost import AGAIN, CACHE, CAUSAL_LINEAR, CAUSAL_SOFTMAX, COPIED, LINEAR
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.transformer import SelfAttention, initialise_


@pytest.fixture
def layers():
    generator = torch.Generator().manual_seed(0)
    found = SelfAttention(generation_cost.CONFIG, causal=True), LinearSelfAttention(generation_cost.CONFIG, causal=True)
    for layer in found:
        initialise_(layer, generator)
    return found


@torch.inference_mode()
def test_every_form_computes_what_its_layer_computes_at_once(layers):
    x = torch.randn(1, 23, 256, generator=torch.Generator().manual_seed(1))
    calls, kept = generation_cost.token_calls(*layers, x[:, :20], x[:, 20:])
    dense, linear = (layer(x)[0][:, 20:] for layer in layers)
    for form, truth in ((LINEAR, linear), (CACHE, dense), (COPIED, dense), (AGAIN, dense[:, :1])):
        for _ in range(2):  # a call leaves nothing behind that would change the next
            torch.testing.assert_close(calls[form](), truth, rtol=0, atol=1e-5)
    assert kept == {LINEAR: 4 * 4 * 64 * 65, CACHE: 2 * 4 * 20 * 256, COPIED: 2 * 4 * 20 * 256, AGAIN: 8 * 20}
    whole = generation_cost.whole_calls(20, torch.Generator().manual_seed(0))
    assert {call().shape for call in whole.values()} == {(1, 4, 20, 64)}


def test_a_small_run_has_every_number():
    numbers = generation_cost.run({"lengths": [8, 16], "runs": 2}, seed=0).numbers
    assert numbers["lengths"] == [8, 16]
    assert set(numbers["token"]) == set(numbers["bytes"]) == {LINEAR, CACHE, COPIED, AGAIN}
    assert len(numbers["whole"]) == 3
    for column in ("token", "whole"):
        for rows in numbers[column].values():
            assert len(rows) == 2 and all(0 < low <= middle <= high for middle, low, high in rows)
    first, second = zip(*numbers["bytes"].values(), strict=True)
    assert first[0] == second[0] and all(2 * a == b for a, b in zip(first[1:], second[1:], strict=True))


def test_ratios_are_taken_within_a_run():
    def run(slow):
        token = {LINEAR: [[slow, 0, 0]] * 3, CACHE: [[slow * t, 0, 0] for t in (0.5, 2, 8)]}
        return {"lengths": [1, 4, 16], "token": token}

    summary = {"runs": [run(1.0), run(3.0), run(2.0)]}
    assert generation_cost.ratios(summary, "token", CACHE, LINEAR) == [(0.5,) * 3, (2,) * 3, (8,) * 3]
    assert generation_cost.seconds_of(summary, "token")[CACHE] == [1, 4, 16]
    assert generation_cost.linear_wins_from(summary, "token", CACHE, LINEAR) == pytest.approx(2)
    with pytest.raises(ValueError, match="column must be"):
        generation_cost.seconds_of(summary, "bytes")


# ------------------------------------------------------------------------ recorded


def test_recorded_a_token_costs_linear_attention_the_same_after_any_context():
    summary = load_results("generation_cost")
    seconds = generation_cost.seconds_of(summary, "token")
    assert max(seconds[LINEAR]) < 2 * min(seconds[LINEAR])
    for form in (CACHE, COPIED, AGAIN):
        assert seconds[form] == sorted(seconds[form]) and seconds[form][-1] > 4 * seconds[form][0], form
    assert len({size for run in summary["runs"] for size in run["bytes"][LINEAR]}) == 1


def test_recorded_a_cache_is_faster_for_short_contexts_and_slower_for_long_ones():
    summary = load_results("generation_cost")
    found = generation_cost.ratios(summary, "token", CACHE, LINEAR)
    assert found[0][2] < 1 and found[-1][1] > 2  # in every run
    assert 128 < generation_cost.linear_wins_from(summary, "token", CACHE, LINEAR) < 2_048
    # what a comparison with the weakest rival would claim
    assert generation_cost.ratios(summary, "token", AGAIN, LINEAR)[-1][1] > 50 * found[-1][2]


def test_recorded_over_a_whole_text_linear_attention_is_faster_from_some_hundred_tokens():
    summary = load_results("generation_cost")
    found = generation_cost.ratios(summary, "whole", CAUSAL_SOFTMAX, CAUSAL_LINEAR)
    assert found[0][2] < 1 and found[-1][1] > 4
    assert 128 < generation_cost.linear_wins_from(summary, "whole", CAUSAL_SOFTMAX, CAUSAL_LINEAR) < 2_048
