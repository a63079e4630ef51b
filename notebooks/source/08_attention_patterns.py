# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # Attention patterns: which pairs need a score?
#
# A text of $n$ tokens has $n^2$ pairs, and attention gives each a score. Most of these scores come out close to zero.
# This notebook leaves pairs out *before* it looks at the text: the pattern is fixed, only the weights inside it depend on
# the words.
#
# **Lecture topic:** Efficient attention, data-independent patterns. **Reading:** 60 minutes. **Running:** about 40
# seconds on two cores, no GPU, no network.
#
# **You need:** notebook 00, and attention as in Vaswani et al. 2017. Parts marked *(depth)* can wait.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. write the mask of each pattern of the lecture from its definition, and count its pairs;
# 2. turn a mask into an algorithm that never makes an $n \times n$ table, and prove that it does not;
# 3. say how far a stack of layers reaches, and in which order layers must stand;
# 4. judge a pattern on real heads, and say why the share of attention that it captures can mislead;
# 5. choose a pattern by what it costs, at the length that you have.
#
# **Two questions from notebook 00.** Answer, then open.
#
# <details><summary>From which length do scores and mixing cost MiniLM more MACs than the feed-forward?</summary>
#
# From 1,536 tokens, four times its width of 384. Below that, the $n^2$ pairs are not what a layer spends most on.
# </details>
# <details><summary>At 1,024 tokens, which is larger: the weights of all six layers, or the scores of one?</summary>
#
# The scores of one: 50 MB against 43.
# </details>

# %% [markdown]
# ## 1. Leaving pairs out
#
# Here is the usual way to say which pairs are left out: a table of True and False, the **mask**. This one lets every
# token see 64 tokens to each side, a *sliding window*.

# %% tags=["nbval-check-output"]
import torch

from effnlp_lessons.attention.longformer import window_attention, window_mask
from effnlp_lessons.attention.patterns import pairs

length, window = 2_048, 64
mask = window_mask(length, window)
print(f"{pairs(mask):,} of {length**2:,} pairs, {100 * pairs(mask) / length**2:.1f} %")

# %% [markdown]
# **Predict first.** We give this mask to attention, `dense_attention(q, k, v, attention_mask=mask)`: 94 % of all scores
# become $-\infty$. How many times as fast does it get? (`patterns.masked`: 1 is as fast as before.)

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("patterns.masked", my_guess)

# %% tags=["reveal"]
from functools import partial

from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.measure import latencies

heads, d_head = 4, 64
q, k, v = torch.randn(3, 1, heads, length, d_head, generator=torch.Generator().manual_seed(0)).unbind()
ways = {"all pairs, written out": partial(dense_attention, q, k, v),
        "all pairs, then the mask": partial(dense_attention, q, k, v, attention_mask=mask),
        "only the window's blocks": partial(window_attention, q, k, v, window=window)}

if (guess := reveal("patterns.masked")) is not None:
    timings = latencies(ways, runs=5, warmup=1)
    for name, timing in timings.items():
        faster = timings["all pairs, written out"].median / timing.median
        print(f"{name:26} {1e3 * timing.median:7.1f} ms   {faster:5.1f} x as fast")
    print(f"Your guess for the mask: {guess:g} x")

# %% [markdown]
# <details><summary><b>After your guess: what follows from it</b></summary>
#
# A mask alone makes attention *slower*: every score is computed, and then thrown away, which is one step more. A
# pattern saves nothing until an algorithm skips the pairs. So each pattern below has two parts: its **mask**, which says
# what is true, and its **fast path**, which must give the same numbers without ever making the table. (A fused kernel
# for all pairs is faster than attention written out, too: section 11.)
# </details>
#
# How do we know that a fast path is not a masked table in disguise? We watch it. `largest_storage` sees every operation,
# forward and backward, and reports the largest tensor that it makes.

# %% tags=["nbval-check-output"]
from effnlp_lessons.attention.guard import largest_storage

for n in (512, 1_024, 2_048):
    x = torch.randn(3, 1, heads, n, 16).unbind()
    table = heads * n**2
    masked = partial(dense_attention, attention_mask=window_mask(n, window))
    fast = partial(window_attention, window=window)
    print(f"{n:5} tokens, of the table of all scores: masked {largest_storage(masked, *x) / table:.2f}, "
          f"window {largest_storage(fast, *x) / table:.2f}")

# %% [markdown]
# The masked table stays the whole table. The window's largest tensor grows like $n$, so its share halves when the text
# doubles. All fast paths of this notebook pass this check in the course's tests.
#
# ## 2. What do heads look at?
#
# Before we cut, look. The first words of a passage from *The Winter's Tale*, through MiniLM: rows look, columns are looked
# at.

# %%
from effnlp_lessons.attention.patterns import read_heads
from effnlp_lessons.datasets import shakespeare, tokenizer
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.widgets.page import attention_maps

minilm = load_minilm()
play = shakespeare.load_text("test")
begin = play.index("A sad tale's best for winter")
encoded = tokenizer.load_tokenizer().encode(play[begin : begin + 80])
short = read_heads(minilm, torch.tensor([encoded.ids]))
chosen = [(0, 2), (1, 8), (2, 9), (4, 5)]
attention_maps(torch.stack([short.weights[layer, head] for layer, head in chosen]), encoded.tokens,
               titles=[f"layer {layer}, head {head}" for layer, head in chosen],
               caption="Four of the 72 heads. Two look at a neighbour, two at `[CLS]`.")

# %% [markdown]
# Two habits are easy to see: a band along the diagonal, and one dark column at `[CLS]`. Every pattern of the lecture is an
# answer to the question what a head needs: neighbours, a few places for all, or something else. Keep these pictures in mind
# for section 9.
#
# ## 3. Blocks (Qiu et al. 2019)
#
# The simplest cut. Split the text into $m$ blocks of $n/m$ tokens. In head $h$ the queries of block $b$ see the keys of one
# block, $\pi_h(b)$:
#
# $$\text{output}_b = \text{softmax}\!\left(\frac{Q_b K_{\pi_h(b)}^\top}{\sqrt d}\right) V_{\pi_h(b)}$$
#
# $\pi_h$ is a permutation of the blocks. With the identity a head sees its own block; with a shift the next one.

