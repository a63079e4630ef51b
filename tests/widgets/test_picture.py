import base64
import io
import subprocess
import sys
import threading
import time

import ipywidgets
import matplotlib
import numpy as np
import pytest
from PIL import Image

from effnlp_lessons.widgets import style
from effnlp_lessons.widgets.painted_image import PaintedImage
from effnlp_lessons.widgets.picture import Explorer


class Probe(Explorer):
    """y = factor * x, a dot on the line; the factor changes what stays, `colour` does nothing below 3."""

    size = (3.0, 2.0)
    scene = ("factor",)

    def __init__(self):
        self.calls = []
        super().__init__(
            {
                "x": ipywidgets.IntSlider(value=2, min=0, max=8),
                "factor": ipywidgets.Dropdown(options=[1, 2]),
                "colour": ipywidgets.ToggleButtons(options=[style.BLUE, style.VERMILION]),
            }
        )

    def numbers(self, x, factor, colour):
        self.calls.append("numbers")
        return {"x": x, "y": factor * x, "factor": factor, "colour": colour, "points": [x, factor * x]}

    def draw_static(self, figure, numbers):
        self.calls.append("draw_static")
        self.axes = figure.subplots()
        self.axes.plot([0, 8], [0, 8 * numbers["factor"]], color=style.GREY, zorder=50)
        self.axes.set(xlim=(0, 8), ylim=(0, 16), title=f"factor {numbers['factor']}")
        (self.dot,) = self.axes.plot([], [], "o", markersize=14)
        self.note = self.axes.text(numbers["x"], 3, "a long note that leaves the axes")
        return [self.dot, self.note]

    def draw(self, numbers):
        self.calls.append("draw")
        self.dot.set_data([numbers["x"]], [numbers["y"]])
        self.dot.set_color(numbers["colour"])
        self.note.set(text=f"<{numbers['y']}> a long note that leaves the axes", x=numbers["x"])

    def describe(self, numbers):
        return f"A dot at {numbers['x']}, {numbers['y']}."

    def summary(self, numbers):
        return f"x < y & y = {numbers['y']}"

    def idle(self, numbers):
        return {"colour"} if numbers["x"] < 3 else set()


def set_values(explorer, **values):
    for name, value in values.items():
        explorer.controls[name].value = value


@pytest.mark.parametrize("x, factor, colour", [(5, 1, style.BLUE), (3, 2, style.VERMILION), (7, 2, style.BLUE)])
def test_an_event_reaches_numbers_picture_alt_text_and_line(shown, x, factor, colour):
    probe = Probe()
    set_values(probe, x=x, factor=factor, colour=colour)
    assert probe.state == probe.numbers(x, factor, colour)
    column, row = probe.axes.transData.transform((x, factor * x))
    pixel = shown(probe)[200 - round(row), round(column)]
    assert pixel.tolist() == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    assert probe.alt == probe.image.tooltip == f"A dot at {x}, {factor * x}."
    assert f">x &lt; y &amp; y = {factor * x}</div>" in probe.line.value


def test_the_state_is_a_copy():
    probe = Probe()
    probe.state["points"].append(99)
    assert probe.state["points"] == [2, 2]


def test_what_stays_is_drawn_once_per_scene():
    probe = Probe()
    set_values(probe, x=5, colour=style.VERMILION)
    assert probe.calls.count("draw_static") == 1 and probe.calls.count("draw") == 3
    set_values(probe, factor=2)
    assert probe.calls.count("draw_static") == 2


def test_blitted_equals_drawn_anew(shown, drawn_anew):
    probe = Probe()
    generator = np.random.default_rng(0)
    for _ in range(25):
        name = generator.choice(list(probe.controls))
        control = probe.controls[name]
        options = range(9) if name == "x" else control.options
        control.value = options[generator.integers(len(options))]
        picture = shown(probe)
        assert np.array_equal(picture, probe.pixels[..., :3])
        assert np.array_equal(picture, drawn_anew(probe)), probe


