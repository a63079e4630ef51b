"""The guard must fire on every way in which a floating number gets into an integer computation."""

import warnings

import pytest
import torch

from effnlp_lessons.quantization.float_guard import FloatInIntegerPath, no_floats

INTS, FLOATS = torch.arange(1, 7, dtype=torch.int32), torch.arange(1.0, 7.0)
COMPLEX = torch.complex(FLOATS, FLOATS)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch announces the end of these tensors
    QUANTIZED = torch._make_per_tensor_quantized_tensor(INTS.to(torch.uint8), 0.1, 3)
LEAKS = {
    "a float operand": lambda: FLOATS + INTS,
    "a float that is only read": lambda: FLOATS > 1,
    "a float that is only viewed": lambda: FLOATS[1:],
    ".float()": lambda: INTS.float(),
    ".to(half)": lambda: INTS.to(torch.float16),
    "bfloat16": lambda: INTS.bfloat16(),
    "float64": lambda: INTS.double(),
    "true division": lambda: INTS / 2,
    "division of integer tensors": lambda: INTS / INTS,
    "sqrt": lambda: INTS.sqrt(),
    "softmax": lambda: INTS.softmax(0, dtype=torch.float32),
    "a new tensor": lambda: torch.zeros(3),
    "a mean": lambda: INTS.mean(dtype=torch.float32),
    "a Python float": lambda: INTS * 0.5,
    "a comparison with a Python float": lambda: INTS > 0.5,
    "in place": lambda: torch.empty(0, dtype=torch.int32).copy_(FLOATS[:0]),
    "in a list": lambda: torch.cat([INTS, FLOATS]),
    "out=": lambda: torch.add(INTS, INTS, out=FLOATS.clone()),
    "complex": lambda: COMPLEX[1:],
    "a Python complex": lambda: INTS == 1j,
    "item()": lambda: FLOATS[0].item(),
    "a quantized tensor": lambda: QUANTIZED.int_repr(),
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("inference", [False, True])
def test_fires(leak, inference):
    with torch.inference_mode(inference):
        LEAKS[leak]()
        with pytest.raises(FloatInIntegerPath, match="integer-only"), no_floats():
            LEAKS[leak]()


def test_names_the_operation_and_the_type():
    with pytest.raises(FloatInIntegerPath, match=r"aten::div.* makes torch\.float32"), no_floats():
        INTS / 2
    with pytest.raises(FloatInIntegerPath, match=r"aten::mul\.?.* reads the Python number 0\.5"), no_floats():
        INTS * 0.5
    assert issubclass(FloatInIntegerPath, RuntimeError)


def test_lets_integers_and_booleans_pass():
    codes = torch.arange(-8, 8, dtype=torch.int8).view(4, 4)
    with no_floats():
        product = torch._int_mm(codes, codes.t())
        x = (product.long() * 3 + 2**4 >> 5).clamp(-128, 127).to(torch.int8)
        x = torch.where(x > 0, x, -x).div(3, rounding_mode="floor")
        x = torch.cat([x, codes.to(torch.uint8).to(torch.int8)]).sum(-1, dtype=torch.int32)
        assert x[0].item() == x.tolist()[0]
        assert not (x == x.max()).all()


def test_floats_return_after_the_guard():
    with no_floats():
        pass
    assert (FLOATS / 2).sum() > 0
    with pytest.raises(FloatInIntegerPath), no_floats():
        INTS.float()
    assert (FLOATS / 2).sum() > 0
