"""Movie-review sentences with the mean of human sentiment ratings, and a fixed split.

The data are Hutto and Gilbert's (2014). A sentence is labelled when its mean rating is at least half a point
from zero; the others are neutral and serve as unlabelled text. The split depends on the sentences alone, not
on a random generator: labelled sentences are ordered by the sha256 of their normalised text; the first 2,000
are the test set, the next 1,000 the development set, the rest the training set. Equal texts have equal
hashes, so they stand side by side in that order.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from effnlp_lessons.datasets import sources

SPLITS = ("train", "dev", "test", "neutral")
TEST_SIZE = 2_000
DEV_SIZE = 1_000
NEUTRAL_BELOW = 0.5  # absolute mean rating under which a sentence carries no label


@dataclass(frozen=True)
class Reviews:
    """Sentences and their ratings, row by row.

    Attributes:
        text: the sentences, `len(reviews)` of them.
        rating: mean of the human ratings, from -4 (negative) to 4 (positive); float64 (rows,).
        split: "train", "dev", "test" or "neutral"; str (rows,).
        label: 1 positive, 0 negative, -1 neutral; int64 (rows,).
    """

    text: list[str]
    rating: np.ndarray
    split: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.text)

    def subset(self, split: str) -> "Reviews":
        """Return the rows of one split, in file order.

        Raises:
            ValueError: if `split` is not one of train, dev, test, neutral.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        rows = np.flatnonzero(self.split == split)
        return Reviews([self.text[row] for row in rows], self.rating[rows], self.split[rows], self.label[rows])


def load_reviews() -> Reviews:
    """Return all 10,605 sentences in the order of the file, so that stored predictions line up with the rows.

    Raises:
        SourceError: if the data have not been prepared.
    """
    file = sources.path("movie_reviews", "movieReviewSnippets_GroundTruth.txt")
    return parse_reviews(file.read_text(encoding="utf-8"))


def parse_reviews(content: str, *, test_size: int = TEST_SIZE, dev_size: int = DEV_SIZE) -> Reviews:
    """Return the sentences of `content`, lines of "id, rating, text" with tabs between, labelled and split.

    Raises:
        ValueError: if a line has another form, or equal texts fall into two splits.
    """
    text, ratings = [], []
    for number, line in enumerate(content.rstrip("\n").split("\n"), start=1):
        columns = line.split("\t")
        if len(columns) != 3 or columns[0] != str(number):
            raise ValueError(f"line {number} must be {number}, a rating and a text with tabs between, got {line!r}")
        text.append(columns[2])
        ratings.append(float(columns[1]))
    rating = np.array(ratings)
    label = np.where(np.abs(rating) < NEUTRAL_BELOW, -1, (rating > 0).astype(np.int64))
    split = _split(text, label, test_size, dev_size)
    return Reviews(text, rating, split, label)


def normalised(text: str) -> str:
    """Return the text in lower case with single spaces: what decides whether two sentences are the same."""
    return " ".join(text.lower().split())


def _split(text: list[str], label: np.ndarray, test_size: int, dev_size: int) -> np.ndarray:
    keys = [hashlib.sha256(normalised(sentence).encode()).hexdigest() for sentence in text]
    order = sorted(np.flatnonzero(label >= 0), key=lambda row: keys[row])
    split = np.full(len(text), "neutral")
    split[order[:test_size]] = "test"
    split[order[test_size : test_size + dev_size]] = "dev"
    split[order[test_size + dev_size :]] = "train"
    first: dict[str, str] = {}
    for key, name, sentence in zip(keys, split, text, strict=True):
        if first.setdefault(key, name) != name:
            raise ValueError(f"the text {sentence!r} is both in {first[key]} and in {name}")
    return split
