"""The study of traffic: counts of the running kernels are the closed formulas, and helpers pick the right numbers."""

import copy
import json
import math

import pytest
import torch

from effnlp_lessons import paths
from effnlp_lessons.studies import flash_traffic as study
from effnlp_lessons.studies.flash_traffic import BACKWARD, CAUSAL, DKDV, FORWARD, FULL, KERNELS, MASKS, SPARSE, WINDOWED
from effnlp_lessons.studies.runner import Outcome, Run, load_results


@pytest.fixture(scope="module")
def small():
    """Two seeds of a length that fills no tile, tiles of two sizes."""
    pytest.importorskip("triton")
    setting = {"length": 100, "blocks": [32, 64], "sram": [20_000, 50_000]}
    return [{"setting": setting, "seed": seed} | study.run(setting, seed).numbers for seed in (0, 1)]


def test_a_small_run_counts_what_the_formulas_say(small):
    numbers = small[0]
    assert set(numbers["counted"]) == set(numbers["formula"]) == set(MASKS)
    for mask in MASKS:
        for kernel in KERNELS:
            counted, formula = numbers["counted"][mask][kernel], numbers["formula"][mask][kernel]
            assert {name: counted[name] for name in ("bytes", "flops")} == formula, (mask, kernel)
            assert all(0 < once <= moved for once, moved in zip(counted["once"], counted["bytes"], strict=True))
            assert any(counted["lists"]) == (mask == SPARSE and kernel != "delta")
    # by hand: Q, O and K, V four times over (100 rows in 4 blocks of 32) of 64 float16, and 100 numbers of LSE
    assert numbers["counted"][FULL][FORWARD]["bytes"][0] == 2 * 64 * (2 * 100 + 4 * 2 * 100) + 4 * 100
    assert numbers["counted"][FULL][FORWARD]["once"][0] == 2 * 64 * 4 * 100 + 4 * 100
    assert numbers["counted"][FULL][FORWARD]["flops"][0] == 4 * 128 * 128 * 64
    # ten of sixteen tiles touch the past; the last column of tiles has 4 keys
    assert numbers["counted"][CAUSAL][FORWARD]["bytes"][0] == 2 * 64 * (2 * 100 + 2 * (9 * 32 + 4)) + 4 * 100
    # one int32 a tile that is computed, and the two ends of its list for each of the four programs
    assert numbers["counted"][SPARSE][FORWARD]["lists"][0] == 4 * (8 + 2 * 4)
    assert numbers["standard"] == 2 * (4 * 100 * 100 + 4 * 100 * 64)
    assert [row[:3] for row in numbers["sram"]] == [[20_000, 32, 16], [50_000, 64, 32]]
    assert all(counted == formula for *_, counted, formula in numbers["sram"])


def test_other_data_gives_the_same_counts(small, tmp_path):
    assert all(small[0][part] == small[1][part] for part in ("counted", "formula", "standard", "sram"))
    runs = [
        Run(numbers["setting"], numbers["seed"], 1.0, Outcome({"counted": numbers["counted"]})) for numbers in small
    ]
    assert study.finish(runs, tmp_path) == {"the same for every seed": True}
    runs[1].outcome.numbers["counted"] = copy.deepcopy(small[0]["counted"])
    runs[1].outcome.numbers["counted"][FULL][FORWARD]["bytes"][1] += 2
    assert study.finish(runs, tmp_path) == {"the same for every seed": False}


def test_the_chessboard_keeps_its_diagonal():
    kept = study.every_second_tile(100, 32)
    assert kept.dtype == torch.bool and kept.shape == (4, 4) and kept.sum() == 8 and bool(kept.diagonal().all())
    assert study.every_second_tile(10, 32).tolist() == [[True]]
    with pytest.raises(ValueError, match="mask must be one of .*, got 'sparse'"):
        study.mask_settings("sparse", 100, 32)


def test_helpers_pick_numbers_of_one_length(small):
    summary = {"runs": small}
    assert study.lengths_of(summary) == [100]
    counted = small[0]["counted"]
    assert study.by_block(summary, 100) == dict(zip([32, 64], counted[FULL][FORWARD]["bytes"], strict=True))
    backward = study.by_block(summary, 100, "flops", CAUSAL, BACKWARD)
    assert backward[64] == sum(counted[CAUSAL][kernel]["flops"][1] for kernel in BACKWARD)
    lower = copy.deepcopy(small)
    for numbers in lower:
        numbers["standard"] = counted[FULL][FORWARD]["bytes"][1]  # equal is not more
    assert study.moves_more_than_standard({"runs": lower}, 100) == [32]
    json.dumps(summary)  # plain numbers all of them


