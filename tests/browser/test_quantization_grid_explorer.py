"""The explorer of grids in a real page: what is on the screen is what the class gives after the same moves."""

import pytest
import torch

from effnlp_lessons.widgets.quantization_grid_explorer import QuantizationGridExplorer
from effnlp_lessons.widgets.quantization_grid_picture import AREA, pixel_of

# made up; run here and in the notebook, whose cells have one line each: so the picture begins at a whole pixel
MAKE_MATRICES = (
    "import torch",
    "draw = lambda rows, columns, seed: torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 10",
    "matrices = {'first': draw(16, 256, 0), 'second': draw(8, 384, 1) ** 3}",
)
HEIGHT = 100  # of the moved weight, in the picture


def made_up() -> dict[str, torch.Tensor]:
    names: dict = {}
    exec("\n".join(MAKE_MATRICES), names)
    return names["matrices"]


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        page = lab.page
        self.lab, self.page, self.twin = lab, page, QuantizationGridExplorer(made_up())
        self.picture, self.pad = page.locator("img.explorer-picture"), page.locator(".painted-pad")

    def row(self, name: str):
        return self.page.locator(".widget-toggle-buttons").filter(has=self.page.get_by_text(name, exact=True))

    def slider(self, name: str):
        return self.page.locator(".widget-hslider").filter(has=self.page.get_by_text(name, exact=True))

    def press(self, row: str, words: str) -> None:
        self.row(row).get_by_role("button", name=words, exact=True).click()

    def settled(self) -> None:
        self.lab.settled(self.twin)

    def assert_shows_twin(self) -> None:
        """Line, alt text, controls and pixels, in the file and on the screen, are those of the twin."""
        twin = self.twin
        self.settled()
        values = twin.values
        self.page.wait_for_function(
            """words => JSON.stringify([...document.querySelectorAll('.widget-toggle-buttons button.mod-active')]
                .map(button => button.innerText.trim())) === JSON.stringify(words)""",
            arg=[values["matrix"], values["granularity"], values["kind"]],
        )
        self.page.wait_for_function(
            """words => JSON.stringify([...document.querySelectorAll('.widget-hslider .widget-readout')]
                .map(node => node.innerText.trim().replace('\u2212', '-'))) === JSON.stringify(words)""",
            arg=[str(values["bits"]), str(values["share"]), f"{values['outlier']:.1f}"],
        )
        self.lab.assert_shows(twin)

    def in_window(self, x: float, y: float) -> tuple[float, float]:
        """A place of the picture in the window."""
        box = self.picture.bounding_box()
        scale = box["width"] / 900
        return box["x"] + x * scale, box["y"] + y * scale

    def drag(self, *multiples: float, steps: int = 8) -> None:
        """Drag the weight with the mouse from place to place of the axis; the same on the twin."""
        places = [(pixel_of(multiple), HEIGHT) for multiple in multiples]
        self.pad.scroll_into_view_if_needed()
        self.page.mouse.move(*self.in_window(*places[0]))
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*self.in_window(*place), steps=steps)
        self.page.mouse.up()
        self.twin.act([["down", *places[0]], *(["move", *place] for place in places[1:])])


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "grids.ipynb",
        [
            *MAKE_MATRICES,
            "from effnlp_lessons.widgets.quantization_grid_explorer import QuantizationGridExplorer",
            "explorer = QuantizationGridExplorer(matrices); explorer",
        ],
    )
    lab.open("grids.ipynb")
    return lab


@pytest.fixture
def explorer(opened, quiet) -> Page:
    opened.run_all()  # a fresh one
    page = Page(opened)
    page.picture.wait_for()
    page.settled()
    return page


def in_kernel(explorer, expression: str):
    """What Python holds in the notebook's kernel: a number."""
    return explorer.page.evaluate(
        """async (expression) => {
            const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const asked = kernel.requestExecute({code: '', user_expressions: {value: expression}});
            const answer = await asked.done;
            return JSON.parse(answer.content.user_expressions.value.data['text/plain']) }""",
        expression,
    )


def test_it_shows_what_the_class_gives(explorer):
    explorer.assert_shows_twin()
    words = explorer.page.locator(".explorer-controls").locator("button, label:visible")
    cut = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth + 1 || !n.offsetHeight).map(n => n.innerText)"
    assert words.count() == 2 + 4 + 2 + 3 + 3 and words.evaluate_all(cut) == []
    for names in (("one grid for each", "grid"), ("bits", "range (%)", "moved weight (x largest)")):
        find = explorer.row if "grid" in names else explorer.slider
        tops = [find(name).bounding_box()["y"] for name in names]
        assert max(tops) - min(tops) < 2, f"{names} do not stand side by side"
    box, pad = explorer.picture.bounding_box(), explorer.pad.bounding_box()
    place = (pad["x"] - box["x"], pad["y"] - box["y"], pad["width"], pad["height"])
    assert place == pytest.approx(AREA, abs=0.1)


