"""The explorer of bit budgets: what it shows are the given accuracies, and the Hessian's choice only when asked."""

import base64
import itertools
import math

import numpy as np
import pytest

from effnlp_lessons.quantization.qbert import block_bytes
from effnlp_lessons.studies import bit_budget
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.transformer import MINILM_L6
from effnlp_lessons.widgets.bit_budget_explorer import BitBudgetExplorer
from effnlp_lessons.widgets.bit_budget_picture import (
    AREA,
    BOTTOM,
    CELL,
    GAUGE,
    OMEGA_BOTTOM,
    WIDTH,
    cell_top,
    column,
    layer_at,
    middle,
)
from effnlp_lessons.widgets.layer_mapping_explorer import ordinal

ALL = list(itertools.product((2, 3), repeat=6))
EQUAL = [bits for bits in ALL if sum(bits) == 15]
SENTENCES = 2_000
OMEGA = [31.2, 45.1, 22.0, 18.0, 9.5, 3.2]
CHOICE, REVERSE = (3, 3, 3, 2, 2, 2), (2, 2, 2, 3, 3, 3)


def made_up(seed=0):
    """Accuracies of all 64 choices: drawn, the first layers count for more."""
    generator, weights = np.random.default_rng(seed), np.array([3.0, 4.8, 2.4, 3.6, 1.2, 1.8])
    return {bits: 66 + float((np.array(bits) - 2) @ weights + generator.uniform(-1, 1)) for bits in ALL}


ACCURACY = made_up()


def make(bits=(2,) * 6, accuracy=ACCURACY):
    return BitBudgetExplorer(accuracy, OMEGA, SENTENCES, bits)


def click(explorer, *layers):
    explorer.act([["down", middle(layer), BOTTOM - 10] for layer in layers])


def controls_of(explorer):
    return tuple(explorer.controls[f"layer_{m}"].value for m in range(1, 7))


def show(explorer, bits):
    click(explorer, *(m for m, (a, b) in enumerate(zip(bits, explorer.bits, strict=True), 1) if a != b))
    assert explorer.bits == bits


@pytest.fixture(scope="module")
def anywhere():
    """One explorer for the tests that go to many choices: making one takes longer than an event."""
    return make()


# ------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("bits", ALL[::5] + EQUAL[::4])
def test_state_equals_the_given_numbers(anywhere, bits):
    show(anywhere, bits)
    state, own = anywhere.state, ACCURACY[bits]
    assert state["bits"] == bits and state["accuracy"] == own and controls_of(anywhere) == bits
    assert state["bytes"] == sum(block_bytes(MINILM_L6, k, 64) for k in bits)
    assert state["budget"] == 3 * block_bytes(MINILM_L6, 2, 64) + 3 * block_bytes(MINILM_L6, 3, 64)
    assert state["fits"] == (sum(bits) <= 15)
    error = state["standard_error"]
    assert error == pytest.approx(math.sqrt(own * (100 - own) / SENTENCES))
    assert state["sensitivity"] is None
    if sum(bits) != 15:
        assert state["rank"] is state["best"] is state["worst"] is None and state["near_ties"] == ()
        return
    better_first = sorted(EQUAL, key=lambda b: -ACCURACY[b])
    assert better_first[state["rank"] - 1] == bits
    ties = [b for b in EQUAL if b != bits and abs(ACCURACY[b] - own) <= 2 * error]
    assert sorted(state["near_ties"]) == sorted(ties)
    # the ties may all be ahead, or all behind
    assert state["best"] == 1 + sum(ACCURACY[b] > own and b not in ties for b in EQUAL)
    assert state["worst"] == 20 - sum(ACCURACY[b] < own and b not in ties for b in EQUAL)
    assert state["best"] <= state["rank"] <= state["worst"] == state["best"] + len(ties)


def test_equal_accuracies_share_a_place():
    accuracy = dict.fromkeys(ALL, 80.0) | {CHOICE: 95.0}
    explorer = make(REVERSE, accuracy)
    assert explorer.state["rank"] == 2 and len(explorer.state["near_ties"]) == 18
    assert "80.0 % of 2,000 sentences (standard error 0.9 points), 2nd of 20 (shared); 18 near ties leave 2nd to 20th open" in explorer.line.value  # noqa: E501  # fmt: skip
    show(explorer, CHOICE)
    assert "1st of 20; no near ties." in explorer.line.value


