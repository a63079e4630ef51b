"""FlashAttention-2 as Triton kernels: attention in tiles, forward and backward (Dao 2023, arXiv 2307.08691).

A program of `forward_kernel` and `dq_kernel` owns a block of queries and walks over tiles of keys; a program of
`dkdv_kernel` owns a block of keys and walks over tiles of queries. No two programs write the same number, so no
atomics are needed and the result is the same in every run.

    forward   S = scale Q Kᵀ, m' = max(m, rowmax S), l' = exp(m - m') l + rowsum exp(S - m'),
              O' = exp(m - m') O + exp(S - m') V; at the end O / l and LSE = m + log l             (Algorithm 1)
    backward  P = exp(S - LSE), dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP - D), dQ = scale dS K, dK = scale dSᵀ Q
              with D = rowsum(dO ∘ O)                                                             (Algorithm 2)

All tensors are contiguous: Q, O, dO, dQ (batch, heads, queries, D), K, V, dK, dV (batch, heads, keys, D), LSE and DELTA
(batch, heads, queries) in float32 (float64 for float64, which runs in the interpreter only), REAL_KEYS (batch, keys)
bytes, 0 = padding, or None. The grid is (blocks, heads, batch).

Query i sees the keys from i + keys - queries - BEFORE to i + keys - queries + AFTER, where -1 means no limit: causal is
AFTER = 0, a window w is BEFORE = AFTER = w. With STARTS and TILES (a block mask as lists), block b computes the tiles
TILES[STARTS[b]] to TILES[STARTS[b + 1] - 1] and no other.

NOTE the paper's Algorithm 1 prints the inverse of exp(m - m') before O; the factor itself is right.
NOTE the exponentials are base 2, for which the hardware has an instruction: exp(x) = exp2(x log2 e). LSE is stored as
the natural logarithm.
NOTE the paper's backward adds to dQ from many programs at once; here dQ has its own kernel and S and dP are computed
twice, 7 products a tile instead of 5.
"""

# ruff: noqa: E741  (O and l are the paper's letters)

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


# ------------------------------------------------------------------------------------------- what they share


@triton.jit
def _head():
    """Which (batch, head) this program works on, as int64: offsets into large tensors exceed 32 bits."""
    return tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def _load(X, rows, columns, length, D: tl.constexpr, ROWS_INSIDE: tl.constexpr):
    """Rows of a (length, D) matrix, zeros outside it; without a mask where all of it is known to lie inside."""
    pointers = X + rows[:, None] * D + columns[None, :]
    if ROWS_INSIDE and columns.shape[0] == D:
        x = tl.load(pointers)
    else:
        inside = columns[None, :] < D
        if not ROWS_INSIDE:
            inside = inside & (rows[:, None] < length)
        x = tl.load(pointers, mask=inside, other=0.0)
    return x