# %%
from effnlp_lessons.attention.blockwise import blockwise_attention, blockwise_mask, shifted_permutations
from effnlp_lessons.widgets.page import pattern_maps

permutations = shifted_permutations(heads=3, blocks=4, identity_heads=1)
masks = blockwise_mask(48, permutations)
pattern_maps({f"head {head}, {order.tolist()}": mask for head, (order, mask) in enumerate(zip(permutations, masks, strict=True))},
             caption="Three heads and their permutations. Each query sees a quarter of the text, whatever the head.")

# %% [markdown]
# Each head has $n^2/m$ pairs. The fast path gathers the block of keys for each block of queries. Then all blocks are small
# dense attentions, done as one batch. Queries stay where they are; only keys and values move. (You will write it in the
# homework.)
#
# Does it equal its mask? From here on we ask this of every pattern, on a length that is no multiple of anything.

# %% tags=["nbval-check-output"]
def equals_its_mask(fast, mask, heads=3):
    """True if the fast path and dense attention under the mask agree, in float64, to ten digits."""
    length = mask.shape[-1]
    q, k, v = torch.randn(3, 2, heads, length, 8, dtype=torch.float64).unbind()
    return torch.allclose(fast(q, k, v), dense_attention(q, k, v, attention_mask=mask), rtol=1e-10, atol=1e-10)


print("blocks:", equals_its_mask(partial(blockwise_attention, permutations=permutations), blockwise_mask(101, permutations)))

# %% [markdown]
# A head with the identity never leaves its block, and neither does a stack of them. `reach` follows every path through the
# layers, residual sums included. A layer passes on what *any* of its heads passes on, so its mask is the union of theirs.

# %% tags=["nbval-check-output"]
from effnlp_lessons.attention.patterns import reach

own, following = blockwise_mask(48, shifted_permutations(heads=2, blocks=2, identity_heads=1))
print("own block, twelve layers: reaches", f"{reach([own] * 12).float().mean():.0%} of all pairs")
print("own or next block, two layers: reaches", f"{reach([own | following] * 2).float().mean():.0%}")

# %% [markdown]
# That is why heads differ. With some heads on their own block and some on the next, two layers join two blocks.
#
# ## 4. Local attention: blocks with a shared memory (Parmar et al. 2018)
#
# Hard borders are the weakness of blocks: the first word of a block does not see the word before it. The Image
# Transformer keeps blocks of queries, and gives each block a **memory**: its own positions and a *flange* of some
# positions at each side. *All queries of a block share one memory.* This is not a sliding window: look at the staircase.

# %%
from effnlp_lessons.attention.local import local_attention, local_attention_2d, local_mask, local_mask_2d
from effnlp_lessons.widgets.page import show_source

pattern_maps({"local, 8 and 4": local_mask(48, block=8, flange=4), "window of 8": window_mask(48, 8),
              "local, causal": local_mask(48, block=8, flange=4, causal=True)},
             caption="Left: every block of eight queries shares its memory. Middle: a sliding window moves with each "
             "query. Right: the causal form, for a model that writes: flange to the left only, and no future.")

# %% [markdown]
# Here is a whole fast path, to read once in full. `neighbour_blocks` gives each block its memory as a *view*: the
# stretches overlap in memory, and nothing is copied. `attend` does all blocks as one batch of small dense attentions.

# %%
show_source(local_attention)

# %% tags=["nbval-check-output"]
print("local:        ", equals_its_mask(partial(local_attention, block=8, flange=5), local_mask(101, 8, 5)))
print("local, causal:", equals_its_mask(partial(local_attention, block=8, flange=5, causal=True),
                                         local_mask(101, 8, 5, causal=True)))

# %% [markdown]
# **In two dimensions** *(depth)*. The paper made pictures, pixel by pixel. There a block is a rectangle, and its memory a
# larger one around it. Written as a mask over the pixels in raster order it looks wild. Seen from one query it is plain.

# %%
rectangle = local_mask_2d(12, 16, block=(4, 4), flange=(2, 3), causal=True)
query = 6 * 16 + 9  # row 6, column 9
pattern_maps({"the whole mask": rectangle, "what row 6, column 9 sees": rectangle[query].view(12, 16)},
             caption="A picture of 12 x 16 pixels, blocks of 4 x 4, flange 2 above and 3 to the sides. Right: the keys of one "
             "query in their places; what comes later in raster order is cut off.")
fast = partial(local_attention_2d, width=16, block=(4, 4), flange=(2, 3), causal=True)
print("local in 2D equals its mask:", equals_its_mask(fast, rectangle))

# %% [markdown]
# ## 5. Two short steps instead of one long one (Child et al. 2019)
#
# A causal model over $n$ tokens. Can each token see only about $\sqrt n$ others, and still everything in *two* layers?
# The Sparse Transformer splits attention into two sets. With stride $l \approx \sqrt n$:
#
# | | first set $A^{(1)}$ | second set $A^{(2)}$ |
# |---|---|---|
# | **strided** | the last $l$ tokens and itself | every $l$-th token before: $(i-j) \bmod l = 0$ |
# | **fixed** | own block of $l$: $\lfloor j/l \rfloor = \lfloor i/l \rfloor$ | the last $c$ positions of every block: $j \bmod l \ge l-c$ |
#
# Always with $j \le i$. Positions count from 0. (The authors' code has one token less in the first strided set: $l$ with
# itself.)

# %%
from effnlp_lessons.attention.sparse_transformer import (
    fixed_attention,
    fixed_masks,
    head_masks,
    strided_attention,
    strided_masks,
)

