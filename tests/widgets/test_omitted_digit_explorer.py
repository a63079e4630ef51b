import statistics

import numpy as np
import pytest
import torch

from effnlp_lessons.datasets.digits import Digits, load_digits
from effnlp_lessons.distillation.hinton import soft_cross_entropy, softened_probabilities
from effnlp_lessons.distillation.omitted_digit import shift_bias_
from effnlp_lessons.studies.omitted_digit import load_logits
from effnlp_lessons.widgets.omitted_digit_explorer import (
    LOOK,
    SHIFTS,
    STUDENTS,
    TEMPERATURES,
    OmittedDigitExplorer,
    chance,
    chosen_rows,
    gradient_size,
)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits().subset("test")


@pytest.fixture(scope="module")
def logits(digits) -> dict[str, torch.Tensor]:
    """Made up: a teacher that is mostly right, students like it with a logit of 3 that is too low; labels: far too low.

    Their numbers are coarse (eighths) and so differ in many rows by a shift exactly: ties are settled alike, or seen.
    """
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    likeness = noise(10, 10)
    teacher = 7 * torch.eye(10)[digits.labels] + likeness[digits.labels] + 1.8 * noise(len(digits), 10)
    made_up = {"teacher": teacher}
    for name, below in zip(STUDENTS, (30.0, 6.0, 4.5, 4.0, 3.5, 3.0), strict=True):
        made_up[name] = 0.8 * teacher + 0.6 * noise(len(digits), 10)
        made_up[name][:, 3] -= below
    return {name: (8 * rows).round() / 8 for name, rows in made_up.items()}


@pytest.fixture
def make(logits, digits):
    return lambda **choices: OmittedDigitExplorer(logits, digits=digits, **choices)


def through_a_layer(logits: torch.Tensor, shift: float) -> torch.Tensor:
    """The logits after `shift_bias_` on a last layer that passes them on."""
    last = torch.nn.Linear(10, 10)
    with torch.no_grad():
        last.weight.copy_(torch.eye(10))
        last.bias.zero_()
        shift_bias_(last, 3, shift)
        return last(logits)


CHOICES = [
    ("hard", 0.0, "clear 3"),
    ("hard", 8.0, "median 3"),
    ("1", 0.0, "doubtful 3"),
    ("2", 0.25, "clear 3"),
    ("4", 3.5, "doubtful 3"),
    ("8", 5.75, None),
    ("20", 8.0, None),
]


@pytest.mark.parametrize("targets, shift, image", CHOICES)
def test_state_equals_the_library(make, logits, digits, targets, shift, image):
    state = make(targets=targets, shift=shift, image=image).state
    shifted, row = through_a_layer(logits[targets], shift), state["row"]
    right, threes = shifted.argmax(-1) == digits.labels, digits.labels == 3
    assert state["right"]["threes"] == pytest.approx(right[threes].double().mean().item())
    assert state["right"]["others"] == pytest.approx(right[~threes].double().mean().item())
    assert state["errors"] == (~right).sum() and state["errors_on_threes"] == (~right & threes).sum()
    assert state["called_three"] == ((shifted.argmax(-1) == 3) & ~threes).sum()
    before = (logits[targets].argmax(-1) == digits.labels) & ~threes
    assert state["lost"] == pytest.approx((before & ~right).sum().item() / 900)
    assert (state["answer"], state["label"]) == (shifted[row].argmax(), digits.labels[row])
    np.testing.assert_allclose(state["student"], softened_probabilities(shifted[row], 1.0), rtol=1e-5)
    if targets == "hard":
        np.testing.assert_array_equal(state["target"], np.eye(10)[state["label"]])
        assert state["temperature"] is state["gradient"] is state["rescaled"] is None
    else:
        expected = softened_probabilities(logits["teacher"][row], float(targets))
        np.testing.assert_allclose(state["target"], expected, rtol=1e-5)
        assert state["temperature"] == float(targets)


@pytest.mark.parametrize("targets", TEMPERATURES)
def test_gradient_is_that_of_the_soft_loss(make, logits, digits, targets):
    state, teacher = make(targets=targets).state, logits["teacher"][digits.labels != 3].double()
    for name, rescale in (("gradient", False), ("rescaled", True)):
        student = torch.zeros_like(teacher, requires_grad=True)
        soft_cross_entropy(student, teacher, float(targets), rescale=rescale).backward()
        sizes = len(teacher) * student.grad.norm(dim=-1)  # the loss is a mean over the images
        assert state[name] == pytest.approx(sizes.mean().item(), rel=1e-5)


