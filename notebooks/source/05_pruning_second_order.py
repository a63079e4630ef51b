# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # Pruning: which weights can go, and what must the others do about it?
#
# Quantization gave every weight fewer bits. Pruning gives some weights none: they are set to 0, and stay there. This
# notebook asks which ones, first by their size, then by the curvature of the loss; and it asks what zeros are worth in
# bytes and in milliseconds. The answer to the last question is a surprise to many users.
#
# **Lecture topic:** Pruning, second-order methods. **Reading:** 60 minutes. **Running:** about 40 seconds on two cores,
# no GPU, no network.
#
# **You need:** notebook 00; notebook 04 for the word Hessian. Parts marked *(depth)* can wait.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. make a mask with an exact count, and train so that no pruned weight grows again;
# 2. say what a sparse file costs in each format, and when it is smaller than the dense one;
# 3. compute second derivatives in one backward pass, and rank weights by what their removal costs;
# 4. derive Optimal Brain Surgeon's saliency and its update of all other weights;
# 5. judge a criterion by a distribution over seeds, with and without retraining.
#
# **Two questions from earlier notebooks.** Answer, then open.
#
# <details><summary>4-bit weights in a file made the classifier smaller. Did they make it faster?</summary>
#
# No. They were turned back into floats in each pass, which took time. Fewer bytes and fewer milliseconds are two
# different wishes (notebook 03).
# </details>
# <details><summary>What does the largest eigenvalue of the Hessian say about a weight matrix?</summary>
#
# How much the loss rises, at most, for a step of a given length: $\frac12 \lambda_{max} |\delta|^2$ (notebook 04).
# </details>

# %% [markdown]
# **A question before anything runs.** Take a float32 matrix and set half of its weights to 0. Save it in the usual
# sparse format: *compressed sparse rows* (CSR), which keeps the values that are not 0, and for each the number of its
# column as a 64-bit integer. How large is the file, in per cent of the dense one? (`second_order.csr_growth`)

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("second_order.csr_growth", my_guess)

# %% [markdown]
# ## 1. A mask, and three questions
#
# A layer that computes $a = Wx$ is pruned by a mask of zeros and ones:
#
# $$a = (W \odot M)\,x, \qquad M \in \{0,1\}^{n \times m}, \qquad \text{sparsity} = 1 - \frac{\|M\|_0}{|M|}$$
#
# All of pruning is a choice of $M$. Hassibi and Stork (1993) ask three questions of every method. They are the thread
# through notebooks 05, 06 and 07:
#
# | method | Which weights go? | How are the others adjusted? | What does it cost to find out? |
# |---|---|---|---|
# | magnitude | smallest $\lvert w \rvert$ | not at all, or retrain | nothing |
# | optimal brain damage (05) | smallest $h_{kk} w_k^2$ | retrain | one more backward pass |
# | optimal brain surgeon (05) | smallest $w_q^2 / [H^{-1}]_{qq}$ | all at once, in closed form | an inverse Hessian |
# | lottery tickets (06) | smallest $\lvert w \rvert$ after training | set back to their start, train again | one training a round |
# | movement pruning (07) | those that move towards 0 | while fine-tuning | one score per weight |
# | heads, neurons, layers (07) | by the gradient of a gate | retrain | one backward pass |
#
# The definition on one matrix of MiniLM:

# %% tags=["nbval-check-output"]
import torch

from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.pruning.masks import keep_top, masked_product
from effnlp_lessons.widgets.page import curves, dots, show_source

teacher = load_teacher()
expand = teacher.encoder.blocks[1].channel_mixer.expand
W, x = expand.weight.detach(), torch.randn(384, generator=torch.Generator().manual_seed(0))
M = keep_top(W.abs(), rate=0.9)
print("W", tuple(W.shape), " M", M.dtype, " kept:", int(M.sum()), "of", M.numel())
print("(W * M) x is a sum over the kept weights alone:",
      torch.allclose(masked_product(W, M, x)[0], (W[0, M[0]] * x[M[0]]).sum(), atol=1e-5))

# %% [markdown]
# ## 2. Magnitude: the smallest weights go
#
# $S = |W|$, and $M$ keeps the largest. Two choices remain. **Local:** every matrix loses the same share. **Global:** one
# threshold for all matrices, so that a matrix of small weights loses more. And one habit of the field hides a trap: a
# rate is a share *of the weights that are still there*.

# %% tags=["nbval-check-output"]
from effnlp_lessons.pruning.masks import global_masks, local_masks, magnitudes, share_left, shares_left

