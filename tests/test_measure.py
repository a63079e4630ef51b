"""The yardstick: counted MACs equal closed forms and hand counts; unknown operations are refused."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effnlp_lessons import measure
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.measure import (
    UncountedOperation,
    block_macs,
    bytes_on_disk,
    count_macs,
    count_parameters,
    crossing,
    latencies,
    peak_memory,
    transformer_macs,
    transformer_parameters,
)
from effnlp_lessons.transformer import Decoder, Encoder, TransformerConfig

CONFIGS = {
    "one head": TransformerConfig(100, 64, d_model=8, layers=1, heads=1, d_ff=32),
    "many heads": TransformerConfig(100, 64, d_model=24, layers=2, heads=8, d_ff=30),
    "narrow feed-forward": TransformerConfig(100, 64, d_model=16, layers=3, heads=2, d_ff=4),
    "no pooler, no segments": TransformerConfig(
        100, 64, d_model=16, layers=2, heads=4, d_ff=64, segments=0, pooler=False
    ),
    "norm first": TransformerConfig(100, 64, d_model=16, layers=2, heads=4, d_ff=64, norm_first=True),
    "no layers": TransformerConfig(100, 64, d_model=16, layers=0, heads=4, d_ff=64),
    "minilm sizes, two layers": TransformerConfig(100, 64, layers=2),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 17), (2, 64)])
def test_counted_macs_equal_the_closed_form(config, batch, length):
    ids = torch.zeros(batch, length, dtype=torch.long)
    counted = count_macs(Encoder(config), ids, torch.ones(batch, length, dtype=torch.bool))
    expected = {part: macs for part, macs in transformer_macs(config, batch, length).items() if macs}
    assert counted.by_part() == expected
    assert counted.total == sum(expected.values())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_counted_parameters_equal_the_closed_form(config):
    assert count_parameters(Encoder(config)) == sum(transformer_parameters(config).values())


def test_counted_macs_equal_loops_by_hand():
    """An independent count: one MAC for every step of the innermost loops."""
    n, d, d_ff, heads = 3, 4, 6, 2
    macs = 0
    for _projection in range(4):
        macs += sum(1 for _ in range(n) for _ in range(d) for _ in range(d))
    for _head in range(heads):
        macs += sum(1 for _ in range(n) for _ in range(n) for _ in range(d // heads))  # scores
        macs += sum(1 for _ in range(n) for _ in range(d // heads) for _ in range(n))  # mixing
    macs += sum(1 for _ in range(n) for _ in range(d) for _ in range(d_ff))
    macs += sum(1 for _ in range(n) for _ in range(d_ff) for _ in range(d))
    config = TransformerConfig(10, 8, d_model=d, layers=1, heads=heads, d_ff=d_ff)
    assert sum(block_macs(config, n).values()) == macs


def test_the_two_crossings():
    config = TransformerConfig()
    at = block_macs(config, config.d_ff)
    assert at["attention scores and mixing"] == at["feed-forward"]
    at = block_macs(config, 2 * config.d_model)
    assert at["attention scores and mixing"] + at["attention projections"] == at["feed-forward"]


def test_exchanged_attention_is_counted_in_its_place():
    config = CONFIGS["many heads"]
    ids, mask = torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.bool)

    def sdpa(q, k, v, key_padding_mask):
        return F.scaled_dot_product_attention(q, k, v)

    none = count_macs(Encoder(config, attention=lambda q, k, v, mask: v), ids, mask).by_part()
    assert "attention scores and mixing" not in none
    assert count_macs(Encoder(config, attention=sdpa), ids, mask).by_part() == transformer_macs(config, 1, 9)


def test_decoder_and_classifier_are_counted_too():
    config = TransformerConfig(100, 64, d_model=16, layers=2, heads=4, d_ff=64)
    ids = torch.zeros(2, 5, dtype=torch.long)
    body = sum(macs for part, macs in transformer_macs(config, 2, 5).items() if part != "pooler")
    assert count_macs(Decoder(config), ids).total == body + 2 * 5 * 16 * 100  # the output layer is the token table
    parts = count_macs(SentenceClassifier(Encoder(config), 3), ids).by_part()
    assert parts["head"] == 2 * 16 * 3 and parts["pooler"] == 2 * 16 * 16


a, b = torch.randn(5, 7), torch.randn(7, 3)
integers = torch.zeros(32, 64, dtype=torch.int8)


@pytest.mark.parametrize(
    ("function", "inputs", "macs"),
    [
        (torch.matmul, (a, b), 5 * 7 * 3),
        (torch.matmul, (a.to(torch.complex64), b.to(torch.complex64)), 4 * 5 * 7 * 3),
        (lambda x: F.linear(x, torch.zeros(3, 7), torch.zeros(3)), (a,), 5 * 7 * 3),
        (lambda x, y: torch.einsum("id,df->if", x, y), (a, b), 5 * 7 * 3),
        (lambda x: torch.mv(x, torch.zeros(7)), (a,), 5 * 7),
        (lambda x, y: torch._int_mm(x, y.T), (integers, integers), 32 * 64 * 32),
        (nn.Conv1d(4, 6, 3), (torch.randn(2, 4, 9),), 2 * 6 * 7 * 4 * 3),
        (nn.Conv1d(4, 6, 3, groups=2), (torch.randn(2, 4, 9),), 2 * 6 * 7 * 2 * 3),
        (nn.ConvTranspose1d(4, 6, 3), (torch.randn(2, 4, 9),), 2 * 4 * 9 * 6 * 3),
        (torch.fft.fft, (torch.zeros(2, 8, dtype=torch.complex64),), round(2 * 2.5 * 8 * 3)),
        (torch.fft.rfft, (torch.zeros(2, 8),), round(2 * 1.25 * 8 * 3)),
        (lambda x: (x.softmax(-1) + 1).relu().sort().values.cumsum(0)[:, :2], (a,), 0),
    ],
)
def test_single_operations(function, inputs, macs):
    assert count_macs(function, *inputs).total == macs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_int8_linear_is_counted():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(7, 3)), {nn.Linear})
    assert count_macs(model, a).total == 5 * 7 * 3


def test_unknown_operation_is_refused_not_taken_for_free():
    with pytest.raises(UncountedOperation, match="linalg_inv_ex has no MAC formula"):
        count_macs(torch.linalg.inv, torch.eye(3))


def test_counting_leaves_the_model_as_it_was():
    model = Encoder(CONFIGS["one head"])
    ids = torch.zeros(1, 4, dtype=torch.long)
    count_macs(model, ids)
    with pytest.raises(ValueError, match="token_ids"):
        count_macs(model, torch.zeros(1, 4))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_bytes_on_disk_is_the_size_of_the_file():
    model = nn.Sequential(nn.Linear(100, 50), nn.Linear(100, 50))
    weights = 2 * (100 * 50 + 50) * 4
    assert weights < bytes_on_disk(model) < weights + 1_000
    model[1].weight = model[0].weight  # shared: stored once
    assert bytes_on_disk(model) < weights - 100 * 50 * 4 + 1_000
    assert bytes_on_disk(nn.Linear(100, 50).half()) < 100 * 50 * 2 + 1_000


def test_latencies_tell_slow_from_fast_and_take_turns():
    order = []
    calls = {
        "fast": lambda: order.append("fast") or time.sleep(0.001),
        "slow": lambda: order.append("slow") or time.sleep(0.004),
    }
    timings = latencies(calls, runs=5, warmup=2)
    assert order == ["fast", "slow"] * 7
    assert 0.001 <= timings["fast"].low <= timings["fast"].median <= timings["fast"].high
    assert timings["slow"].median > 2 * timings["fast"].median and timings["slow"].runs == 5
    with pytest.raises(ValueError, match="runs must be >= 2, got 1"):
        latencies(calls, runs=1)


def test_quartiles_are_those_of_the_measured_calls(monkeypatch):
    """On a clock of the test's own: two slow warm-up calls, then 1, 2, 3, 4, 5 seconds."""
    now, durations = [0.0], iter([90, 90, 5, 1, 4, 2, 3])
    monkeypatch.setattr(measure, "perf_counter", lambda: now[0])
    timing = latencies({"call": lambda: now.append(now.pop() + next(durations))}, runs=5, warmup=2)["call"]
    assert (timing.low, timing.median, timing.high, timing.runs) == (2, 3, 4, 5)
    assert str(timing) == "3000.0 ms [2000.0, 4000.0]"


