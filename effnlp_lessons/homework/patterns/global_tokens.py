"""Exercise 9 of notebook 08, "find the bug": a sliding window with global tokens.

Longformer (Beltagy et al. 2020, arXiv 2004.05150, sec. 3.1), with one set of projections.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def window_with_globals(
    q: Float[Tensor, "batch heads length d_head"],
    k: Float[Tensor, "batch heads length d_head"],
    v: Float[Tensor, "batch heads length d_head"],
    window: int,
    global_tokens: Bool[Tensor, " length"],
) -> Float[Tensor, "batch heads length d_head"]:
    """A query sees the tokens at most `window` away and all global tokens; a global query sees every token."""
    position = torch.arange(q.shape[2])
    near = (position[:, None] - position[None, :]).abs() <= window
    allowed = near | global_tokens[None, :] | global_tokens[:, None]
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -math.inf)
    return scores.softmax(dim=-1) @ v


def _near(length: int, window: int) -> Tensor:
    position = torch.arange(length)
    return (position[:, None] - position[None, :]).abs() <= window


def _mix(q: Tensor, k: Tensor, v: Tensor, times: Tensor) -> Tensor:
    """Attention in which query i counts key j times[i, j] times."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores + times.to(scores.dtype).log()).softmax(dim=-1) @ v


def _counted(times: Callable[[Tensor, Tensor], Tensor]) -> Answer:
    """The answer with another number of times that a key counts, of (near, global_tokens)."""
    return lambda q, k, v, window, global_tokens: _mix(q, k, v, times(_near(q.shape[2], window), global_tokens))


def _two_softmaxes(share: float) -> Answer:
    """Globals and window weighted in softmaxes of their own, then added with `share` each; global queries right."""

    def answer(q: Tensor, k: Tensor, v: Tensor, window: int, global_tokens: Tensor) -> Tensor:
        if not global_tokens.any():
            return _mix(q, k, v, _near(q.shape[2], window))
        in_window = _mix(q, k, v, _near(q.shape[2], window) & ~global_tokens)  # NaN in rows that are replaced below
        in_globals = _mix(q, k, v, global_tokens.expand(q.shape[2], -1))
        everything = _mix(q, k, v, torch.ones(q.shape[2], q.shape[2]))
        return torch.where(global_tokens[:, None], everything, share * (in_window + in_globals))

    return answer


def _zeroed_after_the_softmax(q: Tensor, k: Tensor, v: Tensor, window: int, global_tokens: Tensor) -> Tensor:
    near = _near(q.shape[2], window)
    both = near.long() + global_tokens.long()  # how often the starter counts a key
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    weights = (scores + both.to(scores.dtype).log()).softmax(dim=-1) / both.clamp(min=1)
    everything = _mix(q, k, v, torch.ones_like(scores))
    return torch.where(global_tokens[:, None], everything, weights @ v)


def _draw(globals_: str, dtype: torch.dtype = torch.float32) -> Callable[[Generator], tuple]:
    """Random inputs; global tokens "none", "first", "some" (in many windows), or "all"."""

    def draw(generator: Generator) -> tuple:
        batch, heads, d_head = (whole_number(*bounds, generator) for bounds in ((1, 2), (1, 3), (2, 5)))
        window, length = whole_number(1, 2, generator), whole_number(9, 12, generator)
        global_tokens = torch.zeros(length, dtype=torch.bool)
        if globals_ == "first":
            global_tokens[0] = True
        if globals_ == "some":
            global_tokens[torch.randperm(length, generator=generator)[: whole_number(2, 3, generator)]] = True
        if globals_ == "all":
            global_tokens[:] = True
        q, k, v = torch.randn(3, batch, heads, length, d_head, generator=generator, dtype=dtype)
        return q, k, v, window, global_tokens

    return draw


def _rows_and_columns(rows: Callable, columns: Callable) -> Answer:
    """What global queries see (`rows`) and what the others see (`columns`), each of (near, global_tokens)."""
    return _counted(
        lambda near, global_tokens: torch.where(
            global_tokens[:, None], rows(near, global_tokens), columns(near, global_tokens)
        )
    )


def _window_and_globals(near: Tensor, global_tokens: Tensor) -> Tensor:
    return near | global_tokens


def _everything(near: Tensor, global_tokens: Tensor) -> Tensor:
    return torch.ones_like(near)


WINDOW_WITH_GLOBALS = Exercise(
    id="patterns.window_with_globals",
    title="find the bug: a window with global tokens",
    minutes=20,
    difficulty=3,
    reference=window_with_globals,
    properties=(
        Property("no global token: the plain window", _draw("none")),
        Property("all tokens global: plain attention", _draw("all"), times=1),
        Property("the first token is global, as [CLS] is", _draw("first")),
        Property("some tokens are global", _draw("some")),
        Property("float64 stays float64", _draw("some", torch.float64), times=1),
    ),
    mistakes=(
        Mistake(
            "A global key inside the window counts twice",
            "It stands among the global columns and among the window's, so the softmax sees it two times. "
            "Take it out of one of the two.",
            _rows_and_columns(_everything, lambda near, global_tokens: near.long() + global_tokens.long()),
        ),
        Mistake(
            "The second copy is removed after the softmax",
            "By then it has taken its part: the weights that are left do not sum to 1. Hide it before the softmax.",
            _zeroed_after_the_softmax,
        ),
        Mistake(
            "Global keys are taken out altogether",
            "You hid the global keys in the window and in the global columns. One of the two must stay.",
            _rows_and_columns(_everything, lambda near, global_tokens: near & ~global_tokens),
        ),
        Mistake(
            "The others do not see the global tokens",
            "Only global queries see far. Every query sees all global tokens, however far away.",
            _rows_and_columns(_everything, lambda near, global_tokens: near),
        ),
        Mistake(
            "A global query sees only its window and the global tokens",
            "The pattern is symmetric: every token sees a global one, and a global one sees every token.",
            _rows_and_columns(_window_and_globals, _window_and_globals),
        ),
        Mistake(
            "Global queries see only global keys",
            "A global token collects from the whole text, so it sees every token.",
            _rows_and_columns(
                lambda near, global_tokens: global_tokens.expand_as(near),
                _window_and_globals,
            ),
        ),
        Mistake(
            "Two softmaxes, averaged",
            "Window and globals are weighted apart and then given one half each. All keys of a query compete "
            "in one softmax.",
            _two_softmaxes(0.5),
        ),
        Mistake(
            "Two softmaxes, added",
            "Window and globals are weighted apart and added, so the weights sum to 2. All keys of a query "
            "compete in one softmax.",
            _two_softmaxes(1.0),
        ),
    ),
    hints=(
        "Take one query, three tokens and one of them global. How many columns does the softmax see, and how "
        "many different keys stand in them?",
        "Print weights.sum(-1): it is 1, so the sums do not show it. Look at which keys are allowed in "
        "`local`: should a key that has a column of its own on the left be among them?",
        "A neighbour: the votes of members and of people living near. Who is both has one vote.\n"
        "  member = torch.tensor([True, False, True, False])\n"
        "  near   = torch.tensor([True, True, False, False])\n"
        "  member.sum() + near.sum()                 -> 4 votes, person 0 votes twice\n"
        "  member.sum() + (near & ~member).sum()     -> 3 votes",
    ),
)
