"""Interpreting Triton kernels: numbers to the bit, every address watched, every byte counted, all put back."""

import inspect
import linecache
import types
from contextlib import contextmanager

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from effnlp_lessons.attention import triton_tools  # noqa: E402
from effnlp_lessons.attention.triton_tools import OutOfBounds, Traffic, interpreting  # noqa: E402


@triton.jit
def cast_kernel(X, Y, size, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + lanes, mask=lanes < size)
    tl.store(Y + lanes, x.to(Y.dtype.element_ty), mask=lanes < size)


@triton.jit
def dot_kernel(A, B, C, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + m[:, None] * K + k[None, :])
    b = tl.load(B + k[:, None] * N + n[None, :])
    tl.store(C + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def arithmetic_kernel(X, WHAT: tl.constexpr):
    lanes = tl.arange(0, 4)
    x = tl.load(X + lanes)
    if WHAT == "add":
        y = x + x
    elif WHAT == "negative":
        y = -x
    elif WHAT == "compare":
        y = tl.where(x > x, x, x)
    elif WHAT == "clamp":
        y = tl.clamp(x, x, x)
    elif WHAT == "fma":
        y = tl.fma(x, x, x)
    elif WHAT == "sum":
        y = x + tl.sum(x, 0)
    elif WHAT == "cumsum":
        y = tl.cumsum(x, 0)
    elif WHAT == "atomic":
        y = tl.atomic_add(X + lanes, x)
    else:  # the kinds that need no arithmetic
        y = tl.where(lanes < 2, x, tl.abs(tl.trans(x[:, None])).reshape(4))
    tl.store(X + lanes, y)


@triton.jit
def tail_kernel(X, Y, size, BLOCK: tl.constexpr):
    """Without a mask on its load.

    def this_line_is_no_function
    """
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + lanes)
    tl.store(Y + lanes, x, mask=lanes < size)


@triton.jit
def histogram_kernel(X, Y, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(X + tl.program_id(0) * BLOCK + lanes)
    if ATOMIC:
        tl.atomic_add(Y + lanes, x)
    else:
        tl.store(Y + lanes, tl.load(Y + lanes) + x)


@triton.jit
def double(x):
    return x + x


@triton.jit
def helper_kernel(X):
    lanes = tl.arange(0, 4)
    x = double(tl.load(X + lanes))
    tl.store(X + lanes, x - x.sum(0) + tl.max(x, 0))


@triton.jit
def negative_kernel(X):
    tl.store(X - 1, 1.0)


@triton.jit
def assert_kernel(X):
    tl.device_assert(tl.load(X) > 0, "X must be positive")


def cast(x, dtype, block=1024):
    y = torch.empty_like(x, dtype=dtype)
    with interpreting():
        cast_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), block)
    return y