strided, fixed = strided_masks(48, stride=7), fixed_masks(48, stride=7, summary=1)
pattern_maps({"strided, first": strided[0], "strided, second": strided[1],
              "fixed, first": fixed[0], "fixed, second": fixed[1]},
             caption="Stride 7. Strided suits data with rows, such as pictures: the second set is the column above. "
             "Fixed suits text: the last token of each block is seen by all that come later.")

# %% [markdown]
# Three ways to give the two sets to heads: **merged**, one head attends to the union; **multi-head**, even heads take the
# first set and odd heads the second; **interleaved**, layers take them in turn.

# %% tags=["nbval-check-output"]
for combine in ("merged", "multi-head", "interleaved"):
    agree = [equals_its_mask(partial(strided_attention, stride=7, combine=combine, layer=1),
                             head_masks(strided_masks(101, 7), 3, combine, layer=1)),
             equals_its_mask(partial(fixed_attention, stride=7, summary=2, combine=combine, layer=1),
                             head_masks(fixed_masks(101, 7, 2), 3, combine, layer=1))]
    print(f"{combine:12} strided {agree[0]}, fixed {agree[1]}")

# %% [markdown]
# How does a column become fast? Write the text in rows of $l$. The keys with $(i-j) \bmod l = 0$ are the column above: transpose,
# and each column is a short dense attention of its own.
#
# **Predict first.** Interleaved, two layers, *fixed*. Which set must the *lower* layer use, so that the last token
# knows about every token before it? (`patterns.order`: "first", "second" or "either")

# %%
my_guess = None
predict("patterns.order", my_guess)

# %% tags=["reveal"]
if (guess := reveal("patterns.order")) is not None:
    past = torch.ones(48, 48, dtype=torch.bool).tril()
    for name, (first, second) in (("strided", strided), ("fixed", fixed)):
        for words, layers in (("first set below", [first, second]), ("second set below", [second, first])):
            seen = reach(layers)
            print(f"{name:8} {words:17} last token reaches {int(seen[-1].sum()):2} of 48, "
                  f"all tokens all of the past: {bool((seen | ~past).all())}")
    print("Your guess:", guess)

# %% [markdown]
# <details><summary><b>After your guess: why</b></summary>
#
# In the fixed pattern the last token of a block is a collector. First it must collect (own block, below), then others
# read it (above). The other way round, collectors are read before they know anything. The strided pattern works in both
# orders: a step along the row and a step along the column commute.
# </details>
#
# How many pairs? Merged, at most $2\sqrt n$ a row, and three quarters of that on average, because early rows are short.

# %% tags=["nbval-check-output"]
for n in (256, 1_024, 4_096):
    stride = round(n**0.5)
    merged = strided_masks(n, stride).any(0)
    print(f"{n:5} tokens: {pairs(merged) / n:5.1f} pairs a row, 2 sqrt(n) = {2 * stride}")

# %% [markdown]
# ## 6. A window, wider holes, and a few tokens for all (Beltagy et al. 2020)
#
# Longformer's three ideas can be combined freely:
#
# * **window:** $|i-j| \le w$. We count $w$ to *one* side; transformers counts both sides;
# * **dilated window:** every $\delta$-th token, $j = i + r\delta$ with $|r| \le w$: the same pairs, $\delta$ times the reach;
# * **global tokens:** a few tokens see all and are seen by all.

# %%
from effnlp_lessons.attention.longformer import longformer_mask

one_global = torch.zeros(48, dtype=torch.bool)
one_global[0] = True
pattern_maps({"window 4": window_mask(48, 4), "window 4, dilated 3": window_mask(48, 4, dilation=3),
              "window 4, causal": window_mask(48, 4, causal=True), "window 4, one global": longformer_mask(48, 4, one_global)},
             caption="A global token adds a row and a column. Its column is what a [CLS] token is good for: everyone can write to it "
             "and read from it.")

# %% [markdown]
# **From mask to algorithm.** A window moves with every query, but blocks can still be used. The keys that a block of queries
# can need start $w$ before its first token and end $w$ after its last one: local attention with a flange of $w$. Compute that
# staircase, and let a small band mask inside each block do the rest.

# %%
computed = local_mask(48, block=6, flange=8)
pattern_maps({"computed": computed, "kept": window_mask(48, 8), "thrown away": computed & ~window_mask(48, 8)},
             caption="A window of 8 in blocks of 6. Small blocks throw away little, large blocks make large and fast products; our "
             "library takes 64 queries.")

# %% [markdown]
# **Dilation** needs no new algorithm. Tokens with the same position modulo $\delta$ never see the others, so they are $\delta$ separate
# texts, each with a plain window.

# %% tags=["nbval-check-output"]
settings = {"window": {"window": 5}, "dilated": {"window": 5, "dilation": 3}, "causal": {"window": 5, "causal": True}}
for name, setting in settings.items():
    print(f"{name:8}", equals_its_mask(partial(window_attention, **setting), window_mask(101, **setting)))
by_head = torch.stack([window_mask(101, 5, gap) for gap in (1, 1, 4)])
print("a gap for each head:", equals_its_mask(partial(window_attention, window=5, dilation=(1, 1, 4)), by_head))

# %% [markdown]
# **Predict first.** Windows of 8 to each side. How many layers until the last of 128 tokens can know about the first?
# (`patterns.layers`, in layers.)

# %%
my_guess = None
predict("patterns.layers", my_guess)

# %% tags=["reveal"]
if (guess := reveal("patterns.layers")) is not None:
    for name, mask in (("window 8", window_mask(128, 8)), ("window 8, dilated 4", window_mask(128, 8, 4)),
                       ("window 8, one global", longformer_mask(128, 8, torch.arange(128) == 0))):
        needed = next((n for n in range(1, 30) if reach([mask] * n)[127, 0]), "never")
        joined = next((n for n in range(1, 30) if reach([mask] * n).all()), "never")
        print(f"{name:21} from last to first {needed}, from all to all {joined} layers")
    print("Your guess for the plain window:", guess)

