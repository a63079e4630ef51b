# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown]
# # Knowledge distillation: what a large model can tell a small one
#
# Distillation trains a small model, the **student**, on the answers of a large one, its **teacher**. Only the student is
# used afterwards.
#
# **Lecture topic:** Knowledge distillation. **Reading:** 60 minutes. **Running:** about 40 seconds on two cores, no GPU,
# no network.
#
# **You need:** notebook 00, cross-entropy, and the softmax.
#
# ## Learning goals
#
# After this notebook you can
#
# 1. derive the gradient of the distillation loss, and say why it carries a factor $T^2$;
# 2. test whether soft targets hold knowledge of a class that the student never saw;
# 3. tell what a student gains from soft targets, and what from unlabelled text that the teacher has answered;
# 4. name the three steps of pre-trained distillation, and the starts it is compared with;
# 5. name seven usual mistakes in a distillation loss.
#
# **Two questions from notebook 00.** Answer, then open.
#
# <details><summary>Half of MiniLM's parameters cost almost no MACs. Which?</summary>
#
# The embeddings: 11.9 of 22.7 million numbers, looked up and not multiplied. A student with half the layers is therefore
# far from half the size on disk.
# </details>
# <details><summary>A model with half the MACs: is it twice as fast?</summary>
#
# Not always. MACs count products, the clock also counts moved memory and small operations. Measure both.
# </details>

# %% [markdown]
# **A question before anything runs.** A student learns from 1,500 labelled reviews and reaches some accuracy. Then a good
# teacher answers these 1,500 and 5,572 more, whose labels the student does not see. The student learns from its answers,
# and gets better. Where does most of the gain come from? (`distillation.gain`: "soft answers", "more text" or "both alike")

# %%
from effnlp_lessons.homework import predict, reveal

my_guess = None
predict("distillation.gain", my_guess)

# %% [markdown]
# The answer comes in section 5. First the loss.
#
# ## 1. A softmax hides what the model knows
#
# Our first teacher reads handwritten digits. It has two hidden layers of 300 units and was trained on 4,000 images. Here are
# two test images of a 2, and the probabilities of the teacher. In the lower rows its logits are divided by a number $T$,
# the **temperature**, before the softmax.

# %%
import torch

from effnlp_lessons.datasets.digits import load_digits
from effnlp_lessons.distillation.hinton import softened_probabilities, teacher_logits_of
from effnlp_lessons.distillation.omitted_digit import DigitExamples
from effnlp_lessons.studies.omitted_digit import train_teacher
from effnlp_lessons.widgets.page import images

digits = load_digits()
training, test = DigitExamples(digits.subset("train")), DigitExamples(digits.subset("test"))
teacher = train_teacher(seed=0)
logits = teacher_logits_of([teacher], test.pixels)[0]
right = (logits.argmax(-1) == test.labels).double().mean()
print(f"the teacher gets {100 * right:.1f} % of the 1,000 test digits right")

twos = [i for i in range(1_000) if test.labels[i] == 2 and logits[i].argmax() == 2]
like_3 = max(twos, key=lambda i: logits[i, 3] - logits[i, 7])
like_7 = max(twos, key=lambda i: logits[i, 7] - logits[i, 3])
images({"a 2 like a 3": digits.subset("test").images[like_3], "a 2 like a 7": digits.subset("test").images[like_7]},
       caption="Both have the label 2.")
print("\nprobability of     " + "".join(f"{digit:7}" for digit in range(10)))
for temperature in (1, 8):
    for name, image in (("a 2 like a 3", like_3), ("a 2 like a 7", like_7)):
        p = softened_probabilities(logits[image], temperature)
        print(f"{name}, T = {temperature:2}" + "".join(f"{value:7.3f}" for value in p))

# %% [markdown]
# The label says nothing about how the two differ. The teacher's probabilities do: the one looks a little like a 3, the other
# like a 7. At temperature 1 most of these numbers are too small to teach anything. At $T = 8$ they can be read:
#
# $$q_i = \frac{\exp(z_i / T)}{\sum_j \exp(z_j / T)}$$
#
# Hinton, Vinyals and Dean (2015) call these **soft targets**, and what they tell about wrong classes *dark knowledge*. In
# training, student and teacher are softened by the same $T$. The finished student is used at $T = 1$.
#
# ## 2. The loss, and where $T^2$ comes from
#
# Let $v$ be the teacher's logits, $p$ its softened probabilities, $z$ and $q$ the student's. The soft loss is a
# cross-entropy, $C = -\sum_i p_i \log q_i$, with $p$ and $q$ at one $T$. We derive its gradient, and check each step on small
# numbers. ($\delta_{ik}$ is 1 for $i = k$, else 0.)
#
# **Step 1.** $\log q_i = z_i/T - \log \sum_j \exp(z_j/T)$, so $\dfrac{\partial \log q_i}{\partial z_k} = \dfrac1T(\delta_{ik} - q_k)$.
#
# **Step 2.** Weight by $-p_i$ and add up; $\sum_i p_i = 1$:
#
# $$\frac{\partial C}{\partial z_k} = -\frac1T \sum_i p_i(\delta_{ik} - q_k) = \frac1T\,(q_k - p_k)$$

