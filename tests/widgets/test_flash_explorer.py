"""The explorer of FlashAttention's tiles: its numbers are those of dense scores and closed formulas, tile by tile."""

import base64
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from matplotlib.transforms import Bbox

from effnlp_lessons import attention
from effnlp_lessons.attention.flash import flash_forward
from effnlp_lessons.attention.flash_costs import (
    flash_attention_bytes,
    standard_attention_bytes,
    tile_bytes,
    visited_tiles,
)
from effnlp_lessons.widgets import flash_trace
from effnlp_lessons.widgets.flash_explorer import OFF, ON, SRAM, FlashExplorer
from effnlp_lessons.widgets.flash_picture import MEMORY
from effnlp_lessons.widgets.flash_tiles import LEFT, MARGIN_LEFT, MARGIN_TOP, TOP, ink_of, words_of
from effnlp_lessons.widgets.flash_trace import (
    BLOCKS,
    TORCH,
    TRITON,
    Head,
    fast_memory,
    has_interpreter,
    made_up_head,
    record_trace,
)

SETTINGS = list(itertools.product(BLOCKS, BLOCKS, (False, True)))
needs_triton = pytest.mark.skipif(not has_interpreter(), reason="no Triton that can be interpreted")


def drawn(queries=37, keys=50, d_head=20, seed=1):
    """A head with lengths that no tile divides."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (queries, d_head), (keys, d_head), (keys, d_head)
    return Head(*(2 * torch.randn(shape, generator=generator) for shape in shapes))


# with more queries than keys the first causal queries see no key at all, some programs nothing
HEADS = {"made up": made_up_head(), "fewer queries": drawn(), "fewer keys": drawn(50, 21, 7), "single": drawn(1, 1, 1)}


@pytest.fixture(scope="module")
def explorers():
    """One explorer for each head; the kernel's trace for the first, PyTorch's for the others, which is faster."""
    made = {name: FlashExplorer(head, run="torch") for name, head in HEADS.items() if name != "made up"}
    return {"made up": FlashExplorer(), **made}


@pytest.fixture
def explorer(explorers):
    set_to(explorers["made up"], block_queries=16, block_keys=16, sram=64, causal=OFF, step=1)
    return explorers["made up"]


def set_to(explorer, **values):
    """Set controls one after another, the step last, and return the state."""
    for name in ("causal", "block_queries", "block_keys", "sram", "step"):
        if name in values:
            explorer.controls[name].value = values[name]
    return explorer.state


def numbers_of(explorer, setting, step, sram=64):
    block_queries, block_keys, causal = setting
    return explorer.numbers(
        step=step, causal=ON if causal else OFF, block_queries=block_queries, block_keys=block_keys, sram=sram
    )


def tiles_of(head, setting):
    block_queries, block_keys, causal = setting
    sizes = {"block_queries": block_queries, "block_keys": block_keys, "causal": causal}
    return visited_tiles(len(head.q), len(head.k), **sizes), sizes


def dense_scores(head, causal):
    """float64, by numpy alone."""
    q, k, _ = (part.double().numpy() for part in head)
    scores = q @ k.T / math.sqrt(q.shape[1])
    later = np.arange(len(k)) > np.arange(len(q))[:, None] + len(k) - len(q)
    return np.where(later & causal, -np.inf, scores)


# ------------------------------------------------------------------------ the trace


@pytest.mark.parametrize("name", HEADS)
def test_order_and_kinds_are_those_of_visited_tiles(explorers, name):
    for setting in SETTINGS:
        tiles, sizes = tiles_of(HEADS[name], setting)
        state = numbers_of(explorers[name], setting, 1)
        read = [(rows[0] // setting[0], columns[0] // setting[1]) for rows, columns in state["tiles"]]
        assert read == [tile[:2] for tile in tiles]
        ends = [(rows[1], columns[1]) for rows, columns in state["tiles"]]
        lengths = len(HEADS[name].q), len(HEADS[name].k)
        assert ends == [tuple(min((at + 1) * s, n) for at, s, n in zip(tile, setting, lengths)) for tile in tiles]  # noqa: B905
        order = np.zeros_like(state["order"])
        kinds = np.full(order.shape, "skipped", object)
        for place, tile in enumerate(tiles, 1):
            order[tile[:2]], kinds[tile[:2]] = place, tile.kind
        assert np.array_equal(state["order"], order) and np.array_equal(state["kinds"], kinds), sizes


def test_causal_skips_exactly_the_tiles_above_the_diagonal(explorers):
    for name, (block_queries, block_keys) in itertools.product(HEADS, itertools.product(BLOCKS, BLOCKS)):
        shift = len(HEADS[name].k) - len(HEADS[name].q)
        state = numbers_of(explorers[name], (block_queries, block_keys, True), 1)
        for (row, (_, end)), (column, (start, _)) in itertools.product(
            enumerate(state["query blocks"]), enumerate(state["key blocks"])
        ):
            above = start > end - 1 + shift  # the first key lies behind what the last query sees
            assert (state["order"][row, column] == 0) == above
        assert (numbers_of(explorers[name], (block_queries, block_keys, False), 1)["order"] > 0).all()


@pytest.mark.parametrize("name", HEADS)
def test_bytes_are_counted_tile_by_tile_and_end_at_the_formula(explorers, name):
    head, explorer = HEADS[name], explorers[name]
    d_head, (queries, keys) = head.q.shape[1], (len(head.q), len(head.k))
    for setting in SETTINGS:
        (tiles, sizes), moved = tiles_of(head, setting), {}
        last = numbers_of(explorer, setting, len(tiles))
        assert last["curve"][-1] == flash_attention_bytes(queries, keys, d_head, 4, **sizes)
        assert last["standard"] == standard_attention_bytes(queries, keys, d_head, 4)
        rows_seen = 0  # those of programs that have begun, and of programs that have ended
        for step, tile in enumerate(tiles, 1):
            begins = step == 1 or tiles[step - 2].query_block != tile.query_block
            ends = step == len(tiles) or tiles[step].query_block != tile.query_block
            rows_seen = min((tile.query_block + 1) * setting[0], queries) if begins else rows_seen
            rows_done = rows_seen if ends else tile.query_block * setting[0]
            columns = min((tile.key_block + 1) * setting[1], keys) - tile.key_block * setting[1]
            for part in "KV":
                moved[part] = moved.get(part, 0) + 4 * d_head * columns
            expected = moved | {"Q": 4 * d_head * rows_seen, "O": 4 * d_head * rows_done, "LSE": 4 * rows_done}
            shown = numbers_of(explorer, setting, step)["moved"]
            assert shown == {part: amount for part, amount in expected.items() if amount}, (setting, step)
            assert last["curve"][step - 1] == sum(expected.values())


@needs_triton
@pytest.mark.parametrize("name", HEADS)
def test_kernel_and_pytorch_leave_the_same_trace(name):
    for block_queries, block_keys, causal in [(8, 16, True), (16, 8, False), (64, 64, True), (32, 8, True)]:
        sizes = {"block_queries": block_queries, "block_keys": block_keys, "causal": causal}
        kernel, tiled = (record_trace(*HEADS[name], **sizes, run=run) for run in ("interpreter", "torch"))
        assert kernel.steps == tiled.steps and (kernel.source, tiled.source) == (TRITON, TORCH)


@needs_triton
def test_it_shows_the_kernels_trace(explorer):
    assert explorer.state["source"].startswith(TRITON) and "Recorded from the Triton kernel" in explorer.alt


@pytest.mark.parametrize("reason", ["missing", "another version"])
def test_without_triton_it_shows_pytorchs_trace_and_says_so(monkeypatch, reason):
    if reason == "missing":
        monkeypatch.delattr(attention, "triton_tools", raising=False)
        monkeypatch.setitem(sys.modules, "effnlp_lessons.attention.triton_tools", None)
    else:
        tools = pytest.importorskip("effnlp_lessons.attention.triton_tools")

        def refuse():
            raise RuntimeError("written for another version")

        monkeypatch.setattr(tools, "check_version", refuse)
    assert not has_interpreter()
    explorer = FlashExplorer(drawn())
    assert explorer.state["source"].startswith(TORCH) and "not the Triton kernel" in explorer.alt
    assert explorer.state["curve"] == FlashExplorer(drawn(), run="torch").state["curve"]
    with pytest.raises((ImportError, RuntimeError)):
        record_trace(*drawn(), block_queries=8, block_keys=8, causal=False, run="interpreter")


# ------------------------------------------------------------------------ the running softmax


@pytest.mark.parametrize("name", HEADS)
def test_running_maximum_and_sum_are_those_of_the_keys_so_far(explorers, name):
    for setting in [(8, 8, False), (8, 16, True), (16, 8, True), (32, 8, False), (8, 64, True), (64, 32, True)]:
        scores, before, program = dense_scores(HEADS[name], setting[2]), None, None
        for step, tile in enumerate(tiles_of(HEADS[name], setting)[0], 1):
            state = numbers_of(explorers[name], setting, step)
            rows = slice(tile.query_block * setting[0], (tile.query_block + 1) * setting[0])
            seen = scores[rows, : (tile.key_block + 1) * setting[1]]  # of keys so far: the tiles begin with the first
            m = seen.max(1)
            l = np.exp(seen - np.where(np.isfinite(m), m, 0)[:, None]).sum(1)  # noqa: E741
            assert np.allclose(state["m"], m, atol=1e-5, rtol=0) and np.allclose(state["l"], l, atol=1e-5, rtol=1e-5)
            if program != tile.query_block:
                program, before = tile.query_block, (np.full_like(m, -np.inf), np.zeros_like(m))
            with np.errstate(invalid="ignore"):
                kept = np.where(np.isfinite(before[0]), before[1] * np.exp(before[0] - m), 0)
            assert np.allclose(state["m before"], before[0], atol=1e-5, rtol=0)
            assert np.allclose(state["l kept"], kept, atol=1e-5, rtol=1e-5)
            assert np.allclose(state["l kept"] + state["l added"], l, atol=1e-5, rtol=1e-5)
            assert state["program"] == tile.query_block
            assert np.array_equal(state["rose"], np.isfinite(before[0]) & (m > before[0]))
            before = m, l


def test_at_the_end_they_give_the_kernels_lse(explorer):
    _, lse = flash_forward(*(part[None, None] for part in made_up_head()), causal=True)
    tiles = tiles_of(made_up_head(), (16, 8, True))[0]
    for step, tile in enumerate(tiles, 1):
        if step == len(tiles) or tiles[step].query_block != tile.query_block:
            state = numbers_of(explorer, (16, 8, True), step)
            end = state["m"] + np.log(state["l"])
            assert np.allclose(end, lse[0, 0, 16 * tile.query_block :][:16], atol=1e-5, rtol=0)


def test_the_maximum_rises_somewhere_after_the_first_tile(explorer):
    """Otherwise nothing would be seen of the rescaling."""
    assert sum(numbers_of(explorer, (16, 16, False), step)["rose"].sum() for step in range(1, 17)) > 10


# ------------------------------------------------------------------------ what fits


def test_a_tile_needs_what_the_library_says_and_fits_below_it(explorers):
    for (name, explorer), setting, sram in itertools.product(explorers.items(), SETTINGS[1::2], SRAM):
        needed = tile_bytes(*setting[:2], HEADS[name].q.shape[1], 4)
        state = numbers_of(explorer, setting, 1, sram)
        assert sum(state["needs"].values()) == needed == sum(fast_memory(*setting[:2], HEADS[name].q.shape[1]).values())
        assert state["fits"] == (needed <= 1024 * sram) and (state["step"] == 1) == state["fits"]


def test_a_tile_that_does_not_fit_is_refused(explorer):
    state = set_to(explorer, block_queries=64, block_keys=64, sram=32)
    assert not state["fits"] and state["moved"] == {} and state["m"].size == 0 and state["program"] is None
    assert explorer.controls["step"].disabled
    assert "A tile of 64 x 64 does not fit into the fast memory. A tile needs 48.5 of 32.0 KiB" in explorer.line.value
    assert "Fits, and moves least: 64 x 16." in explorer.line.value
    set_to(explorer, sram=64)
    assert not explorer.controls["step"].disabled and explorer.state["moved"]


@pytest.mark.parametrize("causal", [False, True])
def test_the_suggestion_moves_least_of_all_that_fit(explorer, causal):
    d_head = made_up_head().q.shape[1]
    for sram in SRAM:
        chosen = numbers_of(explorer, (8, 8, causal), 1, sram)["suggestion"]
        amounts = {
            (rows, columns): flash_attention_bytes(
                64, 64, d_head, 4, block_queries=rows, block_keys=columns, causal=causal
            )
            for rows, columns in itertools.product(BLOCKS, BLOCKS)
            if tile_bytes(rows, columns, d_head, 4) <= 1024 * sram
        }
        assert amounts[chosen] == min(amounts.values())


def test_where_nothing_fits_it_says_so():
    wide = FlashExplorer(drawn(16, 16, 64), block_queries=8, block_keys=8, sram=8, run="torch")
    assert not wide.state["fits"] and wide.state["suggestion"] is None
    assert "No tile that is offered fits" in wide.line.value


def test_small_tiles_move_more_than_standard_attention(explorer):
    """What the explorer is there to show: rows save traffic, and too few of them cost more than the table of scores."""
    totals = {rows: numbers_of(explorer, (rows, 16, False), 1)["curve"][-1] for rows in BLOCKS}
    standard = explorer.state["standard"]
    assert totals[8] > standard > totals[16] > totals[32] > totals[64]
    assert {numbers_of(explorer, (16, columns, False), 1)["curve"][-1] for columns in BLOCKS} == {totals[16]}


# ------------------------------------------------------------------------ controls


def test_it_opens_at_the_first_tile_of_sixteen():
    explorer = FlashExplorer()
    assert explorer.values == {"step": 1, "causal": OFF, "block_queries": 16, "block_keys": 16, "sram": 16}
    assert explorer.controls["step"].max == 16 and explorer.state["fits"]
    assert explorer.state["moved"] == {"Q": 2048, "K": 2048, "V": 2048} and not explorer.state["rose"].any()


def test_the_slider_has_as_many_places_as_there_are_tiles(explorer):
    for rows, columns, causal in SETTINGS:
        set_to(explorer, block_queries=rows, block_keys=columns, causal=ON if causal else OFF)
        assert explorer.controls["step"].max == len(tiles_of(made_up_head(), (rows, columns, causal))[0])


def test_who_looks_at_the_last_tile_stays_there(explorer):
    set_to(explorer, step=16)
    assert set_to(explorer, block_keys=8)["step"] == 32
    assert set_to(explorer, causal=ON)["step"] == 20
    assert set_to(explorer, step=7)["step"] == 7
    assert set_to(explorer, causal=OFF)["step"] == 7
    assert set_to(explorer, block_queries=64, block_keys=64)["step"] == 1
    assert set_to(explorer, block_queries=8)["step"] == 1  # the only tile is not meant as the last one
    set_to(explorer, step=5)
    assert set_to(explorer, block_queries=32)["step"] == 2  # as far as there are tiles


def test_no_kernel_runs_when_a_control_changes(explorer, monkeypatch):
    def refuse(*args, **values):
        raise AssertionError("nothing may be recorded now")

    for name in ("_record_kernel", "_record_torch", "record_trace", "run_softmax"):
        monkeypatch.setattr(flash_trace, name, refuse)
    for rows, columns, causal in SETTINGS:
        set_to(explorer, block_queries=rows, block_keys=columns, causal=ON if causal else OFF)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"block_queries": 12}, "block_queries must be one of 8, 16, 32, 64, got 12"),
        ({"block_keys": 128}, "block_keys must be one of 8, 16, 32, 64, got 128"),
        ({"sram": 0}, "sram must be one of 8, 16, 32, 64, got 0"),
        ({"step": 0}, "step must be in 1 .. 16, got 0"),
        ({"step": 11, "causal": True}, "step must be in 1 .. 10, got 11"),
        ({"run": "gpu"}, "run must be 'auto', 'interpreter' or 'torch', got 'gpu'"),
        ({"head": drawn()._replace(q=torch.zeros(65, 20))}, r"q must be \(1 to 64, 1 to 64\), got \(65, 20\)"),
        ({"head": drawn()._replace(q=torch.zeros(3))}, r"q must be \(1 to 64, 1 to 64\), got \(3,\)"),
        ({"head": drawn()._replace(k=torch.zeros(50, 21))}, "k must have the width of q, 20, got 21"),
        ({"head": drawn()._replace(v=torch.zeros(49, 20))}, r"v must have the shape of k, \(50, 20\), got \(49, 20\)"),
        ({"head": drawn()._replace(k=torch.zeros(50, 20).double())}, "k must be float32, got torch.float64"),
        ({"head": drawn()._replace(v=torch.full((50, 20), math.nan))}, "v must be finite"),
    ],
)
def test_bad_input_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        FlashExplorer(**values)


# ------------------------------------------------------------------------ picture and words

STATES = [
    {},
    {"causal": ON, "step": 7},
    {"block_queries": 8, "block_keys": 8, "causal": ON, "step": 20},
    {"block_queries": 64, "block_keys": 64, "sram": 8},
    {"block_queries": 64, "block_keys": 8, "step": 8},
]


def test_the_picture_is_drawn_whole_and_another_in_each_state(explorer, shown, drawn_anew):
    pictures = []
    for values in STATES:
        set_to(explorer, **{"block_queries": 16, "block_keys": 16, "sram": 64, "causal": OFF, "step": 1, **values})
        picture = shown(explorer)
        assert picture.shape == (610, 900, 3) and np.array_equal(picture, drawn_anew(explorer))
        assert all(not np.array_equal(picture, other) for other in pictures)
        pictures.append(picture)
    set_to(explorer, **{"block_queries": 16, "block_keys": 16, "sram": 64, "causal": OFF, "step": 1})
    assert np.array_equal(shown(explorer), pictures[0])


def test_the_square_shows_what_is_read_now_to_come_skipped_and_masked(explorer, shown):
    set_to(explorer, causal=ON, step=4)  # the first tile of program 3
    picture = shown(explorer).astype(int)
    left, top, tile = LEFT, TOP, 64
    at = {
        (row, column): picture[top + tile * row + 12, left + tile * column + 4]
        for row in range(4)
        for column in range(4)
    }
    looks = {"read": at[0, 0], "now": at[2, 0], "to come": at[2, 1], "skipped": at[0, 1]}
    expected = [["read", "skipped", "skipped", "skipped"], ["read", "read", "skipped", "skipped"],
                ["now", "to come", "to come", "skipped"], ["to come"] * 4]  # fmt: skip
    for row, column in at:
        assert np.array_equal(at[row, column], looks[expected[row][column]]), (row, column)
    assert len({tuple(look) for look in looks.values()}) == 4
    masked = picture[top + 4 : top + 12, left + 48 : left + 60]  # in the upper right of a tile on the diagonal
    seen = picture[top + 44 : top + 60, left + 30 : left + 40]
    assert len(np.unique(masked.reshape(-1, 3), axis=0)) == 2 and len(np.unique(seen.reshape(-1, 3), axis=0)) == 1


def test_bars_curve_and_memory_show_the_numbers(explorer):
    state = set_to(explorer, block_queries=32, block_keys=8, step=11)
    picture = explorer._picture
    bars, before = picture._maximum, picture._before
    heights = [np.ptp(path.vertices[:4, 1]) for path in bars.get_paths()]
    assert heights == pytest.approx(list(np.abs(state["m"])))
    orange = (bars.get_facecolors()[:, :3] == (230 / 255, 159 / 255, 0)).all(1)
    assert np.array_equal(orange, state["rose"]) and 0 < orange.sum() < 32
    assert [segment[0][1] for segment in before.get_segments()] == pytest.approx(list(state["m before"]))
    lower, upper = picture._kept, picture._added
    assert [path.vertices[:4, 1].max() for path in lower.get_paths()] == pytest.approx(list(state["l kept"]))
    assert [path.vertices[:4, 1].max() for path in upper.get_paths()] == pytest.approx(list(state["l"]))
    (x,), (y,) = picture._dot.get_data()
    assert x == pytest.approx(11 / 16) and y == pytest.approx(sum(state["moved"].values()) / 1024)
    assert list(picture._moved.get_data()[1]) == pytest.approx([0, *np.array(state["curve"][:11]) / 1024])
    assert y < picture._dot.axes.get_ylim()[1]
    widths = [np.ptp(path.vertices[:4, 0]) for path in picture._parts.get_paths()]
    frame = np.ptp(picture._sram.get_data()[0])
    assert np.array(widths) / frame == pytest.approx(np.array(list(state["needs"].values())) / state["sram"])


def test_a_tile_too_large_stands_out_of_the_frame(explorer):
    set_to(explorer, block_queries=64, block_keys=64, sram=8)
    widths = [np.ptp(path.vertices[:4, 0]) for path in explorer._picture._parts.get_paths()]
    assert np.ptp(explorer._picture._sram.get_data()[0]) / sum(widths) == pytest.approx(8 / 48.5)
    assert MEMORY[0] + sum(widths) <= 890


@pytest.mark.parametrize("name", HEADS)
def test_no_words_leave_the_picture_or_meet(explorers, name):
    explorer, picture = explorers[name], explorers[name]._picture
    for rows, columns, causal in [(8, 8, OFF), (8, 8, ON), (16, 64, OFF), (64, 8, ON)]:
        set_to(explorer, block_queries=rows, block_keys=columns, causal=causal)
        for sram, step in ((8, 1), (64, 1), (64, explorer.controls["step"].max)):
            set_to(explorer, sram=sram, step=step)
            renderer = explorer.figure.canvas.get_renderer()
            texts = list(picture._plain.texts)
            for axes in explorer.figure.axes:
                if axes is not picture._plain:
                    texts += axes.get_yticklabels()
            boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
            boxes += [
                (words.text, Bbox.from_bounds(LEFT + words.left, 610 - TOP - words.top - words.height, *words[3:5]))
                for words in words_of(explorer.state, picture._tiles.cell)
            ]
            for place, (text, box) in enumerate(boxes):
                assert box.x0 >= 0 and box.x1 <= 900 and box.y0 >= 0 and box.y1 <= 610, text
                for other, second in boxes[place + 1 :]:
                    assert not box.overlaps(second), (text, other, explorer.values)


@pytest.mark.parametrize("setting", [(8, 8, True), (16, 32, False), (64, 64, True)])
def test_every_tile_has_its_number_in_it(explorer, setting):
    """On the middle of the tile, or where pairs are seen if it is partly masked."""
    state = numbers_of(explorer, setting, 1)
    words = {word.text: word for word in words_of(state, 4)}
    for place, ((a, b), (c, d)) in enumerate(state["tiles"], 1):
        word = words[str(place)]
        assert 4 * c < word.left and word.left + word.width < 4 * d
        assert 4 * a < word.top and word.top + word.height < 4 * b
        x, y = (word.left + word.width // 2) // 4, (word.top + word.height // 2) // 4
        assert state["visible"][y, x]
    assert {f"program {row}" for row in range(1, len(state["query blocks"]) + 1)} <= set(words)
    for text in words:
        assert ink_of(text, words[text].size).max() > 200
    picture = explorer._picture._tiles
    codes, light = picture._draw_setting(state)
    word = words["1"]
    top, left = MARGIN_TOP + word.top, MARGIN_LEFT + word.left
    inked = light[top : top + word.height, left : left + word.width]
    assert np.corrcoef(inked.ravel(), ink_of("1", word.size).ravel())[0, 1] < -0.99


def test_words(explorer):
    state = set_to(explorer, causal=ON, step=9)
    line, alt = explorer.line.value, explorer.alt
    assert "Tile 9 of 10: program 4 (queries 48 to 63) reads keys 32 to 47, no mask." in line
    assert f"Running maximum {state['m'].min():.2f} to {state['m'].max():.2f}, running sum" in line
    assert f"m rose in {state['rose'].sum()} of 16 rows (orange): their l and O are rescaled" in line
    assert f"Moved so far {sum(state['moved'].values()) / 1024:.1f} KiB (Q 8.0, K 18.0, V 18.0, O 6.0, LSE 0.2)" in line
    assert "in all 56.2 KiB, standard attention 96.0 KiB. 10 tiles are read, 4 with a mask, and 6 skipped." in line
    assert "A tile needs 9.1 of 64.0 KiB of fast memory." in line
    assert "4 x 4 tiles, numbered in the order" in alt and explorer.summary(state) in alt
    set_to(explorer, step=10)
    assert (
        list(explorer.state["moved"]) == ["Q", "K", "V", "O", "LSE"]
        and "reads keys 48 to 63, partly masked." in explorer.line.value
    )
    data, metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer.image.value
    assert metadata["image/png"]["alt"] == explorer.alt == explorer.image.tooltip


def test_words_of_a_single_query_and_key(explorers):
    set_to(explorers["single"], block_queries=16, block_keys=16, sram=16, causal=OFF)
    assert "Tile 1 of 1: program 1 (query 0) reads key 0, partly masked." in explorers["single"].line.value
    assert "1 tile is read, 1 with a mask, and 0 skipped" in explorers["single"].line.value


def test_events_are_fast(explorer, assert_fast):
    set_to(explorer, block_queries=8, block_keys=8)
    assert_fast("tile", lambda turn: set_to(explorer, step=50 + turn))
    assert_fast("causal", lambda turn: set_to(explorer, causal=(ON, OFF)[turn % 2]))
    assert_fast("queries a tile", lambda turn: set_to(explorer, block_queries=BLOCKS[turn % 4]))
    set_to(explorer, block_queries=8)
    assert_fast("keys a tile", lambda turn: set_to(explorer, block_keys=BLOCKS[turn % 4]))
    set_to(explorer, block_keys=8)
    assert_fast("fast memory", lambda turn: set_to(explorer, sram=SRAM[turn % 4]))
