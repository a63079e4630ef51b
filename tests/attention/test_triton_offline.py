"""Compiling without a GPU: what is read from the machine code, what is flagged, and that every kernel passes."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from effnlp_lessons.attention import triton_offline  # noqa: E402
from effnlp_lessons.attention.flash_triton import TileSize, default_tiles  # noqa: E402
from effnlp_lessons.attention.triton_offline import MachineCode, Setting, machine_code, violations  # noqa: E402
from effnlp_lessons.attention.triton_tools import interpreting  # noqa: E402


@triton.jit
def product_kernel(A, B, C, size, BLOCK: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """C = A B for A (ROWS, size) and B (size, BLOCK)."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    c = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        a = tl.load(A + rows[:, None] * size + inner[None, :], mask=inner[None, :] < size, other=0.0)
        b = tl.load(B + inner[:, None] * BLOCK + columns[None, :], mask=inner[:, None] < size, other=0.0)
        c = tl.dot(a, b, c, input_precision=PRECISION)
    tl.store(C + rows[:, None] * BLOCK + columns[None, :], c)


@triton.jit
def wrong_kernel(X):
    tl.store(X, tl.arange(0, 3))  # not a power of two


def product(rows=64, size=128, dtype=torch.float16, precision="ieee", device="meta"):
    """Arguments of `product_kernel`."""
    shapes = {"A": (rows, size), "B": (size, 32)}
    tensors = {name: torch.ones(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    tensors["C"] = torch.empty(rows, 32, device=device)
    return tensors | {"size": size, "BLOCK": 32, "ROWS": rows, "PRECISION": precision}


# ------------------------------------------------------------------------------------------ reading machine code


def test_what_a_kernel_becomes_on_each_chip():
    found = {chip: machine_code(product_kernel, product(), chip) for chip in triton_offline.CHIPS}
    assert [list(found[chip].tensor_core) for chip in ("A100", "H100", "MI300X")] == [["mma.sync"], ["wgmma"], ["mfma"]]
    for chip, code in found.items():
        assert 16 < code.registers < 255 and code.spilled_bytes == 0
        assert 0 < code.shared_bytes < triton_offline.CHIPS[chip].shared_bytes
        assert violations(code, chip, rows=64) == []
    assert found["A100"].async_copies and found["H100"].async_copies


def test_fewer_than_64_rows_fall_back_on_h100():
    code = machine_code(product_kernel, product(rows=32), "H100")
    assert list(code.tensor_core) == ["mma.sync"]
    assert violations(code, "H100", rows=32) == []
    assert violations(code, "H100", rows=64) == ["has no wgmma"]


def test_one_stage_copies_nothing_asynchronously():
    code = machine_code(product_kernel, product(), "A100", num_stages=1)
    assert violations(code, "A100", rows=64) == ["has no asynchronous copies"]


def test_float32_uses_tensor_cores_only_if_it_may_round():
    by_precision = {
        precision: machine_code(product_kernel, product(16, 32, torch.float32, precision), "A100").tensor_core
        for precision in ("ieee", "tf32", "tf32x3")
    }
    assert by_precision["ieee"] == {}
    assert by_precision["tf32x3"]["mma.sync"] == 3 * by_precision["tf32"]["mma.sync"] > 0


def test_the_code_depends_on_whether_a_length_is_a_multiple_of_16():
    """As at a launch. With rows of 125 numbers no 16 bytes of A lie together, so it is copied another way."""
    even, odd = (machine_code(product_kernel, product(size=size), "A100") for size in (128, 125))
    assert even.async_copies > odd.async_copies > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled_bytes": 8}, "spills 8 bytes a thread"),
        ({"shared_bytes": 166_913}, "needs 166913 bytes of shared memory, A100 has 166912"),
        ({"tensor_core": {}}, "has no mma.sync"),
        ({"tensor_core": {"wgmma": 3}}, "has no mma.sync"),
        ({"async_copies": 0}, "has no asynchronous copies"),
    ],
)
def test_what_is_wrong_is_said(change, message):
    good = MachineCode(255, 0, 166_912, {"mma.sync": 1}, 1)
    assert violations(good, "A100", 64) == []
    assert violations(good._replace(**change), "A100", 64) == [message]
    assert violations(good._replace(**change), "MI300X", 64) == []
    without_products = violations(good._replace(**change), "A100", None)
    assert without_products == ([message] if change.keys() & {"spilled_bytes", "shared_bytes"} else [])


