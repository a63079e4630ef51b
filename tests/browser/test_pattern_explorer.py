"""The explorer of patterns in a real page: what is on the screen is what the class gives after the same moves."""

import json

import numpy as np
import pytest

from effnlp_lessons.attention.gallery import PATTERNS
from effnlp_lessons.widgets.pattern_explorer import PAINTED, PatternExplorer
from effnlp_lessons.widgets.pattern_picture import LEFT, TOP, cell_pixels

LENGTH = 43  # tokens of the default text
CELL = cell_pixels(LENGTH)


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        page = lab.page
        self.lab, self.page, self.twin = lab, page, PatternExplorer()
        self.picture, self.pad = page.locator("img.explorer-picture"), page.locator(".painted-pad")

    def set(self, **values) -> None:
        """To the twin only."""
        for name, value in values.items():
            self.twin.controls[name].value = value

    def slider(self, name: str):
        return self.page.locator(".widget-hslider").filter(has=self.page.get_by_text(name, exact=True))

    def shown(self, name: str) -> int:
        return int(self.slider(name).locator(".widget-readout").inner_text())

    def press(self, words: str) -> None:
        self.page.locator(".explorer-controls button").get_by_text(words, exact=True).click()

    def assert_shows_twin(self) -> None:
        """Line, alt text and pixels, in the file and on the screen, are those of the twin."""
        twin = self.twin
        on_screen = self.lab.assert_shows(twin)
        # and from the screen the mask can be read, cell by cell
        side = CELL * LENGTH
        middle = on_screen[TOP : TOP + side, LEFT : LEFT + side][CELL // 2 :: CELL, CELL // 2 :: CELL].astype(int)
        assert np.array_equal(middle[..., 2] - middle[..., 0] > 20, twin.state["mask"])

    def place(self, query: int, key: int) -> tuple[float, float]:
        """The middle of a cell in the window."""
        box = self.picture.bounding_box()
        scale = box["width"] / 900
        at = (LEFT + (key + 0.5) * CELL, TOP + (query + 0.5) * CELL)
        return box["x"] + at[0] * scale, box["y"] + at[1] * scale

    def stroke(self, *cells: tuple[int, int]) -> None:
        """Drag with the mouse from cell to cell; the same on the twin."""
        self.pad.scroll_into_view_if_needed()
        self.page.mouse.move(*self.place(*cells[0]))
        self.page.mouse.down()
        for cell in cells[1:]:
            self.page.mouse.move(*self.place(*cell), steps=5)
        self.page.mouse.up()
        kinds = ["down"] + ["move"] * (len(cells) - 1)
        places = [(LEFT + (key + 0.5) * CELL, TOP + (query + 0.5) * CELL) for query, key in cells]
        self.twin.paint([[kind, *place] for kind, place in zip(kinds, places, strict=True)])


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "patterns.ipynb",
        ["from effnlp_lessons.widgets.pattern_explorer import PatternExplorer", "PatternExplorer()"],
    )
    lab.open("patterns.ipynb")
    return lab


@pytest.fixture
def explorer(opened, quiet) -> Page:
    opened.run_all()  # a fresh one
    page = Page(opened)
    page.picture.wait_for()
    opened.settled(page.twin)
    return page


def test_it_shows_what_the_class_gives(explorer):
    explorer.assert_shows_twin()
    words = explorer.page.locator(".explorer-controls").locator("button, label:visible, .widget-readout")
    cut = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth + 1 || !n.offsetHeight).map(n => n.innerText)"
    assert words.count() > 25 and words.evaluate_all(cut) == []
    box, pad = explorer.picture.bounding_box(), explorer.pad.bounding_box()
    assert (pad["x"] - box["x"], pad["y"] - box["y"], pad["width"]) == pytest.approx((LEFT, TOP, 430), abs=0.1)


