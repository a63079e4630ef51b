"""The explorer of FlashAttention's tiles in a real page: it shows what the class gives after the same moves."""

import pytest

from effnlp_lessons.widgets.flash_explorer import OFF, ON, FlashExplorer

GROUPS = {"causal": "causal", "block_queries": "queries a tile", "block_keys": "keys a tile", "sram": "SRAM (KiB)"}


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        self.lab, self.page, self.twin = lab, lab.page, FlashExplorer()
        self.picture = lab.page.locator("img.explorer-picture")
        self.slider = lab.page.locator(".explorer-controls .widget-hslider")

    def press(self, key: str, times: int = 1) -> None:
        """Press a key on the slider; the same on the twin."""
        self.slider.locator(".noUi-handle").focus()
        control = self.twin.controls["step"]
        for _ in range(times):
            self.page.keyboard.press(key)
            control.value = {"End": control.max, "Home": 1, "ArrowLeft": control.value - 1}.get(key, control.value + 1)

    def button(self, name: str, words: object):
        group = self.page.locator(".widget-toggle-buttons").filter(
            has=self.page.locator("label", has_text=GROUPS[name])
        )
        return group.get_by_role("button", name=str(words), exact=True)

    def choose(self, name: str, words: object, keyboard: bool = False) -> None:
        """Press a button with the mouse or by keyboard; the same on the twin."""
        button = self.button(name, words)
        if keyboard:
            button.focus()
            self.page.keyboard.press("Enter")
        else:
            button.click()
        self.twin.controls[name].value = words

    def assert_shows_twin(self) -> None:
        """Line, alt text, slider, buttons and pixels, in the file and on the screen, are those of the twin."""
        self.lab.settled(self.twin)
        control = self.twin.controls["step"]
        self.page.wait_for_function(
            """([value, least, most, disabled]) => {
                const slider = document.querySelector('.explorer-controls .widget-hslider');
                const handle = slider.querySelector('.noUi-handle');
                return slider.querySelector('.widget-readout').innerText.trim() === value
                    && Number(handle.getAttribute('aria-valuemin')) === least
                    && Number(handle.getAttribute('aria-valuemax')) === most
                    && slider.querySelector('.noUi-target').hasAttribute('disabled') === disabled }""",
            arg=[str(control.value), control.min, control.max, control.disabled],
        )
        self.page.wait_for_function(
            """words => JSON.stringify([...document.querySelectorAll('.explorer-controls button.mod-active')]
                .map(node => node.innerText.trim())) === JSON.stringify(words)""",
            arg=[str(self.twin.values[name]) for name in GROUPS],
        )
        self.lab.assert_shows(self.twin, "title")


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "flash.ipynb", ["from effnlp_lessons.widgets.flash_explorer import FlashExplorer", "FlashExplorer()"]
    )
    lab.open("flash.ipynb")
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
    assert words.count() == 2 + 3 * 4 + 5 + 1 and words.evaluate_all(cut) == []


def test_slider_by_keyboard_and_mouse(explorer):
    for key, times in (("ArrowRight", 5), ("ArrowLeft", 2), ("End", 1), ("Home", 1)):
        explorer.press(key, times)
        explorer.assert_shows_twin()
    track = explorer.slider.locator(".noUi-target").bounding_box()
    explorer.page.mouse.click(track["x"] + track["width"] * 6 / 15, track["y"] + track["height"] / 2)
    explorer.twin.controls["step"].value = 7  # six of the fifteen steps from tile 1
    explorer.assert_shows_twin()


@pytest.mark.parametrize("keyboard", [False, True])
def test_every_button(explorer, keyboard):
    explorer.press("ArrowRight", 3)
    for name, words in (
        ("causal", ON), ("block_queries", 8), ("block_keys", 32), ("sram", 8), ("sram", 64), ("block_queries", 64),
        ("block_keys", 64), ("sram", 32), ("block_keys", 16), ("block_queries", 32), ("causal", OFF),
    ):  # fmt: skip
        explorer.choose(name, words, keyboard)
        explorer.assert_shows_twin()


def test_a_tile_that_does_not_fit_greys_the_slider(explorer):
    explorer.choose("sram", 8)
    explorer.assert_shows_twin()
    assert not explorer.twin.state["fits"] and explorer.slider.locator(".noUi-target[disabled]").count() == 1
    explorer.choose("sram", 16)
    explorer.press("ArrowRight")
    explorer.assert_shows_twin()
    assert explorer.twin.values["step"] == 2


def test_the_slider_follows_the_number_of_tiles(explorer):
    explorer.press("End")
    explorer.choose("block_keys", 8)
    explorer.assert_shows_twin()
    assert explorer.twin.values["step"] == 32  # who was at the last tile is still there
    explorer.press("ArrowLeft", 3)
    explorer.choose("causal", ON)
    explorer.assert_shows_twin()
    assert explorer.twin.values["step"] == explorer.twin.controls["step"].max == 20


def test_a_screen_reader_finds_the_picture_and_the_controls(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    roles = {(n["role"]["value"], n["name"]["value"]) for n in tree["nodes"] if "name" in n and "role" in n}
    assert ("image", explorer.twin.alt) in roles
    assert {("button", ON), ("button", OFF), ("button", "64")} <= roles
