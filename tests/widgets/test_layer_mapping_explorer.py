"""The explorer of layer mappings: what it shows are the given scores, and its lines never cross."""

import base64
import copy
import itertools
import sys
import types

import numpy as np
import pytest

from effnlp_lessons import studies
from effnlp_lessons.distillation.tinybert import layer_mapping
from effnlp_lessons.studies import runner
from effnlp_lessons.widgets.layer_mapping_explorer import (
    AREA,
    BOX_WIDTH,
    GRAB,
    MAPPINGS,
    STUDENT_LEFT,
    TEACHER_LEFT,
    LayerMappingExplorer,
    line_at,
    loss_in_words,
    move_line,
    ordinal,
    standings,
    student_row,
    teacher_row,
)

ALL = [g for g in itertools.product(range(1, 7), repeat=3) if g[0] < g[1] < g[2]]
MEASURES = ("agreement", "accuracy", "loss")


def made_up(seed=0, seeds=3):
    """Scores of all 20 mappings: drawn, with more noise in the accuracy."""
    generator = np.random.default_rng(seed)

    def around(middle, noise):
        return (middle + noise * generator.standard_normal(seeds)).tolist()

    scores = {}
    for g in ALL:
        middle = 84 + 2 * generator.standard_normal()
        scores[g] = {
            "agreement": around(middle, 0.5),
            "accuracy": around(middle - 6, 1.5),
            "loss": around(0.2 * sum(g) + 0.3 * generator.uniform(), 0.05),
        }
    return scores


SCORES = made_up()


def at_end(layer):
    """Where a line ends at this teacher layer, in pixels of the picture."""
    return TEACHER_LEFT, teacher_row(layer)


def drag(explorer, layer, *teacher_layers):
    """Press on the end of a student layer's line and pull it along these teacher layers."""
    moves = [["move", *at_end(target)] for target in teacher_layers]
    explorer.act([["down", *at_end(explorer.mapping[layer - 1])], *moves])


def controls_of(explorer):
    return tuple(explorer.controls[f"layer_{m}"].value for m in (1, 2, 3)), explorer.controls["strategy"].value


def strategy_of(mapping):
    named = {layer_mapping(3, 6, name)[1:-1]: name for name in ("uniform", "top", "bottom")}
    return named.get(mapping)


def change(scores, mapping, measure, values):
    scores = copy.deepcopy(scores)
    scores[mapping][measure] = values
    return scores


def show(explorer, mapping):
    """Go to a mapping by the buttons: the second line last, since it is pushed by both others."""
    for m in (1, 3, 2):
        explorer.controls[f"layer_{m}"].value = mapping[m - 1]
    assert explorer.mapping == mapping


@pytest.fixture(scope="module")
def anywhere():
    """One explorer for the tests that go to many mappings: making one takes longer than an event."""
    return LayerMappingExplorer(SCORES)


# ------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("mapping", ALL)
def test_state_equals_the_given_scores(anywhere, mapping):
    show(anywhere, mapping)
    state = anywhere.state
    assert state["mapping"] == mapping and state["strategy"] == strategy_of(mapping)
    lowest = min(ALL, key=lambda g: np.mean(SCORES[g]["loss"]))
    for name in MEASURES:
        table = np.array([SCORES[g][name] for g in ALL])
        own, sign = np.array(SCORES[mapping][name]), -1 if name == "loss" else 1
        ranks = {g: 1 + (sign * table.mean(1) > sign * np.mean(SCORES[g][name])).sum() for g in (mapping, lowest)}
        assert state[name]["seeds"] == SCORES[mapping][name]
        assert state[name]["mean"] == pytest.approx(own.mean(), abs=1e-8)
        assert (state[name]["low"], state[name]["high"]) == (own.min(), own.max())
        assert state[name]["rank"] == ranks[mapping] and state["lowest_loss"][name]["rank"] == ranks[lowest]
        # every seed of one against every seed of the other
        ahead = [(sign * other > sign * own[:, None]).all() for other in table]
        behind = [(sign * other < sign * own[:, None]).all() for other in table]
        assert state[name]["best"] == 1 + sum(ahead) and state[name]["worst"] == 20 - sum(behind)
        apart = np.array(ahead) | behind
        assert state[name]["near_ties"] == tuple(
            g for g, far in zip(ALL, apart, strict=True) if not far and g != mapping
        )


