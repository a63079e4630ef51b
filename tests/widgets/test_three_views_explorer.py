"""The explorer of the three views: its numbers are those of dense powers, plain convolution and finer integration."""

import base64
import html
import itertools

import numpy as np
import pytest
import torch

from effnlp_lessons.architectures.hippo import integrate, random_memory
from effnlp_lessons.widgets.three_views_explorer import FOLLOWS, RATES, STATES, STAYS, STEPS, ThreeViewsExplorer
from effnlp_lessons.widgets.three_views_numbers import (
    KINDS,
    LAGS,
    LEGS,
    LENGTH,
    LIN,
    PIECES,
    RANDOM,
    SIGNALS,
    kernel_of,
    make_model,
    pieces_of,
    run_views,
    signal_at,
    solve,
)
from effnlp_lessons.widgets.three_views_picture import CURVES, round_up

ORDER = ("kind", "state", "signal", "rate", "follows", "step", "position")
OPENS = {
    "kind": LEGS, "state": 16, "signal": "steps", "rate": "full", "follows": STAYS, "step": 0.04, "position": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def made():
    return ThreeViewsExplorer()


@pytest.fixture
def explorer(made):
    set_to(made)
    return made


def set_to(explorer, **values):
    """The opening state but for `values`, set control by control; returns the state."""
    for name in ORDER:
        explorer.controls[name].value = {**OPENS, **values}[name]
    return explorer.state


def numbers_of(explorer, **values):
    return explorer.numbers(**{**OPENS, **values})


def dense_model(kind, state):
    """(A, B, C) written anew, in numpy alone but for the random A; complex for S4D-Lin."""
    if kind == LEGS:
        n = np.arange(state)
        b = np.sqrt(2 * n + 1)
        a = np.array([[-b[i] * b[j] if i > j else -(i + 1.0) * (i == j) for j in n] for i in n])
        return a, b, b * np.array([np.polynomial.Legendre.basis(i)(2 * np.exp(-1.0) - 1) for i in n])
    if kind == LIN:
        rates = -0.5 + 1j * np.pi * np.arange(state // 2)
        answers = np.exp(np.outer(rates, LAGS.numpy()))
        answers = np.concatenate([answers.real, answers.imag])
    else:
        a, b = (part.numpy() for part in random_memory(state, torch.Generator().manual_seed(0)))
        answers = np.stack([expm(lag * a) @ b for lag in LAGS.numpy()], 1)
    c = np.linalg.pinv(answers / 64, rcond=0.03)[64]
    if kind == RANDOM:
        return a, b, c
    c = (c[: state // 2] - 1j * c[state // 2 :]) / 2
    return np.diag(np.concatenate([rates, rates.conj()])), np.ones(state), np.concatenate([c, c.conj()])


def expm(matrix):
    """By its series, and squared."""
    squarings = max(0, int(np.log2(np.abs(matrix).sum(1).max() + 1e-9)) + 2)
    power = total = np.eye(len(matrix))
    for n in range(1, 25):
        power = power @ matrix / 2**squarings / n
        total = total + power
    return np.linalg.matrix_power(total, 2**squarings)


def discrete(a, b, step):
    left = np.linalg.inv(np.eye(len(b)) - step / 2 * a)
    return left @ (np.eye(len(b)) + step / 2 * a), step * left @ b


# ------------------------------------------------------------------------ the views


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", STATES)
def test_kernel_and_outputs_are_those_of_dense_powers(explorer, kind, state):
    a, b, c = dense_model(kind, state)
    for step, (rate, every), follows in itertools.product((STEPS[0], 0.04, STEPS[-1]), RATES.items(), (STAYS, FOLLOWS)):
        for signal in ("impulse", "noise"):
            shown = numbers_of(
                explorer, kind=kind, state=state, step=step, rate=rate, follows=follows, signal=signal, position=9
            )
            assert shown["model step"] == pytest.approx(step * (every if follows == FOLLOWS else 1))
            a_bar, b_bar = discrete(a, b, shown["model step"])
            x, states, kernel = np.zeros(state), [], []
            power = np.eye(state)
            for u in shown["samples"]:
                x = a_bar @ x + b_bar * u
                kernel.append((c @ power @ b_bar).real)
                states.append(x)
                power = a_bar @ power
            count = LENGTH // every
            y = np.convolve(shown["samples"], kernel)[:count]
            for name, truth in (
                ("kernel", kernel), ("convolution", y), ("recurrent", y), ("recurrent", (np.array(states) @ c).real),
            ):  # fmt: skip
                assert shown[name].shape == (count,) and np.abs(shown[name] - truth).max() < 1e-10, (name, step, every)
            x = states[8]
            if kind == LIN:  # of each pair the real and the imaginary part are kept
                x = np.concatenate([x[: state // 2].real, x[: state // 2].imag])
            assert np.abs(shown["x"] - x).max() < 1e-10 * max(1, np.abs(x).max())
            assert shown["apart"] < 1e-10


def test_powers_and_the_wrong_ways_differ():
    """The kernels are close enough that only the right one is within 1e-10."""
    right = kernel_of(LEGS, 8, 0.04, 32)
    a, b, c = dense_model(LEGS, 8)
    held = expm(0.04 * a), np.linalg.solve(a, (expm(0.04 * a) - np.eye(8)) @ b)
    other = [c @ np.linalg.matrix_power(held[0], i) @ held[1] for i in range(32)]
    assert np.abs(right.numpy() - other).max() > 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [STEPS[0], STEPS[-1]])
def test_the_continuous_view_is_exact_for_a_signal_of_steps(kind, step):
    """Level stretches of the signal, each crossed by one exponential of A."""
    a, b, c = dense_model(kind, 16)
    x, at = np.zeros(16), 0
    shown = run_views(kind, 16, step, "steps", LENGTH).continuous
    for end, level in ((8, 0.0), (40, 1.0), (56, -0.5), (96, 0.75), (128, 0.0)):
        for moment in np.linspace(at, end, 5)[1:]:
            flow = expm(step * (moment - at) * a)
            there = flow @ x + np.linalg.solve(a, (flow - np.eye(16)) @ b) * level
            assert abs((c @ there).real - shown[round(moment * PIECES / LENGTH) - 1]) < 1e-9
        x, at = there, end


@pytest.mark.parametrize("signal", ["chirp", "noise"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_continuous_view_is_that_of_fine_integration(kind, signal):
    """Runge-Kutta on the smooth signal; a sine of 16 samples in pieces of 1/8 loses (pi/128)^2 / 6 = 0.01 %."""
    model, step = make_model(kind, 8), 0.04
    at = lambda t: signal_at(signal, np.array([t / step]))[0]  # noqa: E731
    states = integrate(model.a, model.b, at, step * LENGTH, 4 * LENGTH)
    y = (states @ model.c).numpy()
    shown = run_views(kind, 8, step, signal, LENGTH).continuous
    assert np.abs(shown[1::2] - y).max() < 2e-3 < 0.1 * np.abs(y).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signal", ["chirp", "noise"])
def test_the_error_of_the_step_is_of_second_order(explorer, kind, signal):
    """A doubled step makes the distance to continuous time about four times as large: 3.2 to 5 times here."""
    settings = {"kind": kind, "state": 8, "signal": signal, "step": 0.01, "follows": FOLLOWS, "position": 9}
    errors = [numbers_of(explorer, **settings, rate=rate)["error"] for rate in RATES]
    ratios = np.array(errors[1:]) / errors[:-1]
    assert errors[0] < 0.01 and ((ratios > 3.2) & (ratios < 5)).all(), errors


# ------------------------------------------------------------------------ rates and steps


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_follows_the_rate_gives_the_same_answer(explorer, kind, signal):
    """Off by the error of the larger step, of second order; an impulse is 2 and 4 times as long besides."""
    smooth = signal != "impulse"
    bounds = {"half": 0.03 if smooth else 0.08, "quarter": 0.13 if smooth else 0.2}  # of the largest value
    settings = {"kind": kind, "state": 8 if smooth else 4, "signal": signal, "step": 0.01}
    full = numbers_of(explorer, **settings)["convolution"]
    for rate, bound in bounds.items():
        follows, stays = (
            numbers_of(explorer, **settings, rate=rate, follows=choice, position=9) for choice in (FOLLOWS, STAYS)
        )
        for shown in (follows, stays):
            off = np.abs(shown["convolution"] - full[RATES[rate] - 1 :: RATES[rate]]).max()
            assert np.array_equal(shown["full"], full) and shown["off"] == pytest.approx(off)
        assert follows["off"] < bound * np.abs(full).max() < 0.6 * np.abs(full).max() < stays["off"]


def test_a_smaller_step_stretches_the_kernel(explorer):
    lags = {}
    for step in (0.01, 0.02, 0.04, 0.08):
        shown = numbers_of(explorer, step=step)
        lags[step] = shown["peak"]
        assert shown["delay"] == pytest.approx(1 / step) and abs(shown["peak"] * step - 1) < 0.1
    assert lags[0.01] > 1.9 * lags[0.02] > 3.6 * lags[0.04]
    both = {choice: numbers_of(explorer, rate="half", follows=choice, position=9) for choice in (STAYS, FOLLOWS)}
    assert both[STAYS]["delay"] == 50 and both[FOLLOWS]["delay"] == 25
    same = both[STAYS]["kernel"] - numbers_of(explorer)["kernel"][:64]  # by sample, nothing has changed
    assert np.abs(same).max() < 1e-12


@pytest.mark.parametrize("signal", SIGNALS)
def test_samples_are_means_of_the_same_signal(explorer, signal):
    fine = signal_at(signal, (np.arange(64 * LENGTH) + 0.5) / 64)
    assert np.abs(fine).max() <= 1 and np.abs(pieces_of(signal)).max() > 0.8
    for rate, every in RATES.items():
        samples = numbers_of(explorer, signal=signal, rate=rate, position=9)["samples"]
        assert np.abs(samples - fine.reshape(LENGTH // every, -1).mean(1)).max() < 1e-3
    assert set(numbers_of(explorer, signal="impulse", rate="quarter", position=9)["samples"]) == {0, 0.25}


def test_an_impulse_is_answered_by_the_kernel(explorer):
    shown = numbers_of(explorer, signal="impulse")
    assert np.allclose(shown["recurrent"][4:], shown["kernel"][:-4], atol=1e-12, rtol=0)
    assert np.abs(shown["recurrent"][:4]).max() == 0


# ------------------------------------------------------------------------ what the state remembers


@pytest.mark.parametrize("kind", KINDS)
def test_the_past_ends_now_and_goes_through_the_output(explorer, kind):
    shown = numbers_of(explorer, kind=kind, position=100)
    times, values = shown["past"]
    assert len(times) == len(LAGS) and times[0] == 100 and times[-1] == pytest.approx(50)
    assert values[64] == pytest.approx(shown["recurrent"][99], abs=1e-10) and times[64] == pytest.approx(75)
    early = numbers_of(explorer, kind=kind, position=10)["past"][0]
    assert early.min() >= 0 and len(early) == 26  # nothing before the signal


def test_legs_remembers_the_legendre_series(explorer):
    shown = numbers_of(explorer, signal="noise", position=100)
    v = np.exp(-(100 - shown["past"][0]) * 0.04)
    scaled = shown["x"] * np.sqrt(2 * np.arange(16) + 1)
    assert np.allclose(shown["past"][1], np.polynomial.legendre.legval(2 * v - 1, scaled), atol=1e-10, rtol=0)


def test_legs_remembers_a_smooth_signal_and_a_random_a_does_not(explorer):
    wrong = {}
    for kind, state in itertools.product((LEGS, RANDOM), (8, 32)):
        times, values = numbers_of(explorer, kind=kind, state=state, signal="noise", position=110)["past"]
        wrong[kind, state] = np.sqrt(np.mean((values - signal_at("noise", times))[:65] ** 2))
    print(wrong)
    assert wrong[LEGS, 32] < 0.5 * wrong[LEGS, 8] and wrong[LEGS, 32] < 0.3 * wrong[RANDOM, 32]


@pytest.mark.parametrize("kind", (LIN, RANDOM))
def test_another_state_is_remembered_as_the_smallest_signal_that_leaves_it(kind):
    """The past of a state, read in again, gives the state, but for directions weaker than 3 % of the strongest."""
    model = make_model(kind, 8)
    answers = np.stack([expm(lag * model.a.numpy()) @ model.b.numpy() for lag in LAGS.numpy()], 1) / 64
    past = model.past.numpy()
    assert np.allclose(past @ answers @ past, past, atol=1e-8 * np.abs(past).max())
    assert np.allclose(past @ answers, (past @ answers).T, atol=1e-8)


# ------------------------------------------------------------------------ controls


def test_it_opens_at_the_full_rate_in_the_middle():
    explorer = ThreeViewsExplorer()
    assert explorer.values == OPENS and explorer.controls["position"].max == LENGTH
    assert explorer.controls["follows"].disabled and explorer.state["off"] == 0


def test_the_step_is_doubled_by_four_places_of_the_slider():
    assert len(STEPS) == 17 and STEPS[0] == 0.01 and STEPS[-1] == 0.16 and 0.04 in STEPS
    assert np.allclose(np.array(STEPS[4:]) / STEPS[:-4], 2, rtol=1e-3)


def test_another_rate_keeps_the_moment(explorer):
    control = explorer.controls["position"]
    for rate, count, position in (("half", 64, 32), ("quarter", 32, 16), ("full", 128, 64), ("quarter", 32, 16)):
        explorer.controls["rate"].value = rate
        assert (control.max, control.value) == (count, position)
        assert explorer.controls["follows"].disabled == (rate == "full")
    control.value = 32
    explorer.controls["rate"].value = "full"
    assert control.value == 128
    control.value = 1
    explorer.controls["rate"].value = "half"
    assert control.value == 1 and explorer.state["time"] == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "S5"}, "kind must be one of HiPPO-LegS, S4D-Lin, random stable, got 'S5'"),
        ({"state": 5}, "state must be one of 4, 8, 16, 32, got 5"),
        ({"step": 0.05}, r"step must be one of 0\.01, .*, 0\.16, got 0\.05"),
        ({"rate": "double"}, "rate must be one of full, half, quarter, got 'double'"),
        ({"follows": "yes"}, "follows must be one of False, True, got 'yes'"),
        ({"signal": "speech"}, "signal must be one of impulse, steps, chirp, noise, got 'speech'"),
        ({"position": 0}, r"position must be in 1 \.\. 128, got 0"),
        ({"position": 65, "rate": "half"}, r"position must be in 1 \.\. 64, got 65"),
    ],
)
def test_bad_input_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        ThreeViewsExplorer(**values)


def test_unknown_names_are_refused_below_the_page_too():
    with pytest.raises(ValueError, match="kind must be one of HiPPO-LegS, S4D-Lin, random stable, got 'S5'"):
        make_model("S5", 8)
    with pytest.raises(ValueError, match="signal must be one of impulse, steps, chirp, noise, got 'speech'"):
        signal_at("speech", np.zeros(1))


# ------------------------------------------------------------------------ picture and words

OTHERS = [
    {"step": 0.02}, {"position": 90}, {"rate": "half"}, {"rate": "half", "follows": FOLLOWS}, {"rate": "quarter"},
    *({"kind": kind} for kind in KINDS[1:]), *({"signal": signal} for signal in ("impulse", "chirp", "noise")),
    *({"state": state} for state in (4, 8, 32)),
]  # fmt: skip


def test_the_picture_is_drawn_whole_and_another_for_each_control(explorer, shown, drawn_anew):
    pictures = [shown(explorer)]
    assert pictures[0].shape == (640, 900, 3)
    for values in OTHERS:
        set_to(explorer, **{"position": 64 // RATES[values.get("rate", "full")], **values})
        pictures.append(shown(explorer))
        assert np.array_equal(pictures[-1], drawn_anew(explorer))
    for first, second in itertools.combinations(pictures, 2):
        assert not np.array_equal(first, second)
    set_to(explorer)
    assert np.array_equal(shown(explorer), pictures[0])


@pytest.mark.parametrize("rate", RATES)
def test_marks_are_at_the_numbers(explorer, rate):
    state = set_to(explorer, rate=rate, follows=FOLLOWS, signal="noise", position=20)
    picture, every = explorer._picture, RATES[rate]
    ends = every * np.arange(1, LENGTH // every + 1)
    limit = round_up(max(np.abs(state[name]).max() for name in CURVES))
    assert limit >= np.abs(state["full"]).max() and picture._limits[0].get_text() == f"{limit:g}"
    for name, x, y in (
        ("continuous", np.arange(1, PIECES + 1) / 8, state["continuous"]),
        ("recurrent", ends[:20], state["recurrent"][:20]),
        ("convolution", ends, state["convolution"]), ("full", np.arange(1, LENGTH + 1), state["full"]),
    ):  # fmt: skip
        assert np.array_equal(picture._curves[name].get_xdata(), x)
        assert np.allclose(limit * picture._curves[name].get_ydata(), y)
    assert picture._curves["full"].get_visible() == (every > 1)
    assert np.array_equal(picture._samples.get_xydata(), np.stack([ends - every / 2, state["samples"]], 1))
    assert np.array_equal(picture._signal.get_ydata(), state["pieces"])
    drawn = np.concatenate([picture._used.get_ydata(), picture._unused.get_ydata()])
    assert len(picture._used.get_ydata()) == 20 and np.abs(drawn).max() == 1
    assert np.allclose(drawn * abs(state["kernel"][state["peak"]]), state["kernel"])
    lags = np.concatenate([picture._used.get_xdata(), picture._unused.get_xdata()])
    assert np.array_equal(lags, every * np.arange(len(lags)))
    heights = [path.vertices[0, 1] for path in picture._bars.get_paths()]
    assert np.allclose(np.array(heights) * np.abs(state["x"]).max(), state["x"])
    assert [line.get_xdata()[0] for line in picture._nows] == [20 * every] * 2
    assert picture._unit.get_xdata()[0] == pytest.approx(25)
    if every > 1:
        assert picture._read.get_xdata() == pytest.approx([20 * every - 25])
        assert picture._read.get_ydata() == pytest.approx([state["recurrent"][19]])
    else:
        assert len(picture._read.get_xdata()) == 0  # one unit ago the signal had not begun


@pytest.mark.parametrize(
    ("value", "rounded"), [(0, 1), (0.4, 0.5), (1, 1), (1.01, 1.5), (2e-4, 2e-4), (6, 10), (99, 100)]
)
def test_limits_are_round(value, rounded):
    assert round_up(value) == pytest.approx(rounded)


def test_no_words_leave_the_picture_or_meet(explorer):
    settings = itertools.product((LEGS, RANDOM), STEPS[::16], RATES, ((STAYS, 32, "impulse"), (FOLLOWS, 4, "noise")))
    for kind, step, rate, (follows, state, signal) in settings:
        set_to(explorer, kind=kind, step=step, rate=rate, signal=signal, follows=follows, state=state, position=9)
        renderer = explorer.figure.canvas.get_renderer()
        texts = list(explorer._picture._plain.texts)
        for axes in explorer.figure.axes[1:]:
            texts += [*axes.get_yticklabels(), *axes.get_xticklabels()]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
        for place, (text, box) in enumerate(boxes):
            assert box.x0 >= 0 and box.x1 <= 900 and box.y0 >= 0 and box.y1 <= 640, text
            for other, second in boxes[place + 1 :]:
                assert not box.overlaps(second), (text, other, explorer.values)


def test_words(explorer):
    state = set_to(explorer, rate="half", follows=FOLLOWS, signal="noise", position=50)
    line, alt = html.unescape(explorer.line.value), explorer.alt
    kernel, peak = state["kernel"], state["peak"]
    assert "HiPPO-LegS, N = 16, noise at the half rate, 64 samples, Δ = 0.0400 x 2 = 0.0800." in line
    assert "One unit of the model's time is 12.5 samples (25 of the full rate)." in line
    assert f"Kernel: largest {kernel[peak]:.3g}, {peak} samples back." in line
    assert f"After sample 50 of 64: norm of x {np.sqrt((state['x'] ** 2).sum()):.3g}; " in line
    y = f"{state['recurrent'][49]:.3f}"
    assert f"y continuous {state['continuous'][799]:.3f}, recurrent {y}, convolution {y}." in line
    assert "Largest differences: recurrent and convolution < 1e-10; convolution and continuous " in line
    assert f"continuous {state['error']:.3f}, off the answer at the full rate by {state['off']:.3f}." in line
    assert explorer.summary(state) in alt and "continuous as a line, recurrent as circles" in alt
    set_to(explorer, rate="half", position=50)
    assert "Δ = 0.0400, unchanged." in explorer.line.value
    set_to(explorer)
    assert "128 samples, Δ = 0.0400. One unit of the model's time is 25 samples. Kernel" in explorer.line.value
    assert "off the answer" not in explorer.line.value
    data, metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer.image.value
    assert metadata["image/png"]["alt"] == explorer.alt == explorer.image.tooltip


def test_zero_has_no_sign(explorer):
    tiny = {name: -1e-9 * np.ones(PIECES) for name in ("continuous", "recurrent", "convolution")}
    assert "y continuous 0.000, recurrent 0.000, convolution 0.000." in explorer.summary(explorer.state | tiny)


def test_views_that_part_are_said_to(explorer):
    state = explorer.state
    assert "recurrent and convolution 3.0e-08;" in explorer.summary(state | {"apart": 3e-8})


def test_events_are_fast(explorer, assert_fast):
    def choose(name, options, **values):
        def act(turn):
            run_views.cache_clear()  # as for a setting that nobody has seen
            explorer.controls[name].value = options[turn % len(options)]

        set_to(explorer, state=32, signal="noise", **values)
        assert_fast(name, act)

    choose("step", STEPS)
    choose("position", range(30, 60))
    choose("rate", ("half", "full", "quarter"))
    choose("follows", (FOLLOWS, STAYS), rate="half", position=20)
    choose("kind", (LIN, RANDOM, LEGS))
    choose("signal", ("chirp", "impulse", "steps", "noise"))
    choose("state", (4, 8, 16, 32))
    assert solve(make_model(LEGS, 4), 0.01, np.zeros(3)).shape == (3,)
