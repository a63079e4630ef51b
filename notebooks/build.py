"""Notebooks from their text, and the proof that they are current.

    python notebooks/build.py build [--force] [files]   run the text, write the notebooks
    python notebooks/build.py check [files]             compare the notebooks with the text, run nothing

`source/NAME.py` (py:percent) becomes `NAME.ipynb`, executed. `source/homework/NAME.py` becomes
`homework/NAME.ipynb`, unsolved and not run, and `homework/solutions/NAME.ipynb`, solved and executed.
A built notebook keeps a hash of its text and of the recorded studies that it loads; what has not changed is
not run again without --force.

What the text may say:
    tag `reveal`              the outputs are empty in the file; the student runs the cell after a guess
    tag `nbval-check-output`  nbval compares the stored output; not together with `reveal`
    homework: tag `exercise`  a cell to fill in, followed by its check cell; between `### BEGIN SOLUTION` and
                              `### END SOLUTION` stands the answer. A region `### BEGIN STARTER` ...
                              `### END STARTER` behind it is what the student starts from ("find the bug");
                              without one the student finds `raise NotImplementedError`.
    homework: tag `check`     calls check("id", ...); `points=2` beside the tags is what nbgrader gives for it
"""

import argparse
import copy
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
COMMAND = "make notebooks"
CELL_SECONDS = 300

SOLUTION = re.compile(
    r"^(?P<indent>[ \t]*)### BEGIN SOLUTION[ \t]*\n(?P<solution>.*?)^[ \t]*### END SOLUTION[ \t]*(?:\n|\Z)"
    r"(?:[ \t]*### BEGIN STARTER[ \t]*\n(?P<starter>.*?)^[ \t]*### END STARTER[ \t]*(?:\n|\Z))?",
    re.MULTILINE | re.DOTALL,
)
MARKER = re.compile(r"### (?:BEGIN|END) (?:SOLUTION|STARTER)")
STUB = 'raise NotImplementedError("your code here")\n'
CHECK_CALL = re.compile(r"""\bcheck\(\s*["']([\w.]+)["']""")
LOADED_STUDY = re.compile(r"""\bload_results\(\s*["'](\w+)["']""")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PROGRESS_BAR = re.compile(r"\d+%\|")
OUTSIDE_IMAGE = re.compile(r"""<img[^>]+src=["']?(?:https?:)?//|!\[[^\]]*\]\(\s*(?:https?:)?//""", re.IGNORECASE)


class BuildError(Exception):
    """The text, or what it gives when run, may not become a notebook. The message names the file."""


@dataclass(frozen=True)
class Target:
    """One notebook to be made: the file, its cells before they run, and whether they run."""

    path: Path
    notebook: NotebookNode
    executed: bool


# ----------------------------------------------------------------------------- from the text


def targets(source: Path, folder: Path) -> list[Target]:
    """The notebooks that the text `source` gives: one for a lecture, two for homework."""
    text = jupytext.read(source)
    for cell in text.cells:  # blank lines between cells are layout, not content
        for key in ("lines_to_next_cell", "lines_to_end_of_cell_marker"):
            cell.metadata.pop(key, None)
    digest = source_hash(text)
    name = source.with_suffix(".ipynb").name
    if source.parent.name != "homework":
        _lecture_rules(text, source)
        return [Target(folder / name, _finished(text, digest), executed=True)]
    _homework_rules(text, source)
    graded = _with_grading(text)
    return [
        Target(folder / "homework" / name, _finished(_unsolved(graded), digest), executed=False),
        Target(folder / "homework" / "solutions" / name, _finished(_solved(text), digest), executed=True),
    ]


def source_hash(text: NotebookNode) -> str:
    """A hash of what the text says, cells with type and metadata, and of the recorded studies that it loads."""
    cells = [(cell.cell_type, cell.source, cell.metadata) for cell in text.cells]
    digest = hashlib.sha256(json.dumps(cells, sort_keys=True).encode())
    for name in sorted({name for cell in text.cells for name in LOADED_STUDY.findall(cell.source)}):
        file = HERE.parent / "data" / "results" / f"{name}.json"
        digest.update(file.read_bytes() if file.exists() else b"not recorded")
    return digest.hexdigest()[:16]