def test_ranks_are_a_ranking():
    for name in MEASURES:
        table = standings({g: SCORES[g][name] for g in ALL}, highest_first=name != "loss")
        assert sorted(own["rank"] for own in table.values()) == list(range(1, 21))
        best_first = sorted(ALL, key=lambda g: table[g]["rank"])
        means = [np.mean(SCORES[g][name]) for g in best_first]
        assert means == sorted(means, reverse=name != "loss")
        for g, own in table.items():
            assert own["best"] <= own["rank"] <= own["worst"]
            assert own["worst"] - own["best"] == len(own["near_ties"])
            assert all(g in table[other]["near_ties"] for other in own["near_ties"])


def test_equal_means_share_a_place_whatever_the_order_of_their_seeds():
    values = {"a": [0.1, 0.2, 0.3], "b": [0.9, 0.8, 0.1], "c": [0.3, 0.2, 0.1], "d": [0.0, 0.1, 0.1]}
    assert sum(values["a"]) != sum(values["c"])  # in the last bit
    table = standings(values, highest_first=True)
    assert {name: own["rank"] for name, own in table.items()} == {"b": 1, "a": 2, "c": 2, "d": 4}
    table = standings(values, highest_first=False)
    assert {name: own["rank"] for name, own in table.items()} == {"d": 1, "a": 2, "c": 2, "b": 4}


def test_seeds_that_touch_are_near_ties_and_seeds_apart_are_not():
    values = {"top": [90, 91], "touches": [90, 88], "below": [87.9, 87], "last": [50, 52]}
    table = standings(values, highest_first=True)
    assert {name: own["near_ties"] for name, own in table.items()} == {
        "top": ("touches",), "touches": ("top",), "below": (), "last": (),
    }  # fmt: skip
    assert [(own["best"], own["worst"]) for own in table.values()] == [(1, 2), (1, 2), (3, 3), (4, 4)]


def test_a_shared_place_and_no_near_ties_are_said():
    scores = {g: {name: [place, place + 0.25] for name in MEASURES} for place, g in enumerate(ALL)}
    scores[2, 4, 6]["accuracy"] = scores[1, 2, 3]["accuracy"]
    line = LayerMappingExplorer(scores, (2, 4, 6)).line.value
    assert "Accuracy from 1,500 labels: 0.1 % (seeds 0.0 to 0.2 %), 19th of 20 (shared); 1 near tie leaves 19th" in line
    place = ALL.index((2, 4, 6))
    assert f"Agreement with the teacher: {place + 0.125:.1f} %" in line
    assert f"{20 - place}th of 20; no near ties." in line
    assert f"{place + 1}th lowest of 20" in line
    assert "The mapping of the lowest loss is 20th in agreement and 19th in accuracy." in line


# ------------------------------------------------------------------------ lines


def test_all_mappings_and_the_papers_strategies():
    assert list(MAPPINGS) == ALL and len(ALL) == 20
    explorer = LayerMappingExplorer(SCORES)
    assert explorer.mapping == (2, 4, 6) and explorer.values["strategy"] == "uniform"
    for name, mapping in (("top", (4, 5, 6)), ("bottom", (1, 2, 3)), ("uniform", (2, 4, 6))):
        explorer.controls["strategy"].value = name
        assert explorer.mapping == explorer.state["mapping"] == mapping
        assert controls_of(explorer) == (mapping, name) and explorer.state["strategy"] == name


@pytest.mark.parametrize("mapping", ALL)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_moved_line_pushes_and_never_crosses(mapping, layer):
    for target in range(1, 7):
        after = move_line(mapping, layer, target)
        assert after in ALL
        assert after[layer - 1] == min(max(target, layer), layer + 3)
        # of all mappings with the line there, the one that moves the others least
        way = {
            g: sum(abs(a - b) for a, b in zip(g, mapping, strict=True)) for g in ALL if g[layer - 1] == after[layer - 1]
        }
        assert way[after] == min(way.values()) and list(way.values()).count(way[after]) == 1


