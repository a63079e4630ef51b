# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # Attention that accumulates, and attention that remembers
#
# A model that writes looks back at every step, and the longer its text, the longer each look takes. This notebook has two ways out. The first replaces the
# softmax, so that the past fits into one matrix of fixed size. The second keeps the softmax over a short stretch, and carries a memory from stretch to stretch.
#
# **Lecture topic:** Efficient attention, linear attention and recurrence. **Reading:** 60 minutes. **Running:** about 25
# seconds on two cores, no GPU, no network.
#
# **You need:** notebook 08. Notebook 09 helps. Parts marked *depth* can wait.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. derive linear attention line by line, and say which line the exponential breaks;
# 2. compute its causal form in three ways, and choose one for training and one for writing;
# 3. compare the cost of a generated token fairly, against a KV cache;
# 4. carry a memory over segments with relative positions, and stop its gradient;
# 5. test what a memory remembers, with a task that needs it.
#
# **Two questions from earlier notebooks.** Answer, then open.
#
# <details><summary>A stack of six layers with windows of 100 to each side: how far can it look?</summary>
#
# 600 tokens to each side. Each layer adds one window (notebook 08).
# </details>
# <details><summary>What does "causal in the gradient only" mean?</summary>
#
# No later token enters an earlier softmax, but later tokens change which earlier ones do (notebook 09, hashing).
# </details>

# %% [markdown]
# ## 1. The past as a list
#
# How does a Transformer write its 1,001st token? It has kept the keys and values of the first 1,000, the **KV cache**, and compares the new query with each. So
# part of a token's time is in proportion to the text so far, and the cache grows with it.

# %% tags=["nbval-check-output"]
import torch

from effnlp_lessons.transformer import Decoder, TransformerConfig

config = TransformerConfig(vocab_size=100, max_length=4_096, d_model=256, layers=6, heads=4, d_ff=512, segments=0, norm_first=True, dropout=0.0)
writer = Decoder(config).eval()
for length in (256, 1_024):
    with torch.inference_mode():
        state = writer(torch.zeros(1, length, dtype=torch.long)).state
    kept = sum(part.numel() * part.element_size() for layer in state.layers for part in layer)
    print(f"after {length:5,} tokens the cache holds {kept / 2**20:.0f} MiB")

# %% [markdown]
# Could the past be kept in a fixed number of bytes?
#
# ## 2. Linear attention, line by line (Katharopoulos et al. 2020)
#
# Attention for query $i$ is a weighted mean of values. Write the weight as a similarity of query and key.
#
# $$\begin{aligned}
# (1)\quad & o_i = \frac{\sum_j \exp(q_i \cdot k_j)\, v_j}{\sum_j \exp(q_i \cdot k_j)} && \text{softmax}\\
# (2)\quad & o_i = \frac{\sum_j \text{sim}(q_i, k_j)\, v_j}{\sum_j \text{sim}(q_i, k_j)} && \text{name the similarity}\\
# (3)\quad & \text{sim}(q, k) = \phi(q) \cdot \phi(k) && \text{let it factorise}\\
# (4)\quad & o_i = \frac{\sum_j \phi(q_i)^\top \phi(k_j)\, v_j^\top}{\sum_j \phi(q_i)^\top \phi(k_j)} && \text{substitute}\\
# (5)\quad & o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j)\, v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)} && \text{pull } \phi(q_i) \text{ out}\\
# (6)\quad & O = \phi(Q)\left(\phi(K)^\top V\right) \oslash \phi(Q)\left(\phi(K)^\top \mathbf 1\right) && \text{as matrices}\\
# (7)\quad & S_i = S_{i-1} + \phi(k_i) v_i^\top, \quad z_i = z_{i-1} + \phi(k_i) && \text{causal: running sums}
# \end{aligned}$$
#
# In line 5 both sums have lost the query. They are computed **once**, for all queries. Without the divisor in line 6 the weights do not
# sum to 1. The paper takes $\phi(x) = \text{elu}(x) + 1$, which is always positive.
#
# **Predict first.** Which line does $\exp(q \cdot k)$ break? (`recurrent.line`, a number from 1 to 7)

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("recurrent.line", my_guess)

