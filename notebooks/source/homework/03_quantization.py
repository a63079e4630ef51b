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
# # Homework 3: quantization
#
# Six exercises after the notebook *Quantization*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. Scale and zero point | 15 | 1 of 5 | **core** |
# | 2. Repair it: from real numbers to codes | 10 | 2 of 5 | **core** |
# | 3. A multiplier without real numbers | 15 | 2 of 5 | optional |
# | 4. Repair it: multiply an accumulator, bit for bit | 20 | 3 of 5 | optional |
# | 5. A linear layer on integers | 30 | 3 of 5 | optional |
# | 6. Find the bug: a grid for every group | 20 | 2 of 5 | **core** |
#
# Little time? Do exercises 1, 2 and 6. Exercises 3, 4 and 5 together are integer-only inference.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)`, or the blanks `...`, by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("quantization.quantize", quantize, explain=True)` names it at once.
# - Stuck? `hint("quantization.quantize")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.
#
# In all exercises a code $q$ stands for the real number $z = S (q - Z)$, with the **scale** $S > 0$ and the
# **zero point** $Z$, which is a whole number. There are $k$ `bits`. "Rounded" means to the nearest whole number,
# **a half to the even one**, unless the exercise says otherwise.

# %%
import math

import torch
import torch.nn.functional as F

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)

# %% [markdown]
# ## Exercise 1. Scale and zero point
#
# *15 minutes, difficulty 1 of 5, **core**.*
#
# The numbers of a tensor lie between `low` and `high`, and `low < high`. They are to have the codes
# $0, 1, \dots, 2^k - 1$. The number 0 must be a point of the grid, since padding and ReLU give exact zeros.
# So, in this order:
#
# 1. the range is extended, if needed, to contain 0;
# 2. $S$ is the width of one step, with the ends of the range at the first and the last code;
# 3. $Z$ is the code of the number 0, rounded.
#
# Worked out for $k = 8$:
#
# | range | extended | $S$ | 0 lies at | $Z$ |
# |---|---|---|---|---|
# | -0.5 to 3 | -0.5 to 3 | 3.5 / 255 = 0.01373 | 36.43 | 36 |
# | 0.2 to 3 | 0 to 3 | 3 / 255 = 0.01176 | 0 | 0 |
# | -3 to -1 | -3 to 0 | 3 / 255 = 0.01176 | 255 | 255 |
#
# Fill in the blanks.

# %% tags=["exercise"]
def scale_and_zero_point(low: float, high: float, bits: int) -> tuple[float, int]:
    """S and Z of the codes 0 .. 2^bits - 1 over the range."""
    ### BEGIN SOLUTION
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    zero_point = round(-low / scale)
    return scale, zero_point
    ### END SOLUTION
    ### BEGIN STARTER
    low, high = ...
    scale = (high - low) / ...
    zero_point = round(...)
    return scale, zero_point
    ### END STARTER


# %% tags=["check"] points=1
check("quantization.scale_and_zero_point", scale_and_zero_point)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("quantization.scale_and_zero_point")

# %% [markdown]
# **Look back.** $Z$ is rounded, so the grid may be off by up to half a step, and one end of the range then lies a
# little outside. Why is it better to be wrong at the ends than at 0?

# %% [markdown]
# ## Exercise 2. Repair it: from real numbers to codes
#
# *10 minutes, difficulty 2 of 5, **core**.*
#
# A number has the code $q = \mathrm{clamp}(\mathrm{round}(z / S) + Z,\ 0,\ 2^k - 1)$. The codes are returned as bytes,
# `torch.uint8`. What the function below gives is right for most positive numbers. Repair it.
#
# An example with $S = 0.5$, $Z = 1$ and 2 bits:
#
# | $z$ | -1.5 | -0.5 | 0 | 0.25 | 0.75 | 2 |
# |---|---|---|---|---|---|---|
# | $z / S$ | -3 | -1 | 0 | 0.5 | 1.5 | 4 |
# | code | 0 | 0 | 1 | 1 | 3 | 3 |

# %% tags=["exercise"]
def quantize(z: torch.Tensor, scale: float, zero_point: int, bits: int) -> torch.Tensor:
    """Codes of z, uint8, of the same shape."""
    ### BEGIN SOLUTION
    q = torch.round(z / scale) + zero_point
    q = torch.clamp(q, 0, 2**bits - 1)
    ### END SOLUTION
    ### BEGIN STARTER
    q = torch.clamp(z / scale, 0, 2**bits - 1)
    q = torch.round(q) + zero_point
    ### END STARTER
    return q.to(torch.int32).to(torch.uint8)


# %% tags=["check"] points=2
check("quantization.quantize", quantize)

# %% [markdown]
# **Look back.** Take away the clamp, and quantize 1.5 with $S = 0.005$, $Z = 0$ and 8 bits. Which number does the code
# stand for? Why is that worse than a rounding error?

