"""Models with quantized weights against their float model with the same rounded weights put in, and by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effnlp_lessons.heads import MaskedLanguageModel, SentenceClassifier
from effnlp_lessons.layers import block_linears, block_of_name
from effnlp_lessons.measure import count_macs, transformer_macs
from effnlp_lessons.quantization.post_training import (
    QuantizedEmbedding,
    QuantizedLinear,
    quantize_embeddings,
    quantize_linears,
    quantized_layers,
    signal_to_noise,
)
from effnlp_lessons.quantization.quantizers import quantize_matrix
from effnlp_lessons.quantization.ranges import mean_squared_error, percentile
from effnlp_lessons.transformer import MINILM_L6, Encoder, TransformerConfig

CONFIG = TransformerConfig(vocab_size=40, max_length=16, d_model=24, layers=3, heads=4, d_ff=36, dropout=0.2)
IDS = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(1))


def classifier(seed=0):
    model, generator = SentenceClassifier(Encoder(CONFIG, seed=seed), classes=3), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


# ------------------------------------------------------------------------------------------- which layers


def test_names_of_blocks():
    assert block_of_name("encoder.blocks.11.token_mixer.query") == 11
    assert block_of_name("blocks.0.channel_mixer.expand") == 0
    for name in ("encoder.pooler", "head", "subblocks.3.x", "blocks.3", ""):
        assert block_of_name(name) is None


def test_the_36_linear_layers_of_minilm():
    with torch.device("meta"):
        model = SentenceClassifier(Encoder(MINILM_L6), classes=2)
    names = block_linears(model)
    assert len(names) == 36 and not any("pooler" in name or "head" in name for name in names)
    assert sum(model.get_submodule(name).weight.numel() for name in names) == 6 * (4 * 384**2 + 2 * 384 * 1536)


def test_only_the_chosen_layers_change():
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    assert set(quantized_layers(quantize_linears(model, 4))) == set(block_linears(model))
    for names in (["head"], ("encoder.pooler", "encoder.blocks.1.token_mixer.key")):
        assert set(quantized_layers(quantize_linears(model, 4, names=names))) == set(names)
    tables = {"encoder.embeddings.tokens", "encoder.embeddings.positions", "encoder.embeddings.segments"}
    quantized = quantize_embeddings(quantize_linears(model, 4), 8)
    assert set(quantized_layers(quantized)) == tables | set(block_linears(model))
    assert set(quantized_layers(quantize_embeddings(model, 8, names=["encoder.embeddings.tokens"]))) < tables
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    quantized = quantize_linears(model, 4)
    quantized.get_parameter("head.weight").data.zero_()
    quantized.get_parameter("encoder.blocks.0.token_mixer.query.bias").data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in quantized.modules())
    assert all(module.training for module in quantize_linears(model.train(), 4).modules())


def test_bits_by_block_and_by_name():
    model = classifier()
    quantized = quantized_layers(quantize_linears(model, {0: 8, 1: 3, 2: 2}))
    assert {block_of_name(name): layer.bits for name, layer in quantized.items()} == {0: 8, 1: 3, 2: 2}
    for name, layer in quantized.items():
        expected = quantize_matrix(model.get_submodule(name).weight, layer.bits)
        assert torch.equal(layer.codes, expected.codes)
    by_name = quantize_linears(model, lambda name: 8 if name.endswith("value") else 4)
    assert all(layer.bits == (8 if "value" in name else 4) for name, layer in quantized_layers(by_name).items())


# ------------------------------------------------------------------------------------- what they compute


@pytest.mark.parametrize("granularity", ["tensor", "row", 6, (12, 4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_float_model_with_rounded_weights(granularity, symmetric):
    model = classifier()
    quantized = quantize_linears(model, 4, granularity, symmetric, percentile(0.95))
    blocks = {"tensor": "tensor", "row": "row", 6: 6, (12, 4): (2, 4)}  # positions and segments have few rows
    quantized = quantize_embeddings(quantized, 3, blocks[granularity], symmetric)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name in block_linears(model):
            weight = rounded.get_submodule(name).weight
            weight.copy_(quantize_matrix(weight, 4, granularity, symmetric, percentile(0.95)).dequantize())
        for table in rounded.encoder.embeddings.children():
            if isinstance(table, nn.Embedding):
                matrix = quantize_matrix(table.weight, 3, blocks[granularity], symmetric)
                table.weight.copy_(matrix.dequantize())
    assert torch.equal(quantized(IDS), rounded(IDS))
    assert not torch.equal(quantized(IDS), model(IDS))


def test_embeddings_of_every_block_shape():
    table = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 11, 5], [4, 4, 7]])
    for granularity in ("tensor", "row", 5, (3, 2), (12, 1), (1, 10)):
        layer = QuantizedEmbedding(quantize_matrix(table, 3, granularity, symmetric=False))
        assert torch.equal(layer(ids), F.embedding(ids, layer.weight))
        assert layer(ids[:0]).shape == (0, 3, 10)


def test_without_a_bias_and_in_float64():
    linear = nn.Linear(10, 6, bias=False, dtype=torch.float64)
    quantized = quantize_linears(nn.Sequential(linear), 8, names=["0"])
    x = torch.randn(2, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert quantized[0].bias is None and quantized(x).dtype == torch.float64
    # the error of an 8-bit weight is at most half a step
    bound = (x.abs().sum(-1, keepdim=True) * linear.weight.abs().amax(-1) / 127 / 2).detach()
    assert ((quantized(x) - linear(x)).abs() <= bound * (1 + 1e-12)).all()


def test_more_bits_and_smaller_groups_are_nearer():
    model = classifier()

    def distance(*arguments, **options):
        return (quantize_linears(model, *arguments, **options)(IDS) - model(IDS)).abs().max().item()

    assert distance(8) < distance(4) < distance(2)
    noise = {
        granularity: signal_to_noise(model, quantize_linears(model, 4, granularity))
        for granularity in ("tensor", "row", 6)
    }
    for name in block_linears(model):
        assert noise["tensor"][name] < noise["row"][name] < noise[6][name]


def test_signal_to_noise_by_hand():
    model = nn.Sequential(nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.7, 0.25]]))  # 3 bits: S = 0.7 / 3, codes 3, 1
    quantized = quantize_linears(model, 3, names=["0"])
    assert quantized[0].codes.tolist() == [[3, 1]]
    expected = 10 * math.log10((0.49 + 0.0625) / (0.25 - 0.7 / 3) ** 2)
    assert signal_to_noise(model, quantized)["0"] == pytest.approx(expected, rel=1e-5)
    exact = nn.Sequential(nn.Linear(1, 1))
    with torch.no_grad():
        exact[0].weight.fill_(3.0)
    assert signal_to_noise(exact, quantize_linears(exact, 3, names=["0"])) == {"0": math.inf}


def test_the_least_error_rule_has_the_least_error():
    model = classifier()
    plain = signal_to_noise(model, quantize_linears(model, 3))
    searched = signal_to_noise(model, quantize_linears(model, 3, ranges=mean_squared_error(3)))
    assert all(searched[name] >= plain[name] for name in plain)


def test_macs_stay_what_they_were():
    model = classifier()
    quantized = quantize_embeddings(quantize_linears(model, 4, 6, symmetric=False), 8)
    mask = torch.ones(IDS.shape, dtype=torch.bool)
    assert count_macs(quantized, IDS, mask) == count_macs(model, IDS, mask)
    parts = count_macs(quantized, IDS, mask).by_part()
    assert {name: parts[name] for name in parts if name != "head"} == transformer_macs(CONFIG, *IDS.shape)


def test_a_tied_table_is_read_through_its_codes():
    model = MaskedLanguageModel(Encoder(CONFIG)).eval()
    quantized = quantize_embeddings(model, 4)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for table in rounded.encoder.embeddings.children():
            if isinstance(table, nn.Embedding):
                table.weight.copy_(quantize_matrix(table.weight, 4).dequantize())
    assert torch.equal(quantized(IDS), rounded(IDS))


def test_one_layer_in_two_places_stays_one():
    shared = nn.Linear(4, 4)
    quantized = quantize_linears(nn.Sequential(shared, nn.ReLU(), shared), 8, names=["0"])
    assert isinstance(quantized[0], QuantizedLinear) and quantized[2] is quantized[0]


def test_gradients_reach_the_input_and_the_bias():
    layer = QuantizedLinear(quantize_matrix(torch.randn(3, 4), 4), torch.zeros(3))
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(2, 4)) and torch.equal(
        layer.bias.grad, torch.full((3,), 2.0)
    )


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": {0: 4, 1: 4}}, "no entry for block 2"),
        ({"bits": {0: 4, 1: 4, 2: 16}}, "bits"),
        ({"bits": lambda name: 4.0}, "bits"),
        ({"bits": {0: 4}, "names": ["head"]}, "no entry for block None"),
        ({"bits": 4, "names": ["encoder.nothing"]}, "'encoder.nothing' must be an nn.Linear .* nothing"),
        ({"bits": 4, "names": ["encoder.embeddings.tokens"]}, "must be an nn.Linear of the model, it is Embedding"),
        ({"bits": 4, "names": []}, "at least one"),
        ({"bits": 4, "names": "head"}, "collection"),
        ({"bits": 4, "granularity": 7}, "does not divide"),
        ({"bits": 4, "granularity": "column"}, "granularity"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        quantize_linears(classifier(), **options)


def test_models_without_such_layers():
    with pytest.raises(ValueError, match="at least one nn.Linear"):
        quantize_linears(nn.Sequential(nn.Linear(2, 2)), 4)
    with pytest.raises(ValueError, match="at least one nn.Embedding"):
        quantize_embeddings(nn.Sequential(nn.Linear(2, 2)), 4)
    with pytest.raises(ValueError, match="at least one nn.Linear"):
        quantize_linears(quantize_linears(classifier(), 4), 4)
    model = classifier()
    with torch.no_grad():
        model.encoder.blocks[1].token_mixer.key.weight[0, 0] = math.nan
    with pytest.raises(ValueError):
        quantize_linears(model, 4)
