"""The explorer of grids: what it shows is what the library gives for the matrix with the moved weight in it."""

import base64
import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from effnlp_lessons.pretrained import load_minilm
from effnlp_lessons.quantization.packing import save_quantized
from effnlp_lessons.quantization.post_training import QuantizedLinear
from effnlp_lessons.quantization.quantizers import quantize_matrix
from effnlp_lessons.widgets.quantization_grid_explorer import (
    GRANULARITIES,
    KINDS,
    QuantizationGridExplorer,
    trained_matrices,
)
from effnlp_lessons.widgets.quantization_grid_numbers import bytes_on_disk, decibels
from effnlp_lessons.widgets.quantization_grid_picture import AREA, FARTHEST, LEFT, WIDTH, multiple_at, pixel_of


def draw(rows, columns, seed, power=1.0):
    """Random weights; a power above 1 gives heavy tails."""
    z = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return 0.1 * z.sign() * z.abs() ** power


MATRICES = {
    "even": draw(6, 256, 0),
    "heavy": draw(5, 384, 1, power=2.0),
    "one-sided": draw(2, 128, 2).abs() + 0.3,
}


def show(explorer, **values):
    """Set controls, in one event, and return the state."""
    with explorer.still():
        for name, value in values.items():
            explorer.controls[name].value = value
    explorer.refresh()
    return explorer.state


def with_outlier(weights, outlier):
    """The matrix with its smallest weight at a multiple of its largest, and where that weight is."""
    weights = weights.clone()
    place = np.unravel_index(int(weights.abs().argmin()), weights.shape)
    if outlier:
        weights[place] = outlier * weights.abs().max().item()
    return weights, tuple(map(int, place))


def sqnr(z, restored):
    z, restored = z.double(), restored.double()
    return (10 * torch.log10(z.square().sum() / (z - restored).square().sum())).item()


@pytest.fixture(scope="module")
def anywhere():
    """One explorer for the tests that go to many settings: making one takes longer than an event."""
    return QuantizationGridExplorer(MATRICES)


# ------------------------------------------------------------------------ numbers


def random_settings(count):
    generator = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "matrix": generator.choice(list(MATRICES)).item(),
            "granularity": generator.choice(list(GRANULARITIES)).item(),
            "kind": generator.choice(list(KINDS)).item(),
            "bits": int(generator.integers(2, 9)),
            "share": int(generator.choice([100, generator.integers(10, 101)])),
            "outlier": float(generator.choice([0.0, generator.integers(-80, 81) / 10])),
        }


