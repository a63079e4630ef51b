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
# # Homework 2: distilling a pre-trained model
#
# Seven exercises after the notebook *Distilling a pre-trained model*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. The layers that DistilBERT copies | 10 | 1 of 5 | **core** |
# | 2. TinyBERT's loss on attention scores | 15 | 2 of 5 | **core** |
# | 3. TinyBERT's loss on hidden states | 20 | 2 of 5 | optional |
# | 4. DistilBERT's loss on the words | 15 | 2 of 5 | **core** |
# | 5. A block of MobileBERT | 25 | 3 of 5 | optional |
# | 6. Find the bug: a step of progressive transfer | 25 | 3 of 5 | optional |
# | 7. MiniLM's relations between values | 25 | 3 of 5 | optional |
#
# Little time? Do exercises 1, 2 and 4.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)` by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("pretraining.score_loss", score_loss, explain=True)` names it at once.
# - Stuck? `hint("pretraining.score_loss")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.
#
# `key_padding_mask` is a bool tensor `(batch, length)`, True for a **real** token.
# A loss is a tensor with one number, of the dtype of its inputs. At least one token of a batch is real.
# Divergences are in nats.

# %%
import math

import torch
import torch.nn.functional as F

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)

# %% [markdown]
# ## Exercise 1. The layers that DistilBERT copies
#
# *10 minutes, difficulty 1 of 5, **core**.*
#
# A DistilBERT (Sanh et al. 2019) begins with some of its teacher's own layers. The paper takes "one layer out of
# two"; the released code copies layers 0, 2, 4, 7, 9 and 11 of twelve, counted from 0.
#
# One rule gives these numbers for any two depths. The copied layers are **evenly spread**, the first and the last of
# the teacher are among them, and each place is rounded to the nearest layer. **A half rounds down.**
# A student of one layer takes the first.
#
# | teacher | student | copied |
# |---|---|---|
# | 12 | 6 | 0, 2, 4, 7, 9, 11 |
# | 4 | 3 | 0, 1, 3 |
# | 6 | 3 | 0, 2, 5 |
# | 6 | 1 | 0 |
#
# Complete the loop.

# %% tags=["exercise"]
def alternate_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher layers to copy, from 0, in increasing order."""
    if student_layers == 1:
        return [0]
    layers = []
    for layer in range(student_layers):
        ### BEGIN SOLUTION
        place = layer * (teacher_layers - 1) / (student_layers - 1)
        layers.append(math.ceil(place - 0.5))
        ### END SOLUTION
    return layers


# %% tags=["check"] points=1
check("pretraining.alternate_layers", alternate_layers)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("pretraining.alternate_layers")

# %% [markdown]
# **Look back.** The copied layer 4 was followed by layer 5 in the teacher. In the student it is followed by layer 7.
# Why is that a better start than six layers with random weights?

# %% [markdown]
# ## Exercise 2. TinyBERT's loss on attention scores
#
# *15 minutes, difficulty 2 of 5, **core**.*
#
# TinyBERT (Jiao et al. 2019) makes the student's attention like the teacher's, head by head. It compares the raw
# scores $q k^\top / \sqrt{d}$, **before** the softmax, by their mean squared error.
#
# - `student_scores` and `teacher_scores` have the shape `(batch, heads, length, length)`. No mask has been put on them.
# - The mean is over the batch, the heads, and the **pairs of real tokens**: query and key are both real.
#   A pair of any text weighs the same.
#
# An example with one head and three tokens, the last of them padding. Squared differences:
#
# | | key 0 | key 1 | key 2 |
# |---|---|---|---|
# | query 0 | **1** | **4** | 9 |
# | query 1 | **0** | **1** | 9 |
# | query 2 | 9 | 9 | 9 |
#
# The loss is (1 + 4 + 0 + 1) / 4 = 1.5.

# %% tags=["exercise"]
def score_loss(
    student_scores: torch.Tensor, teacher_scores: torch.Tensor, key_padding_mask: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the scores over heads and pairs of real tokens."""
    ### BEGIN SOLUTION
    real_pairs = key_padding_mask[:, None, :, None] & key_padding_mask[:, None, None, :]
    squared = (student_scores - teacher_scores).square()
    return squared[real_pairs.expand_as(squared)].mean()
    ### END SOLUTION