# %% [markdown]
# ## Exercise 3. A multiplier without real numbers
#
# *15 minutes, difficulty 2 of 5, optional.*
#
# An integer engine has to multiply by real numbers such as $M = S_1 S_2 / S_3$. It keeps $M$ as two whole numbers
# $m$ and $n$:
#
# $$M \approx m \cdot 2^{-b} \cdot 2^{-n}, \qquad 2^{b-1} \le m < 2^b$$
#
# $m$ uses all of its $b$ bits, so it is as exact as $b$ bits allow. $2^{-n}$ is a shift to the right by $n$ places; a
# negative $n$ is a shift to the left. Jacob et al. (2017) have $b = 31$. Here `bits` is $b$.
#
# | $M$ | $b$ | $m$ | $n$ | $m \cdot 2^{-b} \cdot 2^{-n}$ |
# |---|---|---|---|---|
# | 0.3 | 4 | 10 | 1 | 0.3125 |
# | 0.5 | 4 | 8 | 0 | 0.5 |
# | 5 | 4 | 10 | -3 | 5 |
# | 0.3 | 31 | 1,288,490,189 | 1 | 0.3000000000 |
#
# Mind the numbers just below a power of 2: is $m$ still less than $2^b$ after rounding?
#
# You may use `math.frexp`. Return `(m, n)`.

# %% tags=["exercise"]
def fixed_point_multiplier(multiplier: float, bits: int) -> tuple[int, int]:
    """(m, n) for a positive multiplier."""
    ### BEGIN SOLUTION
    m0, exponent = math.frexp(multiplier)  # multiplier = m0 2^exponent, m0 in [0.5, 1)
    m = round(m0 * 2**bits)
    if m == 2**bits:
        return m // 2, -exponent - 1
    return m, -exponent
    ### END SOLUTION


# %% tags=["check"] points=2
check("quantization.fixed_point_multiplier", fixed_point_multiplier)

# %% [markdown]
# **Look back.** By how many per cent can $M$ be wrong with $b = 31$, and with $b = 7$? An output has 8 bits. How many
# bits does $m$ need so that the error of $M$ cannot move the largest output, 127 steps, by half a step?

# %% [markdown]
# ## Exercise 4. Repair it: multiply an accumulator, bit for bit
#
# *20 minutes, difficulty 3 of 5, optional.*
#
# Now the multiplication itself. `accumulator` is an int32 tensor, `multiplier` is $m$ in $2^{30} \dots 2^{31} - 1$, and
# `shift` is $n \ge 0$. gemmlowp, the library of Jacob et al., computes the product with $m \cdot 2^{-31} \cdot 2^{-n}$
# on integers, and rounds **twice**:
#
# 1. accumulator times $m$, divided by $2^{31}$: to the nearest whole number, **a half goes up**, towards $+\infty$;
# 2. that, divided by $2^n$: to the nearest whole number, **a half goes away from zero**.
#
# An example with $m = 2^{30}$, which is the factor 0.5, and $n = 1$:
#
# | accumulator | after step 1 | after step 2 |
# |---|---|---|
# | 9 | 4.5 → 5 | 2.5 → 3 |
# | 3 | 1.5 → 2 | 1 |
# | -3 | -1.5 → -1 | -0.5 → -1 |
# | -6 | -3 | -1.5 → -2 |
#
# The function below takes the product of real numbers. It differs by one now and then, and two engines that differ by
# one are not the same engine. Repair it, with **integers only**. `x >> n` divides by $2^n$ and rounds down,
# for negative numbers too. Return an int32 tensor.

# %% tags=["exercise"]
def requantize(accumulator: torch.Tensor, multiplier: int, shift: int) -> torch.Tensor:
    """accumulator * multiplier * 2^-31 * 2^-shift, rounded as gemmlowp does it; int32."""
    ### BEGIN SOLUTION
    product = accumulator.to(torch.int64) * multiplier
    high = (product + 2**30) >> 31
    half = 2**shift // 2
    result = high.sign() * ((high.abs() + half) >> shift)
    ### END SOLUTION
    ### BEGIN STARTER
    result = torch.round(accumulator.double() * (multiplier / 2 ** (31 + shift)))
    ### END STARTER
    return result.to(torch.int32)


# %% tags=["check"] points=3
check("quantization.requantize", requantize)

# %% [markdown]
# **Look back.** Which accumulators between -20 and 20 does the first version get wrong with $m = 2^{30}$ and $n = 1$?
# An int32 product has to be moved into 64 bits. Why does no product of two int32 numbers overflow there?

