"""Exercise 3 of notebook 02: TinyBERT's losses on embeddings and hidden states, with a narrower student.

TinyBERT (Jiao et al. 2019, arXiv 1909.10351, sec. 3): W_e projects the student's embeddings, one W_h the hidden states
of all its layers. NOTE the released code has one projection, with a bias, for both.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def hidden_loss(
    student_hidden: Sequence[Float[Tensor, "batch length d_student"]],
    teacher_hidden: Sequence[Float[Tensor, "batch length d_teacher"]],
    mapping: Sequence[int],
    w_e: Float[Tensor, "d_student d_teacher"],
    w_h: Float[Tensor, "d_student d_teacher"],
) -> Float[Tensor, ""]:
    """MSE(E_S W_e, E_T) + sum over m of MSE(H_S,m W_h, H_T,g(m)); the teacher gets no gradient.

    hidden[0] is the embeddings, hidden[m] the output of layer m. g(1), g(2), ... are the entries of `mapping`.
    """
    loss = F.mse_loss(student_hidden[0] @ w_e, teacher_hidden[0].detach())
    for student, layer in zip(student_hidden[1:], mapping, strict=True):
        loss = loss + F.mse_loss(student @ w_h, teacher_hidden[layer].detach())
    return loss


def _exchange(
    matrices: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda w_e, w_h: (w_e, w_h),
    student_layer: Callable[[int], int] = lambda m: m,
    teacher_layer: Callable[[int, int], int] = lambda m, g: g,
    compare: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda mine, theirs, w: F.mse_loss(mine @ w, theirs),
    add_up: Callable[[Tensor, Tensor], Tensor] = lambda embeddings, layers: embeddings + layers.sum(),
) -> Answer:
    """The answer with one choice exchanged; it keeps the teacher as it is given.

    Args:
        matrices: what projects the embeddings, and what the layers.
        student_layer, teacher_layer: number of the hidden state for pair m (from 1), of (m) and of (m, g(m)).
        add_up: the loss, of the embeddings' and of those of the layers (layers,).
    """

    def answer(student_hidden: Sequence, teacher_hidden: Sequence, mapping: Sequence[int], w_e: Tensor, w_h: Tensor):
        of_embeddings, of_layers = matrices(w_e, w_h)
        embeddings = compare(student_hidden[0], teacher_hidden[0], of_embeddings)
        layers = [
            compare(student_hidden[student_layer(m)], teacher_hidden[teacher_layer(m, g)], of_layers)
            for m, g in enumerate(mapping, start=1)
        ]
        return add_up(embeddings, torch.stack(layers))

    return answer


def _teacher_detached(answer: Answer) -> Answer:
    def detached(student_hidden: Sequence, teacher_hidden: Sequence, *others):
        return answer(student_hidden, [hidden.detach() for hidden in teacher_hidden], *others)

    return detached


def _with_and_without_gradient(name: str, explanation: str, answer: Answer) -> tuple[Mistake, Mistake]:
    """The mistake, and the mistake with a teacher that learns: many will leave `detach` for later."""
    both = f"{explanation} And the teacher gets a gradient: compare with `teacher_hidden[...].detach()`."
    return (
        Mistake(name, explanation, _teacher_detached(answer)),
        Mistake(f"{name}, and the teacher learns", both, answer),
    )


def _who_learns(fn: Answer, *inputs: object) -> dict[str, bool]:
    """Which inputs get a gradient that is not zero."""
    student_hidden, teacher_hidden, mapping, w_e, w_h = inputs
    groups = {"student": student_hidden, "W_e": [w_e], "W_h": [w_h], "teacher": teacher_hidden}
    groups = {name: [x.clone().requires_grad_() for x in tensors] for name, tensors in groups.items()}
    loss = fn(groups["student"], groups["teacher"], mapping, *groups["W_e"], *groups["W_h"])
    if not loss.requires_grad:
        return dict.fromkeys(groups, False)
    gradients = {name: torch.autograd.grad(loss, x, retain_graph=True, allow_unused=True) for name, x in groups.items()}
    return {name: any(g is not None and bool(g.any()) for g in found) for name, found in gradients.items()}


def _draw(layers: str, equal_widths: bool = False, dtype: torch.dtype = torch.float32) -> Callable[[Generator], tuple]:
    """Random hidden states; student layers "one" or "some". The last is matched with the teacher's last."""

    def draw(generator: Generator) -> tuple:
        batch, length, d_student = (whole_number(*bounds, generator) for bounds in ((1, 2), (2, 4), (2, 4)))
        d_teacher = d_student if equal_widths else d_student + whole_number(1, 3, generator)
        count = 1 if layers == "one" else whole_number(2, 3, generator)
        total = count + whole_number(1, 3, generator)
        lower = 1 + torch.randperm(total - 1, generator=generator)[: count - 1]
        mapping = (*sorted(lower.tolist()), total)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        student = [normal(batch, length, d_student) for _ in range(count + 1)]
        teacher = [normal(batch, length, d_teacher) for _ in range(total + 1)]
        return student, teacher, mapping, normal(d_student, d_teacher), normal(d_student, d_teacher)

    return draw