# %% tags=["reveal"]
if (guess := reveal("recurrent.line")) is not None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 200, 4, generator=generator, dtype=torch.float64)
    for name, similarity in (("exp(q.k)", (q @ k.T).exp()), ("phi(q).phi(k)", (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).T)):
        print(f"{name:14} 200 x 200 similarities of vectors with 4 channels have rank {torch.linalg.matrix_rank(similarity)}")
    print("Your guess: line", guess)

# %% [markdown]
# <details><summary><b>After your guess: why that line</b></summary>
#
# Line 3. A product $\phi(q) \cdot \phi(k)$ with $d$ features makes tables of rank $d$ at most. The exponential's table has a much higher rank: no finite $\phi$ gives it
# exactly. (Infinitely many features would. Section 6 takes a random sample of them.) All other lines are algebra and hold for every similarity that factorises.
# </details>
#
# Lines 1 to 6 are also a check on small numbers; line 7 follows in section 3.

# %% tags=["nbval-check-output"]
from effnlp_lessons.attention.linear import feature_map, linear_attention

q, k, v = torch.randn(3, 1, 2, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
powers = (q @ k.mT).exp()
line2 = (powers @ v) / powers.sum(-1, keepdim=True)
similarity = feature_map(q) @ feature_map(k).mT  # line 3
line4 = (similarity @ v) / similarity.sum(-1, keepdim=True)
sums, normaliser = feature_map(k).mT @ v, feature_map(k).sum(-2)  # made once, without a query
line5 = torch.stack([(x[..., None, :] @ sums)[..., 0, :] / (x * normaliser).sum(-1, keepdim=True) for x in feature_map(q).unbind(-2)], -2)
line6 = feature_map(q) @ (feature_map(k).mT @ v) / (feature_map(q) @ feature_map(k).sum(-2, keepdim=True).mT)
print("line 2 with exp is line 1:", torch.allclose(line2, (q @ k.mT).softmax(-1) @ v, atol=1e-10))
print("weights sum to 1:", torch.allclose((similarity / similarity.sum(-1, keepdim=True)).sum(-1), torch.ones(1, 2, 7, dtype=torch.float64)))
print("lines 4, 5 and 6 agree:", torch.allclose(line4, line5, atol=1e-10) and torch.allclose(line4, line6, atol=1e-10))
print("and the library: ", torch.allclose(linear_attention(q, k, v), line6, atol=1e-5))

# %% [markdown]
# Once $\phi$ has replaced exp, only the order of two products changes, $(QK^\top)V$ to $Q(K^\top V)$. That makes $n^2 d$ into $n d^2$.

# %% tags=["nbval-check-output"]
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.measure import count_macs

for n in (64, 512, 4_096):
    x = torch.zeros(3, 1, 1, n, 64).unbind()
    print(f"{n:5} tokens, 64 channels: dense {count_macs(dense_attention, *x).total / 1e6:8.1f} M MACs, "
          f"linear {count_macs(linear_attention, *x).total / 1e6:6.1f} M")

# %% [markdown]
# ## 3. The causal form, three ways
#
# Line 7 can be computed
#
# * **all at once**: the $n \times n$ table with the future cut off. Exact, and what we wanted to avoid;
# * **as a recurrence**: one token after another. Right for writing; a training text would need $n$ steps in a row;
# * **in chunks**: inside a chunk of 64 tokens as a table, between chunks by the state. Right for training.

# %%
from effnlp_lessons.attention.linear import causal_linear_attention, linear_step
from effnlp_lessons.widgets.page import show_source

show_source(linear_step)

# %% tags=["nbval-check-output"]
q, k, v = torch.randn(3, 1, 2, 101, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
similarity = (feature_map(q) @ feature_map(k).mT).tril()
at_once = (similarity @ v) / similarity.sum(-1, keepdim=True)
chunked = causal_linear_attention(q, k, v, chunk=16)
state, steps = None, []
for i in range(101):
    out, state = linear_step(q[:, :, i : i + 1], k[:, :, i : i + 1], v[:, :, i : i + 1], state)
    steps.append(out)
print("chunks = all at once:    ", torch.allclose(chunked, at_once, atol=1e-6))
print("recurrence = all at once:", torch.allclose(torch.cat(steps, dim=2), at_once, atol=1e-6))
print("state after 101 tokens:", tuple(state.sums.shape), "and", tuple(state.normaliser.shape))

# %% [markdown]
# **The backward pass by hand.** If autograd recorded the recurrence, it would keep one state per token: $n \cdot d \cdot d$ numbers. But the gradient has the same form as the
# forward pass: $S_i$ again for the queries, and for keys and values a sum that runs *backwards*, $U_i = \sum_{j \ge i} q_j g_j^\top$.

# %%
from effnlp_lessons.attention.linear import CausalProduct

show_source(CausalProduct)

# %% tags=["nbval-check-output"]
from effnlp_lessons.attention.guard import largest_storage

x = torch.randn(3, 1, 4, 1_024, 32).unbind()
largest = largest_storage(causal_linear_attention, *x)
print("gradient checked against differences:", torch.autograd.gradcheck(lambda a: causal_linear_attention(a, a, a, chunk=4),
                                                                       torch.randn(1, 1, 9, 3, dtype=torch.float64, requires_grad=True)))
print("makes a table of all scores:", largest >= 4 * 1_024**2)
print("makes one tensor of a state for every token:", largest >= 4 * 1_024 * 32 * 32)

# %% [markdown]
# ## 4. What the state holds
#
# The state is a picture: rows are features of keys, columns are channels of values. Each token adds one outer product. Nothing is ever taken out, and all tokens lie on top of each
# other. Step through a text. Watch the weights of linear attention beside those of softmax: the first are much flatter.

# %%
from effnlp_lessons.widgets.linear_state_explorer import LinearStateExplorer

LinearStateExplorer()

# %% [markdown]
# $d$ features can keep at most $d$ keys apart. And $\text{elu}+1$ grows only linearly, so a sharp peak needs much larger vectors than with exp. (The heads shown were trained with the softmax.)
#
# ## 5. The price of a token
#
# **Predict first.** One layer, 4 heads of 64 channels, 8,192 tokens written so far. How many times as fast is the next token with the state as with a **KV cache**? (`recurrent.token`, times as fast)

# %%
my_guess = None
predict("recurrent.token", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.studies import generation_cost
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.widgets.page import lines

if (guess := reveal("recurrent.token")) is not None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    live = generation_cost.run({"lengths": [512, 8_192], "runs": 3}, seed=0).numbers
    torch.set_num_threads(threads)
    print("one more token, microseconds, your machine, one thread")
    print(f"{'':34}" + "".join(f"{n:10,}" for n in live["lengths"]) + "   bytes kept")
    for form, times in live["token"].items():
        kept = live["bytes"].get(form)
        print(f"{form:34}" + "".join(f"{1e6 * median:10,.0f}" for median, *_ in times) + (f"{kept[-1]:13,}" if kept else ""))
    print(f"Your guess for 8,192 tokens: {guess:g} times")

# %% tags=["reveal"]
if reveal("recurrent.token") is not None:
    recorded = load_results("generation_cost")
    lengths = recorded["runs"][0]["lengths"]
    lines(lengths, {form: [[1e6 * times[0] for times in run["token"][form]] for run in recorded["runs"]] for form in recorded["runs"][0]["token"]},
          x_label="tokens so far", y_label="microseconds for one more",
          caption="Recorded (`generation_cost`), one layer of 4 heads of 64 channels, one thread. The state does the same work at each length; its line rises by about a third, its size not at all. The cache's line is flat at first, where the projections cost more "
          "than the keys, and then grows.")
    whole = generation_cost.seconds_of(recorded, "whole")
    at = lengths.index(4_096)
    print(f"a whole text of 4,096 tokens, causal: linear takes {whole[generation_cost.CAUSAL_LINEAR][at] / whole[generation_cost.CAUSAL_SOFTMAX][at]:.2f} of the fused softmax's time")

# %% [markdown]
# <details><summary><b>After your guess: a fair opponent</b></summary>
#
# The paper's headline numbers, 317 and 4,462 times as many pictures a second, are against a softmax model that computes all earlier tokens again at every step. Nobody writes that way. Against a KV cache the state is *slower* for short texts: the figure shows where
# the lines cross. At 8,192 tokens it is some 5 to 6 times as fast, and the gap grows, since one of the two keeps more and more.
# </details>
#
# ## 6. Depth: random features for the softmax itself (Choromanski et al. 2020)
#
# Infinitely many features give the exponential exactly: $e^{q \cdot k} = \mathbb{E}_w\!\left[e^{w \cdot q - |q|^2/2}\, e^{w \cdot k - |k|^2/2}\right]$ with $w \sim N(0, I)$. **Performer** (FAVOR+) draws a few hundred of
# them, orthogonal to each other.

# %%
from effnlp_lessons.attention.performer import draw_projections, performer_attention

generator = torch.Generator().manual_seed(0)
q, k, v = torch.randn(3, 1, 4, 128, 32, generator=generator)
q, k = 0.7 * q, 0.7 * k  # scores of moderate size: the estimate's variance grows with their exponential
exact = dense_attention(q, k, v)
plain = linear_attention(q, k, v)
print(f"error of elu + 1: {(plain - exact).norm() / exact.norm():.2f}")
for features in (32, 128, 512, 2_048):
    errors = []
    for _ in range(5):
        estimate = performer_attention(q, k, v, projections=draw_projections(features, 32, generator))
        errors.append(((estimate - exact).norm() / exact.norm()).item())
    print(f"{features:5} random features: error {min(errors):.2f} to {max(errors):.2f}")

# %% [markdown]
# The error falls with the number of features, slowly. An error of 1 is that of answering zero. $\phi = \text{elu}+1$ does not try to approximate the softmax at all: the model is trained with it.
#
# ## 7. A memory of the last segment (Dai et al. 2019)
#
# Now the second way. Cut the text into **segments** of $n$ tokens. Without memory, the first token of a segment knows nothing. **Transformer-XL** keeps, for each layer, the *inputs* of the last $M$ tokens, and
# lets the new segment attend to them:
#
# $$\tilde h = [\,\text{stop-gradient}(m)\,;\,h\,], \qquad q = h W_q, \quad k, v = \tilde h W_k,\ \tilde h W_v$$
#
# Nothing flows back into the memory: that would mean to train through the whole past. Forward, layer upon layer, knowledge still travels $M$ tokens a layer.
#
# **Positions must be relative.** Position 3 of this segment and position 3 of the last are not the same place. So the score depends on the distance $i-j$:
#
# $$A_{ij} = (q_i + u)\cdot k_j + (q_i + v)\cdot W_R\, r_{i-j}$$
#
# $r_p$ is a sinusoid, $u$ and $v$ are learned vectors of the layer (this $v$ is not a value): "how much does this key interest anyone?" and "how much does this distance?".

# %%
from effnlp_lessons.attention.transformer_xl import TransformerXLAttention, relative_shift

show_source(relative_shift)

# %% [markdown]
# The second product needs the key's distance, not the key. So compute it for each query and all distances, and *shift* each row to the left: the last by nothing, each earlier one by one place more. The shift costs no index table: pad one column, read the same memory with another
# row length.

# %% tags=["nbval-check-output"]
distances = torch.arange(6).flip(0).expand(4, 6)  # four queries, two tokens of memory: distances 5 .. 0
print(relative_shift(distances[None, None].clone())[0, 0])

# %% [markdown]
# The entry for query $i$ and key $j$ is their distance, $i + 2 - j$ here. What stands right of a row's first 0 is the future: the padded zero and leftovers of the
# next row. It must be hidden.
#
# With a memory that is long enough, four segments must give exactly what one long pass gives.

# %% tags=["nbval-check-output"]
from functools import partial

small = TransformerConfig(vocab_size=50, max_length=0, d_model=32, layers=2, heads=4, d_ff=64, segments=0, norm_first=True, dropout=0.0)
tokens = torch.randint(50, (1, 32), generator=torch.Generator().manual_seed(0))


def by_segments(model, tokens, segment):
    """Logits of a decoder that reads `tokens` in segments and carries its state, and the last state."""
    state, logits = None, []
    for part in tokens.split(segment, dim=1):
        out = model(part, state=state)
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, dim=1), state


def transformer_xl(config, layer, memory_length):
    return TransformerXLAttention(config, memory_length=memory_length)


for memory in (32, 8):
    model = Decoder(small, token_mixer=partial(transformer_xl, memory_length=memory)).eval()
    whole, parts = model(tokens).logits, by_segments(model, tokens, 8)[0]
    print(f"memory of {memory:2}: four segments equal one pass: {torch.allclose(whole, parts, atol=1e-5)}")

# %% [markdown]
# ## 8. Compress instead of forgetting (Rae et al. 2019)
#
# Transformer-XL forgets what is older than $M$. The **Compressive Transformer** squeezes it: when a segment pushes old rows out of the memory, each $c$ of them become one slot of a second, *compressed* memory. Both are queues. One layer
# now looks back $M + c \cdot M_c$ tokens, at the price of $M + M_c$ keys.
#
# How to compress? Mean, maximum, a convolution, a dilated one, or keep the rows that were used most. A learned compression needs a goal. The gradient of the language model would have to travel through old segments, so it gets a loss of
# its own: **attention over the compressed rows should give what attention over the old rows gave**,
#
# $$\mathcal L = \sum_l \left\lVert \text{attn}(h, \text{old}) - \text{attn}(h, f_c(\text{old})) \right\rVert^2$$
#
# with stopped gradients at $h$, at the old rows and at the projections: only $f_c$ learns from it.

# %% tags=["nbval-check-output"]
from effnlp_lessons.attention.compressive import CompressiveAttention

torch.manual_seed(0)
mixer = lambda config, layer: CompressiveAttention(config, memory_length=8, compressed_length=8, rate=2, compression="convolution")  # noqa: E731
model = Decoder(small, token_mixer=mixer)
logits, state = by_segments(model, tokens, 8)
memory = state.layers[0]
print("memory", tuple(memory.memory.shape), "compressed", tuple(memory.compressed.shape))
for name, loss in (("the language model's loss", torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])),
                   ("the reconstruction loss", sum(layer.reconstruction_loss for layer in state.layers))):
    model.zero_grad()
    loss.backward(retain_graph=True)
    trained = {("the compression" if "compress" in n else "everything else") for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    print(f"{name} trains {', '.join(sorted(trained))}")

# %% [markdown]
# The explorer shows the queues. Move through the segments, then put a repeat at some distance: is it still in the memory, squeezed, or gone?

# %%
from effnlp_lessons.widgets.memory_explorer import MemoryExplorer

MemoryExplorer()

# %% [markdown]
# ## 9. How to see a memory
#
# Does a model remember? Loss on plain text, the usual measure, can hardly tell for a model this small. Here is the softmax model again, allowed to see only the last $c$ characters of plain Shakespeare.

# %%
from effnlp_lessons.studies import printed_twice
from effnlp_lessons.widgets.page import curves

twice = load_results("printed_twice")
plain = printed_twice.runs_of(twice, "softmax", "plain")
print("last characters seen:  ", "".join(f"{c:7}" for c in printed_twice.CONTEXTS))
for run in plain:
    print(f"seed {run['seed']}, nats a character", "".join(f"{loss:7.2f}" for loss in run["context"]))

# %% [markdown]
# From 16 characters to 128 the loss falls by a few hundredths of a nat, on every seed: the next character follows from the last few. By this measure the model looks nearly as good with 16 characters as with 128.
#
# So the study prints a passage **twice** on one page, `lag` characters apart. What is new in the first copy is known in the second, for a model that can still reach the first. Six small models of the same width and depth, the same pages
# (a quarter of them random characters), equal steps:
#
# | model | reaches back, in one layer |
# |---|---|
# | softmax | the whole page |
# | window-32 | 32 characters |
# | linear | the whole page, in one state |
# | transformer-xl | 64 characters before its segment of 32 |
# | compressive-2 | 32 characters, and 32 slots of 2: 96 |
# | compressive-4 | 32 characters, and 32 slots of 4: 160 |
#
# The last three hold **64 slots each**. They have relative positions, the others none. Relative positions add 8 % of parameters, the compression up to 35 % more, which learn only from its own loss. So that two layers learn to copy in 600 steps, every model's attention sees each character together with the three before it.
#
# The second copy begins 8 characters into its segment, and its first 8 characters do not count, since no reader can know yet what they are. So the recurrent models reach 16 characters more than the table says. Two layers could relay from further back, but to copy, a layer must
# find the place itself.
#
# **Predict first.** Which model comes closest to softmax on the second copy, in the mean over all distances? (`recurrent.copy`: "window", "linear", "transformer-xl" or "compressive")

# %%
my_guess = None
predict("recurrent.copy", my_guess)

# %% tags=["reveal"]
if (guess := reveal("recurrent.copy")) is not None:
    print("loss on the second copy after its first 8 characters, nats a character, three seeds, by distance")
    print(f"{'':16}    first copy" + "".join(f"{lag:14}" for lag in printed_twice.LAGS))
    for model in printed_twice.REACH:
        losses = [printed_twice.by_lag(twice, model, copy="first")[96], *printed_twice.by_lag(twice, model).values()]
        mean = sum(sum(own) for own in losses[1:]) / sum(len(own) for own in losses[1:])
        print(f"{model:16}" + "".join(f"  {min(own):4.2f} to {max(own):4.2f}" for own in losses) + f"   mean {mean:.2f}")
    print("Your guess:", guess)

# %% tags=["reveal"]
if reveal("recurrent.copy") is not None:
    mean_by_lag = {model: [sum(own) / len(own) for own in printed_twice.by_lag(twice, model).values()] for model in printed_twice.REACH}
    curves(printed_twice.LAGS, mean_by_lag, x_label="distance between the copies (characters)", y_label="loss on the second copy (nats)", points=True,
           caption="Recorded, mean of three seeds. A loss near the top: nothing is remembered. It jumps where a model's exact rows end, and for compressive-2 again where its slots end.")
    sizes = {model: printed_twice.runs_of(twice, model)[0]["parameters"] for model in printed_twice.REACH}
    print("parameters (of these, for the compression):", ", ".join(f"{model} {own['all']:,} ({own['compression']:,})" for model, own in sizes.items()))

# %% [markdown]
# <details><summary><b>After your guess: what each memory is good for</b></summary>
#
# * **Softmax** copies from anywhere. It was trained for 600 steps, so the copy is not perfect.
# * **The window** copies in part while the first copy is within 32 characters, and then not at all.
# * **Linear attention** reaches the whole page and gains less than a tenth of a nat over its own first copy, the same at every distance: a trace of the page, not a copy. After this training no exact place can be read out of its one state.
# * **Transformer-XL** is about as good as softmax while the first copy lies in its 64 slots, and falls off a cliff behind them.
# * **In the mean** Transformer-XL comes closest. At 96 characters compressive-2 does. Farther apart, no model but softmax copies.
# * **Compressive** has half of the slots for exact rows, and is good within these. Behind them it keeps *something*: with two characters to a slot clearly, with four a little. In the same 64 slots Transformer-XL keeps more of the last 80 characters; Compressive keeps
#   a trace of 96 or 160.
#
# So what a memory holds, and how exactly, are two questions. For an exact copy an exact slot is worth more than a compressed one. The paper's gain is on long books, where the gist helps. Six hundred steps of a tiny model cannot show that, and do not refute it.
# </details>
#
# Now in the explorer of section 8, with the recorded losses below the queues. Drag the repeat past the end of the memory.

# %% tags=["reveal"]
from IPython.display import display

if reveal("recurrent.copy") is not None:
    display(MemoryExplorer(losses={model: list(zip(printed_twice.LAGS, losses, strict=True)) for model, losses in mean_by_lag.items()},
                           length=384, segment=32, memory=32, compressed=32, rate=2, passed=6, distance=48))

# %% [markdown]
# A small live version of the same function. After so few steps nothing is copied yet: the loss is nearly the same on both copies.

# %%
live = printed_twice.run({"model": "transformer-xl", "pages": "repeats", "steps": 30, "batch": 8, "rate": 4e-3, "passages": 16}, seed=0).numbers
for lag in ("24", "96"):
    first, second = (sum(live[copy][lag]) / len(live[copy][lag]) for copy in ("first", "second"))
    print(f"distance {lag:>3}: first copy {first:.2f}, second copy {second:.2f} nats a character")

# %% [markdown]
# ## 10. The yardstick
#
# Character models of two layers, a text of 1,024 characters in one pass, untrained: the table is about cost.

# %%
from effnlp_lessons.attention.linear import LinearSelfAttention
from effnlp_lessons.attention.longformer import window_attention
from effnlp_lessons.measure import cost, table

sizes = TransformerConfig(vocab_size=100, max_length=1_024, d_model=128, layers=2, heads=4, d_ff=512, segments=0, norm_first=True, dropout=0.0)
relative = TransformerConfig(vocab_size=100, max_length=0, d_model=128, layers=2, heads=4, d_ff=512, segments=0, norm_first=True, dropout=0.0)
models = {
    "softmax": Decoder(sizes),
    "window 64": Decoder(sizes, attention=partial(window_attention, window=64, causal=True)),
    "linear": Decoder(sizes, token_mixer=lambda config, layer: LinearSelfAttention(config, causal=True)),
    "Transformer-XL 64": Decoder(relative, token_mixer=lambda config, layer: TransformerXLAttention(config, memory_length=64)),
    "Compressive 64 + 32 x 4": Decoder(relative, token_mixer=lambda config, layer: CompressiveAttention(
        config, memory_length=64, compressed_length=32, rate=4, compression="convolution")),
}


class Reader(torch.nn.Module):
    """A decoder that reads a text whole, or in segments if its memory asks for it."""

    def __init__(self, model, segment):
        super().__init__()
        self.model, self.segment = model, segment

    def forward(self, tokens):
        return by_segments(self.model, tokens, self.segment)[0]


text = torch.zeros(1, 1_024, dtype=torch.long)
segments = {name: 64 if name[0] in "TC" else 1_024 for name in models}
print(table({name: cost(Reader(model, segments[name]).eval(), text, runs=3) for name, model in models.items()}))

# %% [markdown]
# All but the first avoid the large table, which softmax writes out here (notebook 11's fused softmax does not). The last two read the text in 16 segments. Compressive's row includes its reconstruction loss, which only training needs. Models without a table of
# positions have fewer parameters. What the table does not show is what a model can still find.
#
# ## Paper and ours
#
# | method | paper or released code | here |
# |---|---|---|
# | linear attention | $\phi(x) = \text{elu}(x)+1$, no $1/\sqrt d$ | the same |
# | linear attention | causal product in C++ and CUDA | chunks of 64 in PyTorch, the same hand-written gradient |
# | Performer | projections drawn anew now and then | an argument; the caller draws them |
# | Transformer-XL | one $u$ and $v$ for all layers in the released code | one per layer, as in XLNet |
# | Transformer-XL | norm after each sum | our Transformer's `norm_first` decides |
# | Compressive | five compressions; the loss is a sum of squares | the same five; the loss is a mean of squares |
#
# Transformer-XL's attention equals transformers' XLNet, read in one direction. Printed by Rae et al. 2019 for enwik8, bits per character, attention reconstruction with a convolution: 0.97 for the best model, against 0.99 for
# Transformer-XL. Printed by Katharopoulos et al. 2020 for pictures of digits: 0.644 bits per dimension with linear attention, 0.621 with softmax. Our own numbers are about tiny models of two layers and one task: see section 9.
#
# ## Choose by cost
#
# <details><summary><b>A phone that writes short answers.</b></summary>
#
# Softmax with a KV cache. At a few hundred tokens the cache is small, and nothing is lost.
# </details>
#
# <details><summary><b>A server that continues thousands of long chats at once.</b></summary>
#
# Memory decides: each chat's cache. A state of fixed size serves more chats, if the task does not need exact copies. A window with a memory lies between.
# </details>
#
# <details><summary><b>A document of 16,000 tokens, read once, with questions about details.</b></summary>
#
# Details need exact keys. Keep the softmax (notebook 11), or choose pairs (notebook 09). A compressed memory keeps the gist.
# </details>
#
# ## Common mistakes
#
# * **The forgotten normaliser.** Without the divisor the output grows with the length of the text.
# * **A prefix sum that sees the present twice**, or begins one token late. Compare with the table cut by `tril`.
# * **A mask added to the non-causal form.** The sums have already mixed the future in.
# * **Speed against recomputation.** Compare with a KV cache.
# * **Absolute positions with a memory.** Position 3 then means two places.
# * **The shift off by one.** Then each key gets its neighbour's distance, and training hides it. Test with explicit indices.
# * **Memory of the outputs of a layer.** It must hold its *inputs*.
# * **A gradient into the memory.** It costs as much as one long text, and trains the compression for another goal.
#
# ## Quiz
#
# **1. Which step turns n² d into n d²?**
# <details><summary>elu + 1 in place of exp</summary>No. It makes the step possible, and changes no count by itself.</details>
# <details><summary>multiplying keys and values first</summary>Yes. The product does not contain the query, so it is made once.</details>
# <details><summary>dropping the normaliser</summary>No. It is needed, and costs n d.</details><br>
#
# **2. A long text gets twice as long. Per generated token, linear attention and a KV cache take**
# <details><summary>the same, and twice the time</summary>Yes. One state of fixed size, against a list that has doubled.</details>
# <details><summary>both twice the time</summary>No. The state does not grow.</details>
# <details><summary>twice and four times</summary>No. Four times holds for a whole text, not for a token.</details><br>
#
# **3. Transformer-XL, memory of 100, six layers. Information can travel back from the current segment about**
# <details><summary>100 tokens</summary>No. That is one layer.</details>
# <details><summary>600 tokens</summary>Yes. Each layer's memory was made with the memory of the layer below.</details>
# <details><summary>without limit</summary>No. Each layer adds one memory.</details><br>
#
# **4. The reconstruction loss trains**
# <details><summary>the compression and the projections</summary>No. Then keys would be bent to be easy to compress.</details>
# <details><summary>all parameters</summary>No. The rest of the model learns from the language model's loss.</details>
# <details><summary>the compression only</summary>Yes. All else is behind a stopped gradient.</details><br>
#
# **5. A model's loss on plain text hardly changes when its context is cut to 16 characters. So**
# <details><summary>it has no memory</summary>Not shown. The measure cannot see a memory.</details>
# <details><summary>this text, by this measure, cannot tell memories apart</summary>Yes, for this model. Most of what it predicts follows from the last few characters. Use a task that needs the memory.</details>
# <details><summary>longer contexts are useless</summary>No. On the second copy of a passage they decide everything.</details>
#
# ## Where next
#
# The homework is `homework/10_linear_and_recurrent.ipynb`. Notebook 11 keeps the exact softmax and all pairs, and saves the traffic instead. Notebook 13 returns to a state of
# fixed size, and asks how to choose what it forgets.
#
# ## References
#
# * Choromanski et al. 2020. *Rethinking Attention with Performers.* arXiv 2009.14794.
# * Dai et al. 2019. *Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context.* arXiv 1901.02860.
# * Katharopoulos et al. 2020. *Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention.* arXiv 2006.16236.
# * Rae et al. 2019. *Compressive Transformers for Long-Range Sequence Modelling.* arXiv 1911.05507.
# * Yang et al. 2019. *XLNet: Generalized Autoregressive Pretraining for Language Understanding.* arXiv 1906.08237.
