"""How `check` and `hint` behave, on a small exercise of their own: area and outline of rectangles."""

import subprocess
import sys

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from effnlp_lessons.homework import HomeworkError, check, grader, hint
from effnlp_lessons.homework.exercise import Exercise, Mistake, Property, whole_number


def sides(generator):
    return whole_number(2, 40, generator), whole_number(2, 40, generator)


def outline(width, height):
    return 2 * (width + height)


OUTLINE = Exercise(
    id="start.outline",
    title="outline of a rectangle",
    minutes=5,
    difficulty=1,
    reference=outline,
    properties=(
        Property("a square of 3", lambda generator: (3, 3), times=1),
        Property("other rectangles", sides),
    ),
    mistakes=(
        Mistake("Half the outline", "There are two of each side.", lambda width, height: width + height),
        Mistake("The area", "An outline is a length.", lambda width, height: width * height),
        Mistake("A square", "Use the height, too.", lambda width, height: 4 * width),
        Mistake("One width", "The width counts twice.", lambda width, height: width + 2 * height),
    ),
    hints=(
        "Walk around it.",
        "Two widths and two heights.",
        "A neighbour: a triangle's outline is a + b + c.",
    ),
)
SCALE = Exercise(
    id="start.scale",
    title="twice a tensor",
    minutes=5,
    difficulty=1,
    reference=lambda x: 2 * x,
    properties=(Property("any tensor", lambda generator: (torch.randn(2, 3, generator=generator),)),),
    mistakes=tuple(
        Mistake(f"Times {factor}", "Two is asked for.", lambda x, factor=factor: factor * x) for factor in (1, 3, 4, 5)
    ),
    hints=("One.", "Two.", "Three."),
)


@pytest.fixture(autouse=True)
def exercises(monkeypatch):
    """The two exercises are found, and nothing has been called before."""
    found = {exercise.id: exercise for exercise in (OUTLINE, SCALE)}
    monkeypatch.setattr(grader, "find_exercise", found.__getitem__)
    grader._failed_checks.clear()
    grader._hints_given.clear()


def failing(capsys, id, fn, **options):
    """The error and the printed report of a check that must fail."""
    with pytest.raises(HomeworkError) as caught:
        check(id, fn, **options)
    return str(caught.value), capsys.readouterr().out


# ----------------------------------------------------------------------------- what is printed


def test_all_properties_are_printed_when_they_hold(capsys):
    check("start.outline", outline)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == [
        "  holds  a square of 3",
        "  holds  other rectangles",
        "All of start.outline holds.",
    ]


def test_a_failure_shows_property_input_expected_and_got(capsys):
    error, printed = failing(capsys, "start.outline", lambda width, height: 4 * width, seed=7)
    lines = printed.splitlines()
    width, height = grader.draw_cases(OUTLINE, 7)[1].inputs
    assert lines[1:3] == ["  holds  a square of 3", "  FAILS  other rectangles"]
    assert f"    input     width = {width}, height = {height}" in lines
    assert f"    expected  {2 * (width + height)}" in lines
    assert f"    got       {4 * width}" in lines
    assert error == f"start.outline: expected {2 * (width + height)}, got {4 * width}"


def test_it_stops_at_the_first_property_that_fails(capsys):
    _, printed = failing(capsys, "start.outline", lambda width, height: width + height)
    assert printed.count("FAILS") == 1 and "other rectangles" not in printed


def test_the_second_failing_check_names_the_cause_and_the_first_does_not(capsys):
    first = failing(capsys, "start.outline", lambda width, height: width + height)[1]
    second = failing(capsys, "start.outline", lambda width, height: width + height)[1]
    assert "likely cause  " not in first and "next failing check" in first
    assert "likely cause  Half the outline. There are two of each side." in second


def test_failing_checks_are_counted_for_each_exercise(capsys):
    failing(capsys, "start.outline", lambda width, height: width + height)
    assert "likely cause  " not in failing(capsys, "start.scale", lambda x: 3 * x)[1]


