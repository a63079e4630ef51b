"""MiniLM-L6 in 8 bits as others published it, to compare with our own: does a real artefact do what the lecture says?

The published file is an ONNX graph. For every weight it holds int8 codes q and a float32 scale per output channel (per
word in a table of embeddings), and computes

    W = Cast(q) * scale,   y = MatMul(x, W) + b

so it is symmetric, with Z = 0, and weight-only: arithmetic is in float32, the file is smaller. The matrices have lost
their names; each is found through the bias that is added to its product. Norms, biases, and the two segment embeddings
are float32; there is no pooler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnlp_lessons.datasets import sources
from effnlp_lessons.layers import with_layers
from effnlp_lessons.pretrained import rename_bert_state
from effnlp_lessons.quantization.post_training import QuantizedEmbedding, QuantizedLinear
from effnlp_lessons.quantization.quantizers import QuantizedMatrix
from effnlp_lessons.transformer import MINILM_L6, Encoder


def read_int8_graph(file: Path) -> tuple[dict[str, QuantizedMatrix], dict[str, Tensor]]:
    """The quantized matrices of an ONNX graph, and its other weights, under the names of our `Encoder`.

    A matrix is named as its weight, "blocks.0.token_mixer.query.weight", of shape (out, in).

    Raises:
        ValueError: a matrix that cannot be named, or a scale that does not belong to an output channel.
    """
    import onnx.numpy_helper  # here, since nothing else needs it

    graph = onnx.load(file).graph
    tensors = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    factors = {}  # name of W -> names of its codes and scales
    for node in graph.node:
        cast = made.get(node.input[0]) if node.op_type == "Mul" else None
        if cast is not None and cast.op_type == "Cast" and cast.input[0] in tensors and node.input[1] in tensors:
            factors[node.output[0]] = (cast.input[0], node.input[1])
    named = {name: name for name in factors if name.endswith(".weight")}  # tables keep their names
    for node in graph.node:
        products = [made[name] for name in node.input if name in made and made[name].op_type == "MatMul"]
        biases = [name for name in node.input if name in tensors and name.endswith(".bias")]
        if node.op_type == "Add" and products and biases:
            named[products[0].input[1]] = biases[0].removesuffix("bias") + "weight"
    matrices = {}
    for name, (codes, scale) in factors.items():
        if name not in named:
            raise ValueError(f"every matrix of {file.name} must have a bias added to its product, {name!r} has none")
        linear = name != named[name]  # W stands transposed in the graph, (in, out)
        q, s = (tensors[codes].T, tensors[scale].T) if linear else (tensors[codes], tensors[scale])
        if q.dtype != torch.int8 or s.shape != (len(q), 1):
            raise ValueError(f"{codes} must be int8 with one scale per row, got {q.dtype} and {tuple(s.shape)}")
        zero_point = torch.zeros_like(s, dtype=torch.int32)
        matrices[named[name]] = QuantizedMatrix(q.contiguous(), s.contiguous(), zero_point, 8, True, (1, q.shape[1]))
    rest = {name: tensor for name, tensor in tensors.items() if name.endswith((".weight", ".bias"))}
    return _renamed(matrices), _renamed(rest)


def _renamed(state: dict) -> dict:
    return rename_bert_state({name.removeprefix("inner."): tensor for name, tensor in state.items()})


def published_path() -> Path:
    return sources.path("minilm_int8", "model.onnx")


def load_published() -> Encoder:
    """The published 8-bit MiniLM-L6 as our encoder with quantized layers, in evaluation mode; it has no pooler.

    Raises:
        SourceError: if the file was not prepared yet.
    """
    matrices, rest = read_int8_graph(published_path())
    encoder = Encoder(replace(MINILM_L6, pooler=False))
    layers: dict[str, nn.Module] = {}
    for name, matrix in matrices.items():
        name = name.removesuffix(".weight")
        plain = encoder.get_submodule(name)
        linear = isinstance(plain, nn.Linear)
        layers[name] = QuantizedLinear(matrix, plain.bias) if linear else QuantizedEmbedding(matrix)
    encoder = with_layers(encoder, layers)
    codes = {
        name: tensor for name, tensor in encoder.state_dict().items() if name.endswith(("codes", "scale", "point"))
    }
    encoder.load_state_dict(codes | rest)
    return encoder.eval()


@dataclass(frozen=True)
class Agreement:
    """Two 8-bit versions of one weight, ours and another.

    Attributes:
        equal: share of the codes that are the same, 0 to 1.
        largest: the largest difference of two codes, in steps.
        scale: the largest relative difference of two scales.
        error, other_error: mean squared distance of each to the real weight.
    """

    equal: float
    largest: int
    scale: float
    error: float
    other_error: float


def agreement(weight: Float[Tensor, "rows columns"], ours: QuantizedMatrix, other: QuantizedMatrix) -> Agreement:
    """Compare two quantizations of `weight` code by code.

    Raises:
        ValueError: other shapes, or other blocks.
    """
    if not weight.shape == ours.codes.shape == other.codes.shape or ours.block != other.block:
        raise ValueError(
            f"shapes and blocks must agree, got {tuple(ours.codes.shape)} in {ours.block}, "
            f"{tuple(other.codes.shape)} in {other.block} of a weight {tuple(weight.shape)}"
        )
    weight, steps = weight.detach().double(), (ours.codes.int() - other.codes.int()).abs()
    error, other_error = ((weight - matrix.dequantize()).square().mean().item() for matrix in (ours, other))
    scale = ((ours.scale - other.scale).abs() / other.scale).max().item()
    return Agreement((steps == 0).double().mean().item(), int(steps.max()), scale, error, other_error)
