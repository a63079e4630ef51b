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
# # Homework 8: attention patterns
#
# Ten exercises after the notebook *Attention patterns*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. A dilated window as a mask | 10 | 1 of 5 | optional |
# | 2. The memory that a block shares | 10 | 1 of 5 | optional |
# | 3. Labels for relative positions | 10 | 1 of 5 | optional |
# | 4. How far a stack of masks reaches | 15 | 2 of 5 | optional |
# | 5. Strided and fixed, merged | 15 | 2 of 5 | optional |
# | 6. A list, not a set | 10 | 2 of 5 | optional |
# | 7. Attention between permuted blocks | 20 | 3 of 5 | optional |
# | 8. Window attention in chunks | 30 | 3 of 5 | **core** |
# | 9. Find the bug: a window with global tokens | 20 | 3 of 5 | optional |
# | 10. A stream with sinks, counted | 20 | 3 of 5 | optional |
#
# Little time? Do exercise 8. Exercise 1 is a good way into it.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)` by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("patterns.window_mask", window_mask, explain=True)` names it at once.
# - Stuck? `hint("patterns.window_mask")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.
#
# A mask is a bool tensor with a row for every query and a column for every key. True means: may attend.
# Positions count from 0. A window counts **one side**: window 3 is 3 tokens before and 3 behind.

# %%
import math

import torch
import torch.nn.functional as F

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)

# %% [markdown]
# ## Exercise 1. A dilated window as a mask
#
# *10 minutes, difficulty 1 of 5, optional.*
#
# A window of `window` steps on each side, where every step is `dilation` tokens long.
# With `dilation = 1` it has no gaps.
#
# An example with 7 tokens, `window = 1`, `dilation = 2`. Token 3 goes one step of 2 to each side:
#
# | | key 0 | 1 | 2 | 3 | 4 | 5 | 6 |
# |---|---|---|---|---|---|---|---|
# | query 0 | x | | x | | | | |
# | query 3 | | x | | x | | x | |
# | query 6 | | | | | x | | x |
#
# Return the mask of shape `(length, length)`. The table of distances is done.

# %% tags=["exercise"]
def window_mask(length: int, window: int, dilation: int) -> torch.Tensor:
    """Mask (length, length) of a dilated window: bool, True = may attend."""
    position = torch.arange(length)
    distance = (position[:, None] - position[None, :]).abs()
    ### BEGIN SOLUTION
    in_reach = distance <= window * dilation
    on_a_step = distance % dilation == 0
    return in_reach & on_a_step
    ### END SOLUTION


# %% tags=["check"] points=1
check("patterns.window_mask", window_mask)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("patterns.window_mask")

# %% [markdown]
# **Look back.** Compare `window_mask(512, 32, 1).sum()` with `window_mask(512, 32, 4).sum()`.
# The second window reaches four times as far. Does it cost more? Where do the missing pairs come from?

# %% [markdown]
# ## Exercise 2. The memory that a block shares
#
# *10 minutes, difficulty 1 of 5, optional.*
#
# Local attention of the Image Transformer (Parmar et al. 2018) cuts the text into blocks of `block` tokens: the first
# is tokens 0 to `block - 1`, and the last may be cut off. All queries of a block share one **memory block**: their own
# block, and a **flange** of `flange` tokens on each side of it. With `causal` no key after the query is seen.
#
# An example with 10 tokens, `block = 4`, `flange = 1`:
#
# | query | its block | first and last key | the same, causal |
# |---|---|---|---|
# | 1 | 0 .. 3 | 0, 4 | 0, 1 |
# | 6 | 4 .. 7 | 3, 8 | 3, 6 |
# | 9 | 8 .. 9 | 7, 9 | 7, 9 |
#
# Return the positions of the first and the last key that the query may attend to, both included.

# %% tags=["exercise"]
def memory_block(query: int, length: int, block: int, flange: int, causal: bool) -> tuple[int, int]:
    """First and last key position, both included, that the query may attend to."""
    ### BEGIN SOLUTION
    start = query // block * block
    first = max(0, start - flange)
    last = query if causal else min(length - 1, start + block - 1 + flange)
    return first, last
    ### END SOLUTION