def test_dragging_a_line_ends_where_the_pointer_is(anywhere):
    """A walk of 60 drags over the mappings, each from where the last one ended."""
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        layer, target = int(generator.integers(1, 4)), int(generator.integers(1, 7))
        after = move_line(anywhere.mapping, layer, target)
        drag(anywhere, layer, target)
        assert anywhere.state["mapping"] == anywhere.mapping == after and anywhere.state["layer"] == layer
        assert controls_of(anywhere) == (after, strategy_of(after))
        assert anywhere.state["agreement"]["seeds"] == SCORES[after]["agreement"]
        seen.add(after)
    assert len(seen) > 10


def test_lines_that_were_pushed_come_back_while_the_drag_goes_on():
    explorer = LayerMappingExplorer(SCORES, (1, 2, 3))
    drag(explorer, 1, 2, 3, 4)
    assert explorer.mapping == (4, 5, 6)
    assert explorer.state["message"] == "Student layers 2 and 3 are pushed along: lines do not cross."
    explorer.act([["move", *at_end(2)]])
    assert explorer.mapping == (2, 3, 4)
    explorer.act([["move", *at_end(1)]])
    assert explorer.mapping == (1, 2, 3) and explorer.state["message"] == ""
    drag(explorer, 3, 6)
    drag(explorer, 2, 1)  # a new drag begins where the last one ended
    assert explorer.mapping == (1, 2, 6)


def test_what_stops_or_pushes_is_said_everywhere():
    explorer = LayerMappingExplorer(SCORES, (1, 3, 6))
    drag(explorer, 1, 6)
    message = "Student layer 1 stops at teacher layer 4: lines do not cross."
    assert explorer.mapping == (4, 5, 6) and explorer.state["message"] == message
    assert all(message in words for words in (explorer.line.value, explorer.alt, explorer.image.spoken))
    drag(explorer, 3, 5)
    assert explorer.mapping == (3, 4, 5)
    explorer.controls["layer_2"].value = 3
    assert explorer.state["message"] == "Student layer 1 is pushed along: lines do not cross."
    explorer.controls["layer_3"].value = 6
    assert explorer.state["message"] == "" and "cross" not in explorer.line.value


def test_pointer_outside_the_column_stays_within_it():
    explorer = LayerMappingExplorer(SCORES, (2, 3, 5))
    drag(explorer, 3, 5)
    explorer.act([["move", TEACHER_LEFT + 400, -500]])
    assert explorer.mapping == (2, 3, 6) and explorer.state["message"] == ""
    drag(explorer, 1, 2)
    explorer.act([["move", TEACHER_LEFT, 5_000]])
    assert explorer.mapping == (1, 3, 6) and explorer.state["message"] == ""


def test_a_line_is_picked_up_along_its_way_and_at_its_boxes():
    mapping = (1, 3, 6)
    for m, g in enumerate(mapping, 1):
        (x, y), (right, end) = (STUDENT_LEFT + BOX_WIDTH, student_row(m)), at_end(g)
        for share in (0, 0.3, 0.6, 1):
            assert line_at(x + share * (right - x), y + share * (end - y), mapping) == m
        assert line_at(STUDENT_LEFT + 10, y + GRAB - 5, mapping) == m
        assert line_at(TEACHER_LEFT + BOX_WIDTH, end - GRAB + 5, mapping) == m
    for layer in (2, 4, 5):  # nothing ends there
        assert line_at(TEACHER_LEFT + BOX_WIDTH / 2, teacher_row(layer), mapping) is None


def test_a_press_beside_the_lines_moves_nothing():
    explorer = LayerMappingExplorer(SCORES, (1, 3, 6))
    explorer.act([["down", TEACHER_LEFT + 50, teacher_row(5)], ["move", *at_end(4)], ["move", *at_end(1)]])
    assert explorer.mapping == (1, 3, 6) and explorer.state["layer"] is None
    drag(explorer, 2, 4)
    explorer.act([["down", TEACHER_LEFT + 50, teacher_row(2)], ["move", *at_end(2)]])  # the drag before has ended
    assert explorer.mapping == (1, 4, 6)


