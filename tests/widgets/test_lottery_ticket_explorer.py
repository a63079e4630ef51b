"""The explorer of lottery tickets: pixels and numbers are those of the masks and of the recorded runs."""

import base64

import numpy as np
import pytest
import torch

from effnlp_lessons.pruning.lottery import (
    LAYERS,
    ladder,
    lenet_300_100,
    magnitude_round,
    masks_after,
    removal_rounds,
    shuffled,
)
from effnlp_lessons.pruning.lottery_training import digit_splits
from effnlp_lessons.pruning.masks import full_masks
from effnlp_lessons.studies.lottery_tickets import KINDS, MEASURES, ONE_SHOT, REDRAWN, SHUFFLED, TICKET, control_seed
from effnlp_lessons.widgets.lottery_ticket_explorer import FLOOR, SHOWN, LotteryTicketExplorer
from effnlp_lessons.widgets.lottery_ticket_picture import AREA, CHART, DIGIT, LOOK

ROUNDS, SEEDS, STEPS, EVERY = 20, (3, 4), 110, 20
POINTS = [20, 40, 60, 80, 100, 110]


def made_up():
    """Masks of an untrained net, and numbers that fall with the round; controls at every second round."""
    generator, model = np.random.default_rng(0), lenet_300_100(0)
    masks = [full_masks(model)]
    for _ in range(ROUNDS):
        masks.append(magnitude_round(model, masks[-1]))
    removed = removal_rounds(masks)
    layers = {n: [round(100 * m[n].double().mean().item(), 4) for m in masks] for n in LAYERS}
    runs = []
    for seed in SEEDS:
        run = {"seed": seed, "setting": {"steps": STEPS, "every": EVERY}, "layers": layers}
        run["left"] = [round(left, 4) for left in ladder(ROUNDS)]
        for place, kind in enumerate(KINDS):
            rounds = list(range(ROUNDS + 1)) if kind == TICKET else list(range(2, ROUNDS + 1, 2))
            run[kind] = {"rounds": rounds}
            for name in MEASURES:
                values = 95 - (0.3 + place) * np.array(rounds) / 2 + generator.uniform(-1, 1, len(rounds))
                run[kind][name] = values.round(1).tolist() if name != "early stop" else (20 * (values // 10)).tolist()
        runs.append(run)
    right = torch.full((len(SEEDS), len(KINDS), ROUNDS + 1, len(POINTS)), -1, dtype=torch.int32)
    for place, kind in enumerate(KINDS):
        for number in runs[0][kind]["rounds"]:
            drawn = generator.integers(-20, 20, (len(SEEDS), len(POINTS)))
            right[:, place, number] = torch.from_numpy(940 - 12 * place * number + drawn).int()
    return {"runs": runs}, removed, right


SUMMARY, REMOVED, RIGHT = made_up()
INKED = digit_splits().train[0].sum(0) > 0


def make(**given):
    return LotteryTicketExplorer(SUMMARY, REMOVED, RIGHT, **given)


@pytest.fixture(scope="module")
def anywhere():
    """One explorer for the tests that go to many states: making one takes longer than an event."""
    return make()


def set_to(explorer, **values):
    for name, value in values.items():
        explorer.controls[name].value = value


# ------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("number", [0, 1, 7, 12, 20])
@pytest.mark.parametrize("kind", SHOWN)
def test_state_equals_the_masks_and_the_recorded_numbers(anywhere, number, kind):
    set_to(anywhere, round=number, kind=kind, measure="end")
    state = anywhere.state
    masks = masks_after(REMOVED, number)
    assert state["weights"] == sum(int(mask.sum()) for mask in masks.values())
    assert state["left"] == pytest.approx(ladder(ROUNDS)[number], abs=1e-4)
    for name in LAYERS:
        assert state["layers"][name] == pytest.approx(100 * masks[name].double().mean().item(), abs=1e-4)
    if kind == SHUFFLED and number:
        masks = shuffled(masks, control_seed(3, number))
    first = masks["0.weight"]
    assert np.array_equal(state["pixels"], first.sum(0).view(28, 28).numpy())
    assert state["bare"] == int((first.sum(0) == 0).sum())
    assert state["inked pixels"] == int(INKED.sum())
    assert state["inked"] == pytest.approx((first[:, INKED].sum() / first.sum()).item())
    assert state["shown"] == (kind if number else TICKET)
    for measure in MEASURES:
        set_to(anywhere, measure=measure)
        for k in SHOWN:
            recorded = [dict(zip(run[k]["rounds"], run[k][measure], strict=True)) for run in SUMMARY["runs"]]
            assert (k in anywhere.state["values"]) == (number in recorded[0])
            if number in recorded[0]:
                of_seeds = [run[number] for run in recorded]
                expected = {"mean": np.mean(of_seeds), "lowest": min(of_seeds), "highest": max(of_seeds)}
                assert anywhere.state["values"][k] == pytest.approx(expected)
        dense = [run[TICKET][measure][0] for run in SUMMARY["runs"]]
        assert anywhere.state["dense"]["mean"] == pytest.approx(np.mean(dense))
    for k in SHOWN:
        curve, counts = anywhere.state["curves"].get(k), RIGHT[:, KINDS.index(k), number].double() / 10
        assert (curve is None) == bool((counts < 0).any())
        if curve is not None:
            assert curve["mean"] == pytest.approx(counts.mean(0).tolist())
            assert curve["lowest"] == counts.amin(0).tolist() and curve["highest"] == counts.amax(0).tolist()


def test_one_shot_is_not_mixed_up_with_the_others(anywhere):
    assert ONE_SHOT not in SHOWN and set(anywhere.state["along"]) == set(SHOWN)


def test_numbers_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="given together"):
        LotteryTicketExplorer(SUMMARY)
    other = REMOVED | {"0.weight": REMOVED["0.weight"].clone()}
    other["0.weight"][0, 0] = 21 if REMOVED["0.weight"][0, 0] < 21 else 1
    for removed, right, words in (
        (other, RIGHT, "must leave"),
        ({}, RIGHT, "must be uint8"),
        (REMOVED | {"2.weight": REMOVED["2.weight"].int()}, RIGHT, "must be uint8"),
        (REMOVED, RIGHT[:1], "right must have the shape"),
        (REMOVED, RIGHT[:, :, :5], "right must have the shape"),
    ):
        with pytest.raises(ValueError, match=words):
            LotteryTicketExplorer(SUMMARY, removed, right)
    for bad in ({"round": 21}, {"kind": ONE_SHOT}, {"measure": "loss"}):
        with pytest.raises(ValueError, match="round must be in 0 .. 20"):
            make(**bad)


# ------------------------------------------------------------------------ slider, clicks, keys


def x_of_round(number):
    """Where a round's share lies on the chart, in pixels: the scale is of logarithms, from 100 % to the last."""
    left = ladder(ROUNDS)
    return CHART[0] + CHART[2] * np.log(100 / left[number]) / np.log(100 / left[-1])


def test_a_click_takes_the_nearest_round():
    explorer = make()
    for number in (0, 1, 5, 13, 19, 20, 3):
        explorer.act([["down", x_of_round(number) + 2, CHART[1] + 40]])
        assert explorer.state["round"] == explorer.controls["round"].value == number
        assert explorer.image.spoken.startswith(f"Round {number}, " if number else "Before pruning, ")
    explorer.act([["down", x_of_round(2), 100], ["move", x_of_round(4), 90], ["move", x_of_round(9), 100]])
    assert explorer.state["round"] == 9
    assert tuple(AREA) == CHART
    for x in (0, 899):
        explorer.act([["down", x, 100]])
        assert explorer.state["round"] == (0 if x == 0 else 20)


def test_the_keyboard_goes_through_rounds_and_kinds():
    explorer = make()
    explorer.act([["focus"]])
    assert "Before pruning, 100.00 % left. dense net: " in explorer.image.spoken
    for key, number, kind in (
        ("ArrowLeft", 0, TICKET),
        ("ArrowDown", 0, TICKET),
        ("ArrowRight", 1, TICKET),
        ("ArrowRight", 2, TICKET),
        ("ArrowDown", 2, REDRAWN),
        ("Enter", 2, SHUFFLED),
        (" ", 2, TICKET),
        ("ArrowUp", 2, SHUFFLED),
        ("ArrowRight", 3, SHUFFLED),
    ):
        explorer.act([["key", key]])
        assert (explorer.state["round"], explorer.state["kind"]) == (number, kind), key
        assert (explorer.values["round"], explorer.values["kind"]) == (number, kind)
    assert explorer.image.spoken == "Round 3, 51.28 % left. random mask: not recorded."
    explorer.act([["key", "ArrowRight"]] * 30)
    assert explorer.state["round"] == 20


def test_at_round_0_there_is_one_net():
    explorer = make(kind=SHUFFLED)
    assert explorer.controls["kind"].disabled and (explorer.state["pixels"] == 300).all()
    set_to(explorer, round=2)
    assert not explorer.controls["kind"].disabled and explorer.state["shown"] == SHUFFLED


def test_a_change_is_one_event_and_draws_one_picture(monkeypatch):
    explorer, drawn = make(), []
    monkeypatch.setattr(explorer.image, "show", lambda png, alt: drawn.append(alt))
    explorer.act([["down", x_of_round(5), 100], ["move", x_of_round(9), 100], ["key", "ArrowDown"]])
    set_to(explorer, kind=SHUFFLED)
    set_to(explorer, measure="early stop")
    assert len(drawn) == 3


# ------------------------------------------------------------------------ picture and words


@pytest.mark.parametrize(
    ("number", "kind", "measure"),
    [(0, TICKET, "end"), (7, TICKET, "early stop"), (8, REDRAWN, "tenth"), (20, SHUFFLED, "at early stop")],
)
def test_the_picture_is_drawn_whole(number, kind, measure, shown, drawn_anew):
    explorer = make(round=number, kind=kind, measure=measure)
    picture = shown(explorer)
    assert picture.shape == (510, 900, 3) and np.array_equal(picture, drawn_anew(explorer))
    # the same after other states
    set_to(explorer, round=3, kind=TICKET, measure="end")
    set_to(explorer, measure=measure, kind=kind, round=number)
    assert np.array_equal(shown(explorer), picture)


def test_the_pixels_are_darker_the_more_weights_are_left(shown):
    explorer = make(round=15)
    picture, counts = shown(explorer).astype(int), explorer.state["pixels"]
    left, top, width, _ = DIGIT
    side = width // 28
    places = [(top + side * row + 2, left + side * column + 2) for row in range(28) for column in range(28)]
    light = np.array([picture[y, x].sum() for y, x in places]).reshape(28, 28)
    assert (light[counts == 0] == 3 * 255).all() and light[counts == counts.max()].max() < 200
    for fewer, more in zip(np.unique(counts)[:-1], np.unique(counts)[1:], strict=True):
        assert light[counts == fewer].min() > light[counts == more].max()
    # a dot in the middle of those pixels, and of no other, that are white in every training digit
    red = np.array([picture[y + 3, x + 3] for y, x in places]).reshape(28, 28, 3)
    assert np.array_equal(red[..., 0] - red[..., 2] > 100, ~INKED.view(28, 28).numpy())


def charts(explorer):
    """The upper and the lower chart."""
    return sorted((a for a in explorer.figure.axes if a.axison), key=lambda a: -a.get_position().y0)


def test_the_charts_hold_what_they_show():
    explorer = make(round=14)
    for measure in MEASURES:
        set_to(explorer, measure=measure)
        upper, lower = charts(explorer)
        low, high = upper.get_ylim()
        for kind in SHOWN:
            for value in explorer.state["along"][kind].values():
                assert low < value["lowest"] <= value["highest"] < high
            line = next(line for line in upper.lines if line.get_label() == kind)
            assert list(line.get_ydata()) == [v["mean"] for v in explorer.state["along"][kind].values()]
            assert line.get_color() == LOOK[kind][0]
            for x, number in zip(line.get_xdata(), explorer.state["along"][kind], strict=True):
                assert CHART[0] + CHART[2] * x == pytest.approx(x_of_round(number), abs=0.01)
            curve = explorer._picture._lines[kind]
            assert list(curve.get_xdata()) == POINTS
            assert list(curve.get_ydata()) == explorer.state["curves"][kind]["mean"]
        assert lower.get_ylim()[0] == FLOOR and lower.get_ylim()[1] > 94
    where = explorer._picture._here.get_segments()[0][0][0]
    assert CHART[0] + CHART[2] * where == pytest.approx(x_of_round(14), abs=0.01)
    labels = [text.get_text() for text in upper.get_xticklabels()]
    assert labels == ["100", "50", "20", "10", "5", "2"]


@pytest.mark.parametrize("number", [0, 3, 4, 20])
def test_no_words_leave_the_picture_or_meet(number):
    explorer = make(round=number, kind=SHUFFLED)
    for measure in MEASURES:
        set_to(explorer, measure=measure)
        renderer = explorer.figure.canvas.get_renderer()
        words = [t for t in explorer.figure.texts if t.get_text()]
        words += [axis.label for axes in charts(explorer) for axis in (axes.xaxis, axes.yaxis)]
        words += charts(explorer)[0].get_legend().get_texts()
        boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in words]
        for place, (text, box) in enumerate(boxes):
            assert box.x0 >= 0 and box.x1 <= 900 and box.y0 >= 0 and box.y1 <= 510, text
            for other, second in boxes[place + 1 :]:
                assert not box.overlaps(second), (text, other)


