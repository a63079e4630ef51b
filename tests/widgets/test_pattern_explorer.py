"""The explorer of patterns: its numbers are the library's, its pixels are the mask, its brush keeps the budget."""

import base64
import re

import numpy as np
import pytest
import torch

from effnlp_lessons.attention.gallery import PATTERNS, size_for
from effnlp_lessons.attention.patterns import captured_mass, output_error, pairs, reach
from effnlp_lessons.datasets.tokenizer import encode
from effnlp_lessons.widgets.pattern_explorer import (
    PAINTED,
    SHAPES,
    TEXT,
    PatternExplorer,
)
from effnlp_lessons.widgets.pattern_picture import LEFT, PANEL, REACH_SIDE, REACH_TOP, SIDE, TOP, label
from effnlp_lessons.widgets.reading import LONGEST, SHORTEST, Reading, read_text

LAYERS, HEADS, D_HEAD = 3, 4, 8


def words(count: int) -> str:
    return " ".join(f"w{place}" for place in range(count))


class Reader:
    """Stands for the model: a word is a token, weights and values are drawn; counts how often it reads."""

    def __init__(self):
        self.texts = []

    def __call__(self, text):
        if len(text.split()) < 2:
            raise ValueError("Too few words.")
        self.texts.append(text)
        length, generator = len(text.split()), torch.Generator().manual_seed(len(text))
        scores = 3 * torch.randn(LAYERS, HEADS, length, length, generator=generator)
        values = torch.randn(LAYERS, HEADS, length, D_HEAD, generator=generator)
        return Reading(text.split(), scores.softmax(-1), values)


def small(length=20, **options):
    return PatternExplorer(**{"text": words(length), "head": 1, "read": Reader(), **options})


def choose(explorer, **values):
    for name, value in values.items():
        explorer.controls[name].value = value


def place_of(query, key, length):
    """The middle of a cell, in pixels of the picture, as a reader would point at it."""
    cell = SIDE // length
    return LEFT + (key + 0.5) * cell, TOP + (query + 0.5) * cell


def stroke(explorer, *cells):
    length = explorer.length
    kinds = ["down"] + ["move"] * (len(cells) - 1)
    explorer.paint([[kind, *place_of(*cell, length)] for kind, cell in zip(kinds, cells, strict=True)])


def cells_of(picture, length, left, top, side):
    """The inner pixels of each cell of a square, (length, length, pixels, 3)."""
    cell = side // length
    square = picture[top : top + cell * length, left : left + cell * length].astype(int)
    square = square.reshape(length, cell, length, cell, 3).transpose(0, 2, 1, 3, 4)
    inner = square[:, :, 1:-1, 1:-1] if cell > 3 else square[:, :, 1:2, 1:2]
    return inner.reshape(length, length, -1, 3)


def mask_in(picture, length):
    """The mask as it can be read from the picture: allowed is blue all over, forbidden is grey all over."""
    inner = cells_of(picture, length, LEFT, TOP, SIDE)
    blue = inner[..., 2] - inner[..., 0]
    allowed = (blue > 20).all(-1)
    assert np.array_equal(allowed, ~(blue == 0).all(-1)), "cells that are neither"
    return allowed


# ------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("layer, head, layers", [(0, 3, 1), (2, 0, 3)])
def test_state_equals_the_library(layer, head, layers):
    explorer = small(layer=layer, head=head, layers=layers)
    reading = Reader()(words(20))
    for pattern, size in [(name, size) for name in PATTERNS for size in list(PATTERNS[name].sizes(20))[::7]]:
        choose(explorer, pattern=pattern, size=size)
        mask, state = PATTERNS[pattern].mask(20, size), explorer.state
        weights, values = reading.weights[layer, head : head + 1], reading.values[layer, head : head + 1]
        assert np.array_equal(state["mask"], mask.numpy())
        assert (state["pairs"], state["all_pairs"]) == (pairs(mask), 400)
        assert state["macs"] == 2 * D_HEAD * pairs(mask) and state["dense_macs"] == 2 * D_HEAD * 400
        assert state["share"] == state["macs"] / state["dense_macs"]
        assert state["mass"] == captured_mass(weights, mask).item()
        assert state["error"] == output_error(weights, values, mask).item()
        stack = reach([mask] * layers)
        assert np.array_equal(state["reached"], stack.numpy())
        assert state["reach_share"] == stack.sum().item() / 400


