# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # Distilling a pre-trained model: what inside the teacher is worth copying?
#
# In notebook 01 the teacher had a task, and the student learned its answers. A pre-trained model has no task yet. It has
# words, layers, hidden states and attention. DistilBERT, TinyBERT and MobileBERT each copy a different part of this. This
# notebook takes the three apart, and measures which part helps a small student of MiniLM most.
#
# **Lecture topic:** Knowledge distillation, before the task is known. **Reading:** 60 minutes. **Running:** about 40
# seconds on two cores, no GPU, no network.
#
# **You need:** notebooks 00 and 01. Parts marked *(depth)* can wait.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. place a method in the table *when does it distil, what does it match*;
# 2. start a student from its teacher's layers, and say which ones DistilBERT really takes;
# 3. write TinyBERT's losses so that padding cannot enter, and map layers to layers;
# 4. read a MobileBERT block, and count its parameters;
# 5. judge a student by what it can do.
#
# **Two questions from notebook 01.** Answer, then open.
#
# <details><summary>What does <code>reduction="mean"</code> do to a soft loss over 30,522 words?</summary>
#
# It divides by the number of classes too: the loss is 30,522 times too small.
# </details>
# <details><summary>A student gains from a teacher's answers to unlabelled text. Which control is missing?</summary>
#
# The same text with the teacher's hard pseudo-labels.
# </details>

# %% [markdown]
# **A question before anything runs.** A student with half of its teacher's layers is trained until its hidden states come close
# to the teacher's. Two students used two different layer mappings. The one with the *smaller* training loss is
# (`pretraining.loss`: "better", "worse" or "cannot be said")

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("pretraining.loss", my_guess)

# %% [markdown]
# ## 1. One table for three papers
#
# | | when | word distribution | masked word | embeddings | hidden states | attention |
# |---|---|---|---|---|---|---|
# | Hinton 2015, Turc 2019 (notebook 01) | task | classes of the task | Turc: in its own pre-training | | | |
# | **DistilBERT** (Sanh 2019) | pre-training | yes ($T = 2$ in the code) | yes | copied at the start | last layer, direction only | |
# | **TinyBERT** (Jiao 2019) | pre-training, then task | task's classes, at the end | | squared error | squared error, mapped layers | *raw scores*, squared error |
# | **MobileBERT** (Sun 2020) | pre-training | yes | yes | copied at the start | squared error, every layer | *distributions*, divergence |
#
# The teacher of this notebook is MiniLM-L6 as published: six layers, 384 wide, no task. It was itself distilled (Wang et al.
# 2020) and then trained to give sentence vectors, and it comes **without a head for masked words**. So the losses over words are
# shown and tested here, but not used to rank anything: to train a useful masked language model takes days, and we have minutes.
#
# ## 2. DistilBERT: half the layers, and a good start (Sanh et al. 2019)
#
# The student is a BERT with half the layers, without segment embeddings and without the pooler. It starts from its teacher's own
# weights: "one layer out of two", says the paper. Which ones?

# %% tags=["nbval-check-output"]
from dataclasses import replace

from effnlp_lessons.distillation.distilbert import alternate_layers, student_config, student_from_teacher
from effnlp_lessons.distillation.well_read import encoder_parameters
from effnlp_lessons.transformer import TransformerConfig

bert_base = TransformerConfig(d_model=768, layers=12, heads=12, d_ff=3_072)
print("counted from 0; 12 -> 6 layers, as released:", alternate_layers(12, 6))
print("MiniLM's 6 -> 3:", alternate_layers(6, 3))
print(f"BERT-base  {encoder_parameters(bert_base):11,} parameters with pooler and segments")
print(f"DistilBERT {encoder_parameters(student_config(bert_base, 6)):11,} without: half the layers, but 61 % of the parameters")

# %% [markdown]
# Not every second one: 0, 2, 4, 7, 9, 11, evenly spread with the first and the last kept. (Users keep asking about this:
# transformers #3585.) Why not 50 % of the parameters? The token table, 23.4 of the 109.5 million, is kept whole.
#
# How good is such a start, before any training? We ask for **agreement**: of 300 reviews, for how many is the nearest other review
# the same for student and teacher? (`start` copies layers, and keeps segments and pooler, so that nothing but the layers differs.)

# %%
import torch

from effnlp_lessons.classification import ReviewExamples
from effnlp_lessons.datasets import reviews, tokenizer
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.studies.layer_losses import agreement, start, vectors

minilm = load_minilm()
dev = ReviewExamples(reviews.load_reviews().subset("dev"), limit=300)
of_teacher = vectors(minilm, dev)
for name, layers in (("DistilBERT's choice", alternate_layers(6, 3)), ("the first three", (0, 1, 2)), ("the last three", (3, 4, 5))):
    print(f"{name:20} {layers}: the nearest neighbour agrees for {agreement(vectors(start(layers).eval(), dev), of_teacher):.0f} %")

