"""Figures of a page: what they show is what they were given; bad input is named."""

import base64
import io

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from PIL import Image

from effnlp_lessons.measure import block_macs
from effnlp_lessons.widgets.page import (
    attention_maps,
    bars,
    curves,
    dots,
    head_grid,
    images,
    lines,
    pattern_maps,
    show_source,
)


@pytest.fixture(autouse=True, scope="module")
def shell():
    InteractiveShell.instance()


def displayed(call):
    with capture_output() as captured:
        call()
    picture = next((o for o in captured.outputs if "image/png" in o.data), None)
    text = " ".join(o.data.get("text/markdown", "") for o in captured.outputs)
    if picture is None:
        return None, "", text
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.data["image/png"]))).convert("RGB"))
    text = text.strip()
    return pixels, picture.metadata["image/png"]["alt"], text


def test_source_is_the_librarys_own():
    _, _, text = displayed(lambda: show_source(block_macs))
    assert text.startswith("`effnlp_lessons/measure.py`") and '"attention projections": 4 * length * d * d' in text


def test_a_kernel_shows_its_source():
    kernels = pytest.importorskip("effnlp_lessons.attention.flash_kernels", reason="Triton exists on Linux only")
    _, _, text = displayed(lambda: show_source(kernels.delta_kernel))
    assert text.startswith("`effnlp_lessons/attention/flash_kernels.py`") and "tl.sum(o * do, 1)" in text


def test_bars_are_as_long_as_their_numbers():
    pixels, alt, caption = displayed(lambda: bars({"a": 1.0, "b": 3.0}, unit="million", caption="Look."))
    blue = (pixels == np.array([0x00, 0x72, 0xB2])).all(-1).sum(1)  # blue pixels in every row
    long, short = blue.max(), blue[blue > 5].min()
    assert long / short == pytest.approx(3, rel=0.03)
    assert alt == "Bars in million: b 3.00, a 1.00." and caption == "*Look.*"


def test_lines_say_where_they_go():
    call = {"x_label": "length (tokens)", "y_label": "ms", "caption": "Look."}
    pixels, alt, _ = displayed(lambda: lines([1, 10, 100], {"a": [[1, 2, 4], [2, 3, 8], [3, 9, 9]]}, **call))
    assert pixels.std() > 0 and alt == "ms against length (tokens), 1 to 100: a from 2 to 8."
    with pytest.raises(ValueError, match="runs of 2 points"):
        lines([1, 2], {"a": [[1, 2], [1]]}, **call)
    with pytest.raises(ValueError, match="runs of 2 points"):
        lines([1, 2], {}, **call)


def test_curves_say_where_they_go_and_mark_places():
    call = {"x_label": "clip", "y_label": "error", "caption": "Look."}
    pixels, alt, _ = displayed(lambda: curves([1, 2, 3], {"a": [4, 1, 2], "b": [9, 9, 9]}, marks={"best": 2}, **call))
    assert pixels.std() > 0
    assert alt == "error against clip, 1 to 3: a from 4 to 2, b from 9 to 9; best at 2."
    plain, _, _ = displayed(lambda: curves([1, 2, 3], {"a": [4, 1, 2], "b": [9, 9, 9]}, **call))
    assert plain.shape != pixels.shape or (plain != pixels).any()  # the mark is drawn
    with pytest.raises(ValueError, match="3 points each"):
        curves([1, 2, 3], {"a": [1, 2]}, **call)
    with pytest.raises(ValueError, match="3 points each"):
        curves([1, 2, 3], {}, **call)


def test_attention_maps_show_the_weights():
    weights = torch.zeros(5, 3, 3)
    weights[:, :, 1] = 1.0
    weights[2] = torch.eye(3)
    pixels, alt, _ = displayed(lambda: attention_maps(weights, ["[CLS]", "film", "[SEP]"], caption="Look."))
    assert "head 0: film 100 %" in alt and "head 2: [CLS] 33 %" in alt
    dark = np.abs(pixels.astype(int) - [8, 48, 107]).sum(-1) < 12  # the end of the colour map
    white = (pixels == [247, 251, 255]).all(-1)  # its beginning: a weight of 0
    assert dark.sum() / (dark.sum() + white.sum()) == pytest.approx(1 / 3, abs=0.02)
    with pytest.raises(ValueError, match=r"weights must be \(heads, 2, 2\), got \(5, 3, 3\)"):
        attention_maps(weights, ["a", "b"], caption="Look.")
    with pytest.raises(ValueError, match="at least one part"):
        bars({}, unit="x", caption="Look.")


