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
# # Homework 7: movement pruning, and layers that get smaller
#
# Four exercises after the notebook *Movement pruning*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. What a score learns from | 15 | 2 of 5 | **core** |
# | 2. How many are left, step by step | 10 | 1 of 5 | **core** |
# | 3. A threshold, and what is really left | 20 | 2 of 5 | optional |
# | 4. Heads and neurons that are really gone | 25 | 3 of 5 | **core** |
#
# Little time? Do exercises 1, 2 and 4.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)`, or the blanks `...`, by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("movement.share_at", share_at, explain=True)` names it at once.
# - Stuck? `hint("movement.share_at")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.
#
# In all exercises a layer computes $a = (W \odot M)\, x$. The mask $M$ is 1 where a weight is kept and 0 where it is
# pruned, and follows from the scores $S$: a high score means that the weight stays.

# %%
import math

import torch

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)
from effnlp_lessons.homework.movement.shrink import attention, feed_forward  # noqa: F401 (for you to use)

# %% [markdown]
# ## Exercise 1. What a score learns from
#
# *15 minutes, difficulty 2 of 5, **core**.*
#
# The mask is $M = 1$ where $\sigma(S) > \tau$, which has no useful derivative. Movement pruning (Sanh, Wolf and Rush
# 2020) passes **straight through**, as if $M$ were $S$ itself. With $W' = W \odot M$, the weight that the layer uses,
# and $\partial L / \partial W'$, the sum of upstream times input over all tokens:
#
# $$\frac{\partial L}{\partial S} = \frac{\partial L}{\partial W'} \odot W, \qquad
# \frac{\partial L}{\partial W} = \frac{\partial L}{\partial W'} \odot M$$
#
# The score's gradient has **no** gate $M$: a pruned weight still learns whether it is missed. An example with one output,
# three weights and one token, $x = (1, 2, 1)$ and $\partial L / \partial a = -2$:
#
# | weight | $S$ | kept | $\partial L / \partial W'$ | $\partial L / \partial S$ | $\partial L / \partial W$ |
# |---|---|---|---|---|---|
# | 0.5 | 1 | yes | -2 | -1 | -2 |
# | 1.5 | -1 | no | -4 | -6 | 0 |
# | -1 | -2 | no | -2 | 2 | 0 |
#
# Descent raises the scores of the first two: their weights are being pushed away from 0. The third is pushed towards 0.
#
# One score may stand for a whole **block** of weights: the scores are `(row_blocks, column_blocks)`, and the gradient of
# a score is the **sum** over its block.
#
# Fill in the blanks. The mask and $\partial L / \partial W'$ are done.