# %% [markdown]
# Chance would be a third of a per cent. (On all 1,000 dev reviews, which sections 4 and 5 use, a neighbour is harder to agree
# on: there the first of these three has 16.5 %, and chance is 0.1 %.) So layers of a Transformer can be left out, and something
# remains: each layer adds a little to what passes through it. The last layer helps, since the sentence vectors are read from it.
#
# ### Three losses
#
# $$L = a_{ce}\,T^2\,\mathrm{KL}\big(p_{\text{teacher}} \,\|\, p_{\text{student}}\big) + a_{mlm}\big(-\log p_{\text{student}}(\text{word})\big)
# + a_{cos}\big(1 - \cos(h_S, h_T)\big)$$
#
# The first compares whole distributions over 30,522 words, the second asks for the hidden word, the third for the direction of the last
# hidden state. The released code takes the first over *all* real tokens, the second at masked ones, with weights 5, 2, 1 in
# one published command. (The paper prints no weights, and its first loss without the minus sign.)
#
# **Dynamic masking.** Which words are to be guessed is drawn anew each time a sentence is read. 15 % of the tokens are chosen; of
# these 80 % become `[MASK]`, 10 % a random word, 10 % stay as they are. In the released code rare words are chosen more often.

# %%
from effnlp_lessons.distillation.distilbert import count_tokens, mask_tokens

vocabulary = tokenizer.load_tokenizer()
counts = count_tokens(tokenizer.encode(reviews.load_reviews().subset("train").text))
sentence = "the film is a quiet masterpiece, and the actors are wonderful."
token_ids, mask = tokenizer.pad(tokenizer.encode([sentence]))
generator = torch.Generator().manual_seed(1)
for _ in range(2):
    masked = mask_tokens(token_ids, mask, generator, token_counts=counts)
    print(" ".join(vocabulary.id_to_token(int(token)) for token in masked.token_ids[0]))
    print("    to be guessed:", [vocabulary.id_to_token(int(t)) for t in masked.targets[0][masked.chosen[0]]])

# %% [markdown]
# Now the three losses on this sentence, with a small teacher of random weights. The student is copied from it. Watch which loss
# is 0 when the student *is* its teacher, and which is not.

# %% tags=["nbval-check-output"]
from effnlp_lessons.distillation.distilbert import masked_language_student, triple_loss
from effnlp_lessons.heads import MaskedLanguageModel
from effnlp_lessons.transformer import Encoder

small = TransformerConfig(d_model=64, layers=4, heads=4, d_ff=128, segments=0, pooler=False)
word_teacher = MaskedLanguageModel(Encoder(small, seed=0), seed=0).eval()
for name, layers in (("all four layers copied", (0, 1, 2, 3)), ("layers 0 and 3 copied", alternate_layers(4, 2))):
    word_student = masked_language_student(word_teacher, layers, copy_transform=True).eval()
    loss = triple_loss(word_student, word_teacher, masked, mask)
    zero = ["0" if part.item() < 1e-6 else "above 0" for part in loss]
    print(f"{name}: soft targets {zero[0]}, masked words {zero[1]}, cosine {zero[2]}")

# %% [markdown]
# The masked word is not the teacher's opinion but the truth, so its loss stays. The other two are 0 once the student equals its
# teacher.
#
# ## 3. TinyBERT: layer by layer (Jiao et al. 2019)
#
# TinyBERT-4 is *narrower* than its teacher, so it cannot start from the teacher's weights. Instead each of its layers gets a
# teacher of its own: student layer $m$ learns from teacher layer $g(m)$. (TinyBERT-6 is as wide as BERT-base.)
#
# $$L_{\text{embd}} = \mathrm{MSE}(E_S W_e, E_T) \qquad L_{\text{hidn}} = \mathrm{MSE}(H_S W_h, H_T) \qquad
# L_{\text{attn}} = \frac1h \sum_{i=1}^{h} \mathrm{MSE}(A_{S,i}, A_{T,i})$$
#
# $E$ are the embeddings, $H$ the hidden states of one layer, $S$ student, $T$ teacher, $h$ the number of heads. The total is
# $L_{\text{embd}}$ plus, over the student's layers, $L_{\text{hidn}} + L_{\text{attn}}$; at the end, for the task, a soft loss.
#
# $W_e$ and $W_h$ lift the student's width to its teacher's. They are learned, and thrown away at the end. $A$ are the **raw scores**
# $QK^\top/\sqrt{d}$, before the softmax. Student and teacher have the same number of heads, so a student of width 312 has heads of 26
# channels.

