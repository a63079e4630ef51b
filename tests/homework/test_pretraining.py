"""The exercises of notebook 02: references against the library and loops, and wrong answers against the grader.

The wrong answers are written here anew, as a student would write them; none uses a `Mistake` of the exercise.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from effnlp_lessons.distillation import distilbert, tinybert
from effnlp_lessons.distillation.mobilebert import BottleneckBlock, MobileBertConfig
from effnlp_lessons.homework import HomeworkError, check
from effnlp_lessons.homework.pretraining.bottleneck import bottleneck_block
from effnlp_lessons.homework.pretraining.hidden import hidden_loss
from effnlp_lessons.homework.pretraining.layers import alternate_layers
from effnlp_lessons.homework.pretraining.relations import relation_loss
from effnlp_lessons.homework.pretraining.scores import score_loss
from effnlp_lessons.homework.pretraining.stage import Optimizer, Student, transfer_step
from effnlp_lessons.homework.pretraining.words import word_divergence
from effnlp_lessons.transformer import EncoderOutput


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def real_tokens(*lengths):
    """A mask (batch, longest) of texts of these lengths, padded at the end."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# ----------------------------------------------------------------------------- references


@pytest.mark.parametrize("teacher", [1, 2, 3, 6, 7, 12, 24])
def test_alternate_layers_are_the_librarys_and_the_nearest_places(teacher):
    for student in range(1, teacher + 1):
        layers = alternate_layers(teacher, student)
        assert tuple(layers) == distilbert.alternate_layers(teacher, student)
        for number, layer in enumerate(layers):  # nearest, and of two equally near ones the lower
            twice_off = [abs((student - 1) * other - number * (teacher - 1)) for other in range(teacher)]
            assert layer == twice_off.index(min(twice_off))


def test_the_copied_layers_of_the_notebook():
    table = {(12, 6): [0, 2, 4, 7, 9, 11], (4, 3): [0, 1, 3], (6, 3): [0, 2, 5], (6, 1): [0]}
    for depths, layers in table.items():
        assert alternate_layers(*depths) == layers


def test_score_loss_pair_by_pair():
    student, teacher, mask = normal(3, 2, 5, 5), normal(3, 2, 5, 5, seed=1), real_tokens(5, 2, 0)
    squares = [
        (student[text, head, i, j] - teacher[text, head, i, j]).item() ** 2
        for text, length in enumerate((5, 2, 0))
        for head in range(2)
        for i in range(length)
        for j in range(length)
    ]
    torch.testing.assert_close(score_loss(student, teacher, mask).item(), sum(squares) / len(squares))
    torch.testing.assert_close(score_loss(student, teacher, mask), tinybert.attention_loss(student, teacher, mask))


def test_the_scores_of_the_notebook():
    table = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 3.0], [3.0, 3.0, 3.0]])[None, None]
    assert score_loss(table, torch.zeros(1, 1, 3, 3), torch.tensor([[True, True, False]])).item() == 1.5


def test_hidden_loss_is_the_librarys():
    student = [normal(2, 4, 3, seed=i) for i in range(3)]
    teacher = [normal(2, 4, 5, seed=10 + i) for i in range(5)]
    w_e, w_h = normal(3, 5, seed=20), normal(3, 5, seed=21)

    def config(layers, d_model):  # the losses need no more of a model than its sizes
        return SimpleNamespace(layers=layers, d_model=d_model, heads=1)

    losses = tinybert.LayerLosses(config(2, 3), config(4, 5), mapping=(0, 2, 4, 5)).double()
    losses.embedding_projection.weight.data, losses.hidden_projection.weight.data = w_e.T, w_h.T

    def output(hidden):
        scores = tuple(torch.zeros(2, 1, 4, 4, dtype=torch.float64) for _ in hidden[1:])
        return EncoderOutput(hidden[-1], tuple(hidden), None, scores)

    expected = losses(output(student), output(teacher))
    given = hidden_loss(student, teacher, (2, 4), w_e, w_h)
    torch.testing.assert_close(given, expected["embedding"] + expected["hidden"], rtol=1e-12, atol=1e-12)