def test_state_of_a_painted_mask_equals_the_library():
    explorer = small(budget=0.3)
    choose(explorer, pattern=PAINTED, layer=2, head=3, layers=2)
    stroke(explorer, (3, 4), (3, 9), (11, 9))
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[3, 4:10] = mask[3:12, 9] = True
    reading, state = Reader()(words(20)), explorer.state
    assert np.array_equal(state["mask"], mask.numpy()) and state["pairs"] == 14
    assert state["mass"] == captured_mass(reading.weights[2, 3:4], mask).item()
    assert state["error"] == output_error(reading.weights[2, 3:4], reading.values[2, 3:4], mask).item()
    assert np.array_equal(state["reached"], reach([mask, mask]).numpy())


def test_the_text_is_read_as_minilm_reads_it():
    reading = read_text(TEXT)
    (ids,) = encode([TEXT])
    assert len(reading.tokens) == len(ids) and (reading.tokens[0], reading.tokens[-1]) == ("[CLS]", "[SEP]")
    assert reading.weights.shape == (6, 12, len(ids), len(ids)) and reading.values.shape == (6, 12, len(ids), 32)
    assert torch.allclose(reading.weights.sum(-1), torch.ones(6, 12, len(ids)), atol=1e-5)


def test_the_default_opening():
    explorer = PatternExplorer()
    state = explorer.state
    assert explorer.values["text"] == TEXT and state["pattern"] == "window" and state["size"] == 2
    assert state["budget"] == int(0.12 * 43**2) and state["pairs"] == 43 + 2 * 42 + 2 * 41 <= state["budget"]
    # what the student finds out: [CLS] and [SEP] have more of the mass, and alone they keep next to nothing
    choose(explorer, pattern=PAINTED, shape="column")
    stroke(explorer, (5, 0))
    stroke(explorer, (5, 42))
    columns = explorer.state
    assert columns["pairs"] == 2 * 43 < state["pairs"] and columns["mass"] > state["mass"] + 0.1
    assert columns["error"] > 0.9
    # together they stay within the budget and beat both
    choose(explorer, shape="diagonal")
    for key in (4, 5, 6):
        stroke(explorer, (5, key))
    both = explorer.state
    assert both["pairs"] <= both["budget"] and both["mass"] > columns["mass"] + 0.1 and both["error"] < 0.5


@pytest.mark.parametrize("budget", [0.12, 0.4])
def test_a_pattern_opens_at_the_size_that_uses_the_budget_best(budget):
    explorer = small(30, pattern="BigBird", size=12, budget=budget)
    for pattern in PATTERNS:
        choose(explorer, pattern=pattern)
        sizes, slider = PATTERNS[pattern].sizes(30), explorer.controls["size"]
        assert (slider.min, slider.max) == (sizes[0], sizes[-1])
        best = size_for(pattern, 30, int(budget * 900))
        if best is None:
            assert explorer.state["pairs"] == min(pairs(PATTERNS[pattern].mask(30, size)) for size in sizes)
            assert "over the budget" in explorer.line.value
        else:
            assert explorer.state["size"] == best and "within the budget" in explorer.line.value


# ------------------------------------------------------------------------ the picture


@pytest.mark.parametrize("length", [10, 31, 43, 48])
def test_pixels_are_the_mask(shown, length):
    explorer = small(length)
    for pattern, size in [(name, size) for name in PATTERNS for size in list(PATTERNS[name].sizes(length))[::15]]:
        choose(explorer, pattern=pattern, size=size)
        assert np.array_equal(mask_in(shown(explorer), length), PATTERNS[pattern].mask(length, size).numpy())