def test_a_line_follows_on_the_teachers_half_only():
    explorer = LayerMappingExplorer(SCORES, (1, 3, 6))
    left, right = STUDENT_LEFT + BOX_WIDTH, TEACHER_LEFT
    explorer.act([["down", STUDENT_LEFT + 20, student_row(2)], ["move", left + 0.4 * (right - left), teacher_row(5)]])
    assert explorer.mapping == (1, 3, 6) and explorer.state["layer"] == 2
    explorer.act([["move", left + 0.6 * (right - left), teacher_row(5)]])
    assert explorer.mapping == (1, 5, 6)


def test_a_press_alone_chooses_and_does_not_move():
    explorer = LayerMappingExplorer(SCORES, (1, 3, 6))
    explorer.act([["down", TEACHER_LEFT, teacher_row(3) + 15]])
    assert explorer.mapping == (1, 3, 6) and explorer.state["layer"] == 2


# ------------------------------------------------------------------------ keys and controls


def test_the_keyboard_chooses_a_layer_and_moves_its_line():
    explorer = LayerMappingExplorer(SCORES)
    explorer.act([["focus"]])
    assert (explorer.mapping, explorer.state["layer"]) == ((2, 4, 6), 1)
    for key, mapping, layer in (
        ("ArrowUp", (3, 4, 6), 1),
        ("ArrowUp", (4, 5, 6), 1),
        ("ArrowUp", (4, 5, 6), 1),
        ("ArrowLeft", (4, 5, 6), 1),
        ("ArrowRight", (4, 5, 6), 2),
        ("ArrowDown", (3, 4, 6), 2),
        (" ", (3, 4, 6), 3),
        ("ArrowRight", (3, 4, 6), 3),
        ("ArrowDown", (3, 4, 5), 3),
        ("Enter", (3, 4, 5), 1),
        ("ArrowDown", (2, 4, 5), 1),
        ("ArrowDown", (1, 4, 5), 1),
        ("ArrowDown", (1, 4, 5), 1),
    ):
        explorer.act([["key", key]])
        assert (explorer.mapping, explorer.state["layer"]) == (mapping, layer), key
        assert controls_of(explorer) == (mapping, strategy_of(mapping))
    state = explorer.state
    words = f"Student layer 1 learns from teacher layer 1. Agreement {state['agreement']['mean']:.1f} %, "
    assert explorer.image.spoken.startswith(words)
    assert f"loss {loss_in_words(state['loss']['mean'])}, " in explorer.image.spoken


def test_keys_while_a_line_is_held_and_many_events_at_once():
    explorer = LayerMappingExplorer(SCORES, (1, 2, 3))
    explorer.act([["down", *at_end(3)], ["move", *at_end(6)], ["key", "ArrowLeft"], ["key", "ArrowUp"]])
    assert explorer.mapping == (1, 3, 6) and explorer.state["layer"] == 2


def test_the_buttons_do_what_dragging_does(anywhere):
    """A walk of 60 presses."""
    generator = np.random.default_rng(1)
    for _ in range(60):
        layer = int(generator.integers(1, 4))
        row = anywhere.controls[f"layer_{layer}"]
        assert list(row.options) == [(str(g), g) for g in range(layer, layer + 4)]
        target = int(generator.integers(layer, layer + 4))
        after = move_line(anywhere.mapping, layer, target)
        row.value = target
        assert anywhere.state["mapping"] == after and controls_of(anywhere) == (after, strategy_of(after))


def test_a_change_is_one_event_and_draws_one_picture(monkeypatch):
    explorer, drawn = LayerMappingExplorer(SCORES, (1, 2, 3)), []
    monkeypatch.setattr(explorer.image, "show", lambda png, alt: drawn.append(alt))
    explorer.controls["layer_1"].value = 4  # three rows and the strategy change
    assert len(drawn) == 1
    drag(explorer, 1, 3, 2, 1)
    assert len(drawn) == 2


def test_no_strategy_is_chosen_by_taking_it_away():
    explorer = LayerMappingExplorer(SCORES)
    explorer.controls["strategy"].value = None
    assert controls_of(explorer) == ((2, 4, 6), "uniform") and explorer.mapping == (2, 4, 6)


def test_every_button_says_in_full_what_it_does():
    explorer = LayerMappingExplorer(SCORES)
    assert explorer.controls["layer_2"].tooltips[1] == "student layer 2 learns from teacher layer 3"
    assert explorer.controls["strategy"].tooltips[1] == "teacher layers 4, 5 and 6"


