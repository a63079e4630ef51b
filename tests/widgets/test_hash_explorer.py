"""The explorer of hashing: its numbers are those of `attention.lsh`, its pixels are the pairs and the sorted list."""

import base64
import math

import numpy as np
import pytest
import torch

from effnlp_lessons.attention.lsh import draw_rotations, lsh_attention, lsh_buckets, lsh_pairs
from effnlp_lessons.widgets.hash_explorer import CIRCLE, KEYS, MOST_ROUNDS, TEXT, HashExplorer, circle_vectors
from effnlp_lessons.widgets.hash_picture import (
    APART,
    CELL,
    COLOURS,
    GAP,
    LIST,
    RESCUED,
    ROW,
    SQUARE,
    TOGETHER,
    list_pixels,
)
from effnlp_lessons.widgets.linear_state_explorer import Projections, read_projections
from effnlp_lessons.widgets.pattern_picture import cell_pixels

D_HEAD = 8


class Reader:
    """Stands for the model: a word is a token, all is drawn; counts how often it reads."""

    def __init__(self):
        self.texts = []

    def __call__(self, text):
        self.texts.append(text)
        length, generator = len(text.split()), torch.Generator().manual_seed(len(text))
        parts = (3 * torch.randn(2, 3, length, D_HEAD, generator=generator) for _ in range(3))
        return Projections(text.split(), *parts)


def small(length=21, read=None, **options):
    return HashExplorer(" ".join(f"w{place}" for place in range(length)), read=read or Reader(), **options)


def choose(explorer, **values):
    for name, value in values.items():
        explorer.controls[name].value = value


def qk_of(explorer, state):
    return circle_vectors(state["length"]) if state["circle"] else explorer._keys[state["layer"], state["head"]]


