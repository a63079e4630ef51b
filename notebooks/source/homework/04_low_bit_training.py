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
# # Homework 4: training for few bits
#
# Five exercises after the notebook *Training for few bits*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. Fake quantization with a gradient | 15 | 2 of 5 | **core** |
# | 2. Find the bug: a step of quantization-aware training | 20 | 2 of 5 | **core** |
# | 3. Two eigenvalues of a Hessian | 25 | 3 of 5 | optional |
# | 4. Ternary weights, row by row | 15 | 2 of 5 | **core** |
# | 5. The best bits under a budget | 25 | 3 of 5 | optional |
#
# Little time? Do exercises 1, 2 and 4.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)`, or the blanks `...`, by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("low_bit.ternary_scale", ternary_scale, explain=True)` names it at once.
# - Stuck? `hint("low_bit.ternary_scale")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.
#
# In all exercises a code $q$ stands for the real number $S (q - Z)$, with the scale $S$ and the zero point $Z$.

# %%
import itertools

import torch
import torch.nn.functional as F

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)
from effnlp_lessons.homework.low_bit.shadow import on_grid

# %% [markdown]
# ## Exercise 1. Fake quantization with a gradient
#
# *15 minutes, difficulty 2 of 5, **core**.*
#
# Fake quantization moves a number to its grid and goes on with a real number. Rounding has the gradient 0 almost
# everywhere, so training puts the **straight-through** gradient in its place: as if nothing had been rounded, but still
# clipped. With `low` and `high`, the first and the last point of the grid,
#
# $$\frac{\partial L}{\partial x} = \begin{cases} \partial L / \partial y & \text{if } low \le x \le high\\
# 0 & \text{otherwise} \end{cases}$$
#
# The library writes a backward pass for it. It can be had without one. `a + (b - a).detach()` has the value of `b` and
# the gradient of `a`. Worked out for $S = 0.25$, $Z = 2$, 3 bits, where the grid goes from -0.5 to 1.25:
#
# | $x$ | -0.75 | -0.5 | 0.1 | 1.25 | 1.3 |
# |---|---|---|---|---|---|
# | value | -0.5 | -0.5 | 0 | 1.25 | 1.25 |
# | gradient | 0 | 1 | 1 | 1 | 0 |
#
# Fill in the blanks.

# %% tags=["exercise"]
def fake_quantize(x: torch.Tensor, scale: float, zero_point: int, bits: int) -> torch.Tensor:
    """x on the grid S (q - Z), q = 0 .. 2^bits - 1, with the straight-through gradient."""
    low, high = scale * (0 - zero_point), scale * (2**bits - 1 - zero_point)
    q = torch.clamp(torch.round(x / scale) + zero_point, 0, 2**bits - 1)
    y = scale * (q - zero_point)
    ### BEGIN SOLUTION
    clipped = x.clamp(low, high)
    return clipped + (y - clipped).detach()
    ### END SOLUTION
    ### BEGIN STARTER
    clipped = ...
    return ... + (... - ...).detach()
    ### END STARTER


# %% tags=["check"] points=2
check("low_bit.straight_through", fake_quantize)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("low_bit.straight_through")

# %% [markdown]
# **Look back.** A weight lies far above `high`, and the loss would fall if its output became smaller. Which gradient
# does it get, and what becomes of it? And what if the range is taken anew from the largest weight in every step?

# %% [markdown]
# ## Exercise 2. Find the bug: a step of quantization-aware training
#
# *20 minutes, difficulty 2 of 5, **core**.*
#
# One step of training for a linear layer whose weight will have few bits:
#
# - the prediction is $x \hat w^\top + b$ with $\hat w$ = `on_grid(layer.weight, bits)`, the weight on a grid for each
#   row. `on_grid` is given, and has no gradient of its own. The bias is not quantized;
# - the loss is the mean squared error, and its gradient **at $\hat w$** moves the weight of the layer;
# - `layer.weight` stays a real number, off the grid, from the first step to the last. Most steps are much smaller than
#   a step of the grid, and have to add up. It is called the shadow weight.
#
# The function below makes one step, in place, and returns the loss of the quantized layer before it. The loss even
# falls. Find the bug, and repair it.