# ------------------------------------------------------------------------ picture and words


@pytest.mark.parametrize("mapping", [(2, 4, 6), (1, 2, 3), (3, 4, 6)])
def test_the_picture_joins_the_layers_and_marks_the_scores(mapping, shown, drawn_anew):
    explorer = LayerMappingExplorer(SCORES)
    show(explorer, mapping)
    picture = shown(explorer).astype(int)
    assert picture.shape == (500, 900, 3) and np.array_equal(picture, drawn_anew(explorer))
    blue = (picture[..., 2] - picture[..., 0] > 120) & (picture[..., 1] < 140)
    for m, g in enumerate(mapping, 1):
        x, y = (STUDENT_LEFT + BOX_WIDTH + TEACHER_LEFT) / 2, (student_row(m) + teacher_row(g)) / 2
        assert blue[round(y) - 2 : round(y) + 3, round(x)].any(), f"no line from {m} to {g}"
    for g in range(1, 7):
        y = round(teacher_row(g))
        assert blue[y, TEACHER_LEFT - 3] == (g in mapping), "an end of a line where none is, or none where one is"
        filled = (picture[y + 10, TEACHER_LEFT + 10 : TEACHER_LEFT + 20] != 255).any()
        assert filled == (g in mapping)
    # in both strips and clouds the dots of this mapping, at its values, and at no other mapping's
    for name, (strip, cloud) in zip(("agreement", "accuracy"), panels(explorer), strict=True):
        own = explorer.state[name]
        order = sorted(ALL, key=lambda g: -np.mean(SCORES[g][name]))
        for g in ALL:
            for seed in SCORES[g][name]:
                x, y = pixel(explorer, strip, order.index(g) + 1, seed)
                # a seed of this mapping may lie under the white edge of the next
                assert blue[y - 3 : y + 4, x - 1 : x + 2].any() == (g == mapping), (name, g)
        x, y = pixel(explorer, cloud, explorer.state["loss"]["mean"], own["mean"])
        assert blue[[y - 2, y + 2], [x - 2, x + 2]].all()  # beside the cross of its ranges, so within its dot


def panels(explorer):
    """(strip, cloud) of agreement and of accuracy, from their places in the figure."""
    plots = [axes for axes in explorer.figure.axes if axes.axison]
    plots.sort(key=lambda axes: (-round(axes.get_position().y0, 3), axes.get_position().x0))
    return [plots[:2], plots[2:]]


def pixel(explorer, axes, x, y):
    across, up = axes.transData.transform((x, y))
    return int(across), int(explorer.figure.bbox.height - up)


def test_all_scores_are_within_the_axes_and_the_lowest_loss_is_framed(shown):
    explorer = LayerMappingExplorer(SCORES)
    lowest = min(ALL, key=lambda g: np.mean(SCORES[g]["loss"]))
    red = shown(explorer).astype(int)
    red = (red[..., 0] - red[..., 2] > 150) & (red[..., 1] < 140)
    for name, (strip, cloud) in zip(("agreement", "accuracy"), panels(explorer), strict=True):
        for axes, table in ((strip, [SCORES[g][name] for g in ALL]), (cloud, [SCORES[g][name] for g in ALL])):
            low, high = axes.get_ylim()
            assert low < np.min(table) and high > np.max(table)
        low, high = cloud.get_xlim()
        assert all(low < loss < high for g in ALL for loss in SCORES[g]["loss"])
        x, y = pixel(explorer, cloud, np.mean(SCORES[lowest]["loss"]), np.mean(SCORES[lowest][name]))
        frame = red[y - 14 : y + 15, x - 14 : x + 15]
        assert frame[14, :10].any() and frame[14, 19:].any() and frame[:10, 14].any() and not frame[14, 14]


def test_near_ties_stand_out_in_the_picture(shown):
    explorer = LayerMappingExplorer(SCORES, (1, 4, 5))
    picture = shown(explorer).astype(int)
    ties = explorer.state["accuracy"]["near_ties"]
    assert 0 < len(ties) < 19
    _, cloud = panels(explorer)[1]
    for g in set(ALL) - {(1, 4, 5)}:
        x, y = pixel(explorer, cloud, np.mean(SCORES[g]["loss"]), np.mean(SCORES[g]["accuracy"]))
        red, _, blue = picture[y, x]
        if max(abs(red - 0), abs(blue - 178)) > 30:  # not under the dot of this mapping
            assert (blue - red > 80) == (g in ties), g


