"""What holds for every exercise of the course, and that each lecture has its own file of wrong answers."""

import importlib.util
from pathlib import Path

import pytest

from effnlp_lessons.homework import HomeworkError, check
from effnlp_lessons.homework.grader import draw_cases, examine, likely_cause
from effnlp_lessons.homework.lectures import MODULES, all_exercises, find_exercise

SEEDS = range(5)
IDS = list(all_exercises())


def wrong_answers(prefix):
    """The rows (id, function, name of the mistake) of `tests/homework/test_PREFIX.py`."""
    file = Path(__file__).with_name(f"test_{prefix}.py")
    assert file.exists(), f"write {file.name} with WRONG_ANSWERS = [(id, function, name of the mistake), ...]"
    spec = importlib.util.spec_from_file_location(f"wrong_answers_{prefix}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WRONG_ANSWERS


@pytest.mark.parametrize("prefix", MODULES)
def test_wrong_answers_written_by_hand_fail_and_are_named(prefix, capsys):
    named = {id: set() for id in IDS if id.split(".")[0] == prefix}
    for id, wrong, name in wrong_answers(prefix):
        for seed in SEEDS:
            with pytest.raises(HomeworkError):
                check(id, wrong, explain=True, seed=seed)
            assert f"likely cause  {name}" in capsys.readouterr().out, f"{id}, {name}: not named with seed {seed}"
        named[id].add(name)
    few = [id for id, names in named.items() if len(names) < 4]
    assert not few, f"fewer than four wrong answers in tests/homework/test_{prefix}.py: {few}"


@pytest.mark.parametrize("id", IDS)
def test_the_reference_passes(id, capsys):
    for seed in SEEDS:
        check(id, find_exercise(id).reference, seed=seed)
    assert "FAILS" not in capsys.readouterr().out


@pytest.mark.parametrize("id", IDS)
def test_every_listed_mistake_is_told_from_the_reference_and_from_the_others(id):
    exercise = find_exercise(id)
    for seed in SEEDS:
        for mistake in exercise.mistakes:
            findings = examine(exercise, mistake.answer, seed)
            assert any(finding.problem for finding in findings), (mistake.name, seed)
            assert likely_cause(exercise, findings).startswith(mistake.name), seed


@pytest.mark.parametrize("id", IDS)
def test_the_inputs_are_new_at_every_draw_and_repeat_with_their_seed(id):
    drawn = [str([case.inputs for case in draw_cases(find_exercise(id), seed)]) for seed in SEEDS]
    assert len(set(drawn)) == len(drawn)
    assert drawn[3] == str([case.inputs for case in draw_cases(find_exercise(id), 3)])
