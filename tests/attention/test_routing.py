"""Routing attention: full attention as its limit, a loop over clusters, its look into the future, and its centroids."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnlp_lessons.attention.guard import largest_storage
from effnlp_lessons.attention.local import local_attention
from effnlp_lessons.attention.routing import (
    Centroids,
    RoutingSelfAttention,
    routing_attention,
    routing_clusters,
    spherical,
)
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.transformer import Decoder, Encoder, TransformerConfig

CONFIG = TransformerConfig(vocab_size=60, max_length=64, d_model=20, layers=2, heads=4, d_ff=16, segments=0)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_inputs(length: int, heads: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """q, k, v of three texts, not contiguous, and a mask with a whole text of padding."""
    vectors = random(3, 3, length, heads, 5, seed=seed, dtype=dtype).transpose(2, 3)
    real = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)) < 0.8
    real[2] = False
    return [*vectors, real]


# ----------------------------------------------------------------------------- on the sphere


def test_spherical_is_a_layer_norm_without_scale():
    x = random(2, 3, 7, 8, dtype=torch.float64) * 3 + 1
    y = spherical(x)
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 3, 7).double(), rtol=0, atol=1e-10)
    # 1e-6 is added to the variance
    torch.testing.assert_close(y.norm(dim=-1), torch.full((2, 3, 7), 8**0.5).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(spherical(5 * x - 2), y, rtol=1e-5, atol=1e-5)
    assert not spherical(torch.ones(3)).any()


def test_on_the_sphere_the_nearest_has_the_largest_product():
    x = spherical(random(9, 8, dtype=torch.float64))
    # 1e-6 is added to the variance
    torch.testing.assert_close(torch.cdist(x, x).square(), 2 * 8 - 2 * x @ x.T, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------- the clusters


def test_clusters_are_the_nearest_tokens_in_the_order_of_time():
    x, centroids = random(2, 3, 11, 5), random(3, 4, 5, seed=1)
    got = routing_clusters(x, centroids, 3)
    assert got.shape == (2, 3, 4, 3)
    for text in range(2):
        for head in range(3):
            for cluster in range(4):
                similarity = (x[text, head].numpy() @ centroids[head, cluster].numpy()).tolist()
                wanted = sorted(range(11), key=lambda position: -similarity[position])[:3]
                assert got[text, head, cluster].tolist() == sorted(wanted)


def test_of_equal_tokens_the_earlier_is_taken_and_padding_last():
    x, centroids = torch.ones(1, 1, 6, 5), torch.ones(1, 1, 5)
    assert routing_clusters(x, centroids, 3).tolist() == [[[[0, 1, 2]]]]
    real = torch.tensor([[False, True, True, False, True, True]])
    assert routing_clusters(-x, centroids, 3, real).tolist() == [[[[1, 2, 4]]]]
    assert routing_clusters(-x, centroids, 5, real).tolist() == [[[[0, 1, 2, 4, 5]]]]
    assert routing_clusters(x, centroids, 99).tolist() == [[[[0, 1, 2, 3, 4, 5]]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_choice_is_made_in_float32(dtype):
    x, centroids = random(2, 3, 200, 16).to(dtype), random(3, 4, 16, seed=1)
    assert torch.equal(routing_clusters(x, centroids, 50), routing_clusters(x.float(), centroids, 50))


# ----------------------------------------------------------------------------- the attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("length", "heads"), [(1, 1), (13, 2)])
def test_one_cluster_of_everything_is_full_attention_on_the_sphere(length, heads, dtype, causal):
    q, k, v, real = draw_inputs(length, heads, dtype, seed=1)
    for mask in (None, real):
        expected = dense_attention(spherical(q), spherical(k), v, mask, causal=causal)
        expected = expected if mask is None else expected * mask[:, None, :, None]
        got = routing_attention(q, k, v, mask, centroids=random(heads, 1, 5), window=length, causal=causal)
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        # several clusters of everything agree, and so does their mean
        got = routing_attention(q, k, v, mask, centroids=random(heads, 3, 5), window=length, causal=causal)
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def defined(q, k, v, real, centroids, window, causal):
    """The paper's loop: every text, head and cluster, its queries one after another, by numpy's sort."""
    q, k = spherical(q), spherical(k)
    output = v * 0.0
    for text in range(q.shape[0]):
        tokens = real[text].nonzero().flatten()
        for head in range(q.shape[1]):
            rows = [[] for _ in range(q.shape[2])]
            for centroid in centroids[head]:
                members = []
                for x in (q, k):
                    far = -(x[text, head, tokens] @ centroid.to(x.dtype)).detach().numpy()
                    members.append(sorted(tokens[np.argsort(far, kind="stable")[:window].copy()].tolist()))
                for i in members[0]:
                    seen = [j for j in members[1] if not causal or j <= i]
                    if seen:
                        scores = k[text, head, seen] @ q[text, head, i] / q.shape[-1] ** 0.5
                        rows[i].append(scores.softmax(0) @ v[text, head, seen])
            for i, found in enumerate(rows):
                if found:
                    output[text, head, i] = torch.stack(found).mean(0)
    return output


@given(
    length=st.integers(1, 17),
    heads=st.integers(1, 3),
    clusters=st.integers(1, 4),
    window=st.integers(1, 9),
    causal=st.booleans(),
    shared=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=30, deadline=None)
def test_output_and_gradients_equal_a_loop_over_clusters(length, heads, clusters, window, causal, shared, dtype, seed):
    *vectors, real = draw_inputs(length, heads, dtype, seed)
    centroids = random(heads, clusters, 5, seed=seed + 1)
    results = []
    for path in (routing_attention, defined):
        q, k, v = inputs = [x.detach().clone().requires_grad_() for x in vectors]
        chosen = {"centroids": centroids, "window": window, "causal": causal}
        output = path(q, q if shared else k, v, real, **chosen)
        wanted = torch.autograd.grad(
            (output * output.detach().cos()).sum(), inputs, allow_unused=True, materialize_grads=True
        )
        results.append([output, *wanted])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype and torch.isfinite(got).all()
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_token_in_no_cluster_gets_zeros_and_one_in_two_their_mean():
    # a text of two directions: both centroids take the first two tokens
    q = torch.tensor([[3.0, -1, 1], [3, -1, 1], [-3, 2, 1], [-3, 2, 1]])[None, None]
    v = torch.eye(4)[None, None]
    got = routing_attention(q, q, v, centroids=q[0, :, :2], window=2)
    torch.testing.assert_close(got[0, 0, :2], torch.tensor([[0.5, 0.5, 0, 0]] * 2))
    assert not got[0, 0, 2:].any()


def test_a_cluster_without_an_earlier_key_does_not_count():
    q = torch.tensor([[2.0, -1, -1, 0], [2, -1, -1, 0], [-2, 1, 1, 0], [-2, 1, 1, 0]])[None, None]
    k = torch.tensor([[1.0, 1, -1, -1], [-1, -1, 1, 1], [-1, -1, 1, 1], [1, -1, 1, -1]])[None, None]
    centroids = k[0, :, [0, 3]]
    assert routing_clusters(spherical(q), centroids, 1).tolist() == [[[[0], [0]]]]
    assert routing_clusters(spherical(k), centroids, 1).tolist() == [[[[0], [3]]]]
    # query 0 is in both clusters, and the key of the second one is in its future
    got = routing_attention(q, k, torch.eye(4)[None, None], centroids=centroids, window=1, causal=True)[0, 0]
    assert got.tolist() == [[1, 0, 0, 0], [0] * 4, [0] * 4, [0] * 4]


def test_what_stands_in_padding_changes_nothing_and_gets_zeros():
    *vectors, real = draw_inputs(15, 2, torch.float32, seed=4)
    attention = partial(routing_attention, centroids=random(2, 3, 5), window=4)
    before = attention(*vectors, real)
    assert before.any() and not before.transpose(1, 2)[~real].any()
    for x in vectors:
        x.transpose(1, 2)[~real] = 1e4
    assert torch.equal(attention(*vectors, real), before)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(dtype, bound):
    # clusters of everything, for of tokens rounded to 16 bits others may be nearest
    *vectors, real = draw_inputs(13, 2, dtype, seed=2)
    settings_ = {"centroids": random(2, 3, 5), "window": 13, "causal": True}
    got = routing_attention(*vectors, real, **settings_)
    assert got.dtype == dtype
    truth = routing_attention(*(x.double() for x in vectors), real, **settings_)
    torch.testing.assert_close(got.double(), truth, rtol=bound, atol=bound)


def test_no_table_of_all_pairs():
    """Windows of one size: twice the tokens need twice the clusters, and half the share of all pairs."""
    heads, window = 4, 128
    shares = []
    for length in (1024, 2048):
        q, k, v = random(3, 1, heads, length, 64)
        attention = partial(routing_attention, centroids=random(heads, length // window, 64), window=window)
        shares.append(largest_storage(attention, q, k, v) / (heads * length**2))
    assert shares[0] < 0.5 and shares[1] == pytest.approx(shares[0] / 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"window": 2.0}, "window must be an integer >= 1"),
        ({"centroids": torch.zeros(2, 3, 4)}, r"centroids must have shape \(2, clusters, 5\)"),
        ({"centroids": torch.zeros(1, 3, 5)}, r"centroids must have shape \(2, clusters, 5\)"),
        ({"centroids": torch.zeros(3, 5)}, "centroids must have shape"),
        ({"key_padding_mask": torch.ones(3, 7)}, "key_padding_mask must be bool"),
        ({"key_padding_mask": torch.ones(3, 6, dtype=torch.bool)}, r"key_padding_mask must have shape \(3, 7\)"),
        ({"k": torch.zeros(3, 2, 6, 5)}, "do not fit together"),
    ],
)
def test_bad_input_is_refused_by_name(changed, message):
    x = torch.zeros(3, 2, 7, 5)
    with pytest.raises(ValueError, match=message):
        routing_attention(**({"q": x, "k": x, "v": x, "centroids": torch.zeros(2, 3, 5), "window": 2} | changed))


# ----------------------------------------------------------------------------- what it sees of the future


def causal_case(length: int, moment: int) -> tuple:
    q, v = random(2, 1, 4, length, 8)
    later = q.clone()
    later[:, :, moment:] = random(1, 4, length - moment, 8, seed=1)
    return q, later, v, partial(routing_attention, centroids=Centroids(4, 8, 8).means, window=length // 8, causal=True)


def test_gradients_of_causal_outputs_never_reach_the_future():
    q, _, v, attention = causal_case(64, 40)
    q, v = q.requires_grad_(), v.requires_grad_()
    for gradient in torch.autograd.grad(attention(q, q, v)[:, :, :40].square().sum(), [q, v]):
        assert gradient[:, :, :40].any() and not gradient[:, :, 40:].any()


def test_values_of_the_future_are_not_seen():
    q, _, v, attention = causal_case(64, 40)
    before = attention(q, q, v)
    v = v.clone()
    v[:, :, 40:] += 1
    after = attention(q, q, v)
    assert torch.equal(before[:, :, :40], after[:, :, :40]) and not torch.equal(before, after)


def test_the_choice_of_clusters_leaks_the_future():
    """Other tokens from 40 on: many outputs before 40 change, though no query attends to a later key."""
    q, later, v, attention = causal_case(64, 40)
    before, after = attention(q, q, v)[0, :, :40], attention(later, later, v)[0, :, :40]
    changed = (before != after).any(-1)
    assert changed.float().mean() > 0.2
    # all of it comes through the choice: where the clusters are fixed by one that takes all, nothing leaks
    everything = partial(attention, window=64)
    assert torch.allclose(everything(q, q, v)[:, :, :40], everything(later, later, v)[:, :, :40], atol=1e-6)


# ----------------------------------------------------------------------------- the centroids


def test_moving_average_equals_a_loop_in_numpy():
    centroids, decay = Centroids(2, 3, 4, decay=0.9, seed=1), 0.9
    means = centroids.means.numpy().astype(np.float64)
    sums, counts = means.copy(), np.ones((2, 3))
    for step in range(5):
        x = spherical(random(2, 2, 7, 4, seed=step))
        real = torch.rand(2, 7, generator=torch.Generator().manual_seed(step)) < 0.7
        centroids.update_(x, real)
        for head in range(2):
            new_sums, new_counts = np.zeros((3, 4)), np.zeros(3)
            for text in range(2):
                for token in range(7):
                    if real[text, token]:
                        vector = x[text, head, token].numpy()
                        nearest = max(range(3), key=lambda c, v=vector, h=head: float(v @ means[h, c]))
                        new_sums[nearest] += vector
                        new_counts[nearest] += 1
            sums[head] = decay * sums[head] + (1 - decay) * new_sums
            counts[head] = decay * counts[head] + (1 - decay) * new_counts
            total = counts[head].sum()
            smoothed = (counts[head] + 1e-5) / (total + 3 * 1e-5) * total
            means[head] = sums[head] / smoothed[:, None]
        for got, expected in ((centroids.means, means), (centroids.sums, sums), (centroids.counts, counts)):
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_an_empty_cluster_keeps_its_centroid():
    centroids = Centroids(1, 2, 6)
    far = centroids.means[:, :1].clone()
    before = centroids.means[0, 1].clone()
    for _ in range(20):
        centroids.update_(far[None].expand(1, 1, 30, 6))  # all of them at the first centroid
    assert centroids.counts[0, 0] > centroids.counts[0, 1]
    # the smoothing gives it a part of 1e-5
    torch.testing.assert_close(centroids.means[0, 1], before, rtol=1e-4, atol=0)


def test_the_counts_of_padding_alone_only_fade():
    centroids = Centroids(2, 3, 4)
    centroids.update_(random(2, 2, 5, 4), torch.zeros(2, 5, dtype=torch.bool))
    torch.testing.assert_close(centroids.counts, torch.full((2, 3), 0.999))
    # the smoothing's part of 1e-5 again
    torch.testing.assert_close(centroids.means, Centroids(2, 3, 4).means, rtol=1e-4, atol=1e-4)


def planted(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens around one of 6 directions that are the same for every seed, with the number of that direction."""
    directions = 3 * random(6, 16, seed=99)
    kind = torch.randint(6, (tokens,), generator=torch.Generator().manual_seed(seed))
    return spherical(directions[kind] + random(tokens, 16, seed=seed))[None, None], kind


