"""The explorer of layer mappings in a real page: what is on the screen is what the class gives after the same moves."""

import pytest

from effnlp_lessons.widgets.layer_mapping_explorer import (
    AREA,
    BOX_WIDTH,
    STUDENT_LEFT,
    TEACHER_LEFT,
    LayerMappingExplorer,
    student_row,
    teacher_row,
)

# made up; run here and in the notebook, whose cells have one line each: so the picture begins at a whole pixel
MAKE_SCORES = (
    "import itertools, random",
    "draw, mappings = random.Random(0), list(itertools.combinations(range(1, 7), 3))",
    "seeds = lambda low, high: [draw.uniform(low, high) for _ in range(3)]",
    "measures = {'agreement': (80, 90), 'accuracy': (70, 85), 'loss': (0.2, 0.9)}",
    "scores = {g: {name: seeds(*limits) for name, limits in measures.items()} for g in mappings}",
)


def made_up() -> dict:
    names: dict = {}
    exec("\n".join(MAKE_SCORES), names)
    return names["scores"]


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        page = lab.page
        self.lab, self.page, self.twin = lab, page, LayerMappingExplorer(made_up())
        self.picture, self.pad = page.locator("img.explorer-picture"), page.locator(".painted-pad")

    def row(self, name: str):
        return self.page.locator(".widget-toggle-buttons").filter(has=self.page.get_by_text(name, exact=True))

    def press(self, row: str, words: str) -> None:
        self.row(row).get_by_role("button", name=words, exact=True).click()

    def settled(self) -> None:
        self.lab.settled(self.twin)

    def assert_shows_twin(self) -> None:
        """Line, alt text, buttons and pixels, in the file and on the screen, are those of the twin."""
        twin = self.twin
        self.settled()
        strategy = twin.values["strategy"]
        expected = [*map(str, twin.mapping), *([strategy] if strategy else [])]
        self.page.wait_for_function(
            """words => JSON.stringify([...document.querySelectorAll('.widget-toggle-buttons button.mod-active')]
                .map(button => button.innerText.trim())) === JSON.stringify(words)""",
            arg=expected,
        )
        self.lab.assert_shows(twin)

    def in_window(self, x: float, y: float) -> tuple[float, float]:
        """A place of the picture in the window."""
        box = self.picture.bounding_box()
        scale = box["width"] / 900
        return box["x"] + x * scale, box["y"] + y * scale

    def drag(self, *places: tuple[float, float], steps: int = 6) -> None:
        """Drag with the mouse from place to place of the picture; the same on the twin."""
        self.pad.scroll_into_view_if_needed()
        self.page.mouse.move(*self.in_window(*places[0]))
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*self.in_window(*place), steps=steps)
        self.page.mouse.up()
        self.twin.act([["down", *places[0]], *(["move", *place] for place in places[1:])])


def end(layer: int) -> tuple[float, float]:
    """Where a line ends at this teacher layer."""
    return TEACHER_LEFT, teacher_row(layer)


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "mappings.ipynb",
        [
            *MAKE_SCORES,
            "from effnlp_lessons.widgets.layer_mapping_explorer import LayerMappingExplorer",
            "explorer = LayerMappingExplorer(scores); explorer",
        ],
    )
    lab.open("mappings.ipynb")
    return lab


@pytest.fixture
def explorer(opened, quiet) -> Page:
    opened.run_all()  # a fresh one
    page = Page(opened)
    page.picture.wait_for()
    page.settled()
    return page


def mapping_in_kernel(explorer) -> list[int]:
    """What Python holds in the notebook's kernel."""
    return explorer.page.evaluate(
        """async () => {
            const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const asked = kernel.requestExecute({code: '', user_expressions: {mapping: 'list(explorer.mapping)'}});
            const answer = await asked.done;
            return JSON.parse(answer.content.user_expressions.mapping.data['text/plain']) }"""
    )


def test_it_shows_what_the_class_gives(explorer):
    explorer.assert_shows_twin()
    words = explorer.page.locator(".explorer-controls").locator("button, label:visible")
    cut = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth + 1 || !n.offsetHeight).map(n => n.innerText)"
    assert words.count() == 3 * (4 + 1) + 3 + 1 and words.evaluate_all(cut) == []
    rows = [*(f"student layer {m} learns from" for m in (1, 2, 3)), "strategy"]
    tops = [explorer.row(name).bounding_box()["y"] for name in rows]
    assert max(tops) - min(tops) < 2, "the rows of buttons do not stand side by side"
    box, pad = explorer.picture.bounding_box(), explorer.pad.bounding_box()
    place = (pad["x"] - box["x"], pad["y"] - box["y"], pad["width"], pad["height"])
    assert place == pytest.approx(AREA, abs=0.1)


