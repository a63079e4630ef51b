# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # Start here: what a Transformer costs
#
# Every lecture of this course makes a language model cheaper. So first: what is there to save? We take a real
# model apart and look where its parameters, its arithmetic, its time and its memory go.
#
# **Lecture topic:** Efficiency, introduction. **Reading:** 35 minutes. **Running:** about 40 seconds on two cores,
# no GPU, no network.
#
# **You need:** PyTorch, and the Transformer as in Vaswani et al. 2017. Nothing about efficiency.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. say which part of a BERT-like encoder holds most parameters, and which does most of the work;
# 2. write down the MACs of each part as a function of the text's length, and check the formula by counting;
# 3. say from which length on attention, in part and as a whole, costs more than the feed-forward, in MACs and on the
#    clock;
# 4. measure any model with the course's yardstick, and read its numbers with the right doubts.
#
# **How to read.** Run the cells from top to bottom. Where it says *predict first*, put your guess in place of
# `None`: the answer stays hidden until you do. What is folded, open after your guess.
#
# **Before anything runs.** People say: *attention is what makes a Transformer expensive.* A review has about 27 tokens.
# Do you agree, for such a text? Keep your answer in mind.

# %%
import torch

from effnlp_lessons import environment

print(environment.as_table(environment.report()))

# %% [markdown]
# A line that starts with `MEND` is followed by the command that mends it. All others are fine.

# %% [markdown]
# ## 1. The model and the text
#
# Our model is **MiniLM-L6**: a BERT with 6 layers, 384 channels and 12 heads, trained to turn a sentence into a
# vector (Wang et al. 2020; Reimers and Gurevych 2019). Our text is 10,605 sentences from movie reviews, each rated
# by about twenty people (Hutto and Gilbert 2014). Both were fetched at set-up, with their checksums. Who made them,
# and what you may do with them:

# %%
from effnlp_lessons.datasets import sources

print(sources.citations())

# %%
from effnlp_lessons.datasets import reviews, tokenizer
from effnlp_lessons.heads import sentence_vectors
from effnlp_lessons.pretrained import load_minilm

minilm = load_minilm()
data = reviews.load_reviews()
texts = data.subset("dev").text[:300] + ["A love story that left me cold."]
with torch.inference_mode():
    vectors = sentence_vectors(minilm, *tokenizer.pad(tokenizer.encode(texts)))
similarity = vectors[:-1] @ vectors[-1]
print("Nearest to:", texts[-1])
for index in similarity.topk(3).indices:
    print(f"  {similarity[index]:.2f}  {texts[index]}")

# %% [markdown]
# Sentences about the same thing get vectors at a small angle. Note what counts as *the same*: love stories find love
# stories, whether they are praised or not. Remember this when we come to the teacher. Now we open the model up.
#
# ## 2. Where the parameters are
#
# **Predict first.** A table of 30,522 word pieces with 384 numbers each, then six layers. Which share of all
# parameters is the table? (`start.share`, in per cent.)

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("start.share", my_guess)

# %% tags=["nbval-check-output"]
from effnlp_lessons.measure import count_parameters, transformer_parameters

config = minilm.config
parts = transformer_parameters(config)
print(f"counted {count_parameters(minilm):,}   by formula {sum(parts.values()):,}")

# %% tags=["reveal"]
from effnlp_lessons.widgets.page import bars

if (guess := reveal("start.share")) is not None:
    share = 100 * config.vocab_size * config.d_model / count_parameters(minilm)
    bars({part: count / 1e6 for part, count in parts.items()}, unit="million parameters",
         caption=f"The word table alone holds {share:.1f} % of MiniLM-L6 (the bar has positions and segments "
         f"too). Your guess: {guess:g} %.")

# %% [markdown]
# <details><summary><b>After your guess: what follows from it</b></summary>
#
# Half of this model is a look-up table. Looking a row up costs no arithmetic. So *a model's size and its work are
# different things*: a method that shrinks the layers to nothing would still leave half of the file. Keep this in mind
# for quantization (notebook 03) and for the capstone, where we trim the table itself.
# </details>
#
# The formula is one line per part. This is the library's code; the notebook imports it and has no copy of its own.

# %%
from effnlp_lessons.widgets.page import show_source

show_source(transformer_parameters)

