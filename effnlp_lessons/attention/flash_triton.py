"""FlashAttention-2 on the GPU: the host side of the Triton kernels in `flash_kernels` (Dao 2023, arXiv 2307.08691).

`flash_attention` is exact attention with gradients that never writes the table of queries x keys. It runs the same
kernels compiled on a GPU or, when asked, in Triton's interpreter on a CPU; otherwise it falls back to the tiles in
plain PyTorch of `flash` and says so. `launches` lists what would be run, kernel by kernel with all arguments, also for
tensors without memory (device "meta"), so that exactly this can be traced, or compiled without a GPU.

NOTE Triton exists on Linux only: it is imported when a kernel is first needed, not before.
NOTE for the product of two float32 numbers tensor cores keep 10 bits of each (TF32) if nothing is said. The kernels ask
for "tf32x3", three such products that together are nearly as good as float32.
NOTE inputs that are not contiguous are copied first: the kernels read plain rows.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from effnlp_lessons.attention.blocks import check_not_negative, without_padding
from effnlp_lessons.attention.flash import check_flash_inputs, tiled_attention
from effnlp_lessons.attention.flash_costs import check_block_mask, padded_d_head

LARGEST_HEAD = 128  # two sums of block_keys x d_head must fit into the registers of a program
SMALLEST_SIDE = 16  # of a tile, for the tensor cores; the interpreter takes any
PRECISION = {
    torch.float32: "tf32x3",
    torch.float16: "ieee",  # 16 bits have nothing to choose, and some AMD chips accept no other word
    torch.bfloat16: "ieee",
    torch.float64: "ieee",
}
RUNS = ("auto", "gpu", "interpreter", "torch")


class FallbackWarning(UserWarning):
    """`flash_attention` runs the plain PyTorch version, because no kernel can run."""


class TileSize(NamedTuple):
    """A kernel's tile of scores, and the warps (32 threads each) and pipeline stages that it is compiled for."""

    block_queries: int
    block_keys: int
    num_warps: int = 4
    num_stages: int = 2


class Tiles(NamedTuple):
    """The tiles of the three kernels, and the queries x keys that one entry of a block mask stands for."""

    forward: TileSize
    dq: TileSize
    dkdv: TileSize
    block_mask: tuple[int, int] = (64, 64)


class Launch(NamedTuple):
    """A kernel with all its arguments by name; what it writes is among them, empty."""

    name: str  # "forward", "delta", "dq" or "dkdv"
    kernel: Any  # a triton.JITFunction of `flash_kernels`
    arguments: dict[str, Any]
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arguments that are tensors."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def run(self) -> None:
        """Run it: on the GPU or, inside `triton_tools.interpreting()`, in the interpreter."""
        self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


class _Problem(NamedTuple):
    """What the forward and the backward pass are told beside their tensors."""

    key_padding_mask: Bool[Tensor, "batch keys"] | None
    causal: bool
    window: int | None
    block_mask: Bool[Tensor, "query_blocks key_blocks"] | None
    tiles: Tiles


def default_tiles(d_head: int, dtype: torch.dtype, block_sparse: bool = False) -> Tiles:
    """Tiles whose compiled code keeps everything in registers on A100 and H100, float32 excepted.

    Chosen from the machine code, not by timing. With `block_sparse` each divides the 64 x 64 block of a mask.
    float64, for the interpreter, has those of float32.
    """
    if dtype in (torch.float32, torch.float64):
        small = TileSize(32, 32, num_warps=4 if d_head <= 64 else 8)
        return Tiles(small, small, small)
    forward = TileSize(64, 32, num_warps=4) if block_sparse else TileSize(128, 32, num_warps=8)
    dq = TileSize(64, 32, num_warps=4) if d_head <= 64 else TileSize(64, 64, num_warps=8)
    return Tiles(forward, dq, dkdv=TileSize(32, 64, num_warps=8))


# ------------------------------------------------------------------------------------- arguments of the kernels


