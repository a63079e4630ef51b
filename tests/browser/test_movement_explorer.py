"""The explorer of movement pruning in a real page: what is on the screen is what the class gives then."""

import pytest

from effnlp_lessons.widgets.movement_explorer import WHATS, MovementExplorer

# made up; run here and in the notebook, whose cells have one line each: so the picture begins at a whole pixel
MAKE_NUMBERS = (
    "import torch",
    "from effnlp_lessons.studies.movement import DENSE, LEVELS, METHODS, SHOWN",
    "draw, places = torch.Generator().manual_seed(0), [(m, l, t) for m in METHODS for l in LEVELS for t in SHOWN]",
    "some = lambda: (0.05 * torch.randn(500, generator=draw)).half()",
    "weights = {f'before/{t}/weight': some() for t in SHOWN}",
    "weights |= {f'{m}/{l}/{t}/{kind}': some() for m, l, t in places for kind in ('weight', 'score')}",
    "weights |= {f'{m}/{l}/{t}/mask': torch.rand(500, generator=draw) < l / 100 for m, l, t in places}",
    "models = [{'method': m, 'level': l, 'left': l, 'right': 70 + l / 10 + n} for n, m in enumerate(METHODS) for l in LEVELS]",  # noqa: E501
    "dense = {'method': DENSE, 'level': 100, 'left': 100.0, 'right': 83.0}",
    "summary = {'runs': [{'setting': {'distilled': False}, 'seed': 0, 'models': [dense, *models]}]}",
)
WORDS = {"movement": ("soft", "hard"), "matrix": ("attention, query", "feed-forward, contract"), "what": WHATS.values()}


def made_up() -> MovementExplorer:
    names: dict = {}
    exec("\n".join(MAKE_NUMBERS), names)
    return MovementExplorer(names["summary"], names["weights"])


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        self.lab, self.page, self.twin = lab, lab.page, made_up()
        self.picture = lab.page.locator("img.explorer-picture")

    def press(self, name: str, words: str) -> None:
        """Press a button; the same on the twin."""
        self.page.get_by_role("button", name=words, exact=True).click()
        self.twin.controls[name].value = dict(self.twin.controls[name].options)[words]

    def slide(self, key: str) -> None:
        """A key on the slider; the same on the twin."""
        self.page.locator(".explorer-controls .noUi-handle").first.focus()
        self.page.keyboard.press(key)
        slider = self.twin.controls["level"]
        slider.index += 1 if key == "ArrowRight" else -1

    def assert_shows_twin(self) -> None:
        """Line, alt text, buttons, slider and pixels, in the file and on the screen, are those of the twin."""
        twin = self.twin
        self.lab.settled(twin)
        expected = [dict(map(reversed, twin.controls[name].options))[twin.values[name]] for name in WORDS]
        self.page.wait_for_function(
            """words => JSON.stringify([...document.querySelectorAll('.explorer-controls button.mod-active')]
                .map(button => button.innerText.trim())) === JSON.stringify(words)""",
            arg=expected,
        )
        self.page.wait_for_function(
            "words => document.querySelector('.explorer-controls .widget-readout').innerText.trim() === words",
            arg=f"{twin.values['level']} %",
        )
        self.lab.assert_shows(twin, description="title")


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "movement.ipynb",
        [
            *MAKE_NUMBERS,
            "from effnlp_lessons.widgets.movement_explorer import MovementExplorer",
            "explorer = MovementExplorer(summary, weights); explorer",
        ],
    )
    lab.open("movement.ipynb")
    return lab


@pytest.fixture
def explorer(opened, quiet) -> Page:
    opened.run_all()  # a fresh one
    page = Page(opened)
    page.picture.wait_for()
    page.lab.settled(page.twin)
    return page


def test_it_shows_what_the_class_gives(explorer):
    explorer.assert_shows_twin()
    words = explorer.page.locator(".explorer-controls").locator("button, label:visible")
    cut = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth + 1 || !n.offsetHeight).map(n => n.innerText)"
    assert words.count() == 2 + 3 + 4 + 1 and words.evaluate_all(cut) == []


def test_buttons_change_the_points(explorer):
    for name, choices in WORDS.items():
        for words in choices:
            explorer.press(name, words)
            explorer.assert_shows_twin()


def test_the_slider_goes_down_to_three_per_cent_and_back(explorer):
    levels = []
    for key in ("ArrowLeft", "ArrowRight", "ArrowRight", "ArrowRight"):
        explorer.slide(key)
        explorer.assert_shows_twin()
        levels.append(explorer.twin.state["level"])
    assert levels == [50, 15, 5, 3]


def test_a_screen_reader_finds_picture_and_buttons(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    roles = {(n["role"]["value"], n["name"]["value"]) for n in tree["nodes"] if "name" in n and "role" in n}
    assert any(role == "image" and name == explorer.twin.alt for role, name in roles)
    assert {("button", words) for choices in WORDS.values() for words in choices} <= roles