def test_hidden_loss_entry_by_entry():
    student, teacher = [normal(1, 2, 2, seed=i) for i in range(3)], [normal(1, 2, 3, seed=9 + i) for i in range(4)]
    w_e, w_h = normal(2, 3, seed=5), normal(2, 3, seed=6)
    total = 0.0
    for mine, theirs, w in ((0, 0, w_e), (1, 1, w_h), (2, 3, w_h)):
        for token in range(2):
            for channel in range(3):
                projected = sum(student[mine][0, token, i] * w[i, channel] for i in range(2))
                total += (projected - teacher[theirs][0, token, channel]).item() ** 2 / 6
    torch.testing.assert_close(hidden_loss(student, teacher, (1, 3), w_e, w_h).item(), total)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_word_divergence_is_torchs(temperature):
    student, teacher, mask = normal(3, 5, 11), normal(3, 5, 11, seed=1), real_tokens(5, 1, 4)
    rows = [(text, token) for text, length in enumerate((5, 1, 4)) for token in range(length)]
    z, v = (torch.stack([logits[row] for row in rows]) / temperature for logits in (student, teacher))
    expected = F.kl_div(F.log_softmax(z, -1), F.softmax(v, -1), reduction="batchmean") * temperature**2
    given = word_divergence(student, teacher, mask, temperature)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    of_library = distilbert.soft_divergence(student, teacher, temperature, mask)
    torch.testing.assert_close(given, of_library, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:reduction")  # torch itself warns of it
def test_the_mean_of_kl_div_is_smaller_by_the_vocabulary():
    z, v = normal(4, 30_522).log_softmax(-1), normal(4, 30_522, seed=1).softmax(-1)
    ratio = F.kl_div(z, v, reduction="batchmean") / F.kl_div(z, v, reduction="mean")
    assert round(ratio.item(), 6) == 30_522


@pytest.mark.parametrize("feed_forwards", [1, 2, 4])
def test_bottleneck_block_is_the_librarys(feed_forwards):
    config = MobileBertConfig(
        d_embedding=4, d_model=12, d_bottleneck=8, heads=2, d_ff=16, feed_forwards=feed_forwards, layers=1
    )
    block = BottleneckBlock(config).double().eval()
    for number, parameter in enumerate(block.parameters()):
        parameter.data = normal(*parameter.shape, seed=number) / 3
    mixer = block.token_mixer

    def norm(part):
        return part.norm.weight, part.norm.bias

    def attention(query_key_input, value_input):
        """What the library's attention gives before its residual and norm."""
        q, k = mixer.query(query_key_input), mixer.key(query_key_input)
        q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k, mixer.value(value_input)))
        return mixer.output.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def linear(part):
        return part.linear.weight, part.linear.bias, *norm(part)

    weights = {
        "bottleneck": linear(block.bottleneck),
        "shared": linear(block.shared_bottleneck),
        "attention": norm(mixer.output),
        "feed_forwards": [(one.expand.weight, one.expand.bias, *linear(one.contract)) for one in block.channel_mixer],
        "output": linear(block.output_bottleneck),
    }
    x = normal(2, 5, 12)
    torch.testing.assert_close(bottleneck_block(x, weights, attention), block(x)[0], rtol=1e-12, atol=1e-12)


def moved_parts(step, block, lower_rate, learning_rate=0.01):
    """Which parts of a small student `step` moves, and by how much each of the blocks, after a first step of all."""
    generator = torch.Generator().manual_seed(1)
    student = Student(4, 3, generator)
    optimizer = Optimizer(student)
    ids, teacher_maps = torch.tensor([[1, 2, 3]]), normal(5, 1, 3, 3)
    (student(ids).square().sum() + sum(weight.sum() for weight in student.parts["head"])).backward()
    optimizer.step()
    before = {part: [w.detach().clone() for w in weights] for part, weights in student.parts.items()}
    step(student, optimizer, ids, teacher_maps, block, learning_rate, lower_rate)
    return {
        part: max((new.detach() - old).abs().max().item() for new, old in zip(weights, before[part], strict=True))
        for part, weights in student.parts.items()
    }


def test_transfer_step_moves_a_block_and_those_below_at_their_rate():
    moved = moved_parts(transfer_step, block=2, lower_rate=0.1)
    assert {part for part, distance in moved.items() if distance} == {0, 1, 2}
    alone = moved_parts(transfer_step, block=2, lower_rate=0.0)
    assert {part for part, distance in alone.items() if distance} == {2}
    full = moved_parts(transfer_step, block=2, lower_rate=1.0)
    assert alone[2] == moved[2] == full[2]
    assert moved[0] == pytest.approx(0.1 * full[0]) and moved[1] == pytest.approx(0.1 * full[1])


def test_the_starter_moves_everything_though_its_gradients_are_zero():
    assert all(moved_parts(starter_of_the_notebook, block=1, lower_rate=0.1).values())