def tile_mask(
    block_mask: Bool[Tensor, "query_blocks key_blocks"],
    queries: int,
    keys: int,
    tile: TileSize,
    *,
    block: tuple[int, int] = (64, 64),
    causal: bool = False,
) -> Bool[Tensor, "query_tiles key_tiles"]:
    """A mask of blocks cut into the tiles of a kernel; with `causal` without the tiles that lie wholly in the future.

    Raises:
        ValueError: tiles that do not divide the blocks, a mask that is not bool or has not one entry a block.
    """
    if block[0] % tile.block_queries or block[1] % tile.block_keys:
        size = f"{tile.block_queries} x {tile.block_keys}"
        raise ValueError(f"tiles must divide the {block[0]} x {block[1]} blocks of block_mask, got a tile of {size}")
    check_block_mask(block_mask, math.ceil(queries / block[0]), math.ceil(keys / block[1]))
    mask = block_mask.repeat_interleave(block[0] // tile.block_queries, dim=0)
    mask = mask.repeat_interleave(block[1] // tile.block_keys, dim=1)
    mask = mask[: math.ceil(queries / tile.block_queries), : math.ceil(keys / tile.block_keys)]
    if causal:
        rows, columns = (torch.arange(size, device=mask.device) for size in mask.shape)
        last_query = ((rows + 1) * tile.block_queries).clamp(max=queries) - 1
        mask = mask & (columns * tile.block_keys <= last_query[:, None] + keys - queries)
    return mask


def _list_of_tiles(mask: Bool[Tensor, "blocks tiles"]) -> tuple[Int[Tensor, " blocks_and_1"], Int[Tensor, " listed"]]:
    """(starts, tiles): block b computes tiles[starts[b]] to tiles[starts[b + 1] - 1], a sparse matrix by rows (CSR)."""
    starts = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(dim=1).cumsum(dim=0)])
    return starts.int(), mask.nonzero()[:, 1].int()


def _common_arguments(q: Tensor, keys: int, problem: _Problem, tile: TileSize, by_key_block: bool) -> dict[str, Any]:
    """What the forward, dq and dk/dv kernels all take."""
    queries, d_head = q.shape[2:]
    real_keys = problem.key_padding_mask
    starts = tiles = None
    if problem.block_mask is not None:
        mask = problem.block_mask
        mask = tile_mask(mask, queries, keys, tile, block=problem.tiles.block_mask, causal=problem.causal)
        starts, tiles = (x.to(q.device) for x in _list_of_tiles(mask.T if by_key_block else mask))
    reach = problem.window
    if reach is None or reach >= max(queries, keys):  # no query and key are further apart
        reach = -1  # no limit
    return {
        "REAL_KEYS": None if real_keys is None else real_keys.contiguous().view(torch.uint8),
        "STARTS": starts,
        "TILES": tiles,
        "queries": queries,
        "keys": keys,
        "SCALE": 1 / math.sqrt(d_head),
        "D": d_head,
        "D_PADDED": padded_d_head(d_head),
        "BLOCK_QUERIES": tile.block_queries,
        "BLOCK_KEYS": tile.block_keys,
        "BEFORE": reach,
        "AFTER": 0 if problem.causal else reach,
        "PRECISION": PRECISION[q.dtype],
    }


def _launch(name: str, q: Tensor, blocks: int, tile: TileSize, arguments: dict[str, Any]) -> Launch:
    from effnlp_lessons.attention import flash_kernels

    kernel = getattr(flash_kernels, f"{name}_kernel")
    grid = (blocks, q.shape[1], q.shape[0])  # not batch * heads in one: a GPU allows 65535 there
    return Launch(name, kernel, arguments, grid, tile.num_warps, tile.num_stages)


def _forward_launch(q: Tensor, k: Tensor, v: Tensor, problem: _Problem) -> Launch:
    tile = problem.tiles.forward
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    arguments = {"Q": q, "K": k, "V": v, "O": torch.empty_like(q), "LSE": lse}
    arguments |= _common_arguments(q, k.shape[2], problem, tile, by_key_block=False)
    return _launch("forward", q, math.ceil(q.shape[2] / tile.block_queries), tile, arguments)


