"""Sentences on anything but films, without labels: general text to distil on before the task's own text.

They come from the archive of the movie reviews (Hutto and Gilbert 2014): opinions on products, newspaper
editorials, tweets. Their ratings are not read. A sentence that is a movie review too is left out, so that
none of the task's test set is in here; so are repetitions. Two sentences are the same when they agree in
lower case and single spaces (`reviews.normalised`).
"""

import html
import re

from effnlp_lessons.datasets import reviews, sources

FILES = {
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
_ID = re.compile(r"[0-9]+(_[0-9]+)?")  # document_sentence, or sentence


def load_general_text() -> list[str]:
    """Return the 12,951 sentences, products first, then editorials, then tweets, each in file order.

    Raises:
        SourceError: if the data have not been prepared.
    """
    return [sentence for sentences in load_by_origin().values() for sentence in sentences]


def load_by_origin() -> dict[str, list[str]]:
    """Return the sentences of "products", "editorials" and "tweets", each in file order.

    Of the 13,098 sentences in the files 146 are left out: one movie review, and 145 repetitions of an earlier one.

    Raises:
        SourceError: if the data have not been prepared.
    """
    contents = {
        origin: sources.path("general_text", name).read_text(encoding="utf-8") for origin, name in FILES.items()
    }
    parsed = {origin: parse_sentences(content) for origin, content in contents.items()}
    return without_repetitions(parsed, known=reviews.load_reviews().text)


def parse_sentences(content: str) -> list[str]:
    """Return the texts of `content`, lines of "id, rating, text" with tabs between.

    Quotation marks have no meaning of their own. Written-out characters become the character: `&lt;` <,
    and both `&amp;` and `&amp;amp;` become &.

    Raises:
        ValueError: if a line has another form or no text, or its id stood there before.
    """
    sentences, seen = [], set()
    for number, line in enumerate(content.rstrip("\n").split("\n"), start=1):
        columns = line.split("\t")
        text = html.unescape(html.unescape(columns[-1])).strip()  # the editorials' & is written out twice
        if len(columns) != 3 or not _ID.fullmatch(columns[0]) or columns[0] in seen or not text:
            raise ValueError(f"line {number} must be a new id, a rating and a text with tabs between, got {line!r}")
        seen.add(columns[0])
        sentences.append(text)
    return sentences


def without_repetitions(sentences: dict[str, list[str]], known: list[str]) -> dict[str, list[str]]:
    """Return `sentences` without those that are in `known`, or that came before under any key."""
    seen = {reviews.normalised(sentence) for sentence in known}
    kept: dict[str, list[str]] = {}
    for origin, texts in sentences.items():
        kept[origin] = []
        for text in texts:
            key = reviews.normalised(text)
            if key not in seen:
                seen.add(key)
                kept[origin].append(text)
    return kept