def test_forbidden_cells_are_striped_and_allowed_ones_plain(shown):
    explorer = small(20)
    inner = cells_of(shown(explorer), 20, LEFT, TOP, SIDE)
    plain = (inner == inner[:, :, :1]).all((-1, -2))
    assert np.array_equal(plain, explorer.state["mask"])


def test_a_larger_weight_is_darker(shown):
    explorer = small(20, pattern="own block", size=10)
    darkness = -np.median(cells_of(shown(explorer), 20, LEFT, TOP, SIDE)[..., 0], axis=-1)  # stripes are few
    state = explorer.state
    for kind in (state["mask"], ~state["mask"]):
        order = np.argsort(state["weights"][kind])
        assert (np.diff(darkness[kind][order]) >= 0).all() and len(set(darkness[kind])) > 10


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_pixels_of_the_reach(shown, layers):
    explorer = small(30, pattern="window", size=2, layers=layers)
    cells = cells_of(shown(explorer), 30, PANEL + 1, REACH_TOP + 1, REACH_SIDE)[:, :, 0]
    white, blue = (cells == 255).all(-1), cells[..., 2] > cells[..., 0] + 20
    distance = abs(np.arange(30)[:, None] - np.arange(30))
    assert np.array_equal(blue, distance <= 2) and np.array_equal(~white, distance <= 2 * layers)


@pytest.mark.parametrize("size", [0, 1, 4])
def test_bars_are_as_long_as_the_numbers(shown, size):
    explorer = small(30, pattern="window", size=size)
    state, picture = explorer.state, shown(explorer)
    (bars,) = explorer.figure.axes
    for place, colour, number in (
        (10, (0, 158, 115), state["share"]),
        (78, (0, 114, 178), state["mass"]),
        (146, (213, 94, 0), min(state["error"], 1.5)),
    ):
        column, height = bars.transData.transform((0, place + 7))
        row = picture[picture.shape[0] - 1 - int(height), int(column) :]
        found = np.flatnonzero((row == colour).all(-1))
        assert abs(found.max() - 200 * number) <= 2
    # the budget's mark, at its share
    column, height = bars.transData.transform((state["budget"] / 900, 21))
    window = picture[picture.shape[0] - 1 - int(height), int(column) - 6 : int(column) + 7].sum(-1)
    assert abs(np.flatnonzero(window < 200).mean() - 6) <= 1


def test_the_cursor_marks_its_row_and_column(shown):
    explorer = small(20)
    plain = shown(explorer)
    explorer.paint([["focus"], ["key", "ArrowDown"], ["key", "ArrowRight"], ["key", "ArrowDown"]])
    assert explorer.state["cursor"] == (2, 1)
    marked, cell = shown(explorer), SIDE // 20
    orange = (marked == (213, 94, 0)).all(-1)
    rows = np.flatnonzero(orange[TOP : TOP + SIDE, LEFT : LEFT + 20 * cell].all(1))
    columns = np.flatnonzero(orange[TOP : TOP + 20 * cell, LEFT : LEFT + SIDE].all(0))
    assert rows.tolist() == [2 * cell - 1, 3 * cell - 1] and columns.tolist() == [cell - 1, 2 * cell - 1]
    names = np.flatnonzero((marked[:, :LEFT] != plain[:, :LEFT]).any((1, 2)))  # the query's name
    assert TOP + 2 * cell <= names.min() and names.max() < TOP + 3 * cell
    assert np.array_equal(mask_in(marked, 20), explorer.state["mask"])


def test_blitted_equals_drawn_anew(shown, drawn_anew):
    explorer, generator = small(24, budget=0.5), np.random.default_rng(0)
    for step in range(12):
        if step % 4 == 3:
            stroke(explorer, *generator.integers(0, 24, (2, 2)).tolist())
        else:
            name = ("pattern", "head", "layers", "size")[generator.integers(4)]
            control = explorer.controls[name]
            options = control.options if name == "pattern" else range(control.min, control.max + 1)
            control.value = options[generator.integers(len(options))]
        assert np.array_equal(shown(explorer), drawn_anew(explorer)), explorer


