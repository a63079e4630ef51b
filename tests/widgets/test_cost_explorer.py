import numpy as np
import pytest
import torch

from effnlp_lessons.measure import block_macs
from effnlp_lessons.widgets.cost_explorer import (
    FEED_FORWARD,
    LENGTHS,
    LOOK,
    MODELS,
    PARTS,
    SCORES,
    CostExplorer,
    format_macs,
    format_seconds,
)

RECORDED = [64, 128, 256, 512, 1_024, 2_048]


def power_law(seconds_at_one: float, power: int):
    median = [seconds_at_one * n**power for n in RECORDED]
    return RECORDED, median, [0.9 * t for t in median], [1.2 * t for t in median]


TIMES = {  # scores equal the feed-forward at 3.6e-5 / 4e-8 = 900 tokens
    "attention projections": power_law(1.5e-5, 1),
    "attention scores and mixing": power_law(4e-8, 2),
    "feed-forward": power_law(3.6e-5, 1),
}


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def pixel_of(explorer, axes, x, y) -> tuple[int, int]:
    """(row, column) of the picture where the data point (x, y) of these axes lies."""
    column, height = axes.transData.transform((x, y))
    return explorer.figure.canvas.get_width_height()[1] - 1 - int(height), int(column)


def assert_picture_shows_state(explorer, picture):
    """Line, dots and bars of the picture stand where the numbers of the state say."""
    state = explorer.state
    curves, shares = explorer.figure.axes
    bottom = curves.get_ylim()[0]
    row, column = pixel_of(explorer, curves, state["length"], bottom)
    dark = [c for c in range(column - 8, column + 9) if picture[row - 3, c].sum() < 200]
    assert dark and abs(np.mean(dark) - column) <= 1, (state["length"], column, dark)
    for part, (colour, _) in LOOK.items():
        row, column = pixel_of(explorer, curves, state["length"], state["cost"][part])
        assert picture[row, column].tolist() == rgb(colour), (part, state["length"])
    for place, part in enumerate(PARTS):
        row, start = pixel_of(explorer, shares, 0, place)
        coloured = (picture[row, start + 1 :] == rgb(LOOK[part][0])).all(axis=1)
        width = int(coloured.argmin()) + 1
        expected = pixel_of(explorer, shares, state["share"][part], place)[1] - start
        assert abs(width - expected) <= 1, (part, width, expected)


@pytest.mark.parametrize("model", MODELS)
def test_state_equals_the_library(model):
    explorer = CostExplorer(model=model)
    for length in LENGTHS[::3]:
        explorer.controls["length"].value = length
        macs = block_macs(MODELS[model], length)
        state = explorer.state
        assert state["cost"] == {part: macs[part] for part in PARTS}
        assert state["total"] == sum(macs.values())
        assert state["share"] == {part: macs[part] / sum(macs.values()) for part in PARTS}


@pytest.mark.parametrize("model", MODELS)
def test_macs_cross_where_the_state_says(model):
    crossing = CostExplorer(model=model).state["crossing"]["MACs"]
    below, at, above = (block_macs(MODELS[model], crossing + step) for step in (-1, 0, 1))
    assert at[SCORES] == at[FEED_FORWARD]
    assert below[SCORES] < below[FEED_FORWARD] and above[SCORES] > above[FEED_FORWARD]
    assert crossing in LENGTHS and crossing == 4 * MODELS[model].d_model > MODELS[model].max_length


# lengths at which no dot covers another
@pytest.mark.parametrize(
    "model, length",
    [(model, length) for model in MODELS for length in (32, 56, 320)] + [("MiniLM-L6", 4_096)],
)
def test_picture_shows_the_macs(shown, model, length):
    explorer = CostExplorer(model=model, times=TIMES)
    explorer.controls["length"].value = length
    assert_picture_shows_state(explorer, shown(explorer))


@pytest.mark.parametrize("length", [64, 160, 640, 2_048])
def test_picture_shows_the_recorded_times(shown, length):
    explorer = CostExplorer(times=TIMES)
    explorer.controls["view"].value = "clock"
    explorer.controls["length"].value = length
    assert_picture_shows_state(explorer, shown(explorer))


