"""Tiled attention equals dense attention, stays within O(n) memory, and moves the bytes that its formulas say."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from effnlp_lessons.attention.flash import (
    TwoMemories,
    flash_backward,
    flash_forward,
    online_softmax_step,
    tiled_attention,
)
from effnlp_lessons.attention.flash_costs import (
    backward_bytes,
    backward_flops,
    flash_attention_bytes,
    flash_attention_flops,
    padded_d_head,
    standard_attention_bytes,
    tile_bytes,
    tile_sizes_for,
    visited_tiles,
)
from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.dense_attention import attention_scores, dense_attention
from effnlp_lessons.measure import peak_memory
from effnlp_lessons.transformer import Decoder, Encoder, TransformerConfig

BATCH, HEADS = 2, 2
LENGTHS = [(n, n) for n in (1, 7, 17, 64, 97, 130)]
LENGTHS += [(1, 17), (17, 1), (7, 130), (97, 64), (64, 97), (130, 97), (97, 130)]
MASKS = ["full", "causal", "window", "causal window", "block mask", "causal block mask"]
D_HEADS = [8, 64, 40, 16, 80, 24]
TILES = [(16, 16), (32, 64), (64, 32), (64, 64), (11, 23), (128, 16), (256, 256)]


def random_settings(mask: str, queries: int, keys: int, tiles: tuple[int, int], seed: int) -> dict:
    """Arguments of `tiled_attention` for one of MASKS."""
    chosen = {"causal": "causal" in mask, "block_queries": tiles[0], "block_keys": tiles[1]}
    generator = torch.Generator().manual_seed(seed)
    if "window" in mask:
        chosen["window"] = int(torch.randint(0, 40, (), generator=generator))
    if "block mask" in mask:
        blocks = (-(-queries // tiles[0]), -(-keys // tiles[1]))
        chosen["block_mask"] = torch.rand(blocks, generator=generator) < 0.6
    return chosen


def dense_mask(queries, keys, *, block_queries, block_keys, causal=False, window=None, block_mask=None):
    """The definition, pair by pair: True where query i may see key j."""
    place, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    mask = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        mask &= key <= place
    if window is not None:
        mask &= (place - key).abs() <= window
    if block_mask is not None:
        by_row = block_mask.repeat_interleave(block_queries, 0)[:queries]
        mask &= by_row.repeat_interleave(block_keys, 1)[:, :keys]
    return mask


def draw(queries, keys, d_head, dtype=torch.float64, seed=0, heads=HEADS):
    """q, k, v and a gradient for the output, none of them contiguous."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(BATCH, length, heads, d_head, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for length in (queries, keys, keys, queries)
    ]


def draw_padding(keys, seed):
    """Some of the keys of the first text are real, none of the second."""
    real = torch.rand(BATCH, keys, generator=torch.Generator().manual_seed(seed)) < 0.7
    real[1] = False
    return real