def test_the_mouse_drags_the_size(explorer):
    handle = explorer.slider("size").locator(".noUi-handle")
    for step in (9, -4):
        before, box = explorer.shown("size"), handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        explorer.page.mouse.move(x, y)
        explorer.page.mouse.down()
        for move in range(1, 9):
            explorer.page.mouse.move(x + move * step, y)
            explorer.page.wait_for_timeout(16)
        explorer.page.mouse.up()
        assert (explorer.shown("size") - before) * step > 0
        explorer.set(size=explorer.shown("size"))
        explorer.assert_shows_twin()


def test_the_keyboard_moves_size_head_layer_and_stack(explorer):
    for name, label, keys, value in (
        ("size", "size", ["ArrowRight"] * 3, 5),
        ("head", "head", ["ArrowLeft"] * 2, 7),
        ("layer", "layer", ["ArrowRight"], 2),
        ("layers", "stacked layers", ["ArrowRight"] * 2, 4),
    ):
        explorer.slider(label).locator(".noUi-handle").focus()
        for key in keys:
            explorer.page.keyboard.press(key)
        explorer.set(**{name: value})
        explorer.assert_shows_twin()


@pytest.mark.parametrize("pattern", ["own block", "fixed", "BigBird"])
def test_another_pattern_brings_its_sizes(explorer, pattern):
    explorer.press(pattern)
    explorer.set(pattern=pattern)
    explorer.assert_shows_twin()
    assert explorer.shown("size") == explorer.twin.values["size"]
    explorer.slider("size").locator(".noUi-handle").focus()
    explorer.page.keyboard.press("Home")
    explorer.set(size=PATTERNS[pattern].sizes(LENGTH)[0])
    explorer.assert_shows_twin()


def test_the_mouse_paints(explorer):
    explorer.press(PAINTED)
    explorer.set(pattern=PAINTED)
    explorer.stroke((3, 4), (3, 20), (18, 20))
    cells = explorer.twin.state["mask"]
    assert cells[3, 4:21].all() and cells[3:19, 20].all() and cells.sum() == 17 + 15
    explorer.assert_shows_twin()
    explorer.press("column")
    explorer.set(shape="column")
    explorer.stroke((7, 0), (7, 1))
    explorer.assert_shows_twin()
    explorer.press("erase")
    explorer.set(brush="erase")
    explorer.stroke((30, 20))
    explorer.assert_shows_twin()
    explorer.press("undo")
    explorer.twin.undo.click()
    explorer.assert_shows_twin()
    assert explorer.twin.state["pairs"] == 17 + 15 + 2 * LENGTH
    explorer.press("clear")
    explorer.twin.clear.click()
    explorer.assert_shows_twin()


def test_a_slow_kernel_loses_no_cell(explorer):
    """Moves come faster than pictures can be drawn: every cell on the way is painted all the same."""
    explorer.press(PAINTED)
    explorer.set(pattern=PAINTED)
    corners = [(row, key) for row in range(2, 10, 2) for key in ((2, 28) if row % 4 == 2 else (28, 2))]
    explorer.stroke(*corners)
    assert explorer.twin.state["pairs"] == 4 * 27 + 3
    explorer.assert_shows_twin()


def test_painting_beyond_the_budget_is_refused_in_words(explorer):
    explorer.press("row")
    explorer.set(shape="row")
    explorer.stroke((12, 30))
    assert explorer.twin.state["pattern"] == "window" and explorer.twin.state["message"].startswith("Not painted")
    explorer.assert_shows_twin()


