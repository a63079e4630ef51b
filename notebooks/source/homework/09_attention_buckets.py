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
# # Homework 9: attention that chooses its pairs
#
# Eight exercises after the notebook *Attention that chooses its pairs, or shortens its keys*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. The bucket of a vector | 10 | 1 of 5 | optional |
# | 2. Sort by bucket, cut into chunks | 15 | 2 of 5 | optional |
# | 3. Several rounds, one softmax | 20 | 2 of 5 | **core** |
# | 4. Find the bug: shared queries and keys | 20 | 3 of 5 | optional |
# | 5. The tokens of a cluster | 10 | 2 of 5 | optional |
# | 6. Compressed slots without the future | 10 | 2 of 5 | optional |
# | 7. Fewer keys by projection | 20 | 2 of 5 | optional |
# | 8. Scores from two short factors | 10 | 2 of 5 | optional |
#
# Little time? Do exercise 3. Exercises 1 and 2 lead to it.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)` by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("buckets.hash", buckets, explain=True)` names it at once.
# - Stuck? `hint("buckets.hash")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.

# %%
import torch
import torch.nn.functional as F

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)

# %% [markdown]
# ## Exercise 1. The bucket of a vector
#
# *10 minutes, difficulty 1 of 5, optional.*
#
# Reformer (Kitaev et al. 2020): $h(x) = \arg\max\,[\,xR\,;\,-xR\,]$. There is one rotation $R$ for each round.
#
# An example with the two axes as directions: $(2, 1)$ gives $[2, 1, -2, -1]$, so bucket 0; $(1, -2)$ gives $[1, -2, -1, 2]$, so bucket 3.
#
# Return the bucket of every token in every round.

