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
# # Homework 0: counting, and where counting misleads
#
# Five short exercises after the notebook *Start here*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. Parameters of a decoder block | 10 | 1 of 5 | optional |
# | 2. MACs of a padded batch | 20 | 2 of 5 | **core** |
# | 3. From which length does attention cost more? | 15 | 3 of 5 | optional |
# | 4. Find the bug: a sentence vector that ignores padding | 15 | 2 of 5 | optional |
# | 5. MACs or clock? | 20 | 3 of 5 | optional |
#
# Little time? Do exercise 2.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)` by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("start.encoder_macs", encoder_macs, explain=True)` names it at once.
# - Stuck? `hint("start.encoder_macs")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.
#
# Counts follow the course's convention: one MAC is one multiplication with its addition.

# %%
import statistics

import torch

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)

# %% [markdown]
# ## Exercise 1. Parameters of a decoder block
#
# *10 minutes, difficulty 1 of 5, optional.*
#
# An **encoder** block of MiniLM has `d_model = 384` and `d_ff = 1536`. Its parameters:
#
# | part | weights | biases | together |
# |---|---|---|---|
# | query, key, value, output | 4 · 384 · 384 | 4 · 384 | 591,360 |
# | feed-forward, up and down | 2 · 384 · 1536 | 1536 + 384 | 1,181,568 |
# | two norms | 2 · 384 | 2 · 384 | 1,536 |
# | **block** | | | **1,774,464** |
#
# Translation and summarisation models also have **decoder** blocks.
# A decoder block attends twice: to itself, and to the output of the encoder (cross-attention).
# It has a third norm. The feed-forward is the same.
#
# Complete the count for a decoder block of any size. The line for one attention is done.

# %% tags=["exercise"]
def block_parameters(d_model: int, d_ff: int) -> int:
    """Parameters of one decoder block, with all biases and norms."""
    attention = 4 * (d_model * d_model + d_model)  # query, key, value, output
    ### BEGIN SOLUTION
    feed_forward = (d_model * d_ff + d_ff) + (d_ff * d_model + d_model)
    norm = 2 * d_model
    return 2 * attention + feed_forward + 3 * norm
    ### END SOLUTION


# %% tags=["check"] points=1
check("start.block_parameters", block_parameters)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("start.block_parameters")

# %% [markdown]
# ## Exercise 2. MACs of a padded batch
#
# *20 minutes, difficulty 2 of 5, **core**.*
#
# A batch is one tensor. Sentences of different lengths are padded to the longest,
# and the model computes the padding too. How many MACs is that?
#
# Count the forward pass of an encoder on one batch.
# `lengths` are the sentences' own lengths, for example `[12, 40, 128]`.
#
# - Count all four projections, the scores, the mixing, and both matrices of the feed-forward.
# - Look-ups, norms and softmax count as none.
# - The number of heads does not matter. Why?

# %% tags=["exercise"]
def encoder_macs(layers: int, d_model: int, d_ff: int, lengths: list[int]) -> int:
    """MACs of an encoder's forward pass on a batch that is padded to its longest sentence."""
    ### BEGIN SOLUTION
    length = max(lengths)
    projections = 4 * length * d_model**2
    scores_and_mixing = 2 * length**2 * d_model
    feed_forward = 2 * length * d_model * d_ff
    return layers * len(lengths) * (projections + scores_and_mixing + feed_forward)
    ### END SOLUTION


# %% tags=["check"] points=2
check("start.encoder_macs", encoder_macs)

# %% [markdown]
# **Look back.** Put sentences of 12, 40 and 128 tokens in one batch, or run them one by one:
# compare `encoder_macs(6, 384, 1536, [12, 40, 128])` with the sum of three batches of one sentence.
# This is why libraries sort sentences by length before they make batches.

# %% [markdown]
# ## Exercise 3. From which length does attention cost more?
#
# *15 minutes, difficulty 3 of 5, optional.*
#
# The lecture found n = 2d for **all** of attention (the four projections, scores and mixing),
# where `d_ff = 4 * d_model` and the feed-forward has two matrices. Now for any sizes.
#
# Newer models have a *gated* feed-forward with three matrices of `d_model` x `d_ff` instead of two.
# So the number of matrices is an argument.
#
# Return the smallest length, in tokens, at which attention costs **strictly more** MACs
# than the feed-forward. A length is a whole number and at least 1.
#
# Write the inequality on paper first. Two things cancel.