# %% tags=["check"] points=2
check("pretraining.score_loss", score_loss)

# %% [markdown]
# **Look back.** Add 3 to all scores of the student. What does the softmax make of it, and what does your loss?
# The released code keeps padding in its mean. How does its loss change if the same text stands in a longer batch?

# %% [markdown]
# ## Exercise 3. TinyBERT's loss on hidden states
#
# *20 minutes, difficulty 2 of 5, optional.*
#
# A TinyBERT is narrower than its teacher, so its hidden states are projected first. The paper has **two** matrices:
# $W_e$ for the embeddings $E$, and one $W_h$ for the hidden states $H$ of **all** layers.
#
# $$\mathrm{MSE}(E_S W_e,\ E_T) + \sum_{m=1}^{M} \mathrm{MSE}(H_{S,m} W_h,\ H_{T,g(m)})$$
#
# - `student_hidden` is a list of $M + 1$ tensors `(batch, length, d_student)`: **first the embeddings**, then the
#   output of layer 1, of layer 2, ... `teacher_hidden` has the same form, with more layers and `d_teacher`.
# - `mapping` has the numbers $g(1), ..., g(M)$. With `(2, 4)` layer 1 learns from the teacher's layer 2, and layer 2
#   from layer 4.
# - `w_e` and `w_h` are `(d_student, d_teacher)`. Here they are used even if the widths are equal.
# - MSE is the mean over all entries. There is no padding.
# - The teacher does not learn: **no gradient reaches its tensors**.

# %% tags=["exercise"]
def hidden_loss(
    student_hidden: list[torch.Tensor],
    teacher_hidden: list[torch.Tensor],
    mapping: tuple[int, ...],
    w_e: torch.Tensor,
    w_h: torch.Tensor,
) -> torch.Tensor:
    """The losses of embeddings and layers, added."""
    ### BEGIN SOLUTION
    total = F.mse_loss(student_hidden[0] @ w_e, teacher_hidden[0].detach())
    for student, layer in zip(student_hidden[1:], mapping, strict=True):
        total = total + F.mse_loss(student @ w_h, teacher_hidden[layer].detach())
    return total
    ### END SOLUTION


# %% tags=["check"] points=2
check("pretraining.hidden_loss", hidden_loss)

# %% [markdown]
# **Look back.** The matrices are thrown away after training. With one $W_h$ for all layers, a direction of the
# student's hidden states means the same in every layer. What would a matrix for each layer allow the student to do?

# %% [markdown]
# ## Exercise 4. DistilBERT's loss on the words
#
# *15 minutes, difficulty 2 of 5, **core**.*
#
# At every token the teacher has a distribution over the vocabulary. DistilBERT learns it at a temperature $T$:
#
# $$L_{ce} = T^2\,\mathrm{KL}(p \,\|\, q) = T^2 \sum_i p_i \log \frac{p_i}{q_i},\qquad
# p = \mathrm{softmax}(z_{teacher} / T),\quad q = \mathrm{softmax}(z_{student} / T)$$
#
# The released code takes the **mean over all real tokens** of the batch, whether they were masked or not.
#
# - `student_logits` and `teacher_logits` are $z$, with the shape `(batch, length, vocab)`.
# - Padding counts nowhere. A token of any text weighs the same.
#
# You may use `F.kl_div`. Mind what it takes, and over what its means run.

# %% tags=["exercise"]
def word_divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, key_padding_mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    """T² KL(teacher || student), mean over the real tokens."""
    ### BEGIN SOLUTION
    log_student = (student_logits[key_padding_mask] / temperature).log_softmax(dim=-1)  # (real tokens, vocab)
    teacher = (teacher_logits[key_padding_mask] / temperature).softmax(dim=-1)
    return temperature**2 * F.kl_div(log_student, teacher, reduction="batchmean")
    ### END SOLUTION


