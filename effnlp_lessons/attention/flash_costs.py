"""What FlashAttention reads, writes and multiplies: closed formulas (Dao et al. 2022; Dao 2023).

A chip has a large slow memory and a small fast one. Standard attention writes the table of scores to the slow memory,
reads it for the softmax, writes the weights and reads them again: 4 n² numbers beside Q, K, V and O. FlashAttention
keeps a tile of scores in the fast memory and reads K and V once for every block of queries instead:
    bytes = itemsize (2 n d + ceil(n / block_queries) 2 n d) + 4 n        about 2 n² d / block_queries numbers, not 4 n²
With M bytes of fast memory block_queries ~ M / d, hence n² d² / M (arXiv 2205.14135, Theorem 2). Below a certain
block_queries this is more than standard attention moves. The loops are those of FlashAttention-2 (2307.08691).

Every function counts one head of one text. The formulas are exact: `TwoMemories` counts the same while the
PyTorch version runs, and the Triton kernels request the same. Requests are counted, before any cache: on a GPU some of
them are answered by the L2 cache.

NOTE FLOPs count tiles as the kernels compute them: whole, also where a mask or the end of the text empties a part, and
with `d_head` filled up to a power of two, at least 16. Papers count 4 n² d instead.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from effnlp_lessons.attention.blocks import check_not_negative, check_positive


class TwoMemories:
    """Counts the bytes that go between slow and fast memory, all heads and texts together.

    loaded, stored: bytes by tensor ("Q", "K", "V", "O", "LSE", "dO", "delta", "dQ", "dK", "dV", "mask").
    peak_fast: bytes of the largest set of tiles held at once for one head, as a chip holds them for one program.
    """

    def __init__(self) -> None:
        self.loaded: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()
        self.peak_fast = 0

    @property
    def total(self) -> int:
        """Bytes loaded and stored."""
        return self.loaded.total() + self.stored.total()

    def load(self, name: str, x: Tensor) -> Tensor:
        """Count `x` as read from slow memory, and return it."""
        self.loaded[name] += x.nbytes
        return x

    def store(self, name: str, x: Tensor) -> Tensor:
        """Count `x` as written to slow memory, and return it."""
        self.stored[name] += x.nbytes
        return x

    def hold(self, *tiles: Tensor) -> None:
        """Count the tiles (batch, heads, ...) as in fast memory together, one head of one text at a time."""
        self.peak_fast = max(self.peak_fast, sum(x.nbytes // x.shape[:2].numel() for x in tiles))


# ------------------------------------------------------------------------------------------------- the tiles


class Tile(NamedTuple):
    """One tile of scores that is computed. "full": all its queries see all `block_keys` keys, no mask but padding's."""

    query_block: int
    key_block: int
    kind: Literal["full", "partial"]