# %% tags=["nbval-check-output"]
from effnlp_lessons.distillation.hinton import soft_cross_entropy, soft_gradient

generator = torch.Generator().manual_seed(0)
z = torch.randn(1, 10, generator=generator, dtype=torch.float64, requires_grad=True)
v = 3 * torch.randn(1, 10, generator=generator, dtype=torch.float64)
for T in (1.0, 4.0, 20.0):
    q = softened_probabilities(z, T)
    (by_autograd,) = torch.autograd.grad(-(softened_probabilities(v, T) * q.log()).sum(), z)
    same = torch.allclose(by_autograd, soft_gradient(z, v, T), rtol=1e-10)
    print(f"T = {T:2.0f}: autograd gives the formula {same}, the norm is {by_autograd.norm():.5f}")

# %% [markdown]
# The gradient shrinks as $T$ grows, and faster than $1/T$. Why?
#
# **Step 3.** For a large $T$, $\exp(z_i/T) \approx 1 + z_i/T$. If the logits of each image have mean zero (a
# constant added to all of them changes no softmax), then $q_i \approx \frac1N(1 + z_i/T)$ with $N$ classes, and the same for $p$. So
#
# $$\frac{\partial C}{\partial z_k} \approx \frac{1}{N T^2}\,(z_k - v_k)$$
#
# **That is the $T^2$.** The soft loss is multiplied by $T^2$. Then its gradient stays of one order of size at every
# temperature, and the balance with other losses hardly changes when you change $T$. And in the limit, distillation is nothing but matching
# logits: $\frac{1}{2N}\sum_k (z_k - v_k)^2$.

# %% tags=["nbval-check-output"]
from effnlp_lessons.distillation.hinton import logit_matching_loss, soft_divergence

centred = v - v.mean()
student = (z - z.mean()).detach().requires_grad_(True)
(limit,) = torch.autograd.grad(logit_matching_loss(student, centred), student)
for T in (1, 5, 20, 100):
    (scaled,) = torch.autograd.grad(soft_divergence(student, centred, temperature=T), student)  # T^2 is in it
    print(f"T = {T:3}: norm of the gradient with T^2 {scaled.norm():.4f}, "
          f"distance to logit matching {(scaled - limit).norm() / limit.norm():.3f}")

# %% [markdown]
# **Step 4: mix.** Where there are labels, a second term learns from them, at temperature 1. The weight $a$ of the soft term is
# near 1, and $|_T$ means: softened by $T$. (All runs below use the soft term alone.)
#
# $$L = a\,T^2\,\mathrm{CE}(p, q)\big|_{T} + (1-a)\,\mathrm{CE}(\text{label}, q)\big|_{1}$$
#
# Cross-entropy or Kullback-Leibler divergence? They differ by the teacher's entropy, which no student changes: the same
# gradient, another value. The divergence is easier to read, because it is 0 when the student has become its teacher.
#
# One trap in PyTorch: `F.kl_div(..., reduction="mean")` divides by rows *and classes*. With ten classes the loss is ten times
# too small. With a vocabulary it vanishes.

# %% tags=["nbval-check-output"]
import warnings

import torch.nn.functional as F

warnings.filterwarnings("ignore", message="reduction: 'mean'")  # torch warns of it; many do not read on
z, v = torch.randn(2, 8, 10, generator=generator, dtype=torch.float64).unbind()
entropy = torch.special.entr(softened_probabilities(v, 4.0)).sum(-1).mean()
difference = soft_cross_entropy(z, v, 4.0) - soft_divergence(z, v, 4.0)
print("cross-entropy less divergence is T^2 times the entropy:", torch.allclose(difference, 16 * entropy, rtol=1e-9))
for classes in (2, 10, 1_000):
    some, other = torch.randn(2, 8, classes, generator=generator).unbind()
    log_q, p = some.log_softmax(-1), other.softmax(-1)
    ratio = F.kl_div(log_q, p, reduction="batchmean") / F.kl_div(log_q, p, reduction="mean")
    print(f"{classes:6} classes: 'mean' is {ratio:,.0f} times too small")