# %% tags=["check"] points=2
check("pretraining.word_divergence", word_divergence)

# %% [markdown]
# **Look back.** `reduction="mean"` would divide by the words of the vocabulary, too. The student would still learn
# something, and nothing would look wrong. By how much does that change the weights of DistilBERT's three losses?

# %% [markdown]
# ## Exercise 5. A block of MobileBERT
#
# *25 minutes, difficulty 3 of 5, optional.*
#
# A block of MobileBERT (Sun et al. 2020) reads and writes the wide stream `x`, and works in a narrow one. In place of
# layer norms it has **NoNorm**, $N(h) = \gamma h + \beta$, element by element. One part after the other, each with a
# NoNorm of its own:
#
# | part | what it computes |
# |---|---|
# | bottleneck | a linear layer on the block's input; its output $u$ begins the narrow **residual stream** |
# | shared bottleneck | another linear layer on the block's input; its output $s$ is read by queries **and** keys |
# | attention | queries and keys from $s$, values from the block's input at full width; added to the residual stream |
# | feed-forwards | several, one after the other: linear, ReLU, linear; **each** added to its own input |
# | output | a linear layer back to the full width; added to the block's input |
#
# NoNorm comes last in each part: after the linear layer, and after the sum where there is one.
#
# - `x` is `(batch, length, d_model)`. There is no padding and no dropout.
# - `attention(query_key_input, value_input)` is given. It holds all projections of the attention, and returns
#   `(batch, length, d_bottleneck)`.
# - `weights` is a dictionary. `"bottleneck"`, `"shared"` and `"output"` hold `(W, b, gamma, beta)`; `"attention"` holds
#   `(gamma, beta)`; `"feed_forwards"` is a list of `(W_1, b_1, W_2, b_2, gamma, beta)`.
# - `F.linear(h, W, b)` is the linear layer.

# %% tags=["exercise"]
def bottleneck_block(x: torch.Tensor, weights: dict, attention) -> torch.Tensor:
    """One block: (batch, length, d_model) in and out."""
    ### BEGIN SOLUTION
    def no_norm(h, gamma, beta):
        return gamma * h + beta

    w, b, gamma, beta = weights["bottleneck"]
    u = no_norm(F.linear(x, w, b), gamma, beta)
    w, b, gamma, beta = weights["shared"]
    s = no_norm(F.linear(x, w, b), gamma, beta)
    a = no_norm(attention(s, x) + u, *weights["attention"])
    for w_1, b_1, w_2, b_2, gamma, beta in weights["feed_forwards"]:
        a = no_norm(F.linear(F.relu(F.linear(a, w_1, b_1)), w_2, b_2) + a, gamma, beta)
    w, b, gamma, beta = weights["output"]
    return no_norm(F.linear(a, w, b) + x, gamma, beta)
    ### END SOLUTION


# %% tags=["check"] points=3
check("pretraining.bottleneck_block", bottleneck_block)

# %% [markdown]
# **Look back.** MobileBERT is 512 wide outside and 128 inside. Count the weights of one feed-forward of 128 to 512 to
# 128, and of one of BERT, 768 to 3,072 to 768. How many of the small ones cost as much as one of the large?

# %% [markdown]
# ## Exercise 6. Find the bug: a step of progressive transfer
#
# *25 minutes, difficulty 3 of 5, optional.*
#
# MobileBERT learns from its teacher block by block. In the **stage** of a block
#
# - only the loss of this block is on: the mean squared error between its map and the teacher's;
# - this block learns at `learning_rate`;
# - the blocks below it, whose stages are over, go on at `lower_rate * learning_rate`; `lower_rate` may be 0;
# - the blocks above it, the embeddings and the head **do not move at all**.
#
# What the function below is given:
#
# - `student(token_ids)` is a tensor `(blocks + 1, batch, length, width)`: the embeddings' output, then the map after
#   each block. `teacher_maps` has the same shape. Blocks are counted from 0.
# - `optimizer` is an AdamW with weight decay. It has made steps in earlier stages. It has one group for every part of
#   the student; `group["part"]` is the number of a block, or `"embeddings"`, or `"head"`.
#
# The function makes one step, in place, and returns the loss before it. What must not learn is given a gradient of
# zero. The loss falls as it should. Still something moves that must not. Find out why, and repair it.