# %% tags=["check"] points=1
check("patterns.memory_block", memory_block)

# %% [markdown]
# **Look back.** Take the first and the last query of a block in a long text, causal: how many keys does each see?
# In a causal sliding window all late queries see equally many.
# What does a GPU gain if all queries of a block read the same keys?

# %% [markdown]
# ## Exercise 3. Labels for relative positions
#
# *10 minutes, difficulty 1 of 5, optional.*
#
# ETC (Ainslie et al. 2020) has no absolute positions. Each pair of a query and a key has a **label**, the number of
# a row in a table of learned vectors. With $k$ = `max_distance`:
#
# - 0: query and key have the same position;
# - 1 to $k$: the key stands that far to the **right** of the query, and $k$ also stands for all that is farther;
# - $k + 1$ to $2k$: the key stands 1 to $k$ to the **left**, and $2k$ also stands for all that is farther.
#
# An example: a query at position 5, `max_distance = 2`.
#
# | key position | 2 | 3 | 4 | 5 | 6 | 7 | 8 |
# |---|---|---|---|---|---|---|---|
# | label | 4 | 4 | 3 | 0 | 1 | 2 | 2 |
#
# `query_positions` is `(queries,)`, `key_positions` is `(keys,)`, both int64. Return the labels, int64,
# `(queries, keys)`.

# %% tags=["exercise"]
def relative_labels(query_positions: torch.Tensor, key_positions: torch.Tensor, max_distance: int) -> torch.Tensor:
    """Label of every pair: 0 same position, 1 .. k to the right, k + 1 .. 2k to the left."""
    ### BEGIN SOLUTION
    distance = key_positions[None, :] - query_positions[:, None]
    clipped = distance.clamp(-max_distance, max_distance)
    return torch.where(clipped >= 0, clipped, max_distance - clipped)
    ### END SOLUTION


# %% tags=["check"] points=1
check("patterns.relative_labels", relative_labels)

# %% [markdown]
# **Look back.** How many rows does the table of vectors need for a text of 512 tokens, and how many for one of 4,096?
# What does a token still know about the order of two others that both stand far to its right?

# %% [markdown]
# ## Exercise 4. How far a stack of masks reaches
#
# *15 minutes, difficulty 2 of 5, optional.*
#
# One layer with a window of 3 carries information over 3 tokens. Layers join such steps.
# `masks` holds one mask `(length, length)` for each layer, the lowest first.
# Which outputs of the whole stack can depend on which inputs?
#
# Every layer has a residual connection: it adds its input to its output.
#
# An example with three tokens. In layer 1 token 1 may attend to token 0, in layer 2 token 2 may attend to token 1,
# and nothing else. Then output 2 depends on inputs 0, 1 and 2. With the two layers exchanged, on 1 and 2 alone.
#
# Return a bool tensor `(length, length)`: True at `[i, j]` if output `i` can depend on input `j`.

# %% tags=["exercise"]
def reach(masks: list[torch.Tensor]) -> torch.Tensor:
    """True at [i, j] if output i of the stack can depend on input j; masks lowest layer first."""
    ### BEGIN SOLUTION
    itself = torch.eye(len(masks[0]), dtype=torch.bool)
    reached = itself
    for mask in masks:
        # i reads some m (or is m), and m depended on j one layer below
        reached = (mask | itself).float() @ reached.float() > 0
    return reached
    ### END SOLUTION


# %% tags=["check"] points=2
check("patterns.reach", reach)

# %% [markdown]
# **Look back.** The fixed pattern of the Sparse Transformer has two masks: the query's own block, and the summary
# tokens of all blocks. Put them into two layers, in both orders, and ask `reach` for each.
# Only one order lets the last token hear of the whole past. Which one, and why?

