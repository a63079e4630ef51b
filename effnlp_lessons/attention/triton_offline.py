"""Compile Triton kernels for GPUs that are not there, and read what became of them in the machine code.

Triton brings the whole compiler, down to the machine code of NVIDIA and AMD chips, and needs a GPU only to ask which
one it is. `machine_code` answers that question in its place. The kernel goes through the ordinary launch, which makes
other code for a pointer or a length that is a multiple of 16; its tensors may be on the device "meta", without memory.
What can be read without a GPU: registers, bytes that did not fit into them (spilled to memory, slow), shared memory,
tensor-core instructions, asynchronous copies. Nothing is run, so nothing is known of speed, nor of wrong results.

    python -m effnlp_lessons.attention.triton_offline     compiles `flash_kernels` and fails if a kernel is bad

NOTE a kernel that was compiled before comes from a cache, which hides that it no longer compiles. Here every kernel is
compiled into an empty folder.
NOTE "A100" and "H100" stand for sm_80 and sm_90a, "MI300X" for gfx942.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from effnlp_lessons.attention.flash_triton import Launch, Tiles, default_tiles, launches


class Chip(NamedTuple):
    """A GPU: how Triton's compiler calls it, and the bytes of shared memory that one program may use."""

    backend: str
    architecture: int | str
    lanes: int  # of a warp
    shared_bytes: int


CHIPS = {
    "A100": Chip("cuda", 80, 32, 163 * 1024),
    "H100": Chip("cuda", 90, 32, 227 * 1024),
    "MI300X": Chip("hip", "gfx942", 64, 64 * 1024),
}

# instructions in PTX, NVIDIA's portable assembly, and in AMD's
TENSOR_CORE = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "mfma": r"\bv_mfma"}
ASYNC_COPY = r"\bcp\.async\.c[ag]\.|\bcp\.async\.bulk\.tensor"


class MachineCode(NamedTuple):
    """What a compiled kernel takes of a chip.

    `registers` are those of a thread, 255 at most on NVIDIA. `spilled_bytes`, of a thread too, are moved to memory for
    want of registers. `shared_bytes` are those of a program. `tensor_core` counts instructions in the code, not how
    often they run: {"mma.sync" or "wgmma" or "mfma": number}. `async_copies` load from global into shared memory
    while the program goes on; on AMD they are not counted.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core: dict[str, int]
    async_copies: int


class _Driver:
    """In the place of a GPU's driver: answers what a launch asks before it compiles."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(*CHIPS[self.name][:3])

    def get_current_device(self) -> str:
        return self.name  # a kernel keeps its compiled forms by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _pretending(chip: str) -> Iterator[None]:
    """Triton takes the chip for present, and finds nothing that it compiled before."""
    drivers = triton.runtime.driver
    before = drivers._active
    drivers.set_active(_Driver(chip))
    try:
        with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
            triton.knobs.cache.dir = folder
            yield
    finally:
        drivers.set_active(before)