# %% tags=["exercise"]
def transfer_step(
    student: torch.nn.Module,
    optimizer: torch.optim.AdamW,
    token_ids: torch.Tensor,
    teacher_maps: torch.Tensor,
    block: int,
    learning_rate: float,
    lower_rate: float,
) -> torch.Tensor:
    """One step in the stage of `block`; returns the loss before it."""
    maps = student(token_ids)
    loss = F.mse_loss(maps[block + 1], teacher_maps[block + 1])
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        part = group["part"]
        group["lr"] = learning_rate if part == block else lower_rate * learning_rate
        if part in ("embeddings", "head") or part > block:
            for parameter in group["params"]:
                ### BEGIN SOLUTION
                parameter.grad = None  # an optimizer passes over what has no gradient
                ### END SOLUTION
                ### BEGIN STARTER
                parameter.grad = torch.zeros_like(parameter)
                ### END STARTER
    optimizer.step()
    return loss.detach()


# %% tags=["check"] points=3
check("pretraining.transfer_step", transfer_step)

# %% [markdown]
# **Look back.** With plain gradient descent, without momentum and weight decay, the first version would be right.
# Another repair is a learning rate of 0. What does AdamW then do to the moments of a block whose turn comes later?

# %% [markdown]
# ## Exercise 7. MiniLM's relations between values
#
# *25 minutes, difficulty 3 of 5, optional.*
#
# MiniLM (Wang et al. 2020, arXiv 2002.10957), the family that our teacher comes from, needs neither a projection nor
# a mapping of layers. In the last layer it compares attention, and how the **values** of a head relate to each other:
#
# $$R = \mathrm{softmax}\left(\frac{V V^\top}{\sqrt{d}}\right),\qquad
# L_{VR} = \mathrm{KL}(R_{teacher} \,\|\, R_{student})$$
#
# $R$ is `(length, length)` for every head, however wide the head is. Here you write $L_{VR}$, which the library does
# not have.
#
# - `student_values` is `(batch, heads, length, d_student)`, `teacher_values` is `(batch, heads, length, d_teacher)`.
#   $d$ is each model's **own** width of a head.
# - Each row of $R$ belongs to one token; its softmax runs over the real tokens only.
# - The divergence of a row is a sum. The loss is the mean over the heads and the real tokens of the batch.
# - Padding must not matter, and nothing may become NaN.

# %% tags=["exercise"]
def relation_loss(
    student_values: torch.Tensor, teacher_values: torch.Tensor, key_padding_mask: torch.Tensor
) -> torch.Tensor:
    """KL between the relations of values, teacher's against student's."""
    ### BEGIN SOLUTION
    def log_relations(values):
        scores = values @ values.mT / math.sqrt(values.shape[-1])
        hidden = ~key_padding_mask[:, None, None, :]
        # a finite number, not -inf: 0 times -inf is NaN
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min / 2).log_softmax(dim=-1)

    log_student, log_teacher = log_relations(student_values), log_relations(teacher_values)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)  # (batch, heads, length)
    return divergence.transpose(1, 2)[key_padding_mask].mean()
    ### END SOLUTION


# %% tags=["check"] points=3
check("pretraining.relation_loss", relation_loss)

# %% [markdown]
# **Look back.** Rotate all values of the student's head by the same orthogonal matrix: `values @ rotation`.
# What happens to the loss, and what would happen to TinyBERT's loss on hidden states without a projection?
# How much freedom does each loss leave to the student?
