"""The gallery: each pattern is the mask of its paper's module, and the size found is the largest within a budget."""

import pytest
import torch

from effnlp_lessons.attention.bigbird import bigbird_mask, random_plan
from effnlp_lessons.attention.gallery import PATTERNS, ends, size_for
from effnlp_lessons.attention.local import local_mask
from effnlp_lessons.attention.longformer import longformer_mask, window_mask
from effnlp_lessons.attention.patterns import pairs

every_pattern = pytest.mark.parametrize("name", PATTERNS)


@every_pattern
@pytest.mark.parametrize("length", [9, 24, 48])
def test_every_size_gives_a_square_mask(name, length):
    for size in PATTERNS[name].sizes(length):
        mask = PATTERNS[name].mask(length, size)
        assert mask.shape == (length, length) and mask.dtype == torch.bool
        if name != "next block":
            assert mask.diagonal().all(), size


@every_pattern
@pytest.mark.parametrize("budget", [140, 300, 576])
def test_size_for_is_the_largest_within_the_budget(name, budget):
    counts = {size: pairs(PATTERNS[name].mask(24, size)) for size in PATTERNS[name].sizes(24)}
    size = size_for(name, 24, budget)
    if size is None:
        assert min(counts.values()) > budget
    else:
        assert counts[size] == max(count for count in counts.values() if count <= budget)


def test_no_size_is_small_enough():
    assert size_for("window + ends", 24, 10) is None and size_for("window", 24, 24) == 0


def test_masks_are_those_of_the_papers_modules():
    masks = {name: pattern.mask(20, 4) for name, pattern in PATTERNS.items()}
    assert torch.equal(masks["window"], window_mask(20, 4))
    assert torch.equal(masks["dilated"], window_mask(20, 4, 2))
    assert torch.equal(masks["window + ends"], longformer_mask(20, 4, ends(20)))
    assert torch.equal(masks["local"], local_mask(20, 4, 2))
    assert torch.equal(masks["BigBird"], bigbird_mask(20, 4, random_plan(1, 5, 1, 0))[0])
    block = torch.arange(20) // 4
    assert torch.equal(masks["own block"], block[:, None] == block)
    assert torch.equal(masks["next block"], (block[:, None] + 1) % 5 == block)
    i, j = torch.arange(20)[:, None], torch.arange(20)
    distance = (i - j).abs()
    assert torch.equal(masks["strided"], (distance <= 4) | (distance % 4 == 0))
    # mirrored: a key at a block's end for all later queries, a query at a block's end for all later keys
    summary = ((j % 4 == 3) & (j <= i)) | ((i % 4 == 3) & (i <= j))
    assert torch.equal(masks["fixed"], (block[:, None] == block) | summary)
    near_global = (i < 8) | (j < 8)
    assert torch.equal(masks["ETC"], near_global | (distance <= 4))


@pytest.mark.parametrize("length", [10, 23])
def test_a_block_has_its_size_where_the_length_is_no_multiple(length):
    block = torch.arange(length) // 6
    assert torch.equal(PATTERNS["own block"].mask(length, 6), block[:, None] == block)
