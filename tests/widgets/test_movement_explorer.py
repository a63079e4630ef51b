"""The explorer of movement pruning: points, colours and numbers are those of the masks and of the recorded runs."""

import base64

import numpy as np
import pytest
import torch

from effnlp_lessons.studies.movement import DENSE, HARD, LEVELS, MAGNITUDE, METHODS, SHOWN, SOFT
from effnlp_lessons.widgets.movement_explorer import MOVEMENTS, UPRIGHT, WHATS, MovementExplorer
from effnlp_lessons.widgets.movement_picture import (
    BOTH,
    CHART,
    GROUPS,
    LOOK,
    NARROWEST,
    NEITHER,
    ONLY_MAGNITUDE,
    ONLY_MOVEMENT,
    POINTS,
)

MATRIX, SAMPLE, SEEDS = "attention, query", 600, (5, 6, 7)


def made_up():
    """Weights that move at random, scores that follow them, and accuracies of three seeds."""
    generator = torch.Generator().manual_seed(0)
    weights, runs = {}, []
    for title in SHOWN:
        before = 0.05 * torch.randn(SAMPLE, generator=generator)
        weights[f"before/{title}/weight"] = before.half()
        weights[f"before/{title}/mask"] = torch.ones(SAMPLE, dtype=torch.bool)
        for method in METHODS:
            for level in LEVELS:
                after = before + 0.02 * torch.randn(SAMPLE, generator=generator)
                score = (after - before) * before.sign()
                by = after.abs() if method == MAGNITUDE else score
                kept = by >= by.sort(descending=True).values[SAMPLE * level // 100 - 1]
                weights[f"{method}/{level}/{title}/weight"], weights[f"{method}/{level}/{title}/mask"] = (
                    after.half(),
                    kept,
                )
                if method != MAGNITUDE:
                    weights[f"{method}/{level}/{title}/score"] = score.half()
    for seed in SEEDS:
        models = [{"method": DENSE, "level": 100, "left": 100.0, "right": 82.0 + seed / 10}]
        for place, method in enumerate(METHODS):
            for level in LEVELS:
                left = level + (0.4 if method == SOFT else 0) * (seed - 6)
                models.append(
                    {"method": method, "level": level, "left": left, "right": 70 + place + level / 10 + seed / 5}
                )
        runs.append({"setting": {"distilled": False}, "seed": seed, "models": models})
    runs.append({"setting": {"distilled": True}, "seed": 5, "models": [models[0] | {"right": 1.0}]})
    return {"runs": runs}, weights


SUMMARY, WEIGHTS = made_up()


def make(**given):
    return MovementExplorer(SUMMARY, WEIGHTS, **given)


@pytest.fixture(scope="module")
def anywhere():
    """One explorer for the tests that go to many states: making one takes longer than an event."""
    return make()


def set_to(explorer, **values):
    for name, value in values.items():
        explorer.controls[name].value = value


def kept(method, level, matrix=MATRIX):
    return WEIGHTS[f"{method}/{level}/{matrix}/mask"].numpy()


# ------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("movement", MOVEMENTS)
@pytest.mark.parametrize("matrix", SHOWN)
def test_the_groups_are_those_of_the_masks(anywhere, level, movement, matrix):
    state = anywhere.numbers(level, movement, matrix, "movement")
    by_size, by_movement = kept(MAGNITUDE, level, matrix), kept(movement, level, matrix)
    assert np.array_equal(state["groups"][BOTH] | state["groups"][ONLY_MAGNITUDE], by_size)
    assert np.array_equal(state["groups"][BOTH] | state["groups"][ONLY_MOVEMENT], by_movement)
    assert (sum(members.astype(int) for members in state["groups"].values()) == 1).all()  # each point in one
    assert state["counts"] == {name: int(members.sum()) for name, members in state["groups"].items()}
    assert state["by chance"] == pytest.approx(SAMPLE * (level / 100) ** 2)
    before = WEIGHTS[f"before/{matrix}/weight"].float().numpy()
    assert np.array_equal(state["before"], before)
    for name, members in state["groups"].items():
        size = state["mean size"][name]
        assert (size is None) == (not members.any())
        assert size is None or size == pytest.approx(np.abs(before[members]).mean())


@pytest.mark.parametrize("movement", MOVEMENTS)
def test_what_stands_upright_and_where_it_is_cut(anywhere, movement):
    before = WEIGHTS[f"before/{MATRIX}/weight"].float().numpy()
    for level in LEVELS:
        at = {what: anywhere.numbers(level, movement, MATRIX, what) for what in WHATS}
        after = WEIGHTS[f"{MAGNITUDE}/{level}/{MATRIX}/weight"].float().numpy()
        top, bottom = at["magnitude"]["limits"]
        # the lines separate what magnitude keeps from what it does not; in half precision two weights may be equal
        assert top == -bottom and np.array_equal(at["magnitude"]["height"], after)
        assert ((np.abs(after) >= top) >= kept(MAGNITUDE, level)).all()
        assert (np.abs(after) > top).sum() <= kept(MAGNITUDE, level).sum()
        moved = WEIGHTS[f"{movement}/{level}/{MATRIX}/weight"].float().numpy()
        assert np.array_equal(at["movement"]["height"], moved) and np.array_equal(
            at["change"]["height"], moved - before
        )
        assert at["movement"]["limits"] == at["change"]["limits"] == []
        score, (cut,) = WEIGHTS[f"{movement}/{level}/{MATRIX}/score"].float().numpy(), at["score"]["limits"]
        assert np.array_equal(at["score"]["height"], score)
        assert ((score >= cut) >= kept(movement, level)).all() and (score > cut).sum() <= kept(movement, level).sum()
        for what, state in at.items():
            wide, (low, high) = state["bounds"]
            assert np.abs(state["before"]).max() < wide and low < state["height"].min() and state["height"].max() < high
            assert state["upright"] == UPRIGHT[what]
    # the axes stay while the share changes
    bounds = [anywhere.numbers(level, movement, MATRIX, "score")["bounds"] for level in LEVELS]
    assert bounds == bounds[:1] * len(LEVELS)


def test_no_cut_where_everything_is_kept():
    everything = torch.ones(SAMPLE, dtype=torch.bool)
    weights = WEIGHTS | {f"{SOFT}/50/{MATRIX}/mask": everything}
    explorer = MovementExplorer(SUMMARY, weights, level=50, movement=SOFT, matrix=MATRIX, what="score")
    assert explorer.state["limits"] == [] and explorer.state["mean size"][ONLY_MAGNITUDE] is None
    assert not any(line.get_visible() for line in explorer._picture._limits)


def test_the_accuracies_are_those_of_the_seeds(anywhere):
    for level in LEVELS:
        set_to(anywhere, level=level)
        for method in METHODS:
            found = [
                m for run in SUMMARY["runs"][:3] for m in run["models"] if (m["method"], m["level"]) == (method, level)
            ]
            right, left = [m["right"] for m in found], [m["left"] for m in found]
            expected = {
                "left": np.mean(left),
                "mean": np.mean(right),
                "lowest": min(right),
                "highest": max(right),
                "seeds": 3,
            }
            assert anywhere.state["right"][method] == pytest.approx(expected)
            assert anywhere.state["along"][method][level] == anywhere.state["right"][method]
    assert anywhere.state["dense"]["mean"] == pytest.approx(82.6)  # not the distilled one


def test_numbers_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="given together"):
        MovementExplorer(SUMMARY)
    for name in (f"before/{MATRIX}/weight", f"{HARD}/5/{MATRIX}/score", f"{MAGNITUDE}/50/{MATRIX}/mask"):
        with pytest.raises(ValueError, match="weights must have"):
            MovementExplorer(SUMMARY, {key: value for key, value in WEIGHTS.items() if key != name})
        with pytest.raises(ValueError, match="weights must have"):
            MovementExplorer(SUMMARY, WEIGHTS | {name: WEIGHTS[name][:5]})
    with pytest.raises(ValueError, match="summary must have the models"):
        MovementExplorer({"runs": [SUMMARY["runs"][-1]]}, WEIGHTS)
    for bad in ({"level": 10}, {"movement": MAGNITUDE}, {"matrix": "embeddings"}, {"what": "gradient"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be one of"):
            make(**bad)


# ------------------------------------------------------------------------ picture and words


def test_the_points_have_the_colours_of_their_groups():
    explorer = make(level=15, matrix=MATRIX, what="score")
    for what in WHATS:
        set_to(explorer, what=what)
        state = explorer.state
        for name, line in explorer._picture._groups.items():
            members = state["groups"][name]
            assert np.array_equal(line.get_xdata(), state["before"][members])
            assert np.array_equal(line.get_ydata(), state["height"][members])
            assert line.get_color() == GROUPS[name][0]
        shown = [line.get_ydata()[0] for line in explorer._picture._limits if line.get_visible()]
        assert shown == state["limits"]
    assert len({colour for colour, _, _ in GROUPS.values()}) == len(GROUPS)


def test_the_chart_has_a_log_scale_and_the_measured_shares():
    explorer = make(level=3)

    def pixel(left):
        return CHART[0] + CHART[2] * np.log(100 / left) / np.log(100 / NARROWEST)

    axes = explorer.figure.axes[1]
    for method, (colour, _, _) in LOOK.items():
        line = next(line for line in axes.lines if line.get_color() == colour and len(line.get_xdata()) == len(LEVELS))
        values = explorer.state["along"][method]
        assert list(line.get_ydata()) == [values[level]["mean"] for level in LEVELS]
        assert CHART[0] + CHART[2] * np.array(line.get_xdata()) == pytest.approx(
            [pixel(values[level]["left"]) for level in LEVELS]
        )
        dot = explorer._picture._dots[method]
        assert list(dot.get_ydata()) == [explorer.state["right"][method]["mean"]]
    where = explorer._picture._here.get_segments()[0][0][0]
    assert CHART[0] + CHART[2] * where == pytest.approx(pixel(3))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["100", "50", "15", "5", "3", "1"]
    box = axes.get_window_extent()
    assert (box.x0, box.width, box.height) == pytest.approx((CHART[0], *CHART[2:]))


def test_what_is_blitted_is_what_a_full_drawing_gives(shown, drawn_anew):
    explorer = make(matrix=MATRIX)
    for values in (
        {"level": 50},
        {"level": 3, "what": "score"},
        {"movement": SOFT, "what": "change"},
        {"what": "magnitude"},
    ):
        set_to(explorer, **values)
        assert np.array_equal(shown(explorer), drawn_anew(explorer)), values


@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("level", [50, 3])
def test_no_words_leave_the_picture_or_meet(what, level):
    explorer = make(level=level, what=what)
    renderer = explorer.figure.canvas.get_renderer()
    words = [text for text in explorer.figure.texts if text.get_text()]
    for axes in explorer.figure.axes[:2]:
        words += [axes.xaxis.label, axes.yaxis.label, *axes.texts]
    words += explorer.figure.axes[1].get_legend().get_texts()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in words]
    boxes += [("points", explorer.figure.axes[0].get_window_extent())] if what != "change" else []
    for place, (text, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= 900 and box.y0 >= 0 and box.y1 <= 480, text
        for other, second in boxes[place + 1 :]:
            assert not box.overlaps(second), (text, other)
    assert explorer.figure.axes[0].get_window_extent().x0 == pytest.approx(POINTS[0])


def test_words():
    explorer = make(level=5, matrix=MATRIX, movement=HARD, what="score")
    counts = explorer.state["counts"]
    line = explorer.line.value
    assert f"Of 600 weights both keep {counts[BOTH]}, only magnitude {counts[ONLY_MAGNITUDE]}, only movement" in line
    assert f"neither {counts[NEITHER]}." in line
    assert "movement, hard with 5.0 % left 72.7 % (72.5 to 72.9, 3 seeds)" in line
    assert "dense 82.6 % (82.5 to 82.7, 3 seeds)" in line
    for words in ("upright score of movement", "with a line at", "by chance both would keep 2", "neither 542"):
        assert words in explorer.alt
    set_to(explorer, what="magnitude")
    assert "with lines at plus and minus" in explorer.alt
    data, metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer.image.value
    assert metadata["image/png"]["alt"] == explorer.alt == explorer.image.tooltip


def test_one_seed_is_called_one_seed():
    runs = [
        run | {"models": [m for m in run["models"] if run["seed"] == 5 or m["method"] != SOFT]}
        for run in SUMMARY["runs"]
    ]
    explorer = MovementExplorer({"runs": runs}, WEIGHTS)
    assert "movement, soft with 14.6 % left 74.5 % (1 seed)" in explorer.line.value
    assert explorer.state["right"][SOFT]["seeds"] == 1 and explorer.state["right"][HARD]["seeds"] == 3


def test_events_are_fast(assert_fast):
    # as many points as are recorded
    weights = {name: tensor.repeat(7)[:4_000] for name, tensor in WEIGHTS.items()}
    explorer = MovementExplorer(SUMMARY, weights)
    assert_fast("level", lambda turn: set_to(explorer, level=LEVELS[turn % 4]))


def test_the_recorded_numbers():
    """Without numbers it shows what `movement` recorded."""
    from effnlp_lessons.studies.movement import by_model, shipped
    from effnlp_lessons.studies.runner import load_results

    explorer, models = MovementExplorer(level=3), by_model(load_results("movement"))
    for method in METHODS:
        assert explorer.state["right"][method]["mean"] == pytest.approx(np.mean(models[method, 3]["right"]))
    assert np.array_equal(explorer.state["before"], shipped()["before/feed-forward, expand/weight"].float().numpy())
    # movement keeps other weights than magnitude does: smaller ones
    sizes = explorer.state["mean size"]
    assert sizes[ONLY_MOVEMENT] < sizes[ONLY_MAGNITUDE]