# %% tags=["exercise"]
def score_gradient(
    x: torch.Tensor, upstream: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/dS, in the shape of the scores, and dL/dW; x is (batch, length, d_in), upstream (batch, length, d_out)."""
    row_blocks, column_blocks = scores.shape
    rows, columns = weight.shape[0] // row_blocks, weight.shape[1] // column_blocks  # of a block
    mask = (torch.sigmoid(scores) > threshold).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    product = torch.einsum("bto,bti->oi", upstream, x)  # dL/dW'
    ### BEGIN SOLUTION
    movement = product * weight
    blocks = movement.reshape(row_blocks, rows, column_blocks, columns)
    return blocks.sum(dim=(1, 3)), product * mask
    ### END SOLUTION
    ### BEGIN STARTER
    movement = product * ...
    blocks = movement.reshape(row_blocks, rows, column_blocks, columns)
    return blocks.sum(dim=...), product * ...
    ### END STARTER


# %% tags=["check"] points=2
check("movement.score_gradient", score_gradient)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("movement.score_gradient")

# %% [markdown]
# **Look back.** A large weight is pushed towards 0 in every step. What does magnitude pruning do with it, and what does
# movement pruning? And what would become of a pruned weight if its score's gradient had the gate $M$?

# %% [markdown]
# ## Exercise 2. How many are left, step by step
#
# *10 minutes, difficulty 1 of 5, **core**.*
#
# The share of weights that are kept falls from `first` to `last` while the net trains: it is held at `first` for
# `warm_up` steps and at `last` for the final `cool_down` steps. In between it falls as a cubic,
#
# $$last + (first - last)\,(1 - p)^3,$$
#
# where $p$ goes from 0 to 1 in equal steps: 0 at the step `warm_up`, 1 at the step `steps - cool_down`.
#
# An example with 120 steps, 20 for warming up and 20 for cooling down, from 1 to 0.2:
#
# | step | 10 | 20 | 40 | 60 | 80 | 100 | 110 |
# |---|---|---|---|---|---|---|---|
# | $p$ | | 0 | 0.25 | 0.5 | 0.75 | 1 | |
# | share | 1 | 1 | 0.5375 | 0.3 | 0.2125 | 0.2 | 0.2 |

# %% tags=["exercise"]
def share_at(step: int, steps: int, warm_up: int, cool_down: int, first: float, last: float) -> float:
    """The share of weights that are kept at this step."""
    ### BEGIN SOLUTION
    p = (step - warm_up) / (steps - warm_up - cool_down)
    p = min(max(p, 0.0), 1.0)
    return last + (first - last) * (1 - p) ** 3
    ### END SOLUTION


# %% tags=["check"] points=1
check("movement.share_at", share_at)

# %% [markdown]
# **Look back.** After a quarter of the fall more than half of the weights that are to go have gone. What speaks for
# removing many early and few late? And what is the warm-up for, if all scores begin at 0?

# %% [markdown]
# ## Exercise 3. A threshold, and what is really left
#
# *20 minutes, difficulty 2 of 5, optional.*
#
# In soft movement pruning nobody says how many weights stay. One threshold $\tau$ serves all matrices: a weight is kept
# if $\sigma(S) > \tau$. How many these are depends on where training has driven the scores, so it has to be **measured**.
#
# Nothing keeps a matrix from losing everything, so there is a floor: a matrix keeps at least
# $\lceil min\_keep \cdot n \rceil$ of its $n$ weights. If fewer pass the threshold, those with the highest scores are
# kept (of equal ones the last).
#
# Return the masks, a dictionary with the keys of `scores`, and the share that is left: kept weights over all weights
# **of all matrices**, a number.
#
# An example with $\tau = 0.4$, which a score passes if it is above -0.405, and the floor 0.2:
#
# | matrix | scores | pass | at least | kept |
# |---|---|---|---|---|
# | query | -2, 1, 0.5, -0.9 | 2 | $\lceil 0.8 \rceil = 1$ | 1 and 0.5 |
# | output | -3, -1, -2, -4, -5, -2.5, -6, -7 | 0 | $\lceil 1.6 \rceil = 2$ | -1 and -2 |
#
# The share is (2 + 2) / (4 + 8) = 0.333.

# %% tags=["exercise"]
def soft_masks(
    scores: dict[str, torch.Tensor], threshold: float, min_keep: float
) -> tuple[dict[str, torch.Tensor], float]:
    """The masks, and the share of all weights that is left."""
    ### BEGIN SOLUTION
    masks = {}
    for name, values in scores.items():
        mask = (torch.sigmoid(values) > threshold).flatten()
        at_least = math.ceil(min_keep * mask.numel())
        mask[values.flatten().argsort(stable=True)[mask.numel() - at_least :]] = True
        masks[name] = mask.view(values.shape)
    left = sum(mask.sum().item() for mask in masks.values())
    return masks, left / sum(mask.numel() for mask in masks.values())
    ### END SOLUTION


# %% tags=["check"] points=2
check("movement.soft_masks", soft_masks)

# %% [markdown]
# **Look back.** Two models were trained with $\tau = 0.1$, and one keeps 60 %, the other 4 % of its weights. What may
# differ between them? And why is it not enough to count `weight == 0`, here with the weights $W$ of training?

# %% [markdown]
# ## Exercise 4. Heads and neurons that are really gone
#
# *25 minutes, difficulty 3 of 5, **core**.*
#
# A zero in a dense matrix is multiplied like any other number. A layer gets faster when its matrices get **smaller**.
# Take whole heads and whole neurons out of a block of a Transformer.
#
# `block` is a dictionary of twelve tensors: `"query.weight"`, `"query.bias"`, and so on for `query`, `key`, `value`,
# `output`, `expand`, `contract`. A weight is `(outputs, inputs)`, so a layer computes `x @ weight.T + bias`. `heads` and
# `neurons` are bool tensors, True = kept. Head $h$ has the rows $h \cdot d_{head}$ to $(h + 1) \cdot d_{head} - 1$ of
# query, key and value, and the columns of the same numbers of `output`.
#
# Return the smaller block, with the same twelve names. It must give exactly what the whole block gives **when the
# outputs of the removed heads and neurons are set to 0**. A neuron's output is what comes out of GELU.
#
# An example: 4 heads of 3 rows, 10 neurons, of which 2 heads and 6 neurons are kept:
#
# | | whole | smaller |
# |---|---|---|
# | input and output of the block | 12 | 12 |
# | query, key, value | 12 x 12 each, with 12 biases | 6 x 12, with 6 biases |
# | expand | 10 x 12, with 10 biases | 6 x 12, with 6 biases |
#
# The shapes of `output` and `contract` are for you to find. `attention(block, x, heads)` and `feed_forward(block, x)`
# run a block, with `heads` the *number* of heads that it has.

# %% tags=["exercise"]
def shrink_block(
    block: dict[str, torch.Tensor], heads: torch.Tensor, neurons: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The block without the heads and neurons that are not kept."""
    ### BEGIN SOLUTION
    d_head = block["query.weight"].shape[0] // len(heads)
    rows = heads.repeat_interleave(d_head)
    small = dict(block)
    for name in ("query", "key", "value"):
        small[f"{name}.weight"] = block[f"{name}.weight"][rows]
        small[f"{name}.bias"] = block[f"{name}.bias"][rows]
    small["output.weight"] = block["output.weight"][:, rows]
    small["expand.weight"] = block["expand.weight"][neurons]
    small["expand.bias"] = block["expand.bias"][neurons]
    small["contract.weight"] = block["contract.weight"][:, neurons]
    return small
    ### END SOLUTION


# %% tags=["check"] points=3
check("movement.shrink_block", shrink_block)

# %% [markdown]
# **Look back.** Which of the twelve tensors stay as they are, and why does the model's width stay? Somebody sets the
# *row* of a neuron in `expand` to 0, and removes the neuron for the speed. The output changes. What was forgotten?
