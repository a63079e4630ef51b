"""The Triton kernels, interpreted on the CPU: right in every shape, and exactly the traffic of the closed formulas."""

import importlib.util
import itertools
import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from effnlp_lessons.attention import flash_triton
from effnlp_lessons.attention.flash import tiled_attention
from effnlp_lessons.attention.flash_costs import (
    backward_bytes,
    backward_flops,
    flash_attention_bytes,
    flash_attention_flops,
    visited_tiles,
)
from effnlp_lessons.attention.flash_triton import (
    FallbackWarning,
    Tiles,
    TileSize,
    default_tiles,
    flash_attention,
    launches,
    tile_mask,
)
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.transformer import Encoder, SelfAttention, TransformerConfig

pytest.importorskip("triton", reason="Triton exists on Linux only")
from effnlp_lessons.attention import flash_kernels  # noqa: E402
from effnlp_lessons.attention.triton_tools import Traffic, interpreting  # noqa: E402

LENGTHS = [(1, 1), (1, 64), (64, 1), (17, 17), (64, 64), (33, 97), (100, 33), (130, 130)]
KINDS = ["full", "causal", "window", "causal window", "blocks", "causal blocks", "padding"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEAD_SIZES = [16, 40, 64, 80, 128]


def same_tiles(block_queries, block_keys):
    tile = TileSize(block_queries, block_keys)
    return Tiles(tile, tile, tile, block_mask=(block_queries, block_keys))


SQUARE = same_tiles(32, 32)
MIXED = Tiles(TileSize(64, 32), dq=TileSize(32, 64), dkdv=TileSize(16, 64))
FLAT = Tiles(TileSize(16, 64), dq=TileSize(64, 16), dkdv=TileSize(64, 32))


def draw(queries, keys, d_head, dtype=torch.float32, *, batch=1, heads=1, seed=0):
    """q, k, v and dO."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (queries, keys, keys, queries)
    return [torch.randn(batch, heads, n, d_head, generator=generator).to(dtype) for n in lengths]


def draw_settings(kind, queries, keys, tiles, batch=1, seed=0):
    """The settings of `flash_attention` for a kind of mask."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"causal": "causal" in kind}
    if "window" in kind:
        settings["window"] = 11 + 20 * (seed % 2)
    if "blocks" in kind:
        size = (math.ceil(queries / tiles.block_mask[0]), math.ceil(keys / tiles.block_mask[1]))
        settings["block_mask"] = torch.rand(size, generator=generator) < 0.6
    if kind == "padding":
        settings["key_padding_mask"] = torch.rand(batch, keys, generator=generator) < 0.7
    return settings


def allowed(queries, keys, tiles, *, causal=False, window=None, block_mask=None, key_padding_mask=None):
    """True where a query may attend, from the definitions."""
    place, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if causal:
        mask = mask & (key <= place)
    if window is not None:
        mask = mask & ((place - key).abs() <= window)
    if block_mask is not None:
        rows, columns = torch.arange(queries) // tiles.block_mask[0], torch.arange(keys) // tiles.block_mask[1]
        mask = mask & block_mask[rows[:, None], columns]
    if key_padding_mask is not None:
        mask = mask & key_padding_mask[:, None, None, :]
    return mask


def dense(q, k, v, grad_output, mask, dtype):
    """Output, dQ, dK, dV of attention written out in `dtype`, in float64 numbers."""
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    output = dense_attention(q, k, v, attention_mask=mask)
    grads = torch.autograd.grad(output, (q, k, v), grad_output.to(dtype))
    return [x.detach().double() for x in (output, *grads)]


def rms(x):
    return x.square().mean().sqrt()


def logsumexp(q, k, mask):
    scores = q.double() @ k.double().transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask, -math.inf).logsumexp(dim=-1)


