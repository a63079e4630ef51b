"""The exercises of notebook 07: references against torch and by hand, wrong answers by name.

The wrong answers are written here anew, as a student would write them; none uses a `Mistake` of the exercise.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effnlp_lessons.homework import HomeworkError, check
from effnlp_lessons.homework.movement.gradient import score_gradient
from effnlp_lessons.homework.movement.schedule import share_at
from effnlp_lessons.homework.movement.shrink import attention, feed_forward, shrink_block
from effnlp_lessons.homework.movement.soft import soft_masks


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------- references


class StraightThrough(torch.autograd.Function):
    """Passes M on, and the gradient at M to S."""

    @staticmethod
    def forward(context, scores, threshold):
        return (torch.sigmoid(scores) > threshold).to(scores.dtype)

    @staticmethod
    def backward(context, upstream):
        return upstream, None


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (4, 1), (1, 6), (4, 6)])
def test_score_gradient_is_autograds_through_a_straight_through_mask(rows, columns):
    x, upstream = normal(2, 3, 6), normal(2, 3, 4, seed=1)
    weight = normal(4, 6, seed=2).requires_grad_()
    scores = normal(4 // rows, 6 // columns, seed=3).requires_grad_()
    mask = StraightThrough.apply(scores, 0.4).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    (x @ (weight * mask).T * upstream).sum().backward()
    ours = score_gradient(x, upstream, weight.detach(), scores.detach(), 0.4)
    torch.testing.assert_close(ours[0], scores.grad)
    torch.testing.assert_close(ours[1], weight.grad)


def test_a_score_grows_when_its_weight_moves_away_from_zero():
    """One weight, one input: descent on L moves w by -dL/dw', and S by -dL/dS."""
    for w in (0.5, -0.5):
        for slope in (2.0, -2.0):
            score, gradient = score_gradient(
                torch.ones(1, 1, 1), torch.full((1, 1, 1), slope), torch.tensor([[w]]), torch.zeros(1, 1), 0.1
            )
            away = abs(w - 0.1 * gradient.item()) > abs(w)
            assert (-score.item() > 0) == away


def test_share_at_is_zhu_and_guptas_formula_and_is_held():
    values = [share_at(step, 120, 20, 20, 1.0, 0.2) for step in range(121)]
    assert values[:21] == [1.0] * 21 and values[100:] == pytest.approx([0.2] * 21)
    assert values[60] == pytest.approx(0.3)
    assert all(b < a for a, b in zip(values[20:100], values[21:101], strict=True))
    # their sparsity s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3
    for t in range(20, 101):
        assert 1 - values[t] == pytest.approx(0.8 - 0.8 * (1 - (t - 20) / 80) ** 3)


def a_block(heads=4, d_head=3, d_ff=10, seed=0):
    width = heads * d_head
    shapes = {"query": (width, width), "key": (width, width), "value": (width, width), "output": (width, width)}
    shapes |= {"expand": (d_ff, width), "contract": (width, d_ff)}
    block = {}
    for number, (name, shape) in enumerate(shapes.items()):
        block[f"{name}.weight"] = normal(*shape, seed=seed + number)
        block[f"{name}.bias"] = normal(shape[0], seed=seed + number + 50)
    return block


def test_attention_is_torchs():
    block, x = a_block(), normal(7, 12, seed=9)
    theirs = nn.MultiheadAttention(12, 4, dtype=torch.float64)
    names = "query", "key", "value"
    theirs.in_proj_weight.data = torch.cat([block[f"{name}.weight"] for name in names])
    theirs.in_proj_bias.data = torch.cat([block[f"{name}.bias"] for name in names])
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = block["output.weight"], block["output.bias"]
    torch.testing.assert_close(attention(block, x, 4), theirs(x, x, x)[0])


