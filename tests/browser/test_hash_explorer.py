"""The explorer of hashing in a real page: what is on the screen is what the class gives after the same moves."""

import pytest

from effnlp_lessons.widgets.hash_explorer import CIRCLE, KEYS, HashExplorer
from effnlp_lessons.widgets.linear_state_explorer import Projections

# made up; run here and in the notebook, whose cells have one line each: so the picture begins at a whole pixel
MAKE_READER = (
    "import torch",
    "from effnlp_lessons.widgets.linear_state_explorer import Projections",
    "keys = 3 * torch.randn(2, 3, 20, 8, generator=torch.Generator().manual_seed(0))",
    "read = lambda text: Projections([f'w{place}' for place in range(20)], keys, keys, keys)",
)


def made_up() -> HashExplorer:
    names: dict = {"Projections": Projections}
    exec("\n".join(MAKE_READER), names)
    return HashExplorer(read=names["read"])


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        self.lab, self.page, self.twin = lab, lab.page, made_up()
        self.picture = lab.page.locator("img.explorer-picture")

    def press(self, words: str) -> None:
        self.page.get_by_role("button", name=words, exact=True).click()
        self.twin.controls["vectors"].value = words

    def key(self, name: str, key: str, times: int = 1) -> None:
        """Press a key on a slider's handle; the same steps on the twin."""
        sliders = ["layer", "head", "buckets", "rounds", "seed", "chunk"]
        self.page.locator(".explorer-controls .noUi-handle").nth(sliders.index(name)).focus()
        control = self.twin.controls[name]
        for _ in range(times):
            self.page.keyboard.press(key)
            step = control.step if key == "ArrowRight" else -control.step
            control.value = min(max(control.value + step, control.min), control.max)

    def assert_shows_twin(self) -> None:
        self.lab.settled(self.twin)
        self.lab.assert_shows(self.twin, "title")


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "hashing.ipynb",
        [
            *MAKE_READER,
            "from effnlp_lessons.widgets.hash_explorer import HashExplorer",
            "explorer = HashExplorer(read=read); explorer",
        ],
    )
    lab.open("hashing.ipynb")
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
    assert explorer.twin.values["vectors"] == CIRCLE
    assert explorer.page.locator(".explorer-controls .noUi-target[disabled]").count() == 2  # layer and head
    words = explorer.page.locator(".explorer-controls").locator("button, label:visible")
    cut = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth + 1 || !n.offsetHeight).map(n => n.innerText)"
    assert words.evaluate_all(cut) == []


def test_every_slider_by_keyboard(explorer):
    for name, key, times in (
        ("rounds", "ArrowRight", 2),
        ("buckets", "ArrowRight", 1),
        ("seed", "ArrowRight", 3),
        ("chunk", "ArrowLeft", 1),
    ):
        explorer.key(name, key, times)
        explorer.assert_shows_twin()
    explorer.press(KEYS)
    explorer.assert_shows_twin()
    assert explorer.page.locator(".explorer-controls .noUi-target[disabled]").count() == 0
    explorer.key("layer", "ArrowRight")
    explorer.key("head", "ArrowRight", 2)
    explorer.assert_shows_twin()


def test_one_chunk_greys_the_hash_out(explorer):
    explorer.key("chunk", "ArrowRight", 20 - explorer.twin.values["chunk"])
    explorer.assert_shows_twin()
    assert not explorer.twin.state["hashed"]
    assert explorer.page.locator(".explorer-controls .noUi-target[disabled]").count() == 5


def test_a_screen_reader_finds_the_picture(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    names = {n["name"]["value"] for n in tree["nodes"] if n.get("role", {}).get("value") == "image" and "name" in n}
    assert explorer.twin.alt in names
