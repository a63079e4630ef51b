"""The trained models of the course: MiniLM-L6 and MiniLM-L3 as published, and the teacher, MiniLM on movie reviews.

MiniLM-L6 is all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957; Reimers and Gurevych 2019, 1908.10084). MiniLM-L3
is paraphrase-MiniLM-L3-v2, a compact model of the same width and vocabulary, published as an ONNX graph.
The teacher is MiniLM plus a small difference, kept in `data/checkpoints/teacher.safetensors`: for every
linear layer a low-rank product W + up @ down (Hu et al. 2021, LoRA, 2106.09685), and the new head whole.
It was trained by `python -m effnlp_lessons.studies teacher`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from effnlp_lessons import paths
from effnlp_lessons.datasets import sources
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.transformer import MINILM_L6, Encoder, MixerFactory, TransformerConfig

if TYPE_CHECKING:
    from collections.abc import Callable

MINILM_L3 = TransformerConfig(layers=3, pooler=False)

# transformers' BERT names, piece by piece -> ours
BERT_NAMES = {
    "encoder.layer.": "blocks.",
    "embeddings.word_embeddings": "embeddings.tokens",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.token_type_embeddings": "embeddings.segments",
    "embeddings.LayerNorm": "embeddings.norm",
    "attention.self": "token_mixer",
    "attention.output.dense": "token_mixer.output",
    "attention.output.LayerNorm": "token_norm",
    "intermediate.dense": "channel_mixer.expand",
    "output.dense": "channel_mixer.contract",
    "output.LayerNorm": "channel_norm",
    "pooler.dense": "pooler",
}


def rename_bert_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' `BertModel` under the names of our `Encoder`; no tensor is copied."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in BERT_NAMES.items():  # in this order: attention's output before the block's
            name = name.replace(theirs, ours)
        if not name.endswith("position_ids"):  # 0, 1, 2, ...: a buffer of older files
            renamed[name] = tensor
    return renamed


def load_minilm(
    *,
    attention: Callable[..., Tensor] | None = None,
    token_mixer: MixerFactory | None = None,
    channel_mixer: MixerFactory | None = None,
) -> Encoder:
    """MiniLM-L6 with its published weights (float32), in evaluation mode.

    `attention` may exchange the attention method: it has no weights, so the published ones stay in use.
    With another token or channel mixer the weights that no longer have a place are left out, and the new
    mixer keeps its own initialisation.

    Raises:
        SourceError: if the weights were not prepared yet.
    """
    encoder = Encoder(MINILM_L6, attention=attention, token_mixer=token_mixer, channel_mixer=channel_mixer)
    state = rename_bert_state(load_file(sources.path("minilm", "model.safetensors")))
    encoder.load_state_dict(state, strict=token_mixer is None and channel_mixer is None)
    return encoder.eval()


def load_minilm_l3() -> Encoder:
    """MiniLM-L3 with its published weights (float32), in evaluation mode. It has no pooler: none was published.

    Raises:
        SourceError: if the weights were not prepared yet.
    """
    state = bert_state_of_onnx(sources.path("minilm_l3", "paraphrase-MiniLM-L3-v2.onnx"))
    encoder = Encoder(MINILM_L3)
    encoder.load_state_dict(rename_bert_state(state))
    return encoder.eval()


def bert_state_of_onnx(file: Path) -> dict[str, Tensor]:
    """The weights in an ONNX graph of a sentence encoder, under the names of transformers' `BertModel`.

    A linear layer x Wᵀ + b stands there as Add(b, MatMul(x, M)). M = Wᵀ has lost its name, b has kept it.

    Raises:
        ValueError: if a tensor is not used exactly once, or a matrix cannot be named through its bias.
    """
    import onnx.numpy_helper  # here, since nothing else needs it

    graph = onnx.load(file).graph
    tensors = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input if name in tensors)
    for name in tensors:
        if uses[name] != 1:
            raise ValueError(f"every tensor of {file.name} must be used once, {name!r} is used {uses[name]} times")
    products = {}  # output of a MatMul -> its matrix
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            products[node.output[0]] = node.input[1]
    weights = {}  # matrix -> name of W
    for node in graph.node:
        if node.op_type == "Add":
            biases = [name for name in node.input if name in tensors and name.endswith(".bias")]
            matrices = [products[name] for name in node.input if name in products]
            if biases and matrices:
                weights[matrices[0]] = biases[0].removesuffix("bias") + "weight"
    unnamed = sorted(set(products.values()) - set(weights))
    if unnamed:
        raise ValueError(f"every matrix of {file.name} must have a bias added to its product, {unnamed[0]!r} has none")
    state = {weights.get(name, name): tensor.T if name in weights else tensor for name, tensor in tensors.items()}
    return {name.partition("auto_model.")[2]: tensor for name, tensor in state.items()}


def teacher_path() -> Path:
    return paths.checkpoints_dir() / "teacher.safetensors"


def apply_difference_(model: SentenceClassifier, file: Path) -> None:
    """Add the stored difference to `model` in place: low-rank pairs are added, other tensors replaced.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file names a parameter that the model does not have.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file.name} is missing: record it with `python -m effnlp_lessons.studies teacher`")
    stored, parameters = load_file(file), dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in stored.items():
            target = name.removesuffix(".down").removesuffix(".up")
            if target not in parameters:
                raise ValueError(f"{file.name} changes {target!r}, which the model does not have")
            if name.endswith(".up"):
                parameters[target] += tensor.float() @ stored[target + ".down"].float()  # W + up @ down
            elif not name.endswith(".down"):
                parameters[target].copy_(tensor)


def load_teacher(*, attention: Callable[..., Tensor] | None = None) -> SentenceClassifier:
    """The course's teacher: logits (batch, 2) for negative, positive; float32, in evaluation mode.

    `attention` exchanges the attention method, as in `load_minilm`: it has no weights.
    """
    model = SentenceClassifier(load_minilm(attention=attention), classes=2)
    apply_difference_(model, teacher_path())
    return model.eval()


def teacher_logits() -> Tensor:
    """The teacher's cached logits (10605, 2) float32, row by row in the order of `load_reviews()`."""
    return load_file(paths.checkpoints_dir() / "teacher_logits.safetensors")["logits"].float()