def test_what_was_not_recorded_is_refused_by_name(small):
    summary = {"runs": small}
    with pytest.raises(ValueError, match=r"length must be one of \[100\], got 7"):
        study.by_block(summary, 7)
    with pytest.raises(ValueError, match="mask must be one of .*, got 'sparse'"):
        study.by_block(summary, 100, mask="sparse")
    with pytest.raises(ValueError, match="what must be one of .*, got 'time'"):
        study.by_block(summary, 100, "time")
    for kernels in ((), ("backward",)):
        with pytest.raises(ValueError, match="kernels must be some of"):
            study.by_block(summary, 100, kernels=kernels)
    other = copy.deepcopy(small)
    other[1]["counted"][FULL][DKDV]["bytes"][0] += 1
    with pytest.raises(ValueError, match="seeds must give the same counts"):
        study.by_block({"runs": other}, 100)


def test_traffic_against_fast_memory_falls_with_its_inverse_under_the_papers_rule():
    length, sizes = 2_048, [2**i for i in range(12, 17)]
    assert study.paper_tile_sizes(2**16, 64, 2) == (128, 64)  # 32,768 numbers / (4 * 64), and at most d keys
    assert study.paper_tile_sizes(2**13, 64, 2) == (16, 16)
    points = study.against_sram(sizes, length, tile_sizes=study.paper_tile_sizes)
    assert -1 < study.exponent(points) < -0.95  # Q and O, which are moved once whatever the tiles, flatten the end
    assert points[0].bytes == 2 * 64 * (2 * length + 256 * 2 * length) + 4 * length
    ours = study.against_sram(sizes, length)
    assert [point.bytes for point in ours] == sorted((point.bytes for point in ours), reverse=True)
    assert -1 < study.exponent(ours) < -0.7  # scores of a square tile take more room the larger it is
    with pytest.raises(ValueError, match="points must have at least two sizes"):
        study.exponent(points[:1] * 2)


def test_the_exponent_of_an_exact_power():
    points = [study.SramPoint(m, 1, 1, round(2**40 / m**2)) for m in (2, 8, 64, 1_024)]
    assert study.exponent(points) == pytest.approx(-2)


# ------------------------------------------------------------------------ recorded


@pytest.fixture(scope="module")
def recorded():
    if not (paths.results_dir() / "flash_traffic.json").exists():
        pytest.skip("not recorded yet")
    return load_results("flash_traffic")


def test_recorded_counts_are_the_formulas_computed_again(recorded):
    assert recorded["the same for every seed"]
    settings = 0
    for run in recorded["runs"]:
        length = run["setting"]["length"]
        for mask in MASKS:
            for i, block in enumerate(run["setting"]["blocks"]):
                formula = study.computed(mask, length, block, block)
                for kernel in KERNELS:
                    found = run["counted"][mask][kernel]
                    assert (found["bytes"][i], found["flops"][i]) == formula[kernel], (length, mask, block, kernel)
                settings += 1
        for size, *tile, counted, _ in run["sram"]:
            assert counted == study.computed(FULL, length, *tile)[FORWARD][0], (length, size)
        assert run["standard"] == 2 * (4 * length**2 + 4 * length * 64)
    assert settings >= 3 * 12


def test_recorded_small_tiles_move_more_than_standard_attention(recorded):
    for length in (256, 512):
        assert study.moves_more_than_standard(recorded, length) == [16]
        moved = study.by_block(recorded, length)
        assert list(moved.values()) == sorted(moved.values(), reverse=True)


def test_recorded_masks_save_what_they_skip(recorded):
    length, block = 512, 32
    full, causal, window, sparse = (study.by_block(recorded, length, "flops", mask)[block] for mask in MASKS)
    blocks = math.ceil(length / block)
    assert causal / full == (blocks + 1) / 2 / blocks
    assert sparse / full == 1 / 2
    assert window / full == (5 * blocks - 6) / blocks**2  # 64 keys to each side: the tile itself and two on each side
    assert study.by_block(recorded, length, mask=WINDOWED)[block] < 0.4 * study.by_block(recorded, length)[block]