@pytest.mark.parametrize("token, written", [("[CLS]", "[CLS]"), ("##ing", "##ing"), ("a$b$", "a$b$"),
                                            ("understanding", "understand…"), ("電影", "□□")])  # fmt: skip
def test_every_token_can_be_written(token, written, recwarn):
    assert label(token) == written
    PatternExplorer(text=f"{words(8)} {token}", read=Reader(), head=0)
    assert [str(warning.message) for warning in recwarn] == []


# ------------------------------------------------------------------------ painting


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_paints_what_its_name_says_and_erases_it(shown, shape):
    explorer = small(20, budget=0.5)
    choose(explorer, pattern=PAINTED, shape=shape)
    stroke(explorer, (7, 4))
    rows, columns = np.indices((20, 20))
    expected = {
        "cell": (rows == 7) & (columns == 4),
        "row": rows == 7,
        "column": columns == 4,
        "diagonal": rows - columns == 3,
    }[shape]
    assert np.array_equal(explorer.state["mask"], expected)
    assert np.array_equal(mask_in(shown(explorer), 20), expected)
    choose(explorer, brush="erase")
    stroke(explorer, (7, 4))
    assert explorer.state["pairs"] == 0


def test_a_fast_stroke_leaves_no_gap():
    explorer = small(20, budget=0.5)
    choose(explorer, pattern=PAINTED)
    stroke(explorer, (2, 3), (12, 18))  # one move over many cells
    cells = np.argwhere(explorer.state["mask"])
    assert cells[0].tolist() == [2, 3] and cells[-1].tolist() == [12, 18]
    assert (abs(np.diff(cells, axis=0)).max(1) == 1).all()


def test_a_stroke_that_leaves_the_square_paints_inside_only():
    explorer = small(20, budget=0.5)
    choose(explorer, pattern=PAINTED)
    choose(explorer, shape="row")
    explorer.paint([["down", *place_of(5, 18, 20)], ["move", *place_of(5, 26, 20)], ["move", *place_of(9, 26, 20)]])
    assert explorer.state["mask"].sum(1).tolist() == [20 * (row == 5) for row in range(20)]
    assert explorer.state["cursor"] == (5, 19)
    explorer.paint([["move", *place_of(9, 19, 20)]])  # it comes back two rows below
    assert np.flatnonzero(explorer.state["mask"].any(1)).tolist() == [5, 9]


def test_painting_beyond_the_budget_is_refused_and_nothing_is_lost(shown):
    explorer = small(20, budget=0.1)  # 40 pairs
    choose(explorer, pattern=PAINTED, shape="column")
    stroke(explorer, (3, 0))
    assert explorer.state["message"] == ""
    stroke(explorer, (3, 5))
    before, picture = explorer.state, shown(explorer)
    assert before["pairs"] == before["budget"] == 40
    stroke(explorer, (3, 9))
    after = explorer.state
    assert np.array_equal(after["mask"], before["mask"])
    message = "Not painted: this column needs 20 more, the budget leaves 0. Erase first."
    assert after["message"] == message and message in explorer.line.value and message in explorer.alt
    assert message in explorer.image.spoken
    assert np.array_equal(mask_in(shown(explorer), 20), mask_in(picture, 20))
    stroke(explorer, (7, 5))  # what is already painted needs nothing
    assert explorer.state["message"] == ""
    # a cell that is shared counts once: a row needs 18 more
    choose(explorer, shape="row")
    stroke(explorer, (3, 9))
    assert "this row needs 18 more" in explorer.state["message"]
    choose(explorer, brush="erase", shape="column")
    stroke(explorer, (3, 5))
    choose(explorer, brush="paint")
    stroke(explorer, (3, 9))
    assert explorer.state["pairs"] == 40 and explorer.state["mask"][:, [0, 9]].all()