def test_the_mouse_drags_the_weight(explorer):
    explorer.drag(0, 8)
    assert explorer.twin.values["outlier"] == 8
    explorer.assert_shows_twin()
    assert in_kernel(explorer, "explorer.state['outlier']") == 8
    explorer.drag(8, -3.2)
    explorer.assert_shows_twin()
    assert in_kernel(explorer, "explorer.state['outlier']") == -3.2
    assert in_kernel(explorer, "explorer.state['value']") == explorer.twin.state["value"]


def test_the_pointer_leaves_the_axis_while_it_drags(explorer):
    explorer.drag(1, 9, 2.5, steps=20)
    assert explorer.twin.values["outlier"] == 2.5
    explorer.assert_shows_twin()


def test_the_buttons_choose(explorer):
    explorer.drag(0, 6)
    for row, words, control in (
        ("one grid for each", "group 64", "granularity"),
        ("grid", "affine", "kind"),
        ("matrix", "second", "matrix"),
        ("one grid for each", "row", "granularity"),
    ):
        explorer.press(row, words)
        explorer.twin.controls[control].value = words
        explorer.assert_shows_twin()
    assert in_kernel(explorer, "explorer.state['grids']") == explorer.twin.state["grids"] == 8


def test_the_sliders_work_by_keyboard(explorer):
    page = explorer.page
    for name, control, key, count, value in (
        ("bits", "bits", "ArrowLeft", 4, 4),
        ("range (%)", "share", "ArrowLeft", 3, 97),
        ("moved weight (x largest)", "outlier", "ArrowRight", 7, 0.7),
        ("moved weight (x largest)", "outlier", "End", 1, 8.0),
    ):
        explorer.slider(name).locator(".noUi-handle").focus()
        for _ in range(count):
            page.keyboard.press(key)
        explorer.twin.controls[control].value = value
        explorer.assert_shows_twin()
    assert in_kernel(explorer, "explorer.values['bits']") == 4
    assert in_kernel(explorer, "explorer.state['value']") == explorer.twin.state["value"]


def test_the_keyboard_reaches_and_moves_the_weight(explorer):
    page = explorer.page
    explorer.slider("moved weight (x largest)").locator(".noUi-handle").focus()
    page.keyboard.press("Tab")
    if page.evaluate("() => document.activeElement.className") != "painted-pad":
        page.keyboard.press("Tab")  # the slider's number takes the focus too
    assert page.evaluate("() => document.activeElement.className") == "painted-pad"
    keys = ["ArrowUp", "ArrowUp", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowLeft"]
    for key in keys:
        page.keyboard.press(key)
    explorer.twin.act([["focus"]])
    explorer.twin.act([["key", key] for key in keys])
    assert explorer.twin.values["outlier"] == 0.9
    spoken = explorer.twin.image.spoken
    page.wait_for_function("words => document.querySelector('.painted-voice').textContent === words", arg=spoken)
    explorer.assert_shows_twin()
    explorer.pad.focus()
    page.keyboard.press("Space")
    explorer.twin.act([["key", " "]])
    assert explorer.twin.values["outlier"] == 0
    explorer.assert_shows_twin()


def test_a_screen_reader_finds_picture_axis_and_buttons(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    named = [n for n in tree["nodes"] if "name" in n and "role" in n]
    roles = {(n["role"]["value"], n["name"]["value"]) for n in named}
    assert ("image", explorer.twin.alt) in roles
    assert ("application", explorer.twin.image.label) in roles
    assert {("button", words) for words in ("tensor", "row", "group 128", "group 64", "affine")} <= roles


def test_in_a_narrow_window_the_pointer_still_meets_the_axis(explorer):
    page = explorer.page
    page.set_viewport_size({"width": 900, "height": 900})
    try:
        page.wait_for_function(
            "() => document.querySelector('img.explorer-picture').getBoundingClientRect().width < 890"
        )
        explorer.drag(0, 5)
        explorer.settled()
        assert explorer.twin.values["outlier"] == 5 and in_kernel(explorer, "explorer.state['outlier']") == 5
    finally:
        page.set_viewport_size({"width": 1_400, "height": 900})
    page.wait_for_function("() => document.querySelector('img.explorer-picture').width === 900")
    explorer.assert_shows_twin()