def test_words():
    explorer = make(round=4, kind=SHUFFLED)
    run = SUMMARY["runs"]
    end = {k: [dict(zip(r[k]["rounds"], r[k]["end"], strict=True))[4] for r in run] for k in SHOWN}
    line = explorer.line.value
    assert "Round 4: 109,282 of 266,200 weights left (41.05 %; by layer: first 41.0 %, second 41.0 %, output 65.6 %)." in line  # noqa: E501  # fmt: skip
    for kind, values in end.items():
        assert f"{kind} {np.mean(values):.1f} % ({min(values):.1f} to {max(values):.1f})" in line
    set_to(explorer, measure="early stop", round=0)
    assert "Step of early stop of the dense net: " in explorer.line.value and "random mask" not in explorer.line.value
    for words in ("28 by 28 pixels", "of dense net", "at most 300, none at 0 pixels"):
        assert words in explorer.alt
    data, metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer.image.value
    assert metadata["image/png"]["alt"] == explorer.alt == explorer.image.alt


def test_events_are_fast(assert_fast):
    explorer = make()
    assert_fast("round", lambda turn: set_to(explorer, round=1 + 2 * turn))
    set_to(explorer, kind=SHUFFLED)
    explorer._masks.clear()
    assert_fast("round of a random mask", lambda turn: set_to(explorer, round=2 + 2 * turn))
    assert_fast("key", lambda turn: explorer.act([["key", "ArrowLeft"], ["key", "ArrowDown"]]))


def test_the_recorded_numbers():
    """Without numbers it shows what `lottery_tickets` recorded."""
    from effnlp_lessons.studies.lottery_tickets import by_round, load_tickets
    from effnlp_lessons.studies.runner import load_results

    explorer, summary = LotteryTicketExplorer(round=9), load_results("lottery_tickets")
    values = by_round(summary, REDRAWN, "end")[9]
    assert explorer.state["values"][REDRAWN]["mean"] == pytest.approx(np.mean(values))
    removed, right = load_tickets()
    assert np.array_equal(explorer.state["pixels"], (removed["0.weight"] > 9).sum(0).view(28, 28).numpy())
    # the last measurement is the accuracy at the end
    for kind in KINDS:
        for seed, run in enumerate(summary["runs"]):
            for number, end in zip(run[kind]["rounds"], run[kind]["end"], strict=True):
                assert right[seed, KINDS.index(kind), number, -1] == round(10 * end)
