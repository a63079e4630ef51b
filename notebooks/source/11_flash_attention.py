# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # FlashAttention: all pairs, little traffic
#
# Notebooks 08 to 10 gave something up: pairs, keys, or the softmax. This one gives up nothing. It computes the softmax over all pairs, and never writes the table of
# scores down. What it saves is not arithmetic. It is the way to memory and back.
#
# **Lecture topic:** Efficient attention, FlashAttention. **Reading:** 60 minutes. **Running:** about 30 seconds on two cores, no GPU, no network.
#
# **You need:** notebook 08. Parts marked *depth* can wait.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. compute a softmax in one pass over its scores, tile by tile, and say why the result is exact;
# 2. count the bytes that an attention moves between two memories, to the byte;
# 3. say when tiles move *more* than the plain way;
# 4. derive the backward pass that recomputes the scores from one number a row;
# 5. read a Triton kernel, and check it without a GPU.
#
# **Two questions from earlier notebooks.** Answer, then open.
#
# <details><summary>A method takes half of the multiplications. Is it twice as fast?</summary>
#
# Not if it waits for memory. Time follows the slower of the two, arithmetic and traffic (notebooks 00 and 04).
# </details>
# <details><summary>Why does a softmax subtract the maximum of its row?</summary>
#
# So that no exponential overflows. The factor cancels between numerator and sum.
# </details>

# %% [markdown]
# ## 1. The table that nobody asked for
#
# Attention reads queries, keys and values, and returns as many numbers as there are values. Between them stands a table of $n \times n$ scores. Here is its size beside everything else, for one layer of
# MiniLM (12 heads of 32 channels, float32).

# %% tags=["nbval-check-output"]
for n in (128, 512, 2_048, 8_192):
    table, rest = 12 * n * n * 4, 4 * 12 * n * 32 * 4
    print(f"{n:5} tokens: Q, K, V and O {rest / 2**20:6.1f} MiB, the table {table / 2**20:8.1f} MiB, {table / rest:4.0f} times as much")

# %% [markdown]
# The plain way writes the table, reads it for the softmax, writes the weights, and reads them again for the product with V: four trips.
#
# A chip has two memories. A large, slow one far away (on a GPU **HBM**, high-bandwidth memory; on a laptop RAM) and a small, fast one beside the arithmetic (**SRAM**: shared memory, caches). For an A100 the FlashAttention paper names
# 40 to 80 GB at 1.5 to 2.0 TB/s against 192 KB per multiprocessor, all 108 together at about 19 TB/s. So let us count bytes that cross.

# %% tags=["nbval-check-output"]
from effnlp_lessons.attention.flash_costs import standard_attention_bytes

for n in (128, 512, 2_048, 8_192):
    moved = standard_attention_bytes(n, n, d_head=64, itemsize=2)
    needed = 4 * n * 64 * 2  # Q, K, V in, O out
    flops = 4 * n * n * 64
    print(f"{n:5} tokens: moved {moved / 2**20:7.1f} MiB, needed {needed / 2**20:5.2f}; {flops / moved:4.1f} operations per byte")

# %% [markdown]
# One head of 64 channels in float16. A multiplication and an addition are two operations. An A100 can do about 156 half-precision operations in the time of one byte from HBM (312 TFLOP/s against 2.0 TB/s). The plain way offers 32 at most, however long the text. The arithmetic waits.
#
# Could the table be used while it is made, and never be written? The softmax stands in the way. It needs the sum of a whole row before it can give the first weight.

# %% [markdown]
# ## 2. A softmax in one pass (Milakov and Gimelshein 2018)
#
# Take a row's scores in pieces. After each piece keep three things: the largest score so far $m$, the sum of exponentials $\ell$, and the unfinished output $\tilde o$. A new piece $s$ with values $V$ may hold a larger maximum. Then the old sum and output were
# measured against the wrong maximum, and one factor repairs both.
#
# $$m' = \max(m, \max s) \qquad \ell' = e^{m - m'}\, \ell + \sum e^{s - m'} \qquad \tilde o' = e^{m - m'}\, \tilde o + e^{s - m'} V$$
#
# At the end $o = \tilde o / \ell$. The paper on online softmax keeps $m$ and $\ell$. FlashAttention keeps $\tilde o$ with them.

# %%
from effnlp_lessons.attention.flash import online_softmax_step
from effnlp_lessons.widgets.page import show_source

show_source(online_softmax_step)

# %% [markdown]
# On a real row: MiniLM reads a passage, and one query of one head meets its keys 64 at a time.

# %%
import torch

from effnlp_lessons.attention.patterns import read_projections
from effnlp_lessons.datasets import shakespeare, tokenizer
from effnlp_lessons.pretrained import load_minilm

minilm = load_minilm()
play = shakespeare.load_text("test")
begin = 8_000
token_ids = torch.tensor([tokenizer.load_tokenizer().encode(play[begin : begin + 4_000]).ids[:512]])
q, k, v = read_projections(minilm, token_ids)  # (layers, heads, 512, 32): below, layers stand where a batch would
print("queries of all heads:", tuple(q.shape))

