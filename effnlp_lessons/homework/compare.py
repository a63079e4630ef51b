"""Compare an answer with the expected one and say in words where they part: form first, then values.

Answers are numbers, words, tensors, and tuples, lists or dictionaries of these. Numbers agree within a
tolerance that belongs to their type; NaN agrees with NaN alone.
"""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Two right answers may add in a different order. relative, absolute:
TOLERANCE = {
    torch.float64: (1e-7, 1e-9),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (2e-2, 1e-2),
}
SHOWN_VALUES = 12  # a tensor with more values than this is shown by its shape, a difference by its place


def form_problem(expected: Any, got: Any, place: str = "your function") -> str | None:
    """What is wrong with the type, length, keys, shape or dtype of `got`, in words; None if nothing."""
    given = f"{place} returned {_article(got)}"
    if isinstance(expected, Tensor):
        if not isinstance(got, Tensor):
            return f"{given}; it should return a tensor of shape {tuple(expected.shape)}"
        if got.shape != expected.shape:
            return f"{place} returned shape {tuple(got.shape)}; it should be {tuple(expected.shape)}"
        if got.dtype != expected.dtype:
            return f"{place} returned dtype {_dtype(got)}; it should be {_dtype(expected)}"
        return None
    if isinstance(got, Tensor) and isinstance(expected, (bool, Real, str)):
        return f"{given}; it should return a plain {type(expected).__name__} (.item() makes one)"
    if isinstance(expected, bool):
        return None if isinstance(got, (bool, np.bool_)) else f"{given}; it should return True or False"
    if isinstance(expected, Integral):
        if isinstance(got, Integral) and not isinstance(got, (bool, np.bool_)):
            return None
        reason = " (a count is whole: use // and not /)" if isinstance(got, float) else ""
        return f"{given}; it should return an int{reason}"
    if isinstance(expected, Real):
        right = isinstance(got, Real) and not isinstance(got, (bool, np.bool_))
        return None if right else f"{given}; it should return a number"
    if isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)):
            return f"{given}; it should return {len(expected)} values"
        if len(got) != len(expected):
            return f"{place} returned {len(got)} values; it should return {len(expected)}"
        return _first(
            form_problem(wanted, had, f"{place}, in value {number},")
            for number, (wanted, had) in enumerate(zip(expected, got, strict=True), start=1)
        )
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            return f"{given}; it should return a dictionary"
        if set(got) != set(expected):
            keys = sorted(map(str, got)), sorted(map(str, expected))
            return f"{place} returned the keys {keys[0]}; they should be {keys[1]}"
        return _first(form_problem(expected[key], got[key], f"{place}, under {key!r},") for key in expected)
    right = isinstance(got, type(expected))
    return None if right else f"{given}; it should return {_article(expected)}"


def difference(expected: Any, got: Any) -> tuple[str, str] | None:
    """Expected and got in words, where their values differ; None if they agree. Same form required."""
    if isinstance(expected, Tensor):
        return _tensor_difference(expected, got)
    if isinstance(expected, (tuple, list)):
        return _first(
            _placed(difference(wanted, had), f"value {number}: ")
            for number, (wanted, had) in enumerate(zip(expected, got, strict=True), start=1)
        )
    if isinstance(expected, dict):
        return _first(_placed(difference(expected[key], got[key]), f"{key!r}: ") for key in expected)
    if isinstance(expected, Real) and not isinstance(expected, (bool, Integral)):
        both_nan = math.isnan(expected) and math.isnan(got)
        agree = both_nan or math.isclose(expected, got, rel_tol=TOLERANCE[torch.float64][0], abs_tol=1e-12)
    else:
        agree = bool(expected == got)
    if agree:
        return None
    texts = show(expected), show(got)
    return texts if texts[0] != texts[1] else (repr(expected), repr(got))


def same(one: Any, other: Any) -> bool:
    """True if the two have the same form and agree within the tolerance."""
    return form_problem(one, other) is None and difference(one, other) is None


def show(value: Any) -> str:
    """A value on one line, short enough to read: 22,713,216 · 0.4375 · tensor of shape (3, 7, 5), float32."""
    if isinstance(value, Tensor):
        if value.numel() > SHOWN_VALUES:
            return f"tensor of shape {tuple(value.shape)}, {_dtype(value)}"
        return f"{_nested(value.tolist())} ({_dtype(value)})"
    if isinstance(value, (bool, np.bool_, str)):
        return repr(value)
    if isinstance(value, Integral):
        return f"{int(value):,}"
    if isinstance(value, Real):
        return f"{float(value):.6g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        left, right = "[]" if isinstance(value, list) else "()"
        return left + ", ".join(map(show, value)) + right
    return repr(value)


def _tensor_difference(expected: Tensor, got: Tensor) -> tuple[str, str] | None:
    relative, absolute = TOLERANCE.get(expected.dtype, (0.0, 0.0))
    expected, got = expected.detach(), got.detach()
    wrong = ~torch.isclose(got, expected, rtol=relative, atol=absolute, equal_nan=True)
    if not wrong.any():
        return None
    if expected.numel() <= SHOWN_VALUES:
        return show(expected), show(got)
    index = tuple(wrong.nonzero()[0].tolist())
    place = f"at [{', '.join(map(str, index))}]: "
    count = f" ({int(wrong.sum()):,} of {wrong.numel():,} values differ)"
    return place + show(expected[index].item()), place + show(got[index].item()) + count


def _nested(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_nested, value)) + "]"
    return str(int(value)) if isinstance(value, bool) else f"{value + 0:.5g}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _article(value: Any) -> str:
    """ "a float (3.5)", "an int (3)", "a tensor of shape (2, 3), float32"."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {_dtype(value)}"
    name = type(value).__name__
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name} ({show(value)})" if isinstance(value, (Real, str)) else f"{article} {name}"


def _first(problems: Any) -> Any:
    return next((problem for problem in problems if problem is not None), None)


def _placed(texts: tuple[str, str] | None, place: str) -> tuple[str, str] | None:
    return None if texts is None else (place + texts[0], place + texts[1])
