"""The explorer of mixed keys in a real page: what is on the screen is what the class gives for the same controls."""

import pytest

from effnlp_lessons.widgets.shorter_keys_explorer import DISTANCE, RANK, ShorterKeysExplorer


@pytest.fixture(scope="module")
def opened(lab):
    lab.server.write(
        "shorter_keys.ipynb",
        ["from effnlp_lessons.widgets.shorter_keys_explorer import ShorterKeysExplorer", "ShorterKeysExplorer()"],
    )
    lab.open("shorter_keys.ipynb")
    lab.run_all()
    lab.page.locator("img.explorer-picture").wait_for()
    return lab


def test_keys_and_buttons_move_the_picture_as_they_move_the_class(opened, quiet):
    page, twin = opened.page, ShorterKeysExplorer()
    opened.assert_shows(twin, "title")
    slots = page.locator(".widget-hslider .noUi-handle").first
    for key, step in (("ArrowLeft", -1), ("ArrowLeft", -1), ("ArrowRight", 1)):
        slots.press(key)
        twin.controls["slots"].value += step
        opened.assert_shows(twin, "title")
    for way in (RANK, DISTANCE):
        page.get_by_role("button", name=way, exact=True).click()
        twin.controls["way"].value = way
        opened.assert_shows(twin, "title")
    head = page.locator(".widget-hslider .noUi-handle").nth(2)
    head.press("ArrowRight")
    twin.controls["head"].value += 1
    opened.assert_shows(twin, "title")