# %%
layer, head, row = 4, 11, 424
scores = (q[layer, head, row] @ k[layer, head].T / 32**0.5).double()
values = v[layer, head].double()
m, total, o = torch.tensor([-torch.inf], dtype=torch.float64), torch.zeros(1, dtype=torch.float64), torch.zeros(1, 32, dtype=torch.float64)
for piece, rows in zip(scores.split(64), values.split(64), strict=True):
    before = m
    m, total, o = online_softmax_step(m, total, o, piece[None], rows)
    print(f"maximum {m.item():6.2f}, what was kept is multiplied by {(before - m).exp().item():.3f}, sum {total.item():6.2f}")
print("equal to the softmax of the whole row:", torch.allclose(o / total[:, None], (scores.softmax(-1) @ values)[None], rtol=0, atol=1e-12))

# %% [markdown]
# The first factor is 0, since nothing was kept yet. Later it is 1 whenever the maximum stays, and never above 1: what was weighed by $e^{s-m}$ must become $e^{s-m'}$, and $m' \ge m$. (FlashAttention-2 prints its inverse in line 10 of
# Algorithm 1. Copied to the letter, that gives NaN at the first piece, and old keys that grow at later ones. Two wrong answers of the homework do this.)
#
# ## 3. Attention in tiles (Dao et al. 2022, Dao 2023)
#
# Now for many queries at once. Cut the queries into blocks of $B_r$ rows and the keys into blocks of $B_c$. A **tile** is $B_r \times B_c$ scores.
#
# 1. Load one block of queries.
# 2. Load one block of keys and values. Compute the tile, update $m$, $\ell$ and $\tilde o$ with it as in section 2, then discard it.
# 3. When all keys have come by, divide by $\ell$ and write the output, and one number a row: $\text{LSE} = m + \log \ell$, the log-sum-exp of its scores. The backward pass needs it (section 7).
#
# Blocks of queries do not need each other: a GPU works on as many at once as it has room for. `flash_forward` does the same in plain PyTorch.
#
# **Predict first.** In float32, how does the output differ from dense attention's?
# (`flash.exact`: "not at all", "in the last digits", "by a few per cent")

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("flash.exact", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.attention.flash import flash_forward
from effnlp_lessons.dense_attention import dense_attention

if (guess := reveal("flash.exact")) is not None:
    truth = dense_attention(q.double(), k.double(), v.double())
    dense, tiles = dense_attention(q, k, v), flash_forward(q, k, v)[0]
    size = truth.abs().mean()
    print(f"all 72 heads, in units of the mean absolute output: tiles differ from dense by {(tiles - dense).abs().max() / size:.1e} at most")
    print(f"error against float64: dense {(dense - truth).abs().max() / size:.1e}, tiles {(tiles - truth).abs().max() / size:.1e}")
    print("Your guess:", guess)

# %% [markdown]
# <details><summary><b>After your guess: why both are off</b></summary>
#
# In the last digits. Float32 rounds after every step, and sums in another order are rounded in another way. Measured against float64, both are off by about as much. In float64 the two agree to twelve digits, whatever the tiles: below. *Exact* means that no pair is left out and nothing is approximated. It does not mean the same bits.
# </details>

# %% tags=["nbval-check-output"]
from functools import partial

from effnlp_lessons.attention.flash import tiled_attention
from effnlp_lessons.attention.guard import largest_storage

part = [x[2:3].double() for x in (q, k, v)]
for block_queries, block_keys in ((64, 64), (16, 128), (100, 7), (512, 512)):
    tiles, lse = flash_forward(*part, block_queries=block_queries, block_keys=block_keys)
    same = torch.allclose(tiles, dense_attention(*part), rtol=0, atol=1e-12)
    method = partial(tiled_attention, block_queries=block_queries, block_keys=block_keys)
    print(f"tiles of {block_queries:3} x {block_keys:3}: equal in float64 {same}, largest tensor {largest_storage(method, *part):9,} numbers")
print(f"dense:                                 largest tensor {largest_storage(dense_attention, *part):9,} numbers")

# %% [markdown]
# With small tiles the largest tensor is the output itself, 12 heads x 512 x 32 numbers. The model does not notice. Same weights, same text:

# %% tags=["nbval-check-output"]
with torch.inference_mode():
    before = minilm(token_ids).hidden[-1]
    after = load_minilm(attention=tiled_attention)(token_ids).hidden[-1]
print("MiniLM with attention in tiles gives the same hidden states:", torch.allclose(before, after, atol=1e-4))

# %% [markdown]
# ## 4. Step through the tiles
#
# One head with made-up numbers, 64 queries and 64 keys. Each rectangle is a tile. A row of them is one **program**, the worker of one block of queries. The trace is real: it was recorded while the Triton kernel of section 8 ran (without Triton, the version in PyTorch).
#
# Try this:
#
# * Step through a row. When does the maximum stop rising, and what happens to the sum when it rises?
# * Switch *causal* on. Which tiles disappear, and which need a mask?
# * Make the tiles 8 x 8, go to the last tile, and read the bytes. Then 64 x 64. Then give the chip less SRAM.

# %%
from effnlp_lessons.widgets.flash_explorer import FlashExplorer

FlashExplorer()

# %% [markdown]
# ## 5. How many bytes?
#
# The output and the queries move once. Keys and values are read once **for every block of queries**. With $n$ tokens, $d$ channels and numbers of $b$ bytes:
#
# $$\text{bytes} = b\left(2nd + \lceil n / B_r \rceil \cdot 2nd\right) + 4n$$
#
# The last term is LSE. The traffic still grows with $n^2$, as $2n^2d/B_r$ numbers, where the plain way has $4n^2$. $B_c$ does not occur. So tall tiles save traffic. How tall can they be? Everything that is alive must fit into the fast memory: with room for $M$ numbers, $B_r$ is about $M / d$, and the traffic about $n^2 d^2 / M$. The paper proves that no exact
# algorithm can have a smaller order of traffic for all $M$ between $d$ and $nd$.
#
# Standard attention moves $b\,(4n^2 + 4nd)$. **Predict first.** 512 tokens, 64 channels, float16. How many queries must a tile have at least, in powers of two, so that tiles move fewer bytes than the plain way?
# (`flash.small_sram`)

# %%
my_guess = None
predict("flash.small_sram", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.attention.flash_costs import flash_attention_bytes
from effnlp_lessons.studies import flash_traffic
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.widgets.page import lines

if (guess := reveal("flash.small_sram")) is not None:
    traffic = load_results("flash_traffic")
    for n in (128, 512):
        standard = flash_traffic.numbers_at(traffic, n)["standard"]
        counted = flash_traffic.by_block(traffic, n)
        print(f"{n} tokens: plain {standard:9,} bytes; tiles " + ", ".join(f"{rows}: {moved:,}" for rows, moved in counted.items()))
    rows, counted = list(counted), [moved / 2**20 for moved in counted.values()]
    lines(rows, {"tiles, counted": [counted], "plain way": [[standard / 2**20] * len(rows)]}, x_label="queries in a tile", y_label="MiB moved",
          caption="Recorded (`flash_traffic`), 512 tokens, forward pass, counted access by access while the Triton kernel ran. Where the curve lies above the line, tiles move more than the plain way.")
    print("Your guess:", guess, "queries")

# %% [markdown]
# <details><summary><b>After your guess: when tiles pay</b></summary>
#
# 32. With 16 queries a tile, 32 blocks read all keys and values 32 times: 4.3 MB against 2.4 MB for the plain way. From 32 queries on tiles win, a little. Every doubling then nearly halves the traffic, ever less nearly, since queries and output move anyway. Tiles win only if enough queries fit into the fast memory.
# </details>
#
# The same against the size of the fast memory. A tile must fit with its queries, keys, values, scores, unfinished output, maxima and sums. The paper's law says: traffic falls like $M^{-1}$.

# %% tags=["reveal"]
if reveal("flash.small_sram") is not None:
    sizes = [2**i for i in range(14, 20)]
    points = flash_traffic.against_sram(sizes, length=8_192)
    for point in points:
        tile = f"{point.block_queries} x {point.block_keys}"
        print(f"{point.sram_bytes // 1_024:4} KiB: tiles of {tile:9} move {point.bytes / 2**20:7.1f} MiB")
    print(f"plain way: {standard_attention_bytes(8_192, 8_192, 64, 2) / 2**20:.0f} MiB")
    print(f"measured exponent: {flash_traffic.exponent(points):.2f} with the course's tiles, "
          f"{flash_traffic.exponent(flash_traffic.against_sram(sizes, 8_192, tile_sizes=flash_traffic.paper_tile_sizes)):.2f} with the paper's rule")

# %% [markdown]
# With the paper's rule the exponent is near -1. (The rule gives $\lceil M/4d \rceil$ rows to the outer loop, here the queries, and counts every number as 16 bits. With sums in float32 its tiles would not fit.) The course's tiles must fit with everything in them. A square of scores grows faster than its side, so the exponent is nearer to 0. In the table this shows
# at 256 KiB: 256 x 128 would need a little more.
#
# Fewer bytes for the same operations: the ratio moves from *waits for memory* towards *waits for arithmetic*.

# %% tags=["nbval-check-output"]
from effnlp_lessons.attention.flash_costs import flash_attention_flops

for rows in (64, 128, 256):
    sizes_ = {"block_queries": rows, "block_keys": 64}
    moved, flops = flash_attention_bytes(8_192, 8_192, 64, 2, **sizes_), flash_attention_flops(8_192, 8_192, 64, **sizes_)
    print(f"{rows:3} queries a tile: {flops / moved:4.0f} operations per byte")
print(f"plain way:           {4 * 8_192**2 * 64 / standard_attention_bytes(8_192, 8_192, 64, 2):4.0f}")

# %% [markdown]
# Counted are requests of programs. A GPU's L2 cache answers some of them, so what HBM delivers is at most that, and at least every byte once. This holds for both ways: the table of a short text may never leave the cache.
#
# ## 6. Tiles that need not be computed
#
# A causal mask empties the upper triangle. A tile that lies wholly in it is skipped: not loaded, not multiplied. A tile on the diagonal is computed and masked. A tile below is computed without a mask.
#
# **Predict first.** 1,000 tokens, tiles of 64 x 64, causal. Which share of the tiles is skipped, in per cent? (`flash.causal_share`)

# %%
my_guess = None
predict("flash.causal_share", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.attention.flash_costs import visited_tiles

if (guess := reveal("flash.causal_share")) is not None:
    blocks = {"block_queries": 64, "block_keys": 64}
    whole = visited_tiles(1_000, 1_000, **blocks)
    kinds = [tile.kind for tile in visited_tiles(1_000, 1_000, causal=True, **blocks)]
    print(f"{len(whole)} tiles, causal: {kinds.count('full')} without a mask, {kinds.count('partial')} with one, "
          f"{len(whole) - len(kinds)} skipped = {100 * (1 - len(kinds) / len(whole)):.0f} %")
    print("Your guess:", guess, "per cent")

# %% [markdown]
# <details><summary><b>After your guess: what the diagonal costs</b></summary>
#
# The diagonal tiles are computed whole, half in vain. Sixteen of 256 here, so 47 % are skipped. Longer texts or smaller tiles come nearer to half.
# </details>
#
# The same idea skips whatever a pattern of notebook 08 leaves empty. Here a tile of 64 x 64 is one dot. A window of 128 means 128 keys to each side, and is exact inside the tiles on its edge.

# %% tags=["nbval-check-output"]
from effnlp_lessons.widgets.page import pattern_maps

block_mask = torch.eye(32, dtype=torch.bool) | (torch.arange(32) == 0)[None] | (torch.arange(32) == 0)[:, None]
settings = {"causal": {"causal": True}, "window 128": {"window": 128}, "causal, window 128": {"causal": True, "window": 128},
            "blocks of choice": {"block_mask": block_mask}}
maps = {}
for name, setting in settings.items():
    maps[name] = torch.zeros(32, 32, dtype=torch.bool)
    for tile in visited_tiles(2_048, 2_048, block_queries=64, block_keys=64, **setting):
        maps[name][tile.query_block, tile.key_block] = True
    moved = flash_attention_bytes(2_048, 2_048, 64, 2, block_queries=64, block_keys=64, **setting)
    print(f"{name:20} {maps[name].sum():4} of 1,024 tiles, {moved / 2**20:.2f} MiB")
print(f"{'everything':20} 1024 of 1,024 tiles, {flash_attention_bytes(2_048, 2_048, 64, 2, block_queries=64, block_keys=64) / 2**20:.2f} MiB")
pattern_maps(maps, unit="tiles", caption="Tiles that are computed, 2,048 tokens, 64 x 64. A pattern saves time on a chip when it empties whole tiles.")

# %% [markdown]
# ## 7. The backward pass: compute it again
#
# Training needs gradients, and the textbook backward pass reads the weights $P$. We did not keep them. But one number a row is enough to make any tile again:
#
# $$P = e^{S - \text{LSE}}$$
#
# No maximum, no running sum, no order. Then, with $dO$ the gradient that arrives, $S = \text{scale} \cdot QK^\top$ and $\text{scale} = 1/\sqrt d$:
#
# $$dV = P^\top dO \qquad dP = dO\, V^\top \qquad dS = P \circ (dP - D) \qquad dQ = \text{scale}\; dS\, K \qquad dK = \text{scale}\; dS^\top Q$$
#
# $D_i$ is taken off the whole row $i$. It is the softmax's own term, $D_i = \sum_j P_{ij}\, dP_{ij}$: a sum over the whole row, which a tile does not have. Here is the second trick of the paper. Write the sum out: $\sum_j P_{ij} \sum_c dO_{ic} V_{jc} = \sum_c dO_{ic} \sum_j P_{ij} V_{jc} = \sum_c dO_{ic}\, O_{ic}$. So $D$ is
# the row sum of $dO \circ O$, and costs one pass over two small matrices.

# %% tags=["nbval-check-output"]
from effnlp_lessons.attention.flash import flash_backward

inputs = [x[2:3].double().requires_grad_() for x in (q, k, v)]
output = dense_attention(*inputs)
grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
wanted = torch.autograd.grad(output, inputs, grad_output)
q2, k2, v2 = (x.detach() for x in inputs)
weights = (q2 @ k2.mT / 32**0.5).softmax(-1)
print("D is the row sum of dO * O:", torch.allclose((weights * (grad_output @ v2.mT)).sum(-1), (grad_output * output).sum(-1), rtol=0, atol=1e-10))
result, lse = flash_forward(q2, k2, v2, causal=False)
found = flash_backward(q2, k2, v2, result, lse, grad_output)
print("gradients from O and LSE equal autograd's:", all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(wanted, found, strict=True)))
print(f"kept for the backward pass: dense {weights.numel():,} weights, tiles {lse.numel():,} numbers (and O, which exists anyway)")

# %% [markdown]
# The price is arithmetic. A tile takes 2 products forward. Backward takes 5, among them one to make $S$ again. Our kernels take 7: one pass for $dQ$, another for $dK$ and $dV$, and both make $S$ and $dP$. In return no two programs add into one number, and the result is the same in every run.
# More arithmetic need not be slower, if the arithmetic was waiting anyway. The paper's backward pass was faster on a GPU all the same. Ours was not timed there.
#
# Memory, measured: the most that torch's allocator held, forward and backward, one head of 64 channels.

# %%
from effnlp_lessons.measure import peak_memory


def gradients(method, x):
    with torch.inference_mode(False), torch.enable_grad():
        inputs = [part.clone().requires_grad_() for part in x]
        return torch.autograd.grad(method(*inputs).sum(), inputs)


peaks = {}
for n in (1_024, 2_048, 4_096, 8_192):
    x = torch.zeros(3, 1, 1, n, 64).unbind()
    in_tiles = peak_memory(partial(gradients, partial(tiled_attention, block_queries=256, block_keys=256), x))
    dense = peak_memory(partial(gradients, dense_attention, x)) if n < 8_192 else None
    peaks[n] = in_tiles
    print(f"{n:5} tokens: tiles {in_tiles / 2**20:5.1f} MiB, dense " + (f"{dense / 2**20:6.1f} MiB" if dense else "not tried"))

# %% tags=["nbval-check-output"]
growth = (peaks[8_192] - peaks[4_096]) / (peaks[2_048] - peaks[1_024])
print(f"from 1,024 to 8,192 tokens the memory of tiles grows along a straight line: {abs(growth - 4) < 0.2}")

# %% [markdown]
# ## 8. The same in Triton
#
# PyTorch in tiles proves the algorithm, and wins little time: every tile pays for Python, and every intermediate still goes to memory. On a GPU one **kernel** does the whole walk, and keeps the tile in registers. Triton is a language for such kernels, inside Python.
#
# A kernel describes *one* program. The grid says how many of them run. `tl.program_id` says which one I am. Pointers are numbers, and a load takes a block of them with a **mask** for those that lie outside. The smallest of our kernels computes $D$:

# %%
import importlib.util

if has_triton := importlib.util.find_spec("triton") is not None:
    from effnlp_lessons.attention.flash_kernels import delta_kernel, forward_kernel

    show_source(delta_kernel)
else:
    print("Triton exists on Linux only. The cells of this section show their results in the stored notebook.")

# %% [markdown]
# The forward kernel is section 3 with pointers. Its loop runs in three parts: tiles cut by a limit on the left, whole tiles without a limit, tiles cut on the right.

# %%
if has_triton:
    show_source(forward_kernel)

# %% [markdown]
# Triton has an **interpreter** that runs a kernel on CPU tensors with NumPy, program after program. Slow, and enough to check three things.
#
# **Is it right?** Lengths that fit no tile, queries and keys of different number, forward and backward, against dense attention in float64.

# %% tags=["nbval-check-output"]
from effnlp_lessons.attention.flash_triton import Tiles, TileSize, flash_attention

generator = torch.Generator().manual_seed(0)
small = Tiles(*(TileSize(16, 32),) * 3)


def largest_error(queries, keys, dtype, **settings):
    x = [torch.randn(1, 2, n, 40, generator=generator).to(dtype).requires_grad_() for n in (queries, keys, keys)]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if settings.get("causal") else None
    errors = []
    for method in (partial(flash_attention, run="interpreter", tiles=small, **settings), partial(dense_attention, attention_mask=mask)):
        exact = [part.detach().double().requires_grad_() for part in x]
        truth = dense_attention(*exact, attention_mask=mask)
        output = method(*x)
        pairs = zip([output, *torch.autograd.grad(output.sum(), x)], [truth, *torch.autograd.grad(truth.sum(), exact)], strict=True)
        errors.append(max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs))
    return errors


if has_triton:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for queries, keys, settings in ((97, 97, {"causal": True}), (33, 70, {"causal": True}), (50, 41, {})):
            ours, plain = largest_error(queries, keys, dtype, **settings)
            print(f"{str(dtype):14} {queries} x {keys} {'causal' if settings else 'full':6} error at most twice that of plain attention: {ours <= 2 * plain}")

# %% [markdown]
# **Does it move what the formula says?** Every load and store of the kernel passes through a counter. It also refuses an address outside the tensors, and counts numbers written by two programs.

# %% tags=["nbval-check-output"]
if has_triton:
    from effnlp_lessons.attention import flash_kernels
    from effnlp_lessons.attention.flash_triton import launches
    from effnlp_lessons.attention.triton_tools import Traffic, interpreting

    x = torch.randn(3, 1, 1, 300, 64, generator=generator).half().unbind()
    for rows in (32, 64, 128):
        tile = TileSize(rows, 64)
        launch = launches(*x, causal=True, tiles=Tiles(tile, tile, tile))[0]
        with interpreting(flash_kernels), Traffic(**launch.tensors) as counted:
            launch.run()
        formula = flash_attention_bytes(300, 300, 64, 2, block_queries=rows, block_keys=64, causal=True)
        print(f"{rows:3} queries a tile: counted {counted.total:,} bytes, formula {formula:,}; written by two programs: {counted.conflicts.total()}")

# %% [markdown]
# **Does it stay in its tensors?** The most common bug in kernels is the forgotten mask at the end of a text. On a GPU it reads whatever lies behind the row, and the result depends on that. Here is a row sum that works for every power of two:

# %%
if has_triton:
    import triton
    import triton.language as tl

    from effnlp_lessons.attention.triton_tools import OutOfBounds

    @triton.jit
    def row_sum(X, SUMS, length, BLOCK: tl.constexpr):
        row = tl.program_id(0)
        columns = tl.arange(0, BLOCK)
        x = tl.load(X + row * length + columns)  # no mask: BLOCK may be larger than length
        tl.store(SUMS + row, tl.sum(x, 0))

    for length in (8, 6):
        x, sums = torch.ones(2, length), torch.zeros(2)
        try:
            with interpreting():
                row_sum[(2,)](x, sums, length, BLOCK=8)
            print(f"length {length}: sums {sums.tolist()}")
        except OutOfBounds as error:
            print(f"length {length}: {str(error).partition(', program')[0]}")

# %% [markdown]
# The first row of six read two numbers of the second row, silently. Only the last row left the tensor and was caught. So test lengths that fit no block, and compare with a reference: a tail is a bug that friendly sizes hide.
#
# What an interpreter cannot show: races in time, the number of registers, and speed. It also rounds as NumPy does. Stock Triton's interpreter multiplies bfloat16 numbers as if their bits were integers and says nothing; `triton_tools` computes such products rightly, and refuses other arithmetic in bfloat16.
#
# ## 9. Depth: what the compiler makes of it
#
# A program runs on **warps** of 32 threads. A thread has up to 255 **registers**, the fastest memory of all. The warps of a program share the **shared memory**. **Tensor cores** multiply small matrices in one instruction (`mma.sync`, on an H100 also `wgmma`).
#
# Triton's compiler does not need the GPU it compiles for. So its output can be read here: instructions in PTX, NVIDIA's portable assembly, registers and shared memory in the machine code. Three questions. Does it use the tensor cores? Do loads run ahead of the arithmetic (asynchronous copies)? Do all numbers of a thread fit into its 255 registers, or do some **spill** to memory?

# %% tags=["nbval-check-output"]
from effnlp_lessons.studies import flash_machine_code

code = load_results("flash_machine_code")
for d_head in (64, 128):
    for chip in ("A100", "H100"):
        for kernel in ("forward", "dq", "dkdv"):
            (row,) = flash_machine_code.kernels(code, kernel, chip=chip, dtype="bfloat16", d_head=d_head, default=True)
            instructions = ", ".join(f"{count} {name}" for name, count in row["tensor_core"].items() if count)
            print(f"{d_head:3} channels, {chip} {kernel:7}: {row['registers']} registers, {row['spilled_bytes']} bytes spilled, {row['shared_bytes'] / 1024:5.1f} KiB shared, {instructions}, {row['async_copies']} asynchronous copies")

# %% [markdown]
# Causal attention over 1,024 tokens in bfloat16. Nothing spills, and all shared memory fits (163 KiB a program on an A100, 227 on an H100). The H100's own instruction, `wgmma`, needs products with 64 rows at least. The dk/dv kernel has tiles of 32 x 64, and reads Q and dO once for every block of keys: more keys in a tile would move fewer bytes. Why not take more? A program of this kernel carries two sums, dK and dV,
# of $B_c \times d$ numbers each, in the registers of its threads:
#
# $$\text{registers a thread} = \frac{2\, B_c\, d}{32 \cdot \text{warps}}$$
#
# 128 channels, float16, the course's tile first:

# %% tags=["nbval-check-output"]
for block_queries, block_keys, warps in ((32, 64, 8), (32, 128, 8), (32, 128, 4)):
    sums = flash_machine_code.accumulator_registers(block_keys, 128, warps)
    for chip in ("A100", "H100"):
        (row,) = flash_machine_code.kernels(code, "dkdv", chip=chip, dtype="float16", d_head=128, block_queries=block_queries, block_keys=block_keys, num_warps=warps)
        print(f"{block_queries} x {block_keys:3}, {warps} warps: the sums alone take {sums:3.0f} registers; {chip} spills {row['spilled_bytes']:6,} bytes a thread")

# %% [markdown]
# With 4 warps the sums alone would take 256 registers, and a thread has 255. The compiler then moves numbers to memory and back, and says nothing. With 8 warps there is room for the sums, and on an A100 still not for everything else. A test compiles every kernel in float16 and bfloat16, 64 and 128 channels, for both chips. It fails if one spills, or needs
# too much shared memory, or multiplies without tensor cores or asynchronous copies. Another test sees that the tile with 4 warps is flagged.
#
# No spills does not yet mean fast. Speed needs the chip.
#
# ## 10. On a GPU
#
# **Nothing in this course was run on a GPU.** Everything here is arithmetic, measured on a CPU, run in an interpreter on a CPU, or read in compiled code. If this notebook finds a GPU, the next cell times our kernel beside torch's own and prints where and when. It claims nothing here.

# %%
import datetime

if torch.cuda.is_available():
    x = [torch.randn(4, 16, 4_096, 64, device="cuda", dtype=torch.float16) for _ in range(3)]
    for name, method in (("ours", partial(flash_attention, causal=True, run="gpu")),
                         ("torch", partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True))):
        method(*x)
        times = []
        for _ in range(20):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            method(*x)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        print(f"{name:5} {sorted(times)[10]:.3f} ms, {4 * 64 * 64 * 4_096**2 / 2 / sorted(times)[10] / 1e9:.0f} TFLOP/s (half of the pairs counted)")
    print(torch.cuda.get_device_name(), datetime.date.today())