def entropy(shares: torch.Tensor) -> float:
    """Nats; log(clusters) if every cluster has as many tokens."""
    return torch.special.entr(shares).sum(-1).mean().item()


def test_updates_find_planted_clusters():
    x, kind = planted(600, seed=0)
    gained = []
    for seed in range(6):
        centroids = Centroids(1, 6, 16, decay=0.9, seed=seed)
        spread, distance = entropy(centroids.occupancy(x)), centroids.commitment_loss(x)
        for step in range(60):
            centroids.update_(planted(300, seed=1 + step)[0])
        gained.append(entropy(centroids.occupancy(x)) - spread)
        assert centroids.commitment_loss(x) < 0.4 * distance
        # tokens of one direction go to one centroid
        table = torch.zeros(6, 6).index_put_((kind, centroids.nearest(x)[0, 0]), torch.ones(600), accumulate=True)
        assert table.max(1).values.sum() > 0.95 * 600
    # not from every start: a centroid without tokens has no way back
    assert sum(gained) / 6 > 0.05 and sum(gain > 0.15 for gain in gained) >= 3


def test_occupancy_counts_real_tokens():
    centroids, x = Centroids(2, 3, 4), random(2, 2, 9, 4)
    real = torch.arange(9) < torch.tensor([[9], [4]])
    shares, nearest = centroids.occupancy(x, real), centroids.nearest(x)
    for head in range(2):
        of_head = nearest[:, head][real]
        assert shares[head].tolist() == pytest.approx([(of_head == c).sum().item() / 13 for c in range(3)])
    assert not centroids.occupancy(x, torch.zeros(2, 9, dtype=torch.bool)).any()