@triton.jit
def _store(X, values, rows, columns, length, D: tl.constexpr):
    """Write those rows that lie in a (length, D) matrix, in its own number format."""
    inside = (rows[:, None] < length) & (columns[None, :] < D)
    tl.store(X + rows[:, None] * D + columns[None, :], values.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _tiles(
    part: tl.constexpr, block, first, last, shift, length, STARTS,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Begin and end of one part of the tiles that a block needs; the three parts follow one another.

    Row r of the block, first <= r <= last, needs the positions r + shift - BEFORE to r + shift + AFTER below `length`.
    Part 1 holds the tiles that every row needs whole, so that nothing is masked there. Parts 0 and 2 hold the tiles
    cut by a limit or by the end, left and right of it. The tiles of a list (STARTS) are all in part 2. The limits of a
    part that cannot exist are constants, so that the compiler drops its loop.
    """
    begin = 0
    end = 0
    if STARTS is not None:
        if part == 2:
            begin = tl.load(STARTS + block)
            end = tl.load(STARTS + block + 1)
    elif part != 0 or BEFORE >= 0:
        needed_begin = 0
        needed_end = tl.cdiv(length, BLOCK)
        whole_begin = 0
        whole_end = length // BLOCK
        if AFTER >= 0:
            needed_end = tl.minimum(needed_end, tl.cdiv(tl.maximum(last + shift + AFTER + 1, 0), BLOCK))
            whole_end = tl.minimum(whole_end, tl.maximum(first + shift + AFTER + 1, 0) // BLOCK)
        if BEFORE >= 0:
            # a block that needs nothing, or nothing whole, has empty parts
            needed_begin = tl.minimum(tl.maximum(first + shift - BEFORE, 0) // BLOCK, needed_end)
            whole_begin = tl.minimum(tl.cdiv(tl.maximum(last + shift - BEFORE, 0), BLOCK), needed_end)
            whole_end = tl.maximum(whole_end, whole_begin)
        if part == 0:
            begin = needed_begin
            end = whole_begin
        elif part == 1:
            begin = whole_begin
            end = whole_end
        else:
            begin = whole_end
            end = needed_end
    return begin, end


@triton.jit
def _visible(rows, columns, queries, keys, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """True where query `rows` sees key `columns`, two vectors turned so that they broadcast."""
    visible = (rows < queries) & (columns < keys)
    diagonal = rows + (keys - queries)
    if BEFORE >= 0:
        visible = visible & (columns >= diagonal - BEFORE)
    if AFTER >= 0:
        visible = visible & (columns <= diagonal + AFTER)
    return visible


# -------------------------------------------------------------------------------------------------- forward


@triton.jit
def forward_kernel(
    Q, K, V, O, LSE, REAL_KEYS, STARTS, TILES, queries, keys,
    SCALE: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O and LSE of a block of queries: its tiles of keys one after another, with the online softmax (Algorithm 1)."""
    NUMBER: tl.constexpr = LSE.dtype.element_ty  # format of the sums
    block = tl.program_id(0)
    first = block * BLOCK_QUERIES
    last = tl.minimum(first + BLOCK_QUERIES, queries) - 1
    head = _head()
    Q += head * queries * D
    O += head * queries * D
    LSE += head * queries
    K += head * keys * D
    V += head * keys * D
    if REAL_KEYS is not None:
        REAL_KEYS += tl.program_id(2).to(tl.int64) * keys

    rows = first + tl.arange(0, BLOCK_QUERIES)
    features = tl.arange(0, D_PADDED)
    q = _load(Q, rows, features, queries, D, False)
    m = tl.full([BLOCK_QUERIES], float("-inf"), NUMBER)  # running maximum of the scores, in units of log 2
    l = tl.zeros([BLOCK_QUERIES], NUMBER)  # running sum of exp2(score - m)
    o = tl.zeros([BLOCK_QUERIES, D_PADDED], NUMBER)  # output before the division by l
    for part in tl.static_range(3):
        begin, end = _tiles(part, block, first, last, keys - queries, keys, STARTS, BEFORE, AFTER, BLOCK_KEYS)
        for i in tl.range(begin, end):
            tile = i
            if STARTS is not None:
                tile = tl.load(TILES + i)
            columns = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
            k = _load(K, columns, features, keys, D, part == 1)
            # scaled after the product: q and k keep their format
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=NUMBER) * (SCALE * LOG2_E)
            if part != 1:
                s = tl.where(_visible(rows[:, None], columns[None, :], queries, keys, BEFORE, AFTER), s, float("-inf"))
            if REAL_KEYS is not None:
                real = tl.load(REAL_KEYS + columns, mask=columns < keys, other=0) != 0
                s = tl.where(real[None, :], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            # -inf minus -inf is NaN: a row that has seen no key yet subtracts 0
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - shift[:, None])
            rescale = tl.exp2(m - shift)
            l = l * rescale + tl.sum(p, 1)
            o = o * rescale[:, None]
            v = _load(V, columns, features, keys, D, part == 1)
            o = tl.dot(p.to(v.dtype), v, o, input_precision=PRECISION, out_dtype=NUMBER)
            m = m_new
    l = tl.where(l == 0.0, 1.0, l)  # a row without any key: O = 0 / 1, LSE = -inf + log 1
    _store(O, o / l[:, None], rows, features, queries, D)
    tl.store(LSE + rows, (m + tl.log2(l)) * LN_2, mask=rows < queries)


# ------------------------------------------------------------------------------------------------- backward
# A query without a key has LSE = -inf, hence P = exp2(inf): the masks put all of it to zero before it is used.


@triton.jit
def delta_kernel(
    O, DO, DELTA, queries, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_QUERIES: tl.constexpr
):  # fmt: skip
    """D = rowsum(dO ∘ O) of a block of queries, which equals rowsum(P ∘ dP) (Algorithm 2, line 4)."""
    head = _head()
    rows = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    features = tl.arange(0, D_PADDED)
    o = _load(O + head * queries * D, rows, features, queries, D, False).to(DELTA.dtype.element_ty)
    do = _load(DO + head * queries * D, rows, features, queries, D, False).to(DELTA.dtype.element_ty)
    tl.store(DELTA + head * queries + rows, tl.sum(o * do, 1), mask=rows < queries)


@triton.jit
def dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, REAL_KEYS, STARTS, TILES, queries, keys,
    SCALE: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries: scale * sum over its tiles of keys of dS K (Algorithm 2, line 15)."""
    NUMBER: tl.constexpr = LSE.dtype.element_ty
    block = tl.program_id(0)
    first = block * BLOCK_QUERIES
    last = tl.minimum(first + BLOCK_QUERIES, queries) - 1
    head = _head()
    Q += head * queries * D
    DO += head * queries * D
    DQ += head * queries * D
    K += head * keys * D
    V += head * keys * D
    if REAL_KEYS is not None:
        REAL_KEYS += tl.program_id(2).to(tl.int64) * keys

    rows = first + tl.arange(0, BLOCK_QUERIES)
    features = tl.arange(0, D_PADDED)
    q = _load(Q, rows, features, queries, D, False)
    do = _load(DO, rows, features, queries, D, False)
    lse = tl.load(LSE + head * queries + rows, mask=rows < queries, other=0.0) * LOG2_E
    delta = tl.load(DELTA + head * queries + rows, mask=rows < queries, other=0.0)
    dq = tl.zeros([BLOCK_QUERIES, D_PADDED], NUMBER)
    for part in tl.static_range(3):
        begin, end = _tiles(part, block, first, last, keys - queries, keys, STARTS, BEFORE, AFTER, BLOCK_KEYS)
        for i in tl.range(begin, end):
            tile = i
            if STARTS is not None:
                tile = tl.load(TILES + i)
            columns = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
            k = _load(K, columns, features, keys, D, part == 1)
            v = _load(V, columns, features, keys, D, part == 1)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=NUMBER) * (SCALE * LOG2_E)
            p = tl.exp2(s - lse[:, None])
            if part != 1:
                p = tl.where(_visible(rows[:, None], columns[None, :], queries, keys, BEFORE, AFTER), p, 0.0)
            if REAL_KEYS is not None:
                real = tl.load(REAL_KEYS + columns, mask=columns < keys, other=0) != 0
                p = tl.where(real[None, :], p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=NUMBER)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=NUMBER)
    _store(DQ, dq * SCALE, rows, features, queries, D)


@triton.jit
def dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, REAL_KEYS, STARTS, TILES, queries, keys,
    SCALE: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys, summed over its tiles of queries (Algorithm 2, lines 12 and 16).

    The tile is computed transposed, keys down and queries across: Sᵀ = K Qᵀ.
    """
    NUMBER: tl.constexpr = LSE.dtype.element_ty
    block = tl.program_id(0)
    first = block * BLOCK_KEYS
    last = tl.minimum(first + BLOCK_KEYS, keys) - 1
    head = _head()
    Q += head * queries * D
    DO += head * queries * D
    LSE += head * queries
    DELTA += head * queries
    K += head * keys * D
    V += head * keys * D
    DK += head * keys * D
    DV += head * keys * D

    columns = first + tl.arange(0, BLOCK_KEYS)
    features = tl.arange(0, D_PADDED)
    k = _load(K, columns, features, keys, D, False)
    v = _load(V, columns, features, keys, D, False)
    dk = tl.zeros([BLOCK_KEYS, D_PADDED], NUMBER)
    dv = tl.zeros([BLOCK_KEYS, D_PADDED], NUMBER)
    for part in tl.static_range(3):
        # seen from a key the limits change sides: it is seen by the queries j - shift - AFTER to j - shift + BEFORE
        begin, end = _tiles(part, block, first, last, queries - keys, queries, STARTS, AFTER, BEFORE, BLOCK_QUERIES)
        for i in tl.range(begin, end):
            tile = i
            if STARTS is not None:
                tile = tl.load(TILES + i)
            rows = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
            q = _load(Q, rows, features, queries, D, part == 1)
            do = _load(DO, rows, features, queries, D, part == 1)
            lse = tl.load(LSE + rows, mask=rows < queries, other=0.0) * LOG2_E
            delta = tl.load(DELTA + rows, mask=rows < queries, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=NUMBER) * (SCALE * LOG2_E)
            p = tl.exp2(s - lse[None, :])
            if part != 1:
                p = tl.where(_visible(rows[None, :], columns[:, None], queries, keys, BEFORE, AFTER), p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=NUMBER)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=NUMBER)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=NUMBER)
    if REAL_KEYS is not None:
        # every key has a row of its own here: those of the padding are put to zero once, at the end
        real = tl.load(REAL_KEYS + tl.program_id(2).to(tl.int64) * keys + columns, mask=columns < keys, other=0) != 0
        dk = tl.where(real[:, None], dk, 0.0)
        dv = tl.where(real[:, None], dv, 0.0)
    _store(DK, dk * SCALE, columns, features, keys, D)
    _store(DV, dv, columns, features, keys, D)