def _unsolved(text: NotebookNode) -> NotebookNode:
    def start(region: re.Match) -> str:
        return region["indent"] + STUB if region["starter"] is None else region["starter"]

    return _edited(text, start)


def _solved(text: NotebookNode) -> NotebookNode:
    return _edited(text, lambda region: region["solution"])


def _edited(text: NotebookNode, replace: Callable[[re.Match], str]) -> NotebookNode:
    """A copy of the text with `replace(region)` in the place of every solution region and its starter."""
    text = copy.deepcopy(text)
    for cell in text.cells:
        if cell.cell_type == "code":
            cell.source = SOLUTION.sub(replace, cell.source + "\n").rstrip("\n")
    return text


def _with_grading(text: NotebookNode) -> NotebookNode:
    """The text with nbgrader's metadata: exercise cells are handed in, check cells give the points."""
    text = copy.deepcopy(text)
    for exercise, check in _exercises(text):
        grade_id = CHECK_CALL.search(check.source)[1].replace(".", "-")
        answer = {"grade_id": grade_id, "grade": False, "solution": True, "locked": False}
        test = {"grade_id": f"{grade_id}-check", "grade": True, "solution": False, "locked": True}
        points = {"points": check.metadata["points"]}
        exercise.metadata["nbgrader"] = answer | {"schema_version": 3, "task": False}
        check.metadata["nbgrader"] = test | points | {"schema_version": 3, "task": False}
    return text


def _finished(text: NotebookNode, digest: str) -> NotebookNode:
    """The notebook as it is written, before it runs: cell ids and metadata depend on the text alone."""
    notebook = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
            "effnlp": {"source_hash": digest},
        }
    )
    seen: dict[str, int] = {}
    for cell in text.cells:
        new = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}[cell.cell_type]
        metadata = {key: value for key, value in cell.metadata.items() if key != "points"}
        identity = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:10]
        seen[identity] = seen.get(identity, 0) + 1
        suffix = "" if seen[identity] == 1 else f"-{seen[identity]}"
        notebook.cells.append(new(cell.source, metadata=metadata, id=f"c{identity}{suffix}"))
    return notebook


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _exercises(text: NotebookNode) -> list[tuple[NotebookNode, NotebookNode]]:
    """Every exercise cell with the check cell that follows it."""
    pairs, waiting = [], None
    for cell in text.cells:
        if "exercise" in tags(cell):
            waiting = cell
        elif "check" in tags(cell) and waiting is not None:
            pairs.append((waiting, cell))
            waiting = None
    return pairs


# ----------------------------------------------------------------------------- rules for the text


def _lecture_rules(text: NotebookNode, source: Path) -> None:
    for cell in text.cells:
        _cell_rules(cell, source)
        if MARKER.search(cell.source):
            raise BuildError(f"{source.name}: a solution region belongs in source/homework: {_start(cell)}")


def _homework_rules(text: NotebookNode, source: Path) -> None:
    for cell in text.cells:
        _cell_rules(cell, source)
        if MARKER.search(SOLUTION.sub("", cell.source + "\n")):
            raise BuildError(f"{source.name}: a region is not closed, or a starter stands alone: {_start(cell)}")
        if bool(SOLUTION.search(cell.source)) != ("exercise" in tags(cell)):
            raise BuildError(f"{source.name}: solution and tag `exercise` go together: {_start(cell)}")
        if "check" in tags(cell) and not CHECK_CALL.search(cell.source):
            raise BuildError(f'{source.name}: a check cell calls check("id", ...): {_start(cell)}')
        if "check" in tags(cell) and not isinstance(cell.metadata.get("points"), int):
            raise BuildError(f"{source.name}: a check cell states points=NUMBER: {_start(cell)}")
    pairs = _exercises(text)
    for tag in ("exercise", "check"):
        if len(pairs) != sum(tag in tags(cell) for cell in text.cells):
            raise BuildError(f"{source.name}: every exercise cell is followed by one check cell")
    ids = [CHECK_CALL.search(check.source)[1] for _, check in pairs]
    if len(set(ids)) != len(ids):
        raise BuildError(f"{source.name}: an exercise is checked twice")