# %% [markdown]
# ## Exercise 5. Strided and fixed, merged
#
# *15 minutes, difficulty 2 of 5, optional.*
#
# The Sparse Transformer (Child et al. 2019) gives a head the union of two sets of keys. It is causal: no token sees
# a later one.
#
# - **Strided.** The last `stride` tokens, the query itself included; and every token that stands
#   a multiple of `stride` back.
# - **Fixed.** The query's own block of `stride` tokens; and the last `summary` tokens of **every** block.
#   The first block is tokens 0 to `stride - 1`.
#
# An example with `stride = 4`, `summary = 1`. Query 6 sees
#
# | | first set | second set | together |
# |---|---|---|---|
# | strided | 3, 4, 5, 6 | 2, 6 | 2, 3, 4, 5, 6 |
# | fixed | 4, 5, 6 | 3 | 3, 4, 5, 6 |
#
# Return the two merged masks, each `(length, length)`. `length` need not be a multiple of `stride`.

# %% tags=["exercise"]
def strided_and_fixed(length: int, stride: int, summary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged strided mask and the merged fixed mask: bool, True = may attend."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    ### BEGIN SOLUTION
    strided = (query - key < stride) | ((query - key) % stride == 0)
    fixed = (query // stride == key // stride) | (key % stride >= stride - summary)
    causal = key <= query
    return strided & causal, fixed & causal
    ### END SOLUTION


# %% tags=["check"] points=2
check("patterns.strided_and_fixed", strided_and_fixed)

# %% [markdown]
# **Look back.** The paper's strided window is one token longer than that of the released code: it goes back `stride`
# tokens, and the code `stride - 1`. In your merged mask this makes no difference. Why?

# %% [markdown]
# ## Exercise 6. A list, not a set
#
# *10 minutes, difficulty 2 of 5, optional.*
#
# In BigBird (Zaheer et al. 2020) every block of queries reads a **list** of blocks of keys. The softmax runs over the
# list: a block that stands in it twice weighs twice.
#
# - The first and the last query block list every block once.
# - Each other one lists the first block, the last block, its own and its two neighbours. Where some of these are the
#   same block, it is still listed once.
# - It then lists its row of `plan`, the random blocks. **Each entry adds one**, even for a block that is listed
#   already. An entry of -1 adds nothing.
#
# `plan` has the shape `(blocks, random_blocks)`, int64, for one head. What stands in its first and last row is ignored.
#
# An example with 6 blocks. Two rows of the answer:
#
# | | row of `plan` | key block 0 | 1 | 2 | 3 | 4 | 5 |
# |---|---|---|---|---|---|---|---|
# | query block 1 | 3, 3 | 1 | 1 | 1 | 2 | 0 | 1 |
# | query block 2 | -1, 5 | 1 | 1 | 1 | 1 | 0 | 2 |
#
# Return how often each key block is listed, int64, `(blocks, blocks)`.

# %% tags=["exercise"]
def bigbird_multiplicity(blocks: int, plan: torch.Tensor) -> torch.Tensor:
    """How often key block j stands in the list of query block i."""
    query, key = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
    ### BEGIN SOLUTION
    sees_all = (query == 0) | (query == blocks - 1)
    fixed = sees_all | (key == 0) | (key == blocks - 1) | ((query - key).abs() <= 1)
    drawn = (plan[:, :, None] == key).sum(dim=1)  # (blocks, random_blocks, blocks), summed over the entries
    return fixed + drawn.masked_fill(sees_all, 0)
    ### END SOLUTION


# %% tags=["check"] points=2
check("patterns.bigbird_multiplicity", bigbird_multiplicity)

# %% [markdown]
# **Look back.** The class of the transformers library replaces every random block by block 0 when the model is not
# in training. Ask your function with `torch.zeros(8, 3, dtype=torch.int64)`: how often is block 0 listed?
# What happens to the weights of all other keys? Our library keeps one plan for training and evaluation.

# %% [markdown]
# ## Exercise 7. Attention between permuted blocks
#
# *20 minutes, difficulty 3 of 5, optional.*
#
# BlockBERT (Qiu et al. 2019) cuts the text into blocks. In head `h`, block `b` of the **queries** attends to block
# `permutations[h, b]` of the **keys**, and to no other.
#
# An example: three blocks, and the row `[1, 2, 0]`. Queries of block 0 read keys of block 1, those of block 1 read
# block 2, those of block 2 read block 0.
#
# - `q`, `k`, `v` have the shape `(batch, heads, length, d_head)`; `permutations` is `(heads, blocks)`, whole numbers.
# - `length` is a multiple of the number of blocks. There is no padding.
# - The scores are divided by the square root of `d_head`, as always.
#
# Return `(batch, heads, length, d_head)`. No table of all pairs is needed.

# %% tags=["exercise"]
def block_permuted_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, permutations: torch.Tensor
) -> torch.Tensor:
    """Block b of the queries of head h attends to block permutations[h, b] of the keys."""
    ### BEGIN SOLUTION
    heads, blocks = permutations.shape
    q, k, v = (x.unflatten(2, (blocks, -1)) for x in (q, k, v))  # (batch, heads, blocks, size, d_head)
    head = torch.arange(heads)[:, None]
    k, v = k[:, head, permutations], v[:, head, permutations]
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (weights @ v).flatten(2, 3)
    ### END SOLUTION


# %% tags=["check"] points=3
check("patterns.block_permuted_attention", block_permuted_attention)

# %% [markdown]
# **Look back.** With the row `[1, 2, 0]` no token sees itself, nor its neighbours. What keeps the token's own
# content alive in such a layer? And what would a model lose in which **all** heads have that row?

# %% [markdown]
# ## Exercise 8. Window attention in chunks
#
# *30 minutes, difficulty 3 of 5, **core**.*
#
# Every query sees the tokens at most `window` away, before and behind (no dilation). A mask on a table of n x n scores
# gives the right answer and saves nothing. Here no tensor may hold a number for every pair of tokens.
#
# The usual way: cut the queries into chunks of `window` tokens. The keys of a chunk all lie in three chunks:
# the one to the left, its own, and the one to the right. `unfold` gives overlapping pieces:
#
# ```python
# x = torch.tensor([10, 11, 12, 13, 14, 15])      # 3 chunks of 2
# F.pad(x, (2, 2)).unfold(0, 6, 2)
# # [[ 0,  0, 10, 11, 12, 13],
# #  [10, 11, 12, 13, 14, 15],
# #  [12, 13, 14, 15,  0,  0]]
# ```
#
# - `q`, `k`, `v` have the shape `(batch, heads, length, d_head)`; any `length`, `window` at least 1.
# - `key_padding_mask` is `(batch, length)`, True for a real token. Padded keys are never seen.
# - **Rows of padded queries are zeros.** Nothing may become NaN, in the output or in the gradients,
#   even if a text is padding alone.
#
# Return `(batch, heads, length, d_head)`.

# %% tags=["exercise"]
def window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_padding_mask: torch.Tensor, window: int
) -> torch.Tensor:
    """Attention to the real tokens at most `window` away, without a table of n x n numbers."""
    ### BEGIN SOLUTION
    length, d_head = q.shape[2:]
    fill = -length % window
    # a chunk of queries, and its keys: one chunk to the left, its own, one to the right
    q = F.pad(q, (0, 0, 0, fill)).unflatten(2, (-1, window))
    k, v = (F.pad(x, (0, 0, window, fill + window)).unfold(2, 3 * window, window).mT for x in (k, v))
    real = F.pad(key_padding_mask, (window, fill + window)).unfold(1, 3 * window, window)
    distance = torch.arange(3 * window)[None, :] - window - torch.arange(window)[:, None]
    allowed = (distance.abs() <= window) & real[:, None, :, None, :]
    scores = q @ k.mT / math.sqrt(d_head)
    # the smallest finite number, not -inf: a row without any key must not give 0 / 0
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(dim=-1)
    output = (weights @ v).flatten(2, 3)[:, :, :length]
    return output.masked_fill(~key_padding_mask[:, None, :, None], 0)
    ### END SOLUTION