# %% [markdown]
# ## 3. Where the work is: counting MACs
#
# One **MAC** is one multiplication and one addition, the step inside every matrix product. Some papers print FLOPs and
# count two per MAC; others call a MAC a FLOP. We count MACs.
#
# For one layer, $n$ tokens, $d$ channels and a feed-forward $d_{ff}$ wide:
#
# | part | matrix products | MACs |
# |---|---|---|
# | projections | four times $(n \times d)(d \times d)$ | $4nd^2$ |
# | scores and mixing | $QK^\top$ and then weights times $V$ | $2n^2d$ |
# | feed-forward | $(n \times d)(d \times d_{ff})$ and back | $2ndd_{ff}$ |
#
# Once per text comes the pooler, $d^2$. The number of heads is not in it: twelve heads of 32 channels cost what one head of 384 costs.
#
# A formula can be wrong. `count_macs` does not use one: it runs the model, sees every operation that PyTorch
# executes, and adds up the products. An operation that it does not know makes it stop.

# %% tags=["nbval-check-output"]
from effnlp_lessons.measure import block_macs, count_macs, transformer_macs

for length in (27, 128, 512):
    token_ids = torch.zeros(1, length, dtype=torch.long)
    counted = count_macs(minilm, token_ids)
    expected = transformer_macs(config, batch=1, length=length)
    print(f"{length:3} tokens: {counted.total / 1e6:8,.1f} million MACs, as the formula says: "
          f"{counted.by_part() == expected}")

# %% tags=["nbval-check-output"]
for length in (27, 128, 512):
    layer = block_macs(config, length)
    total = sum(layer.values())
    shares = ", ".join(f"{part} {100 * macs / total:4.1f} %" for part, macs in layer.items())
    print(f"{length:3} tokens: {shares}")

# %% [markdown]
# At the length of a review, attention's $n^2$ part is about one per cent of the work. Two thirds are the feed-forward.
# If you want to make *this* model cheaper on *this* text, a cheaper $n^2$ part will not help you.
#
# ## 4. Where attention overtakes
#
# **Predict first.** MiniLM-L6 has $d = 384$ and $d_{ff} = 1536$. From which length do scores and mixing cost more
# MACs than the feed-forward? (`start.crossing`, in tokens.)

# %%
my_guess = None
predict("start.crossing", my_guess)

# %% tags=["reveal"]
if (guess := reveal("start.crossing")) is not None:
    for length in sorted({128, 256, 512, 1024, 2048, 4096, round(guess)}):
        layer = block_macs(config, length)
        ratio = layer["attention scores and mixing"] / layer["feed-forward"]
        note = "   <- your guess" if length == round(guess) else ""
        print(f"{length:5} tokens: scores and mixing / feed-forward = {ratio:.2f}{note}")

# %% [markdown]
# <details><summary><b>After your guess: why there</b></summary>
#
# Set the two equal: $2n^2d = 2ndd_{ff}$, so $n = d_{ff}$, here 1,536. In most Transformers $d_{ff} = 4d$. **Scores and
# mixing overtake the feed-forward at four times the width**, whatever the depth and the number of heads. The
# projections belong to attention too; with them, attention as a whole overtakes at $n = 2d$.
# </details>

# %% tags=["reveal"]
if reveal("start.crossing") is not None:
    at = block_macs(config, config.d_ff)
    print("equal at n = d_ff:", at["attention scores and mixing"] == at["feed-forward"])
    at = block_macs(config, 2 * config.d_model)
    print("attention as a whole equals the feed-forward at n = 2d:",
          at["attention projections"] + at["attention scores and mixing"] == at["feed-forward"])

# %% [markdown]
# The explorer opens on a wider model. Drag the length: where does the blue curve meet the red one? Then choose MiniLM-L6,
# which can read 512 tokens, and BERT-large: where does the ring go, and why?

# %%
from effnlp_lessons.widgets.cost_explorer import CostExplorer

CostExplorer(length=512, model="BERT-base")

# %% [markdown]
# ## 5. And on the clock?
#
# MACs are easy to count. But nobody waits for MACs. If a MAC cost the same everywhere, the clock would put the crossing
# at the same length.
#
# **Predict first.** On the clock, do scores and mixing overtake the feed-forward *earlier*, at the *same* length or
# *later*? (`start.clock`)

# %%
my_guess = None
predict("start.clock", my_guess)

# %% [markdown]
# First a small run on your machine, then the recorded one: the same function, more lengths, five runs, on one thread of
# the machine that built this course. A layer does not know about positions, so it can be timed beyond 512.

# %% tags=["reveal"]
from effnlp_lessons.studies import cost_by_length