def run(attention, q, k, v, grad):
    """The output and its gradients for q, k and v."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def truth(q, k, v, grad, real, mask, as_tokens=True):
    """Dense attention and its gradients; zeros at padded tokens where the keys are the queries."""

    def attention(q, k, v):
        output = dense_attention(q, k, v, real, attention_mask=mask)
        if real is not None and as_tokens and q.shape[2] == k.shape[2]:
            output = output * real[:, None, :, None]
        return output

    return run(attention, q, k, v, grad)


CASES = []
for number, (lengths, mask, padded) in enumerate(itertools.product(LENGTHS, MASKS, [False, True])):
    tiles = TILES[number % 7]
    CASES.append(pytest.param(*lengths, D_HEADS[number % 6], tiles, mask, padded, id=f"{lengths}-{mask}-{padded}"))
every_case = pytest.mark.parametrize(("queries", "keys", "d_head", "tiles", "mask", "padded"), CASES)


# --------------------------------------------------------------------------------------- equal to dense attention


@every_case
def test_output_and_gradients_are_those_of_dense_attention(queries, keys, d_head, tiles, mask, padded):
    chosen = random_settings(mask, queries, keys, tiles, seed=queries + keys)
    *vectors, grad = draw(queries, keys, d_head, seed=keys)
    real = draw_padding(keys, queries) if padded else None
    exact = truth(*vectors, grad, real, dense_mask(queries, keys, **chosen))
    for dtype, bound in {torch.float64: 1e-12, torch.float32: 1e-5}.items():
        inputs = [x.to(dtype) for x in (*vectors, grad)]
        ours = run(lambda q, k, v: tiled_attention(q, k, v, real, **chosen), *inputs)  # noqa: B023
        for mine, theirs in zip(ours, exact, strict=True):
            assert mine.dtype == dtype and mine.shape == theirs.shape
            torch.testing.assert_close(mine.double(), theirs, rtol=bound, atol=bound)


@every_case
def test_lse_is_the_log_of_the_sum(queries, keys, d_head, tiles, mask, padded):
    chosen = random_settings(mask, queries, keys, tiles, seed=queries + keys)
    q, k, v, _ = draw(queries, keys, d_head, seed=keys)
    real = draw_padding(keys, queries) if padded else None
    allowed = dense_mask(queries, keys, **chosen)
    if padded:
        allowed = allowed & real[:, None, None, :]
    theirs = attention_scores(q, k).masked_fill(~allowed, -math.inf).logsumexp(-1)
    output, lse = flash_forward(q, k, v, real, **chosen)
    torch.testing.assert_close(lse, theirs, rtol=1e-12, atol=1e-12)  # -inf where there is no key
    assert not output[lse == -math.inf].any() and output.isfinite().all()
    for dtype in (torch.float32, torch.bfloat16):
        _, lse = flash_forward(*(x.to(dtype) for x in (q, k, v)), real, **chosen)
        assert lse.dtype == torch.float32 and torch.equal(lse == -math.inf, theirs == -math.inf)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, 64, 97, 130])
def test_torchs_own_kernel_gives_the_same_output_and_lse(length, causal):
    q, k, v, _ = draw(length, length, 40, torch.float32)
    theirs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    ours = tiled_attention(q, k, v, causal=causal, block_queries=32, block_keys=16, return_lse=True)
    torch.testing.assert_close(ours, tuple(theirs), rtol=1e-5, atol=1e-5)


HALF = [(130, 130, "full"), (97, 97, "causal"), (64, 130, "causal window"), (97, 64, "causal"), (130, 97, "block mask")]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("queries", "keys", "mask"), HALF)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_at_most_twice_as_far_off_as_plain_attention(dtype, queries, keys, mask, padded):
    chosen = random_settings(mask, queries, keys, (32, 32), seed=queries)
    *vectors, grad = (x.to(dtype) for x in draw(queries, keys, 64))
    real = draw_padding(keys, queries) if padded else None
    allowed = dense_mask(queries, keys, **chosen)
    exact = truth(*(x.double() for x in (*vectors, grad)), real, allowed)
    plain = truth(*vectors, grad, real, allowed)
    ours = run(lambda q, k, v: tiled_attention(q, k, v, real, **chosen), *vectors, grad)
    for mine, naive, right in zip(ours, plain, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - right).abs().max() <= 2 * (naive.double() - right).abs().max()


@pytest.mark.parametrize("mask", MASKS)
def test_the_written_backward_is_the_derivative(mask):
    queries, keys = 5, 7
    q, k, v, _ = (x[:1].clone() for x in draw(queries, keys, 2, heads=1))
    real = torch.arange(keys)[None] != 4
    chosen = random_settings(mask, queries, keys, (4, 3), seed=1)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: tiled_attention(q, k, v, real, **chosen), inputs)


def test_the_backward_may_have_other_tiles_and_has_no_derivative_itself():
    q, k, v, grad = draw(23, 31, 8)
    output, lse = flash_forward(q, k, v, causal=True, block_queries=4, block_keys=16)
    one, other = (
        flash_backward(q, k, v, output, lse, grad, causal=True, block_queries=a, block_keys=b)
        for a, b in ((16, 8), (64, 64))
    )
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    q.requires_grad_()
    output, lse = tiled_attention(q, k, v, return_lse=True)
    assert not lse.requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(output.sum(), q, create_graph=True)


def test_autocast_does_not_round_the_sums():
    q, k, v, grad = draw(33, 33, 8, torch.float32)
    outside = run(tiled_attention, q, k, v, grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(tiled_attention, q, k, v, grad), outside, strict=True))


# --------------------------------------------------------------------------------------------- the online softmax


@given(cuts=st.lists(st.integers(1, 29), max_size=5, unique=True), hidden=st.integers(0, 30), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_softmax_may_be_taken_in_any_pieces_and_any_order(cuts, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = 30 * torch.randn(3, 5, 30, generator=generator, dtype=torch.float64)
    v = torch.randn(3, 30, 4, generator=generator, dtype=torch.float64)
    scores[:, 0] = -math.inf  # a query that sees nothing
    scores[:, 1, :hidden] = -math.inf  # and one that sees nothing at first
    state = torch.full((3, 5), -math.inf).double(), torch.zeros(3, 5).double(), torch.zeros(3, 5, 4).double()
    edges = [0, *sorted(cuts), 30]
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]
    for i in torch.randperm(len(pieces), generator=generator).tolist():
        state = online_softmax_step(*state, scores[..., pieces[i]], v[:, pieces[i]])
    largest, total, mixed = state
    assert torch.equal(largest, scores.amax(-1)) and not total[:, 0].any() and not mixed[:, 0].any()
    seen = slice(1 if hidden < 30 else 2, None)
    torch.testing.assert_close(
        (mixed / total[..., None])[:, seen], (scores.softmax(-1) @ v)[:, seen], rtol=0, atol=1e-12
    )
    torch.testing.assert_close(largest + total.log(), scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_the_old_output_shrinks_when_a_larger_score_comes():
    """Scores 0, then 1: the first value weighs 1 / e of the second, not e, as the inverse factor would have it."""
    state = torch.tensor([-math.inf]), torch.zeros(1), torch.zeros(1, 2)
    for score, value in ((0.0, [1.0, 0.0]), (1.0, [0.0, 1.0])):
        state = online_softmax_step(*state, torch.tensor([[score]]), torch.tensor([value]))
    expected = torch.tensor([1.0]), torch.tensor([1 + 1 / math.e]), torch.tensor([[1 / math.e, 1.0]])
    torch.testing.assert_close(state, expected)


# ------------------------------------------------------------------------------------------------------- the tiles


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_visited_are_the_tiles_where_some_query_sees_some_key(data):
    queries, keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    rows, columns = data.draw(st.integers(1, 17)), data.draw(st.integers(1, 17))
    mask = data.draw(st.sampled_from(MASKS))
    chosen = random_settings(mask, queries, keys, (rows, columns), data.draw(st.integers(0, 99)))
    allowed = dense_mask(queries, keys, **chosen)
    expected = []
    for i, j in itertools.product(range(-(-queries // rows)), range(-(-keys // columns))):
        tile = allowed[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        if tile.any():
            expected.append((i, j, "full" if tile.all() and tile.shape[1] == columns else "partial"))
    assert visited_tiles(queries, keys, **chosen) == expected  # in this order: query blocks outside, keys inside


class Walk(TwoMemories):
    """Remembers which rows of which tensor were loaded, in order."""

    def __init__(self, d_head):
        super().__init__()
        self.d_head, self.log = d_head, []

    def load(self, name, x):
        self.log.append((name, x.storage_offset() // self.d_head))
        return super().load(name, x)


@pytest.mark.parametrize("mask", MASKS)
def test_the_passes_visit_exactly_these_tiles(mask):
    queries, keys, rows, columns, d = 37, 45, 8, 11, 4
    chosen = random_settings(mask, queries, keys, (rows, columns), seed=5)
    q, k, v, grad = (torch.randn(1, 1, n, d, generator=torch.Generator().manual_seed(n)) for n in (37, 45, 45, 37))
    tiles = [(tile.query_block, tile.key_block) for tile in visited_tiles(queries, keys, **chosen)]

    def visits(log, outer, inner, outer_size, inner_size):
        found, block = [], None
        for name, row in log:
            block = row // outer_size if name == outer else block
            if name == inner:
                found.append((block, row // inner_size))
        return found

    forward = Walk(d)
    output, lse = flash_forward(q, k, v, **chosen, memories=forward)
    assert visits(forward.log, "Q", "K", rows, columns) == tiles
    backward = Walk(d)
    flash_backward(q, k, v, output, lse, grad, **chosen, memories=backward)
    # the second pass begins where a block of keys is loaded before any query: after the last block of queries is done
    key_blocks, query_blocks = -(-keys // columns), -(-queries // rows)
    starts = [i for i, (name, _) in enumerate(backward.log) if name == "V"]
    second = starts[len(tiles)] - 1
    assert visits(backward.log[:second], "Q", "K", rows, columns) == tiles
    assert visits(backward.log[second:], "K", "Q", columns, rows) == sorted((j, i) for i, j in tiles)
    assert len(starts) == len(tiles) + key_blocks
    assert sum(name == "O" for name, _ in backward.log) == query_blocks


class CountMasking(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.masked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.masked += func is torch.ops.aten.masked_fill_.Scalar
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", ["causal", "window", "full"])
def test_a_full_tile_is_not_masked(mask):
    q, k, v, _ = draw(64, 64, 8)
    chosen = random_settings(mask, 64, 64, (8, 4), seed=3)
    with CountMasking() as counted:
        flash_forward(q, k, v, **chosen)
    partial = sum(tile.kind == "partial" for tile in visited_tiles(64, 64, **chosen))
    assert counted.masked == partial < len(visited_tiles(64, 64, **chosen))
    assert (partial == 0) == (mask == "full")


# --------------------------------------------------------------------------------------------------- bytes, FLOPs


BYTES = list(itertools.product([(130, 130), (97, 64), (17, 130), (1, 97)], MASKS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("lengths", "mask"), BYTES)
def test_counted_bytes_are_those_of_the_closed_formulas(lengths, mask, dtype):
    queries, keys = lengths
    d, size, tiles = 24, torch.empty((), dtype=dtype).itemsize, TILES[(queries + len(mask)) % 6]
    chosen = random_settings(mask, queries, keys, tiles, seed=keys)
    *vectors, grad = draw(queries, keys, d, dtype)
    for real in (None, draw_padding(keys, 0)):
        padded = real is not None
        forward, backward = TwoMemories(), TwoMemories()
        output, lse = flash_forward(*vectors, real, **chosen, memories=forward)
        flash_backward(*vectors, output, lse, grad, real, **chosen, memories=backward)
        heads = BATCH * HEADS
        assert forward.total == heads * flash_attention_bytes(queries, keys, d, size, **chosen, key_padding=padded)
        expected = backward_bytes(queries, keys, d, size, **chosen, key_padding=padded)
        assert backward.total == heads * expected.total

        # the same from the dense mask, tensor by tensor
        allowed = dense_mask(queries, keys, **chosen)
        seen_keys = seen_queries = 0
        for rows in allowed.split(tiles[0]):
            for tile in rows.split(tiles[1], dim=1):
                seen_queries += tile.shape[0] * bool(tile.any())
                seen_keys += tile.shape[1] * bool(tile.any())
        row, number = heads * d * size, heads * max(4, size)
        assert forward.loaded["Q"] == forward.stored["O"] == queries * row
        assert forward.loaded["K"] == forward.loaded["V"] == seen_keys * row
        assert forward.stored["LSE"] == backward.stored["delta"] == queries * number
        assert set(forward.stored) == {"O", "LSE"} and set(forward.loaded) - {"mask"} <= {"Q", "K", "V"}
        assert backward.loaded["O"] == backward.stored["dQ"] == queries * row
        assert backward.stored["dK"] == backward.stored["dV"] == keys * row
        assert backward.loaded["Q"] == (queries + seen_queries) * row
        assert backward.loaded["dO"] == (2 * queries + seen_queries) * row
        assert backward.loaded["LSE"] == backward.loaded["delta"] == (queries + seen_queries) * number
        assert backward.loaded["K"] == backward.loaded["V"] == (seen_keys + keys) * row
        assert expected.delta == 2 * queries * d * size + queries * max(4, size)
        assert expected.dq * heads == (3 * queries + 2 * seen_keys) * row + 2 * queries * number + heads * (
            padded * seen_keys
        )


def test_bytes_and_flops_by_hand():
    # float16, d_head 64, 512 tokens: 2 (2 n d + ceil(n / rows) 2 n d) + 4 n, written out
    sizes = {16: 4_327_424, 32: 2_230_272, 64: 1_181_696, 128: 657_408, 256: 395_264}
    for rows, expected in sizes.items():
        assert flash_attention_bytes(512, 512, 64, 2, block_queries=rows, block_keys=32) == expected
    standard = standard_attention_bytes(512, 512, 64, 2)
    assert standard == 2 * (4 * 512 * 512 + 4 * 512 * 64) == 2_359_296
    assert sizes[16] > standard > sizes[32]  # small tiles move more than no tiles at all
    # 2 x 2 whole tiles of 64 x 64, though there are only 100 tokens
    whole = {"block_queries": 64, "block_keys": 64}
    assert flash_attention_flops(100, 100, 64, **whole) == 4 * (4 * 64 * 64 * 64) == 4_194_304
    assert flash_attention_flops(100, 100, 64, **whole, causal=True) == 3 * (4 * 64 * 64 * 64)
    assert flash_attention_flops(100, 100, 33, **whole) == 4_194_304
    assert backward_flops(100, 100, 64, **whole) == (0, 3 * 2_097_152, 4 * 2_097_152)
    assert backward_flops(100, 100, 64, **whole).total == 7 * 2_097_152
    assert [padded_d_head(d) for d in (1, 16, 17, 64, 80)] == [16, 16, 32, 64, 128]


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("d_head", [16, 64, 80])
@pytest.mark.parametrize("sram", [6_000, 30_000, 100_000, 232_448])
def test_tiles_fill_the_fast_memory(sram, d_head, itemsize):
    rows, columns = tile_sizes_for(sram, d_head, itemsize)
    assert tile_bytes(rows, columns, d_head, itemsize) <= sram
    assert rows in (columns, 2 * columns)
    assert tile_bytes(2 * rows, 2 * columns, d_head, itemsize) > sram
    assert tile_bytes(2 * columns, 2 * columns, d_head, itemsize) > sram


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_held_at_once_is_what_the_formula_says(dtype):
    q, k, v, _ = draw(50, 70, 24, dtype)
    memories = TwoMemories()
    flash_forward(q, k, v, block_queries=16, block_keys=32, memories=memories)
    assert memories.peak_fast == tile_bytes(16, 32, 24, q.itemsize)


# --------------------------------------------------------------------------------------------------------- memory


def linear(amounts):
    """Whether a quantity at 1,024, 2,048, 4,096 and 8,192 tokens is a constant and a part that doubles."""
    steps = [b - a for a, b in itertools.pairwise(amounts)]
    return all(0 < b <= 2.01 * a for a, b in itertools.pairwise(steps))


def test_peak_memory_is_linear_in_the_length():
    block, d, peaks = 512, 16, {"forward": [], "backward": []}
    chosen = {"causal": True, "block_queries": block, "block_keys": block}
    for length in (1_024, 2_048, 4_096, 8_192):
        generator = torch.Generator().manual_seed(0)
        q, k, v, grad = torch.randn(4, 1, 1, length, d, generator=generator)
        output, lse = flash_forward(q, k, v, **chosen)
        peaks["forward"].append(peak_memory(lambda: flash_forward(q, k, v, **chosen)))  # noqa: B023
        peaks["backward"].append(
            peak_memory(lambda: flash_backward(q, k, v, output, lse, grad, **chosen))  # noqa: B023
        )
    for amounts in peaks.values():
        assert linear(amounts)
        # nearly all of it is a few tiles of 512 x 512; a table of all pairs would take 268 MB
        assert amounts[-1] <= 6 * 4 * block**2 < 4 * 8_192**2 / 40
    assert not linear([x**2 for x in (1_024, 2_048, 4_096, 8_192)])  # what a table of all pairs would show


def test_no_tensor_of_all_pairs():
    def largest(length):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 1, length, 16, generator=generator) for _ in "qkv")
        return largest_storage(lambda *x: tiled_attention(*x, causal=True, block_queries=128, block_keys=128), q, k, v)

    assert largest(1_024) == 1_024 * 16  # q itself, and no larger than one tile
    assert largest(2_048) / 2_048**2 <= 0.51 * largest(1_024) / 1_024**2


# ---------------------------------------------------------------------------------------------- padding, Transformer


@pytest.mark.parametrize("mask", MASKS)
def test_what_stands_in_padding_changes_nothing_and_gets_zeros(mask):
    chosen = random_settings(mask, 41, 41, (8, 16), seed=2)
    *vectors, grad = draw(41, 41, 8)
    real = draw_padding(41, 1)
    before = run(lambda q, k, v: tiled_attention(q, k, v, real, **chosen), *vectors, grad)
    _, lse = tiled_attention(*vectors, real, **chosen, return_lse=True)
    assert all(not x.transpose(1, 2)[~real].any() for x in before)
    assert (lse.transpose(1, 2)[~real] == -math.inf).all()
    for x in vectors:
        x.transpose(1, 2)[~real] = 1e4
    after = run(lambda q, k, v: tiled_attention(q, k, v, real, **chosen), *vectors, grad)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("model", "causal"), [(Encoder, False), (Decoder, True)])
def test_it_is_the_attention_of_the_courses_transformer(model, causal):
    config = TransformerConfig(vocab_size=50, max_length=24, d_model=12, layers=2, heads=3, d_ff=16, segments=0)
    token_ids = torch.randint(50, (2, 19), generator=torch.Generator().manual_seed(0))
    real = torch.arange(19) < torch.tensor([[19], [11]])
    tiled = model(config, attention=lambda *x: tiled_attention(*x, causal=causal, block_queries=4, block_keys=8))
    plain = model(config)
    plain.load_state_dict(tiled.state_dict())
    outputs = []
    for net in (tiled, plain):
        states = net.eval()(token_ids, real)[0][real]
        states.square().mean().backward()
        gradient = net.blocks[0].token_mixer.query.weight.grad
        outputs.append((states.detach(), gradient))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert outputs[0][1].abs().max() > 0


def test_bad_input_is_refused_by_name():
    x = torch.zeros(2, 3, 7, 4)
    tiny = {"block_queries": 4, "block_keys": 4}
    bad = [
        (ValueError, r"q, k, v must be \(batch", lambda: tiled_attention(x[0], x[0], x[0])),
        (ValueError, "do not fit together", lambda: tiled_attention(x, x[:, :2], x[:, :2])),
        (ValueError, "do not fit together", lambda: tiled_attention(x, x, x[:, :, :5])),
        (ValueError, "at least one token", lambda: tiled_attention(x, x[:, :, :0], x[:, :, :0])),
        (ValueError, "one floating-point dtype", lambda: tiled_attention(x, x.half(), x.half())),
        (ValueError, "one floating-point dtype", lambda: tiled_attention(x.long(), x.long(), x.long())),
        (ValueError, "key_padding_mask must be bool", lambda: tiled_attention(x, x, x, torch.ones(2, 7))),
        (ValueError, r"shape \(2, 7\)", lambda: tiled_attention(x, x, x, torch.ones(2, 6, dtype=torch.bool))),
        (ValueError, "window must be an integer >= 0, got -1", lambda: tiled_attention(x, x, x, window=-1)),
        (ValueError, "block_queries must be", lambda: tiled_attention(x, x, x, block_queries=0)),
        (ValueError, "block_keys must be", lambda: tiled_attention(x, x, x, block_keys=2.0)),
        (ValueError, r"shape \(2, 2\)", lambda: tiled_attention(x, x, x, block_mask=torch.ones(7, 7).bool(), **tiny)),
        (ValueError, "block_mask must be bool", lambda: tiled_attention(x, x, x, block_mask=torch.ones(2, 2), **tiny)),
        (
            ValueError,
            "block_mask cannot be combined with window",
            lambda: tiled_attention(x, x, x, block_mask=torch.ones(2, 2).bool(), window=3, **tiny),
        ),
        (ValueError, "queries must be", lambda: visited_tiles(0, 4, **tiny)),
        (ValueError, "d_head must be", lambda: flash_attention_bytes(4, 4, 0, 2, **tiny)),
        (ValueError, "d_head must be", lambda: backward_flops(4, 4, 0, **tiny)),
        (ValueError, "itemsize must be", lambda: backward_bytes(4, 4, 4, 0, **tiny)),
        (ValueError, "itemsize must be", lambda: standard_attention_bytes(4, 4, 4, True)),
        (ValueError, "sram_bytes must be >= 652", lambda: tile_sizes_for(600, 64, 2)),
    ]
    for error, message, call in bad:
        with pytest.raises(error, match=message):
            call()
    output, lse = flash_forward(x, x, x)
    with pytest.raises(ValueError, match=r"lse must have shape \(2, 3, 7\)"):
        flash_backward(x, x, x, output, lse[..., None], output)
    with pytest.raises(ValueError, match=r"grad_output must have shape \(2, 3, 7, 4\)"):
        flash_backward(x, x, x, output, lse, output[:, :, :3])