SETTINGS = [
    {"vectors": CIRCLE},
    {"vectors": CIRCLE, "buckets": 4, "rounds": 3, "seed": 7, "chunk": 4},
    {"vectors": KEYS, "layer": 1, "head": 2, "buckets": 6, "rounds": 2, "seed": 99, "chunk": 5},
    {"vectors": KEYS, "buckets": 32, "rounds": 8, "chunk": 2},
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_buckets_pairs_and_mass_are_those_of_the_library(setting):
    explorer = small(**setting)
    state = explorer.state
    qk, length, chunk = qk_of(explorer, state)[None, None], state["length"], state["chunk"]
    generator = torch.Generator().manual_seed(state["seed"])
    rotations = draw_rotations(MOST_ROUNDS, qk.shape[-1], state["buckets"], generator)[: state["rounds"]]
    buckets = lsh_buckets(qk, rotations)
    assert np.array_equal(state["bucket of"], buckets[0, 0])
    assert np.array_equal(state["met"], lsh_pairs(buckets, chunk)[0, 0])
    assert state["pairs"] == int((state["met"] > 0).sum()) == round(length * state["pairs per query"])
    # with the identity as values, attention gives its weights: those of the fast path lie on the pairs that are met
    once = torch.zeros(1, 1, 1, length, dtype=torch.long)
    columns = torch.eye(length).split(qk.shape[-1], dim=1)

    def weights(buckets, chunk, **options):
        values = (torch.nn.functional.pad(part, (0, qk.shape[-1] - part.shape[1])) for part in columns)
        parts = [lsh_attention(qk, v[None, None], buckets=buckets, chunk=chunk, **options)[0, 0] for v in values]
        return torch.cat(parts, dim=1)[:, :length].double()

    dense = weights(once, length)
    assert np.allclose(state["weights"], dense, atol=1e-5)
    met = torch.tensor(state["met"]) > 0
    hashed, renormalised = weights(buckets, chunk, count_duplicates=False), dense * met
    assert (hashed[~met] == 0).all()
    assert torch.allclose(hashed, renormalised / renormalised.sum(1, keepdim=True), atol=1e-4)
    assert state["mass"] == pytest.approx(renormalised.sum(1).mean().item(), abs=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_who_falls_apart_and_who_is_rescued(setting):
    state = small(**setting).state
    together, kinds, found = [0] * state["rounds"], [], 0
    for query in range(state["length"]):
        weights = state["weights"][query].copy()
        weights[query] = -1
        key = int(weights.argmax())
        same = [row[query] == row[key] for row in state["bucket of"]]
        for rounds in range(state["rounds"]):
            together[rounds] += any(same[: rounds + 1])
        kinds.append(TOGETHER if same[0] else RESCUED if any(same) else APART)
        found += state["met"][query, key] > 0
    assert state["together"] == together and state["found"] == found
    assert state["status"].tolist() == kinds
    assert (state["rescued"], state["apart"]) == (kinds.count(RESCUED), kinds.count(APART))
    assert state["together"][0] + state["rescued"] + state["apart"] == state["length"]


def test_it_opens_with_one_round_on_the_circle():
    read = Reader()
    explorer = small(43, read)
    state = explorer.state
    assert (state["vectors"], state["rounds"], state["buckets"], state["chunk"]) == (CIRCLE, 1, 8, 11)
    assert state["rescued"] == 0 and explorer.controls["layer"].disabled and explorer.controls["head"].disabled
    choose(explorer, vectors=KEYS, layer=1, head=1, rounds=3)
    assert not explorer.controls["layer"].disabled
    assert len(read.texts) == 1  # the model does not run in a handler


def test_a_second_round_rescues_and_keeps_the_first():
    explorer = small(43, buckets=8)
    first = explorer.state
    choose(explorer, rounds=2)
    second = explorer.state
    assert np.array_equal(first["bucket of"][0], second["bucket of"][0])
    assert not np.array_equal(second["bucket of"][0], second["bucket of"][1])
    assert first["apart"] == second["rescued"] + second["apart"] and second["rescued"] > 0
    choose(explorer, seed=1)
    assert not np.array_equal(explorer.state["bucket of"], second["bucket of"])
    assert np.array_equal(explorer.state["weights"], second["weights"])


def test_one_chunk_meets_all():
    explorer = small(21, vectors=KEYS, rounds=4, chunk=21)
    state = explorer.state
    assert not state["hashed"] and state["pairs"] == 21 * 20 and state["mass"] == pytest.approx(1)
    assert state["apart"] == state["rescued"] == 0 and state["found"] == 21
    assert all(explorer.controls[name].disabled for name in ("buckets", "rounds", "seed"))
    assert "nothing is hashed" in explorer.line.value
    choose(explorer, chunk=20)
    assert explorer.state["hashed"] and not explorer.controls["rounds"].disabled


def test_circle_vectors_have_one_length():
    vectors = circle_vectors(30)
    assert torch.allclose(vectors.norm(dim=1), torch.full((30,), 16.0))
    assert torch.equal(vectors, circle_vectors(30))
    assert torch.atan2(*vectors.T).unique().numel() == 30
    assert math.dist(vectors[0].tolist(), vectors[1].tolist()) > 0


# --------------------------------------------------------------------------------------------- the picture


def test_the_list_shows_buckets_and_borders():
    buckets, order = np.array([[1, 0, 1, 0, 2], [0, 0, 0, 3, 0]]), np.array([[1, 3, 0, 2, 4], [0, 1, 2, 4, 3]])
    pixels = list_pixels(buckets, order, 3, 3)
    rgb = pixels.view(np.uint8).reshape(*pixels.shape, 4)[..., :3]
    assert pixels.shape == (3 * (ROW + GAP), 5 * CELL + 2)
    for row, colours in enumerate(([0, 0, 1, 1, 2], [0, 0, 0, 0, 3])):
        for place, bucket in enumerate(colours):
            seen = rgb[row * (ROW + GAP) + ROW // 2, CELL * place + CELL // 2]
            assert np.array_equal(seen, np.round(255 * COLOURS[bucket]))
    black = (rgb == 0).all(-1)
    # chunks of 3 in a list of 10: borders at places 0, 3 of the first row, 1 and 4 of the second, and at the end
    assert (np.flatnonzero(black[0]) // CELL).tolist() == [0, 0, 3, 3]
    assert (np.flatnonzero(black[ROW + GAP]) // CELL).tolist() == [1, 1, 4, 4, 5, 5]
    assert (rgb[2 * (ROW + GAP) :] == 255).all()
    assert len(np.unique(COLOURS.round(2), axis=0)) == 32


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_picture_shows_the_pairs_and_the_list(setting, shown):
    explorer = small(**setting)
    picture, state = shown(explorer).astype(int), explorer.state
    cell = cell_pixels(state["length"])
    for query in range(state["length"]):
        for key in range(state["length"]):
            top, left = SQUARE[1] + query * cell, SQUARE[0] + key * cell
            middle = picture[top + 1 : top + cell - 2, left + 1 : left + cell - 2]
            blue = middle[..., 2] - middle[..., 0] > 10
            assert blue.all() if state["met"][query, key] else not blue.any()
    pixels = list_pixels(state["bucket of"], state["order"], state["chunk"], MOST_ROUNDS)
    rgb = pixels.view(np.uint8).reshape(*pixels.shape, 4)[..., :3]
    left, top = LIST
    assert np.array_equal(picture[top : top + rgb.shape[0], left : left + rgb.shape[1]], rgb)


def test_the_marks_are_the_vectors_that_fell_apart():
    explorer = small(43, rounds=2, buckets=32)
    for vectors in (CIRCLE, KEYS):
        choose(explorer, vectors=vectors)
        state, picture = explorer.state, explorer._picture
        for status, marks in picture._marks.items():
            assert len(marks.get_xdata()) == (state["status"] == status).sum()
        assert len(picture._dots.get_offsets()) == 43 * (2 if vectors == CIRCLE else 1)
        assert state["rescued"] > 0 and (vectors == CIRCLE or state["apart"] > 0)
        colours = picture._dots.get_facecolors()[:43, :3]
        assert np.allclose(colours, COLOURS[state["bucket of"][0]])


def test_what_is_blitted_is_what_would_be_drawn(shown, drawn_anew):
    explorer = small(43)
    for setting in (SETTINGS[1], SETTINGS[2]):
        choose(explorer, **setting)
        assert np.array_equal(shown(explorer), drawn_anew(explorer))


@pytest.mark.parametrize("length", [10, 48])
def test_no_words_leave_the_picture_or_meet(length):
    explorer = small(length)
    for setting in SETTINGS[1:3]:
        choose(explorer, **setting)
        renderer = explorer.figure.canvas.get_renderer()
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in explorer.figure.texts if t.get_text()]
        for place, (text, box) in enumerate(boxes):
            assert box.x0 >= 0 and box.x1 <= 900 and box.y0 >= 0 and box.y1 <= 530, text
            for other, second in boxes[place + 1 :]:
                assert not box.overlaps(second), (text, other)


def test_words():
    explorer = small(43, rounds=2, buckets=16, chunk=6)
    state = explorer.state
    assert "43 vectors, circle; 16 buckets, 2 rounds, chunks of 6." in explorer.line.value
    assert "24 scores are computed (dense 43)" in explorer.line.value
    assert f"later rounds rescue {state['rescued']}, and {state['apart']} stay apart" in explorer.line.value
    assert "a ring for each round" in explorer.alt and explorer.summary(state) in explorer.alt
    choose(explorer, rounds=1)
    assert f"and {explorer.state['apart']} into another" in explorer.line.value and "1 round," in explorer.line.value
    choose(explorer, vectors=KEYS, layer=1, head=2)
    assert "keys of layer 1, head 2" in explorer.line.value
    data, metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer.image.value
    assert metadata["image/png"]["alt"] == explorer.alt


def test_events_are_fast(assert_fast):
    explorer = small(48, rounds=8, buckets=32, chunk=5)
    assert_fast("rotations, circle", lambda turn: choose(explorer, seed=turn + 1))
    assert_fast("chunk", lambda turn: choose(explorer, chunk=10 + turn))
    choose(explorer, vectors=KEYS)
    assert_fast("rotations, keys", lambda turn: choose(explorer, seed=turn + 20))
    assert_fast("rounds", lambda turn: choose(explorer, rounds=1 + turn % 8))
    assert_fast("head", lambda turn: choose(explorer, head=turn % 3))


def test_real_keys():
    """The keys are those that MiniLM's own layer makes of the text."""
    explorer = HashExplorer(vectors=KEYS, layer=3, head=5)
    keys = read_projections(TEXT).k[3, 5]
    assert torch.equal(explorer._keys[3, 5], keys)
    assert explorer.state["tokens"][:3] == ["[CLS]", "the", "first"]
    assert 0 < explorer.state["mass"] < 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vectors": "square"}, "vectors must be in"),
        ({"layer": 2}, "layer must be in"),
        ({"head": -1}, "head must be in"),
        ({"buckets": 7}, "buckets must be in"),
        ({"buckets": 34}, "buckets must be in"),
        ({"rounds": 0}, "rounds must be in"),
        ({"rounds": 9}, "rounds must be in"),
        ({"seed": 100}, "seed must be in"),
        ({"chunk": 1}, "chunk must be in"),
        ({"chunk": 22}, "chunk must be in"),
        ({"length": 9}, "text must have 10 to 48 tokens"),
        ({"length": 49}, "text must have 10 to 48 tokens"),
    ],
)
def test_bad_choices_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


def test_bad_keys_are_refused():
    def broken(text):
        read = Reader()(text)
        return read._replace(k=read.k * math.nan)

    with pytest.raises(ValueError, match="keys must be finite"):
        small(read=broken)