def run_kernels(q, k, v, grad_output, *, tiles, **settings):
    """All four kernels inside `Traffic`: {name: result}, and a list of what each moved."""
    todo = launches(q, k, v, tiles=tiles, grad_output=grad_output, **settings)
    moved = []
    for launch in todo:
        for name in {"forward": ["O", "LSE"], "delta": ["DELTA"], "dq": ["DQ"], "dkdv": ["DK", "DV"]}[launch.name]:
            launch.arguments[name].fill_(math.nan)  # what is not written will show
        with interpreting(flash_kernels), Traffic(**launch.tensors) as traffic:
            launch.run()
        assert not traffic.conflicts
        moved.append(traffic)
    return {name: x for launch in todo for name, x in launch.tensors.items()}, moved


# ------------------------------------------------------------------------------------------------- exactness


CASES = list(itertools.product(enumerate(LENGTHS), enumerate(KINDS), enumerate(DTYPES), enumerate([SQUARE, MIXED])))
IDS = [f"{n[0]}x{n[1]}-{kind}-{str(dtype)[6:]}-{i}" for (_, n), (_, kind), (_, dtype), (i, _) in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_as_exact_as_dense_attention(case):
    (a, (queries, keys)), (b, kind), (c, dtype), (e, tiles) = case
    seed = 100 * a + 10 * b + c
    d_head = HEAD_SIZES[(a + b + 2 * c + e) % len(HEAD_SIZES)]
    heads = 4 if min(queries, keys) == 1 else 1  # the mean error of one row of 16 numbers is luck
    inputs = draw(queries, keys, d_head, dtype, heads=heads, seed=seed)
    settings = draw_settings(kind, queries, keys, tiles, seed=seed)
    mask = allowed(queries, keys, tiles, **settings)
    results, _ = run_kernels(*inputs, tiles=tiles, **settings)
    exact = dense(*inputs, mask, torch.float64)
    plain = dense(*inputs, mask, dtype)
    # Beside twice the error of plain attention, the few last places of float32 in which the sums are kept. They count
    # where plain attention makes no error at all (one key: weight 1, dQ = 0), and in float32: P made again from LSE has
    # the relative error of LSE, and tf32x3 keeps 22 of 24 bits.
    last_places = 8 * torch.finfo(torch.float32).eps * max(x.abs().max() for x in exact)
    # The error is the root of the mean square; the largest of a few numbers is luck, and may be twice as far off.
    for name, x, y in zip(("O", "DQ", "DK", "DV"), exact, plain, strict=True):
        error, error_of_plain = results[name].double() - x, y - x
        assert rms(error) <= 2 * rms(error_of_plain) + last_places, name  # NaN is never <=
        assert error.abs().max() <= 4 * error_of_plain.abs().max() + last_places, name
    torch.testing.assert_close(results["LSE"].double(), logsumexp(*inputs[:2], mask), rtol=1e-5, atol=1e-5)


def test_there_are_enough_cases():
    assert len(CASES) >= 300


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_lse_is_that_of_torch(dtype, causal):
    q, k, v, _ = draw(100, 100, 40, dtype, batch=2, heads=2)
    _, expected, *_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    _, lse = flash_attention(q, k, v, causal=causal, tiles=MIXED, run="interpreter", return_lse=True)
    assert lse.dtype == torch.float32
    # in 16 bits torch itself is 5e-5 away from float64, with which ours is compared above
    bound = 1e-5 if dtype == torch.float32 else 1e-4
    torch.testing.assert_close(lse, expected.float(), rtol=1e-5, atol=bound)


@pytest.mark.parametrize(
    ("queries", "keys", "kind"),
    [(5, 5, "full"), (5, 6, "causal"), (6, 5, "causal"), (6, 6, "window"), (6, 5, "causal blocks"), (5, 5, "padding")],
)
def test_gradients_of_the_kernels_are_the_derivatives(queries, keys, kind):
    """float64, tiles of 4 x 4: every part of every loop is run."""
    tiles = same_tiles(4, 4)
    settings = draw_settings(kind, queries, keys, tiles, seed=1)
    if "window" in settings:
        settings["window"] = 2
    mask = allowed(queries, keys, tiles, **settings)
    assert not mask.all() or kind == "full"
    q, k, v, _ = (x.double().requires_grad_() for x in draw(queries, keys, 2))

    def attention(q, k, v):
        return flash_attention(q, k, v, tiles=tiles, run="interpreter", **settings)

    if kind != "padding":
        expected = dense_attention(q, k, v, attention_mask=mask)
        torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(attention, (q, k, v))


def test_default_tiles_and_autograd():
    """Through autograd comes what the launches give one by one, to the bit."""
    for kind, dtype, d_head in [
        ("causal", torch.float32, 40),
        ("window", torch.float16, 128),
        ("blocks", torch.float16, 128),
        ("padding", torch.bfloat16, 64),
    ]:
        *inputs, grad_output = draw(70, 130, d_head, dtype, seed=1)
        tiles = default_tiles(d_head, dtype, block_sparse=kind == "blocks")
        settings = draw_settings(kind, 70, 130, tiles)
        inputs = [x.requires_grad_() for x in inputs]
        output, lse = flash_attention(*inputs, run="interpreter", return_lse=True, **settings)
        grads = torch.autograd.grad(output, inputs, grad_output)
        results, _ = run_kernels(*inputs, grad_output, tiles=tiles, **settings)
        assert not lse.requires_grad and output.dtype == dtype
        for name, x in zip(("O", "LSE", "DQ", "DK", "DV"), (output, lse, *grads), strict=True):
            assert torch.equal(x, results[name]), name


def test_the_pytorch_version_computes_the_same():
    q, k, v, grad_output = (x.double() for x in draw(33, 70, 16, batch=2, heads=2))
    for kind in ("causal", "window", "causal blocks", "padding"):
        settings = draw_settings(kind, 33, 70, SQUARE, batch=2)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        ours, lse = flash_attention(*inputs, tiles=SQUARE, run="interpreter", return_lse=True, **settings)
        theirs, expected = flash_attention(*inputs, tiles=SQUARE, run="torch", return_lse=True, **settings)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lse, expected, rtol=1e-10, atol=1e-10)
        pairs = zip(*(torch.autograd.grad(x, inputs, grad_output) for x in (ours, theirs)), strict=True)
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------- padding and layout


