"""The explorer of memories in a real page: what is on the screen is what the class gives after the same moves."""

import pytest

from effnlp_lessons.widgets.memory_explorer import MemoryExplorer

LOSSES = {"dense": [(8, 0.03), (64, 0.05)], "window": [(8, 0.05), (64, 1.8)]}
WORDS = {
    "passed": "segments passed", "distance": "distance of the repeat", "segment": "segment length", "memory": "memory",
    "layers": "layers", "compressed": "compressed slots", "rate": "compression rate",
}  # fmt: skip


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        self.lab, self.page, self.twin = lab, lab.page, MemoryExplorer(LOSSES)
        self.picture = lab.page.locator("img.explorer-picture")

    def slider(self, name: str):
        return self.page.locator(".widget-hslider").filter(has=self.page.get_by_text(WORDS[name], exact=True))

    def press(self, name: str, key: str, times: int = 1) -> None:
        """Press a key on a slider; the same on the twin."""
        self.slider(name).locator(".noUi-handle").focus()
        control = self.twin.controls[name]
        for _ in range(times):
            self.page.keyboard.press(key)
            ends = {"Home": control.min, "End": control.max}
            step = 1 if key == "ArrowRight" else -1
            control.value = ends.get(key, control.value + step)

    def assert_shows_twin(self) -> None:
        """Line, alt text, sliders and pixels, in the file and on the screen, are those of the twin."""
        self.lab.settled(self.twin)
        self.page.wait_for_function(
            """words => JSON.stringify([...document.querySelectorAll('.widget-hslider .widget-readout')]
                .map(node => node.innerText.trim())) === JSON.stringify(words)""",
            arg=[str(self.twin.values[name]) for name in WORDS],
        )
        self.lab.assert_shows(self.twin, "title")


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "memory.ipynb",
        # a line a cell: so the picture begins at a whole pixel
        ["from effnlp_lessons.widgets.memory_explorer import MemoryExplorer", f"MemoryExplorer({LOSSES!r})"],
    )
    lab.open("memory.ipynb")
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
    words = explorer.page.locator(".explorer-controls").locator("label:visible, .widget-readout")
    cut = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth + 1 || !n.offsetHeight).map(n => n.innerText)"
    assert words.count() == 2 * 7 and words.evaluate_all(cut) == []
    for names in (("passed", "distance"), ("segment", "memory", "layers"), ("compressed", "rate")):
        tops = [explorer.slider(name).bounding_box()["y"] for name in names]
        assert max(tops) - min(tops) < 2, f"{names} do not stand side by side"


def test_the_keyboard_moves_every_slider(explorer):
    for name, key, times in (
        ("passed", "ArrowRight", 9),
        ("distance", "ArrowRight", 45),
        ("memory", "ArrowLeft", 5),
        ("rate", "ArrowRight", 2),
        ("layers", "End", 1),
        ("segment", "ArrowLeft", 3),  # the reader stays near its place
        ("passed", "ArrowRight", 6),  # beyond 11, for the segments are shorter
        ("compressed", "Home", 1),
    ):
        explorer.press(name, key, times)
        explorer.assert_shows_twin()
    assert explorer.twin.values == {
        "passed": 18, "distance": 46, "segment": 5, "memory": 11, "compressed": 0, "rate": 5, "layers": 4,
    }  # fmt: skip
    # without slots the rate is greyed out
    assert explorer.page.locator(".explorer-controls .noUi-target[disabled]").count() == 1


def test_a_screen_reader_finds_the_picture_by_its_alt_text(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    roles = {(n["role"]["value"], n["name"]["value"]) for n in tree["nodes"] if "name" in n and "role" in n}
    assert ("image", explorer.twin.alt) in roles
