"""The explorer of the omitted digit in a real page: every state is compared with what the Python class gives for it."""

import pytest

from effnlp_lessons.widgets.omitted_digit_explorer import SHIFTS, OmittedDigitExplorer


class Page:
    """The explorer on the page: its handle and what it shows. `expected` is put into the state that is awaited."""

    def __init__(self, lab) -> None:
        page = lab.page
        self.lab, self.page, self.expected = lab, page, OmittedDigitExplorer()
        self.handle = page.locator(".widget-hslider .noUi-handle")
        self.picture = page.locator("img.explorer-picture")

    @property
    def shift(self) -> float:
        return float(self.page.locator(".widget-hslider .widget-readout").inner_text())

    def assert_shows(self, **choices) -> None:
        """Line, title and pixels, in the file and on the screen, are those of this state."""
        for name, value in choices.items():
            self.expected.controls[name].value = value
        self.lab.assert_shows(self.expected, "title")

    def tab_to(self, button: str, key: str = "Tab") -> None:
        for _ in range(16):
            self.page.keyboard.press(key)
            if self.page.evaluate("() => document.activeElement.textContent") == button:
                return
        pytest.fail(f"{key} does not lead to {button}")


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "omitted_digit.ipynb",
        [
            "from effnlp_lessons.widgets.omitted_digit_explorer import OmittedDigitExplorer",
            "OmittedDigitExplorer()",
        ],
    )
    lab.open("omitted_digit.ipynb")
    return lab


@pytest.fixture
def explorer(opened, quiet) -> Page:
    opened.run_all()  # a fresh explorer, without a shift
    page = Page(opened)
    page.picture.wait_for()
    page.assert_shows()
    return page


def test_no_word_of_the_controls_is_cut_and_no_row_wraps(explorer):
    rows = explorer.page.locator(".explorer-controls")
    assert rows.count() == 3
    for row in rows.all():
        words = row.locator(".widget-label:not(:empty), button, .widget-readout")
        assert words.count() >= 2
        cut = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth || !n.offsetHeight).map(n => n.innerText)"
        assert words.evaluate_all(cut) == []
        tops = words.evaluate_all("nodes => nodes.map(n => n.getBoundingClientRect().top)")
        assert max(tops) - min(tops) < 10


def test_the_mouse_drags_the_shift(explorer):
    for moves, step in ((6, 12), (10, 9), (12, -8)):
        before = explorer.shift
        explorer.handle.scroll_into_view_if_needed()
        box = explorer.handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        explorer.page.mouse.move(x, y)
        explorer.page.mouse.down()
        for move in range(1, moves + 1):
            explorer.page.mouse.move(x + move * step, y)
            explorer.page.wait_for_timeout(16)
        explorer.page.mouse.up()
        assert (explorer.shift - before) * step > 0
        explorer.assert_shows(shift=explorer.shift)


def test_the_keyboard_moves_the_shift(explorer):
    explorer.handle.focus()
    place = 0
    for key, steps in (("ArrowRight", 5), ("ArrowLeft", 2)):
        for _ in range(steps):
            explorer.page.keyboard.press(key)
        place += steps if key == "ArrowRight" else -steps
        explorer.assert_shows(shift=SHIFTS[place])
        assert explorer.shift == SHIFTS[place]
    explorer.page.keyboard.press("End")
    explorer.assert_shows(shift=8.0)


def test_the_keyboard_reaches_targets_and_digit(explorer):
    explorer.page.locator(".explorer-controls button").first.focus()
    explorer.tab_to("T = 20")
    explorer.page.keyboard.press("Space")
    explorer.assert_shows(targets="20")
    explorer.tab_to("doubtful 3")
    explorer.page.keyboard.press("Enter")
    explorer.assert_shows(image="doubtful 3")
    explorer.tab_to("hard labels", "Shift+Tab")
    explorer.page.keyboard.press("Space")
    explorer.assert_shows(targets="hard")


def test_a_screen_reader_finds_the_picture_by_its_alt_text(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    names = [n["name"]["value"] for n in tree["nodes"] if n.get("role", {}).get("value") == "image"]
    assert explorer.expected.alt in names