@pytest.mark.parametrize("view, crossing", [("MACs", 1_536), ("clock", 900)])
def test_picture_marks_crossing_and_positions(shown, view, crossing):
    explorer = CostExplorer(length=64, view=view, times=TIMES)
    picture, curves = shown(explorer), explorer.figure.axes[0]
    # the mark of this view, around the point where the two curves meet: black above and below, not inside
    height = block_macs(MODELS["MiniLM-L6"], 1_536)[SCORES] if view == "MACs" else 900 * 3.6e-5
    row, column = pixel_of(explorer, curves, crossing, height)
    window = picture[row - 14 : row + 15, column].sum(axis=1) < 150
    assert window[:12].any() and window[-12:].any() and not window[12:17].any()
    # on the clock the ring of the MACs at the lower edge; with MACs no sign of what the clock will say
    _, column = pixel_of(explorer, curves, 1_536 if view == "clock" else 900, height)
    bottom = curves.get_window_extent().y0 + 0.05 * curves.get_window_extent().height
    row = picture.shape[0] - 1 - int(bottom)
    rows, columns = np.nonzero(picture[row - 9 : row + 10, column - 9 : column + 10].sum(axis=2) < 150)
    if view == "clock":
        assert len(rows) and abs(rows.mean() - 9) <= 1 and abs(columns.mean() - 9) <= 1
    else:
        assert not len(rows)
    # MiniLM's last position: dots all the way up, darker than the grid
    _, column = pixel_of(explorer, curves, 512, height)
    darkness = (255 - picture[40:330, column - 1 : column + 2, 0].astype(int)).sum(axis=1)
    assert 0.3 < (darkness > 90).mean() < 0.7


def test_crossings_are_at_different_places_beyond_the_positions():
    state = CostExplorer(times=TIMES).state
    assert state["crossing"]["MACs"] == 1_536
    assert state["crossing"]["clock"] == pytest.approx(900)
    assert state["positions"] == 512


def test_the_clock_is_not_given_away_before_it_is_chosen(shown):
    timed, untimed = CostExplorer(length=512, times=TIMES), CostExplorer(length=512)
    assert np.array_equal(shown(timed), shown(untimed))
    assert (timed.alt, timed.line.value) == (untimed.alt, untimed.line.value)
    timed.controls["view"].value = "clock"
    words = "Scores and mixing equal the feed-forward at about 900 tokens; in MACs at 1,536."
    assert timed.alt.endswith(words) and words in timed.line.value


def test_recorded_curves_that_do_not_cross():
    explorer = CostExplorer(view="clock", times={**TIMES, FEED_FORWARD: power_law(1e-3, 2)})
    assert explorer.state["crossing"]["clock"] is None
    assert "equal the feed-forward at no recorded length; in MACs at 1,536." in explorer.line.value


def test_clock_state_is_the_record():
    explorer = CostExplorer(view="clock", times=TIMES)
    for place, length in enumerate(RECORDED):
        explorer.controls["length"].value = length
        state = explorer.state
        assert state["cost"] == {part: pytest.approx(TIMES[part][1][place], rel=1e-12) for part in PARTS}
        assert not state["interpolated"] and "interpolated" not in explorer.line.value


def test_between_recorded_lengths_it_says_so():
    explorer = CostExplorer(length=160, view="clock", times=TIMES)
    assert explorer.state["interpolated"] and "interpolated between recorded lengths" in explorer.line.value
    # straight on log-log axes: a power law is met exactly
    assert explorer.state["cost"][SCORES] == pytest.approx(4e-8 * 160**2)


@pytest.mark.parametrize("length", [32, 56, 2_560, 4_096])
def test_outside_the_recorded_lengths_nothing_is_made_up(shown, drawn_anew, length):
    explorer = CostExplorer(length=length, view="clock", times=TIMES)
    state = explorer.state
    assert state["cost"] is None and state["share"] is None and state["total"] is None
    assert f"{length:,} tokens: not recorded" in explorer.line.value
    assert not explorer.controls["length"].disabled
    shares = explorer.figure.axes[1]
    for place, part in enumerate(PARTS):
        row, start = pixel_of(explorer, shares, 0, place)
        assert not (shown(explorer)[row, start + 2 :] == rgb(LOOK[part][0])).all(axis=1).any()
    assert np.array_equal(shown(explorer), drawn_anew(explorer))


@pytest.mark.parametrize(
    "options", [{}, {"times": TIMES, "model": "BERT-base"}, {"times": TIMES, "timed_model": "BERT-base"}]
)
def test_without_times_the_clock_says_not_recorded(options):
    explorer = CostExplorer(**options)
    assert not explorer.controls["length"].disabled
    explorer.controls["view"].value = "clock"
    assert explorer.controls["length"].disabled
    assert not explorer.controls["model"].disabled and not explorer.controls["view"].disabled
    assert "not recorded" in explorer.line.value and "not recorded" in explorer.alt
    words = [text.get_text() for text in explorer.figure.axes[0].texts]
    assert words == [f"not recorded:\nno times for {explorer.values['model']}"]
    explorer.controls["view"].value = "MACs"
    assert not explorer.controls["length"].disabled and explorer.state["cost"]


