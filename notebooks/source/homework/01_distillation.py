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
# # Homework 1: distillation with soft targets
#
# Seven exercises after the notebook *Knowledge distillation*.
# Each stands alone, so you can skip one.
#
# | exercise | minutes | difficulty | |
# |---|---|---|---|
# | 1. The loss with soft targets | 10 | 1 of 5 | **core** |
# | 2. The gradient by hand | 15 | 2 of 5 | optional |
# | 3. Soft targets and labels in one loss | 20 | 2 of 5 | **core** |
# | 4. Find the bug: asking a teacher | 15 | 2 of 5 | **core** |
# | 5. The targets of several teachers | 10 | 2 of 5 | optional |
# | 6. Targets with k classes | 20 | 3 of 5 | optional |
# | 7. A digit that the student never saw | 30 | 3 of 5 | optional |
#
# Little time? Do exercises 1, 3 and 4. More time? Exercise 7 is what the others are for.

# %% [markdown]
# ## How it works
#
# - Replace `raise NotImplementedError(...)`, or the blanks `...`, by your code. Run the cell.
# - Run the check cell below it. It tries your function on random inputs, new ones each time.
# - A failed check shows what does not hold, with the input, the expected answer and yours.
#   From the second failed check on it also names the likely cause.
#   `check("distillation.soft_loss", soft_loss, explain=True)` names it at once.
# - Stuck? `hint("distillation.soft_loss")` prints a hint. There are three for each exercise, one per call.
# - The solved notebook has the same name and lies in the folder `solutions`.
#
# In all exercises the student has the logits $z$, the teacher the logits $v$, and at the **temperature** $T$
# their probabilities are $q = \mathrm{softmax}(z / T)$ and $p = \mathrm{softmax}(v / T)$.
# Logits have the shape `(rows, classes)`: one row for each example. Losses are in nats.

# %%
import torch
import torch.nn.functional as F

from effnlp_lessons.homework import check, hint  # noqa: F401 (hint is for when you are stuck)
from effnlp_lessons.homework.distillation.digits import judge, transfer_set  # noqa: F401 (judge is for you to use)

# %% [markdown]
# ## Exercise 1. The loss with soft targets
#
# *10 minutes, difficulty 1 of 5, **core**.*
#
# The student is to give every class what the teacher gives it (Hinton, Vinyals, Dean 2015). The loss of a row is
#
# $$T^2 \cdot \mathrm{KL}(p \,\|\, q) = T^2 \sum_i p_i \log \frac{p_i}{q_i}$$
#
# and the loss of a batch is the mean over its rows.
#
# One row with three classes, $T = 2$, worked out:
#
# | | class 0 | class 1 | class 2 | sum |
# |---|---|---|---|---|
# | teacher, $v$ | 4 | 2 | 0 | |
# | student, $z$ | 2 | 2 | 0 | |
# | $p$ = softmax of $v / 2$ | 0.665 | 0.245 | 0.090 | 1 |
# | $q$ = softmax of $z / 2$ | 0.422 | 0.422 | 0.155 | 1 |
# | $p \log (p / q)$ | 0.302 | -0.134 | -0.049 | 0.120 |
# | times $T^2$ | | | | 0.479 |
#
# Fill in the blanks. The student's line is done. `F.kl_div` takes log-probabilities first and probabilities second.

# %% tags=["exercise"]
def soft_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(teacher || student) at this temperature, mean over rows; a scalar tensor."""
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    ### BEGIN SOLUTION
    p = F.softmax(teacher_logits / temperature, dim=-1)
    divergence = F.kl_div(log_q, p, reduction="batchmean")
    return temperature**2 * divergence
    ### END SOLUTION
    ### BEGIN STARTER
    p = F.softmax(teacher_logits / ..., dim=...)
    divergence = F.kl_div(..., ..., reduction=...)
    return ... * divergence
    ### END STARTER


# %% tags=["check"] points=1
check("distillation.soft_loss", soft_loss)

# %% [markdown]
# Stuck? Remove the `#` and run the next cell. Each run gives one more hint.

# %%
# hint("distillation.soft_loss")

# %% [markdown]
# **Look back.** Call your function with the student's and the teacher's logits exchanged. Is it the same number?
# By how much would `reduction="mean"` make the loss of a masked-language model with 30,522 words smaller?

# %% [markdown]
# ## Exercise 2. The gradient by hand
#
# *15 minutes, difficulty 2 of 5, optional.*
#
# Take the soft cross-entropy of a row **without** a factor $T^2$, $C = - \sum_i p_i \log q_i$, and the mean of $C$ over
# all rows as the loss. What is the gradient of this loss with respect to the student's logits $z$?
#
# Derive the formula and write it down. Autograd is not allowed, and not needed: the answer is short.
#
# An example with one row, to test your formula with: $z = (2, 1, 0)$, $v = (3, 0, 0)$.
#
# | | class 0 | class 1 | class 2 |
# |---|---|---|---|
# | gradient at $T = 1$ | -0.244 | 0.199 | 0.045 |
# | gradient at $T = 2$ | -0.093 | 0.077 | 0.016 |
#
# Return a tensor of the shape `(rows, classes)`.

# %% tags=["exercise"]
def soft_gradient(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Gradient at the student's logits of the mean over rows of - sum p log q."""
    ### BEGIN SOLUTION
    q = F.softmax(student_logits / temperature, dim=-1)
    p = F.softmax(teacher_logits / temperature, dim=-1)
    rows = len(q)
    return (q - p) / temperature / rows
    ### END SOLUTION


