"""Q-BERT: curvature of layers against whole Hessians, bits under a budget, groups by hand, the paper's sizes."""

import itertools
import statistics

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from safetensors import safe_open
from torch.func import functional_call
from transformers import BertConfig, BertModel

from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.layers import block_linears
from effnlp_lessons.measure import count_parameters
from effnlp_lessons.quantization.hessian import flatten, unflatten
from effnlp_lessons.quantization.packing import save_quantized
from effnlp_lessons.quantization.post_training import quantize_linears, quantized_layers
from effnlp_lessons.quantization.qbert import (
    allocate_bits,
    block_bytes,
    layer_sensitivities,
    papers_size,
    quantize_groups,
    row_groups,
    sensitivity,
)
from effnlp_lessons.quantization.quantizers import affine_quantizer
from effnlp_lessons.quantization.ranges import percentile
from effnlp_lessons.transformer import BERT_BASE, MINILM_L6, Encoder, TransformerConfig

TINY = TransformerConfig(
    vocab_size=11, max_length=6, d_model=4, layers=2, heads=2, d_ff=6, segments=0, pooler=True, dropout=0.3
)


def classifier(seed=0, config=TINY, scale=0.4):
    """In float64 and evaluation mode, all parameters of ordinary size."""
    model, generator = SentenceClassifier(Encoder(config), classes=2), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


def batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(1, 11, mask.shape, generator=generator) * mask
    return ids, mask, torch.randint(0, 2, (len(lengths),), generator=generator)


def rows(given, start, end):
    return tuple(part[start:end] for part in given)


# ------------------------------------------------------------------------------------------- sensitivity


def test_omega_is_the_mean_without_its_sign_plus_the_standard_deviation_of_the_population():
    eigenvalues = torch.tensor([[1.0, 2.0, 6.0], [-4.0, -4.0, -4.0], [-3.0, 3.0, 0.0]], dtype=torch.float64)
    expected = [abs(statistics.fmean(row)) + statistics.pstdev(row) for row in eigenvalues.tolist()]
    assert sensitivity(eigenvalues).tolist() == pytest.approx(expected)
    assert sensitivity(eigenvalues[1]).item() == 4  # the sign is taken off the mean, not off the values
    assert sensitivity(eigenvalues[2]).item() == pytest.approx(6**0.5)
    assert sensitivity(torch.tensor([[-2.5]])).tolist() == [2.5]  # one subset has no spread, and no NaN
    with pytest.raises(ValueError, match="eigenvalues must be .* with a subset"):
        sensitivity(torch.zeros(3, 0))


def largest_by_whole_hessian(model, block, given):
    names = [f"encoder.blocks.{block}.{name}" for name, _ in model.encoder.blocks[block].named_parameters()]
    weights = [model.get_parameter(name).detach() for name in names]

    def loss(flat):
        replaced = dict(zip(names, unflatten(flat, weights), strict=True))
        return F.cross_entropy(functional_call(model, replaced, given[:2]), given[2])

    eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flatten(weights)))
    return eigenvalues[eigenvalues.abs().argmax()].item()


def test_sensitivities_are_those_of_the_whole_hessians():
    model, first, second = classifier(), batch([6, 4, 5, 2], 1), batch([3, 6, 1], 2)
    found = layer_sensitivities(model, [[first], [second]], iterations=100)
    assert found.eigenvalues.shape == found.residuals.shape == (2, 2)
    for layer, subset in itertools.product(range(2), range(2)):
        wanted = largest_by_whole_hessian(model, layer, (first, second)[subset])
        assert found.eigenvalues[layer, subset].item() == pytest.approx(wanted, rel=1e-6), (layer, subset)
        assert found.residuals[layer, subset] < 1e-3 * abs(wanted)
    assert torch.equal(found.omega, sensitivity(found.eigenvalues))


