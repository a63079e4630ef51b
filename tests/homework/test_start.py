"""The exercises of notebook 00: references against independent counts, and wrong answers against the grader.

The wrong answers are written here anew, as a student would write them; none uses a `Mistake` of the exercise.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from effnlp_lessons.homework import check
from effnlp_lessons.homework.start.clock import macs_or_clock
from effnlp_lessons.homework.start.crossing import crossing_length
from effnlp_lessons.homework.start.macs import encoder_macs
from effnlp_lessons.homework.start.parameters import block_parameters
from effnlp_lessons.homework.start.pooling import mean_pool

SEEDS = range(5)


# ----------------------------------------------------------------------------- references


@pytest.mark.parametrize(("d_model", "d_ff"), [(8, 32), (12, 37), (20, 7)])
def test_block_parameters_counts_torchs_decoder_layer(d_model, d_ff):
    layer = nn.TransformerDecoderLayer(d_model, nhead=2, dim_feedforward=d_ff)
    assert block_parameters(d_model, d_ff) == sum(parameter.numel() for parameter in layer.parameters())


def test_encoder_macs_counts_the_multiplications_of_a_forward_pass():
    layers, d_model, d_ff, lengths = 2, 3, 7, [2, 5, 4]
    counted = 0

    def product(rows, inner, columns):
        nonlocal counted
        counted += sum(1 for _ in range(rows) for _ in range(inner) for _ in range(columns))

    for _ in range(layers * len(lengths)):
        for _projection in range(4):
            product(5, d_model, d_model)
        product(5, d_model, 5)
        product(5, 5, d_model)
        product(5, d_model, d_ff)
        product(5, d_ff, d_model)
    assert encoder_macs(layers, d_model, d_ff, lengths) == counted


@pytest.mark.parametrize("matrices", [2, 3])
@pytest.mark.parametrize(("d_model", "d_ff"), [(4, 16), (5, 16), (5, 17), (9, 4), (8, 16), (6, 8)])
def test_crossing_length_is_the_first_that_costs_more(d_model, d_ff, matrices):
    def attention_costs_more(n):
        return 4 * n * d_model**2 + 2 * n**2 * d_model > matrices * n * d_model * d_ff

    first = next(n for n in range(1, 1000) if attention_costs_more(n))
    assert crossing_length(d_model, d_ff, matrices) == first


def test_crossing_length_of_known_models():
    assert crossing_length(384, 1536, 2) == 769
    assert crossing_length(4096, 11008, 3) == 8321


def test_mean_pool_agrees_with_a_loop_over_rows():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0], [0] * 6, [1] * 6], dtype=torch.bool)
    for row in range(4):
        real = hidden[row].numpy()[mask[row].numpy()]
        expected = real.mean(axis=0) if len(real) else np.zeros(3)
        # float64, and the two add in different orders
        np.testing.assert_allclose(mean_pool(hidden, mask)[row].numpy(), expected, rtol=1e-12)


def test_cosine_similarity_does_not_see_the_bug_of_the_starter():
    generator = torch.Generator().manual_seed(2)
    hidden, mask = torch.randn(2, 6, 5, generator=generator), torch.arange(6) < torch.tensor([[2], [5]])
    right, wrong = mean_pool(hidden, mask), starter_of_the_notebook(hidden, mask)
    assert not torch.allclose(right, wrong)
    torch.testing.assert_close(torch.cosine_similarity(*right, dim=0), torch.cosine_similarity(*wrong, dim=0))


def test_macs_or_clock_by_hand():
    macs = {"a": 600, "b": 400, "c": 0}
    runs = {"a": [9.0, 2.0, 4.0, 3.0], "b": [9.0, 1.0, 1.0, 1.0], "c": [9.0, 1.0, 2.0, 9.0]}
    # medians 3, 1, 2; shares of the time .5, .167, .333; of the MACs .6, .4, 0
    assert macs_or_clock(macs, runs, 1) == ({"a": 200, "b": 400, "c": 0}, "c")


# ----------------------------------------------------------------------------- wrong answers


def no_cross_attention(d, f):
    weights = 4 * d**2 + 2 * d * f
    biases = 4 * d + f + d
    return weights + biases + 6 * d


def norms_scale_only(d, f):
    layer = nn.TransformerDecoderLayer(d, 1, dim_feedforward=f)
    shifts = [layer.norm1.bias, layer.norm2.bias, layer.norm3.bias]
    return sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in shifts)


def no_feed_forward_bias(d, f):
    return 8 * (d * d + d) + d * f * 2 + 6 * d


def two_norms(d, f):
    return 8 * d * (d + 1) + f * (d + 1) + d * (f + 1) + 4 * d


def no_norms(d, f):
    return 8 * d * (d + 1) + f * (d + 1) + d * (f + 1)


def bert_sized(d, f):
    return 8 * d * d + 8 * d + 8 * d * d + 5 * d + 6 * d


def up_but_not_down(d, f):
    return 8 * d * (d + 1) + f * (d + 1) + 6 * d


def count_batch(lengths, layers, per_sentence):
    total = 0
    for n in lengths:
        total += per_sentence(n)
    return layers * total


def layer_macs(n, d, f):
    return 4 * n * d * d + n * n * d + n * n * d + n * d * f + n * f * d


def padding_free(layers, d, f, lengths):
    return count_batch(lengths, layers, lambda n: layer_macs(n, d, f))


def one_long_sentence(layers, d, f, lengths):
    return layers * layer_macs(max(lengths) * len(lengths), d, f)


def one_sentence(layers, d, f, lengths):
    return layers * layer_macs(sorted(lengths)[-1], d, f)


def one_layer(layers, d, f, lengths):
    return len(lengths) * layer_macs(max(lengths), d, f)


def flops(layers, d, f, lengths):
    n, b = max(lengths), len(lengths)
    return layers * b * (8 * n * d * d + 4 * n * n * d + 4 * n * d * f)


def scores_only(layers, d, f, lengths):
    n, b = max(lengths), len(lengths)
    return layers * b * n * d * (4 * d + n + 2 * f)


def weights_only(layers, d, f, lengths):
    n, b = max(lengths), len(lengths)
    return layers * b * n * (4 * d * d + 2 * d * f)


def no_output_projection(layers, d, f, lengths):
    n, b = max(lengths), len(lengths)
    return layers * b * n * d * (3 * d + 2 * n + 2 * f)


def search(costs_more):
    """The first length that satisfies the inequality, by trying."""
    return next(n for n in range(1, 10_000) if costs_more(n))


def equal_is_enough(d, f, m):
    return search(lambda n: 4 * d + 2 * n >= m * f)


def round_up_and_add(d, f, m):
    return max(1, math.ceil((m * f) / 2 - 2 * d) + 1)


def without_projections(d, f, m):
    return search(lambda n: 2 * n * n * d > m * n * d * f)


def without_mixing(d, f, m):
    return search(lambda n: 4 * n * d * d + n * n * d > m * n * d * f)


def three_projections(d, f, m):
    return search(lambda n: 3 * d + 2 * n > m * f)


def two_matrices(d, f, m):
    return search(lambda n: 4 * d + 2 * n > 2 * f)


def may_be_negative(d, f, m):
    return math.floor(m * f / 2 - 2 * d) + 1


def ignores_the_mask(hidden, mask):
    return hidden.sum(1) / hidden.size(1)


def starter_of_the_notebook(hidden, mask):
    return torch.where(mask[..., None], hidden, torch.zeros_like(hidden)).mean(1)


def zero_by_zero(hidden, mask):
    return torch.einsum("bld,bl->bd", hidden, mask.to(hidden.dtype)) / mask.sum(1, keepdim=True)


def repaired_after_the_division(hidden, mask):
    vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    return torch.where(torch.isnan(vectors), torch.zeros_like(vectors), vectors)


def plus_one(hidden, mask):
    weights = mask / (mask.sum(1, keepdim=True) + 1)
    return torch.einsum("bld,bl->bd", hidden, weights.to(hidden.dtype))


def true_is_padding(hidden, mask):
    real = (~mask).to(hidden.dtype)[..., None]
    return (hidden * real).sum(1) / real.sum(1).clamp(min=1)


def cls_vector(hidden, mask):
    return hidden.select(1, 0).clone()


def only_summed(hidden, mask):
    return hidden.masked_fill(~mask[..., None], 0).sum(1)


def tokens_of_the_batch(hidden, mask):
    return hidden.masked_fill(~mask[..., None], 0).sum(1) / max(1, int(mask.sum()))


def report(macs, seconds, name):
    return {part: macs[part] / seconds[part] for part in seconds}, name


def shares(values):
    return {part: value / sum(values.values()) for part, value in values.items()}


def disagreement(macs, seconds):
    of_time, of_macs = shares(seconds), shares(macs)
    return sorted(macs, key=lambda part: of_macs[part] - of_time[part])[0]


def by(summary):
    """The right answer, but with another summary of a part's runs."""

    def answer(macs, runs, warm_up):
        seconds = {part: summary(times, warm_up) for part, times in runs.items()}
        return report(macs, seconds, disagreement(macs, seconds))

    return answer