def _cell_rules(cell: NotebookNode, source: Path) -> None:
    if cell.cell_type not in ("markdown", "code"):
        raise BuildError(f"{source.name}: a {cell.cell_type} cell; use markdown and code: {_start(cell)}")
    if {"reveal", "nbval-check-output"} <= set(tags(cell)):
        raise BuildError(f"{source.name}: `reveal` empties what nbval would compare: {_start(cell)}")
    if cell.cell_type == "markdown" and OUTSIDE_IMAGE.search(cell.source):
        raise BuildError(f"{source.name}: an image from outside the repository: {_start(cell)}")


def _start(cell: NotebookNode) -> str:
    return repr(cell.source.strip().split("\n")[0][:70])


# ----------------------------------------------------------------------------- running


def execute(notebook: NotebookNode, folder: Path, allow_errors: bool = False, guesses: str = "recorded") -> None:
    """Run the notebook in `folder` with this Python, on one thread; its outputs are stored in place.

    With `guesses=""` nobody has guessed: the student who runs all cells at once.

    Raises:
        nbclient.exceptions.CellExecutionError: at the first cell that fails, unless errors are allowed.
    """
    manager = AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec.argv[0] = sys.executable  # the kernel of this environment, whatever else is installed
    manager.kernel_spec.argv.append("--IPKernelApp.log_level=ERROR")
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=CELL_SECONDS,
        allow_errors=allow_errors,
        store_widget_state=False,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    with tempfile.TemporaryDirectory() as own:
        environment = {**os.environ, "EFFNLP_GUESSES": guesses, "OMP_NUM_THREADS": "1"}
        client.execute(env=environment | {"IPYTHONDIR": own, "EFFNLP_HOME": own}, cleanup_kc=True)


def _tidy(notebook: NotebookNode, target: Target) -> None:
    """Undo what running changed besides outputs, and drop from these what means nothing in a file."""
    notebook.metadata = copy.deepcopy(target.notebook.metadata)
    for cell, planned in zip(notebook.cells, target.notebook.cells, strict=True):
        cell.metadata = copy.deepcopy(planned.metadata)
        if cell.cell_type != "code":
            continue
        if "reveal" in tags(cell):
            cell.outputs, cell.execution_count = [], None
        for output in cell.outputs:
            output.get("data", {}).pop(WIDGET_VIEW, None)  # its model ends with the kernel; the picture stays
        cell.outputs = [output for output in cell.outputs if not _is_progress_bar(output)]


