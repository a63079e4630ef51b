"""The movie-review sentences: counts, labels and the split."""

import hashlib

import numpy as np
import pytest

from effnlp_lessons.datasets import reviews


@pytest.fixture(scope="module")
def loaded() -> reviews.Reviews:
    return reviews.load_reviews()


def test_counts(loaded):
    assert len(loaded) == len(loaded.text) == 10_605
    assert {split: int((loaded.split == split).sum()) for split in reviews.SPLITS} == {
        "train": 7_072,
        "dev": 1_000,
        "test": 2_000,
        "neutral": 533,
    }
    positive = {split: int((loaded.subset(split).label == 1).sum()) for split in reviews.SPLITS}
    assert positive == {"train": 3_489, "dev": 515, "test": 992, "neutral": 0}
    labelled = loaded.label >= 0
    assert labelled.sum() == 10_072
    assert round(100 * float(loaded.label[labelled].mean()), 1) == 49.6


def test_rows_are_in_file_order(loaded):
    assert loaded.text[2] == "Effective but too tepid biopic"
    np.testing.assert_allclose(loaded.rating[:4], [2.26666667, 3.53333333, -0.6, 1.46666667], atol=1e-8)
    assert loaded.text[-1].endswith("In this case zero.")
    assert loaded.rating.min() == -3.875 and loaded.rating.max() == pytest.approx(3.94117647059)
    assert any("é" in text for text in loaded.text)  # read as UTF-8


def test_labels_follow_the_ratings(loaded):
    assert loaded.label.dtype == np.int64
    for rating, label in zip(loaded.rating, loaded.label, strict=True):
        assert label == (-1 if abs(rating) < 0.5 else int(rating >= 0.5))
    np.testing.assert_array_equal(loaded.split == "neutral", loaded.label == -1)
    assert (np.abs(loaded.rating[loaded.label >= 0]) == 0.5).any()  # half a point is a label


def test_split_is_the_order_of_the_hashes(loaded):
    """A second way to the split, and the fingerprint of the one that stored predictions rely on."""

    def largest_and_smallest(split):
        keys = [hashlib.sha256(reviews.normalised(t).encode()).hexdigest() for t in loaded.subset(split).text]
        return max(keys), min(keys)

    assert largest_and_smallest("test")[0] < largest_and_smallest("dev")[1]
    assert largest_and_smallest("dev")[0] < largest_and_smallest("train")[1]
    fingerprint = hashlib.sha256("\n".join(loaded.split).encode()).hexdigest()
    assert fingerprint[:16] == "89bb329a414a8714"


def test_equal_texts_share_their_split(loaded):
    splits: dict[str, set] = {}
    for text, split in zip(loaded.text, loaded.split, strict=True):
        splits.setdefault(reviews.normalised(text), set()).add(str(split))
    assert len(splits) == 10_603  # two sentences stand there twice
    assert all(len(found) == 1 for found in splits.values())


def test_subset_keeps_rows_together(loaded):
    dev = loaded.subset("dev")
    rows = np.flatnonzero(loaded.split == "dev")
    assert len(dev) == 1_000 and set(dev.split) == {"dev"}
    assert dev.text == [loaded.text[row] for row in rows]
    np.testing.assert_array_equal(dev.rating, loaded.rating[rows])
    np.testing.assert_array_equal(dev.label, loaded.label[rows])
    with pytest.raises(ValueError, match="split must be one of train, dev, test, neutral, got 'valid'"):
        loaded.subset("valid")


def lines(*rows: tuple[float, str]) -> str:
    return "\n".join(f"{number}\t{rating}\t{text}" for number, (rating, text) in enumerate(rows, start=1))


def test_equal_texts_in_two_splits_are_refused():
    same = lines((2.0, "A fun ride."), (1.5, "a  FUN ride."))
    assert list(reviews.parse_reviews(same, test_size=2, dev_size=0).split) == ["test", "test"]
    with pytest.raises(ValueError, match="is both in test and in dev"):
        reviews.parse_reviews(same, test_size=1, dev_size=1)
    with pytest.raises(ValueError, match="is both in test and in neutral"):
        reviews.parse_reviews(lines((2.0, "A fun ride."), (0.1, "A fun ride.")), test_size=1, dev_size=0)


@pytest.mark.parametrize("content", ["1\t2.0", "2\t2.0\tGood.", "1\t2.0\tGood.\tBad.", ""])
def test_another_form_is_refused(content):
    with pytest.raises(ValueError, match="line 1 must be 1, a rating and a text"):
        reviews.parse_reviews(content)
