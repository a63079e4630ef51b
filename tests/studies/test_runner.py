"""Studies: every run kept, a killed study goes on, Dask gives the same results, bad input is named."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch

from effnlp_lessons.studies import runner, teacher
from effnlp_lessons.studies.runner import Outcome, Study, find_studies, load_results, record

SMALL_TEACHER = replace(
    teacher.STUDY,
    recorded=({"rank": 2, "epochs": 1, "learning_rate": 1e-3, "sentences": 48},),
    seeds=(0, 1),
    finish=None,
)


def draw(setting, seed):
    """A run that is quick and depends on the setting and the seed alone; it notes that it ran."""
    values = torch.randn(setting["size"], generator=torch.Generator().manual_seed(seed))
    with open(setting["log"], "a") as log:
        log.write(f"{setting['size']} {seed}\n")
    return Outcome(
        {"sum": values.sum().item(), "threads": torch.get_num_threads()},
        {"values.bin": values.numpy().tobytes()},
    )


def describe(runs, artefacts):
    (artefacts / "largest.txt").write_text(str(max(run.outcome.numbers["sum"] for run in runs)))
    return {"bytes": [len(run.outcome.files["values.bin"]) for run in runs]}


def make_study(folder, **changes):
    settings = tuple({"size": size, "log": str(folder / "log")} for size in (3, 5))
    given = {
        "name": "draw", "question": "?", "run": draw, "recorded": settings, "seeds": (0, 1), "minutes": 0,
        "finish": describe,
    }  # fmt: skip
    return Study(**given | changes)


def logged(folder):
    return sorted((folder / "log").read_text().splitlines())


def test_summary_keeps_every_run(tmp_path):
    summary = record(make_study(tmp_path), out=tmp_path, jobs=1)
    assert json.loads((tmp_path / "draw.json").read_text()) == summary
    assert [(run["setting"]["size"], run["seed"]) for run in summary["runs"]] == [
        (3, 0),
        (3, 1),
        (5, 0),
        (5, 1),
    ]
    expected = [draw(run["setting"], run["seed"]).numbers["sum"] for run in summary["runs"]]
    assert [run["sum"] for run in summary["runs"]] == expected
    assert summary["bytes"] == [12, 12, 20, 20] and float((tmp_path / "largest.txt").read_text()) == max(expected)
    assert {"command", "versions", "seconds", "machine"} <= set(summary)
    assert not (tmp_path / "runs" / "draw").exists()  # the summary holds them now


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_gets_the_threads_of_its_study(tmp_path, threads):
    before = torch.get_num_threads()
    summary = record(make_study(tmp_path, threads=threads), out=tmp_path, jobs=1)
    assert {run["threads"] for run in summary["runs"]} == {threads}
    assert torch.get_num_threads() == before


def test_interrupted_study_runs_only_what_is_missing(tmp_path):
    study, runs = make_study(tmp_path), tmp_path / "runs" / "draw"

    def fail(runs, artefacts):
        raise KeyboardInterrupt  # stopped when all runs are there, before the summary

    with pytest.raises(KeyboardInterrupt):
        record(replace(study, finish=fail), out=tmp_path, jobs=1)
    assert len(logged(tmp_path)) == 4 and not (tmp_path / "draw.json").exists()
    one, two, *_ = sorted(runs.glob("*.json"))
    one.unlink()
    two.write_text(two.read_text()[:40])  # damaged: half a file
    summary = record(study, out=tmp_path, jobs=1)
    assert len(logged(tmp_path)) == 6
    fresh = record(make_study(tmp_path / "x", name="fresh", recorded=study.recorded), out=tmp_path, jobs=1)
    assert [run["sum"] for run in summary["runs"]] == [run["sum"] for run in fresh["runs"]]


KILLED = """
    import sys, time
    from pathlib import Path
    from dataclasses import replace
    sys.path.insert(0, {tests!r})
    import test_runner
    def slow(setting, seed):
        if seed == 1 and setting["size"] == 5:
            print("last", flush=True)
            time.sleep(60)
        return test_runner.draw(setting, seed)
    folder = Path({folder!r})
    test_runner.record(test_runner.make_study(folder, run=slow), out=folder, jobs=1)
