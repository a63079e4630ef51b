"""`make bench`: attention in tiles beside attention in separate steps, on a CPU.

One text, 4 heads of 64 channels, float32, one thread, each comparison in one run. Times are the thread's own. Bounds
leave room for another machine: a tile in plain PyTorch costs a dozen calls, and saves the traffic of large matrices.
"""

import gc
from functools import partial

import pytest
import torch

from effnlp_lessons.attention.flash import tiled_attention
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.measure import peak_memory
from effnlp_lessons.studies.flash_traffic import every_second_tile
from effnlp_lessons.studies.fused_attention import (
    CAUSAL_ONLY,
    COLUMNS,
    DENSE,
    FLEX,
    FUSED,
    MASKED,
    OURS,
    TILE,
    UNFUSED,
    calls_of,
    has_compiler,
    inputs,
    window_calls,
)
from effnlp_lessons.studies.pruning_costs import in_turns

RUNS = 7
LENGTH = 2_048


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    gc.collect()


def measured(title: str, calls: dict, to: str) -> tuple[dict[str, float], dict[str, int]]:
    """Print a table; {name: time as a ratio to `to`'s} and {name: largest number of bytes held}."""
    times = in_turns(calls, RUNS, seed=0)
    memory = {name: peak_memory(call) for name, call in calls.items()}
    ratios = {name: timing.median / times[to].median for name, timing in times.items()}
    print(f"\n{title}: median of {RUNS} turns, ratio to {to}, most memory held")
    for name, timing in times.items():
        print(f"  {name!s:34} {timing!s:>26}   {ratios[name]:5.2f} x   {memory[name] / 1e6:7.1f} MB")
    return ratios, memory


@pytest.mark.parametrize("column", COLUMNS)
def test_fused_kernel_and_tiles_beside_separate_steps(column):
    ratios, memory = measured(f"{column}, {LENGTH:,} tokens", calls_of(column, LENGTH, seed=0), DENSE)
    assert ratios[FUSED] <= 0.7 and ratios[FUSED] <= 0.6 * ratios[UNFUSED]
    assert ratios[OURS] <= 2
    assert max(memory[FUSED], memory[OURS]) <= min(memory[UNFUSED], memory[DENSE]) / 8


def test_smaller_tiles_take_longer_and_hold_less():
    q, k, v = (x.detach() for x in inputs(LENGTH, seed=0))
    calls = {DENSE: partial(dense_attention, q, k, v)}
    calls |= {n: partial(tiled_attention, q, k, v, block_queries=n, block_keys=n) for n in (64, 128, 256)}
    ratios, memory = measured(f"full attention, {LENGTH:,} tokens, sides of tiles", calls, DENSE)
    assert ratios[64] >= 1.3 * ratios[256]
    assert memory[64] < memory[128] < memory[256] <= memory[DENSE] / 8


def test_skipping_half_of_the_tiles_takes_half_of_the_time():
    length, tile = 4_096, 128
    q, k, v = (x.detach() for x in inputs(length, seed=0))
    tiles = partial(tiled_attention, q, k, v, block_queries=tile, block_keys=tile)
    calls = {
        "all tiles": tiles,
        "causal: 528 of 1,024 tiles": partial(tiles, causal=True),
        "every second tile": partial(tiles, block_mask=every_second_tile(length, tile)),
        "window of 256: 154 of 1,024 tiles": partial(tiles, window=2 * tile),
    }
    ratios, _ = measured(f"tiles of {tile}, {length:,} tokens", calls, "all tiles")
    assert ratios["causal: 528 of 1,024 tiles"] <= 0.7
    assert ratios["every second tile"] <= 0.65
    assert ratios["window of 256: 154 of 1,024 tiles"] <= 0.35


@pytest.mark.skipif(not has_compiler(), reason="compiling FlexAttention takes a C++ compiler")
def test_skipped_tiles_beside_the_same_window_as_a_mask():
    ratios, _ = measured("causal window of 256, 4,096 tokens", window_calls(4_096, TILE, seed=0), MASKED)
    assert ratios[FLEX] <= 0.5
    assert ratios[FLEX] <= 0.8 * ratios[CAUSAL_ONLY]
