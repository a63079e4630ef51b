"""The explorer of bit budgets in a real page: what is on the screen is what the class gives after the same moves."""

import pytest

from effnlp_lessons.widgets.bit_budget_explorer import BitBudgetExplorer
from effnlp_lessons.widgets.bit_budget_picture import AREA, BOTTOM, middle

# made up; run here and in the notebook, whose cells have one line each: so the picture begins at a whole pixel
MAKE_NUMBERS = (
    "import itertools, random",
    "draw, choices = random.Random(0), list(itertools.product((2, 3), repeat=6))",
    "accuracy = {bits: draw.uniform(66, 72) + 2 * (sum(bits) - 12) for bits in choices}",
    "omega = [31.2, 45.1, 22.0, 18.0, 9.5, 3.2]",
)
CHOICE, REVERSE = (3, 3, 3, 2, 2, 2), (2, 2, 2, 3, 3, 3)


def made_up() -> BitBudgetExplorer:
    names: dict = {}
    exec("\n".join(MAKE_NUMBERS), names)
    return BitBudgetExplorer(names["accuracy"], names["omega"], 2_000)


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        page = lab.page
        self.lab, self.page, self.twin = lab, page, made_up()
        self.picture, self.pad = page.locator("img.explorer-picture"), page.locator(".painted-pad")

    def row(self, name: str):
        return self.page.locator(".widget-toggle-buttons").filter(has=self.page.get_by_text(name, exact=True))

    def press(self, row: str, words: str) -> None:
        self.row(row).get_by_role("button", name=words, exact=True).click()

    def ask(self) -> None:
        """Press the button that shows the sensitivity, or hides it; the same on the twin."""
        self.page.get_by_role("button", name="show the sensitivity").click()
        self.twin.controls["sensitivity"].value = not self.twin.controls["sensitivity"].value

    def click(self, layer: int) -> None:
        """Click a layer of the picture; the same on the twin."""
        self.pad.scroll_into_view_if_needed()
        box = self.picture.bounding_box()
        scale = box["width"] / 900
        self.page.mouse.click(box["x"] + middle(layer) * scale, box["y"] + (BOTTOM - 10) * scale)
        self.twin.act([["down", middle(layer), BOTTOM - 10]])

    def settled(self) -> None:
        self.lab.settled(self.twin)

    def assert_shows_twin(self) -> None:
        """Line, alt text, buttons and pixels, in the file and on the screen, are those of the twin."""
        twin = self.twin
        self.settled()
        asked, choice = (twin.values[name] for name in ("sensitivity", "choice"))
        names = {CHOICE: "the Hessian's choice", REVERSE: "its reverse"}
        expected = [
            *map(str, twin.bits),
            *(["show the sensitivity"] if asked else []),
            *filter(None, [names.get(choice)]),
        ]
        self.page.wait_for_function(
            """words => JSON.stringify([...document.querySelectorAll('.explorer-controls button.mod-active')]
                .map(button => button.innerText.trim())) === JSON.stringify(words)""",
            arg=expected,
        )
        self.lab.assert_shows(twin)


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "bits.ipynb",
        [
            *MAKE_NUMBERS,
            "from effnlp_lessons.widgets.bit_budget_explorer import BitBudgetExplorer",
            "explorer = BitBudgetExplorer(accuracy, omega, 2_000); explorer",
        ],
    )
    lab.open("bits.ipynb")
    return lab


@pytest.fixture
def explorer(opened, quiet) -> Page:
    opened.run_all()  # a fresh one
    page = Page(opened)
    page.picture.wait_for()
    page.settled()
    return page


def bits_in_kernel(explorer) -> tuple[int, ...]:
    """What Python holds in the notebook's kernel."""
    found = explorer.page.evaluate(
        """async () => {
            const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const asked = kernel.requestExecute({code: '', user_expressions: {bits: 'list(explorer.bits)'}});
            const answer = await asked.done;
            return JSON.parse(answer.content.user_expressions.bits.data['text/plain']) }"""
    )
    return tuple(found)


