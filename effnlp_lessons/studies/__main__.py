"""`python -m effnlp_lessons.studies [NAME] [--full] [--seeds 0 1] [--out DIR] [--scheduler ADDRESS] [--jobs N]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effnlp_lessons.studies.runner import find_studies, record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m effnlp_lessons.studies", description="Record a study.")
    parser.add_argument("name", nargs="?", help="which study; without it, all are listed")
    parser.add_argument("--full", action="store_true", help="the full setting instead of the recorded one")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than the study's own")
    parser.add_argument("--out", type=Path, help="write here instead of into data/")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="run on the Dask cluster with this scheduler")
    parser.add_argument("--jobs", type=int, help="runs at a time on this machine")
    arguments = parser.parse_args()
    studies = find_studies()
    if arguments.name is None:
        for study in studies.values():
            runs = len(study.recorded) * len(study.seeds)
            print(f"{study.name:20} {runs:3} runs, about {study.minutes:g} min   {study.question}")
        return
    if arguments.name not in studies:
        parser.error(f"there is no study {arguments.name!r}; there are {', '.join(studies)}")
    seeds = tuple(arguments.seeds) if arguments.seeds else None
    if seeds and arguments.out is None:
        parser.error("--seeds needs --out: what is recorded in data/ keeps the study's own seeds")
    command = "python -m effnlp_lessons.studies " + " ".join(sys.argv[1:])
    try:
        summary = record(
            studies[arguments.name], full=arguments.full, seeds=seeds, out=arguments.out,
            scheduler=arguments.scheduler, jobs=arguments.jobs, command=command,
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"studies: {error}")
    print(f"recorded {len(summary['runs'])} runs in {summary['seconds'] / 60:.1f} min of work")


if __name__ == "__main__":
    main()
