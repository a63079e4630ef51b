# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Homework 11: attention in tiles
#
# Six exercises after the notebook *FlashAttention: all pairs, little traffic*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. Softmax in one pass | 20 | 2 of 5 | **core** |
# | 2. Which tiles are computed | 20 | 3 of 5 | optional |
# | 3. Attention in tiles | 35 | 4 of 5 | **core** |
# | 4. Gradients from tiles made again | 40 | 4 of 5 | optional |
# | 5. Count the bytes | 20 | 2 of 5 | optional |
# | 6. Find the bug: the masks of a kernel | 25 | 3 of 5 | optional |
#
# Little time? Do exercise 1, then exercise 3: it is exercise 1 with two loops around it.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)` by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
#   Their lengths are seldom powers of two, and queries and keys often differ in number.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("flash.online_softmax", online_softmax, explain=True)` names it at once.
# - Stuck? `hint("flash.online_softmax")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.
#
# Everything is for one head and one text, without a batch. A text has `queries` queries and `keys` keys.
# **Causal** means aligned at the end: query `i` stands at key `i + keys - queries`, and sees the keys up to it.
# If there are fewer keys than queries, the first queries see none. Their output is 0.

# %%
import math

import torch

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)

# %% [markdown]
# ## Exercise 1. Softmax in one pass
#
# *20 minutes, difficulty 2 of 5, core.*
#
# The keys come in tiles. `scores[t]` is (queries, keys of tile t), `values[t]` is (keys of tile t, d). Tiles differ in width.
# Go through them **once**, and return three things:
#
# - the output, softmax over all keys times values, (queries, d);
# - the maximum $m$ of each query's scores, (queries,);
# - the sum $l$ of $\exp(\text{score} - m)$ over all keys, (queries,).
#
# A score of $-\infty$ is a key that this query may not see. A query that sees none has output 0, $m = -\infty$ and $l = 0$.
#
# An example: one query, scores 1, 2 in the first tile and 4 in the second. After the first tile $m = 2$ and $l = e^{-1} + 1 = 1.37$.
# After the second $m = 4$ and $l = e^{-3} + e^{-2} + 1 = 1.19$.

