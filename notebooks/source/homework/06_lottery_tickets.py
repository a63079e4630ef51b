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
# # Homework 6: lottery tickets
#
# Four exercises after the notebook *Lottery tickets*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. One round of pruning | 15 | 1 of 5 | **core** |
# | 2. Rewind | 20 | 2 of 5 | **core** |
# | 3. Training with weights that stay away | 20 | 2 of 5 | **core** |
# | 4. Find the bugs: two controls | 25 | 3 of 5 | optional |
#
# Little time? Do exercises 1, 2 and 3.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)`, or the blanks `...`, by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("tickets.rewind", rewind, explain=True)` names it at once.
# - Stuck? `hint("tickets.rewind")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.
#
# In all exercises `masks` is a dictionary: the name of a weight matrix, and a bool tensor of its shape, True where the
# weight is kept. Biases have no mask.

# %%
import torch
import torch.nn.functional as F

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)
from effnlp_lessons.homework.second_order.magnitude import keep_top
from effnlp_lessons.homework.tickets.controls import glorot

# %% [markdown]
# ## Exercise 1. One round of pruning
#
# *15 minutes, difficulty 1 of 5, **core**.*
#
# After each training, a round of pruning removes from every matrix the share `rate` of the weights **that it still
# has**, those with the smallest $|w|$. The output layer is pruned at **half the rate** (Frankle and Carbin 2019). Each
# matrix is pruned for itself. Biases are not pruned.
#
# LeNet-300-100 has three matrices, and 20 % go in each round. Worked out for two rounds:
#
# | matrix | weights | rate | after 1 round | after 2 rounds |
# |---|---|---|---|---|
# | first | 235,200 | 0.2 | 188,160 | 150,528 |
# | second | 30,000 | 0.2 | 24,000 | 19,200 |
# | output | 1,000 | 0.1 | 900 | 810 |
# | together | 266,200 | | 213,060 = 80.04 % | 170,538 = 64.06 % |
#
# `keep_top(scores, rate, mask)` is the function of the homework before: the mask after the round(rate · n) lowest of
# the n scores that `mask` keeps are removed. `trained` holds all parameters by name, the biases as well. `output` is
# the name of the last matrix.
#
# Fill in the blanks.

# %% tags=["exercise"]
def one_round(
    trained: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], rate: float, output: str
) -> dict[str, torch.Tensor]:
    """The masks after one more round."""
    new = {}
    ### BEGIN SOLUTION
    for name in masks:
        share = rate / 2 if name == output else rate
        new[name] = keep_top(trained[name].abs(), share, masks[name])
    ### END SOLUTION
    ### BEGIN STARTER
    for name in ...:
        share = ... if name == output else ...
        new[name] = keep_top(..., share, ...)
    ### END STARTER
    return new


# %% tags=["check"] points=1
check("tickets.one_round", one_round)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("tickets.one_round")

# %% [markdown]
# **Look back.** The paper's figures are labelled 51.3, 21.1, 13.5, 3.6, 1.9 and 1.2 per cent. Continue the table: which
# rounds are these? What would the labels be if the output layer were pruned at the full rate? The difference is small,
# but it tells you which protocol somebody has followed.

# %% [markdown]
# ## Exercise 2. Rewind
#
# *20 minutes, difficulty 2 of 5, **core**.*
#
# A ticket is a mask **together with the weights that the net began with**, `theta_0`. After a round of pruning, and
# before the next training, everything else has to be forgotten. Write the function that does it:
#
# - the model is changed in place: each parameter gets its value in `theta_0`, and pruned weights are 0. Biases have no
#   mask, but they go back as well;
# - return the optimizer for the next training. It is Adam on the model's parameters with the learning rate of the old
#   one, and remembers nothing. You may clear the old one (`optimizer.state`), or make a new one;
# - `theta_0` is needed again after the next round: it must not change, neither now nor **while the model trains**.
#
# | | before | after |
# |---|---|---|
# | a kept weight | 0.7, trained | -0.2, as in `theta_0` |
# | a pruned weight | 0.1, trained | 0 |
# | a bias | 0.4, trained | 0, as in `theta_0` |
# | Adam | a mean of gradients for each parameter, and a count of steps | nothing |

# %% tags=["exercise"]
def rewind(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    theta_0: dict[str, torch.Tensor],
    masks: dict[str, torch.Tensor],
) -> torch.optim.Optimizer:
    """Set the model to theta_0 under its masks, in place; returns the optimizer for its next training."""
    ### BEGIN SOLUTION
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(theta_0[name])
            if name in masks:
                parameter.mul_(masks[name])
    optimizer.state.clear()
    return optimizer
    ### END SOLUTION