# %% tags=["exercise"]
def crossing_length(d_model: int, d_ff: int, matrices: int) -> int:
    """Smallest length at which all of attention costs strictly more MACs than the feed-forward."""
    ### BEGIN SOLUTION
    # 4 n d² + 2 n² d > m n d f; divide by n d:  4 d + 2 n > m f,  so  n > (m f - 4 d) / 2
    last_length_that_is_not_more = (matrices * d_ff - 4 * d_model) // 2
    return max(1, last_length_that_is_not_more + 1)
    ### END SOLUTION


# %% tags=["check"] points=3
check("start.crossing_length", crossing_length)

# %% [markdown]
# **Look back.** A model with `d_model = 4096`, `d_ff = 11008` and three matrices reads 4,096 tokens.
# Which side costs more there?

# %% [markdown]
# ## Exercise 4. Find the bug
#
# *15 minutes, difficulty 2 of 5, optional.*
#
# A sentence vector is the mean of the sentence's token vectors. Padding must not change it.
# The mask is True for a real token.
#
# The function below runs and gives vectors that look right. Their cosine similarities are right, too.
# Still it is wrong. Repair it.
#
# A row that is padding alone (an empty sentence) must give zeros. It must not give NaN.

# %% tags=["exercise"]
def mean_pool(hidden: torch.Tensor, key_padding_mask: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens: hidden (batch, length, d_model), mask (batch, length) -> (batch, d_model)."""
    ### BEGIN SOLUTION
    mask = key_padding_mask.unsqueeze(-1)
    total = (hidden * mask).sum(dim=1)
    count = mask.sum(dim=1).clamp(min=1)  # an empty row: 0 / 1, not 0 / 0
    return total / count
    ### END SOLUTION
    ### BEGIN STARTER
    mask = key_padding_mask.unsqueeze(-1)
    total = (hidden * mask).sum(dim=1)
    return total / hidden.shape[1]
    ### END STARTER


# %% tags=["check"] points=2
check("start.mean_pool", mean_pool)

# %% [markdown]
# ## Exercise 5. MACs or clock?
#
# *20 minutes, difficulty 3 of 5, optional.*
#
# You have counted the MACs of every part of a model, and you have timed every part several times.
# Where does the clock disagree with the count? Write the tool that says it.
#
# `macs` gives the MACs of each part, for example `{"embeddings": 0, "feed-forward": 40_000_000}`.
# `runs` gives the seconds of each run of each part, in the order in which they were taken.
# The first `warm_up` runs are slow and do not count.
#
# Return two things:
#
# 1. a dictionary with the **MACs per second** of each part: its MACs divided by the median of its seconds;
# 2. the name of the part whose **share of the time most exceeds its share of the MACs**
#    (share of time minus share of MACs is largest).
#
# Some parts have no MACs at all. They still take time.

# %% tags=["exercise"]
def macs_or_clock(
    macs: dict[str, int], runs: dict[str, list[float]], warm_up: int
) -> tuple[dict[str, float], str]:
    """MACs per second of each part, and the part that takes more of the time than of the MACs."""
    ### BEGIN SOLUTION
    seconds = {part: statistics.median(times[warm_up:]) for part, times in runs.items()}
    speed = {part: macs[part] / seconds[part] for part in macs}
    all_macs, all_seconds = sum(macs.values()), sum(seconds.values())
    excess = {part: seconds[part] / all_seconds - macs[part] / all_macs for part in macs}
    return speed, max(excess, key=excess.get)
    ### END SOLUTION


# %% tags=["check"] points=3
check("start.macs_or_clock", macs_or_clock)

# %% [markdown]
# **Next.** Give your function the lecture's recorded times, one layer of MiniLM at 512 tokens.
# Is the part that it names the one you would have guessed? And at 2,048 tokens?
#
# ```python
# from effnlp_lessons.measure import block_macs
# from effnlp_lessons.studies.cost_by_length import PARTS, seconds_by_run
# from effnlp_lessons.studies.runner import load_results
# from effnlp_lessons.transformer import MINILM_L6
#
# recorded = load_results("cost_by_length")
# place = recorded["runs"][0]["lengths"].index(512)
# runs = {part: [run[place] for run in seconds_by_run(recorded)[part]] for part in PARTS}
# macs_or_clock(block_macs(MINILM_L6, 512), runs, warm_up=0)
# ```