def test_a_stroke_ends_where_the_budget_does():
    explorer = small(20, budget=0.03)  # 12 pairs
    choose(explorer, pattern=PAINTED)
    stroke(explorer, (4, 0), (4, 19))
    assert explorer.state["mask"][4].tolist() == [True] * 12 + [False] * 8
    assert explorer.state["message"].startswith("Not painted: this cell needs 1 more, the budget leaves 0")


def test_painting_on_a_pattern_goes_on_from_it():
    explorer = small(20, pattern="window", size=1, budget=0.2)  # 58 of 80 pairs
    stroke(explorer, (0, 19))
    band = PATTERNS["window"].mask(20, 1).numpy().copy()
    band[0, 19] = True
    assert explorer.values["pattern"] == PAINTED and explorer.controls["size"].disabled
    assert np.array_equal(explorer.state["mask"], band) and explorer.state["size"] is None
    explorer.undo.click()
    assert explorer.state["pairs"] == 0 and explorer.values["pattern"] == PAINTED and explorer.undo.disabled


def test_a_refused_stroke_leaves_the_pattern():
    explorer = small(20, pattern="window", size=1, budget=0.145)  # 58 of 58 pairs
    stroke(explorer, (0, 19))
    assert explorer.values["pattern"] == "window" and explorer.state["size"] == 1
    assert 'Erase first, or choose "painted".' in explorer.line.value
    choose(explorer, pattern=PAINTED)
    assert explorer.state["pairs"] == 0 and explorer.state["message"] == ""


def test_a_pattern_over_the_budget_can_be_erased_to_a_painted_one():
    explorer = small(20, pattern="window", size=3, budget=0.1)
    choose(explorer, brush="erase", shape="diagonal")
    stroke(explorer, (0, 3), (0, 2))
    assert explorer.values["pattern"] == PAINTED and explorer.state["pairs"] == 20 + 2 * 19 + 18 + 17
    choose(explorer, brush="paint")
    stroke(explorer, (0, 3))
    assert "the budget leaves 0" in explorer.state["message"]


def test_undo_takes_back_one_stroke_and_clear_can_be_undone():
    explorer = small(20, budget=0.5)
    choose(explorer, pattern=PAINTED)
    assert explorer.undo.disabled and explorer.clear.disabled
    stroke(explorer, (1, 1), (1, 6))
    first = explorer.state["mask"]
    stroke(explorer, (9, 1), (9, 6))
    second = explorer.state["mask"]
    explorer.clear.click()
    assert explorer.state["pairs"] == 0 and explorer.clear.disabled
    explorer.undo.click()
    assert np.array_equal(explorer.state["mask"], second)
    explorer.undo.click()
    assert np.array_equal(explorer.state["mask"], first)
    explorer.undo.click()
    assert explorer.state["pairs"] == 0 and explorer.undo.disabled
    choose(explorer, pattern="local")
    assert explorer.undo.disabled and explorer.clear.disabled


def test_the_keyboard_paints_and_erases():
    explorer = small(20, budget=0.5)
    choose(explorer, pattern=PAINTED)
    explorer.paint([["focus"]])
    assert explorer.state["cursor"] == (0, 0) and explorer.state["pairs"] == 0
    keys = ["ArrowRight"] * 3 + [" "] + ["ArrowDown"] * 2 + ["Enter"]
    explorer.paint([["key", key] for key in keys])
    assert np.argwhere(explorer.state["mask"]).tolist() == [[0, 3], [2, 3]]
    explorer.paint([["key", " "]])
    assert np.argwhere(explorer.state["mask"]).tolist() == [[0, 3]]
    weight = explorer.state["weights"][2, 3]
    assert explorer.image.spoken == f"Query w2, key w3: weight {weight:.2f}, left out."
    explorer.paint([["key", key] for key in ["ArrowUp"] * 9 + ["ArrowLeft"] * 9])
    assert explorer.state["cursor"] == (0, 0)
    explorer.paint([["key", key] for key in ["ArrowDown"] * 30 + ["ArrowRight"] * 30])
    assert explorer.state["cursor"] == (19, 19)


