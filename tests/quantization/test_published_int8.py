"""A published 8-bit MiniLM against our own 8 bits, and our reading of it against its graph."""

import dataclasses

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from effnlp_lessons.datasets import tokenizer
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.quantization.packing import save_quantized
from effnlp_lessons.quantization.post_training import quantize_embeddings, quantize_linears, quantized_layers
from effnlp_lessons.quantization.published_int8 import (
    agreement,
    load_published,
    published_path,
    read_int8_graph,
)
from effnlp_lessons.quantization.quantizers import min_max, quantize_matrix
from effnlp_lessons.transformer import Encoder


@pytest.fixture(scope="module")
def published() -> Encoder:
    return load_published()


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    return load_minilm()


def test_what_is_quantized(published):
    matrices, rest = read_int8_graph(published_path())
    assert len(matrices) == 38 and sum(m.codes.numel() for m in matrices.values()) == 22_533_888
    assert {m.block for m in matrices.values()} == {(1, 384), (1, 1536)}
    assert len(rest) == 36 + 2 * 13 + 1 and all(tensor.dtype == torch.float32 for tensor in rest.values())
    assert len(quantized_layers(published)) == 38 and published.pooler is None and not published.training


def test_its_other_weights_are_those_of_minilm(published, minilm):
    state = minilm.state_dict()
    for name, tensor in published.named_parameters():
        assert torch.equal(tensor, state[name])
    assert torch.equal(published.embeddings.segments.weight, minilm.embeddings.segments.weight)


def test_every_code_is_the_one_that_we_find(published, minilm):
    """Rows, Z = 0, scale max|w| / 127, half to even: somebody else's file has the lecture's definition, bit for bit."""
    for name, layer in quantized_layers(published).items():
        weight = minilm.get_submodule(name).weight
        ours = quantize_matrix(weight, 8)
        found = agreement(weight, ours, layer.matrix)
        assert (found.equal, found.largest, found.scale) == (1.0, 0, 0.0), name
        assert found.error == found.other_error > 0
        assert torch.equal(ours.scale, layer.scale)


def test_another_convention_finds_other_codes(published, minilm):
    def wide(values):  # S = max|w| / 127.5, as torch.ao's symmetric observer has it
        low, high = min_max(values)
        return low * 127 / 127.5, high * 127 / 127.5

    name = "blocks.0.token_mixer.query"
    weight, layer = minilm.get_submodule(name).weight, published.get_submodule(name)
    found = agreement(weight, quantize_matrix(weight, 8, ranges=wide), layer.matrix)
    assert 0.8 < found.equal < 0.95 and found.largest == 1 and found.scale == pytest.approx(0.5 / 127.5, rel=1e-4)
    found = agreement(weight, quantize_matrix(weight, 7), layer.matrix)
    assert found.largest == 64 and found.error > 3 * found.other_error


def test_our_file_is_as_small(published, minilm, tmp_path):
    ours = quantize_embeddings(quantize_linears(minilm, 8), 8, names=["embeddings.tokens", "embeddings.positions"])
    ours.pooler = None
    size = save_quantized(ours, tmp_path / "ours")
    assert size == save_quantized(published, tmp_path / "published")
    theirs = published_path().stat().st_size
    assert abs(size - theirs) < 0.002 * theirs  # the same numbers; the rest is each format's own


def test_it_computes_what_its_graph_does(published):
    """The reference runs the graph itself, operation by operation, in NumPy."""
    ids, mask = tokenizer.pad(tokenizer.encode(["Too long, and it knows it.", "A fun ride."]))
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()}
    inputs["token_type_ids"] = np.zeros_like(ids.numpy())
    [last] = onnx.reference.ReferenceEvaluator(str(published_path())).run(None, inputs)
    with torch.no_grad():
        ours = published(ids, mask).last
    assert last.shape == (2, 10, 384) and (~mask).sum() == 4
    # float32 sums in another order, values up to about 2
    torch.testing.assert_close(ours[mask], torch.from_numpy(last)[mask], rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------- small graphs


def graph_file(folder, *, without_bias=False, scales=(1, 3), dtype=np.int8):
    """A table and a linear layer, quantized as the published ones are."""
    generator = np.random.default_rng(0)
    values = {
        "inner.t.weight_q": generator.integers(-127, 128, (5, 4)).astype(np.int8),
        "inner.t.weight_scale": generator.random((5, 1), np.float32),
        "val_q": generator.integers(0, 100, (4, 3)).astype(dtype),
        "val_scale": generator.random(scales, np.float32),
        "inner.a.bias": generator.random(3, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["inner.t.weight_q"], ["t_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["t_f", "inner.t.weight_scale"], ["inner.t.weight"]),
        helper.make_node("Cast", ["val_q"], ["val_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["val_f", "val_scale"], ["val"]),
        helper.make_node("Gather", ["inner.t.weight", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "val"], ["product"]),
        helper.make_node("Add", ["inner.a.bias", "product" if not without_bias else "x"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("ids", "y")]
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", ends[:1], ends[1:], tensors)), folder / "graph.onnx")
    return folder / "graph.onnx", values


def test_matrices_get_their_names_from_the_biases(tmp_path):
    file, values = graph_file(tmp_path)
    matrices, rest = read_int8_graph(file)
    assert sorted(matrices) == ["a.weight", "t.weight"] and list(rest) == ["a.bias"]
    np.testing.assert_array_equal(matrices["a.weight"].codes, values["val_q"].T)
    np.testing.assert_array_equal(matrices["a.weight"].dequantize(), (values["val_q"] * values["val_scale"]).T)
    table = values["inner.t.weight_q"] * values["inner.t.weight_scale"]
    np.testing.assert_array_equal(matrices["t.weight"].dequantize(), table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"without_bias": True}, "every matrix of graph.onnx must have a bias added to its product, 'val' has none"),
        ({"scales": (1, 1)}, r"val_q must be int8 with one scale per row, got torch.int8 and \(1, 1\)"),
        ({"scales": (4, 1)}, "one scale per row"),
        ({"dtype": np.uint8}, "must be int8 .* got torch.uint8"),
    ],
)
def test_a_graph_of_another_kind_is_refused(tmp_path, change, message):
    file, _ = graph_file(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        read_int8_graph(file)


def test_agreement_by_hand():
    weight = torch.tensor([[0.0, 1.0, 2.0, 127.0]])
    ours = quantize_matrix(weight, 8)  # S = 1
    other = dataclasses.replace(ours, codes=torch.tensor([[0, -2, 2, 126]], dtype=torch.int8), scale=ours.scale * 1.25)
    found = agreement(weight, ours, other)
    assert (found.equal, found.largest, found.error) == (0.5, 3, 0.0)
    assert found.scale == pytest.approx(0.2) and found.other_error == (3.5**2 + 0.5**2 + 30.5**2) / 4
    with pytest.raises(ValueError, match="must agree"):
        agreement(weight, ours, quantize_matrix(weight, 8, 2))
    with pytest.raises(ValueError, match="must agree"):
        agreement(weight.T, ours, ours)