def test_commitment_loss_and_its_gradient():
    centroids, x = Centroids(2, 3, 4), random(2, 2, 9, 4).requires_grad_()
    real = torch.arange(9) < torch.tensor([[9], [4]])
    difference = torch.stack([x[:, head] - centroids.means[head][centroids.nearest(x)[:, head]] for head in range(2)])
    loss = centroids.commitment_loss(x, real)
    torch.testing.assert_close(loss, difference[:, real].square().mean())
    loss.backward()
    expected = (2 * difference.transpose(0, 1) * real[:, None, :, None]) / (2 * 13 * 4)
    torch.testing.assert_close(x.grad, expected.detach())
    assert centroids.commitment_loss(x, torch.zeros(2, 9, dtype=torch.bool)) == 0


def test_centroids_start_on_the_sphere_from_their_seed():
    first, again, other = (Centroids(2, 3, 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.means, again.means) and not torch.equal(first.means, other.means)
    torch.testing.assert_close(first.means.norm(dim=-1), torch.full((2, 3), 8**0.5), rtol=1e-4, atol=0)
    assert list(first.parameters()) == [] and set(first.state_dict()) == {"means", "sums", "counts"}


def test_centroids_refuse():
    with pytest.raises(ValueError, match="clusters must be an integer >= 1"):
        Centroids(2, 0, 4)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        Centroids(2, 3, 4, decay=1.0)
    with pytest.raises(ValueError, match="centroids must have shape"):
        Centroids(2, 3, 4).update_(random(2, 2, 9, 5))
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        Centroids(2, 3, 4).commitment_loss(random(2, 2, 9, 4), torch.ones(2, 9))


# ----------------------------------------------------------------------------- the mixer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [2, 5])
def test_mixer_is_local_heads_beside_routed_ones(causal, heads):
    config = TransformerConfig(vocab_size=60, d_model=4 * heads, layers=1, heads=heads, d_ff=16, segments=0)
    mixer, x = RoutingSelfAttention(config, 3, 4, 2, causal=causal).eval(), random(2, 11, 4 * heads)
    real = torch.arange(11) < torch.tensor([[11], [7]])
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (mixer.query, mixer.key, mixer.value))
    half = heads // 2
    near = local_attention(q[:, :half], k[:, :half], v[:, :half], real, block=2, flange=2, causal=causal)
    keys = q[:, half:] if causal else k[:, half:]
    chosen = {"centroids": mixer.centroids.means, "window": 4, "causal": causal}
    far = routing_attention(q[:, half:], keys, v[:, half:], real, **chosen)
    got, state = mixer(x, real)
    torch.testing.assert_close(got, mixer.output(torch.cat([near, far], 1).transpose(1, 2).flatten(2)))
    assert state is None and mixer.commitment_loss is None
    assert mixer.centroids.means.shape == (heads - half, 3, 4)


