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
# # Homework 10: linear attention and memories
#
# Six exercises after the notebook *Attention that accumulates, and attention that remembers*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. Linear attention | 15 | 1 of 5 | optional |
# | 2. Linear attention by running sums | 20 | 2 of 5 | **core** |
# | 3. One step of a recurrence | 10 | 2 of 5 | optional |
# | 4. The relative shift | 25 | 3 of 5 | optional |
# | 5. Find the bug: two queues | 15 | 2 of 5 | optional |
# | 6. A loss for the compression alone | 25 | 3 of 5 | optional |
#
# Little time? Do exercise 2. Exercise 1 is a good way into it.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)` by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("recurrent.linear_attention", linear_attention, explain=True)` names it at once.
# - Stuck? `hint("recurrent.linear_attention")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.
#
# Everything is for one head and one text, without a batch.

# %%
import torch
import torch.nn.functional as F

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)


def phi(x: torch.Tensor) -> torch.Tensor:
    """The feature map of linear attention, always positive."""
    return F.elu(x) + 1


# %% [markdown]
# ## Exercise 1. Linear attention
#
# *15 minutes, difficulty 1 of 5, optional.*
#
# $$O = \phi(Q)\left(\phi(K)^\top V\right) \oslash \phi(Q)\left(\phi(K)^\top \mathbf 1\right)$$
#
# Keys where `real` is False are padding and count nothing. Nothing is scaled.

# %% tags=["exercise"]
def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Output (length, d_value) of q, k (length, d_head), v (length, d_value), real (length,)."""
    ### BEGIN SOLUTION
    keys = phi(k) * real[:, None]
    return phi(q) @ (keys.T @ v) / (phi(q) @ keys.sum(dim=0))[:, None]
    ### END SOLUTION


# %% tags=["check"] points=1
check("recurrent.linear_attention", linear_attention)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("recurrent.linear_attention")

# %% [markdown]
# **Look back.** Why would it be wrong to set padded *keys* to zero before `phi`?

# %% [markdown]
# ## Exercise 2. Linear attention by running sums
#
# *20 minutes, difficulty 2 of 5, core.*
#
# Causal: query $i$ sees the keys $j \le i$, itself included. No table of queries and keys is needed: keep the running sums of $\phi(k_j)\, v_j^\top$ and of $\phi(k_j)$. There is no padding. (A sum for every token at once is fine here. The library goes in chunks
# of 64 tokens and keeps only the running sum.)

# %% tags=["exercise"]
def causal_linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Output (length, d_value) of q, k (length, d_head), v (length, d_value); no query sees its future."""
    ### BEGIN SOLUTION
    sums = (phi(k)[:, :, None] * v[:, None, :]).cumsum(dim=0)
    normaliser = phi(k).cumsum(dim=0)
    return torch.einsum("id,idm->im", phi(q), sums) / (phi(q) * normaliser).sum(dim=-1, keepdim=True)
    ### END SOLUTION


# %% tags=["check"] points=2
check("recurrent.prefix_sum", causal_linear_attention)

# %% [markdown]
# **Look back.** How many numbers does `sums` hold for 10,000 tokens and heads of 64 channels? What would autograd keep?

# %% [markdown]
# ## Exercise 3. One step of a recurrence
#
# *10 minutes, difficulty 2 of 5, optional.*
#
# The same, one token at a time. The state is `sums` and `normaliser`. Return the output, the new sums and the new normaliser. A token sees itself.

