"""Exercises 5 and 6 of notebook 10: the queues of the Compressive Transformer, and its loss.

Rae et al. 2019, arXiv 1911.05507, sec. 3.1 and algorithm 2.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def update_memories(
    memory: Float[Tensor, "slots d"],
    compressed: Float[Tensor, "compressed_slots d"],
    segment: Float[Tensor, "length d"],
    rate: int,
) -> tuple[Float[Tensor, "slots d"], Float[Tensor, "compressed_slots d"]]:
    """Both queues after a segment, oldest first: what leaves the memory is averaged by `rate` and joins the other.

    `length` is a multiple of `rate` and at most `slots`.
    """
    old, memory = torch.cat([memory, segment]).split([len(segment), len(memory)])
    squeezed = old.view(-1, rate, old.shape[1]).mean(dim=1)
    return memory, torch.cat([compressed, squeezed])[len(squeezed) :]


def _draw_queues(generator: Generator) -> tuple:
    rate, width = whole_number(2, 3, generator), whole_number(2, 3, generator)
    length = rate * whole_number(2, 3, generator)
    slots, compressed = length + whole_number(1, 4, generator), length // rate + whole_number(1, 3, generator)
    memory, short, segment = (
        torch.randn(size, width, generator=generator, dtype=torch.float64) for size in (slots, compressed, length)
    )
    return memory, short, segment, rate


def _by_hand(generator: Generator) -> tuple:
    return torch.tensor([[5.0], [6.0], [7.0], [8.0]]), torch.tensor([[1.5], [3.5]]), torch.tensor([[9.0], [10.0]]), 2


def _queues(
    evict: Callable[[Tensor, Tensor], Tensor] = lambda memory, segment: memory[: len(segment)],
    squeeze: Callable[[Tensor, int], Tensor] = lambda old, rate: old.view(-1, rate, old.shape[1]).mean(dim=1),
    push: Callable[[Tensor, Tensor], Tensor] = lambda queue, new: torch.cat([queue, new])[len(new) :],
    push_memory: Callable[[Tensor, Tensor], Tensor] = lambda queue, new: torch.cat([queue, new])[len(new) :],
) -> Answer:
    def answer(memory: Tensor, compressed: Tensor, segment: Tensor, rate: int) -> tuple[Tensor, Tensor]:
        squeezed = squeeze(evict(memory, segment), rate)
        return push_memory(memory, segment), push(compressed, squeezed)

    return answer


UPDATE_MEMORIES = Exercise(
    id="recurrent.update_memories",
    title="find the bug: two queues",
    minutes=15,
    difficulty=2,
    reference=update_memories,
    properties=(
        Property("by hand: tokens as numbers, a slot as their mean", _by_hand, times=1),
        Property("any sizes", _draw_queues),
    ),
    mistakes=(
        Mistake(
            "The newest rows are squeezed",
            "What leaves the memory are its oldest rows, at the front.",
            _queues(evict=lambda memory, segment: memory[-len(segment) :]),
        ),
        Mistake(
            "The segment is squeezed",
            "The segment goes into the memory uncompressed. What falls out at the other end is squeezed.",
            _queues(evict=lambda memory, segment: segment),
        ),
        Mistake(
            "Every c-th row instead of the mean of c rows",
            "This keeps one row of each group and forgets the others. Take the mean of neighbours.",
            _queues(squeeze=lambda old, rate: old[::rate]),
        ),
        Mistake(
            "The groups are not neighbours",
            "view(rate, -1) takes rows far apart. Neighbours belong together: view(-1, rate, ...).",
            _queues(squeeze=lambda old, rate: old.view(rate, -1, old.shape[1]).mean(dim=0)),
        ),
        Mistake(
            "The compressed queue is pushed from the front",
            "Oldest first: new slots come at the end, and the first ones leave.",
            _queues(push=lambda queue, new: torch.cat([new, queue])[: len(queue)]),
        ),
        Mistake(
            "The compressed queue loses its newest slots",
            "A queue drops what is oldest, at the front.",
            _queues(push=lambda queue, new: torch.cat([queue[: len(queue) - len(new)], new])),
        ),
        Mistake(
            "The memory is pushed from the front",
            "Oldest first: the segment comes at the end.",
            _queues(push_memory=lambda queue, new: torch.cat([new, queue])[: len(queue)]),
        ),
    ),
    hints=(
        "Write tokens as numbers: memory 5 6 7 8, segment 9 10. What is the memory afterwards, and who has left?",
        "Join memory and segment; the first len(segment) rows leave. Group them by view(-1, rate, width), take the "
        "mean, and push the result into the other queue in the same way.",
        "A neighbour: a shelf for three newspapers, and a box with weekly digests.\n"
        "  shelf, new = [3, 4, 5], [6, 7]\n"
        "  (shelf + new)[:2]      [3, 4] leave, and go into the digest\n"
        "  (shelf + new)[2:]      [5, 6, 7] stay",
    ),
)


def compression_loss(
    h: Float[Tensor, "queries d"],
    old: Float[Tensor, "rows d"],
    kernel: Float[Tensor, " rate"],
    w_q: Float[Tensor, "d d"],
    w_k: Float[Tensor, "d d"],
    w_v: Float[Tensor, "d d"],
) -> Float[Tensor, ""]:
    """Mean square of attention over the old rows less attention over the compressed ones; only `kernel` learns.

    Compressed row m is the sum of kernel[r] * old[m * rate + r].
    """
    h, old, w_q, w_k, w_v = (x.detach() for x in (h, old, w_q, w_k, w_v))
    compressed = torch.einsum("r,mrd->md", kernel, old.view(-1, len(kernel), old.shape[1]))
    return (_attend(h, old, w_q, w_k, w_v) - _attend(h, compressed, w_q, w_k, w_v)).square().mean()


def _attend(h: Tensor, rows: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    return ((h @ w_q) @ (rows @ w_k).T / h.shape[-1] ** 0.5).softmax(dim=-1) @ (rows @ w_v)


def _loss(stopped: str = "h old w_q w_k w_v", target_stopped: str = "", kernel_stopped: bool = False) -> Answer:
    """The loss with gradients stopped at the named inputs only; the name after "target " stops the whole target."""

    def answer(h: Tensor, old: Tensor, kernel: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
        named = {"h": h, "old": old, "w_q": w_q, "w_k": w_k, "w_v": w_v}
        h, old, w_q, w_k, w_v = (x.detach() if name in stopped.split() else x for name, x in named.items())
        kernel = kernel.detach() if kernel_stopped else kernel
        compressed = torch.einsum("r,mrd->md", kernel, old.view(-1, len(kernel), old.shape[1]))
        target = _attend(h, old, w_q, w_k, w_v)
        target = target.detach() if target_stopped else target
        loss = (target - _attend(h, compressed, w_q, w_k, w_v)).square().mean()
        return loss + 0 * kernel.sum() if kernel_stopped else loss

    return answer


def _value_and_gradients(fn: Answer, *inputs: Tensor) -> dict[str, Tensor]:
    """The loss, and its gradient at every input; zeros where none arrives."""
    names = ("h", "old", "kernel", "w_q", "w_k", "w_v")
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    loss = fn(*inputs)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return {"loss": loss} | {
            f"gradient at {name}": torch.zeros_like(x) for name, x in zip(names, inputs, strict=True)
        }
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    gradients = {
        f"gradient at {name}": torch.zeros_like(x) if g is None else g
        for name, x, g in zip(names, inputs, found, strict=True)
    }
    return {"loss": loss.detach()} | gradients


def _draw_loss(generator: Generator) -> tuple:
    d, rate = whole_number(3, 4, generator), whole_number(2, 3, generator)
    h = torch.randn(whole_number(3, 5, generator), d, generator=generator, dtype=torch.float64)
    old = torch.randn(rate * whole_number(2, 3, generator), d, generator=generator, dtype=torch.float64)
    kernel = torch.rand(rate, generator=generator, dtype=torch.float64)
    return h, old, kernel, *torch.randn(3, d, d, generator=generator, dtype=torch.float64)


def _identity(generator: Generator) -> tuple:
    h, old, kernel, *weights = _draw_loss(generator)
    return h, old, torch.ones(1, dtype=torch.float64), *weights


COMPRESSION_LOSS = Exercise(
    id="recurrent.compression_loss",
    title="a loss for the compression alone",
    minutes=25,
    difficulty=3,
    reference=compression_loss,
    properties=(
        Property("rate 1 and kernel 1 change nothing: the loss is 0", _identity, times=1),
        Property("the value", _draw_loss, lambda fn, *inputs: fn(*inputs).detach()),
        Property("only the kernel gets a gradient", _draw_loss, _value_and_gradients),
    ),
    mistakes=(
        Mistake(
            "No gradient is stopped",
            "The model would bend its memory and projections to be easy to compress. Detach all but the kernel.",
            _loss(stopped=""),
        ),
        Mistake(
            "A gradient leaks into the memory",
            "The old rows belong to earlier segments. Detach them, on both sides of the difference.",
            _loss(stopped="h w_q w_k w_v"),
        ),
        Mistake(
            "A gradient leaks into the segment",
            "h asks the question here, and must not learn from it. Detach it.",
            _loss(stopped="old w_q w_k w_v"),
        ),
        Mistake(
            "A gradient leaks into the projections",
            "w_q, w_k and w_v are shared with the language model. Detach them in this loss.",
            _loss(stopped="h old"),
        ),
        Mistake(
            "Only the target is stopped",
            "Through attention over the compressed rows, h, old rows and projections still learn. Detach these.",
            _loss(stopped="", target_stopped="target"),
        ),
        Mistake(
            "The kernel does not learn",
            "Everything is detached, the kernel too. It is the only thing that should learn here.",
            _loss(kernel_stopped=True),
        ),
        Mistake(
            "Compares the rows, not the attention",
            "Each output of attention over old and compressed rows is compared, so what no query asks for may be lost.",
            lambda h, old, kernel, w_q, w_k, w_v: (
                (
                    (rows := old.detach().view(-1, len(kernel), old.shape[1]))
                    - torch.einsum("r,mrd->md", kernel, rows)[:, None]
                )
                .square()
                .mean()
            ),
        ),
    ),
    hints=(
        "Write attention over some rows as a small function. It is called twice: with the old rows and with the "
        "compressed ones. Who may learn?",
        "Detach h, old, w_q, w_k and w_v in the first line. Then nothing but the kernel can get a gradient.",
        "A neighbour: fit one number s so that s * x is near y, and let neither x nor y learn.\n"
        "  x, y, s = (torch.tensor(a, requires_grad=True) for a in (2.0, 3.0, 1.0))\n"
        "  ((s * x.detach() - y.detach()) ** 2).backward()\n"
        "  s.grad, x.grad, y.grad     -4, None, None",
    ),
)