# %% [markdown]
# ## Exercise 5. A linear layer on integers
#
# *30 minutes, difficulty 3 of 5, optional.*
#
# The library's integer layer has weights with zero point 0. Here is a variant that it does not have: **each row of the
# weight has a zero point of its own**. For input $i$ and output $k$, with $N$ inputs,
#
# $$\mathrm{acc}_{ik} = \sum_{j=1}^{N} (x_{ij} - Z_x)(w_{kj} - Z_{w,k}) + \mathrm{bias\ in\ units\ of\ } S_x S_{w,k}$$
#
# $$y_{ik} = \mathrm{clamp}\big(Z_y + \mathrm{rescale}(\mathrm{acc}_{ik})\big)$$
#
# The processor multiplies int8 codes, and $x - Z_x$ is no int8. So the subtractions are taken out of the sum: multiply
# the brackets out. Three of the four terms need no product of matrices.
#
# - `x` is int8 `(batch, in)`, `w` is int8 `(out, in)`, the answer is int8 `(batch, out)`.
# - `x_grid`, `w_grid` and `y_grid` have a `scale` and a `zero_point`: of the shape `()` for `x` and `y`,
#   `(out, 1)` for `w`.
# - `bias` is `(out,)`, real numbers. Round it to the units of the accumulator. (An engine does this once, when
#   the layer is built.)
# - `rescale(accumulator)` is given. It takes int32 `(batch, out)`, multiplies by $M = S_x S_w / S_y$ and gives int32.
# - The layer ends with a **ReLU**, which costs nothing: it is a bound of the clamp. The highest code is 127.
#
# Sums of int8 need `dtype=torch.int32`; `x.to(torch.int32) @ ...` stands for the processor's product.

# %% tags=["exercise"]
def integer_linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, x_grid, w_grid, y_grid, rescale
) -> torch.Tensor:
    """Codes of ReLU(x w^T + bias), int8 (batch, out)."""
    ### BEGIN SOLUTION
    z_x, z_w, z_y = x_grid.zero_point, w_grid.zero_point.T, y_grid.zero_point
    product = x.to(torch.int32) @ w.to(torch.int32).T
    sum_w = w.sum(dim=1, dtype=torch.int32)  # (out,)
    sum_x = x.sum(dim=1, keepdim=True, dtype=torch.int32)  # (batch, 1)
    accumulator = product - z_x * sum_w - z_w * sum_x + x.shape[1] * z_x * z_w
    accumulator = accumulator + torch.round(bias / (x_grid.scale * w_grid.scale.squeeze(1))).to(torch.int32)
    y = rescale(accumulator) + z_y
    return y.clamp(int(z_y), 127).to(torch.int8)
    ### END SOLUTION


# %% tags=["check"] points=4
check("quantization.integer_linear", integer_linear)

# %% [markdown]
# **Look back.** Which of the four terms can be computed before the first input arrives? And which disappears if the
# weights are symmetric? For 1,024 inputs and outputs and a batch of 1, count the multiplications that a zero point of
# the weights costs, beside those of the product.

# %% [markdown]
# ## Exercise 6. Find the bug: a grid for every group
#
# *20 minutes, difficulty 2 of 5, **core**.*
#
# One large weight spoils the grid of all numbers that share it. So 4-bit models give every **group** of consecutive
# numbers of a row a scale of its own. The library wants rows that the group size divides. This version is for any
# length: the last group of a row may be shorter.
#
# - `weight` is `(rows, columns)`; a row belongs to one output. A group never holds numbers of two rows.
# - Each group has a symmetric grid, $S = \max|w| / (2^{k-1} - 1)$ over the group, and $Z = 0$.
# - The answer is the weight moved to its grids, of the same shape and dtype. A group of zeros stays zero.
#
# The function below has passed all tests of its author, who works with 384 columns and groups of 64. Elsewhere one
# outlier harms numbers that it should not. Find out which ones, and repair it.

# %% tags=["exercise"]
def group_quantize(weight: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    """The weight on symmetric grids, one for every `group` consecutive numbers of a row."""
    ### BEGIN SOLUTION
    rows, columns = weight.shape
    padding = -columns % group  # what a row lacks to be a whole number of groups
    groups = F.pad(weight, (0, padding)).reshape(-1, group)
    scale = groups.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale > 0, scale, 1.0)  # a group of zeros
    on_grid = scale * torch.round(groups / scale)
    return on_grid.reshape(rows, -1)[:, :columns]
    ### END SOLUTION
    ### BEGIN STARTER
    padding = -weight.numel() % group  # what is missing for a whole number of groups
    groups = F.pad(weight.flatten(), (0, padding)).reshape(-1, group)
    scale = groups.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale > 0, scale, 1.0)  # a group of zeros
    on_grid = scale * torch.round(groups / scale)
    return on_grid.flatten()[: weight.numel()].reshape(weight.shape)
    ### END STARTER


# %% tags=["check"] points=3
check("quantization.group_quantize", group_quantize)

# %% [markdown]
# **Look back.** Each group also stores its scale. With 4-bit codes and float16 scales, how many bits does a weight
# take with groups of 64, and with groups of 8? A row of 100 numbers in groups of 64: how many then?