def machine_code(
    kernel: JITFunction, arguments: Mapping[str, Any], chip: str, *, num_warps: int = 4, num_stages: int = 2
) -> MachineCode:
    """Compile a kernel for `chip` as a launch with these arguments would, and read the machine code.

    Args:
        arguments: {parameter: value} as at a launch; tensors may be on the device "meta".
        chip: one of `CHIPS`.

    Raises:
        ValueError: another chip, or no compilable kernel.
        triton.CompilationError: the kernel does not compile.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip must be one of {', '.join(CHIPS)}, got {chip!r}")
    if not isinstance(kernel, JITFunction):
        raise ValueError(f"kernel must be a function under triton.jit, got {type(kernel).__name__} (TRITON_INTERPRET?)")
    with _pretending(chip):
        try:
            compiled = kernel.warmup(**arguments, grid=(1,), num_warps=num_warps, num_stages=num_stages)
        finally:
            kernel.device_caches.pop(chip, None)
    if CHIPS[chip].backend == "cuda":
        text = compiled.asm["ptx"]
        found = _resources(compiled.asm["cubin"])
        registers, spilled = found["REG"], found["STACK"] + found["LOCAL"]
    else:
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
        )
    tensor_core = {name: len(re.findall(pattern, text)) for name, pattern in TENSOR_CORE.items()}
    return MachineCode(
        registers,
        spilled,
        compiled.metadata.shared,
        {name: count for name, count in tensor_core.items() if count},
        len(re.findall(ASYNC_COPY, text)),
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and others of a cubin, as NVIDIA's cuobjdump, which comes with Triton, prints them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b([A-Z]+):(\d+)", printed)}


# ------------------------------------------------------------------------------------------ what is asked of a kernel


def violations(code: MachineCode, chip: str, rows: int | None) -> list[str]:
    """What is wrong with a kernel's machine code, in words; an empty list if nothing is.

    Nothing may spill, and shared memory must suffice. A kernel with products must use tensor cores and copy
    asynchronously: on A100 by mma.sync; on H100 by wgmma, whose instructions take 64 rows at least, so that tiles of
    fewer rows fall back to mma.sync. On MI300X it is enough that the kernel compiles.

    Args:
        rows: rows of the left factor of the kernel's products; None for a kernel without `tl.dot`.
    """
    if CHIPS[chip].backend != "cuda":
        return []
    found = []
    if code.spilled_bytes:
        found.append(f"spills {code.spilled_bytes} bytes a thread")
    if code.shared_bytes > CHIPS[chip].shared_bytes:
        found.append(f"needs {code.shared_bytes} bytes of shared memory, {chip} has {CHIPS[chip].shared_bytes}")
    if rows is not None:
        wanted = "wgmma" if chip == "H100" and rows >= 64 else "mma.sync"
        if not code.tensor_core.get(wanted):
            found.append(f"has no {wanted}")
        if not code.async_copies:
            found.append("has no asynchronous copies")
    return found


class Setting(NamedTuple):
    """One problem for which the kernels are compiled; `length` is that of queries and keys."""

    chip: str
    dtype: str  # "float16" or "bfloat16"
    d_head: int
    length: int
    pattern: str = "causal"  # one of `PATTERNS`
    tiles: Tiles | None = None  # default: `default_tiles`

    def tile_sizes(self) -> Tiles:
        """The tiles of the kernels."""
        return self.tiles or default_tiles(self.d_head, getattr(torch, self.dtype), self.pattern == "block mask")

    def launches(self) -> list[Launch]:
        """The kernels with their arguments: forward, delta, dq, dkdv."""
        q = torch.empty(2, 4, self.length, self.d_head, dtype=getattr(torch, self.dtype), device="meta")
        settings: dict[str, Any] = {}
        if self.pattern.endswith("padding"):
            settings["key_padding_mask"] = torch.empty(2, self.length, dtype=torch.bool, device="meta")
        elif self.pattern == "block mask":
            settings["block_mask"] = torch.ones(2 * (math.ceil(self.length / 64),), dtype=torch.bool)
        elif self.pattern == "window":
            settings["window"] = 256
        settings["causal"] = self.pattern in ("causal", "causal, padding", "block mask")
        return launches(q, q, q, **settings, tiles=self.tile_sizes())


PATTERNS = ("causal", "window", "padding", "causal, padding", "block mask")


def settings() -> list[Setting]:
    """Those of the check: causal attention in full, the other patterns in part, lengths with and without factor 16."""
    causal = [
        Setting(chip, dtype, d_head, length)
        for chip in ("A100", "H100")
        for dtype in ("float16", "bfloat16")
        for d_head in (64, 128)
        for length in (1024, 997)
    ]
    others = [
        Setting(chip, "bfloat16", d_head, 997, pattern)
        for chip in ("A100", "H100")
        for d_head in (64, 128)
        for pattern in PATTERNS[1:]
    ]
    return [*causal, *others, Setting("MI300X", "bfloat16", 64, 1024), Setting("MI300X", "float16", 128, 997)]


KERNELS = ("forward", "delta", "dq", "dkdv")


def compiled(setting: Setting, kernels: tuple[str, ...] = KERNELS) -> Iterator[dict[str, Any]]:
    """For each of `kernels` its name, tile, `MachineCode` and violations, as one flat dictionary."""
    for launch in setting.launches():
        if launch.name not in kernels:
            continue
        rows = {"forward": "BLOCK_QUERIES", "dq": "BLOCK_QUERIES", "dkdv": "BLOCK_KEYS"}.get(launch.name)
        arguments = launch.arguments
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
        code = machine_code(launch.kernel, arguments, setting.chip, **options)
        tile = {name.lower(): arguments[name] for name in ("BLOCK_QUERIES", "BLOCK_KEYS") if name in arguments}
        wrong = violations(code, setting.chip, rows and arguments[rows])
        yield {"kernel": launch.name} | tile | options | code._asdict() | {"violations": wrong}


def main(todo: Iterable[Setting]) -> int:
    """Compile everything, print one JSON line a kernel, and return 1 if one has a violation, else 0."""
    bad = 0
    for setting in todo:
        # "delta" knows nothing of patterns: once is enough
        for row in compiled(setting, KERNELS if setting.pattern == "causal" else ("forward", "dq", "dkdv")):
            bad += bool(row["violations"])
            print(json.dumps({k: v for k, v in setting._asdict().items() if k != "tiles"} | row), flush=True)
    if bad:
        print(f"{bad} kernels are not as they should be", file=sys.stderr)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(settings()))