masks, left = None, []
for _ in range(3):
    masks = local_masks(magnitudes(teacher), rate=0.2, masks=masks)
    left.append(f"{100 * share_left(masks):.1f} %")
print("a fifth, three times:", left)

everywhere = global_masks(magnitudes(teacher), rate=0.5)
for name in ("encoder.blocks.0.token_mixer.query.weight", "encoder.blocks.5.channel_mixer.contract.weight"):
    print(f"half of all, one threshold: {name:50} keeps {100 * everywhere[name].float().mean():.0f} %")

# %% [markdown]
# **State the denominator.** "50 % sparse" means 50 % of something. Embeddings, biases and norms are not pruned, and in
# MiniLM the embeddings are more than half of the model:

# %% tags=["nbval-check-output"]
for what, share in shares_left(teacher, everywhere).items():
    print(f"{what:30} {100 * share:5.1f} % left")

# %% [markdown]
# How much can go? Live on 300 test reviews, no retraining:

# %%
import copy

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.pruning.masks import apply_masks_

tested = ReviewExamples(reviews.load_reviews().subset("test"), limit=300)
for rate in (0.0, 0.3, 0.5, 0.7):
    pruned = copy.deepcopy(teacher)
    apply_masks_(pruned, local_masks(magnitudes(teacher), rate))
    print(f"{100 * rate:3.0f} % of each matrix pruned: {accuracy(pruned, tested):.0f} % of the reviews right")

# %% [markdown]
# A third of the weights are free, half cost some points, and then there is a cliff. Whoever wants more must choose
# better, adjust the others, or retrain. First, retraining has a trap of its own.
#
# ### Zeros that stay zeros
#
# Set the weights to 0 once, and go on with the optimizer that you had. Here an Adam with a past takes a single step:

# %% tags=["nbval-check-output"]
from torch import nn

from effnlp_lessons.pruning.masks import masked


