"""The study of fused attention: every form computes the same, by the kernel it names; ratios are within a run."""

import copy

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import profile

from effnlp_lessons import paths
from effnlp_lessons.studies import fused_attention as study
from effnlp_lessons.studies.fused_attention import (
    CAUSAL_ONLY,
    COLUMNS,
    DENSE,
    FLEX,
    FUSED,
    MASKED,
    NOT_AVAILABLE,
    OURS,
    UNFUSED,
    WINDOW,
)
from effnlp_lessons.studies.runner import load_results


@pytest.mark.parametrize("column", COLUMNS)
def test_every_form_computes_the_same(column):
    length = 300  # two tiles of plain PyTorch, the second one not full
    found = {form: call() for form, call in study.calls_of(column, length, seed=1).items()}
    assert set(found) == {FUSED, UNFUSED, DENSE, OURS}
    q, k, v = (x.double() for x in study.inputs(length, seed=1))
    scores = q @ k.transpose(-1, -2) / 8
    if column.endswith("causal"):
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    truth = scores.softmax(-1) @ v
    if column.startswith(study.BOTH):
        truth = torch.autograd.grad(truth.sum(), (q, k, v))
        truth, found = torch.stack(truth), {form: torch.stack(x) for form, x in found.items()}
    for form, result in found.items():
        torch.testing.assert_close(result.double(), truth, rtol=0, atol=1e-5, msg=form)


def test_fused_and_unfused_run_the_kernels_that_they_name():
    q, k, v = study.inputs(20, seed=0)
    for attention, name in (
        (study.fused_attention, "aten::_scaled_dot_product_flash_attention_for_cpu"),
        (study.unfused_attention, "aten::_scaled_dot_product_attention_math"),
    ):
        with torch.inference_mode(), profile() as recorded:
            attention(q, k, v)
        assert [e.key for e in recorded.key_averages() if "dot_product" in e.key and "_" in e.key[6:7]] == [name]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [0, 5, 400])
def test_every_form_of_the_window_sees_the_same_keys(monkeypatch, window):
    monkeypatch.setattr(study, "has_compiler", lambda: True)
    monkeypatch.setattr(study, "compiled_flex", lambda: flex_attention)  # the same function, not compiled
    length = 300
    calls = study.window_calls(length, window, seed=1)
    assert set(calls) == {FLEX, MASKED, CAUSAL_ONLY, OURS}
    q, k, v = (x.detach().double() for x in study.inputs(length, seed=1))
    truth = torch.empty_like(q)
    for i in range(length):
        seen = slice(max(0, i - window), i + 1)
        weights = (q[0, :, i, None] @ k[0, :, seen].mT / 8).softmax(-1)
        truth[0, :, i] = (weights @ v[0, :, seen])[:, 0]
    for form in (FLEX, MASKED, OURS):
        torch.testing.assert_close(calls[form]().double(), truth, rtol=0, atol=1e-5, msg=form)


def test_a_small_run_has_every_number(monkeypatch):
    monkeypatch.setattr(study, "has_compiler", lambda: False)
    setting = {"lengths": [64, 128], "runs": 2, "window": 16}
    numbers = study.run(setting, seed=0).numbers
    assert set(numbers["seconds"]) == set(numbers["bytes"]) == {*COLUMNS, WINDOW}
    for column in COLUMNS:
        assert set(numbers["seconds"][column]) == set(numbers["bytes"][column]) == {FUSED, UNFUSED, DENSE, OURS}
        for form in (FUSED, UNFUSED, DENSE, OURS):
            rows, sizes = numbers["seconds"][column][form], numbers["bytes"][column][form]
            assert len(rows) == len(sizes) == 2
            assert all(0 < low <= middle <= high for middle, low, high in rows)
            assert 0 < sizes[0] < sizes[1]
    assert numbers["seconds"][WINDOW][FLEX] == numbers["bytes"][WINDOW][FLEX] == NOT_AVAILABLE
    summary = {"runs": [{"setting": setting} | numbers]}
    assert FLEX not in study.seconds_of(summary, WINDOW)
    assert FLEX not in study.bytes_of(summary, WINDOW)
    with pytest.raises(ValueError, match="must have been recorded"):
        study.ratios(summary, WINDOW, FLEX, MASKED)


