# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # Movement pruning, and pruning that a clock can see
#
# A fine-tuned weight is large mostly because pre-training made it large. Pruning by size then keeps what was useful for
# general text, whatever the task. Movement pruning (Sanh, Wolf, Rush 2020) looks at where a weight *goes* while the
# task is learned. The second half of this notebook removes heads, neurons and layers for real, and measures what the
# lecture's table says about storage, inference and flexibility.
#
# **Lecture topic:** Pruning, movement and structure. **Reading:** 60 minutes. **Running:** about 45 seconds on two
# cores, no GPU, no network.
#
# **You need:** notebook 05, sections 1 to 3; notebook 01 for distillation. Parts marked *(depth)* can wait.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. derive the gradient of a score through a mask, and say what its sign means;
# 2. fine-tune under a schedule that prunes, with a hard and with a soft threshold, and compare at equal measured share;
# 3. say at which share of weights the criteria differ, and at which they do not;
# 4. remove heads and neurons so that the outputs are those of zeroing them, and say what is easily forgotten;
# 5. fill the table storage, inference, flexibility with numbers measured on your own machine.
#
# **Two questions from earlier notebooks.** Answer, then open.
#
# <details><summary>Half of a matrix is zeros, at random places. Which file is smaller than the dense one: CSR, or a bit mask with the values?</summary>
#
# The bit mask. One bit for a weight is cheap; an integer for every kept weight is not (notebook 05).
# </details>
# <details><summary>The straight-through estimator rounds forward. What does it do backward?</summary>
#
# It passes the gradient on as if nothing had been rounded (notebook 04).
# </details>

# %% [markdown]
# **A question before anything runs.** In one layer of MiniLM, 90 % of all weights are set to 0. The layer runs as
# before, on one core of a CPU. How many times faster is it? (`movement.zeros`)

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("movement.zeros", my_guess)

# %% [markdown]
# ## 1. Where a weight is, and where it goes
#
# Fine-tuning starts from weights that pre-training made, and moves them little. How little, for the teacher of this
# course?

# %%
import torch

from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.pretrained import load_minilm, load_teacher
from effnlp_lessons.pruning.masks import local_masks, magnitudes, prunable

teacher, before = load_teacher(), SentenceClassifier(load_minilm(), classes=2)
start, end = prunable(before), prunable(teacher)
sizes = torch.cat([w.detach().abs().flatten() for w in start.values()])
moves = torch.cat([(end[name] - w).detach().abs().flatten() for name, w in start.items()])
print(f"mean |w| of a pre-trained weight: {sizes.mean():.4f}; mean |move| in fine-tuning: {moves.mean():.4f}")
masks = [local_masks(magnitudes(model), 0.85) for model in (before, teacher)]
same = sum(int((a & b).sum()) for a, b in zip(*(m.values() for m in masks), strict=True))
kept = sum(int(a.sum()) for a in masks[0].values())
print(f"15 % kept by size: {100 * same / kept:.0f} % of them are kept before and after fine-tuning alike")

# %% [markdown]
# So magnitude decides nearly everything before the task is seen. Movement pruning asks instead: does the task push this
# weight away from zero, or towards zero?
#
# ## 2. A score that learns through its mask
#
# Every weight gets a score $S_{ij}$, and the mask keeps the highest: $M = \mathrm{Top}_v(S)$. The layer computes
# $a_i = \sum_k W_{ik} M_{ik} x_k$. How can $S$ learn? The mask is a staircase in $S$, so pass straight through it, as in
# notebook 04: take $\partial M / \partial S$ to be 1. Then, with $W' = M \odot W$,
#
# $$\frac{\partial L}{\partial S_{ij}} = \frac{\partial L}{\partial a_i}\, W_{ij}\, x_j = \frac{\partial L}{\partial W'_{ij}}\; W_{ij} \qquad\qquad
# \frac{\partial L}{\partial W_{ij}} = \frac{\partial L}{\partial W'_{ij}}\; M_{ij}$$
#
# The mask gates the weight's gradient and **not** the score's. A pruned weight stands still, but its score still learns,
# so it can come back.
#
# **What does the score collect?** After $T$ steps of gradient descent, $S_{ij} = -\alpha_S \sum_t (\partial L/\partial
# W'_{ij})^{(t)}\, W_{ij}^{(t)}$. If $W > 0$ and the gradient is negative, the step makes $W$ larger: away from zero, and
# the score rises. If $W < 0$ and the gradient is positive, the same. In the two other cases the weight moves towards zero,
# and the score falls. Two weights, ten steps:

# %%
from effnlp_lessons.pruning.movement import MovementLinear, cubic_level, masked_weight
from effnlp_lessons.widgets.page import curves, dots, show_source

paths, scores = {"weight that leaves 0": [0.3], "weight that comes to 0": [0.9]}, {}
for name, target in zip(paths, (1.0, 0.2), strict=True):
    weight, score = torch.tensor([[paths[name][0]]], requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    scores[f"score of the {name}"] = [0.0]
    for _ in range(10):
        used = masked_weight(weight, score, torch.ones(1, 1, dtype=torch.bool))
        (used - target).square().sum().backward()  # the task wants this weight at its target
        with torch.no_grad():
            for tensor in (weight, score):
                tensor -= 0.1 * tensor.grad
                tensor.grad = None
        paths[name].append(weight.item())
        scores[f"score of the {name}"].append(score.item())
curves(list(range(11)), paths | scores, x_label="step", y_label="weight, score",
       caption="The larger weight at the start is the one that the task pulls towards zero. Its score falls; the other's rises.")

# %% [markdown]
# Magnitude would have kept the wrong one at first. The identities, on random numbers, against autograd:

# %% tags=["nbval-check-output"]
generator = torch.Generator().manual_seed(0)
W, S, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (5, 4), (7, 4)))
M, target = S > 0.3, torch.randn(7, 5, generator=generator, dtype=torch.float64)
weight, score = W.clone().requires_grad_(), S.clone().requires_grad_()
(x @ masked_weight(weight, score, M).T - target).square().mean().backward()

used = (W * M).requires_grad_()  # dL/dW', by autograd alone
(x @ used.T - target).square().mean().backward()
print("score's gradient is dL/dW' times W, not gated:", torch.allclose(score.grad, used.grad * W))
print("weight's gradient is gated by the mask:       ", torch.allclose(weight.grad, used.grad * M))
print("scores of masked weights that learn:", f"{int((score.grad[~M] != 0).sum())} of {int((~M).sum())}")

# %%
show_source(MovementLinear.mask)

# %% [markdown]
# **Hard or soft.** *Hard:* each matrix keeps the share $v$ of its highest scores. *Soft:* a matrix keeps what has
# $\sigma(S) > \tau$, so that matrices may keep different shares, and a penalty $\lambda \cdot \mathrm{mean}\,\sigma(S)$
# pushes all scores down. What share that leaves is not known beforehand: **it must be measured**, and compared at equal
# measured shares.
#
# **When.** At the start all scores are 0. A top share of equal scores would be an arbitrary block of the matrix. So the
# first steps prune nothing; then $v$ falls along a cubic, fast at first, and the last steps only train:
#
# $$v_t = v_f + (v_i - v_f)\left(1 - \frac{t - t_i}{N - t_i - t_f}\right)^3$$

# %%
steps = 200
shares = {f"to {100 * final:.0f} %": [100 * cubic_level(t, steps, 1.0, final, 20, 40) for t in range(steps)] for final in (0.5, 0.15, 0.03)}
curves(list(range(steps)), shares, x_label="step", y_label="weights left (%)",
       caption="One schedule for magnitude and for movement: all weights in the first tenth, all pruned by the last fifth.")

# %% tags=["nbval-check-output"]
from effnlp_lessons.pruning.movement import above, top_share

scores = torch.randn(40, 50, generator=generator)
print("hard, v = 0.15: ", int(top_share(scores, 0.15).sum()), "of 2,000 kept")
print("soft, tau = 0.1, scores still 0:       ", int(above(torch.zeros(40, 50), 0.1).sum()), "of 2,000 kept")
print("soft, tau = 0.1, all scores far below: ", int(above(scores - 9, 0.1).sum()), "of 2,000 kept, the least that stays")
print("the schedule at its ends:", [round(cubic_level(t, 100, 1.0, 0.03, 10, 20), 2) for t in (0, 10, 80, 100)])

