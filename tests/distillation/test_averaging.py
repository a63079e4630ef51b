"""The averaging network against a loop over one sentence at a time."""

import pytest
import torch

from effnlp_lessons.distillation.averaging import MULTIPLIER, AveragingNetwork


@pytest.fixture
def network():
    return AveragingNetwork(3, width=8, pairs=50, vocab_size=40, seed=1).double().eval()


def by_hand(network, tokens):
    words = [network.words.weight[token] for token in tokens]
    before = [tokens[0], *tokens[:-1]]
    pairs = [network.pairs.weight[(a * MULTIPLIER + b) % 50] for a, b in zip(before, tokens, strict=True)]
    average = sum(word + pair for word, pair in zip(words, pairs, strict=True)) / len(tokens)
    return network.head.weight @ torch.relu(network.hidden.weight @ average + network.hidden.bias) + network.head.bias


def test_equals_the_definition_and_padding_counts_for_nothing(network):
    sentences = [[3, 7, 7, 1, 39], [5], [0, 2]]
    token_ids = torch.zeros(3, 5, dtype=torch.long)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    for row, tokens in enumerate(sentences):
        token_ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), True
    expected = torch.stack([by_hand(network, tokens) for tokens in sentences])
    # float64: only the order of the sums differs
    assert torch.allclose(network(token_ids, mask), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(network(token_ids.masked_fill(~mask, 9), mask), network(token_ids, mask))


def test_order_matters_through_neighbours_alone(network):
    mask = torch.ones(1, 4, dtype=torch.bool)
    one, other, same_pairs = ([[1, 2, 3, 4]], [[4, 3, 2, 1]], [[1, 2, 3, 4]])
    logits = [network(torch.tensor(ids), mask) for ids in (one, other, same_pairs)]
    assert not torch.allclose(logits[0], logits[1], rtol=1e-3) and torch.equal(logits[0], logits[2])


def test_weights_come_from_the_seed_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    a, b, c = (AveragingNetwork(seed=seed, vocab_size=10, pairs=10) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.words.weight, b.words.weight) and not torch.equal(a.words.weight, c.words.weight)


@pytest.mark.parametrize("name", ["width", "pairs", "vocab_size"])
def test_bad_sizes(name):
    with pytest.raises(ValueError, match=name):
        AveragingNetwork(**{name: 0})