if (guess := reveal("start.clock")) is not None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    live = cost_by_length.run({"lengths": [256, 512, 1024, 1536], "runs": 3}, seed=0).numbers
    torch.set_num_threads(threads)
    print("tokens   scores and mixing   feed-forward   (milliseconds, your machine, one thread)")
    for index, length in enumerate(live["lengths"]):
        attention, feed_forward = (live["seconds"][part][index] for part in cost_by_length.PARTS[1:])
        note = "   <- overtaken" if attention > feed_forward else ""
        print(f"{length:6} {1e3 * attention:12.1f} {1e3 * feed_forward:18.1f}{note}")
    print("Your guess:", guess)

# %% tags=["reveal"]
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.widgets.page import lines

if reveal("start.clock") is not None:
    recorded = load_results("cost_by_length")
    lengths, series = recorded["runs"][0]["lengths"], cost_by_length.seconds_by_run(recorded)
    where = {name: "{:,.0f} tokens ({:,.0f} to {:,.0f})".format(*lengths)
             for name, lengths in cost_by_length.crossings(recorded).items()}
    lines(lengths, {part: [[1e3 * s for s in run] for run in runs] for part, runs in series.items()},
          x_label="length (tokens)", y_label="milliseconds per layer",
          caption=f"One MiniLM layer, one thread: median of {len(recorded['runs'])} recorded runs, shaded "
          f"from the smallest to the largest. Scores and mixing overtake the feed-forward at "
          f"{where['written out']} written out, at {where['fused']} fused, at {config.d_ff:,} in MACs. Attention "
          f"as a whole, written out, overtakes at {where['whole']}, in MACs at {2 * config.d_model}.")

# %% [markdown]
# <details><summary><b>After your guess: why</b></summary>
#
# Earlier, in every recorded run. The products are not the reason: at 1,536 tokens both parts do equally many. But
# attention, written out, makes a table of $n \times n$ numbers for every head, and a new one for each step: first the
# scores, then the weights. The next cell times one such step twice, into a new table and into a table that is already
# there. On our machine much of the time went into *getting the memory*, which the operating system hands out page by
# page. (The jump after 768 tokens is where a table outgrows what the allocator keeps for reuse.) On a GPU the same
# tables cost traffic to slow memory; notebook 11 shows that.
#
# The curve named *fused* is a kernel that does the same products and never makes the whole table. Even fused, attention
# overtakes before 1,536: the exponentials of the softmax take time, and count no MACs.
#
# If your machine says otherwise, believe it. The lesson holds: *a MAC saved is not a second saved*. Each method must be
# timed.
# </details>

# %% tags=["reveal"]
from effnlp_lessons.measure import latencies

if reveal("start.clock") is not None:
    scores = torch.randn(config.heads, 1024, 1024)
    there = torch.empty_like(scores)
    steps = {"a new table": lambda: scores.softmax(-1),
             "a table that is there": lambda: torch.softmax(scores, -1, out=there)}
    for name, timing in latencies(steps, runs=5).items():
        print(f"softmax of one layer's scores, 1,024 tokens, into {name}: {1e3 * timing.median:.1f} ms")

# %% [markdown]
# The explorer again, now on the clock.

# %% tags=["reveal"]
from IPython.display import display

if reveal("start.clock") is not None:
    display(CostExplorer(length=512, view="clock", times=cost_by_length.times_by_part(recorded)))

# %% [markdown]
# ## 6. Memory
#
# How many bytes must be held at once, beyond the weights? This needs no clock: the allocator is asked.

# %%
from functools import partial

from torch.nn.functional import scaled_dot_product_attention

from effnlp_lessons.dense_attention import attention_scores, dense_attention
from effnlp_lessons.measure import peak_memory

print("tokens   one layer's scores   peak, written out   peak, fused   (MB)")
for length in (128, 512, 1024):
    q = k = v = torch.zeros(1, config.heads, length, config.d_head)
    written_out = peak_memory(partial(dense_attention, q, k, v))
    fused = peak_memory(partial(scaled_dot_product_attention, q, k, v))
    scores = config.heads * length**2 * 4
    print(f"{length:6} {scores / 1e6:16.1f} {written_out / 1e6:19.1f} {fused / 1e6:13.1f}")

# %% [markdown]
# Twice the length, four times the scores; and written out, two copies of them are alive at the same moment. The
# weights of all six layers are 43 MB. At 1,024 tokens a single layer's scores are more than that.