# %% tags=["exercise"]
def shadow_step(
    layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, bits: int
) -> torch.Tensor:
    """One step of training; returns the loss of the quantized layer before it."""
    ### BEGIN SOLUTION
    w_hat = layer.weight + (on_grid(layer.weight, bits) - layer.weight).detach()  # straight through
    loss = F.mse_loss(F.linear(x, w_hat, layer.bias), y)
    ### END SOLUTION
    ### BEGIN STARTER
    with torch.no_grad():
        layer.weight.copy_(on_grid(layer.weight, bits))
    loss = F.mse_loss(layer(x), y)
    ### END STARTER
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# %% tags=["check"] points=2
check("low_bit.shadow_step", shadow_step)

# %% [markdown]
# **Look back.** With the bug the loss falls, too: who still learns? (The bias. And which weight of each row?) There is
# no clipping in this exercise. Why does no weight lie outside the range of its grid?

# %% [markdown]
# ## Exercise 3. Two eigenvalues of a Hessian
#
# *25 minutes, difficulty 3 of 5, optional.*
#
# Q-BERT asks how curved the loss is in the weights of a layer: for the eigenvalue of the Hessian $H$ that is largest in
# **absolute value**. $H$ is never written down. `hvp(v)` gives $H v$. Power iteration repeats $v \leftarrow Hv / |Hv|$,
# and ends with the Rayleigh quotient $v^\top H v$ of the unit vector, which keeps the eigenvalue's sign.
#
# Write it for the **two** largest. Eigenvectors of a symmetric matrix are orthogonal, so the second iteration runs
# among the vectors orthogonal to the first eigenvector $v_1$.
#
# - A layer has several weights, so a vector is a **list of tensors**. All of them together are one vector, with one
#   norm and one inner product: $a \cdot b = \sum_t \sum_i a_{t,i} b_{t,i}$.
# - `hvp` takes such a list and returns one of the same shapes.
# - `starts` holds two lists, one for each iteration to begin with. `iterations` are enough for both to settle.
# - Return two numbers with their signs, `(first, second)`, the one with the larger absolute value first.
# - The loss may be very flat: eigenvalues of $10^{-6}$ occur.
#
# An example: a Hessian with the eigenvalues -7, 2, 0.5 has the answer (-7, 2).

# %% tags=["exercise"]
def top_eigenvalues(hvp, starts: tuple[list, list], iterations: int) -> tuple[float, float]:
    """The two eigenvalues that are largest in absolute value."""
    ### BEGIN SOLUTION
    def inner(a: list, b: list) -> float:
        return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))

    def unit(v: list) -> list:
        length = inner(v, v) ** 0.5
        return [part / length for part in v]

    def without(v: list, known: list) -> list:
        share = inner(known, v)
        return [part - share * other for part, other in zip(v, known, strict=True)]

    first, second = starts
    for _ in range(iterations):
        first = unit(hvp(first))
    for _ in range(iterations):
        second = unit(without(hvp(second), first))
    return inner(first, hvp(first)), inner(second, hvp(second))
    ### END SOLUTION


# %% tags=["check"] points=3
check("low_bit.top_eigenvalues", top_eigenvalues)

# %% [markdown]
# **Look back.** In exact arithmetic it would be enough to make the second start orthogonal to the first eigenvector,
# once. Try it. How large does a rounding error of $10^{-16}$ become in 30 products if the first eigenvalue is ten times
# the second?

# %% [markdown]
# ## Exercise 4. Ternary weights, row by row
#
# *15 minutes, difficulty 2 of 5, **core**.*
#
# Each weight becomes $-\alpha$, 0 or $\alpha$. TernaryBERT does this to the word embeddings with an $\alpha$ for
# **every row**. For one row, by the rule of TWN (Li, Zhang and Liu 2016):
#
# $$\Delta = 0.7 \cdot \mathrm{mean}(|w|), \qquad b_i = \begin{cases} \mathrm{sign}(w_i) & |w_i| > \Delta\\ 0 &
# \text{otherwise,}\end{cases} \qquad \alpha = \mathrm{mean}(|w_i|)\ \text{over the } i \text{ with } b_i \ne 0$$
#
# An example:
#
# | $w$ | 0.9 | -0.3 | -1.1 | 0.1 | 0.5 | -0.7 |
# |---|---|---|---|---|---|---|
# | $\vert w \vert$ | 0.9 | 0.3 | 1.1 | 0.1 | 0.5 | 0.7 |
# | above $\Delta = 0.7 \cdot 0.6 = 0.42$ | yes | | yes | | yes | yes |
# | $b$ | 1 | 0 | -1 | 0 | 1 | -1 |
#
# with $\alpha = (0.9 + 1.1 + 0.5 + 0.7) / 4 = 0.8$.
#
# The row of [PAD] is all zeros: its $\alpha$ is 0. Return $\alpha$, of the shape `(rows,)` and the dtype of the weight,
# and the codes $b$, int8 of the shape of the weight.