def test_state_equals_the_library_on_the_whole_matrix(anywhere):
    """For 100 settings: the whole matrix, with the moved weight, quantized anew; errors taken apart by hand."""
    for setting in random_settings(100):
        state = anywhere.numbers(**setting)
        z, (row, column) = with_outlier(MATRICES[setting["matrix"]], setting["outlier"])
        share, bits, symmetric = setting["share"] / 100, setting["bits"], KINDS[setting["kind"]]
        quantized = quantize_matrix(
            z, bits, GRANULARITIES[setting["granularity"]], symmetric,
            lambda blocks, share=share: (share * blocks.amin(-1), share * blocks.amax(-1)),
        )  # fmt: skip
        restored = quantized.dequantize()
        assert state["weight"] == (row, column) and state["value"] == z[row, column].item()
        assert state["lands"] == restored[row, column].item()
        # the grid of every weight, as a matrix of the weights' shape
        scale, zero = (
            grids.repeat_interleave(quantized.block[0], 0).repeat_interleave(quantized.block[1], 1)
            for grids in (quantized.scale, quantized.zero_point)
        )
        q_min, q_max = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        top, bottom = scale.double() * (q_max - zero), scale.double() * (q_min - zero)
        cut = (z > top + scale / 2) | (z < bottom - scale / 2)
        squares = (z.double() - restored.double()).square()
        error = squares.mean().item()
        assert state["mse"] == pytest.approx(error, rel=1e-5)  # weights are float32, and so are their errors
        assert state["rounding"] == pytest.approx(squares[~cut].sum().item() / z.numel(), rel=1e-5, abs=1e-7 * error)
        assert state["clipping"] == pytest.approx(squares[cut].sum().item() / z.numel(), rel=1e-5, abs=1e-7 * error)
        assert state["clipped"] == cut.sum() and state["cut"] == cut[row, column]
        # the block with the weight, the rest of it, and all others
        rows, columns = quantized.block
        block = torch.zeros(z.shape, dtype=torch.bool)
        block[row // rows * rows :, column // columns * columns :][:rows, :columns] = True
        rest = block.clone()
        rest[row, column] = False
        assert state["held_mse"] == pytest.approx(squares[block].mean().item(), rel=1e-5)
        # in dB, from float32 sums in another order
        assert state["sqnr"]["matrix"] == pytest.approx(sqnr(z, restored), abs=1e-4)
        assert state["sqnr"]["rest"] == pytest.approx(sqnr(z[rest], restored[rest]), abs=1e-4)
        if block.all():
            assert state["sqnr"]["others"] is None
        else:
            assert state["sqnr"]["others"] == pytest.approx(sqnr(z[~block], restored[~block]), abs=1e-4)
        assert all(ratio is None or ratio > -1e-6 for ratio in state["sqnr"].values())  # 0 is a level of every grid
        # both grids
        away = torch.zeros(z.shape, dtype=torch.bool)
        away[state["elsewhere_row"]] = block[row] if columns < z.shape[1] else True
        assert state["elsewhere_row"] != row
        for part, where, grid in (
            ("held", block, (row, column)),
            ("elsewhere", away, (state["elsewhere_row"], column)),
        ):
            assert np.array_equal(state[part]["weights"], z[where].numpy())
            assert (state[part]["scale"], state[part]["zero_point"]) == (scale[grid].item(), zero[grid].item())
            levels = scale[grid] * (torch.arange(q_min, q_max + 1) - zero[grid])
            assert np.array_equal(state[part]["levels"], levels.numpy())
            assert np.array_equal(state[part]["used"], np.isin(state[part]["levels"], restored[where].numpy()))
            assert state[part]["count"] == len(restored[where].unique())
        assert state["grids"] == quantized.scale.numel()


def test_every_control_is_an_event(anywhere):
    """The state is the numbers of the controls' values, after each of them."""
    show(anywhere, **PLAIN)
    for setting in random_settings(3):
        for name, value in setting.items():
            anywhere.controls[name].value = value
            now, expected = anywhere.state, anywhere.numbers(**anywhere.values)
            for part in ("held", "elsewhere"):
                one, other = now.pop(part), expected.pop(part)
                assert all(np.array_equal(one[key], other[key]) for key in one)
            assert now == expected and now[name] == value
            assert anywhere.summary(anywhere.state) in anywhere.line.value


def test_it_opens_without_an_outlier_on_one_grid_of_8_bits():
    explorer = QuantizationGridExplorer(MATRICES)
    assert explorer.values == {
        "matrix": "even", "granularity": "tensor", "kind": "symmetric", "bits": 8, "share": 100, "outlier": 0.0,
    }  # fmt: skip
    state = explorer.state
    assert state["value"] == state["own"] == MATRICES["even"].flatten()[MATRICES["even"].abs().argmin()]
    assert abs(state["own"]) < 0.01 * state["largest"] and state["largest"] == MATRICES["even"].abs().max()
    assert state["clipped"] == 0 and state["sqnr"]["others"] is None


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_bit_is_6_decibels(anywhere, bits):
    """SQNR grows by about 6.02 dB a bit; less exactly with few levels, whose errors are not evenly spread."""
    if bits >= 5:
        ratios = [show(anywhere, **PLAIN | {"bits": k})["sqnr"]["matrix"] for k in (bits - 1, bits)]
        assert np.diff(ratios).item() == pytest.approx(6.02, abs=1.2)


PLAIN = {"matrix": "even", "granularity": "tensor", "kind": "symmetric", "share": 100, "outlier": 0.0}


@pytest.mark.parametrize("matrix", ["drawn", "block 0 query", "block 5 query"])
def test_an_outlier_breaks_the_tensors_grid_and_the_groups_survive(matrix):
    """8 times the largest weight, 4 bits: the SQNR falls sharply on one grid, outside of its group it does not."""
    weights = draw(384, 384, 3) if matrix == "drawn" else trained_matrices()[matrix]
    explorer = QuantizationGridExplorer(weights, bits=4)
    before, after = (show(explorer, outlier=outlier) for outlier in (0.0, 8.0))
    assert before["sqnr"]["matrix"] > 8 and after["sqnr"]["matrix"] < 0.5
    assert after["held"]["scale"] == pytest.approx(8 * before["held"]["scale"])
    assert after["elsewhere"]["scale"] == after["held"]["scale"] and after["elsewhere"]["count"] <= 3
    show(explorer, granularity="group 64")
    before, after = (show(explorer, outlier=outlier) for outlier in (0.0, 8.0))
    assert before["sqnr"]["rest"] > 15 and after["sqnr"]["rest"] < 0.5  # its own group does not survive
    assert after["sqnr"]["others"] == before["sqnr"]["others"] > 18  # no other group has changed at all
    assert abs(after["sqnr"]["matrix"] - before["sqnr"]["matrix"]) < 0.3
    assert after["elsewhere"]["scale"] == before["elsewhere"]["scale"]
    row = show(explorer, granularity="row")["sqnr"]["matrix"]
    assert 8 < row < after["sqnr"]["matrix"]


def test_a_smaller_range_trades_rounding_for_clipping():
    explorer = QuantizationGridExplorer(draw(64, 128, 4), bits=4, outlier=8.0)
    whole, part = explorer.state, show(explorer, share=12)
    assert whole["clipping"] == 0 and whole["clipped"] == 0 and not whole["cut"]
    assert part["cut"] and part["clipped"] >= 1 and part["lands"] < 0.13 * part["value"]
    assert part["rounding"] < 0.2 * whole["rounding"] and part["clipping"] > part["rounding"]
    assert part["sqnr"]["rest"] > 8 > whole["sqnr"]["rest"] + 7


def test_decibels():
    assert decibels(100.0, 1.0) == 20 and decibels(1.0, 0.0) == math.inf and decibels(0.0, 1.0) == -math.inf


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_bytes_are_those_of_a_file(tmp_path, anywhere, granularity, kind, bits):
    """Of a layer saved by the library, without the header: what its codes, scales and zero points take."""
    quantized = quantize_matrix(MATRICES["heavy"], bits, GRANULARITIES[granularity], KINDS[kind])
    file = tmp_path / "layer.safetensors"
    written = save_quantized(nn.Sequential(QuantizedLinear(quantized)), file)
    parts = load_file(file)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
    assert written > stored
    state = show(anywhere, matrix="heavy", granularity=granularity, kind=kind, bits=bits)
    assert state["bytes"] == stored == bytes_on_disk(5 * 384, bits, quantized.scale.numel(), KINDS[kind])
    grids = sum(tensor.numel() * tensor.element_size() for name, tensor in parts.items() if "codes" not in name)
    assert state["grid_bytes"] == grids and state["float_bytes"] == 4 * 5 * 384


def test_four_matrices_of_minilm_are_shown():
    encoder, matrices = load_minilm(), trained_matrices()
    assert list(matrices) == ["block 0 query", "block 0 value", "block 5 query", "block 0 contract"]
    assert torch.equal(matrices["block 5 query"], encoder.blocks[5].token_mixer.query.weight)
    assert torch.equal(matrices["block 0 contract"], encoder.blocks[0].channel_mixer.contract.weight)
    explorer = QuantizationGridExplorer()
    assert explorer.state["shape"] == (384, 384) and explorer.controls["matrix"].options == tuple(matrices)
    # a trained outlier: the largest weight of this matrix is more than 100 standard deviations away
    state = show(explorer, matrix="block 0 contract")
    assert state["shape"] == (384, 1_536) and state["largest"] > 100 * matrices["block 0 contract"].std()
    assert state["sqnr"]["matrix"] < 10 and state["held"]["count"] < 30
    assert show(explorer, granularity="group 64")["sqnr"]["matrix"] > 35


def test_the_callers_matrix_stays_his():
    weights = draw(2, 128, 5)
    explorer = QuantizationGridExplorer(weights)
    before, kept = explorer.state["mse"], weights.clone()
    show(explorer, outlier=5.0)
    assert torch.equal(weights, kept)
    weights.fill_(1.0)
    assert show(explorer, outlier=0.0)["mse"] == before


# ------------------------------------------------------------------------ pointer and keys


def test_the_weight_follows_the_pointer_in_steps_and_stays_on_the_axis(anywhere):
    show(anywhere, **PLAIN)
    for x, expected in (
        (pixel_of(3), 3.0),
        (pixel_of(-7.96), -8.0),
        (5_000, 8.0),
        (-5_000, -8.0),
        (pixel_of(0.31), 0.3),
    ):
        anywhere.act([["down", x, 100.0]])
        assert anywhere.values["outlier"] == anywhere.state["outlier"] == expected
        assert anywhere.state["value"] == pytest.approx(
            expected * anywhere.state["largest"] if expected else anywhere.state["own"]
        )
    anywhere.act([["down", pixel_of(1), 80.0], *(["move", pixel_of(k), 500.0] for k in (2, 3.5, -1.2))])
    assert anywhere.values["outlier"] == -1.2


def test_keys_move_it_and_put_it_back(anywhere):
    show(anywhere, **PLAIN)
    for keys, expected in (
        (["ArrowRight"], 0.1),
        (["ArrowUp", "ArrowUp", "ArrowLeft"], 2.0),
        (["ArrowDown"] * 12, -8.0),
        (["ArrowRight"], -7.9),
        ([" "], 0.0),
        (["ArrowUp", "Enter"], 0.0),
        (["ArrowRight"] * 3, 0.3),
    ):
        anywhere.act([["key", key] for key in keys])
        assert anywhere.values["outlier"] == anywhere.state["outlier"] == expected
    assert anywhere.image.spoken.startswith(f"Weight {anywhere.state['value']:.3f} (0.3 x largest), stored as ")
    assert "rest of its block" in anywhere.image.spoken
    anywhere.act([["focus"]])
    assert anywhere.values["outlier"] == 0.3 and anywhere.image.spoken


def test_pixels_and_multiples():
    assert multiple_at(LEFT + WIDTH / 2) == pytest.approx(0)
    for multiple in (-8.0, -0.37, 0.0, 5.5, 8.0):
        assert multiple_at(pixel_of(multiple)) == pytest.approx(multiple)
        assert AREA[0] < pixel_of(multiple) < AREA[0] + AREA[2]


def test_several_events_draw_one_picture(monkeypatch):
    explorer, drawn = QuantizationGridExplorer(MATRICES), []
    monkeypatch.setattr(explorer.image, "show", lambda png, alt: drawn.append(alt))
    explorer.act([["down", 300.0, 100.0], ["move", 350.0, 100.0], ["key", "ArrowUp"]])
    assert len(drawn) == 1


# ------------------------------------------------------------------------ picture and words


def axes_of(explorer):
    """long axis, its lanes, upper and lower panel."""
    return explorer.figure.axes[:4]


def column_of(explorer, axes, x):
    return round(float(axes.transData.transform((x, 0))[0]) - 0.5)


def rows_of(explorer, axes, low, high):
    """Rows of pixels between two shares of the axes' height, from above."""
    box = axes.get_position()
    height = explorer.figure.bbox.height
    return slice(round(height * (1 - box.y0 - high * box.height)), round(height * (1 - box.y0 - low * box.height)))


def is_vermilion(pixels):
    red, green, blue = (pixels[..., i].astype(int) for i in range(3))
    return (red - blue > 120) & (green < 150)


def is_blue(pixels):
    red, green, blue = (pixels[..., i].astype(int) for i in range(3))
    return (blue - red > 100) & (green < 180)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_has_a_line_at_every_level(granularity, kind, shown, drawn_anew):
    explorer = QuantizationGridExplorer(MATRICES, "heavy", 3, kind, granularity, 90, -1.5)
    picture, state = shown(explorer), explorer.state
    assert picture.shape == (550, 900, 3) and np.array_equal(picture, drawn_anew(explorer))
    _, lanes, *panels = axes_of(explorer)
    assert len(state["held"]["levels"]) == (7 if kind == "symmetric" else 8)
    for panel, part, coloured in zip(panels, ("held", "elsewhere"), (is_vermilion, is_blue), strict=True):
        tall, short = (coloured(picture[rows_of(explorer, panel, *at)]).any(0) for at in ((0.7, 0.8), (0.05, 0.2)))
        expected = np.zeros(900, dtype=bool)
        for level, used in zip(state[part]["levels"], state[part]["used"], strict=True):
            if abs(level) < 0.97 * state["spread"]:
                x = column_of(explorer, panel, level)
                assert tall[x - 1 : x + 2].any() == used, (part, level)
                expected[x - 3 : x + 4] |= used
                if not used:
                    gray = picture[rows_of(explorer, panel, 0.05, 0.2), x - 1 : x + 2].max(-1)
                    assert gray.min() < 130
        inside = slice(
            column_of(explorer, panel, -0.97 * state["spread"]), column_of(explorer, panel, 0.97 * state["spread"])
        )
        assert not (tall & ~expected)[inside].any(), "a line where no level is in use"
        assert expected[inside].any() and short.any()
    for lane, part, coloured in ((0, "held", is_vermilion), (1, "elsewhere", is_blue)):
        strip = coloured(picture[rows_of(explorer, lanes, 0.75 - 0.5 * lane - 0.1, 0.75 - 0.5 * lane + 0.1)]).any(0)
        for level in state[part]["levels"]:
            x = column_of(explorer, lanes, level)
            assert strip[x - 1 : x + 2].any(), (part, level)
        ends = [column_of(explorer, lanes, state[part]["levels"][end]) for end in (0, -1)]
        assert not strip[LEFT : ends[0] - 3].any() and not strip[ends[1] + 4 :].any()


@pytest.mark.parametrize("outlier", [0.0, 8.0, -8.0, 1.7])
def test_the_moved_weight_is_drawn_where_the_pointer_would_put_it(anywhere, outlier, shown):
    show(anywhere, **PLAIN | {"outlier": outlier, "share": 50})  # clipped, so that it is not where it is stored
    picture = shown(anywhere)
    long_axis = axes_of(anywhere)[0]
    columns = np.flatnonzero(is_vermilion(picture[rows_of(anywhere, long_axis, 0.5, 0.6)]).any(0))
    assert columns.mean() == pytest.approx(pixel_of(outlier), abs=1.5) and 14 < len(columns) < 20
    assert multiple_at(columns.mean()) == pytest.approx(outlier, abs=0.05)  # half a step of the pointer


def test_the_histograms_count_the_weights(anywhere):
    """Bars are the shares of the highest bin, of the block's weights near 0."""
    state = show(anywhere, **PLAIN | {"granularity": "group 128", "bits": 4, "outlier": 6.0})
    for panel, part in zip(axes_of(anywhere)[2:], ("held", "elsewhere"), strict=True):
        heights, edges, _ = panel.patches[0].get_data()
        near = state[part]["weights"][abs(state[part]["weights"]) <= state["spread"]]
        counts = [((near >= a) & (near < b)).sum() for a, b in itertools.pairwise(edges[:-1])]
        assert np.allclose(heights[:-1], np.array(counts) / max(counts), atol=1e-6)
        assert len(near) == 127 if part == "held" else 128


def test_the_shade_begins_where_the_clamp_does(anywhere):
    for setting in (
        {"kind": "affine", "share": 40},
        {"kind": "symmetric", "share": 55},
        {"share": 100, "outlier": 3.0},
    ):
        state = show(anywhere, **PLAIN | {"granularity": "row", "bits": 4} | setting)
        for panel, part in zip(axes_of(anywhere)[2:], ("held", "elsewhere"), strict=True):
            below, above = (patch for patch in panel.patches[2:4])
            half = state[part]["scale"] / 2
            assert below.get_x() + below.get_width() == pytest.approx(
                max(state[part]["levels"][0] - half, -state["spread"])
            )
            assert above.get_x() == pytest.approx(state[part]["levels"][-1] + half)
            assert above.get_width() == pytest.approx(max(state["spread"] - above.get_x(), 0))


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"bits": 2, "granularity": "group 64", "kind": "affine", "share": 10, "outlier": -8.0},
        {"matrix": "block 0 contract", "granularity": "group 128", "kind": "affine", "share": 33, "outlier": -7.7},
        {"matrix": "block 0 contract", "granularity": "group 64", "bits": 8, "outlier": 0.1},
        {"granularity": "row", "share": 99, "outlier": 8.0},
    ],
)
def test_no_words_leave_the_picture_or_meet(real, setting):
    show(real, **DEFAULTS | setting)
    figure = real.figure
    renderer = figure.canvas.get_renderer()
    words = [*figure.texts]
    for axes in figure.axes:
        words += axes.texts
        if axes.axison:
            words += [axes.xaxis.label, axes.yaxis.label]
            for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
                ticks = [tick for tick in axis.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits)]
                words += [tick.label1 for tick in ticks if tick.label1.get_visible()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in words if t.get_text() and t.get_visible()]
    boxes = [(text, box) for text, box in boxes if box.width > 0]
    assert len(boxes) > 30
    for text, box in boxes:
        assert min(box.x0, box.y0) >= 0 and box.x1 <= 900 and box.y1 <= 550, text
    for (text, box), (other, second) in itertools.combinations(boxes, 2):
        assert not box.overlaps(second), (text, other)


