"""The explorer of mixed keys: its state is the library's numbers, and a control is answered at once."""

import pytest
import torch

from effnlp_lessons.attention.linformer import linformer_attention, pooling_projection
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.widgets.linear_state_explorer import Projections
from effnlp_lessons.widgets.shorter_keys_explorer import (
    DISTANCE,
    NEIGHBOURS,
    RANDOM,
    RANK,
    ShorterKeysExplorer,
    distance_weights,
    random_projection,
)

LENGTH = 13


def made_up(text):
    q, k, v = torch.randn(3, 2, 3, LENGTH, 4, generator=torch.Generator().manual_seed(0))
    return Projections([f"t{i}" for i in range(LENGTH)], q, k, v)


@pytest.fixture
def explorer():
    return ShorterKeysExplorer("any", layer=1, head=2, read=made_up)


def exact_and(approximation):
    """The error of a head's output against dense attention."""
    q, k, v = (part[1:2, 2:3].double() for part in made_up("")[1:])
    exact = dense_attention(q, k, v)
    return float((approximation(q, k, v) - exact).norm() / exact.norm())


@pytest.mark.parametrize("slots", [1, 4, 6, LENGTH])
def test_errors_are_those_of_linformer_and_of_the_best_rank(explorer, slots):
    explorer.controls["slots"].value = slots
    errors = explorer.state["errors"]
    for name, projection in (
        (NEIGHBOURS, pooling_projection(LENGTH, slots).double()),
        (RANDOM, random_projection(slots, LENGTH)[None]),
    ):
        truth = exact_and(lambda q, k, v, e=projection: linformer_attention(q, k, v, project_keys=e, project_values=e))
        assert errors[name] == pytest.approx(truth, rel=1e-6, abs=1e-9)

    def best_rank(q, k, v):
        weights = (q @ k.mT / 2).softmax(-1)
        u, s, vt = torch.linalg.svd(weights)
        s[..., slots:] = 0
        return u @ torch.diag_embed(s) @ vt @ v

    assert errors[RANK] == pytest.approx(exact_and(best_rank), abs=1e-9)


def test_with_as_many_keys_as_tokens_nothing_is_lost(explorer):
    assert explorer.values["slots"] == LENGTH
    state = explorer.state
    assert state["errors"][NEIGHBOURS] == pytest.approx(0, abs=1e-9)
    assert state["errors"][RANK] == pytest.approx(0, abs=1e-9)
    assert state["macs"] == 1


def test_distance_weights_are_one_number_a_diagonal_before_rows_are_scaled():
    weights = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fixed = distance_weights(weights)
    assert torch.allclose(fixed.sum(-1), torch.ones(5).double())
    for i in range(5):
        row = torch.stack([weights.diagonal(j - i).mean() for j in range(5)])
        assert torch.allclose(fixed[i], row / row.sum())


def test_words_follow_the_controls(explorer):
    explorer.controls["slots"].value = 4
    assert "4 of 13 keys, 31 % of the products" in explorer.line.value
    assert "13 keys and with 4 (mean of neighbours)" in explorer.alt
    explorer.controls["way"].value = DISTANCE
    assert explorer.controls["slots"].disabled
    assert "only the distance" in explorer.line.value


def test_the_picture_moves_with_the_controls(explorer):
    before = explorer.pixels
    explorer.controls["slots"].value = 3
    assert (explorer.pixels != before).any()


@pytest.mark.parametrize(("layer", "head", "name"), [(2, 0, "layer"), (0, 3, "head")])
def test_places_that_are_not_there_are_refused(layer, head, name):
    with pytest.raises(ValueError, match=f"{name} must be in"):
        ShorterKeysExplorer("any", layer=layer, head=head, read=made_up)


def test_a_handler_is_fast(assert_fast):
    explorer = ShorterKeysExplorer()
    length = explorer.state["length"]

    def drag(turn):
        explorer.controls["slots"].value = length - 1 - turn % (length - 1)

    assert_fast("keys", drag)