# ------------------------------------------------------------------------------------------ one process


def test_compile_interpret_compile_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver = triton.runtime.driver._active
    seen = []
    for _ in range(2):
        seen.append(machine_code(product_kernel, product(), "A100"))
        arguments = product(device="cpu")
        with interpreting():
            product_kernel[(1,)](**arguments)
            seen.append(machine_code(product_kernel, product(), "A100"))
        assert arguments["C"].unique().tolist() == [128]
    assert len(set(map(repr, seen))) == 1
    assert list(tmp_path.iterdir()) == []  # compiled each time: nothing was kept that could hide a failure
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)
    assert not product_kernel.device_caches.keys() & triton_offline.CHIPS.keys()
    assert triton.runtime.driver._active is driver


def test_a_kernel_that_does_not_compile_raises_and_all_is_put_back():
    driver = triton.runtime.driver._active
    with pytest.raises(triton.CompilationError, match="power of 2"):
        machine_code(wrong_kernel, {"X": torch.empty(4, device="meta")}, "A100")
    assert triton.runtime.driver._active is driver


@pytest.mark.parametrize(
    ("kernel", "chip", "message"),
    [
        (product_kernel, "V100", "chip must be one of A100, H100, MI300X, got 'V100'"),
        (print, "A100", "kernel must be a function under triton.jit, got builtin"),
    ],
)
def test_bad_input_is_refused(kernel, chip, message):
    with pytest.raises(ValueError, match=message):
        machine_code(kernel, {}, chip)


# ------------------------------------------------------------------------------------------ the course's kernels


def test_a_known_bad_tile_is_flagged(capsys):
    tiles = default_tiles(128, torch.float16)._replace(dkdv=TileSize(32, 128, num_warps=4))
    assert triton_offline.main([Setting("A100", "float16", 128, 1024, tiles=tiles)]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wrong = {row["kernel"]: row["violations"] for row in rows}
    assert wrong == {
        "forward": [],
        "delta": [],
        "dq": [],
        "dkdv": [f"spills {rows[-1]['spilled_bytes']} bytes a thread"],
    }
    assert rows[-1]["spilled_bytes"] > 1000


def test_every_kernel_passes():
    """The check as a user would run it, in a process of its own: some 120 kernels, 110 seconds of one core."""
    command = [sys.executable, "-m", "effnlp_lessons.attention.triton_offline"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row for row in rows if row["violations"]] == []
    assert done.returncode == 0, done.stderr[-2000:]

    def compiled(*names, pattern):
        return {tuple(row[name] for name in names) for row in rows if row["pattern"] == pattern}

    names, four = ("chip", "dtype", "d_head", "length", "kernel"), triton_offline.KERNELS
    nvidia, formats, heads = ("A100", "H100"), ("float16", "bfloat16"), (64, 128)
    causal = compiled(*names, pattern="causal")
    assert causal >= set(itertools.product(nvidia, formats, heads, (1024, 997), four))
    assert {(row["dtype"], row["d_head"], row["kernel"]) for row in rows if row["chip"] == "MI300X"} >= {
        ("bfloat16", 64, kernel) for kernel in four
    }
    for pattern in triton_offline.PATTERNS[1:]:
        expected = set(itertools.product(nvidia, heads, ("forward", "dq", "dkdv")))
        assert compiled("chip", "d_head", "kernel", pattern=pattern) == expected
    for row in rows:
        if row["kernel"] != "delta":
            # the rows of all products are 64 or more, so that nothing falls back to mma.sync on H100
            expected = {"A100": "mma.sync", "H100": "wgmma", "MI300X": "mfma"}[row["chip"]]
            assert list(row["tensor_core"]) == [expected]
