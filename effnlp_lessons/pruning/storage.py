"""What a pruned matrix costs on disk, and back: dense, compressed sparse rows, a bit mask, 2:4.

n rows of m weights, k of them kept, float32:

    dense       4 n m                      every weight, zeros too
    csr         4 k + 4 k + 4 (n + 1)      values, their columns, and where each row begins; int32 numbers
    csr64       4 k + 8 k + 8 (n + 1)      the same with int64 numbers, as torch.sparse_csr has them
    bit mask    4 k + n m / 8              values, and one bit for each weight: kept or not
    2:4         4 k + k / 4                two values of every four, and 2 bits each for their places; k = n m / 2

CSR is smaller than dense below k = n m / 2 (int64: n m / 3), a bit mask almost as soon as anything is gone.
`save_pruned` writes the masked matrices of a model in one of these forms and all else as it is; `load_pruned` brings
the model back bit for bit. Where the mask is False the loaded weight is 0.0.

NOTE a quantized matrix with zeros is another matter: there values take few bits, and places cost relatively more.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import torch
from jaxtyping import Bool, Float, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from effnlp_lessons.pruning.masks import Masks
from effnlp_lessons.tensor_files import read_tensors
from effnlp_lessons.training import write_atomically

FORMS = ("dense", "csr", "csr64", "bit mask", "2:4")
FORMAT = "effnlp pruned model, 1"
INDEX = {"csr": torch.int32, "csr64": torch.int64}
SHIFTS = torch.arange(8, dtype=torch.uint8)


# --------------------------------------------------------------------------------------------- one matrix


def matrix_bytes(form: str, rows: int, columns: int, kept: int, value_bytes: int = 4) -> int:
    """Bytes of one matrix in a form of `FORMS`, without the file's header.

    Raises:
        ValueError: another form, counts that do not fit, or 2:4 with other than half of the weights kept.
    """
    _check_form(form)
    weights = rows * columns
    if min(rows, columns) < 0 or not 0 <= kept <= weights:
        raise ValueError(f"kept must be in 0 .. {weights} weights, got {kept}")
    if form == "dense":
        return value_bytes * weights
    if form == "bit mask":
        return value_bytes * kept + -(-weights // 8)
    if form == "2:4":
        if columns % 4 or 2 * kept != weights:
            raise ValueError(f"2:4 needs rows of a multiple of 4 with half kept, got {kept} of {rows} x {columns}")
        return value_bytes * kept + -(-kept // 4)
    return (value_bytes + INDEX[form].itemsize) * kept + INDEX[form].itemsize * (rows + 1)


def pack_bits(bits: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """Eight bits to a byte in the order of their rows, the lowest bit first."""
    padded = torch.zeros(-(-bits.numel() // 8) * 8, dtype=torch.uint8)
    padded[: bits.numel()] = bits.flatten()
    return (padded.view(-1, 8) << SHIFTS).sum(1).to(torch.uint8)


def unpack_bits(packed: UInt8[Tensor, " bytes"], count: int) -> Bool[Tensor, " count"]:
    """The inverse of `pack_bits`.

    Raises:
        ValueError: `packed` is not uint8, or of another length than `count` bits take.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 1 or len(packed) != -(-count // 8):
        raise ValueError(f"{count} bits take {-(-count // 8)} bytes, got {packed.dtype} {tuple(packed.shape)}")
    return ((packed[:, None] >> SHIFTS) & 1).bool().flatten()[:count]


def pack_matrix(
    weight: Float[Tensor, "rows columns"], mask: Bool[Tensor, "rows columns"], form: str
) -> dict[str, Tensor]:
    """The tensors that stand for a pruned matrix in a form of `FORMS`: what `unpack_matrix` takes.

    Raises:
        ValueError: another form, a mask that is not bool of the weight's shape, 2:4 with a mask that is not.
    """
    _check_form(form)
    if weight.ndim != 2 or mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(f"mask must be bool of the matrix's shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    weight = weight.detach()
    if form == "dense":
        return {"values": weight.masked_fill(~mask, 0.0)}
    values = weight[mask]  # row by row
    if form == "bit mask":
        return {"values": values, "bits": pack_bits(mask)}
    if form == "2:4":
        if weight.shape[1] % 4 or not (mask.view(-1, 4).sum(1) == 2).all():
            raise ValueError("2:4 needs a mask that keeps exactly two of every four neighbours in a row")
        place = mask.view(-1, 4).nonzero()[:, 1].to(torch.uint8)  # 0 .. 3, the two of a group in order
        return {"values": values, "places": pack_bits(((place[:, None] >> SHIFTS[:2]) & 1).bool())}
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return {"values": values, "columns": mask.nonzero()[:, 1].to(INDEX[form]), "starts": starts.to(INDEX[form])}


def unpack_matrix(
    packed: dict[str, Tensor], shape: tuple[int, int], form: str
) -> tuple[Float[Tensor, "rows columns"], Bool[Tensor, "rows columns"] | None]:
    """The matrix of `pack_matrix` and its mask; the dense form has no mask to give back, None.

    Raises:
        ValueError: another form, tensors that are missing or do not fit the shape.
    """
    _check_form(form)
    try:
        values = packed["values"]
        if form == "dense":
            if values.shape != shape:
                raise ValueError(f"values are {tuple(values.shape)}")
            return values.clone(), None
        mask = _mask_of(packed, shape, form)
        if len(values) != int(mask.sum()):
            raise ValueError(f"{len(values)} values for {int(mask.sum())} places")
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"the tensors do not make a {form} matrix of {shape}: {error}") from None
    weight = torch.zeros(shape, dtype=values.dtype)
    weight[mask] = values
    return weight, mask


def _mask_of(packed: dict[str, Tensor], shape: tuple[int, int], form: str) -> Tensor:
    rows, columns = shape
    if form == "bit mask":
        return unpack_bits(packed["bits"], rows * columns).view(shape)
    mask = torch.zeros(shape, dtype=torch.bool)
    if form == "2:4":
        bits = unpack_bits(packed["places"], rows * columns).view(-1, 2)  # n m / 2 places of two bits
        place = (bits.long() << torch.arange(2)).sum(1).view(-1, 2)
        return mask.view(-1, 4).scatter_(1, place, True).view(shape)
    starts, places = packed["starts"].long(), packed["columns"].long()
    if len(starts) != rows + 1 or starts[0] != 0 or starts[-1] != len(places):
        raise ValueError(f"{len(starts) - 1} rows that do not begin at 0 and end at {len(places)}")
    row = torch.arange(rows).repeat_interleave(starts.diff())
    # the values come in the order of the mask: columns must rise within a row
    if ((places < 0) | (places >= columns)).any() or ((row * columns + places).diff() <= 0).any():
        raise ValueError(f"columns that are not in 0 .. {columns - 1} or do not rise within a row")
    mask[row, places] = True
    return mask


# --------------------------------------------------------------------------------------------- whole models


def save_pruned(model: nn.Module, masks: Masks, file: Path | str, form: str) -> int:
    """Write `model` to `file` (safetensors), the matrices in `masks` in a form of `FORMS`; the size in bytes.

    The file appears as a whole or not at all.

    Raises:
        ValueError: no masks, a name that the model lacks, another form, masks that do not fit.
    """
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    if not masks or not set(masks) <= set(tensors):
        raise ValueError(f"masks must name tensors of the model, got {sorted(set(masks) - set(tensors)) or 'none'}")
    shapes = {}
    for name, mask in masks.items():
        matrix = tensors.pop(name)
        shapes[name] = tuple(matrix.shape)
        tensors |= {f"{name}.{part}": tensor for part, tensor in pack_matrix(matrix, mask, form).items()}
    metadata = {"format": FORMAT, "form": form, "shapes": json.dumps(shapes)}
    write_atomically(Path(file), lambda path: save_file(tensors, path, metadata))
    return Path(file).stat().st_size


def pruned_bytes_on_disk(model: nn.Module, masks: Masks, form: str) -> int:
    """Size in bytes of the file of `save_pruned`, found by writing it."""
    with tempfile.TemporaryDirectory() as folder:
        return save_pruned(model, masks, Path(folder) / "model.safetensors", form)


def load_pruned(model: nn.Module, file: Path | str) -> tuple[nn.Module, Masks]:
    """A copy of `model` with the weights of a file of `save_pruned`, and the masks; the dense form has none.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: a damaged file, a file of another kind or of another model.
    """
    file = Path(file)
    metadata, tensors = read_tensors(file, FORMAT, "save_pruned")
    try:
        shapes, form = json.loads(metadata["shapes"]), metadata["form"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file.name} is damaged, its metadata do not tell shapes and form: {error}") from None
    masks: Masks = {}
    for name, shape in shapes.items():
        parts = {part: tensors.pop(f"{name}.{part}") for part in _parts_of(tensors, name)}
        tensors[name], mask = unpack_matrix(parts, tuple(shape), form)
        if mask is not None:
            masks[name] = mask
    loaded = copy.deepcopy(model)
    for name, wanted in loaded.state_dict().items():
        if name in tensors and tensors[name].dtype != wanted.dtype:  # torch would convert it silently
            raise ValueError(f"{file.name} is of another model: {name!r} is {tensors[name].dtype}, not {wanted.dtype}")
    try:
        loaded.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{file.name} is of another model: {error}") from None
    return loaded, masks


def _parts_of(tensors: dict[str, Tensor], name: str) -> list[str]:
    return [key.removeprefix(f"{name}.") for key in tensors if key.startswith(f"{name}.")]


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