def test_gradient_times_the_square_of_the_temperature_tends_to_logit_matching(logits):
    teacher = logits["teacher"].double()
    limit = (teacher - teacher.mean(-1, keepdim=True)).norm(dim=-1).mean().item() / 10  # Eq. 4 with z = 0
    assert gradient_size(teacher, 1e5) * 1e10 == pytest.approx(limit, rel=1e-3)
    # a mean over images, whatever their number
    assert gradient_size(torch.cat([teacher] * 3), 2.0) == pytest.approx(gradient_size(teacher, 2.0))


def test_images_are_those_of_the_rule(logits, digits):
    teacher, labels = logits["teacher"], digits.labels.tolist()
    rows = chosen_rows(teacher, digits)
    above, lacking = {}, {}
    for row, z in enumerate(teacher.tolist()):
        if max(range(10), key=z.__getitem__) != labels[row]:
            continue
        if labels[row] == 3:
            above[row] = z[3] - max(z[:3] + z[4:])
        else:
            lacking[row] = z[labels[row]] - z[3]
    names = list(rows)
    assert names[:3] == ["clear 3", "median 3", "doubtful 3"]
    assert above[rows["clear 3"]] == max(above.values()) and above[rows["doubtful 3"]] == min(above.values())
    assert above[rows["median 3"]] == statistics.median_low(above.values())
    nearest = {digit: min(gap for row, gap in lacking.items() if labels[row] == digit) for digit in set(labels) - {3}}
    assert [lacking[rows[name]] for name in names[3:]] == sorted(nearest.values())[:3]
    assert [f"{labels[rows[name]]} like a 3" for name in names[3:]] == names[3:]
    assert len(names) == 6


def test_fewest_errors_and_beyond(make):
    explorer = make(targets="4")
    errors = []
    for shift in SHIFTS:
        explorer.controls["shift"].value = shift
        errors.append(explorer.state["errors"])
    fewest, first = min(errors), errors.index(min(errors))
    assert errors[0] > fewest < errors[-1], "the made-up logits show nothing"
    assert (explorer.state["fewest"], explorer.state["fewest_at"]) == (fewest, SHIFTS[first])
    for place, shift in enumerate(SHIFTS):
        explorer.controls["shift"].value = shift
        beyond = place > first and errors[place] > fewest
        assert explorer.state["too_far"] == beyond
        assert (f"beyond the fewest errors, {fewest} at {SHIFTS[first]:.2f}" in explorer.line.value) == beyond


# ---------------------------------------------------------------------------------------------- the picture


def rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def pixel_of(explorer, axes, x, y) -> tuple[int, int]:
    """(row, column) of the picture where the data point (x, y) of these axes lies."""
    column, height = axes.transData.transform((x, y))
    return explorer.figure.canvas.get_width_height()[1] - 1 - int(height), int(column)


def dark_near(picture, row: int, column: int) -> bool:
    """Whether a black line goes up through this place."""
    return bool((picture[row - 2 : row + 3, column - 2 : column + 3].sum(-1) < 200).any(1).all())


@pytest.mark.parametrize("targets, shift, image", CHOICES)
def test_picture_shows_the_state(shown, make, digits, targets, shift, image):
    explorer = make(targets=targets, shift=shift, image=image)
    picture, state = shown(explorer), explorer.state
    curves, gradient, digit, target, answer = explorer.figure.axes
    # the line at this shift and nowhere else, the dots upon it
    for other in SHIFTS[::4]:
        row, column = pixel_of(explorer, curves, other, 12)  # no curve comes here
        assert dark_near(picture, row, column) == (other == shift)
    apart = abs(state["right"]["threes"] - state["right"]["others"]) > 0.08
    for kind in ("threes", "others") if apart else ("others",):  # the last lies on top
        row, column = pixel_of(explorer, curves, shift, 100 * state["right"][kind])
        assert picture[row, column].tolist() == rgb(LOOK[kind][0]), kind
    for kind in ("threes", "others"):
        line = explorer._lines[kind]
        np.testing.assert_allclose(line.get_ydata(), 100 * np.array(state["curves"][kind]))
        assert line.get_xdata().tolist() == list(SHIFTS)
    for temperature in TEMPERATURES.values():
        # half-way between the two markers; at T = 1, where they are one, below
        height = temperature * explorer._gradients[temperature] if temperature > 1 else 1.3 * gradient.get_ylim()[0]
        row, column = pixel_of(explorer, gradient, temperature, height)
        assert dark_near(picture, row, column) == (temperature == state["temperature"])
    if targets != "hard":
        for kind in ("gradient",) if targets == "1" else ("gradient", "rescaled"):
            row, column = pixel_of(explorer, gradient, state["temperature"], state[kind])
            assert picture[row, column].tolist() == rgb(LOOK[kind][0]), kind
    # the digit, five dots a pixel
    box = digit.get_window_extent()
    top, left = picture.shape[0] - round(box.y1), round(box.x0)
    inked = 255 - picture[top : top + 140, left : left + 140, 0].reshape(28, 5, 28, 5)[:, 2, :, 2]
    assert np.abs(inked.astype(int) - digits.images[state["row"]].numpy()).max() <= 2
    # the bars, each in its colour up to its probability
    for axes, probabilities in ((target, state["target"]), (answer, state["student"])):
        for place, probability in enumerate(probabilities):
            bottom, column = pixel_of(explorer, axes, place, 0)
            colour = rgb(LOOK["threes" if place == 3 else "others"][0])
            is_bar = (picture[bottom - 170 : bottom, column - 8 : column + 9] == colour).all(-1).any(1)
            expected = bottom - pixel_of(explorer, axes, place, float(probability))[0]
            assert abs(is_bar.sum() - expected) <= 2, (place, is_bar.sum(), expected)
    words = {name: head.get_text() for name, head in explorer._heads.items()}
    assert words["threes"] == f"{100 * state['right']['threes']:.1f} %"
    assert words["others"] == f"{100 * state['right']['others']:.1f} %"
    assert (words["digit"], words["answer"]) == (str(state["label"]), str(state["answer"]))
    kind = "Label" if targets == "hard" else f"Teacher at T = {targets}"
    assert words["target"] == f"{kind}: {'no target, 3s are left out' if state['label'] == 3 else 'the target'}"
    for kind in ("gradient", "rescaled"):
        assert words[kind] == ("" if targets == "hard" else f"{state[kind]:.3g}")