def one_step(hold: bool) -> int:
    """How many of the pruned weights are not 0 after one step of an Adam that has trained before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 6))
        inputs, labels = torch.randn(64, 8), torch.randint(6, (64,))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    step()
    masks = local_masks(magnitudes(net), 0.4)
    with masked(net, masks) as keep:  # sets the zeros, and their gradients to 0
        step()
        if hold:
            keep()  # sets the zeros again
        weights = dict(net.named_parameters())
        return sum(int((weights[name][~mask] != 0).sum()) for name, mask in masks.items())

print("pruned weights that are back after one step, masked once:", one_step(hold=False), "of 56")
print("masked again after the step:                            ", one_step(hold=True), "of 56")

# %% [markdown]
# All of them are back, though their gradients were 0: Adam's momentum moves them. The rule is to mask again after
# every step. A public course reported a network pruned to a tenth; after its retraining 98 % of the weights were there.

# %% [markdown]
# ## 3. What are zeros worth? Bytes first
#
# A file need not store zeros. It must then store *where* the others are. Four forms for one float32 matrix:
#
# * **dense:** 4 bytes for each weight, zero or not;
# * **CSR:** for each kept weight its value and its column; for each row where it begins;
# * **bit mask:** one bit for each weight, kept or not, then the kept values;
# * **2:4:** of every four neighbours in a row exactly two are kept: two values, and 2 bits each for their places.

# %% tags=["reveal"]
from effnlp_lessons.pruning.storage import FORMS, matrix_bytes

if (guess := reveal("second_order.csr_growth")) is not None:
    rows, columns = W.shape
    dense = matrix_bytes("dense", rows, columns, rows * columns)
    for share in (0.5, 0.1, 0.03):
        kept = round(share * rows * columns)
        sizes = {form: matrix_bytes(form, rows, columns, kept) for form in FORMS if form != "2:4" or share == 0.5}
        print(f"{100 * share:3.0f} % left:", ", ".join(f"{form} {100 * size / dense:.0f} %" for form, size in sizes.items()))
    print(f"your guess for CSR with 64-bit columns, half left: {guess:g} %")

# %% [markdown]
# <details><summary><b>After your guess</b></summary>
#
# The file **grows**, by half. A kept weight takes 4 bytes for its value and 8 for its column. Even with 32-bit columns,
# half of the weights fill the whole dense file. A bit mask is smaller almost from the first zero on. Users who report
# that "pruning does not shrink the model" have met this, or have saved the zeros.
# </details>
#
# Written to disk for the whole classifier, and read back:

# %% tags=["nbval-check-output"]
import tempfile
from pathlib import Path

from effnlp_lessons.measure import bytes_on_disk
from effnlp_lessons.pruning.masks import n_of_m
from effnlp_lessons.pruning.storage import load_pruned, save_pruned

file = Path(tempfile.mkdtemp()) / "model.safetensors"
halves = {"bit mask": everywhere, "2:4": {name: n_of_m(score) for name, score in magnitudes(teacher).items()}}
print(f"{'as it was':9} {bytes_on_disk(teacher) / 1e6:5.1f} MB")
for form, chosen in halves.items():
    size = save_pruned(teacher, chosen, file, form)
    back, found = load_pruned(teacher, file)
    print(f"{form:9} {size / 1e6:5.1f} MB; masks come back:", all(torch.equal(found[name], chosen[name]) for name in chosen))

# %% [markdown]
# ### Then milliseconds
#
# A kernel for dense matrices multiplies zeros as it multiplies anything else. A kernel for CSR skips them, and pays for
# looking up where the others are. One matrix times 128 tokens, one thread, in turns:

# %%
import warnings

from effnlp_lessons.measure import latencies

torch.set_num_threads(1)
tokens = torch.randn(384, 128, generator=torch.Generator().manual_seed(0))
calls = {"dense, all weights": lambda: W @ tokens}
for share in (0.5, 0.1, 0.01):
    kept = keep_top(W.abs(), 1 - share)
    calls[f"dense kernel, {100 * share:.0f} % left"] = lambda zeros=W * kept: zeros @ tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that its sparse tensors are in beta
        csr = (W * kept).to_sparse_csr()
    calls[f"CSR kernel, {100 * share:.0f} % left"] = lambda csr=csr: csr @ tokens
times = latencies(calls, runs=15)
for name, timing in sorted(times.items()):
    print(f"{name:25} {times['dense, all weights'].median / timing.median:6.2f} times as fast")

# %% [markdown]
# Zeros in a dense kernel cost what other numbers cost. CSR loses at one half, and wins when nine of ten weights are
# gone. What makes a model faster at one half is a smaller matrix, and that needs *structure*: notebook 07.
#
# ### Try it: a mask on a real matrix

# %%
from effnlp_lessons.widgets.mask_explorer import MaskExplorer

MaskExplorer(structure="rows", sparsity=90)

# %% [markdown]
# **Try:**
#
# * It opens with whole *rows* removed: the matrix becomes smaller itself, so bytes and time fall together.
# * Choose *unstructured*, and drag the sparsity from 90 % down: where does CSR become larger than dense, where slower?
# * Choose *2:4*: the sparsity is fixed, the file is that of a bit mask. What does each structure do to the share of
#   squared weight that is kept?

# %% [markdown]
# ## 4. Optimal Brain Damage (LeCun, Denker, Solla 1990)
#
# Is the smallest weight the least important one? A small weight that reads a loud input can matter more than a large
# one that reads a quiet input. So ask the loss. If the weights move by $\delta u$, it changes by
#
# $$\delta E = \underbrace{\sum_i g_i\, \delta u_i}_{1} + \underbrace{\tfrac12 \sum_i h_{ii}\, \delta u_i^2}_{2} +
# \underbrace{\tfrac12 \sum_{i \neq j} h_{ij}\, \delta u_i\, \delta u_j}_{3} + \underbrace{O(\|\delta u\|^3)}_{4}$$
#
# Three assumptions leave only term 2. *Extremal:* training is finished, so $g = 0$. *Diagonal:* what two removals cost
# together is the sum of what each costs alone. *Quadratic:* the higher terms are small. Removing weight $k$ is the move
# $\delta u_k = -u_k$, so it costs the **saliency**
#
# $$s_k = \tfrac12\, h_{kk}\, u_k^2$$
#
# To see the four terms, take a network small enough for its whole Hessian: three hidden units that learn the rule
# "$a_1 = a_2$ or $a_5 = 1$" from 124 cases (the first of the *MONK's problems*, Thrun et al. 1991).

# %%
from torch.func import functional_call

from effnlp_lessons.pruning.logic_problems import monk_training, sigmoid_network, train_to_minimum_

monk, net = monk_training(1, seed=0), sigmoid_network((17, 3, 1), seed=0)
train_to_minimum_(net, monk, weight_decay=1e-4)
shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
u = nn.utils.parameters_to_vector(net.parameters()).detach()

def E(weights):
    """The mean squared error with these 58 numbers as weights and biases."""
    pieces = weights.split([shape.numel() for shape in shapes.values()])
    named = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
    return (monk.targets - functional_call(net, named, (monk.inputs,))).square().sum(1).mean()

g, H = torch.func.grad(E)(u), torch.func.hessian(E)(u)
print(f"{len(u)} weights and biases; E = {E(u):.5f}, largest |g| = {g.abs().max():.5f}")

# %% [markdown]
# Remove each weight by itself, and compare what really happens with term 2 alone.

# %%
removed = [u.clone().index_fill_(0, torch.tensor([k]), 0.0) for k in range(len(u))]
true = torch.stack([E(weights) - E(u) for weights in removed])
saliency = H.diagonal() * u**2 / 2
order = true.argsort()
curves(list(range(len(u))), {"true rise of E": true[order].clamp_min(1e-6).tolist(),
                             "term 2, the saliency": saliency[order].clamp_min(1e-6).tolist(),
                             "|w|, for comparison": (u.abs()[order] / u.abs().max()).tolist()},
       x_label="weights, the least costly first", y_label="rise of E (and |w| / largest)", log_y=True,
       caption="Term 2 follows the truth where a removal is cheap, and is several times too low where it is not: term 4. "
               "And |w|? It orders these weights nearly as well: all 17 inputs are equally loud.")

# %% [markdown]
# **All of the diagonal in one backward pass.** The Hessian has an entry for every pair of weights; its diagonal is as
# cheap as the gradient. Write $a_i = \sum_j w_{ij} x_j$ and $x_i = f(a_i)$, with $E = \sum_i (d_i - x_i)^2$ averaged
# over the patterns. Since $a_i$ is linear in $w_{ij}$,
#
# $$\frac{\partial^2 E}{\partial w_{ij}^2} = \frac{\partial^2 E}{\partial a_i^2}\; x_j^2$$
#
# and the second derivatives in $a$ run backward, from the outputs to the layers below:
#
# $$\text{output:}\quad \frac{\partial^2 E}{\partial a_i^2} = 2 f'(a_i)^2 - 2 (d_i - x_i) f''(a_i)$$
#
# $$\text{hidden:}\quad \frac{\partial^2 E}{\partial a_i^2} = f'(a_i)^2 \sum_l w_{li}^2 \frac{\partial^2 E}{\partial a_l^2} + f''(a_i) \frac{\partial E}{\partial x_i}$$

# %%
from effnlp_lessons.pruning.obd import second_derivatives

show_source(second_derivatives)

# %% [markdown]
# The paper's text prints a minus before the last term. Its own formula for the outputs has a plus there, and so has the
# chain rule: differentiate $\partial E / \partial a_i = f'(a_i)\, \partial E/\partial x_i$ once more. Which sign is
# right, the whole Hessian can say:

# %% tags=["nbval-check-output"]
def worst(**how):
    """Largest difference to the diagonal of the whole Hessian."""
    found = second_derivatives(net, monk.inputs, monk.targets, **how)
    return (torch.cat([found[name].flatten() for name in shapes]) - H.diagonal()).abs().max().item()

print("plus: equal to the diagonal of the whole Hessian:", worst() < 1e-12)
print("minus, as printed:                               ", worst(printed_minus=True) < 1e-12)
untrained = sigmoid_network((17, 3, 1), seed=0)
for name, damped in (("with the terms in f''", False), ("Levenberg-Marquardt  ", True)):
    h = second_derivatives(untrained, monk.inputs, monk.targets, levenberg_marquardt=damped).values()
    print(f"untrained network, {name}: any negative entry:", any((part < 0).any().item() for part in h))

# %% [markdown]
# With one hidden layer the recursion is exact. With more it is not: it leaves out how two units above bend together.
# Away from a minimum $h_{kk}$ can be negative, and then the saliency promises that a removal makes things better. The
# **Levenberg-Marquardt** form leaves out the terms with $f''$; it is never negative. The recipe: train,
# compute the saliencies, delete some of the lowest, retrain, repeat.
#
# <details><summary><b>Shared weights.</b> What is $h_{kk}$ of a weight that is used at many places, as in a convolution?</summary>
#
# The sum of $h$ over its connections. The library has it as `obd.sum_over_connections`; like the recursion, it leaves
# out the cross terms.
# </details>

# %% [markdown]
# ## 5. Optimal Brain Surgeon (Hassibi and Stork 1993)
#
# OBD removes a weight and leaves the others alone, until retraining. But the others can make up for it at once. Which
# move $\delta w$ of *all* weights removes weight $q$, and raises the loss least?
#
# $$\min_{\delta w}\; \tfrac12\, \delta w^\top H\, \delta w \quad\text{such that}\quad e_q^\top \delta w + w_q = 0$$
#
# **Step 1.** With a multiplier $\lambda$ for the condition, $L = \frac12 \delta w^\top H \delta w + \lambda (e_q^\top
# \delta w + w_q)$. Its derivative is 0 where $H\, \delta w = -\lambda e_q$, so $\delta w = -\lambda H^{-1} e_q$.
#
# **Step 2.** The condition fixes $\lambda$: $-\lambda\, [H^{-1}]_{qq} + w_q = 0$, so $\lambda = w_q / [H^{-1}]_{qq}$ and
#
# $$\delta w = -\frac{w_q}{[H^{-1}]_{qq}}\, H^{-1} e_q$$
#
# **Step 3.** Put it back into $\frac12 \delta w^\top H \delta w$. One $H$ and one $H^{-1}$ cancel:
#
# $$L_q = \frac12\, \frac{w_q^2}{[H^{-1}]_{qq}}$$

# %% tags=["nbval-check-output"]
from effnlp_lessons.pruning.logic_problems import every_mask
from effnlp_lessons.pruning.obs import deletion, inverse_hessian, operate, output_gradients, saliencies

X = output_gradients(net, monk.inputs, every_mask(net))
inverse, q = inverse_hessian(X, alpha=1e-4), 7
H_obs, e_q = torch.linalg.inv(inverse), torch.eye(len(u), dtype=u.dtype)[q]
multiplier = u[q] / inverse[q, q]
move = -multiplier * inverse @ e_q
print("step 1: H dw = -lambda e_q     ", torch.allclose(H_obs @ move, -multiplier * e_q, atol=1e-10))
print("step 2: dw_q = -w_q            ", torch.allclose(move[q], -u[q]))
print("step 3: dw' H dw / 2 = L_q     ", torch.allclose(move @ H_obs @ move / 2, saliencies(u, inverse)[q]))
others = [k for k in range(len(u)) if k != q]  # brute force: solve for the other weights, w_q being 0
best = torch.linalg.solve(H_obs[others][:, others], H_obs[others, q] * u[q])
print("no other move of the rest is better:", torch.allclose(deletion(u, inverse, q)[others], u[others] + best))

# %% [markdown]
# OBD is the special case of a diagonal $H$: then $[H^{-1}]_{qq} = 1/h_{qq}$, and no other weight moves.
#
# **The inverse without inverting.** For the squared error near a minimum, the Hessian is a sum over patterns,
# $H \approx \frac1P \sum_k X_k X_k^\top$, where $X_k$ is the gradient of the network's *output*, not of its error. Every
# pattern adds a matrix of rank one, and a change of rank one changes the inverse in closed form:
#
# $$H_0^{-1} = \alpha^{-1} I, \qquad H_{m+1}^{-1} = H_m^{-1} - \frac{H_m^{-1} X_{m+1} X_{m+1}^\top H_m^{-1}}{P + X_{m+1}^\top H_m^{-1} X_{m+1}}$$
#
# The $P$ in the denominator is the $\frac1P$ of the sum. With a 1 there, one gets the inverse of something else.

# %%
show_source(inverse_hessian)

# %% tags=["nbval-check-output"]
rows = X.flatten(0, 1)
direct = torch.linalg.inv(1e-4 * torch.eye(len(u), dtype=u.dtype) + rows.T @ rows / len(monk))
print("equal to the inverse of alpha I + X'X / P, to 1e-10:", bool((inverse - direct).abs().max() < 1e-10 * direct.abs().max()))
print("124 patterns, 58 weights; rank of X'X:", "full" if torch.linalg.matrix_rank(rows) == len(u) else "less than 58")
new, kept, predicted = operate(u, inverse, count=10)
print("ten deleted; all of them exactly 0:", not new[~kept].any().item(), "; all others moved:", bool((new != u)[kept].all()))

# %% [markdown]
# ### XOR: how often is the right weight deleted?
#
# The paper's showpiece: a network of two inputs, two hidden units and one output learns exclusive or, with 9 weights and
# biases. One of them is deleted. The paper says that magnitude and OBD delete the wrong one, and OBS the right one.
#
# **Predict first.** Of 100 such networks, trained from different starts: OBS deletes one weight and adjusts the others.
# How many still solve XOR, without retraining? (`second_order.xor`)

# %%
my_guess = None
predict("second_order.xor", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.studies import second_order
from effnlp_lessons.studies.runner import load_results

if (guess := reveal("second_order.xor")) is not None:
    record = load_results("second_order")
    for problem, what in ((second_order.XOR_EARLY, "training stopped early"), (second_order.XOR, "trained to a minimum, with weight decay")):
        nets = second_order.converged(record, problem)
        print(f"{what}: {len(nets)} networks that learned XOR; in per cent of them:")
        print(f"  {'':26} right weight   four answers right at once   solved after retraining   mean E at once")
        for method, found in second_order.first_deletions(nets).items():
            shares = [100 * found[key] / found["networks"] for key in ("right weight", "four right", "retrained")]
            print(f"  {method:26} {shares[0]:12.0f} {shares[1]:28.0f} {shares[2]:25.0f} {found['mean error']:16.3f}")
    print(f"your guess for OBS: {guess:g} of 100")

# %% [markdown]
# The *right weight* is one without which the network can be trained to solve XOR again: all nine are tried in turn.
#
# <details><summary><b>After your guess: what reproduces, and what does not</b></summary>
#
# OBS deletes a right weight every time, and keeps all four answers right without any training. That is the paper's
# claim. The other half of it, that *only* OBS does, is not found: magnitude mostly takes a right weight too. What
# magnitude lacks is the **update**: "OBS, others as they were" takes OBS's weight and adjusts nothing, and is as wrong as
# magnitude. OBD is worse than magnitude here, and its Levenberg-Marquardt form takes a wrong weight every time: XOR lives
# from its cross terms, just what a diagonal leaves out. One hand-picked network could have shown any of this.
# </details>
#
# A live run of the same function, four starts:

# %%
live = second_order.run(second_order.LIVE, seed=99).numbers["nets"]
for net in live:
    if "first" in net:
        errors = {method: net["first"][method]["error"] for method in ("magnitude", "OBD", "OBS")}
        print(f"start {net['start']}: E {net['error']:.4f}; after one deletion", {m: round(e, 3) for m, e in errors.items()})
    else:
        print(f"start {net['start']}: E {net['error']:.4f}, XOR not learned")

# %% [markdown]
# ## 6. How far down? MONK's problems and digits
#
# One weight after the other is deleted, with and without retraining, until nothing is left. The three MONK's problems
# have 432 cases and rules that can be written down, so they can be made anywhere: $a_1 = a_2$ or $a_5 = 1$; exactly two
# of six attributes have their first value; and a third with wrong labels among its training cases.

# %% tags=["nbval-check-output"]
from effnlp_lessons.pruning.logic_problems import TRAINING_CASES, monk_all

for problem, cases in TRAINING_CASES.items():
    positives = int(monk_all(problem).targets.sum())
    print(f"MONK's problem {problem}: {positives} of 432 cases positive, {cases} to train on")

# %%
METHODS = (second_order.MAGNITUDE, second_order.OBD, second_order.OBS, second_order.OBS_CHOICE)
rows, record = {}, load_results("second_order")
for method in METHODS:
    for after in ("", second_order.RETRAINED):
        rows[method + after] = {}
        for problem, tolerance in (("monk 1", 0), ("monk 2", 0), ("monk 3", 0), ("digits", 1)):
            fewest = sorted(second_order.fewest_weights(record, problem, method + after, "train", tolerance))
            rows[method + after][f"{problem}: weights"] = (fewest[len(fewest) // 2], fewest[0], fewest[-1])
dots(rows, grey=[name for name in rows if second_order.RETRAINED not in name],
     caption="The fewest weights with which the training cases are answered as well as by the whole network (digits: within a point). "
             "Dots: middle of the seeds; bars: all of them. Grey: without retraining.")

# %% [markdown]
# **Read the grey dots first.** Without retraining OBS needs far fewer weights than the others, and the control shows why:
# OBS's choice without its update is hardly better than magnitude. Then read the coloured ones. With retraining after each
# deletion the methods come close to each other. Training does what the update did, at the price of training.

# %% [markdown]
# ## 7. On the real model: one layer at a time (Frantar, Alistarh 2023)
#
# MiniLM's Hessian has $10^{14}$ entries. But a layer can be asked to give nearly the outputs that it gave before:
#
# $$\min_{\hat W}\; \|W X - \hat W X\|^2$$
#
# with its inputs $X$ on some sentences. That is a quadratic problem for each row of $W$, with the Hessian
# $H = 2 X X^\top$, the same for all rows: 384 x 384 numbers for most layers. OBS then applies exactly, without any
# training, on a few hundred unlabelled sentences. SparseGPT makes it fast: it goes through the columns from left to
# right, decides which weights of a column go, and lets the columns to the *right* make up for it.

# %% tags=["nbval-check-output"]
from effnlp_lessons.pruning.layerwise_obs import calibration_batches, layer_hessians, output_error, refit, sweep

training = ReviewExamples(reviews.load_reviews().subset("train"), limit=64)
batches = calibration_batches(training.token_ids)
name = "encoder.blocks.1.token_mixer.query.weight"
H = layer_hessians(teacher, batches, ["encoder.blocks.1.token_mixer.query"])[name]
query = teacher.encoder.blocks[1].token_mixer.query.weight.detach()
swept, kept = sweep(query, H, rate=0.6)
by_size = keep_top(query.abs(), 0.6)
error = {"magnitude": output_error(query, query * by_size, H), "OBS's choice, not adjusted": output_error(query, query * kept, H),
         "OBS, swept": output_error(query, swept, H), "best values for this mask": output_error(query, refit(query, kept, H), H)}
print("H:", tuple(H.shape), "for a weight of", tuple(query.shape), "; 60 % of the weights gone")
print("from the largest error of the outputs to the smallest:", ", ".join(sorted(error, key=error.get, reverse=True)))

# %%
print({name: round(value, 4) for name, value in error.items()}, " (|WX - W'X|^2 over |WX|^2)")

# %% [markdown]
# The sweep is not the best: what stands to the left stays as it is. For a mask that is given, the best values are one
# linear system a row. But it needs one Cholesky factor for all rows, and comes close. On the whole teacher, without any
# training, on 256 unlabelled sentences, three samples of them:

# %%
from effnlp_lessons.studies import layerwise_obs

layers, rows = load_results("layerwise_obs"), {}
for sparsity in ("50", "60", "70", "2:4"):
    for way in layerwise_obs.WAYS:
        right = sorted(layerwise_obs.accuracies(layers, way).get(sparsity, []))
        if right:
            name = f"{sparsity} %, {way}" if ":" not in sparsity else f"2:4, {way}"
            rows[name] = {"test accuracy (%)": (right[len(right) // 2], right[0], right[-1])}
dots(rows, grey=[name for name in rows if "OBS" not in name], from_zero=False,
     caption="2,000 test reviews, no training. Dots: middle of three samples; bars: all of them (magnitude reads no sentence). "
             f"The whole teacher has {layers['runs'][0]['teacher']:.1f} %.")

# %% [markdown]
# At one half, OBS costs nothing: 86 %, as the whole teacher, where magnitude falls to 77. At 70 % it is still above 82,
# and magnitude near 60. Both halves of the method count: the *choice* reads the inputs, so it knows which weights meet
# quiet ones, and the *update* makes up for what went. And the pattern 2:4, which magnitude pays for dearly, costs one or
# two points.

# %% [markdown]
# ## 8. The yardstick
#
# Half of the encoder's weights gone, by layer-wise OBS, live on 64 sentences. The MACs do not change; the file does, if
# its form can leave zeros out.

# %%
from effnlp_lessons.measure import count_macs
from effnlp_lessons.pruning.layerwise_obs import prune_layerwise
from effnlp_lessons.pruning.storage import pruned_bytes_on_disk
from effnlp_lessons.widgets.own_models import TOKENS, keep_model, show_kept_models

half, half_masks = prune_layerwise(teacher, batches, rate=0.5)
dev = ReviewExamples(reviews.load_reviews().subset("dev"), limit=200)
inputs = torch.ones(1, TOKENS, dtype=torch.long), torch.ones(1, TOKENS, dtype=torch.bool)
sizes = {form: pruned_bytes_on_disk(half, half_masks, form) for form in ("dense", "csr", "bit mask")}
print(f"{count_macs(half, *inputs).total:,} MACs, as before;", ", ".join(f"{form} {size / 1e6:.1f} MB" for form, size in sizes.items()))
keep_model("05", "half of the weights, OBS", accuracy=accuracy(half, dev), examples=200,
           macs=count_macs(half, *inputs).total, bytes_on_disk=sizes["bit mask"])
show_kept_models()

# %% [markdown]
# ## Paper and ours
#
# | | paper | here |
# |---|---|---|
# | OBD: recursion | prints $-f'' \partial E/\partial x$ for hidden units | plus: equal to the whole Hessian's diagonal to $10^{-12}$ |
# | OBD: network | 2,578 free parameters, about 9,300 handwritten digits | 1,210 parameters, 4,000 digits of 7 x 7 inputs |
# | OBD: which form | both; non-negative by Levenberg-Marquardt | Levenberg-Marquardt in the study |
# | OBS: $\alpha$ | $10^{-8}$ to $10^{-4}$ | equal to the weight decay of the training, so that it belongs to the loss |
# | OBS: XOR | only OBS deletes the right weight, in every case | counted over seeds: see section 5; "every case" is not found |
# | OBS: MONK's problems | the original training sets | the same rules, cases drawn with a seed |
# | OBS: each deletion | a new $H^{-1}$ | one $H^{-1}$ a round; on digits several deletions in a round |
# | Layer-wise OBS | language models of up to 175 billion weights | MiniLM-L6, as a classifier |

# %% [markdown]
# ## Choose by cost
#
# <details><summary><b>A phone, one short message at a time.</b></summary>
#
# Unstructured zeros make the download smaller from about half of the weights on, if the format is a bit mask. They
# make nothing faster. Removing whole heads and neurons does (notebook 07).
# </details>
#
# <details><summary><b>A server that classifies in large batches.</b></summary>
#
# Same answer on a CPU. GPUs have units for 2:4, which keep exactly half. Whether that pays is a question to measure
# there.
# </details>
#
# <details><summary><b>Documents of 16,000 tokens.</b></summary>
#
# Attention scores have no weights. Prune the matrix of scores itself: notebooks 08 to 11.
# </details>

# %% [markdown]
# ## Common mistakes
#
# * **Masking once.** Adam and momentum bring pruned weights back. Mask after every step.
# * **A rate of the original.** A rate counts what is still there. To take a tenth of the original each round, use 1/10, 1/9, 1/8, ...
# * **A threshold at ties.** `w.abs() > threshold` removes too many or too few when weights are equal. Count.
# * **Zeros as candidates.** A pruned weight is the smallest of all; leave it out, or later rounds remove nothing.
# * **Sparse is small.** With an integer for every kept value, a half-empty matrix grows.
# * **The gradient squared is not the second derivative.** It is the Fisher matrix's diagonal: another method.
# * **OBD away from a minimum.** Then $g \neq 0$, and term 1 is the largest.
# * **OBS without its update.** Then it is a ranking, and most of its gain is gone.
# * **The gradient of the error in $H$.** $X$ is the gradient of the output; at a minimum the error's is 0.

# %% [markdown]
# ## Quiz
#
# **1. A rate of 0.5 is applied twice. What is left?**
# <details><summary>nothing</summary>No. The second rate counts what the first has left.</details>
# <details><summary>a quarter</summary>Yes. Half of what is left goes in each round.</details>
# <details><summary>a half</summary>No. The second round removes weights too, if pruned ones are no candidates.</details><br>
#
# **2. Which form of a float32 matrix with half of its weights left is the smallest?**
# <details><summary>CSR with 64-bit columns</summary>No. Each kept value takes 12 bytes there.</details>
# <details><summary>dense</summary>No. It stores the zeros.</details>
# <details><summary>bit mask and values</summary>Yes. One bit a weight, and 4 bytes for each that is kept.</details><br>
#
# **3. OBD's saliency needs, besides the gradient's backward pass,**
# <details><summary>the whole Hessian</summary>No. Only its diagonal.</details>
# <details><summary>one more backward pass</summary>Yes. Second derivatives run backward like first ones.</details>
# <details><summary>one forward pass per weight</summary>No. That is what it avoids.</details><br>
#
# **4. With a diagonal Hessian, OBS**
# <details><summary>is OBD</summary>Yes. The saliencies are equal, and no other weight moves.</details>
# <details><summary>is magnitude pruning</summary>No. For that all second derivatives must be equal too.</details>
# <details><summary>has no solution</summary>No. It is the easiest case.</details><br>
#
# **5. The network was pruned by OBS, and then trained on. Compared with magnitude pruning and the same training, what should one expect?**
# <details><summary>always a large gain</summary>No. Training adjusts the other weights too.</details>
# <details><summary>a gain that shrinks with training, to be measured over seeds</summary>Yes. The records of this notebook show both.</details>
# <details><summary>a loss</summary>No. Nothing suggests it.</details><br>

# %% [markdown]
# ## Where next
#
# The homework is `homework/05_pruning_second_order.ipynb`. Notebook 06 asks whether the small network could have been
# trained from the start.
#
# ## References
#
# * Frantar, Alistarh 2023. *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot.* arXiv 2301.00774.
# * Hassibi, Stork 1993. *Second Order Derivatives for Network Pruning: Optimal Brain Surgeon.* NIPS 5.
# * LeCun, Denker, Solla 1990. *Optimal Brain Damage.* NIPS 2.
# * Thrun et al. 1991. *The MONK's Problems: A Performance Comparison of Different Learning Algorithms.* CMU-CS-91-197.