def test_the_sheet_is_kept_while_patterns_are_looked_at():
    explorer = small(20, budget=0.5)
    choose(explorer, pattern=PAINTED)
    stroke(explorer, (3, 2), (9, 8))
    mask = explorer.state["mask"]
    choose(explorer, pattern="ETC", size=3, head=2)
    choose(explorer, pattern=PAINTED)
    assert np.array_equal(explorer.state["mask"], mask)


# ------------------------------------------------------------------------ the text


def test_a_text_is_read_once_and_nothing_else_reads(monkeypatch):
    reader = Reader()
    explorer = small(read=reader)
    assert len(reader.texts) == 1
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_: pytest.fail("a model ran in a handler"))
    for name, value in (("size", 3), ("head", 3), ("layer", 0), ("layers", 4), ("brush", "erase"), ("shape", "row")):
        choose(explorer, **{name: value})
    for pattern in (*PATTERNS, PAINTED):
        choose(explorer, pattern=pattern)
    stroke(explorer, (3, 3), (4, 4))
    assert len(reader.texts) == 1
    choose(explorer, text=words(15))
    assert reader.texts == [words(20), words(15)]
    assert explorer.state["tokens"] == words(15).split() and explorer.image.area[2:] == [15 * (SIDE // 15)] * 2
    choose(explorer, text=words(20))
    assert len(reader.texts) == 2  # it is still known


def test_the_model_runs_for_a_new_text_only(monkeypatch):
    explorer, runs = PatternExplorer(), []
    call = torch.nn.Module.__call__

    def counted(self, *arguments, **options):
        runs.append(type(self).__name__)
        return call(self, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    choose(explorer, head=3, layer=5, pattern="BigBird", size=5)
    assert runs == []
    choose(explorer, text="I never saw such a film, and I never want to see one again.")
    assert runs.count("Encoder") == 1 and explorer.state["tokens"][1:4] == ["i", "never", "saw"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("  ", "The text is empty"),
        ("Too short.", f"has 5 tokens .* it must have {SHORTEST} to {LONGEST}"),
        ("word " * 60, "has 62 tokens"),
    ],
)
def test_a_text_that_cannot_be_shown_is_refused_in_words(shown, text, words):
    with pytest.raises(ValueError, match=words):
        PatternExplorer(text=text)
    explorer = PatternExplorer()
    state, picture = explorer.state, shown(explorer)
    choose(explorer, text=text)
    assert re.search(words, explorer.line.value) and "The picture keeps the text before it." in explorer.line.value
    assert np.array_equal(shown(explorer), picture)
    after = explorer.state
    assert after.pop("message") and not state.pop("message")
    np.testing.assert_equal(after, state)
    choose(explorer, head=3)
    assert explorer.state["message"] == ""


def test_sheets_belong_to_a_length():
    explorer = small(20, budget=0.5)
    choose(explorer, pattern=PAINTED)
    stroke(explorer, (3, 2), (9, 8))
    mask = explorer.state["mask"]
    choose(explorer, text=words(15))
    assert explorer.state["mask"].shape == (15, 15) and explorer.state["pairs"] == 0
    assert explorer.state["cursor"] is None
    choose(explorer, text=words(19) + " other")  # as many tokens as before
    assert np.array_equal(explorer.state["mask"], mask)


def test_the_size_fits_the_text():
    explorer = small(40, pattern="window")
    assert explorer.controls["size"].max == 39
    choose(explorer, size=30)
    choose(explorer, text=words(39) + " other")
    assert explorer.state["size"] == 30  # as many tokens: the student's size stays
    choose(explorer, text=words(12))
    assert explorer.controls["size"].max == 11 and explorer.state["pairs"] <= explorer.state["budget"]


# ------------------------------------------------------------------------ words


def test_words_say_the_numbers():
    explorer = small(20, pattern="window", size=1, layers=1)
    state = explorer.state
    assert explorer.summary(state) == (
        "window, size 1 (tokens to each side): 58 of 400 pairs (14.5 %, over the budget of 48), 928 of 6,400 MACs. "
        f"They capture {100 * state['mass']:.1f} % of the head's mass; the output error is {state['error']:.2f}. "
        "Through 1 such layer 14.5 % of all pairs are reached."
    )
    assert explorer.alt.startswith(
        "A square of 20 queries by 20 keys with the weights of layer 1, head 1: allowed pairs"
    )
    assert explorer.alt.endswith(explorer.summary(state)) and explorer.image.alt == explorer.alt
    data, metadata = explorer._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == explorer.alt
    assert base64.b64decode(data["image/png"]) == explorer.image.value
    assert data["text/plain"].startswith("PatternExplorer(pattern='window', size=1, layer=1, head=1, layers=1")


def test_recorded_times_are_said():
    times = {"window": (0.8, 0.1, 4_096), "local": (0.1, 0.25, 512), "ETC": "Words of its own."}
    explorer = small(times=times)
    assert explorer.summary(explorer.state).endswith(
        " Recorded at 4,096 tokens: dense 800 ms, window 100 ms, 8.0 times as fast."
    )
    choose(explorer, pattern="local")
    assert "at 512 tokens: dense 100 ms, local 250 ms, 2.5 times as slow." in explorer.line.value
    choose(explorer, pattern="ETC")
    assert explorer.summary(explorer.state).endswith(" are reached. Words of its own.")
    choose(explorer, pattern="BigBird")
    assert explorer.summary(explorer.state).endswith(" are reached.")
    choose(explorer, pattern=PAINTED)
    assert "no fast path of its own" in explorer.line.value and "as long as dense" in explorer.line.value


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pattern": "spiral"}, "pattern must be one of"),
        ({"size": 20}, "size must be one of"),
        ({"pattern": PAINTED, "size": 2}, "size must be one of"),
        ({"layer": 3}, "layer must be one of"),
        ({"head": -1}, "head must be one of"),
        ({"layers": 0}, "layers must be one of"),
        ({"budget": 0}, "budget must be a share"),
        ({"budget": 12}, "budget must be a share"),
        ({"times": {"spiral": "fast"}}, "times must have patterns among"),
        ({"times": {"window": (1, 2)}}, r"times\['window'\] must be words or"),
        ({"times": {"window": (1, 0, 512)}}, r"times\['window'\] must be words or"),
        ({"text": "word"}, "Too few words"),
    ],
)
def test_a_choice_that_is_not_offered_is_refused(options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        small(**options)


def test_an_event_takes_less_than_50_ms(assert_fast):
    """Median processor time of every control's events and of strokes; the best of three rounds decides."""
    explorer = PatternExplorer(read=read_text)
    turns = {
        "size": range(2, 20, 3),
        "layer": range(6),
        "head": range(12),
        "layers": range(1, 7),
        "pattern": (*PATTERNS, PAINTED),
        "brush": ("erase", "paint"),
        "shape": SHAPES,
    }
    acts = {
        name: lambda turn, name=name, values=values: choose(explorer, **{name: values[turn % len(values)]})
        for name, values in turns.items()
    }
    acts["stroke"] = lambda turn: stroke(explorer, (turn, 3), (turn, 6))
    acts["key"] = lambda turn: explorer.paint([["key", "ArrowRight"], ["key", " "]])
    for name, act in acts.items():
        choose(explorer, pattern="window" if name in turns else PAINTED, shape="cell")
        assert_fast(name, act)


def test_a_message_stands_above_the_picture_too_and_goes_with_the_next_event():
    explorer = small(20, budget=0.01)
    choose(explorer, pattern=PAINTED)
    stroke(explorer, (4, 0), (4, 19))
    assert "Not painted" in explorer.note.value and explorer.children.index(explorer.image) > 0
    choose(explorer, head=2)
    assert explorer.note.value == ""


def test_a_pattern_that_fits_no_budget_says_so():
    explorer = small(20, budget=0.12)
    choose(explorer, pattern="strided")
    assert explorer.state["message"].startswith("No size of strided fits the budget at 20 tokens")