else:
    print("no GPU here: nothing was timed")

# %% [markdown]
# What others measured, and published as theirs:
#
# | source | printed there |
# |---|---|
# | Dao 2023, abstract | FlashAttention-2: 50 to 73 % of an A100's peak; training a GPT-style model at up to 225 TFLOP/s per A100 |
# | Shah et al. 2024, abstract | on an H100 FlashAttention-2 reaches 35 % of the peak; FlashAttention-3 up to 740 TFLOP/s in float16, 75 % |
# | Dao et al. 2022, abstract | BERT-large trained 15 % faster end to end than the record of MLPerf 1.1; GPT-2 three times as fast at 1,024 tokens |
#
# ## 11. What this machine can measure
#
# A CPU has two memories too, caches and RAM, and torch has a fused kernel for it that works in tiles in the same way. So fused against separate steps can be timed here: the same pairs, with and without the table. One text, 4 heads of 64 channels, float32, one thread.

# %%
from effnlp_lessons.studies import fused_attention
from effnlp_lessons.studies.fused_attention import CAUSAL_ONLY, DENSE, FLEX, FUSED, MASKED, OURS, UNFUSED, WINDOW

fused = load_results("fused_attention")
lengths = fused_attention.lengths_of(fused)
for form in (DENSE, OURS):
    print(f"{form}, times as long as the fused kernel, median of three runs [smallest, largest]")
    for column in ("forward, full", "forward, causal", "forward and backward, full", "forward and backward, causal"):
        cells = (f"{mid:4.1f} [{low:.1f}, {high:.1f}]" for mid, low, high in fused_attention.ratios(fused, column, form, FUSED))
        print(f"  {column:28}" + " ".join(f"{n:5}: {cell}" for n, cell in list(zip(lengths, cells, strict=True))[::2]))

