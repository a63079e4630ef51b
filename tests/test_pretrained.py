"""The published weights and the stored difference: names, exchange of parts, bad files; MiniLM-L3 as its graph says."""

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from effnlp_lessons.datasets import sources, tokenizer
from effnlp_lessons.heads import SentenceClassifier, mean_pool, sentence_vectors
from effnlp_lessons.measure import count_parameters
from effnlp_lessons.pretrained import apply_difference_, bert_state_of_onnx, load_minilm, load_minilm_l3
from effnlp_lessons.transformer import Encoder, TransformerConfig

SMALL = TransformerConfig(vocab_size=40, max_length=16, d_model=16, layers=2, heads=2, d_ff=24)


def test_bad_difference_files_are_named(tmp_path):
    model = SentenceClassifier(Encoder(SMALL), 2)
    with pytest.raises(FileNotFoundError, match="record it with `python -m effnlp_lessons.studies teacher`"):
        apply_difference_(model, tmp_path / "none.safetensors")
    save_file({"blocks.7.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="changes 'blocks.7.weight', which the model does not have"):
        apply_difference_(model, tmp_path / "other.safetensors")


def test_minilm_keeps_its_weights_when_the_channel_mixer_is_exchanged():
    encoder = load_minilm(channel_mixer=lambda config, layer: nn.Identity())
    assert torch.equal(encoder.blocks[3].token_mixer.query.weight, load_minilm().blocks[3].token_mixer.query.weight)


# --------------------------------------------------------------------------------------------- MiniLM-L3


@pytest.fixture(scope="module")
def minilm_l3() -> Encoder:
    return load_minilm_l3()


def test_minilm_l3_has_the_published_sizes(minilm_l3):
    embeddings = (30_522 + 512 + 2) * 384 + 2 * 384
    block = 4 * (384 * 384 + 384) + 2 * 384 * 1_536 + 1_536 + 384 + 4 * 384
    assert count_parameters(minilm_l3.blocks) == 3 * block == 5_323_392
    assert count_parameters(minilm_l3) == embeddings + 3 * block == 17_241_984
    assert minilm_l3.pooler is None and not any(module.training for module in minilm_l3.modules())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in minilm_l3.parameters())


def test_minilm_l3_computes_what_its_graph_does(minilm_l3):
    """The reference runs the graph itself, operation by operation, in NumPy."""
    file = sources.path("minilm_l3", "paraphrase-MiniLM-L3-v2.onnx")
    ids, mask = tokenizer.pad(tokenizer.encode(["Too long, and it knows it.", "A fun ride."]))
    inputs = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()}
    _, _, last, pooled = onnx.reference.ReferenceEvaluator(str(file)).run(None, inputs)
    with torch.no_grad():
        ours = minilm_l3(ids, mask).last
    assert last.shape == (2, 10, 384) and (~mask).sum() == 4
    # float32 sums in another order, values up to about 5
    torch.testing.assert_close(ours[mask], torch.from_numpy(last)[mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(mean_pool(ours, mask), torch.from_numpy(pooled), rtol=0, atol=1e-5)


def test_paraphrases_are_near(minilm_l3):
    texts = [
        "The film is a joy from start to finish.",
        "A delight, beginning to end, is this movie.",
        "Parliament passed the budget on Tuesday.",
        "On Tuesday lawmakers approved the budget.",
    ]
    with torch.no_grad():
        vectors = sentence_vectors(minilm_l3, *tokenizer.pad(tokenizer.encode(texts)))
    cosines = vectors @ vectors.T
    assert min(cosines[0, 1], cosines[2, 3]) > 0.4 > 0.2 > cosines[:2, 2:].max()


def graph_file(folder, *, unused=False, shared=False, without_bias=False):
    """Two linear layers as an exporter writes them, the second Add with its inputs the other way round."""
    generator = np.random.default_rng(0)
    shapes = {"auto_model.a.bias": 3, "auto_model.b.bias": 2, "MatMul_8": (3, 2), "MatMul_9": (4, 3)}
    values = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if unused:
        values["left_over"] = np.zeros(1, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "MatMul_9"], ["first"]),
        helper.make_node("Add", ["auto_model.a.bias", "first"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "MatMul_8"], ["second"]),
        helper.make_node("Add", ["second", "hidden" if without_bias else "auto_model.b.bias"], ["y"]),
    ]
    if shared:
        nodes.append(helper.make_node("MatMul", ["x", "MatMul_9"], ["again"]))
    if without_bias:
        del values["auto_model.b.bias"]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", ends[:1], ends[1:], tensors)), folder / "graph.onnx")
    return folder / "graph.onnx", values


def test_matrices_get_their_names_from_the_biases(tmp_path):
    file, values = graph_file(tmp_path)
    state = bert_state_of_onnx(file)
    assert sorted(state) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    for layer, matrix in (("a", "MatMul_9"), ("b", "MatMul_8")):
        np.testing.assert_array_equal(state[f"{layer}.weight"], values[matrix].T)
        np.testing.assert_array_equal(state[f"{layer}.bias"], values[f"auto_model.{layer}.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unused", "every tensor of graph.onnx must be used once, 'left_over' is used 0 times"),
        ("shared", "every tensor of graph.onnx must be used once, 'MatMul_9' is used 2 times"),
        ("without_bias", "every matrix of graph.onnx must have a bias added to its product, 'MatMul_8' has none"),
    ],
)
def test_a_graph_that_cannot_be_read_is_refused(tmp_path, change, message):
    file, _ = graph_file(tmp_path, **{change: True})
    with pytest.raises(ValueError, match=message):
        bert_state_of_onnx(file)
