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
# # Homework 5: pruning with second derivatives
#
# Five exercises after the notebook *Pruning*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. Which weights stay | 15 | 1 of 5 | **core** |
# | 2. Find the bug: saliencies of Optimal Brain Damage | 25 | 3 of 5 | **core** |
# | 3. An inverse, pattern by pattern | 25 | 3 of 5 | optional |
# | 4. One step of Optimal Brain Surgeon | 30 | 3 of 5 | **core** |
# | 5. Prune until the file fits | 35 | 4 of 5 | optional |
#
# Little time? Do exercises 1, 2 and 4.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)`, or the blanks `...`, by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("second_order.keep_top", keep_top, explain=True)` names it at once.
# - Stuck? `hint("second_order.keep_top")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.
#
# A **mask** has the shape of its weight: True where the weight is kept, False where it is pruned. A pruned weight is 0.

# %%
import math

import torch

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)

# %% [markdown]
# ## Exercise 1. Which weights stay
#
# *15 minutes, difficulty 1 of 5, **core**.*
#
# Pruning runs in rounds. In each round the weights with the lowest scores go: a share, the `rate`, **of those that are
# still there**. The number is exact, $\mathrm{round}(rate \cdot n)$ for $n$ weights that are still there. Of equal
# scores the first go, row by row from the left. What is gone stays gone.
#
# An example with `rate` 0.4. The score is $|w|$. One of the eight weights, the first of the second row, is gone already:
#
# | | | | | |
# |---|---|---|---|---|
# | row 0 | 0.5 | -0.1 | 0.3 | -0.3 |
# | row 1 | gone | 0.3 | -0.8 | 0.2 |
#
# Seven are still there, and round(0.4 · 7) = round(2.8) = 3 of them go. Sorted by $|w|$: 0.1, 0.2, then three times 0.3.
# The third to go is the first 0.3. The new mask:
#
# | | | | | |
# |---|---|---|---|---|
# | row 0 | True | False | False | True |
# | row 1 | False | True | True | False |
#
# Fill in the blanks. `scores[mask]` is a list of the scores where `mask` is True, row by row.

# %% tags=["exercise"]
def keep_top(scores: torch.Tensor, rate: float, mask: torch.Tensor) -> torch.Tensor:
    """The mask after one more round: the round(rate * n) lowest of the n scores still there are removed."""
    candidates = scores[mask]
    ### BEGIN SOLUTION
    remove = round(rate * len(candidates))
    kept = torch.ones_like(candidates, dtype=torch.bool)
    kept[candidates.argsort(stable=True)[:remove]] = False
    new = mask.clone()
    new[mask] = kept
    ### END SOLUTION
    ### BEGIN STARTER
    remove = round(rate * ...)
    kept = torch.ones_like(candidates, dtype=torch.bool)
    kept[candidates.argsort(stable=True)[...]] = ...
    new = mask.clone()
    new[...] = ...
    ### END STARTER
    return new


# %% tags=["check"] points=1
check("second_order.keep_top", keep_top)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("second_order.keep_top")

# %% [markdown]
# **Look back.** At rate 0.2, which share of the original weights is left after 1, 2, 3 and 10 rounds? And how many
# rounds would there be if 20 % of the *original* weights went in each?