def test_going_and_coming_back_leaves_no_trace(shown):
    probe = Probe()
    first = shown(probe)
    set_values(probe, x=8, factor=2)
    assert not np.array_equal(shown(probe), first)
    set_values(probe, factor=1, x=2)  # the scene is drawn anew while the note leaves the axes
    assert np.array_equal(shown(probe), first)


def test_nothing_happens_when_no_value_changed():
    probe = Probe()
    probe.calls.clear()
    events = []
    for widget in (probe.image, probe.line):
        widget.observe(events.append)
    set_values(probe, **probe.values)
    assert events == [] and probe.calls == []


def test_one_event_sends_the_picture_once_and_with_its_title(monkeypatch):
    probe = Probe()
    sent = []
    monkeypatch.setattr(ipywidgets.Image, "send_state", lambda self, key=None: sent.append(set(key)))
    set_values(probe, x=6)
    assert sent == [{"value", "tooltip"}]


def test_a_control_that_changes_nothing_is_disabled():
    probe = Probe()
    assert probe.controls["colour"].disabled and not probe.controls["x"].disabled
    set_values(probe, x=3)
    assert not probe.controls["colour"].disabled
    set_values(probe, x=0)
    assert probe.controls["colour"].disabled


def test_one_control_may_change_another_in_the_same_event():
    class Bound(Probe):
        def settle(self, name):
            self.calls.append(name)
            if name == "factor":
                self.controls["x"].value = 4 * self.controls["factor"].value

    probe = Bound()
    probe.calls.clear()
    set_values(probe, factor=2)
    assert probe.calls == ["factor", "numbers", "draw_static", "draw"]
    assert probe.state["x"] == 8 and probe.alt == "A dot at 8, 16."
    probe.calls.clear()
    set_values(probe, x=3)
    assert probe.calls == ["x", "numbers", "draw"]


def test_an_error_while_settling_does_not_silence_the_controls():
    class Wrong(Probe):
        def settle(self, name):
            if name == "factor":
                raise RuntimeError("no")

    probe = Wrong()
    with pytest.raises(RuntimeError):
        set_values(probe, factor=2)
    set_values(probe, x=7)
    assert probe.state["x"] == 7


def test_what_changes_in_a_still_block_is_shown_by_the_next_refresh(shown):
    probe = Probe()
    before = shown(probe)
    with probe.still():
        set_values(probe, x=6)
    assert probe.state["x"] == 2 and np.array_equal(shown(probe), before)
    probe.refresh()
    assert probe.state["x"] == 6 and not np.array_equal(shown(probe), before)


def test_events_in_two_threads_wait_for_each_other(shown):
    """Each thread stops inside its event, so that without a lock the other one draws into the same picture."""

    class Slow(Probe):
        inside, most = 0, 0

        def draw(self, numbers):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.001)
            super().draw(numbers)
            self.inside -= 1

    probe, expected = Slow(), Probe()

    def settle_x():
        for x in (7, 3, 6):
            with probe.still():
                set_values(probe, x=x)
            probe.refresh()

    def change_colour():
        for _ in range(3):
            set_values(probe, colour=style.VERMILION)
            set_values(probe, colour=style.BLUE)
        set_values(probe, colour=style.VERMILION)

    threads = [threading.Thread(target=target) for target in (settle_x, change_colour)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    set_values(expected, x=6, colour=style.VERMILION)
    assert probe.most == 1
    assert probe.state == expected.state and np.array_equal(shown(probe), shown(expected))


def test_a_subclass_may_bring_its_rows_and_its_image():
    class Other(Probe):
        def arrange(self):
            return [ipywidgets.HBox([control]) for control in self.controls.values()]

        def make_image(self, width, height):
            self.room = width, height
            return PaintedImage(width, height, "a dot", lambda events: None)

    probe = Other()
    assert [len(row.children) for row in probe.children[:3]] == [1, 1, 1] and probe.children[3] is probe.image
    assert all("explorer-controls" in row._dom_classes for row in probe.children[:3])
    set_values(probe, x=6)
    assert probe.room == (300, 200) and probe.image.alt == "A dot at 6, 6."
    assert probe._repr_mimebundle_()[0]["image/png"] == base64.b64encode(probe.image.value).decode()


def test_the_mime_bundle_holds_widget_picture_and_alt_text():
    probe = Probe()
    set_values(probe, x=4)
    data, metadata = probe._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == probe.model_id
    assert base64.b64decode(data["image/png"]) == bytes(probe.image.value)
    assert metadata == {"image/png": {"alt": "A dot at 4, 4."}}
    assert data["text/plain"] == repr(probe) == "Probe(x=4, factor=1, colour='#0072B2')"


def test_the_page_keeps_the_room_of_the_picture():
    probe = Probe()
    assert (probe.image.width, probe.image.height) == ("300", "200")
    assert Image.open(io.BytesIO(probe.image.value)).size == (300, 200)


def test_a_scene_of_unknown_controls_is_refused():
    class Wrong(Probe):
        scene = ("factr",)

    with pytest.raises(ValueError, match="scene must name controls among .*'factr'"):
        Wrong()


def test_personal_settings_change_nothing(shown):
    plain = Probe()
    set_values(plain, x=5)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "text.antialiased": False}):
        personal = Probe()
        set_values(personal, x=5)
        assert np.array_equal(shown(personal), shown(plain))


