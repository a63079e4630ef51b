"""The explorer of linear attention's state: its numbers are those of `attention.linear`, token by token."""

import base64

import numpy as np
import pytest
import torch

from effnlp_lessons.attention.linear import causal_linear_attention, feature_map, linear_step
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.widgets.linear_state_explorer import (
    OFF,
    ON,
    TEXT,
    LinearStateExplorer,
    Projections,
    read_projections,
)
from effnlp_lessons.widgets.reading import read_text


def made_up(length=11, d_head=6, layers=2, heads=3, seed=0):
    """Projections of a text that nobody wrote."""
    generator = torch.Generator().manual_seed(seed)
    parts = (torch.randn(layers, heads, length, d_head, generator=generator) for _ in range(3))
    return Projections([f"word{place}" for place in range(length)], *parts)


READ = made_up()


def make(read=READ, **values):
    return LinearStateExplorer("any", read=lambda text: read, **values)


def set_to(explorer, **values):
    """Set controls, in one event, and return the state."""
    with explorer.still():
        for name, value in values.items():
            explorer.controls[name].value = value
    explorer.refresh()
    return explorer.state


@pytest.fixture(scope="module")
def anywhere():
    return make()


# ------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (1, 2)])
def test_state_and_output_are_those_of_linear_step(anywhere, layer, head):
    q, k, v = (part[layer, head].double()[None, None] for part in READ[1:])
    softmax = dense_attention(q, k, v, causal=True)
    state = None
    for position in range(11):
        here = slice(position, position + 1)
        out, state = linear_step(q[:, :, here], k[:, :, here], v[:, :, here], state)
        shown = set_to(anywhere, position=position, layer=layer, head=head, normaliser=ON)
        assert np.allclose(shown["state"], state.sums[0, 0], atol=1e-10, rtol=0)
        assert np.allclose(shown["sums"], state.normaliser[0, 0], atol=1e-10, rtol=0)
        assert np.allclose(shown["outputs"]["linear"], out[0, 0, 0], atol=1e-10, rtol=0)
        assert np.allclose(shown["outputs"]["softmax"], softmax[0, 0, position], atol=1e-10, rtol=0)
        assert np.allclose(shown["update"], feature_map(k)[0, 0, position][:, None] * v[0, 0, position])
        without = set_to(anywhere, normaliser=OFF)
        undivided = feature_map(q)[0, 0, position] @ state.sums[0, 0]
        assert np.allclose(without["outputs"]["linear"], undivided, atol=1e-10, rtol=0)
        assert without["denominator"] == pytest.approx(float(feature_map(q)[0, 0, position] @ state.normaliser[0, 0]))


def test_weights_are_those_that_give_the_outputs(anywhere):
    q, k, v = (part[1, 1].double()[None, None] for part in READ[1:])
    whole = causal_linear_attention(q, k, v)
    for position in (0, 4, 10):
        shown = set_to(anywhere, position=position, layer=1, head=1, normaliser=ON)
        for name, weights in shown["weights"].items():
            assert len(weights) == position + 1 and weights.sum() == pytest.approx(1)
            assert np.allclose(weights @ v[0, 0, : position + 1].numpy(), shown["outputs"][name], atol=1e-10)
        assert np.allclose(shown["outputs"]["linear"], whole[0, 0, position], atol=1e-10)
        products = (feature_map(q)[0, 0, position] @ feature_map(k)[0, 0, : position + 1].T).numpy()
        assert np.allclose(set_to(anywhere, normaliser=OFF)["weights"]["linear"], products)


def test_cosine_error_and_entropy(anywhere):
    shown = set_to(anywhere, position=9, layer=0, head=1, normaliser=ON)
    a, b = (torch.tensor(shown["outputs"][name]) for name in ("linear", "softmax"))
    assert shown["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))
    assert shown["error"] == pytest.approx(float((a - b).norm() / b.norm()))
    for name, weights in shown["weights"].items():
        assert shown["entropy"][name] == pytest.approx(
            float(torch.distributions.Categorical(torch.tensor(weights)).entropy())
        )
        assert shown["entropy"][name] < shown["even"] == pytest.approx(np.log(10))
    undivided = set_to(anywhere, normaliser=OFF)
    assert undivided["cosine"] == pytest.approx(shown["cosine"])  # a number by which all is divided turns nothing
    assert undivided["entropy"] == pytest.approx(shown["entropy"]) and undivided["error"] > 2 * shown["error"]


def test_the_state_has_one_size_and_the_cache_grows(anywhere):
    for position in range(11):
        shown = set_to(anywhere, position=position)
        assert shown["state_bytes"] == 4 * (shown["state"].size + shown["sums"].size) == 4 * (36 + 6)
        assert shown["cache_bytes"] == 4 * 2 * 6 * (position + 1)
        (x, state), (_, cache) = (artist.get_data() for artist in anywhere._picture._chart_moves)
        assert x == [position + 1] and state == [0.168] and cache == pytest.approx([0.048 * (position + 1)])


def test_minilms_projections_are_those_of_the_model():
    read, reading, encoder = read_projections(TEXT), read_text(TEXT), load_minilm()
    assert read.tokens == reading.tokens and read.k.shape == (6, 12, len(read.tokens), 32)
    torch.testing.assert_close(read.v, reading.values)
    weights = (read.q @ read.k.transpose(-2, -1) / 32**0.5).softmax(-1)
    torch.testing.assert_close(weights, reading.weights, atol=1e-5, rtol=0)
    with torch.inference_mode():  # of one layer, from the embeddings
        x = encoder.embeddings(torch.tensor([[101, 1996, 102]]))
        assert read_projections("the").tokens == ["[CLS]", "the", "[SEP]"]
        mixer = encoder.blocks[0].token_mixer
        torch.testing.assert_close(read_projections("the").k[0], mixer.split_heads(mixer.key(x))[0])


def test_it_opens_at_the_first_token_where_both_readouts_are_its_value():
    explorer = LinearStateExplorer()
    assert explorer.values == {"position": 0, "layer": 0, "head": 0, "normaliser": ON}
    shown = explorer.state
    for name in ("softmax", "linear"):
        assert np.allclose(shown["outputs"][name], shown["value"]) and shown["weights"][name] == pytest.approx([1])
    assert shown["state_bytes"] == 4_224 and shown["cache_bytes"] == 256


def test_no_model_runs_when_a_control_changes():
    calls = []
    explorer = LinearStateExplorer("any", read=lambda text: calls.append(text) or READ)
    set_to(explorer, position=5, layer=1, head=2, normaliser=OFF)
    assert calls == ["any"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layer": 2}, "layer must be in 0 .. 1, got 2"),
        ({"head": -1}, "head must be in 0 .. 2, got -1"),
        ({"position": 11}, "position must be in 0 .. 10, got 11"),
        ({"read": made_up(length=1)}, "2 to 48 tokens .* got 1"),
        ({"read": made_up(length=49)}, "2 to 48 tokens .* got 49"),
        ({"read": made_up(d_head=65)}, "q must be .*65"),
        ({"read": READ._replace(k=READ.k[:, :2])}, "q must be .*6"),
        ({"read": READ._replace(v=READ.v / 0)}, "v must be finite"),
    ],
)
def test_bad_input_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        make(**values)


