# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # Attention that chooses its pairs, or shortens its keys
#
# Notebook 08 left pairs out before it saw the text. Here the text decides: tokens with similar vectors meet, the others do
# not. Then come two other ideas: make fewer keys out of many, and give up the comparison of queries and keys.
#
# **Lecture topic:** Efficient attention, data-dependent patterns and compressed keys. **Reading:** 60 minutes.
# **Running:** about 35 seconds on two cores, no GPU, no network.
#
# **You need:** notebook 08. Parts marked *depth* can wait.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. hash vectors so that neighbours meet, and say how often they miss each other;
# 2. turn buckets into blocks by sorting, and join several rounds into one softmax;
# 3. test whether a method looks into the future, in its output and in its gradient;
# 4. shorten keys by convolution, pooling and projection, and count what it saves;
# 5. say for each method which part depends on the data.
#
# **Two questions from notebook 08.** Answer, then open.
#
# <details><summary>Why does a mask alone save no time?</summary>
#
# Every score is computed, and then hidden. Only products that are skipped save time.
# </details>
# <details><summary>A head's pattern captures 90 % of its mass. Is its output right?</summary>
#
# Not necessarily. In notebook 08 two columns held much mass and brought little of the output. Measure the output, too.
# </details>

# %% [markdown]
# ## 1. A few keys carry most of the weight
#
# 128 tokens of *The Winter's Tale* through MiniLM. Each query spreads its weight over 128 keys. How much of it goes to its
# eight largest?

# %%
import torch

from effnlp_lessons.attention.patterns import read_heads
from effnlp_lessons.datasets import shakespeare, tokenizer
from effnlp_lessons.pretrained import load_minilm

minilm = load_minilm()
play = shakespeare.load_text("test")
begin = play.index("A sad tale's best for winter")
token_ids = torch.tensor([tokenizer.load_tokenizer().encode(play[begin : begin + 1_000]).ids[:128]])
heads = read_heads(minilm, token_ids)
top = heads.weights.topk(8).values.sum(-1).mean(-1).flatten().sort().values
print(f"mass of the eight largest of 128 weights: median head {top[36]:.2f}, from {top[0]:.2f} to {top[-1]:.2f}")

# %% [markdown]
# In half of the heads, eight keys of 128 hold most of the mass. If we knew *which* eight, we could skip the others. But
# to know them we would have to compute all scores. So: can we find near keys without comparing all pairs?
#
# ## 2. Hashing that keeps neighbours together (Kitaev et al. 2020)
#
# Reformer's answer is **locality-sensitive hashing**. Draw a random matrix $R$ with $b/2$ columns. The **bucket** of a vector is
#
# $$h(x) = \arg\max\,[\,xR\,;\,-xR\,]$$
#
# Each column is a random direction, and its negative counts as another. A vector goes to the direction to which it points most.
# There are $b$ buckets. Only the direction of $x$ matters, not its length.

# %%
from effnlp_lessons.attention.lsh import draw_rotations, lsh_buckets
from effnlp_lessons.widgets.page import show_source

show_source(lsh_buckets)

# %% tags=["nbval-check-output"]
rotations = draw_rotations(1, 2, 8, torch.Generator().manual_seed(0))
angles = torch.arange(0, 360, 30).deg2rad()
circle = torch.stack([angles.cos(), angles.sin()], dim=-1)
buckets = lsh_buckets(circle, rotations)[0]
print("degrees:", [round(angle) for angle in angles.rad2deg().tolist()])
print("buckets:", buckets.tolist())
print("twice as long, same bucket:", torch.equal(lsh_buckets(2 * circle, rotations)[0], buckets))
print("opposite points never share one:", bool((buckets != buckets.roll(6)).all()))

# %% [markdown]
# Points next to each other often share a bucket, and sometimes a border falls between them. Turn the directions (a new seed),
# and the borders lie elsewhere. That is why Reformer hashes more than once.
#
# **Predict first.** Two vectors at an angle of about 25 degrees in 64 dimensions, 16 buckets. In one round they share a bucket in 60 of 100
# draws. In what share of draws do they not meet at all in *four* rounds? (`buckets.rounds`, in per cent)

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("buckets.rounds", my_guess)

# %% tags=["reveal"]
if (guess := reveal("buckets.rounds")) is not None:
    generator = torch.Generator().manual_seed(1)
    rotations = draw_rotations(4_000, 64, 16, generator)
    first, other = torch.linalg.qr(torch.randn(64, 2, generator=generator)).Q.T
    print("angle   meet in one round   never in four, (1 - p)^4")
    for degrees in (10, 25, 45, 60, 90):
        angle = torch.tensor(degrees).deg2rad()
        pair = torch.stack([first, angle.cos() * first + angle.sin() * other])
        one, two = lsh_buckets(pair, rotations).T
        meet = (one == two).float().mean().item()
        print(f"{degrees:5}   {meet:17.0%}   {(1 - meet) ** 4:21.1%}")
    print(f"Your guess for 25 degrees: {guess:g} %")

# %% [markdown]
# <details><summary><b>After your guess: what more rounds buy, and what they cost</b></summary>
#
# Rounds are independent, so misses multiply: $(1-p)^r$. But vectors at 90 degrees, which we did not want, meet too, in about one round of 16. More
# rounds find more neighbours and more strangers, and each round costs as much as the first.
# </details>
#
# The explorer shows both: vectors on a circle, and real keys of a head. Draw other rotations and watch neighbours fall apart;
# then add a round.

