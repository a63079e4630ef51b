"""The study of the duplication task: a small run against the functions that it uses, and what is recorded."""

import pytest
import torch
import torch.nn.functional as F

from effnlp_lessons.attention.lsh import lsh_attention, unit_keys
from effnlp_lessons.dense_attention import causal_mask, masked_softmax
from effnlp_lessons.studies import duplication
from effnlp_lessons.studies.duplication import FULL, LIVE, SIZES, STUDY, TESTED, TRAINED
from effnlp_lessons.studies.runner import load_results

TINY = LIVE | {"word": 7, "symbols": 5, "d_model": 16, "chunk": 4, "buckets": 4, "steps": 6, "batch": 4, "tested": 9}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_texts_are_a_word_twice():
    texts = duplication.duplicated_words(200, 7, 5, generator())
    assert texts.shape == (200, 16)
    assert (texts[:, [0, 8]] == 0).all() and torch.equal(texts[:, 1:8], texts[:, 9:])
    assert texts[:, 1:8].unique().tolist() == [1, 2, 3, 4, 5]
    assert len(texts.unique(dim=0)) > 190


def test_the_loss_counts_on_the_second_word_alone():
    """Each logit is of the token before its symbol; no gradient reaches a symbol's own place, or the future."""
    texts = duplication.duplicated_words(3, 7, 5, generator())
    model = duplication.make_model(TINY, 0)
    duplication.hash_anew_(model, FULL, TINY, generator())
    logits, symbols = duplication.second_word(model, texts)
    assert torch.equal(symbols, texts[:, 1:8]) and torch.equal(logits, model(texts).logits[:, 8:15])
    changed = texts.clone()
    changed[:, -1] = changed[:, -1] % 5 + 1
    assert torch.equal(duplication.second_word(model, changed)[0], logits)  # the last symbol is only a target
    changed[:, 1] = changed[:, 1] % 5 + 1
    assert not torch.equal(duplication.second_word(model, changed)[0], logits)


def test_full_is_shared_query_key_attention():
    model = duplication.make_model(TINY, 1)
    duplication.hash_anew_(model, FULL, TINY, generator())
    mixer, x = model.blocks[0].token_mixer, torch.randn(2, 16, 16, generator=generator())
    qk, v = (project(x).unflatten(-1, (2, 8)).transpose(1, 2) for project in (mixer.query_key, mixer.value))
    allowed = causal_mask(16, 16) & ~torch.eye(16, dtype=torch.bool)
    weights = masked_softmax(qk @ unit_keys(qk).transpose(-1, -2), allowed)
    weights[:, :, 0, 0] = 1  # the first token has only itself
    expected = mixer.output((weights @ v).transpose(1, 2).flatten(2))
    assert torch.allclose(mixer(x)[0], expected, atol=1e-5)


def test_hashing_is_drawn_anew_and_leaves_the_weights():
    model = duplication.make_model(TINY, 0)
    before = {name: weights.clone() for name, weights in model.named_parameters()}
    source, drawn, mixer = generator(), [], model.blocks[0].token_mixer
    for hashes in (2, 2, 8):
        duplication.hash_anew_(model, hashes, TINY, source)
        assert mixer.chunk == 4 and mixer.rotations.shape == (hashes, 8, 2)
        drawn.append(mixer.rotations)
    assert not torch.equal(drawn[0], drawn[1])
    assert "blocks.0.token_mixer.rotations" in dict(model.named_buffers())
    assert all(torch.equal(weights, before[name]) for name, weights in model.named_parameters())
    duplication.hash_anew_(model, FULL, TINY, source)
    assert mixer.chunk == 16


