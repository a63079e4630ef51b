"""The explorer of masks in a real page: what is on the screen is what the class gives after the same moves."""

import pytest

from effnlp_lessons.widgets.mask_explorer import MaskExplorer

# made up; run here and in the notebook, whose cells have one line each: so the picture begins at a whole pixel
MAKE_NUMBERS = (
    "import torch",
    "draw = lambda rows, columns, seed: torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))",
    "matrices, norms = {'first': draw(384, 384, 0), 'second': draw(64, 128, 1)}, {}",
    "norms |= {name: draw(1, matrix.shape[1], 2)[0].abs() for name, matrix in matrices.items()}",
    "times = {'384 x 384': {'CSR, 50 % zeros': 6.0, 'CSR, 90 % zeros': 1.5, '90 % zeros in the dense kernel': 1.01}}",
)


def made_up() -> MaskExplorer:
    names: dict = {}
    exec("\n".join(MAKE_NUMBERS), names)
    return MaskExplorer(names["matrices"], names["norms"], names["times"])


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        page = lab.page
        self.lab, self.page, self.twin = lab, page, made_up()
        self.picture, self.pad = page.locator("img.explorer-picture"), page.locator(".painted-pad")

    def press(self, name: str, words: str) -> None:
        """Press a button; the same on the twin."""
        self.page.get_by_role("button", name=words, exact=True).click()
        self.twin.controls[name].value = words

    def click(self, x: int, y: int) -> None:
        """Click the matrix at a place from its corner; the same on the twin."""
        self.pad.scroll_into_view_if_needed()
        box, (left, top, _, _) = self.picture.bounding_box(), self.twin.image.area
        scale = box["width"] / 900
        self.page.mouse.click(box["x"] + (left + x) * scale, box["y"] + (top + y) * scale)
        self.twin.act([["down", left + x, top + y]])

    def assert_shows_twin(self) -> None:
        """Line, alt text, buttons, slider and pixels, in the file and on the screen, are those of the twin."""
        twin = self.twin
        self.lab.settled(twin)
        self.page.wait_for_function(
            """words => JSON.stringify([...document.querySelectorAll('.explorer-controls button.mod-active')]
                .map(button => button.innerText.trim())) === JSON.stringify(words)""",
            arg=[twin.values[name] for name in ("matrix", "criterion", "structure")],
        )
        self.page.wait_for_function(
            "words => document.querySelector('.explorer-controls .widget-readout').innerText.trim() === words",
            arg=str(twin.values["sparsity"]),
        )
        self.lab.assert_shows(twin)


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "masks.ipynb",
        [
            *MAKE_NUMBERS,
            "from effnlp_lessons.widgets.mask_explorer import MaskExplorer",
            "explorer = MaskExplorer(matrices, norms, times); explorer",
        ],
    )
    lab.open("masks.ipynb")
    return lab


@pytest.fixture
def explorer(opened, quiet) -> Page:
    opened.run_all()  # a fresh one
    page = Page(opened)
    page.picture.wait_for()
    page.lab.settled(page.twin)
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
    assert words.evaluate_all(cut) == []
    box, pad = explorer.picture.bounding_box(), explorer.pad.bounding_box()
    place = (pad["x"] - box["x"], pad["y"] - box["y"], pad["width"], pad["height"])
    assert place == pytest.approx(explorer.twin.image.area, abs=0.1)


def test_buttons_and_clicks(explorer):
    for name, words in (
        ("criterion", "random"),
        ("structure", "rows"),
        ("criterion", "magnitude x input"),
        ("structure", "blocks 32 x 32"),
    ):
        explorer.press(name, words)
        explorer.assert_shows_twin()
    explorer.click(200, 90)
    assert explorer.twin.state["corner"] == (96, 224)
    explorer.assert_shows_twin()
    explorer.press("matrix", "second")
    explorer.assert_shows_twin()
    explorer.click(150, 5)
    explorer.assert_shows_twin()
    assert in_kernel(explorer, "explorer.state['kept']") == explorer.twin.state["kept"]


def test_the_slider_by_keyboard_and_2_of_4(explorer):
    handle = explorer.page.locator(".explorer-controls .noUi-handle").first
    handle.focus()
    for _ in range(3):
        explorer.page.keyboard.press("ArrowRight")
    explorer.twin.controls["sparsity"].value = 53
    explorer.assert_shows_twin()
    assert in_kernel(explorer, "explorer.state['bytes']['csr']") == explorer.twin.state["bytes"]["csr"]
    explorer.press("structure", "2:4")
    assert explorer.twin.values["sparsity"] == 50
    explorer.assert_shows_twin()
    assert explorer.page.locator(".explorer-controls .noUi-target[disabled]").count() == 1


def test_the_keyboard_reaches_the_picture(explorer):
    page = explorer.page
    explorer.pad.focus()
    keys = ["ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowDown"]
    for key in keys:
        page.keyboard.press(key)
    explorer.twin.act([["focus"]])
    explorer.twin.act([["key", key] for key in keys])
    assert explorer.twin.state["corner"] == (64, 32)
    spoken = explorer.twin.image.spoken
    page.wait_for_function("words => document.querySelector('.painted-voice').textContent === words", arg=spoken)
    explorer.assert_shows_twin()
    # and it is reached with the Tab key
    page.locator(".explorer-controls .noUi-handle").first.focus()
    for _ in range(2):  # the slider's number takes the focus too
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.className") == "painted-pad":
            break
    assert page.evaluate("() => document.activeElement.className") == "painted-pad"


def test_a_screen_reader_finds_picture_and_matrix(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    roles = {(n["role"]["value"], n["name"]["value"]) for n in tree["nodes"] if "name" in n and "role" in n}
    assert ("image", explorer.twin.alt) in roles
    assert ("application", explorer.twin.image.label) in roles