# %%
from effnlp_lessons.widgets.hash_explorer import HashExplorer

HashExplorer()

# %% [markdown]
# ## 3. From buckets to blocks
#
# Buckets have different sizes, and a GPU likes equal ones. Reformer's trick:
#
# 1. **sort** the tokens by bucket, and inside a bucket by position;
# 2. cut the sorted list into **chunks** of equal size;
# 3. each chunk attends to itself and to the **chunk before** it, since a bucket may straddle the border. (The first chunk looks at the last one, and with several rounds at the last of the round before.)
#
# For this a token must be query and key at once, so queries and keys **share** one projection, and the key is the query
# scaled to length 1: $k_j = q_j / \lVert q_j \rVert$. A token always fits best to itself, so **itself is allowed only if there is nothing else**.

# %% tags=["nbval-check-output"]
generator = torch.Generator().manual_seed(0)
qk = torch.randn(1, 1, 12, 8, generator=generator)
rotations = draw_rotations(1, 8, 4, generator)
bucket = lsh_buckets(qk, rotations)[0, 0, 0]
order = bucket.argsort(stable=True)
print("bucket of each token:", bucket.tolist())
print("sorted by bucket:    ", order.tolist())
print("chunks of four:      ", [chunk.tolist() for chunk in order.split(4)])

# %% [markdown]
# The sort must be **stable**: tokens of one bucket stay in the order of the text. If not, neighbours in the text are thrown into
# different chunks by chance, and the result depends on the sorting program.

# %%
from effnlp_lessons.attention.lsh import lsh_attention, lsh_pairs
from effnlp_lessons.widgets.page import pattern_maps

n = 64
generator = torch.Generator().manual_seed(0)
centres = torch.randn(6, 16, generator=generator)
qk = (centres[torch.arange(n) % 6] + 0.5 * torch.randn(n, 16, generator=generator))[None, None]
buckets = lsh_buckets(qk, draw_rotations(2, 16, 8, generator))
order = buckets[0, 0, 0].argsort(stable=True)
seen = {f"{rounds} round{'s' * (rounds > 1)}": lsh_pairs(buckets[:, :, :rounds], chunk=8, causal=False)[0, 0] > 0 for rounds in (1, 2)}
pattern_maps({"1 round, sorted": seen["1 round"][order][:, order], **seen},
             caption="Six kinds of tokens, one after another. Left: rows and columns in the sorted order, a band of chunks and their "
             "predecessors. Middle and right: the same in the order of the text, and with a second round.")

# %% [markdown]
# Sorted, it is a band as in notebook 08, with one block in the corner, where the first chunk looks at the last. In the order of the text it is a pattern that nobody drew.
#
# ## 4. Several rounds, one softmax
#
# Each round $r$ gives an output $o_i^{(r)}$, a weighted mean of values. How to join them? The plain mean is wrong: a round that found
# the important key must count more. Each round also reports the logarithm of its sum, $\ell_i^{(r)} = \log \sum_j e^{s_{ij}}$
# over its keys. Then
#
# $$o_i = \sum_r \frac{e^{\ell_i^{(r)}}}{\sum_{r'} e^{\ell_i^{(r')}}}\; o_i^{(r)}$$
#
# is *one* softmax over the keys of all rounds. (A key that was found twice counts twice. The option `count_duplicates=False` divides by
# the number of rounds that found it.)

