"""The exercises of notebook 11: references against dense attention or the library, wrong answers against the grader.

The wrong answers are written here anew, as a student would write them; none uses a `Mistake` of the exercise.
"""

import math
import sys

import pytest
import torch

from effnlp_lessons.attention import flash as library
from effnlp_lessons.attention.flash_costs import flash_attention_bytes, standard_attention_bytes, visited_tiles
from effnlp_lessons.homework import HomeworkError
from effnlp_lessons.homework.compare import same
from effnlp_lessons.homework.flash import PREDICTIONS
from effnlp_lessons.homework.flash.backward import BACKWARD, flash_backward
from effnlp_lessons.homework.flash.kinds import TILE_KINDS, tile_kinds
from effnlp_lessons.homework.flash.masks import MASKED_TAIL, interpreted, masked_row_softmax
from effnlp_lessons.homework.flash.online import ONLINE_SOFTMAX, online_softmax
from effnlp_lessons.homework.flash.tiled import FORWARD, flash_forward
from effnlp_lessons.homework.flash.traffic import BYTES, bytes_moved
from effnlp_lessons.homework.grader import examine

tl = pytest.importorskip("triton.language", reason="Triton exists on Linux only, and a wrong kernel needs it")

SIZES = [  # queries, keys, block_queries, block_keys, causal
    (7, 7, 3, 2, False),
    (7, 7, 3, 2, True),
    (5, 11, 4, 3, True),
    (9, 4, 2, 3, True),
    (6, 13, 8, 16, True),
    (1, 9, 4, 4, True),
    (12, 8, 4, 4, False),
]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def visible(queries, keys, causal):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries if causal else keys)


def table_of_scores(q, k, causal):
    s = q @ k.T / math.sqrt(q.shape[1])
    return s.masked_fill(~visible(len(q), len(k), causal), -math.inf)


# ----------------------------------------------------------------------------- references


def test_online_softmax_is_one_softmax_over_all_tiles():
    scores, values = drawn(4, 9), drawn(9, 3, seed=1)
    scores[2] = -math.inf
    scores[1, :5] = -math.inf
    output, m, l = online_softmax(list(scores.split([4, 2, 3], dim=1)), list(values.split([4, 2, 3])))  # noqa: E741
    seen = [0, 1, 3]
    torch.testing.assert_close(output[seen], scores[seen].softmax(1) @ values)
    torch.testing.assert_close(m, scores.amax(1))
    torch.testing.assert_close((m + l.log())[seen], scores[seen].logsumexp(1))
    assert output[2].tolist() == [0, 0, 0] and l[2] == 0