def test_a_subset_is_the_mean_over_its_sentences_whatever_its_batches():
    """Batches of unequal size: a mean of the batches' means would be another loss."""
    model, whole = classifier(), batch([5, 5, 5, 5, 5], 3)
    cut = [rows(whole, 0, 1), rows(whole, 1, 5)]
    # from one start the same vectors, after however few products
    together, apart, first = (layer_sensitivities(model, [subset], iterations=3) for subset in ([whole], cut, cut[:1]))
    torch.testing.assert_close(apart.eigenvalues, together.eigenvalues)
    assert (first.eigenvalues - together.eigenvalues).abs().min() > 1e-6


def test_the_seed_decides_and_the_model_stays_as_it_was():
    model, subsets, state = classifier(), [[batch([4, 3])]], torch.random.get_rng_state()
    model.head.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    first, again, other = (
        layer_sensitivities(model, subsets, iterations=1, seed=seed).eigenvalues for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.grad is None


def test_other_blocks_and_another_loss():
    model, given = classifier(), batch([4, 3])

    def doubled(model, batch):
        return 2 * F.cross_entropy(model(*batch[:2]), batch[2])

    blocks = [model.encoder.blocks[1], model.head]
    found = layer_sensitivities(model, [[given]], iterations=100, blocks=blocks, loss=doubled).eigenvalues
    assert found[0].item() == pytest.approx(2 * largest_by_whole_hessian(model, 1, given), rel=1e-6)
    assert found.shape == (2, 1) and found[1] > 0  # cross-entropy of a linear layer is convex


def test_a_model_with_dropout_on_and_empty_subsets_are_refused():
    model, given = classifier(), batch([4, 3])
    model.encoder.blocks[1].dropout.train()
    with pytest.raises(ValueError, match=r"model must be in evaluation mode, dropout off: call model.eval\(\)"):
        layer_sensitivities(model, [[given]])
    model.eval()
    for subsets in ([], [[]], [[given], []]):
        with pytest.raises(ValueError, match="subsets must hold at least one subset, each with at least one batch"):
            layer_sensitivities(model, subsets)
    # and after an error too the model is as it was
    with pytest.raises(IndexError):
        layer_sensitivities(model, [[(given[0] + 100, *given[1:])]])
    assert all(parameter.requires_grad for parameter in model.parameters())


# -------------------------------------------------------------------------------------------------- bits


def test_the_most_sensitive_layers_get_more_bits():
    assert allocate_bits([1.0, 5.0, 3.0, 0.1], count=2) == [2, 3, 3, 2]
    assert allocate_bits(torch.tensor([1.0, 5.0, 3.0]), 4, 8, count=1) == [4, 8, 4]
    assert allocate_bits([1.0, 5.0], count=0) == [2, 2] and allocate_bits([1.0, 5.0], count=2) == [3, 3]
    assert allocate_bits([2.0, 2.0, 2.0], count=1) == [3, 2, 2]  # of equal ones the earlier
    assert allocate_bits([], count=0) == []


def test_a_budget_in_bytes():
    sizes = {2: [20, 40, 20], 3: [30, 60, 30]}
    omega = [1.0, 3.0, 2.0]
    for budget, bits in ((80, [2, 2, 2]), (99, [2, 2, 2]), (100, [2, 3, 2]), (110, [2, 3, 3]), (120, [3, 3, 3])):
        assert allocate_bits(omega, budget=budget, sizes=sizes) == bits, budget
    assert allocate_bits([1.0, 2.0, 3.0, 4.0], budget=49, sizes=lambda bits: 5 * bits) == [2, 2, 2, 3]
    with pytest.raises(ValueError, match="budget of 79 bytes is too small: 2 bits everywhere take 80"):
        allocate_bits(omega, budget=79, sizes=sizes)


@given(st.data())
def test_budgets_are_kept_and_no_layer_has_more_bits_than_a_more_sensitive_one(data):
    layers = data.draw(st.integers(1, 6))
    omega = data.draw(st.lists(st.floats(0, 10), min_size=layers, max_size=layers))
    small = data.draw(st.lists(st.integers(1, 20), min_size=layers, max_size=layers))
    extra = data.draw(st.lists(st.integers(0, 20), min_size=layers, max_size=layers))
    budget = sum(small) + data.draw(st.integers(0, 80))
    large = [a + b for a, b in zip(small, extra, strict=True)]
    bits = allocate_bits(omega, 2, 4, budget=budget, sizes={2: small, 4: large})

    def total(bits):
        return sum({2: small, 4: large}[b][i] for i, b in enumerate(bits))

    assert total(bits) <= budget
    assert all(bits[i] >= bits[j] for i in range(layers) for j in range(layers) if omega[i] > omega[j])
    if 2 in bits:  # the next one would not have fitted
        following = max((i for i in range(layers) if bits[i] == 2), key=lambda i: (omega[i], -i))
        assert total([*bits[:following], 4, *bits[following + 1 :]]) > budget


def test_bad_allocations_are_named():
    for options in ({}, {"count": 1, "budget": 100}):
        with pytest.raises(ValueError, match="give either count or budget"):
            allocate_bits([1.0, 2.0], **options)
    with pytest.raises(ValueError, match=r"count must be in 0 .. 2, got 3"):
        allocate_bits([1.0, 2.0], count=3)
    with pytest.raises(ValueError, match="a budget needs sizes"):
        allocate_bits([1.0, 2.0], budget=10)
    with pytest.raises(ValueError, match="low must be at most high, got 4 and 2"):
        allocate_bits([1.0], 4, 2, count=1)
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 1"):
        allocate_bits([1.0], 1, 2, count=1)
    for omega in ([1.0, float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="sensitivities must be one finite number a layer"):
            allocate_bits(omega, count=1)


# ------------------------------------------------------------------------------------------------ groups


def test_groups_of_bert_base():
    assert row_groups((768, 768), 128) == (6, 768)  # the paper's; 64 rows a head are no multiple of 6
    assert row_groups((768, 768), 12) == (64, 768) and row_groups((768, 768), 24) == (32, 768)
    assert row_groups((768, 768), 768) == (1, 768) and row_groups((3_072, 768), 1) == (3_072, 768)
    for groups in (0, 100, 1_536):
        with pytest.raises(ValueError, match=f"groups must divide the 768 rows of the matrix, got {groups}"):
            row_groups((768, 768), groups)


@pytest.mark.parametrize(("groups", "ranges"), [(1, None), (2, None), (4, percentile(0.9)), (8, None)])
def test_every_group_of_rows_has_its_own_range(groups, ranges):
    config = TransformerConfig(**vars(TINY) | {"d_model": 8, "d_ff": 24})
    model = classifier(config=config).float()
    options = {} if ranges is None else {"ranges": ranges}
    quantized = quantize_groups(model, 3, groups, embedding_bits=None, **options)
    for name in block_linears(model):
        weight, found = model.get_submodule(name).weight, quantized.get_submodule(name)
        for part, own in zip(weight.chunk(groups), found.weight.chunk(groups), strict=True):
            low, high = part.min(), part.max()
            if ranges is not None:
                low, high = (bound[0] for bound in ranges(part.reshape(1, -1)))
            assert torch.equal(own, affine_quantizer(low, high, 3)(part)), name
            assert len(own.unique()) <= 8
        assert torch.equal(found.bias, model.get_submodule(name).bias)
    assert all(isinstance(table, torch.nn.Embedding) for table in (quantized.encoder.embeddings.tokens,))
    assert torch.equal(quantized.head.weight, model.head.weight)


def test_bits_of_layers_and_of_embeddings():
    model = classifier().float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = quantize_groups(model, {0: 2, 1: 4}, 2)
    layers = quantized_layers(quantized)
    assert len(layers) == 6 * 2 + 2
    for name, layer in layers.items():
        assert layer.bits == (2 if ".0." in name else 4 if ".1." in name else 8) and not layer.symmetric
    table = model.encoder.embeddings.tokens.weight
    ids = torch.arange(11)
    expected = affine_quantizer(table.min(), table.max(), 8)(table)
    assert torch.equal(quantized.encoder.embeddings.tokens(ids), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    by_name = quantize_groups(model, lambda name: 3 if name.endswith("query") else 8, 2, embedding_bits=4)
    bits = {name.split(".")[-1]: layer.bits for name, layer in quantized_layers(by_name).items()}
    assert bits["query"] == 3 and bits["expand"] == 8 and bits["tokens"] == 4
    with pytest.raises(ValueError, match="groups must divide the 4 rows"):
        quantize_groups(model, 2, 3)


def test_finer_groups_err_less():
    model = classifier(config=TransformerConfig(**vars(TINY) | {"d_model": 16, "d_ff": 32}))
    errors = []
    for groups in (1, 4, 16):
        quantized = quantize_groups(model, 2, groups)
        errors.append(
            sum((model.get_submodule(n).weight - quantized.get_submodule(n).weight).square().sum().item()
                for n in block_linears(model))
        )  # fmt: skip
    assert errors[0] > errors[1] > errors[2]


# ------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("bits", "embedding_bits", "encoder", "total"),
    [
        (32, 32, 324.46, 415.4), (8, 8, 81.1, 103.8), (4, 8, 40.6, 63.3), (3, 8, 30.4, 53.2), (2, 8, 20.3, 43.0),
        ([3] * 6 + [2] * 6, 8, 25.3, 48.1), ([4, 2] * 6, 8, 30.4, 53.2),
    ],
)  # fmt: skip
def test_the_papers_sizes_of_bert_base(bits, embedding_bits, encoder, total):
    found = papers_size(BERT_BASE, bits, embedding_bits)
    assert found["encoder"] == pytest.approx(encoder, abs=0.1) and found["total"] == pytest.approx(total, abs=0.1)
    assert found["total"] == found["encoder"] + found["embeddings"]


def test_sizes_count_all_parameters_of_encoder_and_embeddings():
    with torch.device("meta"):
        bert = BertModel(BertConfig(), add_pooling_layer=False)
        mini = Encoder(MINILM_L6)
    found = papers_size(BERT_BASE, 32, 32)
    assert found["embeddings"] == pytest.approx(90.93, abs=0.005)
    assert found["embeddings"] * 2**20 / 4 == count_parameters(bert.embeddings) == 23_837_184
    assert found["encoder"] * 2**20 / 4 == count_parameters(bert.encoder) == 12 * 7_087_872
    assert papers_size(MINILM_L6, 8, 8)["encoder"] * 2**20 == count_parameters(mini.blocks)
    assert papers_size(BERT_BASE, 32, 32)["encoder"] / papers_size(BERT_BASE, 2.5, 8)["encoder"] == 12.8  # "13 x"


def test_bad_sizes_are_named():
    for bits, embedding_bits in (([2, 3], 8), (0, 8), (2, 0)):
        with pytest.raises(ValueError, match="bits must be positive, one number or 12, got"):
            papers_size(BERT_BASE, bits, embedding_bits)
    with pytest.raises(ValueError, match="granularity 100 does not divide"):
        block_bytes(MINILM_L6, 2, 100)
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8, got 9"):
        block_bytes(MINILM_L6, 9)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "bits"), [("row", 3), (6, 2), ("tensor", 5), ((2, 3), 7)])
def test_bytes_of_a_layer_are_those_of_its_file(tmp_path, granularity, bits, symmetric):
    config = TransformerConfig(**vars(TINY) | {"d_model": 6, "d_ff": 18})
    model = classifier(config=config).float()
    save_quantized(quantize_linears(model, bits, granularity, symmetric), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys() if ".blocks.1." in name)  # noqa: SIM118
    assert block_bytes(config, bits, granularity, symmetric) == stored