# %% tags=["nbval-check-output"]
q = k = torch.zeros(1, config.heads, 1024, config.d_head)
layers_bytes = 4 * sum(p.numel() for p in minilm.blocks.parameters())
print(f"weights of the layers {layers_bytes / 1e6:.0f} MB; scores of one layer at 1,024 tokens "
      f"{attention_scores(q, k).nbytes / 1e6:.0f} MB")

# %% [markdown]
# ## 7. The yardstick
#
# Every lecture ends with one table, made by one function. Five numbers per model: parameters, bytes on disk, MACs,
# latency, peak memory. None of them replaces another.
#
# * *On disk* is the size of a file that was really written.
# * *MACs* are exact, and the same on every machine.
# * *Peak memory* is what torch's allocator counted. It repeats, up to the kernels' own small buffers.
# * *Latency* is a median with its quartiles, on your machine, today. Trust ratios from one run, not seconds.
#
# Attention is written out here, as in all of this notebook.

# %%
from effnlp_lessons.measure import cost, table

costs = {}
for length in (16, 128, 512):
    token_ids = torch.randint(1000, 30_000, (1, length))
    costs[f"MiniLM-L6, {length} tokens"] = cost(minilm, token_ids, runs=7)
print(table(costs))

# %% [markdown]
# ### Free of charge: do not compute padding
#
# One saving needs no new method. Sentences in a batch are padded to the longest. Count the token slots of one epoch
# over the training reviews, in batches of 32.

# %% tags=["nbval-check-output"]
from effnlp_lessons.training import bucketed_batches

lengths = [len(ids) for ids in tokenizer.encode(data.subset("train").text)]


def slots(batches):
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


generator = torch.Generator().manual_seed(0)
random_order = bucketed_batches(lengths, 32, generator, pool=1)
by_length = bucketed_batches(lengths, 32, generator)
longest = max(lengths) * len(lengths)
print(f"a review has {sum(lengths) / len(lengths):.1f} tokens on average")
print(f"real tokens {sum(lengths) / 1e3:.0f} k; all padded to the longest {longest / 1e3:.0f} k")
print(f"random batches use {slots(random_order) / sum(lengths):.2f} slots per token")
print(f"batches of similar length use {slots(by_length) / sum(lengths):.2f}")

# %% [markdown]
# ### The teacher
#
# A cheap model that is wrong is no use, so beside cost we need accuracy. The course's task: is a review positive or
# negative? The course's **teacher** is MiniLM-L6 fine-tuned for it. What is shipped is only the
# difference to MiniLM, of low rank (Hu et al. 2021), a file of about a megabyte.

# %%
from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.pretrained import load_teacher, teacher_path

study = load_results("teacher")
print("recorded, dev accuracy by seed:", ", ".join(f"{run['dev accuracy']:.1f} %" for run in study["runs"]))
shipped = study["shipped"]
print(f"shipped is seed {shipped['seed']}, {teacher_path().stat().st_size / 1e6:.2f} MB: "
      f"dev {shipped['dev accuracy']:.1f} %, test {shipped['test accuracy']:.1f} % (read once)")

teacher = load_teacher()
sample = ReviewExamples(data.subset("dev"), limit=200)
print(f"measured now on 200 dev sentences: {accuracy(teacher, sample):.1f} %")

# %% [markdown]
# The course compares many models by accuracy and by cost, so keep this one: it is the first point of a plot of your own,
# which lasts between notebooks. Later lectures add theirs.

# %%
from effnlp_lessons.measure import bytes_on_disk
from effnlp_lessons.widgets.own_models import TOKENS, keep_model, show_kept_models

one_review = torch.ones(1, TOKENS, dtype=torch.long)
keep_model("00", "teacher", accuracy=accuracy(teacher, sample), examples=200,
           macs=count_macs(teacher, one_review).total, bytes_on_disk=bytes_on_disk(teacher))
show_kept_models()

# %% [markdown]
# Read these numbers with doubt. The standard error of an accuracy is $\sqrt{p(1-p)/n}$: 2.5 points on 200 sentences, 1.0
# on dev's 1,000, 0.8 on test's 2,000. And the shipped seed is the best of four *on dev*, so its dev accuracy is partly
# luck; the test split, read once, is not chosen. The course gives the spread wherever it compares.
#
# The same training function runs here on 256 sentences for one epoch, to see that it runs. It learns next to nothing
# from so few: compare it with always saying *positive*.

# %%
from effnlp_lessons.studies import teacher as teacher_study