# %% tags=["exercise"]
def linear_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sums: torch.Tensor, normaliser: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (d_value,), new sums (d_head, d_value) and new normaliser (d_head,) after one token."""
    ### BEGIN SOLUTION
    sums = sums + torch.outer(phi(k), v)
    normaliser = normaliser + phi(k)
    return phi(q) @ sums / (phi(q) @ normaliser), sums, normaliser
    ### END SOLUTION


# %% tags=["check"] points=1
check("recurrent.linear_step", linear_step)

# %% [markdown]
# **Look back.** The state only grows. How would you let it forget? (Notebook 13 has an answer.)

# %% [markdown]
# ## Exercise 4. The relative shift
#
# *25 minutes, difficulty 3 of 5, optional.*
#
# Transformer-XL (Dai et al. 2019) computes scores for *distances*: column $c$ of `x` belongs to the distance `keys - 1 - c`, in every row. Attention needs them for *keys*. Query $i$ stands at key `keys - queries + i`, so its score with key $j$ is the one for distance
# `keys - queries + i - j`. Move them there. Where $j$ lies in the future of $i$, put 0.
#
# An example with three queries and three keys, every row of `x` the same:
#
# | | x | | | result | | |
# |---|---|---|---|---|---|---|
# | query 0 | 2.5 | 1.5 | 0.5 | 0.5 | 0 | 0 |
# | query 1 | 2.5 | 1.5 | 0.5 | 1.5 | 0.5 | 0 |
# | query 2 | 2.5 | 1.5 | 0.5 | 2.5 | 1.5 | 0.5 |

# %% tags=["exercise"]
def relative_shift(x: torch.Tensor) -> torch.Tensor:
    """Scores by distance (queries, keys) as scores by key (queries, keys), 0 in the future."""
    queries, keys = x.shape
    ### BEGIN SOLUTION
    padded = torch.cat([x.new_zeros(queries, 1), x], dim=1)
    shifted = padded.view(keys + 1, queries)[1:].view(queries, keys)
    return shifted.tril(keys - queries)
    ### END SOLUTION


# %% tags=["check"] points=3
check("recurrent.relative_shift", relative_shift)

# %% [markdown]
# **Look back.** Run the solution without `tril`. Which numbers stand in the future, and why is no error raised if one forgets to hide them?

# %% [markdown]
# ## Exercise 5. Find the bug: two queues
#
# *15 minutes, difficulty 2 of 5, optional.*
#
# The Compressive Transformer (Rae et al. 2019) keeps two queues, **oldest first**. A new segment joins the memory at the end, and as many rows leave at the front. Each `rate` neighbours of these are averaged to one slot, and the slots join the compressed queue at its end.
#
# An example: memory 5, 6, 7, 8, compressed 1.5, 3.5, segment 9, 10, rate 2. Afterwards: memory 7, 8, 9, 10, compressed 3.5, 5.5.
#
# The function below gives the right shapes. Repair it.

# %% tags=["exercise"]
def update_memories(
    memory: torch.Tensor, compressed: torch.Tensor, segment: torch.Tensor, rate: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """New memory (slots, d) and new compressed memory (compressed_slots, d) after a segment (length, d)."""
    ### BEGIN SOLUTION
    old, memory = memory[: len(segment)], torch.cat([memory, segment])[len(segment) :]
    squeezed = old.view(-1, rate, old.shape[1]).mean(dim=1)
    compressed = torch.cat([compressed, squeezed])[len(squeezed) :]
    ### END SOLUTION
    ### BEGIN STARTER
    old, memory = memory[-len(segment) :], torch.cat([memory, segment])[len(segment) :]
    squeezed = old.view(rate, -1, old.shape[1]).mean(dim=0)
    compressed = torch.cat([compressed, squeezed])[: len(compressed)]
    ### END STARTER
    return memory, compressed


# %% tags=["check"] points=2
check("recurrent.update_memories", update_memories)

# %% [markdown]
# **Look back.** How far back does one layer see with 100 memory slots, 50 compressed slots and rate 4? What does it cost in keys?

# %% [markdown]
# ## Exercise 6. A loss for the compression alone
#
# *25 minutes, difficulty 3 of 5, optional.*
#
# A learned compression: compressed row $m$ is $\sum_r \text{kernel}_r \cdot \text{old}_{m c + r}$, with $c$ = `len(kernel)`. It should not change what attention finds. With
# $\text{attn}(h, x) = \text{softmax}\big(h W_q (x W_k)^\top / \sqrt d\big)\, x W_v$, return
#
# $$\text{mean}\left[\left(\text{attn}(h, \text{old}) - \text{attn}(h, \text{compressed})\right)^2\right]$$
#
# **Only the kernel may get a gradient** from this loss.

# %% tags=["exercise"]
def compression_loss(
    h: torch.Tensor,
    old: torch.Tensor,
    kernel: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
) -> torch.Tensor:
    """The loss, a scalar: h (queries, d), old (rows, d), kernel (rate,), projections (d, d)."""
    ### BEGIN SOLUTION
    h, old, w_q, w_k, w_v = (x.detach() for x in (h, old, w_q, w_k, w_v))

    def attend(rows: torch.Tensor) -> torch.Tensor:
        scores = (h @ w_q) @ (rows @ w_k).T / h.shape[-1] ** 0.5
        return scores.softmax(dim=-1) @ (rows @ w_v)

    groups = old.view(-1, len(kernel), old.shape[1])
    compressed = (groups * kernel[None, :, None]).sum(dim=1)
    return (attend(old) - attend(compressed)).square().mean()
    ### END SOLUTION


# %% tags=["check"] points=3
check("recurrent.compression_loss", compression_loss)

# %% [markdown]
# **Look back.** What would the model learn if `w_k` and `w_v` could learn from this loss, too?
