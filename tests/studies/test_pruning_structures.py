"""The study of structures: each leaves what it says, a small run measures what it says, what is gone stays away."""

import pytest
import torch

from effnlp_lessons.classification import ReviewExamples, accuracy
from effnlp_lessons.datasets import reviews
from effnlp_lessons.layers import block_linears
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.pruning.importance import Importance
from effnlp_lessons.pruning.masks import apply_masks_, block_sums, share_left
from effnlp_lessons.studies import pruning_structures
from effnlp_lessons.studies.pruning_structures import (
    ANY,
    BLOCKS,
    HEADS,
    LAST,
    LAYERS,
    NOTHING,
    OF_FOUR,
    RANDOM_HEADS,
    STRUCTURES,
    masks_of,
    right_of,
    smaller,
)
from effnlp_lessons.studies.runner import load_results

WHOLE = 10_616_832  # 36 matrices of MiniLM-L6: 6 (4 384^2 + 2 384 1536)
TINY = {"asked": 16, "sentences": 0, "learning_rate": 1e-4, "tested": 24}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher()


@pytest.fixture(scope="module")
def found():
    """Importances as of the teacher; in layers 1, 4, 0, 5, 2, 3 from low to high."""
    generator = torch.Generator().manual_seed(0)
    heads, neurons = (tuple(torch.rand(6, count, generator=generator)) for count in (12, 1536))
    return Importance(heads, neurons, torch.tensor([0.3, 0.1, 0.5, 0.6, 0.2, 0.4]))


def left_in(model):
    """Weights that are not 0 in the matrices of the blocks."""
    return sum(int((model.get_submodule(name).weight != 0).sum()) for name in block_linears(model))


@pytest.mark.parametrize("left", [0.5, 0.25])
@pytest.mark.parametrize("structure", [ANY, OF_FOUR, BLOCKS])
def test_masks_leave_the_share_in_every_matrix(teacher, structure, left):
    masks = masks_of(teacher, structure, left)
    assert tuple(masks) == tuple(f"{name}.weight" for name in block_linears(teacher))
    assert all(share_left({name: mask}) == left for name, mask in masks.items())
    mask = masks["encoder.blocks.2.channel_mixer.expand.weight"]
    of_four = mask.unflatten(1, (-1, 4)).sum(-1)
    assert (of_four.unique().tolist() == [4 * left]) == (structure == OF_FOUR)
    of_block = block_sums(mask.float(), (32, 32))
    assert (of_block.unique().tolist() == [0, 1024]) == (structure == BLOCKS)


@pytest.mark.parametrize("structure", [ANY, BLOCKS])
def test_what_goes_is_the_smallest(teacher, structure):
    name = "encoder.blocks.4.token_mixer.key.weight"
    mask, size = masks_of(teacher, structure, 0.5)[name], teacher.get_parameter(name).detach().abs()
    if structure == BLOCKS:
        mask, size = block_sums(mask.float(), (32, 32)) > 0, block_sums(size, (32, 32))
    assert size[mask].min() >= size[~mask].max()


@pytest.mark.parametrize("structure", [HEADS, RANDOM_HEADS, LAYERS, LAST])
def test_a_smaller_model_has_as_many_weights(teacher, found, structure):
    small = smaller(teacher, structure, 0.5, found)
    assert left_in(small) == left_in(teacher) // 2 == WHOLE // 2
    assert left_in(teacher) == WHOLE  # the given one stays whole


def test_the_important_ones_stay(teacher, found):
    small, blocks = smaller(teacher, HEADS, 0.25, found), teacher.encoder.blocks
    for layer, block in enumerate(small.encoder.blocks):
        heads, neurons = (v[layer].topk(n).indices.sort().values for v, n in ((found.heads, 3), (found.neurons, 384)))
        query, expand = blocks[layer].token_mixer.query.weight, blocks[layer].channel_mixer.expand.weight
        assert torch.equal(block.token_mixer.query.weight, query.view(12, 32, 384)[heads].flatten(0, 1))
        assert torch.equal(block.channel_mixer.expand.weight, expand[neurons])
    for structure, kept in ((LAYERS, [2, 3, 5]), (LAST, [0, 1, 2])):
        small = smaller(teacher, structure, 0.5, found)
        for block, layer in zip(small.encoder.blocks, kept, strict=True):
            assert torch.equal(block.token_mixer.query.weight, blocks[layer].token_mixer.query.weight)