# %% [markdown]
# <details><summary><b>After your guess: what the numbers say</b></summary>
#
# A window moves knowledge by $w$ tokens a layer: $\lceil 127 / 8 \rceil = 16$ layers. MiniLM has six. Dilation goes $\delta$ times as
# far and splits the text into $\delta$ parts that never meet, so only some heads should be dilated. In this example, the last token
# and the first are in different parts. One global token makes every pair two steps apart. But everything that
# travels through it must fit into one vector.
# </details>
#
# Global tokens have their own projections, $Q_g, K_g, V_g$. In a dense model these weights do not exist, so they start as
# copies. The mixer `LongformerAttention` goes into our MiniLM with one argument. Its 512 positions are copied one
# after another, and it reads 2,048 tokens of the play.

# %%
from dataclasses import replace

from effnlp_lessons.attention.longformer import LongformerAttention, extended_positions
from effnlp_lessons.measure import count_macs, transformer_macs
from effnlp_lessons.transformer import Encoder

long_config = replace(minilm.config, max_length=2_048)
longformer_minilm = Encoder(long_config, token_mixer=lambda config, layer: LongformerAttention(config, window=64)).eval()
state = minilm.state_dict()
state["embeddings.positions.weight"] = extended_positions(state["embeddings.positions.weight"], 2_048)
longformer_minilm.load_state_dict(state, strict=False)  # the global projections are not in the file
for block in longformer_minilm.blocks:
    block.token_mixer.copy_local_to_global_()

token_ids = torch.tensor([tokenizer.load_tokenizer().encode(play[begin : begin + 20_000]).ids[:2_048]])
with torch.inference_mode():
    last = longformer_minilm(token_ids).last
print(f"{token_ids.shape[1]:,} tokens in, vectors {tuple(last.shape)} out")

# %% tags=["nbval-check-output"]
ours = count_macs(longformer_minilm, token_ids).by_part()["attention scores and mixing"]
dense = transformer_macs(long_config, 1, 2_048)["attention scores and mixing"]
print(f"scores and mixing: {dense / 1e9:.1f} G MACs dense, {ours / 1e9:.1f} G with windows")

# %% [markdown]
# It runs; that does not make it good. Its heads were trained to see everything. The paper continues training after such a
# change.
#
# ## 7. Random blocks: BigBird (Zaheer et al. 2020)
#
# BigBird works on blocks of $b$ tokens. Each block of queries sees
#
# * the first and the last block (global),
# * itself and its two neighbours (window),
# * $r$ **random** blocks, different ones in each head.
#
# The first and the last block of queries see everything. The paper's argument for random blocks: in a graph of neighbours, a
# few random long edges make every path short.

# %%
from effnlp_lessons.attention.bigbird import bigbird_attention, bigbird_mask, random_plan

plan = random_plan(heads=3, blocks=16, random_blocks=1, seed=0)
pattern_maps({f"head {head}": mask for head, mask in enumerate(bigbird_mask(96, 6, plan))},
             caption="Blocks of six, one random block a row. Cross, band and scattered squares; only the squares differ "
             "between heads.")

# %% [markdown]
# The random blocks are **drawn once, from a seed**. If they were drawn anew in every forward pass, the model could never rely
# on them. And training and evaluation must use the same ones. (transformers' BigBird uses others in evaluation than in
# training: see *Paper and ours*.)

# %% tags=["nbval-check-output"]
bigbird = partial(bigbird_attention, block=8, random_blocks=2, seed=3)
plan = random_plan(heads=3, blocks=13, random_blocks=2, seed=3)
print("BigBird:", equals_its_mask(bigbird, bigbird_mask(101, 8, plan)))
small = replace(minilm.config, layers=1, dropout=0.0)
encoder, x = Encoder(small, attention=bigbird), torch.arange(1_000, 1_090)[None]
print("training and evaluation give the same:", torch.equal(encoder.train()(x).last, encoder.eval()(x).last))
print("the plan repeats with its seed:", torch.equal(plan, random_plan(3, 13, 2, seed=3)))

# %% [markdown]
# ## 8. Global tokens beside the text: ETC (Ainslie et al. 2020)
#
# Longformer and BigBird make some tokens *of the text* global. ETC adds global tokens of its own, say one for each
# sentence, in front of the long text. That makes four kinds of pairs:
#
# | | to global | to long |
# |---|---|---|
# | **from global** | all | all |
# | **from long** | all | within a radius |
#
# A long token has *one* softmax over its neighbours and all global tokens together. There are no absolute positions:
# each pair has a **relative label**, and every label has a learned vector $a$ and a bias,
# $\text{score}_{ij} = (q_i \cdot k_j + q_i \cdot a_{\text{label}(i,j)} + \text{bias}_{\text{label}(i,j)})/\sqrt d$.

# %%
from effnlp_lessons.attention.etc import ETCAttention, etc_mask, relative_labels

pattern_maps({"8 global, 40 long, radius 3": etc_mask(8, 40, 3)},
             caption="The first eight rows and columns are the global tokens. The rest is a band.")

# %% tags=["nbval-check-output"]
positions = torch.arange(7)
print("labels of distances, clipped at 3: 0 itself, 1 to 3 right, 4 to 6 left")
print(relative_labels(positions, positions, max_distance=3))

# %% [markdown]
# Row $i$ of this table is row $i-1$ moved by one: the label depends on the distance alone. So the fast path needs one small
# table for all blocks of the text, and never an $n \times n$ table of labels. Here it is in our Transformer, with eight
# global tokens in front:

# %% tags=["nbval-check-output"]
config = replace(minilm.config, layers=2)
etc = Encoder(config, token_mixer=lambda config, layer: ETCAttention(config, global_length=8, radius=16, seed=layer)).eval()
with torch.inference_mode():
    print(tuple(etc(torch.arange(1_000, 1_300)[None]).last.shape), "from 8 global and 292 long tokens")