def test_the_sensitivity_is_hidden_until_it_is_asked_for(shown):
    explorer = make(CHOICE)
    before, alt, line = shown(explorer), explorer.alt, explorer.line.value
    for words in (alt, line, explorer.image.spoken):
        assert "ensitiv" not in words and "Hessian" not in words
    assert explorer.controls["choice"].disabled and explorer.controls["choice"].value is None
    explorer.controls["sensitivity"].value = True
    found = explorer.state["sensitivity"]
    assert found["omega"] == OMEGA and found["order"] == [2, 1, 3, 4, 5, 6]
    assert found["choice"]["bits"] == CHOICE and found["reverse"]["bits"] == REVERSE
    for name, bits in (("choice", CHOICE), ("reverse", REVERSE)):
        assert found[name]["accuracy"] == ACCURACY[bits]
        assert found[name]["rank"] == 1 + sum(ACCURACY[b] > ACCURACY[bits] for b in EQUAL)
    assert found["mean"] == pytest.approx(np.mean([ACCURACY[b] for b in EQUAL]))
    assert not explorer.controls["choice"].disabled and explorer.controls["choice"].value == CHOICE
    assert f"{ordinal(found['reverse']['rank'])}; mean of the 20: {found['mean']:.1f} %." in explorer.line.value
    assert "Layers from the most to the least sensitive: 2, 1, 3, 4, 5, 6." in explorer.line.value
    assert "layer 2 45.1" in explorer.alt
    assert not np.array_equal(shown(explorer), before)
    explorer.controls["sensitivity"].value = False
    assert np.array_equal(shown(explorer), before) and (explorer.alt, explorer.line.value) == (alt, line)
    assert explorer.controls["choice"].value is None


def test_a_choice_off_the_budget_has_no_place_and_says_why():
    step = block_bytes(MINILM_L6, 3, 64) - block_bytes(MINILM_L6, 2, 64)
    explorer = make((3, 2, 2, 3, 2, 2))
    assert explorer.state["fits"] and "no place: below the budget" in explorer.line.value
    assert f"{step:,} bytes below the budget" in explorer.line.value
    click(explorer, 6)
    assert "the budget is used up" in explorer.line.value and "no place" not in explorer.line.value
    click(explorer, 5, 2)
    assert not explorer.state["fits"] and "no place: over the budget" in explorer.line.value
    assert f"{2 * step:,} bytes over the budget" in explorer.line.value and "over the budget" in explorer.image.spoken


# ------------------------------------------------------------------------ clicks, keys, buttons


def test_a_click_changes_the_layer_under_it():
    explorer = make()
    for layer, bits in ((1, (3, 2, 2, 2, 2, 2)), (6, (3, 2, 2, 2, 2, 3)), (1, (2, 2, 2, 2, 2, 3))):
        click(explorer, layer)
        assert explorer.bits == bits == controls_of(explorer) and explorer.state["layer"] == layer
    before = explorer.bits
    explorer.act([["down", 500, 100], ["down", middle(2), 300], ["move", middle(3), BOTTOM - 10]])
    assert explorer.bits == before and explorer.state["layer"] == 1
    click(explorer, 2, 2, 3)  # several at once
    assert explorer.bits == (2, 2, 3, 2, 2, 3)


def test_every_place_of_the_area_belongs_to_the_nearest_layer():
    left, top, width, height = AREA
    for x in np.linspace(left, left + width - 1, 60):
        nearest = min(range(1, 7), key=lambda layer: abs(x - middle(layer)))
        for y in (top, top + height / 2, top + height - 1):
            gap = min(abs(abs(x - middle(a)) - abs(x - middle(a + 1))) for a in range(1, 6))
            assert layer_at(x, y) == nearest or gap < 1
    for x, y in ((left - 1, top + 1), (left + width, top + 1), (left + 1, top - 1), (left + 1, top + height)):
        assert layer_at(x, y) is None
    assert left <= column(1) and left + width >= column(6) + WIDTH and top <= cell_top(3)
    assert top + height >= BOTTOM


