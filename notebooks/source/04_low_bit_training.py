# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # Training for few bits: what can a weight learn that must land on a grid?
#
# Notebook 03 rounded the weights of a finished model. At 4 bits that works, at 2 bits it does not. This notebook lets
# the model train while it is rounded, asks which layers need their bits most, and ends with weights of three values.
#
# **Lecture topic:** Quantization, with training. **Reading:** 60 minutes. **Running:** about 40 seconds on two cores,
# no GPU, no network.
#
# **You need:** notebooks 01 and 03. Parts marked *(depth)* can wait.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. write fake quantization with a straight-through gradient, and say where the gradient must be 0;
# 2. say why the float weights are kept while their rounded copies work;
# 3. find the largest eigenvalue of a layer's Hessian without the Hessian, and tell its sign;
# 4. spend a budget of bytes over layers, and judge the choice among all choices;
# 5. find the best ternary weights for a row, and prove that they are the best.
#
# **Two questions from earlier notebooks.** Answer, then open.
#
# <details><summary>One weight of a matrix is far larger than the others. Why does a grid for each row help?</summary>
#
# The step is set by the largest weight that shares the grid. With a grid for each row, the outlier spoils one row
# (notebook 03).
# </details>
# <details><summary>A student gains from its teacher's soft targets on the sentences that it has labels for. How much, in notebook 01?</summary>
#
# Next to nothing. The gain came from unlabelled sentences.
# </details>

# %% [markdown]
# **A question before anything runs.** Rounded to 2 bits, one grid a row, the teacher is hardly better than a coin. Now
# let it train on some thousand labelled reviews *while it is rounded*, for two minutes. How many points of test
# accuracy does that add, still at 2 bits? (`low_bit.qat`)

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("low_bit.qat", my_guess)

# %% [markdown]
# ## 1. A staircase has no slope
#
# To train a rounded weight, we need to know how the loss changes with it. But the rounded value stays the same when the
# weight moves a little. The derivative of *round* is 0 wherever it exists:

# %% tags=["nbval-check-output"]
import torch

w = torch.tensor([-1.3, -0.4, 0.2, 0.9, 2.6], requires_grad=True)
torch.round(w).square().sum().backward()
print("gradient through round:", w.grad.abs().tolist())

# %% [markdown]
# Nothing would ever be learned. The **straight-through estimator** (Bengio et al. 2013) puts a wrong derivative in
# place of the useless one: forward the staircase, backward the straight line that runs through it.
#
# $$\hat w = Q(w) \qquad\qquad \frac{\partial L}{\partial w} := \frac{\partial L}{\partial \hat w}\;\; \text{if } a \le w \le b,
# \quad 0 \text{ otherwise}$$
#
# Outside the range $[a, b]$ the staircase is flat for good: $w$ can move as it likes, and $\hat w$ stays at the end. So
# there the derivative really is 0, and is left so. This pair, round forward and straight through backward, is **fake
# quantization**: floats that lie on a grid.

# %% tags=["nbval-check-output"]
from effnlp_lessons.quantization.qat import fake_quantize
from effnlp_lessons.quantization.quantizers import affine_quantizer, symmetric_quantizer

grid = symmetric_quantizer(torch.tensor(1.5), bits=3)  # S = 0.5, from -1.5 to 1.5
w = torch.tensor([-1.6, -1.5, -0.4, 0.2, 0.9, 2.6], requires_grad=True)
fake_quantize(w, grid).sum().backward()
print("w          ", [f"{x:4.1f}" for x in w.tolist()])
print("Q(w)       ", [f"{x:4.1f}" for x in grid(w.detach()).tolist()])
print("dQ(w) / dw ", [f"{x:4.0f}" for x in w.grad.tolist()])

# %%
from effnlp_lessons.widgets.page import curves, dots, show_source

x = torch.linspace(-2.2, 2.2, 441)
curves(x.tolist(), {"Q(x), forward": grid(x).tolist(), "what the gradient believes": x.clamp(-1.5, 1.5).tolist()},
       x_label="x", y_label="", caption="Forward the staircase, backward the line: slope 1 inside the range, 0 outside.")

# %% [markdown]
# **At the border** there are two rules in use. The papers, and this library, ask whether the *real* number lies in
# $[a, b]$. Torch asks whether the *rounded* one does, and so lets through half a step more at each end:

# %% tags=["nbval-check-output"]
grid8 = affine_quantizer(torch.tensor(-0.5), torch.tensor(25.0), bits=8)  # S = 0.1, Z = 5
for value in (24.9, 25.04, 25.06):
    ours, theirs = (torch.tensor([value], requires_grad=True) for _ in range(2))
    fake_quantize(ours, grid8).sum().backward()
    torch.fake_quantize_per_tensor_affine(theirs, 0.1, 5, 0, 255).sum().backward()
    print(f"{value:5} with b = 25.0: gradient here {ours.grad.item():.0f}, in torch {theirs.grad.item():.0f}")

# %% [markdown]
# ## 2. The shadow weight
#
# The update goes to the float weight $w$, not to its rounded copy:
#
# $$w_{t+1} = w_t - \eta\,\frac{\partial L}{\partial \hat w_t}$$
#
# Suppose each step wants to move the weight by a twentieth of the grid's step. If only the rounded weight is kept, each
# of these moves is rounded away, and nothing ever happens. The float **shadow weight** adds them up.

# %% tags=["nbval-check-output"]
shadow, stored = torch.tensor(0.0), torch.tensor(0.0)
path = {"shadow weight": [], "its rounded copy": [], "only the rounded weight is kept": []}
for _ in range(30):
    shadow = shadow + 0.025  # a twentieth of the step of 0.5
    stored = grid(stored + 0.025)
    for name, value in zip(path, (shadow, grid(shadow), stored), strict=True):
        path[name].append(value.item())
print("after 30 steps:", {name: round(values[-1], 3) for name, values in path.items()})

# %%
curves(list(range(1, 31)), path, x_label="step", y_label="weight",
       caption="Small moves add up until the rounded weight takes a step. Without a shadow weight none of them is remembered.")

# %% [markdown]
# `FakeQuantizedLinear` is this, for a matrix: it takes the ranges anew from the shadow weights at each step, rounds,
# and multiplies.

# %%
from effnlp_lessons.quantization.qat import FakeQuantizedLinear

show_source(FakeQuantizedLinear.forward)

# %% [markdown]
# ## 3. The teacher, trained through the grid
#
# Live and small first: 2 bits, one grid a row, eight steps on 256 sentences, tested on 300 reviews. The 36 matrices of
# the encoder are fake-quantized; the embeddings, the pooler and the head stay as they are.

# %% tags=["reveal"]
from effnlp_lessons.pretrained import load_minilm, load_teacher
from effnlp_lessons.quantization.post_training import quantize_linears, quantized_layers
from effnlp_lessons.studies import qat_by_bits
from effnlp_lessons.studies.runner import load_results

if (guess := reveal("low_bit.qat")) is not None:
    rounded = quantized_layers(quantize_linears(load_teacher(), 2, "row")).values()
    zeros = sum((layer.codes == 0).sum() for layer in rounded) / sum(layer.codes.numel() for layer in rounded)
    print(f"2 bits, from smallest to largest weight of a row: {100 * zeros:.0f} % of the weights become 0")
    for epochs in (0, 1):
        found = qat_by_bits.run(qat_by_bits.LIVE | {"epochs": epochs}, seed=0).numbers["right"]["2"]
        print(f"2 bits, {8 * epochs} steps of training: {found:.0f} % of 300 test reviews right")

# %% [markdown]
# Eight steps are only a taste. The record: 3,000 sentences, once through, three seeds, all 2,000 test reviews. Two
# controls stand beside it. One is trained just as long *in floats*, and rounded afterwards: is it the training, or the
# rounding in it? The other keeps the step with which LSQ begins (section 4): is it the learning of the step, or its
# start?

# %% tags=["reveal"]
if (guess := reveal("low_bit.qat")) is not None:
    rows = {}
    for run in load_results("qat_by_bits")["runs"]:
        way, epochs, rate = (run["setting"][key] for key in ("way", "epochs", "learning_rate"))
        if way == qat_by_bits.FLOAT:
            way = f"trained in floats, rate {rate:g}" if epochs else "not trained"
        elif not epochs:
            way += ", not trained"
        for bits, right in run["right"].items():
            bits = bits if bits == "float" else bits.replace("2", "2 bits").replace("3", "3 bits").replace("4", "4 bits")
            rows.setdefault(f"{bits}: {way}", []).append(right)
    shown = {name: {"test accuracy (%)": (sorted(v)[1], min(v), max(v))} for name, v in sorted(rows.items())}
    dots(shown, grey=[name for name in shown if "fake" not in name and "LSQ" not in name or "not trained" in name], from_zero=False,
         caption="Dots: middle of three seeds; bars: all of them. Grey: not trained through the grid.")
    gain = [after - before for before, after in zip(rows["2 bits: not trained"], rows["2 bits: fake-quantized"], strict=True)]
    print(f"2 bits: training through the grid adds {min(gain):.0f} to {max(gain):.0f} points; your guess: {guess:g}")