setting = study["runs"][0]["setting"] | {"epochs": 1, "sentences": 256}
live = teacher_study.run(setting, seed=0).numbers
positive = 100 * ReviewExamples(data.subset("dev"), limit=256).labels.double().mean()
print(f"on 256 dev sentences: {live['dev accuracy']:.0f} % right; always positive: {positive:.0f} %")

# %%
with torch.inference_mode():
    for text in ("A warm, funny film that trusts its actors.", "Two hours of noise without a single idea.",
                 "I have rarely been so bored by so many explosions.", "A story that left me cold.",
                 "A love story that left me cold."):
        negative, positive = teacher(*tokenizer.pad(tokenizer.encode([text]))).softmax(-1)[0]
        print(f"positive {100 * positive:5.1f} %   {text}")

# %% [markdown]
# The last one is wrong, and one word makes the difference. On the test split about one sentence in seven goes wrong.
# This teacher is what every compressed model of the course is compared with.

# %% [markdown]
# ## 8. What attention does with your sentence
#
# Now that we know what attention costs, see what it does. **Change the sentence and run the cell again.** Up to about
# 25 words read well. Each square is a head: rows are the tokens that look, columns the tokens they look at.

# %%
from effnlp_lessons.dense_attention import masked_softmax
from effnlp_lessons.widgets.page import attention_maps

sentence = "The plot is thin, but the actors make it work."
layer = 3  # 0 to 5
assert layer in range(config.layers), f"layer must be 0 to {config.layers - 1}, got {layer}"

encoded = tokenizer.load_tokenizer().encode(sentence)
with torch.inference_mode():
    scores = minilm(torch.tensor([encoded.ids]), return_scores=True).scores
weights = torch.stack([masked_softmax(raw, None)[0] for raw in scores])  # (layers, heads, length, length)
attention_maps(weights[layer], encoded.tokens,
               caption=f"The {config.heads} heads of layer {layer}. Dark: much weight.")

# %% [markdown]
# With our sentence most squares are nearly empty, and many have one dark column at the left. How much of all attention
# goes to the two tokens that are no words, `[CLS]` and `[SEP]`?

# %%
ends = weights[..., [0, -1]].sum(-1).mean((1, 2))
uniform = 2 / len(encoded.ids)
print(f"if attention were even: {100 * uniform:.0f} %")
print("by layer:", ", ".join(f"{100 * share:.0f} %" for share in ends))

# %% [markdown]
# A head that has nothing to say must still spend its weight, for the softmax sums to one. It seems to park it at the
# ends (Clark et al. 2019, sec. 3.2, on `[SEP]` in BERT). But much weight need not mean much effect. Which of the $n^2$
# pairs can be left out is the question of notebooks 08 to 10.

# %% [markdown]
# ## Paper and ours
#
# | what | printed | here |
# |---|---|---|
# | parameters of BERT-base | 110 M (Devlin et al. 2018, sec. 3) | see the cell below |
# | FLOPs of BERT-base | 22.5 B (Jiao et al. 2019, Table 1) | see the cell below |

# %% tags=["nbval-check-output"]
from effnlp_lessons.transformer import BERT_BASE

macs = BERT_BASE.layers * sum(block_macs(BERT_BASE, length=128).values())
print(f"BERT-base: {sum(transformer_parameters(BERT_BASE).values()):,} parameters")
print(f"BERT-base at 128 tokens: {macs / 1e9:.2f} G MACs = {2 * macs / 1e9:.2f} G FLOPs")

# %% [markdown]
# The printed FLOPs are 0.7 % above twice our MACs at 128 tokens; what the rest is, we do not know. Before you compare two
# tables, ask both: one or two per MAC, and at which length?

# %% [markdown]
# ## Choose by cost
#
# Three situations. What would you make cheaper first? Think, then open.
#
# <details><summary><b>A phone, one short message at a time, 25 MB for the app.</b></summary>
#
# Bytes. Half of MiniLM's 91 MB is the word table. Fewer bits a weight (03), a smaller table (14). A faster
# attention changes nothing at 20 tokens.
# </details>
#
# <details><summary><b>A server that scores a million reviews a night.</b></summary>
#
# MACs of the feed-forward and the projections, and padding. Batches of similar length first: they are free. Then a
# smaller student (01, 02), integers (03), structured pruning (07).
# </details>
#
# <details><summary><b>A document of 16,000 tokens.</b></summary>
#
# The n² part, in time and in memory. A pattern (08), buckets (09), a linear or recurrent form (10, 13), or the exact
# fused kernel (11).
# </details>

