"""Shakespeare's text: counts, splits by work, and the character vocabulary."""

import hashlib
import re

import pytest
import torch

from effnlp_lessons.datasets import shakespeare


def test_counts():
    works = shakespeare.load_works()
    assert len(works) == 42 and list(works) == sorted(works)
    assert len(shakespeare.load_text()) == 5_057_323
    sizes = {split: len(shakespeare.load_text(split)) for split in shakespeare.SPLITS}
    assert sizes == {"train": 4_532_374, "dev": 271_173, "test": 253_776}
    fingerprint = hashlib.sha256(shakespeare.load_text().encode()).hexdigest()
    assert fingerprint[:16] == "e1d2e18ac43deb31"


def test_splits_are_whole_works_one_after_the_other():
    whole = shakespeare.load_text()
    assert "".join(shakespeare.load_text(split) for split in shakespeare.SPLITS) == whole
    works = shakespeare.load_works()
    names = {split: [n for n in works if shakespeare.split_of(n) == split] for split in shakespeare.SPLITS}
    assert names["dev"] == ["troilus_and_cressida", "twelfth_night"]
    assert names["test"] == ["two_gentlemen_of_verona", "winters_tale"]
    assert len(names["train"]) == 38
    for split in shakespeare.SPLITS:
        assert shakespeare.load_text(split) == "".join(works[name] for name in names[split])
    with pytest.raises(ValueError, match="split must be None or one of train, dev, test, got 'all'"):
        shakespeare.load_text("all")


def test_texts_are_the_works_alone():
    """No header, trailer or licence of an electronic edition."""
    for name, text in shakespeare.load_works().items():
        assert text[:60].split("\n")[0].isupper(), name
        assert "by William Shakespeare" in text[:90], name
        assert text.endswith("\n\n\n") and not text.endswith("\n\n\n\n")
        assert not re.search(r"gutenberg|\be-?text|copyright|http|www\.", text.lower()), name
    assert "To be, or not to be,--that is the question:--" in shakespeare.load_works()["hamlet"]


def test_vocabulary():
    characters = shakespeare.vocabulary()
    assert len(characters) == len(set(characters)) == 84
    assert list(characters) == sorted(characters) and characters.isascii()
    assert set(characters) == set(shakespeare.load_text("train"))  # every character can be learnt


def test_encode_and_decode():
    text = "Exit, pursued by a bear.\n"
    numbers = shakespeare.encode(text)
    assert numbers.dtype == torch.int64
    assert numbers.tolist() == [shakespeare.vocabulary().index(character) for character in text]
    dev = shakespeare.load_text("dev")
    assert shakespeare.decode(shakespeare.encode(dev)) == dev
    assert shakespeare.encode("").shape == (0,) and shakespeare.decode(torch.tensor([])) == ""
    for bad in ("50 %", "café"):
        with pytest.raises(ValueError, match="characters outside the vocabulary: '[%é]'"):
            shakespeare.encode(bad)
    for bad in ([0, 84], [-1]):
        with pytest.raises(ValueError, match=r"characters must be in 0 \.\. 83"):
            shakespeare.decode(torch.tensor(bad))


def test_what_is_returned_may_be_changed():
    shakespeare.load_works().clear()
    assert len(shakespeare.load_works()) == 42