# %% [markdown]
# <details><summary><b>After your guess: what the controls say</b></summary>
#
# At 4 bits nothing needs to be trained. At 3 bits training through the grid brings back most of what rounding took. At
# 2 bits it adds more than twenty points, and yet it is not the best way. The grid from smallest to largest weight has
# three levels there, and most weights sit at 0. A model trained in *floats*, at the larger rate, and then rounded with
# a **clipped** range does as well. LSQ's grid has four levels, and its step comes from the mean of $|w|$, not from the
# largest weight: *untrained* it is already as good. Trained through that grid, the model comes to about four points
# below float32. And *learning* the step? Kept as it began, it does as well, within the seeds. So at 2 bits the range
# counts first, training through it second, and that the step itself moves cannot be told from nothing here.
# </details>

# %% [markdown]
# ## 4. What training must know about inference
#
# Fake quantization is a promise: inference will compute *this*. So it has to stand exactly where inference rounds: on
# the weights, and on the activations after the fused ReLU, not before. Ranges of activations are moving averages
# (notebook 03) with a **start delay**: in the first steps they pass in floats, until their ranges have settled. Near
# the end ranges are frozen.
#
# Here a small network with batch norm is trained so, then turned into the integers of notebook 03. Each integer layer
# gets the codes of the layer before. Does it agree?

# %%
from torch import nn

from effnlp_lessons.quantization.qat import freeze_ranges_
from effnlp_lessons.quantization.qat_integers import convert_to_integers, prepare_integer_stack

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(256, 12, generator=generator)
targets = (inputs[:, :6].sum(1) * inputs[:, 6] > 0).long()
with torch.random.fork_rng():
    torch.manual_seed(0)
    stack = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