# %%
held = fused_attention.bytes_of(fused, "forward and backward, full")
lines(lengths, {form: [[amount / 2**20 for amount in held[form]]] for form in (DENSE, UNFUSED, OURS, FUSED)}, x_label="tokens", y_label="most MiB held",
      caption="Recorded (`fused_attention`), forward and backward. The table grows with the square of the length. Tiles grow with the length.")

# %% [markdown]
# At 256 tokens, all pairs, there is little to win: the table of four heads takes 1 MiB, and probably stays in the cache. At 4,096 tokens separate steps take about twice as long as the fused kernel, and causal, where they compute every pair and hide half, about five times. With the backward pass it is less, 1.7 and 3.4 times. Our tiles of 256 x 256 in plain PyTorch take two to three times the kernel's time. Causal,
# where they skip tiles as the kernel does, they are faster than separate steps from 1,024 tokens on. With the backward pass both take the same time there, and tiles are faster at 4,096. (Torch's own separate steps do more, to be safe, and take longer still.)
#
# Memory is the clearer gain. At 4,096 tokens, forward and backward, separate steps hold more than 700 MiB, both forms of tiles about 21.
#
# Skipping whole tiles is the other gain, and here it can be timed as well. Torch's FlexAttention compiles a kernel for a given mask. A causal window, the last 256 tokens and oneself:

# %%
for form in (MASKED, CAUSAL_ONLY, FLEX):
    try:
        cells = (f"{mid:5.2f} [{low:.2f}, {high:.2f}]" for mid, low, high in fused_attention.ratios(fused, WINDOW, form, FUSED, to_column="forward, full"))
        print(f"{form:31}" + " ".join(f"{n:5}: {cell}" for n, cell in list(zip(lengths, cells, strict=True))[::2]))
    except ValueError as error:
        print(form, "was not available:", error)
print("in units of the fused kernel over all pairs")

# %% [markdown]
# A mask saves nothing: all pairs are computed, and the mask is read as well. The causal kernel skips half of the tiles in the long run. FlexAttention skips all tiles outside the window: at 256 tokens it is slower than all pairs, at 4,096 more than three times as fast. It has no backward pass on a CPU.
#
# A small live version, on this machine and now:

# %%
live = fused_attention.run({"lengths": [1_024], "runs": 3, "window": None}, seed=0).numbers["seconds"]["forward, full"]
for form, ((mid, low, high),) in live.items():
    print(f"{form:32}1,024 tokens {mid * 1e3:6.1f} ms [quartiles {low * 1e3:.1f}, {high * 1e3:.1f}]")

# %% [markdown]
# ## 12. The yardstick
#
# An encoder of two layers reads 1,024 tokens in one pass, untrained: the table is about cost.