def _backward_launches(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, grad_output: Tensor, problem: _Problem
) -> tuple[Launch, Launch, Launch]:
    queries, keys, tiles = q.shape[2], k.shape[2], problem.tiles
    query_blocks, key_blocks = math.ceil(queries / tiles.dq.block_queries), math.ceil(keys / tiles.dkdv.block_keys)
    delta = torch.empty_like(lse)
    sizes = {"queries": queries, "D": q.shape[3], "D_PADDED": padded_d_head(q.shape[3])}
    sizes["BLOCK_QUERIES"] = tiles.dq.block_queries
    of_delta = {"O": output, "DO": grad_output, "DELTA": delta} | sizes
    tensors = {"Q": q, "K": k, "V": v, "DO": grad_output, "LSE": lse, "DELTA": delta}
    of_dq = tensors | {"DQ": torch.empty_like(q)}
    of_dq |= _common_arguments(q, keys, problem, tiles.dq, by_key_block=False)
    of_dkdv = tensors | {"DK": torch.empty_like(k), "DV": torch.empty_like(v)}
    of_dkdv |= _common_arguments(q, keys, problem, tiles.dkdv, by_key_block=True)
    return (
        _launch("delta", q, query_blocks, tiles.dq, of_delta),
        _launch("dq", q, query_blocks, tiles.dq, of_dq),
        _launch("dkdv", q, key_blocks, tiles.dkdv, of_dkdv),
    )


def launches(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch heads keys d_head"],
    v: Float[Tensor, "batch heads keys d_head"],
    key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    block_mask: Bool[Tensor, "query_blocks key_blocks"] | None = None,
    tiles: Tiles | None = None,
    grad_output: Float[Tensor, "batch heads queries d_head"] | None = None,
) -> list[Launch]:
    """The four launches of a forward and a backward pass, in order: forward, delta, dq, dkdv. Runs nothing.

    Each reads what those before it write. Tensors of device "meta" have no data: such launches serve to compile, and
    only the block mask must have its data. Without `grad_output` the backward pass reads an empty tensor.

    Raises:
        ValueError: as `flash_attention`.
    """
    problem = _problem(q, k, v, key_padding_mask, causal, window, block_mask, tiles)
    q, k, v = (x.detach().contiguous() for x in (q, k, v))
    grad_output = torch.empty_like(q) if grad_output is None else grad_output.contiguous()
    forward = _forward_launch(q, k, v, problem)
    output, lse = forward.arguments["O"], forward.arguments["LSE"]
    return [forward, *_backward_launches(q, k, v, output, lse, grad_output, problem)]


# ------------------------------------------------------------------------------------- attention with gradients


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    causal: bool,
    window: int | None,
    block_mask: Tensor | None,
    tiles: Tiles | None,
) -> _Problem:
    """Check everything that the caller gives."""
    check_flash_inputs(q, k, v, key_padding_mask)
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    if key_padding_mask is not None and key_padding_mask.device != q.device:
        raise ValueError(f"key_padding_mask must be on {q.device} like q, got {key_padding_mask.device}")
    if window is not None:
        check_not_negative(window=window)
        if block_mask is not None:
            raise ValueError(f"block_mask cannot be combined with window, got window {window}")
    tiles = tiles or default_tiles(q.shape[3], q.dtype, block_sparse=block_mask is not None)
    for name, tile in zip(("forward", "dq", "dkdv"), tiles[:3], strict=True):
        for side in tile[:2]:
            if isinstance(side, bool) or not isinstance(side, int) or side < 1 or side & (side - 1):
                raise ValueError(f"tiles.{name} must have powers of two as sides, got {tile[0]!r} x {tile[1]!r}")
        if block_mask is not None:
            tile_mask(block_mask, q.shape[2], k.shape[2], tile, block=tiles.block_mask)
    return _Problem(key_padding_mask, causal, window, block_mask, tiles)


def _obstacle(q: Tensor, k: Tensor, tiles: Tiles, interpreter: bool) -> str | None:
    """Why the kernels cannot run on these tensors, or None."""
    length, d_head = max(q.shape[2], k.shape[2]), q.shape[3]
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if q.device.type != ("cpu" if interpreter else "cuda"):
        return f"the tensors are on device {q.device}, not on {'the CPU' if interpreter else 'a GPU'}"
    if q.dtype not in PRECISION or (q.dtype == torch.float64 and not interpreter):
        return f"there is no kernel for {q.dtype}"
    if d_head > LARGEST_HEAD:
        return f"d_head is {d_head}, more than {LARGEST_HEAD}"
    if length * d_head >= 2**31:  # inside a head, positions are counted in 32 bits
        return f"length * d_head is {length} * {d_head}, not below 2**31"
    if not interpreter and min(side for tile in tiles[:3] for side in tile[:2]) < SMALLEST_SIDE:
        return f"tiles have sides below {SMALLEST_SIDE}"
    return None


