"""Forms on disk: bit for bit back, the bytes of the formula, torch's own CSR, and files that are not ours."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from effnlp_lessons.measure import bytes_on_disk
from effnlp_lessons.pruning.masks import apply_masks_, keep_top, local_masks, magnitudes, n_of_m
from effnlp_lessons.pruning.storage import (
    FORMS,
    load_pruned,
    matrix_bytes,
    pack_bits,
    pack_matrix,
    pruned_bytes_on_disk,
    save_pruned,
    unpack_bits,
    unpack_matrix,
)


def a_matrix(rows, columns, rate, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight, keep_top(weight.abs(), rate)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def size_of(packed):
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.values())


@given(st.integers(0, 9), st.integers(0, 13), st.floats(0, 1), st.sampled_from(FORMS[:-1]), st.integers(0, 9))
@settings(deadline=None, max_examples=80)
def test_there_and_back_bit_for_bit_in_the_bytes_of_the_formula(rows, columns, rate, form, seed):
    weight, mask = a_matrix(rows, columns, rate, seed)
    packed = pack_matrix(weight, mask, form)
    back, found = unpack_matrix(packed, (rows, columns), form)
    assert same_bits(back, torch.where(mask, weight, 0.0))
    assert form == "dense" or torch.equal(found, mask)
    assert size_of(packed) == matrix_bytes(form, rows, columns, int(mask.sum()))


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (5, 12), (3, 20)])
def test_two_of_four_there_and_back(rows, columns):
    weight, _ = a_matrix(rows, columns, 0)
    mask = n_of_m(weight.abs())
    packed = pack_matrix(weight, mask, "2:4")
    back, found = unpack_matrix(packed, (rows, columns), "2:4")
    assert torch.equal(found, mask) and same_bits(back, torch.where(mask, weight, 0.0))
    assert size_of(packed) == matrix_bytes("2:4", rows, columns, rows * columns // 2)


@pytest.mark.parametrize("form", FORMS[1:])
def test_kept_zeros_minus_zeros_and_nan_come_back(form):
    weight = torch.tensor([[0.0, -0.0, math.nan, 1.0]])
    mask = torch.tensor([[True, True, False, False]])
    back, found = unpack_matrix(pack_matrix(weight, mask, form), (1, 4), form)
    assert torch.equal(found, mask) and back.tolist() == [[0, 0, 0, 0]]
    assert torch.signbit(back).tolist() == [[False, True, False, False]]
    kept_nan = torch.tensor([[False, False, True, True]])
    assert math.isnan(unpack_matrix(pack_matrix(weight, kept_nan, form), (1, 4), form)[0][0, 2])


@pytest.mark.parametrize(("form", "dtype"), [("csr", torch.int32), ("csr64", torch.int64)])
def test_csr_is_torchs(form, dtype):
    weight, mask = a_matrix(7, 11, 0.6)
    packed, theirs = pack_matrix(weight, mask, form), (weight * mask).to_sparse_csr()
    assert torch.equal(packed["values"], theirs.values()) and packed["columns"].dtype == dtype
    assert torch.equal(packed["columns"].long(), theirs.col_indices())
    assert torch.equal(packed["starts"].long(), theirs.crow_indices())


def test_half_of_the_weights_in_csr_is_larger_than_all_of_them():
    size = {form: matrix_bytes(form, 3072, 768, 3072 * 768 // 2) / 1e6 for form in FORMS}
    rounded = {form: round(value, 2) for form, value in size.items()}
    assert rounded == {"dense": 9.44, "csr": 9.45, "csr64": 14.18, "bit mask": 5.01, "2:4": 5.01}
    tenth = {form: round(matrix_bytes(form, 3072, 768, 235_930) / 1e6, 2) for form in FORMS[1:4]}
    assert tenth == {"csr": 1.90, "csr64": 2.86, "bit mask": 1.24}


def test_bits():
    bits = torch.tensor([True, False, True, True, False, False, False, False, True])
    assert pack_bits(bits).tolist() == [13, 1]
    assert torch.equal(unpack_bits(pack_bits(bits), 9), bits)


# --------------------------------------------------------------------------------------------- files


def a_model():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.mark.parametrize("form", FORMS)
def test_a_model_there_and_back(form, tmp_path):
    model = a_model()
    scores = magnitudes(model)
    masks = {name: n_of_m(score) for name, score in scores.items()} if form == "2:4" else local_masks(scores, 0.7)
    size = save_pruned(model, masks, tmp_path / "model.safetensors", form)
    assert size == (tmp_path / "model.safetensors").stat().st_size == pruned_bytes_on_disk(model, masks, form)
    other = a_model()
    before = copy.deepcopy(other.state_dict())
    loaded, found = load_pruned(other, tmp_path / "model.safetensors")
    expected = copy.deepcopy(model)
    apply_masks_(expected, masks)
    for name, tensor in expected.state_dict().items():
        assert same_bits(loaded.state_dict()[name], tensor)
        assert torch.equal(other.state_dict()[name], before[name])
    assert form == "dense" or all(torch.equal(found[name], masks[name]) for name in masks)


def test_the_file_has_the_bytes_of_the_formula_beside_its_header():
    model = nn.Sequential(nn.Linear(256, 300, bias=False))
    masks = local_masks(magnitudes(model), 0.9)
    kept = int(masks["0.weight"].sum())
    sizes = {form: pruned_bytes_on_disk(model, masks, form) for form in FORMS[:-1]}
    for form, size in sizes.items():
        assert 0 <= size - matrix_bytes(form, 300, 256, kept) < 600
    assert sizes["bit mask"] < sizes["csr"] < sizes["csr64"] < sizes["dense"]
    assert abs(sizes["dense"] - bytes_on_disk(model)) < 600


def test_bad_files(tmp_path):
    model = a_model()
    masks, file = local_masks(magnitudes(model), 0.5), tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="no file"):
        load_pruned(model, file)
    file.write_bytes(b"not one")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pruned(model, file)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="not written by save_pruned"):
        load_pruned(model, file)
    save_pruned(model, masks, file, "csr")
    with pytest.raises(ValueError, match="of another model"):
        load_pruned(nn.Sequential(nn.Linear(12, 16)), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pruned(model, file)
    file.write_bytes(whole)
    tensors = load_file(file)
    tensors["0.weight.columns"] += 100
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=r"do not make a csr matrix of \(16, 12\)"):
        load_pruned(model, file)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("starts", lambda t: t + 1, "do not begin at 0"),
        ("starts", lambda t: t[:-1], "15 rows"),
        ("starts", lambda t: torch.cat([t[:1], t[-1:], t[1:-1]]), "do not begin at 0 and end at"),
        ("columns", lambda t: t - 12, r"not in 0 .. 11"),
        ("columns", lambda t: torch.cat([t[:2].flip(0), t[2:]]), "do not rise within a row"),
        ("columns", lambda t: torch.cat([t[:1], t[:1], t[2:]]), "do not rise within a row"),
        ("values", lambda t: t[1:], "values for"),
        ("values", lambda t: None, "'values'"),
        ("values", lambda t: t.double(), "is torch.float64, not torch.float32"),
    ],
)
def test_damaged_parts_of_csr(part, change, message, tmp_path):
    model, file = a_model(), tmp_path / "model.safetensors"
    save_pruned(model, local_masks(magnitudes(model), 0.5), file, "csr")
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    new = change(tensors.pop(f"0.weight.{part}"))
    save_file(tensors if new is None else tensors | {f"0.weight.{part}": new}, file, metadata)
    with pytest.raises(ValueError, match=message):
        load_pruned(model, file)


@pytest.mark.parametrize("damage", [{"shapes": "{"}, {"shapes": None}, {"form": None}, {"form": "coo"}])
def test_damaged_metadata(damage, tmp_path):
    model, file = a_model(), tmp_path / "model.safetensors"
    save_pruned(model, local_masks(magnitudes(model), 0.5), file, "csr")
    with safe_open(file, "pt") as opened:
        metadata = {key: value for key, value in (opened.metadata() | damage).items() if value is not None}
    save_file(load_file(file), file, metadata)
    with pytest.raises(ValueError, match="its metadata do not tell|form must be one of"):
        load_pruned(model, file)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: matrix_bytes("coo", 2, 2, 1), "form must be one of"),
        (lambda: matrix_bytes("csr", 2, 2, 5), "kept must be in 0 .. 4"),
        (lambda: matrix_bytes("2:4", 2, 4, 3), "2:4 needs rows"),
        (lambda: pack_matrix(torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool), "2:4"), "exactly two of every four"),
        (lambda: pack_matrix(torch.ones(2, 4), torch.ones(2, 4), "csr"), "mask must be bool"),
        (lambda: unpack_bits(torch.zeros(2, dtype=torch.uint8), 8), "8 bits take 1 bytes"),
        (lambda: save_pruned(a_model(), {}, "x", "csr"), "masks must name tensors of the model, got none"),
        (
            lambda: save_pruned(a_model(), {"9.weight": torch.ones(1, dtype=torch.bool)}, "x", "csr"),
            r"got \['9.weight'\]",
        ),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act()