# ------------------------------------------------------------------------ picture and words


@pytest.mark.parametrize("values", [{}, {"position": 10, "layer": 1}, {"position": 6, "head": 2, "normalised": False}])
def test_the_picture_is_drawn_whole(values, shown, drawn_anew):
    explorer = make(**values)
    picture = shown(explorer)
    assert picture.shape == (610, 900, 3) and np.array_equal(picture, drawn_anew(explorer))
    before = explorer.values
    set_to(explorer, position=3, layer=0, head=1, normaliser=OFF)
    set_to(explorer, **before)
    assert np.array_equal(shown(explorer), picture)


def test_the_picture_shows_the_state(anywhere, shown):
    """Warm where S is above 0, cold below it, the more the farther from 0."""
    state, picture = set_to(anywhere, position=7, layer=0, head=0, normaliser=ON)["state"], shown(anywhere).astype(int)
    cell = 256 // 6
    middle = [1 + cell * place + cell // 2 for place in range(6)]
    seen = np.array([[picture[66 + y, 62 + x] for x in middle] for y in middle])
    assert np.array_equal(seen[..., 0] > seen[..., 2], state > 0)
    dark, size = -seen.sum(-1), np.abs(state)
    for sign in (state > 0, state < 0):
        assert np.array_equal(np.argsort(dark[sign], kind="stable"), np.argsort(size[sign], kind="stable"))


def test_the_bars_are_as_high_as_the_weights(anywhere):
    state = set_to(anywhere, position=8, layer=1, head=0, normaliser=OFF)
    for name, (bars, even, largest) in anywhere._picture._rows.items():
        weights = state["weights"][name]
        heights = [path.vertices[:4, 1].max() for path in bars.get_paths()]
        assert heights == pytest.approx(list(weights / weights.max())) and f"{weights.max():.3g}" in largest.get_text()
        assert even.get_segments()[0][0][1] == pytest.approx(weights.mean() / weights.max())


@pytest.mark.parametrize("read", [READ, made_up(48, 32), made_up(2, 4)])
def test_no_words_leave_the_picture_or_meet(read):
    explorer = make(read)
    for position in (0, len(read.tokens) - 1):
        for how in (ON, OFF):
            set_to(explorer, position=position, normaliser=how)
            renderer = explorer.figure.canvas.get_renderer()
            words = [t for t in explorer.figure.texts if t.get_text() and t is not explorer._picture._now]
            boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in words]
            for place, (text, box) in enumerate(boxes):
                assert box.x0 >= 0 and box.x1 <= 900 and box.y0 >= 0 and box.y1 <= 610, text
                for other, second in boxes[place + 1 :]:
                    assert not box.overlaps(second), (text, other)


def test_words():
    explorer = make(position=4, layer=1, head=2)
    line, state = explorer.line.value, explorer.state
    assert "Layer 1, head 2: token 5 of 11, “word4”, is read. State: S of 6 x 6 and z of 6 numbers, 168 bytes" in line
    assert "keys and values of 5 tokens: 240 bytes" in line
    top = int(state["weights"]["softmax"].argmax())
    assert f"Largest weight: softmax {state['weights']['softmax'].max():.3g} on “word{top}”" in line
    assert f"divided by φ(q)ᵀz = {state['denominator']:.3g}: cosine to softmax's output {state['cosine']:.2f}" in line
    assert "a level line for the state and a rising one for keys and values" in explorer.alt
    explorer.controls["normaliser"].value = OFF
    assert "Readout, not divided by φ(q)ᵀz" in explorer.line.value
    data, metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer.image.value
    assert metadata["image/png"]["alt"] == explorer.alt == explorer.image.tooltip


def test_events_are_fast(assert_fast):
    """On the longest text, with MiniLM's sizes."""
    explorer = make(made_up(48, 32, 6, 12))
    assert_fast("token", lambda turn: set_to(explorer, position=40 + turn))
    assert_fast("head", lambda turn: set_to(explorer, layer=turn % 6, head=turn))
    assert_fast("normaliser", lambda turn: set_to(explorer, normaliser=(ON, OFF)[turn % 2]))
