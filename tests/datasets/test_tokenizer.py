"""The word pieces must be those of transformers' own tokenizer for the same model."""

import random

import pytest
import torch

from effnlp_lessons.datasets import reviews, sources, tokenizer

ODD = [
    "",
    " ",
    "\n\t \u00a0\u3000",
    "[CLS] [SEP] [PAD] [MASK] [UNK]",
    "[mask] ##ing",
    "naïve café façade Ångström",
    "nai\u0308ve cafe\u0301",  # combining accents
    "İstanbul ıssız ŞAŞKIN ß ẞ",
    "汉字仮名交じり文",
    "한국어 텍스트",
    "हिन्दी पाठ",
    "שָׁלוֹם עולם",
    "سلام دنیا",
    "a\u200bb\u200dc\ufeffd",  # zero-width characters
    "soft\u00adhyphen",
    "tab\tand\x00null\x07bell\ufffd",
    "👩‍👩‍👧 🇩🇪 👍🏽",
    "x" * 101,  # longer than a word may be
    "x" * 100,
    "don't -- stop... e.g. 3.14159 $5,000.00 50%",
    "http://a.b/c?d=e&f=g#h",
    "ﬁ ﬂ Ⅷ ½ ²",
    "\ud7ff\ue000\U0010ffff",
    "word " * 600,
    "antidisestablishmentarianism " * 200,
    "汉" * 700,
]


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x2000, 0x206F), (0x4E00, 0x4FFF)]
    return [
        "".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(generator.randint(1, 60)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    texts = ODD + random_texts(80)
    return texts + reviews.load_reviews().text[: 200 - len(texts)]


@pytest.fixture(scope="module")
def reference():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(sources.path("minilm", "tokenizer.json").parent, local_files_only=True)


@pytest.mark.parametrize("max_length", [2, 3, 17, 128, 512])
def test_same_ids_as_transformers(sentences, reference, max_length):
    assert len(sentences) == 200
    ours = tokenizer.encode(sentences, max_length=max_length)
    theirs = reference(sentences, truncation=True, max_length=max_length, padding=False)["input_ids"]
    for text, own, other in zip(sentences, ours, theirs, strict=True):
        assert own == other, text
    assert max(map(len, ours)) == max_length


def test_same_padding_as_transformers(sentences, reference):
    token_ids, mask = tokenizer.pad(tokenizer.encode(sentences, max_length=64))
    theirs = reference(sentences, truncation=True, max_length=64, padding=True, return_tensors="pt")
    assert token_ids.dtype == torch.int64 and mask.dtype == torch.bool
    torch.testing.assert_close(token_ids, theirs["input_ids"])
    torch.testing.assert_close(mask, theirs["attention_mask"].bool())


def test_frame_and_vocabulary():
    [empty, film] = tokenizer.encode(["", "A film."])
    assert empty == [tokenizer.CLS, tokenizer.SEP] == [101, 102]
    assert film == [101, 1037, 2143, 1012, 102]
    loaded = tokenizer.load_tokenizer()
    assert loaded.get_vocab_size() == 30_522
    assert [loaded.token_to_id(t) for t in ("[PAD]", "[CLS]", "[SEP]")] == [0, 101, 102]
    vocabulary = sources.path("minilm", "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert all(loaded.id_to_token(number) == vocabulary[number] for number in range(30_522))
    assert loaded.decode(film) == "a film."


def test_loaded_tokenizer_neither_truncates_nor_pads_and_is_a_copy():
    loaded = tokenizer.load_tokenizer()
    assert loaded.truncation is None and loaded.padding is None
    assert len(loaded.encode("word " * 600).ids) == 602
    loaded.enable_padding(length=99)
    assert tokenizer.encode(["A film."]) == [[101, 1037, 2143, 1012, 102]]
    assert tokenizer.load_tokenizer().padding is None


def test_lengths_of_the_reviews():
    lengths = sorted(map(len, tokenizer.encode(reviews.load_reviews().text)))
    assert lengths[-1] == 79
    assert lengths[len(lengths) * 95 // 100] == 46


def test_pad():
    token_ids, mask = tokenizer.pad([[101, 7, 102], [], [101, 0, 9, 102]])
    assert token_ids.tolist() == [[101, 7, 102, 0], [0, 0, 0, 0], [101, 0, 9, 102]]
    assert mask.int().tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]  # by length, not by token id
    assert tokenizer.pad([[5]])[0].shape == (1, 1)


def test_bad_input():
    with pytest.raises(ValueError, match="texts must be a list of strings, got one string"):
        tokenizer.encode("A film.")
    with pytest.raises(ValueError, match="texts must hold strings only, got int"):
        tokenizer.encode(["A film.", 3])
    for length in (1, 0, 513):
        with pytest.raises(ValueError, match=rf"max_length must be in 2 \.\. 512, got {length}"):
            tokenizer.encode(["A film."], max_length=length)
    with pytest.raises(ValueError, match="at least one row"):
        tokenizer.pad([])
    assert tokenizer.encode([]) == []