print("a global token is one step from all, long tokens two steps apart:", bool(reach([etc_mask(8, 292, 16)] * 2).all()))

# %% [markdown]
# ## 9. What do real heads need?
#
# Now the test: all 72 heads of MiniLM, each pattern with at most the same number of pairs. Two questions for each head:
#
# * **mass:** which share of its attention weights falls on the pairs that are left?
# * **error:** how far does its output move, $\|\text{masked} - \text{dense}\| / \|\text{dense}\|$? 0 is perfect, 1 is as
#   bad as an output of zeros.
#
# ### Mass and error
#
# We start small, with 48 tokens and the two masks that the pictures of section 2 suggest: a **band** along the diagonal, and
# **two columns**, `[CLS]` and `[SEP]`, alone.

# %%
from effnlp_lessons.attention.gallery import ends
from effnlp_lessons.attention.patterns import captured_mass, output_error
from effnlp_lessons.studies import attention_patterns

token_ids = attention_patterns.passage("plays", 48, torch.Generator().manual_seed(0))
weights, values = (part.flatten(0, 1) for part in read_heads(minilm, token_ids))  # 72 heads
band, columns = window_mask(48, 1), ends(48).expand(48, 48)
for name, mask in (("band", band), ("two columns", columns)):
    print(f"{name:12} {100 * pairs(mask) / 48**2:.0f} % of the pairs capture "
          f"{100 * captured_mass(weights, mask).median():.0f} % of the mass, in the median head")
for name, place in (("[CLS]", 0), ("[SEP]", -1)):
    print(f"{name:12} alone {100 * weights[..., place].mean(-1).median():.0f} %")

# %% [markdown]
# **Predict first.** The columns win by far in mass. How large is the error of the output if a head may look at nothing but
# these two columns? (`patterns.columns`, the median head; 0 is perfect, 1 as bad as zeros.)

# %%
my_guess = None
predict("patterns.columns", my_guess)

# %% tags=["reveal"]
if (guess := reveal("patterns.columns")) is not None:
    masks = {"band": band, "two columns": columns, "both together": band | columns,
             "a wider band": window_mask(48, 2)}
    for name, mask in masks.items():
        mass, error = captured_mass(weights, mask).median(), output_error(weights, values, mask).median()
        print(f"{name:14} {100 * pairs(mask) / 48**2:3.0f} % of pairs   mass {mass:.2f}   error {error:.2f}")
    kept, dense = (weights * band) @ values, weights @ values  # not scaled up to 1 again
    error = (kept - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)
    print(f"the band, divided by the denominator of all pairs: error {error.median():.2f}")
    norms = values.norm(dim=-1).mean(0)
    print(f"length of a value vector, others = 1: [CLS] {norms[0] / norms[1:-1].mean():.2f}, "
          f"[SEP] {norms[-1] / norms[1:-1].mean():.2f}")
    print("Your guess for two columns:", guess)

# %% [markdown]
# <details><summary><b>After your guess: what the columns are for</b></summary>
#
# Two columns alone are as good as nothing. Nearly all of their mass is at `[CLS]`, and its value vector is a tenth as long as
# the others: much weight there brings little output. A band alone is *worse* than nothing. It captures a tenth of the mass, and the softmax
# scales that tenth up to 1: a whisper is turned into a shout. A wider band with as many pairs as both together does not
# mend it. Dividing by the right denominator does, and that is what the columns bring. **`[CLS]` carries the denominator of
# the softmax, the band carries the message.** (Even so the error stays near 1: so few pairs are too few for 48 tokens.) So
# mass alone misleads, and so does a mask that looks reasonable.
# </details>
#
# Try it yourself. The explorer shows any head, on any text, with any pattern or a mask that you paint, under a budget of
# pairs. *First:* which mask within the budget captures most mass? *Then:* which has the smallest error? Find a head where a
# band is enough, and one where a band needs the column at `[CLS]`. Strided, fixed, BigBird and ETC are made for longer texts;
# here no size of theirs fits the budget.

# %%
from effnlp_lessons.widgets.pattern_explorer import PatternExplorer

PatternExplorer()

# %% [markdown]
# <details><summary>Two heads to try</summary>
#
# Layer 0, head 2 looks at the token before: a window of 1 keeps nearly everything. Layer 1, head 9, which opens: paint the
# column at `[CLS]` over the window of 1, and compare.
# </details>
#
# ### Twenty passages of 512 tokens
#
# Half from plays, half from reviews, recorded once. What is compared:

# %%
from effnlp_lessons.attention.gallery import PATTERNS

for name, pattern in PATTERNS.items():
    print(f"{name:14} size = {pattern.knob} ({pattern.paper})")

# %% [markdown]
# MiniLM reads both ways, so *strided* and *fixed*, causal in the paper, are mirrored to the future. In *ETC* the first eight
# tokens of the text play the global tokens. Beside the patterns stand two masks that are no patterns: the *best of equal
# size*, which has seen the weights, and the two columns. Each pattern gets the largest size that fits the budget.
#
# First a small live run of the same function. At 128 tokens some patterns have no size that fits, and errors are larger: the
# budget is 8 tokens to each side here, 32 at 512 tokens.

# %%
live = attention_patterns.run({"text": "plays", "length": 128, "passages": 1, "shares": [0.125]}, seed=0).numbers
print("one passage of 128 tokens, at most 12.5 % of its pairs: medians over 72 heads")
print(f"{'':20}  mass  error")
for name, row in attention_patterns.over_heads([live], 0.125).items():
    mass, error = (attention_patterns.spread(row[what])[0] for what in ("mass", "error"))
    print(f"{name:20}  {mass:.2f}   {error:.2f}")

# %%
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.widgets.page import dots