def same_bits(a, b):
    """Equal, where any NaN is as good as another."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(7).view(torch.int16), b.nan_to_num(7).view(torch.int16)
    )


# ------------------------------------------------------------------------------------------ bfloat16, tf32


def test_every_bfloat16_is_read_and_written_to_the_bit():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    wide = cast(every, torch.float32, 2**16)
    assert torch.equal(wide.isnan(), every.isnan())
    assert torch.equal(wide.view(torch.int32)[~every.isnan()], every.float().view(torch.int32)[~every.isnan()])
    assert torch.equal(cast(every, torch.bfloat16, 2**16).view(torch.int16), every.view(torch.int16))


def test_float32_is_rounded_to_bfloat16_as_torch_does():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32)  # all exponents, also NaN
    ties = (bits & -0x10000) | 0x8000
    limits = torch.tensor(
        [3.39e38, 3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, 9.2e-41, -1e-40]
    )
    for x in (bits.view(torch.float32), ties.view(torch.float32), limits):
        assert same_bits(cast(x, torch.bfloat16, 2**18), x.bfloat16())
    assert cast(limits, torch.bfloat16)[1:3].tolist() == [torch.inf, -torch.inf]  # overflow
    assert cast(limits, torch.bfloat16)[-1] != 0  # a subnormal number


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_other_formats_become_bfloat16_and_back(dtype):
    x = (torch.randn(500, generator=torch.Generator().manual_seed(0)) * 1000).to(dtype)
    assert same_bits(cast(x, torch.bfloat16), x.bfloat16())
    assert torch.equal(cast(x.bfloat16(), dtype), x.bfloat16().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_of_16_bits_is_summed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, 32), (32, 8)))
    c = torch.empty(16, 8)
    with interpreting():
        dot_kernel[(1,)](a, b, c, 16, 8, 32, "ieee")
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("what", ["add", "negative", "compare", "fma", "sum", "atomic"])
def test_arithmetic_in_bfloat16_raises(what):
    x = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="float32"), interpreting():
        arithmetic_kernel[(1,)](x, what)
    assert x.tolist() == [1] * 4
    y = torch.ones(4)
    with interpreting():
        arithmetic_kernel[(1,)](y, what)  # in float32 all of them are possible


@pytest.mark.parametrize(
    ("what", "y"), [("move", [-1, 2, 3, 4]), ("clamp", [-1, 2, -3, -4]), ("cumsum", [-1, 1, -2, -6])]
)
def test_what_moves_bfloat16_or_goes_through_float32_does_not_raise(what, y):
    x = torch.tensor([-1, 2, -3, -4.0]).bfloat16()
    with interpreting():
        arithmetic_kernel[(1,)](x, what)
    assert x.tolist() == y


def test_precision_of_float32_products():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 32, generator=generator), torch.randn(32, 16, generator=generator)
    exact = a.double() @ b.double()
    error = {}
    for precision in ("ieee", "tf32x3", "tf32"):
        c = torch.empty(16, 16)
        with interpreting():
            dot_kernel[(1,)](a, b, c, 16, 16, 32, precision)
        error[precision] = (c - exact).abs().max().item()
    assert error["ieee"] < 5e-6 and error["tf32x3"] < 1e-5
    assert 1e-4 < error["tf32"] < 2e-2  # 32 products of factors with 11 significant bits
    # numbers with 10 bits behind the point are exact, the half of the last one is rounded up, infinity stays
    x = np.float32([1 + 2**-10, 1 + 2**-11, -1 - 2**-11, 1 + 2**-12, np.inf])
    assert triton_tools.round_to_tf32(x).tolist() == [1 + 2**-10, 1 + 2**-10, -1 - 2**-10, 1, np.inf]


# ------------------------------------------------------------------------------------------ addresses


def line_of(kernel, text):
    lines, first = inspect.getsourcelines(kernel.fn)
    return first + next(i for i, line in enumerate(lines) if text in line)


def test_a_load_behind_the_end_raises_with_kernel_program_and_line():
    y = torch.zeros(10)
    storage = torch.arange(64.0)
    with interpreting():
        tail_kernel[(1,)](storage[:8], y, 8, 8)
        with pytest.raises(OutOfBounds) as raised:
            tail_kernel[(2,)](storage[:10], y, 10, 8)  # the memory behind is the process's own
    said = str(raised.value)
    for part in (
        "elements 8 to 15 of X, which has 10",
        "kernel tail_kernel",
        "program (1, 0, 0)",
        "tl.load(X + lanes)",
    ):
        assert part in said
    assert f"test_triton_tools.py line {line_of(tail_kernel, 'tl.load')}" in said
    assert y.tolist() == [*range(8), 0, 0]  # the first program was fine


def test_a_store_outside_raises_and_masked_lanes_may_point_anywhere():
    x, y = torch.ones(10), torch.zeros(10)
    cast_to = torch.empty(10)
    with interpreting():
        cast_kernel[(2,)](x, cast_to, 10, 8)
        with pytest.raises(OutOfBounds, match="store at elements 0 to 15 of Y, which has 10"):
            cast_kernel[(1,)](torch.ones(16), y, 16, 16)
        with pytest.raises(OutOfBounds, match="outside every tensor"):
            negative_kernel[(1,)](x)
    assert torch.equal(cast_to, x)
    assert y.tolist() == [0] * 10


def test_an_access_outside_the_named_tensors_raises():
    x, y = torch.ones(8), torch.zeros(8)
    with interpreting(), Traffic(x=x), pytest.raises(OutOfBounds, match="store outside every tensor known"):
        cast_kernel[(1,)](x, y, 8, 8)
    assert y.tolist() == [0] * 8


# ------------------------------------------------------------------------------------------ counting


def test_bytes_of_masked_lanes_are_not_counted():
    x, y = torch.arange(10.0), torch.empty(10, dtype=torch.float16)
    with interpreting(), Traffic(x=x, y=y) as traffic:
        cast_kernel[(3,)](x, y, 10, 4)
    assert traffic.bytes == {("load", "x"): 40, ("store", "y"): 20}
    assert traffic.total == 60 and traffic.flops == 0
    assert traffic.once == {"x": 40, "y": 20}
    last = traffic.log[-1]
    assert last == ("store", "y", (2, 0, 0), 4, 8, 9, 2, line_of(cast_kernel, "tl.store"))
    assert [access.kind for access in traffic.log] == ["load", "store"] * 3


def test_an_element_loaded_by_two_programs_counts_twice_and_once():
    x, y = torch.ones(8), torch.zeros(4)
    with interpreting(), Traffic(log=False, x=x, y=y) as traffic:
        histogram_kernel[(2,)](x, y, 4, False)
    assert traffic.bytes == {("load", "x"): 32, ("load", "y"): 32, ("store", "y"): 32}
    assert traffic.once == {"x": 32, "y": 16}
    assert traffic.log == []


def test_products_are_counted_whole():
    a, b, c = torch.ones(16, 32), torch.ones(32, 8), torch.empty(16, 8)
    with interpreting(), Traffic(a=a, b=b, c=c) as traffic:
        dot_kernel[(1,)](a, b, c, 16, 8, 32, "tf32x3")
    assert traffic.flops == 2 * 16 * 8 * 32


def test_two_programs_that_store_to_one_address_are_found():
    x, y = torch.ones(12), torch.zeros(4)
    with interpreting():
        with Traffic(x=x, y=y) as traffic:
            histogram_kernel[(3,)](x, y, 4, False)
        assert traffic.conflicts == {"y": 4}
        assert y.tolist() == [3] * 4  # one after another they do no harm: only the count shows the race
        with Traffic(x=x, y=y) as traffic:
            cast_kernel[(2,)](x, y, 4, 2)
            cast_kernel[(1,)](x, y, 4, 4)  # another program than before stores the last two, but in a later launch
            histogram_kernel[(3,)](x, y, 4, True)
        assert not traffic.conflicts
        assert traffic.bytes["atomic", "y"] == 3 * 16


def test_traffic_counts_only_inside():
    x, y = torch.ones(8), torch.zeros(8)
    with interpreting():
        with Traffic(x=x, y=y) as outer:
            with Traffic(x=x, y=y) as inner:
                cast_kernel[(1,)](x, y, 8, 8)
            cast_kernel[(1,)](x, y, 8, 8)
        cast_kernel[(1,)](x, y, 8, 8)
    assert (outer.total, inner.total) == (128, 64)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "tensors must be given"),
        ({"x": torch.empty(2, device="meta")}, "x must be on the CPU, got meta"),
        (dict(zip("xy", torch.ones(6)[None].expand(2, 6), strict=True)), "must not share memory, got x and y"),
    ],
)
def test_traffic_refuses(tensors, message):
    with pytest.raises(ValueError, match=message):
        Traffic(**tensors)


# ------------------------------------------------------------------------------------------ where kernels live


CELL = """
import triton
import triton.language as tl

