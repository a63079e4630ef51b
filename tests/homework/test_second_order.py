"""The exercises of notebook 05: references against torch, linear algebra and brute force, wrong answers by name.

The wrong answers are written here anew, as a student would write them; none uses a `Mistake` of the exercise.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.utils import prune

from effnlp_lessons.homework import HomeworkError, check
from effnlp_lessons.homework.second_order.budget import prune_to_budget
from effnlp_lessons.homework.second_order.curvature import obd_saliency
from effnlp_lessons.homework.second_order.inverse import Net, inverse_hessian
from effnlp_lessons.homework.second_order.magnitude import keep_top
from effnlp_lessons.homework.second_order.surgeon import surgeon_step


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------- references


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.37, 1.0])
def test_keep_top_twice_is_torchs_unstructured_pruning(rate):
    layer = torch.nn.Linear(7, 5)
    layer.weight.data = normal(5, 7).float()
    mask = torch.ones(5, 7, dtype=torch.bool)
    for _ in range(2):
        mask = keep_top(layer.weight.detach().abs(), rate, mask)
        prune.l1_unstructured(layer, "weight", rate)
        assert torch.equal(mask, layer.weight_mask.bool())


def test_keep_top_with_equal_scores_removes_the_first_and_the_exact_number():
    scores = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    assert keep_top(scores, 0.4, mask).tolist() == [[True, False, False], [True, False, True]]
    assert keep_top(torch.zeros(10, 10), 0.37, torch.ones(10, 10, dtype=torch.bool)).sum() == 63


def the_error(w1, w2, x, d):
    return ((d - torch.tanh(torch.tanh(x @ w1.T) @ w2.T)) ** 2).sum(1).mean()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 4, 2, 5), (2, 1, 3, 6), (4, 5, 1, 3)])
def test_obd_saliency_is_the_diagonal_of_autograds_hessian(sizes):
    inputs, hidden, outputs, patterns = sizes
    weights = normal(hidden, inputs), normal(outputs, hidden, seed=1)
    x, d = normal(patterns, inputs, seed=2), normal(patterns, outputs, seed=3)
    blocks = torch.autograd.functional.hessian(lambda w1, w2: the_error(w1, w2, x, d), weights)
    for number, saliency in enumerate(obd_saliency(*weights, x, d)):
        w = weights[number]
        exact = blocks[number][number].reshape(w.numel(), w.numel()).diagonal().view_as(w) * w**2 / 2
        torch.testing.assert_close(saliency, exact, rtol=1e-12, atol=1e-12)


def test_obd_saliency_of_the_notebooks_example():
    one = [torch.tensor([[number]], dtype=torch.float64) for number in (0.5, 1.0, 1.0, 1.0)]
    first, second = obd_saliency(*one)
    assert first.item() == pytest.approx(0.2481, abs=5e-5) and second.item() == pytest.approx(0.2266, abs=5e-5)


@pytest.mark.parametrize(("patterns", "outputs"), [(1, 1), (4, 1), (5, 3), (20, 2)])
def test_inverse_hessian_is_numpys_inverse_of_the_sum(patterns, outputs):
    net = Net(normal(patterns, 3), 2, outputs)
    w, alpha = normal(net.weights, seed=1), 0.01
    h = alpha * np.eye(net.weights)
    for pattern in range(patterns):
        for output in range(outputs):
            v = w.clone().requires_grad_()
            net(v)[pattern, output].backward()
            h += np.outer(v.grad, v.grad) / patterns
    ours = inverse_hessian(net, w, normal(patterns, outputs), alpha)
    np.testing.assert_allclose(ours.numpy(), np.linalg.inv(h), rtol=1e-9, atol=1e-9)


def curved(size, seed=0):
    factor = normal(size, size + 1, seed=seed)
    return factor @ factor.T / size + 0.05 * torch.eye(size, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
def test_surgeon_step_is_the_best_constrained_least_squares_solution(seed):
    """For each weight that could go, solve for the others with numpy, and compare the errors."""
    w, hessian = normal(6, seed=seed), curved(6, seed + 10)
    kept = torch.tensor([True, True, False, True, True, True])
    w = w * kept
    best = (math.inf, None, None)
    for q in kept.nonzero()[:, 0].tolist():
        free = [i for i in range(6) if kept[i] and i != q]
        move = np.zeros(6)
        move[q] = -w[q]
        h = hessian.numpy()
        move[free] = np.linalg.solve(h[np.ix_(free, free)], -h[np.ix_(free, [q])][:, 0] * move[q])
        best = min(best, (move @ h @ move / 2, q, move), key=lambda one: one[0])
    q, new, increase = surgeon_step(w, hessian, kept)
    assert q == best[1] and increase == pytest.approx(best[0], rel=1e-10)
    np.testing.assert_allclose(new.numpy(), w.numpy() + best[2], rtol=1e-10, atol=1e-12)
    assert new[q] == 0 and new[2] == 0


def test_surgeon_step_of_the_notebooks_example():
    w = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    q, new, increase = surgeon_step(w, hessian, torch.ones(3, dtype=torch.bool))
    assert q == 0 and increase == pytest.approx(0.5) and new.tolist() == pytest.approx([0.0, 3.0, -1.0])


def file_size(mask):
    rows, columns = mask.shape
    kept = int(mask.sum())
    return min(4 * rows * columns, -(-rows * columns // 8) + 4 * kept, 6 * kept + 4 * (rows + 1))


@pytest.mark.parametrize("seed", range(4))
def test_prune_to_budget_step_by_step(seed):
    """Weight after weight, with the file's size taken anew each time."""
    weights = {"a": 0.2 * normal(2, 90, seed=seed), "b": normal(3, 8, seed=seed + 9)}
    for budget, floor in product((40, 90, 180, 400, 900), (0.0, 0.1)):
        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        while sum(map(file_size, masks.values())) > budget:
            rest = [
                (weights[name][i, j].abs().item(), name, i, j)
                for name, mask in masks.items()
                for i, j in mask.nonzero().tolist()
                if mask.sum() > math.ceil(floor * mask.numel())
            ]
            if not rest:
                break
            _, name, i, j = min(rest)
            masks[name][i, j] = False
        ours, forms = prune_to_budget(weights, budget, floor)
        for name in weights:
            assert torch.equal(ours[name], masks[name]), (budget, floor)
            rows, columns, kept = *masks[name].shape, int(masks[name].sum())
            sizes = {"dense": 4 * rows * columns, "bitmask": -(-rows * columns // 8) + 4 * kept}
            sizes["csr"] = 6 * kept + 4 * (rows + 1)
            assert sizes[forms[name]] == file_size(masks[name])


def test_prune_to_budget_of_the_notebook():
    weights = {"a": torch.tensor([[0.1, -0.9, 0.2, 0.4]]), "b": torch.tensor([[2.0, -0.3], [0.8, 1.0]])}
    masks, forms = prune_to_budget(weights, 18, 0.5)
    assert masks["a"].tolist() == [[False, True, False, True]]
    assert masks["b"].tolist() == [[True, False], [False, True]] and set(forms.values()) == {"bitmask"}


# ----------------------------------------------------------------------------- wrong answers


def kept_places(mask):
    return [tuple(place) for place in mask.nonzero().tolist()]


def remove_in_order(count, key=lambda value, place: (value, place), candidates=kept_places):
    """In plain Python: sort the candidates' places, remove the first `count(rate, mask)`."""

    def answer(scores, rate, mask):
        places = sorted(candidates(mask), key=lambda place: key(scores[place].item(), place))
        new = mask.clone()
        for place in places[: count(rate, mask)]:
            new[place] = False
        return new

    return answer


def asked(rate, mask):
    return round(rate * int(mask.sum()))


def larger_than_threshold(scores, rate, mask):
    count = asked(rate, mask)
    if count == 0:
        return mask.clone()
    threshold = torch.kthvalue(scores[mask], count).values
    return (scores > threshold) & mask


def at_least_threshold(scores, rate, mask):
    count = asked(rate, mask)
    if count == 0:
        return mask.clone()
    threshold = torch.kthvalue(scores[mask], count).values
    return (scores >= threshold) & mask


def zeros_are_candidates(scores, rate, mask):
    new = mask.clone().flatten()
    lowest = scores.flatten().argsort(stable=True)[: asked(rate, mask)]
    new[lowest] = False
    return new.view_as(mask)


def without_the_old_mask(scores, rate, mask):
    new = torch.ones_like(mask).flatten()
    new[scores.flatten().argsort(stable=True)[: round(rate * mask.numel())]] = False
    return new.view_as(mask)


def by_quantile(scores, rate, mask):
    return mask & (scores > scores[mask].quantile(rate))


def right_masks(scores, rate, mask):
    return remove_in_order(asked)(scores, rate, mask)


def each_row(scores, rate, mask):
    rows = [right_masks(scores[i][None], rate, mask[i][None]) for i in range(len(scores))]
    return torch.cat(rows)


def obd_by(
    hidden_sign=1,
    output_sign=-1,
    bends=(1, 1),
    power=lambda w: w**2,
    entering=lambda x, a: (x, torch.tanh(a)),
    exponent=2,
    gather=lambda h: h.mean(0),
    finish=lambda h, w: 0.5 * h * w**2,
    slope_power=2,
    factor=2,
):
    """Loops over patterns; the formulas of the paper with one slip each."""

    def answer(w1, w2, x, d):
        h1, h2 = [], []
        for xp, dp in zip(x, d, strict=True):
            a = w1 @ xp
            y = torch.tanh(a)
            o = torch.tanh(w2 @ y)
            f1, f1o = 1 - y**2, 1 - o**2
            f2, f2o = -2 * y * (1 - y**2), -2 * o * (1 - o**2)
            second_o = factor * f1o**2 + output_sign * bends[1] * factor * (dp - o) * f2o
            back = w2.T @ (-factor * (dp - o) * f1o)
            second = f1**slope_power * (power(w2).T @ second_o) + hidden_sign * bends[0] * f2 * back
            first_in, second_in = entering(xp, a)
            h1.append(torch.outer(second, first_in**exponent))
            h2.append(torch.outer(second_o, second_in**exponent))
        return finish(gather(torch.stack(h1)), w1), finish(gather(torch.stack(h2)), w2)

    return answer


def fisher(square_each):
    def answer(w1, w2, x, d):
        v1, v2 = w1.clone().requires_grad_(), w2.clone().requires_grad_()
        grads = [torch.autograd.grad(the_error(v1, v2, x[p : p + 1], d[p : p + 1]), (v1, v2)) for p in range(len(x))]
        both = []
        for which, w in enumerate((w1, w2)):
            stack = torch.stack([g[which] for g in grads])
            h = (stack**2).mean(0) if square_each else stack.mean(0) ** 2
            both.append(h * w**2 / 2)
        return tuple(both)

    return answer


def gradients_of(net, w, rows):
    """The gradient of each number of rows(net(w)), one backward pass for each."""
    found = []
    for number in range(rows(net(w)).numel()):
        v = w.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(rows(net(v)).flatten()[number], v)
        found.append(gradient)
    return torch.stack(found)


def inverse_by(rows=lambda out, targets: out, p=lambda targets: targets.shape[0], finish=torch.linalg.inv):
    """Not by recursion: H written out, and inverted."""

    def answer(net, w, targets, alpha):
        x = gradients_of(net, w, lambda out: rows(out, targets))
        return finish(alpha * torch.eye(len(w), dtype=w.dtype) + x.T @ x / p(targets))

    return answer


def recursion_by(start=lambda alpha: 1 / alpha, step=lambda inverse, old, x, p: inverse):
    def answer(net, w, targets, alpha):
        inverse = start(alpha) * torch.eye(len(w), dtype=w.dtype)
        old = inverse.clone()
        for x in gradients_of(net, w, lambda out: out):
            inverse = step(inverse, old, x[:, None], len(targets))
        return inverse

    return answer


def minus_update(inverse, old, x, p):
    return inverse - (inverse @ x @ x.T @ inverse) / (p + x.T @ inverse @ x)


def plus_update(inverse, old, x, p):
    return inverse + (inverse @ x @ x.T @ inverse) / (p + x.T @ inverse @ x)


def update_from_the_first(inverse, old, x, p):
    return inverse - (old @ x @ x.T @ old) / (p + x.T @ old @ x)


def one_in_the_denominator(inverse, old, x, p):
    return inverse - (inverse @ x @ x.T @ inverse) / (1 + x.T @ inverse @ x)


def surgery(
    cost=lambda w, h, inverse: w**2 / inverse.diagonal() / 2,
    pick=torch.argmin,
    move=lambda w, h, inverse, q: -(w[q] / inverse[q, q]) * inverse[:, q],
    number=lambda left, q: left[q],
    zero=True,
    told=lambda cost: cost,
):
    """The problem of the kept weights alone, with numbers of their own."""

    def answer(w, hessian, kept):
        left = [i for i in range(len(w)) if kept[i]]
        h = hessian[left][:, left]
        inverse, some = torch.linalg.inv(h), w[left]
        costs = cost(some, h, inverse)
        q = int(pick(costs))
        some = some + move(some, h, inverse, q)
        if zero:
            some[q] = 0
        new = torch.zeros_like(w)
        new[left] = some
        return number(left, q), new, told(costs[q].item())

    return answer


def surgery_with_the_whole_inverse(hold, choose_any=False):
    def answer(w, hessian, kept):
        inverse = torch.linalg.inv(hessian)
        costs = w**2 / inverse.diagonal() / 2
        if not choose_any:
            costs[~kept] = math.inf
        q = costs.argmin().item()
        new = w - w[q] / inverse[q, q] * inverse[:, q]
        if hold:
            new[~kept] = 0
        new[q] = 0
        return q, new, costs[q].item()

    return answer


def smallest_weight(w, hessian, kept):
    sizes = w.abs()
    sizes[~kept] = math.inf
    q = int(sizes.argmin())
    return surgery(pick=lambda costs: torch.tensor(int(kept[:q].sum())))(w, hessian, kept)


DENSE, BITMASK, CSR = "dense", "bitmask", "csr"


def sizes_of(shape, kept, without=(), bits=8, cut=False, pointers=1, column=2, mask_is_free=False):
    rows, columns = shape
    count = rows * columns
    mask_bytes = 0 if mask_is_free else (count * bits // 8 // 8 if cut else math.ceil(count * bits / 8 / 8))
    sizes = {
        DENSE: 4 * count,
        BITMASK: mask_bytes + 4 * kept,
        CSR: (4 + column) * kept + 4 * (rows + pointers),
    }
    return {form: size for form, size in sizes.items() if form not in without}


def fitted(
    key=abs, keep=lambda floor, n: math.ceil(floor * n), strict=False, one_form=False, local=False, extra=0, **slips
):
    """One weight after another, with running counts."""

    def answer(weights, budget, floor):
        names = list(weights)
        masks = {name: torch.ones_like(weights[name], dtype=torch.bool) for name in names}
        kept = {name: weights[name].numel() for name in names}
        tables = {
            name: [sizes_of(weights[name].shape, count, **slips) for count in range(kept[name] + 1)] for name in names
        }

        def forms():
            if one_form:
                common = tables[names[0]][0].keys()
                best = min(common, key=lambda form: sum(tables[name][kept[name]][form] for name in names))
                return dict.fromkeys(names, best)
            return {name: min(tables[name][kept[name]], key=tables[name][kept[name]].get) for name in names}

        def size():
            return sum(tables[name][kept[name]][form] for name, form in forms().items())

        def done():
            return size() < budget if strict else size() <= budget

        queue = []
        for position, name in enumerate(names):
            values = [key(value) for value in weights[name].flatten().tolist()]
            order = sorted(range(len(values)), key=lambda place, values=values: (values[place], place))
            for rank, place in enumerate(order[: len(order) - keep(floor, len(order))]):
                queue.append((rank / len(order) if local else values[place], position, place))
        over = extra
        for _, position, place in sorted(queue):
            if done():
                if not over:
                    break
                over -= 1
            masks[names[position]].view(-1)[place] = False
            kept[names[position]] -= 1
        return masks, forms()

    return answer


KEEP, OBD, INVERSE, OBS, BUDGET = (
    f"second_order.{name}"
    for name in ("keep_top", "obd_saliency", "inverse_hessian", "surgeon_step", "prune_to_budget")
)

WRONG_ANSWERS = [
    (KEEP, larger_than_threshold, "All equal scores at the threshold go"),
    (KEEP, at_least_threshold, "All equal scores at the threshold stay"),
    (
        KEEP,
        remove_in_order(asked, key=lambda value, place: (value, -place[0], -place[1])),
        "Of equal scores the last go",
    ),
    (KEEP, zeros_are_candidates, "Pruned weights are candidates"),
    (KEEP, without_the_old_mask, "Pruned weights come back"),
    (
        KEEP,
        remove_in_order(lambda rate, mask: round(rate * mask.numel())),
        "The rate is taken of all weights, not of those still there",
    ),
    (
        KEEP,
        remove_in_order(lambda rate, mask: max(0, round(rate * mask.numel()) - int((~mask).sum()))),
        "The rate is taken for the share of all that is gone in the end",
    ),
    (
        KEEP,
        remove_in_order(lambda rate, mask: int(mask.sum()) - asked(rate, mask)),
        "The rate is taken for what stays",
    ),
    (KEEP, remove_in_order(asked, key=lambda value, place: (-value, place)), "The largest go"),
    (KEEP, remove_in_order(lambda rate, mask: int(rate * mask.sum())), "The number is rounded down"),
    (KEEP, remove_in_order(lambda rate, mask: math.ceil(rate * mask.sum().item())), "The number is rounded up"),
    (KEEP, remove_in_order(lambda rate, mask: asked(rate, mask) + 1), "One more goes"),
    (KEEP, by_quantile, "The threshold is a quantile"),
    (KEEP, each_row, "Each row loses its share"),
    (KEEP, lambda *inputs: ~right_masks(*inputs), "The mask is turned round"),
    (OBD, obd_by(hidden_sign=-1), "The minus sign of the printed formula"),
    (OBD, obd_by(bends=(0, 1)), "The f'' term of the hidden units is left out"),
    (OBD, obd_by(bends=(0, 0)), "Both f'' terms are left out"),
    (OBD, obd_by(output_sign=1), "The outputs have the wrong sign"),
    (OBD, obd_by(hidden_sign=-1, output_sign=1), "Both signs are wrong"),
    (OBD, fisher(True), "The gradient is squared"),
    (OBD, fisher(False), "The mean gradient is squared"),
    (OBD, obd_by(finish=lambda h, w: h * w * w), "The factor 1/2 is forgotten"),
    (OBD, obd_by(finish=lambda h, w: h), "The weight is left out"),
    (OBD, obd_by(finish=lambda h, w: h * w.abs() / 2), "The weight is not squared"),
    (OBD, obd_by(entering=lambda x, a: (x, a)), "What enters the layer is taken before the activation"),
    (OBD, obd_by(exponent=1), "What enters the layer is not squared"),
    (OBD, obd_by(power=lambda w: w), "The weights above are not squared"),
    (OBD, obd_by(slope_power=1), "f' is not squared at the hidden units"),
    (OBD, obd_by(gather=lambda h: h.sum(0)), "The patterns are added"),
    (OBD, obd_by(factor=1), "The error has a factor 1/2"),
    (INVERSE, recursion_by(step=one_in_the_denominator), "The denominator holds 1 instead of P"),
    (
        INVERSE,
        inverse_by(p=lambda targets: len(targets) ** 2),
        "The gradients are divided by P, and not by its root",
    ),
    (INVERSE, inverse_by(p=lambda targets: targets.numel()), "P counts the outputs, too"),
    (
        INVERSE,
        inverse_by(lambda out, targets: ((out - targets) ** 2).sum(1) / 2),
        "The gradient of the error",
    ),
    (
        INVERSE,
        inverse_by(lambda out, targets: ((out - targets) ** 2).sum(1)),
        "The gradient of the squared error, without 1/2",
    ),
    (INVERSE, inverse_by(lambda out, targets: out.sum(1)), "The gradients of a pattern's outputs are added up"),
    (INVERSE, inverse_by(lambda out, targets: out[:, 0]), "Only the first output is used"),
    (INVERSE, recursion_by(step=update_from_the_first), "Every term begins from the first inverse"),
    (INVERSE, recursion_by(start=lambda alpha: alpha, step=minus_update), "The start is alpha I"),
    (INVERSE, recursion_by(step=plus_update), "The term is added"),
    (INVERSE, inverse_by(finish=lambda h: h), "H is returned, not its inverse"),
    (INVERSE, inverse_by(finish=lambda h: torch.diag(h.diag() ** -1)), "Only the diagonal of H is inverted"),
    (OBS, surgery(move=lambda w, h, inverse, q: 0 * w), "The other weights are not updated"),
    (
        OBS,
        surgery(move=lambda w, h, inverse, q: w[q] / inverse[q, q] * inverse[:, q]),
        "The update has the wrong sign",
    ),
    (
        OBS,
        surgery(move=lambda w, h, inverse, q: w[q] / inverse[q, q] * inverse[:, q], zero=False),
        "The update has the wrong sign, and w_q doubles",
    ),
    (OBS, surgery(zero=False), "w_q is not exactly 0"),
    (OBS, surgery_with_the_whole_inverse(hold=False), "Pruned weights drift away from 0"),
    (
        OBS,
        surgery_with_the_whole_inverse(hold=True),
        "The pruned weights are held, but still in the inverse",
    ),
    (OBS, surgery_with_the_whole_inverse(hold=True, choose_any=True), "A pruned weight is chosen again"),
    (OBS, surgery_with_the_whole_inverse(hold=False, choose_any=True), "A pruned weight is chosen again"),
    (OBS, surgery(cost=lambda w, h, inverse: h.diagonal() * w**2 / 2), "The weight is chosen by H_qq"),
    (
        OBS,
        surgery(cost=lambda w, h, inverse: inverse.diagonal() * w**2 / 2),
        "The inverse multiplies instead of dividing",
    ),
    (OBS, smallest_weight, "The smallest weight goes"),
    (OBS, surgery(pick=torch.argmax), "The most expensive weight goes"),
    (
        OBS,
        surgery(move=lambda w, h, inverse, q: -(w[q] / h[q, q]) * h[:, q]),
        "The others move by H, not by its inverse",
    ),
    (OBS, surgery(number=lambda left, q: q), "q is counted among the weights that are left"),
    (OBS, surgery(told=lambda cost: 2 * cost), "The factor 1/2 is missing in the increase"),
    (BUDGET, fitted(without=(DENSE, BITMASK)), "CSR for all matrices"),
    (BUDGET, fitted(without=(DENSE, CSR)), "A bitmask for all matrices"),
    (BUDGET, fitted(without=(DENSE,)), "Dense is not considered"),
    (BUDGET, fitted(without=(BITMASK,)), "Bitmasks are not considered"),
    (BUDGET, fitted(without=(CSR,)), "CSR is not considered"),
    (BUDGET, fitted(one_form=True), "One form for all matrices"),
    (BUDGET, fitted(mask_is_free=True), "The mask is stored for nothing"),
    (BUDGET, fitted(bits=64), "A byte for each weight of the mask"),
    (BUDGET, fitted(cut=True), "The last byte of the mask is cut off"),
    (BUDGET, fitted(pointers=0), "CSR has one row pointer too few"),
    (BUDGET, fitted(column=4), "The columns of CSR take four bytes"),
    (BUDGET, fitted(keep=lambda floor, n: 0), "The floor is forgotten"),
    (BUDGET, fitted(keep=lambda floor, n: int(floor * n)), "The floor is rounded down"),
    (BUDGET, fitted(local=True), "Each matrix loses the same share"),
    (BUDGET, fitted(key=lambda value: value), "The weights are sorted with their signs"),
    (BUDGET, fitted(strict=True), "The budget must not be reached"),
    (BUDGET, fitted(extra=1), "One weight too many goes"),
]


# ----------------------------------------------------------------------------- other right answers


def saliency_by_autograd(w1, w2, x, d):
    blocks = torch.autograd.functional.hessian(lambda a, b: the_error(a, b, x, d), (w1, w2))
    return tuple(blocks[n][n].reshape(w.numel(), -1).diagonal().view_as(w) * w**2 / 2 for n, w in enumerate((w1, w2)))


def test_other_right_answers_pass():
    check(KEEP, right_masks)
    check(OBD, obd_by())
    check(OBD, saliency_by_autograd)
    check(INVERSE, recursion_by(step=minus_update))
    check(INVERSE, inverse_by())
    check(OBS, surgery())
    check(BUDGET, fitted())


def test_the_librarys_own_functions_pass():
    from effnlp_lessons.pruning.masks import keep_top as of_library

    check(KEEP, of_library)


def test_the_notebooks_starter_has_the_printed_sign(capsys):
    with pytest.raises(HomeworkError):
        check(OBD, obd_by(hidden_sign=-1), explain=True, seed=0)
    printed = capsys.readouterr().out
    assert "FAILS  by hand: one unit after another, one pattern" in printed
    assert "likely cause  The minus sign of the printed formula" in printed
