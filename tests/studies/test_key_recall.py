"""The study of found keys: its parts against loops over pairs, a small run, and the recorded summary."""

import pytest
import torch

from effnlp_lessons.attention.lsh import draw_rotations, lsh_buckets
from effnlp_lessons.attention.patterns import captured_mass, read_heads
from effnlp_lessons.attention.routing import routing_clusters, spherical
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.studies import key_recall
from effnlp_lessons.studies.attention_patterns import passage
from effnlp_lessons.studies.runner import load_results

SETTING = {"length": 40, "passages": 2, "tops": [3, 5], "buckets": [4], "rounds": [1, 3], "clusters": [5]}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------- what is chosen


def test_queries_and_keys_are_those_of_the_heads():
    encoder = load_minilm()
    token_ids = passage("plays", 30, torch.Generator().manual_seed(0))
    weights = read_heads(encoder, token_ids).weights
    layers = list(key_recall.queries_and_keys(encoder, token_ids))
    assert len(layers) == 6
    for (q, k), expected in zip(layers, weights, strict=True):
        got = (q @ k.transpose(1, 2) / 32**0.5).softmax(-1)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_mean_key_changes_no_weight_and_the_mean_query_does():
    q, k = random(2, 9, 4), random(2, 9, 4, seed=1) + 3
    weights = {}
    for centre in key_recall.CENTRES:
        new_q, new_k = key_recall.centred(q, k, centre)
        assert torch.equal(new_q, q) is (centre != "both") and torch.equal(new_k, k) is (centre == "nothing")
        weights[centre] = (new_q @ new_k.transpose(1, 2)).softmax(-1)
    torch.testing.assert_close(weights["keys"], weights["nothing"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(weights["both"], weights["nothing"], atol=0.01)
    with pytest.raises(ValueError, match="centre must be one of .* got 'queries'"):
        key_recall.centred(q, k, "queries")


def test_hashed_pairs_share_a_bucket_in_one_of_the_rounds():
    q, k = random(2, 9, 4), random(2, 11, 4, seed=1)[:, :9]
    rotations = draw_rotations(3, 4, 4, torch.Generator().manual_seed(0))
    of_queries, of_keys = lsh_buckets(q, rotations), lsh_buckets(k, rotations)
    for rounds, chosen in enumerate(key_recall.hashed(q, k, rotations), 1):
        for head in range(2):
            met = [
                [(of_queries[head, :rounds, i] == of_keys[head, :rounds, j]).sum().item() for j in range(9)]
                for i in range(9)
            ]
            assert chosen.mask[head].tolist() == [[times > 0 for times in row] for row in met]
            assert chosen.work[head].item() == pytest.approx(sum(map(sum, met)) / 81)
    assert rounds == 3


def test_clustered_pairs_are_taken_by_one_centroid():
    q, k = random(2, 13, 4), random(2, 13, 4, seed=1)
    chosen = key_recall.clustered(q, k, 3, torch.Generator().manual_seed(2))
    tokens = torch.cat([spherical(q), spherical(k)], 1)
    centroids = key_recall.spherical_kmeans(tokens, 3, torch.Generator().manual_seed(2))
    queries, keys = (routing_clusters(spherical(x)[None], centroids, 4)[0].tolist() for x in (q, k))
    for head in range(2):
        met = torch.zeros(13, 13)
        for of_queries, of_keys in zip(queries[head], keys[head], strict=True):
            for i in of_queries:
                met[i, of_keys] += 1
        assert torch.equal(chosen.mask[head], met > 0)
        assert chosen.work[head].item() == pytest.approx(3 * 16 / 169) == pytest.approx(met.mean().item())


def test_kmeans_is_at_rest_and_better_than_its_start():
    x = spherical(random(2, 60, 5))
    start, end = (key_recall.spherical_kmeans(x, 4, torch.Generator().manual_seed(0), steps=steps) for steps in (0, 50))
    assert all(any(torch.equal(centroid, token) for token in x[0]) for centroid in start[0])
    nearest = (x @ end.transpose(1, 2)).argmax(-1)
    for head in range(2):
        for cluster in range(4):
            own = x[head, nearest[head] == cluster]
            torch.testing.assert_close(end[head, cluster], spherical(own.sum(0)), rtol=1e-5, atol=1e-5)
    best = [(x @ centroids.transpose(1, 2)).amax(-1).mean(1) for centroids in (start, end)]
    assert (best[1] > best[0] + 0.1).all()
    assert torch.allclose(key_recall.spherical_kmeans(x, 4, torch.Generator().manual_seed(0)), end, atol=1e-4)
    with pytest.raises(ValueError, match="clusters must be from 1 to 60"):
        key_recall.spherical_kmeans(x, 61, torch.Generator())


def test_a_centroid_without_tokens_stays():
    x = spherical(random(1, 1, 5)).expand(1, 7, 5)  # one token seven times: the first of two equal centroids has all
    end = key_recall.spherical_kmeans(x, 2, torch.Generator().manual_seed(0))
    torch.testing.assert_close(end[0, 1], x[0, 0])


# ----------------------------------------------------------------------------- what it is worth


def test_worth_of_a_mask_and_of_as_many_pairs():
    weights = random(3, 12, 12).softmax(-1)
    truth = key_recall.Truth(weights, (2, 5), torch.Generator().manual_seed(0))
    mask = (
        torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.1, 0.4, 1.0])[:, None, None]
    )
    table = truth.of(mask)
    torch.testing.assert_close(table["found"][:, 0], captured_mass(weights, mask))
    for head in range(3):
        keys = -(-int(mask[head].sum()) // 12)
        window, mass, recalls = torch.zeros(12, 12, dtype=torch.bool), [], {2: [], 5: []}
        for i in range(12):
            best = weights[head, i].argsort(descending=True)
            for top in recalls:
                recalls[top].append(mask[head, i, best[:top]].float().mean())
            window[i, sorted(range(12), key=lambda j, i=i: abs(i - j))[:keys]] = True
            mass.append(weights[head, i, best[:keys]].sum())
        expected = torch.stack([torch.stack(found).mean() for found in recalls.values()])
        torch.testing.assert_close(table["found"][head, 1:], expected)
        torch.testing.assert_close(table["window"][head, 0], captured_mass(weights[head : head + 1], window)[0])
        torch.testing.assert_close(table["best"][head, 0], torch.stack(mass).mean())
        assert table["best"][head, 1:].tolist() == pytest.approx([min(1, keys / 2), min(1, keys / 5)])
    assert table["random"][2].tolist() == pytest.approx([1.0, 1.0, 1.0])  # all pairs find all
    # on many heads a random choice finds its share
    many = key_recall.Truth(random(200, 12, 12).softmax(-1), (2,), torch.Generator().manual_seed(0))
    share = many.of(torch.ones(200, 12, 12).tril().bool())["random"].mean(0)  # 78 pairs: 7 keys of 12 a query
    assert share.tolist() == pytest.approx([7 / 12, 7 / 12], abs=0.02)


@pytest.fixture(scope="module")
def small():
    return key_recall.run(SETTING, seed=3).numbers


def test_a_small_run(small):
    assert small["columns"] == ["mass", "top 3", "top 5"] and tuple(small["results"]) == key_recall.CENTRES
    again = key_recall.run(SETTING, seed=3).numbers
    assert again == small != key_recall.run(SETTING, seed=4).numbers
    for rows in small["results"].values():
        assert list(rows) == ["4 buckets, 1 round", "4 buckets, 3 rounds", "5 clusters"]
        one, three, clusters = rows.values()
        assert one["pairs"] == one["work"] < three["pairs"] < three["work"]
        assert clusters["pairs"] <= clusters["work"] == pytest.approx(1 / 5)  # 5 clusters of 8 x 8 pairs of 40 x 40
        assert all(a < b for a, b in zip(one["found"], three["found"], strict=True))
        for row in rows.values():
            for low, found, high in zip(row["low"], row["found"], row["high"], strict=True):
                assert 0 <= low <= high <= 1 and 0 <= found <= 1
            # as many keys for every query and a few more; a half one of 40 on average
            assert row["random"] == pytest.approx([row["pairs"]] * 3, abs=0.05)


def test_a_run_is_the_mean_over_passages_and_heads(small):
    generator, encoder = torch.Generator().manual_seed(3), load_minilm()
    mass = []
    for _ in range(2):
        token_ids = passage("plays", 40, generator)
        for (q, k), weights in zip(
            key_recall.queries_and_keys(encoder, token_ids), read_heads(encoder, token_ids).weights, strict=True
        ):
            torch.rand(40, 40, generator=generator)  # the random choice
            rotations = draw_rotations(3, 32, 4, generator)
            torch.randint(2**31, (), generator=generator)
            of_queries, of_keys = (
                lsh_buckets(q, rotations)[:, 0],
                lsh_buckets(k - k.mean(1, keepdim=True), rotations)[:, 0],
            )
            mass.append(captured_mass(weights, of_queries[:, :, None] == of_keys[:, None]))
    mass = torch.stack(mass).unflatten(0, (2, 6)).mean(0).flatten()
    # the queries' mean is taken away in "both" alone, the keys' in two of three
    assert len({str(small["results"][centre]["4 buckets, 1 round"]["found"]) for centre in key_recall.CENTRES}) == 3
    row = small["results"]["keys"]["4 buckets, 1 round"]
    # the study keeps three digits
    assert row["found"][0] == pytest.approx(mass.mean().item(), abs=6e-4)
    quarters = mass.sort().values.unflatten(0, (2, 36)).median(1).values  # torch: the lower one of two middle heads
    assert row["low"][0] == pytest.approx(quarters[0].item(), abs=0.02)
    assert row["high"][0] == pytest.approx(quarters[1].item(), abs=0.02)


def test_over_seeds():
    runs = [{"results": {"keys": {"a": {"pairs": x, "found": [x, 1.0], "low": [0.0, x]}}}} for x in (0.2, 0.4)]
    table = key_recall.over_seeds(runs, "keys")
    assert table["a"]["pairs"] == pytest.approx(0.3) and table["a"]["found"] == pytest.approx([0.3, 1.0])
    assert table["a"]["low"] == pytest.approx([0.0, 0.3]) and table["a"]["seeds"] == [0.2, 0.4]


# ----------------------------------------------------------------------------- what is recorded


@pytest.fixture(scope="module")
def recorded():
    return load_results("key_recall")["runs"]


def test_recorded_settings_are_those_of_the_study(recorded):
    study = key_recall.STUDY
    wanted = [(setting, seed) for setting in study.recorded for seed in study.seeds]
    assert [(run["setting"], run["seed"]) for run in recorded] == wanted


def test_in_every_recorded_run_choices_by_content_beat_chance(recorded):
    for run in recorded:
        for rows in run["results"].values():
            for row in rows.values():
                assert all(found > chance for found, chance in zip(row["found"], row["random"], strict=True))


def test_in_every_recorded_run_more_rounds_find_more_and_pay_more(recorded):
    for run in recorded:
        setting = run["setting"]
        for rows in run["results"].values():
            for buckets in setting["buckets"]:
                own = [row for name, row in rows.items() if name.startswith(f"{buckets} buckets")]
                assert len(own) == len(setting["rounds"])
                for less, more in zip(own, own[1:], strict=False):
                    assert less["pairs"] < more["pairs"] and all(
                        a < b for a, b in zip(less["found"], more["found"], strict=True)
                    )


def test_recorded_hashing_loses_to_a_window_in_one_round_and_wins_in_eight(recorded):
    for run in recorded:
        one, eight = (run["results"]["keys"][f"32 buckets, {rounds}"] for rounds in ("1 round", "8 rounds"))
        assert all(found < window for found, window in zip(one["found"], one["window"], strict=True))
        assert all(found > window for found, window in zip(eight["found"], eight["window"], strict=True))


def test_recorded_centring_the_keys_finds_more_for_fewer_pairs(recorded):
    for run in recorded:
        apart, centred = (
            run["results"]["nothing"]["16 buckets, 4 rounds"],
            run["results"]["keys"]["32 buckets, 4 rounds"],
        )
        assert centred["pairs"] < apart["pairs"] and centred["found"][1] > apart["found"][1]


def test_recorded_clusters_beat_a_window_of_as_many_pairs(recorded):
    for run in recorded:
        row = run["results"]["keys"]["16 clusters"]
        assert all(found > window for found, window in zip(row["found"], row["window"], strict=True))