def test_the_mouse_drags_a_lines_end(explorer):
    explorer.drag(end(4), end(5))
    assert explorer.twin.mapping == (2, 5, 6)
    explorer.assert_shows_twin()
    assert mapping_in_kernel(explorer) == [2, 5, 6]
    explorer.drag(end(2), end(1))
    assert explorer.twin.mapping == (1, 5, 6)
    explorer.assert_shows_twin()
    assert mapping_in_kernel(explorer) == [1, 5, 6]


def test_a_dragged_line_pushes_the_others_and_they_come_back(explorer):
    explorer.drag(end(2), end(4))
    assert explorer.twin.mapping == (4, 5, 6) and "pushed along" in explorer.twin.state["message"]
    explorer.assert_shows_twin()
    explorer.drag(end(6), end(1))  # the third: below it the two others need a layer each
    assert explorer.twin.mapping == (1, 2, 3) and "stops at teacher layer 3" in explorer.twin.state["message"]
    explorer.assert_shows_twin()
    explorer.drag(end(1), end(4), end(2), end(1))
    assert explorer.twin.mapping == (1, 2, 3) and explorer.twin.state["message"] == ""
    explorer.assert_shows_twin()
    assert mapping_in_kernel(explorer) == [1, 2, 3]


def test_a_line_can_be_pulled_from_the_student_to_the_teacher(explorer):
    explorer.drag((STUDENT_LEFT + BOX_WIDTH / 2, student_row(1)), (TEACHER_LEFT + BOX_WIDTH / 2, teacher_row(3)))
    assert explorer.twin.mapping == (3, 4, 6)
    explorer.assert_shows_twin()
    explorer.drag((TEACHER_LEFT + BOX_WIDTH / 2, teacher_row(1)), end(6))  # nothing to pick up there
    explorer.assert_shows_twin()
    assert mapping_in_kernel(explorer) == [3, 4, 6]


def test_the_pointer_leaves_the_lines_area_while_it_drags(explorer):
    explorer.drag(end(6), (TEACHER_LEFT + 300, teacher_row(5)), steps=20)
    assert explorer.twin.mapping == (2, 4, 5)
    explorer.assert_shows_twin()


def test_the_buttons_move_the_lines(explorer):
    for row, words, mapping in (
        ("student layer 1 learns from", "4", (4, 5, 6)),
        ("student layer 2 learns from", "2", (1, 2, 6)),
        ("strategy", "bottom", (1, 2, 3)),
        ("student layer 3 learns from", "5", (1, 2, 5)),
        ("strategy", "uniform", (2, 4, 6)),
    ):
        explorer.press(row, words)
        if row == "strategy":
            explorer.twin.controls["strategy"].value = words
        else:
            explorer.twin.controls[f"layer_{row.split()[2]}"].value = int(words)
        assert explorer.twin.mapping == mapping
        explorer.assert_shows_twin()
    assert mapping_in_kernel(explorer) == [2, 4, 6]


def test_the_keyboard_reaches_and_moves_the_lines(explorer):
    page = explorer.page
    explorer.row("strategy").locator("button").last.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "painted-pad"
    keys = ["ArrowRight", "ArrowUp", "ArrowRight", "ArrowDown", "Space", "ArrowDown", "ArrowLeft", "ArrowUp"]
    for key in keys:
        page.keyboard.press(key)
    explorer.twin.act([["focus"]])
    explorer.twin.act([["key", " " if key == "Space" else key] for key in keys])
    assert explorer.twin.mapping == (2, 4, 5) and explorer.twin.state["layer"] == 1
    spoken = explorer.twin.image.spoken
    page.wait_for_function("words => document.querySelector('.painted-voice').textContent === words", arg=spoken)
    explorer.assert_shows_twin()
    assert mapping_in_kernel(explorer) == [2, 4, 5]


def test_a_screen_reader_finds_picture_lines_and_buttons(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    named = [n for n in tree["nodes"] if "name" in n and "role" in n]
    roles = {(n["role"]["value"], n["name"]["value"]) for n in named}
    assert ("image", explorer.twin.alt) in roles
    assert ("application", explorer.twin.image.label) in roles
    described = {n["description"]["value"] for n in named if n["role"]["value"] == "button" and "description" in n}
    assert {f"student layer {m} learns from teacher layer {m + 1}" for m in (1, 2, 3)} <= described
    assert "teacher layers 4, 5 and 6" in described


def test_in_a_narrow_window_the_pointer_still_meets_the_lines(explorer):
    page = explorer.page
    page.set_viewport_size({"width": 900, "height": 900})
    try:
        page.wait_for_function(
            "() => document.querySelector('img.explorer-picture').getBoundingClientRect().width < 890"
        )
        explorer.drag(end(4), end(3))
        explorer.settled()
        assert explorer.twin.mapping == (2, 3, 6) and mapping_in_kernel(explorer) == [2, 3, 6]
    finally:
        page.set_viewport_size({"width": 1_400, "height": 900})
    page.wait_for_function("() => document.querySelector('img.explorer-picture').width === 900")
    explorer.assert_shows_twin()
