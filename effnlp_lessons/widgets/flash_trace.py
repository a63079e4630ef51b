"""What the forward kernel of FlashAttention reads and writes, access by access, cut into tiles (notebook 11).

The Triton kernel of `attention.flash_kernels` runs in Triton's interpreter on a small head, and every access to the
slow memory is recorded. A tile begins where a program loads keys; what a program does before its first tile (it loads
its queries) and after its last one (it stores its outputs) belongs to these tiles. Where Triton is missing, or another
version than the one that `attention.triton_tools` knows, the tiled PyTorch version of `attention.flash` is recorded.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from effnlp_lessons.attention.flash import TwoMemories, flash_forward, online_softmax_step

BLOCKS = (8, 16, 32, 64)  # rows of a tile, and columns
LENGTH, D_HEAD, LONGEST, WIDEST = 64, 32, 64, 64
BYTES = 4  # of a float32
TENSORS = ("Q", "K", "V", "O", "LSE")
Span = tuple[int, int]  # first row and the one after the last
TRITON = "recorded from the Triton kernel in its interpreter"
TORCH = "recorded from the tiled PyTorch version, not the Triton kernel"


class Head(NamedTuple):
    """Queries, keys and values of one head, float32."""

    q: Float[Tensor, "queries d_head"]
    k: Float[Tensor, "keys d_head"]
    v: Float[Tensor, "keys d_head"]


def made_up_head() -> Head:
    """A head that nobody trained: normal numbers, the queries twice as large, so that some keys stand out."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(LENGTH, D_HEAD, generator=generator) for _ in range(3))
    return Head(2 * q, k, v)


def check_head(head: Head) -> None:
    """Raise a ValueError unless q, k and v are finite float32 of 1 to 64 rows and one width of 1 to 64."""
    for name, part in head._asdict().items():
        if part.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {part.dtype}")
        if part.ndim != 2 or not (1 <= part.shape[0] <= LONGEST and 1 <= part.shape[1] <= WIDEST):
            raise ValueError(f"{name} must be (1 to {LONGEST}, 1 to {WIDEST}), got {tuple(part.shape)}")
        if not torch.isfinite(part).all():
            raise ValueError(f"{name} must be finite")
    if head.q.shape[1] != head.k.shape[1]:
        raise ValueError(f"k must have the width of q, {head.q.shape[1]}, got {head.k.shape[1]}")
    if head.v.shape != head.k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(head.k.shape)}, got {tuple(head.v.shape)}")


class Access(NamedTuple):
    """One load or store of a part of one of the `TENSORS`; `first` and `last` are its elements."""

    program: int
    tensor: str
    bytes: int
    first: int
    last: int


class Step(NamedTuple):
    """One tile: which program reads which keys, and the bytes moved by all tiles up to this one, by tensor."""

    program: int
    queries: Span
    keys: Span
    moved: Counter[str]


class Trace(NamedTuple):
    """The tiles of a forward pass in the order in which they were read, and what was recorded."""

    source: str
    steps: list[Step]


def record_trace(
    q: Float[Tensor, "queries d_head"],
    k: Float[Tensor, "keys d_head"],
    v: Float[Tensor, "keys d_head"],
    *,
    block_queries: int,
    block_keys: int,
    causal: bool,
    run: str = "auto",
) -> Trace:
    """Run the forward pass of one head and record what it moves.

    Args:
        run: "interpreter": the Triton kernel; "torch": the tiled PyTorch version; "auto": the kernel if there is a
            Triton that can be interpreted here, otherwise PyTorch.

    Raises:
        ValueError: another `run`.
        ImportError, RuntimeError: "interpreter" without such a Triton.
    """
    if run not in ("auto", "interpreter", "torch"):
        raise ValueError(f"run must be 'auto', 'interpreter' or 'torch', got {run!r}")
    use_triton = run == "interpreter" or (run == "auto" and has_interpreter())
    record = _record_kernel if use_triton else _record_torch
    q, k, v = (x.clone()[None, None] for x in (q, k, v))
    accesses = record(q, k, v, block_queries, block_keys, causal)
    return Trace(TRITON if use_triton else TORCH, steps_of(accesses, q.shape[-1], block_queries))


def has_interpreter() -> bool:
    """Whether Triton is here, in the version that `triton_tools` can interpret."""
    try:
        from effnlp_lessons.attention import triton_tools

        triton_tools.check_version()
    except (ImportError, RuntimeError):
        return False
    return True


def _record_kernel(q: Tensor, k: Tensor, v: Tensor, block_queries: int, block_keys: int, causal: bool) -> list[Access]:
    from effnlp_lessons.attention import flash_triton, triton_tools

    tile = flash_triton.TileSize(block_queries, block_keys)
    forward = flash_triton.launches(q, k, v, causal=causal, tiles=flash_triton.Tiles(tile, tile, tile))[0]
    with triton_tools.interpreting(), triton_tools.Traffic(**forward.tensors) as traffic:
        forward.run()
    return [Access(a.program[0], a.tensor, a.bytes, a.first, a.last) for a in traffic.log]


