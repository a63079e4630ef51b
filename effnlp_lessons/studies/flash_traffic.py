"""Bytes and FLOPs of the FlashAttention kernels, counted while they run, against the size of their tiles.

The Triton kernels run in the interpreter on one head of 64 channels in float16, and every load and store is counted:
forward, and the three kernels of the backward pass, with square tiles of 16 to 256, for full, causal, windowed and
block-sparse attention. Beside each count stands its closed formula from `flash_costs`, and what standard attention
moves. With `SRAM`, the forward pass again with the largest tiles that fit a fast memory of that size.

Counted are requests of programs to the memory that all of them share. Caches answer some of them: what a GPU would
fetch from its slow memory lies between "once", where every byte is fetched a single time, and this count. Nothing
depends on the data: other random inputs, the three seeds, must give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from effnlp_lessons.attention.flash_costs import (
    backward_bytes,
    backward_flops,
    flash_attention_bytes,
    flash_attention_flops,
    standard_attention_bytes,
    tile_sizes_for,
)
from effnlp_lessons.attention.flash_triton import Tiles, TileSize, launches
from effnlp_lessons.studies.runner import Outcome, Run, Study

D_HEAD, DTYPE = 64, torch.float16
ITEMSIZE = 2
WINDOW = 64  # keys to each side

FORWARD, DELTA, DQ, DKDV = KERNELS = "forward", "delta", "dq", "dkdv"
BACKWARD = (DELTA, DQ, DKDV)
FULL, CAUSAL, WINDOWED, SPARSE = MASKS = "full", "causal", "window", "half of the tiles"
LISTS = ("STARTS", "TILES")  # arguments of a block-sparse kernel that say which tiles to compute


def every_second_tile(length: int, block: int) -> Bool[Tensor, "blocks blocks"]:
    """A chessboard with its diagonal kept."""
    place = torch.arange(math.ceil(length / block))
    return (place[:, None] + place) % 2 == 0


def mask_settings(mask: str, length: int, block: int) -> dict[str, Any]:
    """What a mask of `MASKS` is called in `flash_triton.launches` and in the closed formulas.

    Raises:
        ValueError: another mask.
    """
    found = {
        FULL: {},
        CAUSAL: {"causal": True},
        WINDOWED: {"window": WINDOW},
        SPARSE: {"block_mask": every_second_tile(length, block)},
    }
    if mask not in found:
        raise ValueError(f"mask must be one of {MASKS}, got {mask!r}")
    return found[mask]


# ------------------------------------------------------------------------------------- counted and computed


class Count(NamedTuple):
    """What one kernel did. `lists`: bytes read to know which tiles to compute, of block-sparse kernels only."""

    bytes: int
    flops: int
    once: int
    lists: int = 0


def counted(
    mask: str, length: int, block_queries: int, block_keys: int, seed: int, kernels: Sequence[str] = KERNELS
) -> dict[str, Count]:
    """{kernel: its count}, the kernels run in the interpreter on standard normal Q, K, V and dO, one head.

    `kernels` may leave out those after the last one needed; each reads what those before it wrote.
    """
    from effnlp_lessons.attention import flash_kernels  # imports Triton, which exists on Linux only
    from effnlp_lessons.attention.triton_tools import Traffic, interpreting

    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad_output = torch.randn(4, 1, 1, length, D_HEAD, generator=generator).to(DTYPE)
    tile = TileSize(block_queries, block_keys)
    tiles = Tiles(tile, tile, tile, block_mask=(block_queries, block_keys))
    settings = mask_settings(mask, length, block_queries)
    found = {}
    with interpreting(flash_kernels):
        for launch in launches(q, k, v, tiles=tiles, grad_output=grad_output, **settings):
            if launch.name not in kernels:
                continue
            with Traffic(log=False, **launch.tensors) as traffic:
                launch.run()
            lists = sum(traffic.bytes["load", name] for name in LISTS)
            once = sum(size for name, size in traffic.once.items() if name not in LISTS)
            found[launch.name] = Count(traffic.total - lists, traffic.flops, once, lists)
    return found


def computed(mask: str, length: int, block_queries: int, block_keys: int) -> dict[str, tuple[int, int]]:
    """{kernel: (bytes, FLOPs)} by the closed formulas."""
    settings = mask_settings(mask, length, block_queries)
    settings |= {"block_queries": block_queries, "block_keys": block_keys}
    sizes = (length, length, D_HEAD)
    moved, flops = backward_bytes(*sizes, ITEMSIZE, **settings), backward_flops(*sizes, **settings)
    return {
        FORWARD: (flash_attention_bytes(*sizes, ITEMSIZE, **settings), flash_attention_flops(*sizes, **settings)),
        DELTA: (moved.delta, flops.delta),
        DQ: (moved.dq, flops.dq),
        DKDV: (moved.dkdv, flops.dkdv),
    }


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Count and compute everything at `setting["length"]`, for each of `setting["blocks"]` and of `setting["sram"]`.

    Numbers: {"counted": {mask: {kernel: {"bytes", "flops", "once", "lists": [one number a block]}}},
    "formula": {mask: {kernel: {"bytes", "flops": [...]}}}, "standard": bytes of standard attention,
    "sram": [[bytes of fast memory, block_queries, block_keys, bytes counted, bytes by the formula] each]}.
    """
    length, blocks = setting["length"], setting["blocks"]
    counts: dict[str, dict[str, dict[str, list[int]]]] = {}
    formulas: dict[str, dict[str, dict[str, list[int]]]] = {}
    for mask in MASKS:
        by_block = [counted(mask, length, block, block, seed) for block in blocks]
        counts[mask] = {
            kernel: {name: [getattr(count[kernel], name) for count in by_block] for name in Count._fields}
            for kernel in KERNELS
        }
        by_formula = [computed(mask, length, block, block) for block in blocks]
        formulas[mask] = {
            kernel: {name: [costs[kernel][i] for costs in by_formula] for i, name in enumerate(("bytes", "flops"))}
            for kernel in KERNELS
        }
    sram = []
    for size in setting["sram"]:
        tile = tile_sizes_for(size, D_HEAD, ITEMSIZE)
        here = counted(FULL, length, *tile, seed, kernels=(FORWARD,))[FORWARD].bytes
        sram.append([size, *tile, here, computed(FULL, length, *tile)[FORWARD][0]])
    standard = standard_attention_bytes(length, length, D_HEAD, ITEMSIZE)
    return Outcome({"counted": counts, "formula": formulas, "standard": standard, "sram": sram})