def visited_tiles(
    queries: int,
    keys: int,
    *,
    block_queries: int,
    block_keys: int,
    causal: bool = False,
    window: int | None = None,
    block_mask: Bool[Tensor, "query_blocks key_blocks"] | None = None,
) -> list[Tile]:
    """The tiles in which some query sees some key, in FlashAttention-2's order: query block outside, keys inside.

    Args:
        queries, keys: lengths in tokens. With `off` = keys - queries, query i stands at the place of key i + off.
        causal: query i sees key j only if j <= i + off.
        window: and only if |i + off - j| <= window.
        block_mask: True = the tile may be visited; not together with `window`.

    Raises:
        ValueError: sizes that are no integer >= 1, a window that is no integer >= 0, a block mask that is not bool,
            has not one entry for every tile, or comes with a window.
    """
    check_positive(queries=queries, keys=keys, block_queries=block_queries, block_keys=block_keys)
    query_blocks, key_blocks = -(-queries // block_queries), -(-keys // block_keys)
    if window is not None:
        check_not_negative(window=window)
    if block_mask is not None:
        check_block_mask(block_mask, query_blocks, key_blocks, window)
    may_visit = None if block_mask is None else block_mask.tolist()
    left = keys + queries if window is None else window  # how far a query sees to each side of its own place
    right = 0 if causal else left
    tiles = []
    for i in range(query_blocks):
        # the places of the block's first and last query among the keys; some may lie outside of them
        first = i * block_queries + keys - queries
        last = min((i + 1) * block_queries, queries) - 1 + keys - queries
        # some query of the block sees [first - left, last + right], every one [last - left, first + right]
        lowest, highest = max(first - left, 0), min(last + right, keys - 1)
        if lowest > highest:
            continue
        for j in range(lowest // block_keys, highest // block_keys + 1):
            if may_visit is None or may_visit[i][j]:
                start, end = j * block_keys, (j + 1) * block_keys - 1
                full = last - left <= start and end <= first + right and end < keys
                tiles.append(Tile(i, j, "full" if full else "partial"))
    return tiles


def check_block_mask(mask: Tensor, query_blocks: int, key_blocks: int, window: int | None = None) -> None:
    """Raise a ValueError unless `mask` is bool (query blocks, key blocks) and there is no window."""
    if window is not None:
        raise ValueError(f"block_mask cannot be combined with window, got window {window}")
    if mask.dtype != torch.bool:
        raise ValueError(f"block_mask must be bool (True = compute the tile), got {mask.dtype}")
    if tuple(mask.shape) != (query_blocks, key_blocks):
        raise ValueError(
            f"block_mask must have shape ({query_blocks}, {key_blocks}), one entry a tile, got {tuple(mask.shape)}"
        )


class _Visits(NamedTuple):
    """How many tiles are visited, and the rows of keys and of queries in them; the last blocks end with the text."""

    tiles: int
    key_rows: int
    query_rows: int


def _visits(
    queries: int,
    keys: int,
    block_queries: int,
    block_keys: int,
    causal: bool,
    window: int | None,
    block_mask: Tensor | None,
) -> _Visits:
    tiles = visited_tiles(
        queries,
        keys,
        block_queries=block_queries,
        block_keys=block_keys,
        causal=causal,
        window=window,
        block_mask=block_mask,
    )
    key_rows = sum(min(block_keys, keys - tile.key_block * block_keys) for tile in tiles)
    query_rows = sum(min(block_queries, queries - tile.query_block * block_queries) for tile in tiles)
    return _Visits(len(tiles), key_rows, query_rows)


def _wide(itemsize: int) -> int:
    """Bytes of a number that sums up others (LSE, delta, accumulators): float32, but float64 for float64."""
    return max(4, itemsize)


class BackwardCosts(NamedTuple):
    """Bytes or FLOPs of the three kernels of a backward pass."""

    delta: int  # D = rowsum(dO o O)
    dq: int
    dkdv: int

    @property
    def total(self) -> int:
        return sum(self)


# ------------------------------------------------------------------------------------------- bytes, one head


def standard_attention_bytes(queries: int, keys: int, d_head: int, itemsize: int) -> int:
    """Bytes that attention in three steps moves: Q, K, V and O once, scores and weights each written and read.

    itemsize (4 queries keys + 2 queries d + 2 keys d) (2205.14135, Algorithm 0).

    Raises:
        ValueError: sizes that are no integer >= 1.
    """
    check_positive(queries=queries, keys=keys, d_head=d_head, itemsize=itemsize)
    return itemsize * (4 * queries * keys + 2 * queries * d_head + 2 * keys * d_head)


def flash_attention_bytes(
    queries: int,
    keys: int,
    d_head: int,
    itemsize: int,
    *,
    block_queries: int,
    block_keys: int,
    causal: bool = False,
    window: int | None = None,
    block_mask: Bool[Tensor, "query_blocks key_blocks"] | None = None,
    key_padding: bool = False,
) -> int:
    """Bytes that the forward pass moves: Q, O and LSE once, K and V of every visited tile (2307.08691, Algorithm 1).

    itemsize d (2 queries + 2 sum over visited tiles of their keys) + 4 queries, the last for LSE in float32
    (8 queries with itemsize 8: float64 stays float64). With `key_padding`, one byte more for every key of a tile.

    Raises:
        ValueError: sizes that are no integer >= 1, and as `visited_tiles`.
    """
    check_positive(d_head=d_head, itemsize=itemsize)
    visits = _visits(queries, keys, block_queries, block_keys, causal, window, block_mask)
    moved = itemsize * d_head * (2 * queries + 2 * visits.key_rows) + _wide(itemsize) * queries
    return moved + visits.key_rows if key_padding else moved


def backward_bytes(
    queries: int,
    keys: int,
    d_head: int,
    itemsize: int,
    *,
    block_queries: int,
    block_keys: int,
    causal: bool = False,
    window: int | None = None,
    block_mask: Bool[Tensor, "query_blocks key_blocks"] | None = None,
    key_padding: bool = False,
) -> BackwardCosts:
    """Bytes that each kernel of the backward pass moves.

    delta: O and dO once; delta, 4 bytes a query, once.
    dq: Q, dO, dQ, LSE and delta once, K and V of every visited tile.
    dkdv: K, V, dK and dV once, Q, dO, LSE and delta of every visited tile.
    With `key_padding`, one byte more for every key of a tile in dq, and for every key in dkdv.

    Raises:
        ValueError: sizes that are no integer >= 1, and as `visited_tiles`.
    """
    check_positive(d_head=d_head, itemsize=itemsize)
    visits = _visits(queries, keys, block_queries, block_keys, causal, window, block_mask)
    row, number, mask = itemsize * d_head, _wide(itemsize), int(key_padding)
    return BackwardCosts(
        delta=row * 2 * queries + number * queries,
        dq=row * (3 * queries + 2 * visits.key_rows) + number * 2 * queries + mask * visits.key_rows,
        dkdv=row * (4 * keys + 2 * visits.query_rows) + number * 2 * visits.query_rows + mask * keys,
    )


# ------------------------------------------------------------------------------------------- FLOPs, one head


def padded_d_head(d_head: int) -> int:
    """What the kernels compute with: the next power of two, at least 16."""
    return max(16, 1 << (d_head - 1).bit_length())


def flash_attention_flops(
    queries: int,
    keys: int,
    d_head: int,
    *,
    block_queries: int,
    block_keys: int,
    causal: bool = False,
    window: int | None = None,
    block_mask: Bool[Tensor, "query_blocks key_blocks"] | None = None,
) -> int:
    """FLOPs of the forward pass: q kᵀ and weights v, 4 block_queries block_keys d for every visited tile.

    Raises:
        ValueError: sizes that are no integer >= 1, and as `visited_tiles`.
    """
    check_positive(d_head=d_head)
    visits = _visits(queries, keys, block_queries, block_keys, causal, window, block_mask)
    return 4 * block_queries * block_keys * padded_d_head(d_head) * visits.tiles


def backward_flops(
    queries: int,
    keys: int,
    d_head: int,
    *,
    block_queries: int,
    block_keys: int,
    causal: bool = False,
    window: int | None = None,
    block_mask: Bool[Tensor, "query_blocks key_blocks"] | None = None,
) -> BackwardCosts:
    """FLOPs of each kernel of the backward pass: matrix products of 2 block_queries block_keys d a visited tile.

    delta: none. dq: three (S, dP, dQ). dkdv: four (S, dP, dK, dV). Seven, where one pass with atomic sums needs five.

    Raises:
        ValueError: sizes that are no integer >= 1, and as `visited_tiles`.
    """
    check_positive(d_head=d_head)
    visits = _visits(queries, keys, block_queries, block_keys, causal, window, block_mask)
    product = 2 * block_queries * block_keys * padded_d_head(d_head) * visits.tiles
    return BackwardCosts(delta=0, dq=3 * product, dkdv=4 * product)


# ----------------------------------------------------------------------------------------- the fast memory


def tile_bytes(block_queries: int, block_keys: int, d_head: int, itemsize: int) -> int:
    """Bytes that the forward pass holds in fast memory: tiles of Q, K, V; O, scores, maxima and sums in float32.

    itemsize d (block_queries + 2 block_keys) + 4 block_queries (d + block_keys + 2), with 8 for float64.

    Raises:
        ValueError: sizes that are no integer >= 1.
    """
    check_positive(block_queries=block_queries, block_keys=block_keys, d_head=d_head, itemsize=itemsize)
    read = itemsize * d_head * (block_queries + 2 * block_keys)
    return read + _wide(itemsize) * block_queries * (d_head + block_keys + 2)


def tile_sizes_for(sram_bytes: int, d_head: int, itemsize: int) -> tuple[int, int]:
    """(block_queries, block_keys), powers of two, whose `tile_bytes` fit into `sram_bytes`.

    The largest square tile, then block_queries doubled if that still fits: K and V are read once for every block of
    queries, so rows save traffic and columns do not.

    NOTE FlashAttention-1 takes block_keys = ceil(M / 4d) and block_queries = min(block_keys, d) for M numbers.

    Raises:
        ValueError: sizes that are no integer >= 1, or a memory too small for a tile of 1 x 1.
    """
    check_positive(sram_bytes=sram_bytes)
    smallest = tile_bytes(1, 1, d_head, itemsize)
    if smallest > sram_bytes:
        raise ValueError(f"sram_bytes must be >= {smallest}, one query and one key, got {sram_bytes}")
    block = 1
    while tile_bytes(2 * block, 2 * block, d_head, itemsize) <= sram_bytes:
        block *= 2
    wider = 2 * block if tile_bytes(2 * block, block, d_head, itemsize) <= sram_bytes else block
    return wider, block