@pytest.mark.parametrize("kept", [(0, 2), (3,), (0, 1, 2, 3)])
def test_a_shrunk_block_is_the_whole_one_with_outputs_of_heads_and_neurons_at_zero(kept):
    block, x = a_block(), normal(7, 12, seed=9)
    heads = torch.tensor([h in kept for h in range(4)])
    neurons = normal(10, seed=4) > 0.2
    small = shrink_block(block, heads, neurons)
    assert small["query.weight"].shape == (3 * len(kept), 12) and small["contract.weight"].shape == (12, neurons.sum())
    # head after head, through softmax and its own columns of the output matrix
    total = block["output.bias"].repeat(7, 1)
    for h in kept:
        rows = slice(3 * h, 3 * h + 3)
        q, k, v = (F.linear(x, block[f"{n}.weight"][rows], block[f"{n}.bias"][rows]) for n in ("query", "key", "value"))
        total = total + F.scaled_dot_product_attention(q, k, v) @ block["output.weight"][:, rows].T
    torch.testing.assert_close(attention(small, x, len(kept)), total)
    hidden = F.gelu(F.linear(x, block["expand.weight"], block["expand.bias"])) * neurons
    torch.testing.assert_close(
        feed_forward(small, x), F.linear(hidden, block["contract.weight"], block["contract.bias"])
    )


def test_soft_masks_of_the_notebook():
    scores = {
        "query": torch.tensor([[-2.0, 1.0, 0.5, -0.9]]),
        "output": torch.tensor([[-3.0, -1.0, -2.0, -4.0], [-5.0, -2.5, -6.0, -7.0]]),
    }
    masks, share = soft_masks(scores, 0.4, 0.2)
    assert masks["query"].tolist() == [[False, True, True, False]]
    assert masks["output"].nonzero().tolist() == [[0, 1], [0, 2]] and share == pytest.approx(4 / 12)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_soft_masks_weight_by_weight(threshold):
    scores = {"a": normal(6, 7), "b": normal(3, 5, seed=1) - 2}
    masks, share = soft_masks(scores, threshold, 0.13)
    left = 0
    for name, values in scores.items():
        flat = values.flatten().tolist()
        floor = sorted(flat)[-math.ceil(0.13 * len(flat))]
        wanted = [1 / (1 + math.exp(-value)) > threshold or value >= floor for value in flat]
        assert masks[name].flatten().tolist() == wanted
        left += sum(wanted)
    assert share == pytest.approx(left / 57)


# ----------------------------------------------------------------------------- wrong answers


def score_by(
    part=lambda g, w, m: g * w,
    total=None,
    weight_part=lambda g, m: g * m,
    tokens=lambda x: 1,
    last=lambda total, scores: total,
):
    """Loops over blocks; one slip each."""

    def answer(x, upstream, weight, scores, threshold):
        g = upstream.flatten(0, 1).T @ x.flatten(0, 1) / tokens(x)
        rows, columns = weight.shape[0] // scores.shape[0], weight.shape[1] // scores.shape[1]
        m = torch.kron((torch.sigmoid(scores) > threshold).to(weight), torch.ones(rows, columns).to(weight))
        values = part(g, weight, m)
        if total:
            sums = total(values, rows, columns)
        else:
            sums = torch.zeros_like(scores)
            for i in range(scores.shape[0]):
                for j in range(scores.shape[1]):
                    sums[i, j] = values[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].sum()
        return last(sums, scores), weight_part(g, m)

    return answer


