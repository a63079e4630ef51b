"""General text: counts, no movie review in it, and the form of the files."""

import hashlib

import pytest

from effnlp_lessons.datasets import general_text, reviews, sources, tokenizer


@pytest.fixture(scope="module")
def by_origin() -> dict[str, list[str]]:
    return general_text.load_by_origin()


def test_counts(by_origin):
    assert {origin: len(texts) for origin, texts in by_origin.items()} == {
        "products": 3_696,
        "editorials": 5_115,
        "tweets": 4_140,
    }
    assert sum(map(len, tokenizer.encode(general_text.load_general_text()))) == 305_573  # with [CLS] and [SEP]


def test_sentences_follow_the_files(by_origin):
    loaded = general_text.load_general_text()
    assert loaded == [*by_origin["products"], *by_origin["editorials"], *by_origin["tweets"]]
    assert by_origin["products"][0] == "troubleshooting ad-2500 and ad-2600 no picture scrolling b/w."
    assert by_origin["editorials"][-1] == "They sound a needed alarm in the urban education night."
    assert by_origin["tweets"][2].startswith("We were 17 deep last night & the love was so strong")
    assert any("español" in text for text in by_origin["tweets"])  # read as UTF-8
    assert hashlib.sha256("\n".join(loaded).encode()).hexdigest()[:16] == "da5e6e881bd8e944"


def test_nothing_is_left_that_is_no_text(by_origin):
    for text in general_text.load_general_text():
        assert text == text.strip() and text.isprintable() and "&amp;" not in text
    assert any('"' in text for text in by_origin["tweets"])  # quotation marks stay as they are


def test_none_is_a_movie_review():
    """Everything that the files hold, less what is left out: one movie review and 146 repetitions."""
    films = {" ".join(text.lower().split()) for text in reviews.load_reviews().text}
    loaded = [" ".join(text.lower().split()) for text in general_text.load_general_text()]
    assert not films & set(loaded)
    assert len(set(loaded)) == len(loaded)
    everything = []
    for name in general_text.FILES.values():
        content = sources.path("general_text", name).read_text(encoding="utf-8")
        everything += [" ".join(text.lower().split()) for text in general_text.parse_sentences(content)]
    assert len(everything) == 13_098
    assert [text for text in everything if text in films] == ["don't waste your money."]
    assert len(everything) - len(set(everything)) == 146
    assert set(everything) - set(loaded) == {"don't waste your money."}


def test_repetitions_go_and_the_first_stays():
    sentences = {"products": ["It  works.", "Great film!", "it works."], "tweets": ["IT WORKS.", "Yes."], "none": []}
    found = general_text.without_repetitions(sentences, known=["great FILM!"])
    assert found == {"products": ["It  works."], "tweets": ["Yes."], "none": []}
    assert len(sentences["products"]) == 3  # the argument is left as it was


def test_lines_are_read_as_they_stand():
    content = '1_1\t-0.9\t"Quoted," it said\n1_2\t0.1\t one &quot;more &amp;amp; \n10_1\tnan\tR&B, a\u2028b\n\n'
    assert general_text.parse_sentences(content) == ['"Quoted," it said', 'one "more &', "R&B, a\u2028b"]


@pytest.mark.parametrize(
    "line", ["", "1_1\t2.0", "1_1\t2.0\tGood.\tBad.", "1_1\t2.0\t ", "a\t2.0\tGood.", "\t2.0\tGood.", "3_1\t2.0\tGood."]
)
def test_a_broken_line_is_refused(line):
    with pytest.raises(ValueError, match="line 2 must be a new id, a rating and a text with tabs between, got"):
        general_text.parse_sentences(f"3_1\t1.0\tBefore.\n{line}\n4_1\t1.0\tAfter.")