def test_a_text_of_padding_gives_zeros():
    q, k, v, grad_output = draw(33, 33, 16, batch=3, heads=2)
    real = torch.ones(3, 33, dtype=torch.bool)
    real[0, 20:] = False
    real[1] = False
    inputs = [x.requires_grad_() for x in (q, k, v)]
    output, lse = flash_attention(*inputs, real, tiles=SQUARE, run="interpreter", return_lse=True)
    grads = torch.autograd.grad(output, inputs, grad_output)
    for x in (output, *grads):
        assert x.isfinite().all()
        assert (x[1] == 0).all() and (x[0, :, 20:] == 0).all() and (x[0, :, :20] != 0).any()
    assert (lse == -math.inf).equal(~real[:, None].expand_as(lse))


def test_queries_that_see_no_key_give_zeros():
    """More queries than keys: with causal the first ones have nothing to see."""
    q, k, v, grad_output = draw(40, 10, 16)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    output, lse = flash_attention(*inputs, causal=True, tiles=SQUARE, run="interpreter", return_lse=True)
    dq = torch.autograd.grad(output, inputs, grad_output)[0]
    assert (output[:, :, :30] == 0).all() and (dq[:, :, :30] == 0).all() and (lse[:, :, :30] == -math.inf).all()
    assert (output[:, :, 30:] != 0).all() and lse[:, :, 30:].isfinite().all()