stack = prepare_integer_stack(stack, bits=8, delay=20, rate=0.1)
optimizer = torch.optim.Adam(stack.parameters(), lr=1e-2)
for step in range(60):
    if step == 50:
        freeze_ranges_(stack)
    loss = nn.functional.cross_entropy(stack.train()(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %% tags=["nbval-check-output"]
from effnlp_lessons.quantization.float_guard import no_floats

integers, x = convert_to_integers(stack.eval()), inputs
codes = stack[0].input.quantizer.quantize(inputs)
for number, (fake, layer) in enumerate(zip(stack, integers, strict=True), start=1):
    with no_floats():
        codes = layer(codes)
    with torch.inference_mode():
        x = fake(x)
    apart = (fake.output.quantizer.quantize(x).int() - codes.int()).abs().max()
    print(f"layer {number}: {codes.dtype}, at most one code apart: {bool(apart <= 1)}")
    x = fake.output.quantizer.dequantize(codes)

# %% [markdown]
# ### The step size as a parameter: LSQ *(depth; Esser et al. 2019)*
#
# Why should the range be the largest weight? **LSQ** trains the step $s$ along with the weights. With $v = w/s$, its
# derivative is
#
# $$\frac{\partial \hat w}{\partial s} = \begin{cases} -Q_N & v \le -Q_N \\ \mathrm{round}(v) - v & \text{between} \\ Q_P & v \ge Q_P
# \end{cases}$$
#
# Clipped weights ask for a larger step, and rounding errors tell the rest. Here a step that is far too small finds its
# place:

# %%
from effnlp_lessons.quantization.lsq import initial_step, lsq_quantize

weights = torch.randn(1, 4_096, generator=generator)
curve = {}
for name, start in (("from 2 mean|w| / sqrt(Q_P)", initial_step(weights, 3)), ("from far too small", torch.tensor([0.02]))):
    step = start.clone().requires_grad_()
    optimizer, curve[name] = torch.optim.Adam([step], lr=0.02), []
    for _ in range(80):
        error = (lsq_quantize(weights, step, bits=3) - weights).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        curve[name].append(error.item())
curves(list(range(80)), curve, x_label="update", y_label="mean squared error", log_y=True,
       caption="3 bits, Gaussian weights: the learned step ends at the same error from both starts.")

# %% [markdown]
# ## 5. Which layer needs its bits? Q-BERT (Shen et al. 2019)
#
# Two bits everywhere is too few, and not every layer suffers alike. Rounding moves the weights of a layer by some
# $\delta$. Around a trained model the loss is
#
# $$L(w + \delta) \approx L(w) + g^\top \delta + \tfrac12\, \delta^\top H \delta \;\;\approx\;\; L(w) + \tfrac12\, \delta^\top H \delta$$
#
# since the gradient $g$ is about 0 after training. $H$ is the Hessian, the matrix of second derivatives. So what a
# rounding of length $|\delta|$ costs is at most $\frac12 \lambda_{max} |\delta|^2$: curved layers suffer more. Q-BERT
# spends bits by this.
#
# A layer of MiniLM has 1.8 million weights; its Hessian would have $3 \cdot 10^{12}$ entries. But one only needs
# products $Hv$, and those cost two backward passes:
#
# $$Hv = \frac{d\,(g^\top v)}{dw}$$
#
# **Power iteration:** multiply again and again, $v \leftarrow Hv / |Hv|$. What survives is the direction of the largest
# eigenvalue, and $\lambda = v^\top H v$. On a small network, next to the true spectrum:

# %% tags=["nbval-check-output"]
from effnlp_lessons.quantization.hessian import Hessian, lanczos, power_iteration

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(40, 5, generator=generator, dtype=torch.float64)
targets = (inputs[:, 0] * inputs[:, 1] > 0).long()
with torch.random.fork_rng():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
hessian = Hessian(nn.functional.cross_entropy(net(inputs), targets), list(net.parameters()))
full = torch.stack([hessian(e) for e in torch.eye(hessian.size, dtype=torch.float64)])
spectrum = torch.linalg.eigvalsh(full)
found = power_iteration(hessian, hessian.size, iterations=500, tolerance=0, generator=generator, k=2, dtype=torch.float64)
print(f"{hessian.size} weights; symmetric: {torch.allclose(full, full.T)}; "
      f"largest two by power iteration as in the spectrum: {torch.allclose(found.values, spectrum.flip(0)[:2], rtol=1e-6)}")

# %% [markdown]
# The second eigenvalue was found **orthogonal** to the first: each step removes what lies along the vectors already
# known. Without that, every start ends at the first again.
#
# **The sign.** Power iteration finds the eigenvalue that is largest *in absolute value*. That can be a negative one,
# where the loss curves downwards. Then $|Hv|$ tells its size and hides its sign; $v^\top H v$ keeps it. To get the
# largest *by sign*, shift the spectrum first, or take **Lanczos**, which keeps all directions and finds both ends at
# once.

# %% tags=["nbval-check-output"]
from effnlp_lessons.quantization.hessian import largest_eigenvalue

q, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
saddle = q @ torch.diag(torch.tensor([-3.0, 2.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)) @ q.T
settings = {"generator": generator, "dtype": torch.float64}
print(f"power iteration: {power_iteration(saddle.mv, 6, iterations=200, tolerance=0, **settings).values.item():.3f}")
print(f"with a shift:    {largest_eigenvalue(saddle.mv, 6, iterations=500, tolerance=0, **settings).values.item():.3f}")
ends = lanczos(saddle.mv, 6, steps=6, **settings).values
print(f"Lanczos:         {ends[0]:.3f} and {ends[-1]:.3f}")

# %% [markdown]
# ### From eigenvalues to bits
#
# Q-BERT takes the top eigenvalue of each layer on ten subsets of the training set, and ranks layers by
#
# $$\Omega = |\mathrm{mean}(\lambda)| + \mathrm{std}(\lambda)$$
#
# The spread is there because a layer that is flat on average may be steep for some sentences. Live, on two subsets of
# 16 sentences, for two layers of the teacher, four iterations each (the record has ten of 64, ten iterations, all six
# layers):

# %%
from effnlp_lessons.quantization.qbert import layer_sensitivities, papers_size
from effnlp_lessons.studies.bit_budget import hessian_subsets

teacher, minilm = load_teacher(), load_minilm()
two = [teacher.encoder.blocks[0], teacher.encoder.blocks[5]]
found = layer_sensitivities(teacher, hessian_subsets(2, 16, tokens=24, seed=0, batch=16), iterations=4, blocks=two)
for layer, values in zip((1, 6), found.eigenvalues, strict=True):
    print(f"layer {layer}: largest eigenvalue on each subset {[round(v, 2) for v in values.tolist()]}")

# %% [markdown]
# **The budget.** Six layers, three of them at 3 bits and three at 2: twenty ways, all of one size. With groups of 64
# and an affine grid, a finished model survives this, so all twenty can be measured without training.
#
# **Predict first.** The Hessian's three most curved layers get 3 bits. Among all twenty choices, ranked by test
# accuracy, which place does this choice take? 1 is the best, 20 the worst. (`low_bit.rank`)

# %%
my_guess = None
predict("low_bit.rank", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.studies.bit_budget import EQUAL_SIZE, accuracies, hessian_choice, pooled_omega, rank

budget = load_results("bit_budget")
omega, right = pooled_omega(budget), accuracies(budget)
if (guess := reveal("low_bit.rank")) is not None:
    print("Omega of layers 1 to 6:", [round(value, 2) for value in omega])
    ordered = sorted(EQUAL_SIZE, key=right.get, reverse=True)
    shown = {"the Hessian's": hessian_choice(omega), "its reverse": hessian_choice(omega, reverse=True),
             "the best": ordered[0], "the worst": ordered[-1]}
    for name, bits in shown.items():
        print(f"{name:14} bits {bits}: {right[bits]:.1f} % right, place {rank(bits, right)} of 20")
    print(f"the mean of all 20: {sum(right[bits] for bits in EQUAL_SIZE) / 20:.1f} %; your guess: place {guess:g}")

# %% [markdown]
# <details><summary><b>After your guess: is the Hessian right?</b></summary>
#
# Layers 1 and 2 tie at the top, and from layer 3 on the curvature falls, on every seed; so the choice is always the
# first three layers. It is better than the mean of all twenty, and its reverse is worse. It is not the best: the winner
# takes layer 4 in place of layer 1, the most curved of all. One accuracy on 2,000 reviews has a standard error of
# nearly a point, so close neighbours in this ranking are ties. As a rule that needs no search, it is useful; as a law,
# not.
# </details>
#
# Now spend the budget yourself. **Try:** find a choice among the best five before you switch on the curvature. Then
# switch it on: does it point to the layers that you chose? (This explorer holds the answer: guess first.)

# %%
from effnlp_lessons.widgets.bit_budget_explorer import BitBudgetExplorer

BitBudgetExplorer()

# %% [markdown]
# ### Groups, embeddings, and the file *(depth)*
#
# Q-BERT cuts the rows of each of $W_q, W_k, W_v, W_o$ into groups of consecutive output neurons, a range each: 12
# groups are the heads, 128 groups of BERT-base's 768 rows are 6 rows each. The embeddings get their own bits, 8, since
# they suffer more. The paper's sizes follow by arithmetic:

# %% tags=["nbval-check-output"]
from effnlp_lessons.transformer import BERT_BASE

for name, bits, embedding_bits in (("float32", 32, 32), ("8 bits", 8, 8), ("4 bits", 4, 8), ("3 bits", 3, 8), ("2 bits", 2, 8),
                                   ("2 or 3 bits", 2.5, 8)):
    size = papers_size(BERT_BASE, bits, embedding_bits)
    print(f"{name:12} encoder {size['encoder']:6.1f} MiB, with embeddings {size['total']:6.1f} MiB")

# %% [markdown]
# ## 6. Three values: TernaryBERT (Zhang et al. 2020)
#
# The last step before nothing is left: each weight is $-\alpha$, 0 or $\alpha$, one $\alpha$ for a whole matrix. Which
# weights become 0, and how large is $\alpha$? Smallest error is the aim:
#
# $$\min_{\alpha,\; b \in \{-1, 0, 1\}^n}\; \sum_i d_i\,(\alpha b_i - w_i)^2$$
#
# **TWN** (Li et al. 2016) has $d_i = 1$ and a rule of thumb: keep $|w| > \Delta = 0.7\, \mathrm{mean}|w|$, and take the
# mean of what is kept as $\alpha$. **LAT** (Hou and Kwok 2018) weighs each error by how curved the loss is there,
# $d_i$, and can solve it exactly: whatever is kept, it is the $k$ largest for some $k$; so sort, and try all $k$. We
# can afford to check that against *all* ternary patterns of a row of eight:

# %% tags=["nbval-check-output"]
from itertools import product

from effnlp_lessons.quantization.ternary import lat_approximate, lat_exact, ternarize_matrix, twn, weighted_error

generator = torch.Generator().manual_seed(0)
rows = torch.randn(200, 8, generator=generator, dtype=torch.float64)
d = torch.rand(200, 8, generator=generator, dtype=torch.float64)
patterns = torch.tensor(list(product([-1, 0, 1], repeat=8)), dtype=torch.float64)  # all 6,561
alpha = ((d * rows) @ patterns.T).clamp(min=0) / (d @ patterns.abs().T).clamp(min=1e-12)
errors = (d[:, None] * (alpha[..., None] * patterns - rows[:, None]).square()).sum(-1)
best = errors.min(-1).values
print("exact LAT is the best of all 6,561 patterns, in all 200 rows:", torch.allclose(weighted_error(rows, d, *lat_exact(rows, d)), best))
for name, ternary in (("LAT, by turns", lat_approximate(rows, d)), ("TWN", twn(rows))):
    print(f"{name:14} error above the best by {100 * (weighted_error(rows, d, *ternary) / best - 1).mean():.0f} % on average")

# %% [markdown]
# And without curvature, on a whole matrix of MiniLM: how good is 0.7?

# %%
w = minilm.blocks[2].token_mixer.value.weight.detach()
size = w.abs().flatten()
factors = torch.linspace(0.05, 2.5, 99)
error = []
for factor in factors:
    kept = size > factor * size.mean()
    error.append((torch.where(kept, size - size[kept].mean(), size).square().mean() / size.square().mean()).item())
exact = ternarize_matrix(w, "lat exact")
best_factor = (exact.scale.item() / 2) / size.mean().item()
curves(factors.tolist(), {"error / mean square of the weights": error}, marks={"TWN": 0.7, "best": best_factor},
       x_label="threshold, in mean |w|", y_label="relative squared error",
       caption="One matrix of MiniLM, one alpha. The rule of thumb is close to the best. All weights kept (left end): sign and size alone.")
print(f"TWN sets {100 * (ternarize_matrix(w, 'twn').codes == 0).float().mean():.0f} % of the weights to 0, the best choice "
      f"{100 * (exact.codes == 0).float().mean():.0f} %")

# %% [markdown]
# ### Training it, with its own former self as the teacher
#
# Student and teacher are the same fine-tuned model; the student computes with ternary weights and 8-bit activations.
# The latent float weights are kept and updated, as in section 2. There are no labels in the loss: all hidden states,
# all attention scores, and the logits must match the teacher's.
#
# $$L = \sum_{l=0}^{L} \mathrm{MSE}(H_l^S, H_l^T) + \sum_{l=1}^{L} \mathrm{MSE}(A_l^S, A_l^T) + \mathrm{CE}\big(\mathrm{softmax}(z^T), z^S\big)$$
#
# **Predict first.** How many points of test accuracy does this add, compared with the same training on the labels
# alone? (`low_bit.ternary`)

# %%
my_guess = None
predict("low_bit.ternary", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.studies import ternary as ternary_study

record = load_results("ternary")
if (guess := reveal("low_bit.ternary")) is not None:
    for name, found in record["before"].items():
        print(f"not trained: {name:27} {found['right']:5.1f} % right")
    rows = {}
    for run in record["runs"]:
        rows.setdefault(f"{run['setting']['method'].upper()}, {run['setting']['signal']}", []).append(run["right"])
    shown = {name: {"test accuracy (%)": (sorted(v)[len(v) // 2], min(v), max(v))} for name, v in rows.items()}
    dots(shown, grey=[name for name in shown if "labels" in name], from_zero=False,
         caption="Ternary weights, 8-bit activations, after training. Dots: middle of three seeds; bars: all of them.")
    gain = [a - b for a, b in zip(rows["TWN, distillation"], rows["TWN, labels"], strict=True)]
    print(f"TWN: distillation adds {min(gain):.1f} to {max(gain):.1f} points; your guess: {guess:g}")

# %% [markdown]
# Live and small, the same function: one pass over some sentences, tested on 200 reviews. The student is written to a
# file with 2 bits a ternary weight, and the file is what gets tested.

# %%
live = ternary_study.run(ternary_study.LIVE, seed=0).numbers
print(f"{live['steps']} steps: loss {live['loss'][0]:.1f} -> {live['loss'][1]:.1f}, {live['right']:.0f} % of 200 reviews right")
print(f"file {live['bytes'] / 1e6:.1f} MB; largest difference of a logit between student and file: {live['gap']:g}")

# %% tags=["nbval-check-output"]
from effnlp_lessons.quantization.ternarybert import size_in_bytes

size = size_in_bytes(BERT_BASE, scales=False)
print(f"BERT-base: {size['full'] / 2**20:.1f} MiB in float32, {size['ternary'] / 2**20:.2f} MiB ternary: {size['full'] / size['ternary']:.2f} times smaller")

# %% [markdown]
# The paper prints 28 MB and 14.9 times. Its released code stores the ternary weights as float32, so the files it writes
# do not have that size; users asked about it.

# %% [markdown]
# ## 7. The yardstick
#
# MACs do not change: every product is still made. What changes is the bytes. Files are packed; accuracies are the
# recorded ones.

# %%
import tempfile
from pathlib import Path

from effnlp_lessons.measure import bytes_on_disk, count_macs
from effnlp_lessons.quantization.packing import save_quantized
from effnlp_lessons.widgets.own_models import TOKENS, keep_model, show_kept_models

file = Path(tempfile.mkdtemp()) / "model.safetensors"
sizes = {"float32": bytes_on_disk(teacher)}
for name, bits, granularity, symmetric in (("4 bits a row", 4, "row", True), ("2 bits a row", 2, "row", True),
                                           ("3 or 2 bits, groups of 64", dict(enumerate(hessian_choice(omega))), 64, False)):
    sizes[name] = save_quantized(quantize_linears(teacher, bits, granularity, symmetric), file)
sizes["ternary, embeddings too"] = record["runs"][0]["bytes"]
for name, size in sizes.items():
    print(f"{name:27} {size / 1e6:5.1f} MB")

# %% [markdown]
# The mixed choice joins your plot; the other records were made on the test reviews, and the plot is one of dev reviews.

# %% tags=["reveal"]
if reveal("low_bit.rank") is not None:
    tokens = torch.ones(1, TOKENS, dtype=torch.long), torch.ones(1, TOKENS, dtype=torch.bool)
    macs = count_macs(teacher, *tokens).total
    by_budget = accuracies(budget, "dev")[hessian_choice(omega)]
    keep_model("04", "3 or 2 bits", accuracy=by_budget, examples=1_000, macs=macs, bytes_on_disk=sizes["3 or 2 bits, groups of 64"])
    show_kept_models()

# %% [markdown]
# ## Paper and ours
#
# | | paper or released code | here |
# |---|---|---|
# | Jacob et al.: start delay | 50,000 steps to 2 million | tens of steps, a small network |
# | straight-through border | papers: the real number; torch: the rounded one | the real number |
# | LSQ: step sizes | one for a layer, SGD | one for a row in the study, AdamW |
# | Q-BERT: training | fine-tunes with quantized weights, percentile ranges | the twenty choices are measured without training |
# | Q-BERT: groups | 128 groups of rows | groups of 64 inputs in the study, finer; `quantize_groups` has the paper's |
# | Q-BERT: code | none was released | the spread is that of the population; top means largest in absolute value |
# | LAT: curvature | Adam's second moment | the same average, kept by each module |
# | TernaryBERT: activations | paper: asymmetric min-max; code: symmetric in linear layers; clipped at $\pm 2.5$ | asymmetric; not clipped in the study: section 6 shows what the clip costs before any weight is ternary |
# | TernaryBERT: data | GLUE, augmented by default | 2,000 reviews |
#
# Printed by Zhang et al. for MNLI: BERT-base 84.5 and 84.9; TWN with 2-bit weights and 8-bit activations 83.3 and 83.3,
# LAT 83.5 and 83.4. Not repeated here.

# %% [markdown]
# ## Choose by cost
#
# <details><summary><b>A phone, one short message at a time.</b></summary>
#
# Start with notebook 03: 4 bits in groups need no training. Go to 2 bits only if the file must be smaller still, and
# then train through the grid.
# </details>
#
# <details><summary><b>A server that classifies in large batches.</b></summary>
#
# Low-bit weights save memory, not products: the MACs are the same, and they are made in floats or int8. There 8 bits
# are the better bargain.
# </details>
#
# <details><summary><b>Documents of 16,000 tokens.</b></summary>
#
# Weights are not the problem. Eight-bit activations help with the scores; fewer scores help more (notebooks 08 to 11).
# </details>

# %% [markdown]
# ## Common mistakes
#
# * **Straight through everywhere.** Outside the range the staircase is flat: the gradient is 0 there. Else weights run away and never return.
# * **The rounded weight is stored.** Small updates are lost, and training stands still.
# * **The optimizer came first.** If layers are replaced after the optimizer was made, it updates weights that nobody reads.
# * **Ranges move in evaluation.** Then the same sentence gets another answer the second time.
# * **Power iteration without a sign.** $|Hv|$ is the size of the eigenvalue. $v^\top H v$ is the eigenvalue.
# * **Two vectors, no orthogonalising.** Both end at the same eigenvector.
# * **Dropout in the Hessian.** Every product then has another matrix.
# * **0.7 of the largest weight.** TWN's threshold is 0.7 of the *mean* of $|w|$; 0.7 of the largest keeps next to nothing.
# * **$\alpha$ as the mean over all weights.** It is the mean over those that are kept.

# %% [markdown]
# ## Quiz
#
# **1. Why does quantization-aware training keep float weights?**
# <details><summary>Because inference needs them</summary>No. Inference needs the codes and the scales.</details>
# <details><summary>Because one update is smaller than a step of the grid</summary>Yes. The float weight adds updates up until the rounded one moves.</details>
# <details><summary>Because rounding has no derivative</summary>No. That is why the straight-through estimator is needed.</details><br>
#
# **2. A weight lies outside the clipping range. Its gradient is**
# <details><summary>that of the rounded weight</summary>No. Moving it a little does not change the output at all.</details>
# <details><summary>0</summary>Yes. The rounded weight stays at the end of the grid.</details>
# <details><summary>that of the rounded weight, with its sign turned</summary>No. Nothing in the estimator turns signs.</details><br>
#
# **3. The eigenvalues of a Hessian are -7, 5 and 1. Power iteration with $v^\top H v$ gives**
# <details><summary>5</summary>No. That is the largest by sign; a shift or Lanczos finds it.</details>
# <details><summary>7</summary>No. That is $|Hv|$, which hides the sign.</details>
# <details><summary>-7</summary>Yes. The largest in absolute value, with its sign.</details><br>
#
# **4. TWN and exact LAT with equal curvature everywhere differ in that**
# <details><summary>LAT finds the best threshold, TWN takes 0.7 of the mean</summary>Yes. For bell-shaped weights the best is a little above 0.7.</details>
# <details><summary>LAT has two scales</summary>No. Both have one $\alpha$ for a block.</details>
# <details><summary>TWN keeps more weights at 0</summary>No. Its threshold is lower here, so it keeps fewer at 0.</details><br>
#
# **5. A model was trained with ternary weights and then saved with `state_dict`. Its file is**
# <details><summary>a sixteenth of the float file</summary>No. That needs packed codes.</details>
# <details><summary>as large as before</summary>Yes. The latent weights are floats, and so are weights that merely lie on a grid.</details>
# <details><summary>larger, because of the scales</summary>No. One scale for a matrix is nothing.</details><br>

# %% [markdown]
# ## Where next
#
# The homework is `homework/04_low_bit_training.ipynb`. A ternary weight of 0 is a weight that could be left out.
# Notebook 05 leaves weights out on purpose, and asks which.
#
# ## References
#
# * Bengio, Leonard, Courville 2013. *Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation.* arXiv 1308.3432.
# * Esser et al. 2019. *Learned Step Size Quantization.* arXiv 1902.08153.
# * Hou, Kwok 2018. *Loss-aware Weight Quantization of Deep Networks.* arXiv 1802.08635.
# * Jacob et al. 2017. *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference.* arXiv 1712.05877.
# * Li, Zhang, Liu 2016. *Ternary Weight Networks.* arXiv 1605.04711.
# * Shen et al. 2019. *Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT.* arXiv 1909.05840.
# * Zhang et al. 2020. *TernaryBERT: Distillation-aware Ultra-low Bit BERT.* arXiv 2009.12812.