@triton.jit
def shifted(x, BY: tl.constexpr):
    return x + BY

@triton.jit
def cell_kernel(X, BY: tl.constexpr):
    lanes = tl.arange(0, 4)
    x = shifted(tl.load(X + lanes), BY)
    tl.store(X + lanes, x)
"""


def notebook(cell):
    """The names of a notebook after a cell, as IPython runs it: module __main__, source in `linecache` alone."""
    name = "<ipython-input-1-0123456789ab>"
    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
    names = {"__name__": "__main__"}
    exec(compile(cell, name, "exec"), names)
    return names


def test_a_kernel_in_a_cell_of_a_notebook():
    names = notebook(CELL)
    known = set(names)
    x = torch.arange(4.0)
    with interpreting(), Traffic(x=x) as traffic:
        names["cell_kernel"][(1,)](x, 10)
    assert x.tolist() == [10, 11, 12, 13]
    assert traffic.log[-1].line == 1 + CELL.splitlines().index("    tl.store(X + lanes, x)")
    assert set(names) == known
    with interpreting(), pytest.raises(OutOfBounds, match="ipython-input"):
        names["cell_kernel"][(1,)](x[:3], 10)
    names = notebook(CELL.replace("x + BY", "x * BY"))  # the cell is changed and run again
    with interpreting():
        names["cell_kernel"][(1,)](x, 2)
    assert x.tolist() == [20, 22, 24, 26]


def test_a_kernel_inside_a_function_sees_its_variables():
    factor = tl.constexpr(3)

    @triton.jit
    def inner(X):
        x = tl.load(X) * factor
        tl.store(X, x)

    x = torch.ones(1)
    with interpreting():
        inner[(1,)](x)
    assert x.item() == 3


def test_functions_of_the_kernel_and_methods():
    x = torch.tensor([1.0, 2, 3, 4])
    with interpreting():
        helper_kernel[lambda settings: (1,)](x, num_warps=1)
    assert x.tolist() == [2 - 20 + 8, 4 - 20 + 8, 6 - 20 + 8, 8 - 20 + 8]


def test_only_kernels_of_the_given_modules_are_interpreted():
    module, other = types.ModuleType("module"), types.ModuleType("other")
    for where in (module, other):
        where.kernel = triton.jit(types.FunctionType(cast_kernel.fn.__code__, globals(), "cast_kernel"))
        where.kernel.fn.__module__ = where.__name__
        where.kernel.fn.__annotations__ = cast_kernel.fn.__annotations__
    x, y = torch.ones(8), torch.zeros(8)
    with interpreting(module):
        module.kernel[(1,)](x, y, 8, 8)
        with launching_fails():
            other.kernel[(1,)](x, y, 8, 8)
        with interpreting(other):
            for where in (module, other):
                y.zero_()
                where.kernel[(1,)](x, y, 8, 8)
                assert torch.equal(x, y)
        with launching_fails():
            other.kernel[(1,)](x, y, 8, 8)
    with pytest.raises(ValueError, match="modules must hold kernels, got types"), interpreting(types):
        pass


@contextmanager
def launching_fails():
    """A compiled launch: no driver without a GPU, and with one no tensors on the CPU."""
    with pytest.raises((RuntimeError, ValueError), match="active drivers|cpu tensor"):
        yield


# ------------------------------------------------------------------------------------------ errors


def test_an_error_is_raised_as_it_is_with_a_note():
    with interpreting():
        with pytest.raises(AssertionError, match="X must be positive") as raised:
            assert_kernel[(1,)](torch.zeros(1))
        assert_kernel[(1,)](torch.ones(1))
    (note,) = raised.value.__notes__
    assert "kernel assert_kernel, program (0, 0, 0)" in note and f"line {line_of(assert_kernel, 'assert(')}" in note
    assert raised.value.__cause__ is None


def test_tensors_without_data_are_refused():
    with interpreting(), pytest.raises(ValueError, match="X must be on the CPU to be interpreted, got meta"):
        assert_kernel[(1,)](torch.zeros(1, device="meta"))


def test_a_function_of_kernels_cannot_be_called_from_outside():
    with interpreting(), pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        double(1)


# ------------------------------------------------------------------------------------------ putting back


def triton_state():
    """Every name of Triton that interpreting could change, with its object."""
    interpreter = triton.runtime.interpreter
    owners = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, JITFunction)
    owners += (interpreter, interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface)
    return {
        (owner.__name__, name): inspect.getattr_static(owner, name)
        for owner in owners
        for name in dir(owner)
        if name not in ("__annotations__", "__dict__", "__weakref__")  # made anew when asked for
    }


def test_everything_is_put_back_also_after_an_error():
    before, mine = triton_state(), dict(globals())
    options = triton.runtime.interpreter.interpreter_builder.options
    assert "__get__" not in vars(JITFunction)  # nor has an earlier test left anything
    x = torch.tensor([1.0, 2, 3, 4])
    with interpreting():
        helper_kernel[(1,)](x)
        with interpreting():
            helper_kernel[(1,)](x)
        helper_kernel[(1,)](x)
        assert triton_state() != before
    with pytest.raises(OutOfBounds), interpreting():
        helper_kernel[(1,)](x[:2])
    after = triton_state()
    assert {name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)} == set()
    assert triton.runtime.interpreter.interpreter_builder.options is options
    assert dict(globals()) == mine  # the interpreter alone adds sixty names to a kernel's module
    with launching_fails():
        helper_kernel[(1,)](x)


def test_the_private_names_of_triton_are_there():
    triton_tools.check_version()  # says which are missing, or that the version is another


def test_another_triton_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    with pytest.raises(RuntimeError, match="written for Triton 3.7, found 4.0.0"), interpreting():
        pass


def test_a_private_name_that_moved_is_refused(monkeypatch):
    monkeypatch.delattr(triton.runtime.interpreter.InterpreterBuilder, "create_fma")
    with pytest.raises(RuntimeError, match="has no interpreter.InterpreterBuilder.create_fma"), interpreting():
        pass


def test_tritons_own_switch_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), interpreting():
        pass
