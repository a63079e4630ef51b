"""Where the course keeps its files. Standard library only.

Everything lies in the `data` folder of the checkout. The environment variable `EFFNLP_DATA` names another
folder to use instead, for example a copy of `data` on a disk with more room.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def data_dir() -> Path:
    """Return the data folder: `EFFNLP_DATA` if it is set and not empty, otherwise `data` in the checkout."""
    chosen = os.environ.get("EFFNLP_DATA")
    return Path(chosen).expanduser().absolute() if chosen else ROOT / "data"


def sources_file() -> Path:
    """Return the list of sources: `sources.toml` of the data folder, or the checkout's if it has none."""
    own = data_dir() / "sources.toml"
    return own if own.is_file() else ROOT / "data" / "sources.toml"


def prepared_dir() -> Path:
    """Return the folder of the verified data that `python -m effnlp_lessons prepare` makes."""
    return data_dir() / "prepared"


def results_dir() -> Path:
    """Return the folder of the recorded studies."""
    return data_dir() / "results"


def checkpoints_dir() -> Path:
    """Return the folder of the checkpoints trained for the course."""
    return data_dir() / "checkpoints"