def test_no_words_overlap_or_leave_the_picture(make):
    explorer = make()
    width, height = explorer.figure.canvas.get_width_height()
    for targets in STUDENTS:
        for image in explorer.controls["image"].options:
            explorer.controls["targets"].value, explorer.controls["image"].value = targets, image
            explorer.controls["shift"].value = SHIFTS[-1]
            boxes = [text.get_window_extent() for text in explorer.figure.texts if text.get_text()]
            for place, box in enumerate(boxes):
                assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height
                assert not any(box.overlaps(other) for other in boxes[:place]), (targets, image, place)


def test_every_control_changes_state_picture_and_words(shown, make):
    explorer = make()
    changes = (("shift", 2.5), ("targets", "20"), ("image", "clear 3"), ("targets", "hard"), ("shift", 8.0))
    for name, value in changes:
        state, picture, alt, line = explorer.state, shown(explorer), explorer.alt, explorer.line.value
        explorer.controls[name].value = value
        assert explorer.state[name] == value != state[name]
        assert not np.array_equal(shown(explorer), picture)
        assert explorer.alt != alt and explorer.line.value != line and explorer.image.tooltip == explorer.alt


def test_blitted_equals_drawn_anew_and_made_anew(shown, drawn_anew, make):
    explorer, generator = make(), np.random.default_rng(1)
    for step in range(9):
        name = ("shift", "targets", "image")[step % 3]
        options = {"shift": SHIFTS, "targets": STUDENTS, "image": explorer.controls["image"].options}[name]
        explorer.controls[name].value = options[generator.integers(len(options))]
        picture = shown(explorer)
        assert np.array_equal(picture, shown(make(**explorer.values))), explorer
        assert np.array_equal(picture, drawn_anew(explorer)), explorer


# ------------------------------------------------------------------------------------------------ the words


def test_words_say_the_numbers(make):
    explorer = make(targets="4", shift=8.0)
    state, line = explorer.state, explorer.summary(explorer.state)
    threes, others = (f"{100 * state['right'][kind]:.1f} %" for kind in ("threes", "others"))
    label = state["label"]
    assert line == (
        f"Student of soft targets at T = 4, bias of class 3 raised by 8.00: {threes} of the 3s right, {others} of the "
        f"other digits; {state['errors']} errors in 1,000, {state['errors_on_threes']} of them on 3s. "
        f"Other digits called 3: {state['called_three']}. This is beyond the fewest errors, {state['fewest']} at "
        f"{state['fewest_at']:.2f}: the shift costs {100 * state['lost']:.1f} % of the other digits. "
        f"The digit shown is {'an' if label == 8 else 'a'} {label}: the teacher gives a probability of "
        f"{chance(state['target'][3])} to 3 and {chance(state['target'][label])} to {label}; the student says "
        f"{state['answer']} and gives {chance(state['student'][3])} to 3. "
        f"Gradient of an untrained student: {state['gradient']:.3g}, times T² {state['rescaled']:.3g}."
    )
    assert line in explorer.line.value and explorer.alt.endswith(line)
    curves = state["curves"]
    assert f"3s go from {100 * curves['threes'][0]:.1f} % to {100 * curves['threes'][-1]:.1f} %" in explorer.alt
    assert f"other digits from {100 * curves['others'][0]:.1f} % to {others}, with a mark at 8.00" in explorer.alt
    data, metadata = explorer._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == explorer.alt
    image = explorer.values["image"]
    assert data["text/plain"] == f"OmittedDigitExplorer(targets='4', image={image!r}, shift=8.0)"


