# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # Quantization: how few bits does a weight need?
#
# A weight of MiniLM takes 32 bits. That is enough for four billion different numbers. This notebook gives each weight a
# choice of 256, of 16, of 4, and asks three things: what happens to the answers, what happens to the file, and what
# happens to the clock.
#
# **Lecture topic:** Quantization, after training. **Reading:** 60 minutes. **Running:** about 40 seconds on two cores,
# no GPU, no network.
#
# **You need:** notebook 00. Parts marked *(depth)* can wait.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. write a quantizer from its definition, and choose scale and zero point for a range;
# 2. say why one weight can ruin a matrix, and which three remedies there are;
# 3. choose a range by a rule, and say what the rule trades;
# 4. compute a linear layer on integers alone, bit for bit, and say which rounding is used where;
# 5. tell what a smaller file, a faster product and a faster model each need.
#
# **Two questions from earlier notebooks.** Answer, then open.
#
# <details><summary>Which part of MiniLM-L6 has the most parameters?</summary>
#
# The embeddings, 11.9 of 22.7 million. The six layers have 10.6 million (notebook 00).
# </details>
# <details><summary>A distilled student of three layers: how much smaller is its file than that of its six-layer teacher?</summary>
#
# Not by half. The token table stays whole (notebook 02).
# </details>

# %% [markdown]
# **A question before anything runs.** The teacher of this course gets 86 % of the test reviews right. Round every
# weight of its six layers to one of 15 evenly spaced values, with one spacing for each weight matrix. How many per cent
# of the reviews does it then get right? Half of the reviews are positive. (`quantization.granularity`)

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("quantization.granularity", my_guess)

# %% [markdown]
# ## 1. The definition: a staircase
#
# A quantizer of $k$ bits has $2^k$ **levels** $q_0 < q_1 < \dots$ and **thresholds** between them:
#
# $$Q(z) = q_j \quad\text{for}\quad z \in (t_j,\; t_{j+1}]$$
#
# The staircase below has 2 bits, so four levels. The thresholds decide, the levels answer. Nothing says that the steps
# are even. *Uniform* steps suit a machine: the level's number says where it lies. *Non-uniform* steps suit the weights:
# more levels where there are more weights, at the price of a table to look up each level in.
#
# For given levels the best thresholds lie half-way between neighbours. For given thresholds the best level of a bin is
# the mean of the weights in it. To do both in turn is **Lloyd's algorithm** (k-means in one dimension).

# %%
import torch

from effnlp_lessons.pretrained import load_minilm, load_teacher
from effnlp_lessons.widgets.page import bars, curves

torch.set_num_threads(2)
minilm, teacher = load_minilm(), load_teacher()

# %%
from effnlp_lessons.quantization.nonuniform import lloyd_max, nearest_level, power_of_two_levels, quantile_levels

w = minilm.blocks[0].token_mixer.value.weight.detach()
even = torch.linspace(-1, 1, 4) * w.abs().max()
best, errors = lloyd_max(w, bits=2)
x = torch.linspace(-0.28, 0.28, 561)
curves(x.tolist(), {"even": nearest_level(x, even).tolist(), "Lloyd's": nearest_level(x, best).tolist()}, x_label="weight z", y_label="Q(z)",
       caption="Four levels for a matrix of MiniLM. Lloyd's move to where the weights are; the largest weights pay.")

# %% tags=["nbval-check-output"]
kinds = {"even, 0 not among them": even, "equal shares of the weights": quantile_levels(w, 2), "Lloyd's": best,
         "0 and powers of two": power_of_two_levels(float(w.abs().max()), 2)}
for name, levels in kinds.items():
    error = (nearest_level(w, levels) - w).square().mean() / w.square().mean()
    print(f"{name:28} {len(levels)} levels, squared error {100 * error:3.0f} % of the mean square")
print("each round of Lloyd's lowers the error or leaves it:", all(a >= b for a, b in zip(errors, errors[1:], strict=False)))

# %% [markdown]
# To set every weight to 0 would give 100 %. The even levels of 2 bits are *worse* than that: no weight can be near 0,
# where nearly all of them are. At so few bits the choice of levels is everything. With more bits it matters less, and
# even levels have a great advantage: a product of *codes* is a product of numbers, up to one factor. The rest of this
# notebook has even levels.
#
# %% [markdown]
# ## 2. Linear quantization: two numbers for a grid
#
# Even steps need two numbers, the **scale** $S$ and the **zero point** $Z$:
#
# $$z = S\,(q - Z) \qquad\qquad q = \mathrm{clamp}\Big(\mathrm{round}\big(\tfrac{z}{S}\big) + Z,\; q_{min},\; q_{max}\Big)$$
#
# A clash of letters: the lecture's $z$ is a real number and its $Z$ an integer. Jacob et al. (2017) write
# $r = S(q - Z)$ for the same. $Z$ is the code that stands for *exactly* 0. That matters: padding and ReLU produce
# zeros, and a zero that comes back as 0.003 is added up thousands of times.
#
# **Affine:** the range $[a, b]$ is stretched to contain 0, then $S = (b - a)/(2^k - 1)$ and
# $Z = \mathrm{round}(q_{min} - a/S)$. **Symmetric:** $Z = 0$ and $S = \max|z|/(2^{k-1} - 1)$, codes $-7 \dots 7$ at 4
# bits. One code is given up so that plus and minus have the same reach.