def test_transfer_step_is_a_step_of_adamw_on_the_blocks_alone():
    """A new AdamW that knows of the moving parameters only makes the same first step."""
    student = Student(3, 2, torch.Generator().manual_seed(2))
    ids, teacher_maps = torch.tensor([[4, 5]]), normal(4, 1, 2, 2)
    twin = Student(3, 2, torch.Generator().manual_seed(2))
    groups = [{"params": twin.parts[0], "lr": 0.003}, {"params": twin.parts[1], "lr": 0.01}]
    lone = torch.optim.AdamW(groups, weight_decay=0.1)
    loss = (twin(ids)[2] - teacher_maps[2]).square().mean()
    loss.backward()
    lone.step()
    given = transfer_step(student, Optimizer(student), ids, teacher_maps, 1, 0.01, 0.3)
    assert given.item() == pytest.approx(loss.item(), rel=1e-12) and not given.requires_grad
    for mine, other in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_relation_loss_row_by_row():
    student, teacher, mask = normal(3, 2, 5, 3), normal(3, 2, 5, 4, seed=1), real_tokens(5, 3, 0)
    divergences = []
    for text, length in enumerate((5, 3, 0)):
        for head in range(2):
            for row in range(length):
                mine, theirs = (
                    torch.stack([v[text, head, row] @ v[text, head, j] for j in range(length)]) / v.shape[-1] ** 0.5
                    for v in (student, teacher)
                )
                p, q = theirs.softmax(0).tolist(), mine.softmax(0).tolist()
                divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    expected = sum(divergences) / len(divergences)
    torch.testing.assert_close(relation_loss(student, teacher, mask).item(), expected, rtol=1e-12, atol=1e-12)


def test_relation_loss_does_not_see_a_rotation_and_is_zero_for_the_teacher():
    values, mask = normal(2, 3, 6, 4), real_tokens(6, 4)
    rotation = torch.linalg.qr(normal(4, 4, seed=2))[0]
    assert relation_loss(values @ rotation, values, mask).item() == pytest.approx(0, abs=1e-12)
    assert relation_loss(1.5 * values, values, mask) > 0.01


def test_relation_loss_and_its_gradient_are_finite_beside_padding_and_a_text_of_padding_alone():
    student = normal(3, 2, 4, 3).requires_grad_()
    loss = relation_loss(student, normal(3, 2, 4, 5, seed=1), real_tokens(4, 2, 0))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    assert [bool(gradient.any()) for gradient in student.grad] == [True, True, False]


# ----------------------------------------------------------------------------- wrong answers


def layers_by(place):
    """Student layer i takes `place(i, teacher_layers, student_layers)`; the given line for one layer stays."""

    def answer(teacher_layers, student_layers):
        if student_layers == 1:
            return (0,)
        return tuple(place(i, teacher_layers, student_layers) for i in range(student_layers))

    return answer


def nearest(x):
    """Nearest whole number, a half downwards."""
    return int(x) if x - int(x) <= 0.5 else int(x) + 1


def scores_text_by_text(wanted=lambda i, j: i and j, error=lambda d: d * d, join="pairs"):
    """The loss in loops over texts; `wanted(is query real, is key real)`. Join "pairs", or "texts" (mean of means)."""

    def answer(student, teacher, mask):
        found = []
        for s, t, real in zip(student, teacher, mask.tolist(), strict=True):
            rows = [(i, j) for i in range(len(real)) for j in range(len(real)) if wanted(real[i], real[j])]
            if rows:
                found.append(torch.stack([error(s[:, i, j] - t[:, i, j]) for i, j in rows]))
        if join == "texts":
            return sum(text.mean() for text in found) / len(found)
        return torch.cat(found).mean()

    return answer


def probabilities_of_scores(student, teacher, mask):
    student, teacher = F.softmax(student, dim=-1), F.softmax(teacher, dim=-1)
    return scores_text_by_text()(student, teacher, mask)


def zeroed_then_mse(student, teacher, mask):
    outside = ~(mask.unsqueeze(1).unsqueeze(3) & mask.unsqueeze(1).unsqueeze(2))
    return F.mse_loss(student.masked_fill(outside, 0), teacher.masked_fill(outside, 0))


def released_zeros(student, teacher, mask):
    padded = ~mask[:, None, None, :]
    return F.mse_loss(student.masked_fill(padded, 0), teacher.masked_fill(padded, 0))