@pytest.mark.parametrize("causal", [False, True])
def test_training_moves_the_centroids_and_every_parameter(causal):
    model = (Decoder if causal else Encoder)(
        CONFIG, token_mixer=lambda config, layer: RoutingSelfAttention(config, 4, 5, 4, causal=causal, seed=layer)
    )
    mixers = [block.token_mixer for block in model.blocks]
    start = [mixer.centroids.means.clone() for mixer in mixers]
    assert not torch.equal(*start)
    token_ids = torch.randint(60, (2, 19), generator=torch.Generator().manual_seed(0))
    real = torch.arange(19) < torch.tensor([[19], [11]])
    model.eval()(token_ids, real)
    with torch.no_grad():
        model.train()(token_ids, real)
    assert all(torch.equal(mixer.centroids.means, old) for mixer, old in zip(mixers, start, strict=True))
    output = model(token_ids, real)[0][real]
    (output.square().mean() + sum(mixer.commitment_loss for mixer in mixers)).backward()
    for mixer, old in zip(mixers, start, strict=True):
        assert not torch.equal(mixer.centroids.means, old) and mixer.commitment_loss > 0
        # a bias of the keys changes no softmax, but the sphere makes it matter where keys are routed
        names = [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.any()]
        assert names in ([], ["key.bias"])