DEFAULTS = {
    "matrix": "block 0 query", "granularity": "tensor", "kind": "symmetric", "bits": 8, "share": 100, "outlier": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def real():
    return QuantizationGridExplorer()


def test_words_say_the_numbers(anywhere):
    state = show(
        anywhere, **PLAIN | {"granularity": "group 64", "kind": "affine", "bits": 3, "share": 80, "outlier": 4.0}
    )
    (row, column), held, away, ratios = (state[name] for name in ("weight", "held", "elsewhere", "sqnr"))
    first = column // 64 * 64
    inputs = f"inputs {first} to {first + 63}"
    rounding, clipping = (100 * state[name] / state["mse"] for name in ("rounding", "clipping"))
    assert anywhere.summary(state) == (
        "Even (6 x 256): 24 grids, one a group, 3 bits, affine, over 80 % of the range. "
        f"Moved weight (row {row}, input {column}): {state['value']:.3f} (4.0 x largest), "
        f"clipped to {state['lands']:.3f}. "
        f"Its grid, row {row}, {inputs}: S = {held['scale']:.3g}, Z = {held['zero_point']}, "
        f"{held['count']} of 8 levels used. "
        f"Elsewhere, row {(row + 3) % 6}, {inputs}: S = {away['scale']:.3g}, Z = {away['zero_point']}, "
        f"{away['count']} of 8 levels used. "
        f"Signal to noise of the matrix {ratios['matrix']:.1f} dB, of the other weights of the moved weight's block "
        f"{ratios['rest']:.1f} dB, of all other blocks {ratios['others']:.1f} dB. "
        f"Mean squared error {state['mse']:.3g} (rounding {rounding:.1f} %, clipping {clipping:.1f} %), in the block "
        f"{state['held_mse']:.3g}; {state['clipped']} weights clipped. "
        "681 bytes, 105 of them for grids, against 6,144 in float32."
    )
    assert anywhere.summary(state) in anywhere.alt and anywhere.summary(state) in anywhere.line.value
    assert anywhere.image.alt == anywhere.alt
    data, metadata = anywhere._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == anywhere.alt
    assert base64.b64decode(data["image/png"]) == anywhere.image.value
    assert repr(anywhere) == (
        "QuantizationGridExplorer(matrix='even', granularity='group 64', kind='affine', bits=3, share=80, outlier=4.0)"
    )


def test_one_weight_clipped_and_one_grid_are_said_so():
    weights = 0.01 * torch.ones(2, 128)
    weights[0, 0] = 0.0
    explorer = QuantizationGridExplorer(weights, bits=4, share=50, outlier=8.0)
    assert "; 1 weight clipped. " in explorer.line.value and ", 4 of them for grids, " in explorer.line.value
    exact = QuantizationGridExplorer(0.01 * torch.eye(2, 128), granularity="row")
    assert exact.state["mse"] == 0 and exact.state["sqnr"]["matrix"] == math.inf
    assert "matrix exact, of" in exact.line.value and "(no error)" in exact.line.value
    assert "nan" not in exact.alt and "-0.000" not in exact.alt


# ------------------------------------------------------------------------ what is refused, how long it takes


@pytest.mark.parametrize(
    "given, words",
    [
        ({"matrices": {}}, "matrices must hold at least one matrix"),
        ({"matrices": torch.ones(1, 128)}, r"matrices\['matrix'\] must have two rows or more"),
        ({"matrices": torch.ones(4, 192)}, r"matrices\['matrix'\] must have two rows or more and a multiple of 128"),
        ({"matrices": {"a": torch.ones(4)}}, r"matrices\['a'\] must have two rows"),
        ({"matrices": torch.zeros(4, 128)}, r"matrices\['matrix'\] must be finite and not all 0"),
        ({"matrices": torch.full((4, 128), float("nan"))}, r"matrices\['matrix'\] must be finite"),
        ({"matrix": "odd"}, "matrix must be one of"),
        ({"bits": 9}, "bits must be one of"),
        ({"bits": 1}, "bits must be one of"),
        ({"kind": "signed"}, "kind must be one of"),
        ({"granularity": 64}, "granularity must be one of"),
        ({"share": 9}, "share must be whole per cent from 10 to 100, got 9"),
        ({"share": 50.5}, "share must be whole per cent"),
        ({"outlier": 8.1}, "outlier must be from -8 to 8, got 8.1"),
        ({"outlier": float("nan")}, "outlier must be from"),
    ],
)
def test_what_is_not_offered_is_refused(given, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        QuantizationGridExplorer(**{"matrices": MATRICES} | given)


@pytest.mark.parametrize(
    "matrix, granularity",
    [("block 0 query", "tensor"), ("block 0 query", "group 64"), ("block 0 contract", "tensor")],
)
def test_an_event_takes_less_than_50_ms(real, matrix, granularity, assert_fast):
    """Median processor time of dragging, keys and controls on the real matrices; the best of three rounds decides."""
    acts = {
        "drag": lambda turn: real.act([["down", pixel_of(turn % FARTHEST - 4), 100.0]]),
        "key": lambda turn: real.act([["key", ("ArrowUp", "ArrowLeft")[turn % 2]]]),
        "outlier": lambda turn: setattr(real.controls["outlier"], "value", turn / 2),
        "bits": lambda turn: setattr(real.controls["bits"], "value", turn % 7 + 2),
        "share": lambda turn: setattr(real.controls["share"], "value", 60 + turn % 40),
        "kind": lambda turn: setattr(real.controls["kind"], "value", tuple(KINDS)[turn % 2]),
        "granularity": lambda turn: setattr(real.controls["granularity"], "value", tuple(GRANULARITIES)[turn % 4]),
    }
    for name, act in acts.items():
        show(real, **DEFAULTS | {"matrix": matrix, "granularity": granularity})
        assert_fast(f"{matrix}, {granularity}, {name}", act)