# %% [markdown]
# ## The map of the course
#
# | topic | notebooks | saves |
# |---|---|---|
# | knowledge distillation | 01, 02 | layers and width: a small model learns from a large one |
# | quantization | 03, 04 | bits per number |
# | pruning | 05, 06, 07 | weights, heads, neurons |
# | efficient attention | 08, 09, 10, 11 | the n² pairs, or the bytes moved for them |
# | efficient architectures | 12, 13 | work per token (experts), or attention itself (state spaces) |
# | all together | 14 | the teacher, within one point of accuracy |

# %% [markdown]
# ## Common mistakes
#
# * **"Attention is the expensive part."** In MACs, not below twice the width. On the clock it depends on the kernel; at
#   the length of a review it never was, here.
# * **Comparing FLOPs with MACs.** A factor of two looks like a result.
# * **Timing once.** The first call sets things up; later calls vary. Warm up, repeat, show the spread.
# * **Padding in the average.** A mean over padded positions makes a sentence's vector depend on its neighbours in the
#   batch.
# * **Calling a file small because the numbers in it are simple.** Zeros take four bytes each until someone writes them
#   differently.

# %% [markdown]
# ## Quiz
#
# **1. You halve the number of heads and keep the width. The MACs of attention**
# <details><summary>halve</summary>No. Each head gets twice the channels: heads times channels per head stays d.</details>
# <details><summary>stay the same</summary>Yes. Both parts of the formula, 4nd² and 2n²d, know only d.</details>
# <details><summary>double</summary>No. Fewer, wider heads do the same products.</details><br>
#
# **2. MiniLM-L6 reads sentences of 20 tokens. Which change saves most MACs?**
# <details><summary>scores and mixing at no cost at all</summary>No. At this length they are below one per cent.</details>
# <details><summary>a feed-forward half as wide</summary>Yes. It is two thirds of the work, so a third is saved.</details>
# <details><summary>half the vocabulary</summary>No. Look-ups cost no MACs. It saves bytes on disk.</details><br>
#
# **3. A fused kernel gives the same numbers several times faster. It saves**
# <details><summary>MACs</summary>No. The same products are computed.</details>
# <details><summary>memory, and the traffic to it</summary>Yes. The table of scores never exists as a whole.</details>
# <details><summary>parameters</summary>No. Attention's n² part has none.</details><br>
#
# **4. Ninety per cent of a layer's weights are set to zero. The file, stored as before, is**
# <details><summary>a tenth</summary>No. A zero in float32 takes four bytes like any number.</details>
# <details><summary>as large as before</summary>Yes. Size and time change only when the format or the shape does (05, 07).</details>
# <details><summary>larger</summary>Not as stored here; but a sparse format with indices can be, at few zeros (05).</details><br>
#
# **5. Model A gets 88.0 %, model B 87.6 % on the same 2,000 test sentences, one run each.**
# <details><summary>A is better</summary>Not shown. The standard error of each is √(.88 · .12 / 2000), 0.7 points.</details>
# <details><summary>They cannot be told apart</summary>Yes, not from one run. Several seeds, or a paired test, might.</details>
# <details><summary>They are equal</summary>Not shown either. No difference seen is not no difference.</details>

# %% [markdown]
# ## Where next
#
# The homework to this notebook is `homework/00_start_here.ipynb`: five short exercises with instant feedback. After
# it, any topic can come first; the notebooks of one topic build on each other.
#
# ## References
#
# * Clark, Khandelwal, Levy, Manning 2019. *What Does BERT Look At?* arXiv 1906.04341.
# * Devlin, Chang, Lee, Toutanova 2018. *BERT.* arXiv 1810.04805.
# * Hu et al. 2021. *LoRA: Low-Rank Adaptation of Large Language Models.* arXiv 2106.09685.
# * Hutto, Gilbert 2014. *VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text.* ICWSM.
# * Jiao et al. 2019. *TinyBERT.* arXiv 1909.10351.
# * Pang, Lee 2004. *A Sentimental Education.* ACL. arXiv cs/0409058. (The source of the sentences.)
# * Reimers, Gurevych 2019. *Sentence-BERT.* arXiv 1908.10084.
# * Vaswani et al. 2017. *Attention Is All You Need.* arXiv 1706.03762.
# * Wang et al. 2020. *MiniLM.* arXiv 2002.10957.