def test_the_keyboard_chooses_layers_and_their_bits():
    explorer = make()
    explorer.act([["focus"]])
    assert explorer.state["layer"] == 1 and explorer.image.spoken.startswith("Layer 1 has 2 bits. ")
    for key, layer, bits in (
        ("ArrowUp", 1, (3, 2, 2, 2, 2, 2)),
        ("ArrowUp", 1, (3, 2, 2, 2, 2, 2)),
        ("ArrowLeft", 1, (3, 2, 2, 2, 2, 2)),
        ("ArrowRight", 2, (3, 2, 2, 2, 2, 2)),
        (" ", 2, (3, 3, 2, 2, 2, 2)),
        ("Enter", 2, (3, 2, 2, 2, 2, 2)),
        ("ArrowUp", 2, (3, 3, 2, 2, 2, 2)),
        ("ArrowDown", 2, (3, 2, 2, 2, 2, 2)),
        *(("ArrowRight", min(3 + i, 6), (3, 2, 2, 2, 2, 2)) for i in range(5)),
        ("ArrowUp", 6, (3, 2, 2, 2, 2, 3)),
    ):
        explorer.act([["key", key]])
        assert (explorer.state["layer"], explorer.bits) == (layer, bits) == (layer, controls_of(explorer)), key
    assert explorer.image.spoken == (
        f"Layer 6 has 3 bits. 224,640 bytes below the budget; accuracy {ACCURACY[3, 2, 2, 2, 2, 3]:.1f} %, "
        "no place: below the budget."
    )


def test_buttons_do_what_clicks_do(anywhere):
    generator = np.random.default_rng(1)
    for _ in range(30):
        layer, k = int(generator.integers(1, 7)), int(generator.integers(2, 4))
        expected = (*anywhere.bits[: layer - 1], k, *anywhere.bits[layer:])
        anywhere.controls[f"layer_{layer}"].value = k
        assert anywhere.bits == anywhere.state["bits"] == controls_of(anywhere) == expected
        assert anywhere.state["accuracy"] == ACCURACY[expected]


def test_the_named_choices_are_taken():
    explorer = make()
    explorer.controls["sensitivity"].value = True
    assert explorer.controls["choice"].value is None
    for bits in (CHOICE, REVERSE):
        explorer.controls["choice"].value = bits
        assert explorer.bits == controls_of(explorer) == bits
    click(explorer, 1)
    assert explorer.controls["choice"].value is None
    click(explorer, 1)
    assert explorer.controls["choice"].value == REVERSE
    explorer.controls["choice"].value = None  # taking it away chooses nothing
    assert explorer.bits == REVERSE and explorer.controls["choice"].value == REVERSE
    assert [label for label, _ in explorer.controls["choice"].options] == ["the Hessian's choice", "its reverse"]


def test_a_change_is_one_event_and_draws_one_picture(monkeypatch):
    explorer, drawn = make(), []
    monkeypatch.setattr(explorer.image, "show", lambda png, alt: drawn.append(alt))
    explorer.controls["sensitivity"].value = True
    explorer.controls["choice"].value = CHOICE  # three layers change
    click(explorer, 1, 2, 3)
    assert len(drawn) == 3


def test_every_button_says_in_full_what_it_does():
    explorer = make()
    assert explorer.controls["layer_4"].tooltips == ("layer 4 gets 2 bits", "layer 4 gets 3 bits")
    assert all(control.description or control.tooltip for control in explorer.controls.values())


# ------------------------------------------------------------------------ picture and words


def pixel(explorer, axes, x, y):
    across, up = axes.transData.transform((x, y))
    return int(across), int(explorer.figure.bbox.height - up)


def plots(explorer):
    """Strip and cloud, from left to right."""
    return sorted((a for a in explorer.figure.axes if a.axison), key=lambda a: a.get_position().x0)


def is_blue(picture):
    return (picture[..., 2] - picture[..., 0] > 120) & (picture[..., 1] < 140)