def finish(runs: list[Run], _: Path) -> dict[str, Any]:
    """Whether every seed gave the same numbers."""
    by_length: dict[int, list[dict[str, Any]]] = {}
    for finished in runs:
        by_length.setdefault(finished.setting["length"], []).append(finished.outcome.numbers)
    same = all(numbers == group[0] for group in by_length.values() for numbers in group)
    return {"the same for every seed": same}


# ------------------------------------------------------------------------------------- what was recorded


def lengths_of(summary: Mapping[str, Any]) -> list[int]:
    """The lengths that were counted, in tokens."""
    return sorted({run["setting"]["length"] for run in summary["runs"]})


def numbers_at(summary: Mapping[str, Any], length: int) -> Mapping[str, Any]:
    """The run at a length; which seed does not matter.

    Raises:
        ValueError: a length that was not recorded, or seeds that differ.
    """
    runs = [run for run in summary["runs"] if run["setting"]["length"] == length]
    if not runs:
        raise ValueError(f"length must be one of {lengths_of(summary)}, got {length}")
    if any(run[part] != runs[0][part] for run in runs for part in ("counted", "sram")):
        raise ValueError(f"seeds must give the same counts, got others at length {length}")
    return runs[0]


def by_block(
    summary: Mapping[str, Any], length: int, what: str = "bytes", mask: str = FULL, kernels: Sequence[str] = (FORWARD,)
) -> dict[int, int]:
    """{side of the square tiles: number}, summed over `kernels`; `what` is "bytes", "flops", "once" or "lists".

    Raises:
        ValueError: a length, count, mask or kernel that was not recorded.
    """
    found = numbers_at(summary, length)
    for name, value, allowed in (("mask", mask, MASKS), ("what", what, Count._fields)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if not kernels or not set(kernels) <= set(KERNELS):
        raise ValueError(f"kernels must be some of {KERNELS}, got {tuple(kernels)}")
    columns = [found["counted"][mask][kernel][what] for kernel in kernels]
    return dict(zip(found["setting"]["blocks"], map(sum, zip(*columns, strict=True)), strict=True))


def moves_more_than_standard(summary: Mapping[str, Any], length: int) -> list[int]:
    """The sizes of tiles with which the forward pass moves more bytes than standard attention does."""
    standard = numbers_at(summary, length)["standard"]
    return [block for block, moved in by_block(summary, length).items() if moved > standard]


# ------------------------------------------------------------------------------------- fast memory, by formula


class SramPoint(NamedTuple):
    """Traffic of the forward pass with the tiles that a fast memory of this size allows."""

    sram_bytes: int
    block_queries: int
    block_keys: int
    bytes: int


def paper_tile_sizes(sram_bytes: int, d_head: int, itemsize: int) -> tuple[int, int]:
    """(block_queries, block_keys) by the rule of Dao et al. 2022 (2205.14135, Algorithm 1), for any number of rows.

    With M numbers of fast memory, ceil(M / 4d) for the loop outside and min(ceil(M / 4d), d) for the one inside. Theirs
    has keys outside and queries inside, FlashAttention-2 the reverse.
    """
    block = math.ceil(sram_bytes / itemsize / (4 * d_head))
    return block, min(block, d_head)


def against_sram(
    sram_sizes: Sequence[int],
    length: int,
    d_head: int = D_HEAD,
    itemsize: int = ITEMSIZE,
    tile_sizes: Callable[[int, int, int], tuple[int, int]] = tile_sizes_for,
) -> list[SramPoint]:
    """Full attention's forward traffic by the closed formula for each size of fast memory, in bytes."""
    points = []
    for size in sram_sizes:
        rows, keys = tile_sizes(size, d_head, itemsize)
        moved = flash_attention_bytes(length, length, d_head, itemsize, block_queries=rows, block_keys=keys)
        points.append(SramPoint(size, rows, keys, moved))
    return points


def exponent(points: Sequence[SramPoint]) -> float:
    """p of bytes ~ SRAM^p, least squares on log-log axes.

    Raises:
        ValueError: fewer than two sizes of fast memory.
    """
    x, y = ([math.log(getattr(point, name)) for point in points] for name in ("sram_bytes", "bytes"))
    if len(set(x)) < 2:
        raise ValueError(f"points must have at least two sizes of fast memory, got {len(set(x))}")
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - middle_x) ** 2 for a in x)


BLOCKS = [16, 32, 64, 128, 256]
SRAM = [1_024 * size for size in (12, 24, 48, 96, 192, 384)]
SETTINGS = (
    *({"length": length, "blocks": BLOCKS, "sram": SRAM} for length in (128, 256, 512)),
    {"length": 1_000, "blocks": BLOCKS[1:], "sram": SRAM[1:]},  # fills no tile to the end; 16 would be 4,000 tiles
)
# a second or two, for a notebook
LIVE = {"length": 256, "blocks": [32, 64, 128], "sram": []}
STUDY = Study(
    name="flash_traffic",
    question="How many bytes and FLOPs do FlashAttention's kernels take, against the size of tiles and fast memory?",
    run=run,
    recorded=SETTINGS,
    full=(*SETTINGS, {"length": 2_048, "blocks": BLOCKS[2:], "sram": SRAM[2:]}),
    seeds=(0, 1, 2),
    minutes=3,
    threads=1,
    finish=finish,
)
