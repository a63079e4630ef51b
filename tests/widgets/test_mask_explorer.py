"""The explorer of masks: masks, bytes and times are those of the library and of the study."""

import base64
import json

import numpy as np
import pytest
import torch
from torch import nn

from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.pruning.masks import block_sums, keep_top, n_of_m, spread_blocks
from effnlp_lessons.pruning.storage import pack_matrix
from effnlp_lessons.studies import pruning_costs
from effnlp_lessons.studies.pruning_costs import BLOCK, bsr, csr, rows, zeros
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.widgets import mask_numbers
from effnlp_lessons.widgets.mask_explorer import STEP, MaskExplorer
from effnlp_lessons.widgets.mask_numbers import (
    BLOCKS,
    BYTES,
    JOINED,
    KERNELS,
    LAYERS,
    MAGNITUDE,
    NONE,
    OTHER,
    RANDOM,
    RECORDED,
    ROWS,
    SCATTERED,
    STRUCTURES,
    TWO_OF_FOUR,
    WITH_INPUT,
    input_norms,
    joined,
    recorded_times,
    trained_matrices,
)
from effnlp_lessons.widgets.mask_picture import BARS, LENS, MATRIX, MOST, PART, area_of, cell_of, pixels_of

SHAPES = {"wide": (96, 160), "tall": (256, 64), "small": (32, 32), "square": (384, 384)}


def draw(name, seed):
    """Random weights on a coarse grid, so that many are equal; some are 0."""
    drawn = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))
    return (20 * drawn).round() / 100


MATRICES = {name: draw(name, seed) for seed, name in enumerate(SHAPES)}
NORMS = {name: torch.rand(shape[1], generator=torch.Generator().manual_seed(9)) + 0.1 for name, shape in SHAPES.items()}
TIMES = {
    "96 x 160": {csr(0.5): 6.0, csr(0.9): 1.5, csr(0.99): 0.3, bsr(0.5): 1.2, bsr(0.9): 0.4}
    | {zeros(0.5): 1.02, zeros(0.9): 0.98, rows(0.5): 0.55, rows(0.1): 0.2}
}


def make(**given):
    return MaskExplorer(MATRICES, **{"norms": NORMS, "times": TIMES} | given)


@pytest.fixture(scope="module")
def anywhere():
    """One explorer for the tests that go to many states: making one takes longer than an event."""
    return make()


def set_to(explorer, **values):
    for name, value in values.items():
        explorer.controls[name].value = value


def expected_mask(matrix, criterion, structure, sparsity):
    """The same by the library, from the beginning."""
    weights = MATRICES[matrix]
    scores = {
        MAGNITUDE: lambda: weights.abs(),
        RANDOM: lambda: torch.rand(weights.shape, generator=torch.Generator().manual_seed(0)),
        WITH_INPUT: lambda: weights.abs() * NORMS[matrix],
    }[criterion]()
    if structure == TWO_OF_FOUR:
        return n_of_m(scores, 2, 4)
    block = {SCATTERED: (1, 1), BLOCKS: BLOCK, ROWS: (1, scores.shape[1])}[structure]
    return spread_blocks(keep_top(block_sums(scores, block), sparsity / 100), block)