def pairs_of_one_head(student, teacher, mask):
    pairs = torch.einsum("bi,bj->bij", mask.to(student.dtype), mask.to(student.dtype))
    return torch.einsum("bhij,bij->", (student - teacher) ** 2, pairs) / pairs.sum()


def mean_head_first(student, teacher, mask):
    gap = (student - teacher).mean(dim=1)
    return (gap**2)[mask[:, :, None] & mask[:, None, :]].mean()


def hidden_by(w_first="w_e", w_rest="w_h", pairs=None, loss=F.mse_loss, add=sum, detached=True, first=True):
    """TinyBERT's sum with a choice of matrices and of `pairs(mapping)`: (student's number, teacher's number)."""

    def answer(student_hidden, teacher_hidden, mapping, w_e, w_h):
        named = {"w_e": w_e, "w_h": w_h}
        chosen = pairs(mapping) if pairs else [(m + 1, mapping[m]) for m in range(len(mapping))]
        terms = [(0, 0, named[w_first])] if first else []
        terms += [(m, g, named[w_rest]) for m, g in chosen]
        losses = []
        for m, g, w in terms:
            theirs = teacher_hidden[g].detach() if detached else teacher_hidden[g]
            losses.append(loss(torch.einsum("bts,sd->btd", student_hidden[m], w), theirs))
        return add(losses)

    return answer


def teacher_brought_down(student_hidden, teacher_hidden, mapping, w_e, w_h):
    loss = ((student_hidden[0] - teacher_hidden[0].detach() @ w_e.t()) ** 2).mean()
    for m, g in enumerate(mapping):
        loss = loss + ((student_hidden[m + 1] - teacher_hidden[g].detach() @ w_h.t()) ** 2).mean()
    return loss


def as_linear_layers(student_hidden, teacher_hidden, mapping, w_e, w_h):
    loss = F.mse_loss(F.linear(student_hidden[0], w_e), teacher_hidden[0].detach())
    for m, g in zip(range(1, len(student_hidden)), mapping, strict=True):
        loss += F.mse_loss(F.linear(student_hidden[m], w_h), teacher_hidden[g].detach())
    return loss


def kl_of_torch(reduction="batchmean", masked=True, t_factor=lambda t: t * t, swap=False, log=True, heat=(1, 1)):
    """F.kl_div with the usual slips; `heat`: powers of T by which student and teacher are divided."""

    def answer(student, teacher, mask, temperature):
        if swap:
            student, teacher = teacher, student
        student, teacher = student / temperature ** heat[0], teacher / temperature ** heat[1]
        if masked:
            student, teacher = student[mask], teacher[mask]
        q = F.log_softmax(student, -1) if log else F.softmax(student, -1)
        return F.kl_div(q, F.softmax(teacher, -1), reduction=reduction) * t_factor(temperature)

    return answer


def words_by_token(join):
    """`join` of the list of texts, each a list of (divergence, is real), times T²."""

    def answer(student, teacher, mask, temperature):
        texts = []
        for z, v, real in zip(student / temperature, teacher / temperature, mask.tolist(), strict=True):
            rows = F.kl_div(z.log_softmax(-1), v.softmax(-1), reduction="none").sum(-1)
            texts.append(list(zip(rows, real, strict=True)))
        return join(texts) * temperature**2

    return answer


def mean(values):
    return sum(values) / len(values)


def soft_cross_entropy_of_torch(student, teacher, mask, temperature):
    target = (teacher[mask] / temperature).softmax(-1)
    return F.cross_entropy(student[mask] / temperature, target) * temperature**2


def block_by(
    norm=lambda h, gamma, beta: h * gamma + beta,
    attend=lambda attention, x, u, s: attention(s, x) + u,
    choose=lambda parts: parts,
    activation=torch.relu,
    add_own=1,
    add_stack=0,
    add_x=1,
):
    """MobileBERT's block with a choice of what is read and added; `add_...`: how often a residual is added."""

    def answer(x, weights, attention):
        def part(name, h, plus=0):
            w, b, gamma, beta = weights[name]
            return norm(h @ w.mT + b + plus, gamma, beta)

        u, s = part("bottleneck", x), part("shared", x)
        a = norm(attend(attention, x, u, s), *weights["attention"])
        start = a
        for w_1, b_1, w_2, b_2, gamma, beta in choose(weights["feed_forwards"]):
            a = norm(activation(a @ w_1.mT + b_1) @ w_2.mT + b_2 + add_own * a, gamma, beta)
        return part("output", a + add_stack * start, add_x * x)

    return answer