def test_pyplot_is_never_imported():
    code = (
        "import sys; from effnlp_lessons.widgets.cost_explorer import CostExplorer; e = CostExplorer();"
        "e.controls['length'].value = 512; print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------------ show


def small_figure():
    with style.course_style():
        figure = style.new_figure(3, 2)
        figure.subplots().plot([0, 1], [0, 1])
    return figure


def test_show_displays_picture_alt_text_and_caption(monkeypatch):
    calls = []
    monkeypatch.setattr(style, "display", lambda data, **options: calls.append((data, options)))
    style.show(small_figure(), alt="A rising line.", caption="It rises by $x^2$.")
    (picture, options), (caption, _) = calls
    assert options == {"metadata": {"image/png": {"alt": "A rising line."}}, "raw": True}
    image = Image.open(io.BytesIO(base64.b64decode(picture["image/png"])))
    assert image.size == (300, 200) and image.info == {} and image.mode == "RGB"
    assert picture["text/plain"] == "A rising line."
    assert caption == {"text/markdown": "*It rises by $x^2$.*", "text/plain": "It rises by $x^2$."}


def test_the_same_figure_gives_the_same_bytes():
    assert style.figure_png(small_figure()) == style.figure_png(small_figure())


@pytest.mark.parametrize("alt, caption, wrong", [(" ", "words", "alt"), ("words", "", "caption")])
def test_show_asks_for_words(alt, caption, wrong):
    with pytest.raises(ValueError, match=f"^{wrong} must say something"):
        style.show(small_figure(), alt=alt, caption=caption)


@pytest.mark.parametrize("width, height, wrong", [(0, 2, "width"), (3, -1, "height"), (float("nan"), 1, "width")])
def test_a_figure_needs_a_size(width, height, wrong):
    with pytest.raises(ValueError, match=f"^{wrong} must be a positive number of inches"):
        style.new_figure(width, height)


def test_the_style_stays_in_its_block():
    before = dict(matplotlib.rcParams)
    with style.course_style():
        assert matplotlib.rcParams["axes.spines.top"] is False
    assert dict(matplotlib.rcParams) == before


def test_what_carries_meaning_stands_out_from_white():
    """WCAG 2.1: 3 : 1 for graphics, 4.5 : 1 for text; yellow, sky and orange are for areas only."""

    def contrast(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 1.05 / (0.05 + np.dot([0.2126, 0.7152, 0.0722], linear))

    assert all(contrast(colour) >= 3 for colour in (style.BLUE, style.VERMILION, style.GREEN))
    assert contrast(style.GREY) >= 4.5