# %% tags=["exercise"]
def ternary_scale(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha (rows,) and codes (rows, columns) of a weight."""
    ### BEGIN SOLUTION
    size = weight.abs()
    kept = size > 0.7 * size.mean(dim=1, keepdim=True)
    alpha = (size * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
    codes = (weight.sign() * kept).to(torch.int8)
    return alpha, codes
    ### END SOLUTION


# %% tags=["check"] points=2
check("low_bit.ternary_scale", ternary_scale)

# %% [markdown]
# **Look back.** 0.7 is a rule of thumb. For the $b$ of the example no $\alpha$ gives a smaller squared error than 0.8.
# Is there a better $b$? Try to leave out the weight 0.5, and take the mean of the other three.

# %% [markdown]
# ## Exercise 5. The best bits under a budget
#
# *25 minutes, difficulty 3 of 5, optional.*
#
# Each layer gets 2 or 3 bits, and the file must not be larger than a budget. Q-BERT ranks the layers by
#
# $$\Omega = |\mathrm{mean}(\lambda)| + \mathrm{std}(\lambda)$$
#
# over the top eigenvalues $\lambda$ on several parts of the training data, and gives 3 bits to the most sensitive ones.
# Here the layers differ in size, which the library's rule does not weigh: a large layer can keep two smaller ones out.
# Find the best choice of all: **the largest sum of $\Omega$ over the layers with 3 bits**, among those that fit.
#
# - `eigenvalues` is `(layers, parts)`. std is that of the population (divided by the number of parts).
# - `sizes` are numbers of weights, `budget` is in **bytes**. All weights together, each with the bits of its layer,
#   take at most the budget. 2 bits everywhere always fit.
# - There are few layers: try all choices.
# - Return $\Omega$, a tensor `(layers,)`, and the list of bits.
#
# An example with a budget of 53 bytes, which are 424 bits:
#
# | layer | $\lambda$ | $\Omega$ | weights | with 2 bits | with 3 bits |
# |---|---|---|---|---|---|
# | 0 | 3, 5 | 4 + 1 = 5 | 80 | 160 | 240 |
# | 1 | 2.5, 2.5 | 2.5 + 0 = 2.5 | 40 | 80 | 120 |
# | 2 | -1, -3 | 2 + 1 = 3 | 48 | 96 | 144 |
#
# Layer 0 with 3 bits fits, 240 + 80 + 96 = 416, and leaves no room for another. Layers 1 and 2 fit together,
# 160 + 120 + 144 = 424, and have the larger sum. The answer is the bits `[2, 3, 3]`.

# %% tags=["exercise"]
def bits_under_budget(
    eigenvalues: torch.Tensor, sizes: list[int], budget: int
) -> tuple[torch.Tensor, list[int]]:
    """Omega of every layer, and the best bits that fit."""
    ### BEGIN SOLUTION
    omega = eigenvalues.mean(dim=1).abs() + eigenvalues.std(dim=1, correction=0)
    best, chosen = -1.0, None
    for bits in itertools.product((2, 3), repeat=len(sizes)):
        if sum(size * k for size, k in zip(sizes, bits, strict=True)) > 8 * budget:
            continue
        total = sum(value for value, k in zip(omega.tolist(), bits, strict=True) if k == 3)
        if total > best:
            best, chosen = total, list(bits)
    return omega, chosen
    ### END SOLUTION


# %% tags=["check"] points=3
check("low_bit.bits_under_budget", bits_under_budget)

# %% [markdown]
# **Look back.** How many choices are there for 12 layers, and for 12 layers with 2, 3 or 4 bits? The sum of $\Omega$ is
# only a guess at what the choice does to the accuracy. In the notebook you saw all 20 choices of equal size measured:
# how far was the guess off?