@pytest.mark.parametrize("sizes", SIZES)
def test_tile_kinds_pair_by_pair_and_by_the_library(sizes):
    queries, keys, block_queries, block_keys, causal = sizes
    table, pairs = tile_kinds(*sizes), visible(queries, keys, causal)
    listed = visited_tiles(queries, keys, block_queries=block_queries, block_keys=block_keys, causal=causal)
    library_kinds = {(tile.query_block, tile.key_block): tile.kind for tile in listed}
    assert (len(table), len(table[0])) == (-(-queries // block_queries), -(-keys // block_keys))
    for i, row in enumerate(table):
        for j, kind in enumerate(row):
            tile = pairs[i * block_queries : (i + 1) * block_queries, j * block_keys : (j + 1) * block_keys]
            whole = bool(tile.all()) and tile.shape[1] == block_keys
            assert kind == ("full" if whole else "partial" if tile.any() else "skipped")
            assert kind == library_kinds.get((i, j), "skipped")


@pytest.mark.parametrize("sizes", SIZES)
def test_forward_is_dense_attention_and_the_librarys(sizes):
    queries, keys, block_queries, block_keys, causal = sizes
    q, k, v = drawn(queries, 5), drawn(keys, 5, seed=1), drawn(keys, 5, seed=2)
    output, lse = flash_forward(q, k, v, block_queries, block_keys, causal)
    scores = table_of_scores(q, k, causal)
    torch.testing.assert_close(output, scores.softmax(1).nan_to_num() @ v)
    torch.testing.assert_close(lse, scores.logsumexp(1))
    tiled = library.flash_forward(
        *(x[None, None] for x in (q, k, v)), causal=causal, block_queries=block_queries, block_keys=block_keys
    )
    torch.testing.assert_close((output, lse), tuple(x[0, 0] for x in tiled))


@pytest.mark.parametrize("sizes", SIZES)
def test_backward_is_the_gradient_of_dense_attention(sizes):
    queries, keys, block_queries, block_keys, causal = sizes
    q, k, v = (x.requires_grad_() for x in (drawn(queries, 5), drawn(keys, 5, seed=1), drawn(keys, 5, seed=2)))
    seen = visible(queries, keys, causal).any(1)  # autograd's softmax of a row of -inf is NaN
    dense = table_of_scores(q[seen], k, False).masked_fill(~visible(queries, keys, causal)[seen], -math.inf)
    grad_output = drawn(queries, 5, seed=3)
    expected = torch.autograd.grad(dense.softmax(1) @ v, (q, k, v), grad_output[seen])
    q, k, v = (x.detach() for x in (q, k, v))
    output, lse = flash_forward(q, k, v, block_queries, block_keys, causal)
    got = flash_backward(q, k, v, output, lse, grad_output, block_queries, block_keys, causal)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_bytes_are_the_librarys(sizes, itemsize):
    queries, keys, block_queries, block_keys, causal = sizes
    blocks = {"block_queries": block_queries, "block_keys": block_keys, "causal": causal}
    assert bytes_moved(queries, keys, 5, itemsize, *sizes[2:]) == flash_attention_bytes(
        queries, keys, 5, itemsize, **blocks
    )
    if itemsize == 4:
        memories = library.TwoMemories()
        q, k, v = (drawn(1, 1, n, 5).float() for n in (queries, keys, keys))
        library.flash_forward(q, k, v, **blocks, memories=memories)
        assert bytes_moved(queries, keys, 5, itemsize, *sizes[2:]) == memories.total


def row_softmax(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < length
    x = tl.load(scores + row * row_stride + columns, mask=inside, other=-float("inf"))
    powers = tl.exp(x - tl.max(x, axis=0))
    tl.store(weights + row * row_stride + columns, powers / tl.sum(powers, axis=0), mask=inside)


@pytest.mark.parametrize("length", [1, 5, 8])
@pytest.mark.parametrize("gap", [0, 3])
def test_masked_row_softmax_is_the_kernels(length, gap):
    scores = drawn(2 * (length + gap) + length).float()
    got = interpreted(row_softmax)(scores, 3, length + gap, length, 8)
    torch.testing.assert_close(got, masked_row_softmax(scores, 3, length + gap, length, 8))
    rows = [scores[r * (length + gap) :][:length] for r in range(3)]
    torch.testing.assert_close(got[:length], rows[0].softmax(0))
    torch.testing.assert_close(got[-length:], rows[2].softmax(0))


def test_the_right_kernel_passes_plain_and_decorated():
    import triton

    for kernel in (row_softmax, triton.jit(row_softmax)):
        assert not any(finding.problem for finding in examine(MASKED_TAIL, interpreted(kernel), seed=0))


def test_the_line_of_a_kernel_outside_its_tensor_is_named():
    ends = [f for f in examine(MASKED_TAIL, interpreted(row_without_store_mask), seed=0) if not f.returned]
    assert ends and all("tl.store(weights" in f.problem[1] for f in ends)
    assert all("of weights" in f.summary for f in ends)


def blank_kernel(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    raise NotImplementedError("your code here")


def test_a_blank_kernel_is_not_written_yet():
    assert all(finding.blank for finding in examine(MASKED_TAIL, interpreted(blank_kernel), seed=0))


def test_without_triton_and_without_a_kernel_one_line_says_so(monkeypatch):
    with pytest.raises(HomeworkError, match="interpreted needs the kernel itself"):
        interpreted(3)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(HomeworkError, match="there is no Triton here .it exists on Linux only."):
        interpreted(row_softmax)


# ----------------------------------------------------------------------------- predictions


def test_tiles_of_32_queries_are_the_first_that_move_less_than_standard_attention():
    standard = standard_attention_bytes(512, 512, 64, 2)
    moved = {block: bytes_moved(512, 512, 64, 2, block, 64, False) for block in (8, 16, 32, 64)}
    assert [block for block, total in moved.items() if total < standard] == [32, 64]


def test_46_per_cent_of_the_tiles_are_skipped():
    row = [kind for row in tile_kinds(1000, 1000, 64, 64, True) for kind in row]
    assert (row.count("skipped"), len(row)) == (120, 256)  # 46.9 %


def test_tiles_differ_from_dense_attention_in_the_last_digits():
    q, k, v = drawn(3, 200, 16).float()
    dense = table_of_scores(q, k, True).softmax(1) @ v
    worst = float((flash_forward(q, k, v, 64, 64, True)[0] - dense).abs().max())
    assert 0 < worst < 1e-5


def test_no_recorded_guess_is_the_truth():
    truths = {"flash.small_sram": 32, "flash.causal_share": 46.9, "flash.exact": "in the last digits"}
    assert {one.id for one in PREDICTIONS} == set(truths)
    assert all(one.accept(truths[one.id]) is not None and one.recorded != truths[one.id] for one in PREDICTIONS)


# --------------------------------------------------------------------------- wrong answers


def online(first, later):
    """Running maximum and sums by hand, row by row; `later` gives the factors of sum and output, of (old, new)."""

    def answer(scores, values):
        rows = len(scores[0])
        out, tops, sums = torch.zeros(rows, values[0].shape[1], dtype=values[0].dtype), [], []
        for r in range(rows):
            top, total, mixed = first, 0.0, torch.zeros_like(out[r])
            for s, v in zip(scores, values, strict=True):
                new = max(top, float(s[r].max()))
                away = 0.0 if new == -math.inf else new
                of_total, of_mixed = later(top, away)
                p = torch.exp(s[r] - away)
                total, mixed, top = of_total * total + float(p.sum()), of_mixed * mixed + p @ v, new
            out[r] = mixed / total if total else torch.full_like(mixed, 0 if first else math.nan)
            tops.append(top)
            sums.append(total)
        return out, torch.tensor(tops, dtype=out.dtype), torch.tensor(sums, dtype=out.dtype)

    return answer


def upside_down(old, new):
    return math.exp(old - new), math.inf if old == -math.inf else math.exp(new - old)


def only_the_sum(old, new):
    return math.exp(old - new), 1


def only_the_output(old, new):
    return 1, math.exp(old - new)


def online_with_nan(scores, values):
    m = torch.full((len(scores[0]),), -math.inf, dtype=values[0].dtype)
    total, out = torch.zeros_like(m), 0
    for s, v in zip(scores, values, strict=True):
        new = torch.max(m, s.max(dim=1).values)
        p = torch.exp(s - new[:, None])
        total = total * torch.exp(m - new) + p.sum(1)
        out = out * torch.exp(m - new)[:, None] + p @ v
        m = new
    return out / total[:, None], m, total


def online_divided_each_time(scores, values):
    _, m, total = online_softmax(scores, values)
    top, running, out = torch.full_like(m, -math.inf), torch.zeros_like(m), torch.zeros(len(m), values[0].shape[1])
    for s, v in zip(scores, values, strict=True):
        new = torch.maximum(top, s.max(1).values)
        away = torch.where(new.isinf(), 0.0, new)
        p = torch.exp(s - away[:, None])
        running = running * torch.exp(top - away) + p.sum(1)
        divisor = torch.where(running == 0, 1.0, running)[:, None]
        out, top = (out * torch.exp(top - away)[:, None] + p @ v) / divisor, new
    return out, m, total


def kinds_pair_by_pair(place=lambda i, queries, keys: i + keys - queries, tail="partial", up=True):
    """The kinds from a table of all pairs."""

    def answer(queries, keys, block_queries, block_keys, causal):
        sees = [[not causal or j <= place(i, queries, keys) for j in range(keys)] for i in range(queries)]
        table = []
        for i in range(0, queries if up else queries // block_queries * block_queries, block_queries):
            row = []
            for j in range(0, keys if up else keys // block_keys * block_keys, block_keys):
                tile = [pair for line in sees[i : i + block_queries] for pair in line[j : j + block_keys]]
                kind = "full" if all(tile) else "partial" if any(tile) else "skipped"
                row.append(tail if kind == "full" and j + block_keys > keys else kind)
            table.append(row)
        return table

    return answer


def kinds_without_skipping(*sizes):
    return [["partial" if kind == "skipped" else kind for kind in row] for row in tile_kinds(*sizes)]


def whole_rows(q, k, v, block_queries, block_keys, causal):
    """Each query's scores with the keys that it sees: one row at a time, in no tiles."""
    for i in range(len(q)):
        s = k @ q[i] / math.sqrt(len(q[i]))
        yield s[: max(0, min(len(k), i + 1 + len(k) - len(q)))] if causal else s


def forward_by_rows(nothing):
    """Attention, a row at a time; `nothing` is the output of a query that sees no key."""

    def answer(q, k, v, *settings):
        out, sums = torch.full_like(q, nothing), torch.full_like(q[:, 0], -math.inf)
        for i, s in enumerate(whole_rows(q, k, v, *settings)):
            if len(s):
                out[i], sums[i] = s.softmax(0) @ v[: len(s)], s.logsumexp(0)
        return out, sums

    return answer


def forward_with_zeros_behind(q, k, v, block_queries, block_keys, causal):
    """Keys and values filled up with zeros to a multiple of the block; nothing hides them unless causal does."""
    extra = -len(k) % block_keys
    k_filled, v_filled = (torch.cat([x, x.new_zeros(extra, x.shape[1])]) for x in (k, v))
    out, sums = [], []
    for i in range(len(q)):
        s = k_filled @ q[i] / math.sqrt(q.shape[1])
        if causal:
            s = s[: max(0, min(i + len(k) - len(q) + 1, len(s)))]
        out.append(s.softmax(0) @ v_filled[: len(s)])
        sums.append(s.logsumexp(0))
    return torch.stack(out), torch.stack(sums)


def forward_for_multiples(q, k, v, block_queries, block_keys, causal):
    k.reshape(-1, block_keys, k.shape[1]), q.reshape(-1, block_queries, q.shape[1])
    return forward_by_rows(0.0)(q, k, v, block_queries, block_keys, causal)


def forward_off_by_one(q, k, v, block_queries, block_keys, causal):
    if not causal:
        return flash_forward(q, k, v, block_queries, block_keys, False)
    # one more query behind makes every query stand one key earlier
    out, lse = flash_forward(torch.cat([q, q[-1:]]), k, v, block_queries, block_keys, True)
    return out[:-1], lse[:-1]


def forward_top_left(q, k, v, block_queries, block_keys, causal):
    if not causal:
        return flash_forward(q, k, v, block_queries, block_keys, False)
    outputs = [flash_forward(q[i : i + 1], k[: i + 1], v[: i + 1], 1, block_keys, False) for i in range(len(q))]
    return torch.cat([o for o, _ in outputs]), torch.cat([lse for _, lse in outputs])


def forward_without_scale(q, k, v, *settings):
    return flash_forward(q * math.sqrt(q.shape[1]), k, v, *settings)


def forward_lse_of_the_sum(q, k, v, *settings):
    largest = [float(s.max()) if len(s) else -math.inf for s in whole_rows(q, k, v, *settings)]
    out, lse = flash_forward(q, k, v, *settings)
    away = torch.tensor(largest, dtype=q.dtype)
    return out, torch.where(away == -math.inf, away, lse - away)


def forward_all_scores(q, k, v, block_queries, block_keys, causal):
    s = table_of_scores(q, k, causal).to(q.dtype)
    return s.softmax(1).nan_to_num() @ v, s.logsumexp(1)


def gradients(weights=None, delta=True, ds=None, dq_scale=True, dk_scale=True, hidden=True):
    """Gradients, one key after another, in no tiles; the arguments say what is done wrong."""

    def answer(q, k, v, output, lse, grad_output, block_queries, block_keys, causal):
        scale = 1 / math.sqrt(q.shape[1])
        dq, dk, dvs = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d = (grad_output * output).sum(1) if delta else torch.zeros_like(lse)
        for j in range(len(k)):
            s = q @ k[j] * scale
            if causal and hidden:
                s = torch.where(torch.arange(len(q)) + len(k) - len(q) < j, -math.inf, s)
            p = (s - lse).exp() if weights == "nan" else (s - torch.where(lse.isinf(), 0.0, lse)).exp()
            dp = grad_output @ v[j]
            g = ds(p, dp, d) if ds else p * (dp - d)
            dq += torch.outer(g, k[j]) * (scale if dq_scale else 1)
            dk[j] = g @ q * (scale if dk_scale else 1)
            dvs[j] = p @ grad_output
        return dq, dk, dvs

    return answer


def gradients_with_p_the_wrong_way(q, k, v, output, lse, grad_output, block_queries, block_keys, causal):
    dq, dk, dv = flash_backward(q, k, v, output, lse, grad_output, block_queries, block_keys, causal)
    dv = torch.zeros_like(dv)
    p = (table_of_scores(q, k, causal) - lse[:, None]).exp().nan_to_num()
    for i in range(0, len(q), block_queries):
        for j in range(0, len(k), block_keys):
            dv[j : j + block_keys] += (
                p[i : i + block_queries, j : j + block_keys] @ grad_output[i : i + block_queries]
            )  # raises unless the tile is square
    return dq, dk, dv


def counted(key_rows, lse=4):
    """Bytes from the sum of loaded keys over all blocks of queries."""

    def answer(queries, keys, d_head, itemsize, block_queries, block_keys, causal):
        rows = key_rows(queries, keys, block_queries, block_keys, causal)
        return itemsize * d_head * (2 * queries + 2 * rows) + lse * queries

    return answer


def keys_of_tiles(queries, keys, block_queries, block_keys, causal):
    table = tile_kinds(queries, keys, block_queries, block_keys, causal)
    return sum(min(block_keys, keys - j * block_keys) for row in table for j, kind in enumerate(row) if kind[0] != "s")


def keys_of_whole_tiles(queries, keys, block_queries, block_keys, causal):
    table = tile_kinds(queries, keys, block_queries, block_keys, causal)
    return sum(block_keys for row in table for kind in row if kind != "skipped")


def keys_of_whole_blocks(queries, keys, block_queries, block_keys, causal):
    table = tile_kinds(queries, keys, block_queries, block_keys, causal)
    rows = [row[: keys // block_keys] for row in table[: queries // block_queries]]
    return sum(block_keys for row in rows for kind in row if kind != "skipped")


def keys_exchanged(queries, keys, block_queries, block_keys, causal):
    return keys_of_tiles(queries, keys, block_keys, block_queries, causal)


def half_of_the_keys(queries, keys, block_queries, block_keys, causal):
    loaded = -(-queries // block_queries) * keys
    return loaded // 2 if causal else loaded


def row_without_masks(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    place = tl.program_id(0) * row_stride + tl.arange(0, BLOCK)
    x = tl.load(scores + place)
    powers = tl.exp(x - tl.max(x, axis=0))
    tl.store(weights + place, powers / tl.sum(powers, axis=0))


def row_without_load_mask(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    columns = tl.arange(0, BLOCK)
    place = tl.program_id(0) * row_stride + columns
    x = tl.load(scores + place)
    powers = tl.exp(x - tl.max(x, axis=0))
    tl.store(weights + place, powers / tl.sum(powers, axis=0), mask=columns < length)


def row_without_store_mask(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    columns = tl.arange(0, BLOCK)
    place = tl.program_id(0) * row_stride + columns
    x = tl.load(scores + place, mask=columns < length, other=-float("inf"))
    powers = tl.exp(x - tl.max(x, axis=0))
    tl.store(weights + place, powers / tl.sum(powers, axis=0))


def row_with_zeros(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    columns = tl.arange(0, BLOCK)
    place = tl.program_id(0) * row_stride + columns
    x = tl.load(scores + place, mask=columns < length, other=0.0)
    powers = tl.exp(x - tl.max(x, axis=0))
    tl.store(weights + place, powers / tl.sum(powers, axis=0), mask=columns < length)


def row_with_zeros_out_of_the_sum(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    columns = tl.arange(0, BLOCK)
    place = tl.program_id(0) * row_stride + columns
    x = tl.load(scores + place, mask=columns < length, other=0.0)
    powers = tl.where(columns < length, tl.exp(x - tl.max(x, axis=0)), 0.0)
    tl.store(weights + place, powers / tl.sum(powers, axis=0), mask=columns < length)


def row_with_one_more(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    columns = tl.arange(0, BLOCK)
    inside = columns <= length
    place = tl.program_id(0) * row_stride + columns
    x = tl.load(scores + place, mask=inside, other=-float("inf"))
    powers = tl.exp(x - tl.max(x, axis=0))
    tl.store(weights + place, powers / tl.sum(powers, axis=0), mask=inside)


def row_without_other(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    columns = tl.arange(0, BLOCK)
    place = tl.program_id(0) * row_stride + columns
    x = tl.load(scores + place, mask=columns < length)
    powers = tl.exp(x - tl.max(x, axis=0))
    tl.store(weights + place, powers / tl.sum(powers, axis=0), mask=columns < length)


def row_by_places(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    place = tl.program_id(0) * row_stride + tl.arange(0, BLOCK)
    x = tl.load(scores + place, mask=place < length, other=-float("inf"))
    powers = tl.exp(x - tl.max(x, axis=0))
    tl.store(weights + place, powers / tl.sum(powers, axis=0), mask=place < length)


def row_without_maximum(scores, weights, row_stride, length, BLOCK: "tl.constexpr"):
    columns = tl.arange(0, BLOCK)
    place = tl.program_id(0) * row_stride + columns
    powers = tl.exp(tl.load(scores + place, mask=columns < length, other=-float("inf")))
    tl.store(weights + place, powers / tl.sum(powers, axis=0), mask=columns < length)


WRONG_ANSWERS = [
    (
        "flash.online_softmax",
        online(-math.inf, lambda old, new: (math.exp(old - new), 1)),
        "The output is not rescaled",
    ),
    ("flash.online_softmax", online(-math.inf, lambda old, new: (1, math.exp(old - new))), "The sum is not rescaled"),
    ("flash.online_softmax", online(-math.inf, lambda old, new: (1, 1)), "Nothing is rescaled"),
    ("flash.online_softmax", online(-math.inf, upside_down), "The factor is upside down"),
    ("flash.online_softmax", online_with_nan, "-inf minus -inf"),
    ("flash.online_softmax", online(0.0, lambda old, new: (math.exp(old - new),) * 2), "The maximum starts at 0"),
    ("flash.online_softmax", online_divided_each_time, "Divided at every tile"),
    ("flash.tile_kinds", kinds_pair_by_pair(lambda i, n, m: i + m - n - 1), "Causal off by one"),
    ("flash.tile_kinds", kinds_pair_by_pair(lambda i, n, m: i), "Aligned at the top left"),
    ("flash.tile_kinds", kinds_pair_by_pair(tail="full"), "The ragged tail is called full"),
    ("flash.tile_kinds", kinds_pair_by_pair(up=False), "The tail is forgotten"),
    ("flash.tile_kinds", kinds_without_skipping, "Nothing is skipped"),
    ("flash.tile_kinds", lambda n, m, a, b, causal: tile_kinds(n, m, b, a, causal), "The block sizes are exchanged"),
    ("flash.forward", forward_with_zeros_behind, "The tail is not masked"),
    ("flash.forward", forward_for_multiples, "Works only for multiples of the block"),
    ("flash.forward", forward_without_scale, "The scale is missing"),
    ("flash.forward", forward_lse_of_the_sum, "The log-sum-exp without the maximum"),
    ("flash.forward", forward_off_by_one, "Causal off by one"),
    ("flash.forward", forward_top_left, "Causal, aligned at the top left"),
    ("flash.forward", forward_by_rows(math.nan), "A query without a key is divided by 0"),
    ("flash.forward", forward_all_scores, "All scores at once"),
    ("flash.backward", gradients(dk_scale=False), "The scale is missing in dk"),
    ("flash.backward", gradients(dq_scale=False), "The scale is missing in dq"),
    ("flash.backward", gradients(delta=False), "delta is forgotten"),
    ("flash.backward", gradients(ds=lambda p, dp, d: p * dp - d), "delta in the wrong place"),
    ("flash.backward", gradients(hidden=False), "The causal mask is not made again"),
    ("flash.backward", gradients(weights="nan"), "-inf minus -inf"),
    ("flash.backward", gradients_with_p_the_wrong_way, "P is not transposed in dV"),
    ("flash.bytes", counted(keys_of_whole_blocks), "Only whole blocks are counted"),
    ("flash.bytes", counted(keys_of_whole_tiles), "The last tile is counted whole"),
    ("flash.bytes", counted(lambda queries, keys, *others: keys), "Keys and values only once"),
    ("flash.bytes", counted(keys_of_tiles, lse=0), "The LSE is forgotten"),
    ("flash.bytes", counted(keys_exchanged), "block_keys in the place of block_queries"),
    ("flash.bytes", counted(half_of_the_keys), "Causal is half"),
    ("flash.masked_tail", interpreted(row_without_masks), "No mask at all"),
    ("flash.masked_tail", interpreted(row_without_load_mask), "The load has no mask"),
    ("flash.masked_tail", interpreted(row_without_store_mask), "The store has no mask"),
    ("flash.masked_tail", interpreted(row_with_zeros), "Hidden lanes count as 0"),
    ("flash.masked_tail", interpreted(row_without_other), "Hidden lanes count as 0"),
    ("flash.masked_tail", interpreted(row_with_zeros_out_of_the_sum), "Hidden lanes count as 0 in the maximum"),
    ("flash.masked_tail", interpreted(row_with_one_more), "The mask lets one lane too many through"),
    ("flash.masked_tail", interpreted(row_by_places), "The mask counts from the start of the tensor"),
    ("flash.masked_tail", interpreted(row_without_maximum), "The maximum is not subtracted"),
]


# ----------------------------------------------------- one friendly shape would let these pass


def friendly(queries=4, keys=4, seed=0, causal=False):
    q, grad = drawn(2, queries, 4, seed=seed)
    k, v = drawn(2, keys, 4, seed=seed + 1)
    output, lse = flash_forward(q, k, v, queries, keys, causal)
    return q, k, v, output, lse, grad


@pytest.mark.parametrize(
    ("wrong", "right", "inputs"),
    [
        (forward_with_zeros_behind, flash_forward, (*friendly(8, 8)[:3], 4, 4, True)),
        (forward_for_multiples, flash_forward, (*friendly(8, 8)[:3], 4, 4, True)),
        (forward_top_left, flash_forward, (*friendly(8, 8)[:3], 4, 4, True)),
        (gradients(weights="nan"), flash_backward, (*friendly(8, 8, causal=True), 4, 4, True)),
        (kinds_pair_by_pair(up=False), tile_kinds, (8, 8, 4, 4, True)),
        (kinds_pair_by_pair(tail="full"), tile_kinds, (8, 8, 4, 4, True)),
        (kinds_pair_by_pair(lambda i, n, m: i), tile_kinds, (8, 8, 4, 4, True)),
        (counted(keys_of_whole_blocks), bytes_moved, (8, 8, 4, 2, 4, 4, True)),
        (counted(keys_of_whole_tiles), bytes_moved, (8, 8, 4, 2, 4, 4, True)),
        (counted(keys_exchanged), bytes_moved, (8, 8, 4, 2, 4, 4, True)),
        (interpreted(row_without_masks), masked_row_softmax, (drawn(24).float(), 3, 8, 8, 8)),
        (interpreted(row_with_zeros), masked_row_softmax, (drawn(24).float(), 3, 8, 8, 8)),
        (interpreted(row_with_one_more), masked_row_softmax, (drawn(24).float(), 3, 8, 8, 8)),
    ],
)
def test_these_are_right_for_powers_of_two_and_fail_all_the_same(wrong, right, inputs):
    assert same(wrong(*inputs), right(*inputs))
    exercise = next(
        one
        for one in (ONLINE_SOFTMAX, TILE_KINDS, FORWARD, BACKWARD, BYTES, MASKED_TAIL)
        if one.reference.__name__ == right.__name__
    )
    assert any(finding.problem for finding in examine(exercise, wrong, seed=0))
