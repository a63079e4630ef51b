"""The exercises of notebook 10: references against loops or the library, and wrong answers against the grader.

The wrong answers are written here anew, as a student would write them; none uses a `Mistake` of the exercise.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from effnlp_lessons.attention import linear as library
from effnlp_lessons.attention import transformer_xl
from effnlp_lessons.homework.recurrent.linear import causal_linear_attention, linear_attention, linear_step
from effnlp_lessons.homework.recurrent.memory import compression_loss, update_memories
from effnlp_lessons.homework.recurrent.shift import relative_shift


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(q, k):
    return (F.elu(q) + 1) @ (F.elu(k) + 1).T


# ----------------------------------------------------------------------------- references


def test_linear_attention_is_the_librarys():
    q, k, v = drawn(3, 7, 4)
    real = torch.arange(7) < 5
    own = library.linear_attention(*(x[None, None] for x in (q, k, v)), real[None])[0, 0]
    torch.testing.assert_close(linear_attention(q, k, v, real)[real], own[real], rtol=1e-5, atol=1e-5)


def test_prefix_sums_equal_the_table_without_the_future():
    q, k, v = drawn(3, 9, 4)
    table = weights(q, k).tril()
    torch.testing.assert_close(causal_linear_attention(q, k, v), table @ v / table.sum(-1, keepdim=True))


def test_steps_equal_prefix_sums():
    q, k, v = drawn(3, 9, 4)
    sums, normaliser = torch.zeros(4, 4).double(), torch.zeros(4).double()
    for i, expected in enumerate(causal_linear_attention(q, k, v)):
        out, sums, normaliser = linear_step(q[i], k[i], v[i], sums, normaliser)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("queries", "keys"), [(3, 3), (4, 7), (1, 5)])
def test_shift_by_loops_and_by_the_library(queries, keys):
    x = drawn(queries, keys)
    shifted = relative_shift(x)
    for i in range(queries):
        for j in range(keys):
            distance = keys - queries + i - j
            assert shifted[i, j] == (x[i, keys - 1 - distance] if distance >= 0 else 0)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    assert torch.equal(transformer_xl.relative_shift(x[None, None])[0, 0][seen], shifted[seen])


def test_queues_hold_the_oldest_tokens_first():
    memory, compressed, text = torch.zeros(4, 1), torch.zeros(3, 1), torch.arange(1.0, 13.0)[:, None]
    for segment in text.split(2):
        memory, compressed = update_memories(memory, compressed, segment, 2)
    assert memory.flatten().tolist() == [9, 10, 11, 12]
    assert compressed.flatten().tolist() == [3.5, 5.5, 7.5]


def test_compression_loss_by_loops():
    h, old, w = drawn(3, 4), drawn(6, 4, seed=1), drawn(3, 4, 4, seed=2)
    kernel = torch.tensor([0.3, 0.7], dtype=torch.float64)
    short = torch.stack([0.3 * old[2 * m] + 0.7 * old[2 * m + 1] for m in range(3)])
    total = 0.0
    for query in h @ w[0]:
        outputs = []
        for rows in (old, short):
            powers = [math.exp(float(query @ row) / 2) for row in rows @ w[1]]
            outputs.append(sum(p / sum(powers) * value for p, value in zip(powers, rows @ w[2], strict=True)))
        total += float((outputs[0] - outputs[1]).square().mean()) / 3
    assert float(compression_loss(h, old, kernel, *w)) == pytest.approx(total)


# --------------------------------------------------------------------------- wrong answers


def linear_unnormalised(q, k, v, real):
    return weights(q, k)[:, real] @ v[real]


def linear_by_count(q, k, v, real):
    return weights(q, k)[:, real] @ v[real] / len(k)


def linear_with_padding(q, k, v, real):
    return weights(q, k) @ v / weights(q, k).sum(1, keepdim=True)


def linear_zeros_before_phi(q, k, v, real):
    table = weights(q, torch.where(real[:, None], k, 0.0))
    return table @ v / table.sum(1, keepdim=True)


def linear_without_one(q, k, v, real):
    table = F.elu(q) @ F.elu(k[real]).T
    return table @ v[real] / table.sum(1, keepdim=True)


def prefix(table_of):
    def answer(q, k, v):
        table = table_of(weights(q, k))
        return table @ v / table.sum(1, keepdim=True)

    return answer


def prefix_unnormalised(q, k, v):
    return weights(q, k).tril() @ v


def prefix_divided_by_all(q, k, v):
    return weights(q, k).tril() @ v / weights(q, k).sum(1, keepdim=True)


def step_read_first(q, k, v, sums, normaliser):
    out = (F.elu(q) + 1) @ sums / ((F.elu(q) + 1) @ normaliser)
    return out, sums + (F.elu(k) + 1)[:, None] * v, normaliser + F.elu(k) + 1


def step_unnormalised(q, k, v, sums, normaliser):
    sums = sums + (F.elu(k) + 1)[:, None] * v
    return (F.elu(q) + 1) @ sums, sums, normaliser + F.elu(k) + 1


def step_with_a_fixed_normaliser(q, k, v, sums, normaliser):
    sums = sums + (F.elu(k) + 1)[:, None] * v
    return (F.elu(q) + 1) @ sums / ((F.elu(q) + 1) @ normaliser), sums, normaliser


def step_key_without_phi(q, k, v, sums, normaliser):
    sums, normaliser = sums + k[:, None] * v, normaliser + k
    return (F.elu(q) + 1) @ sums / ((F.elu(q) + 1) @ normaliser), sums, normaliser


def shift_rows(places):
    """Row i moved to the left by places(i, queries), what falls off is lost, zeros come in."""

    def answer(x):
        out = torch.zeros_like(x)
        for i in range(len(x)):
            for j in range(x.shape[1]):
                if 0 <= j + places(i, len(x)) < x.shape[1]:
                    out[i, j] = x[i, j + places(i, len(x))]
        return out

    return answer


def shift_in_a_circle(x):
    return torch.stack([row.roll(-(len(x) - 1 - i)) for i, row in enumerate(x)])


def queues_newest_squeezed(memory, compressed, segment, rate):
    short = memory[len(memory) - len(segment) :].reshape(-1, rate, memory.shape[1]).mean(1)
    return torch.cat([memory[len(segment) :], segment]), torch.cat([compressed[len(short) :], short])


def queues_segment_squeezed(memory, compressed, segment, rate):
    short = segment.reshape(-1, rate, memory.shape[1]).mean(1)
    return torch.cat([memory[len(segment) :], segment]), torch.cat([compressed[len(short) :], short])


def queues_every_cth(memory, compressed, segment, rate):
    short = memory[: len(segment) : rate]
    return torch.cat([memory[len(segment) :], segment]), torch.cat([compressed[len(short) :], short])


def queues_newest_slots_lost(memory, compressed, segment, rate):
    short = memory[: len(segment)].reshape(-1, rate, memory.shape[1]).mean(1)
    return torch.cat([memory[len(segment) :], segment]), torch.cat([compressed[: -len(short)], short])


def loss_with(detach):
    """The loss with only the inputs at these places detached."""

    def answer(*inputs):
        h, old, kernel, w_q, w_k, w_v = (x.detach() if place in detach else x for place, x in enumerate(inputs))
        short = (old.reshape(-1, len(kernel), old.shape[1]) * kernel[None, :, None]).sum(1)
        outputs = [
            F.softmax(h @ w_q @ (rows @ w_k).T / math.sqrt(h.shape[1]), -1) @ (rows @ w_v) for rows in (old, short)
        ]
        return ((outputs[0] - outputs[1]) ** 2).mean()

    return answer


def loss_with_a_stopped_target(h, old, kernel, w_q, w_k, w_v):
    short = (old.reshape(-1, len(kernel), old.shape[1]) * kernel[None, :, None]).sum(1)
    target, got = (
        F.softmax(h @ w_q @ (rows @ w_k).T / math.sqrt(h.shape[1]), -1) @ (rows @ w_v) for rows in (old, short)
    )
    return ((target.detach() - got) ** 2).mean()


WRONG_ANSWERS = [
    ("recurrent.linear_attention", linear_unnormalised, "The normaliser is forgotten"),
    ("recurrent.linear_attention", linear_by_count, "Divided by the number of keys"),
    ("recurrent.linear_attention", linear_with_padding, "Padding counts"),
    ("recurrent.linear_attention", linear_zeros_before_phi, "Padding is zeroed before phi"),
    ("recurrent.linear_attention", linear_without_one, "elu without the 1"),
    ("recurrent.prefix_sum", prefix(lambda table: table.tril(-1)), "The present is left out"),
    ("recurrent.prefix_sum", prefix(lambda table: table.tril() + table.diag().diag()), "The present is counted twice"),
    ("recurrent.prefix_sum", prefix(lambda table: table), "The future is seen"),
    ("recurrent.prefix_sum", prefix(lambda table: table.tril(1)), "One token of the future is seen"),
    ("recurrent.prefix_sum", prefix_unnormalised, "The normaliser is forgotten"),
    ("recurrent.prefix_sum", prefix_divided_by_all, "The normaliser sees all keys"),
    ("recurrent.linear_step", step_read_first, "Read before written"),
    ("recurrent.linear_step", step_unnormalised, "The normaliser is forgotten"),
    ("recurrent.linear_step", step_with_a_fixed_normaliser, "The normaliser is never moved"),
    ("recurrent.linear_step", step_key_without_phi, "The key without phi"),
    ("recurrent.relative_shift", shift_rows(lambda i, queries: queries - i), "Off by one to the left"),
    ("recurrent.relative_shift", shift_rows(lambda i, queries: queries - 2 - i), "Off by one to the right"),
    ("recurrent.relative_shift", shift_rows(lambda i, queries: i - queries + 1), "Shifted the other way"),
    ("recurrent.relative_shift", shift_rows(lambda i, queries: i), "The first row stays and the last one moves"),
    ("recurrent.relative_shift", shift_in_a_circle, "The future is left as it comes"),
    ("recurrent.update_memories", queues_newest_squeezed, "The newest rows are squeezed"),
    ("recurrent.update_memories", queues_segment_squeezed, "The segment is squeezed"),
    ("recurrent.update_memories", queues_every_cth, "Every c-th row instead of the mean of c rows"),
    ("recurrent.update_memories", queues_newest_slots_lost, "The compressed queue loses its newest slots"),
    ("recurrent.compression_loss", loss_with(()), "No gradient is stopped"),
    ("recurrent.compression_loss", loss_with((0, 3, 4, 5)), "A gradient leaks into the memory"),
    ("recurrent.compression_loss", loss_with((1, 3, 4, 5)), "A gradient leaks into the segment"),
    ("recurrent.compression_loss", loss_with((0, 1)), "A gradient leaks into the projections"),
    ("recurrent.compression_loss", loss_with_a_stopped_target, "Only the target is stopped"),
]
