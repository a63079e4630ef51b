"""The study of what pruning costs: every form computes what it should, bytes are those of tensors and files."""

import pytest
import torch
from torch import nn

from effnlp_lessons.pruning.masks import keep_top, prunable, spread_blocks
from effnlp_lessons.pruning.storage import pack_matrix
from effnlp_lessons.studies import pruning_costs
from effnlp_lessons.studies.pruning_costs import SparseLinear, bsr, csr, through_linear, zeros
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.transformer import TransformerConfig

CONFIG = TransformerConfig(d_model=64, layers=2, heads=4, d_ff=128)
SHAPES = [(64, 64)] * 4 + [(128, 64), (64, 128)]
SETTING = {"csr": [0.5, 0.9], "bsr": [0.5]}


@pytest.fixture
def encoder():
    return pruning_costs.one_layer(CONFIG, 0)


@pytest.mark.parametrize("block", [None, (4, 4)])
@pytest.mark.parametrize("linear_function", [False, True])
def test_a_sparse_layer_computes_the_masked_product(block, linear_function):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(8, 12)
    generator = torch.Generator().manual_seed(1)
    mask = keep_top(torch.rand((12, 8) if block is None else (3, 2), generator=generator), 0.6)
    mask = mask if block is None else spread_blocks(mask, block)
    sparse = SparseLinear(linear, mask, block, linear_function)
    for shape in ((5, 8), (2, 5, 8), (2, 3, 5, 8)):
        x = torch.randn(shape, generator=generator)
        with torch.inference_mode():
            expected = x @ (linear.weight * mask).T + linear.bias
            torch.testing.assert_close(sparse(x), expected, rtol=0, atol=1e-5)
    assert sparse.weight.values().numel() == int(mask.sum()) < mask.numel()  # no zero is kept


def test_every_form_of_a_layer_computes_a_layer(encoder):
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    models = dict(pruning_costs.forms(encoder, SETTING))
    with torch.inference_mode():
        y = {name: model.blocks[0](x)[0] for name, model in models.items()}
    assert all(values.shape == (1, 9, 64) and torch.isfinite(values).all() for values in y.values())
    for name in (csr(0.9), through_linear(csr(0.9))):  # the same zeros in three kernels
        torch.testing.assert_close(y[zeros(0.9)], y[name], rtol=0, atol=1e-5)
    assert (y[zeros(0.9)] - y[pruning_costs.DENSE]).abs().max() > 1e-3
    torch.testing.assert_close(y[pruning_costs.INT8], y[pruning_costs.DENSE], rtol=0, atol=0.05)  # steps of 8 bits
    assert models[pruning_costs.HALF].blocks[0].token_mixer.heads == 2
    assert models[pruning_costs.QUARTER].blocks[0].channel_mixer.expand.out_features == 32
    for weight in prunable(models[pruning_costs.TWO_OF_FOUR]).values():
        assert (weight.view(-1, 4) != 0).sum(1).eq(2).all()


def test_the_bytes_are_those_of_the_tensors(encoder):
    found, weights = pruning_costs.form_bytes(SHAPES, SETTING), prunable(encoder)
    assert [tuple(weight.shape) for weight in weights.values()] == SHAPES

    def size(*tensors):
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    models = dict(pruning_costs.forms(encoder, SETTING))
    assert found[pruning_costs.DENSE] == found[zeros(0.9)] == size(*weights.values())
    for name in (csr(0.5), csr(0.9), bsr(0.5)):  # what torch's own sparse tensors hold
        sparse = [m.weight for m in models[name].modules() if isinstance(m, SparseLinear)]
        assert found[name] == size(*(part for w in sparse for part in (w.values(), w.col_indices(), w.crow_indices())))
    two = [
        pack_matrix(weight, pruning_costs.n_of_m(weight.detach().abs()), "2:4").values() for weight in weights.values()
    ]
    assert found[pruning_costs.TWO_OF_FOUR] == size(*(tensor for tensors in two for tensor in tensors))
    for name in (pruning_costs.HALF, pruning_costs.QUARTER):
        assert found[name] == size(*prunable(models[name]).values())
    for name in (pruning_costs.INT8, pruning_costs.HALF_INT8):
        int8 = [m for m in models[name].modules() if hasattr(m, "scale")]
        assert found[name] == size(*(tensor for m in int8 for tensor in (m.weight, m.scale)))


