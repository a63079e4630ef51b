"""The explorer of the three views in a real page: it shows what the class gives after the same moves."""

import pytest

from effnlp_lessons.widgets.three_views_explorer import FOLLOWS, RATES, STATES, STAYS, ThreeViewsExplorer
from effnlp_lessons.widgets.three_views_numbers import KINDS, LEGS, LIN, RANDOM, SIGNALS

GROUPS = {
    "rate": ("sampling rate", RATES),
    "follows": ("model's step", (STAYS, FOLLOWS)),
    "state": ("state N", STATES),
    "kind": ("A", KINDS),
    "signal": ("signal", SIGNALS),
}
SLIDERS = {"step": 0, "position": 1}


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        self.lab, self.page, self.twin = lab, lab.page, ThreeViewsExplorer()
        self.picture = lab.page.locator("img.explorer-picture")
        self.sliders = lab.page.locator(".explorer-controls .widget-hslider")

    def press(self, name: str, key: str, times: int = 1) -> None:
        """Press a key on a slider; the same on the twin."""
        self.sliders.nth(SLIDERS[name]).locator(".noUi-handle").focus()
        for _ in range(times):
            self.page.keyboard.press(key)
            self.place(name, {"End": self.last(name), "Home": 0}.get(key, self.at(name) + (1, -1)[key == "ArrowLeft"]))

    def at(self, name: str) -> int:
        control = self.twin.controls[name]
        return control.index if name == "step" else control.value - 1

    def last(self, name: str) -> int:
        control = self.twin.controls[name]
        return len(control.options) - 1 if name == "step" else control.max - 1

    def place(self, name: str, place: int) -> None:
        """The twin's slider at a place, from 0."""
        control = self.twin.controls[name]
        if name == "step":
            control.index = place
        else:
            control.value = place + 1

    def choose(self, name: str, words: object, keyboard: bool = False) -> None:
        """Press a button with the mouse or by keyboard; the same on the twin."""
        label = self.page.get_by_text(GROUPS[name][0], exact=True)
        group = self.page.locator(".widget-toggle-buttons").filter(has=label)
        button = group.get_by_role("button", name=str(words), exact=True)
        if keyboard:
            button.focus()
            self.page.keyboard.press("Enter")
        else:
            button.click()
        self.twin.controls[name].value = words

    def assert_shows_twin(self) -> None:
        """Line, alt text, sliders, buttons and pixels, in the file and on the screen, are those of the twin."""
        self.lab.settled(self.twin)
        values = self.twin.values
        self.page.wait_for_function(
            """expected => JSON.stringify([...document.querySelectorAll('.explorer-controls .widget-readout')]
                .map(node => node.innerText.trim())) === JSON.stringify(expected)""",
            arg=[f"{values['step']:.4f}", str(values["position"])],
        )
        self.page.wait_for_function(
            """most => Number(document.querySelectorAll('.explorer-controls .widget-hslider .noUi-handle')[1]
                .getAttribute('aria-valuemax')) === most""",
            arg=self.twin.controls["position"].max,
        )
        self.page.wait_for_function(
            """expected => JSON.stringify([...document.querySelectorAll('.explorer-controls button.mod-active')]
                .map(node => node.innerText.trim())) === JSON.stringify(expected)""",
            arg=[str(values[name]) for name in GROUPS],
        )
        self.lab.assert_shows(self.twin, "title")


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "three_views.ipynb",
        ["from effnlp_lessons.widgets.three_views_explorer import ThreeViewsExplorer", "ThreeViewsExplorer()"],
    )
    lab.open("three_views.ipynb")
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
    buttons = sum(len(options) for _, options in GROUPS.values())
    assert words.count() == buttons + len(GROUPS) + 4 and words.evaluate_all(cut) == []


@pytest.mark.parametrize("name", SLIDERS)
def test_sliders_by_keyboard(explorer, name):
    for key, times in (("ArrowRight", 3), ("ArrowLeft", 5), ("End", 1), ("Home", 1)):
        explorer.press(name, key, times)
        explorer.assert_shows_twin()


def test_sliders_by_mouse(explorer):
    for name, place in (("step", 4), ("position", 100)):
        track = explorer.sliders.nth(SLIDERS[name]).locator(".noUi-target")
        box = track.bounding_box()
        at = {"x": box["width"] * place / explorer.last(name), "y": box["height"] / 2}
        track.click(position=at)
        explorer.place(name, place)
        explorer.assert_shows_twin()


@pytest.mark.parametrize("keyboard", [False, True])
def test_every_button(explorer, keyboard):
    for name, words in (
        ("state", 4), ("state", 8), ("state", 32), ("state", 16), ("kind", LIN), ("signal", "impulse"),
        ("kind", RANDOM), ("signal", "chirp"), ("kind", LEGS), ("signal", "noise"), ("rate", "half"),
        ("follows", FOLLOWS), ("rate", "quarter"), ("follows", STAYS), ("signal", "steps"), ("rate", "full"),
    ):  # fmt: skip
        explorer.choose(name, words, keyboard)
        explorer.assert_shows_twin()


def test_the_model_s_step_is_greyed_at_the_full_rate(explorer):
    greyed = explorer.page.locator(".widget-toggle-buttons button[disabled]")
    assert sorted(greyed.all_inner_texts()) == sorted((STAYS, FOLLOWS))
    explorer.choose("rate", "half")
    explorer.assert_shows_twin()
    assert greyed.count() == 0


def test_the_position_follows_the_rate(explorer):
    explorer.press("position", "End")
    explorer.choose("rate", "quarter")
    explorer.assert_shows_twin()
    assert explorer.twin.values["position"] == 32  # the same moment
    explorer.press("position", "ArrowLeft", 2)
    explorer.choose("rate", "half")
    explorer.assert_shows_twin()
    assert explorer.twin.values["position"] == 60


def test_a_screen_reader_finds_the_picture_and_the_controls(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    roles = {(n["role"]["value"], n["name"]["value"]) for n in tree["nodes"] if "name" in n and "role" in n}
    assert ("image", explorer.twin.alt) in roles
    assert {("button", str(words)) for _, options in GROUPS.values() for words in options} <= roles