def test_every_control_changes_state_and_picture(shown):
    explorer = CostExplorer(times=TIMES)
    for name, value in (("length", 1_024), ("model", "BERT-base"), ("model", "MiniLM-L6"), ("view", "clock")):
        state, picture, alt, line = explorer.state, shown(explorer), explorer.alt, explorer.line.value
        explorer.controls[name].value = value
        assert explorer.state[name] == value and explorer.state["cost"] != state["cost"]
        assert not np.array_equal(shown(explorer), picture)
        assert explorer.alt != alt and explorer.line.value != line and explorer.image.tooltip == explorer.alt


def test_blitted_equals_drawn_anew_and_made_anew(shown, drawn_anew):
    explorer = CostExplorer(times=TIMES)
    generator = np.random.default_rng(1)
    for step in range(12):
        name = ("length", "length", "view", "model")[step % 4]
        options = LENGTHS if name == "length" else explorer.controls[name].options
        explorer.controls[name].value = options[generator.integers(len(options))]
        picture = shown(explorer)
        assert np.array_equal(picture, shown(CostExplorer(**explorer.values, times=TIMES))), explorer
        assert np.array_equal(picture, drawn_anew(explorer)), explorer


def test_words_say_the_numbers():
    explorer = CostExplorer(length=1_536, times=TIMES)
    assert explorer.summary(explorer.state) == (
        "1,536 tokens: 4.53 G MACs a layer; attention projections 20.0 %, attention scores and mixing "
        "40.0 %, feed-forward 40.0 %. Scores and mixing equal the feed-forward at 1,536 tokens."
    )
    assert explorer.summary(explorer.state) in explorer.line.value
    assert explorer.alt.startswith("Two charts for one layer of MiniLM-L6. Left: MACs")
    assert explorer.alt.endswith(explorer.summary(explorer.state))
    data, metadata = explorer._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == explorer.alt
    assert data["text/plain"] == "CostExplorer(length=1536, model='MiniLM-L6', view='MACs')"


@pytest.mark.parametrize(
    "macs, text", [(786_432, "0.786 M"), (37_748_736, "37.7 M"), (999.6e6, "1 G"), (1_207_959_552, "1.21 G")]
)
def test_macs_are_written_short(macs, text):
    assert format_macs(macs) == text


@pytest.mark.parametrize("seconds, text", [(8.2e-5, "0.082 ms"), (0.0768, "76.8 ms"), (0.9996, "1 s"), (2.5, "2.5 s")])
def test_seconds_are_written_short(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("choice", [{"length": 100}, {"model": "GPT-2"}, {"view": "MAC"}, {"timed_model": "T5"}])
def test_a_choice_that_is_not_offered_is_refused(choice):
    (name,) = choice
    with pytest.raises(ValueError, match=f"^{name} must be one of"):
        CostExplorer(**choice)


def broken_times(part=FEED_FORWARD, **columns):
    record = dict(zip(("lengths", "median", "low", "high"), TIMES[part], strict=True), **columns)
    return {**TIMES, part: tuple(record.values())}


@pytest.mark.parametrize(
    "times, message",
    [
        ({}, "times must have the parts"),
        ({**TIMES, "pooler": TIMES[SCORES]}, "times must have the parts"),
        (broken_times(median=[1.0] * 5), "four|of one size"),
        (broken_times(lengths=RECORDED[::-1]), "rising lengths"),
        (broken_times(low=[0.0] + [1.0] * 5), "positive seconds"),
        (broken_times(lengths=[32, *RECORDED[1:]]), "must have the lengths of"),
        ({part: tuple(column[:1] for column in TIMES[part]) for part in PARTS}, "of one size >= 2"),
    ],
)
def test_times_of_another_shape_are_refused(times, message):
    with pytest.raises(ValueError, match=message):
        CostExplorer(times=times)


def test_no_model_runs_in_a_handler(monkeypatch):
    explorer = CostExplorer(times=TIMES)

    def forbidden(*_, **__):
        raise AssertionError("a model ran in a handler")

    monkeypatch.setattr(torch.nn.Module, "__call__", forbidden)
    for name, value in (
        ("length", 2_048),
        ("model", "BERT-large"),
        ("model", "MiniLM-L6"),
        ("view", "clock"),
    ):
        explorer.controls[name].value = value


def test_an_event_takes_less_than_50_ms(assert_fast):
    explorer = CostExplorer(times=TIMES)

    def drag(event: int) -> None:
        explorer.controls["length"].value = LENGTHS[(7 * event) % len(LENGTHS)]

    assert_fast("length", drag, events=64)