HIDDEN_LOSS = Exercise(
    id="pretraining.hidden_loss",
    title="TinyBERT's loss on hidden states",
    minutes=20,
    difficulty=2,
    reference=hidden_loss,
    properties=(
        Property("one student layer, matched to the teacher's last", _draw("one"), times=1),
        Property("some layers of a deeper teacher", _draw("some"), times=1),
        Property("a student as wide as its teacher is projected, too", _draw("some", equal_widths=True), times=1),
        Property("float64 stays float64", _draw("some", dtype=torch.float64), times=1),
        Property(
            "the student and both matrices get a gradient, the teacher gets none",
            _draw("some", equal_widths=True),
            observe=_who_learns,
            times=1,
        ),
    ),
    mistakes=(
        Mistake(
            "The teacher gets a gradient",
            "The values are right. But the loss could also be lowered by moving the teacher: compare with "
            "`teacher_hidden[...].detach()`.",
            _exchange(),
        ),
        Mistake(
            "Nobody gets a gradient",
            "The student must learn, and so must the two matrices: detach the teacher's tensors only.",
            lambda *inputs: hidden_loss(*inputs).detach(),
        ),
        *_with_and_without_gradient(
            "W_e is used for the layers, too",
            "Embeddings and hidden states are different spaces, and the paper gives each a matrix: W_e for the "
            "embeddings, one W_h for all layers.",
            _exchange(lambda w_e, w_h: (w_e, w_e)),
        ),
        *_with_and_without_gradient(
            "W_h is used for the embeddings, too",
            "The embeddings have a matrix of their own, W_e. (One for both is what the released code has; asked is the "
            "paper's.)",
            _exchange(lambda w_e, w_h: (w_h, w_h)),
        ),
        *_with_and_without_gradient(
            "The two matrices are exchanged",
            "W_e belongs to the embeddings, hidden[0], and W_h to the layers.",
            _exchange(lambda w_e, w_h: (w_h, w_e)),
        ),
        *_with_and_without_gradient(
            "The teacher is projected",
            "You bring the teacher down to the student's width. A matrix that maps everything to 0 would then make "
            "teacher and a lazy student equal. The student is projected up: H_S W against H_T.",
            _exchange(compare=lambda mine, theirs, w: F.mse_loss(mine, theirs @ w.T)),
        ),
        *_with_and_without_gradient(
            "The projection is transposed",
            "W is (d_student, d_teacher), and H_S W is `hidden @ w`. F.linear(hidden, w) computes hidden @ w.T, which "
            "fits only where the widths agree, and is wrong there.",
            _exchange(compare=lambda mine, theirs, w: F.mse_loss(F.linear(mine, w), theirs)),
        ),
        *_with_and_without_gradient(
            "The teacher's layer is off by one",
            "hidden[0] is the embeddings, so the output of layer g is hidden[g], not hidden[g - 1].",
            _exchange(teacher_layer=lambda m, g: g - 1),
        ),
        *_with_and_without_gradient(
            "The student's layer is off by one",
            "You match the student's embeddings with the teacher's layer g(1), its layer 1 with g(2), and so on; its "
            "last layer learns nothing. Skip student_hidden[0] when you go through the mapping.",
            _exchange(student_layer=lambda m: m - 1),
        ),
        *_with_and_without_gradient(
            "Both layers are off by one",
            "hidden[0] is the embeddings on both sides: layer m of the student is student_hidden[m], layer g of the "
            "teacher is teacher_hidden[g].",
            _exchange(student_layer=lambda m: m - 1, teacher_layer=lambda m, g: g - 1),
        ),
        *_with_and_without_gradient(
            "The mapping is not used",
            "You match layer m with layer m, so the student learns the lower part of its teacher only.",
            _exchange(teacher_layer=lambda m, g: m),
        ),
        *_with_and_without_gradient(
            "The embeddings are left out",
            "Their loss MSE(E_S W_e, E_T) belongs to the sum.",
            _exchange(add_up=lambda embeddings, layers: layers.sum()),
        ),
        *_with_and_without_gradient(
            "A mean over the losses",
            "The losses of embeddings and layers are added, each with weight 1.",
            _exchange(add_up=lambda embeddings, layers: (embeddings + layers.sum()) / (len(layers) + 1)),
        ),
        *_with_and_without_gradient(
            "A mean over the layers",
            "The losses of the layers are added, each with weight 1.",
            _exchange(add_up=lambda embeddings, layers: embeddings + layers.mean()),
        ),
        *_with_and_without_gradient(
            "Squared errors are summed, not averaged",
            "MSE is a mean over batch, length and width.",
            _exchange(compare=lambda mine, theirs, w: F.mse_loss(mine @ w, theirs, reduction="sum")),
        ),
    ),
    hints=(
        "Write the loss of the embeddings alone, and look at the shapes: (batch, length, d_student) times "
        "(d_student, d_teacher). Then one more term for each layer of the student.",
        "`zip(student_hidden[1:], mapping)` walks through the pairs: a hidden state of the student, and the number of "
        "the teacher's layer for it. hidden[0] is the embeddings, so layer number g is teacher_hidden[g]. Only the "
        "teacher's side is detached.",
        "A neighbour: pupils guess three sizes, each in inches, and the right answers are in cm. A cover page stands "
        "first in both lists; page 2 of the pupils belongs to page 3 of the answers.\n"
        "  pupil  = ['cover', 2.0, 4.0]\n"
        "  answer = ['cover', 5.0, 7.0, 10.0]\n"
        "  pages  = (1, 3)\n"
        "  sum((2.54 * mine - answer[page]) ** 2 for mine, page in zip(pupil[1:], pages))\n"
        "  -> (5.08 - 5.0)² + (10.16 - 10.0)² = 0.032\n"
        "The pupils' side is converted, and page numbers fit because the cover is page 0.",
    ),
)