# %% [markdown]
# ## 3. Does it matter where a weight goes?
#
# MiniLM-L3, 3,000 labelled reviews, the same schedule and the same steps for all; magnitude keeps the largest
# $|W|$ of the moment.
#
# **Predict first.** With 3 % of the weights left, by how many points does movement (hard) beat magnitude?
# (`movement.three_percent`)

# %%
my_guess = None
predict("movement.three_percent", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.studies import movement as movement_study
from effnlp_lessons.studies.runner import load_results

if (guess := reveal("movement.three_percent")) is not None:
    found = movement_study.by_model(load_results("movement"))
    rows = {}
    for (method, _), values in found.items():
        right = sorted(values["right"])
        name = method if method == "dense" else f"{method}, {sum(values['left']) / len(values['left']):.1f} % left"
        rows[name] = {"test accuracy (%)": (right[len(right) // 2], right[0], right[-1])}
    dots(rows, grey=[name for name in rows if "magnitude" in name], from_zero=False,
         caption="Dots: middle of three seeds; bars: all of them. Grey: magnitude. The share is counted from the masks, its mean in the name.")
    gain = [b - a for a, b in zip(found["magnitude", 3]["right"], found["hard", 3]["right"], strict=True)]
    print(f"3 % left: movement is {min(gain):.1f} to {max(gain):.1f} points above magnitude ({len(gain)} seeds); your guess: {guess:g}")

# %% [markdown]
# <details><summary><b>After your guess: what holds, and what does not</b></summary>
#
# At 3 % movement (hard) wins by three to four points on every seed; at 5 % on two of three. At 50 % it *loses*, and at
# 15 % two of three runs never learn: they stay at one half. The paper's runs are far longer. The loss of these runs
# jumps when the first weights go, after 28 steps under a head that was only just drawn; with a longer warm-up one of
# them ended better (the study's notes say how it was looked into). *Soft* has none of this. It is ahead of magnitude on
# every seed at every level, and its shares are measured: 2.6 to 2.9 % where magnitude keeps 3 %.
# </details>
#
# Live and small, the same function: eight steps, tested on 200 reviews. Too few steps to say who is better, enough to
# see the shares arrive.

# %%
live = movement_study.run(movement_study.LIVE, seed=0).numbers["models"]
for model in live:
    print(f"{model['method']:10} {model['left']:.2f} % of the weights left, {model['right']:.0f} % of 200 reviews right")

# %% [markdown]
# ### With distillation
#
# The paper's best numbers are distilled: half of the loss is that of the labels, half the soft targets of the teacher at
# $T = 2$, times $T^2$ (notebook 01). One seed, no claim:

# %%
for (method, level), values in movement_study.by_model(load_results("movement"), distilled=True).items():
    plain = movement_study.by_model(load_results("movement"))[method, level]["right"]
    print(f"{method:10} {values['left'][0]:5.1f} % left: distilled {values['right'][0]:.1f} %, labels alone {plain[0]:.1f} % (the same seed)")

# %% [markdown]
# On this one seed distillation lifts magnitude by more than a point, and movement not at all; in the paper it lifts all.
# The soft row shows the trap of soft thresholds: the same penalty against another loss leaves twice the share of weights, so its two numbers do not
# compare.

# %% [markdown]
# ### Before and after, weight by weight

# %%
from effnlp_lessons.widgets.movement_explorer import MovementExplorer

MovementExplorer()

# %% [markdown]
# **Try:**
#
# * Look at 3 %. Magnitude keeps all that lies outside a band around 0. Movement keeps weights that moved *away* from 0,
#   and small ones are among them.
# * Go to 50 %: which points are kept by both?
# * Change what is drawn: weights before and after, or the scores.
#
# ## 4. Blocks of weights (Lagunas et al. 2021)
#
# *(Depth.)* Single zeros save no time. So let a score belong to a whole block: squares of 32 x 32 in attention, and in the
# feed-forward part a row of the first matrix and a column of the second, that is a neuron. The block's score collects
# over the block, and its mask is spread over it:
#
# $$M = \mathrm{spread}(M'), \qquad \frac{\partial L}{\partial S_b} = \sum_{ij \in b} \frac{\partial L}{\partial W'_{ij}} W_{ij}$$

# %% tags=["nbval-check-output"]
from effnlp_lessons.pruning.movement import movement_masks, set_level_
from effnlp_lessons.pruning.movement_blocks import hybrid_blocks, prepare_blocks, removable

blocked = prepare_blocks(teacher, hybrid_blocks(teacher), mode="hard")
set_level_(blocked, 0.5)  # scores are still equal: the size of a block decides
masks = movement_masks(blocked)
name = "encoder.blocks.0.channel_mixer.expand.weight"
rows_kept = masks[name].float().mean(1)
print("rows of the first feed-forward matrix kept whole or not at all:", bool(((rows_kept == 0) | (rows_kept == 1)).all()))
cut = removable(blocked)["encoder.blocks.0"]
print(f"layer 0: {int(cut['neurons'].sum())} of 1,536 neurons and {int(cut['heads'].sum())} of 12 heads can be cut out")

# %% [markdown]
# A neuron goes when either its row or its column is masked, so more than half of them. A head goes only when all of
# its value rows, or all of its output columns, are: fewer heads than half.
#
# ## 5. Pruning that a clock can see: heads, neurons, layers
#
# | what goes | rows that go | columns that go |
# |---|---|---|
# | a head | its part of $W_q, W_k, W_v$, with their biases | its part of $W_o$ |
# | a feed-forward neuron | its row of $W_1$, with its bias | its column of $W_2$ |
# | a layer | all | all |
#
# What is left is a smaller dense model. It must give what the large one gives with the same parts at zero. The usual
# slip is the bias: zero a neuron's row alone, and $\mathrm{GELU}(b)$ still flows on.

# %% tags=["nbval-check-output"]
import copy

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.measure import bytes_on_disk, count_parameters
from effnlp_lessons.pruning.structured import remove_heads, remove_neurons, zero_heads, zero_neurons

some = ReviewExamples(reviews.load_reviews().subset("dev"), limit=64)
ids, mask, labels = some.batch(list(range(8)))
heads, neurons = {0: [1, 5], 3: [0]}, {2: range(700), 4: [7]}
small, zeroed = remove_neurons(remove_heads(teacher, heads), neurons), zero_neurons(zero_heads(teacher, heads), neurons)
rows_only = copy.deepcopy(teacher)
with torch.no_grad():
    rows_only.encoder.blocks[2].channel_mixer.expand.weight[:700] = 0.0
    print("smaller model equals the zeroed one:", torch.allclose(small(ids, mask), zeroed(ids, mask), atol=1e-5))
    only_2 = remove_neurons(teacher, {2: range(700)})
    print("rows alone at zero, biases left, equal:", torch.allclose(only_2(ids, mask), rows_only(ids, mask), atol=1e-3))
print("parameters:", f"{count_parameters(teacher):,} -> {count_parameters(small):,}; zeroed: {count_parameters(zeroed):,}")

# %%
from effnlp_lessons.widgets.mask_explorer import MaskExplorer

MaskExplorer(matrix="block 0 expand", structure="rows", sparsity=75)

# %% [markdown]
# Three quarters of the neurons removed are three quarters of the rows, and what is left is a dense matrix. How much of
# the squared weight would *unstructured* keep at 75 %?
#
# **Which heads?** Michel, Levy and Neubig (2019) give each head a gate $\xi_h = 1$ and ask how much the loss would
# change if it were turned: $I_h = \mathbb{E}_x \left| \partial L / \partial \xi_h \right|$. One backward pass gives all.
# The same gate works for neurons.

# %%
from effnlp_lessons.pruning.importance import importance, shrink

training = ReviewExamples(reviews.load_reviews().subset("train"), limit=192)
batches = [training.batch(list(range(start, start + 32))) for start in range(0, 192, 32)]
found = importance(teacher, batches)
ranked = sorted(((value.item(), layer, head) for layer, values in enumerate(found.normalised_heads) for head, value in enumerate(values)), reverse=True)
print("most important heads (layer, head): ", [(layer, head) for _, layer, head in ranked[:5]])
print("least important heads (layer, head):", [(layer, head) for _, layer, head in ranked[-5:]])
print("layers, from the least important:   ", found.layers.argsort().tolist())

# %%
tested = ReviewExamples(reviews.load_reviews().subset("test"), limit=300)
for heads_left, neurons_left in ((12, 1536), (9, 1152), (6, 768)):
    smaller = shrink(teacher, found, heads_left, neurons_left)
    print(f"{heads_left:2} heads and {neurons_left:5,} neurons a layer: {bytes_on_disk(smaller) / 1e6:5.1f} MB, "
          f"{accuracy(smaller, tested):.0f} % of 300 reviews right, without retraining")

# %% [markdown]
# Half of the heads and neurons are gone, and this sample hardly notices. On all 2,000 reviews it costs two to four
# points; the record in section 6 has them, and what a short training brings back.
#
# **Predict first.** Half of the heads and half of the neurons are removed in every layer. One core, one sentence of 128
# tokens: how many times faster is the classifier? (`movement.half`)

# %%
my_guess = None
predict("movement.half", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.studies import pruning_costs, pruning_structures

costs = load_results("pruning_costs")

def times_faster(what, form):
    """Dense seconds over the seconds of this form, one number a repetition."""
    return sorted(run["seconds"][what]["dense"][0] / run["seconds"][what][form][0] for run in costs["runs"])

if (guess := reveal("movement.half")) is not None:
    faster = times_faster("the classifier", pruning_costs.HALF)
    print(f"half of the heads and neurons: {faster[0]:.2f} to {faster[-1]:.2f} times as fast ({len(faster)} repetitions); your guess: {guess:g}")

# %% tags=["reveal"]
if (guess := reveal("movement.zeros")) is not None:
    shown = {form: {f"{what}: times as fast": (lambda t: (t[len(t) // 2], t[0], t[-1]))(times_faster(what, form))
                    for what in ("a layer of MiniLM", "a layer of BERT-base", "the classifier")}
             for form in costs["runs"][0]["seconds"]["a layer of MiniLM"]}
    dots(shown, grey=[form for form in shown if "zeros" in form or "2:4" in form],
         caption="One thread, one text of 128 tokens; dots: middle of three repetitions. 1 is the dense model. Grey: scattered zeros in some form.")
    zeros = times_faster("a layer of MiniLM", pruning_costs.zeros(0.9))
    print(f"90 % zeros in a dense kernel: {zeros[0]:.2f} to {zeros[-1]:.2f} times as fast; your guess, at the top: {guess:g}")

# %% [markdown]
# <details><summary><b>After your guesses</b></summary>
#
# Ninety per cent zeros in a dense kernel: nothing. In torch's CSR kernel they do bring something, since nine of ten
# products really are left out. Half of the structure: about twice as fast, with the kernel that everybody has. And
# int8 multiplies with it.
# </details>
#
# Measured now, on this machine, the same models:

# %%
from effnlp_lessons.measure import latencies
from effnlp_lessons.pruning.masks import apply_masks_
from effnlp_lessons.quantization.dynamic_int8 import with_dynamic_int8

torch.set_num_threads(1)
tokens = torch.randint(1_000, 30_000, (1, 128), generator=generator), torch.ones(1, 128, dtype=torch.bool)
half = shrink(teacher, found, 6, 768)
models = {"dense": teacher, "90 % zeros": copy.deepcopy(teacher), "half of heads and neurons": half, "int8": with_dynamic_int8(teacher),
          "half, in int8": with_dynamic_int8(half)}
apply_masks_(models["90 % zeros"], local_masks(magnitudes(teacher), 0.9))
times = latencies({name: lambda model=model: model(*tokens) for name, model in models.items()}, runs=8)
for name, timing in times.items():
    print(f"{name:27} {times['dense'].median / timing.median:5.2f} times as fast, {bytes_on_disk(models[name]) / 1e6:5.1f} MB")

# %% tags=["nbval-check-output"]
from effnlp_lessons.measure import count_macs

weights = {name: sum(w.numel() for w in prunable(model).values()) for name, model in (("dense", teacher), ("half", half))}
print(f"weights in the encoder's matrices: {weights['dense']:,} -> {weights['half']:,}")
ratio = count_macs(half.encoder.blocks[0], torch.ones(1, 128, 384)).total / count_macs(teacher.encoder.blocks[0], torch.ones(1, 128, 384)).total
print("products of a layer of the smaller model over those of the dense one:", ratio)

# %% [markdown]
# ## 6. Storage, inference, flexibility
#
# The lecture's table says: unstructured pruning is flexible and saves storage, structured pruning saves time. Storage
# and time are measured above. **Flexibility** can be measured too: the accuracy at equal numbers of weights. Who may
# choose freely should lose least. Half of the encoder's weights, removed in different units; then 2,000 sentences of
# training under the masks:

# %%
structures = load_results("pruning_structures")
rows = {}
for when in ("before", "after"):
    for (structure, share), right in pruning_structures.right_of(structures, when).items():
        rows.setdefault(f"{structure}, {100 * share:.0f} % left", {})[f"{when} training (%)"] = (sorted(right)[1], min(right), max(right))
dots(rows, from_zero=False, caption="Test accuracy. Dots: middle of three seeds; bars: all of them.")

# %% [markdown]
# And the whole table, each cell from a record: the file of the classifier against the dense one, the time of the
# classifier, the accuracy after training.

# %%
forms = {pruning_structures.ANY: (pruning_costs.csr(0.5), "bit mask, 50 % zeros"), pruning_structures.OF_FOUR: (pruning_costs.TWO_OF_FOUR,) * 2,
         pruning_structures.BLOCKS: (pruning_costs.bsr(0.5), None), pruning_structures.HEADS: (pruning_costs.HALF,) * 2,
         pruning_structures.LAYERS: (pruning_costs.LAYERS,) * 2}
size = costs["runs"][0]["bytes"]["the classifier"]
after = pruning_structures.right_of(structures, "after")
print(f"{'half of the weights, as':24} {'file':>8} {'times as fast':>14} {'accuracy after training':>26}")
for structure, (timed, stored) in forms.items():
    share = f"{100 * size[stored] / size['dense']:.0f} %" if stored in size else "-"
    speed = times_faster("the classifier", timed)[1]
    right = sorted(after[structure, 0.5])
    print(f"{structure:24} {share:>8} {speed:14.2f} {right[1]:14.1f} [{right[0]:.1f}, {right[-1]:.1f}]")

# %% [markdown]
# **Storage:** about the same for all, once the format fits; the embeddings, which nobody prunes, are most of the file.
# **Inference:** only what makes matrices smaller is faster. **Flexibility:** with one criterion, size, the order is the
# lecture's: single weights, then two of every four, then blocks, which come out worst. But heads and neurons, chosen by
# *gradients*, beat single weights chosen by *size*. A better criterion can weigh more than a freer unit. Give single
# weights a good criterion too, layer-wise OBS of notebook 05, and they are in front again: 86 % without any training.
# The control with random heads says what the gradients are worth.

# %% [markdown]
# ## 7. The yardstick
#
# Half of the heads and neurons, after the training of the record, cannot be made live; without training it already is a
# model. It joins your plot, in float32 and in int8, measured on 200 dev reviews.

# %%
from effnlp_lessons.measure import cost, table
from effnlp_lessons.widgets.own_models import TOKENS, keep_model, show_kept_models

inputs = torch.ones(1, TOKENS, dtype=torch.long), torch.ones(1, TOKENS, dtype=torch.bool)
dev = ReviewExamples(reviews.load_reviews().subset("dev"), limit=200)
measured = {name: cost(models[name], *inputs, runs=8) for name in ("dense", "half of heads and neurons", "half, in int8")}
print(table(measured))
for name in ("half of heads and neurons", "half, in int8"):
    keep_model("07", name, accuracy=accuracy(models[name], dev), examples=200, macs=measured[name].macs, bytes_on_disk=measured[name].bytes_on_disk)
show_kept_models()

# %% [markdown]
# ## Paper and ours
#
# | | paper or released code | here |
# |---|---|---|
# | model, data | BERT-base, 12 layers; SQuAD, MNLI, QQP | MiniLM-L3, movie reviews |
# | training | 10 epochs of SQuAD, batch 16 | 3 epochs of 3,000 reviews, batch 32 |
# | score learning rate | 0.01, weights $3 \cdot 10^{-5}$ | 0.01; in hard mode only the order of scores counts |
# | soft mode | paper: $S > \tau$; code: $\sigma(S) > \tau$, $\lambda = 400$, at least 0.5 % of a matrix kept | as the code; $\lambda$ as in the study |
# | SQuAD F1, 3 % left, distilled (printed) | magnitude 59.6, movement 78.0, soft 82.3, dense 88.1 | not repeated: other model and data, see section 3 |
# | speed | the authors state none for unstructured masks | none measured: 90 % zeros cost what 0 % cost |
# | Block pruning | SQuAD, 1.84 to 3.64 times faster on a GPU (printed) | one core of a CPU, measured here |
# | Head importance | expected $\lvert \partial L / \partial \xi_h \rvert$, layer-wise normed | the same, on labelled reviews |

# %% [markdown]
# ## Choose by cost
#
# <details><summary><b>A phone, one short message at a time.</b></summary>
#
# Remove heads and neurons, then quantize: both the file and the time shrink, and they multiply.
# </details>
#
# <details><summary><b>A server that classifies in large batches.</b></summary>
#
# The same. Structured pruning is the one kind whose gain needs no special kernel, on any hardware.
# </details>
#
# <details><summary><b>Documents of 16,000 tokens.</b></summary>
#
# Removing heads removes their attention scores too. Neurons do not touch the scores. Notebooks 08 to 11 do.
# </details>

# %% [markdown]
# ## Common mistakes
#
# * **The score's gradient gated by the mask.** Then a pruned weight can never come back.
# * **The wrong sign, or $|S|$.** Then what moves towards zero is kept.
# * **A sigmoid's derivative in the straight-through step.** The estimator passes straight.
# * **Pruning from step 0 with equal scores.** An arbitrary block of each matrix is kept.
# * **Weight decay on scores.** It pulls them all towards the threshold.
# * **Nominal instead of measured.** In soft mode the threshold is no share. Count the mask.
# * **Counting zeros of $W$.** A kept weight may be 0, and a pruned weight need not be.
# * **Zeroed rows, kept biases.** $\mathrm{GELU}(b) \neq 0$ leaks through the next matrix. Remove row, bias and column.
# * **FLOPs reported as speed.** Measure the time, one run, ratios.

# %% [markdown]
# ## Quiz
#
# **1. A weight is -0.5, and the gradient of the loss in it is +0.1. After a step of descent its movement score**
# <details><summary>falls</summary>No. The weight becomes more negative: it moves away from zero.</details>
# <details><summary>rises</summary>Yes. Gradient times weight is negative, and the score goes against it.</details>
# <details><summary>does not change</summary>No. Scores of all weights learn in every step.</details><br>
#
# **2. Hard movement pruning won at 3 % and lost at 50 %. The fair conclusion is that**
# <details><summary>movement is the better criterion</summary>No. Not at every share, and not in every training.</details>
# <details><summary>which one is better depends on the share left, and takes several seeds to say</summary>Yes. At 15 % one seed alone would have said anything.</details>
# <details><summary>magnitude is the better criterion</summary>No. At 3 % it lost on every seed.</details><br>
#
# **3. 90 % of a layer's weights are zeros at random places. A dense kernel is**
# <details><summary>ten times faster</summary>No. It multiplies zeros like other numbers.</details>
# <details><summary>as fast as before</summary>Yes. It does not look.</details>
# <details><summary>slower</summary>No. The same products are made.</details><br>
#
# **4. Half of all feed-forward neurons are removed. Which tensors become smaller?**
# <details><summary>the weight of the first layer only</summary>No. The outputs that are gone are inputs of the second.</details>
# <details><summary>weight and bias of the first layer, and the weight of the second</summary>Yes. The second bias keeps the model's width.</details>
# <details><summary>all tensors of the block, the layer norms too</summary>No. The width of the model has not changed.</details><br>
#
# **5. Single weights chosen by size lost more accuracy here than heads and neurons chosen by gradients. This shows that**
# <details><summary>structure is no restriction</summary>No. Single weights chosen by layer-wise OBS lost nothing (notebook 05).</details>
# <details><summary>the criterion can matter more than the unit</summary>Yes. Compare units under one criterion, and criteria under one unit.</details>
# <details><summary>heads should be chosen by size</summary>No. Nothing of the kind was tried.</details><br>

# %% [markdown]
# ## Where next
#
# The homework is `homework/07_movement_pruning.ipynb`. So far the weights became fewer. Notebook 08 turns to what has no
# weights at all: the attention scores, which grow with the square of the length.
#
# ## References
#
# * Lagunas, Charlaix, Sanh, Rush 2021. *Block Pruning For Faster Transformers.* arXiv 2109.04838.
# * Michel, Levy, Neubig 2019. *Are Sixteen Heads Really Better than One?* arXiv 1905.10650.
# * Sanh, Wolf, Rush 2020. *Movement Pruning: Adaptive Sparsity by Fine-Tuning.* arXiv 2005.07683.
