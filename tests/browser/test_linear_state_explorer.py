"""The explorer of linear attention's state in a real page: it shows what the class gives after the same moves."""

import pytest

from effnlp_lessons.widgets.linear_state_explorer import OFF, ON, LinearStateExplorer

WORDS = {"position": "token", "layer": "layer", "head": "head"}
# made up; run here and in the notebook, whose cells have one line each: so the picture begins at a whole pixel
MAKE_NUMBERS = (
    "import torch",
    "from effnlp_lessons.widgets.linear_state_explorer import LinearStateExplorer, Projections",
    "draw = lambda seed: torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(seed))",
    "made_up = Projections([f'word{i}' for i in range(12)], draw(0), draw(1), draw(2))",
)


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        names: dict = {}
        exec("\n".join(MAKE_NUMBERS), names)
        self.lab, self.page = lab, lab.page
        self.twin = LinearStateExplorer("any", read=lambda text: names["made_up"])
        self.picture = lab.page.locator("img.explorer-picture")

    def press(self, name: str, key: str, times: int = 1) -> None:
        """Press a key on a slider; the same on the twin."""
        slider = self.page.locator(".widget-hslider").filter(has=self.page.get_by_text(WORDS[name], exact=True))
        slider.locator(".noUi-handle").focus()
        control = self.twin.controls[name]
        for _ in range(times):
            self.page.keyboard.press(key)
            control.value = control.max if key == "End" else control.value + (1 if key == "ArrowRight" else -1)

    def choose(self, words: str) -> None:
        self.page.get_by_role("button", name=words, exact=True).click()
        self.twin.controls["normaliser"].value = words

    def assert_shows_twin(self) -> None:
        """Line, alt text, sliders, buttons and pixels, in the file and on the screen, are those of the twin."""
        self.lab.settled(self.twin)
        self.page.wait_for_function(
            """words => JSON.stringify([...document.querySelectorAll('.widget-hslider .widget-readout')]
                .map(node => node.innerText.trim())) === JSON.stringify(words)""",
            arg=[str(self.twin.values[name]) for name in WORDS],
        )
        self.page.wait_for_function(
            "words => document.querySelector('.explorer-controls button.mod-active').innerText.trim() === words",
            arg=self.twin.values["normaliser"],
        )
        self.lab.assert_shows(self.twin, "title")


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write("state.ipynb", [*MAKE_NUMBERS, "LinearStateExplorer('any', read=lambda text: made_up)"])
    lab.open("state.ipynb")
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
    assert words.count() == 2 + 1 + 2 * 3 and words.evaluate_all(cut) == []


def test_keyboard_and_buttons(explorer):
    for name, key, times in (
        ("position", "ArrowRight", 4),
        ("layer", "ArrowRight", 1),
        ("head", "End", 1),
        ("position", "ArrowLeft", 2),
    ):
        explorer.press(name, key, times)
        explorer.assert_shows_twin()
    explorer.choose(OFF)
    explorer.assert_shows_twin()
    explorer.press("position", "End")
    explorer.assert_shows_twin()
    explorer.choose(ON)
    assert explorer.twin.values == {"position": 11, "layer": 1, "head": 2, "normaliser": ON}
    explorer.assert_shows_twin()


def test_a_screen_reader_finds_the_picture_by_its_alt_text(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    roles = {(n["role"]["value"], n["name"]["value"]) for n in tree["nodes"] if "name" in n and "role" in n}
    assert ("image", explorer.twin.alt) in roles and ("button", OFF) in roles
