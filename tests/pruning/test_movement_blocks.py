"""Scores of blocks: the gradient is a sum, whole rows and columns go, and what is removable really can be removed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effnlp_lessons.classification import ReviewExamples
from effnlp_lessons.datasets import reviews
from effnlp_lessons.distillation.hinton import label_objective
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.layers import block_linears
from effnlp_lessons.pruning.masks import block_sums, share_left, spread_blocks
from effnlp_lessons.pruning.movement import (
    MovementLinear,
    MovementPlan,
    masked_weight,
    movement_layers,
    movement_masks,
    score_penalty,
    set_level_,
    to_dense,
    top_share,
    train_movement,
)
from effnlp_lessons.pruning.movement_blocks import BlockMovementLinear, hybrid_blocks, prepare_blocks, removable
from effnlp_lessons.training import TrainingPlan
from effnlp_lessons.transformer import Encoder, TransformerConfig

SMALL = TransformerConfig(vocab_size=30_522, d_model=12, layers=2, heads=3, d_ff=20, max_length=64)


@pytest.fixture(scope="module")
def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SentenceClassifier(Encoder(SMALL), classes=2, seed=0).eval()
        for part in model.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.3)
                nn.init.normal_(part.bias)  # biases of zero would hide what a bias can do wrong
        return model


@pytest.fixture(scope="module")
def sentences():
    return ReviewExamples(reviews.load_reviews().subset("train"), 48)


@pytest.mark.parametrize("block", [(1, 6), (4, 1), (2, 3), (4, 6), (1, 1)])
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_the_gradient_of_a_score_is_the_sum_over_its_block(block, mode):
    layer = BlockMovementLinear(nn.Linear(6, 4).double(), block, mode)
    with torch.no_grad():
        layer.score.copy_(torch.randn_like(layer.score))
    set_level_(layer, 0.5)
    mask, x, upstream = layer.mask(), torch.randn(7, 6).double(), torch.randn(7, 4).double()
    (layer(x) * upstream).sum().backward()
    each = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.detach().clone().requires_grad_()
    (F.linear(x, masked_weight(weight, each, mask)) * upstream).sum().backward()
    torch.testing.assert_close(layer.score.grad, block_sums(each.grad, block), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=0, atol=1e-12)
    # by hand: the sum over the block of (dL/dW') W
    torch.testing.assert_close(
        layer.score.grad, block_sums(upstream.T @ x * layer.weight.detach(), block), rtol=0, atol=1e-12
    )


def test_blocks_of_one_are_single_weights():
    linear = nn.Linear(5, 7)
    ours, single = BlockMovementLinear(linear, (1, 1), "hard"), MovementLinear(linear, "hard")
    score = torch.randn(7, 5)
    for layer in (ours, single):
        with torch.no_grad():
            layer.score.copy_(score)
        set_level_(layer, 0.6)
    x = torch.randn(3, 5)
    assert torch.equal(ours.mask(), single.mask()) and torch.equal(ours(x), single(x))


@pytest.mark.parametrize("block", [(2, 3), (1, 9), (6, 1)])
def test_the_mask_is_of_whole_blocks_and_the_layer_dense_under_it(block):
    linear = nn.Linear(9, 6)
    layer = BlockMovementLinear(linear, block, "hard")
    with torch.no_grad():
        layer.score.copy_(torch.randn_like(layer.score))
    set_level_(layer, 0.5)
    blocks, mask, x = layer.block_mask(), layer.mask(), torch.randn(4, 9)
    assert torch.equal(blocks, top_share(layer.score, 0.5)) and torch.equal(mask, spread_blocks(blocks, block))
    assert set(block_sums(mask.float(), block).unique().tolist()) <= {0.0, float(block[0] * block[1])}
    rows = mask.any(1)
    expected = x @ (linear.weight * mask).T + linear.bias * rows
    torch.testing.assert_close(layer(x), expected)
    assert (layer(x)[:, ~rows] == 0).all()  # no bias without a row
    torch.testing.assert_close(to_dense(nn.Sequential(layer))(x), layer(x), rtol=0, atol=0)


def test_ties_go_by_the_size_of_the_block():
    layer = BlockMovementLinear(nn.Linear(6, 4), (2, 2), "hard")
    set_level_(layer, 0.5)
    assert torch.equal(layer.block_mask(), top_share(block_sums(layer.weight.detach().abs(), (2, 2)), 0.5))


def test_the_hybrid_has_squares_in_attention_rows_and_columns_in_the_feed_forward_part(classifier, sentences):
    blocks = hybrid_blocks(classifier, (4, 4))
    assert tuple(blocks) == block_linears(classifier)
    model = prepare_blocks(classifier, blocks)
    shapes = {name.split("blocks.1.")[-1]: tuple(layer.score.shape) for name, layer in movement_layers(model).items()}
    assert shapes["channel_mixer.expand"] == (20, 1) and shapes["channel_mixer.contract"] == (1, 20)
    assert all(shapes[f"token_mixer.{name}"] == (3, 3) for name in ("query", "key", "value", "output"))
    batch = sentences.batch([0, 4, 2])
    torch.testing.assert_close(model(*batch[:2]), classifier(*batch[:2]), rtol=0, atol=0)
    assert share_left(movement_masks(model)) == 1 and score_penalty(model).item() == 0.5


def shrunk(model):
    """The exported model with its removable neurons and heads cut out: other shapes, written here independently."""
    dense, gone = to_dense(model), removable(model)
    for name, units in gone.items():
        block = dense.get_submodule(name)
        mixer, ffn = block.token_mixer, block.channel_mixer
        neurons = ~units["neurons"]
        heads = (~units["heads"]).repeat_interleave(mixer.query.out_features // mixer.heads)
        for layer in (mixer.query, mixer.key, mixer.value):
            layer.weight, layer.bias = nn.Parameter(layer.weight[heads]), nn.Parameter(layer.bias[heads])
        mixer.output.weight = nn.Parameter(mixer.output.weight[:, heads])
        mixer.heads = int((~units["heads"]).sum())
        ffn.expand.weight, ffn.expand.bias = (nn.Parameter(p[neurons]) for p in (ffn.expand.weight, ffn.expand.bias))
        ffn.contract.weight = nn.Parameter(ffn.contract.weight[:, neurons])
    return dense


def test_what_is_removable_can_be_removed(classifier, sentences):
    model = prepare_blocks(classifier, hybrid_blocks(classifier, (4, 4)), "hard")
    layers = movement_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.score.copy_(torch.randn_like(layer.score))
        # a head whose value rows are gone, and one whose output columns are
        layers["encoder.blocks.0.token_mixer.value"].score[1] = -9
        layers["encoder.blocks.1.token_mixer.output"].score[:, 2] = -9
    set_level_(model, 0.6)
    gone = removable(model)
    assert gone["encoder.blocks.0"]["heads"].tolist() == [False, True, False]
    assert gone["encoder.blocks.1"]["heads"].tolist() == [False, False, True]
    for name, units in gone.items():
        expand, contract = (layers[f"{name}.channel_mixer.{k}"].score.flatten() for k in ("expand", "contract"))
        kept = top_share(expand, 0.6) & top_share(contract, 0.6)
        assert torch.equal(units["neurons"], ~kept) and 8 <= int(units["neurons"].sum()) < 20
    small, batch = shrunk(model).eval(), sentences.batch([1, 5, 8, 11])
    widths = [b.channel_mixer.expand.out_features - len(b.channel_mixer.expand.weight) for b in small.encoder.blocks]
    assert widths == [int(gone[f"encoder.blocks.{i}"]["neurons"].sum()) for i in range(2)]
    assert [block.token_mixer.heads for block in small.encoder.blocks] == [2, 2]
    torch.testing.assert_close(small(*batch[:2]), model(*batch[:2]), rtol=1e-5, atol=1e-6)


def test_training_closes_the_masks_of_blocks(classifier, sentences):
    model = prepare_blocks(classifier, hybrid_blocks(classifier, (4, 4)), "hard")
    before = copy.deepcopy(model.state_dict())
    train_movement(model, sentences, label_objective, TrainingPlan(4, 16, 1e-3), MovementPlan(0.5))
    for name, layer in movement_layers(model).items():
        assert int(layer.block_mask().sum()) == layer.score.numel() - round(0.5 * layer.score.numel()), name
        assert not torch.equal(layer.score, before[f"{name}.score"])
    batch = sentences.batch([3, 1])
    assert torch.equal(to_dense(model)(*batch[:2]), model(*batch[:2]))


def test_bad_input(classifier):
    with pytest.raises(ValueError, match="mode must be"):
        BlockMovementLinear(nn.Linear(4, 4), (2, 2), "magnitude")
    with pytest.raises(ValueError, match="block must tile"):
        BlockMovementLinear(nn.Linear(4, 6), (4, 4))
    with pytest.raises(ValueError, match="no nn.Linear"):
        prepare_blocks(classifier, {"encoder.norm": (1, 1)})
    with pytest.raises(ValueError, match="in blocks"):
        hybrid_blocks(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="in its blocks"):
        hybrid_blocks(nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(3, 3)})])}))
    with pytest.raises(ValueError, match="prepare_movement"):
        removable(classifier)
    blocks = {name: (1, 1) for name in block_linears(classifier) if not name.endswith("output")}
    with pytest.raises(ValueError, match="BlockMovementLinear for each"):
        removable(prepare_blocks(classifier, blocks))
    with pytest.raises(ValueError, match="feed-forward"):
        removable(prepare_blocks(classifier, {"encoder.blocks.0.token_mixer.query": (4, 4)}))
