"""Codes in the bits they need, and files of quantized models: what is claimed about size is bytes on disk.

A code of k bits kept as int8 costs 8 bits, and a "quantized" model saved as float32 costs 32. `pack_codes` puts codes
one behind the other: code i takes the bits k i .. k i + k - 1 of the stream, the lowest bit first, and the stream
fills bytes from their lowest bit. Any k from 2 to 8, without gaps: eight 3-bit codes take three bytes. Codes -1, 0, 1
take 2 bits, or 1.6 with `pack_trits`: five to a byte, since 3^5 = 243 < 256.

`save_quantized` writes a safetensors file: per quantized layer packed codes, packed zero points (affine only) and
scales in their own dtype, float32 for a float32 model; the rest of the model as it is. `load_quantized` brings all of
it back bit for bit. With a float32 scale for g codes, a weight costs k + 32 / g bits, and k / g more if affine.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from effnlp_lessons.layers import with_layers
from effnlp_lessons.quantization.post_training import QuantizedEmbedding, QuantizedLinear, quantized_layers
from effnlp_lessons.quantization.quantizers import QuantizedMatrix, block_of, check_bits
from effnlp_lessons.tensor_files import read_tensors
from effnlp_lessons.training import write_atomically

FORMAT = "effnlp quantized model, 1"
KINDS = {"linear": (QuantizedLinear, nn.Linear), "embedding": (QuantizedEmbedding, nn.Embedding)}
TRIT_WEIGHTS = 3 ** torch.arange(5)


def packed_bytes(count: int, bits: int) -> int:
    """How many bytes `count` codes of `bits` bits take: ceil(count bits / 8)."""
    return -(-count * bits // 8)


def pack_codes(codes: Int[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Codes of `bits` bits, in the order of their rows, without gaps; negative ones as two's complement.

    Raises:
        ValueError: bits out of range, codes that are no integers or do not fit, or both -1 and 2^(k-1) and above:
            signed and unsigned codes must not be mixed.
    """
    check_bits(bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes must be integers, got {codes.dtype}")
    if codes.numel():
        smallest, largest = int(codes.min()), int(codes.max())
        half = 2 ** (bits - 1)
        if not (0 <= smallest <= largest < 2 * half or -half <= smallest <= largest < half):
            raise ValueError(
                f"codes of {bits} bits are -{half} .. {half - 1} or 0 .. {2 * half - 1}, got {smallest} .. {largest}"
            )
    count = codes.numel()
    # eight codes fill `bits` bytes: they meet in one integer of 8 * bits <= 64 bits
    eights = torch.zeros(-(-count // 8) * 8, dtype=torch.int64)
    eights[:count] = codes.flatten().to(torch.int64) & (2**bits - 1)
    eights = eights.view(-1, 8)
    word = torch.zeros(len(eights), dtype=torch.int64)
    for i in range(8):
        word |= eights[:, i] << (bits * i)
    stream = torch.stack([(word >> (8 * i)) & 255 for i in range(bits)], dim=1).to(torch.uint8)
    return stream.flatten()[: packed_bytes(count, bits)].clone()


def unpack_codes(packed: UInt8[Tensor, " bytes"], bits: int, count: int, signed: bool = False) -> Int[Tensor, " count"]:
    """The inverse of `pack_codes`: `count` codes, uint8, or int8 if they are `signed`.

    Raises:
        ValueError: bits out of range, `packed` not uint8 or of another length than `count` codes take.
    """
    check_bits(bits)
    if packed.dtype != torch.uint8 or packed.ndim != 1 or count < 0 or len(packed) != packed_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes of uint8, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    stream = torch.zeros(-(-len(packed) // bits) * bits, dtype=torch.int64)
    stream[: len(packed)] = packed
    stream = stream.view(-1, bits)
    word = torch.zeros(len(stream), dtype=torch.int64)
    for i in range(bits):
        word |= stream[:, i] << (8 * i)
    codes = torch.stack([(word >> (bits * i)) & (2**bits - 1) for i in range(8)], dim=1).flatten()[:count]
    if signed:
        half = 2 ** (bits - 1)
        return torch.where(codes >= half, codes - 2 * half, codes).to(torch.int8)
    return codes.to(torch.uint8)


def pack_trits(codes: Int[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """Codes -1, 0, 1, five to a byte: sum of (q_i + 1) 3^i.

    Raises:
        ValueError: other codes.
    """
    if codes.is_floating_point() or not torch.isin(codes, torch.tensor([-1, 0, 1], dtype=codes.dtype)).all():
        raise ValueError("codes must be the integers -1, 0 and 1")
    fives = torch.zeros(-(-codes.numel() // 5) * 5, dtype=torch.int64)
    fives[: codes.numel()] = codes.flatten().to(torch.int64) + 1
    return (fives.view(-1, 5) * TRIT_WEIGHTS).sum(-1).to(torch.uint8)


def unpack_trits(packed: UInt8[Tensor, " bytes"], count: int) -> Int[Tensor, " count"]:
    """The inverse of `pack_trits`: `count` codes, int8.

    Raises:
        ValueError: `packed` is not uint8, of another length than `count` codes take, or holds a byte above 242.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 1 or count < 0 or len(packed) != -(-count // 5):
        raise ValueError(
            f"{count} codes take {-(-count // 5)} bytes of uint8, got {packed.dtype} {tuple(packed.shape)}"
        )
    if len(packed) and packed.max() > 242:
        raise ValueError(f"five codes of three make bytes of at most 242, got {int(packed.max())}")
    digits = packed.to(torch.int64)[:, None] // TRIT_WEIGHTS % 3
    return (digits.flatten()[:count] - 1).to(torch.int8)


# ------------------------------------------------------------------------------------------------- files


def save_quantized(model: nn.Module, file: Path | str) -> int:
    """Write a model with quantized layers to `file` (safetensors), codes packed, and return the size in bytes.

    The file appears as a whole or not at all.

    Raises:
        ValueError: if no layer of the model is quantized.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("model has no quantized layer: see post_training.quantize_linears")
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    described = {}
    for name, layer in layers.items():
        kind = next(kind for kind, (quantized, _) in KINDS.items() if isinstance(layer, quantized))
        described[name] = {
            "kind": kind,
            "bits": layer.bits,
            "symmetric": layer.symmetric,
            "block": layer.block,
            "shape": tuple(layer.codes.shape),
        }
        tensors[f"{name}.codes"] = pack_codes(layer.codes, layer.bits)
        zero_point = tensors.pop(f"{name}.zero_point")
        if not layer.symmetric:
            tensors[f"{name}.zero_point"] = pack_codes(zero_point, layer.bits)
    file, metadata = Path(file), {"format": FORMAT, "layers": json.dumps(described)}
    write_atomically(file, lambda path: save_file(tensors, path, metadata))
    return file.stat().st_size


def quantized_bytes_on_disk(model: nn.Module) -> int:
    """Size in bytes of the file of a model with quantized layers, found by writing it.

    `measure.bytes_on_disk` writes codes as they are in memory, a byte each.

    Raises:
        ValueError: if no layer of the model is quantized.
    """
    with tempfile.TemporaryDirectory() as folder:
        return save_quantized(model, Path(folder) / "model.safetensors")


def load_quantized(model: nn.Module, file: Path | str) -> nn.Module:
    """A copy of `model` with every quantized layer and every other tensor of a file of `save_quantized`.

    `model` gives the architecture, quantized or not; it stays as it is.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: a damaged file, a file of another kind, or of a model with other layers or shapes.
    """
    file = Path(file)
    metadata, tensors = read_tensors(file, FORMAT, "save_quantized")
    modules, layers = dict(model.named_modules()), {}
    for name, about in json.loads(metadata["layers"]).items():
        quantized, plain = KINDS[about["kind"]]
        module, shape = modules.get(name), tuple(about["shape"])
        if not isinstance(module, quantized | plain):
            raise ValueError(f"{file.name} is of another model: it has a quantized {about['kind']} {name!r}")
        has = tuple(module.codes.shape if isinstance(module, quantized) else module.weight.shape)
        if has != shape:
            raise ValueError(f"{file.name} is of another model: {name!r} is {shape} there, the model wants {has}")
        matrix = _matrix(tensors, name, about)
        bias = [] if getattr(module, "bias", None) is None else [module.bias]  # its numbers come with the rest
        layers[name] = quantized(matrix, *bias)
        tensors |= {f"{name}.codes": matrix.codes, f"{name}.zero_point": matrix.zero_point}
    loaded = with_layers(model, layers)
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in loaded.state_dict().items()}
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for name in (*expected, *found):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{file.name} is of another model: {name!r} is {found.get(name)} there, "
                f"the model wants {expected.get(name)}"
            )
    loaded.load_state_dict(tensors)
    return loaded


def _matrix(tensors: dict[str, Tensor], name: str, about: dict) -> QuantizedMatrix:
    """The `QuantizedMatrix` of one layer from the tensors of a file."""
    shape, bits, symmetric = tuple(about["shape"]), about["bits"], about["symmetric"]
    block = block_of(shape, tuple(about["block"]))
    for part in ("codes", "scale") if symmetric else ("codes", "scale", "zero_point"):
        if f"{name}.{part}" not in tensors:
            raise ValueError(f"the file has no tensor '{name}.{part}'")
    grids, scale = (shape[0] // block[0], shape[1] // block[1]), tensors[f"{name}.scale"]
    if scale.shape != grids:
        raise ValueError(f"'{name}.scale' must have the shape {grids}, got {tuple(scale.shape)}")
    codes = unpack_codes(tensors[f"{name}.codes"], bits, shape[0] * shape[1], signed=symmetric).view(shape)
    if symmetric:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        zero_point = unpack_codes(tensors[f"{name}.zero_point"], bits, scale.numel()).view(grids).to(torch.int32)
    return QuantizedMatrix(codes, scale, zero_point, bits, symmetric, block)