# ------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("matrix", SHAPES)
@pytest.mark.parametrize("criterion", [MAGNITUDE, RANDOM, WITH_INPUT])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support:UserWarning")
def test_state_equals_masks_and_storage(anywhere, matrix, criterion, structure):
    for sparsity in (50,) if structure == TWO_OF_FOUR else (0, 7, 50, 93, 99):
        # without a picture; that the state is these numbers is the test after this one
        values = {"matrix": matrix, "criterion": criterion, "structure": structure, "sparsity": sparsity}
        state, weights = anywhere.numbers(**values), MATRICES[matrix]
        mask = expected_mask(matrix, criterion, structure, sparsity)
        assert torch.equal(anywhere.mask(**values), mask)
        assert state["kept"] == int(mask.sum()) and state["left"] == mask.double().mean().item()
        share = (weights[mask].double().square().sum() / weights.double().square().sum()).item()
        assert state["squares"] == pytest.approx(share, rel=1e-6)
        cell = state["cell"]
        tiles = mask.numpy().reshape(mask.shape[0] // cell, cell, -1, cell)
        assert np.allclose(state["cells"], tiles.mean((1, 3)))
        row, column = state["corner"]
        assert np.array_equal(state["part"], mask[row : row + LENS, column : column + LENS].numpy())
        # the bytes are those of the tensors that storage makes
        forms = {"dense", "csr64", "csr", "bit mask"} | ({"2:4"} if structure == TWO_OF_FOUR else set())
        for form in forms:
            packed = sum(tensor.nbytes for tensor in pack_matrix(weights, mask, form).values())
            assert state["bytes"][form] * state["dense bytes"] == pytest.approx(packed, abs=1e-6), form
        if structure == BLOCKS:
            sparse = (mask + 0.0).to_sparse_bsr(BLOCK)
            places = 4 * (sparse.crow_indices().numel() + sparse.col_indices().numel())
            stored = 4 * sparse.values().numel() + places
            assert state["bytes"]["blocks"] * state["dense bytes"] == pytest.approx(stored, abs=1e-6)
            forms.add("blocks")
        if structure == ROWS:
            left = int(mask.any(1).sum())
            assert state["bytes"]["smaller dense"] == pytest.approx(left / len(mask))
            forms.add("smaller dense")
        assert set(BYTES) - forms == {form for form, value in state["bytes"].items() if value is None}
        assert {state["how"]["bytes"][form] for form in set(BYTES) - forms} <= {OTHER}


def test_the_state_is_the_numbers_of_the_controls(anywhere):
    values = {"matrix": "wide", "criterion": RANDOM, "structure": ROWS, "sparsity": 33}
    set_to(anywhere, **values)
    state, expected = anywhere.state, anywhere.numbers(**values)
    assert anywhere.values == values and state["kept"] == 64 * 160
    for name, value in expected.items():
        assert np.array_equal(state[name], value) if name in ("cells", "part") else state[name] == value, name


def test_csr_of_half_of_the_weights_is_larger_than_dense(anywhere):
    set_to(anywhere, matrix="square", criterion=MAGNITUDE, structure=SCATTERED, sparsity=50)
    assert anywhere.state["bytes"]["csr64"] > 1.5 and 1 < anywhere.state["bytes"]["csr"] < 1.01
    assert anywhere.state["bytes"]["bit mask"] == pytest.approx(0.5 + 1 / 32)
    set_to(anywhere, sparsity=51)
    assert anywhere.state["bytes"]["csr"] < 1


def test_times_are_recorded_joined_or_absent(anywhere):
    set_to(anywhere, matrix="wide", criterion=MAGNITUDE, structure=SCATTERED)
    middle = 6.0 * (1.5 / 6.0) ** (np.log(0.5 / 0.3) / np.log(0.5 / 0.1))
    dense = 1.02 * (0.98 / 1.02) ** (np.log(0.5 / 0.3) / np.log(0.5 / 0.1))
    for sparsity, kernel, value, how in (
        (50, "CSR kernel", 6.0, RECORDED),
        (90, "CSR kernel", 1.5, RECORDED),
        (70, "CSR kernel", middle, JOINED),
        (49, "CSR kernel", None, NONE),
        (0, "CSR kernel", None, NONE),
        (99, "CSR kernel", 0.3, RECORDED),
        (70, "dense kernel", dense, JOINED),
        (0, "dense kernel", 1.0, RECORDED),
        (95, "dense kernel", None, NONE),
        (70, "block kernel", None, OTHER),
        (70, "smaller dense", None, OTHER),
    ):
        set_to(anywhere, sparsity=sparsity)
        assert anywhere.state["time"][kernel] == (None if value is None else pytest.approx(value)), (sparsity, kernel)
        assert anywhere.state["how"]["time"][kernel] == how
    set_to(anywhere, structure=BLOCKS, sparsity=90)
    assert anywhere.state["time"] == {
        "dense kernel": 0.98,
        "CSR kernel": None,
        "block kernel": 0.4,
        "smaller dense": None,
    }
    set_to(anywhere, structure=ROWS)
    assert anywhere.state["time"]["smaller dense"] == 0.2
    set_to(anywhere, sparsity=25)
    half = 0.55 ** (np.log(1 / 0.75) / np.log(1 / 0.5))
    assert anywhere.state["time"]["smaller dense"] == pytest.approx(half)
    set_to(anywhere, structure=TWO_OF_FOUR)
    assert anywhere.state["time"]["dense kernel"] == 1.02 and anywhere.state["time"]["CSR kernel"] is None
    set_to(anywhere, matrix="tall", structure=SCATTERED)
    assert set(anywhere.state["time"].values()) == {None}
    assert "dense kernel not recorded; CSR kernel not recorded." in anywhere.line.value
    assert joined({}, 50) == (None, NONE)


def test_recorded_times_come_from_the_study(monkeypatch):
    """Ratios are of one run, and their median over the runs; the names are those the study gives."""
    setting = pruning_costs.SETTING | {"runs": 2, "tokens": 3, "sizes": [], "classifier": False}
    setting |= {"matrices": [[32, 64]], "csr of a matrix": [0.5, 0.9]}
    runs = []
    for seed in range(3):
        numbers = json.loads(json.dumps(pruning_costs.run(setting, seed).numbers))
        for values in numbers["seconds"]["32 x 64"].values():
            values[0] = (values[0] + 1e-4) * (seed + 1)
        runs.append(numbers)
    monkeypatch.setattr(mask_numbers, "load_results", lambda name: {"runs": runs} if name == "pruning_costs" else None)
    times = recorded_times()
    expected = pruning_costs.speedups({"runs": runs}, "32 x 64")
    assert {form: 1 / value for form, value in times["32 x 64"].items()} == pytest.approx(
        {form: fast for form, (fast, _, _) in expected.items()}
    )
    explorer = MaskExplorer({"one": torch.ones(32, 64)}, structure=SCATTERED, sparsity=90)
    assert explorer.state["time"]["CSR kernel"] == times["32 x 64"][csr(0.9)]
    assert explorer.state["time"]["dense kernel"] == times["32 x 64"][zeros(0.9)]
    set_to(explorer, structure=BLOCKS, sparsity=50)
    assert explorer.state["time"]["block kernel"] == times["32 x 64"][bsr(0.5)]
    set_to(explorer, structure=ROWS, sparsity=75)
    assert explorer.state["time"]["smaller dense"] == times["32 x 64"][rows(0.25)]


def test_without_a_record_there_are_no_times(monkeypatch):
    def missing(name):
        raise FileNotFoundError(name)

    monkeypatch.setattr(mask_numbers, "load_results", missing)
    assert recorded_times() == {}
    explorer = MaskExplorer({"one": torch.ones(32, 64)})
    assert set(explorer.state["time"].values()) == {None}
    assert [bar.get_width() for bar, _ in explorer._picture._bars["time"].values()] == [0] * len(KERNELS)


def test_what_does_not_fit_is_refused():
    for matrices, words in (
        ({}, "at least one"),
        ({"a": torch.ones(32)}, "multiple of 32"),
        ({"a": torch.ones(33, 32)}, "multiple of 32"),
        ({"a": torch.ones(32, 4096)}, "at most 3,072"),
        ({"a": torch.zeros(32, 32)}, "not all 0"),
        ({"a": torch.full((32, 32), torch.nan)}, "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            MaskExplorer(matrices)
    for norms, words in (
        ({}, "one number for each"),
        (NORMS | {"wide": torch.ones(96)}, "one number for each of the 160"),
        (NORMS | {"wide": -torch.ones(160)}, "not below 0"),
    ):
        with pytest.raises(ValueError, match=words):
            make(norms=norms)
    with pytest.raises(ValueError, match="together with matrices"):
        MaskExplorer(norms=NORMS)
    for bad in (
        {"matrix": "none"},
        {"criterion": "size"},
        {"criterion": WITH_INPUT, "norms": None},
        {"structure": "1:4"},
        {"sparsity": 100},
        {"sparsity": 0.5},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            make(**bad)
    assert WITH_INPUT not in make(norms=None).controls["criterion"].options


def test_norms_of_the_inputs_leave_padding_out():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, x = nn.Linear(6, 3), torch.randn(2, 5, 6)
    tokens = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = input_norms({"layer": layer}, lambda: layer(x), tokens)["layer"]
    expected = torch.cat([x[0], x[1, :2]]).square().sum(0).sqrt()
    assert torch.allclose(found, expected) and not layer._forward_pre_hooks


def test_the_matrices_are_the_teachers():
    matrices, norms = trained_matrices()
    state = load_teacher().state_dict()
    assert list(matrices) == list(norms) == list(LAYERS)
    for name, (block, place) in LAYERS.items():
        assert torch.equal(matrices[name], state[f"encoder.blocks.{block}.{place}.weight"])
        assert norms[name].shape == matrices[name].shape[1:] and (norms[name] > 0).all()
    # what goes into `contract` is behind the activation, and differs from input to input far more
    assert {tuple(m.shape) for m in matrices.values()} == {(384, 384), (1536, 384), (384, 1536)}
    explorer = MaskExplorer(matrices, norms, times={}, matrix="block 5 expand", sparsity=80)
    kept = {}
    for criterion in (RANDOM, MAGNITUDE):
        set_to(explorer, criterion=criterion)
        kept[criterion] = explorer.state["squares"]
    assert kept[RANDOM] == pytest.approx(0.2, abs=0.01) and kept[MAGNITUDE] > 0.4


# ------------------------------------------------------------------------ controls, pointer, keys


def test_2_of_4_holds_the_slider_at_half():
    explorer = make(sparsity=80)
    assert not explorer.controls["sparsity"].disabled
    set_to(explorer, structure=TWO_OF_FOUR)
    assert explorer.controls["sparsity"].disabled and explorer.values["sparsity"] == explorer.state["sparsity"] == 50
    assert "2:4 is always half" in explorer.line.value
    set_to(explorer, sparsity=70)
    assert explorer.values["sparsity"] == explorer.state["sparsity"] == 50
    set_to(explorer, structure=ROWS)
    assert not explorer.controls["sparsity"].disabled and "always half" not in explorer.line.value
    assert make(structure=TWO_OF_FOUR, sparsity=80).values["sparsity"] == 50


def test_pointer_and_keys_move_the_frame():
    explorer = make(matrix="square", sparsity=70)
    left, top, width, height = explorer.image.area
    assert (left, top) == MATRIX and (width, height) == (288, 288)  # three quarters of a pixel a weight
    for (x, y), corner in (
        ((0, 0), (0, 0)),
        ((144, 72), (64, 160)),
        ((287, 287), (320, 320)),
        ((-40, 900), (320, 0)),
    ):
        explorer.act([["down", left + x, top + y]])
        assert explorer.state["corner"] == corner
    explorer.act([["down", left, top], ["move", left + 100, top], ["move", left + 144, top + 72]])
    assert explorer.state["corner"] == (64, 160)
    for key, corner in (
        ("ArrowRight", (64, 160 + STEP)),
        ("ArrowUp", (32, 192)),
        ("ArrowUp", (0, 192)),
        ("ArrowUp", (0, 192)),
        ("ArrowDown", (32, 192)),
        ("ArrowLeft", (32, 160)),
        (" ", (0, 0)),
    ):
        explorer.act([["key", key]])
        assert explorer.state["corner"] == corner, key
    explorer.act([["focus"]])
    kept = int(explorer.mask(**explorer.values)[:64, :64].sum())
    assert explorer.image.spoken == f"Row 0, column 0: {kept:,} of 4,096 kept."
    # in a smaller matrix the frame stays inside
    explorer.act([["key", "ArrowDown"]] * 20)
    assert explorer.state["corner"] == (320, 0)
    set_to(explorer, matrix="wide")
    assert explorer.state["corner"] == (32, 0) and explorer.state["part"].shape == (64, 64)
    set_to(explorer, matrix="small")
    assert explorer.state["corner"] == (0, 0) and explorer.state["part"].shape == (32, 32)


def test_a_change_is_one_event_and_draws_one_picture(monkeypatch):
    explorer, drawn = make(), []
    monkeypatch.setattr(explorer.image, "show", lambda png, alt: drawn.append(alt))
    explorer.act([["down", 60, 100], ["move", 80, 100], ["key", "ArrowDown"]])
    set_to(explorer, structure=TWO_OF_FOUR)
    set_to(explorer, criterion=RANDOM)
    assert len(drawn) == 3


# ------------------------------------------------------------------------ picture and words


@pytest.mark.parametrize(("matrix", "structure"), [("wide", SCATTERED), ("tall", ROWS), ("small", BLOCKS)])
def test_the_picture_is_drawn_whole(matrix, structure, shown, drawn_anew):
    explorer = make(matrix=matrix, structure=structure, sparsity=90)
    picture = shown(explorer)
    assert picture.shape == (420, 900, 3) and np.array_equal(picture, drawn_anew(explorer))
    # the same after other states
    set_to(explorer, matrix="square", structure=TWO_OF_FOUR)
    set_to(explorer, structure=structure, sparsity=90, matrix=matrix)
    assert np.array_equal(shown(explorer), picture)


def test_the_picture_shows_the_mask(shown):
    explorer = make(matrix="tall", structure=SCATTERED, sparsity=80)
    explorer.act([["key", "ArrowDown"]] * 6)
    picture, state = shown(explorer).astype(int), explorer.state
    row, _ = state["corner"]
    assert row == 192
    squares = np.array([[picture[PART[1] + 3 * y + 1, PART[0] + 3 * x + 1] for x in range(64)] for y in range(64)])
    assert np.array_equal(squares.sum(-1) < 500, state["part"])
    # cells without anything are white, fuller ones darker; those under the frame's line are left out
    side, pixels = cell_of((256, 64)), pixels_of((256, 64))
    _, _, width, height = area_of((256, 64))
    above = range(row // side - 2)
    light = np.array(
        [
            [picture[MATRIX[1] + pixels * y + 2, MATRIX[0] + pixels * x + 2].sum() for x in range(width // pixels)]
            for y in above
        ]
    )
    cells = state["cells"][: len(above)]
    assert height == pixels * len(state["cells"]) and (light[cells == 0] == 3 * 255).all()
    for fewer, more in zip(np.unique(cells)[:-1], np.unique(cells)[1:], strict=True):
        assert light[cells == fewer].min() > light[cells == more].max()


@pytest.mark.parametrize(("matrix", "moves"), [("square", 0), ("square", 4), ("tall", 6), ("wide", 1)])
def test_the_frame_lies_around_what_is_magnified(matrix, moves, shown):
    explorer = make(matrix=matrix, sparsity=99)
    explorer.act([["key", "ArrowRight"], ["key", "ArrowDown"], ["key", "ArrowDown"]] * moves)
    picture, (row, column) = shown(explorer).astype(int), explorer.state["corner"]
    red = (picture[..., 0] - picture[..., 2] > 120) & (picture[..., 1] < 150)
    red[:, MATRIX[0] + 300 :] = False  # bars are red too
    (y0, x0), (y1, x1) = (getattr(np.argwhere(red), end)(0) for end in ("min", "max"))
    scale, (high, wide) = pixels_of(SHAPES[matrix]) / cell_of(SHAPES[matrix]), explorer.state["part"].shape
    expected = [MATRIX[0] + scale * column, MATRIX[1] + scale * row]
    expected += [expected[0] + scale * wide, expected[1] + scale * high]
    assert [x0, y0, x1, y1] == pytest.approx(expected, abs=1.6)  # the line is 2 pixels wide


def test_the_bars_are_as_long_as_the_numbers(anywhere):
    for structure, sparsity in ((SCATTERED, 50), (SCATTERED, 99), (BLOCKS, 90), (ROWS, 50), (TWO_OF_FOUR, 50)):
        set_to(anywhere, matrix="wide", criterion=MAGNITUDE, structure=structure, sparsity=sparsity)
        for kind in ("bytes", "time"):
            for name, (bar, amount) in anywhere._picture._bars[kind].items():
                value = anywhere.state[kind][name]
                assert bar.get_width() == (0 if value is None else min(100 * value, MOST))
                if value is None:
                    how = anywhere.state["how"][kind][name]
                    assert amount.get_text() == ("–" if how == OTHER else how)
                else:
                    assert float(amount.get_text()) == pytest.approx(100 * value, abs=0.5)
                red = bar.get_facecolor()[0] > 0.5
                assert red == (value is not None and value > (1.05 if kind == "time" else 1))


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1536, 384), (384, 1536)])
def test_no_words_leave_the_picture_or_meet(shape):
    explorer = MaskExplorer({"block 0 contract": torch.ones(shape).cumsum(0)}, None, {})
    for structure, sparsity in ((SCATTERED, 0), (SCATTERED, 50), (ROWS, 90), (TWO_OF_FOUR, 50)):
        set_to(explorer, structure=structure, sparsity=sparsity)
        explorer.act([["key", "ArrowRight"], ["key", "ArrowDown"]] * 40)
        renderer = explorer.figure.canvas.get_renderer()
        words = [t for t in explorer.figure.texts if t.get_text()]
        for axes in explorer.figure.axes:
            if axes.axison:
                words += [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in words]
        for place, (text, box) in enumerate(boxes):
            assert box.x0 >= 0 and box.x1 <= 900 and box.y0 >= 0 and box.y1 <= 420, text
            for other, second in boxes[place + 1 :]:
                assert not box.overlaps(second), (text, other)
    assert BARS[0] + BARS[1] < 900


def test_words():
    explorer = make(matrix="wide", structure=BLOCKS, sparsity=60)
    assert "wide (96 x 160), blocks 32 x 32, by magnitude: 6,144 of 15,360 weights left, 40.0 %" in explorer.line.value
    assert "Of 61,440 dense bytes: dense, with zeros 100.0 %; CSR, int64 places 121.3 %" in explorer.line.value
    assert "32 x 32 kernel 103 % (interpolated)." in explorer.line.value
    for words in ("rows 0 to 63 and columns 0 to 63 weight by weight", "a line at 100 %, the dense matrix", "40.0 %"):
        assert words in explorer.alt
    data, metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer.image.value
    assert metadata["image/png"]["alt"] == explorer.alt == explorer.image.alt


def test_events_are_fast(assert_fast):
    """On a matrix as large as the largest of the teacher."""
    drawn = torch.randn(1536, 384, generator=torch.Generator().manual_seed(0))
    explorer = MaskExplorer({"large": drawn}, {"large": torch.ones(384)}, {})
    for structure in (SCATTERED, BLOCKS, ROWS):
        set_to(explorer, structure=structure)
        assert_fast(f"sparsity, {structure}", lambda turn: set_to(explorer, sparsity=10 + 9 * turn + turn % 2))
    assert_fast("frame", lambda turn: explorer.act([["key", "ArrowDown" if turn < 4 else "ArrowUp"]]))
    assert_fast("structure", lambda turn: set_to(explorer, structure=STRUCTURES[turn % 4]))
    assert_fast("criterion", lambda turn: set_to(explorer, criterion=(MAGNITUDE, RANDOM, WITH_INPUT)[turn % 3]))


def test_the_recorded_times_of_the_teachers_matrices():
    """Without times it shows what `pruning_costs` recorded: every matrix has times from half of the weights gone."""
    summary, explorer = load_results("pruning_costs"), MaskExplorer()
    for matrix in LAYERS:
        set_to(explorer, matrix=matrix)
        fast = pruning_costs.speedups(summary, " x ".join(map(str, explorer.state["shape"])))
        for structure, kernel, name in (
            (SCATTERED, "CSR kernel", csr(0.9)),
            (BLOCKS, "block kernel", bsr(0.9)),
            (ROWS, "smaller dense", rows(0.1)),
        ):
            set_to(explorer, structure=structure, sparsity=90)
            assert explorer.state["time"][kernel] == pytest.approx(1 / fast[name][0])
            assert explorer.state["time"]["dense kernel"] == pytest.approx(1 / fast[zeros(0.9)][0])
            assert set(explorer.state["how"]["time"].values()) == {RECORDED, OTHER}