def test_a_small_run_has_every_row_and_can_be_read():
    setting = SETTING | {
        "tokens": 8, "matrices": [[64, 32]], "csr of a matrix": [0.5, 0.9], "rows": [0.5], "runs": 2,
        "sizes": ["MiniLM"], "classifier": False,
    }  # fmt: skip
    numbers = pruning_costs.run(setting, seed=0).numbers
    assert set(numbers["seconds"]) == {"64 x 32", "a layer of MiniLM"}
    for times in numbers["seconds"].values():
        assert all(0 < low <= median <= high for median, low, high in times.values())
    summary = {"runs": [numbers | {"setting": setting, "seed": 0}]}
    ratios = pruning_costs.speedups(summary, "64 x 32")
    assert ratios[pruning_costs.DENSE] == (1, 1, 1) and pruning_costs.rows(0.5) in ratios
    with pytest.raises(ValueError, match="what must be one of"):
        pruning_costs.speedups(summary, "64 x 64")


def test_ratios_are_taken_within_a_run():
    """A machine that is twice as slow in one run does not change them."""
    runs = [
        {"seconds": {"m": {pruning_costs.DENSE: [a, 0, 0], "other": [b, 0, 0]}}} for a, b in ((2, 1), (4, 2), (9, 3))
    ]
    assert pruning_costs.speedups({"runs": runs}, "m")["other"] == (2, 2, 3)
    assert pruning_costs.seconds_of({"runs": runs}, "m") == {pruning_costs.DENSE: 4, "other": 2}


def test_the_crossing_of_csr_and_dense():
    def summary(*seconds):
        times = {csr(s): [t] * 3 for s, t in zip((0.5, 0.75, 0.9), seconds, strict=True)}
        run = {"seconds": {"1 x 1": times | {pruning_costs.DENSE: [1.0] * 3}}}
        return {"runs": [run | {"setting": {"csr of a matrix": [0.5, 0.75, 0.9]}}] * 3}

    assert pruning_costs.csr_crossing(summary(2.0, 1.0, 0.4), "1 x 1") == pytest.approx(0.75)
    assert pruning_costs.csr_crossing(summary(4.0, 0.25, 0.1), "1 x 1") == pytest.approx(1 - 0.25 * 2**0.5)
    assert pruning_costs.csr_crossing(summary(4.0, 3.0, 2.0), "1 x 1") is None


def test_calls_take_turns_in_another_order_each():
    calls = []
    timings = pruning_costs.in_turns({name: lambda n=name: calls.append(n) for name in "abcd"}, 4, 0, warmup=1)
    rounds = [calls[i : i + 4] for i in range(0, 20, 4)]
    assert len(calls) == 20 and all(sorted(one) == list("abcd") for one in rounds) and len(set(map(tuple, rounds))) > 1
    assert all(timing.runs == 4 and timing.low <= timing.median <= timing.high for timing in timings.values())


# ------------------------------------------------------------------------ recorded


def test_zeros_in_a_dense_kernel_take_as_long_as_other_numbers():
    summary = load_results("pruning_costs")
    for what in ("a layer of MiniLM", "a layer of BERT-base", "the classifier"):
        found = pruning_costs.speedups(summary, what)
        for name in (zeros(0.9), pruning_costs.TWO_OF_FOUR):
            assert 0.9 < found[name][1] <= found[name][2] < 1.1, (what, name)


def test_structure_is_faster_in_every_run():
    summary = load_results("pruning_costs")
    for what in ("a layer of MiniLM", "a layer of BERT-base", "the classifier"):
        found = pruning_costs.speedups(summary, what)
        assert found[pruning_costs.HALF][1] > 1.7 and found[pruning_costs.QUARTER][1] > 2.8, what
        assert found[pruning_costs.HALF_INT8][1] > found[pruning_costs.INT8][2] > 2, what
    assert pruning_costs.speedups(summary, "the classifier")[pruning_costs.LAYERS][1] > 1.7


def test_csr_loses_at_half_and_wins_at_nine_tenths_held_the_right_way_round():
    summary = load_results("pruning_costs")
    for what in ("a layer of MiniLM", "a layer of BERT-base", "the classifier"):
        found = pruning_costs.speedups(summary, what)
        assert found[csr(0.5)][2] < 1 < found[csr(0.9)][1], what
        assert found[through_linear(csr(0.9))][2] < 1, what
        sizes = [run["bytes"][what] for run in summary["runs"]]
        assert all(s[csr(0.5)] > s[pruning_costs.DENSE] > s[csr(0.8)] for s in sizes)
    for what in ("1536 x 384", "3072 x 768"):
        assert 0.5 < pruning_costs.csr_crossing(summary, what) < 0.9