@pytest.mark.parametrize(
    ("bits", "asked"), [(CHOICE, True), ((2, 3, 2, 3, 3, 2), False), ((2,) * 6, True), ((3,) * 6, False)]
)
def test_the_picture_shows_bits_bytes_and_the_dots(bits, asked, shown, drawn_anew):
    explorer = make(bits)
    explorer.controls["sensitivity"].value = asked
    picture = shown(explorer).astype(int)
    assert picture.shape == (500, 900, 3) and np.array_equal(picture, drawn_anew(explorer))
    blue = is_blue(picture)
    for layer, k in enumerate(bits, 1):
        x = round(middle(layer))
        assert blue[round(cell_top(3) + CELL / 2), x] == (k == 3)
        assert not (picture[round(cell_top(1) + CELL / 2), x] == 255).all()  # the first two are always there
    left, top, width, height = GAUGE
    row = picture[top + height // 2]
    largest = explorer._bytes[(3,) * 6]
    line = left + width * explorer.state["budget"] / largest
    end = left + width * explorer.state["bytes"] / largest
    assert is_blue(row)[left + 3 : int(min(end, line)) - 3].all()
    beyond = (row[:, 0] - row[:, 2] > 100) & (row[:, 1] < 140)
    assert beyond[int(line) + 4 : int(max(end, line))].any() == (sum(bits) > 15)
    assert not is_blue(row)[int(line) + 4 :].any()
    # bars of the sensitivity, each as high as it is large
    orange = (picture[..., 0] > 200) & (abs(picture[..., 1] - 159) < 20) & (picture[..., 2] < 60)
    heights = [orange[220:OMEGA_BOTTOM, round(middle(layer))].sum() for layer in range(1, 7)]
    assert (heights == pytest.approx([74 * value / 45.1 for value in OMEGA], abs=3)) if asked else not any(heights)
    # this choice and no other is a blue dot
    strip, cloud = plots(explorer)
    x, y = pixel(explorer, cloud, explorer.state["bytes"] / 1e6, ACCURACY[bits])
    assert blue[y - 1 : y + 2, x - 1 : x + 2].any()
    order = sorted(EQUAL, key=lambda b: -ACCURACY[b])
    for place, other in enumerate(order, 1):
        x, y = pixel(explorer, strip, place, ACCURACY[other])
        assert blue[y - 1 : y + 2, x - 1 : x + 2].all() == (other == bits), place


def test_near_ties_and_the_hessians_choice_stand_out(shown):
    explorer = make((3, 3, 2, 2, 3, 2))
    ties = explorer.state["near_ties"]
    assert 0 < len(ties) < 19
    order = sorted(EQUAL, key=lambda b: -ACCURACY[b])
    strip, _ = plots(explorer)

    def framed(place, bits):
        """Whether there is colour on the four corners of a frame, above, below, left and right of a dot."""
        x, y = pixel(explorer, strip, place, ACCURACY[bits])
        red = (picture[..., 0] - picture[..., 2] > 150) & (picture[..., 1] < 140)
        return red[y - 13 : y - 6, x - 2 : x + 3].any() and red[y - 2 : y + 3, x + 6 : x + 13].any()

    for asked in (False, True):
        explorer.controls["sensitivity"].value = asked
        picture = shown(explorer).astype(int)
        for place, bits in enumerate(order, 1):
            x, y = pixel(explorer, strip, place, ACCURACY[bits])
            if bits != explorer.bits and not asked:  # the frame may lie on a dot beside it
                assert (picture[y, x, 2] - picture[y, x, 0] > 80) == (bits in ties), place
            assert framed(place, bits) == (asked and bits == CHOICE), place


def test_all_choices_are_within_the_axes():
    explorer = make()
    strip, cloud = plots(explorer)
    for axes in (strip, cloud):
        low, high = axes.get_ylim()
        assert low < min(ACCURACY.values()) and high > max(ACCURACY.values())
    low, high = cloud.get_xlim()
    assert low < explorer._bytes[(2,) * 6] / 1e6 and high > explorer._bytes[(3,) * 6] / 1e6
    # equal accuracies everywhere too
    assert make(accuracy=dict.fromkeys(ALL, 50.0)).state["rank"] is None


@pytest.mark.parametrize("bits", [CHOICE, (3,) * 6, (2,) * 6, (2, 3, 3, 3, 3, 3)])
def test_no_words_leave_the_picture_or_meet(bits):
    explorer = BitBudgetExplorer(dict.fromkeys(ALL, 88.8), [1234.5] * 6, 2_000, bits)
    explorer.controls["sensitivity"].value = True
    figure = explorer.figure
    renderer = figure.canvas.get_renderer()
    words = [t for t in [*figure.texts, *(t for axes in figure.axes for t in axes.texts)] if t.get_text()]
    words += [axis.label for axes in plots(explorer) for axis in (axes.xaxis, axes.yaxis) if axis.label.get_text()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in words]
    assert len(words) > 25
    for text, box in boxes:
        assert min(box.x0, box.y0) >= 0 and box.x1 <= 900 and box.y1 <= 500, text
    for (text, box), (other, second) in itertools.combinations(boxes, 2):
        assert not box.overlaps(second), (text, other)


def test_words_say_the_numbers():
    explorer = make(CHOICE)
    state = explorer.state
    assert explorer.summary(state) == (
        "3 bits for layers 1, 2 and 3: 4,152,960 of 4,152,960 bytes, the budget is used up. Accuracy "
        f"{state['accuracy']:.1f} % of 2,000 sentences (standard error {state['standard_error']:.1f} points), "
        f"{ordinal(state['rank'])} of 20; {len(state['near_ties'])} near ties leave {ordinal(state['best'])} to "
        f"{ordinal(state['worst'])} open."
    )
    assert len(state["near_ties"]) > 1
    assert explorer.image.alt == explorer.alt and explorer.summary(state) in explorer.alt
    assert "layer 3 3 bits, layer 4 2 bits" in explorer.alt and explorer.summary(state) in explorer.line.value
    data, metadata = explorer._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == explorer.alt
    assert base64.b64decode(data["image/png"]) == explorer.image.value
    assert "layer_3=3, layer_4=2" in repr(explorer)
    for bits, words in (((2,) * 6, "2 bits for all layers: "), ((2, 2, 2, 2, 3, 2), "3 bits for layer 5: ")):
        assert make(bits).summary(make(bits).state).startswith(words)


# ------------------------------------------------------------------------ what is refused, what is recorded


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accuracy": {bits: 80.0 for bits in EQUAL}}, "accuracy must have the 64 choices of 2 or 3 bits for 6 layers"),
        ({"accuracy": [80.0] * 64}, "accuracy must have the 64 choices"),
        ({"accuracy": ACCURACY | {CHOICE: 101.0}}, r"accuracy\[\(3, 3, 3, 2, 2, 2\)\] must be per cent, 0 to 100"),
        ({"accuracy": ACCURACY | {CHOICE: math.nan}}, r"accuracy\[.*\] must be per cent, 0 to 100, got nan"),
        ({"omega": [1.0] * 5}, "omega must be 6 finite numbers >= 0"),
        ({"omega": [1.0] * 5 + [-1.0]}, "omega must be 6 finite numbers >= 0"),
        ({"omega": [1.0] * 5 + [math.inf]}, "omega must be 6 finite numbers >= 0"),
        ({"sentences": 0}, "sentences must be >= 1, got 0"),
        ({"bits": (2, 3)}, "bits must be 2 or 3 for each of 6 layers"),
        ({"bits": (2, 3, 4, 2, 2, 2)}, "bits must be 2 or 3 for each of 6 layers"),
    ],
)
def test_other_numbers_are_refused(changes, words):
    given = {"accuracy": ACCURACY, "omega": OMEGA, "sentences": SENTENCES, "bits": CHOICE} | changes
    with pytest.raises(ValueError, match=f"^{words}"):
        BitBudgetExplorer(**given)