# %% tags=["nbval-check-output"]
from effnlp_lessons.distillation.tinybert import TINYBERT_4, TINYBERT_6, LayerLosses, layer_mapping

for name, config in (("TinyBERT-4", TINYBERT_4), ("TinyBERT-6", TINYBERT_6)):
    print(f"{name}: {encoder_parameters(config):,} parameters, heads of {config.d_model // config.heads} channels")
narrow = LayerLosses(TINYBERT_4, bert_base)
print("projections of TinyBERT-4, thrown away afterwards:", sum(p.numel() for p in narrow.parameters()))
for strategy in ("uniform", "top", "bottom"):
    print(f"g for 4 of 12 layers, {strategy:7}: {layer_mapping(4, 12, strategy)}")

# %% [markdown]
# In $g$ the first number, 0, stands for the embeddings, and the last, $N + 1$, for the prediction. Layers count from 1 here.
#
# **Scores, not probabilities.** Add a constant to a whole row of scores, and the softmax does not change; the raw score loss does. So
# it asks for more than equal attention. MobileBERT compares distributions.
#
# **Padding.** In the released code padded scores are about $-10{,}000$; both sides are set to 0 there. Ours are left out of the mean, and
# the loss cannot depend on what stands there:

# %% tags=["nbval-check-output"]
from effnlp_lessons.distillation.mobilebert_transfer import attention_transfer
from effnlp_lessons.distillation.tinybert import attention_loss, hidden_loss

student_of_minilm = start(alternate_layers(6, 3)).eval()
token_ids, mask = tokenizer.pad(tokenizer.encode([sentence, "dull."]))
changed = token_ids.masked_fill(~mask, 2_000)  # other words in the padding
for name, loss, what in (("hidden states", hidden_loss, "hidden"), ("raw scores", attention_loss, "scores"),
                         ("distributions", attention_transfer, "scores")):
    found = []
    for ids in (token_ids, changed):
        with torch.inference_mode():
            mine, theirs = (model(ids, mask, return_scores=True) for model in (student_of_minilm, minilm))
        found.append(loss(getattr(mine, what)[-1], getattr(theirs, what)[-1], mask))
    print(f"{name:14} loss above 0: {bool(found[0] > 0)}, unchanged by what stands in the padding: {torch.allclose(*found, rtol=1e-5)}")
row = torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(0))
for name, loss in (("raw scores", attention_loss), ("distributions", attention_transfer)):
    print(f"all scores plus 3: {name} {loss(row, row + 3).abs().item():.1f}")

# %% [markdown]
# ### Two stages, and new sentences
#
# TinyBERT is taught twice. In the **general** stage the teacher has no task, the text is anything, and layers are matched. In the **task** stage
# the teacher is fine-tuned and the text is the task's, *augmented*: of each sentence some variants are made, and the teacher answers them. First the
# layers are matched again, then the predictions. For the variants each word may be exchanged, with probability 0.4, for one of its 15
# candidates (the paper draws 20 variants; below 4 of 8 candidates). Stop words and punctuation stay.
#
# * a word that is a single piece is masked, and the masked-word model fills the gap;
# * a word of several pieces takes the words with the nearest vectors.
#
# MiniLM has no masked-word head, so we train a small one, for some seconds, on top of its frozen layers.

# %%
from effnlp_lessons.distillation.augmentation import augment, mean_piece_vectors, nearest_words, split_words

text = reviews.load_reviews().subset("train").text
filler = MaskedLanguageModel(minilm.requires_grad_(False), seed=0)
ids, real = tokenizer.pad(tokenizer.encode(text[:600], max_length=32))
masked = mask_tokens(ids, real, torch.Generator().manual_seed(0))
with torch.inference_mode():
    states = torch.cat([minilm(a, b).last[c] for a, b, c in zip(masked.token_ids.split(50), real.split(50), masked.chosen.split(50), strict=True)])