def test_words_where_the_labels_taught_nothing(make):
    line = make(targets="hard", shift=3.0, image="clear 3").line.value
    assert "Student of hard labels, bias of class 3 raised by 3.00: 0.0 % of the 3s right" in line
    assert "No shift up to 8 gets more than 0.0 % of the 3s right." in line and "fewest" not in line
    assert "the label gives a probability of 1 to 3 (no target: 3s are left out); the student says" in line
    assert line.removesuffix("</div>").endswith("Hard labels have no temperature.")


@pytest.mark.parametrize(
    "probability, text",
    [(0.0, "0"), (1.0, "1"), (4e-4, "below 0.001"), (6e-4, "0.001"), (0.1236, "0.124"), (0.9996, "above 0.999")],
)
def test_probabilities_are_written_short(probability, text):
    assert chance(probability) == text


def test_probabilities_in_the_picture_have_two_digits():
    assert [chance(p, 2) for p in (0.004, 0.126, 0.996)] == ["below 0.01", "0.13", "above 0.99"]


# -------------------------------------------------------------------------------------- recorded, refused, fast


def test_without_logits_the_recorded_ones_are_shown(shown, digits):
    recorded = OmittedDigitExplorer(targets="8", shift=2.0)
    given = OmittedDigitExplorer(load_logits(), "8", 2.0, digits=digits)
    assert np.array_equal(shown(recorded), shown(given)) and recorded.alt == given.alt
    soft, hard = recorded.state, OmittedDigitExplorer(targets="hard", shift=2.0, digits=digits).state
    assert soft["right"]["threes"] > 0.5 > 0.1 > hard["right"]["threes"], "the lesson of the experiment"


def test_without_a_record_it_says_how_to_make_one(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFNLP_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="python -m effnlp_lessons.studies omitted_digit"):
        OmittedDigitExplorer()


@pytest.mark.parametrize("choice", [{"targets": "3"}, {"targets": 4}, {"shift": 0.1}, {"shift": 9}, {"image": "a 3"}])
def test_a_choice_that_is_not_offered_is_refused(make, choice):
    (name,) = choice
    with pytest.raises(ValueError, match=f"^{name} must be one of"):
        make(**choice)


def test_logits_of_another_form_are_refused(logits, digits):
    holed = logits["2"].clone()
    holed[7, 2] = torch.nan
    backwards = {name: rows.flip(0) for name, rows in logits.items()}
    for broken, message in (
        ({name: rows for name, rows in logits.items() if name != "8"}, "logits must have the keys"),
        ({**logits, "16": logits["8"]}, "logits must have the keys"),
        (
            {**logits, "4": logits["4"][:-1]},
            r"logits\['4'\] must be floats \(1000, 10\), got torch.float32 \(999, 10\)",
        ),
        ({**logits, "hard": logits["hard"].T}, r"logits\['hard'\] must be floats \(1000, 10\)"),
        ({**logits, "1": logits["1"].long()}, r"logits\['1'\] must be floats \(1000, 10\), got torch.int64"),
        ({**logits, "2": holed}, r"logits\['2'\] must be finite, got nan"),
        (backwards, r"logits\['teacher'\] must be right on half of the 0s at least, got"),
    ):
        with pytest.raises(ValueError, match=message):
            OmittedDigitExplorer(broken, digits=digits)


def test_given_logits_stay_as_they_are(logits, digits):
    before = {name: rows.clone() for name, rows in logits.items()}
    OmittedDigitExplorer(logits, "8", 4.0, digits=digits).controls["shift"].value = 8.0
    assert all(torch.equal(rows, before[name]) for name, rows in logits.items())


def test_no_model_runs_in_a_handler(monkeypatch, make):
    explorer = make()

    def forbidden(*_, **__):
        raise AssertionError("a model ran in a handler")

    monkeypatch.setattr(torch.nn.Module, "__call__", forbidden)
    for name, value in (("shift", 4.0), ("targets", "hard"), ("targets", "20"), ("image", "clear 3")):
        explorer.controls[name].value = value


def test_an_event_takes_less_than_50_ms(make, assert_fast):
    explorer = make()
    images = explorer.controls["image"].options

    def change(event: int) -> None:
        name, options = (("shift", SHIFTS), ("targets", STUDENTS), ("shift", SHIFTS), ("image", images))[event % 4]
        explorer.controls[name].value = options[(7 * event) % len(options)]

    assert_fast("shift, targets, shift, image", change, events=60)