# %% tags=["check"] points=2
check("distillation.soft_gradient", soft_gradient)

# %% [markdown]
# **Look back.** Each row of the gradient sums to 0. Why must it?
# Multiply your gradient by `temperature ** 2` and let the temperature grow: 2, 8, 32, 128. It settles down.
# What has it to do with the plain difference of the logits?

# %% [markdown]
# ## Exercise 3. Soft targets and labels in one loss
#
# *20 minutes, difficulty 2 of 5, **core**.*
#
# Some rows of the transfer set have a label, others were never labelled: theirs is -1. With $a$ = `soft_weight`:
#
# - a row **with** a label has the loss $\quad a \, T^2 \, \mathrm{CE}(p, q) + (1 - a) \, \mathrm{CE}(\text{label})$;
# - a row **without** one has the loss $\quad T^2 \, \mathrm{CE}(p, q)$, at weight 1.
#
# $\mathrm{CE}(p, q) = - \sum_i p_i \log q_i$ is taken at temperature $T$. The term of the label is the usual
# cross-entropy of the student's logits, **at temperature 1**.
# The loss of the batch is the mean over **all** its rows.
#
# An example with $T = 2$ and $a = 0.9$:
#
# | student, $z$ | teacher, $v$ | label | $T^2$ CE(p, q) | CE(label) | loss of the row |
# |---|---|---|---|---|---|
# | (2, 0) | (3, 0) | 0 | 1.983 | 0.127 | 1.797 |
# | (0, 1) | (0, 0) | -1 | 2.896 | | 2.896 |
# | | | | | **mean** | 2.347 |
#
# Return the loss of the batch, a scalar tensor.

# %% tags=["exercise"]
def mixed_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    soft_weight: float,
) -> torch.Tensor:
    """Soft term and hard term, mean over rows; labels (rows,), int64, -1 = without one."""
    ### BEGIN SOLUTION
    p = F.softmax(teacher_logits / temperature, dim=-1)
    log_q = torch.log_softmax(student_logits / temperature, dim=-1)
    soft = temperature**2 * -(p * log_q).sum(dim=-1)
    hard = F.cross_entropy(student_logits, labels, ignore_index=-1, reduction="none")
    both = soft_weight * soft + (1 - soft_weight) * hard
    return torch.where(labels == -1, soft, both).mean()
    ### END SOLUTION


# %% tags=["check"] points=3
check("distillation.mixed_loss", mixed_loss)

# %% [markdown]
# **Look back.** In the second row of the example the teacher cannot decide, and nobody knows the label.
# Its loss is the larger one all the same. Which part of it can no student remove?

# %% [markdown]
# ## Exercise 4. Find the bug: asking a teacher
#
# *15 minutes, difficulty 2 of 5, **core**.*
#
# `teacher` is a module with dropout, `x` a batch for it. The function returns `teacher(x)` as soft targets are made of
# it:
#
# - without dropout, so that the same batch gives the same logits every time;
# - without recording anything for a gradient;
# - and the teacher is **only asked**: afterwards it is as it was. It may be in training mode, because someone trains
#   it at the same time. Its parts may even be in different modes: a head in training on an encoder that is kept in
#   evaluation mode.
#
# The function below runs without an error, and a student trained with it even learns something. Repair it.

