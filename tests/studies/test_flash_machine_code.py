"""The study of machine code: the register budget, small runs, and what was recorded for A100 and H100."""

import importlib.util
import itertools

import pytest

from effnlp_lessons.studies import flash_machine_code
from effnlp_lessons.studies.flash_machine_code import BAD, accumulator_registers, kernels
from effnlp_lessons.studies.runner import load_results

CHIPS, DTYPES, HEADS = ("A100", "H100"), ("float16", "bfloat16"), (64, 128)
SHARED_BYTES = {"A100": 163 * 1024, "H100": 227 * 1024}  # that a program may use


def test_registers_of_the_sums():
    # dK and dV of 64 keys, 128 numbers each, over 8 warps of 32 threads
    assert accumulator_registers(64, 128, 8) == 2 * 64 * 128 / 256 == 64
    assert accumulator_registers(BAD[1], 128, BAD[2]) == 256


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists on Linux only")
def test_a_small_run_has_the_course_tiles_and_the_others():
    setting = {"chip": "A100", "dtype": "bfloat16", "d_head": 16, "length": 64, "others": [(32, 32, 4), (32, 64, 8)]}
    rows = flash_machine_code.run(setting, 0).numbers["kernels"]
    assert [(row["kernel"], row["default"]) for row in rows[:3]] == [(name, True) for name in ("forward", "dq", "dkdv")]
    course = rows[2]
    others = {(row["block_queries"], row["block_keys"], row["num_warps"]) for row in rows[3:]}
    assert others == {(32, 32, 4), (32, 64, 8)} - {(course["block_queries"], course["block_keys"], course["num_warps"])}
    for row in rows:
        assert 0 < row["registers"] <= 255 and row["tensor_core"]["mma.sync"] > 0


def test_rows_are_chosen_by_kernel_and_setting():
    runs = [
        {"setting": {"chip": chip}, "kernels": [{"kernel": name, "registers": 1} for name in ("dq", "dkdv")]}
        for chip in CHIPS
    ]
    assert list(kernels({"runs": runs}, "dq", chip="H100")) == [{"chip": "H100", "kernel": "dq", "registers": 1}]
    assert len(list(kernels({"runs": runs}))) == 4
    assert [row["chip"] for row in kernels({"runs": runs}, kernel="dkdv")] == ["A100", "H100"]


def test_runs_of_a_setting_must_agree_and_count_once():
    run = {"setting": {"chip": "A100"}, "kernels": [{"kernel": "dq", "registers": 1}]}
    other = run | {"kernels": [{"kernel": "dq", "registers": 2}]}
    assert len(list(kernels({"runs": [run, run]}))) == 1
    with pytest.raises(ValueError, match="must give the same code, got two for .*A100"):
        list(kernels({"runs": [run, other]}))


# ------------------------------------------------------------------------ recorded


def test_recorded_every_kernel_of_the_course_fits():
    rows = list(kernels(load_results("flash_machine_code"), default=True))
    found = {(row["chip"], row["dtype"], row["d_head"], row["kernel"]) for row in rows}
    assert found == set(itertools.product(CHIPS, DTYPES, HEADS, ("forward", "dq", "dkdv")))
    for row in rows:
        assert row["spilled_bytes"] == 0 and row["registers"] <= 255 and row["violations"] == []
        assert row["shared_bytes"] <= SHARED_BYTES[row["chip"]]
        assert list(row["tensor_core"]) == [{"A100": "mma.sync", "H100": "wgmma"}[row["chip"]]]
        assert row["async_copies"] > 0


def test_recorded_the_bad_tile_spills_a_lot_and_only_with_large_heads():
    summary = load_results("flash_machine_code")
    tile = dict(zip(("block_queries", "block_keys", "num_warps"), BAD, strict=True))
    for chip, dtype in itertools.product(CHIPS, DTYPES):
        (large,) = kernels(summary, "dkdv", chip=chip, dtype=dtype, d_head=128, **tile)
        (small,) = kernels(summary, "dkdv", chip=chip, dtype=dtype, d_head=64, **tile)
        assert large["spilled_bytes"] > 500 and small["spilled_bytes"] < 100
        assert large["violations"] == [f"spills {large['spilled_bytes']} bytes a thread"]


def test_recorded_what_spills_is_what_needs_many_registers_for_its_sums():
    for row in kernels(load_results("flash_machine_code"), "dkdv"):
        needed = accumulator_registers(row["block_keys"], row["d_head"], row["num_warps"])
        if needed <= 64:  # a quarter of all
            assert row["spilled_bytes"] == 0, row
        if needed > 255:
            assert row["spilled_bytes"] > 500, row