def layer_norm_by_hand(h, gamma, beta):
    centred = h - h.mean(-1, keepdim=True)
    return gamma * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() + beta


def x_added_last(x, weights, attention):
    return block_by(add_x=0)(x, weights, attention) + x


def starter_of_the_notebook(student, optimizer, token_ids, teacher_maps, block, learning_rate, lower_rate):
    maps = student(token_ids)
    loss = F.mse_loss(maps[block + 1], teacher_maps[block + 1])
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        part = group["part"]
        group["lr"] = learning_rate if part == block else lower_rate * learning_rate
        if part in ("embeddings", "head") or part > block:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return loss.detach()


def step_by(rates, maps_compared=lambda block, maps: [block + 1], still=None, clear=True, shrink=False):
    """One step with `rates(block)`: part -> "own", "lower" or a number; parts not named are left without gradient.

    `still(optimizer, group)`: what is done to those instead. `shrink`: lower blocks have smaller gradients.
    """

    def answer(student, optimizer, token_ids, teacher_maps, block, learning_rate, lower_rate):
        if clear:
            for parameter in student.parameters():
                parameter.grad = None
        maps = student(token_ids)
        losses = [(maps[n] - teacher_maps[n]).pow(2).mean() for n in maps_compared(block, maps)]
        sum(losses).backward()
        chosen = {"own": learning_rate, "lower": learning_rate * lower_rate}
        table = rates(block)
        for group in optimizer.param_groups:
            if group["part"] not in table:
                group["lr"] = chosen["lower"]
                for parameter in group["params"]:
                    parameter.grad = None if still is None else torch.zeros_like(parameter)
                if still is not None:
                    still(optimizer, group)
                continue
            rate = table[group["part"]]
            group["lr"] = chosen.get(rate, rate)
            if shrink and rate == "lower":
                group["lr"] = learning_rate
                for parameter in group["params"]:
                    parameter.grad = parameter.grad * lower_rate
        optimizer.step()
        return sum(losses).detach()

    return answer


def right_rates(block):
    return {block: "own"} | {below: "lower" for below in range(block)}


def forget_moments(optimizer, group):
    for parameter in group["params"]:
        optimizer.state[parameter] = {}


def stop_decay(optimizer, group):
    group["weight_decay"] = 0


def relations_by(
    width=lambda own, other: own, keys=True, rows="real", direction="teacher first", fill=-1e30, join="rows", root=0.5
):
    """MiniLM's loss text by text, with the usual slips; rows "real" or "all", direction, join "rows" or "texts"."""

    def answer(student, teacher, mask):
        d_s, d_t = student.shape[-1], teacher.shape[-1]
        texts = []
        for text in range(len(mask)):
            logs = []
            for v, d in ((student[text], width(d_s, d_t)), (teacher[text], width(d_t, d_s))):
                table = torch.einsum("hid,hjd->hij", v, v) / d**root
                if keys:
                    table = table.masked_fill(~mask[text], fill)
                logs.append(table.log_softmax(-1))
            q, p = logs if direction == "teacher first" else logs[::-1]
            divergence = (p.exp() * (p - q)).sum(-1)  # (heads, length)
            texts.append(divergence[:, mask[text]] if rows == "real" else divergence)
        if join == "texts":
            return sum(one.mean() for one in texts if one.numel()) / sum(one.numel() > 0 for one in texts)
        return torch.cat([one.flatten() for one in texts]).mean()

    return answer


def relations_as_squares(student, teacher, mask):
    tables = [v @ v.transpose(2, 3) / math.sqrt(v.shape[3]) for v in (student, teacher)]
    return scores_text_by_text()(*tables, mask)


def heads_merged(student, teacher, mask):
    batch, _, length, _ = student.shape
    merged = [v.permute(0, 2, 1, 3).reshape(batch, 1, length, -1) for v in (student, teacher)]
    return relations_by()(*merged, mask)


SQUARED_SUM = lambda mine, theirs: F.mse_loss(mine, theirs, reduction="sum")  # noqa: E731