recorded = load_results("attention_patterns")
found = attention_patterns.over_heads(recorded["runs"], 0.125)
quantities = {"mass": "share of the mass captured", "error": "error of the head's output"}
rows = {name: {words: attention_patterns.spread(found[name][what]) for what, words in quantities.items()}
        for name in sorted(found, key=lambda name: attention_patterns.spread(found[name]["error"])[0])}
(mass, *_), (error, *_) = rows[attention_patterns.COLUMNS].values()
dots(rows, grey=[attention_patterns.BEST, attention_patterns.COLUMNS],
     caption=f"512 tokens, at most 12.5 % of the pairs ({attention_patterns.COLUMNS}: 0.4 %). Dot: the median of 72 heads; bar: half "
     f"of the heads. The bars are long: heads differ more than patterns do. Two columns hold {mass:.0%} of the mass "
     f"at 512 tokens, and leave an error of {error:.2f}.")

# %% [markdown]
# Does more budget help, and whom?

# %%
from effnlp_lessons.widgets.page import lines

shares = sorted(map(float, recorded["runs"][0]["results"]))
fit = [name for name in rows if name != attention_patterns.COLUMNS
       and all(name in recorded["runs"][0]["results"][str(share)] for share in shares)]
curves = {name: [[attention_patterns.spread(run["results"][str(share)][name]["error"])[0] for share in shares]
                 for run in recorded["runs"]] for name in fit[:6]}
lines([100 * share for share in shares], curves, x_label="pairs computed (% of all)", y_label="error, median head",
      caption="The best mask, and five of the patterns that fit all three budgets. Shaded: smallest to largest of the recorded runs. Twice "
      "the pairs take away a quarter to a little more than a third of the error in these five.")

# %% [markdown]
# ### Which head needs what?
#
# For each head the pattern with the least error, at the same budget:

# %%
from effnlp_lessons.widgets.page import head_grid

candidates = [name for name in found if name not in (attention_patterns.BEST, attention_patterns.COLUMNS)]
by_error = [sorted(candidates, key=lambda name: found[name]["error"][head]) for head in range(72)]
close = sum(found[b]["error"][head] - found[a]["error"][head] < 0.02 for head, (a, b, *_) in enumerate(by_error))
head_grid([names[0] for names in by_error], layers=6,
          caption="The pattern with the least error for each head of MiniLM, 12.5 % of the pairs, mean over the recorded "
          f"passages. In {close} of 72 heads the second is less than 0.02 behind: read the colours as groups.")

# %%
with_globals = {"window + ends", "BigBird", "ETC"}
for words, heads_of in (("layer 0", by_error[:12]), ("layers 1 to 5", by_error[12:])):
    best = sum(names[0] in with_globals for names in heads_of)
    print(f"{words}: a pattern with global tokens is best in {best} of {len(heads_of)} heads")
gaps = [found["window"]["error"][head] - found["window + ends"]["error"][head] for head in range(72)]
print(f"two global tokens, {1 - (510 / 512)**2:.1%} of the pairs, in place of a wider window:")
for words, pick in (("gains most", max), ("gains least", min)):
    head = pick(range(72), key=lambda head: gaps[head])
    print(f"  layer {head // 12}, head {head % 12} {words}: error {found['window']['error'][head]:.2f} without, "
          f"{found['window + ends']['error'][head]:.2f} with")

# %% [markdown]
# From layer 1 on, a few tokens that everyone may see help nearly every head; which of the three patterns brings them is often a
# tie. In layer 0, which sees words and positions only, they change little.
#
# These heads were trained dense. A model trained *with* a pattern learns to use it, so this shows where it would start, not
# where it would end.
#
# ## 10. Does the task notice?
#
# Errors of heads are not errors of a model. So we put patterns into the teacher, which judges movie reviews, and train
# nothing. Reviews are short: the saving here is nil, the question is what gets lost. A global token does two things: its
# **row**, it reads all, and its **column**, all read it. We try them apart, for `[CLS]`.

# %%
from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.pretrained import load_teacher


def window_and_cls(q, k, v, key_padding_mask, window, row, column):
    """Dense attention under a mask: for texts of 27 tokens, only to see what is lost."""
    length = q.shape[2]
    first = torch.arange(length) == 0
    mask = window_mask(length, window) | (first[:, None] & row) | (first & column)
    return dense_attention(q, k, v, key_padding_mask, attention_mask=mask)


dev = ReviewExamples(reviews.load_reviews().subset("dev"), limit=200)
measured = {"dense": accuracy(load_teacher(), dev)}
for row, column in ((False, False), (False, True), (True, False), (True, True)):
    attention = partial(window_and_cls, window=2, row=row, column=column)
    words = [name for name, there in (("row of [CLS]", row), ("column of [CLS]", column)) if there]
    measured[", ".join(["window 2", *words])] = accuracy(load_teacher(attention=attention), dev)
print(f"always the more frequent answer          {100 * dev.labels.float().mean():.0f} %")
for name, percent in measured.items():
    print(f"{name:40} {percent:.0f} %")

# %% [markdown]
# Of 200 reviews; the standard error is about 3 points. A window of two alone is no better than always giving the more frequent answer. In one
# layer `[CLS]`, whose vector the classifier reads, hears two tokens; six layers reach further, but this model was not trained
# to pass messages on. Most of the gain is the row: `[CLS]` reads all. Some is the column, as in section 9. A global token
# belongs where the answer is read.
#
# They join your own plot. Nothing was saved at this length, so each point stands straight below the dense model.

# %%
from effnlp_lessons.measure import bytes_on_disk
from effnlp_lessons.widgets.own_models import TOKENS, keep_model, show_kept_models

macs, size = count_macs(load_teacher(), torch.ones(1, TOKENS, dtype=torch.long)).total, bytes_on_disk(load_teacher())
for name, percent in measured.items():
    keep_model("08", name.replace(" of [CLS]", ""), accuracy=percent, examples=200, macs=macs, bytes_on_disk=size)
show_kept_models()