# %% tags=["check"] points=4
check("patterns.window_attention", window_attention)

# %% [markdown]
# **Look back.** Each query is compared with `3 * window` keys, and `2 * window + 1` of them count.
# The rest is the price of computing with whole chunks. What would smaller chunks change?
# Your function is an attention of the course: in `Encoder(config, attention=...)` it can stand in for the dense one
# (give `window` with `functools.partial`).

# %% [markdown]
# ## Exercise 9. Find the bug: a window with global tokens
#
# *20 minutes, difficulty 3 of 5, optional.*
#
# Longformer (Beltagy et al. 2020) adds a few **global** tokens to the window. Every query sees the tokens at most
# `window` away **and** all global tokens. A global query sees every token.
#
# `global_tokens` is a bool tensor `(length,)`, the same for the whole batch. There is no padding. Here both kinds of
# tokens use the same `q`, `k` and `v`.
#
# The function below gives the global keys columns of their own, as a fast version would. All weights of a query
# sum to 1, and the outputs look right. Still some outputs are wrong. Find out which, and repair it.

# %% tags=["exercise"]
def window_with_globals(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, global_tokens: torch.Tensor
) -> torch.Tensor:
    """Sliding window and global tokens: (batch, heads, length, d_head) each, output too."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    position = torch.arange(q.shape[2])
    near = (position[:, None] - position[None, :]).abs() <= window

    to_globals = scores[..., global_tokens]  # (batch, heads, length, number of globals)
    ### BEGIN SOLUTION
    local = scores.masked_fill(~near | global_tokens, -math.inf)  # a global key has its column already
    ### END SOLUTION
    ### BEGIN STARTER
    local = scores.masked_fill(~near, -math.inf)  # (batch, heads, length, length)
    ### END STARTER
    weights = torch.cat([to_globals, local], dim=-1).softmax(dim=-1)
    count = int(global_tokens.sum())
    output = weights[..., :count] @ v[:, :, global_tokens] + weights[..., count:] @ v

    output[:, :, global_tokens] = scores[:, :, global_tokens].softmax(dim=-1) @ v
    return output


# %% tags=["check"] points=3
check("patterns.window_with_globals", window_with_globals)

# %% [markdown]
# **Look back.** To count a key twice is to add log 2 to its score. No error is raised, and no sum is off.
# In which of the lecture's patterns can a key come up twice by design, and what must a reference do then?

# %% [markdown]
# ## Exercise 10. A stream with sinks, counted
#
# *20 minutes, difficulty 3 of 5, optional.*
#
# A model that writes without end cannot keep all keys. StreamingLLM (Xiao et al. 2023, arXiv 2309.17453) keeps the
# last ones **and** the first few of the text, the *attention sinks*. The library does not have this pattern.
#
# A query sees itself, the `window` tokens before it, and the first `sinks` tokens of the text.
# It never sees a later token, a sink or not.
#
# An example with 6 tokens, `window = 1`, `sinks = 2`:
#
# | query | 0 | 1 | 2 | 3 | 4 | 5 |
# |---|---|---|---|---|---|---|
# | keys | 0 | 0, 1 | 0, 1, 2 | 0, 1, 2, 3 | 0, 1, 3, 4 | 0, 1, 4, 5 |
#
# Together 1 + 2 + 3 + 4 + 4 + 4 = 18 pairs.
#
# Return the number of pairs (query, key), as an `int`, by a formula. The check asks for 20 million tokens:
# a mask has no room there, and a loop over all tokens would be slow.

# %% tags=["exercise"]
def sink_pairs(length: int, window: int, sinks: int) -> int:
    """Number of allowed pairs (query, key) of a causal window with sinks."""
    ### BEGIN SOLUTION
    most = sinks + window + 1  # keys of a late query
    growing = min(length, most)  # query i of these has i + 1 keys: it sees all before it
    return growing * (growing + 1) // 2 + (length - growing) * most
    ### END SOLUTION


# %% tags=["check"] points=3
check("patterns.sink_pairs", sink_pairs)

# %% [markdown]
# **Look back.** Compare `sink_pairs(10_000, 1020, 4)` with `sink_pairs(10_000, 1024, 0)`.
# Sinks cost nothing if the window gives up as many tokens. What the lecture measured on real heads says why the
# exchange can be worth it: where does much of the attention go?