@pytest.mark.parametrize("layer, target", [(1, 6), (2, 6), (3, 1), (1, 2)])
def test_no_words_leave_the_picture_or_meet(layer, target):
    """With the longest words: a named strategy, two digits of the place, which is shared, a line that is stopped."""
    scores = {g: {name: [88.8, 88.8, 88.8 + (sum(g) % 2)] for name in MEASURES} for g in ALL}
    explorer = LayerMappingExplorer(scores)
    drag(explorer, layer, target)
    figure = explorer.figure
    renderer = figure.canvas.get_renderer()
    words = [t for t in [*figure.texts, *(t for axes in figure.axes for t in axes.texts)] if t.get_text()]
    boxes = {t.get_text(): t.get_window_extent(renderer) for t in words}
    assert len(words) > 15
    for text, box in boxes.items():
        assert min(box.x0, box.y0) >= 0 and box.x1 <= 900 and box.y1 <= 500, text
    for (text, box), (other, second) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(second), (text, other)


def test_the_area_holds_all_boxes():
    area = LayerMappingExplorer(SCORES).image.area
    right, bottom = area[0] + area[2], area[1] + area[3]
    assert area == AREA
    assert area[0] <= STUDENT_LEFT and right >= TEACHER_LEFT + BOX_WIDTH
    assert area[1] <= teacher_row(6) - GRAB and bottom >= teacher_row(1) + GRAB


def test_words_say_the_numbers():
    explorer = LayerMappingExplorer(SCORES, (2, 4, 6))
    state = explorer.state
    agreement, accuracy, loss, lowest = (state[name] for name in (*MEASURES, "lowest_loss"))

    def ties(own):
        return f"{len(own['near_ties'])} near ties leave {ordinal(own['best'])} to {ordinal(own['worst'])} open"

    assert len(agreement["near_ties"]) > 1 and len(accuracy["near_ties"]) > 1
    assert explorer.summary(state) == (
        "Student layers 1, 2 and 3 learn from teacher layers 2, 4 and 6 (uniform). "
        f"Agreement with the teacher: {agreement['mean']:.1f} % (seeds {agreement['low']:.1f} to "
        f"{agreement['high']:.1f} %), {ordinal(agreement['rank'])} of 20; {ties(agreement)}. "
        f"Accuracy from 1,500 labels: {accuracy['mean']:.1f} % (seeds {accuracy['low']:.1f} to "
        f"{accuracy['high']:.1f} %), {ordinal(accuracy['rank'])} of 20; {ties(accuracy)}. "
        f"Training loss: {loss['mean']:.2f} (seeds {loss['low']:.2f} to {loss['high']:.2f}), "
        f"{ordinal(loss['rank'])} lowest of 20; each mapping has targets of its own. "
        f"The mapping of the lowest loss is {ordinal(lowest['agreement']['rank'])} in agreement and "
        f"{ordinal(lowest['accuracy']['rank'])} in accuracy."
    )
    assert explorer.summary(state) in explorer.alt and "1 to 2, 2 to 4, 3 to 6" in explorer.alt
    assert explorer.image.alt == explorer.alt and explorer.summary(state) in explorer.line.value
    data, metadata = explorer._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == explorer.alt
    assert base64.b64decode(data["image/png"]) == explorer.image.value
    assert repr(explorer) == "LayerMappingExplorer(layer_1=2, layer_2=4, layer_3=6, strategy='uniform')"


def test_the_lowest_loss_is_called_so():
    lowest = min(ALL, key=lambda g: np.mean(SCORES[g]["loss"]))
    explorer = LayerMappingExplorer(SCORES, lowest)
    assert explorer.state["loss"]["rank"] == 1 and "), lowest of 20;" in explorer.line.value


def test_places_and_losses_in_words():
    places = [ordinal(n) for n in (1, 2, 3, 4, 10, 11, 12, 13, 20, 21)]
    assert places == ["1st", "2nd", "3rd", "4th", "10th", "11th", "12th", "13th", "20th", "21st"]
    assert [loss_in_words(x) for x in (1.3, 0.04567, 120.2, 2)] == ["1.30", "0.0457", "120", "2.00"]


