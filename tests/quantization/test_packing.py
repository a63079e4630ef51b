"""Packed codes against Python's own integers, and files of quantized models: bit for bit, and what is refused."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.layers import block_linears
from effnlp_lessons.measure import bytes_on_disk
from effnlp_lessons.quantization import packing
from effnlp_lessons.quantization.packing import (
    load_quantized,
    pack_codes,
    pack_trits,
    packed_bytes,
    quantized_bytes_on_disk,
    save_quantized,
    unpack_codes,
    unpack_trits,
)
from effnlp_lessons.quantization.post_training import quantize_embeddings, quantize_linears, quantized_layers
from effnlp_lessons.transformer import Encoder, TransformerConfig

CONFIG = TransformerConfig(vocab_size=40, max_length=16, d_model=24, layers=2, heads=4, d_ff=36)
IDS = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(1))

# -------------------------------------------------------------------------------------------------- codes


@given(st.integers(2, 8), st.booleans(), st.data())
def test_the_stream_is_one_long_number(bits, signed, data):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    codes = data.draw(st.lists(st.integers(low, high), max_size=40))
    packed = pack_codes(torch.tensor(codes, dtype=torch.int64), bits)
    number = sum((code % 2**bits) << (bits * i) for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == number.to_bytes(packed_bytes(len(codes), bits), "little")
    unpacked = unpack_codes(packed, bits, len(codes), signed)
    assert unpacked.tolist() == codes and unpacked.dtype == (torch.int8 if signed else torch.uint8)


def test_golden_bytes():
    assert pack_codes(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack_codes(torch.tensor([-1, 0, 1, -1, 1]), 2).tolist() == [0b11_01_00_11, 0b01]
    # 3 bits: 001 010 011 100 101 110 111 000, the last first: 00011111 01011000 11010001
    assert pack_codes(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [0b11010001, 0b01011000, 0b00011111]
    assert pack_codes(torch.tensor([-128, 127], dtype=torch.int8), 8).tolist() == [0x80, 0x7F]


def test_sizes():
    sizes = [(0, 3, 0), (1, 3, 1), (8, 3, 3), (9, 3, 4), (147_456, 4, 73_728), (5, 2, 2)]
    for count, bits, size in sizes:
        assert packed_bytes(count, bits) == size == len(pack_codes(torch.zeros(count, dtype=torch.uint8), bits))


def test_rows_of_a_matrix_and_views():
    codes = torch.randint(-7, 8, (6, 10), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    view = codes.T[1:, ::2]
    assert torch.equal(unpack_codes(pack_codes(view, 4), 4, view.numel(), signed=True).view(view.shape), view)


@given(st.lists(st.integers(-1, 1), max_size=40))
def test_trits(codes):
    packed = pack_trits(torch.tensor(codes, dtype=torch.int8))
    assert len(packed) == (len(codes) + 4) // 5
    assert unpack_trits(packed, len(codes)).tolist() == codes
    padded = codes + [-1] * (-len(codes) % 5)
    fives = [padded[i : i + 5] for i in range(0, len(padded), 5)]
    assert packed.tolist() == [sum((q + 1) * 3**i for i, q in enumerate(five)) for five in fives]


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        ([16], 4, "got 16 .. 16"),
        ([-9], 4, "got -9"),
        ([-1, 8], 4, "got -1 .. 8"),  # signed and unsigned at once
        ([1.0], 4, "integers"),
        ([True], 4, "integers"),
        ([1], 1, "bits"),
        ([1], 9, "bits"),
    ],
)
def test_codes_that_do_not_fit(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack_codes(torch.tensor(codes), bits)


def test_streams_that_do_not_fit():
    packed = pack_codes(torch.arange(5), 3)
    for bad, count in ((packed, 6), (packed, 2), (packed, -1), (packed.int(), 5), (packed[None], 5)):
        with pytest.raises(ValueError, match="take"):
            unpack_codes(bad, 3, count)
    for bad, count in ((packed, 3), (packed.int(), 10)):
        with pytest.raises(ValueError, match="take"):
            unpack_trits(bad, count)
    with pytest.raises(ValueError, match="got 243"):
        unpack_trits(torch.tensor([243], dtype=torch.uint8), 5)
    for codes in (torch.tensor([2]), torch.tensor([0.0])):
        with pytest.raises(ValueError, match="-1, 0 and 1"):
            pack_trits(codes)


# -------------------------------------------------------------------------------------------------- files


def classifier(seed=0, **changes):
    config = TransformerConfig(**vars(CONFIG) | changes)
    return SentenceClassifier(Encoder(config, seed=seed), classes=3, seed=seed).eval()


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "granularity"), [(8, "row"), (4, 6), (3, "tensor"), (2, (12, 4)), ({0: 5, 1: 2}, "row")]
)
def test_a_file_brings_back_every_bit(tmp_path, bits, granularity, symmetric):
    model = quantize_linears(classifier(), bits, granularity, symmetric)
    if granularity == "row":
        model = quantize_embeddings(model, 3, symmetric=symmetric, names=["encoder.embeddings.tokens"])
    size = save_quantized(model, tmp_path / "new" / "model.safetensors")
    assert size == (tmp_path / "new" / "model.safetensors").stat().st_size
    other = classifier(seed=5)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for architecture in (other, model, quantize_linears(other, 8)):
        loaded = load_quantized(architecture, tmp_path / "new" / "model.safetensors")
        assert same_state(loaded, model) and torch.equal(loaded(IDS), model(IDS))
        for name, layer in quantized_layers(model).items():
            again = loaded.get_submodule(name)
            assert (again.bits, again.symmetric, again.block) == (layer.bits, layer.symmetric, layer.block)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert loaded.encoder.blocks[0].token_mixer.query.bias.requires_grad


def test_the_size_is_that_of_the_codes(tmp_path):
    file = tmp_path / "model.safetensors"
    sizes = {}
    for bits in (8, 4, 3, 2):
        for granularity in ("row", 6):
            for symmetric in (True, False):
                model = quantize_linears(classifier(), bits, granularity, symmetric)
                save_quantized(model, file)
                with safe_open(file, "pt") as opened:
                    sizes[bits, granularity, symmetric] = sum(
                        opened.get_tensor(name).nbytes
                        for name in opened.keys()  # noqa: SIM118
                    )
    weights = 2 * (4 * 24 * 24 + 2 * 24 * 36)
    rest = sum(p.nbytes for p in classifier().parameters()) - 4 * weights
    for (bits, granularity, symmetric), size in sizes.items():
        each = (24, 24, 24, 24, 36, 24) if granularity == "row" else (96, 96, 96, 96, 144, 144)
        zero_points = 0 if symmetric else sum(-(-grids * bits // 8) for grids in each)  # each layer begins a byte
        assert size == rest + weights * bits // 8 + 2 * (4 * sum(each) + zero_points)


def test_the_size_without_keeping_a_file(tmp_path):
    model = quantize_linears(classifier(), 4)
    assert quantized_bytes_on_disk(model) == save_quantized(model, tmp_path / "a") < bytes_on_disk(model)


def test_shared_tensors_and_float64(tmp_path):
    model = quantize_linears(classifier().double(), 4)
    model.encoder.blocks[1].token_norm.weight = model.encoder.blocks[0].token_norm.weight
    save_quantized(model, tmp_path / "a")
    loaded = load_quantized(classifier().double(), tmp_path / "a")
    assert torch.equal(loaded(IDS), model(IDS)) and loaded(IDS).dtype == torch.float64
    with pytest.raises(ValueError, match="another model.*float64.*float32"):
        load_quantized(classifier(), tmp_path / "a")


def test_nothing_is_lost_when_writing_fails(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    save_quantized(quantize_linears(classifier(), 4), file)
    before = file.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(packing, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_quantized(quantize_linears(classifier(), 8), file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_a_damaged_file(tmp_path):
    model, file = classifier(), tmp_path / "model.safetensors"
    save_quantized(quantize_linears(model, 4), file)
    content = file.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="model.safetensors is not a readable"):
            load_quantized(model, file)
    with pytest.raises(FileNotFoundError, match="no file"):
        load_quantized(model, tmp_path / "none")
    save_file({"head.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="not written by save_quantized"):
        load_quantized(model, file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 1}, "quantized linear 'encoder.blocks.1"),
        ({"d_model": 36}, r"'encoder.blocks.0.token_mixer.query' is \(24, 24\) there, the model wants \(36, 36\)"),
        ({"d_ff": 12}, "channel_mixer.expand"),
        ({"vocab_size": 41}, "embeddings.tokens.weight"),
        ({"layers": 3}, "blocks.2.* is None there"),
    ],
)
def test_a_file_of_another_model(tmp_path, changes, message):
    save_quantized(quantize_linears(classifier(), 4), tmp_path / "a")
    other = classifier(**changes)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"of another model.*{message}"):
        load_quantized(other, tmp_path / "a")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_tensors_that_are_missing_or_too_many(tmp_path):
    model, file = quantize_linears(classifier(), 4, symmetric=False), tmp_path / "a"
    save_quantized(model, file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    layer = block_linears(classifier())[0]
    for name in (f"{layer}.codes", f"{layer}.scale", f"{layer}.zero_point", f"{layer}.bias", "head.weight"):
        save_file({other: tensors[other] for other in tensors if other != name}, file, metadata)
        with pytest.raises(ValueError, match=name):
            load_quantized(classifier(), file)
    save_file(tensors | {"more": torch.zeros(1)}, file, metadata)
    with pytest.raises(ValueError, match="more"):
        load_quantized(classifier(), file)
    for part, tensor, message in (
        ("codes", tensors[f"{layer}.codes"][:-1], "576 codes of 4 bits take 288 bytes"),
        ("scale", torch.ones(3, 1), r"scale' must have the shape \(24, 1\)"),
        ("zero_point", torch.ones(3, dtype=torch.uint8), "24 codes of 4 bits take 12"),
    ):
        save_file(tensors | {f"{layer}.{part}": tensor.clone()}, file, metadata)
        with pytest.raises(ValueError, match=message):
            load_quantized(classifier(), file)


def test_a_model_without_quantized_layers(tmp_path):
    with pytest.raises(ValueError, match="no quantized layer"):
        save_quantized(classifier(), tmp_path / "a")
    assert not os.listdir(tmp_path)