def test_it_shows_what_the_class_gives(explorer):
    explorer.assert_shows_twin()
    words = explorer.page.locator(".explorer-controls").locator("button, label:visible")
    cut = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth + 1 || !n.offsetHeight).map(n => n.innerText)"
    assert words.count() == 6 * (2 + 1) + 1 + 2 + 1 and words.evaluate_all(cut) == []
    tops = [explorer.row(f"layer {m}").bounding_box()["y"] for m in range(1, 7)]
    assert max(tops) - min(tops) < 2, "the rows of buttons do not stand side by side"
    box, pad = explorer.picture.bounding_box(), explorer.pad.bounding_box()
    place = (pad["x"] - box["x"], pad["y"] - box["y"], pad["width"], pad["height"])
    assert place == pytest.approx(AREA, abs=0.1)


def test_clicks_on_the_layers_change_their_bits(explorer):
    for layer, bits in (
        (1, (3, 2, 2, 2, 2, 2)),
        (5, (3, 2, 2, 2, 3, 2)),
        (6, (3, 2, 2, 2, 3, 3)),
        (3, (3, 2, 3, 2, 3, 3)),
    ):
        explorer.click(layer)
        assert explorer.twin.bits == bits
        explorer.assert_shows_twin()
        assert bits_in_kernel(explorer) == bits
    explorer.click(3)
    assert explorer.twin.state["rank"] is not None
    explorer.assert_shows_twin()


def test_the_buttons_change_the_bits(explorer):
    for layer, k, bits in ((2, 3, (2, 3, 2, 2, 2, 2)), (6, 3, (2, 3, 2, 2, 2, 3)), (2, 2, (2, 2, 2, 2, 2, 3))):
        explorer.press(f"layer {layer}", str(k))
        explorer.twin.controls[f"layer_{layer}"].value = k
        assert explorer.twin.bits == bits
        explorer.assert_shows_twin()
    assert bits_in_kernel(explorer) == bits


def test_the_sensitivity_is_shown_when_it_is_asked_for(explorer):
    assert "ensitiv" not in explorer.picture.get_attribute("alt")
    choice = explorer.row("take").get_by_role("button", name="the Hessian's choice")
    assert choice.is_disabled()
    explorer.ask()
    explorer.assert_shows_twin()
    assert "Hessian's choice" in explorer.picture.get_attribute("alt") and choice.is_enabled()
    for words, bits in (("the Hessian's choice", CHOICE), ("its reverse", REVERSE)):
        explorer.press("take", words)
        explorer.twin.controls["choice"].value = bits
        assert explorer.twin.bits == bits
        explorer.assert_shows_twin()
        assert bits_in_kernel(explorer) == bits
    explorer.ask()
    explorer.assert_shows_twin()
    assert choice.is_disabled() and bits_in_kernel(explorer) == REVERSE


def test_the_keyboard_reaches_and_changes_the_layers(explorer):
    page = explorer.page
    page.get_by_role("button", name="show the sensitivity").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "painted-pad"
    keys = ["ArrowUp", "ArrowRight", "ArrowRight", "Space", "ArrowDown", "ArrowUp", "ArrowLeft", "Enter"]
    for key in keys:
        page.keyboard.press(key)
    explorer.twin.act([["focus"]])
    explorer.twin.act([["key", " " if key == "Space" else key] for key in keys])
    assert explorer.twin.bits == (3, 3, 3, 2, 2, 2) and explorer.twin.state["layer"] == 2
    spoken = explorer.twin.image.spoken
    page.wait_for_function("words => document.querySelector('.painted-voice').textContent === words", arg=spoken)
    explorer.assert_shows_twin()
    assert bits_in_kernel(explorer) == (3, 3, 3, 2, 2, 2)


def test_a_screen_reader_finds_picture_layers_and_buttons(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    named = [n for n in tree["nodes"] if "name" in n and "role" in n]
    roles = {(n["role"]["value"], n["name"]["value"]) for n in named}
    assert ("image", explorer.twin.alt) in roles
    assert ("application", explorer.twin.image.label) in roles
    described = {n["description"]["value"] for n in named if n["role"]["value"] == "button" and "description" in n}
    assert {f"layer {m} gets {k} bits" for m in range(1, 7) for k in (2, 3)} <= described
