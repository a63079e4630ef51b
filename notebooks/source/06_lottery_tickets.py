# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # Lottery tickets: could the small network have been trained from the start?
#
# A network is trained, then most of its weights are removed, and it works as well as before. So the small network is
# enough. Why not train the small one at once? Because, so the common belief went, it does not train. Frankle and Carbin
# (2019) found that it does, if every weight that is left starts where it started the first time.
#
# **Lecture topic:** Pruning, lottery tickets. **Reading:** 45 minutes. **Running:** about 40 seconds on two cores,
# no GPU, no network.
#
# **You need:** notebook 05, sections 1 and 2. Parts marked *(depth)* can wait.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. run iterative magnitude pruning, with rates of what is left, and say what share is left after each round;
# 2. rewind a network to the bit, and tell rewinding from fine-tuning and from re-initialising;
# 3. name two controls, and say which explanation each of them rules out;
# 4. read a lottery plot, and say which of its claims survive a change of seed;
# 5. say what takes the place of the initialisation in a pre-trained encoder.
#
# **Two questions from earlier notebooks.** Answer, then open.
#
# <details><summary>A network is pruned at a rate of 20 % three times. How many of its weights are left?</summary>
#
# 51.2 %: a rate counts what is still there (notebook 05).
# </details>
# <details><summary>Weights were set to 0 once, and Adam went on. How many are 0 after the next step?</summary>
#
# None. Momentum moves them, whatever their gradients are (notebook 05).
# </details>

# %% [markdown]
# **A question before anything runs.** A network for digits is trained, pruned in eight rounds until 16.9 % of its
# weights are left, and set back to its first weights. Now both train: the *ticket*, a sixth of the network, and the
# whole network, from the same start, on the same batches. After a tenth of the training, by how many points of
# test accuracy does the ticket lead (or trail, negative)? (`tickets.early`)

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("tickets.early", my_guess)

# %% [markdown]
# ## 1. The experiment
#
# 1. Draw a network $f(x; \theta_0)$.
# 2. Train it for $j$ steps, to $\theta_j$.
# 3. Remove the $p$ % smallest of $|\theta_j|$ in each layer: a mask $m$.
# 4. **Rewind:** set the weights that are left back to their values in $\theta_0$. The ticket is $f(x; m \odot \theta_0)$.
# 5. Repeat from 2, with the mask.
#
# The network of the paper is LeNet-300-100: three linear layers on the 784 pixels of a digit. A fifth of what is left
# goes in every round, in the last layer a tenth. That gives the odd numbers on the axes of the paper's figures:

# %% tags=["nbval-check-output"]
from effnlp_lessons.pruning.lottery import SIZES, ladder, lenet_300_100

print("weights:", SIZES, "together", f"{sum(SIZES.values()):,}")
print("left, in per cent:", [round(share, 2) for share in ladder(20)])
print("with a fifth everywhere:", [round(share, 2) for share in ladder(20, rates=dict.fromkeys(SIZES, 0.2))][3:11:2])

# %% [markdown]
# 51.3, 21.1, 13.5, 3.6, 1.9, 1.2: these are the labels in the paper. A fifth everywhere would end elsewhere, so the
# ladder is a cheap check that the last layer is treated as the paper says.
#
# The loop itself, from the library:

# %%
from effnlp_lessons.pruning.lottery import find_tickets, magnitude_round, regrown, rewind_
from effnlp_lessons.widgets.page import curves, dots, lines, show_source

show_source(find_tickets)
show_source(magnitude_round)

# %% [markdown]
# ## 2. Rewinding to the bit
#
# Rewinding is easily got wrong. `theta_0` must be a *copy*: the optimizer writes into the network's own tensors. The
# mask must be applied after the weights are loaded. And the optimizer must be new, or its momentum still knows the old
# run. Two rounds, live, on real digits:

# %% tags=["nbval-check-output"]
import torch

from effnlp_lessons.pruning.lottery_training import TicketPlan, digit_splits, snapshot, train_masked