# %% [markdown]
# ## 11. Time and memory
#
# **Predict first.** Torch's own dense attention is fused and fast. A window of 128 to each side, one thread, 4 heads of 64
# channels: from which length is it faster than *all pairs*? (`patterns.faster`, in tokens.)

# %%
my_guess = None
predict("patterns.faster", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.studies import pattern_speed

if (guess := reveal("patterns.faster")) is not None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    live = pattern_speed.run({"lengths": [256, 1_024, 2_048], "runs": 3, "written_out": 0}, seed=0).numbers
    torch.set_num_threads(threads)
    print("milliseconds forward, your machine, one thread")
    print(f"{'':14}" + "".join(f"{n:8,}" for n in live["lengths"]))
    for name, seconds in live["seconds"].items():
        if None not in seconds:
            print(f"{name:14}" + "".join(f"{1e3 * second:8.1f}" for second in seconds))
    print(f"Your guess: {guess:g} tokens")

# %% tags=["reveal"]
if reveal("patterns.faster") is not None:
    speed = load_results("pattern_speed")["runs"]
    lengths = speed[0]["lengths"]
    whole = [name for name, seconds in speed[0]["seconds"].items() if None not in seconds]
    lines(lengths, {name: [[1e3 * s for s in run["seconds"][name]] for run in speed] for name in whole},
          x_label="length (tokens)", y_label="milliseconds, forward",
          caption="One thread, recorded: median of three runs, shaded from the smallest to the largest. At the long end, twice the "
          "length costs dense attention four times the time, windows and blocks twice.")
    at = lengths.index(8_192)
    for name in whole:
        print(f"{name:14} at 8,192 tokens: {speed[0]['bytes'][name][at] / 1e6:6.1f} MB beyond its inputs")

# %% tags=["reveal"]
from effnlp_lessons.measure import crossing

if reveal("patterns.faster") is not None:
    print("faster than fused dense attention, forward, from (tokens, smallest and largest of the runs):")
    for name in whole[1:]:
        found_at = [crossing(lengths, run["seconds"]["dense, fused"], run["seconds"][name]) for run in speed]
        always = all(a > b for run in speed for a, b in zip(run["seconds"]["dense, fused"], run["seconds"][name], strict=True))
        where = "256, the shortest timed" if always else "not in every run" if None in found_at else (
            f"{min(found_at):,.0f} to {max(found_at):,.0f}")
        print(f"  {name:14} {where}")

# %% [markdown]
# <details><summary><b>After your guess: why not earlier</b></summary>
#
# At 256 tokens a window of 128 to each side is three quarters of all pairs, and gathering costs. The fused kernel also never
# makes the table, so **against it a pattern saves time, not memory**: the printed numbers say so. Users ask again and again why
# their Longformer is not faster than BERT (for one, transformers #8725, at 1,536 tokens on a CPU). At such lengths there
# is little to save; `make bench` shows that implementations differ, too.
# </details>

# %% [markdown]
# The explorer once more, now with recorded times in its last line.

# %% tags=["reveal"]
from IPython.display import display

if reveal("patterns.faster") is not None:
    display(PatternExplorer(times=pattern_speed.times_in_words(load_results("pattern_speed"), length=4_096)))

# %% [markdown]
#
# ## 12. The yardstick
#
# MiniLM with 1,024 positions, cut to one layer so that you need not wait, and with exchanged attention. Parameters change only
# where a method brings some of its own.

# %%
from torch.nn.functional import scaled_dot_product_attention

from effnlp_lessons.measure import cost, table

config = replace(minilm.config, max_length=1_024, layers=1)
models = {"dense, written out": Encoder(config),
          "dense, fused": Encoder(config, attention=lambda q, k, v, mask: scaled_dot_product_attention(q, k, v)),
          "blocks of 128": Encoder(config, attention=partial(
              blockwise_attention, permutations=shifted_permutations(12, 8, 10))),
          "window 64": Encoder(config, attention=partial(window_attention, window=64)),
          "Longformer 64": Encoder(config, token_mixer=lambda config, layer: LongformerAttention(config, window=64)),
          "BigBird 32": Encoder(config, attention=partial(bigbird_attention, block=32, random_blocks=3)),
          "ETC 8, 64": Encoder(config, token_mixer=lambda config, layer: ETCAttention(config, global_length=8, radius=64))}
token_ids = torch.tensor([tokenizer.load_tokenizer().encode(play[begin : begin + 9_000]).ids[:1_024]])
print(table({name: cost(model.eval(), token_ids, runs=3) for name, model in models.items()}))

# %% tags=["nbval-check-output"]
counts = {name: count_macs(model, token_ids) for name, model in models.items()}
dense = counts["dense, written out"]
for name, counted in counts.items():
    part = "attention scores and mixing"
    print(f"{name:18} scores and mixing {counted.by_part()[part] / dense.by_part()[part]:4.0%} of dense, "
          f"the whole model {counted.total / dense.total:4.0%}")

# %% [markdown]
# Scores and mixing shrink to a third and less, the whole model to about three quarters: the rest is projections and
# feed-forward, which no pattern touches. Longformer's second set of projections takes back a good part of what its window saves.
# In memory the patterns beat attention written out by far. Against the fused kernel they save time, and no memory.

# %% [markdown]
# ## Paper and ours
#
# | method | paper or released code | here |
# |---|---|---|
# | blockwise | the length is a multiple of the blocks | any length; the last block may be shorter |
# | local | released code takes an all-zero vector for padding | the padding mask says what is padding |
# | local, 2D | pixels are made block by block, so the past is all earlier blocks | the past is all earlier pixels in raster order |
# | strided | window of $l+1$ tokens in the paper, $l$ with itself in the code | option `window="paper"` or `"code"` |
# | fixed | each head may take another $c$ positions of a block | all heads take the last $c$, as in the formula |
# | Longformer | `attention_window` in transformers counts both sides; length a multiple of it | one side; any length |
# | BigBird | transformers' evaluation replaces all random blocks by block 0, counted again | one plan in training and evaluation |
# | ETC | sentences and paragraphs have their own links | one id per token says what belongs together |
#
# Each line is a named test. Where transformers has the method, ours equals it to five digits, with its weights loaded, in
# the mode that follows the paper. transformers' Longformer has no dilation, and its BigBird has no ETC.
#
# Printed by Beltagy et al. 2020, their ablation on text8 after 150 thousand steps, bits per character: windows that grow with
# depth 1.21, the same everywhere 1.23, shrinking 1.24. Not repeated here: it needs days of training. Printed by Zaheer et al.
# 2020, their building blocks at 512 tokens, accuracy on masked words: random blocks alone 60.1, window alone 58.3, both
# 62.7, BERT 64.2. We asked another question, about heads that were trained dense. There, too, no pattern reaches the dense
# model.

# %% [markdown]
# ## Choose by cost
#
# <details><summary><b>A phone, one short message at a time.</b></summary>
#
# None of these. At 27 tokens the pairs are about one per cent of the work (notebook 00), and every pattern loses something.
# </details>
#
# <details><summary><b>A server that classifies documents of 2,000 tokens, in batches.</b></summary>
#
# A window with one global token where the classifier reads. Section 11 has the times at 2,048 tokens. Continue training with
# the pattern, or at least fine-tune with it.
# </details>
#
# <details><summary><b>A document of 16,000 tokens, questions about all of it.</b></summary>
#
# Eight times the length, 64 times the pairs. Global tokens for the question (Longformer), or for
# each paragraph (ETC), so that two layers join everything. If the exact result is needed, notebook 11.
# </details>

# %% [markdown]
# ## Common mistakes
#
# * **"A mask saves time."** It costs time. Only skipped products save any.
# * **One side or two.** A window of 512 is 256 to each side in one library and 512 in another. Count pairs: $2w+1$ a row.
# * **Permuting queries and keys together.** Then every block meets its old partner, and nothing has changed.
# * **Padding only in the keys.** Rows of padding then hold garbage, and a mean over all rows sees it. Here they are zero.
# * **The stride without $j \le i$.** $(i-j) \bmod l = 0$ holds in the future too.
# * **Positions counted from one.** Then the summary column of the fixed pattern is one token too far to the left.
# * **Random blocks drawn anew.** In evaluation the model meets a graph that it has never seen.
# * **Only mass.** A column can hold a third of it and bring nothing.

# %% [markdown]
# ## Quiz
#
# **1. A mask hides 90 % of the pairs from a dense implementation. Time and memory**
# <details><summary>fall to a tenth</summary>No. Every score is computed before it is hidden.</details>
# <details><summary>do not fall</summary>Yes. Hiding is one step more. Only an algorithm that skips pairs saves.</details>
# <details><summary>fall in memory, not in time</summary>No. The table of scores is as large as before.</details><br>
#
# **2. A sliding window of 100 to each side, six layers. The output at token 1,000 can depend on**
# <details><summary>tokens 900 to 1,100</summary>No. That is one layer.</details>
# <details><summary>tokens 400 to 1,600</summary>Yes. Each layer adds one window to each side: 6 times 100.</details>
# <details><summary>all tokens, as information spreads exponentially</summary>No. With a window it moves a fixed step a layer. Random edges or a global token change that.</details><br>
#
# **3. Local attention (Parmar) and a sliding window (Longformer) differ in that**
# <details><summary>queries of one block share the same keys in local attention</summary>Yes. So the first query of a block sees less to its left than the last one.</details>
# <details><summary>local attention is always causal</summary>No. It has a causal form and one without.</details>
# <details><summary>a window cannot be causal</summary>No. The autoregressive window keeps the left side.</details><br>
#
# **4. In the fixed pattern, interleaved, the first set (own block) stands above the second (summaries). Then**
# <details><summary>nothing changes</summary>No. That holds for the strided pattern, whose two steps commute.</details>
# <details><summary>the future leaks</summary>No. Both sets keep to the past.</details>
# <details><summary>summaries are read before they have collected anything</summary>Yes. Two layers then do not reach all of the past.</details><br>
#
# **5. Two columns capture a third of a head's mass, a band of equal size a tenth. Which keeps the output better?**
# <details><summary>The columns</summary>Not shown by mass. The value vector at [CLS] is short; alone they brought an error of about 1.</details>
# <details><summary>The band</summary>Not shown either. Its tenth is scaled up to 1, which made it worse than zeros.</details>
# <details><summary>Mass does not say; measure the output</summary>Yes. And try both together: one carries the denominator, the other the message.</details>

# %% [markdown]
# ## Where next
#
# The homework is `homework/08_attention_patterns.ipynb`. Notebook 09 lets the *text* choose the pairs, with hashing and
# clustering; notebook 10 gives up the pairs; notebook 11 keeps all of them and saves the traffic.
#
# ## References
#
# * Ainslie et al. 2020. *ETC: Encoding Long and Structured Inputs in Transformers.* arXiv 2004.08483.
# * Beltagy, Peters, Cohan 2020. *Longformer: The Long-Document Transformer.* arXiv 2004.05150.
# * Child, Gray, Radford, Sutskever 2019. *Generating Long Sequences with Sparse Transformers.* arXiv 1904.10509.
# * Parmar et al. 2018. *Image Transformer.* arXiv 1802.05751.
# * Qiu et al. 2019. *Blockwise Self-Attention for Long Document Understanding.* arXiv 1911.02972.
# * Shaw, Uszkoreit, Vaswani 2018. *Self-Attention with Relative Position Representations.* arXiv 1803.02155.
# * Vaswani et al. 2017. *Attention Is All You Need.* arXiv 1706.03762.
# * Xiao et al. 2023. *Efficient Streaming Language Models with Attention Sinks.* arXiv 2309.17453.
# * Zaheer et al. 2020. *Big Bird: Transformers for Longer Sequences.* arXiv 2007.14062.
