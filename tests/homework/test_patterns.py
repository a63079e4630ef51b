"""The exercises of notebook 08: references against independent loops, and wrong answers against the grader.

The wrong answers are written here anew, as a student would write them; none uses a `Mistake` of the exercise.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from effnlp_lessons.attention import bigbird, etc, local
from effnlp_lessons.homework import HomeworkError, check
from effnlp_lessons.homework.patterns.blocks import block_permuted_attention
from effnlp_lessons.homework.patterns.chunks import WINDOW_ATTENTION, window_attention
from effnlp_lessons.homework.patterns.global_tokens import window_with_globals
from effnlp_lessons.homework.patterns.labels import relative_labels
from effnlp_lessons.homework.patterns.memory import memory_block
from effnlp_lessons.homework.patterns.multiplicity import bigbird_multiplicity
from effnlp_lessons.homework.patterns.reach import reach
from effnlp_lessons.homework.patterns.sinks import sink_pairs
from effnlp_lessons.homework.patterns.sparse import strided_and_fixed
from effnlp_lessons.homework.patterns.window import window_mask


def as_mask(keys_of_query):
    """The mask of a list with a set of keys for every query."""
    mask = torch.zeros(len(keys_of_query), len(keys_of_query), dtype=torch.bool)
    for query, keys in enumerate(keys_of_query):
        for key in keys:
            mask[query, key] = True
    return mask


def attend_one_by_one(q, k, v, keys_of):
    """Attention in plain loops: `keys_of(batch, head, query)` lists the keys, one entry for every time it counts."""
    output = torch.zeros_like(q)
    for batch, head, query in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        keys = list(keys_of(batch, head, query))
        powers = [math.exp(float(q[batch, head, query] @ k[batch, head, key]) / q.shape[-1] ** 0.5) for key in keys]
        for power, key in zip(powers, keys, strict=True):
            output[batch, head, query] += power / sum(powers) * v[batch, head, key]
    return output


def random_qkv(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, *shape, generator=generator, dtype=torch.float64)


# ----------------------------------------------------------------------------- references


@pytest.mark.parametrize(
    ("length", "window", "dilation"), [(9, 2, 1), (13, 2, 3), (8, 1, 4), (5, 9, 2), (6, 0, 3), (1, 2, 2)]
)
def test_window_mask_walks_step_by_step(length, window, dilation):
    steps = [step * dilation for step in range(-window, window + 1)]
    keys = [[i + step for step in steps if 0 <= i + step < length] for i in range(length)]
    assert torch.equal(window_mask(length, window, dilation), as_mask(keys))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "block", "flange"), [(12, 4, 2), (13, 4, 5), (9, 3, 0), (5, 8, 1), (1, 2, 3)])
def test_memory_block_asks_every_pair(length, block, flange, causal):
    blocks = [range(start, start + block) for start in range(0, length, block)]
    for query in range(length):
        own = next(tokens for tokens in blocks if query in tokens)
        memory = {token + step for token in own for step in range(-flange, flange + 1)}
        seen = [key for key in range(length) if key in memory and not (causal and key > query)]
        assert memory_block(query, length, block, flange, causal) == (seen[0], seen[-1])
        assert seen == local.local_mask(length, block, flange, causal)[query].nonzero().flatten().tolist()


def test_the_memory_blocks_of_the_notebook():
    table = {1: ((0, 4), (0, 1)), 6: ((3, 8), (3, 6)), 9: ((7, 9), (7, 9))}
    for query, (both, causal) in table.items():
        assert memory_block(query, 10, 4, 1, False) == both and memory_block(query, 10, 4, 1, True) == causal


@pytest.mark.parametrize("max_distance", [1, 2, 5, 40])
def test_relative_labels_one_by_one(max_distance):
    queries, keys = torch.tensor([4, 0, 17]), torch.tensor([0, 3, 4, 5, 9, 17, 30])
    right, left = list(range(max_distance + 1)), [0, *range(max_distance + 1, 2 * max_distance + 1)]
    names = right + [max_distance] * 40, left + [2 * max_distance] * 40  # of distance 0, 1, 2, ...
    expected = [[names[k < q][abs(k - q)] for k in keys.tolist()] for q in queries.tolist()]
    assert relative_labels(queries, keys, max_distance).tolist() == expected
    assert torch.equal(relative_labels(queries, keys, max_distance), etc.relative_labels(queries, keys, max_distance))


def test_the_labels_of_the_notebook():
    assert relative_labels(torch.tensor([5]), torch.arange(2, 9), 2).tolist() == [[4, 4, 3, 0, 1, 2, 2]]


@pytest.mark.parametrize(("blocks", "random_blocks"), [(1, 2), (2, 1), (3, 2), (4, 3), (7, 3), (9, 0)])
def test_bigbird_multiplicity_counts_a_list(blocks, random_blocks):
    plan = torch.randint(-1, blocks, (blocks, random_blocks), generator=torch.Generator().manual_seed(blocks))
    for query, row in enumerate(bigbird_multiplicity(blocks, plan).tolist()):
        listed = list({0, blocks - 1, query - 1, query, query + 1}) + plan[query].tolist()
        if query in (0, blocks - 1):
            listed = list(range(blocks))
        assert row == [listed.count(key) for key in range(blocks)]
    definition = bigbird.bigbird_multiplicity(blocks, 1, plan[None])[0]
    assert torch.equal(bigbird_multiplicity(blocks, plan), definition)


def test_the_lists_of_the_notebook():
    plan = torch.full((6, 2), -1)
    plan[1], plan[2, 1] = 3, 5
    assert bigbird_multiplicity(6, plan)[1:3].tolist() == [[1, 1, 1, 2, 0, 1], [1, 1, 1, 1, 0, 2]]


def test_reach_is_what_a_change_of_an_input_can_change():
    generator = torch.Generator().manual_seed(3)
    for layers in (1, 2, 3, 4):
        masks = [torch.rand(7, 7, generator=generator) < 0.2 for _ in range(layers)]
        sources = [{token} for token in range(7)]
        for mask in masks:
            sources = [set().union(sources[i], *(sources[m] for m in range(7) if mask[i, m])) for i in range(7)]
        assert torch.equal(reach(masks), as_mask(sources))


def test_only_one_order_of_the_fixed_masks_reaches_the_whole_past():
    length, stride = 12, 4
    own = as_mask([[j for j in range(i + 1) if i // stride == j // stride] for i in range(length)])
    summaries = as_mask([[j for j in range(i + 1) if j % stride == stride - 1] for i in range(length)])
    past = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(reach([own, summaries]), past)
    assert not torch.equal(reach([summaries, own]), past)


@pytest.mark.parametrize(("length", "stride", "summary"), [(12, 4, 1), (13, 4, 2), (5, 7, 3), (8, 2, 2), (1, 3, 1)])
def test_strided_and_fixed_set_by_set(length, stride, summary):
    strided, fixed = [], []
    for i in range(length):
        strided.append({*range(max(0, i - stride + 1), i + 1), *range(i, -1, -stride)})
        begin = i - i % stride
        ends = range(stride, length + stride, stride)
        last = {j for end in ends for j in range(end - summary, end) if j <= i}
        fixed.append({*range(begin, i + 1), *last})
    given = strided_and_fixed(length, stride, summary)
    assert torch.equal(given[0], as_mask(strided)) and torch.equal(given[1], as_mask(fixed))


def test_the_longer_window_of_the_paper_gives_the_same_merged_mask():
    paper = as_mask([{*range(max(0, i - 4), i + 1), *range(i, -1, -4)} for i in range(15)])
    assert torch.equal(strided_and_fixed(15, 4, 1)[0], paper)


def test_block_permuted_attention_one_by_one():
    q, k, v = random_qkv(2, 3, 12, 4)
    permutations = torch.tensor([[1, 2, 0], [2, 0, 1], [0, 2, 1]])

    def keys_of(batch, head, query):
        block = int(permutations[head, query // 4])
        return range(4 * block, 4 * block + 4)

    expected = attend_one_by_one(q, k, v, keys_of)
    torch.testing.assert_close(block_permuted_attention(q, k, v, permutations), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("length", "window"), [(8, 2), (9, 2), (11, 3), (2, 5), (1, 1), (7, 1)])
def test_window_attention_one_by_one(length, window):
    q, k, v = random_qkv(2, 2, length, 3, seed=length)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, 1::2] = False
    mask[1, -1] = length == 1

    def keys_of(batch, head, query):
        near = range(max(0, query - window), min(length, query + window + 1))
        return [key for key in near if mask[batch, key]] if mask[batch, query] else []

    expected = attend_one_by_one(q, k, v, keys_of)
    torch.testing.assert_close(window_attention(q, k, v, mask, window), expected, rtol=1e-12, atol=1e-12)


def test_window_with_globals_one_by_one():
    q, k, v = random_qkv(2, 2, 9, 3)
    is_global = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.bool)

    def keys_of(batch, head, query):
        near = set(range(max(0, query - 2), min(9, query + 3)))
        return range(9) if is_global[query] else near | {0, 4}

    expected = attend_one_by_one(q, k, v, keys_of)
    given = window_with_globals(q, k, v, 2, is_global)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


def test_the_starter_counts_a_global_key_in_the_window_twice():
    q, k, v = random_qkv(1, 2, 9, 3)
    is_global = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.bool)

    def keys_of(batch, head, query):
        return range(9) if is_global[query] else [*range(max(0, query - 2), min(9, query + 3)), 0, 4]

    twice = attend_one_by_one(q, k, v, keys_of)
    torch.testing.assert_close(starter_of_the_notebook(q, k, v, 2, is_global), twice, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 8, 17])
def test_sink_pairs_counts_a_set_for_every_query(length, window, sinks):
    keys = [{j for j in range(i + 1) if j < sinks or i - j <= window} for i in range(length)]
    assert sink_pairs(length, window, sinks) == sum(map(len, keys))


def test_sinks_cost_as_much_as_a_wider_window():
    assert sink_pairs(10_000, 1020, 4) == sink_pairs(10_000, 1024, 0)


# ----------------------------------------------------------------------------- wrong answers


def distances(length):
    return torch.arange(length).view(-1, 1) - torch.arange(length)


def walk(steps, stays=True):
    """A mask by walking: for each query the keys at the offsets `steps(window, dilation)`."""

    def mask(length, window, dilation):
        offsets = [step for step in steps(window, dilation) if stays or step]
        return as_mask([[i + step for step in offsets if 0 <= i + step < length] for i in range(length)])

    return mask


def same_grid_for_all(length, window, dilation):
    mask = distances(length).abs() <= window * dilation
    off_the_grid = [j for j in range(length) if j % dilation]
    mask[:, off_the_grid] = False
    return mask


def memory_by(keys_of, lowest=0):
    """First and last of the keys `keys_of(query, length, block, flange, causal)`, cut to the text unless told."""

    def answer(query, length, block, flange, causal):
        keys = [key for key in keys_of(query, length, block, flange, causal) if lowest <= key < length]
        return min(keys), max(keys)

    return answer


def tokens_around(begin, end, causal_end=lambda query, end: query + 1):
    """Keys from `begin(query, block, flange)` up to `end(...)`, not included; fewer if causal."""

    def keys_of(query, length, block, flange, causal):
        stop = end(query, block, flange)
        return range(begin(query, block, flange), causal_end(query, stop) if causal else stop)

    return keys_of


def block_begin(query, block):
    return query - query % block


def memory_begin(query, block, flange):
    return query - query % block - flange


def memory_end(query, block, flange):
    return query - query % block + block + flange


def ends_of(low, high, high_if_causal=lambda query, length, block, flange: query):
    """First and last by two formulas; nothing is clipped here."""

    def answer(query, length, block, flange, causal):
        last = (high_if_causal if causal else high)(query, length, block, flange)
        return low(query, block, flange), last

    return answer


def clipped_begin(query, block, flange):
    return max(memory_begin(query, block, flange), 0)


def causal_cuts_the_past(query, length, block, flange, causal):
    begin = query - query % block
    if causal:
        return begin, query
    return max(begin - flange, 0), min(begin + block + flange, length) - 1


def labels_by(name):
    """Labels one pair after the other, by `name(key - query, k)`."""

    def answer(query_positions, key_positions, max_distance):
        pairs = [[name(k - q, max_distance) for k in key_positions.tolist()] for q in query_positions.tolist()]
        return torch.tensor(pairs)

    return answer


def right_label(gap, k):
    return min(gap, k) if gap >= 0 else k + min(-gap, k)


def columns_first(query_positions, key_positions, max_distance):
    pairs = [[right_label(k - q, max_distance) for q in query_positions.tolist()] for k in key_positions.tolist()]
    return torch.tensor(pairs)


def rows_and_columns_numbered(query_positions, key_positions, max_distance):
    rows, columns = range(query_positions.numel()), range(key_positions.numel())
    return torch.tensor([[right_label(j - i, max_distance) for j in columns] for i in rows])


def lists_by(fixed, planned=lambda row, i, blocks, fixed: [j for j in row if j >= 0], ends=True):
    """Counts of lists that are written out: `fixed(i, blocks)`, then `planned(row of the plan, ...)`.

    `ends`: the first and the last query block list every block once, and nothing else.
    """

    def answer(blocks, plan):
        counts = torch.zeros(blocks, blocks, dtype=torch.int64)
        for i in range(blocks):
            listed = [j for j in fixed(i, blocks) if 0 <= j < blocks]
            listed += planned(plan[i].tolist(), i, blocks, listed)
            for j in range(blocks) if ends and i in (0, blocks - 1) else listed:
                counts[i, j] += 1
        return counts

    return answer


def five_blocks(i, blocks):
    return {0, blocks - 1, i - 1, i, i + 1}


def clamped_to_one(blocks, plan):
    counts = lists_by(five_blocks)(blocks, plan)
    return (counts > 0).long()


def added_up(blocks, plan):
    """The conditions are added instead of joined."""
    i, j = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
    counts = (j == 0).int() + (j == blocks - 1).int() + ((i - j).abs() < 2).int()
    counts = counts.long()
    for row in range(blocks):
        for block in plan[row].tolist():
            if block != -1:
                counts[row, block] += 1
    counts[0] = counts[-1] = 1
    return counts


def assigned_by_index(blocks, plan):
    counts = torch.zeros(blocks, blocks, dtype=torch.int64)
    for i in range(blocks):
        counts[i, [j for j in five_blocks(i, blocks) if 0 <= j < blocks]] = 1
        counts[i, plan[i]] += 1
    counts[[0, -1]] = 1
    return counts


def ends_get_the_plan_too(blocks, plan):
    counts = torch.zeros(blocks, blocks, dtype=torch.int64)
    for i in range(blocks):
        ends = i in (0, blocks - 1)
        for j in range(blocks):
            counts[i, j] = (ends or j in five_blocks(i, blocks)) + plan[i].tolist().count(j)
    return counts


def boolean_product(one, other):
    return (one[:, :, None] & other[None, :, :]).any(dim=1)


def stack(masks, residual=True, upwards=True):
    length = masks[0].shape[0]
    reached = torch.eye(length, dtype=torch.bool)
    for mask in masks:
        step = mask | torch.eye(length, dtype=torch.bool) if residual else mask
        reached = boolean_product(step, reached) if upwards else boolean_product(reached, step)
    return reached


def residual_at_the_end(masks):
    reached = stack(masks, residual=False)
    return reached.clone().fill_diagonal_(True)


def last_layer(masks):
    return masks[-1].clone().fill_diagonal_(True)


def union(masks):
    together = torch.eye(len(masks[0]), dtype=torch.bool)
    for mask in masks:
        together = together | mask
    return together


def loop_stops_early(masks):
    length = len(masks[0])
    reached = torch.eye(length)
    for layer in range(len(masks) - 1):
        reached = masks[layer].float() @ reached + reached
    return reached > 0


def loop_starts_late(masks):
    length = len(masks[0])
    reached = torch.eye(length)
    for layer in range(1, len(masks)):
        reached = masks[layer].float() @ reached + reached
    return reached > 0


def power_of_one(masks):
    step = masks[0].double() + torch.eye(len(masks[0]), dtype=torch.float64)
    return torch.linalg.matrix_power(step, len(masks)) > 0


def by_rules(strided_keys, fixed_keys):
    """The two masks from rules (i, j, stride, summary) -> bool, tried for every pair."""

    def masks(length, stride, summary):
        pair = []
        for rule in (strided_keys, fixed_keys):
            pair.append(as_mask([[j for j in range(length) if rule(i, j, stride, summary)] for i in range(length)]))
        return tuple(pair)

    return masks


def right_strided(i, j, stride, c):
    return j <= i and (j > i - stride or (i - j) % stride == 0)


def right_fixed(i, j, stride, c):
    return j <= i and (i // stride == j // stride or j % stride in range(stride - c, stride))


def no_parentheses_first(length, stride, summary):
    i, j = torch.arange(length)[:, None], torch.arange(length)
    causal = i >= j
    strided = (i - j < stride) | ((i - j) % stride == 0) & causal
    fixed = (i // stride == j // stride) | (j % stride >= stride - summary) & causal
    return strided, fixed


def no_parentheses_second(length, stride, summary):
    i, j = torch.arange(length)[:, None], torch.arange(length)
    causal = i >= j
    strided = causal & (i - j < stride) | ((i - j) % stride == 0)
    fixed = causal & (i // stride == j // stride) | (j % stride >= stride - summary)
    return strided, fixed


def numbered_from_one(length, stride, summary):
    i, j = torch.arange(1, length + 1)[:, None], torch.arange(1, length + 1)
    causal = (i >= j).tril()
    strided = (i - j < stride) | ((i - j) % stride == 0)
    fixed = (i // stride == j // stride) | (j % stride >= stride - summary)
    return strided & causal, fixed & causal


def block_loop(pairing, queries_too=False, keys=True, values=True, scale=True, over=-1):
    """Block attention in loops; `pairing(permutations, h, b)` is the block that query block b of head h reads."""

    def answer(q, k, v, permutations):
        heads, blocks = permutations.shape
        size = q.shape[2] // blocks
        output = torch.empty_like(v)

        def block_of(x, h, b):
            return x[:, h, b * size : (b + 1) * size]

        for h in range(heads):
            for b in range(blocks):
                other = int(pairing(permutations, h, b))
                query = block_of(q, h, other if queries_too else b)
                scores = query @ block_of(k, h, other if keys else b).transpose(1, 2)
                if scale:
                    scores = scores / q.shape[-1] ** 0.5
                mixed = torch.softmax(scores, over) @ block_of(v, h, other if values else b)
                output[:, h, b * size : (b + 1) * size] = mixed
        return output

    return answer


def as_given(permutations, h, b):
    return permutations[h, b]


def wrong_way_round(permutations, h, b):
    return permutations[h].tolist().index(b)


def viewed_wrongly(q, k, v, permutations):
    heads, blocks = permutations.shape
    output = torch.empty_like(q)
    for h in range(heads):
        for b in range(blocks):
            other = int(permutations[h, b])
            q_b, k_b, v_b = q[:, h, b::blocks], k[:, h, other::blocks], v[:, h, other::blocks]
            output[:, h, b::blocks] = F.scaled_dot_product_attention(q_b, k_b, v_b)
    return output


def by_query(
    left=lambda window: window,
    right=lambda window: window,
    zeros_outside=False,
    see_padding=False,
    keep_padded_rows=False,
    scale=True,
    hidden=-1e30,
    chunks=(-1, 1),
):
    """Window attention, one query after the other; never a table of all pairs.

    `chunks`: which chunks, counted from the query's own, are loaded at all.
    """

    def answer(q, k, v, key_padding_mask, window):
        length = q.shape[2]
        rows = []
        for i in range(length):
            own = i // window * window
            low = max(i - left(window), own + chunks[0] * window)
            high = min(i + right(window), own + chunks[1] * window + window - 1)
            inside = range(max(low, 0), min(high, length - 1) + 1)
            scores = (q[:, :, i : i + 1] @ k[:, :, inside.start : inside.stop].mT).squeeze(2)
            scores = scores / q.shape[-1] ** 0.5 if scale else scores
            if not see_padding:
                scores = scores.masked_fill(~key_padding_mask[:, None, inside.start : inside.stop], hidden)
            values = v[:, :, inside.start : inside.stop]
            if zeros_outside:
                missing = max(high - low + 1 - len(inside), 0)
                scores, values = F.pad(scores, (0, missing)), F.pad(values, (0, 0, 0, missing))
            rows.append((scores.softmax(-1)[:, :, None] @ values).squeeze(2))
        output = torch.stack(rows, dim=2)
        if keep_padded_rows:
            return output
        return torch.where(key_padding_mask[:, None, :, None], output, torch.zeros_like(output))

    return answer


def whole_chunks(q, k, v, key_padding_mask, window):
    length = q.shape[2]
    pieces = []
    for start in range(0, length, window):
        keys = slice(max(0, start - window), start + 2 * window)
        allowed = key_padding_mask[:, None, None, keys]
        scores = q[:, :, start : start + window] @ k[:, :, keys].mT / q.shape[-1] ** 0.5
        pieces.append(scores.masked_fill(~allowed, -1e30).softmax(-1) @ v[:, :, keys])
    return torch.cat(pieces, 2) * key_padding_mask[:, None, :, None]


def masked_square(q, k, v, key_padding_mask, window):
    near = distances(q.shape[2]).abs() <= window
    bias = torch.where(near & key_padding_mask[:, None, None, :], 0.0, -1e30).to(q.dtype)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return output * key_padding_mask[:, None, :, None]


def globals_by(times):
    """Every query i weighs key j `times(i, j, near, is_global)` times, one query after the other."""

    def answer(q, k, v, window, global_tokens):
        length = q.shape[2]
        flags = global_tokens.tolist()
        count = torch.tensor(
            [[times(i, j, abs(i - j) <= window, flags) for j in range(length)] for i in range(length)],
            dtype=q.dtype,
        )
        powers = (q @ k.mT / q.shape[-1] ** 0.5).exp() * count
        return powers / powers.sum(-1, keepdim=True) @ v

    return answer


def starter_of_the_notebook(q, k, v, window, global_tokens):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    near = distances(q.shape[2]).abs() <= window
    local = scores.masked_fill(~near, -math.inf)
    weights = torch.cat([scores[..., global_tokens], local], dim=-1).softmax(dim=-1)
    count = int(global_tokens.sum())
    output = weights[..., :count] @ v[:, :, global_tokens] + weights[..., count:] @ v
    output[:, :, global_tokens] = scores[:, :, global_tokens].softmax(dim=-1) @ v
    return output


def copies_zeroed_too_late(q, k, v, window, global_tokens):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    near = distances(q.shape[2]).abs() <= window
    local = scores.masked_fill(~near, -math.inf)
    weights = torch.cat([scores[..., global_tokens], local], dim=-1).softmax(dim=-1)
    count = int(global_tokens.sum())
    left, right = weights[..., :count], weights[..., count:].masked_fill(global_tokens, 0)
    output = left @ v[:, :, global_tokens] + right @ v
    output[:, :, global_tokens] = scores[:, :, global_tokens].softmax(dim=-1) @ v
    return output


def apart(combine):
    def answer(q, k, v, window, global_tokens):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        hidden = (distances(q.shape[2]).abs() > window) | global_tokens
        local = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        if not bool(global_tokens.any()):
            return local
        output = combine(local, scores[..., global_tokens].softmax(-1) @ v[:, :, global_tokens])
        output[:, :, global_tokens] = scores[:, :, global_tokens].softmax(-1) @ v
        return output

    return answer


def counted(sizes):
    """A sum over queries: the first hundred one by one, all others alike."""

    def pairs(length, window, sinks):
        first = min(length, 100)
        one_by_one = sum(sizes(i, length, window, sinks) for i in range(first))
        # from 100 on every query has as many as query 100; the last ones are seen to by `sizes` itself
        return one_by_one + (length - first) * sizes(first, math.inf, window, sinks)

    return pairs


def looks_ahead(length, window, sinks):
    def keys(i, n):
        return len({j for j in range(min(n, sinks)) if j < n} | set(range(max(0, i - window), min(n, i + window + 1))))

    if length < 200:
        return sum(keys(i, length) for i in range(length))
    ends = sum(keys(i, length) for i in [*range(50), *range(length - 50, length)])
    return ends + (length - 100) * keys(100, length)


def triangle_and_rectangle(length, window, sinks):
    width = window + 1 + sinks
    return sum(range(1, width + 1)) + (length - width) * width


def triangle_from_zero(length, window, sinks):
    width = min(window + 1 + sinks, length)
    return sum(range(width)) + (length - width) * (window + 1 + sinks)


WRONG_ANSWERS = [
    (
        "patterns.window_mask",
        walk(lambda w, d: range(-(w // 2) * d, (w // 2) * d + 1, d)),
        "The window is read as two-sided",
    ),
    (
        "patterns.window_mask",
        walk(lambda w, d: [s for s in range(-w * d, w * d + 1) if s % d == 0 and abs(s) < w * d]),
        "One token too few on each side",
    ),
    ("patterns.window_mask", walk(lambda w, d: range(-w * d, 1, d)), "Only the tokens before the query"),
    ("patterns.window_mask", lambda n, w, d: torch.ones(n, n).triu(-w).tril(w).bool(), "Dilation is ignored"),
    ("patterns.window_mask", lambda n, w, d: torch.ones(n, n).triu(-w * d).tril(w * d) > 0, "The band is wide, but"),
    (
        "patterns.window_mask",
        walk(lambda w, d: [s for s in range(-w, w + 1) if s % d == 0]),
        "The band has gaps, but is not wider",
    ),
    (
        "patterns.window_mask",
        walk(lambda w, d: range(-w * (d + 1), w * (d + 1) + 1, d + 1)),
        "Dilation is read as the number of tokens left out",
    ),
    ("patterns.window_mask", same_grid_for_all, "The gaps are the same for all queries"),
    (
        "patterns.window_mask",
        walk(lambda w, d: range(-w * d, w * d + 1, d), stays=False),
        "A token does not see itself",
    ),
    (
        "patterns.memory_block",
        memory_by(tokens_around(lambda i, b, f: i - f, lambda i, b, f: i + f + 1)),
        "A window around the query",
    ),
    (
        "patterns.memory_block",
        memory_by(tokens_around(lambda i, b, f: i - f, memory_end)),
        "The flange before the block is counted from the query",
    ),
    (
        "patterns.memory_block",
        memory_by(tokens_around(memory_begin, memory_end, lambda i, end: end)),
        "Causal changes nothing",
    ),
    (
        "patterns.memory_block",
        lambda i, n, b, f, causal: (clipped_begin(i, b, f), min(n, memory_end(i, b, 0 if causal else f)) - 1),
        "Causal takes away the flange only",
    ),
    ("patterns.memory_block", causal_cuts_the_past, "Causal takes away the flange before the block"),
    (
        "patterns.memory_block",
        memory_by(tokens_around(lambda i, b, f: block_begin(i, b), memory_end)),
        "The flange before the block is forgotten",
    ),
    (
        "patterns.memory_block",
        memory_by(tokens_around(memory_begin, lambda i, b, f: block_begin(i, b) + b)),
        "The flange behind the block is forgotten",
    ),
    (
        "patterns.memory_block",
        memory_by(tokens_around(memory_begin, memory_end), lowest=-99),
        "Keys before the text",
    ),
    (
        "patterns.memory_block",
        ends_of(clipped_begin, lambda i, n, b, f: memory_end(i, b, f) - 1),
        "Keys behind the text",
    ),
    (
        "patterns.memory_block",
        ends_of(memory_begin, lambda i, n, b, f: memory_end(i, b, f) - 1),
        "Keys on both sides of the text",
    ),
    (
        "patterns.memory_block",
        ends_of(clipped_begin, lambda i, n, b, f: min(n, memory_end(i, b, f)), lambda i, n, b, f: min(n, i + 1)),
        "The end of a range",
    ),
    (
        "patterns.memory_block",
        ends_of(clipped_begin, lambda i, n, b, f: min(n, memory_end(i, b, f))),
        "One key too far where the future may be seen",
    ),
    (
        "patterns.memory_block",
        memory_by(tokens_around(memory_begin, lambda i, b, f: memory_end(i, b, f) + 1)),
        "The block is one token too long",
    ),
    (
        "patterns.memory_block",
        ends_of(
            lambda i, b, f: max(math.ceil(i / b) * b - f, 0),
            lambda i, n, b, f: min(math.ceil(i / b) * b + b + f, n) - 1,
        ),
        "The start of the block is rounded up",
    ),
    (
        "patterns.memory_block",
        ends_of(lambda i, b, f: max(0, i // b - f), lambda i, n, b, f: min(i // b + b + f, n) - 1),
        "The number of the block is taken for its start",
    ),
    (
        "patterns.memory_block",
        memory_by(
            tokens_around(lambda i, b, f: (i // b - f) * b, lambda i, b, f: (i // b + f + 1) * b),
        ),
        "The flange is counted in blocks",
    ),
    ("patterns.relative_labels", labels_by(lambda gap, k: right_label(-gap, k)), "Left and right are exchanged"),
    ("patterns.relative_labels", columns_first, "Rows and columns are exchanged"),
    ("patterns.relative_labels", labels_by(lambda gap, k: gap if gap >= 0 else k + abs(gap)), "Nothing is clipped"),
    (
        "patterns.relative_labels",
        labels_by(lambda gap, k: min(gap, k) if gap >= 0 else k + abs(gap)),
        "The left side is not clipped",
    ),
    (
        "patterns.relative_labels",
        labels_by(lambda gap, k: gap if gap >= 0 else min(k + abs(gap), 2 * k)),
        "The right side is not clipped",
    ),
    (
        "patterns.relative_labels",
        labels_by(lambda gap, k: min(gap if gap >= 0 else k + abs(gap), 2 * k)),
        "Clipped at 2k, after the left side was numbered",
    ),
    (
        "patterns.relative_labels",
        labels_by(lambda gap, k: right_label(sorted([1 - k, gap, k - 1])[1], k)),
        "Clipped one too early",
    ),
    (
        "patterns.relative_labels",
        labels_by(lambda gap, k: min(gap, k) if gap >= 0 else min(k - 1 - gap, 2 * k - 1)),
        "The labels of the left begin at k",
    ),
    ("patterns.relative_labels", labels_by(lambda gap, k: min(abs(gap), k)), "One label for both sides"),
    (
        "patterns.relative_labels",
        labels_by(lambda gap, k: max(-k, min(k, gap))),
        "The labels of the left are negative",
    ),
    (
        "patterns.relative_labels",
        labels_by(lambda gap, k: max(0, min(2 * k, k + gap))),
        "The distance is shifted by k",
    ),
    (
        "patterns.relative_labels",
        labels_by(lambda gap, k: min(gap, k) if gap > 0 else k + min(-gap, k)),
        "The same position gets the label k",
    ),
    ("patterns.relative_labels", rows_and_columns_numbered, "Places in the list instead of positions"),
    ("patterns.bigbird_multiplicity", clamped_to_one, "A set instead of a list"),
    ("patterns.bigbird_multiplicity", added_up, "Fixed blocks that coincide are counted twice"),
    (
        "patterns.bigbird_multiplicity",
        lists_by(five_blocks, lambda row, i, blocks, fixed: [j for j in row if j >= 0 and j not in fixed]),
        "The plan adds only blocks that are not fixed",
    ),
    (
        "patterns.bigbird_multiplicity",
        lists_by(five_blocks, lambda row, i, blocks, fixed: list(set(row) - {-1})),
        "A block that the plan lists twice counts once",
    ),
    ("patterns.bigbird_multiplicity", assigned_by_index, "The plan is used as an index"),
    (
        "patterns.bigbird_multiplicity",
        lists_by(five_blocks, lambda row, i, blocks, fixed: row),
        "-1 is taken for the last block",
    ),
    (
        "patterns.bigbird_multiplicity",
        lists_by(five_blocks, lambda row, i, blocks, fixed: [max(j, 0) for j in row]),
        "-1 is taken for block 0",
    ),
    (
        "patterns.bigbird_multiplicity",
        ends_get_the_plan_too,
        "The plan counts for the first and last query block",
    ),
    (
        "patterns.bigbird_multiplicity",
        lists_by(five_blocks, ends=False),
        "The first and last query block are like the others",
    ),
    (
        "patterns.bigbird_multiplicity",
        lists_by(lambda i, blocks: {i - 1, i, i + 1}),
        "The first and last key block are not seen by all",
    ),
    ("patterns.bigbird_multiplicity", lists_by(lambda i, blocks: {0, i, blocks - 1}), "The neighbours are left out"),
    (
        "patterns.bigbird_multiplicity",
        lists_by(lambda i, blocks: {0, i - 1, i + 1, blocks - 1}),
        "The own block is left out",
    ),
    (
        "patterns.bigbird_multiplicity",
        lambda blocks, plan: lists_by(five_blocks)(blocks, plan).transpose(0, 1),
        "Rows and columns are exchanged",
    ),
    ("patterns.reach", lambda masks: stack(masks, residual=False), "The residual connection is forgotten"),
    ("patterns.reach", residual_at_the_end, "The residual connection is added at the end only"),
    ("patterns.reach", lambda masks: stack(masks, upwards=False), "The layers stand in the wrong order"),
    ("patterns.reach", last_layer, "Only the last layer"),
    ("patterns.reach", loop_stops_early, "The top layer is left out"),
    ("patterns.reach", loop_starts_late, "The lowest layer is left out"),
    ("patterns.reach", lambda masks: stack(masks).transpose(0, 1), "Who is influenced by whom"),
    ("patterns.reach", union, "The masks are laid over each other"),
    ("patterns.reach", power_of_one, "Every layer gets the first layer's mask"),
    (
        "patterns.strided_and_fixed",
        by_rules(lambda i, j, s, c: i - s < j <= i or (i - j) % s == 0, right_fixed),
        "The stride is not met with the causal mask",
    ),
    (
        "patterns.strided_and_fixed",
        by_rules(right_strided, lambda i, j, s, c: (i // s == j // s and j <= i) or j % s >= s - c),
        "The summaries are not met with the causal mask",
    ),
    ("patterns.strided_and_fixed", no_parentheses_first, "The first set of each mask is not met"),
    ("patterns.strided_and_fixed", no_parentheses_second, "The second set of each mask is not met"),
    (
        "patterns.strided_and_fixed",
        by_rules(
            lambda i, j, s, c: i - j < s or (i - j) % s == 0, lambda i, j, s, c: i // s == j // s or j % s >= s - c
        ),
        "Neither mask is causal",
    ),
    (
        "patterns.strided_and_fixed",
        by_rules(lambda i, j, s, c: i - s < j <= i, right_fixed),
        "Only the window, no stride",
    ),
    (
        "patterns.strided_and_fixed",
        by_rules(lambda i, j, s, c: j in range(i, -1, -s), right_fixed),
        "Only the stride, no window",
    ),
    (
        "patterns.strided_and_fixed",
        by_rules(lambda i, j, s, c: j <= i and (i - j < s or j % s == 0), right_fixed),
        "The stride is counted from the start of the text",
    ),
    (
        "patterns.strided_and_fixed",
        by_rules(right_strided, lambda i, j, s, c: i - i % s <= j <= i),
        "Only the own block, no summaries",
    ),
    (
        "patterns.strided_and_fixed",
        by_rules(right_strided, lambda i, j, s, c: j <= i and s - j % s <= c),
        "Only the summaries, no own block",
    ),
    (
        "patterns.strided_and_fixed",
        by_rules(right_strided, lambda i, j, s, c: j <= i and (i - i % s <= j or j % s < c)),
        "The summaries stand at the beginning of a block",
    ),
    ("patterns.strided_and_fixed", numbered_from_one, "Positions are read from one"),
    (
        "patterns.strided_and_fixed",
        by_rules(right_strided, lambda i, j, s, c: j <= i and (i - i % s <= j or j % s > s - c)),
        "One summary token too few",
    ),
    (
        "patterns.strided_and_fixed",
        by_rules(right_strided, lambda i, j, s, c: j <= i and ((i - j) % s == 0 or j % s >= s - c)),
        "Remainder and quotient are mixed up",
    ),
    ("patterns.block_permuted_attention", block_loop(wrong_way_round), "The inverse permutation"),
    (
        "patterns.block_permuted_attention",
        block_loop(as_given, queries_too=True),
        "Queries and keys are permuted together",
    ),
    ("patterns.block_permuted_attention", block_loop(lambda permutations, h, b: b), "Every block reads itself"),
    (
        "patterns.block_permuted_attention",
        block_loop(lambda permutations, h, b: permutations[0, b]),
        "One permutation for all heads",
    ),
    (
        "patterns.block_permuted_attention",
        block_loop(as_given, values=False),
        "The values are not permuted with the keys",
    ),
    ("patterns.block_permuted_attention", block_loop(as_given, scale=False), "The scores are not scaled"),
    ("patterns.block_permuted_attention", block_loop(as_given, over=1), "The softmax runs over the queries"),
    ("patterns.block_permuted_attention", viewed_wrongly, "The blocks are cut the wrong way"),
    ("patterns.window_attention", masked_square, "A table of n x n numbers"),
    ("patterns.window_attention", by_query(zeros_outside=True, chunks=(-9, 9)), "Places outside the text enter"),
    ("patterns.window_attention", by_query(keep_padded_rows=True), "Padded queries do not give zeros"),
    ("patterns.window_attention", by_query(see_padding=True), "Padded keys are attended to"),
    ("patterns.window_attention", by_query(chunks=(0, 0)), "Only the own chunk is seen"),
    ("patterns.window_attention", by_query(chunks=(-1, 0)), "The chunk to the right is not seen"),
    ("patterns.window_attention", by_query(right=lambda window: 0), "Only the tokens before the query"),
    ("patterns.window_attention", whole_chunks, "All keys of three chunks are seen"),
    (
        "patterns.window_attention",
        by_query(left=lambda window: window - 1, right=lambda window: window - 1),
        "One token too few on each side",
    ),
    (
        "patterns.window_attention",
        by_query(left=lambda window: window // 2, right=lambda window: window // 2),
        "The window is read as two-sided",
    ),
    ("patterns.window_attention", by_query(scale=False), "The scores are not scaled"),
    ("patterns.window_attention", by_query(hidden=-math.inf), "A query without any key gives NaN"),
    ("patterns.window_with_globals", starter_of_the_notebook, "A global key inside the window counts twice"),
    ("patterns.window_with_globals", copies_zeroed_too_late, "The second copy is removed after the softmax"),
    (
        "patterns.window_with_globals",
        globals_by(lambda i, j, near, flags: flags[i] or (near and not flags[j])),
        "Global keys are taken out altogether",
    ),
    (
        "patterns.window_with_globals",
        globals_by(lambda i, j, near, flags: flags[i] or near),
        "The others do not see the global tokens",
    ),
    (
        "patterns.window_with_globals",
        globals_by(lambda i, j, near, flags: near or flags[j]),
        "A global query sees only its window and the global tokens",
    ),
    (
        "patterns.window_with_globals",
        globals_by(lambda i, j, near, flags: flags[j] or (near and not flags[i])),
        "Global queries see only global keys",
    ),
    ("patterns.window_with_globals", apart(lambda one, other: (one + other) / 2), "Two softmaxes, averaged"),
    ("patterns.window_with_globals", apart(lambda one, other: one + other), "Two softmaxes, added"),
    (
        "patterns.sink_pairs",
        counted(lambda i, n, w, s: min(i + 1, s) + min(i, w) + 1),
        "Sinks inside the window are counted twice",
    ),
    ("patterns.sink_pairs", lambda n, w, s: n * s + n * w + n, "The first queries are counted in full"),
    ("patterns.sink_pairs", counted(lambda i, n, w, s: min(i, s + w)), "The query itself is left out"),
    (
        "patterns.sink_pairs",
        counted(lambda i, n, w, s: len({*range(min(s, i + 1)), *range(max(0, i - w + 1), i + 1)})),
        "The query counts as one of the window",
    ),
    ("patterns.sink_pairs", looks_ahead, "The window looks ahead"),
    (
        "patterns.sink_pairs",
        counted(lambda i, n, w, s: len({*range(min(s, n)), *range(max(0, i - w), i + 1)})),
        "A sink is seen before it comes",
    ),
    ("patterns.sink_pairs", counted(lambda i, n, w, s: min(i, w) + 1), "The sinks are left out"),
    ("patterns.sink_pairs", triangle_from_zero, "The first queries begin with no key"),
    ("patterns.sink_pairs", triangle_and_rectangle, "A short text is not thought of"),
]


# ----------------------------------------------------------------------------- other right answers


def test_other_right_answers_pass():
    check("patterns.window_mask", walk(lambda w, d: range(-w * d, w * d + 1, d)))
    check("patterns.memory_block", memory_by(tokens_around(memory_begin, memory_end)))
    check("patterns.relative_labels", labels_by(right_label))
    check("patterns.reach", stack)
    check("patterns.strided_and_fixed", by_rules(right_strided, right_fixed))
    check("patterns.bigbird_multiplicity", lists_by(five_blocks))
    check("patterns.block_permuted_attention", block_loop(as_given))
    check("patterns.window_with_globals", globals_by(lambda i, j, near, flags: near or flags[i] or flags[j]))
    check("patterns.sink_pairs", counted(lambda i, n, w, s: min(i + 1, w + s + 1)))


@pytest.mark.parametrize("method", ["one query after the other", "all windows gathered", "torch's kernel"])
def test_other_ways_to_save_the_table_pass(method):
    answers = {
        "one query after the other": by_query(),
        "all windows gathered": gathered,
        "torch's kernel": chunks_in_torchs_kernel,
    }
    check("patterns.window_attention", answers[method])


def gathered(q, k, v, key_padding_mask, window):
    """The 2 * window + 1 keys of every query, copied."""
    length = q.shape[2]
    place = torch.arange(length)[:, None] + torch.arange(-window, window + 1)
    inside = (place >= 0) & (place < length)
    place = place.clamp(0, length - 1)
    allowed = inside & key_padding_mask[:, place]
    scores = (q[:, :, :, None] * k[:, :, place]).sum(-1) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~allowed[:, None], -1e30).softmax(-1)
    return (weights[..., None] * v[:, :, place]).sum(3) * key_padding_mask[:, None, :, None]


def chunks_in_torchs_kernel(q, k, v, key_padding_mask, window):
    pieces = []
    for start in range(0, q.shape[2], window):
        low, high = max(0, start - window), min(q.shape[2], start + 2 * window)
        rows, columns = torch.arange(start, min(start + window, q.shape[2])), torch.arange(low, high)
        near = (rows[:, None] - columns).abs() <= window
        bias = torch.where(near & key_padding_mask[:, None, None, low:high], 0.0, -1e30).to(q.dtype)
        piece = F.scaled_dot_product_attention(q[:, :, rows], k[:, :, low:high], v[:, :, low:high], attn_mask=bias)
        pieces.append(piece)
    return torch.cat(pieces, 2) * key_padding_mask[:, None, :, None]


def test_a_full_table_passes_everything_but_the_memory(capsys):
    with pytest.raises(HomeworkError):
        check("patterns.window_attention", masked_square, explain=True, seed=0)
    printed = capsys.readouterr().out
    assert printed.count("  holds  ") == len(WINDOW_ATTENTION.properties) - 1
    assert "FAILS  four times the text" in printed


def test_a_chunked_answer_with_a_full_mask_is_noticed():
    def full_mask(q, k, v, key_padding_mask, window):
        square = distances(q.shape[2]).abs() <= window
        assert square.any()
        return by_query()(q, k, v, key_padding_mask, window)

    with pytest.raises(HomeworkError, match="expected True, got False"):
        check("patterns.window_attention", full_mask, seed=0)
