"""Run a study: every (setting, seed) once, in parallel, resumable, all of it written down.

Each finished run is a file of its own, so a study that was killed goes on where it stopped. When the
last run is done, one summary with every run, the versions, the seconds and the command replaces them.
Runs go through joblib: on this machine's cores, or on a Dask cluster with the same call.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import torch
from tqdm.auto import tqdm

from effnlp_lessons import paths
from effnlp_lessons.training import write_atomically


@dataclass(frozen=True)
class Outcome:
    """What one run gives back: numbers (JSON values), and files to keep with them (name -> content)."""

    numbers: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """An experiment that can be recorded.

    `run(setting, seed)` does one run and depends on nothing else; it must be importable, since other
    processes call it. What shares a costly preparation goes as a list into one setting, what is trained
    separately into settings of its own. `recorded` are the settings whose results are in `data/results`,
    `full` those of `--full`. `finish(runs, artefacts)` may write files for the course from all runs, and
    returns what to add to the summary. `minutes` is the time that recording takes on two idle cores. A study
    that takes times is `timed`: its runs come one after another.
    """

    name: str
    question: str
    run: Callable[[dict[str, Any], int], Outcome]
    recorded: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...]
    minutes: float
    full: tuple[dict[str, Any], ...] = ()
    finish: Callable[[list[Run], Path], dict[str, Any]] | None = None
    threads: int = 1
    timed: bool = False


@dataclass(frozen=True)
class Run:
    setting: dict[str, Any]
    seed: int
    seconds: float
    outcome: Outcome


def _execute(study: Study, setting: dict[str, Any], seed: int) -> Run:
    """One run in a worker, with the study's number of threads so that every scheduler gives the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(study.threads)
    try:
        start = time.perf_counter()
        outcome = study.run(setting, seed)
        return Run(setting, seed, time.perf_counter() - start, outcome)
    finally:
        torch.set_num_threads(before)


def _key(setting: dict[str, Any], seed: int) -> str:
    text = json.dumps([setting, seed], sort_keys=True)
    return f"seed{seed}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _save(run: Run, folder: Path) -> None:
    """The files of a run first, its JSON last: a run without JSON did not happen."""
    key = _key(run.setting, run.seed)
    for name, content in run.outcome.files.items():
        write_atomically(folder / f"{key}-{name}", lambda file, content=content: file.write_bytes(content))
    record = {
        "setting": run.setting,
        "seed": run.seed,
        "seconds": run.seconds,
        "numbers": run.outcome.numbers,
    }
    record["files"] = sorted(run.outcome.files)
    write_atomically(folder / f"{key}.json", lambda file: file.write_text(json.dumps(record)))


def _load(setting: dict[str, Any], seed: int, folder: Path) -> Run | None:
    key = _key(setting, seed)
    try:
        record = json.loads((folder / f"{key}.json").read_text())
        files = {name: (folder / f"{key}-{name}").read_bytes() for name in record["files"]}
        return Run(setting, seed, record["seconds"], Outcome(record["numbers"], files))
    except (OSError, ValueError, KeyError):
        return None  # not run yet, or the file is damaged: run it (again)


@contextmanager
def _scheduler(address: str | None, jobs: int) -> Iterator[None]:
    if address is None:
        with joblib.parallel_config(backend="loky", n_jobs=jobs):
            yield
        return
    try:
        from dask.distributed import Client
    except ImportError:
        raise ValueError("--scheduler needs Dask: pip install -e '.[scale]'") from None
    try:
        client = Client(address, timeout="10s")
    except OSError as error:
        raise ValueError(f"no Dask scheduler answers at {address}: {error}") from None
    with client, joblib.parallel_config(backend="dask", wait_for_workers_timeout=30):
        yield


def record(
    study: Study,
    *,
    full: bool = False,
    seeds: tuple[int, ...] | None = None,
    out: Path | None = None,
    scheduler: str | None = None,
    jobs: int | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Run what is not there yet, write `NAME.json`, and return its content.

    Args:
        out: folder for the summary, the runs in progress and the artefacts; default: the course's own.
        scheduler: address of a Dask scheduler, for example "tcp://127.0.0.1:8786"; default: this machine.
        jobs: runs at a time on this machine; default: as many as its cores allow.

    Raises:
        ValueError: no full setting, no seeds, or a scheduler that does not answer.
    """
    settings = study.full if full else study.recorded
    seeds = study.seeds if seeds is None else seeds
    if not settings or not seeds:
        raise ValueError(f"study {study.name} has no {'full' if full else 'recorded'} settings or no seeds to run")
    results, artefacts = (paths.results_dir(), paths.checkpoints_dir()) if out is None else (out, out)
    name = f"{study.name}-full" if full else study.name
    folder = results / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(setting, seed) for setting in settings for seed in seeds]
    missing = [pair for pair in wanted if _load(*pair, folder) is None]
    if len(missing) < len(wanted):
        print(f"{name}: {len(wanted) - len(missing)} of {len(wanted)} runs are there already")
    if study.timed and scheduler is not None:
        raise ValueError(f"study {study.name} takes times: run it on one quiet machine, without --scheduler")
    jobs = 1 if study.timed else jobs or max(1, joblib.cpu_count() // study.threads)
    with _scheduler(scheduler, jobs):
        finished = joblib.Parallel(return_as="generator_unordered", pre_dispatch="all")(
            joblib.delayed(_execute)(study, setting, seed) for setting, seed in missing
        )
        for run in tqdm(finished, total=len(missing), desc=name, unit="run", leave=False):
            _save(run, folder)

    runs = [_load(setting, seed, folder) for setting, seed in wanted]
    summary: dict[str, Any] = {
        "study": study.name,
        "question": study.question,
        "command": command or f"python -m effnlp_lessons.studies {study.name}{' --full' if full else ''}",
        "scheduler": "dask" if scheduler else "local",
        "machine": {
            "processor": platform.machine(),
            "cores": joblib.cpu_count(),
            "threads a run": study.threads,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "numpy": version("numpy"),
        },
        "seconds": round(sum(run.seconds for run in runs), 1),
        "runs": [
            {"setting": r.setting, "seed": r.seed, "seconds": round(r.seconds, 1)} | r.outcome.numbers for r in runs
        ],
    }
    if study.finish is not None:
        summary |= study.finish(runs, artefacts)
    write_atomically(results / f"{name}.json", lambda file: file.write_text(_readable(summary)))
    for path in folder.iterdir():  # the summary holds every run now; recording again starts afresh
        path.unlink()
    folder.rmdir()
    return summary


def _readable(summary: dict[str, Any]) -> str:
    """JSON with one entry a line, but a list of numbers on one line."""
    text = json.dumps(summary, indent=1)
    return re.sub(r"\[\n[-+\d.eE,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"


def load_results(name: str) -> dict[str, Any]:
    """The recorded summary of a study, from `data/results/NAME.json`."""
    file = paths.results_dir() / f"{name}.json"
    if not file.exists():
        raise FileNotFoundError(f"{file.name} is not recorded: run `python -m effnlp_lessons.studies {name}`")
    return json.loads(file.read_text())


def find_studies() -> dict[str, Study]:
    """Every study of the package by name."""
    import effnlp_lessons.studies as package

    modules = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in ("runner", "__main__")]
    studies = [importlib.import_module(f"{package.__name__}.{module}").STUDY for module in modules]
    return {study.name: study for study in studies}