# %% tags=["exercise"]
def buckets(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Buckets (hashes, length) of `x` (length, d_head) under `rotations` (hashes, d_head, half_buckets)."""
    ### BEGIN SOLUTION
    rotated = x @ rotations
    return torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)
    ### END SOLUTION


# %% tags=["check"] points=1
check("buckets.hash", buckets)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("buckets.hash")

# %% [markdown]
# **Look back.** Multiply `x` by 100: what happens to the buckets? And by -1?

# %% [markdown]
# ## Exercise 2. Sort by bucket, cut into chunks
#
# *15 minutes, difficulty 2 of 5, optional.*
#
# Sort the tokens by bucket, and inside a bucket by their position in the text. Cut the sorted list into chunks of `chunk` tokens.
#
# An example: buckets 1, 0, 2, 0, 1, 0 in chunks of two. Sorted, the tokens are 1, 3, 5, 0, 4, 2. The chunks are (1, 3), (5, 0), (4, 2), so token 0 is in chunk 1.
#
# Return the chunks, with the tokens' positions, and for every token the number of its chunk. The length is a multiple of `chunk`.

# %% tags=["exercise"]
def sorted_chunks(buckets: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (chunks, chunk) sorted by bucket (length,), and the chunk (length,) of every token."""
    ### BEGIN SOLUTION
    order = buckets.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return order.view(-1, chunk), place // chunk
    ### END SOLUTION


# %% tags=["check"] points=2
check("buckets.sorted_chunks", sorted_chunks)

# %% [markdown]
# **Look back.** Three tokens of one bucket can lie in three chunks only if the bucket is large. Why then look back by exactly one chunk?

# %% [markdown]
# ## Exercise 3. Several rounds, one softmax
#
# *20 minutes, difficulty 2 of 5, core.*
#
# Each round gives an output for every token, and the logarithm of the sum of $e^{\text{score}}$ over the keys that it met: `sizes`. It is $-\infty$ where a token met no key. Join the rounds so that the result is **one** softmax over
# all keys of all rounds:
#
# $$o_i = \sum_r \frac{e^{\ell_i^{(r)}}}{\sum_{r'} e^{\ell_i^{(r')}}}\; o_i^{(r)}$$
#
# Sizes can be in the hundreds: take care that no exponential overflows. A token without a key in any round gets zeros.

# %% tags=["exercise"]
def combine_rounds(outputs: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Outputs (rounds, length, d_head) with log-sum-exp `sizes` (rounds, length), joined to (length, d_head)."""
    ### BEGIN SOLUTION
    total = sizes.logsumexp(dim=0)
    total = torch.where(total == -torch.inf, 0.0, total)  # no key anywhere: every weight is exp(-inf) = 0
    weights = (sizes - total).exp()
    return (weights[:, :, None] * outputs).sum(dim=0)
    ### END SOLUTION


# %% tags=["check"] points=2
check("buckets.combine_rounds", combine_rounds)

# %% [markdown]
# **Look back.** The same formula joins blocks of keys in FlashAttention (notebook 11), where the rounds are tiles of one row. What is different there: can a key come up twice?

# %% [markdown]
# ## Exercise 4. Find the bug: shared queries and keys
#
# *20 minutes, difficulty 3 of 5, optional.*
#
# In Reformer a vector is query and key at once. The key has length 1. A token may attend to itself **only if there is nothing else**. The function below attends inside one chunk, with the future hidden. It looks right, and two things are wrong: one shows with a
# single token, the other only with three or more. Repair both.

# %% tags=["exercise"]
def shared_attention(qk: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention (length, d_head) with keys qk / |qk| and no further scale; itself only as a last resort."""
    length = len(qk)
    itself = torch.eye(length, dtype=torch.bool)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    ### BEGIN SOLUTION
    scores = qk @ F.normalize(qk, dim=-1).T
    scores = scores - 1e5 * itself
    ### END SOLUTION
    ### BEGIN STARTER
    scores = qk @ F.normalize(qk, dim=0).T
    scores = scores.masked_fill(itself, -torch.inf)
    ### END STARTER
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v


# %% tags=["check"] points=2
check("buckets.shared_attention", shared_attention)

# %% [markdown]
# **Look back.** Why must keys have the same length, when the hash has looked at directions only?

# %% [markdown]
# ## Exercise 5. The tokens of a cluster
#
# *10 minutes, difficulty 2 of 5, optional.*
#
# In the Routing Transformer (Roy et al. 2020) each centroid takes the `window` tokens that are most similar to it, out of the whole text. Padding is never taken: `real` is True for real tokens.
#
# An example: similarities 0.1, 0.9, 0.3, 1.0 and a window of two give the tokens 1, 3. They stand **in the order of the text**.

# %% tags=["exercise"]
def cluster_members(similarity: torch.Tensor, real: torch.Tensor, window: int) -> torch.Tensor:
    """Tokens (clusters, window) of every cluster by `similarity` (clusters, length); `real` is (length,)."""
    ### BEGIN SOLUTION
    similarity = similarity.masked_fill(~real, -torch.inf)
    return similarity.topk(window, dim=1).indices.sort(dim=1).values
    ### END SOLUTION


# %% tags=["check"] points=1
check("buckets.cluster_members", cluster_members)

# %% [markdown]
# **Look back.** Append one more token to the text that is very similar to a centroid. What happens to the members before it? Is the selection causal?

# %% [markdown]
# ## Exercise 6. Compressed slots without the future
#
# *10 minutes, difficulty 2 of 5, optional.*
#
# Memory-compressed attention (Liu et al. 2018) turns every `factor` tokens into one slot. Slot $m \ge 1$ holds the tokens $(m-1) \cdot$ `factor` to $m \cdot$ `factor` $- 1$. An unfinished last block has no slot. Slot 0 stands in front: it is the first token,
# and every query sees it. A query sees slot $m$ only when all its tokens come **before** the query.
#
# An example with 7 tokens, three to a slot. Queries 0 to 2 see slot 0, queries 3 to 5 slots 0 and 1, query 6 slots 0, 1 and 2.

# %% tags=["exercise"]
def visible_slots(length: int, factor: int) -> torch.Tensor:
    """Mask (length, 1 + length // factor): True where the query may see the slot."""
    ### BEGIN SOLUTION
    query = torch.arange(length)[:, None]
    slot = torch.arange(1 + length // factor)
    return slot * factor <= query
    ### END SOLUTION


# %% tags=["check"] points=1
check("buckets.visible_slots", visible_slots)

# %% [markdown]
# **Look back.** What does a query know of the two tokens right before it? The paper puts layers of local attention between these. Why?

# %% [markdown]
# ## Exercise 7. Fewer keys by projection
#
# *20 minutes, difficulty 2 of 5, optional.*
#
# Linformer (Wang et al. 2020): $\text{softmax}(Q (E K)^\top / \sqrt d)\, F V$, for one head. `project_k` is $E$, `project_v` is $F$. Padded keys and values must count nothing: there is no later place to take them out.

# %% tags=["exercise"]
def project_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    real: torch.Tensor,
    project_k: torch.Tensor,
    project_v: torch.Tensor,
) -> torch.Tensor:
    """Output (length, d_head) of q, k, v (length, d_head), real (length,), projections (projected, length)."""
    ### BEGIN SOLUTION
    short_k = project_k @ k.masked_fill(~real[:, None], 0)
    short_v = project_v @ v.masked_fill(~real[:, None], 0)
    scores = q @ short_k.T / q.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ short_v
    ### END SOLUTION


# %% tags=["check"] points=2
check("buckets.project_keys", project_keys)

# %% [markdown]
# **Look back.** A text of 10 real tokens in a batch of length 500, and mean pooling to 50 keys: how many of the keys are zeros, and which score do they get?

# %% [markdown]
# ## Exercise 8. Scores from two short factors
#
# *10 minutes, difficulty 2 of 5, optional.*
#
# The factorised dense Synthesizer (Tay et al. 2020) makes two short rows for every query, `first` with $a$ entries and `second` with $b$, and from them the scores for $ab$ keys:
#
# $$S_{ij} = \text{first}_{i,\; j \,\text{div}\, b} \cdot \text{second}_{i,\; j \bmod b}$$
#
# An example: (1, 10) and (1, 2, 3) give 1, 2, 3, 10, 20, 30. A text may be shorter than $ab$: return the first `length` columns.

# %% tags=["exercise"]
def factorized_scores(first: torch.Tensor, second: torch.Tensor, length: int) -> torch.Tensor:
    """Scores (queries, length) from `first` (queries, a) and `second` (queries, b)."""
    ### BEGIN SOLUTION
    a, b = first.shape[1], second.shape[1]
    scores = first.repeat_interleave(b, dim=1) * second.repeat(1, a)
    return scores[:, :length]
    ### END SOLUTION


# %% tags=["check"] points=1
check("buckets.factorized_scores", factorized_scores)

# %% [markdown]
# **Look back.** 1,024 keys from $a = b = 32$: how many numbers does a query make, and can they form every row of 1,024 scores?
