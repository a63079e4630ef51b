"""What the FlashAttention kernels become on GPUs that are not there: registers, spills, shared memory, instructions.

Every kernel is compiled for A100 and H100 as its launch would (`attention.triton_offline`), for causal attention over
1,024 tokens: forward, dq and dk/dv with the course's tiles, and dk/dv with others, 32 queries x 32 to 128 keys on 4 or
8 warps. Its two sums dK and dV stay in registers while a program runs, block_keys x d_head numbers of 32 bits each.
At 32 x 128, 4 warps and d_head 128 they alone would fill 256 registers a thread, and there are 255.

NOTE nothing is drawn at random: a compiler should give the same code every time. Three runs, the seeds, show it.
NOTE code without spills is not yet fast. Nothing was run, and no time is in here but that of the compiler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from effnlp_lessons.studies.runner import Outcome, Study

OTHERS = [[32, block_keys, warps] for block_keys in (32, 64, 128) for warps in (4, 8)]  # tiles of dk/dv
BAD = (32, 128, 4)  # which spills at d_head 128


def accumulator_registers(block_keys: int, d_head: int, num_warps: int) -> float:
    """Registers a thread for the sums dK and dV: 2 block_keys d_head numbers of 32 bits over 32 num_warps threads."""
    return 2 * block_keys * d_head / (32 * num_warps)


def run(setting: Mapping[str, Any], seed: int) -> Outcome:
    """Compile for `setting["chip"]`, `["dtype"]`, `["d_head"]` and `["length"]`; `seed` has no effect.

    Numbers: "triton", its version; "kernels", a list of {"kernel": "forward", "dq" or "dkdv"; "default": whether the
    tile is the course's; and what `triton_offline.compiled` tells}.
    """
    import triton  # exists on Linux only

    from effnlp_lessons.attention.triton_offline import Setting, compiled

    course = Setting(setting["chip"], setting["dtype"], setting["d_head"], setting["length"])
    rows = [{"default": True} | row for row in compiled(course, ("forward", "dq", "dkdv"))]
    tiles = course.tile_sizes()
    for block_queries, block_keys, num_warps in setting["others"]:
        tile = tiles.dkdv._replace(block_queries=block_queries, block_keys=block_keys, num_warps=num_warps)
        if tile != tiles.dkdv:
            other = course._replace(tiles=tiles._replace(dkdv=tile))
            rows += [{"default": False} | row for row in compiled(other, ("dkdv",))]
    return Outcome({"triton": triton.__version__, "kernels": rows})


# ------------------------------------------------------------------------------------- what was recorded


def kernels(summary: Mapping[str, Any], kernel: str | None = None, **setting: Any) -> Iterator[dict[str, Any]]:
    """The recorded rows of a kernel, or of all, joined with their setting: `kernels(summary, "dq", chip="A100")`.

    Raises:
        ValueError: two runs of one setting that differ.
    """
    codes: list[Mapping[str, Any]] = []  # one run of each setting
    for recorded in summary["runs"]:
        before = next((run for run in codes if run["setting"] == recorded["setting"]), None)
        if before is None:
            codes.append(recorded)
        elif before["kernels"] != recorded["kernels"]:
            raise ValueError(f"every run of a setting must give the same code, got two for {recorded['setting']}")
    for recorded in codes:
        for row in recorded["kernels"]:
            joined = recorded["setting"] | row
            if kernel in (None, row["kernel"]) and all(joined[name] == value for name, value in setting.items()):
                yield joined


SETTINGS = tuple(
    {"chip": chip, "dtype": dtype, "d_head": d_head, "length": 1024, "others": OTHERS}
    for chip in ("A100", "H100")
    for dtype in ("float16", "bfloat16")
    for d_head in (64, 128)
)
STUDY = Study(
    name="flash_machine_code",
    question="Do the FlashAttention kernels fit into the registers of A100 and H100, and do they use tensor cores?",
    run=run,
    recorded=SETTINGS,
    full=tuple(setting | {"length": length} for setting in SETTINGS for length in (1024, 997)),
    seeds=(0, 1, 2),
    minutes=4,
)