def test_at_random_is_another_choice_for_each_seed(found):
    first, again, other = (pruning_structures.at_random(found, seed) for seed in (0, 0, 1))
    assert torch.equal(first.neurons[3], again.neurons[3]) and not torch.equal(first.neurons[3], other.neurons[3])
    assert [len(values) for values in first.heads] == [12] * 6


def test_bad_input(teacher, found):
    with pytest.raises(ValueError, match="structure must be one of"):
        masks_of(teacher, HEADS, 0.5)
    with pytest.raises(ValueError, match="structure must be one of"):
        smaller(teacher, ANY, 0.5, found)
    with pytest.raises(ValueError, match=r"left must be a number of quarters, got 0.4"):
        masks_of(teacher, OF_FOUR, 0.4)
    with pytest.raises(ValueError, match=r"left must be a whole number of 6 parts, got 0.25"):
        smaller(teacher, LAYERS, 0.25, found)
    with pytest.raises(ValueError, match='when must be "before" or "after"'):
        right_of({"runs": []}, "then")


def test_a_small_run_measures_what_it_says():
    test = ReviewExamples(reviews.load_reviews().subset("test"), TINY["tested"])
    for structure, left in ((NOTHING, 1.0), (BLOCKS, 0.25)):
        model = load_teacher()
        numbers = pruning_structures.run(TINY | {"structure": structure, "left": left}, seed=0).numbers
        apply_masks_(model, masks_of(model, structure, left))
        with torch.autocast("cpu", torch.bfloat16):
            assert numbers["right"] == {"before": pytest.approx(accuracy(model, test), abs=0.01)}
        assert numbers["left"] == left * WHOLE


@pytest.mark.parametrize(("structure", "left"), [(OF_FOUR, 0.5), (HEADS, 0.25)])
def test_what_is_gone_stays_away_in_training(structure, left, monkeypatch):
    trained = []

    def watched(model, *args, **kwargs):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        result = train(model, *args, **kwargs)
        trained.append((model, before, left_in(model)))  # before the masks are put on for the last time
        return result

    train = pruning_structures.train
    monkeypatch.setattr(pruning_structures, "train", watched)
    setting = TINY | {"structure": structure, "left": left, "sentences": 64}
    numbers = pruning_structures.run(setting, seed=1).numbers
    ((model, before, there),) = trained
    assert set(numbers["right"]) == {"before", "after"}
    assert numbers["left"] == left * WHOLE
    assert there == left_in(model) == left * WHOLE
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert not any("embeddings" in name for name in moved)
    assert {f"{name}.weight" for name in block_linears(model)} <= moved


def test_a_summary_by_structure():
    runs = [
        {"setting": {"structure": s, "left": 0.5}, "seed": seed, "right": {"before": value, "after": value + 1}}
        for s, seed, value in ((ANY, 1, 70), (HEADS, 0, 60), (ANY, 0, 71))
    ]
    del runs[1]["right"]["after"]
    assert right_of({"runs": runs}, "before") == {(ANY, 0.5): [71, 70], (HEADS, 0.5): [60]}
    assert right_of({"runs": runs}, "after") == {(ANY, 0.5): [72, 71]}


def test_what_is_recorded_leaves_equal_numbers_of_weights():
    study = pruning_structures.STUDY
    at_half = {setting["structure"] for setting in study.recorded if setting["left"] == 0.5}
    assert at_half == set(STRUCTURES) and len(study.seeds) >= 3 and study.minutes <= 40
    summary = load_results("pruning_structures")
    assert all(run["left"] == run["setting"]["left"] * WHOLE for run in summary["runs"])
    assert all(len(values) == 3 for when in ("before", "after") for values in right_of(summary, when).values())


def test_within_one_criterion_freer_units_lose_less_and_gradients_beat_chance():
    """By size: any weights, then two of every four, then blocks. Heads and neurons: gradients before chance."""
    summary = load_results("pruning_structures")
    before, after = (right_of(summary, when) for when in ("before", "after"))
    assert max(before[BLOCKS, 0.5]) < max(before[OF_FOUR, 0.5]) < min(before[ANY, 0.5])
    assert max(after[BLOCKS, 0.5]) < min(min(after[OF_FOUR, 0.5]), min(after[ANY, 0.5]))
    for found in (before, after):
        assert max(found[RANDOM_HEADS, 0.5]) < min(found[HEADS, 0.5])