# %% [markdown]
# ## 3. A digit that the student never sees
#
# Now an experiment of the paper (section 3). The teacher knows all ten digits. From the student's **transfer set**, the
# images that it learns from, every 3 is taken out. It will never see one.
#
# **Predict first.** The student learns from soft targets at $T = 8$. How many of the test 3s does it get right, in per cent, as
# trained, before anything is changed?
# (`distillation.threes`)

# %%
my_guess = None
predict("distillation.threes", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.distillation.hinton import distil
from effnlp_lessons.distillation.omitted_digit import digit_network, rows_without, shift_bias_
from effnlp_lessons.studies.omitted_digit import loss_of
from effnlp_lessons.training import TrainingPlan

if (guess := reveal("distillation.threes")) is not None:
    kept = rows_without(training.labels, 3)
    transfer_set = DigitExamples(digits.subset("train"), kept)
    targets = teacher_logits_of([teacher], training.pixels)[0][kept]
    threes = test.labels == 3
    plan = TrainingPlan(epochs=6, batch_size=64, learning_rate=2e-3, weight_decay=0.0)
    for name, loss in (("labels", loss_of("hard")), ("soft targets, T = 8", loss_of(8))):
        student = digit_network((300, 300), seed=1_000)
        distil(student, transfer_set, targets, loss, plan)
        for words in ("as trained", "bias of class 3 raised by 3"):
            correct = teacher_logits_of([student], test.pixels)[0].argmax(-1) == test.labels
            print(f"{name:20} {words:28} 3s {100 * correct[threes].double().mean():3.0f} %   "
                  f"other digits {100 * correct[~threes].double().mean():.0f} %")
            shift_bias_(student[-1], 3, 3.0)
    print(f"Your guess: {guess:g} %")

# %% [markdown]
# <details><summary><b>After your guess: how can it know a 3?</b></summary>
#
# Its targets said, of more than a thousand 2s, 5s and 8s, *how much* each of them looks like a 3. From these it learned the
# direction "more like a 3". It also learned that a 3 is never right, so its bias for that class is too low. Raise this one
# number, and most 3s are there. A student of labels was told of no degrees. Up to a shift of 8 it finds next to no 3s. A
# larger shift finds some, but then many other digits are called 3 too.
# </details>
#
# Drag the bias, and change the targets. What is the price of a bias that is too high? At which temperature do targets say
# most? The top right panel shows the gradient of section 2, with and without $T^2$.

# %%
from effnlp_lessons.widgets.omitted_digit_explorer import OmittedDigitExplorer

OmittedDigitExplorer(targets="hard")

# %% [markdown]
# Five teachers and thirty students, recorded. The shift of the bias is chosen on training digits, with the 3s put back for
# this one number. (The paper chose it on its test set.)

# %% tags=["reveal"]
from statistics import median

from effnlp_lessons.studies import omitted_digit
from effnlp_lessons.studies.runner import load_results

if reveal("distillation.threes") is not None:
    runs = load_results("omitted_digit")["runs"]
    print(f"{'':14}  as trained        after the shift (median over {len(runs)} seeds, smallest to largest)")
    print(f"{'targets':14}  3s right          3s right          others right      shift")
    for kind in runs[0]["results"]:
        rows = [run["results"][kind] for run in runs]
        at = [omitted_digit.SHIFTS.tolist().index(row["shift"]) for row in rows]
        columns = [[row["omitted"][0] for row in rows], [row["omitted"][i] for row, i in zip(rows, at, strict=True)],
                   [row["others"][i] for row, i in zip(rows, at, strict=True)]]
        words = "labels" if kind == "hard" else f"T = {kind}"
        print(f"{words:14}" + "".join(f"  {median(c):3.0f} ({min(c):.0f} to {max(c):.0f})".ljust(18) for c in columns)
              + f"{median(row['shift'] for row in rows):.2f}")

# %% [markdown]
# <details><summary><b>After your guess: what the table says</b></summary>
#
# Labels: almost no 3s with any shift up to 8, the largest that we tried. Soft targets: some 3s at once, and more at higher
# temperatures. After the shift most are found. There T = 1 is behind, and from T = 2 on the ranges overlap. In the paper, on
# all of MNIST, 98.6 % of the 3s were right after the shift.
# </details>
#
# ## 4. Which temperature?
#
# Which temperature would you choose? Here all digits are in the transfer set again, and the students differ in size: one
# hidden layer of 4, 8, 16 or 128 units.
#
# **Predict first.** A student with *four* hidden units learns at $T = 1$, another one at $T = 20$. The second is
# (`distillation.temperature`: "better", "worse" or "as good")

# %%
my_guess = None
predict("distillation.temperature", my_guess)

# %% tags=["reveal"]
from effnlp_lessons.studies.temperature_by_size import ENSEMBLE, HARD, ONE
from effnlp_lessons.widgets.page import lines

if (guess := reveal("distillation.temperature")) is not None:
    recorded = load_results("temperature_by_size")
    runs, setting = recorded["runs"], recorded["runs"][0]["setting"]
    errors = {f"{width} units": [[100 - run["results"][ONE][str(width)][str(T)] for T in setting["temperatures"]]
                                 for run in runs] for width in setting["widths"]}
    lines(setting["temperatures"], errors, x_label="temperature", y_label="test errors (%)",
          caption="Students with one hidden layer, soft targets alone: median and range of the recorded seeds. The small ones "
          "suffer from high temperatures.")
    for width in setting["widths"]:
        of_labels = [100 - run["results"][HARD][str(width)] for run in runs]
        print(f"{width:4} units, from labels: {median(of_labels):.1f} % errors ({min(of_labels):.1f} to {max(of_labels):.1f})")
    print("Your guess for four units at T = 20:", guess)

# %% [markdown]
# <details><summary><b>After your guess: why a low temperature for a small student</b></summary>
#
# A likely reason: a high temperature asks for *all* logits, the very negative ones too (section 2: it is logit matching), and
# four units cannot give them. The student of 128 units does about equally well at each temperature, and as well as from
# labels. So no temperature is best for all students. Tune it for each.
# </details>
#
# **Ensembles as teachers.** The other use of distillation: train several models, ten in the paper and five here, and teach one
# student what they know together. At temperature $T$ the target is the mean of the members' softened distributions. The
# arithmetic mean keeps what one member believes in; the geometric mean is the softmax of the averaged logits.

# %%
from effnlp_lessons.distillation.hinton import ensemble_logits

members = torch.tensor([[4.0, 1.0, 0.0], [0.0, 3.0, 0.0]])[:, None]  # two teachers, one row, three classes
for mean in ("arithmetic", "geometric"):
    together = ensemble_logits(members, temperature=1.0, mean=mean)
    print(f"{mean:10} mean of their distributions: {[round(x, 3) for x in together.softmax(-1)[0].tolist()]}")

# %% tags=["reveal"]
if reveal("distillation.temperature") is not None:
    alone = [right for run in runs for right in run["members"]]
    print(f"one teacher {median(alone):.1f} % right, five together {median(run['ensemble of them'] for run in runs):.1f} %")
    wide = str(setting["widths"][-1])
    for T in map(str, setting["temperatures"]):
        better = [run["results"][ENSEMBLE][wide][T] - run["results"][ONE][wide][T] for run in runs]
        print(f"T = {T:2}: a student of {wide} units gains {median(better):+.1f} points from five teachers "
              f"instead of one ({min(better):+.1f} to {max(better):+.1f})")

# %% [markdown]
# On speech, the paper's ensemble of ten was 2.2 points better than one model, and its student kept 86 % of that. Here five
# together are hardly better than one. There is little to pass on, and the student's gain drowns in the spread. So the
# paper's finding does not appear on these digits.
#
# ## 5. Where does the gain come from?
#
# Back to text, and to the question at the top. The task is notebook 00's: good or bad review? The teacher is the course's own,
# MiniLM fine-tuned on 7,070 labels. The student is no Transformer but an **averaging network** (Iyyer et al. 2015). It
# averages the vectors of all words and pairs of neighbours, and puts two small layers on top. No attention, no order beyond
# neighbours (`pair_ids` hashes each pair into one of 32,768 rows). Each example is one sentence of a review.

# %%
from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.distillation.averaging import AveragingNetwork
from effnlp_lessons.measure import count_macs
from effnlp_lessons.pretrained import load_teacher, teacher_logits
from effnlp_lessons.studies.transfer_set import Rows, labelled_rows
from effnlp_lessons.widgets.page import show_source

show_source(AveragingNetwork.forward)
data, review_teacher = reviews.load_reviews(), load_teacher()
text, dev = ReviewExamples(data.subset("train")), ReviewExamples(data.subset("dev"))
answers = teacher_logits()[torch.from_numpy(data.split == "train")]  # computed once, kept on file
sentence = torch.ones(1, 27, dtype=torch.long), torch.ones(1, 27, dtype=torch.bool)
for name, model in (("teacher", review_teacher), ("averaging network", AveragingNetwork())):
    print(f"{name:18} {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{count_macs(model, *sentence).total:,} MACs for a review of 27 tokens")

# %% [markdown]
# The teacher's answers are **cached**: computed once for all sentences, then read from a file. A student's epoch then costs no
# teacher at all.
#
# Three students with about equal steps: 1,500 labels; the teacher's soft answers to all 7,072 sentences, at $T = 2$; and the *hard*
# answers of the same teacher, only the class that it finds likeliest, its **pseudo-labels**.

# %% tags=["reveal"]
from functools import partial

from effnlp_lessons.distillation.hinton import distillation_loss, hard_cross_entropy
from effnlp_lessons.distillation.well_read import pseudo_label_loss

if (guess := reveal("distillation.gain")) is not None:
    few, every = labelled_rows(1_500, 0, len(answers)), torch.arange(len(answers))
    soft = partial(distillation_loss, temperature=2.0)
    students = {}
    for name, rows, epochs, loss in (
        ("1,500 labels", few, 9, lambda z, v, labels: hard_cross_entropy(z, labels)),
        ("soft answers to all", every, 2, lambda z, v, labels: soft(z, v)),
        ("pseudo-labels of all", every, 2, pseudo_label_loss),
    ):
        student = AveragingNetwork(seed=0)
        plan = TrainingPlan(epochs, batch_size=64, learning_rate=3e-3)
        history = distil(student, Rows(text, rows), answers[rows], loss, plan)
        students[name] = student
        print(f"{name:22} {len(history.loss)} steps, {accuracy(student, dev):.1f} % of the dev reviews right")
    print("Your guess:", guess)

# %% [markdown]
# One seed says little. Recorded: three seeds, twice the steps, the test reviews, and a second teacher. The course's teacher has seen
# *all* labels in training, also those of the "unlabelled" sentences. So there is another one, trained on the same 1,500 labels as
# the students. One standard error on 2,000 sentences is about 0.9 points, and three seeds are few.

# %% tags=["reveal"]
from effnlp_lessons.studies.transfer_set import FEW, LABELS, MORE, SAME, SHIPPED
from effnlp_lessons.widgets.page import dots

if reveal("distillation.gain") is not None:
    runs = load_results("transfer_set")["runs"]
    found = {"1,500 labels": [run["students"][LABELS] for run in runs],
             "all 7,072 labels": [run["students"]["all 7,072 labels"] for run in runs]}
    for teacher_name, short in ((FEW, "of 1,500 labels"), (SHIPPED, "of all labels")):
        for sentences, words in ((SAME, "same sentences"), (MORE, "with 5,572 more")):
            for signal in ("soft", "pseudo-labels"):
                found[f"{signal}, {words}, teacher {short}"] = [run["students"][teacher_name][signal][sentences] for run in runs]
    dots({name: {"test reviews right (%)": (median(row), min(row), max(row))} for name, row in found.items()},
         grey=["1,500 labels", "all 7,072 labels"], from_zero=False,
         caption="The averaging network, equal steps. Dot: median of the recorded seeds; bar: smallest to largest.")
    for name, short in ((FEW, "of 1,500 labels"), (SHIPPED, "of all labels")):
        more = [run["students"][name]["soft"][MORE] - run["students"][name]["soft"][SAME] for run in runs]
        softer = [run["students"][name]["soft"][MORE] - run["students"][name]["pseudo-labels"][MORE] for run in runs]
        print(f"teacher {short}: {median(run['teachers'][name] for run in runs):.1f} % right itself. On every seed, more text "
              f"brings {', '.join(f'{x:+.1f}' for x in more)}; soft instead of hard {', '.join(f'{x:+.1f}' for x in softer)}")

# %% [markdown]
# <details><summary><b>After your guess: what the rows say</b></summary>
#
# On the same sentences a teacher brings nothing, soft or hard. With the unlabelled sentences the student gains many points on
# every seed, with either teacher: it comes close to a student of all the true labels. And the pseudo-labels, one bit a
# sentence, bring most of that; soft answers add 0 to 2 points. So here **the transfer set brings most of the gain, and
# softness a little on top**. With two classes a soft target is one number, how sure the teacher is, and there is little
# dark knowledge in it. Section 3 had ten classes, and no label spoke of the class in question.
#
# Whenever you read "distillation improves the student by $x$", ask for the control: the same text with the teacher's hard
# answers.
# </details>

# %% [markdown]
# ## 6. Where should a student start? (Turc et al. 2019)
#
# Before a Transformer student is distilled, where should its weights come from? Turc and colleagues compared three starts,
# **random**, **truncated** (the first layers of a pre-trained model), and **pre-trained** itself on general text, and trained 24
# small BERTs for it. Their recipe, *pre-trained distillation*:
#
# 1. pre-train the compact student on general text (masked words);
# 2. distil it from a fine-tuned teacher on *unlabelled* text of the task, soft labels only;
# 3. fine-tune it on labels, if there are any.

# %% tags=["nbval-check-output"]
from effnlp_lessons.distillation.well_read import LAYERS, NAMES, SIZES, WIDTHS, pretraining_parameters

print("millions of parameters, with both pre-training heads, as the paper counts")
print("layers" + "".join(f"{f'width {width}':>12}" for width in WIDTHS))
for layers in LAYERS:
    print(f"{layers:6}" + "".join(f"{pretraining_parameters(SIZES[layers, width]) / 1e6:12.1f}" for width in WIDTHS))
for name, size in NAMES.items():
    print(f"{name}: {size[0]} layers, width {size[1]}, {pretraining_parameters(SIZES[size]):,} parameters")

# %% [markdown]
# All three steps are one function, with a step left out where its data are missing. So the comparisons of the paper are a
# matter of arguments. An identity to check: without any text of the task, nothing but fine-tuning is left, bit for bit.

# %% tags=["nbval-check-output"]
from effnlp_lessons.distillation.well_read import Plans, pretrained_distillation
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.transformer import Encoder, TransformerConfig

small = TransformerConfig(d_model=64, layers=2, heads=1, d_ff=256)
plans = Plans(fine_tune=TrainingPlan(epochs=1, batch_size=16))
twins = []
nothing = torch.arange(0)
for extra in ({}, {"task_text": Rows(text, nothing), "teacher_logits": answers[nothing]}):
    twin = SentenceClassifier(Encoder(small, seed=0), classes=2, seed=0)
    steps = pretrained_distillation(twin, plans, labelled=Rows(text, torch.arange(48)), **extra)
    twins.append(twin)
    print("steps taken:", {name: len(history.loss) for name, history in steps.items()})
same = all(torch.equal(a, b) for a, b in zip(*(twin.state_dict().values() for twin in twins), strict=True))
print("no task text equals fine-tuning alone, bit for bit:", same)

# %% [markdown]
# Days of pre-training do not fit on a laptop. Our third start, called *well-read* after the paper's title, begins with MiniLM's
# first blocks and matches MiniLM's last hidden states on 3,200 sentences about products and politics, for some minutes. No task
# is known yet. Beside the three stands a published compact model of three layers, MiniLM-L3, trained by its authors on far more
# text. All starts keep a published table of embeddings as it is (MiniLM's, or L3's own), so "random" means random blocks. Every
# start is then fine-tuned on 1,500 labels, or distilled on these and 2,000 more reviews without labels, at $T = 1$, in about
# 110 steps. Step 3 is left out.
#
# **Predict first.** Two layers, soft answers: truncated blocks, compared with random ones, are (`distillation.start`: "better",
# "worse" or "alike")

# %%
my_guess = None
predict("distillation.start", my_guess)

# %% tags=["reveal"]
if (guess := reveal("distillation.start")) is not None:
    runs = load_results("well_read")["runs"]
    print("test reviews right (%): median (smallest to largest) of the recorded seeds\n")
    print(f"{'layers, start':33}{'1,500 labels':>21}{'soft answers':>21}{'pseudo-labels':>21}")
    for layers in (2, 3, 4):
        chosen = [run["results"] for run in runs if run["setting"]["layers"] == layers]
        for kind in chosen[0]:
            columns = [[row[kind][signal] for row in chosen] for signal in ("labels", "soft", "pseudo-labels")]
            words = [f"{median(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in columns]
            print(f"{f'{layers}, {kind}':33}" + "".join(f"{word:>21}" for word in words))
    print("\nYour guess, truncated against random, two layers:", guess)

# %% [markdown]
# <details><summary><b>After your guess: what the table says</b></summary>
#
# Two layers: truncated blocks are hardly better than random ones; the ranges overlap. A likely reason: MiniLM's second layer was
# never meant to be the last. The well-read start is ahead of both on every seed and with every signal. With two and three layers
# reading brings 1.5 to 3.5 points over truncation (medians), with four nothing: four layers are most of MiniLM already. The paper
# reports, too, that its gap is widest for small students.
#
# MiniLM-L3 is the best of three layers from the labels alone, and distillation adds little to it. From truncated and well-read
# starts, soft answers and pseudo-labels differ by less than two points, in either direction, as in section 5. With two layers, a
# well-read student of 1,500 labels is as good as a truncated one that was distilled.
# </details>

# %% [markdown]
# ## 7. The yardstick
#
# The teacher, a three-layer student (untrained here; the cost is the same), MiniLM-L3 and the averaging network, measured on this
# machine.

# %%
from effnlp_lessons.distillation.well_read import truncated_encoder
from effnlp_lessons.measure import cost, table
from effnlp_lessons.pretrained import load_minilm_l3
from effnlp_lessons.widgets.own_models import TOKENS, keep_model, show_kept_models

three_layers = SentenceClassifier(truncated_encoder(review_teacher.encoder, 3), classes=2).eval()
models = {"teacher, 6 layers": review_teacher, "student, 3 layers": three_layers,
          "MiniLM-L3 (no head)": load_minilm_l3(), "averaging network": AveragingNetwork().eval()}
inputs = torch.ones(1, TOKENS, dtype=torch.long), torch.ones(1, TOKENS, dtype=torch.bool)
costs = {name: cost(model, *inputs) for name, model in models.items()}
print(table(costs))

# %% [markdown]
# Half the layers: half the MACs, and three quarters of the bytes, because the token table stays whole. (Notebook 14 shrinks the
# table.) The averaging network has almost no MACs, and all its bytes are tables. With all 7,072 answers it comes close to three
# well-read layers that had 3,500. The data differ, so this is no contest. But little order was needed to get there.
#
# And how good are they? Recorded, with the course's teacher: three layers after 3,500 soft answers, the averaging network after
# all. The averaging networks that you have just trained join your own plot.

# %% tags=["reveal"]
if reveal("distillation.gain") is not None:
    of_three = [run["results"] for run in load_results("well_read")["runs"] if run["setting"]["layers"] == 3]
    transfer = load_results("transfer_set")["runs"]
    right = {"teacher, 6 layers": [run["teachers"][SHIPPED] for run in transfer],
             "student, 3 layers": [row["well-read"]["soft"] for row in of_three],
             "MiniLM-L3": [row["published (MiniLM-L3)"]["soft"] for row in of_three],
             "averaging network": [run["students"][SHIPPED]["soft"][MORE] for run in transfer]}
    for name, found in right.items():
        print(f"{name:18} {median(found):.1f} % of the test reviews right ({min(found):.1f} to {max(found):.1f})")
    size = costs["averaging network"]
    for name, student in students.items():
        keep_model("01", f"averaging, {name}", accuracy=accuracy(student, dev), examples=1_000,
                   macs=size.macs, bytes_on_disk=size.bytes_on_disk)
    show_kept_models()

# %% [markdown]
# ## Paper and ours
#
# | | paper | here |
# |---|---|---|
# | Hinton: teacher for digits | two layers of 1,200, dropout, a bound on the weights, images moved by up to two pixels; 60,000 images | two layers of 300, dropout; 4,000 images |
# | Hinton: the shift of the bias | chosen on the test set | chosen on training digits |
# | Hinton: specialists for 15,000 classes | one generalist and 61 specialists | left out |
# | Turc: random start | all weights | the blocks; the embeddings are MiniLM's |
# | Turc: pre-training | masked words of Wikipedia and books, from random weights | matching MiniLM's last hidden states on 3,200 sentences, from its own blocks |
# | Turc: how many tokens | billions | about seventy thousand, the same for each size |
# | Turc: sizes | 24 BERTs, 128 to 768 wide | counted all 24; trained 2, 3 and 4 layers, 384 wide |
#
# Printed by Hinton et al.: a teacher with 67 test errors of 10,000, a student of two layers of 800 with 146, and with soft targets at
# $T = 20$ 74; on speech, frames right: one model 58.9 %, ten together 61.1 %, one distilled from the ten 60.8 %. Printed
# with the released small BERTs, for the fine-tuned GLUE test average: 64.2 (tiny), 65.8 (mini), 71.2 (small), 73.5 (medium). None of these numbers
# was repeated here.

# %% [markdown]
# ## Choose by cost
#
# <details><summary><b>A phone, one short message at a time, and a fixed question such as good or bad.</b></summary>
#
# Try the averaging network first, taught on as much unlabelled text as you can find. It has a few thousand MACs. Only if its
# accuracy will not do, take three or four layers.
# </details>
#
# <details><summary><b>A server that classifies in large batches, and 1,500 labels.</b></summary>
#
# Fine-tune the largest model that you can, on the labels. Let it answer a large amount of text of the task. Teach a compact student
# on that. The teacher is paid once for each sentence, since its answers are cached. Compare with a compact pre-trained model that is
# fine-tuned on the labels alone: for MiniLM-L3 the two were equal.
# </details>
#
# <details><summary><b>Documents of 16,000 tokens.</b></summary>
#
# Half the layers cost half the MACs. But the growth with the length stays: half of $n^2$ still grows like $n^2$. See notebook 08 and
# what follows.
# </details>

# %% [markdown]
# ## Common mistakes
#
# * **Temperature on one side.** Student and teacher are softened by the same $T$, and only in the soft term. The term with the
#   labels stays at 1, and so does the finished student.
# * **No $T^2$.** At $T = 4$ the soft term is about 16 times too weak: the student learns almost from the labels alone.
# * **`mean` for `batchmean`.** The loss is too small by the number of classes.
# * **The two arguments exchanged.** `F.kl_div` takes *log*-probabilities of the student first, probabilities of the teacher second.
# * **A teacher that is not asked cleanly.** See exercise 4 of the homework.
# * **The teacher compared with itself.** The loss is 0, and the student learns from the labels alone.
# * **No control.** Without the pseudo-labels, "soft targets help" may mean "more text helps".

# %% [markdown]
# ## Quiz
#
# **1. Why is the soft term multiplied by $T^2$?**
# <details><summary>To make its value larger than that of the hard term</summary>No. The value is not the point, and it is not always larger.</details>
# <details><summary>Its gradient shrinks like $1/T^2$, and should not change when T does</summary>Yes. One 1/T is in the chain rule, the other in q - p, which gets flatter.</details>
# <details><summary>Because both softmaxes are divided by T</summary>Half right. That is one 1/T, by the chain rule. The other comes from q - p.</details><br>
#
# **2. A student never saw a 3. After training on soft targets, why does it miss so many 3s?**
# <details><summary>It knows nothing of 3s</summary>No. It finds most of them after one number has changed.</details>
# <details><summary>Its last layer has no output for 3</summary>No. It has ten outputs, as its teacher.</details>
# <details><summary>The bias of class 3 is too low, since 3 was never right</summary>Yes. It learned the direction of a 3, and that the answer is never 3.</details><br>
#
# **3. Two classes, good and bad. How much dark knowledge is in a soft target?**
# <details><summary>One number: how sure the teacher is</summary>Yes. There are no other wrong classes to compare.</details>
# <details><summary>As much as with ten classes</summary>No. With ten there are nine wrong classes, and what they have in common.</details>
# <details><summary>None at all</summary>Not quite: how sure the teacher is differs between sentences.</details><br>
#
# **4. A student gains 6 points when it is distilled on 5,000 more sentences. What must be measured before you credit the soft targets?**
# <details><summary>The same run with another temperature</summary>No. That varies the softness, but never takes it away.</details>
# <details><summary>The same run with the teacher's hard pseudo-labels</summary>Yes. Same sentences, no softness. What remains of the gain is not due to softness.</details>
# <details><summary>The teacher's accuracy</summary>Useful, but it does not separate text from softness.</details><br>
#
# **5. In step 2 of pre-trained distillation, the labels of the task are**
# <details><summary>mixed in with a small weight</summary>No. That is Hinton's loss. Here the text has no labels.</details>
# <details><summary>not read</summary>Yes. Soft labels of the teacher alone; step 3 may fine-tune on labels afterwards.</details>
# <details><summary>used to choose the sentences</summary>No. The text needs no labels at all.</details><br>

# %% [markdown]
# ## Where next
#
# The homework is `homework/01_distillation.ipynb`. Notebook 02 distils before any task is known, and looks inside the teacher:
# hidden states, attention scores, layers mapped to layers.
#
# ## References
#
# * Hinton, Vinyals, Dean 2015. *Distilling the Knowledge in a Neural Network.* arXiv 1503.02531.
# * Iyyer, Manjunatha, Boyd-Graber, Daumé III 2015. *Deep Unordered Composition Rivals Syntactic Methods for Text
#   Classification.* ACL 2015.
# * Joulin, Grave, Bojanowski, Mikolov 2016. *Bag of Tricks for Efficient Text Classification.* arXiv 1607.01759.
# * Reimers, Gurevych 2019. *Sentence-BERT.* arXiv 1908.10084.
# * Turc, Chang, Lee, Toutanova 2019. *Well-Read Students Learn Better: On the Importance of Pre-training Compact Models.*
#   arXiv 1908.08962.
