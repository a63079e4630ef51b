"""Reading a safetensors file that one of our functions wrote, with one clear sentence for what is wrong with it.

The compressed models of several lectures have files of their own: the metadata's `format` says whose a file is.
`training.write_atomically` writes them.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor


def read_tensors(file: Path | str, format: str, writer: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file whose metadata say `format`, that is, which `writer` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: a damaged file, or one of another format.
    """
    file = Path(file)
    if not file.exists():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own kind for a damaged file
        raise ValueError(f"{file.name} is not a readable safetensors file: {error}") from None
    if metadata.get("format") != format:
        raise ValueError(f"{file.name} was not written by {writer}: its format is {metadata.get('format')!r}")
    return metadata, tensors