def test_centroids_learn_from_queries_and_keys_without_padding():
    mixer, x = RoutingSelfAttention(CONFIG, 3, 4, 2).train(), random(2, 11, 20)
    real = torch.arange(11) < torch.tensor([[11], [7]])
    expected = Centroids(2, 3, 5)
    q, k = (p(x).unflatten(-1, (-1, 5)).transpose(1, 2)[:, 2:] for p in (mixer.query, mixer.key))
    loss = expected.commitment_loss(spherical(torch.cat([q, k], 2)), torch.cat([real, real], 1))
    expected.update_(spherical(torch.cat([q, k], 2)), torch.cat([real, real], 1))
    mixer(x, real)
    torch.testing.assert_close(mixer.centroids.means, expected.means)
    torch.testing.assert_close(mixer.commitment_loss, loss)
    assert mixer.centroids.counts.sum().item() == pytest.approx(2 * (3 * 0.999 + 0.001 * 2 * 18))


def test_centroids_travel_with_the_weights():
    mixer, x = RoutingSelfAttention(CONFIG, 3, 4, 2), random(1, 11, 20)
    mixer.train()(x)
    other = RoutingSelfAttention(CONFIG, 3, 4, 2, seed=5)
    other.load_state_dict(mixer.state_dict())
    assert torch.equal(other.eval()(x)[0], mixer.eval()(x)[0])


def test_mixer_refuses():
    mixer, x = RoutingSelfAttention(CONFIG, 3, 4, 2), random(2, 6, 20)
    with pytest.raises(ValueError, match="state must be None"):
        mixer(x, None, (x, x))
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        mixer(x, torch.ones(2, 6))
    with pytest.raises(ValueError, match="heads must be >= 2"):
        RoutingSelfAttention(TransformerConfig(heads=1), 3, 4, 2)
    with pytest.raises(ValueError, match="local_block must be an integer >= 1"):
        RoutingSelfAttention(CONFIG, 3, 4, 0)