def _is_progress_bar(output: NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stderr" and bool(PROGRESS_BAR.search(output.text))
    return bool(PROGRESS_BAR.search(output.get("data", {}).get("text/plain", "")))


def output_problems(notebook: NotebookNode, folder: Path) -> list[str]:
    """What the stored outputs must not hold: errors, warnings, this machine's paths, images from outside."""
    places = {str(folder), str(folder.parent), str(HERE.parent), sys.prefix, tempfile.gettempdir()}
    if str(Path.home()) != "/":
        places.add(str(Path.home()))
    problems = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = _text(output)
            if output.output_type == "error" or "Traceback (most recent call last)" in text:
                problems.append(f"a traceback is stored: {_start(cell)}")
            elif output.output_type == "stream" and output.name == "stderr":
                problems.append(f"a warning is stored ({text.strip()[:70]!r}): {_start(cell)}")
            path = next((place for place in places if place + "/" in text), None)
            if path:
                problems.append(f"a path of this machine is stored ({path}): {_start(cell)}")
            if OUTSIDE_IMAGE.search(text):
                problems.append(f"an image from outside the repository is stored: {_start(cell)}")
    return problems


def _text(output: NotebookNode) -> str:
    """Everything readable in an output, in one text."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return "\n".join(output.traceback)
    return "\n".join(str(value) for kind, value in output.data.items() if not kind.startswith("image/"))


# ----------------------------------------------------------------------------- build and check


def build(folder: Path = HERE, files: list[Path] = (), force: bool = False) -> list[Path]:
    """Write the notebooks of `files` (default: all texts) that are not current; all of them with `force`.

    Raises:
        BuildError: if a text breaks a rule, a cell fails, or an output may not be stored. That notebook keeps
            its old file.
    """
    written = []
    for source in files or sources(folder):
        for target in targets(source, folder):
            name = target.path.relative_to(folder)
            if not force and not drift(target):
                print(f"{name} is current")
                continue
            notebook = copy.deepcopy(target.notebook)
            if target.executed:
                print(f"{name} runs ...", flush=True)
                target.path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    execute(notebook, target.path.parent)
                except Exception as error:  # a failing cell, a dead kernel, a cell that takes too long
                    raise BuildError(f"{name}: {COLOUR.sub('', str(error))}") from None
                _tidy(notebook, target)
                problems = output_problems(notebook, folder)
                if problems:
                    raise BuildError(f"{name}: " + "; ".join(problems))
            _write(notebook, target.path)
            written.append(target.path)
            print(f"{name} written")
    return written


def check(folder: Path = HERE, files: list[Path] = ()) -> list[str]:
    """What is out of date and the command that mends it, a sentence each; empty if all is current."""
    problems, expected = [], set()
    for source in files or sources(folder):
        for target in targets(source, folder):
            expected.add(target.path)
            name = target.path.relative_to(folder.parent)
            reason = drift(target)
            if reason:
                text = source.relative_to(folder.parent)
                problems.append(f"{name} {reason}. Its text is {text}; run `{COMMAND}`.")
                continue
            found = output_problems(nbformat.read(target.path, 4), folder)
            problems += [f"{name}: {problem}. Run `{COMMAND}`." for problem in found]
    if not files:
        places = ("*.ipynb", "homework/*.ipynb", "homework/solutions/*.ipynb")
        stored = {path for place in places for path in folder.glob(place)}
        problems += [
            f"{path.relative_to(folder.parent)} has no text in {folder.name}/source: add it, or delete this."
            for path in sorted(stored - expected)
        ]
    return problems


def sources(folder: Path) -> list[Path]:
    """Every text: lectures first, then homework."""
    return [*sorted(folder.glob("source/*.py")), *sorted(folder.glob("source/homework/*.py"))]


def drift(target: Target) -> str:
    """Why the stored notebook is not what its text gives, in words; empty if it is."""
    if not target.path.exists():
        return "is missing"
    stored = nbformat.read(target.path, 4)
    if stored.metadata.get("effnlp") != target.notebook.metadata["effnlp"]:
        return "was built from another text"
    if stored.metadata != target.notebook.metadata or _cells(stored) != _cells(target.notebook):
        return "was edited by hand"
    ran = [cell for cell in stored.cells if cell.get("execution_count") or cell.get("outputs")]
    if ran and not target.executed:
        return "holds outputs and should be unrun"
    if target.executed and any(cell not in ran for cell in stored.cells if _runs(cell)):
        return "has cells that were not run"
    if any("reveal" in tags(cell) for cell in ran):
        return "shows the output of a `reveal` cell"
    return ""


def _runs(cell: NotebookNode) -> bool:
    """True for a cell that has run in a built notebook."""
    kept_empty = {"reveal", "skip-execution"} & set(tags(cell))
    return cell.cell_type == "code" and bool(cell.source.strip()) and not kept_empty


def _cells(notebook: NotebookNode) -> list[tuple]:
    return [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]


def _write(notebook: NotebookNode, path: Path) -> None:
    """Write in one step, so that a stopped build leaves the old notebook whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.validate(notebook)
    unfinished = path.with_suffix(".part")
    nbformat.write(notebook, unfinished)
    os.replace(unfinished, path)


def checked_cells(notebook: NotebookNode) -> int:
    """How many cells' outputs nbval compares."""
    return sum("nbval-check-output" in tags(cell) for cell in notebook.cells)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the notebooks from their text, or check them against it.")
    parser.add_argument("command", choices=("build", "check"))
    parser.add_argument("files", nargs="*", type=lambda name: Path(name).resolve(), help="texts (default: all)")
    parser.add_argument("--force", action="store_true", help="run unchanged texts, too")
    chosen = parser.parse_args(arguments)
    if chosen.command == "check":
        problems = check(files=chosen.files)
        print("\n".join(problems) or "All notebooks are current.")
        return 1 if problems else 0
    try:
        build(files=chosen.files, force=chosen.force)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
