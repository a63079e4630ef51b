"""What can be asked of a mask: against loops, and on hand-made heads."""

import pytest
import torch

from effnlp_lessons.attention.patterns import best_mask, captured_mass, output_error, pairs, reach, read_heads
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.transformer import Decoder, Encoder, TransformerConfig

CONFIG = TransformerConfig(vocab_size=40, max_length=16, d_model=12, layers=2, heads=3, d_ff=16, segments=0)


def random_masks(count: int, length: int, share: float, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.rand(count, length, length, generator=torch.Generator().manual_seed(seed)) < share)


def random_heads(heads: int = 4, length: int = 9, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, weights and values, float64."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(heads, length, length, generator=generator, dtype=torch.float64)
    return scores, scores.softmax(-1), torch.randn(heads, length, 5, generator=generator, dtype=torch.float64)


# ----------------------------------------------------------------------------- reach


@pytest.mark.parametrize("seed", range(4))
def test_reach_follows_every_path_through_the_layers(seed):
    masks = random_masks(3, 8, 0.15, seed)

    def sources(layer: int, i: int) -> set[int]:
        """Inputs on which token i depends after `layer` layers."""
        if layer == 0:
            return {i}
        seen = masks[layer - 1][i].nonzero().flatten().tolist()
        return set.union(*(sources(layer - 1, j) for j in {i, *seen}))

    reached = reach(masks)
    for i in range(8):
        assert set(reached[i].nonzero().flatten().tolist()) == sources(3, i)


def test_the_order_of_the_layers_matters():
    first, second = torch.zeros(2, 3, 3, dtype=torch.bool)
    first[1, 2] = second[0, 1] = True
    assert reach([first, second])[0, 2] and not reach([second, first])[0, 2]


def test_reach_refuses():
    with pytest.raises(ValueError, match="at least one mask"):
        reach([])
    with pytest.raises(ValueError, match="must be bool"):
        reach([torch.ones(3, 3)])
    with pytest.raises(ValueError, match=r"must broadcast to \(3, 3\)"):
        reach([torch.ones(3, 3, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)])


# ----------------------------------------------------------------------------- mass and error


def test_mass_of_all_of_none_and_of_one_column():
    _, weights, _ = random_heads()
    everything = torch.ones(9, 9, dtype=torch.bool)
    column = torch.zeros(9, 9, dtype=torch.bool)
    column[:, 3] = True
    torch.testing.assert_close(captured_mass(weights, everything), torch.ones(4, dtype=torch.float64))
    assert captured_mass(weights, ~everything).tolist() == [0.0] * 4
    torch.testing.assert_close(captured_mass(weights, column), weights[:, :, 3].mean(1))


def test_error_is_that_of_a_softmax_over_the_allowed_pairs():
    scores, weights, values = random_heads()
    mask = random_masks(1, 9, 0.4)[0]
    mask[2] = False  # a query without any key
    got = output_error(weights, values, mask)
    for head in range(4):
        dense, masked = scores[head].softmax(-1) @ values[head], torch.zeros(9, 5, dtype=torch.float64)
        for i in range(9):
            if mask[i].any():
                masked[i] = scores[head, i, mask[i]].softmax(-1) @ values[head, mask[i]]
        torch.testing.assert_close(got[head], (masked - dense).norm() / dense.norm())
    assert output_error(weights, values, torch.zeros(9, 9, dtype=torch.bool)).tolist() == [1.0] * 4


def test_mass_alone_misleads():
    """Two heads, 0.9 of the weight on a key whose value is zero: the mass is there, the output is elsewhere."""
    weights = torch.tensor([[[0.9, 0.1], [0.9, 0.1]]], dtype=torch.float64)
    values = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64)
    first = torch.tensor([[True, False], [True, False]])
    assert captured_mass(weights, first).item() == pytest.approx(0.9)
    assert output_error(weights, values, first).item() == 1.0
    assert output_error(weights, values, ~first).item() == pytest.approx(9.0)  # 1 instead of 0.1


def test_a_mask_for_every_head():
    _, weights, values = random_heads()
    masks = torch.stack(random_masks(4, 9, 0.3))
    for head in range(4):
        one = slice(head, head + 1)
        assert captured_mass(weights, masks)[head] == captured_mass(weights[one], masks[head])
        # a batch of matrix products may add in another order than a single one
        torch.testing.assert_close(
            output_error(weights, values, masks)[head], output_error(weights[one], values[one], masks[head])[0]
        )


@pytest.mark.parametrize("count", [0, 1, 20, 81])
def test_no_mask_of_its_size_captures_more_than_the_best_one(count):
    _, weights, _ = random_heads()
    best = best_mask(weights, count)
    assert best.flatten(1).sum(1).tolist() == [count] * 4 and pairs(best) == 4 * count
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = torch.zeros(81, dtype=torch.bool)
        other[torch.randperm(81, generator=generator)[:count]] = True
        assert (captured_mass(weights, other.view(9, 9)) <= captured_mass(weights, best) + 1e-12).all()
    with pytest.raises(ValueError, match="pairs_per_head must be from 0 to 81, got 82"):
        best_mask(weights, 82)


def test_mass_and_error_refuse_a_mask_that_does_not_fit():
    _, weights, values = random_heads()
    with pytest.raises(ValueError, match="must be bool"):
        captured_mass(weights, torch.ones(9, 9))
    with pytest.raises(ValueError, match="must broadcast"):
        output_error(weights, values, torch.ones(8, 9, dtype=torch.bool))


# ----------------------------------------------------------------------------- heads of a model


@pytest.mark.parametrize("norm_first", [False, True])
def test_read_heads_are_what_the_model_mixes(norm_first):
    config = TransformerConfig(**{**vars(CONFIG), "norm_first": norm_first})
    taken = []

    def listening(q, k, v, key_padding_mask):
        taken.append((v[0], dense_attention(q, k, v, key_padding_mask)[0]))
        return dense_attention(q, k, v, key_padding_mask)

    token_ids = torch.arange(7)[None]
    Encoder(config, attention=listening).eval()(token_ids)
    heads = read_heads(Encoder(config).eval(), token_ids)
    assert heads.weights.shape == (2, 3, 7, 7) and heads.values.shape == (2, 3, 7, 4)
    for layer, (values, mixed) in enumerate(taken):
        torch.testing.assert_close(heads.values[layer], values)
        torch.testing.assert_close(heads.weights[layer] @ heads.values[layer], mixed)


def test_read_heads_of_minilm_sum_to_one_and_refuse_a_batch():
    encoder = load_minilm()
    heads = read_heads(encoder, torch.tensor([[101, 2204, 3185, 102]]))
    assert heads.weights.shape == (6, 12, 4, 4)
    torch.testing.assert_close(heads.weights.sum(-1), torch.ones(6, 12, 4))
    with pytest.raises(ValueError, match="must be one text"):
        read_heads(encoder, torch.zeros(2, 4, dtype=torch.long))


def test_decoder_has_no_scores_to_hand_out():
    with pytest.raises(TypeError):
        read_heads(Decoder(CONFIG), torch.arange(5)[None])