def _run(todo: list[Launch], interpreter: bool) -> None:
    if interpreter:
        from effnlp_lessons.attention import flash_kernels, triton_tools

        with triton_tools.interpreting(flash_kernels):
            for launch in todo:
                launch.run()
    else:
        with torch.cuda.device(todo[0].arguments["O"].device):
            for launch in todo:
                launch.run()


class _Kernels(torch.autograd.Function):
    """The forward kernel, and the three of the backward pass. Keeps the inputs, the output and LSE."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: _Problem, interpreter: bool
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        launch = _forward_launch(q, k, v, problem)
        _run([launch], interpreter)
        output, lse = launch.arguments["O"], launch.arguments["LSE"]
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.problem, ctx.interpreter = problem, interpreter
        ctx.mark_non_differentiable(lse)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        delta, dq, dkdv = _backward_launches(*ctx.saved_tensors, grad_output.contiguous(), ctx.problem)
        _run([delta, dq, dkdv], ctx.interpreter)
        return dq.arguments["DQ"], dkdv.arguments["DK"], dkdv.arguments["DV"], None, None


def flash_attention(
    q: Float[Tensor, "batch heads queries d_head"],
    k: Float[Tensor, "batch heads keys d_head"],
    v: Float[Tensor, "batch heads keys d_head"],
    key_padding_mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    block_mask: Bool[Tensor, "query_blocks key_blocks"] | None = None,
    tiles: Tiles | None = None,
    run: str = "auto",
    return_lse: bool = False,
) -> Any:
    """softmax(q kᵀ / sqrt(d_head)) v with gradients, exact, in tiles (2307.08691, Algorithms 1 and 2).

    Args:
        key_padding_mask: True = a real token. Padded keys are never attended to.
        causal: key j is visible to query i only if j <= i + keys - queries: the last query sees every key.
        window: and only if |i + keys - queries - j| <= window.
        block_mask: True = the block is computed, for all texts and heads; not together with `window`. One entry stands
            for `tiles.block_mask` queries x keys, 64 x 64 by default.
        tiles: sizes of the kernels' tiles; None takes `default_tiles`. They change bytes and time, not the result.
        run: "gpu" the compiled kernels: float16, bfloat16, float32, d_head up to 128, sides of tiles from 16;
            "interpreter" the same kernels in Triton's interpreter, slow, on CPU tensors, also float64;
            "torch" `flash.tiled_attention`;
            "auto" the kernels if they can run on a GPU, else `tiled_attention` with a `FallbackWarning`.
        return_lse: also return LSE, the natural logarithm of the softmax's denominator; it has no gradient.

    Returns:
        The output in the dtype of `q`, or (output, LSE), LSE in float32 (float64 for float64). Queries without a key
        have output 0 and LSE -inf; so have padded tokens, if there are as many queries as keys.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a window that is no integer >= 0; a block mask of another
            shape, or with a window; tiles that are no powers of two or do not divide the blocks of the mask; a `run`
            that is not known, or is not possible.
    """
    if run not in RUNS:
        raise ValueError(f"run must be one of {RUNS}, got {run!r}")
    problem = _problem(q, k, v, key_padding_mask, causal, window, block_mask, tiles)
    if run != "torch":
        obstacle = _obstacle(q, k, problem.tiles, interpreter=run == "interpreter")
        if obstacle and run != "auto":
            raise ValueError(f"run cannot be {run!r}: {obstacle}")
        if obstacle:
            warnings.warn(f"plain PyTorch instead of Triton's kernels: {obstacle}", FallbackWarning, stacklevel=2)
            run = "torch"
    if run == "torch":
        settings = {"causal": causal, "window": window, "block_mask": block_mask, "return_lse": return_lse}
        if block_mask is not None:
            settings |= {"block_queries": problem.tiles.block_mask[0], "block_keys": problem.tiles.block_mask[1]}
        return tiled_attention(q, k, v, key_padding_mask, **settings)
    output, lse = _Kernels.apply(q, k, v, problem, run == "interpreter")
    if key_padding_mask is not None and q.shape[2] == k.shape[2]:
        output = without_padding(output, key_padding_mask)
        lse = lse.masked_fill(~key_padding_mask[:, None, :], -math.inf)
    return (output, lse) if return_lse else output
