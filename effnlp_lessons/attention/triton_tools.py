"""Triton kernels on a CPU, one program after another, with everything counted that they load and store.

Triton brings an interpreter that executes a kernel with numpy. `interpreting` runs kernels in it that are otherwise
compiled, without the environment variable TRITON_INTERPRET: everything is put back at the end, so that one process
can compile, interpret and compile again. `Traffic` counts bytes and products, and finds programs that store to the
same address. The notebook counts with it what FlashAttention moves between the two memories.

NOTE the interpreter alone computes bfloat16 with the bits of integers, silently. Here loads, stores, casts and
operands of `tl.dot` are right to the bit, and other arithmetic raises: a kernel casts to float32 first.
NOTE the interpreter alone ignores `input_precision`. Here "tf32" rounds both factors of a float32 `tl.dot` to 10 bits
behind the point, and "tf32x3" adds three products of such parts. Sums are in float32, in numpy's order.
NOTE the interpreter alone reads any address. Here an address outside the kernel's tensors raises `OutOfBounds`.
NOTE nothing runs in parallel: a race shows as a store conflict or not at all. What only hardware has (registers,
shared memory, speed) does not show either, for that see `triton_offline`.

This is the only module that names Triton's private parts for interpreting; `check_version` says for which version.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import operator
import sys
import textwrap
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.experimental.gluon  # else imported by the first launch, when it would see a changed tl
import triton.language as tl
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

VERSION = "3.7"  # of Triton, for which this module is written

# what is used below of `triton.runtime`
PRIVATE = (
    "jit.JITFunction.run",
    "jit.JITFunction.__call__",
    "interpreter._interpreter",
    "interpreter._ir.INPUT_PRECISION.TF32x3",
    "interpreter._patch_lang",
    "interpreter.ASTTransformer.visit",
    "interpreter.GridExecutor.__call__",
    "interpreter.InterpreterError",
    "interpreter.TensorHandle",
    "interpreter.interpreter_builder.options.sanitize_overflow",
    "interpreter.interpreter_semantic",
    "interpreter.ReduceScanOpInterface.check_tensor",
    "interpreter.InterpreterBuilder.set_grid_idx",
    "interpreter.InterpreterBuilder.cast_impl",
    "interpreter.InterpreterBuilder.create_fp_to_fp",
    "interpreter.InterpreterBuilder.create_dot",
)
# methods of InterpreterBuilder that would compute with the bits of bfloat16
ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_clampf", "create_atomic_rmw")


class OutOfBounds(IndexError):
    """A kernel reads or writes an address that belongs to none of its tensors."""


def check_version() -> None:
    """Check that Triton is the one this module is written for.

    Raises:
        RuntimeError: it is another version, lacks a private name, or its own switch TRITON_INTERPRET is on.
    """
    if not triton.__version__.startswith(f"{VERSION}."):
        raise RuntimeError(f"triton_tools is written for Triton {VERSION}, found {triton.__version__}")
    names = (*PRIVATE, *(f"interpreter.InterpreterBuilder.{name}" for name in ARITHMETIC))
    missing = [name for name in names if not _has(triton.runtime, name)]
    if missing:
        raise RuntimeError(f"Triton {triton.__version__} has no {', '.join(missing)}: triton_tools must be adapted")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: start Python without it, interpreting() does what it did")


def _has(owner: Any, dotted: str) -> bool:
    """Whether `owner` has an attribute of an attribute of ..."""
    try:
        operator.attrgetter(dotted)(owner)
    except AttributeError:
        return False
    return True


# ------------------------------------------------------------------------------------------ bfloat16 and tf32


def to_bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even, as the 16 bits that are kept of it (uint16)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """The 16 bits of bfloat16 as float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest number with 10 bits behind the point, ties away from zero; still float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isfinite(x), ((bits + 0x1000) & 0xFFFFE000).view(np.float32), x)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _refuse_bfloat16(method: Callable) -> Callable:
    """A builder's method that raises for bfloat16 instead of computing with its bits."""

    @wraps(method)
    def refuses(self: Any, *args: Any) -> Any:
        if any(map(_is_bfloat16, args)):
            raise NotImplementedError("arithmetic in bfloat16 cannot be interpreted: cast to float32 first")
        return method(self, *args)

    return refuses