def test_explain_names_the_cause_at_once(capsys):
    _, printed = failing(capsys, "start.outline", lambda width, height: width * height, explain=True)
    assert "likely cause  The area." in printed


def test_an_unknown_mistake_gets_no_invented_cause(capsys):
    _, printed = failing(capsys, "start.outline", lambda width, height: width * 3 + height, explain=True)
    assert "none of the usual mistakes" in printed


def test_a_constant_factor_is_pointed_out(capsys):
    _, printed = failing(capsys, "start.outline", lambda width, height: 6 * (width + height), explain=True)
    assert "every answer is 3 times the expected one" in printed


def test_a_failed_check_can_be_repeated_with_its_seed(capsys):
    _, printed = failing(capsys, "start.outline", lambda width, height: 4 * width)
    seed = int(printed.split("seed=")[1].split(")")[0])
    _, again = failing(capsys, "start.outline", lambda width, height: 4 * width, seed=seed)
    assert [line for line in again.splitlines() if "input" in line][0] in printed


def test_inputs_are_new_at_every_call():
    seen = []

    def remember(width, height):
        seen.append((width, height))
        return outline(width, height)

    check("start.outline", remember)
    first, seen = seen, []
    check("start.outline", remember)
    assert first[0] == seen[0] == (3, 3) and first[1:] != seen[1:]


# ----------------------------------------------------------------------------- answers of a wrong kind


def blank(width, height):  # as the unsolved notebook hands it out
    raise NotImplementedError("your code here")


def nothing(width, height):
    pass


def dots(width, height):
    return ...


def dots_inside(width, height):
    return width + ...


@pytest.mark.parametrize("fn", [blank, nothing, dots, dots_inside])
def test_a_blank_is_not_written_yet_and_is_no_failed_try(fn, capsys):
    error, printed = failing(capsys, "start.outline", fn)
    assert "is not written yet" in error and "not written yet" in printed and "FAILS" not in printed
    assert "likely cause  " not in failing(capsys, "start.outline", lambda width, height: 1)[1]


def test_a_return_missing_in_one_branch_is_no_blank(capsys):
    _, printed = failing(capsys, "start.outline", lambda width, height: 12 if width == height == 3 else None)
    assert "holds  a square of 3" in printed and "returns None here" in printed


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (12.0, "returned a float (12); it should return an int (a count is whole: use // and not /)"),
        ("12", "returned a str ('12'); it should return an int"),
        (True, "returned a bool (True); it should return an int"),
        (torch.tensor(12), "returned a tensor of shape (), int64; it should return a plain int"),
    ],
)
def test_a_wrong_type_has_its_own_message(answer, words, capsys):
    assert words in failing(capsys, "start.outline", lambda width, height: answer)[1]


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x: (2 * x).numpy(), "returned a ndarray; it should return a tensor of shape (2, 3)"),
        (lambda x: 2 * x[0], "returned shape (3,); it should be (2, 3)"),
        (lambda x: 2 * x.double(), "returned dtype float64; it should be float32"),
    ],
)
def test_a_wrong_shape_or_dtype_has_its_own_message(fn, words, capsys):
    assert words in failing(capsys, "start.scale", fn)[1]


def test_a_changed_input_is_said_even_if_the_answer_is_right(capsys):
    assert "changes its input 'x' in place" in failing(capsys, "start.scale", lambda x: x.mul_(2))[1]


def test_the_input_is_shown_as_it_was_before_the_student_changed_it(capsys):
    _, printed = failing(capsys, "start.scale", lambda x: x.zero_())
    assert "input     x = [[0, 0, 0]" not in printed


def test_a_mistake_may_change_its_input_without_harm(monkeypatch):
    in_place = Mistake("In place", "Twice is asked for.", lambda x: x.mul_(7))
    exercise = Exercise(**{**vars(SCALE), "mistakes": (in_place, *SCALE.mistakes)})
    monkeypatch.setattr(grader, "find_exercise", lambda id: exercise)
    check("start.scale", lambda x: x + x)


