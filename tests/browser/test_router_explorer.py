"""The explorer of the router in a real page: what is on the screen is what the class gives after the same moves."""

import pytest

from effnlp_lessons.widgets.router_explorer import EXPERTS, POLICIES, TOP_K, RouterExplorer

SLIDERS = ("tokens", "capacity_factor", "skew")
GROUPS = ("experts", "top_k", "policy")


def words_of(name: str, value: object) -> str:
    return TOP_K[value] if name == "top_k" else str(value)


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        self.lab, self.page, self.twin = lab, lab.page, RouterExplorer()
        self.picture = lab.page.locator("img.explorer-picture")

    def press(self, name: str, key: str, times: int = 1) -> None:
        """Press a key on a slider's handle; the same on the twin."""
        self.page.locator(".explorer-controls .noUi-handle").nth(SLIDERS.index(name)).focus()
        control = self.twin.controls[name]
        for _ in range(times):
            self.page.keyboard.press(key)
            moves = {"ArrowLeft": control.value - control.step, "ArrowRight": control.value + control.step}
            control.value = {"End": control.max, "Home": control.min, **moves}[key]

    def choose(self, name: str, value: object, keyboard: bool = False) -> None:
        """Press a button with the mouse or by keyboard; the same on the twin."""
        button = self.page.get_by_role("button", name=words_of(name, value), exact=True)
        if keyboard:
            button.focus()
            self.page.keyboard.press("Enter")
        else:
            button.click()
        self.twin.controls[name].value = value

    def assert_shows_twin(self) -> None:
        """Line, alt text, buttons, readouts and pixels, in the file and on the screen, are those of the twin."""
        self.lab.settled(self.twin)
        values = self.twin.values
        self.page.wait_for_function(
            """words => JSON.stringify([...document.querySelectorAll('.explorer-controls button.mod-active')]
                .map(node => node.innerText.trim())) === JSON.stringify(words)""",
            arg=[words_of(name, values[name]) for name in GROUPS],
        )
        self.page.wait_for_function(
            """values => JSON.stringify([...document.querySelectorAll('.explorer-controls .widget-readout')]
                .map(node => Number(node.innerText))) === JSON.stringify(values)""",
            arg=[values[name] for name in SLIDERS],
        )
        self.lab.assert_shows(self.twin, "title")


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "router.ipynb", ["from effnlp_lessons.widgets.router_explorer import RouterExplorer", "RouterExplorer()"]
    )
    lab.open("router.ipynb")
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
    assert words.count() == 7 + 3 + 3 + 3 and words.evaluate_all(cut) == []  # buttons, their names, sliders', readouts


@pytest.mark.parametrize("name", SLIDERS)
def test_every_slider_by_keyboard(explorer, name):
    for key, times in (("ArrowLeft", 1), ("Home", 1), ("ArrowRight", 3), ("End", 1)):
        if key == "ArrowLeft" and explorer.twin.values[name] == explorer.twin.controls[name].min:
            continue
        explorer.press(name, key, times)
        explorer.assert_shows_twin()


def test_a_slider_by_mouse(explorer):
    track = explorer.page.locator(".explorer-controls .noUi-target").nth(1).bounding_box()
    explorer.page.mouse.click(track["x"] + track["width"] * 3 / 15, track["y"] + track["height"] / 2)
    explorer.twin.controls["capacity_factor"].value = 1.0  # three of the fifteen steps from 0.25
    explorer.assert_shows_twin()


@pytest.mark.parametrize("keyboard", [False, True])
def test_every_button(explorer, keyboard):
    explorer.press("capacity_factor", "ArrowLeft", 5)
    for name, value in (
        ("policy", POLICIES[1]), ("experts", EXPERTS[2]), ("experts", EXPERTS[0]), ("policy", POLICIES[0]),
        ("top_k", 1), ("experts", EXPERTS[1]), ("top_k", 2),
    ):  # fmt: skip
        explorer.choose(name, value, keyboard)
        explorer.assert_shows_twin()


def test_tokens_vanish_into_the_residual(explorer):
    explorer.press("capacity_factor", "Home")
    explorer.press("tokens", "End")
    explorer.assert_shows_twin()
    assert explorer.twin.state["lost"]


def test_switch_greys_the_policy_out(explorer):
    explorer.choose("top_k", 1)
    explorer.assert_shows_twin()
    disabled = explorer.page.locator(".explorer-controls button:disabled")
    assert disabled.all_inner_texts() == list(POLICIES)
    explorer.choose("top_k", 2)
    explorer.assert_shows_twin()
    assert disabled.count() == 0


def test_a_screen_reader_finds_the_picture_and_the_controls(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    roles = {(n["role"]["value"], n["name"]["value"]) for n in tree["nodes"] if "name" in n and "role" in n}
    assert ("image", explorer.twin.alt) in roles
    assert {("button", "16"), ("button", "random"), ("button", TOP_K[1])} <= roles