def test_the_keyboard_paints(explorer):
    page = explorer.page
    page.locator(".explorer-controls input[type=text]").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "painted-pad"
    keys = ["ArrowDown"] * 4 + ["ArrowRight"] * 9 + ["Space", "ArrowUp", "Enter", "Space"]
    for key in keys:
        page.keyboard.press(key)
    explorer.twin.paint([["focus"]])
    explorer.twin.paint([["key", " " if key == "Space" else key] for key in keys])
    spoken = explorer.twin.image.spoken
    assert spoken.startswith("Query hour, key are: weight 0.") and spoken.endswith("left out.")
    page.wait_for_function("words => document.querySelector('.painted-voice').textContent === words", arg=spoken)
    state = explorer.twin.state
    assert state["pattern"] == PAINTED and state["mask"][4, 9] and state["pairs"] == 209 + 1
    explorer.assert_shows_twin()
    # the arrows did not move JupyterLab's cells, and the letters of its shortcuts do nothing
    explorer.pad.focus()
    for key in ("a", "b", "x", "d", "d"):
        page.keyboard.press(key)
    cells = "() => jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model.sharedModel.getSource())"
    assert [source for source in page.evaluate(cells) if source] == [
        "from effnlp_lessons.widgets.pattern_explorer import PatternExplorer",
        "PatternExplorer()",
    ]
    assert page.evaluate("() => jupyterapp.shell.currentWidget.content.activeCellIndex") <= 1


def test_a_text_of_their_own_and_one_that_is_too_long(explorer):
    box = explorer.page.locator(".explorer-controls input[type=text]")
    # as many tokens as the default text, so that the cells stay where they are
    text = explorer.twin.values["text"].replace("sisters", "brothers")
    box.fill(text)
    box.press("Enter")
    explorer.set(text=text)
    assert "brothers" in explorer.twin.state["tokens"]
    explorer.assert_shows_twin()
    for refused in ("word " * 60, ""):
        box.fill(refused)
        box.press("Enter")
        explorer.set(text=refused.strip() and refused)
        assert explorer.twin.state["message"] and "brothers" in explorer.twin.state["tokens"]
        explorer.assert_shows_twin()


def test_a_screen_reader_finds_picture_and_canvas(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    named = {(n["role"]["value"], n["name"]["value"]) for n in tree["nodes"] if "name" in n and "role" in n}
    assert ("image", explorer.twin.alt) in named
    assert ("application", "mask over the head: arrows move, space paints or erases") in named


def test_in_a_narrow_window_the_pointer_still_meets_its_cell(explorer):
    page = explorer.page
    explorer.press(PAINTED)
    explorer.set(pattern=PAINTED)
    page.set_viewport_size({"width": 900, "height": 900})
    try:
        page.wait_for_function(
            "() => document.querySelector('img.explorer-picture').getBoundingClientRect().width < 890"
        )
        box = explorer.picture.bounding_box()
        assert box["height"] / box["width"] == pytest.approx(550 / 900, rel=0.01)
        explorer.stroke((2, 3), (30, 3), (30, 41))
        twin = explorer.twin
        explorer.lab.settled(twin)
        assert twin.state["pairs"] == 29 + 38
    finally:
        page.set_viewport_size({"width": 1_400, "height": 900})
    page.wait_for_function("() => document.querySelector('img.explorer-picture').width === 900")
    explorer.assert_shows_twin()


def test_nothing_flickers_while_painting(explorer):
    """The same node stays, loaded and in place, while many pictures follow each other."""
    explorer.press(PAINTED)
    explorer.set(pattern=PAINTED)
    explorer.page.evaluate(
        """() => {
            const picture = document.querySelector('img.explorer-picture');
            window.seen = {frames: 0, pictures: new Set(), places: new Set(), replaced: 0};
            const look = () => {
                const box = picture.getBoundingClientRect();
                seen.frames += 1;
                seen.pictures.add(picture.src);
                seen.places.add(JSON.stringify([box.x, box.y, box.width, box.height]));
                if (document.querySelector('img.explorer-picture') !== picture) seen.replaced += 1;
                if (!seen.enough) requestAnimationFrame(look) };
            requestAnimationFrame(look) }"""
    )
    explorer.pad.scroll_into_view_if_needed()
    explorer.stroke(*[(row, row) for row in range(2, 40, 3)])
    explorer.assert_shows_twin()
    seen = json.loads(
        explorer.page.evaluate(
            "() => { seen.enough = true; return JSON.stringify({...seen, pictures: seen.pictures.size,"
            " places: seen.places.size}) }"
        )
    )
    assert seen["replaced"] == 0 and seen["pictures"] > 3 and seen["places"] <= 2, seen