def test_pattern_maps_are_as_blue_as_their_masks():
    left, empty = torch.zeros(20, 20, dtype=torch.bool), torch.zeros(20, 20, dtype=torch.bool)
    left[:, :5] = True
    pixels, alt, caption = displayed(lambda: pattern_maps({"left": left, "none": empty}, caption="Look."))
    assert alt.endswith("left 25 % of all pairs, none 0 % of all pairs.") and caption == "*Look.*"
    blue = (pixels == [0x00, 0x72, 0xB2]).all(-1)
    rows, columns = blue.nonzero()
    assert columns.max() < pixels.shape[1] / 2, "the empty mask is not empty"
    height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    assert blue.sum() == height * width and width / height == pytest.approx(5 / 20, abs=0.02)
    with pytest.raises(ValueError, match="masks must hold"):
        pattern_maps({"a": left.float()}, caption="Look.")


def test_dots_stand_at_their_medians():
    rows = {"a": {"mass": (0.2, 0.1, 0.4)}, "b": {"mass": (0.4, 0.4, 0.4)}}
    pixels, alt, _ = displayed(lambda: dots(rows, grey=["b"], caption="Look."))
    assert alt == "Medians: a mass 0.20; b mass 0.40."
    blue = (pixels == [0x00, 0x72, 0xB2]).all(-1).nonzero()[1]
    grey = (pixels[:, 200:850] == [0x6B, 0x6B, 0x6B]).all(-1)
    assert len(blue) > 20 and grey.sum() > 20
    with pytest.raises(ValueError, match="all with the same quantities"):
        dots({"a": {"mass": (1, 1, 1)}, "b": {}}, caption="Look.")


def test_dots_that_lie_close_can_begin_where_they_are():
    rows = {"a": {"right": (90.0, 89.0, 91.0)}, "b": {"right": (92.0, 91.0, 93.0)}}
    far, near = (displayed(lambda z=z: dots(rows, from_zero=z, caption="Look."))[0] for z in (True, False))
    columns = [(pixels == [0x00, 0x72, 0xB2]).all(-1).nonzero()[1] for pixels in (far, near)]
    # the two dots are 2 points apart: a small part of an axis from 0, half of one from 89
    assert columns[0].max() - columns[0].min() < 0.2 * far.shape[1]
    assert columns[1].max() - columns[1].min() > 0.3 * near.shape[1]


def test_images_show_their_ink():
    empty, full = torch.zeros(2, 6, 6, dtype=torch.uint8)
    full += 255
    pixels, alt, _ = displayed(lambda: images({"a 2": empty, "a 7": full}, caption="Look."))
    assert alt == "Small pictures: a 2, a 7."
    dark = (pixels < 10).all(-1).nonzero()[1]
    right = (dark > pixels.shape[1] / 2).sum()
    assert right > 1_000 and right > 10 * (len(dark) - right)  # the left half has its title alone
    with pytest.raises(ValueError, match="height, width"):
        images({}, caption="Look.")


def test_head_grid_letters_every_head():
    pixels, alt, _ = displayed(lambda: head_grid(["x", "y", "y", "y"], layers=2, caption="Look."))
    assert alt == "A grid of 2 layers and 2 heads. Heads by name: y 3, x 1."
    assert pixels.std() > 0
    with pytest.raises(ValueError, match="2 layers of equally many heads, got 3"):
        head_grid(["x", "y", "y"], layers=2, caption="Look.")


def test_attention_maps_take_titles():
    _, alt, _ = displayed(
        lambda: attention_maps(torch.eye(2)[None], ["a", "b"], caption="Look.", titles=["layer 3, head 1"])
    )
    assert "layer 3, head 1: " in alt