# %% tags=["exercise"]
def teacher_logits(teacher: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits of the teacher without dropout and without a graph; the teacher is left as it was."""
    ### BEGIN SOLUTION
    modes = {part: part.training for part in teacher.modules()}
    teacher.eval()
    with torch.no_grad():
        logits = teacher(x)
    for part, training in modes.items():
        part.training = training
    return logits
    ### END SOLUTION
    ### BEGIN STARTER
    # the teacher does not learn
    with torch.no_grad():
        logits = teacher(x)
    return logits
    ### END STARTER


# %% tags=["check"] points=2
check("distillation.teacher_logits", teacher_logits)

# %% [markdown]
# **Look back.** A teacher with dropout on is a noisy teacher: its targets scatter around something. Is what they
# scatter around the same as the logits without dropout? Ask a small network of your own a thousand times.

# %% [markdown]
# ## Exercise 5. The targets of several teachers
#
# *10 minutes, difficulty 2 of 5, optional.*
#
# An ensemble of teachers is often better than each of them, and far too slow to use. One student can learn from all.
# Its targets are the **arithmetic mean** of the members' softened distributions.
#
# `member_logits` has the shape `(members, rows, classes)`. An example with two members, one row and $T = 1$:
#
# | | class 0 | class 1 | class 2 |
# |---|---|---|---|
# | logits of the first | 2 | 0 | 0 |
# | logits of the second | 0 | 2 | 0 |
# | **targets** | 0.447 | 0.447 | 0.107 |
#
# Return the targets, `(rows, classes)`.

# %% tags=["exercise"]
def ensemble_targets(member_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean of the members' softened distributions."""
    ### BEGIN SOLUTION
    softened = F.softmax(member_logits / temperature, dim=-1)
    return softened.mean(dim=0)
    ### END SOLUTION


# %% tags=["check"] points=1
check("distillation.ensemble_targets", ensemble_targets)

# %% [markdown]
# **Look back.** In the example, average the logits first and take one softmax then: class 2 gets 0.155 instead of 0.107.
# Which of the two means is larger where the members disagree, and which one lets a single member rule out a class?

# %% [markdown]
# ## Exercise 6. Targets with k classes
#
# *20 minutes, difficulty 3 of 5, optional.*
#
# A teacher that predicts masked words gives 30,522 numbers for each token. To store them for a whole corpus takes too
# much room. The library does not have this variant: keep, for each row, only the `k` largest softened probabilities,
# the largest first, together with their classes. Make the `k` that are kept sum to 1.
#
# An example with the logits (1, 3, 0, 2), $T = 2$ and `k = 2`:
#
# | class | 0 | 1 | 2 | 3 |
# |---|---|---|---|---|
# | softened | 0.167 | 0.455 | 0.102 | 0.276 |
# | kept, made to sum to 1 | | 0.622 | | 0.378 |
#
# The answer is the probabilities `[[0.622, 0.378]]` and the classes `[[1, 3]]`.
#
# Return both, each of the shape `(rows, k)`; the classes are int64.

# %% tags=["exercise"]
def top_k_targets(teacher_logits: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest softened probabilities of every row, made to sum to 1, and their classes."""
    ### BEGIN SOLUTION
    softened = F.softmax(teacher_logits / temperature, dim=-1)
    kept, classes = softened.topk(k, dim=-1)
    return kept / kept.sum(dim=-1, keepdim=True), classes
    ### END SOLUTION


# %% tags=["check"] points=3
check("distillation.top_k_targets", top_k_targets)

# %% [markdown]
# **Look back.** How many bytes does a token take with all 30,522 probabilities in float32, and how many with `k = 8`
# and int64 classes? A student trained on such targets is told that all other words have probability 0.
# Does a higher temperature make that better or worse?

# %% [markdown]
# ## Exercise 7. A digit that the student never saw
#
# *30 minutes, difficulty 3 of 5, optional.*
#
# The teacher knows all ten digits. The student is shown 300 images. **None of them is a 3**, and the teacher takes none
# of them for one. There are no labels, only the teacher's logits. Can the student learn what a 3 is?
#
# Write the whole training: `student` maps `images`, `(rows, 784)`, to logits `(rows, 10)`; `teacher_logits` has the
# same shape as those. Temperature, optimizer and number of steps are up to you. Train the student that you are given,
# in place, and return it in evaluation mode.
#
# The check counts results. It raises the student's bias for the 3 by 1, since for this student the answer 3 was never
# the right one, and shows it 1,000 test digits. Asked is that
#
# - before that the student agrees with the teacher on at least 84 % of the digits that are no 3;
# - with the bias raised it finds at least 40 % of the threes, and takes at most 7 % of the others for one;
# - its logits are no more than three times as large as the teacher's.
#
# Well-trained students are far from each of these bounds. A check takes a few seconds, the first one some more:
# it trains a teacher.
#
# To try something out, `transfer_set(seed)` gives a student, images and logits, and `judge(student)` says what became
# of it.

# %%
student, images, logits = transfer_set(seed=0)
print(tuple(images.shape), tuple(logits.shape))

# %% tags=["exercise"]
def distil_digits(
    student: torch.nn.Module, images: torch.Tensor, teacher_logits: torch.Tensor
) -> torch.nn.Module:
    """Train the student on the teacher's logits; return it in evaluation mode."""
    ### BEGIN SOLUTION
    temperature = 4.0
    p = F.softmax(teacher_logits / temperature, dim=-1)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    student.train()
    for _ in range(60):
        log_q = F.log_softmax(student(images) / temperature, dim=-1)
        loss = temperature**2 * F.kl_div(log_q, p, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.eval()
    ### END SOLUTION


# %% tags=["check"] points=4
check("distillation.distil_digits", distil_digits)

# %% [markdown]
# **Look back.** `judge(distil_digits(*transfer_set(seed=1)))` gives the figures. Try temperatures of 1, 2 and 20 on the
# same transfer set. At which does the student find the fewest threes? Then train it on `teacher_logits.argmax(dim=-1)`:
# where did its knowledge of the 3 go?