WRONG_ANSWERS = [
    ("pretraining.alternate_layers", layers_by(lambda i, n, k: range(0, n, n // k)[i]), "A fixed step from the first"),
    ("pretraining.alternate_layers", layers_by(lambda i, n, k: int(i * n / k + 1e-9)), "The first layer of each group"),
    (
        "pretraining.alternate_layers",
        layers_by(lambda i, n, k: int((i + 1) * n / k + 1e-9) - 1),
        "The last layer of each group",
    ),
    (
        "pretraining.alternate_layers",
        layers_by(lambda i, n, k: 1 + nearest(i * (n - 1) / (k - 1))),
        "Layers are numbered from one",
    ),
    (
        "pretraining.alternate_layers",
        layers_by(lambda i, n, k: nearest(i * n / (k - 1))),
        "The last layer is taken for number teacher_layers",
    ),
    ("pretraining.alternate_layers", layers_by(lambda i, n, k: list(range(n))[:k][i]), "The lowest layers"),
    ("pretraining.alternate_layers", layers_by(lambda i, n, k: list(range(n))[-k:][i]), "The highest layers"),
    (
        "pretraining.alternate_layers",
        layers_by(lambda i, n, k: round(i * (n - 1) / (k - 1))),
        "Python's round goes to the even number",
    ),
    (
        "pretraining.alternate_layers",
        layers_by(lambda i, n, k: int(i * (n - 1) / (k - 1) + 0.5)),
        "A half rounds up",
    ),
    ("pretraining.alternate_layers", layers_by(lambda i, n, k: i * (n - 1) // (k - 1)), "Everything rounds down"),
    ("pretraining.alternate_layers", layers_by(lambda i, n, k: -(i * (1 - n) // (k - 1))), "Everything rounds up"),
    ("pretraining.score_loss", probabilities_of_scores, "Probabilities are compared, not scores"),
    ("pretraining.score_loss", lambda s, t, mask: F.mse_loss(s, t), "Padding counts like text"),
    ("pretraining.score_loss", zeroed_then_mse, "Padding stays in the denominator"),
    ("pretraining.score_loss", scores_text_by_text(lambda i, j: j), "Padded queries still count"),
    ("pretraining.score_loss", released_zeros, "Padded keys become zeros and are counted"),
    ("pretraining.score_loss", scores_text_by_text(lambda i, j: i), "Padded keys still count"),
    ("pretraining.score_loss", scores_text_by_text(lambda i, j: i or j), "A pair counts if one of its tokens is real"),
    ("pretraining.score_loss", pairs_of_one_head, "The heads are summed"),
    ("pretraining.score_loss", mean_head_first, "The heads are averaged before they are compared"),
    ("pretraining.score_loss", scores_text_by_text(join="texts"), "A mean of every text, then the mean of these"),
    ("pretraining.score_loss", scores_text_by_text(error=abs), "The absolute difference"),
    (
        "pretraining.score_loss",
        lambda s, t, mask: torch.sqrt(scores_text_by_text()(s, t, mask)),
        "A square root at the end",
    ),
    ("pretraining.hidden_loss", hidden_by(detached=False), "The teacher gets a gradient"),
    ("pretraining.hidden_loss", torch.no_grad()(hidden_by()), "Nobody gets a gradient"),
    ("pretraining.hidden_loss", hidden_by(w_rest="w_e"), "W_e is used for the layers, too"),
    (
        "pretraining.hidden_loss",
        hidden_by(w_rest="w_e", detached=False),
        "W_e is used for the layers, too, and the teacher learns",
    ),
    ("pretraining.hidden_loss", hidden_by(w_first="w_h"), "W_h is used for the embeddings, too"),
    ("pretraining.hidden_loss", hidden_by(w_first="w_h", w_rest="w_e"), "The two matrices are exchanged"),
    ("pretraining.hidden_loss", teacher_brought_down, "The teacher is projected"),
    ("pretraining.hidden_loss", as_linear_layers, "The projection is transposed"),
    (
        "pretraining.hidden_loss",
        hidden_by(pairs=lambda g: [(m + 1, g[m] - 1) for m in range(len(g))]),
        "The teacher's layer is off by one",
    ),
    (
        "pretraining.hidden_loss",
        hidden_by(pairs=lambda g: list(enumerate(g)), detached=False),
        "The student's layer is off by one, and the teacher learns",
    ),
    (
        "pretraining.hidden_loss",
        hidden_by(pairs=lambda g: [(m, g[m] - 1) for m in range(len(g))]),
        "Both layers are off by one",
    ),
    (
        "pretraining.hidden_loss",
        hidden_by(pairs=lambda g: [(m, m) for m in range(1, len(g) + 1)]),
        "The mapping is not used",
    ),
    ("pretraining.hidden_loss", hidden_by(first=False), "The embeddings are left out"),
    ("pretraining.hidden_loss", hidden_by(add=lambda losses: torch.stack(losses).mean()), "A mean over the losses"),
    (
        "pretraining.hidden_loss",
        hidden_by(add=lambda losses: losses[0] + torch.stack(losses[1:]).mean()),
        "A mean over the layers",
    ),
    ("pretraining.hidden_loss", hidden_by(loss=SQUARED_SUM), "Squared errors are summed, not averaged"),
    ("pretraining.word_divergence", kl_of_torch("mean"), "The mean runs over the words of the vocabulary, too"),
    ("pretraining.word_divergence", kl_of_torch("mean", masked=False), "The mean over everything, padding too"),
    ("pretraining.word_divergence", kl_of_torch(masked=False), "batchmean on three dimensions"),
    (
        "pretraining.word_divergence",
        words_by_token(lambda texts: sum(d for text in texts for d, real in text if real) / len(texts)),
        "Divided by the number of texts",
    ),
    (
        "pretraining.word_divergence",
        words_by_token(lambda texts: mean([d for text in texts for d, _ in text])),
        "Padding counts like text",
    ),
    (
        "pretraining.word_divergence",
        words_by_token(lambda texts: mean([d * real for text in texts for d, real in text])),
        "Padding stays in the denominator",
    ),
    (
        "pretraining.word_divergence",
        words_by_token(lambda texts: mean([mean([d for d, real in text if real]) for text in texts])),
        "A mean of every text, then the mean of these",
    ),
    ("pretraining.word_divergence", kl_of_torch(t_factor=lambda t: 1), "The factor T² is missing"),
    ("pretraining.word_divergence", kl_of_torch(t_factor=lambda t: t), "Multiplied by T, not by T²"),
    ("pretraining.word_divergence", kl_of_torch(swap=True), "The direction is reversed"),
    ("pretraining.word_divergence", soft_cross_entropy_of_torch, "Cross-entropy in place of the divergence"),
    ("pretraining.word_divergence", kl_of_torch(log=False), "Probabilities where log-probabilities are expected"),
    ("pretraining.word_divergence", kl_of_torch(heat=(0, 1)), "Only the teacher is softened"),
    ("pretraining.word_divergence", kl_of_torch(heat=(1, 0)), "Only the student is softened"),
    ("pretraining.word_divergence", kl_of_torch(heat=(-1, -1)), "Logits are multiplied by the temperature"),
    ("pretraining.bottleneck_block", block_by(norm=layer_norm_by_hand), "A layer norm in place of NoNorm"),
    ("pretraining.bottleneck_block", block_by(norm=lambda h, gamma, beta: h * gamma), "Beta is left out"),
    ("pretraining.bottleneck_block", block_by(attend=lambda f, x, u, s: f(s, x) + s), "The attention's residual is s"),
    ("pretraining.bottleneck_block", block_by(attend=lambda f, x, u, s: f(s, x)), "The attention has no residual"),
    ("pretraining.bottleneck_block", block_by(attend=lambda f, x, u, s: f(s, s) + u), "Values are made from s"),
    (
        "pretraining.bottleneck_block",
        block_by(attend=lambda f, x, u, s: f(u, u) + u),
        "Queries, keys and values are made from u",
    ),
    ("pretraining.bottleneck_block", block_by(attend=lambda f, x, u, s: f(u, x) + s), "u and s are exchanged"),
    ("pretraining.bottleneck_block", block_by(choose=lambda parts: parts[:-1]), "One feed-forward too"),
    ("pretraining.bottleneck_block", block_by(add_own=0), "The feed-forwards have no residual"),
    ("pretraining.bottleneck_block", block_by(add_own=0, add_stack=1), "One residual around all feed-forwards"),
    ("pretraining.bottleneck_block", block_by(add_x=0), "The last residual is missing"),
    ("pretraining.bottleneck_block", x_added_last, "The last residual is added after NoNorm"),
    ("pretraining.bottleneck_block", block_by(activation=F.gelu), "GELU in place of ReLU"),
    ("pretraining.transfer_step", starter_of_the_notebook, "A gradient of zero is taken for no step"),
    ("pretraining.transfer_step", step_by(right_rates, still=stop_decay), "Only weight decay is switched off"),
    ("pretraining.transfer_step", step_by(right_rates, still=forget_moments), "Only the moments are thrown away"),
    (
        "pretraining.transfer_step",
        step_by(lambda block: right_rates(block) | {"embeddings": "lower"}),
        "The embeddings learn at the lower rate",
    ),
    (
        "pretraining.transfer_step",
        step_by(lambda block: dict.fromkeys(range(block + 1), "own")),
        "The lower blocks learn at the full rate",
    ),
    ("pretraining.transfer_step", step_by(lambda block: {block: "own"}), "The lower blocks never move"),
    ("pretraining.transfer_step", step_by(right_rates, shrink=True), "The lower blocks' gradients are scaled"),
    (
        "pretraining.transfer_step",
        step_by(right_rates, lambda block, maps: range(1, len(maps))),
        "The losses of all blocks are on",
    ),
    ("pretraining.transfer_step", step_by(right_rates, clear=False), "Old gradients are still there"),
    ("pretraining.relation_loss", relations_by(keys=False), "Padded tokens are related to"),
    ("pretraining.relation_loss", relations_by(rows="all"), "Rows of padded tokens count"),
    ("pretraining.relation_loss", relations_by(keys=False, rows="all"), "Padding counts like text"),
    ("pretraining.relation_loss", relations_by(fill=float("-inf")), "Minus infinity gives NaN"),
    ("pretraining.relation_loss", relations_by(width=max), "The teacher's width for both"),
    ("pretraining.relation_loss", relations_by(width=min), "The student's width for both"),
    ("pretraining.relation_loss", relations_by(root=0), "The scores are not scaled"),
    ("pretraining.relation_loss", relations_by(root=1), "Divided by the width, not by its root"),
    ("pretraining.relation_loss", relations_by(direction="student first"), "The direction is reversed"),
    ("pretraining.relation_loss", relations_as_squares, "The softmax is missing"),
    ("pretraining.relation_loss", heads_merged, "One relation for all heads"),
    ("pretraining.relation_loss", relations_by(join="texts"), "A mean of every text, then the mean of these"),
]


# ----------------------------------------------------------------------------- other right answers


def frozen_by_rate(student, optimizer, token_ids, teacher_maps, block, learning_rate, lower_rate):
    """Nothing is taken away, but what must not move has the rate 0."""
    loss = F.mse_loss(student(token_ids)[block + 1], teacher_maps[block + 1])
    optimizer.zero_grad()
    loss.backward()
    rates = {part: learning_rate * lower_rate for part in range(block)} | {block: learning_rate}
    for group in optimizer.param_groups:
        group["lr"] = rates.get(group["part"], 0.0)
    optimizer.step()
    return loss


def frozen_by_flag(student, optimizer, token_ids, teacher_maps, block, learning_rate, lower_rate):
    """What must not move asks for no gradient."""
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        learns = isinstance(group["part"], int) and group["part"] <= block
        group["lr"] = learning_rate * (1 if group["part"] == block else lower_rate)
        for parameter in group["params"]:
            parameter.requires_grad_(learns)
    loss = F.mse_loss(student(token_ids)[block + 1], teacher_maps[block + 1])
    loss.backward()
    optimizer.step()
    return loss


def test_other_right_answers_pass():
    check("pretraining.alternate_layers", layers_by(lambda i, n, k: nearest(i * (n - 1) / (k - 1))))
    check("pretraining.alternate_layers", distilbert.alternate_layers)
    check("pretraining.score_loss", scores_text_by_text())
    check("pretraining.score_loss", tinybert.attention_loss)
    check("pretraining.hidden_loss", hidden_by())
    check("pretraining.word_divergence", kl_of_torch())
    check("pretraining.word_divergence", words_by_token(lambda t: mean([d for text in t for d, real in text if real])))
    check("pretraining.bottleneck_block", block_by())
    check("pretraining.transfer_step", step_by(right_rates))
    check("pretraining.transfer_step", frozen_by_rate)
    check("pretraining.transfer_step", frozen_by_flag)
    check("pretraining.relation_loss", relations_by())


def test_the_librarys_word_divergence_passes():
    check(
        "pretraining.word_divergence",
        lambda student, teacher, mask, temperature: distilbert.soft_divergence(student, teacher, temperature, mask),
    )


def test_a_teacher_that_learns_is_named_even_beside_another_mistake(capsys):
    both = hidden_by(w_rest="w_e", detached=False)
    with pytest.raises(HomeworkError):
        check("pretraining.hidden_loss", both, explain=True, seed=0)
    assert "too, and the teacher learns. Embeddings and hidden" in capsys.readouterr().out


def test_a_step_shows_the_part_that_moved(capsys):
    with pytest.raises(HomeworkError, match=r"expected 'block 1': at \[0\]: 0, got"):
        check("pretraining.transfer_step", starter_of_the_notebook, seed=0)
    assert "student = a student of" in capsys.readouterr().out