# ------------------------------------------------------------------------ what is refused, what is recorded


def without(mapping):
    return {g: record for g, record in SCORES.items() if g != mapping}


@pytest.mark.parametrize(
    "scores, words",
    [
        (without((2, 4, 6)), r"scores must have the 20 rising mappings .*\[\(2, 4, 6\)\] missing"),
        (SCORES | {(3, 2, 1): SCORES[1, 2, 3]}, r"scores must have .*none missing, \[\(3, 2, 1\)\] not allowed"),
        (without((1, 2, 3)) | {(0, 1, 2): SCORES[1, 2, 3]}, "scores must have the 20 rising mappings"),
        ({"2, 4, 6": SCORES[2, 4, 6]}, "scores must have the 20 rising mappings"),
        ([SCORES], "scores must be a dict"),
        (SCORES | {(2, 4, 6): {"agreement": [80, 81, 82]}}, "scores must have the same two or more seeds"),
        (change(SCORES, (1, 2, 3), "loss", [1.0, 2.0]), r"scores must .* same two or more seeds .*got \[2, 3\]"),
        (made_up(seeds=1), r"scores must have the same two or more seeds .*got \[1\]"),
        (change(SCORES, (1, 2, 3), "accuracy", [80, float("nan"), 81]), r"scores\[\(1, 2, 3\)\]\['accuracy'\] must be"),
        (change(SCORES, (1, 2, 3), "agreement", [80, 101]), "scores must have the same two or more seeds"),
        (change(SCORES, (1, 2, 4), "agreement", [80, 101, 81]), r"scores\[.*\]\['agreement'\] must be per cent, 0 to"),
        (change(SCORES, (1, 3, 4), "loss", [1, -1, 1]), r"scores\[\(1, 3, 4\)\]\['loss'\] must be finite and >= 0"),
        (change(SCORES, (1, 3, 4), "loss", [1, float("inf"), 1]), r"scores\[\(1, 3, 4\)\]\['loss'\] must be finite"),
    ],
)  # fmt: skip
def test_scores_of_another_form_are_refused(scores, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        LayerMappingExplorer(scores)


@pytest.mark.parametrize("mapping", [(2, 2, 6), (6, 4, 2), (0, 1, 2), (4, 5, 7), (2, 4), (0, 2, 4, 6, 7)])
def test_a_mapping_that_is_not_rising_is_refused(mapping):
    with pytest.raises(ValueError, match="^mapping must be three rising layers in 1 .. 6, got"):
        LayerMappingExplorer(SCORES, mapping)


def test_losses_above_100_and_more_seeds_are_allowed():
    scores = {g: record | {"loss": [250.0] * 5} for g, record in made_up(seeds=5).items()}
    assert LayerMappingExplorer(scores).state["loss"]["mean"] == 250


def test_without_scores_the_recorded_ones_are_shown(monkeypatch):
    study = types.ModuleType("layer_mappings")
    study.scores = lambda summary: {"the summary": SCORES}[summary]
    monkeypatch.setitem(sys.modules, "effnlp_lessons.studies.layer_mappings", study)
    monkeypatch.setattr(studies, "layer_mappings", study, raising=False)
    monkeypatch.setattr(runner, "load_results", lambda name: {"layer_mappings": "the summary"}[name])
    assert LayerMappingExplorer().state == LayerMappingExplorer(SCORES).state


def test_an_event_takes_less_than_50_ms(assert_fast):
    """Median processor time of dragging, keys and buttons; the best of three rounds decides."""
    explorer = LayerMappingExplorer(SCORES, (1, 2, 3))
    acts = {
        "drag": lambda turn: drag(explorer, 1, turn % 3 + 2),
        "key": lambda turn: explorer.act([["key", ("ArrowUp", "ArrowDown")[turn % 2]]]),
        "layer": lambda turn: setattr(explorer.controls["layer_2"], "value", turn % 4 + 2),
        "strategy": lambda turn: setattr(explorer.controls["strategy"], "value", ("top", "bottom")[turn % 2]),
    }
    for name, act in acts.items():
        assert_fast(name, act)
