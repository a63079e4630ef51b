"""What a student has done, kept between notebooks: one small JSON file an entry, `EFFNLP_HOME/KIND/NAME.json`.

By default the folder is `.progress` of the checkout. Two open notebooks cannot overwrite each other's entries, and a
file is written in one step. With `EFFNLP_GUESSES=recorded` in the environment (builds and tests) nothing is read or
written.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from effnlp_lessons.paths import ROOT
from effnlp_lessons.training import write_atomically

Entry = TypeVar("Entry")
_told_unwritable: set[Path] = set()


def recorded() -> bool:
    """True where nobody is there to guess or to keep anything: builds and tests."""
    return os.environ.get("EFFNLP_GUESSES") == "recorded"


def folder(kind: str) -> Path:
    return Path(os.environ.get("EFFNLP_HOME") or ROOT / ".progress") / kind


def store(kind: str, name: str, content: dict[str, Any]) -> None:
    """Write an entry; where the folder cannot be written, say so once and go on."""
    path = folder(kind) / f"{name}.json"
    if recorded():
        return
    try:
        write_atomically(path, lambda file: file.write_text(json.dumps(content), encoding="utf-8"))
    except OSError:
        if path.parent not in _told_unwritable:
            _told_unwritable.add(path.parent)
            print(f"Your progress folder cannot be written: {kind} last until this notebook's kernel stops.")


def load(kind: str, name: str, read: Callable[[Any], Entry | None]) -> Entry | None:
    """What `read` makes of the entry's content; None if there is no entry.

    A file that is no JSON, or of which `read` makes nothing (None, or a ValueError, TypeError, KeyError), is renamed,
    and that is said: nothing is lost.
    """
    path = folder(kind) / f"{name}.json"
    if recorded() or not path.exists():
        return None
    try:
        entry = read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError):
        entry = None
    except OSError:
        return None
    if entry is None:
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(".json.damaged"))
        print(f"Your stored {name} of {kind} could not be read. It is now *.json.damaged.")
    return entry


def names(kind: str) -> list[str]:
    """Names of the stored entries of one kind, sorted."""
    return [] if recorded() else sorted(path.stem for path in folder(kind).glob("*.json"))