# %% tags=["check"] points=2
check("tickets.rewind", rewind)

# %% [markdown]
# **Look back.** How would you notice, in a curve of accuracies, that somebody rewound to the *trained* weights? For
# larger nets one often rewinds to an early step $k$ of the training instead of step 0. What else would have to go back
# to step $k$: the learning rate, the order of the data?

# %% [markdown]
# ## Exercise 3. Training with weights that stay away
#
# *20 minutes, difficulty 2 of 5, **core**.*
#
# A net has been trained with Adam. Now its masks come, and training goes on **with the same optimizer**. Write the
# loop: one step for each batch `(x, y)`, on the mean squared error `F.mse_loss(model(x), y)`.
#
# - Pruned weights are 0 in every forward pass, and when the function returns.
# - The kept weights train as they would anyway: they and the optimizer are left alone. A kept weight may happen to be 0
#   now; it is kept all the same.
# - Return the list of losses, plain numbers, one for each batch: each that of its forward pass.
#
# What makes this an exercise: Adam moves a weight by a running mean of its gradients. A weight whose gradient is 0 from
# now on still moves.

# %% tags=["exercise"]
def masked_training(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, masks: dict[str, torch.Tensor], batches: list
) -> list[float]:
    """Train on the batches, in place, with pruned weights at 0; returns the losses."""
    ### BEGIN SOLUTION
    parameters = dict(model.named_parameters())

    def apply_masks() -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].mul_(mask)

    losses = []
    apply_masks()
    for x, y in batches:
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apply_masks()
        losses.append(loss.item())
    return losses
    ### END SOLUTION


# %% tags=["check"] points=2
check("tickets.masked_training", masked_training)

# %% [markdown]
# **Look back.** Remove the masking inside your loop, and count the pruned weights that are not 0 after one step. How
# many are they? Would plain gradient descent without momentum bring them back, too, if their gradients were set to 0?
# "Our net has 90 % zeros" is worth checking after training, and not before.

# %% [markdown]
# ## Exercise 4. Find the bugs: two controls
#
# *25 minutes, difficulty 3 of 5, optional.*
#
# A ticket trains well. Is it because of *which* weights it keeps? Because of the values they began with? Or would any
# small net do? Each control differs from the ticket in **one** thing:
#
# - **shuffled**: the weights of `theta_0`, but each mask is shuffled **within its matrix**. Every matrix keeps its number
#   of weights; where they stand is left to chance;
# - **redrawn**: the masks of the ticket, but **new** random weights. `glorot(shape, generator)` draws them as they were
#   drawn at the start.
#
# In both, pruned weights are 0. Everything random comes from `generator`. There are no biases here. Return
# `{"shuffled": (weights, masks), "redrawn": (weights, masks)}`, all four of them dictionaries by name.
#
# The function below has **two bugs**. Find them, and repair them. The check looks at many draws, and says in words what
# does not hold.

# %% tags=["exercise"]
def controls(
    theta_0: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], generator: torch.Generator
) -> dict[str, tuple[dict, dict]]:
    """Two nets to compare a ticket with."""
    ### BEGIN SOLUTION
    shuffled, redrawn = {}, {}
    for name, mask in masks.items():
        places = torch.randperm(mask.numel(), generator=generator)
        shuffled[name] = mask.flatten()[places].view(mask.shape)
    for name, weight in theta_0.items():
        redrawn[name] = glorot(tuple(weight.shape), generator)
    ### END SOLUTION
    ### BEGIN STARTER
    everything = torch.cat([mask.flatten() for mask in masks.values()])
    everything = everything[torch.randperm(len(everything), generator=generator)]
    parts = everything.split([mask.numel() for mask in masks.values()])
    shuffled = {name: part.view(masks[name].shape) for name, part in zip(masks, parts, strict=True)}

    redrawn = {}
    for name, weight in theta_0.items():
        order = torch.randperm(weight.numel(), generator=generator)
        redrawn[name] = weight.flatten()[order].view(weight.shape)
    ### END STARTER

    return {
        "shuffled": ({name: theta_0[name] * shuffled[name] for name in masks}, shuffled),
        "redrawn": ({name: redrawn[name] * masks[name] for name in masks}, masks),
    }


# %% tags=["check"] points=3
check("tickets.controls", controls)

# %% [markdown]
# **Look back.** Why is a mask that is shuffled over the whole net an unfair control? Think of the output layer, of
# which the ticket keeps much more than of the others. And how many draws of each control does one ticket need, before
# you say that it is better?