# %% tags=["nbval-check-output"]
scores, values = torch.tensor([2.0, 0.0, 5.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
rounds = ((scores[:2], values[:2]), (scores[2:], values[2:]))
outputs = torch.stack([s.softmax(0) @ v for s, v in rounds])
sizes = torch.stack([s.logsumexp(0) for s, _ in rounds])
print(f"one softmax over all four: {scores.softmax(0) @ values:.4f}")
print(f"joined by log-sum-exp:     {sizes.softmax(0) @ outputs:.4f}")
print(f"plain mean of the rounds:  {outputs.mean():.4f}")

# %% [markdown]
# The definition is dense attention in which a pair that was found $N_{ij}$ times gets $\log N_{ij}$ added to its score, and
# $-\infty$ if never. The fast path must equal it. And it must not make the $n \times n$ table.

# %% tags=["nbval-check-output"]
from functools import partial

from effnlp_lessons.attention.guard import largest_storage

v = torch.randn(1, 1, n, 16, generator=generator)
found = lsh_pairs(buckets, chunk=8, causal=False)
scores = qk @ torch.nn.functional.normalize(qk, dim=-1).mT
scores.diagonal(dim1=-2, dim2=-1).sub_(1e5)  # itself only if there is nothing else
definition = (scores + found.log()).softmax(-1) @ v
fast = lsh_attention(qk, v, buckets=buckets, chunk=8)
print("equals its definition:", torch.allclose(fast, definition, atol=1e-5))
for length in (1_024, 2_048):
    x = torch.randn(2, 1, 4, length, 16)
    own = lsh_buckets(x[0], draw_rotations(2, 16, length // 32, torch.Generator().manual_seed(0)))
    share = largest_storage(partial(lsh_attention, buckets=own, chunk=64), *x) / (4 * length**2)
    print(f"{length} tokens: largest tensor {'less' if share < 0.5 else 'more'} than half of the table of all scores")

# %% [markdown]
# ## 5. Does hashed attention see the future?
#
# Reformer writes text, so it masks: a query uses only keys with $j \le i$ (positions in the text, not in the sorted list). Now
# change the tokens after position 40, and look at the outputs before.
#
# **Predict first.** How many of the 40 earlier outputs change? (`buckets.future`: "none", "a few" or "many")

# %%
my_guess = None
predict("buckets.future", my_guess)

# %% tags=["reveal"]
def causal_output(x, rotations):
    return lsh_attention(x, v, buckets=lsh_buckets(x, rotations), chunk=8, causal=True)


if (guess := reveal("buckets.future")) is not None:
    rotations = draw_rotations(2, 16, 8, torch.Generator().manual_seed(1))
    x = qk.clone().requires_grad_()
    before = causal_output(x, rotations)
    before[:, :, :40].square().sum().backward()
    changed = qk.clone()
    changed[:, :, 40:] = torch.randn(1, 1, 24, 16, generator=torch.Generator().manual_seed(2))
    after = causal_output(changed, rotations)
    moved = (before - after).abs().amax(-1)[0, 0, :40] > 0
    print(f"{int(moved.sum())} of 40 earlier outputs changed")
    print(f"largest gradient of an earlier output by a later token: {x.grad[0, 0, 40:].abs().max():g}")
    print("Your guess:", guess)

# %% [markdown]
# <details><summary><b>After your guess: how both can be true</b></summary>
#
# No later key enters an earlier softmax, so the **gradient** is exactly zero. But later tokens also stand in the sorted list, and move the
# borders of the chunks. So *which* earlier keys a query meets depends on the future. The output is not causal in the strict sense. When
# the model writes token by token, it meets another selection than it was trained with.
#
# Three kinds of causality, then: **strict** (nothing before $t$ changes when something after $t$ does), **in the gradient only** (LSH), **none**
# (further below).
# </details>
#
# ## 6. Depth: reversible layers
#
# Reformer's second idea has nothing to do with pairs. Training keeps the activations of every layer for the backward pass. A
# **reversible** layer has two streams and can compute its input from its output:
#
# $$y_1 = x_1 + f(x_2), \quad y_2 = x_2 + g(y_1) \qquad\Longleftrightarrow\qquad x_2 = y_2 - g(y_1), \quad x_1 = y_1 - f(x_2)$$
#
# So only the last output needs to be kept (with random states and buckets), and memory does not grow with depth. The price is a second forward pass. Dropout must fall on the
# same places again, and LSH must use the **same buckets**: a rounding error can flip an argmax.

# %%
from effnlp_lessons.attention.reversible import ReversibleStack, reversible_transformer
from effnlp_lessons.transformer import SelfAttention, TransformerConfig

show_source(ReversibleStack.inverse)

# %% [markdown]
# The same blocks, once as a reversible stack, once as the plain loop that autograd records. How much does each keep for the backward pass?

# %%
def kept_bytes(call):
    """Bytes of all tensors that autograd keeps for the backward pass of `call`, parameters left out."""
    kept = {}

    def note(x):
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = call()  # held until the count is done, so that no memory is used twice
    return sum(kept.values()), result


def plain(stack, x1, x2):
    for block in stack.blocks:
        x1, x2 = block(x1, x2)
    return x1, x2


# %% tags=["nbval-check-output"]
start = torch.randn(2, 1, 128, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
for depth in (2, 8):
    sizes = TransformerConfig(d_model=32, layers=depth, heads=4, d_ff=64, dropout=0.1)
    stack = reversible_transformer(sizes, token_mixer=lambda config, layer: SelfAttention(config))
    (reversible, _), (loop, _) = kept_bytes(partial(stack, *start)), kept_bytes(partial(plain, stack, *start))
    print(f"{depth} blocks: the reversible stack keeps {reversible // 1024} KiB, the plain loop {loop / reversible:.0f} times as much")
stack.eval()
with torch.no_grad():
    found = stack.inverse(*stack(*start))
print("the input computed from the output:", all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, start, strict=True)))

# %% [markdown]
# ## 7. Clusters that learn (Roy et al. 2020)
#
# Random directions know nothing about the keys. The **Routing Transformer** learns its directions: $k$ **centroids** per head, moved
# by spherical k-means while the model trains.
#
# 1. Scale each query and key to mean 0 and variance 1 (a layer norm without weights).
# 2. Each **centroid takes its $w$ nearest tokens**. Not each token its centroid: that would make unequal clusters.
# 3. Sort each cluster's tokens by time, and let them attend to each other.
# 4. A token in several clusters gets the mean of its outputs. A token in none gets zeros.
# 5. Move each centroid a little towards the tokens nearest to it (a moving average, no gradient).

# %%
from effnlp_lessons.attention.routing import routing_attention

show_source(routing_attention)

# %% [markdown]
# With $k \approx \sqrt n$ clusters of $n/k$ tokens, that is $n\sqrt n$ pairs. Half of the heads stay local, as in notebook 08: what no centroid
# picks is not lost.
#
# Is it causal? Inside a cluster, yes. But a centroid takes its *nearest* tokens of the **whole** text, and a later token
# can push an earlier one out. So the choice looks into the future, as with LSH. The same test:

# %% tags=["nbval-check-output"]
centroids = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
route = partial(routing_attention, centroids=centroids, window=16, causal=True)
x = qk.clone().requires_grad_()
before = route(x, x, v)
before[:, :, :40].square().sum().backward()
later = torch.cat([qk[:, :, :40], 3 * qk[:, :, 40:].flip(-1)], dim=2)
after = route(later, later, v)
print("gradient of earlier outputs by later tokens is zero:", bool(x.grad[:, :, 40:].abs().max() == 0))
print("earlier outputs change all the same:", bool((before - after)[:, :, :40].abs().max() > 0))

# %% [markdown]
# ## 8. Real heads: what is found, and what it costs
#
# MiniLM's heads were not trained for hashing: a query and its best key need not point the same way. Two facts help to be fair. Only
# directions count for the hash. And subtracting the mean key from all keys changes no attention weight: every score of a query
# moves by the same amount, and softmax does not see it. For the hash it changes much.

# %% tags=["nbval-check-output"]
q, k = torch.randn(2, 1, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
print("same weights with centred keys:", torch.allclose((q @ k.mT).softmax(-1), (q @ (k - k.mean(-2, keepdim=True)).mT).softmax(-1)))

# %% [markdown]
# **Recorded study** (`key_recall`, 72 heads, passages of 512 tokens, three seeds): which share of the eight largest weights of each query, and of all its weight, do buckets and clusters find? Beside each, as many
# pairs chosen in three other ways: at random, the nearest in the text, and the best possible.

# %%
from effnlp_lessons.studies import key_recall
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.widgets.page import dots

recall = load_results("key_recall")["runs"]
for centre in ("nothing", "keys", "both"):
    rows = key_recall.over_seeds(recall, centre)
    print(f"centred: {centre}")
    print(f"  {'':22}   pairs    work |   mass  random  window    best | of the top 8")
    for name in ("16 buckets, 1 round", "16 buckets, 2 rounds", "16 buckets, 4 rounds", "16 buckets, 8 rounds", "4 clusters", "16 clusters"):
        row = rows[name]
        print(f"  {name:22}  {row['pairs']:6.1%}  {row['work']:6.1%} |  {row['found'][0]:5.2f}   {row['random'][0]:5.2f}   {row['window'][0]:5.2f}"
              f"   {row['best'][0]:5.2f} | {row['found'][1]:6.2f}")

# %%
chosen = {name: row for name, row in key_recall.over_seeds(recall, "keys").items() if name.startswith("16 b") or "clusters" in name}
dots({name: {"mass found": (row["found"][0], row["low"][0], row["high"][0]),
             "of the top 8 keys": (row["found"][1], row["low"][1], row["high"][1]),
             "pairs found, share of all": (row["pairs"],) * 3} for name, row in chosen.items()},
     caption="Keys centred. A dot is the mean over the 72 heads and three seeds, a bar reaches from the lower to the upper quartile of the heads. "
     "More rounds find more, and more pairs that nobody asked for.")

# %% [markdown]
# *Pairs* is what is found, *work* what is computed to find it, both as shares of all pairs. Read the table slowly.
#
# * Four rounds of 16 buckets, nothing centred, find 2.5 times as much as chance. But **a plain window of as many pairs finds just as much** (more at one or two rounds, less at eight), and the best choice far more.
# * Centring the keys makes buckets fuller: more is found, and more is paid. Against a window of equal size it wins from four rounds on, and loses with one or two. Centring the queries as well, which softmax would not forgive, does not help.
# * Clusters look at the vectors before they choose. 16 small clusters do best per pair: nearly half of the top eight keys with 6 % of the pairs, though in mass no more than a window. Four large clusters are no better than buckets.
#
# These heads were trained dense, with separate queries and keys. Reformer and Routing *train* with shared vectors and with their own choice of pairs, so that what belongs together learns to meet. The numbers say what one gets
# without that training: not enough.
#
# A small live version of the same function, one passage of 128 tokens:

# %%
live = key_recall.run({"length": 128, "passages": 1, "tops": [8], "buckets": [16], "rounds": [1, 2, 4], "clusters": [8]}, seed=0).numbers
for name, row in live["results"]["keys"].items():
    print(f"{name:22} pairs {row['pairs']:5.1%}, mass {row['found'][0]:.2f} (at random {row['random'][0]:.2f}), of the top 8 {row['found'][1]:.2f}")

# %% [markdown]
# ## 9. A task that needs one exact key
#
# Reformer's own test. A word $w$ of random symbols is written twice, `0 w 0 w`. To write the second copy, a model must find the one right place
# in the first.
#
# **Recorded study** (`duplication`: words of 63 symbols of 32 kinds, a model of one layer with two heads, five seeds). Rows: rounds of hashing in training. Columns: rounds in the test. The weights in a row are the same.

# %%
from effnlp_lessons.studies import duplication

copied = duplication.table(load_results("duplication"))
print("symbols of the second copy right, mean of five seeds (smallest to largest)")
print(f"{'trained with':14}" + "".join(f"{str(tested):>22}" for tested in duplication.TESTED))
for trained, row in copied.items():
    cells = "".join(f"{mean:6.1%} ({low:.0%} to {high:.0%})".rjust(22) for mean, low, high in row.values())
    print(f"{str(trained):14}{cells}")

# %% [markdown]
# Tested with eight rounds, everyone copies. With one round in the test the model that was trained with full attention loses most: it never had to make itself easy to find. Those trained with hashing lose less on average, though one of five one-round models is no better. For
# tests with few rounds this is the direction of the paper's table (printed in *Paper and ours*). Two things differ: there, models trained with hashes fail when they are tested with full attention, ours do not; and there more rounds in training help, here four, two and one are alike.
#
# **A word of caution.** The sizes were chosen after others had been tried, one or two seeds each, not recorded. With one head instead of two the order turned round, and with words of 127 symbols it was mixed. So the table shows that training with hashes *can* help a
# test with few rounds, not that it always does.
#
# A small live version: words of 15 symbols, 200 steps, with two rounds.

# %%
live = duplication.run(duplication.LIVE | {"hashes": 2}, seed=0).numbers
print("trained with 2 rounds, tested with", ", ".join(f"{tested}: {share:.0%}" for tested, share in live["accuracy"].items()))

# %% [markdown]
# ## 10. Shorter keys by convolution (Liu et al. 2018)
#
# Now another idea: keep all queries, and make *fewer keys*. **Memory-compressed attention** runs a convolution with kernel 3 and
# stride 3 over keys and values. Three tokens become one slot. The learned convolution can be replaced by a mean or a maximum: that is **pooling**.

# %%
from dataclasses import replace

from effnlp_lessons.attention.memory_compressed import MemoryCompressedAttention
from effnlp_lessons.measure import count_macs
from effnlp_lessons.transformer import Encoder

show_source(MemoryCompressedAttention.forward)

# %% [markdown]
# The pairs become $n \cdot n/3$: a third, and still quadratic. (The counts below include the convolution, which grows with $n$ alone.)
#
# A model that writes needs care. Slot $m$ summarises tokens $3m-3$ to $3m-1$, so a query may see it only when all three are past. Then
# the first queries have no slot at all: the released code gives them the first token.

# %% tags=["nbval-check-output"]
small = TransformerConfig(vocab_size=50, max_length=600, d_model=32, layers=1, heads=4, d_ff=64, segments=0, dropout=0.0)
mixer = MemoryCompressedAttention(small, factor=3, visible="strict").eval()
x = torch.randn(1, 60, 32, generator=torch.Generator().manual_seed(0))
changed = x.clone()
changed[:, 40:] += 1
with torch.inference_mode():
    before, after = mixer(x)[0], mixer(changed)[0]
print("outputs before token 40 stay, to the bit:", torch.equal(before[:, :40], after[:, :40]))
for length in (150, 300, 600):
    scores = "attention scores and mixing"
    ids = torch.zeros(1, length, dtype=torch.long)
    full = count_macs(Encoder(small), ids).by_part()[scores]
    short = count_macs(Encoder(small, token_mixer=lambda config, layer: MemoryCompressedAttention(config, factor=3, causal=False)), ids)
    print(f"{length} tokens, scores and mixing: {short.by_part()[scores] / full:.3f} of dense")

# %% [markdown]
# ## 11. A fixed number of keys (Wang et al. 2020)
#
# **Linformer** multiplies keys and values, along the *length*, by learned matrices $E, F$ of $k$ rows:
#
# $$\text{head} = \text{softmax}\!\left(\frac{Q\,(E K)^\top}{\sqrt d}\right) F V, \qquad E, F \in \mathbb{R}^{k \times n}$$
#
# $k$ stays fixed when $n$ grows, so the cost is linear. The paper's reason: the attention matrix is close to **low rank**.

# %%
from effnlp_lessons.attention.linformer import linformer_attention, linformer_mixers

show_source(linformer_attention)

# %% tags=["nbval-check-output"]
from effnlp_lessons.dense_attention import dense_attention

q, k, v = torch.randn(3, 1, 2, 50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
identity = torch.eye(50, dtype=torch.float64)[None]
same = linformer_attention(q, k, v, project_keys=identity, project_values=identity)
print("with identity projections it is full attention:", torch.allclose(same, dense_attention(q, k, v), atol=1e-10))
config = replace(small, layers=12, heads=4, max_length=512)
dense = sum(p.numel() for p in Encoder(config).parameters())
for sharing in ("none", "headwise", "key-value", "layerwise"):
    encoder = Encoder(config, token_mixer=linformer_mixers(config, projected=64, max_length=512, sharing=sharing))
    more = sum(p.numel() for p in encoder.parameters()) - dense
    print(f"{sharing:10} {more // (64 * 512):3} matrices of 64 x 512 for 12 layers of 4 heads")

# %% [markdown]
# **Low rank of what?** The matrix of attention weights $P$ may be close to rank $k$. That says: *some* rank-$k$ matrix is close to $P$.
# It does not say that the softmax of $k$ mixed keys finds it: softmax is not linear.
#
# **Predict first.** A passage of 256 tokens, all heads of MiniLM. The best matrix of rank 64 misses the output of the median head by a few per cent. How far off is
# the output when 64 keys are made by averaging each four neighbours, with no training? (`buckets.pooled`, error: 0 perfect, 1 as bad as zeros)

# %%
my_guess = None
predict("buckets.pooled", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.studies import attention_spectrum

if (guess := reveal("buckets.pooled")) is not None:
    live = attention_spectrum.run({"text": "plays", "length": 256, "shares": [1 / 4]}, seed=0).numbers
    print(f"one passage of 256 tokens, 72 heads, k = {live['projected'][0]}: error of the output, median head and quartiles")
    for name, spread in live["errors"].items():
        error = spread["error"]
        print(f"  {name:25} {error['median'][0]:6.2f}   {error['lower'][0]:6.2f} to {error['upper'][0]:6.2f}")
    print("Your guess for mean pooling:", guess)

# %% tags=["reveal"]
from effnlp_lessons.widgets.page import curves

if reveal("buckets.pooled") is not None:
    spectrum = attention_spectrum.over_passages(load_results("attention_spectrum"), "plays", 512)
    curves(spectrum["projected"][:-1], {name: spread["error"]["median"][:-1] for name, spread in spectrum["errors"].items()},
           x_label="k, of 512", y_label="error of the output, median head", points=True, log_y=True,
           caption="Recorded (`attention_spectrum`, three passages of 512 tokens). The best matrix of rank k comes near. No mix of keys before the softmax does.")
    held = spectrum["spectrum"]["squares"]
    at = spectrum["ranks"].index(64)
    print(f"rank 64 of 512 holds {held['median'][at]:.0%} of the squared singular values in the median head ({held['lower'][at]:.0%} to {held['upper'][at]:.0%} between the quartiles)")

# %% [markdown]
# <details><summary><b>After your guess: what follows</b></summary>
#
# A good rank-$k$ matrix exists, but one must see $P$ to find it. A random projection misses it even after the softmax. Mixing keys before the softmax blurs the key that a head wants, and a random $E$ makes long keys on top. Pooling is the best of the three, and no better than a
# window of as many pairs. A Linformer must be
# **trained** with its projections; it is not a way to run a dense model faster.
# </details>
#
# The explorer does it with a short text. Drag the number of keys. It opens with as many keys as tokens.

# %%
from effnlp_lessons.widgets.shorter_keys_explorer import ShorterKeysExplorer

ShorterKeysExplorer()

# %% [markdown]
# *Distance only* is the extreme: weights that never look at the text, as a random Synthesizer could learn them (section 12). Try a head that looks at its neighbour (layer 1, head 2 or so), and one that does not.
#
# Linformer is **not causal** in any sense. Each mixed key holds a bit of every token, the future too, and no mask on $n \times k$ scores can take
# it out again.

# %% tags=["nbval-check-output"]
projections = torch.randn(1, 8, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
k = k.requires_grad_()
linformer_attention(q, k, v, project_keys=projections, project_values=projections)[:, :, :10].sum().backward()
print("the first ten outputs depend on the last key:", bool(k.grad[:, :, -1].abs().max() > 0))

# %% [markdown]
# **Padding** has the same trap: the mask has $n$ entries, and the scores have $k$ columns. So padded keys and values are set to zero *before* the
# projection.
#
# ## 12. Weights without comparison (Tay et al. 2020)
#
# **Synthesizer** asks whether queries must meet keys at all. It still mixes values with softmax weights, but these come from elsewhere:
#
# | kind | scores of query $i$ | parameters a head, without values |
# |---|---|---|
# | dense | a small network of $x_i$: $W_2\,\text{relu}(W_1 x_i)$ | $d^2 + dN$ |
# | random | row $i$ of a trained table | $N^2$ |
# | factorised dense | $A_{i,\,\lfloor j/b \rfloor} \cdot B_{i,\; j \bmod b}$ with $ab = N$ | $d^2 + d(a+b)$ |
# | factorised random | $R_1 R_2^\top$ | $2Nk$ |
# | mixture | a weighted sum of two kinds, the dot product allowed (below: random and dot product) | both, and the weights |
#
# The factorised form has a classic mistake: expanding both factors in the same way. Then columns are copies of each other.

# %% tags=["nbval-check-output"]
a, b = torch.tensor([1, 10]), torch.tensor([1, 2, 3])
right = a.repeat_interleave(3) * b.repeat(2)
wrong = a.repeat_interleave(3) * b.repeat_interleave(2)
print("j div 3, j mod 3:    ", right.tolist(), "->", right.unique().numel(), "different columns")
print("both stretched:      ", wrong.tolist(), "->", wrong.unique().numel(), "different columns")

# %% tags=["nbval-check-output"]
from effnlp_lessons.attention.synthesizer import Synthesizer

x = torch.randn(1, 60, 32, generator=torch.Generator().manual_seed(0))
changed = x.clone()
changed[:, 40:] += 1
for kind in ("dense", "random", "factorized dense", "factorized random", "mixture"):
    mixer = Synthesizer(small, max_length=60, kind=kind, causal=True).eval()
    with torch.inference_mode():
        strict = torch.equal(mixer(x)[0][:, :40], mixer(changed)[0][:, :40])
    print(f"{kind:18} parameters {sum(p.numel() for p in mixer.parameters()):6,}, strictly causal {strict}")

# %% [markdown]
# It saves the product of queries and keys, not the $n^2$: the weights are still a table of $n \times n$.
#
# ## 13. What depends on the data?
#
# The lecture's slide files all of these under "data-dependent". Two questions sort them better: does the *choice of pairs* depend on
# the text, and do the *weights*?
#
# | method | which pairs | the weights | causal |
# |---|---|---|---|
# | patterns of notebook 08 | fixed | from the text | strict |
# | LSH, Routing | **from the text** | from the text | gradient only |
# | memory-compressed | fixed | from the text | strict, with care |
# | Linformer | none left out; keys mixed by **fixed** $E$ | from the text | none |
# | Synthesizer, dense | all | from the query's token alone | strict |
# | Synthesizer, random | all | **fixed** | strict |
#
# So Linformer's projection is the same for every text, and so are a random Synthesizer's weights: neither depends on the data as LSH does. Do the weights change when the text does? If they do not, the mixer is linear in the text, up to its biases, and that we can test.

# %% tags=["nbval-check-output"]
def mixes_alike(mixer):
    """True if the mixer is linear in the text: the same weights for every text."""
    first, other = torch.randn(2, 1, 60, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        whole, parts, nothing = mixer(first + other)[0], mixer(first)[0] + mixer(other)[0], mixer(0 * first)[0]
    return torch.allclose(whole + nothing, parts, atol=1e-5)


mixers = {"dense attention": SelfAttention(small), "Linformer": linformer_mixers(small, projected=8, max_length=60)(small, 0),
          "Synthesizer, dense": Synthesizer(small, max_length=60, kind="dense"),
          "Synthesizer, random": Synthesizer(small, max_length=60, kind="random")}
for name, mixer in mixers.items():
    print(f"{name:20} same weights for every text: {mixes_alike(mixer.eval())}")

# %% [markdown]
# (Linformer's *weights* do depend on the text. Its projection does not.)
#
# ## 14. The yardstick
#
# MiniLM with 1,024 positions, one layer, and exchanged attention. None of these was trained: the table is about cost.

# %%
from effnlp_lessons.attention.lsh import LSHSelfAttention
from effnlp_lessons.attention.routing import RoutingSelfAttention
from effnlp_lessons.measure import cost, table

config = replace(minilm.config, max_length=1_024, layers=1)
mixers = {"LSH, 2 rounds": lambda config, layer: LSHSelfAttention(config, chunk=64, hashes=2, buckets=32),
          "Routing, 16 clusters": lambda config, layer: RoutingSelfAttention(config, clusters=16, window=64, local_block=64),
          "memory-compressed": lambda config, layer: MemoryCompressedAttention(config, causal=False),
          "Linformer, 128": linformer_mixers(config, projected=128, max_length=1_024, sharing="layerwise"),
          "Synthesizer, dense": lambda config, layer: Synthesizer(config, max_length=1_024, kind="dense")}
models = {"dense, written out": Encoder(config),
          "dense, fused": Encoder(config, attention=lambda q, k, v, mask: torch.nn.functional.scaled_dot_product_attention(q, k, v)),
          **{name: Encoder(config, token_mixer=mixer) for name, mixer in mixers.items()}}
long_ids = torch.tensor([tokenizer.load_tokenizer().encode(play[begin : begin + 9_000]).ids[:1_024]])
print(table({name: cost(model.eval(), long_ids, runs=3) for name, model in models.items()}))

# %% [markdown]
# Against attention written out everything but the Synthesizer is faster, and needs less memory. Against the fused kernel (notebook 11) most of these gain nothing at 1,024 tokens, and none saves memory: compare the rows. LSH does two rounds of 128 keys a query, and sorting and
# gathering are not free. The feed-forward costs the same in every row; LSH has one projection fewer, memory-compressed adds convolutions. `make bench` measures LSH at 4,096 and 8,192 tokens beside transformers' own and the fused kernel.
#
# **Your plot.** The teacher with keys and values averaged over 2 and 4 neighbours, without any training, beside the dense one.

# %%
from effnlp_lessons.attention.linformer import pooling_projection
from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.measure import bytes_on_disk
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.widgets.own_models import TOKENS, keep_model, show_kept_models


def pooled(q, k, v, key_padding_mask, factor):
    """Keys and values averaged over `factor` neighbours; a padded token counts as zeros."""
    pool = pooling_projection(q.shape[2], -(-q.shape[2] // factor))
    return linformer_attention(q, k, v, key_padding_mask, project_keys=pool, project_values=pool)


dev = ReviewExamples(reviews.load_reviews().subset("dev"), limit=200)
for name, factor in (("dense", None), ("keys pooled by 2", 2), ("keys pooled by 4", 4)):
    model = load_teacher() if factor is None else load_teacher(attention=partial(pooled, factor=factor))
    macs = count_macs(model, torch.ones(1, TOKENS, dtype=torch.long)).total
    percent = accuracy(model, dev)
    keep_model("09", name, accuracy=percent, examples=200, macs=macs, bytes_on_disk=bytes_on_disk(model))
    print(f"{name:18} {percent:.0f} % of 200 reviews")
show_kept_models()

# %% [markdown]
# Pairs of neighbours can be merged with no loss that 200 reviews would show; groups of four cost some ten points. The MACs hardly move: at 27 tokens there is nothing to save. In section 11
# such pooling moved the output of MiniLM's heads by about half, yet most reviews are still classified correctly. The error of a head does not tell the error of a model: measure both.
#
# ## Paper and ours
#
# | method | paper or released code | here |
# |---|---|---|
# | Reformer | released code keeps pairs of one chunk that are in different buckets | the same; option `same_bucket_only` |
# | Reformer | a pair found in two rounds counts twice in released code | the same; option `count_duplicates=False` |
# | Reformer | keys of length 1, no further $1/\sqrt d$ (released code) | the same |
# | Routing | released code divides by the number of clusters plus 0.01 | by the number of clusters in which the query found a key; zeros for none |
# | memory-compressed | an unfinished last block is dropped, a query never sees its own block | kept; hidden if causal with `visible="strict"` |
# | Linformer | released code ignores padding | padded keys are zeroed before the projection |
#
# transformers' Reformer, given its buckets, and ours agree (`test_it_equals_transformers_given_its_buckets`), with one and three rounds, causal or not. Printed by Kitaev et al. 2020 for the
# duplication task with 511 symbols: trained with 4 rounds, evaluated with 8, 4, 2, 1: 100, 99.9, 99.4, 91.9 % (and 0.8 % with full attention). Trained with full attention: 94.8, 92.5, 76.9,
# 52.5 %. Our words have 63 symbols; section 9 has our table.
#
# ## Choose by cost
#
# <details><summary><b>A phone, one short message at a time.</b></summary>
#
# None of these. At 27 tokens there is nothing to choose from.
# </details>
#
# <details><summary><b>A server that classifies documents of 2,000 tokens, all of the same length.</b></summary>
#
# Linformer fits: fixed length, no causality needed, linear cost. It must be trained with its projections. A window with a global token (notebook 08) is the
# simpler start.
# </details>
#
# <details><summary><b>A document of 16,000 tokens, where names return after pages.</b></summary>
#
# LSH or Routing were made for it: a far key can be found by its content. Or keep all pairs and save only memory (notebook 11).
# </details>
#
# ## Common mistakes
#
# * **Half a hash.** $\arg\max(xR)$ without $-xR$ has half the buckets, so twice as many strangers meet.
# * **An unstable sort.** Ties in another order give other chunks.
# * **Joining rounds by the plain mean.** Rounds that found nothing count as much as the one that found the key.
# * **Forbidding itself with $-\infty$.** The first token of a causal model then has no key, and the softmax gives NaN.
# * **Keys that are not normalised.** Long vectors win every softmax, and the hash never saw their length.
# * **New rotations in the backward pass.** The gradient belongs to another selection.
# * **A causal mask on Linformer's $n \times k$ scores.** It hides nothing.
# * **Each token to its nearest centroid.** Clusters get unequal, and one can take all.
#
# ## Quiz
#
# **1. Two vectors share a bucket with probability 0.4 in one round. With three rounds they meet at least once with probability**
# <details><summary>1.2, so surely</summary>No. Chances of independent rounds do not add up.</details>
# <details><summary>0.78</summary>Yes. They miss each other with 0.6 to the third, 0.22.</details>
# <details><summary>0.06</summary>No. That is the chance to meet in all three.</details><br>
#
# **2. LSH attention with a causal mask. The gradient of output 10 with respect to token 50 is**
# <details><summary>zero, and the output does not depend on token 50</summary>No. Token 50 can move the borders of chunks.</details>
# <details><summary>not zero</summary>No. Token 50 is in no softmax of token 10.</details>
# <details><summary>zero, and still changing token 50 can change output 10</summary>Yes. The choice of pairs is not differentiable.</details><br>
#
# **3. Routing gives each centroid its nearest tokens, and not each token its nearest centroid, because**
# <details><summary>clusters then have equal size</summary>Yes. Equal blocks make one batch of small dense attentions.</details>
# <details><summary>it is causal</summary>No. The nearest of all tokens include later ones.</details>
# <details><summary>every token then has a cluster</summary>No. A token may be in none. It gets zeros.</details><br>
#
# **4. Linformer with k = 128 on texts of 512 and of 4,096 tokens. The scores cost**
# <details><summary>64 times as much on the longer</summary>No. That is dense attention.</details>
# <details><summary>the same</summary>No. There are eight times as many queries.</details>
# <details><summary>8 times as much</summary>Yes. n times k scores, and k stays.</details><br>
#
# **5. Which of these mixes values with weights that are the same for every text?**
# <details><summary>Linformer</summary>No. Its projection is the same, its weights come from queries and mixed keys.</details>
# <details><summary>the random Synthesizer</summary>Yes. Its table is trained once and does not look at the text.</details>
# <details><summary>LSH attention, because its rotations are random</summary>No. The rotations are fixed, buckets and weights depend on the text.</details>
#
# ## Where next
#
# The homework is `homework/09_attention_buckets.ipynb`. Notebook 10 gives up the softmax, and then adds a memory.
#
# ## References
#
# * Gomez et al. 2017. *The Reversible Residual Network.* arXiv 1707.04585.
# * Kitaev, Kaiser, Levskaya 2020. *Reformer: The Efficient Transformer.* arXiv 2001.04451.
# * Liu et al. 2018. *Generating Wikipedia by Summarizing Long Sequences.* arXiv 1801.10198.
# * Roy et al. 2020. *Efficient Content-Based Sparse Attention with Routing Transformers.* arXiv 2003.05997.
# * Tay et al. 2020. *Synthesizer: Rethinking Self-Attention in Transformer Models.* arXiv 2005.00743.
# * Wang et al. 2020. *Linformer: Self-Attention with Linear Complexity.* arXiv 2006.04768.