def over_the_blocks(values, rows, columns):
    return values.reshape(-1, rows, values.shape[1] // columns, columns).sum(2).sum(0)


def strided(values, rows, columns):
    n, m = values.shape[0] // rows, values.shape[1] // columns
    return torch.stack([torch.stack([values[i::n, j::m].sum() for j in range(m)]) for i in range(n)])


def means(values, rows, columns):
    return F.avg_pool2d(values[None], (rows, columns))[0]


def sigmoid_slope(total, scores):
    s = scores.sigmoid()
    return total * (s - s * s)


def schedule(p=None, low=0.0, high=1.0, value=lambda p, a, b: b + (a - b) * (1 - p) ** 3):
    def answer(step, steps, warm_up, cool_down, first, last):
        length = steps - cool_down - warm_up
        at = p(step, steps, warm_up, cool_down) if p else (step - warm_up) / length
        if at < low:
            at = low
        if at > high:
            at = high
        return value(at, first, last)

    return answer


def breaks_off(step, steps, warm_up, cool_down, first, last):
    if step < warm_up:
        return first
    if step > steps - cool_down:
        return last
    return last + (first - last) * (1 - (step - warm_up) / (steps - warm_up)) ** 3


def shrunk(head_rows=None, leave=(), edit=None):
    """By index lists; `leave` names tensors that stay whole, `edit(small, block, rows, neurons)` changes others."""

    def answer(block, heads, neurons):
        d_head = block["query.weight"].shape[0] // heads.shape[0]
        rows = [h * d_head + i for h in range(len(heads)) if heads[h] for i in range(d_head)]
        if head_rows:
            rows = head_rows(heads, d_head)
        units = neurons.nonzero().flatten().tolist()
        small = {}
        for name, values in block.items():
            layer, kind = name.split(".")
            if name in leave or name in ("output.bias", "contract.bias"):
                small[name] = values
            elif layer in ("query", "key", "value"):
                small[name] = values[rows]
            elif layer == "output":
                small[name] = values[:, rows]
            elif layer == "expand":
                small[name] = values[units]
            else:
                small[name] = values[:, units]
        if edit:
            edit(small, block, rows, units)
        return small

    return answer


def every_nth(heads, d_head):
    n = len(heads)
    return [row for row in range(n * d_head) if heads[row % n]]


def contract_rows(small, block, rows, units):
    small["contract.weight"] = block["contract.weight"][: len(units)]


def contract_first(small, block, rows, units):
    small["contract.weight"] = block["contract.weight"][:, : len(units)]


def output_first(small, block, rows, units):
    small["output.weight"] = block["output.weight"][:, : len(rows)]


def neuron_constants(small, block, rows, units):
    gone = [unit for unit in range(len(block["expand.bias"])) if unit not in units]
    constants = F.gelu(block["expand.bias"][gone])
    small["contract.bias"] = block["contract.bias"] + block["contract.weight"][:, gone] @ constants


def head_constants(small, block, rows, units):
    gone = [row for row in range(len(block["value.bias"])) if row not in rows]
    small["output.bias"] = block["output.bias"] + block["output.weight"][:, gone] @ block["value.bias"][gone]


def columns_of_query(small, block, rows, units):
    for layer in ("query", "key", "value"):
        small[f"{layer}.weight"] = block[f"{layer}.weight"][:, rows]


def no_biases(small, block, rows, units):
    for name in small:
        if "bias" in name:
            small[name] = 0 * small[name]


def scaled_up(small, block, rows, units):
    small["output.weight"] = small["output.weight"] * block["output.weight"].shape[1] / len(rows)
    small["contract.weight"] = small["contract.weight"] * block["contract.weight"].shape[1] / len(units)


def zeros_in_place_of_rows(block, heads, neurons):
    rows = heads.repeat_interleave(len(block["query.bias"]) // len(heads)).double()
    small = {}
    for name, values in block.items():
        layer = name.split(".")[0]
        factor = {"query": rows, "key": rows, "value": rows, "expand": neurons.double()}.get(layer)
        small[name] = values if factor is None else (factor * values.movedim(0, -1)).movedim(-1, 0)
    return small


def the_others(block, heads, neurons):
    return shrunk()(block, ~heads, ~neurons)


def soft(
    passes=lambda s, tau: torch.sigmoid(s) > tau, floor=math.ceil, union=True, highest=True, size=lambda s: s, tell=None
):
    def answer(scores, threshold, min_keep):
        masks = {}
        for name, s in scores.items():
            mask = passes(s, threshold)
            number = floor(min_keep * s.numel())
            order = sorted(range(s.numel()), key=lambda i, s=s: (size(s).flatten()[i].item(), i))
            order = order[::-1] if highest else order
            held = torch.zeros(s.numel(), dtype=torch.bool)
            held[order[:number]] = True
            held = held.view_as(s)
            if union is True:
                mask = mask | held
            elif union == "if too few":
                mask = held if mask.sum() < number else mask
            else:
                mask = union(mask, held)
            masks[name] = mask
        kept, all_ = (sum(f(mask) for mask in masks.values()) for f in (lambda m: m.sum().item(), torch.numel))
        return masks, tell(scores, masks, threshold) if tell else kept / all_

    return answer


def floor_on_top(scores, threshold, min_keep):
    masks = {}
    for name, s in scores.items():
        mask = torch.sigmoid(s) > threshold
        more = math.ceil(min_keep * s.numel())
        for i in s.flatten().argsort(stable=True, descending=False).tolist()[::-1]:
            if more and not mask.flatten()[i]:
                mask.view(-1)[i] = True
                more -= 1
        masks[name] = mask
    return masks, torch.cat([mask.flatten() for mask in masks.values()]).double().mean().item()


def floor_of_the_net(scores, threshold, min_keep):
    flat = torch.cat([s.flatten() for s in scores.values()])
    number = math.ceil(min_keep * len(flat))
    least = flat.sort(descending=True).values[number - 1] if number else math.inf
    masks = {name: (torch.sigmoid(s) > threshold) | (s >= least) for name, s in scores.items()}
    return masks, sum(mask.sum().item() for mask in masks.values()) / len(flat)


def share_of_each(scores, threshold, min_keep):
    masks = {}
    for name, s in scores.items():
        count = round((1 - threshold) * s.numel())
        mask = torch.zeros(s.numel(), dtype=torch.bool)
        mask[s.flatten().argsort(stable=True).flip(0)[:count]] = True
        masks[name] = mask.view_as(s)
    kept = sum(mask.sum().item() for mask in masks.values())
    return masks, kept / sum(mask.numel() for mask in masks.values())


def before_the_floor(scores, masks, threshold):
    passed = torch.cat([(torch.sigmoid(s) > threshold).flatten() for s in scores.values()])
    return passed.double().mean().item()


def mean_of_shares(scores, masks, threshold):
    return sum(mask.double().mean().item() for mask in masks.values()) / len(masks)


def share_gone(scores, masks, threshold):
    return torch.cat([(~mask).flatten() for mask in masks.values()]).double().mean().item()


SCORE, SHARE, SHRINK, SOFT = (
    f"movement.{name}" for name in ("score_gradient", "share_at", "shrink_block", "soft_masks")
)

WRONG_ANSWERS = [
    (SCORE, score_by(lambda g, w, m: abs(g * w)), "The score's gradient without its sign"),
    (SCORE, score_by(lambda g, w, m: g * w.abs()), "The weight counts without its sign"),
    (SCORE, score_by(lambda g, w, m: -(g * w)), "The score's gradient has the other sign"),
    (SCORE, score_by(lambda g, w, m: g * (w * m)), "The score's gradient is gated by the mask"),
    (SCORE, score_by(weight_part=lambda g, m: g), "The weight's gradient is not gated"),
    (SCORE, score_by(lambda g, w, m: g * w * m, weight_part=lambda g, m: g), "The gates are exchanged"),
    (SCORE, score_by(last=sigmoid_slope), "The derivative of the sigmoid is in it"),
    (SCORE, score_by(total=over_the_blocks), "Summed over the blocks, not within a block"),
    (SCORE, score_by(total=strided), "Every n-th row and column forms a block"),
    (SCORE, score_by(total=means), "The mean over the block"),
    (SCORE, score_by(lambda g, w, m: g), "The weight is left out"),
    (SCORE, score_by(tokens=lambda x: x.shape[0]), "The mean over the batch"),
    (SCORE, score_by(tokens=lambda x: x.shape[0] * x.shape[1]), "The mean over all tokens"),
    (SHARE, schedule(value=lambda p, a, b: a - (a - b) * p), "The fall is linear"),
    (SHARE, schedule(value=lambda p, a, b: a - (a - b) * p**3), "The fall is slow at first"),
    (SHARE, schedule(value=lambda p, a, b: b + (a - b) * (1 - p) * (1 - p)), "A square in the place of the cube"),
    (SHARE, schedule(value=lambda p, a, b: a + (b - a) * (1 - p) ** 3), "First and last are exchanged"),
    (SHARE, schedule(value=lambda p, a, b: a * (1 - p) ** 3), "The fall ends at 0"),
    (SHARE, schedule(low=-math.inf), "The share is not held during the warm-up"),
    (SHARE, schedule(high=math.inf), "The share is not held during the cool-down"),
    (SHARE, schedule(low=-math.inf, high=math.inf), "The share is not held at all"),
    (SHARE, schedule(lambda t, n, ti, tf: t / (n - ti - tf)), "The fall begins at step 0"),
    (SHARE, schedule(lambda t, n, ti, tf: (t - ti) / n), "The fall lasts as long as the training"),
    (SHARE, schedule(lambda t, n, ti, tf: (t - ti) / (n - ti)), "The fall lasts to the end of the training"),
    (SHARE, breaks_off, "The fall breaks off at the cool-down"),
    (SHARE, schedule(lambda t, n, ti, tf: (t - tf) / (n - ti - tf)), "The warm-up takes the place of the cool-down"),
    (SHRINK, shrunk(leave=("expand.bias",)), "The bias of the first matrix is not cut"),
    (SHRINK, shrunk(leave=("contract.weight",)), "The columns of the second matrix are not cut"),
    (SHRINK, shrunk(edit=contract_rows), "Rows of the second matrix are cut in the place of columns"),
    (SHRINK, shrunk(edit=contract_first), "The first columns of the second matrix stay"),
    (SHRINK, shrunk(edit=neuron_constants), "A removed neuron's bias lives on in the output"),
    (SHRINK, shrunk(edit=head_constants), "A removed head's bias lives on in the output"),
    (SHRINK, zeros_in_place_of_rows, "Zeros, and nothing is removed"),
    (SHRINK, the_others, "The others are kept"),
    (SHRINK, shrunk(every_nth), "The heads are interleaved"),
    (SHRINK, shrunk(leave=("output.weight",)), "The columns of the output matrix are not cut"),
    (SHRINK, shrunk(edit=output_first), "The first columns of the output matrix stay"),
    (
        SHRINK,
        shrunk(leave=("query.bias", "key.bias", "value.bias")),
        "The biases of query, key and value are not cut",
    ),
    (SHRINK, shrunk(edit=columns_of_query), "Query, key and value lose columns"),
    (SHRINK, shrunk(edit=no_biases), "The biases are gone"),
    (SHRINK, shrunk(edit=scaled_up), "What is left is scaled up"),
    (SOFT, soft(tell=lambda scores, masks, threshold: 1 - threshold), "The share is taken for 1 - threshold"),
    (SOFT, share_of_each, "The threshold is taken for a share of weights"),
    (SOFT, soft(lambda s, tau: s > tau), "The scores themselves are compared"),
    (SOFT, soft(lambda s, tau: torch.sigmoid(s) >= tau), "A score at the threshold passes"),
    (SOFT, soft(lambda s, tau: s.sigmoid() < tau), "The low scores are kept"),
    (
        SOFT,
        soft(lambda s, tau: torch.sigmoid(s.abs()) > tau, size=torch.abs),
        "The size of the score counts",
    ),
    (SOFT, soft(floor=lambda number: 0), "A matrix may be emptied"),
    (SOFT, soft(union=lambda mask, held: mask & held), "The floor is a ceiling"),
    (SOFT, soft(union=lambda mask, held: held), "Only the floor is kept"),
    (SOFT, floor_on_top, "The floor comes on top"),
    (SOFT, soft(highest=False, union="if too few"), "The floor keeps the lowest scores"),
    (SOFT, soft(floor=int), "The floor is rounded down"),
    (SOFT, floor_of_the_net, "The floor holds for the net, not for each matrix"),
    (SOFT, soft(tell=mean_of_shares), "The share is the mean over matrices"),
    (SOFT, soft(tell=before_the_floor), "The share is measured before the floor"),
    (SOFT, soft(tell=share_gone), "The share that is gone is returned"),
]


# ----------------------------------------------------------------------------- other right answers


def by_logit(scores, threshold, min_keep):
    return soft(lambda s, tau: s > math.log(tau / (1 - tau)))(scores, threshold, min_keep)


def heads_in_another_order(block, heads, neurons):
    """The last head first: the output is the same."""
    small = shrunk()(block, heads, neurons)
    d_head = len(small["query.bias"]) // int(heads.sum())
    order = torch.arange(len(small["query.bias"])).view(-1, d_head).flip(0).flatten()
    for name in ("query", "key", "value"):
        small[f"{name}.weight"], small[f"{name}.bias"] = small[f"{name}.weight"][order], small[f"{name}.bias"][order]
    small["output.weight"] = small["output.weight"][:, order]
    return small


def test_other_right_answers_pass():
    check(SCORE, score_by())
    check(SHARE, schedule())
    check(SOFT, soft())
    check(SOFT, soft(union="if too few"))
    check(SOFT, by_logit)
    check(SHRINK, shrunk())
    check(SHRINK, heads_in_another_order)


def test_a_matrix_of_the_wrong_shape_is_shown_by_its_name(capsys):
    with pytest.raises(HomeworkError):
        check(SHRINK, shrunk(leave=("contract.weight",)), seed=0)
    assert "'contract.weight'" in capsys.readouterr().out