class _Recorder(TwoMemories):
    """Also keeps the order in which the parts are loaded and stored. A program begins where it loads its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Access] = []
        self._program = -1

    def load(self, name: str, x: Tensor) -> Tensor:
        self._program += name == "Q"
        first = x.storage_offset()
        self.log.append(Access(self._program, name, x.nbytes, first, first + x.numel() - 1))
        return super().load(name, x)

    def store(self, name: str, x: Tensor) -> Tensor:
        self.log.append(Access(self._program, name, x.nbytes, 0, x.numel() - 1))
        return super().store(name, x)


def _record_torch(q: Tensor, k: Tensor, v: Tensor, block_queries: int, block_keys: int, causal: bool) -> list[Access]:
    recorder = _Recorder()
    flash_forward(q, k, v, causal=causal, block_queries=block_queries, block_keys=block_keys, memories=recorder)
    return recorder.log


def steps_of(accesses: list[Access], d_head: int, block_queries: int) -> list[Step]:
    """The tiles that a list of accesses is made of."""
    steps: list[Step] = []
    moved: Counter[str] = Counter()
    for _, of_program in itertools.groupby(accesses, key=lambda access: access.program):
        parts = list(of_program)
        queries = next(_rows(access, d_head) for access in parts if access.tensor == "Q")
        begins = [place for place, access in enumerate(parts) if access.tensor == "K"]
        if not begins:  # its queries see no key, as the first ones if there are fewer keys: counted with the first tile
            moved.update(_bytes(parts))
            continue
        for begin, end in zip([0, *begins[1:]], [*begins[1:], len(parts)], strict=True):
            keys = next(_rows(access, d_head) for access in parts[begin:end] if access.tensor == "K")
            moved.update(_bytes(parts[begin:end]))
            steps.append(Step(queries[0] // block_queries, queries, keys, moved.copy()))
    return steps


def _rows(access: Access, d_head: int) -> Span:
    return access.first // d_head, access.last // d_head + 1


def _bytes(accesses: list[Access]) -> Counter[str]:
    moved: Counter[str] = Counter()
    for access in accesses:
        moved[access.tensor] += access.bytes
    return moved


Traces = dict[tuple[int, int, bool], Trace]  # by (block_queries, block_keys, causal)


def record_traces(head: Head, run: str) -> Traces:
    """What every setting moves; about a second with the Triton kernel."""
    settings = itertools.product(BLOCKS, BLOCKS, (False, True))
    return {
        (rows, columns, causal): record_trace(*head, block_queries=rows, block_keys=columns, causal=causal, run=run)
        for rows, columns, causal in settings
    }


@functools.cache
def made_up_traces(run: str) -> Traces:
    return record_traces(made_up_head(), run)


# ------------------------------------------------------------------------ what a program holds


def fast_memory(block_queries: int, block_keys: int, d_head: int) -> dict[str, int]:
    """Bytes of a float32 tile in the fast memory, by part: what a program needs at once."""
    queries, keys = BYTES * block_queries * d_head, BYTES * block_keys * d_head
    scores, statistics = BYTES * block_queries * block_keys, BYTES * 2 * block_queries
    return {"Q": queries, "K": keys, "V": keys, "O": queries, "scores": scores, "m and l": statistics}


class Softmax(NamedTuple):
    """Running maximum and sum of a program's rows after a tile; what they were before; what is left of the sum."""

    m: np.ndarray
    l: np.ndarray  # noqa: E741 the paper's letter
    m_before: np.ndarray
    kept: np.ndarray


def run_softmax(head: Head, trace: Trace, causal: bool) -> list[Softmax]:
    """The running softmax after every tile of a trace, by `online_softmax_step`."""
    q, k, v = head
    visible = torch.from_numpy(visible_pairs(len(q), len(k), causal))
    scores = (q @ k.T / math.sqrt(q.shape[1])).masked_fill(~visible, -math.inf)
    after, program = [], -1
    for step in trace.steps:
        rows, columns = slice(*step.queries), slice(*step.keys)
        if step.program != program:
            program, shape = step.program, q[rows].shape
            m, l, o = torch.full(shape[:1], -math.inf), torch.zeros(shape[:1]), torch.zeros(shape)  # noqa: E741
        m_before, l_before = m, l
        m, l, o = online_softmax_step(m, l, o, scores[rows, columns], v[columns])  # noqa: E741
        kept = torch.where(l_before > 0, l_before * (m_before - m).exp(), 0.0)
        after.append(Softmax(*(part.numpy() for part in (m, l, m_before, kept))))
    return after


def visible_pairs(queries: int, keys: int, causal: bool) -> np.ndarray:
    """True where a query (row) sees a key (column)."""
    pairs = np.ones((queries, keys), bool)
    return np.tril(pairs, keys - queries) if causal else pairs