def test_an_exception_names_its_line_in_the_students_function(capsys):
    def divides(width, height):
        total = width + height
        return total / (width - width)

    error, printed = failing(capsys, "start.outline", divides)
    assert "ZeroDivisionError inside your function" in error
    assert "in line   3 of your function: return total / (width - width)" in printed


def test_a_wrong_number_of_parameters_is_said(capsys):
    assert "calls your function with (width, height)" in failing(capsys, "start.outline", lambda width: 1)[1]


def test_the_result_of_a_call_is_no_function(capsys):
    error, _ = failing(capsys, "start.outline", 12)
    assert error == 'check needs the function itself, without parentheses: check("start.outline", outline)'


def test_nan_is_a_difference_and_the_place_is_shown(capsys):
    _, printed = failing(capsys, "start.scale", lambda x: 2 * x / (x != x[1, 1]))
    assert "inf" in printed
    _, printed = failing(capsys, "start.scale", lambda x: 2 * x * float("nan"))
    assert "got       [[nan, nan, nan], [nan, nan, nan]]" in printed


# ----------------------------------------------------------------------------- the exercise itself


def test_an_exercise_whose_mistake_cannot_be_seen_is_refused():
    invisible = Mistake("Swapped", "The sum does not care.", lambda width, height: outline(height, width))
    exercise = Exercise(**{**vars(OUTLINE), "mistakes": (*OUTLINE.mistakes, invisible)})
    with pytest.raises(RuntimeError, match="'Swapped' and 'the reference'"):
        grader.draw_cases(exercise, 0)


def test_inputs_are_drawn_again_until_every_mistake_shows():
    squares_at_first = iter([(5, 5)] * 6 + [(5, 9)] * 3)
    properties = (Property("rectangles", lambda generator: next(squares_at_first)),)
    cases = grader.draw_cases(Exercise(**{**vars(OUTLINE), "properties": properties}), 0)
    assert [case.inputs for case in cases] == [(5, 9)] * 3


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hints", ("one", "two"), "hints must be 3, got 2"),
        ("mistakes", OUTLINE.mistakes[:3], "mistakes must hold at least 4, got 3"),
        ("difficulty", 6, "difficulty must be between 1 and 5, got 6"),
        ("minutes", 0, "minutes must be >= 1, got 0"),
        ("properties", (), "properties must hold at least one"),
    ],
)
def test_an_incomplete_exercise_is_refused(field, value, words):
    with pytest.raises(ValueError, match=words):
        Exercise(**{**vars(OUTLINE), field: value})


# ----------------------------------------------------------------------------- hints, ids, notebook


def test_hints_come_one_at_a_time_and_the_third_says_it_is_the_last(capsys):
    printed = []
    for _ in range(4):
        hint("start.outline")
        printed.append(capsys.readouterr().out)
    for text, expected in zip(printed, (*OUTLINE.hints, OUTLINE.hints[2]), strict=True):
        assert expected in text
    assert ["This is the last hint." in text for text in printed] == [False, False, True, True]


def test_an_unknown_id_lists_the_known_ones(monkeypatch):
    monkeypatch.undo()
    for call in (lambda id: check(id, outline), hint):
        with pytest.raises(HomeworkError) as caught:
            call("start.block_parameter")
        assert "Did you mean 'start.block_parameters'?" in str(caught.value)
        assert "start.encoder_macs" in str(caught.value)
        with pytest.raises(HomeworkError, match="there is no exercise 'hinton'"):
            call("hinton")
    with pytest.raises(HomeworkError, match="as text"):
        check(outline, "start.outline")


def test_a_notebook_shows_one_line_instead_of_a_stack_trace(capsys):
    shell = InteractiveShell()
    shell.user_ns.update(check=check, area=lambda width, height: width * height)
    shell.run_cell('check("start.outline", area)')
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("HomeworkError: start.outline: expected 12, got 9")
    assert "Traceback" not in printed and "grader.py" not in printed


def test_homework_is_light_to_import():
    code = (
        "import sys, effnlp_lessons.homework;"
        "print([name for name in ('transformers', 'matplotlib', 'ipywidgets', 'triton', "
        "'effnlp_lessons.homework.start') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