def test_a_large_score_does_not_overflow():
    """Padded keys and hidden ones have the largest scores, and weights of exp(1000) if they are not hidden in time."""
    q, k, v, grad_output = draw(33, 33, 16)
    k[:, :, 20:] = 1000 * q[:, :, :13]
    real = (torch.arange(33) < 20)[None]
    mask = allowed(33, 33, SQUARE, causal=True, key_padding_mask=real)
    results, _ = run_kernels(q, k, v, grad_output, tiles=SQUARE, causal=True, key_padding_mask=real)
    expected = dense(q, k, v, grad_output, mask, torch.float64)
    for name, x in zip(("O", "DQ", "DK", "DV"), expected, strict=True):
        torch.testing.assert_close(results[name].double(), x, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_gradients():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 20, 3, 3 * 16, generator=generator).requires_grad_()
    q, k, v = x.transpose(1, 2).split(16, dim=-1)
    assert not q.is_contiguous()
    total = flash_attention(q, k, v, causal=True, tiles=SQUARE, run="interpreter").sum()  # a gradient without strides
    expected = dense_attention(q, k, v, causal=True).sum()
    gradient, expected_gradient = (torch.autograd.grad(y, x, retain_graph=True)[0] for y in (total, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits(tmp_path):
    """The third head starts behind number 2**31. Files with holes stand for the tensors: they take no room."""
    heads, length, d_head = 3, 2**26 + 32, 16

    def hollow(name, *shape, dtype=torch.float16):
        return torch.from_file(str(tmp_path / name), shared=True, size=math.prod(shape), dtype=dtype).view(1, *shape)

    x, output = hollow("x", heads, length, d_head), hollow("o", heads, length, d_head)
    lse = hollow("lse", heads, length, dtype=torch.float32)
    x[:, :, :32] = torch.arange(1.0, heads + 1)[:, None, None]
    few = torch.empty(1, heads, 32, d_head, dtype=torch.float16)
    launch = launches(few, few, few, window=0, tiles=SQUARE)[0]
    launch.arguments.update(Q=x, K=x, V=x, O=output, LSE=lse, queries=length, keys=length)
    with interpreting(flash_kernels):
        launch._replace(grid=(1, heads, 1)).run()
    assert torch.equal(output[:, :, :32], x[:, :, :32])  # every query sees its own key alone
    assert (output[:, :, 32:64] == 0).all()


# ------------------------------------------------------------------------------------------ bytes and FLOPs

SETTINGS = [
    (64, 64, 16, torch.float32, "full", SQUARE),
    (100, 100, 64, torch.float16, "full", MIXED),
    (100, 100, 64, torch.float16, "full", FLAT),
    (1, 97, 40, torch.bfloat16, "full", SQUARE),
    (97, 33, 128, torch.float16, "full", MIXED),
    (130, 130, 80, torch.bfloat16, "causal", SQUARE),
    (100, 64, 64, torch.float16, "causal", MIXED),
    (33, 130, 16, torch.float32, "causal", FLAT),
    (130, 130, 64, torch.float16, "window", SQUARE),
    (97, 130, 40, torch.bfloat16, "window", FLAT),
    (130, 97, 64, torch.float32, "causal window", MIXED),
    (130, 130, 64, torch.float16, "blocks", MIXED),
    (100, 130, 128, torch.float16, "blocks", SQUARE),
    (130, 100, 64, torch.bfloat16, "causal blocks", MIXED),
    (9, 11, 5, torch.float64, "causal", same_tiles(4, 4)),
    (70, 70, 64, torch.float16, "padding", SQUARE),
]


def tile_settings(tile, queries, keys, tiles, *, causal=False, window=None, block_mask=None, key_padding_mask=None):
    """The settings of `flash_costs` for one kernel's tile."""
    if block_mask is not None:
        block_mask = tile_mask(block_mask, queries, keys, tile, block=tiles.block_mask)
    sides = {"block_queries": tile.block_queries, "block_keys": tile.block_keys}
    return sides | {"causal": causal, "window": window, "block_mask": block_mask}


@pytest.mark.parametrize("setting", SETTINGS)
def test_traffic_is_that_of_the_closed_formulas(setting):
    queries, keys, d_head, dtype, kind, tiles = setting
    heads = 2
    inputs = draw(queries, keys, d_head, dtype, heads=heads)
    settings = draw_settings(kind, queries, keys, tiles)
    _, moved = run_kernels(*inputs, tiles=tiles, **settings)
    of_kernel = [tile_settings(tile, queries, keys, tiles, **settings) for tile in (tiles.forward, *tiles[1:3])]
    sizes = (queries, keys, d_head)
    expected_bytes = [
        flash_attention_bytes(*sizes, dtype.itemsize, **of_kernel[0]),
        backward_bytes(*sizes, dtype.itemsize, **of_kernel[1]).delta,
        backward_bytes(*sizes, dtype.itemsize, **of_kernel[1]).dq,
        backward_bytes(*sizes, dtype.itemsize, **of_kernel[2]).dkdv,
    ]
    expected_flops = [
        flash_attention_flops(*sizes, **of_kernel[0]),
        0,
        backward_flops(*sizes, **of_kernel[1]).dq,
        backward_flops(*sizes, **of_kernel[2]).dkdv,
    ]
    lists = ("REAL_KEYS", "STARTS", "TILES")
    in_bytes = [sum(n for (_, name), n in traffic.bytes.items() if name not in lists) for traffic in moved]
    assert in_bytes == [heads * n for n in expected_bytes]
    assert [traffic.flops for traffic in moved] == [heads * n for n in expected_flops]


def test_bytes_of_the_masks():
    """A byte for every key of a visited tile; for the lists of tiles 4 bytes a tile, and two starts a block."""
    inputs = draw(70, 70, 16)
    real = torch.ones(1, 70, dtype=torch.bool)
    block_mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    _, (forward, _, dq, dkdv) = run_kernels(*inputs, tiles=SQUARE, key_padding_mask=real, block_mask=block_mask)
    key_rows = 2 * 32 + 1 * 32 + 1 * 6  # key blocks of 32, 32 and 6 keys are visited 2, 1 and 1 times
    for traffic in (forward, dq):
        assert traffic.bytes["load", "REAL_KEYS"] == key_rows
        assert traffic.bytes["load", "STARTS"] == 3 * 8
        assert traffic.bytes["load", "TILES"] == 4 * 4
    assert dkdv.bytes["load", "REAL_KEYS"] == 70
    assert dkdv.bytes["load", "TILES"] == 4 * 4


@pytest.mark.parametrize("kind", ["full", "causal", "causal window", "causal blocks"])
def test_tiles_are_visited_in_the_order_of_the_list(kind):
    settings = draw_settings(kind, 100, 130, SQUARE)
    inputs = draw(100, 130, 16)
    _, (forward, *_) = run_kernels(*inputs, tiles=SQUARE, **settings)
    seen = [(access.program[0], access.first // (32 * 16)) for access in forward.log if access.tensor == "K"]
    expected = visited_tiles(100, 130, **tile_settings(SQUARE.forward, 100, 130, SQUARE, **settings))
    assert seen == [(tile.query_block, tile.key_block) for tile in expected]


def test_tile_mask_marks_what_causal_attention_can_see():
    for queries, keys, tile in itertools.product((1, 33, 70, 100), (1, 64, 90), (TileSize(32, 16), TileSize(16, 64))):
        blocks = torch.ones(math.ceil(queries / 32), math.ceil(keys / 64), dtype=torch.bool)
        mask = tile_mask(blocks, queries, keys, tile, block=(32, 64), causal=True)
        sizes = {"block_queries": tile.block_queries, "block_keys": tile.block_keys}
        visited = {(t.query_block, t.key_block) for t in visited_tiles(queries, keys, causal=True, **sizes)}
        assert {tuple(place) for place in mask.nonzero().tolist()} == visited


# ------------------------------------------------------------------------------------------------- the door


def test_launches_need_no_memory():
    x = torch.empty(2, 3, 100, 64, dtype=torch.float16, device="meta")
    real = torch.empty(2, 100, dtype=torch.bool, device="meta")
    todo = launches(x, x, x, real, causal=True, block_mask=torch.ones(2, 2, dtype=torch.bool))
    assert [launch.name for launch in todo] == ["forward", "delta", "dq", "dkdv"]
    assert all(tensor.is_meta for launch in todo for tensor in launch.tensors.values())
    assert [launch.grid for launch in todo] == [(2, 3, 2)] * 4
    assert todo[0].arguments["O"] is todo[1].arguments["O"] and todo[1].arguments["DELTA"] is todo[2].arguments["DELTA"]
    assert todo[3].arguments["STARTS"].shape == (3,)


def test_auto_falls_back_and_says_so():
    q, k, v, _ = draw(20, 20, 8, heads=2)
    block_mask = torch.tensor([[True, False, True], [True, True, False], [False, True, True]])
    tiles = Tiles(*same_tiles(4, 4)[:3], block_mask=(8, 8))
    for settings in ({}, {"causal": True, "window": 3}, {"block_mask": block_mask, "tiles": tiles}):
        with pytest.warns(FallbackWarning, match="plain PyTorch.* not on a GPU"):
            output = flash_attention(q, k, v, **settings)
        mask = allowed(20, 20, tiles, **{name: x for name, x in settings.items() if name != "tiles"})
        torch.testing.assert_close(output, dense_attention(q, k, v, attention_mask=mask), rtol=1e-5, atol=1e-5)


def test_a_head_too_large_for_the_kernels_falls_back():
    q, k, v, _ = draw(5, 5, 200)
    with pytest.warns(FallbackWarning):
        flash_attention(q, k, v)
    with pytest.raises(ValueError, match="run cannot be 'interpreter': d_head is 200, more than 128"):
        flash_attention(q, k, v, run="interpreter")


def test_without_triton(monkeypatch):
    """The module imports nothing of Triton, and "auto" falls back."""
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("flash_kernels", "triton_tools", "flash_triton"):
        monkeypatch.delitem(sys.modules, f"effnlp_lessons.attention.{name}")
    spec = importlib.util.find_spec("effnlp_lessons.attention.flash_triton")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "effnlp_lessons.attention.flash_triton", module)
    spec.loader.exec_module(module)
    q, k, v, _ = draw(20, 20, 16)
    with pytest.warns(module.FallbackWarning, match="Triton is not installed"):
        output = module.flash_attention(q, k, v, causal=True)
    assert torch.equal(output, tiled_attention(q, k, v, causal=True))
    with pytest.raises(ValueError, match="run cannot be 'interpreter': Triton is not installed"):
        module.flash_attention(q, k, v, run="interpreter")
    assert "effnlp_lessons.attention.flash_kernels" not in sys.modules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "cpu"}, "run must be one of"),
        ({"run": "gpu"}, "run cannot be 'gpu': the tensors are on device cpu"),
        ({"q": torch.zeros(1, 8, 16)}, "q, k, v must be"),
        ({"q": torch.zeros(1, 1, 8, 12)}, "do not fit together"),
        ({"k": torch.zeros(1, 1, 8, 16).half()}, "dtype"),
        ({"k": torch.zeros(1, 1, 8, 16, device="meta")}, "q, k, v must be on one device"),
        ({"key_padding_mask": torch.ones(1, 9, dtype=torch.bool)}, "key_padding_mask must have shape"),
        ({"key_padding_mask": torch.ones(1, 8)}, "key_padding_mask must be bool"),
        ({"key_padding_mask": torch.ones(1, 8, dtype=torch.bool, device="meta")}, "key_padding_mask must be on cpu"),
        ({"window": -1}, "window must be an integer >= 0, got -1"),
        ({"window": 2.0}, "window must be an integer >= 0"),
        ({"window": 2, "block_mask": torch.ones(1, 1, dtype=torch.bool)}, "block_mask cannot be combined with window"),
        ({"block_mask": torch.ones(1, 2, dtype=torch.bool)}, r"block_mask must have shape \(1, 1\)"),
        ({"block_mask": torch.ones(1, 1)}, "block_mask must be bool"),
        ({"tiles": same_tiles(24, 16)}, "tiles.forward must have powers of two as sides, got 24 x 16"),
        ({"tiles": SQUARE._replace(dq=TileSize(16, 0))}, "tiles.dq must have powers of two"),
        (
            {"tiles": FLAT._replace(block_mask=(32, 64)), "block_mask": torch.ones(1, 1, dtype=torch.bool)},
            "tiles must divide the 32 x 64 blocks of block_mask, got a tile of 64 x 16",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    q, k, v, _ = draw(8, 8, 16)
    arguments = {"q": q, "k": k, "v": v, "run": "interpreter"} | change
    with pytest.raises(ValueError, match=message):
        flash_attention(**arguments)


def test_what_a_gpu_cannot_run_is_named():
    half, double = (
        SimpleNamespace(shape=(1, 1, 2**24, 128), dtype=dtype, device=torch.device("cuda"))
        for dtype in (torch.float16, torch.float64)
    )
    one = SimpleNamespace(shape=(1, 1, 1, 128), dtype=torch.float16, device=torch.device("cuda"))
    obstacle = partial(flash_triton._obstacle, interpreter=False)
    assert obstacle(one, one, SQUARE) is None
    assert obstacle(one, one, same_tiles(8, 16)) == "tiles have sides below 16"
    assert obstacle(double, double, SQUARE) == "there is no kernel for torch.float64"
    assert obstacle(one, half, SQUARE) == "length * d_head is 16777216 * 128, not below 2**31"


# ------------------------------------------------------------------------------------------ in the Transformer


def test_the_transformer_can_use_it():
    config = TransformerConfig(
        vocab_size=30, max_length=40, d_model=32, layers=2, heads=2, d_ff=32, segments=0, pooler=False, dropout=0.0
    )
    attention = partial(flash_attention, tiles=SQUARE, run="interpreter")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(30, (2, 37), generator=generator)
    real = torch.arange(37) < torch.tensor([[37], [21]])
    flash, plain = Encoder(config, attention=attention), Encoder(config)
    outputs = [model(tokens, real).last[real] for model in (flash, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for (name, x), y in zip(flash.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4, msg=name)  # sums over 58 tokens, two layers


def test_self_attention_gives_zeros_for_padding():
    config = TransformerConfig(d_model=32, heads=2)
    mixer = SelfAttention(config, attention=partial(flash_attention, tiles=SQUARE, run="interpreter"))
    dense_mixer = SelfAttention(config)
    dense_mixer.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 33, 32, generator=torch.Generator().manual_seed(0))
    real = torch.arange(33) < torch.tensor([[33], [9]])
    (y, _), (expected, _) = mixer(x, real), dense_mixer(x, real)
    torch.testing.assert_close(y[real], expected[real], rtol=1e-5, atol=1e-5)
    assert (y[~real] == mixer.output.bias).all()  # what the output layer makes of zeros


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_head", [64, 80, 128])
def test_compiled_on_a_gpu(dtype, d_head):
    for kind in KINDS:
        tiles = default_tiles(d_head, dtype, block_sparse="blocks" in kind)
        *inputs, grad_output = (x.cuda() for x in draw(517, 1000, d_head, dtype, batch=2, heads=3))
        settings = draw_settings(kind, 517, 1000, tiles, batch=2)
        mask = allowed(517, 1000, tiles, **settings).cuda()
        settings = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in settings.items()}
        exact = dense(*inputs, grad_output, mask, torch.float64)
        plain = dense(*inputs, grad_output, mask, dtype)
        inputs = [x.requires_grad_() for x in inputs]
        runs = []
        for _ in range(2):
            output = flash_attention(*inputs, run="gpu", **settings)
            runs.append([output, *torch.autograd.grad(output, inputs, grad_output)])
        last_places = 8 * torch.finfo(torch.float32).eps * max(x.abs().max() for x in exact)
        for x, again, y, z in zip(*runs, exact, plain, strict=True):
            assert torch.equal(x, again)  # no race
            assert rms(x.double() - y) <= 2 * rms(z - y) + last_places