def test_right_keys_hold_the_wanted_symbol():
    """With the identity as values, the layer's output is its weights; the wanted key comes after 0 or the symbol."""
    texts = duplication.duplicated_words(3, 7, 5, generator())
    model = duplication.make_model(TINY | {"d_model": 32}, 0)
    model.embeddings.positions.weight.data.normal_(generator=generator(1))
    mixer, seen = model.blocks[0].token_mixer, {}
    mixer.query_key.register_forward_hook(lambda module, args, out: seen.update(qk=out))
    weights, cosines = duplication.right_keys(model, texts)
    qk = seen["qk"].unflatten(-1, (2, 16)).transpose(1, 2)
    buckets = torch.zeros(3, 2, 1, 16, dtype=torch.long)
    all_weights = lsh_attention(qk, torch.eye(16).expand(3, 2, 16, 16), buckets=buckets, chunk=16, causal=True)
    pairs = [(query, 1 + place) for place, query in enumerate(range(8, 15))]
    assert all(torch.equal(texts[:, key], texts[:, query + 1]) for query, key in pairs)
    expected = torch.stack([all_weights[:, :, query, key] for query, key in pairs]).mean((0, 1))
    assert torch.allclose(weights, expected, atol=1e-5)
    expected = torch.stack([F.cosine_similarity(qk[:, :, query], qk[:, :, key], dim=-1) for query, key in pairs])
    assert torch.allclose(cosines, expected.mean((0, 1)), atol=1e-4)


def test_accuracy_counts_every_text():
    model = duplication.make_model(TINY, 0)
    texts = duplication.duplicated_words(9, 7, 5, generator())
    found = duplication.test_accuracy(model, texts, FULL, TINY, generator())
    logits, symbols = duplication.second_word(model, texts)
    assert found == pytest.approx((logits.argmax(-1) == symbols).float().mean().item())
    model.embeddings.tokens.weight.data.zero_()  # all logits equal: the first of them, 0, is in no word
    assert duplication.test_accuracy(model, texts, 2, TINY, generator()) == 0


@pytest.mark.parametrize("hashes", [FULL, 2])
def test_a_small_run(hashes):
    setting = {"hashes": hashes, **TINY}
    first, second = (duplication.run(setting, 3).numbers for _ in range(2))
    assert first == second
    assert set(first["accuracy"]) == {str(rounds) for rounds in TESTED} and len(first["loss"]) == 6
    # the loss of a single step is that of the untrained model on this seed's texts, with this seed's rotations
    first = duplication.run(setting | {"steps": 1}, 3).numbers
    texts = duplication.duplicated_words(4, 7, 5, generator(6))
    model = duplication.make_model(setting, 3)
    duplication.hash_anew_(model, hashes, setting, generator(7))
    each = F.cross_entropy(*(part.flatten(0, 1) for part in duplication.second_word(model, texts)))
    assert first["loss"][0] == pytest.approx(each.item(), abs=1e-4)


def test_it_learns_to_copy():
    setting = {"hashes": FULL, **LIVE}
    numbers = duplication.run(setting, 0).numbers
    assert numbers["accuracy"][FULL] > 0.9  # by chance 1 / 16
    assert numbers["loss"][0] > 10 * numbers["loss"][-1]


def test_reading_the_table():
    runs = [
        {"setting": {"hashes": trained}, "accuracy": {str(t): 0.1 * seed + 0.01 * place for t in TESTED}}
        for place, trained in enumerate(TRAINED)
        for seed in (0, 2)
    ]
    found = duplication.table({"runs": runs})
    assert list(found) == list(TRAINED) and list(found[4]) == list(TESTED)
    assert found[4][8] == pytest.approx((0.11, 0.01, 0.21))
    for trained, tested in ((3, 8), (FULL, 3), ("4", 8)):
        with pytest.raises(ValueError, match="trained must be in"):
            duplication.accuracies({"runs": runs}, trained, tested)


# --------------------------------------------------------------------------------------------- what is recorded


@pytest.fixture(scope="module")
def summary():
    return load_results("duplication")


def test_what_is_recorded_is_the_study(summary):
    assert [(run["setting"]["hashes"], run["seed"]) for run in summary["runs"]] == [
        (setting["hashes"], seed) for setting in STUDY.recorded for seed in STUDY.seeds
    ]
    assert all(run["setting"] == {"hashes": run["setting"]["hashes"], **SIZES} for run in summary["runs"])


def test_what_the_lecture_says(summary):
    found = duplication.table(summary)
    for trained in TRAINED:
        means = [found[trained][tested][0] for tested in (1, 2, 4, 8)]
        assert all(more > fewer - 0.005 for fewer, more in zip(means, means[1:], strict=False))
    # trained with full attention: eight rounds find nearly all of it, one round loses some
    assert found[FULL][FULL][0] > 0.99 and found[FULL][8][0] > 0.98 and found[FULL][1][0] < 0.95
    # a model that was trained with one round bears a test with one round better
    assert found[1][1][0] > found[FULL][1][0] and found[1][8][0] > 0.98