states, targets = states.clone(), ids[masked.chosen]
frequency = torch.log((counts + 0.1) / counts.sum())
filler.bias.data.copy_(frequency)  # begin with how frequent each word is
optimizer = torch.optim.Adam([*filler.transform.parameters(), *filler.norm.parameters()], lr=1e-3)
for _ in range(4):
    for rows in torch.randperm(len(targets), generator=generator).split(256):
        loss = torch.nn.functional.cross_entropy(filler.words(states[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"{len(targets):,} masked words, last training loss {loss.item():.2f} nats; "
      f"by frequency alone {-frequency[targets].mean():.2f}")

# %%
words = {word for review in text[:3_000] for word in split_words(review, vocabulary) if word.isalpha()}
word_vectors = mean_piece_vectors(sorted(words), vocabulary, minilm.embeddings.tokens.weight)
for word in ("masterpiece", "heartwarming", "tedious"):
    print(f"{word:13} nearest by our vectors: {', '.join(nearest_words(word, word_vectors, 5))}")
print()
for variant in augment(sentence, vocabulary, filler, torch.Generator().manual_seed(3), word_vectors, samples=4, candidates=8):
    print(variant)

# %% [markdown]
# Look at the last two words: their neighbours share *pieces* with them (heart, ##ious), since our vector of a word is the mean of its
# pieces. That is spelling, not meaning. *Masterpiece* has better neighbours, but it is a single piece, so `augment` masks it
# instead. The paper takes GloVe vectors, made of the company that a word keeps.
#
# The fillers are poor: mostly commas, full stops and *the*. On the sentences that it was trained on, the head is about one nat better
# than word frequencies, and 600 sentences are too few to learn more. So this is the mechanism, and no measure of TinyBERT's
# augmentation. The teacher answers each variant itself: no label of the old sentence is carried to a new one that it may not fit.
#
# ## 4. Which layer learns from which?
#
# Three student layers, six teacher layers: 20 mappings that keep the order. All 20 students began with the same copied layers and
# learned TinyBERT's hidden states and scores, 100 steps on 1,600 general sentences, three seeds. They are judged on 1,000 dev
# reviews: by agreement with MiniLM, and by a *probe*, a linear classifier on their frozen sentence vectors, trained on 1,500
# labels. Layers count from 1, as in the paper, so the start 0, 2, 5 of section 2 is 1-3-6 here.
#
# **Predict first.** Which strategy gives the best agreement: "uniform" (2-4-6), "top" (4-5-6), "bottom" (1-2-3), or "tie" of the first
# two? (`pretraining.mapping`)

# %%
my_guess = None
predict("pretraining.mapping", my_guess)

# %% tags=["reveal"]
from statistics import median

from effnlp_lessons.studies import layer_mappings
from effnlp_lessons.studies.runner import load_results

if (guess := reveal("pretraining.mapping")) is not None:
    found = layer_mappings.scores(load_results("layer_mappings"))
    ranked = sorted(found, key=lambda mapping: -median(found[mapping]["agreement"]))
    print("mapping    agreement with MiniLM (%)    probe right (%)    training loss")
    for mapping in [*ranked[:3], *(layer_mapping(3, 6, s)[1:-1] for s in ("uniform", "top", "bottom"))]:
        row = found[mapping]
        spread = f"{median(row['agreement']):.1f} ({min(row['agreement']):.1f} to {max(row['agreement']):.1f})"
        print(f"{'-'.join(map(str, mapping)):9}  {spread:27}  {median(row['accuracy']):<17.1f}  {median(row['loss']):.2f}"
              f"   rank {ranked.index(mapping) + 1}")
    untrained = load_results("layer_losses")["runs"][0]["results"]["none"]
    print(f"untrained  {untrained['agreement']:<27.1f}  {untrained['accuracy']:.1f}")
    print("Your guess:", guess)

# %% [markdown]
# And now to the guess about the smaller loss, at the top of the notebook:

# %% tags=["reveal"]
if (guess := reveal("pretraining.loss")) is not None:
    found = layer_mappings.scores(load_results("layer_mappings"))
    ranked = sorted(found, key=lambda mapping: -median(found[mapping]["agreement"]))
    lowest = sorted(found, key=lambda mapping: median(found[mapping]["loss"]))
    for mapping in lowest[:3]:
        print(f"{'-'.join(map(str, mapping))}: loss {median(found[mapping]['loss']):.2f}, number {lowest.index(mapping) + 1} of 20; "
              f"agreement {median(found[mapping]['agreement']):.1f} %, number {ranked.index(mapping) + 1} of 20")
    print("Your guess about the smaller loss:", guess)

# %% [markdown]
# <details><summary><b>After your guesses: what the twenty mappings say</b></summary>
#
# The ten mappings whose last layer learns from MiniLM's last are far ahead of the ten others, on every seed: agreement is read from the
# last layer. The ten others fall to 3 to 7 %, far below the untrained 16.5 %: a last layer that is pulled towards an inner layer of the
# teacher forgets what it could do. *Uniform* and *top* are a tie, *bottom* is the worst of all. The best is 1-3-6, the layers that the
# student started from; it may have least to change. The paper, which trains far longer and measures accuracy on tasks, found uniform
# ahead (75.6; top 70.9, bottom 71.3).
#
# And the loss? Student layer 1 is a copy of MiniLM's layer 1. With $g(1) = 1$ it has nothing to learn, and the loss ends at 1.9 to 3.6;
# with any other $g(1)$ it ends at about 7 to 9. That is what the loss tells. The smallest one happens to belong to the best mapping,
# the second smallest to number 12, and the runner-up has nearly four times the best loss. The probe ranks otherwise again: all medians
# lie within three points, and 1-3-5, number 11 in agreement, is on top. **Agreement, accuracy and loss are three questions.**
# </details>
#
# In the picture (means, not medians) drag the lines. Guess first; it holds the answers. Find a mapping with a small loss and a bad
# score, and one with a large loss and a good score. What do all good mappings have in common?

# %%
from effnlp_lessons.widgets.layer_mapping_explorer import LayerMappingExplorer

LayerMappingExplorer(mapping=(1, 3, 5))

# %% [markdown]
# ## 5. Which loss teaches most?
#
# Now the losses of the three papers, from one start, on the same sentences, 200 steps. Uniform mapping where there is one. The
# control is the untrained copy.
#
# **Predict first.** Which single loss gives the best agreement with MiniLM? (`pretraining.losses`: "last layer" is DistilBERT's cosine,
# "hidden states" the squared error of all three layers, "attention" scores or distributions alone)

# %%
my_guess = None
predict("pretraining.losses", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.studies.layer_losses import NONE
from effnlp_lessons.widgets.page import dots

if (guess := reveal("pretraining.losses")) is not None:
    runs = load_results("layer_losses")["runs"]
    quantities = {"agreement": "agreement (%)", "accuracy": "probe right (%)", "fine-tuned": "fine-tuned right (%)"}
    columns = {name: {words: [run["results"][name][what] for run in runs] for what, words in quantities.items()}
               for name in runs[0]["results"]}
    dots({name: {words: (median(c), min(c), max(c)) for words, c in row.items()} for name, row in columns.items()},
         grey=[NONE], from_zero=False,
         caption=f"Three-layer students of MiniLM after {runs[0]['steps']} steps, on dev reviews. Dot: median of the recorded "
         "seeds; bar: smallest to largest. Probe and fine-tuning use 1,500 labels. Grey: the start, untrained.")
    for name, row in columns.items():
        print(f"{name:43} " + "   ".join(f"{words.split(' (')[0]} {median(c):.1f}" for words, c in row.items()))
    print("Your guess:", guess)

# %% [markdown]
# <details><summary><b>After your guess: what each loss buys</b></summary>
#
# **Agreement** nearly doubles with hidden states, and with the cosine of the last layer almost as much. Attention alone makes it
# *worse* than the untrained start. A likely reason: it says which tokens to read, not what to pass on, and nothing holds the last layer
# in place. The sums land in between; in them the attention term outweighs the other (about 50 times at the start for TinyBERT, 9 times for
# MobileBERT). We did not vary the weights. In TinyBERT's paper attention helps: without it 71.0 instead of 75.6. There the training is
# long, the student narrower, and accuracy is what counts. So ours is a finding about few steps from a good start, not about the papers.
#
# **Accuracy** tells another story. The probe gains 1.6 points with the cosine and 1.3 with hidden states (medians), less than one
# with MobileBERT's sum, none with TinyBERT's, and loses about two with attention alone. One point is ten of the 1,000 reviews. After
# fine-tuning on 1,500 labels no taught student is better than the untrained copy, and TinyBERT's sum is below it on every seed. In
# notebook 01 the same reading (the cosine) gained one to three points for three layers that began with MiniLM's *first* ones, on other
# reviews and with another learning rate. It fits: the worse the start, the more there is to gain.
#
# **So:** ask what the student is for. If its vectors are to replace the teacher's in a search engine, agreement counts. If it will be
# fine-tuned anyway, copy well, and measure whether anything beyond that pays.
# </details>

# %% [markdown]
# ## 6. MobileBERT: thin and deep (Sun et al. 2020)
#
# DistilBERT makes the student shallow. MobileBERT keeps all 24 layers of BERT-large and makes each *thin*. A block is 512 wide at its
# ends and 128 wide inside: a **bottleneck**. Its teacher, IB-BERT, is 512 wide at its ends too, and 1,024 inside. So the maps between blocks have
# the same shape in both, and can be compared without any projection.
#
# A block with input $x$, where *norm* is NoNorm, explained below, and $u$, $s$ and $a$ are 128 wide:
#
# | part | formula | |
# |---|---|---|
# | into the bottleneck | $u = \text{norm}(W_{in}\,x)$ | 512 to 128: the residual stream of the block |
# | queries and keys read | $s = \text{norm}(W_{sh}\,x)$ | 512 to 128, *another* bottleneck, shared by the two |
# | values read | $x$ | 512 wide, not squeezed |
# | attention | $a = \text{norm}(W_o\,\text{Attn} + u)$ | four heads of 32 |
# | four times | $a \leftarrow \text{norm}(W_2\,\text{ReLU}(W_1 a) + a)$ | 128 to 512 to 128, stacked |
# | out again | $y = \text{norm}(W_{out}\,a + x)$ | 128 to 512, residual from the block's *input* |
#
# The parts of a block: two bottlenecks in 131,840 parameters, attention 115,456, four feed-forwards 527,872, out again 67,072. **Why
# four feed-forwards?** In a BERT layer, attention has half as many parameters as the feed-forward. Here values read 512 wide. With one
# feed-forward, attention would weigh 0.9 times as much as it; with four it is 0.2.
#
# **NoNorm** takes the place of layer normalisation: $\gamma \odot h + \beta$, no mean, no variance. **Trigrams:** the token table
# is only 128 wide; next, own and previous vector side by side make 384, and a linear layer lifts them to 512.
#
# **Predict first.** MobileBERT has twice as many layers as BERT-base. How many MACs does its encoder need for 128 tokens, in per cent of BERT-base's?
# (`pretraining.mobile`)

# %%
my_guess = None
predict("pretraining.mobile", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.distillation.mobilebert import IB_BERT_LARGE, MOBILEBERT, MOBILEBERT_TINY, MobileBert
from effnlp_lessons.measure import count_macs, transformer_macs

if (guess := reveal("pretraining.mobile")) is not None:
    base = sum(transformer_macs(bert_base, 1, 128).values())
    mobile = count_macs(MobileBert(MOBILEBERT).eval(), torch.ones(1, 128, dtype=torch.long)).total
    print(f"BERT-base {base / 1e9:.2f} G MACs, MobileBERT {mobile / 1e9:.2f} G: {100 * mobile / base:.0f} %")
    print(f"Your guess: {guess:g} %")

# %% tags=["nbval-check-output"]
for name, config in (("MobileBERT", MOBILEBERT), ("MobileBERT-TINY", MOBILEBERT_TINY), ("IB-BERT, the teacher", IB_BERT_LARGE)):
    with torch.device("meta"):  # counted, not filled
        model = MobileBert(config)
    layer = sum(p.numel() for p in model.blocks[0].parameters())
    print(f"{name:21} {sum(p.numel() for p in model.parameters()):11,} parameters, {layer:10,} a block")

# %% [markdown]
# A layer of BERT-base has 7.09 million parameters, a block of MobileBERT 0.84, and nearly every MAC belongs to a parameter. The paper
# prints 25.3, 15.1 and 293 million in all. We could not get these numbers from the released configurations, with any heads; the counts
# above are those of the code.
#
# ### Teaching it in stages *(depth)*
#
# Three losses: feature maps (squared error), attention distributions (divergence), words. Three ways to stage them: all
# at once (*auxiliary*), first the layers and then the words (*joint*), or block after block from the bottom, each while the others rest, and then the words
# (*progressive*). The paper chose the last.

# %% tags=["nbval-check-output"]
from effnlp_lessons.distillation.mobilebert_stages import stages

for strategy in ("auxiliary", "joint", "progressive"):
    print(strategy)
    for stage in stages(strategy, 3, transfer_steps=30, distillation_steps=10):
        print(f"   {stage.name:26} {stage.steps:2} steps, transfer in blocks {stage.transfer_layers}, words {stage.pretraining}, "
              f"rates of the blocks {stage.block_rates}, of the rest {stage.other_rate}")

# %% [markdown]
# All three now, at a small size: three blocks, a teacher that is not trained, a hundred sentences. This shows the mechanism and **no ranking**: a
# random teacher knows nothing that would be worth learning.

# %%
from effnlp_lessons.distillation.mobilebert import MobileBertMaskedLM
from effnlp_lessons.distillation.mobilebert_stages import MaskedBatch, copy_outer_layers_, transfer

sizes = dict(layers=3, d_embedding=32, d_model=64, heads=4, attention_dropout=0.0)
thick = replace(IB_BERT_LARGE, d_bottleneck=128, d_ff=256, dropout=0.0, **sizes)
thin = replace(MOBILEBERT, d_bottleneck=16, d_ff=64, **sizes)
ids, real = tokenizer.pad(tokenizer.encode(text[:96], max_length=24))
masked = mask_tokens(ids, real, torch.Generator().manual_seed(0))
labels = masked.targets.masked_fill(~masked.chosen, -100)


def batch_at(step):
    rows = slice(16 * (step % 6), 16 * (step % 6) + 16)
    return MaskedBatch(masked.token_ids[rows], real[rows], labels[rows])


for strategy in ("auxiliary", "joint", "progressive"):
    wide = MobileBertMaskedLM(MobileBert(thick, seed=0), seed=0).eval()
    student = MobileBertMaskedLM(MobileBert(thin, seed=1), seed=1)
    copy_outer_layers_(student, wide)
    plan = stages(strategy, 3, transfer_steps=30, distillation_steps=6)
    losses = transfer(student, wide, batch_at, plan, learning_rate=2e-3)
    print(strategy, "| " + " | ".join(f"{stage.name}: {of[0]:.2f} -> {of[-1]:.2f}" for stage, of in zip(plan, losses, strict=True)))

# %% [markdown]
# A guess at random costs $\ln 30{,}522 = 10.33$ nats; six steps hardly leave it. Only the falling transfer losses count here. In its own
# stage a block changes, and nothing above it does. That is a test of the library, down to the last bit; the homework asks how an
# optimizer can break it. (The released code splits the map loss in three: normalised maps, means, variances. By a slip of a variable's
# name it takes the teacher's means and variances from the list of all its maps. Ours compares a block with its counterpart.)
#
# ## 7. The yardstick
#
# The published sizes first, counted. Then what we can run, measured on this machine. "No segments" also drops the pooler, as DistilBERT
# does.

# %% tags=["nbval-check-output"]
print("for 128 tokens, the encoder alone; FLOPs of the papers = 2 x MACs")
for name, config in (("BERT-base", bert_base), ("DistilBERT", student_config(bert_base, 6)),
                     ("TinyBERT-6", TINYBERT_6), ("TinyBERT-4", TINYBERT_4)):
    macs = sum(transformer_macs(config, 1, 128).values())
    print(f"{name:11} {encoder_parameters(config) / 1e6:6.1f} M parameters, {2 * macs / 1e9:6.2f} G FLOPs")

# %%
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.measure import bytes_on_disk, cost, table
from effnlp_lessons.pretrained import load_minilm_l3
from effnlp_lessons.widgets.own_models import TOKENS, keep_model, show_kept_models

models = {"MiniLM-L6": minilm, "student, 3 layers": start(alternate_layers(6, 3)).eval(), "MiniLM-L3": load_minilm_l3(),
          "student, no segments": student_from_teacher(minilm, 3).eval(), "MobileBERT": MobileBert(MOBILEBERT).eval()}
inputs = torch.ones(1, TOKENS, dtype=torch.long), torch.ones(1, TOKENS, dtype=torch.bool)
costs = {name: cost(model, *inputs) for name, model in models.items()}
print(table(costs))

# %% [markdown]
# Shallow or thin? MobileBERT has 1.9 times the MACs of MiniLM-L6, and takes more than twice its time here: its 24 layers run one after
# another, each of many small products. (Its weights are random; that does not change the time.) On a Pixel 4 phone the paper measured
# 62 ms, against 342 ms for BERT-base.
#
# Three-layer students join your plot, with their recorded accuracy after fine-tuning on 1,500 labels.

# %% tags=["reveal"]
if reveal("pretraining.losses") is not None:
    half = SentenceClassifier(start(alternate_layers(6, 3)), classes=2).eval()
    for name in (NONE, "cosine of the last layer (DistilBERT)", "hidden states + scores (TinyBERT)"):
        short = {NONE: "3 layers, copied"}.get(name, f"3 layers, {name.split('(')[-1].rstrip(')')}")
        keep_model("02", short, accuracy=median(columns[name]["fine-tuned right (%)"]), examples=1_000,
                   macs=count_macs(half, *inputs).total, bytes_on_disk=bytes_on_disk(half))
    show_kept_models()

# %% [markdown]
# ## Paper and ours
#
# | | paper or released code | here |
# |---|---|---|
# | DistilBERT: segments | the released script drops the teacher's segment vectors, so its start is a little off | `student_from_teacher` does the same; `segments="add to positions"` loses nothing; sections 2, 4, 5 keep segments |
# | DistilBERT: soft loss | over all real tokens in the code, though only masked ones have something to guess | option `soft_rows` |
# | TinyBERT: projections | paper: $W_e$ and one $W_h$; code: one layer with a bias for both, at any width | option `projection="paper"` or `"released"` |
# | TinyBERT: padding | code: scores of padding set to 0, counted in the mean | left out; option `padding="released"` |
# | TinyBERT: last loss | code: mean over rows *and classes* | mean over rows; option `average="released"` |
# | TinyBERT: the teacher | the scripts never call `eval()`, so its dropout is on | evaluation mode |
# | MobileBERT: lower blocks | code: blocks already taught go on at a tenth of the rate | `lower_rate`, 0 by default |
# | MobileBERT: padded keys | code adds $-6$, so padding keeps a little weight | exactly zero |
# | all three | large corpora, days on accelerators | 1,600 or 3,200 sentences, minutes; no losses over words |
#
# Printed by Sanh et al., GLUE average on dev: BERT-base 79.5, DistilBERT 77.0; a random start costs 3.7 points. Printed by
# Jiao et al., mean of four dev scores (MNLI twice, MRPC, CoLA): TinyBERT-4 75.6; without attention losses 71.0, without hidden 72.9, without both
# 56.3; uniform mapping 75.6, top 70.9, bottom 71.3. Printed by Sun et al., GLUE test: BERT-base 78.3, MobileBERT 77.7. None of these numbers was repeated here.

# %% [markdown]
# ## Choose by cost
#
# <details><summary><b>A phone, one short message at a time.</b></summary>
#
# Count the bytes: the token table is half of MiniLM and does not shrink with the layers. A narrow table does, as MobileBERT's: 3.9 of
# its 24.6 million. Then measure on the phone: thin and deep was slow on our CPU.
# </details>
#
# <details><summary><b>A server that classifies in large batches.</b></summary>
#
# Half the layers, started from the teacher's own: half the MACs, and the start costs no training at all.
# </details>
#
# <details><summary><b>Documents of 16,000 tokens.</b></summary>
#
# TinyBERT's attention loss needs the raw scores of every pair: 12 heads times 16,000² times 4 bytes are 12 GB a layer, for each model.
# Match hidden states.
# </details>

# %% [markdown]
# ## Common mistakes
#
# * **Every second layer.** Then the last layer is missing, and with it what the head was trained to read.
# * **Probabilities where scores are meant**, or the reverse. TinyBERT takes the error of scores, MobileBERT the divergence of distributions.
# * **Off by one.** `hidden[0]` are the embeddings, `scores[0]` belong to layer 1.
# * **Padding in the mean.** The loss gets smaller the more padding there is.
# * **One projection for all.** The paper has one for the embeddings and one for the layers; the released code has one for both.
# * **Heads that differ.** Attention maps are compared head by head. A narrower student has narrower heads, not fewer.
# * **Comparing losses.** Another mapping is another target.
# * **Keeping the pooler.** A published DistilBERT has none; a head that expects it reads garbage.

# %% [markdown]
# ## Quiz
#
# **1. DistilBERT's student of a 12-layer teacher starts from layers**
# <details><summary>0, 2, 4, 6, 8, 10</summary>No. That leaves the last layer out.</details>
# <details><summary>0, 2, 4, 7, 9, 11</summary>Yes. Evenly spread, the first and the last kept.</details>
# <details><summary>6 to 11</summary>No. Layer 6 would get the embeddings as its input, and it has learned to read the output of layer 5.</details><br>
#
# **2. Student and teacher give the same attention distributions, but raw scores that differ by a constant in each row. Which loss is 0?**
# <details><summary>TinyBERT's</summary>No. It compares the raw scores.</details>
# <details><summary>MobileBERT's</summary>Yes. A softmax does not see a constant, so the divergence is 0.</details>
# <details><summary>Both</summary>No. One of them sees the constant.</details><br>
#
# **3. Mapping A ends with a loss of 2, mapping B with 3. Then**
# <details><summary>A gives the better student</summary>No. The two have different targets; lower layers may be easier to match.</details>
# <details><summary>B gives the better student</summary>No. It does not follow either.</details>
# <details><summary>nothing follows; measure what the students can do</summary>Yes. Agreement, accuracy, on text that none has read.</details><br>
#
# **4. What makes MobileBERT's maps comparable with its teacher's without a projection?**
# <details><summary>Both are 512 wide between the blocks</summary>Yes. Only inside the blocks they differ, 128 against 1,024.</details>
# <details><summary>Both have 24 layers</summary>Needed to pair the blocks, but it does not make the widths equal.</details>
# <details><summary>NoNorm</summary>No. That is about speed.</details><br>
#
# **5. In the progressive transfer, block 2 is being taught. What may change in block 3?**
# <details><summary>Nothing</summary>Yes. It stays as it is, down to the last bit.</details>
# <details><summary>Its norms only</summary>No. Nothing in it may change.</details>
# <details><summary>All, at a tenth of the rate</summary>No. That is what the released code does with the blocks below.</details><br>

# %% [markdown]
# ## Where next
#
# The homework is `homework/02_distilling_pretraining.ipynb`. A student need not be shallow or thin: notebook 03 keeps every layer and makes each
# number smaller.
#
# ## References
#
# * Hinton, Vinyals, Dean 2015. *Distilling the Knowledge in a Neural Network.* arXiv 1503.02531.
# * Jiao et al. 2019. *TinyBERT: Distilling BERT for Natural Language Understanding.* arXiv 1909.10351.
# * Reimers, Gurevych 2019. *Sentence-BERT.* arXiv 1908.10084.
# * Sanh, Debut, Chaumond, Wolf 2019. *DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter.* arXiv 1910.01108.
# * Sun et al. 2020. *MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices.* arXiv 2004.02984.
# * Turc, Chang, Lee, Toutanova 2019. *Well-Read Students Learn Better.* arXiv 1908.08962.
# * Wang et al. 2020. *MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers.* arXiv 2002.10957.