torch.set_num_threads(1)
digits, plan, net = digit_splits(), TicketPlan(steps=300, every=100), lenet_300_100(seed=0)
start = snapshot(net)
rounds = list(find_tickets(net, lambda masks: train_masked(net, masks, start, digits, plan), 1, magnitude_round))
ticket = rounds[-1]
print("weights that grew again in training:", regrown(net, ticket.masks))
rewind_(net, start.weights, ticket.masks)
for name, weight in net.named_parameters():
    if name in ticket.masks:
        same = torch.equal(weight, start.weights[name] * ticket.masks[name])
        print(f"{name}: {100 * ticket.masks[name].float().mean():.1f} % left, equal to theta_0 times mask, bit for bit: {same}")

# %% [markdown]
# The first of these slips, seen: `state_dict()` hands out the tensors themselves.

# %% tags=["nbval-check-output"]
fresh = lenet_300_100(seed=0)
taken, cloned = fresh.state_dict(), {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
with torch.no_grad():
    fresh[0].weight.add_(1.0)  # as an optimizer would
print("state_dict() has changed with the network:", torch.equal(taken["0.weight"], fresh[0].weight))
print("the clone has not:                        ", not torch.equal(cloned["0.weight"], fresh[0].weight))

# %% [markdown]
# ## 3. A ticket, and two controls
#
# If the ticket trains well, why? It has *this structure* and *these first weights*. Each control takes one away:
#
# * **re-initialised:** the same mask, new random weights;
# * **shuffled:** the same first weights, as many places in each layer, drawn at random.

# %% [markdown]
# The random mask must keep as many weights in each layer as the ticket does. Shuffled over the whole network it would be
# another network.

# %% tags=["nbval-check-output"]
from effnlp_lessons.pruning.lottery import shuffled

control = shuffled(ticket.masks, seed=1)
for name, mask in ticket.masks.items():
    print(f"{name}: {int(mask.sum()):,} weights in the ticket, {int(control[name].sum()):,} in the control; "
          f"the same places: {torch.equal(mask, control[name])}")

# %% [markdown]
# A small live run first: nine rounds of 200 steps each, one seed, with the controls at the end.

# %% tags=["reveal"]
from effnlp_lessons.studies import lottery_tickets
from effnlp_lessons.studies.lottery_tickets import KINDS, REDRAWN, TICKET, by_round
from effnlp_lessons.studies.runner import load_results

if (guess := reveal("tickets.early")) is not None:
    live = lottery_tickets.run(lottery_tickets.LIVE, seed=0).numbers
    print(f"after {lottery_tickets.LIVE['steps'] // 10} of {lottery_tickets.LIVE['steps']} steps, then at the end:")
    print(f"  all weights                     {live[TICKET]['tenth'][0]:.1f} % {live[TICKET]['end'][0]:.1f} %")
    for kind in KINDS:
        print(f"  {kind:12} {live['left'][-1]:.1f} % of the weights {live[kind]['tenth'][-1]:.1f} % {live[kind]['end'][-1]:.1f} %")

# %% [markdown]
# And the record: 20 rounds, five seeds, 1,400 steps in every round.

# %% tags=["reveal"]
if (guess := reveal("tickets.early")) is not None:
    record = load_results("lottery_tickets")
    left = record["runs"][0]["left"]
    dense, ticket = by_round(record, TICKET, "tenth")[0], by_round(record, TICKET, "tenth")[8]
    lead = [b - a for a, b in zip(dense, ticket, strict=True)]
    print(f"after a tenth of training, {left[8]:.1f} % left: the ticket leads by {min(lead):.1f} to {max(lead):.1f} points "
          f"(five seeds); your guess: {guess:g}")
    for measure in ("tenth", "end"):
        runs = {kind: by_round(record, kind, measure) for kind in KINDS}
        shown = {kind: [[100 - runs[kind][r][seed] for r in range(1, 21)] for seed in range(5)] for kind in KINDS}
        lines([round(share, 1) for share in left[1:]], shown, x_label="weights left (%)", y_label="test errors (%)",
              caption={"tenth": "After a tenth of the training.", "end": "At the end of the training."}[measure]
              + " Middle of five seeds, shaded from the best to the worst.")

# %% [markdown]
# **Predict first.** At the end of training, with 16.9 % of the weights: how many points is the re-initialised network
# above (or below, negative) the ticket? (`tickets.reinit`)

# %%
my_guess = None
predict("tickets.reinit", my_guess)

# %% tags=["reveal"]
record = load_results("lottery_tickets")
if (guess := reveal("tickets.reinit")) is not None:
    ends = {kind: by_round(record, kind, "end") for kind in KINDS}
    for number in (8, 15, 20):
        print(f"{record['runs'][0]['left'][number]:4.1f} % left, points above the ticket, five seeds:")
        for kind in KINDS[1:]:
            gap = sorted(b - a for a, b in zip(ends[TICKET][number], ends[kind][number], strict=True))
            print(f"   {kind:12} {gap[0]:5.1f} to {gap[-1]:5.1f}")
    print(f"your guess for new weights at {record['runs'][0]['left'][8]:.1f} %: {guess:g}")

# %% [markdown]
# <details><summary><b>After your guess: what the controls rule out</b></summary>
#
# Every control is behind the ticket, on every seed, and the gap grows as weights become few. *New weights* under the
# ticket's mask: the structure alone is not enough, the first weights belong to it. *A random mask* with the first
# weights: those alone are not enough either, and at 1 % this is by far the worst. Neither "small networks train well"
# nor "the mask is all" explains the ticket. The mask of *one shot* keeps up for a while; the rounds pay when little is
# left.
# </details>
#
# ### Which claims survive a change of seed?
#
# The paper also says *how much* faster a ticket learns: it stops 38 % earlier at 21.1 %. The early-stop step is where
# the validation loss is lowest. That is one point on a noisy curve:

# %%
from effnlp_lessons.studies.lottery_tickets import early_stop_ratios

steps = by_round(record, TICKET, "early stop")
print("early-stop step, five seeds: all weights", sorted(steps[0]), f"; ticket of {record['runs'][0]['left'][7]:.1f} %", sorted(steps[7]))
for other, what in (("dense", "all weights"), (REDRAWN, "new weights")):
    ratios = sorted(early_stop_ratios(record, 7, to=other))
    print(f"ticket over {what:12}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")

# %% [markdown]
# So the ticket did stop earlier on each of five seeds: that much is found here too. *How much* earlier is anything from
# 8 to 50 %, and a single run could have been sold as either. Against new weights the picture is far clearer: a third of
# their steps.

# %% [markdown]
# ## 4. Scrub through the rounds

# %%
from effnlp_lessons.widgets.lottery_ticket_explorer import LotteryTicketExplorer

LotteryTicketExplorer(round=8, measure="early stop")

# %% [markdown]
# **Try:**
#
# * Choose the accuracy at the end for the upper chart, scrub from round 0 to 20, and watch the first layer. Weights go
#   first at the border of the image, where no digit ever has ink; what is left draws the place where digits are.
# * Go to the round where the ticket's accuracy begins to fall. How far below it are the two controls there?
# * Switch to the random mask at the same round: as many weights, no picture.

# %% [markdown]
# ## 5. What is in a ticket?
#
# Three questions that users of the paper asked first. **Is the structure the same from seed to seed?** The overlap of
# two masks is the Jaccard index: kept by both over kept by one of them. Two random masks overlap by chance:

# %%
left = record["runs"][0]["left"]
names = {"0.weight": "pixels to 300", "2.weight": "300 to 100", "4.weight": "100 to 10"}
for layer, name in names.items():
    pairs = [f"{record['overlap'][layer][r]:.3f} ({record['by chance'][layer][r]:.3f})" for r in (4, 8, 15, 20)]
    print(f"{name:14} overlap of two seeds (by chance) at {', '.join(f'{left[r]:.1f}' for r in (4, 8, 15, 20))} % left: {', '.join(pairs)}")

# %% [markdown]
# A hidden unit has no fixed place, so two seeds agree on units only by chance. In the first layer they agree on more:
# which *pixels* are read. **Which layers lose most?** By construction the last one least. **And do kept weights move
# more?** The mean distance from the first weight, of weights that the round keeps and that it removes:

# %%
first = record["runs"][0]["distance"]["0.weight"]
curves(left[:20], {"kept": first["kept"][:20], "removed in this round": first["pruned"][:20]}, x_label="weights left (%)",
       y_label="mean distance from theta_0", caption="First layer, one seed: what is kept has moved further from where it began than what goes.")

# %% [markdown]
# ## 6. Late rewinding, and a pre-trained encoder
#
# In larger networks tickets from $\theta_0$ were not found. **Late rewinding** (Frankle et al. 2019) sets the weights
# back not to the start, but to $\theta_k$, a little way into training. What is rewound must then be rewound whole: the
# weights, the optimizer's moments, the place in the data and in the learning-rate schedule.
#
# For a pre-trained encoder there is a natural $\theta_k$: **pre-training.** Chen et al. (2020) take $\theta_0$ to be the
# published weights of BERT, prune all encoder matrices with one threshold, and rewind to the published weights after
# each round. Here the same with MiniLM-L3 on 1,500 labelled reviews:

# %% tags=["nbval-check-output"]
from effnlp_lessons.pruning.lottery import rate_of_the_original

rates = [rate_of_the_original(done) for done in range(5)]
share = 1.0
for rate in rates:
    share *= 1 - rate
print("a tenth of the original each round, as rates of what is left:", [round(rate, 4) for rate in rates])
print(f"left after five rounds: {share:.1f}")

# %%
from effnlp_lessons.studies import encoder_tickets
from effnlp_lessons.studies.encoder_tickets import right_by_round

encoder = load_results("encoder_tickets")
rows, share = {}, encoder["runs"][0]["left"]
dense = sorted(right_by_round(encoder, encoder_tickets.TICKET)[0])
rows["all weights"] = {"test accuracy (%)": (dense[1], dense[0], dense[-1])}
for number in (5, 7):
    for kind in encoder_tickets.KINDS:
        right = sorted(right_by_round(encoder, kind).get(number, []))
        if right:
            rows[f"{share[number]:.0f} % left: {kind}"] = {"test accuracy (%)": (right[len(right) // 2], right[0], right[-1])}
dots(rows, grey=[name for name in rows if "ticket" not in name and "late" not in name], from_zero=False,
     caption="MiniLM-L3, 1,500 labelled reviews. Dots: middle of three seeds; bars: all of them. Shares are of the 18 encoder matrices.")

# %% [markdown]
# With half of its weights the ticket is a point below the whole encoder, with 30 % some two points. *New weights* under
# its mask fall by nine points and more: in a pre-trained encoder the first weights are nearly everything. Even a random
# mask over pre-trained weights beats a good mask over new ones. *One shot*, the mask by the size of pre-trained weights,
# comes close, for fine-tuning hardly changes that order. And late rewinding gives what rewinding to pre-training gives:
# pre-training already was the late point.

# %% [markdown]
# ## 7. The yardstick
#
# A ticket saves weights, not time: its zeros lie at random places in dense matrices. And it was found by training the
# whole network once per round. Counted in steps, and in bytes of a file with a bit mask (notebook 05):

# %%
from effnlp_lessons.measure import bytes_on_disk, count_macs

per_round = 1_400
dense_bytes = bytes_on_disk(lenet_300_100(0))
macs = count_macs(lenet_300_100(0), torch.ones(1, 784)).total
print(f"all weights: {macs:,} MACs a digit, {dense_bytes / 1e3:.0f} kB")
for number in (0, 8, 15, 20):
    share = ladder(20)[number] / 100
    bit_mask = 266_200 / 8 + 4 * 266_200 * share + 4 * 410
    right = sorted(by_round(record, TICKET, "end")[number])[2]
    print(f"{100 * share:5.1f} % left: {per_round * (number + 1):6,} steps to find and train it, "
          f"{min(bit_mask, 4 * 266_610) / 1e3:5.0f} kB, MACs as before, {right:.1f} % right")

# %% [markdown]
# ## Paper and ours
#
# | | paper or released code | here |
# |---|---|---|
# | digits | 55,000 to train, 5,000 to validate, 10,000 to test | 3,500, 500 and 1,000 |
# | steps a round | 50,000 | 1,400 |
# | optimizer, batch | Adam at 0.0012, 60 (the released code: SGD at 0.1) | Adam at 0.0012, 60 |
# | rates | 20 %, output layer 10 %, of what is left; the released code removes one weight more | the same, exact counts |
# | controls | new weights, three draws a ticket; random masks in the appendix | one draw of each, five seeds |
# | early stop at 21.1 % | 38 % earlier than all weights | earlier on each of five seeds, by 8 to 50 % |
# | BERT: encoder | BERT-base, 12 layers, pooler pruned too | MiniLM-L3, whose pooler is drawn anew and not pruned |
# | BERT: rounds | 10 % of all weights each, a whole fine-tuning between | the same |
# | late rewinding | ResNets and the like on CIFAR and ImageNet | the encoder, at one level |

# %% [markdown]
# ## Choose by cost
#
# <details><summary><b>A phone, one short message at a time.</b></summary>
#
# A ticket shrinks the file, if its format can skip zeros, and saves no time. Take structured pruning (notebook 07) or
# quantization (03) first.
# </details>
#
# <details><summary><b>A server that classifies in large batches.</b></summary>
#
# Nothing is gained: dense kernels multiply zeros as well. Finding the ticket costs one training a round.
# </details>
#
# <details><summary><b>Documents of 16,000 tokens.</b></summary>
#
# Attention scores dominate there, and they have no weights to prune (notebook 08).
# </details>

# %% [markdown]
# ## Common mistakes
#
# * **Rewinding to trained weights.** That is fine-tuning a pruned network: useful, and no evidence about tickets.
# * **`theta_0 = model.state_dict()`.** It is no copy: it changes with the model. Clone it.
# * **A fifth of the original weights.** The rate counts what is left; else five rounds remove everything.
# * **The output layer as the others.** Its rate is halved; the ladder tells.
# * **Old momentum.** A new round needs a new optimizer, and masked weights must be set to 0 after every step.
# * **Shuffling over the whole network.** The control must keep the count of each layer.
# * **One seed.** Early-stop steps vary by hundreds from seed to seed.
# * **Accuracy at the end only.** The ticket's lead is largest early in training.

# %% [markdown]
# ## Quiz
#
# **1. After four rounds at 20 % everywhere, the share of weights left is**
# <details><summary>20 %</summary>No. That would be 20 % of the original in each round.</details>
# <details><summary>41 %</summary>Yes. 0.8 to the fourth power is 0.4096.</details>
# <details><summary>96 %</summary>No. Each round removes a fifth of what is left.</details><br>
#
# **2. The mask is kept, the weights are drawn anew, and the network trains worse than the ticket. This shows that**
# <details><summary>small networks do not train</summary>No. The ticket is as small, and trains.</details>
# <details><summary>the mask alone does not explain the ticket</summary>Yes. The first weights belong to it.</details>
# <details><summary>the mask does not matter</summary>No. For that, look at the other control: a random mask is worse still.</details><br>
#
# **3. Which of these is a lottery ticket in the sense of the paper?**
# <details><summary>a pruned network, trained on from its trained weights</summary>No. That is fine-tuning.</details>
# <details><summary>a pruned network, set back to its first weights</summary>Yes. If it then trains as well as the whole one.</details>
# <details><summary>a small dense network with the same number of weights</summary>No. A ticket's weights lie at chosen places.</details><br>
#
# **4. Late rewinding to step k must restore**
# <details><summary>the weights alone</summary>No. Moments, data order and learning rate belong to the step too.</details>
# <details><summary>weights, optimizer state, place in the data and in the schedule</summary>Yes. Without pruning, going on must repeat the first run to the bit.</details>
# <details><summary>the mask of step k</summary>No. The mask comes from the end of the training.</details><br>
#
# **5. For a pre-trained encoder the "first weights" are**
# <details><summary>a random draw</summary>No. Nobody fine-tunes from there.</details>
# <details><summary>those of pre-training</summary>Yes. They play the part of a late rewinding point.</details>
# <details><summary>those after fine-tuning</summary>No. Rewinding there would be no rewinding.</details><br>

# %% [markdown]
# ## Where next
#
# The homework is `homework/06_lottery_tickets.ipynb`. In a pre-trained encoder the size of a weight is mostly
# pre-training's doing. Notebook 07 asks where weights go instead.
#
# ## References
#
# * Chen et al. 2020. *The Lottery Ticket Hypothesis for Pre-trained BERT Networks.* arXiv 2007.12223.
# * Frankle, Carbin 2019. *The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks.* arXiv 1803.03635.
# * Frankle, Dziugaite, Roy, Carbin 2019. *Linear Mode Connectivity and the Lottery Ticket Hypothesis.* arXiv 1912.05671.