# %% tags=["nbval-check-output"]
from effnlp_lessons.quantization.quantizers import affine_quantizer, quantize_matrix, symmetric_quantizer

for low, high in ((-1.0, 1.0), (-0.5, 3.0), (0.2, 3.0), (-3.0, -1.0)):
    grid = affine_quantizer(torch.tensor(low), torch.tensor(high), bits=8)
    print(f"[{low:4}, {high:4}]: S = {grid.scale:.6f}, Z = {grid.zero_point:3}, 0.0 comes back as {grid(torch.tensor(0.0)):.1f}")
grid = symmetric_quantizer(torch.tensor(1.0), bits=4)
print("4 bits, symmetric, codes of -1, -0.4, 0, 0.4, 1:", grid.quantize(torch.tensor([-1, -0.4, 0, 0.4, 1])).tolist())
print("torch.round of 0.5, 1.5, 2.5, 3.5:", torch.round(torch.tensor([0.5, 1.5, 2.5, 3.5])).int().tolist())

# %% [markdown]
# Two details that cost people days. There are $2^k$ levels but $2^k - 1$ **steps** between them. And *round* here
# rounds a half to the even neighbour, as torch does; C's `round()` goes away from zero.
#
# How large is the error? Inside the range each weight is moved by at most half a step. If it falls anywhere in its step
# with equal chance, the mean squared error is $S^2/12$. One bit more halves the step and quarters the error: **6.02 dB
# per bit**.

# %% tags=["nbval-check-output"]
uniform = 2 * torch.rand(100_000, generator=torch.Generator().manual_seed(0)) - 1
for bits in (8, 6, 4):
    grid = affine_quantizer(torch.tensor(-1.0), torch.tensor(1.0), bits)
    error = (grid(uniform) - uniform).square().mean()
    print(f"{bits} bits: error / (S² / 12) = {error / (grid.scale**2 / 12):.1f}, "
          f"signal to noise {10 * torch.log10(uniform.square().mean() / error):.0f} dB")

# %% [markdown]
# ## 3. How many weights share a grid?
#
# That was evenly spread. The weights of a trained model are not. Look at the largest weight of each matrix, in standard
# deviations of that matrix:

# %% tags=["nbval-check-output"]
matrices = {name: w.detach() for name, w in minilm.named_parameters() if w.ndim == 2 and "blocks" in name}
largest = {name: float(w.abs().max() / w.std()) for name, w in matrices.items()}
ordered = sorted(largest, key=largest.get)
for name in (ordered[0], ordered[len(ordered) // 2], ordered[-1]):
    print(f"{name:38} largest weight: {largest[name]:3.0f} standard deviations")
worst = matrices[ordered[-1]]
codes = quantize_matrix(worst, bits=4, granularity="tensor").codes
print(f"\n{ordered[-1]} at 4 bits, one grid: {(codes != 0).sum()} of {codes.numel():,} weights do not become 0")

# %% [markdown]
# One weight among 589,824 is 175 standard deviations large. It sets the step for all of them. Three remedies, and each
# costs something:
#
# * **more bits**: the file grows;
# * **a narrower range**: clip the outlier, and be wrong about it;
# * **narrower grids**: let fewer weights share one. A grid for each row (each output channel), or for each group of 64
#   consecutive inputs of a row. Each grid is one more scale to store.
#
# **Predict first.** Make one weight of a matrix 20 times as large as the largest was. A symmetric grid of 4 bits has 15
# codes. How many of them do *all the other* weights still use? (`quantization.outlier`)

# %%
my_guess = None
predict("quantization.outlier", my_guess)

# %% tags=["reveal"]
if (guess := reveal("quantization.outlier")) is not None:
    for times in (1, 2, 5, 20):
        w = minilm.blocks[5].token_mixer.query.weight.detach().clone()
        w[0, 0] = times * w.abs().max()
        codes = quantize_matrix(w, bits=4, granularity="tensor").codes.flatten()[1:]
        print(f"largest weight x {times:2}: the others use {len(codes.unique()):2} codes, {100 * (codes == 0).float().mean():5.1f} % of them are 0")
    print(f"Your guess for 20: {guess:g}")

# %% [markdown]
# Now drag it yourself. **Try:** 4 bits, and move the weight away from the others. Watch the step, and the signal to
# noise of the other blocks. Change *tensor* to *row*, then to *group 64*: who suffers now? Then narrow the range until
# it clips the outlier: what do you pay, and who pays it? Last, look at *block 0 contract*, which brings its own
# outlier.

# %%
from effnlp_lessons.widgets.quantization_grid_explorer import QuantizationGridExplorer

QuantizationGridExplorer()

# %% [markdown]
# Now the whole teacher, live on 200 of the test reviews, and its record on all 2,000.

# %% tags=["reveal"]
from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.quantization.post_training import quantize_linears
from effnlp_lessons.studies.bits_by_granularity import AFFINE, SYMMETRIC, recorded

some = ReviewExamples(reviews.load_reviews().subset("test"), limit=200)
if (guess := reveal("quantization.granularity")) is not None:
    for granularity in ("tensor", 64):
        print(f"live: 4 bits, {granularity}: {accuracy(quantize_linears(teacher, 4, granularity), some):.0f} % of 200")
    print(f"\nrecorded, % right of 2,000; float32: {recorded(32)['accuracy']:.1f}")
    print("bits  grid      " + "".join(f"{name:>11}" for name in ("tensor", "row", "group 128", "group 64")))
    for bits in (8, 4, 3, 2):
        for grid in (SYMMETRIC, AFFINE):
            cells = [recorded(bits, granularity, grid)["accuracy"] for granularity in ("tensor", "row", 128, 64)]
            print(f"{bits:4}  {grid:10}" + "".join(f"{cell:11.1f}" for cell in cells))
    print(f"Your guess for 4 bits, one grid per matrix: {guess:g} %")

# %% [markdown]
# <details><summary><b>After your guess: how to read the table</b></summary>
#
# One accuracy has a standard error of 0.8 points; 50 is a coin. At 8 bits nothing matters. From 4 bits on the
# granularity decides: to the right fewer weights share a grid. Affine helps most where levels are few: at 2 bits it has
# four, symmetric only three.
# </details>

# %% [markdown]
# ## 4. Which range?
#
# The other remedy: let the grid end before the largest weight. Weights beyond the end are **clipped** to it. A narrower
# range rounds all others more finely. Both errors, for one row of real weights at 4 bits:

# %%
from effnlp_lessons.quantization.quantizers import min_max
from effnlp_lessons.quantization.ranges import aciq_gaussian, aciq_laplace, mean_squared_error, percentile

row = minilm.blocks[0].token_mixer.output.weight[7].detach()[None]
reach = torch.linspace(0.02, 1, 99) * row.abs().max()
rounding, clipping = [], []
for end in reach:
    error = (symmetric_quantizer(end, 4)(row) - row).square()
    outside = row.abs() > end
    rounding.append((error * ~outside).mean().item())
    clipping.append((error * outside).mean().item())
rules = {"min-max": min_max, "percentile 99": percentile(0.99), "ACIQ, Laplace": aciq_laplace(4),
         "ACIQ, Gaussian": aciq_gaussian(4), "least error": mean_squared_error(4)}
ends = {name: max(-low.item(), high.item()) for name, rule in rules.items() for low, high in [rule(row)]}
curves(reach.tolist(), {"rounding": rounding, "clipping": clipping, "sum": [a + b for a, b in zip(rounding, clipping, strict=True)]},
       marks=ends, x_label="end of the range", y_label="mean squared error", log_y=True,
       caption="A row of MiniLM at 4 bits: a wider range clips less and rounds more. Lines: what each rule chooses.")

# %% [markdown]
# No rule sees the answers; all of them look at weights alone. *Min-max* clips nothing. A *percentile* clips a fixed
# share. *Least error* tries a hundred ends and keeps the best. **ACIQ** (Banner et al. 2018) assumes a bell of known
# shape and has a closed form. For a Laplace distribution of width $b$, clipped at $\alpha$, with $M$ bits:
#
# $$\mathrm{MSE}(\alpha) = 2 b^2 e^{-\alpha/b} + \frac{\alpha^2}{3 \cdot 4^M}$$
#
# The first term is what clipping costs, the second what rounding costs. The best $\alpha$ is a multiple of $b$ that
# depends on $M$ alone:

# %% tags=["nbval-check-output"]
from effnlp_lessons.quantization.ranges import MovingAverageRange, gaussian_clipping, laplace_clipping

bits = (2, 3, 4, 8)
print("bits                 ", "  ".join(f"{k:4}" for k in bits))
print("Laplace:  alpha / b  ", "  ".join(f"{laplace_clipping(k):.2f}" for k in bits))
print("Gaussian: alpha / std", "  ".join(f"{gaussian_clipping(k):.2f}" for k in bits))

# %% [markdown]
# For this row the Gaussian rule comes near the least error; Laplace's, which expects a longer tail, clips nothing. What
# does a rule do to the answers? The record, 4 and 3 bits:

# %% tags=["reveal"]
if reveal("quantization.granularity") is not None:
    print("% right of 2,000     " + "".join(f"{name:>13}" for name in ("min-max", "percentile", "Laplace", "Gaussian", "least error")))
    for bits in (4, 3):
        for granularity in ("tensor", "row"):
            cells = [recorded(bits, granularity, ranges=rule)["accuracy"] for rule in ("min-max", "percentile", "Laplace", "Gaussian", "least error")]
            print(f"{bits} bits, one a {granularity:7}" + "".join(f"{cell:13.1f}" for cell in cells))

# %% [markdown]
# Where one grid serves a whole matrix, clipping its outliers is worth a great deal. Where each row has its own, there
# is less left to gain.
#
# **Activations** have no fixed range: each text brings its own. During *calibration* some texts pass, and a **moving
# average** follows the ends, $m \leftarrow m + c\,(m_{batch} - m)$. The first batch sets $m$; an average that starts at
# 0 would need $1/c$ batches to arrive.

# %% tags=["nbval-check-output"]
average = MovingAverageRange(rate=0.1)
for batch in ([-1.0, 2.0], [-3.0, 2.0], [-1.0, 4.0]):
    average.update(torch.tensor(batch))
    low, high = average.bounds()
    print(f"batch {batch}: range {low:.2f} to {high:.2f}")

# %% [markdown]
# ## 5. The file: size means bytes on disk
#
# **Predict first.** Every weight of the layers is moved to the nearest of 15 levels, quantized and dequantized, and the
# model is saved as usual. Beside the float32 file, this one is (`quantization.file`: "an eighth", "a quarter", "as
# large")

# %%
my_guess = None
predict("quantization.file", my_guess)

# %% tags=["reveal"]
from copy import deepcopy

from effnlp_lessons.layers import block_linears
from effnlp_lessons.measure import bytes_on_disk

if (guess := reveal("quantization.file")) is not None:
    fake = deepcopy(teacher)
    for name in block_linears(fake):
        weight = fake.get_submodule(name).weight
        weight.data = quantize_matrix(weight, 4, 64).dequantize()
    print(f"{bytes_on_disk(fake) / bytes_on_disk(teacher):.2f} of the float32 file; your guess: {guess}")

# %% [markdown]
# <details><summary><b>After your guess</b></summary>
#
# A float32 that lies on a grid still takes 32 bits. Users of released code found exactly this: a quantized model whose
# file had not shrunk.
# </details>
#
# A code of 4 bits in a byte of its own takes 8. So codes must be **packed**: two of 4 bits in a byte, eight of 3 bits
# in three bytes.

# %% tags=["nbval-check-output"]
from effnlp_lessons.quantization.packing import load_quantized, pack_codes, pack_trits, save_quantized, unpack_codes

codes = torch.tensor([-7, 3, 0, 7, -1], dtype=torch.int8)
packed = pack_codes(codes, bits=4)
print(f"{codes.tolist()} -> {[f'{byte:08b}' for byte in packed.tolist()]}")
print("back:", unpack_codes(packed, bits=4, count=5, signed=True).tolist())
print("243 is 3 to the fifth, so five ternary codes fit in", len(pack_trits(torch.tensor([1, 0, -1, -1, 1], dtype=torch.int8))), "byte")

# %%
import tempfile
from pathlib import Path

from effnlp_lessons.quantization.post_training import quantize_embeddings

sentence = ReviewExamples(reviews.load_reviews().subset("test"), limit=8).batch(list(range(8)))[:2]
files, folder = {"float32": bytes_on_disk(teacher)}, Path(tempfile.mkdtemp())
for name, bits, granularity, embeddings in (("8 bits a row", 8, "row", None), ("4 bits in groups of 64", 4, 64, None),
                                            ("the same, embeddings 8 bits", 4, 64, 8), ("the same, embeddings 4 bits", 4, 64, 4)):
    small = quantize_linears(teacher, bits, granularity)
    small = small if embeddings is None else quantize_embeddings(small, embeddings)
    files[name] = save_quantized(small, folder / "small.safetensors")
    again = load_quantized(teacher, folder / "small.safetensors")
    with torch.inference_mode():
        equal = torch.equal(small(*sentence), again(*sentence))
    print(f"{name:28} {files[name] / 1e6:5.1f} MB, {files['float32'] / files[name]:4.1f} times smaller; same logits after loading: {equal}")

# %% [markdown]
# Eight bits in the layers make the file smaller by a third only: half of MiniLM is the token table, and it is still in
# float32. What may be taken from the table? The record, layers at 4 bits in groups of 64, affine:

# %%
for bits in (8, 4, 3):
    row = recorded(4, 64, AFFINE, embeddings=bits)
    print(f"embeddings {bits} bits: {row['bytes'] / 1e6:4.1f} MB, {row['accuracy']:.1f} % right, "
          f"{row['difference']:+.1f} to float32 (standard error {row['its standard error']:.1f})")

# %% [markdown]
# **Others do it, too.** Somebody published MiniLM-L6 in 8 bits, as an ONNX file of 22.9 MB (licence Apache-2.0). Which
# convention did they use? Compare its codes with ours: symmetric, one scale a row, divided by 127.

# %% tags=["nbval-check-output"]
from effnlp_lessons.quantization.published_int8 import agreement, published_path, read_int8_graph

published, _ = read_int8_graph(published_path())
found = [agreement(minilm.get_parameter(name), quantize_matrix(minilm.get_parameter(name), 8, "row"), theirs)
         for name, theirs in published.items()]
print(f"{len(published)} matrices, {sum(theirs.codes.numel() for theirs in published.values()):,} weights")
print(f"equal codes: {100 * min(a.equal for a in found):.2f} % in the worst matrix; largest difference: {max(a.largest for a in found)} steps")
# %% [markdown]
# ## 6. A linear layer on integers alone (Jacob et al. 2017)
#
# So far the codes were turned back into floats before each product. The file got smaller, the arithmetic did not. Now
# the product itself is done on integers. Three grids take part: input ($S_1, Z_1$), weights ($S_2, Z_2$), output
# ($S_3, Z_3$).
#
# $$r_3 = \sum_j r_1 r_2 \;\;\Longrightarrow\;\; S_3 (q_3 - Z_3) = \sum_j S_1 (q_1 - Z_1)\, S_2 (q_2 - Z_2)$$
#
# Solve for the output code. All real numbers gather in one:
#
# $$q_3 = Z_3 + M \sum_j (q_1 - Z_1)(q_2 - Z_2), \qquad M = \frac{S_1 S_2}{S_3}$$
#
# Multiply out. $N$ is the number of terms, $a_1$ the sum of the input codes of a row, $a_2$ that of the weight codes:
#
# $$\sum_j (q_1 - Z_1)(q_2 - Z_2) = \sum_j q_1 q_2 \;-\; Z_1 a_2 \;-\; Z_2 a_1 \;+\; N Z_1 Z_2$$
#
# Only the first sum needs a product per weight. With symmetric weights $Z_2 = 0$, and two terms vanish. $Z_1 a_2$ is
# known before any input comes: it is added to the bias once and for all. The bias has the scale $S_1 S_2$ and 32 bits,
# so it can be added to the sum as it is. Step by step, on small numbers:

# %% tags=["nbval-check-output"]
from effnlp_lessons.quantization.integer_only import integer_product, zero_point_product

generator = torch.Generator().manual_seed(0)
n = 6
q1 = torch.randint(-128, 128, (2, n), generator=generator, dtype=torch.int8)  # input codes, Z1 = 5
q2 = torch.randint(-127, 128, (n, 3), generator=generator, dtype=torch.int8)  # weight codes, Z2 = -3
(s1, z1), (s2, z2) = (0.02, 5), (0.01, -3)
r1, r2 = s1 * (q1.double() - z1), s2 * (q2.double() - z2)
a1, a2 = q1.sum(1, keepdim=True, dtype=torch.int32), q2.sum(0, keepdim=True, dtype=torch.int32)
direct = (q1.int() - z1) @ (q2.int() - z2)
print("r1 r2 = S1 S2 x sum of shifted codes:", torch.allclose(r1 @ r2, s1 * s2 * direct.double()))
print("multiplied out:                      ", torch.equal(direct, integer_product(q1, q2) - z1 * a2 - z2 * a1 + n * z1 * z2))
print("the library's:                       ", torch.equal(direct, zero_point_product(q1, z1, q2, z2)), direct.dtype)

# %% [markdown]
# The sums are kept in **int32**. Two codes of 8 bits make a product of 16, and thousands of those are added: with
# $127 \cdot 255$ a term, up to 66,311 terms are safe, whatever they are.
#
# ### One real number is left: $M$
#
# $M$ is known before any input comes, and it is positive. Write it as $2^{-n} M_0$ with $M_0$ in $[\frac12, 1)$, and
# store $M_0$ as the integer $\mathrm{round}(2^{31} M_0)$. Then $M$ times a sum is one integer product, of which the
# upper half is kept, and one shift.

# %% tags=["nbval-check-output"]
from effnlp_lessons.quantization.fixed_point import (
    quantize_multiplier,
    requantize,
    rounding_divide_by_pot,
    saturating_rounding_doubling_high_mul,
)

for m in (0.5, 0.3, 0.001, 0.99999999999, 1.5):
    m0, shift = quantize_multiplier(m)
    print(f"M = {m:<14} M0 = {int(m0):10} / 2^31, n = {int(shift):2}")
half = torch.tensor(2**30, dtype=torch.int32)
for x in (1, -1, 3, -3):
    x = torch.tensor(x, dtype=torch.int32)
    high, divided = saturating_rounding_doubling_high_mul(x, half), rounding_divide_by_pot(x, 1)
    print(f"{int(x):2} / 2: the product rounds to {int(high):2}, the shift to {int(divided):2}")

# %% [markdown]
# **Two roundings, two rules.** In gemmlowp, the library that the paper describes, the product takes a half *up*, the
# shift takes it *away from zero*. Neither is torch's half to even. And rounding twice is not rounding once. How often
# does it show?

# %% tags=["nbval-check-output"]
sums = torch.randint(-(2**20), 2**20, (200_000,), generator=generator, dtype=torch.int32)
for n in (1, 2, 3, 8):
    m = 2.0**-n * (0.5 + 0.5 * torch.rand(200_000, generator=generator, dtype=torch.float64))
    fixed = requantize(sums, *quantize_multiplier(m), zero_point=0, q_min=-(2**20), q_max=2**20)
    off = fixed - torch.round(sums * m).int()
    print(f"n = {n}: differs from round(M x sum) in {100 * (off != 0).float().mean():4.1f} % of the cases, by at most {off.abs().max()}")

# %% [markdown]
# It halves with each bit of the shift: the coarser the second rounding, the seldomer the first one tips it. So an
# integer engine is compared bit by bit with the integer rule, and with floats only up to one code.
#
# The last step adds $Z_3$ and clamps; a **ReLU** is a clamp that starts at $Z_3$, and costs nothing. The whole layer,
# on one of MiniLM's (with a ReLU where MiniLM has a GELU):

# %%
from effnlp_lessons.quantization.float_guard import no_floats
from effnlp_lessons.quantization.integer_only import IntegerLinear

linear = minilm.blocks[0].channel_mixer.expand
with torch.inference_mode():
    x = minilm(*sentence).hidden[0]
    y = torch.relu(linear(x))
grids = [affine_quantizer(t.min(), t.max(), bits=8, signed=True) for t in (x, y)]
layer = IntegerLinear.build(linear.weight, linear.bias, *grids, activation="relu")
x_codes = grids[0].quantize(x)
with no_floats():  # raises at the first floating number
    y_codes = layer(x_codes)
error = (grids[1].dequantize(y_codes) - y).abs()
print(f"{x_codes.dtype} -> {y_codes.dtype}; error of the output: {error.mean() / grids[1].scale:.2f} steps on average, "
      f"{error.max() / grids[1].scale:.1f} at most")

# %% [markdown]
# A norm that follows a linear layer can be **folded** into its weights before quantizing: batch norm multiplies and
# shifts each channel by fixed numbers, $w \leftarrow \gamma w / \sqrt{\sigma^2 + \epsilon}$. Then it costs nothing. A
# Transformer's layer norm cannot be folded: its mean and variance belong to each token.

# %% tags=["nbval-check-output"]
from torch import nn

from effnlp_lessons.quantization.batch_norm import fold_batch_norm

with torch.random.fork_rng():
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).double()
pair(torch.randn(64, 6, generator=generator, dtype=torch.float64))  # sets the running statistics
pair.eval()
x = torch.randn(5, 6, generator=generator, dtype=torch.float64)
print("one layer instead of two:", torch.allclose(fold_batch_norm(*pair)(x), pair(x), rtol=1e-12))

# %% [markdown]
# ## 7. The whole classifier on integers
#
# *(depth; I-BERT, Kim et al. 2021)* Softmax, GELU and layer norm need $e^x$, erf and a square root. I-BERT replaces the
# first two by polynomials of degree two, which integers can compute: with $x = S q$,
#
# $$a(x + b)^2 + c = aS^2\big[(q + q_b)^2 + q_c\big], \qquad q_b = \lfloor b/S \rfloor,\; q_c = \lfloor c/(aS^2) \rfloor$$
#
# * $e^x$ for $x \le 0$: take out powers of two, $e^x = 2^{-z} e^{p}$ with $p$ in $(-\ln 2, 0]$. A power of two is a
#   shift, and $e^p \approx 0.3585\,(p + 1.353)^2 + 0.344$.
# * $\mathrm{erf}(x) \approx \mathrm{sgn}(x)\,[-0.2888\,(\min(|x|, 1.769) - 1.769)^2 + 1]$.
# * $\sqrt n$: Newton's iteration, $x \leftarrow \lfloor (x + \lfloor n/x \rfloor)/2 \rfloor$, until it no longer falls. Exact.

# %%
from effnlp_lessons.quantization.ibert import IntegerExp, IntegerGelu, IntegerSoftmax, integer_sqrt

scale = 2.0**-12
x = torch.arange(-4, 4, 1 / 64)
gelu = IntegerGelu(scale)
integer = gelu((x / scale).int()) * gelu.output_scale
curves(x.tolist(), {"GELU": torch.nn.functional.gelu(x).tolist(), "integer GELU": integer.tolist()}, x_label="x", y_label="",
       caption=f"The polynomial's error is {(integer - torch.nn.functional.gelu(x)).abs().max():.3f} at most, near |x| = 2.5.")

# %% tags=["nbval-check-output"]
import math

exp = IntegerExp(2.0**-14)
points = torch.arange(-8, 0, 1 / 256, dtype=torch.float64)
print(f"largest error of exp: {((exp((points * 2**14).int()) * exp.output_scale) - points.exp()).abs().max():.4f}")
numbers = torch.randint(0, 2**31 - 1, (1_000,), generator=generator)
print("roots equal math.isqrt:", integer_sqrt(numbers).tolist() == [math.isqrt(n) for n in numbers.tolist()])
scores = torch.randint(-(2**14), 2**14, (4, 50), generator=generator, dtype=torch.int32)
totals = IntegerSoftmax(2.0**-12)(scores).sum(-1) / 256
print("softmax rows, 8 bits: all sums below 1:", bool((totals < 1).all()), "and above 0.9:", bool((totals > 0.9).all()))

# %% [markdown]
# The last line is no bug: each weight is rounded *down*. What reads GELU, softmax or norm gets 32 bits; what enters a
# product gets 8. The residual stream keeps 16 bits, since the small part of a sum would vanish beside the large one.
# All scales are found beforehand, on some training sentences. Then the classifier runs from token ids to logits without
# a single float:

# %%
from effnlp_lessons.quantization.integer_classifier import IntegerClassifier

train = ReviewExamples(reviews.load_reviews().subset("train"), limit=128)
batches = [train.batch(list(range(start, start + 32)))[:2] for start in range(0, 128, 32)]
integers = IntegerClassifier.from_float(teacher, batches)
with no_floats():
    logits = integers.integer_logits(*sentence)
print(f"logits: {logits.dtype}, for example {logits[0].tolist()}, one unit is {integers.output_scale:.2e}")
agree = integers(*sentence).argmax(-1) == teacher(*sentence).argmax(-1)
print(f"{int(agree.sum())} of {len(agree)} sentences get the same answer; file {bytes_on_disk(integers) / 1e6:.1f} MB")

# %% [markdown]
# What did it cost? The record, three calibrations on 256 training sentences each, all 2,000 test reviews; and what
# happens if int8 stands where I-BERT keeps 32 bits (500 reviews).

# %%
from statistics import median

from effnlp_lessons.studies.runner import load_results

runs = load_results("integer_only")["runs"]
print(f"float32 {runs[0]['real']['accuracy']:.1f} % right, integers {[round(run['integer']['accuracy'], 1) for run in runs]}, "
      f"same answer as float32 {[round(run['integer']['agreement'], 1) for run in runs]} %")
for name in runs[0]["variants"]:
    print(f"500 reviews, {name:25} {[run['variants'][name]['accuracy'] for run in runs]} % right")
bars({part: 100 * median(run["time"][part] for run in runs) for part in runs[0]["time"]}, unit="% of the time",
     caption="Where the integer-only encoder spends its time: about a third of it in products.")

# %%
seen = {}
hook = teacher.encoder.blocks[0].channel_norm.register_forward_pre_hook(lambda module, x: seen.update(x=x[0]))
with torch.inference_mode():
    teacher(*sentence)
hook.remove()
channel = seen["x"][sentence[1]].abs().amax(0)  # largest value of each channel, real tokens, before the norm of layer 1
print(f"channel {int(channel.argmax())} reaches {channel.max():.0f}, the median channel {channel.median():.1f}")
print(f"the weight of 175 standard deviations writes to channel {int(worst.abs().amax(1).argmax())}")

# %% [markdown]
# On integers alone the accuracy stays within a point of float32, on each calibration. Eight bits before softmax or GELU
# do no harm here. **Before a norm they ruin the model**: one channel of the residual stream is a hundred times larger
# than the others, and on a grid that reaches it the others are rounded to nothing. It is the channel that the weight of
# 175 standard deviations writes to: outliers of weights and of activations belong together. So the stream keeps 16
# bits.
#
# And the time: two thirds go to what is not a product. Each change of scale is several passes of plain torch over the
# numbers; a kernel would do it on the way out of the product. Section 9 shows what is left of the speed. (Users of the
# released code, which holds its integers in float tensors, report that it is slower than float32: transformers #11312.)

# %% [markdown]
# ## 8. Does it get faster?
#
# Four bytes fit where one float does, and a processor with byte instructions multiplies and adds several at once. The
# product alone is `torch._int_mm`, the fastest integer product that torch offers on this CPU. But inputs come as
# floats: a layer has to find their range, round them, and turn the int32 sums back.
#
# **Predict first.** 128 tokens, 384 to 1,536, one thread. How many times as fast as float32 is the *bare* integer
# product, on this machine? (`quantization.integer_speed`)

# %%
my_guess = None
predict("quantization.integer_speed", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.measure import latencies
from effnlp_lessons.quantization.dynamic_int8 import DynamicInt8Linear

if (guess := reveal("quantization.integer_speed")) is not None:
    torch.set_num_threads(1)
    linear = minilm.blocks[0].channel_mixer.expand
    x = torch.randn(128, 384, generator=generator)
    x_codes, w_codes = (256 * torch.rand(128, 384, generator=generator) - 128).to(torch.int8), quantize_matrix(linear.weight, 8, "row").codes
    dynamic = DynamicInt8Linear(linear)
    timings = latencies({"float32": lambda: linear(x), "int8 product alone": lambda: torch._int_mm(x_codes, w_codes.t()),
                         "int8 layer, floats in and out": lambda: dynamic(x)}, runs=40)
    for name, timing in timings.items():
        print(f"{name:30} {1e6 * timing.median:7.0f} us   {timings['float32'].median / timing.median:4.1f} x as fast")
    print(f"Your guess for the product alone: {guess:g} x")
    torch.set_num_threads(2)

# %% [markdown]
# <details><summary><b>After your guess: where the rest goes</b></summary>
#
# The bare product does not find ranges, does not round, and leaves sums of int32. These steps touch each number of the
# input and the output once; the product touches each weight once a token. So the wider the layer, the less they weigh.
# Weights alone in int8 or int4, with float arithmetic, save bytes and no time: they have to be turned back first.
# </details>
#
# ## 9. The yardstick
#
# One review of 27 tokens, this machine. *4 bits* has packed weights, in the token table too, and turns them back into
# floats in each pass. *int8 layers* are the linear layers of section 8, one byte a weight, with the table in float32.
# *Integers* is section 7.

# %%
from dataclasses import replace

from effnlp_lessons.measure import cost, count_parameters, table
from effnlp_lessons.quantization.dynamic_int8 import with_dynamic_int8
from effnlp_lessons.widgets.own_models import TOKENS, keep_model, show_kept_models

inputs = torch.ones(1, TOKENS, dtype=torch.long), torch.ones(1, TOKENS, dtype=torch.bool)
four = quantize_embeddings(quantize_linears(teacher, 4, 64), 4)
models = {"float32": teacher, "4 bits, weights only": four, "int8 layers": with_dynamic_int8(teacher), "integers": integers}
costs = {name: replace(cost(model, *inputs, runs=10), parameters=count_parameters(teacher)) for name, model in models.items()}
costs["4 bits, weights only"] = replace(costs["4 bits, weights only"], bytes_on_disk=files["the same, embeddings 4 bits"])
print(table(costs))

# %% [markdown]
# The 4-bit model saves bytes and costs time. Integers alone are about as fast as float32, and not the fastest: softmax,
# GELU, norms and changes of scale are many small steps in plain torch. On a chip without float units there is no other
# way; on this CPU the int8 layers are the better bargain.
#
# Your own plot: two of these models join it, measured on 200 dev reviews.

# %% tags=["reveal"]
if reveal("quantization.granularity") is not None:
    dev = ReviewExamples(reviews.load_reviews().subset("dev"), limit=200)
    macs = costs["float32"].macs
    for name in ("float32", "4 bits, weights only"):
        keep_model("03", name, accuracy=accuracy(models[name], dev), examples=200, macs=macs, bytes_on_disk=costs[name].bytes_on_disk)
    show_kept_models()

# %% [markdown]
# ## Paper and ours
#
# | | paper or released code | here |
# |---|---|---|
# | Jacob et al.: codes | uint8, one scale a matrix | int8, the same grid shifted by 128, since `_int_mm` takes int8; weights symmetric, one scale a row |
# | Jacob et al.: models | convolutions, ReLU6, batch norm folded | a Transformer; folding shown on a small network |
# | gemmlowp: multiplier | $M$ in $(0, 1)$ | $M \ge 1$ too, by a shift to the left |
# | ACIQ: grid | $2^M$ steps, each number to the middle of its step | $2^M - 1$ (affine) or $2^M - 2$ steps (symmetric), a level at 0 |
# | torch.ao: symmetric | divides by 127.5 and uses $-128$ | divides by 127, codes $-127 \dots 127$ |
# | I-BERT: integers | the released code keeps whole numbers in *float* tensors, clamps weights to $-127 \dots 126$ | int32 and int8 tensors, guarded; $-127 \dots 127$ |
# | I-BERT: symmetric | everywhere | softmax and GELU outputs have a zero point: they are hardly negative |
#
# Printed by Jacob et al.: ResNet-50 on ImageNet 76.4 in floats, 74.9 in integers; ResNet-150 78.8 and 76.7. Not
# repeated here.

# %% [markdown]
# ## Choose by cost
#
# <details><summary><b>A phone, one short message at a time.</b></summary>
#
# Bytes first: 4 bits in groups of 64 for the layers, 8 bits a row for the token table. The answers stay within a point,
# and nothing was trained. At 4 bits the table costs more than two points. Speed comes only if the phone has integer
# instructions *and* the code uses them.
# </details>
#
# <details><summary><b>A server that classifies in large batches.</b></summary>
#
# The products dominate, so int8 weights *and* int8 inputs: several times as fast in the linear layers. Measure the
# whole model: what is not a product does not get faster.
# </details>
#
# <details><summary><b>Documents of 16,000 tokens.</b></summary>
#
# Weights are a small part of the memory there; the scores are the large one. Eight bits for the scores are four times
# less, and still quadratic. Notebooks 08 to 11 change the square.
# </details>

# %% [markdown]
# ## Common mistakes
#
# * **Steps and levels.** $2^k$ levels have $2^k - 1$ steps between them.
# * **A range without 0.** Then no code is exactly zero, and padding is not nothing any more.
# * **Clip, then add.** Clamp the *code*, after the zero point was added. Clamped before, the whole range is shifted by $Z$.
# * **The wrong axis.** A weight is (out, in): "per channel" means a scale for each *row*.
# * **Half up, half even, half away.** Three rules, all in use. Bit for bit means: the same one.
# * **Fake for real.** Floats that lie on a grid take 32 bits, and are multiplied as floats.
# * **Only the layers.** In a small model the token table is half of the file.
# * **Comparing a sum with 1.** Integer softmax rounds down; its rows sum to a little less.

# %% [markdown]
# ## Quiz
#
# **1. A weight matrix has one weight of 7.9, all others are below 0.5. One grid, 4 bits. What becomes of the others?**
# <details><summary>They are rounded to 0</summary>Yes. A step is 7.9 / 7 = 1.13, and what is below half a step becomes 0.</details>
# <details><summary>They keep about three bits</summary>No. Fifteen levels lie between -7.9 and 7.9; only the one at 0 is near them.</details>
# <details><summary>They are clipped</summary>No. Nothing lies outside the range. That is the trouble.</details><br>
#
# **2. One bit more for each weight changes the mean squared rounding error to**
# <details><summary>a half</summary>No. The step is halved, and the error goes with its square.</details>
# <details><summary>a quarter</summary>Yes. Half the step, a quarter of its square: 6.02 dB less.</details>
# <details><summary>an eighth</summary>No. That would be a bit and a half.</details><br>
#
# **3. Why are weights often symmetric and activations often affine?**
# <details><summary>With $Z_2 = 0$ two terms of the product vanish</summary>Yes. And weights lie about evenly around 0, while activations after a ReLU or GELU do not.</details>
# <details><summary>Symmetric grids are more precise</summary>No. They give one code away, and more where the range is lopsided.</details>
# <details><summary>Zero points cannot be stored for weights</summary>No. They can; it costs bytes and a sum over the input codes.</details><br>
#
# **4. A 4-bit model file is as large as the float32 one. Most likely**
# <details><summary>the scales take the space</summary>No. One float for 64 weights is half a bit a weight.</details>
# <details><summary>the codes were turned back into floats before saving</summary>Yes. Fake quantization. Pack the codes.</details>
# <details><summary>4 bits cannot be stored</summary>No. Two of them are one byte.</details><br>
#
# **5. An integer linear layer differs from the rounded float result by one code, here and there. This is**
# <details><summary>a bug in the zero points</summary>No. That would be off by more, and everywhere.</details>
# <details><summary>the double rounding of the fixed-point product</summary>Yes. It rounds twice. Compare with the integer rule bit by bit.</details>
# <details><summary>an overflow of int32</summary>No. An overflow is off by billions.</details><br>

# %% [markdown]
# ## Where next
#
# The homework is `homework/03_quantization.ipynb`. Below 4 bits, rounding a finished model is not enough. Notebook 04
# trains it while it is rounded.
#
# ## References
#
# * Banner, Nahshan, Hoffer, Soudry 2018. *ACIQ: Analytical Clipping for Integer Quantization of Neural Networks.* arXiv 1810.05723.
# * Jacob et al. 2017. *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference.* arXiv 1712.05877.
# * Kim et al. 2021. *I-BERT: Integer-only BERT Quantization.* arXiv 2101.01321.
# * Lloyd 1982. *Least Squares Quantization in PCM.* IEEE Transactions on Information Theory 28(2).
# * Wang et al. 2020. *MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers.* arXiv 2002.10957.