# %%
from effnlp_lessons.measure import cost, table
from effnlp_lessons.transformer import Encoder, TransformerConfig

sizes = TransformerConfig(vocab_size=100, max_length=1_024, d_model=256, layers=2, heads=4, d_ff=512, segments=0, dropout=0.0)


def torchs_kernel(q, k, v, key_padding_mask=None):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


models = {
    "dense": Encoder(sizes),
    "tiles of 64 x 64 in PyTorch": Encoder(sizes, attention=tiled_attention),
    "tiles of 256 x 256 in PyTorch": Encoder(sizes, attention=partial(tiled_attention, block_queries=256, block_keys=256)),
    "torch's fused kernel": Encoder(sizes, attention=torchs_kernel),
}
text = torch.zeros(1, 1_024, dtype=torch.long)
print(table({name: cost(model.eval(), text, runs=3) for name, model in models.items()}))

# %% [markdown]
# Every row has the same parameters and the same multiplications. They differ in memory, and in how much of the time goes to traffic and to Python.
#
# ## Paper and ours
#
# | | paper or released code | here |
# |---|---|---|
# | order of loops | FlashAttention: keys outside, queries inside; FlashAttention-2: queries outside | queries outside |
# | update of $\tilde o$ | line 10 of Algorithm 1 in Dao 2023 prints the inverse of the factor | the factor |
# | backward | one pass, dQ summed up in slow memory by many programs | two kernels and a small one for D, 7 products a tile instead of 5, no two programs add into one number |
# | exponentials | base e in the paper, base 2 in the released code | base 2 in Triton, base e in PyTorch; LSE natural in both |
# | float32 on a GPU | | three TF32 products (`tf32x3`), nearly float32; stated at every product |
# | masks | dropout, ALiBi, windows, shared keys (GQA) | causal, window, padding, list of blocks; no dropout, no GQA |
# | sizes of tiles | tuned by timing | chosen from machine code: in 16 bits nothing spills (some kernels in float32 do); speed never measured |
#
# The kernels were checked in the interpreter: output and gradients against dense attention in float64, LSE against torch's own; lengths from 1 to 130, queries and keys of different number, 16 to 128 channels, float32, float16, bfloat16; gradients in float64 by finite differences with tiles of 4 x 4.
#
# ## Choose by cost
#
# <details><summary><b>Any model with softmax attention on a GPU.</b></summary>
#
# Use the fused kernel that torch already has. It is exact, and costs nothing but the check that it is chosen: a mask given as a tensor, or another number format, may select a slower one.
# </details>
#
# <details><summary><b>A classifier of short texts on a laptop.</b></summary>
#
# The table is small and fits a cache. Little to gain here; look at the linear layers (notebooks 03 to 07).
# </details>
#
# <details><summary><b>Texts of 100,000 tokens.</b></summary>
#
# Memory is solved, arithmetic is not: it still grows with the square. Combine tiles with a pattern that empties whole tiles (notebook 08), or leave the softmax (notebook 10).
# </details>
#
# ## Common mistakes
#
# * **The old output is not rescaled.** Right only if each row's largest score lies in the first tile: always, in a test with one tile.
# * **$-\infty$ minus $-\infty$.** A row that has seen no key yet gives NaN, and NaN stays.
# * **The tail.** A load behind the end brings zeros or garbage. A score of zero is not "no key": it must be $-\infty$.
# * **Causal with unequal lengths.** The last query sees the last key. Aligned top-left, a model that generates sees one key.
# * **LSE without the maximum**, or in base 2 in one place and base e in another.
# * **A scale forgotten in dK.** dQ is right, and a test of dQ alone passes.
# * **One friendly size in the tests.** 128 x 128 with 64 channels has no tail and no channels to fill up.
# * **A benchmark against softmax written out by hand.** Torch's attention is fused already: compare with that.
#
# ## Quiz
#
# **1. FlashAttention is faster on a GPU because**
# <details><summary>it multiplies less</summary>No. Forward the same, backward more.</details>
# <details><summary>it moves less</summary>Yes. The table of scores never reaches the slow memory.</details>
# <details><summary>it leaves small scores out</summary>No. All pairs are computed: it is exact.</details><br>
#
# **2. A new tile holds a larger score than all before. The old output is multiplied by**
# <details><summary>exp(new maximum - old maximum)</summary>No. That is above 1: old keys would grow.</details>
# <details><summary>exp(old maximum - new maximum)</summary>Yes. At most 1. The old sum is multiplied by the same.</details>
# <details><summary>1, it is divided at the end anyway</summary>No. Then old and new weights are measured against different maxima.</details><br>
#
# **3. Twice as many keys in a tile, the same number of queries, no mask. The bytes of the forward pass**
# <details><summary>halve</summary>No. That is what twice as many queries do.</details>
# <details><summary>stay the same</summary>Yes. Each block of queries reads all keys once, in however many pieces.</details>
# <details><summary>double</summary>No. No key is read twice by one block of queries.</details><br>
#
# **4. What does the backward pass need besides Q, K, V, O and the gradient?**
# <details><summary>the weights P</summary>No. They are made again.</details>
# <details><summary>one number a query</summary>Yes. LSE, from which every weight follows.</details>
# <details><summary>the maximum of every tile</summary>No. LSE holds what all of them were for.</details><br>
#
# **5. A kernel passes all tests in the interpreter. It may still**
# <details><summary>be wrong in the tail</summary>Not if the tests have lengths that fit no tile. That is what an interpreter shows well.</details>
# <details><summary>spill registers, or have a race in time</summary>Yes. Programs run one after another there, without registers. Spills can be read in the machine code. For races a GPU is needed.</details>
# <details><summary>write outside its tensors</summary>Not for the sizes that were tried. An address outside is refused there.</details>
#
# ## Where next
#
# The homework is `homework/11_flash_attention.ipynb`. It ends with the masks of a Triton kernel. Notebook 12 leaves attention and looks at the other half of a layer.
#
# ## References
#
# * Dao, Fu, Ermon, Rudra and Ré 2022. *FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness.* arXiv 2205.14135.
# * Dao 2023. *FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning.* arXiv 2307.08691.
# * Milakov and Gimelshein 2018. *Online normalizer calculation for softmax.* arXiv 1805.02867.
# * Shah, Bikshandi, Zhang, Thakkar, Ramani and Dao 2024. *FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision.* arXiv 2407.08608.