# %% [markdown]
# ## Exercise 2. Find the bug: saliencies of Optimal Brain Damage
#
# *25 minutes, difficulty 3 of 5, **core**.*
#
# How much does the error $E$ grow if the weight $w$ is deleted? At a minimum, and if the weights do not act on each
# other, by the **saliency** $s = h w^2 / 2$ with $h = \partial^2 E / \partial w^2$ (LeCun, Denker and Solla 1990). One
# backward pass gives all $h$. Here is the pass for a net with one hidden layer,
#
# $$x_i = f(a_i), \qquad a_i = \sum_j w_{ij} x_j, \qquad f = \tanh, \qquad E = \sum_i (d_i - x_i)^2,$$
#
# with $E$ and $h$ averaged over the patterns. Three rules are needed:
#
# - $\partial^2 E / \partial w_{ij}^2 = (\partial^2 E / \partial a_i^2) \, x_j^2$, with the $x_j$ that enters the layer;
# - for an output, $\partial^2 E / \partial a_i^2 = 2 f'(a_i)^2 - 2 (d_i - x_i) f''(a_i)$;
# - for a hidden unit, $\partial E / \partial a_i = f'(a_i) \, \partial E / \partial x_i$ has to be differentiated once
#   more by $a_i$.
#
# For $\tanh$, $f' = 1 - x^2$ and $f'' = -2 x f'$.
#
# The function below has one bug. Find it, and repair it. An example with one weight in each layer, $w_1 = 0.5$ and
# $w_2 = 1$, one pattern $x = 1$ and the target $d = 1$:
#
# | | of $w_1$ | of $w_2$ |
# |---|---|---|
# | saliency | 0.248 | 0.227 |
# | what the function gives | 0.080 | 0.227 |