def test_unfused_steps_hold_tables_of_length_by_length_and_tiles_do_not():
    length = 1_024
    table = 4 * study.HEADS * length**2  # bytes of float32
    calls = study.calls_of("forward, full", length, seed=0)
    sizes = {form: study.peak_memory(call) for form, call in calls.items()}
    assert min(sizes[UNFUSED], sizes[DENSE]) > 1.9 * table
    assert max(sizes[FUSED], sizes[OURS]) < table


def test_ratios_are_taken_within_a_run():
    def run(slow):
        full = {FUSED: [[slow, 0, 0], [4 * slow, 0, 0]], UNFUSED: [[3 * slow, 0, 0], [20 * slow, 0, 0]]}
        causal = {form: [[0.5 * row[0], 0, 0] for row in rows] for form, rows in full.items()}
        sizes = {FUSED: [10, 20], UNFUSED: [100, 400]}
        return {
            "setting": {"lengths": [8, 16]},
            "seconds": {"forward, full": full, "forward, causal": causal},
            "bytes": {"forward, full": sizes},
        }

    summary = {"runs": [run(1.0), run(4.0), run(2.0)]}
    kept = copy.deepcopy(summary)
    assert study.lengths_of(summary) == [8, 16]
    assert study.ratios(summary, "forward, full", UNFUSED, FUSED) == [(3,) * 3, (5,) * 3]
    assert study.ratios(summary, "forward, causal", FUSED, FUSED, to_column="forward, full") == [(0.5,) * 3] * 2
    assert study.seconds_of(summary, "forward, full")[FUSED] == [2, 8]
    sizes = study.bytes_of(summary, "forward, full")
    assert study.exponent([8, 16], sizes[FUSED]) == pytest.approx(1)
    assert study.exponent([8, 16], sizes[UNFUSED]) == pytest.approx(2)
    assert summary == kept


def test_what_was_not_recorded_is_refused_by_name():
    summary = {"runs": [{"setting": {"lengths": []}, "seconds": {"forward, full": {}}}]}
    with pytest.raises(ValueError, match="column must be one of .*, got 'backward'"):
        study.seconds_of(summary, "backward")
    with pytest.raises(ValueError, match="column must be one of .*, got 'backward'"):
        study.calls_of("backward", 8, seed=0)
    with pytest.raises(ValueError, match="must have been recorded for 'forward, full'"):
        study.ratios(summary, "forward, full", FUSED, OURS)


# ------------------------------------------------------------------------ recorded


@pytest.fixture(scope="module")
def recorded():
    if not (paths.results_dir() / "fused_attention.json").exists():
        pytest.skip("not recorded yet")
    return load_results("fused_attention")


@pytest.mark.parametrize("column", COLUMNS)
def test_recorded_the_fused_kernel_is_faster_than_separate_steps(recorded, column):
    for rival in (UNFUSED, DENSE):
        assert study.ratios(recorded, column, rival, FUSED)[-1][1] > 1.5  # in every run


@pytest.mark.parametrize("column", COLUMNS)
def test_recorded_memory_is_linear_in_tiles_and_quadratic_in_steps(recorded, column):
    lengths, sizes = study.lengths_of(recorded), study.bytes_of(recorded, column)
    table = 4 * study.HEADS * lengths[-1] ** 2
    for form in (UNFUSED, DENSE):
        assert study.exponent(lengths, sizes[form]) > 1.9
        assert sizes[form][-1] > 1.9 * table
    for form in (FUSED, OURS):
        assert study.exponent(lengths, sizes[form]) < 1.1
        assert sizes[form][-1] < 0.2 * table


@pytest.mark.parametrize("form", [FUSED, OURS])
def test_recorded_causal_tiles_take_about_half_the_time_and_causal_steps_do_not(recorded, form):
    found = study.ratios(recorded, "forward, causal", form, form, to_column="forward, full")
    assert 0.4 < found[-1][0] < 0.8  # just over half of the tiles, and the diagonal's are masked
    for steps in (UNFUSED, DENSE):
        assert study.ratios(recorded, "forward, causal", steps, steps, to_column="forward, full")[-1][0] > 0.9


def test_recorded_skipped_tiles_beat_a_mask_for_long_texts(recorded):
    if FLEX not in study.seconds_of(recorded, WINDOW):
        pytest.skip("recorded without a C++ compiler")
    for rival in (MASKED, CAUSAL_ONLY):
        assert study.ratios(recorded, WINDOW, rival, FLEX)[-1][1] > 1.3
