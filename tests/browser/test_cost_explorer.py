"""The explorer in a real page: every assertion compares with what the Python class gives for that state."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from effnlp_lessons.widgets.cost_explorer import LENGTHS, CostExplorer

WATCH = """() => {
    const picture = document.querySelector('img.explorer-picture');
    const output = picture.closest('.jp-OutputArea');
    window.seen = {frames: 0, replaced: 0, removed: 0, heights: new Set(), widths: new Set()};
    new MutationObserver(list => list.forEach(change => change.removedNodes.forEach(node => {
        if (node.nodeName === 'IMG' || node.querySelector?.('img')) window.seen.removed += 1 })))
        .observe(output, {childList: true, subtree: true});
    const look = () => {
        window.seen.frames += 1;
        if (document.querySelector('img.explorer-picture') !== picture) window.seen.replaced += 1;
        window.seen.heights.add(Math.round(output.getBoundingClientRect().height));
        window.seen.widths.add(Math.round(picture.getBoundingClientRect().width));
        if (!window.seen.enough) requestAnimationFrame(look) };
    requestAnimationFrame(look) }"""


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


class Page:
    """The explorer on the page: its handles and what it shows."""

    def __init__(self, lab) -> None:
        page = lab.page
        self.lab, self.page = lab, page
        self.slider = page.locator(".widget-hslider")
        self.handle = self.slider.locator(".noUi-handle")
        self.picture = page.locator("img.explorer-picture")

    @property
    def length(self) -> int:
        return int(self.slider.locator(".widget-readout").inner_text().replace(",", ""))

    def assert_shows(self, expected: CostExplorer) -> None:
        """Line, title and pixels, in the file and on the screen, are those of this state."""
        self.lab.assert_shows(expected, "title")

    def drag(self, moves: int, step: float) -> None:
        """Drag the handle with the mouse, `moves` steps of `step` pixels, a frame apart."""
        self.handle.scroll_into_view_if_needed()
        box = self.handle.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        for move in range(1, moves + 1):
            self.page.mouse.move(x + move * step, y)
            self.page.wait_for_timeout(16)
        self.page.mouse.up()


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "explorer.ipynb",
        ["from effnlp_lessons.widgets.cost_explorer import CostExplorer", "CostExplorer(length=128)"],
    )
    lab.open("explorer.ipynb")
    return lab


@pytest.fixture
def explorer(opened, quiet) -> Page:
    opened.run_all()  # a fresh explorer, at 128 tokens
    page = Page(opened)
    page.picture.wait_for()
    opened.settled(CostExplorer(length=128))
    return page


def test_it_shows_what_the_class_gives(explorer):
    assert explorer.length == 128
    explorer.assert_shows(CostExplorer(length=128))
    words = explorer.page.locator(".explorer-controls").locator("button, label:text('tokens'), .widget-readout")
    cut = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth || !n.offsetHeight).map(n => n.innerText)"
    assert words.count() == 7 and words.evaluate_all(cut) == []
    tops = words.evaluate_all("nodes => nodes.map(n => n.getBoundingClientRect().top)")
    assert max(tops) - min(tops) < 10, "the buttons do not stand beside the slider"


def test_the_mouse_drags_the_length(explorer):
    for moves, step in ((6, 12), (10, 9), (12, -14)):
        before = explorer.length
        explorer.drag(moves, step)
        assert (explorer.length - before) * step > 0
        explorer.assert_shows(CostExplorer(length=explorer.length))


def test_the_keyboard_moves_the_length(explorer):
    explorer.handle.focus()
    place = LENGTHS.index(128)
    for key, steps in (("ArrowRight", 3), ("ArrowLeft", 1), ("ArrowRight", 2)):
        for _ in range(steps):
            explorer.page.keyboard.press(key)
        place += steps if key == "ArrowRight" else -steps
        explorer.assert_shows(CostExplorer(length=LENGTHS[place]))
        assert explorer.length == LENGTHS[place]
    explorer.page.keyboard.press("End")
    explorer.assert_shows(CostExplorer(length=4_096))


def test_the_keyboard_reaches_model_and_view(explorer):
    explorer.handle.focus()

    def tab_to(button: str) -> None:
        for _ in range(6):
            explorer.page.keyboard.press("Tab")
            if explorer.page.evaluate("() => document.activeElement.textContent") == button:
                return
        pytest.fail(f"Tab does not lead to {button}")

    tab_to("BERT-base")
    explorer.page.keyboard.press("Space")
    explorer.assert_shows(CostExplorer(length=128, model="BERT-base"))
    tab_to("clock")
    explorer.page.keyboard.press("Enter")
    explorer.assert_shows(CostExplorer(length=128, model="BERT-base", view="clock"))
    # nothing is recorded here, so the length is greyed out
    assert explorer.slider.locator(".noUi-target").get_attribute("disabled") is not None


def test_a_screen_reader_finds_the_picture_by_its_alt_text(explorer):
    tree = explorer.page.context.new_cdp_session(explorer.page).send("Accessibility.getFullAXTree")
    names = [n["name"]["value"] for n in tree["nodes"] if n.get("role", {}).get("value") == "image"]
    assert CostExplorer(length=128).alt in names
    sliders = [n for n in tree["nodes"] if n.get("role", {}).get("value") == "slider"]
    assert len(sliders) == 1


def test_nothing_flickers_while_dragging(explorer):
    """40 moves: the same node stays, the page does not jump, and no frame on the screen lacks the picture."""
    page, frames = explorer.page, []
    explorer.handle.scroll_into_view_if_needed()
    box = {side: round(size) for side, size in explorer.picture.bounding_box().items()}
    session = page.context.new_cdp_session(page)

    def keep(event) -> None:
        frames.append(event["data"])
        session.send("Page.screencastFrameAck", {"sessionId": event["sessionId"]})

    session.on("Page.screencastFrame", keep)
    page.evaluate(WATCH)
    session.send("Page.startScreencast", {"format": "png", "everyNthFrame": 1})
    explorer.drag(40, 4)
    last = CostExplorer(length=explorer.length)
    explorer.lab.settled(last)
    page.wait_for_timeout(100)
    session.send("Page.stopScreencast")
    seen = page.evaluate(
        """() => { window.seen.enough = true;
            return {...window.seen, heights: [...window.seen.heights], widths: [...window.seen.widths]} }"""
    )
    explorer.assert_shows(last)
    assert explorer.length > 512
    assert seen["frames"] > 40 and (seen["replaced"], seen["removed"]) == (0, 0), seen
    assert len(seen["heights"]) == 1 and seen["widths"] == [900], seen
    # what never changes, the axis labels on the left, is on the screen in every frame
    labels = pixels(bytes(CostExplorer().image.value))[40:340, :70]
    assert (labels < 128).sum() > 500
    assert len(frames) > 20
    for number, frame in enumerate(frames):
        shown = pixels(base64.b64decode(frame))[box["y"] :, box["x"] :][40:340, :70]
        assert np.abs(shown.astype(int) - labels).max() <= 2, f"no picture in frame {number} of {len(frames)}"


def test_a_narrow_window_shrinks_the_picture_whole(explorer):
    explorer.page.set_viewport_size({"width": 900, "height": 900})
    try:
        explorer.page.wait_for_function(
            "() => document.querySelector('img.explorer-picture').getBoundingClientRect().width < 890"
        )
        box = explorer.picture.bounding_box()
        # the page lays out in whole pixels: one of them in a few hundred
        assert box["height"] / box["width"] == pytest.approx(390 / 900, rel=0.01)
        room = explorer.page.locator(".jp-OutputArea-output:has(img.explorer-picture)").bounding_box()
        assert box["x"] + box["width"] <= room["x"] + room["width"] + 1
    finally:
        explorer.page.set_viewport_size({"width": 1_400, "height": 900})
