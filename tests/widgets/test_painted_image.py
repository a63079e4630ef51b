"""What Python promises to the page; what the page does is tested in a browser with the explorer that paints."""

import pytest

from effnlp_lessons.widgets.painted_image import PaintedImage


@pytest.fixture
def sent(monkeypatch):
    """What goes to the page: names of changed traits, and messages."""
    sent = []
    monkeypatch.setattr(PaintedImage, "send_state", lambda self, key=None: sent.append(key and set(key)))
    monkeypatch.setattr(PaintedImage, "send", lambda self, content, buffers=None: sent.append(content))
    return sent


def test_a_picture_goes_out_once_and_with_its_alt_text(sent):
    image = PaintedImage(30, 20, "a label", lambda events: None)
    sent.clear()
    image.show(b"picture", "words")
    assert (image.value, image.alt) == (b"picture", "words")
    assert sent == [{"value", "alt"}]


def test_every_message_is_answered_after_it_was_dealt_with(sent):
    events = [["down", 3.5, 4.0], ["key", " "]]
    image = PaintedImage(30, 20, "a label", sent.append)
    sent.clear()
    image._handle_custom_msg({"events": events}, [])
    assert sent == [events, {"answered": True}]


def test_a_message_that_fails_is_answered_too(sent):
    def fail(events):
        raise RuntimeError("no")

    image = PaintedImage(30, 20, "a label", fail)
    sent.clear()
    with pytest.raises(RuntimeError):
        image._receive(image, {"events": []}, [])
    assert sent == [{"answered": True}]


def test_the_page_gets_what_it_asks_for(sent):
    image = PaintedImage(30, 20, "a label", lambda events: None)
    state = image.get_state()
    assert (state["width"], state["height"], state["label"]) == (30, 20, "a label")
    for name in ("value", "alt", "area", "label", "spoken", "width", "height"):
        assert f'model.get("{name}")' in image._esm and name in state