# %% tags=["exercise"]
def online_softmax(
    scores: list[torch.Tensor], values: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (queries, d), maximum (queries,) and sum (queries,) from tiles of scores and of values."""
    ### BEGIN SOLUTION
    m = torch.full_like(scores[0][:, 0], -math.inf)
    total = torch.zeros_like(m)
    output = torch.zeros(len(m), values[0].shape[1], dtype=m.dtype)
    for s, v in zip(scores, values, strict=True):
        m_new = torch.maximum(m, s.amax(dim=1))
        subtracted = m_new.masked_fill(m_new == -math.inf, 0)  # -inf - (-inf) would be NaN
        p, rescale = (s - subtracted[:, None]).exp(), (m - subtracted).exp()
        total = rescale * total + p.sum(dim=1)
        output = rescale[:, None] * output + p @ v
        m = m_new
    return torch.where(total[:, None] > 0, output / total[:, None], 0), m, total
    ### END SOLUTION


# %% tags=["check"] points=2
check("flash.online_softmax", online_softmax)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("flash.online_softmax")

# %% [markdown]
# **Look back.** The rescaling factor is never above 1. Why? What would a factor above 1 tell you? (The text of FlashAttention-2 prints its inverse.)

# %% [markdown]
# ## Exercise 2. Which tiles are computed
#
# *20 minutes, difficulty 3 of 5, optional.*
#
# Cut the table of scores into tiles of `block_queries` x `block_keys`. The last blocks may be short. Return a list of rows, one for each block of queries,
# with a word for each block of keys:
#
# - `"skipped"`: no query of the tile sees a key of it;
# - `"full"`: all of its `block_keys` keys exist, and each of its queries sees all of them, so no mask is needed;
# - `"partial"`: everything else.
#
# Four queries, four keys, tiles of 2 x 2, causal: `[["partial", "skipped"], ["full", "partial"]]`. Without `causal` only the end of the keys needs a mask.

# %% tags=["exercise"]
def tile_kinds(queries: int, keys: int, block_queries: int, block_keys: int, causal: bool) -> list[list[str]]:
    """The kind of every tile, "skipped", "partial" or "full"; a row for each block of queries."""
    ### BEGIN SOLUTION
    table = []
    for first_query in range(0, queries, block_queries):
        last_query = min(first_query + block_queries, queries) - 1
        row = []
        for first_key in range(0, keys, block_keys):
            last_key = first_key + block_keys - 1
            if causal and first_key > last_query + keys - queries:
                row.append("skipped")
            elif last_key >= keys or (causal and last_key > first_query + keys - queries):
                row.append("partial")
            else:
                row.append("full")
        table.append(row)
    return table
    ### END SOLUTION


# %% tags=["check"] points=2
check("flash.tile_kinds", tile_kinds)

# %% [markdown]
# **Look back.** A model writes its 1,000th token: one query, 1,000 keys, causal. Which tiles are skipped?

# %% [markdown]
# ## Exercise 3. Attention in tiles
#
# *35 minutes, difficulty 4 of 5, core.*
#
# The forward pass of FlashAttention-2 (Dao 2023). Scores are $S = Q K^\top / \sqrt{d}$. Take a block of queries, go through the blocks of keys as in exercise 1, and go on to the next block of queries.
# Return the output (queries, d_head) and the **log-sum-exp** of each query's scores, $\text{lse} = m + \log l$, natural logarithm, $-\infty$ where there is no key.
#
# If the text is longer than the tiles, no tensor may have as many entries as the table of all queries and keys. Lengths need not be multiples of the blocks.

# %% tags=["exercise"]
def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_queries: int, block_keys: int, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (queries, d_head) and log-sum-exp (queries,) of q (queries, d_head) and k, v (keys, d_head)."""
    queries, keys, d_head = len(q), len(k), q.shape[1]
    ### BEGIN SOLUTION
    outputs, sums = [], []
    for first_query in range(0, queries, block_queries):
        q_tile = q[first_query : first_query + block_queries]
        place = torch.arange(first_query, first_query + len(q_tile))[:, None] + keys - queries
        m = q_tile.new_full((len(q_tile),), -math.inf)
        total, output = torch.zeros_like(m), torch.zeros_like(q_tile)
        for first_key in range(0, keys, block_keys):
            k_tile, v_tile = k[first_key : first_key + block_keys], v[first_key : first_key + block_keys]
            s = q_tile @ k_tile.T / math.sqrt(d_head)
            if causal:
                s = s.masked_fill(torch.arange(first_key, first_key + len(k_tile)) > place, -math.inf)
            m_new = torch.maximum(m, s.amax(dim=1))
            subtracted = m_new.masked_fill(m_new == -math.inf, 0)
            p, rescale = (s - subtracted[:, None]).exp(), (m - subtracted).exp()
            total = rescale * total + p.sum(dim=1)
            output = rescale[:, None] * output + p @ v_tile
            m = m_new
        outputs.append(torch.where(total[:, None] > 0, output / total[:, None], 0))
        sums.append(m + total.log())
    return torch.cat(outputs), torch.cat(sums)
    ### END SOLUTION


# %% tags=["check"] points=4
check("flash.forward", flash_forward)

# %% [markdown]
# **Look back.** This computes tiles that exercise 2 calls skipped. Which line would you add? And what happens to the last tile of keys if a kernel fills it up with zeros?

# %% [markdown]
# ## Exercise 4. Gradients from tiles made again
#
# *40 minutes, difficulty 4 of 5, optional.*
#
# The weights were never stored. The backward pass makes each tile of them again, from the log-sum-exp. With $S = \text{scale} \cdot QK^\top$, $\text{scale} = 1/\sqrt{d}$ and $\circ$ entry by entry
# (here $dS$ contains the scale, in the lecture it does not):
#
# $$\begin{aligned}
# \text{delta} &= \text{rowsum}(dO \circ O) & P &= \exp(S - \text{lse}) & dV &= P^\top dO\\
# dP &= dO\, V^\top & dS &= P \circ (dP - \text{delta}) \cdot \text{scale} & dQ &= dS\, K \qquad dK = dS^\top Q
# \end{aligned}$$
#
# Return the gradients of one head, tile by tile. Again, no table of all queries and keys. A query that sees no key has lse $-\infty$. It gets and gives 0.

# %% tags=["exercise"]
def flash_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    block_queries: int,
    block_keys: int,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients at q (queries, d_head), k and v (keys, d_head); output and grad_output are shaped like q."""
    queries, keys, d_head = len(q), len(k), q.shape[1]
    ### BEGIN SOLUTION
    scale = d_head**-0.5
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad_output * output).sum(dim=1)
    lse = lse.masked_fill(lse == -math.inf, 0)  # exp(-inf - 0) is 0, exp(-inf + inf) NaN
    for first_query in range(0, queries, block_queries):
        rows = slice(first_query, first_query + block_queries)
        place = torch.arange(queries)[rows, None] + keys - queries
        for first_key in range(0, keys, block_keys):
            columns = slice(first_key, first_key + block_keys)
            s = q[rows] @ k[columns].T * scale
            if causal:
                s = s.masked_fill(torch.arange(keys)[columns] > place, -math.inf)
            p = (s - lse[rows, None]).exp()
            dv[columns] += p.T @ grad_output[rows]
            dp = grad_output[rows] @ v[columns].T
            ds = p * (dp - delta[rows, None]) * scale
            dq[rows] += ds @ k[columns]
            dk[columns] += ds.T @ q[rows]
    return dq, dk, dv
    ### END SOLUTION


# %% tags=["check"] points=4
check("flash.backward", flash_backward)

# %% [markdown]
# **Look back.** Two blocks of queries add to the same `dk`. What goes wrong on a GPU that computes them at the same time? What do two separate kernels, one for `dq` and one for `dk` and `dv`, cost instead?

# %% [markdown]
# ## Exercise 5. Count the bytes
#
# *20 minutes, difficulty 2 of 5, optional.*
#
# How many bytes does the forward pass of one head move between the large, slow memory and the small, fast one?
#
# - A block of queries is loaded once, and its output is stored once. Each number takes `itemsize` bytes.
# - The log-sum-exp is stored once: 4 bytes for each query.
# - For every tile that is not skipped (see exercise 2), its keys and its values are loaded. The last tile ends with the keys.
#
# An example, not causal: 5 queries, 7 keys, `d_head` 2, `itemsize` 2, blocks of 3 queries. Two blocks of queries load 7 keys each.
# Queries and output 2 · 5 · 2 · 2 = 40, keys and values 2 · (2 · 7) · 2 · 2 = 112, log-sum-exp 4 · 5 = 20: 172 bytes.

# %% tags=["exercise"]
def bytes_moved(
    queries: int, keys: int, d_head: int, itemsize: int, block_queries: int, block_keys: int, causal: bool
) -> int:
    """Bytes loaded and stored by the forward pass of one head in tiles."""
    ### BEGIN SOLUTION
    rows = 0  # keys loaded, all blocks of queries together
    for first_query in range(0, queries, block_queries):
        last_query = min(first_query + block_queries, queries) - 1
        end = max(0, last_query + keys - queries + 1) if causal else keys
        whole_tiles = -(-end // block_keys) * block_keys
        rows += min(whole_tiles, keys)
    return itemsize * d_head * (2 * queries + 2 * rows) + 4 * queries
    ### END SOLUTION


# %% tags=["check"] points=2
check("flash.bytes", bytes_moved)

# %% [markdown]
# **Look back.** `block_keys` matters only with `causal`. Why? And why are tiles high in practice, and not only wide?

# %% [markdown]
# ## Exercise 6. Find the bug: the masks of a kernel
#
# *25 minutes, difficulty 3 of 5, optional.*
#
# A Triton kernel for the softmax of each row. Program `r` works on row `r`, which lies at `scores + r * row_stride`. The row has `length` numbers.
# The block has `BLOCK` lanes, a power of two, at least `length`. Behind a row may lie other numbers, or the end of the memory.
#
# The kernel below is right if `length` is `BLOCK`, and only then. Repair it. `tl.load(..., mask=..., other=...)` gives `other` in lanes where the mask is False.
#
# Write it as a plain function. The check puts `@triton.jit` on it and runs it in Triton's interpreter, where reading or writing outside a tensor is an error.
# Before the kernel, `weights` holds -1 everywhere. What does not belong to a row must stay -1. (Triton exists on Linux only. Elsewhere this exercise is not checked.)

# %%
try:
    import triton.language as tl
except ImportError:
    tl = None

# %% tags=["exercise"]
def row_softmax(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    """Write the softmax of row `tl.program_id(0)` of `scores` to the same places of `weights`."""
    first = tl.program_id(0) * row_stride
    columns = tl.arange(0, BLOCK)
    ### BEGIN SOLUTION
    inside = columns < length
    row = tl.load(scores + first + columns, mask=inside, other=-float("inf"))
    powers = tl.exp(row - tl.max(row, axis=0))
    tl.store(weights + first + columns, powers / tl.sum(powers, axis=0), mask=inside)
    ### END SOLUTION
    ### BEGIN STARTER
    row = tl.load(scores + first + columns)
    powers = tl.exp(row - tl.max(row, axis=0))
    tl.store(weights + first + columns, powers / tl.sum(powers, axis=0))
    ### END STARTER


# %% tags=["check"] points=3
from effnlp_lessons.homework.flash import interpreted

if tl is None:
    print("Not checked: there is no Triton on this machine.")
else:
    check("flash.masked_tail", interpreted(row_softmax))

# %% [markdown]
# **Look back.** Remove `other=` from your solution and check again. It fails here. What does a GPU put into those lanes?