def naming(choice):
    """The right speeds, but another choice of the part."""

    def answer(macs, runs, warm_up):
        seconds = {part: float(np.median(times[warm_up:])) for part, times in runs.items()}
        return report(macs, seconds, choice(macs, seconds))

    return answer


def twice_the_speed(macs, runs, warm_up):
    speed, name = naming(disagreement)(macs, runs, warm_up)
    return {part: value * 2 for part, value in speed.items()}, name


WRONG_ANSWERS = [
    ("start.block_parameters", no_cross_attention, "Cross-attention is not counted"),
    ("start.block_parameters", norms_scale_only, "Norms have a weight and no bias"),
    ("start.block_parameters", no_feed_forward_bias, "The feed-forward's biases are left out"),
    ("start.block_parameters", two_norms, "Two norms instead of three"),
    ("start.block_parameters", no_norms, "The norms are left out"),
    ("start.block_parameters", bert_sized, "d_ff is taken to be 4 d_model"),
    ("start.block_parameters", up_but_not_down, "One feed-forward matrix is missing"),
    ("start.encoder_macs", padding_free, "Padding is taken to be free"),
    ("start.encoder_macs", one_long_sentence, "The batch is taken to be one long sentence"),
    ("start.encoder_macs", one_sentence, "Only one sentence is counted"),
    ("start.encoder_macs", one_layer, "Only one layer is counted"),
    ("start.encoder_macs", flops, "FLOPs are counted, not MACs"),
    ("start.encoder_macs", scores_only, "Mixing is left out"),
    ("start.encoder_macs", weights_only, "Scores and mixing are left out"),
    ("start.encoder_macs", no_output_projection, "The output projection is left out"),
    ("start.crossing_length", equal_is_enough, "The length where both cost the same"),
    ("start.crossing_length", round_up_and_add, "One token too far between two lengths"),
    ("start.crossing_length", without_projections, "The projections are left out"),
    ("start.crossing_length", without_mixing, "Mixing is left out"),
    ("start.crossing_length", three_projections, "Three projections instead of four"),
    ("start.crossing_length", two_matrices, "The feed-forward always has two matrices"),
    ("start.crossing_length", may_be_negative, "A length below one token"),
    ("start.mean_pool", ignores_the_mask, "Padding is averaged in"),
    ("start.mean_pool", starter_of_the_notebook, "Divided by the padded length"),
    ("start.mean_pool", zero_by_zero, "Zero divided by zero"),
    ("start.mean_pool", repaired_after_the_division, "NaN is replaced after the division"),
    ("start.mean_pool", plus_one, "One is added to every count"),
    ("start.mean_pool", true_is_padding, "The mask is upside down"),
    ("start.mean_pool", cls_vector, "The first token instead of the mean"),
    ("start.mean_pool", only_summed, "The sum instead of the mean"),
    ("start.mean_pool", tokens_of_the_batch, "One count for the whole batch"),
    ("start.macs_or_clock", by(lambda t, w: sum(t[w:]) / len(t[w:])), "The mean instead of the median"),
    ("start.macs_or_clock", by(lambda t, w: sorted(t[w:])[0]), "The fastest run instead of the median"),
    ("start.macs_or_clock", by(lambda t, w: float(np.median(t))), "Warm-up runs are kept"),
    (
        "start.macs_or_clock",
        by(lambda t, w: torch.tensor(t[w:], dtype=torch.float64).median().item()),
        "The lower of the two middle runs",
    ),
    ("start.macs_or_clock", by(lambda t, w: sorted(t[w:])[len(t[w:]) // 2]), "The upper of the two middle"),
    (
        "start.macs_or_clock",
        by(lambda t, w: float(np.median(sorted(t)[w:]))),
        "Runs are dropped after sorting",
    ),
    ("start.macs_or_clock", naming(lambda m, s: max(s, key=s.get)), "The slowest part"),
    (
        "start.macs_or_clock",
        naming(lambda m, s: min(s, key=lambda p: m[p] / s[p])),
        "The part with the lowest",
    ),
    (
        "start.macs_or_clock",
        naming(lambda m, s: max(m, key=lambda p: shares(m)[p] - shares(s)[p])),
        "The difference is taken the wrong way round",
    ),
    ("start.macs_or_clock", naming(lambda m, s: max(m, key=lambda p: s[p] - m[p])), "Seconds are compared"),
    ("start.macs_or_clock", twice_the_speed, "FLOPs per second"),
]


def test_other_right_answers_pass():
    check("start.block_parameters", lambda d, f: np.int64(8 * d * d + 8 * d + 2 * d * f + f + d + 6 * d))
    check("start.mean_pool", masked_fill_and_divide)
    check("start.macs_or_clock", naming(disagreement))
    check("start.crossing_length", lambda d, f, m: search(lambda n: 4 * d + 2 * n > m * f))


def masked_fill_and_divide(hidden, mask):
    count = mask.sum(1)
    total = hidden.masked_fill(~mask[..., None], 0).sum(1)
    return total / torch.where(count == 0, torch.ones_like(count), count)[:, None]