def test_crossing_finds_where_one_curve_passes_another_for_good():
    lengths = [32, 100, 300, 1_000, 5_000]
    first, second = [2 * n**2 * 3 for n in lengths], [2 * n * 3 * 700 for n in lengths]
    assert crossing(lengths, first, second) == pytest.approx(700)  # straight lines on log-log axes: exact
    assert crossing(lengths, second, first) is None
    assert crossing(lengths, [a + b for a, b in zip(first, second, strict=True)], second) is None
    assert crossing([1, 2, 4, 8, 16], [2, 1, 3, 1, 4], [1, 2, 1, 2, 1]) == pytest.approx(8 * 2 ** (1 / 3))
    assert crossing([1, 2, 4], [1, 4, 9], [2, 4, 8]) == pytest.approx(2)
    with pytest.raises(ValueError, match="equally long, got 2, 1, 2"):
        crossing([1, 2], [1], [1, 2])
    with pytest.raises(ValueError, match="must be positive"):
        crossing([1, 2], [0, 1], [1, 2])


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.zeros(256, 1024)  # 1 MiB
    mebibyte = 2**20  # 2 per cent: operations also hold a few small buffers, such as a scalar made a tensor
    assert peak_memory(lambda: x + 1) == pytest.approx(mebibyte, rel=0.02)
    assert peak_memory(lambda: [x + 1 for _ in range(4)]) == pytest.approx(4 * mebibyte, rel=0.02)

    def one_after_another():
        for _ in range(4):
            y = x + 1
        return y

    # the new tensor is made before the name lets go of the old one
    assert peak_memory(one_after_another) == pytest.approx(2 * mebibyte, rel=0.02)
    assert peak_memory(lambda: x.view(-1)) == 0


def test_cost_and_table():
    model = Encoder(CONFIGS["one head"]).eval()
    ids = torch.zeros(1, 4, dtype=torch.long)
    cost = measure.cost(model, ids, runs=3)
    assert cost.parameters == count_parameters(model) and cost.bytes_on_disk == bytes_on_disk(model)
    assert cost.macs == sum(transformer_macs(CONFIGS["one head"], 1, 4).values()) and cost.latency.runs == 3
    lines = measure.table({"small": cost, "again": cost}).splitlines()
    assert len(lines) == 3 and "MACs (M)" in lines[0] and len({len(line) for line in lines}) == 1
    with pytest.raises(ValueError, match="at least one model"):
        measure.table({})


def test_a_product_that_is_added_in_place_is_counted_like_the_others():
    a, b = torch.ones(2, 3, 5), torch.ones(2, 5, 7)
    added = count_macs(lambda: torch.baddbmm(torch.zeros(2, 3, 7), a, b)).total
    assert count_macs(lambda: torch.zeros(2, 3, 7).baddbmm_(a, b)).total == added == 2 * 3 * 5 * 7
