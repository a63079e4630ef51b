"""The exercises of notebook 09: references against loops or the library, and wrong answers against the grader.

The wrong answers are written here anew, as a student would write them; none uses a `Mistake` of the exercise.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from effnlp_lessons.attention.linformer import linformer_attention
from effnlp_lessons.attention.lsh import lsh_attention, lsh_buckets
from effnlp_lessons.homework.buckets.factorized import factorized_scores
from effnlp_lessons.homework.buckets.hashing import buckets
from effnlp_lessons.homework.buckets.projected import project_keys
from effnlp_lessons.homework.buckets.rounds import combine_rounds
from effnlp_lessons.homework.buckets.routed import cluster_members
from effnlp_lessons.homework.buckets.shared import shared_attention
from effnlp_lessons.homework.buckets.slots import visible_slots
from effnlp_lessons.homework.buckets.sorting import sorted_chunks


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------- references


def test_hash_is_the_librarys():
    x, rotations = drawn(11, 5), drawn(3, 5, 4, seed=1)
    assert torch.equal(buckets(x, rotations), lsh_buckets(x, rotations))


@pytest.mark.parametrize(("length", "kinds", "chunk"), [(12, 3, 4), (10, 1, 5), (9, 9, 3), (4, 2, 4)])
def test_sorted_chunks_equal_pythons_sort(length, kinds, chunk):
    own = torch.randint(kinds, (length,), generator=torch.Generator().manual_seed(length))
    order = sorted(range(length), key=lambda token: (int(own[token]), token))
    chunks, place = sorted_chunks(own, chunk)
    assert chunks.flatten().tolist() == order
    assert place.tolist() == [order.index(token) // chunk for token in range(length)]


def test_rounds_are_one_softmax_over_all_their_keys():
    scores, values = drawn(3, 6, 4), drawn(3, 6, 4, 2, seed=1)
    outputs = (scores.softmax(-1)[..., None] * values).sum(2)
    whole = scores.transpose(0, 1).flatten(1).softmax(-1)[..., None] * values.transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(combine_rounds(outputs, scores.logsumexp(-1)), whole.sum(1))


def test_shared_attention_is_the_librarys_in_one_chunk():
    qk, v = drawn(9, 4), drawn(9, 4, seed=1)
    one_bucket = torch.zeros(1, 1, 1, 9, dtype=torch.long)
    library = lsh_attention(qk[None, None], v[None, None], buckets=one_bucket, chunk=9, causal=True)
    # the library adds 1e-6 to a key's squared length
    torch.testing.assert_close(shared_attention(qk, v), library[0, 0], rtol=1e-5, atol=1e-5)


def test_cluster_members_by_sorting_pairs():
    similarity, real = drawn(3, 8), torch.tensor([True] * 6 + [False] * 2)
    for row, members in zip(similarity, cluster_members(similarity, real, 3), strict=True):
        best = sorted(((float(s), token) for token, s in enumerate(row) if real[token]), reverse=True)[:3]
        assert members.tolist() == sorted(token for _, token in best)


@pytest.mark.parametrize(("length", "factor"), [(7, 3), (12, 4), (2, 5), (5, 1)])
def test_a_visible_slot_lies_in_the_past(length, factor):
    mask = visible_slots(length, factor)
    assert mask.shape == (length, 1 + length // factor)
    for query in range(length):
        for slot in range(1, mask.shape[1]):
            tokens = range((slot - 1) * factor, slot * factor)
            assert bool(mask[query, slot]) == all(token < query for token in tokens)
        assert mask[query, 0]


def test_projected_keys_are_the_librarys():
    q, k, v = drawn(3, 7, 4)
    e, f = drawn(2, 3, 7, seed=1)
    real = torch.arange(7) < 5
    library = linformer_attention(
        *(x[None, None] for x in (q, k, v)), real[None], project_keys=e[None], project_values=f[None]
    )[0, 0]
    torch.testing.assert_close(project_keys(q, k, v, real, e, f)[real], library[real])


def test_factorized_scores_entry_by_entry():
    first, second = drawn(2, 3), drawn(2, 5, seed=1)
    scores = factorized_scores(first, second, 13)
    for i in range(2):
        assert scores[i].tolist() == [float(first[i, j // 5] * second[i, j % 5]) for j in range(13)]


# --------------------------------------------------------------------------- wrong answers


def hash_without_the_negative_half(x, rotations):
    return torch.einsum("ld,hdm->hlm", x, rotations).argmax(-1)


def hash_negative_half_first(x, rotations):
    return torch.stack([torch.cat([-(x @ one), x @ one], 1).argmax(1) for one in rotations])


def hash_of_absolute_values(x, rotations):
    return (x @ rotations).abs().max(dim=2).indices


def hash_with_one_rotation(x, rotations):
    one = x @ rotations[0]
    return torch.cat([one, -one], 1).argmax(1).repeat(len(rotations), 1)


def sort_from_the_back(own, chunk):
    order = torch.tensor(sorted(range(len(own)), key=lambda i: (own[i].item(), -i)))
    place = torch.zeros(len(own), dtype=torch.long)
    for p, token in enumerate(order.tolist()):
        place[token] = p // chunk
    return order.reshape(-1, chunk), place


def sort_unstable(own, chunk):
    order = torch.as_tensor(np.argsort(own.numpy(), kind="heapsort"))
    return order.reshape(-1, chunk), torch.argsort(order) // chunk


def sort_order_as_place(own, chunk):
    order = torch.sort(own, stable=True).indices
    return order.reshape(-1, chunk), torch.div(order, chunk, rounding_mode="floor")


def sort_inside_pieces(own, chunk):
    pieces = [
        start + torch.sort(own[start : start + chunk], stable=True).indices for start in range(0, len(own), chunk)
    ]
    return torch.stack(pieces), torch.arange(len(own)) // chunk


def sort_gives_buckets(own, chunk):
    order = torch.sort(own, stable=True).indices
    return own[order].reshape(-1, chunk), torch.argsort(order) // chunk


def rounds_averaged(outputs, sizes):
    return sum(outputs) / len(outputs)


def rounds_added(outputs, sizes):
    return outputs.sum(0)


def rounds_weighted_over_tokens(outputs, sizes):
    return torch.einsum("rl,rld->ld", F.softmax(sizes, dim=-1), outputs)


def rounds_with_nan(outputs, sizes):
    return torch.einsum("rl,rld->ld", F.softmax(sizes, dim=0), outputs)


def rounds_by_plain_exponentials(outputs, sizes):
    shares = torch.exp(sizes) / torch.exp(sizes).sum(0, keepdim=True)
    return torch.einsum("rl,rld->ld", shares, outputs)


def rounds_of_the_best(outputs, sizes):
    best = sizes.argmax(0)
    return torch.stack([outputs[best[i], i] for i in range(outputs.shape[1])])


def attend(scores, v):
    length = len(v)
    for i in range(length):
        for j in range(i + 1, length):
            scores[i, j] = -math.inf
    return scores.softmax(-1) @ v


def shared_self_forbidden(qk, v):
    scores = qk @ (qk / qk.norm(dim=-1, keepdim=True)).T
    return attend(scores.fill_diagonal_(-math.inf), v)


def shared_self_allowed(qk, v):
    return attend(qk @ (qk / qk.norm(dim=-1, keepdim=True)).T, v)


def shared_keys_as_they_are(qk, v):
    return attend(qk @ qk.T - 1e5 * torch.eye(len(qk), dtype=qk.dtype), v)


def shared_scaled_again(qk, v):
    scores = qk @ (qk / qk.norm(dim=-1, keepdim=True)).T / math.sqrt(qk.shape[1])
    return attend(scores - 1e5 * torch.eye(len(qk), dtype=qk.dtype), v)


def shared_both_normalised(qk, v):
    unit = qk / qk.norm(dim=-1, keepdim=True)
    return attend(unit @ unit.T - 1e5 * torch.eye(len(qk), dtype=qk.dtype), v)


def members_by_similarity(similarity, real, window):
    hidden = torch.where(real, similarity, -math.inf)
    return hidden.argsort(dim=1, descending=True)[:, :window]


def members_with_padding(similarity, real, window):
    return similarity.argsort(dim=1, descending=True)[:, :window].sort(dim=1).values


def members_padding_zero(similarity, real, window):
    return torch.where(real, similarity, 0.0).argsort(dim=1, descending=True)[:, :window].sort(dim=1).values


def members_least_similar(similarity, real, window):
    return torch.where(real, similarity, math.inf).argsort(dim=1)[:, :window].sort(dim=1).values


def slots_a_token_early(length, factor):
    mask = torch.zeros(length, 1 + length // factor, dtype=torch.bool)
    for i in range(length):
        for m in range(mask.shape[1]):
            mask[i, m] = m == 0 or m * factor - 1 <= i
    return mask


def slots_with_their_own_block(length, factor):
    mask = torch.zeros(length, 1 + length // factor, dtype=torch.bool)
    for i in range(length):
        mask[i, : i // factor + 2] = True
    return mask


def slots_without_the_first(length, factor):
    mask = torch.zeros(length, 1 + length // factor, dtype=torch.bool)
    for i in range(length):
        mask[i, 1 : i // factor + 1] = True
    return mask


def slots_rounded_up(length, factor):
    mask = torch.zeros(length, 1 + math.ceil(length / factor), dtype=torch.bool)
    for i in range(length):
        mask[i, : i // factor + 1] = True
    return mask


def projected_with_padding(q, k, v, real, e, f):
    return F.softmax(q @ (e @ k).T / math.sqrt(q.shape[1]), -1) @ (f @ v)


def projected_values_with_padding(q, k, v, real, e, f):
    return F.softmax(q @ (e @ (k * real[:, None])).T / math.sqrt(q.shape[1]), -1) @ (f @ v)


def projected_by_one(q, k, v, real, e, f):
    return F.softmax(q @ (e[:, real] @ k[real]).T / math.sqrt(q.shape[1]), -1) @ (e[:, real] @ v[real])


def projected_scaled_by_slots(q, k, v, real, e, f):
    return F.softmax(q @ (e[:, real] @ k[real]).T / math.sqrt(len(e)), -1) @ (f[:, real] @ v[real])


def factors_stretched_alike(first, second, length):
    a, b = first.shape[1], second.shape[1]
    return torch.stack([first[:, j // b] * second[:, j // a] for j in range(length)], 1)


def factors_exchanged(first, second, length):
    a = first.shape[1]
    return torch.stack([first[:, j % a] * second[:, j // a] for j in range(length)], 1)


def factors_both_tiled(first, second, length):
    a, b = first.shape[1], second.shape[1]
    return torch.stack([first[:, j % a] * second[:, j % b] for j in range(length)], 1)


def factors_added(first, second, length):
    b = second.shape[1]
    return torch.stack([first[:, j // b] + second[:, j % b] for j in range(length)], 1)


WRONG_ANSWERS = [
    ("buckets.hash", hash_without_the_negative_half, "The negative half is missing"),
    ("buckets.hash", hash_negative_half_first, "The halves are exchanged"),
    ("buckets.hash", hash_of_absolute_values, "A vector and its opposite get one bucket"),
    ("buckets.hash", hash_with_one_rotation, "All rounds use the first rotation"),
    ("buckets.sorted_chunks", sort_from_the_back, "Ties in reverse order"),
    ("buckets.sorted_chunks", sort_unstable, "The sort is not stable"),
    ("buckets.sorted_chunks", sort_order_as_place, "The order is taken for the place"),
    ("buckets.sorted_chunks", sort_inside_pieces, "The text is cut before it is sorted"),
    ("buckets.sorted_chunks", sort_gives_buckets, "Buckets instead of tokens"),
    ("buckets.combine_rounds", rounds_averaged, "The plain mean of the rounds"),
    ("buckets.combine_rounds", rounds_added, "The rounds are added"),
    ("buckets.combine_rounds", rounds_weighted_over_tokens, "Weights over the tokens"),
    ("buckets.combine_rounds", rounds_with_nan, "NaN for a token without any key"),
    ("buckets.combine_rounds", rounds_by_plain_exponentials, "The exponential overflows"),
    ("buckets.combine_rounds", rounds_of_the_best, "The largest round wins alone"),
    ("buckets.shared_attention", shared_self_forbidden, "Itself is forbidden with -inf"),
    ("buckets.shared_attention", shared_self_allowed, "Itself is allowed"),
    ("buckets.shared_attention", shared_keys_as_they_are, "The keys are not normalised"),
    ("buckets.shared_attention", shared_scaled_again, "Scaled by sqrt(d_head) once more"),
    ("buckets.shared_attention", shared_both_normalised, "The queries are normalised too"),
    ("buckets.cluster_members", members_by_similarity, "In the order of similarity"),
    ("buckets.cluster_members", members_with_padding, "Padding is taken"),
    ("buckets.cluster_members", members_padding_zero, "Padding set to zero"),
    ("buckets.cluster_members", members_least_similar, "The least similar tokens"),
    ("buckets.visible_slots", slots_a_token_early, "One token too early"),
    ("buckets.visible_slots", slots_with_their_own_block, "The own block is visible"),
    ("buckets.visible_slots", slots_without_the_first, "The first queries have no key"),
    ("buckets.visible_slots", slots_rounded_up, "The unfinished block has a slot"),
    ("buckets.project_keys", projected_with_padding, "Padding is projected too"),
    ("buckets.project_keys", projected_values_with_padding, "Only padded keys are zeroed"),
    ("buckets.project_keys", projected_by_one, "One projection for both"),
    ("buckets.project_keys", projected_scaled_by_slots, "Scaled by the number of keys"),
    ("buckets.factorized_scores", factors_stretched_alike, "Both factors are stretched alike"),
    ("buckets.factorized_scores", factors_exchanged, "The fast and the slow factor are exchanged"),
    ("buckets.factorized_scores", factors_both_tiled, "Both factors are tiled"),
    ("buckets.factorized_scores", factors_added, "Added instead of multiplied"),
]
