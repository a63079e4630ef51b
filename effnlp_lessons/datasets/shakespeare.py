"""Shakespeare's plays and poems as one text for character language models, split by work.

The works follow each other in alphabetical order of their file names. The last two plays are the test set,
the two before them the development set, all others the training set, so that no work is in two splits and
each split is one contiguous stretch of the text.
"""

from functools import cache

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from effnlp_lessons.datasets import sources

SPLITS = ("train", "dev", "test")
DEV_WORKS = ("troilus_and_cressida", "twelfth_night")
TEST_WORKS = ("two_gentlemen_of_verona", "winters_tale")
_ENDING = "_gut.txt"


def load_works() -> dict[str, str]:
    """Return the 42 works by name, for example "hamlet", in order. Each ends with three line breaks.

    Raises:
        SourceError: if the data have not been prepared.
    """
    return dict(_works())


@cache
def _works() -> dict[str, str]:
    works = {}
    for file in sources.load_sources()["shakespeare"].files:
        text = sources.path("shakespeare", file.name).read_text(encoding="ascii")
        works[file.name.removesuffix(_ENDING)] = text.strip() + "\n\n\n"
    return works


def split_of(work: str) -> str:
    """Return the split of a work: "train", "dev" or "test"."""
    return "dev" if work in DEV_WORKS else "test" if work in TEST_WORKS else "train"


def load_text(split: str | None = None) -> str:
    """Return the text of one split, or the whole text: train, dev and test one after the other.

    Raises:
        ValueError: if `split` is not None, train, dev or test.
        SourceError: if the data have not been prepared.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be None or one of {', '.join(SPLITS)}, got {split!r}")
    return "".join(text for work, text in _works().items() if split in (None, split_of(work)))


@cache
def vocabulary() -> str:
    """Return every character of the whole text once, sorted; a character's number is its place here."""
    return "".join(sorted(set(load_text())))


def encode(text: str) -> Int64[Tensor, " length"]:
    """Return the number of every character of `text` in the vocabulary.

    Raises:
        ValueError: if `text` has a character that Shakespeare's text has not.
    """
    unknown = sorted(set(text) - set(vocabulary()))
    if unknown:
        raise ValueError(f"text has characters outside the vocabulary: {''.join(unknown)!r}")
    table = np.zeros(128, dtype=np.int64)
    table[np.frombuffer(vocabulary().encode("ascii"), dtype=np.uint8)] = np.arange(len(vocabulary()))
    return torch.from_numpy(table[np.frombuffer(text.encode("ascii"), dtype=np.uint8)])


def decode(characters: Int64[Tensor, " length"]) -> str:
    """Return the text whose characters have these numbers.

    Raises:
        ValueError: if a number is not in 0 to the size of the vocabulary less one.
    """
    numbers = characters.tolist()
    if numbers and not 0 <= min(numbers) <= max(numbers) < len(vocabulary()):
        raise ValueError(f"characters must be in 0 .. {len(vocabulary()) - 1}, got {min(numbers)} .. {max(numbers)}")
    return "".join(vocabulary()[number] for number in numbers)
