"""The explorer of lottery tickets in a real page: what is on the screen is what the class gives then."""

import pytest

from effnlp_lessons.widgets.lottery_ticket_explorer import LotteryTicketExplorer
from effnlp_lessons.widgets.lottery_ticket_picture import AREA, CHART

# made up; run here and in the notebook, whose cells have one line each: so the picture begins at a whole pixel
MAKE_NUMBERS = (
    "import random, torch",
    "from effnlp_lessons.pruning.lottery import LAYERS, ladder, lenet_300_100, magnitude_round, removal_rounds",
    "from effnlp_lessons.pruning.masks import full_masks",
    "from effnlp_lessons.studies.lottery_tickets import KINDS, MEASURES",
    "draw, model = random.Random(0), lenet_300_100(0)",
    "masks = [full_masks(model)]",
    "while len(masks) < 21: masks.append(magnitude_round(model, masks[-1]))",
    "removed, left = removal_rounds(masks), [round(share, 4) for share in ladder(20)]",
    "layers = {n: [round(100 * m[n].double().mean().item(), 4) for m in masks] for n in LAYERS}",
    "some = lambda: [round(draw.uniform(80, 95), 1) for _ in left]",
    "one = lambda: {'rounds': list(range(21))} | {name: some() for name in MEASURES}",
    "run = lambda s: {'seed': s, 'setting': {'steps': 80, 'every': 20}, 'left': left, 'layers': layers}",
    "summary = {'runs': [run(seed) | {kind: one() for kind in KINDS} for seed in (0, 1)]}",
    "right = torch.tensor([draw.randint(700, 960) for _ in range(2 * 4 * 21 * 4)]).view(2, 4, 21, 4)",
)
KINDS = ("ticket", "new weights", "random mask")


def made_up() -> LotteryTicketExplorer:
    names: dict = {}
    exec("\n".join(MAKE_NUMBERS), names)
    return LotteryTicketExplorer(names["summary"], names["removed"], names["right"])


class Page:
    """The explorer on the page, and a twin in this process that the same is done to."""

    def __init__(self, lab) -> None:
        page = lab.page
        self.lab, self.page, self.twin = lab, page, made_up()
        self.picture, self.pad = page.locator("img.explorer-picture"), page.locator(".painted-pad")

    def press(self, name: str, words: str) -> None:
        """Press a button; the same on the twin."""
        self.page.get_by_role("button", name=words, exact=True).click()
        options = dict(self.twin.controls[name].options)
        self.twin.controls[name].value = options[words]

    def click(self, number: int) -> None:
        """Click the chart where a round lies; the same on the twin."""
        self.pad.scroll_into_view_if_needed()
        box = self.picture.bounding_box()
        x = next(x for x in range(CHART[0], CHART[0] + CHART[2] + 1) if self.twin.round_at(x + 4) == number)
        place, scale = (x + 4, CHART[1] + 60), box["width"] / 900
        self.page.mouse.click(box["x"] + place[0] * scale, box["y"] + place[1] * scale)
        self.twin.act([["down", *place]])

    def settled(self) -> None:
        self.lab.settled(self.twin)

    def assert_shows_twin(self) -> None:
        """Line, alt text, buttons, slider and pixels, in the file and on the screen, are those of the twin."""
        twin = self.twin
        self.settled()
        expected = [dict(map(reversed, twin.controls[name].options))[twin.values[name]] for name in ("kind", "measure")]
        self.page.wait_for_function(
            """words => JSON.stringify([...document.querySelectorAll('.explorer-controls button.mod-active')]
                .map(button => button.innerText.trim())) === JSON.stringify(words)""",
            arg=expected,
        )
        self.page.wait_for_function(
            "words => document.querySelector('.explorer-controls .widget-readout').innerText.trim() === words",
            arg=str(twin.values["round"]),
        )
        self.lab.assert_shows(twin)


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "tickets.ipynb",
        [
            *MAKE_NUMBERS,
            "from effnlp_lessons.widgets.lottery_ticket_explorer import LotteryTicketExplorer",
            "explorer = LotteryTicketExplorer(summary, removed, right); explorer",
        ],
    )
    lab.open("tickets.ipynb")
    return lab


@pytest.fixture
def explorer(opened, quiet) -> Page:
    opened.run_all()  # a fresh one
    page = Page(opened)
    page.picture.wait_for()
    page.settled()
    return page


def test_it_shows_what_the_class_gives(explorer):
    explorer.assert_shows_twin()
    words = explorer.page.locator(".explorer-controls").locator("button, label:visible")
    cut = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth + 1 || !n.offsetHeight).map(n => n.innerText)"
    assert words.count() == 3 + 4 + 1 and words.evaluate_all(cut) == []
    box, pad = explorer.picture.bounding_box(), explorer.pad.bounding_box()
    place = (pad["x"] - box["x"], pad["y"] - box["y"], pad["width"], pad["height"])
    assert place == pytest.approx(AREA, abs=0.1)
    for kind in KINDS:
        assert explorer.page.get_by_role("button", name=kind, exact=True).is_disabled()


def test_clicks_on_the_chart_and_buttons(explorer):
    explorer.click(7)
    assert explorer.twin.state["round"] == 7
    explorer.assert_shows_twin()
    for kind in ("random mask", "new weights"):
        explorer.press("kind", kind)
        assert explorer.twin.state["kind"] == kind
        explorer.assert_shows_twin()
    explorer.press("measure", "step of early stop")
    explorer.assert_shows_twin()
    explorer.click(19)
    assert explorer.twin.state["round"] == 19
    explorer.assert_shows_twin()


def test_the_slider(explorer):
    explorer.page.locator(".explorer-controls .noUi-handle").first.focus()
    for _ in range(3):
        explorer.page.keyboard.press("ArrowRight")
    explorer.twin.controls["round"].value = 3
    explorer.assert_shows_twin()


def test_the_keyboard_reaches_the_picture(explorer):
    page = explorer.page
    page.get_by_role("button", name="step of early stop").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "painted-pad"
    keys = ["ArrowRight", "ArrowRight", "ArrowDown", "ArrowRight", "Space", "ArrowLeft"]
    for key in keys:
        page.keyboard.press(key)
    explorer.twin.act([["focus"]])
    explorer.twin.act([["key", " " if key == "Space" else key] for key in keys])
    assert (explorer.twin.state["round"], explorer.twin.state["kind"]) == (2, "random mask")
    spoken = explorer.twin.image.spoken
    page.wait_for_function("words => document.querySelector('.painted-voice').textContent === words", arg=spoken)
    explorer.assert_shows_twin()


def test_a_screen_reader_finds_picture_and_chart(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    roles = {(n["role"]["value"], n["name"]["value"]) for n in tree["nodes"] if "name" in n and "role" in n}
    assert ("image", explorer.twin.alt) in roles
    assert ("application", explorer.twin.image.label) in roles