# %% tags=["exercise"]
def obd_saliency(
    w1: torch.Tensor, w2: torch.Tensor, x: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Saliencies of w1 (hidden, inputs) and w2 (outputs, hidden), for patterns x (patterns, inputs), targets d."""
    patterns = len(x)
    hidden = torch.tanh(x @ w1.T)
    out = torch.tanh(hidden @ w2.T)
    slope_hidden, slope_out = 1 - hidden**2, 1 - out**2  # f'
    bend_hidden, bend_out = -2 * hidden * slope_hidden, -2 * out * slope_out  # f''
    second_out = 2 * slope_out**2 - 2 * (d - out) * bend_out  # d2E/da2 of the outputs
    to_hidden = (-2 * (d - out) * slope_out) @ w2  # dE/dx of the hidden units
    ### BEGIN SOLUTION
    second_hidden = slope_hidden**2 * (second_out @ w2**2) + bend_hidden * to_hidden
    ### END SOLUTION
    ### BEGIN STARTER
    second_hidden = slope_hidden**2 * (second_out @ w2**2) - bend_hidden * to_hidden
    ### END STARTER
    h1 = second_hidden.T @ x**2 / patterns
    h2 = second_out.T @ hidden**2 / patterns
    return h1 * w1**2 / 2, h2 * w2**2 / 2


# %% tags=["check"] points=2
check("second_order.obd_saliency", obd_saliency)

# %% [markdown]
# **Look back.** The bug is not made up: this sign stands in the printed paper. Set $f''$ to 0 in both rules: can a
# saliency still be negative? Such a variant is named after Levenberg and Marquardt. And with two hidden layers the pass
# is no longer exact: what does it leave out between the units of the upper hidden layer?

# %% [markdown]
# ## Exercise 3. An inverse, pattern by pattern
#
# *25 minutes, difficulty 3 of 5, optional.*
#
# Optimal Brain Surgeon (Hassibi and Stork 1993) needs the inverse of the whole Hessian. For the squared error, and near
# a minimum, it is nearly
#
# $$H = \alpha I + \frac{1}{P} \sum_{p=1}^{P} \sum_{o} X_{po} X_{po}^\top, \qquad
# X_{po} = \frac{\partial\, \mathrm{output}_o(p)}{\partial w},$$
#
# with a gradient $X$ for each of the outputs $o$ in each of the $P$ patterns. The small $\alpha$ makes it invertible.
# Each term has rank one, so the inverse can be kept up to date while the terms come in:
#
# $$H^{-1} \leftarrow H^{-1} - \frac{(H^{-1} X)(H^{-1} X)^\top}{P + X^\top H^{-1} X}, \qquad \text{from } H^{-1} =
# \tfrac{1}{\alpha} I.$$
#
# - `net(w)` gives the outputs `(patterns, outputs)` for the weights `w`, a vector.
#   `torch.autograd.functional.jacobian(net, w)` is `(patterns, outputs, weights)`.
# - `targets` are what the outputs should be, `(patterns, outputs)`. Do you need their values?
# - Return $H^{-1}$, `(weights, weights)`, for this `alpha`.
#
# An example in numbers: for one weight, $\alpha = 0.5$, two patterns and one output with the gradients 3 and 2,
# $H = 0.5 + (9 + 4) / 2 = 7$. The inverse is 2 at first, 0.2 after the first pattern, and 1/7 after the second.

# %% tags=["exercise"]
def inverse_hessian(net, w: torch.Tensor, targets: torch.Tensor, alpha: float) -> torch.Tensor:
    """The inverse of alpha I + (1/P) sum X X^T, by the recursion."""
    ### BEGIN SOLUTION
    gradients = torch.autograd.functional.jacobian(net, w).flatten(0, 1)
    patterns = len(targets)
    inverse = torch.eye(len(w), dtype=w.dtype) / alpha
    for x in gradients:
        hx = inverse @ x
        inverse = inverse - torch.outer(hx, hx) / (patterns + x @ hx)
    return inverse
    ### END SOLUTION


# %% tags=["check"] points=3
check("second_order.inverse_hessian", inverse_hessian)

# %% [markdown]
# **Look back.** Of `targets` only the number of rows is needed. Where have their values gone? (The second
# derivative of $(o - t)^2 / 2$ is $X X^\top + (o - t)\, \partial^2 o / \partial w^2$. How large is the second
# term at a minimum?) With 4 patterns and 9 weights, as for XOR: what is the rank of the sum, and what decides in the
# other directions?

# %% [markdown]
# ## Exercise 4. One step of Optimal Brain Surgeon
#
# *30 minutes, difficulty 3 of 5, **core**.*
#
# The surgeon deletes the weight $q$, and lets **all others** move so that the error grows as little as possible:
#
# $$L_q = \frac{w_q^2}{2 [H^{-1}]_{qq}}, \qquad \delta w = - \frac{w_q}{[H^{-1}]_{qq}} H^{-1} e_q,$$
#
# where $H^{-1} e_q$ is the column $q$ of $H^{-1}$. The weight with the smallest $L_q$ goes.
#
# Some weights are gone from earlier steps: `kept` is False there. They are 0, they cannot be chosen, and they must not
# move. So the problem has to be solved **for the kept weights alone**: take the rows and columns of the others out of
# $H$, and then invert.
#
# Return three things: $q$, the place in `w`, an int; the weights after the step, with $w_q$ **exactly** 0 (rounding
# would leave $10^{-17}$ now and then); and the increase $L_q$, a number. Leave `w` itself as it is.
#
# An example, with nothing gone before:
#
# | | $w$ | $H$ | $H^{-1}$ | $L$ | $w$ after |
# |---|---|---|---|---|---|
# | 0 | 1 | 2, 1, 0 | 1, -1, 0 | 1 / 2 = 0.5 | 0 |
# | 1 | 2 | 1, 1, 0 | -1, 2, 0 | 4 / 4 = 1 | 3 |
# | 2 | -1 | 0, 0, 2 | 0, 0, 0.5 | 1 / 1 = 1 | -1 |
#
# $q = 0$, and the move is $-1 / 1 \cdot (1, -1, 0)$: the second weight takes over. Deleting $w_0$ alone would cost
# $w_0^2 H_{00} / 2 = 1$.

# %% tags=["exercise"]
def surgeon_step(w: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor) -> tuple[int, torch.Tensor, float]:
    """The weight that goes, the weights afterwards, and how much the error grows."""
    ### BEGIN SOLUTION
    left = kept.nonzero()[:, 0]
    inverse = torch.linalg.inv(hessian[left][:, left])
    increase = w[left] ** 2 / (2 * inverse.diagonal())
    best = increase.argmin().item()
    q = left[best].item()
    after = w.clone()
    after[left] -= w[q] / inverse[best, best] * inverse[:, best]
    after[q] = 0.0
    return q, after, increase[best].item()
    ### END SOLUTION


# %% tags=["check"] points=3
check("second_order.surgeon_step", surgeon_step)

# %% [markdown]
# **Look back.** Take $H = I$. Which weight goes, and how do the others move? Magnitude pruning is the surgeon who
# believes that; OBD believes in a diagonal $H$. And what does one step cost for a model with a million weights, in
# numbers stored in $H$?

# %% [markdown]
# ## Exercise 5. Prune until the file fits
#
# *35 minutes, difficulty 4 of 5, optional.*
#
# A matrix with zeros can be stored in three ways. With float32 values, $n$ weights in $r$ rows, and $k$ of them kept:
#
# | form | what it holds | bytes |
# |---|---|---|
# | `"dense"` | all weights | $4 n$ |
# | `"bitmask"` | one bit for each weight, and the kept values | $\lceil n / 8 \rceil + 4 k$ |
# | `"csr"` | each kept value with its column (2 bytes), and where each row begins and the last one ends | $(4 + 2) k + 4 (r + 1)$ |
#
# **Each matrix is stored in its smallest form**; if two are equal, in the one that stands first in the table. All
# matrices together may take `budget` bytes. Remove **as few weights as possible**:
#
# - the order is that of $|w|$ over all matrices, the smallest first; of equal ones the first, in the order of the
#   dictionary and row by row;
# - but the $\lceil floor \cdot n \rceil$ largest weights of each matrix stay (of equal ones the last), so that no matrix
#   is emptied. They are passed over;
# - if the budget cannot be met, remove all that may go;
# - return the masks and the forms, two dictionaries with the keys of `weights`.
#
# An example with `floor` 0.5 and 18 bytes. `a` is `[[0.1, -0.9, 0.2, 0.4]]`, `b` is `[[2.0, -0.3], [0.8, 1.0]]`.
#
# | step | kept of a | kept of b | bytes |
# |---|---|---|---|
# | at first | 4, dense | 4, dense | 16 + 16 = 32 |
# | 0.1 goes | 3, bitmask | 4, dense | 13 + 16 = 29 |
# | 0.2 goes | 2, bitmask | 4, dense | 9 + 16 = 25 |
# | -0.3 goes | 2, bitmask | 3, bitmask | 9 + 13 = 22 |
# | 0.4 is passed over: `a` keeps 2 | | | |
# | 0.8 goes | 2, bitmask | 2, bitmask | 9 + 9 = 18 |

# %% tags=["exercise"]
def prune_to_budget(
    weights: dict[str, torch.Tensor], budget: int, floor: float
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Masks and forms: as few weights removed as possible, so that the file fits."""
    ### BEGIN SOLUTION
    masks = {name: torch.ones(weight.numel(), dtype=torch.bool) for name, weight in weights.items()}
    kept = {name: len(mask) for name, mask in masks.items()}

    def smallest(name: str) -> tuple[int, str]:
        rows, size, count = len(weights[name]), weights[name].numel(), kept[name]
        sizes = {"dense": 4 * size, "bitmask": -(-size // 8) + 4 * count, "csr": 6 * count + 4 * (rows + 1)}
        form = min(sizes, key=sizes.get)
        return sizes[form], form

    queue = []
    for number, (name, weight) in enumerate(weights.items()):
        size = weight.abs().flatten()
        order = size.argsort(stable=True)[: len(size) - math.ceil(floor * len(size))]
        queue += [(size[place].item(), number, place, name) for place in order.tolist()]
    for _, _, place, name in sorted(queue):
        if sum(smallest(one)[0] for one in weights) <= budget:
            break
        masks[name][place] = False
        kept[name] -= 1
    shaped = {name: mask.view(weights[name].shape) for name, mask in masks.items()}
    return shaped, {name: smallest(name)[1] for name in weights}
    ### END SOLUTION


# %% tags=["check"] points=4
check("second_order.prune_to_budget", prune_to_budget)

# %% [markdown]
# **Look back.** For a large matrix with many weights in each row, from which share of kept weights on is a bitmask
# smaller than dense, and CSR smaller than a bitmask? PyTorch's CSR takes 8 bytes for a column and for a row pointer.
# At which share is it smaller than dense?
