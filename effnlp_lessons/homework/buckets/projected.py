"""Exercise 7 of notebook 09: attention over projected keys (Wang et al. 2020, arXiv 2006.04768, Eq. 7)."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def project_keys(
    q: Float[Tensor, "length d_head"],
    k: Float[Tensor, "length d_head"],
    v: Float[Tensor, "length d_head"],
    real: Bool[Tensor, " length"],
    project_k: Float[Tensor, "projected length"],
    project_v: Float[Tensor, "projected length"],
) -> Float[Tensor, "length d_head"]:
    """softmax(Q (E K)ᵀ / sqrt(d_head)) F V, where padded keys and values count nothing."""
    short_k = project_k @ k.masked_fill(~real[:, None], 0)
    short_v = project_v @ v.masked_fill(~real[:, None], 0)
    return (q @ short_k.T / q.shape[-1] ** 0.5).softmax(dim=-1) @ short_v


def _with(
    prepare: Callable[[Tensor, Tensor], Tensor] = lambda x, real: x.masked_fill(~real[:, None], 0),
    matrices: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda e, f: (e, f),
    scale: Callable[[Tensor, Tensor], float] = lambda q, e: q.shape[-1] ** -0.5,
    dim: int = -1,
    values: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Answer:
    def answer(q: Tensor, k: Tensor, v: Tensor, real: Tensor, e: Tensor, f: Tensor) -> Tensor:
        e, f = matrices(e, f)
        scores = q @ (e @ prepare(k, real)).T * scale(q, e)
        return scores.softmax(dim=dim) @ (f @ (values or prepare)(v, real))

    return answer


def _draw(padding: bool) -> Callable[[Generator], tuple]:
    def draw(generator: Generator) -> tuple:
        length, projected, d_head = (whole_number(low, low + 3, generator) for low in (8, 3, 3))
        q, k, v = torch.randn(3, length, d_head, generator=generator, dtype=torch.float64)
        e, f = torch.randn(2, projected, length, generator=generator, dtype=torch.float64)
        kept = length - whole_number(2, 4, generator) if padding else length
        return q, k, v, torch.arange(length) < kept, e, f

    return draw


def _identity(generator: Generator) -> tuple:
    q, k, v, real, *_ = _draw(False)(generator)
    eye = torch.eye(len(k), dtype=torch.float64)
    return q, k, v, real, eye, eye


PROJECT_KEYS = Exercise(
    id="buckets.project_keys",
    title="fewer keys by projection",
    minutes=20,
    difficulty=2,
    reference=project_keys,
    properties=(
        Property("identity projections give full attention", _identity, times=1),
        Property("keys and values have their own projections", _draw(False)),
        Property("padding counts nothing", _draw(True)),
    ),
    mistakes=(
        Mistake(
            "Padding is projected too",
            "After the projection no mask can find padding again. Set padded keys and values to 0 before.",
            _with(prepare=lambda x, real: x),
        ),
        Mistake(
            "Only padded keys are zeroed",
            "The values of padding go through F into every mixed value. Zero them, too.",
            _with(values=lambda x, real: x),
        ),
        Mistake(
            "One projection for both",
            "Keys are mixed by E, values by F. (Sharing them is an option of the paper, but not asked here.)",
            _with(matrices=lambda e, f: (e, e)),
        ),
        Mistake(
            "The projections are exchanged",
            "E belongs to the keys, F to the values.",
            _with(matrices=lambda e, f: (f, e)),
        ),
        Mistake(
            "Scaled by the number of keys",
            "The scale belongs to the width of a head, which sets how large a product is: sqrt(d_head).",
            _with(scale=lambda q, e: e.shape[0] ** -0.5),
        ),
        Mistake("Not scaled", "Divide the scores by sqrt(d_head).", _with(scale=lambda q, e: 1.0)),
        Mistake(
            "Softmax over the queries",
            "Each query's weights over the mixed keys must sum to 1: the last dimension.",
            _with(dim=0),
        ),
    ),
    hints=(
        "Write down the shape after each product. Where is the length of the text still visible, so that padding can "
        "be taken out?",
        "Fill padded rows of k and v with 0. Then E @ k has `projected` rows, and all else is usual attention.",
        "A neighbour: mean marks of three classes of two pupils, one pupil absent.\n"
        "  marks = torch.tensor([1.0, 3.0, 2.0, 9.0, 4.0, 2.0]); present = torch.tensor([1, 1, 1, 0, 1, 1]).bool()\n"
        "  mean = torch.eye(3).repeat_interleave(2, dim=1) / 2\n"
        "  mean @ marks.masked_fill(~present, 0)     [2, 1, 3]: the absent 9 does not count",
    ),
)