def test_without_numbers_the_recorded_ones_are_shown():
    summary = load_results("bit_budget")
    explorer = BitBudgetExplorer()
    explorer.controls["sensitivity"].value = True
    accuracy = bit_budget.accuracies(summary)
    for bits in (ALL[0], *EQUAL[::7], ALL[-1]):
        show(explorer, bits)
        right = sum(run["right"]["test"]["".join(map(str, bits))] for run in summary["runs"])
        assert explorer.state["accuracy"] == pytest.approx(right / 20) == pytest.approx(accuracy[bits])
    assert explorer.state["sensitivity"]["omega"] == bit_budget.pooled_omega(summary)
    found = explorer.state["sensitivity"]
    assert found["choice"]["bits"] == bit_budget.hessian_choice(found["omega"])
    assert "of 2,000 sentences" in explorer.line.value


def test_an_event_takes_less_than_50_ms(assert_fast):
    """Median processor time of clicks, keys and buttons; the best of three rounds decides."""
    explorer = make(CHOICE)
    explorer.controls["sensitivity"].value = True
    acts = {
        "click": lambda turn: click(explorer, turn % 6 + 1),
        "key": lambda turn: explorer.act([["key", ("ArrowUp", "ArrowDown")[turn % 2]]]),
        "layer": lambda turn: setattr(explorer.controls["layer_2"], "value", turn % 2 + 2),
        "choice": lambda turn: setattr(explorer.controls["choice"], "value", (CHOICE, REVERSE)[turn % 2]),
        "sensitivity": lambda turn: setattr(explorer.controls["sensitivity"], "value", turn % 2 == 1),
    }
    for name, act in acts.items():
        assert_fast(name, act)