def _cast(method: Callable) -> Callable:
    def cast(self: Any, source: Any, to: Any) -> Any:
        to = to.scalar
        if _is_bfloat16(source) and to != tl.bfloat16:
            source = interpreter.TensorHandle(from_bfloat16_bits(source.data), tl.float32)
            return source if to == tl.float32 else method(self, source, to)
        if to == tl.bfloat16:
            return interpreter.TensorHandle(to_bfloat16_bits(source.data.astype(np.float32)), to)
        return method(self, source, to)

    return cast


def _cast_with_rounding(method: Callable) -> Callable:
    def cast(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if to.scalar == tl.bfloat16 or _is_bfloat16(source):
            raise NotImplementedError("bfloat16 with a rounding mode of its own, or to 8 bits, cannot be interpreted")
        return method(self, source, to, rounding)

    return cast


def _dot(method: Callable) -> Callable:
    def dot(self: Any, a: Any, b: Any, total: Any, precision: Any, imprecise: Any) -> Any:
        if _is_bfloat16(total):
            raise NotImplementedError("tl.dot into bfloat16 cannot be interpreted: use a float32 accumulator")
        for watcher in _watchers:
            watcher.multiplied(a.data.shape, b.data.shape)

        def add_product(total: Any, x: np.ndarray, y: np.ndarray) -> Any:
            x, y = (interpreter.TensorHandle(part, tl.float32) for part in (x, y))
            return method(self, x, y, total, precision, imprecise)

        if _is_bfloat16(a):
            return add_product(total, from_bfloat16_bits(a.data), from_bfloat16_bits(b.data))
        kinds = interpreter._ir.INPUT_PRECISION
        if a.dtype.scalar == tl.float32 and precision in (kinds.TF32, kinds.TF32x3):
            x, y = round_to_tf32(a.data), round_to_tf32(b.data)
            if precision == kinds.TF32x3:  # the small parts first, their own product is left out
                total = add_product(total, round_to_tf32(a.data - x), y)
                total = add_product(total, x, round_to_tf32(b.data - y))
            return add_product(total, x, y)
        return method(self, a, b, total, precision, imprecise)

    return dot


def _reduce(method: Callable) -> Callable:
    def check_tensor(self: Any, inputs: tuple) -> None:
        if any(isinstance(x, tl.tensor) and _is_bfloat16(x.handle) for x in inputs):
            raise NotImplementedError("a reduction of bfloat16 cannot be interpreted: cast to float32 first")
        method(self, inputs)

    return check_tensor


# ------------------------------------------------------------------------------------------ running a kernel


_ranges: dict[str, tuple[int, int]] | None = None  # address ranges by parameter of the kernel that runs now
_watchers: list[Traffic] = []
_rewritten: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_LIBRARIES = (__file__, *(f"{Path(package.__file__).parent}/" for package in (triton, np)))


def _address_range(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor and the one behind its last element; gaps between strides are inside."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (elements * tensor.element_size() if tensor.numel() else 0)


def _tensors(arguments: Any) -> list[torch.Tensor]:
    """Tensors among arguments, also inside a tuple, a descriptor or a wrapper."""
    leaves = [getattr(leaf, "base", leaf) for leaf in tree_leaves(arguments)]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _is_users(filename: str) -> bool:
    return not filename.startswith(_LIBRARIES)


def _line_now() -> int:
    """Line of the kernel, or of a function it calls, that is executed now."""
    frame = sys._getframe(1)
    while frame is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_lineno if frame else 0


def _interpretable(function: Callable) -> Callable:
    """The Python function behind a kernel, with every assigned value made a Triton tensor, as the compiler does."""
    if function in _rewritten:
        return _rewritten[function]
    lines, first = inspect.getsourcelines(function)
    definition = ast.parse(textwrap.dedent("".join(lines))).body[0]
    definition.decorator_list = []
    interpreter.ASTTransformer().visit(definition)
    # The changed function refers to `interpreter_semantic`. It becomes a variable of an enclosing function, beside
    # those of the kernel's own, so that the module of the kernel keeps its names.
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells["interpreter_semantic"] = types.CellType(interpreter.interpreter_semantic)
    around = ast.parse(f"def around({', '.join(cells)}):\n  pass")
    around.body[0].body = [definition]
    ast.increment_lineno(definition, first - 1)
    code = compile(ast.fix_missing_locations(around), function.__code__.co_filename, "exec")
    for name in ("around", function.__name__):
        code = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == name)
    found = types.FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    found.__annotations__ = function.__annotations__
    _rewritten[function] = found
    return found


class _Memory:
    """In the place of Triton's compiled load and store: all that a kernel reads or writes passes here."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        _check_access("load", pointers, mask, np.dtype(dtype).itemsize)
        return self.real.load(pointers, mask, other, dtype)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        _check_access("store", pointers, mask, value.itemsize)
        return self.real.store(pointers, value, mask)

    def atomic_rmw(self, operation: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, order: Any) -> Any:
        _check_access("atomic", pointers, mask, value.itemsize)
        return self.real.atomic_rmw(operation, pointers, value, mask, order)

    def atomic_cas(self, pointers: np.ndarray, expected: np.ndarray, value: np.ndarray, order: Any) -> Any:
        _check_access("atomic", pointers, np.ones(pointers.shape, bool), value.itemsize)
        return self.real.atomic_cas(pointers, expected, value, order)


def _check_access(kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
    addresses = np.asarray(pointers)[np.asarray(mask, bool)].astype(np.int64)
    if not addresses.size:
        return
    first, last = int(addresses.min()), int(addresses.max())
    _find(_ranges, kind, first, last, itemsize)
    for watcher in _watchers:
        watcher.accessed(kind, addresses, first, last, itemsize)


def _find(ranges: dict[str, tuple[int, int]], kind: str, first: int, last: int, itemsize: int) -> str:
    """Name of the tensor that holds the addresses from `first` to `last`."""
    for name, (start, end) in ranges.items():
        if start <= first and last + itemsize <= end:
            return name
    where = "outside every tensor known"
    for name, (start, end) in ranges.items():
        if start <= first < end or start <= last < end:
            reached = f"{(first - start) // itemsize} to {(last - start) // itemsize}"
            where = f"at elements {reached} of {name}, which has {(end - start) // itemsize}"
    raise OutOfBounds(f"{kind} {where}")


def _run(kernel: JITFunction, args: tuple, grid: Any, settings: dict[str, Any]) -> None:
    """Launch a kernel in the interpreter."""
    global _ranges
    arguments = dict(zip(kernel.arg_names, args, strict=False)) | settings
    ranges = {}
    for name, argument in arguments.items():
        for tensor in _tensors(argument):
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} must be on the CPU to be interpreted, got {tensor.device}")
            ranges[name] = _address_range(tensor)
    executor = interpreter.GridExecutor(
        _interpretable(kernel.fn), kernel.arg_names, grid if callable(grid) else tuple(grid), kernel.pre_run_hooks
    )
    with ExitStack() as stack:
        stack.enter_context(_replaced(JITFunction, "__get__", _bind))  # x.sum(0), where tl.sum is a kernel too
        _ranges = ranges
        stack.callback(globals().update, _ranges=None)
        stack.enter_context(np.errstate(all="ignore"))  # a GPU does not warn either
        for watcher in _watchers:
            watcher.launched()
        try:
            executor(*args, **settings)
        except interpreter.InterpreterError as error:
            cause = error.__cause__ or error
            place = _place(kernel.__name__, cause)
            if isinstance(cause, OutOfBounds):
                cause.args = (f"{cause}, by {place}",)
            else:
                cause.add_note(f"in {place}")
            raise cause from None


def _bind(function: JITFunction, instance: Any, owner: type) -> Any:
    return function if instance is None else partial(function, instance)


def _place(kernel: str, error: BaseException) -> str:
    """In which kernel, program and line an error was raised."""
    frames = inspect.getinnerframes(error.__traceback__)
    here = next((f for f in reversed(frames) if _is_users(f.filename)), None)
    program = tuple(interpreter.interpreter_builder.grid_idx or ())
    place = f"kernel {kernel}, program {program}"
    if here is None:
        return place
    code = "".join(here.code_context or [""]).strip()
    return f"{place}, {Path(here.filename).name} line {here.lineno}: {code}"


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value`, and afterwards what it was, or absent."""
    there, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if there:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def interpreting(*modules: types.ModuleType) -> Iterator[None]:
    """Kernels that are launched inside run in the interpreter on CPU tensors: all, or those of the given modules.

    The launch stays as it is, `kernel[grid](...)`, wherever the kernel was defined: in a module, a notebook's cell or
    a function. `num_warps`, `num_stages` and the like have no effect. An error of the kernel is raised as it is, with
    a note that names kernel, program and line. `tl.device_assert` is checked; integers that overflow are not noticed.
    Contexts may be nested. They hold for the whole process, so one thread alone may launch kernels meanwhile.

    Raises:
        RuntimeError: see `check_version`.
        ValueError: a module has no kernel; at a launch, a tensor is not on the CPU.
        OutOfBounds: at a launch, by a load or store outside the kernel's tensors; masked lanes may point anywhere.
        NotImplementedError: at a launch, by arithmetic in bfloat16.
    """
    check_version()
    for module in modules:
        if not any(isinstance(value, JITFunction) for value in vars(module).values()):
            raise ValueError(f"modules must hold kernels, got {module.__name__} without any")
    names = {module.__name__ for module in modules}
    compiled, outside, patch_lang = JITFunction.run, JITFunction.__call__, interpreter._patch_lang
    builder, methods = interpreter.interpreter_builder, interpreter.InterpreterBuilder
    languages = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        if warmup or (names and kernel.fn.__module__ not in names):
            return compiled(kernel, *args, grid=grid, warmup=warmup, **settings)
        return _run(kernel, args, grid, settings)

    def call(function: JITFunction, *args: Any, **settings: Any) -> Any:
        if _ranges is None:
            return outside(function, *args, **settings)  # raises
        return _interpretable(function.fn)(*args, **settings)

    first = not isinstance(interpreter._interpreter, _Memory)  # not nested
    with ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(_replaced(owner, name, value))

        replace(JITFunction, "run", run)
        if first:
            replace(JITFunction, "__call__", call)
            replace(interpreter, "_patch_lang", lambda function: patch_lang(languages))
            replace(interpreter, "_interpreter", _Memory(interpreter._interpreter))
            replace(builder, "options", dataclasses.replace(builder.options, debug=True, sanitize_overflow=False))
            changes = [(interpreter.ReduceScanOpInterface, "check_tensor", _reduce)]
            changes += [(methods, "cast_impl", _cast), (methods, "create_fp_to_fp", _cast_with_rounding)]
            changes += [(methods, "create_dot", _dot), *((methods, name, _refuse_bfloat16) for name in ARITHMETIC)]
            for owner, name, change in changes:
                replace(owner, name, change(getattr(owner, name)))
        yield


# ------------------------------------------------------------------------------------------ counting


class Access(NamedTuple):
    """One load, store or atomic operation of one program.

    `first` and `last` are the smallest and largest element of `tensor` in it, counted in memory from its start;
    `lanes` is the number of elements that the mask lets through, `bytes` what they take; `line` is the kernel's.
    """

    kind: str  # "load", "store" or "atomic"
    tensor: str
    program: tuple[int, int, int]
    bytes: int
    first: int
    last: int
    lanes: int
    line: int


class Traffic:
    """Counts what interpreted kernels move: `with interpreting(), Traffic(Q=q, O=o) as traffic: kernel[grid](q, o)`.

    Every tensor that the kernels touch is given, under the name it shall have. Masked lanes are not counted, an
    element that is loaded twice counts twice. An atomic operation counts once, for its load and store together.
    These are requests of programs; a cache may serve some, so that real traffic is between `once` and `bytes`.

    Attributes:
        bytes: Counter of bytes by (kind, tensor), kinds "load", "store" and "atomic".
        flops: 2 m n k for every `tl.dot` of (m, k) with (k, n), padded rows and columns included.
        log: list of every `Access` in order, empty with `log=False`.

    Raises:
        ValueError: no tensors, two that share memory, or one that is not on a CPU.
        OutOfBounds: at a launch, by an access outside the given tensors.
    """

    def __init__(self, *, log: bool = True, **tensors: torch.Tensor) -> None:
        if not tensors:
            raise ValueError("tensors must be given by name, got none")
        for name, tensor in tensors.items():
            if tensor.device.type != "cpu":
                raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.flops = 0
        self.log: list[Access] = []
        self._ranges = {name: _address_range(tensor) for name, tensor in tensors.items()}
        inside = sorted((start, end, name) for name, (start, end) in self._ranges.items() if start < end)
        for (_, end, name), (start, _, other) in zip(inside, inside[1:], strict=False):
            if start < end:
                raise ValueError(f"tensors must not share memory, got {name} and {other} that do")
        self._itemsize = {name: tensor.element_size() for name, tensor in tensors.items()}
        sizes = {name: (end - start) // self._itemsize[name] for name, (start, end) in self._ranges.items()}
        self._touched = {name: np.zeros(size, bool) for name, size in sizes.items()}
        self._conflict = {name: np.zeros(size, bool) for name, size in sizes.items()}
        self._owner = {name: np.full(size, -1) for name, size in sizes.items()}  # program that stored last
        self._log = log

    def __enter__(self) -> Traffic:
        _watchers.append(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        _watchers.remove(self)

    @property
    def total(self) -> int:
        """All bytes loaded and stored."""
        return sum(self.bytes.values())

    @property
    def once(self) -> dict[str, int]:
        """{tensor: bytes of its elements that are touched at all}: the traffic behind a cache that holds everything."""
        return {name: int(touched.sum()) * self._itemsize[name] for name, touched in self._touched.items()}

    @property
    def conflicts(self) -> Counter[str]:
        """How many elements of each tensor two programs of one launch store to, a race on a GPU; atomics excepted."""
        return Counter({name: int(found.sum()) for name, found in self._conflict.items() if found.any()})

    def launched(self) -> None:
        """A kernel starts: stores of the one before are no conflicts."""
        for owner in self._owner.values():
            owner.fill(-1)

    def multiplied(self, left: tuple[int, ...], right: tuple[int, ...]) -> None:
        """A `tl.dot` of two such shapes."""
        self.flops += 2 * int(np.prod(left)) * right[-1]

    def accessed(self, kind: str, addresses: np.ndarray, first: int, last: int, itemsize: int) -> None:
        """Memory access, `addresses` those of the lanes that the mask lets through."""
        name = _find(self._ranges, kind, first, last, itemsize)
        start, size = self._ranges[name][0], self._itemsize[name]
        self.bytes[kind, name] += addresses.size * itemsize
        elements = (addresses - start) // size
        self._touched[name][elements] = True
        builder = interpreter.interpreter_builder
        if kind == "store":
            x, y, z = builder.grid_idx
            program = x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)
            owners = self._owner[name][elements]
            self._conflict[name][elements[(owners != -1) & (owners != program)]] = True
            self._owner[name][elements] = program
        if self._log:
            lanes = addresses.size
            reach = ((first - start) // size, (last - start) // size)
            self.log.append(Access(kind, name, builder.grid_idx, lanes * itemsize, *reach, lanes, _line_now()))