"""


def test_killed_study_leaves_nothing_broken_and_goes_on(tmp_path):
    script = textwrap.dedent(KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "last"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert logged(tmp_path) == ["3 0", "3 1", "5 0"] and not (tmp_path / "draw.json").exists()
    for file in (tmp_path / "runs" / "draw").glob("[!.]*.json"):
        json.loads(file.read_text())
    summary = record(make_study(tmp_path), out=tmp_path, jobs=1)
    assert logged(tmp_path) == ["3 0", "3 1", "5 0", "5 1"] and len(summary["runs"]) == 4


def test_local_dask_cluster_gives_the_same_results(tmp_path):
    """A real study, unchanged, on two worker processes: the same numbers and the same bytes of weights."""
    from dask.distributed import LocalCluster

    results = {}

    def keep(name):
        return lambda runs, artefacts: results.update({name: runs}) or {}

    local = record(replace(SMALL_TEACHER, finish=keep("local")), out=tmp_path / "local", jobs=2)
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        spread = record(replace(SMALL_TEACHER, finish=keep("dask")), out=tmp_path / "dask", scheduler=address)
    assert spread["scheduler"] == "dask" and local["scheduler"] == "local"
    for ours, theirs in zip(results["local"], results["dask"], strict=True):
        assert (ours.setting, ours.seed) == (theirs.setting, theirs.seed)
        assert ours.outcome == theirs.outcome
    assert results["local"][0].outcome.files != results["local"][1].outcome.files  # the seed matters


def test_timed_study_runs_alone(tmp_path):
    study = make_study(tmp_path, timed=True)
    with pytest.raises(ValueError, match="takes times: run it on one quiet machine"):
        record(study, out=tmp_path, scheduler="tcp://127.0.0.1:1")
    assert len(record(study, out=tmp_path, jobs=8)["runs"]) == 4


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="draw has no full settings"):
        record(make_study(tmp_path), out=tmp_path, full=True)
    with pytest.raises(ValueError, match="no Dask scheduler answers at tcp://127.0.0.1:9"):
        record(make_study(tmp_path), out=tmp_path, scheduler="tcp://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match="run `python -m effnlp_lessons.studies nothing`"):
        load_results("nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no study 'nothing'; there are"),
        (["teacher", "--seeds", "0"], "--seeds needs --out"),
        (["teacher", "--scheduler", "tcp://127.0.0.1:9", "--out", "x"], "no Dask scheduler answers"),
    ],
)
def test_command_says_in_one_sentence_what_is_wrong(tmp_path, arguments, message):
    command = [sys.executable, "-m", "effnlp_lessons.studies", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_every_study_is_found_and_recorded():
    studies = find_studies()
    assert {"teacher", "cost_by_length"} <= set(studies)
    for name, study in studies.items():
        summary = load_results(name)
        assert name == study.name and len(study.seeds) >= 3 and study.minutes <= 40
        work = summary["seconds"] / 60  # of all runs; several may run at a time, and a machine may be busy
        assert study.minutes >= work / 8, f"{name}: minutes={study.minutes}, recorded {work:.1f} minutes of work"
        recorded = [(run["setting"], run["seed"]) for run in summary["runs"]]
        assert recorded == [(setting, seed) for setting in study.recorded for seed in study.seeds]


def test_summaries_keep_a_list_of_numbers_on_one_line():
    summary = {"a": [1, 2.5, -3e-7], "b": [[1, 2], [3]], "c": ["x [1,  2]", None], "d": [], "e": {"f": [0.25]}}
    text = runner._readable(summary)
    assert json.loads(text) == summary
    assert '"a": [ 1, 2.5, -3e-07 ]' in text and '"f": [ 0.25 ]' in text
