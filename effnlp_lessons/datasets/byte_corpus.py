"""Bytes of four domains and nine languages, for a language model whose experts may take one each.

A text is its UTF-8 bytes: no vocabulary, 256 symbols for all scripts. The domains are messages (the translations of a
web framework's messages into eight languages, four of them in scripts that share no letter with Latin or each other),
Python source of the same framework, Shakespeare, and sentences of film reviews. Bytes are sampled so that every domain
comes equally often and, among the messages, every language, although Shakespeare alone is most of the text.

Train and dev share no document. A document is a catalogue of messages, a Python module, a work of Shakespeare or a
sentence of a review; the last two are split as `shakespeare` and `reviews` do it, and their test sets are in neither.
Messages that came before in the same language are left out, so that no message of dev is in train.
"""

import json
import re
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from effnlp_lessons.datasets import reviews, shakespeare, sources

SPLITS = ("train", "dev")
DOMAINS = ("messages", "python", "shakespeare", "reviews")
MESSAGE_LANGUAGES = ("ar", "de", "el", "es", "fr", "ja", "pl", "ru")
LANGUAGES = (*MESSAGE_LANGUAGES, "en", "code")  # Shakespeare and the reviews are English, Python is code
CATALOGUES = ("core", "admin", "admin_js", "flatpages", "gis", "postgres", "admindocs", "auth")
DEV_CATALOGUES = ("admindocs", "auth")
DEV_MODULES = ("django.forms.widgets.py", "django.template.defaulttags.py", "django.test.runner.py")
_FIELD = re.compile(r'(?:(msgctxt|msgid|msgid_plural|msgstr(?:\[[0-9]\])?) )?("(?:[^"\\]|\\["\\nrt])*")')


class Part(NamedTuple):
    """The text of one domain in one language."""

    domain: int  # place in DOMAINS
    language: int  # place in LANGUAGES
    text: UInt8[Tensor, " bytes"]


class Batch(NamedTuple):
    """Pieces of text, and of each its domain and language."""

    token_ids: Int64[Tensor, "batch length"]  # bytes, 0 .. 255
    domains: Int64[Tensor, " batch"]  # places in DOMAINS
    languages: Int64[Tensor, " batch"]  # places in LANGUAGES


def load_parts(split: str) -> dict[str, Part]:
    """Return the eleven parts of "train" or "dev": the messages by language, then python, shakespeare, reviews.

    Raises:
        ValueError: if `split` is neither train nor dev.
        SourceError: if the data have not been prepared.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return dict(_parts(split))


@cache
def _parts(split: str) -> dict[str, Part]:
    texts = {}
    for language in MESSAGE_LANGUAGES:
        catalogues = load_messages(language)
        texts[language] = "messages", language, "".join(catalogues[name] for name in _of(split, CATALOGUES))
    modules = load_modules()
    texts["python"] = "python", "code", "\n\n".join(modules[name] for name in _of(split, tuple(modules)))
    texts["shakespeare"] = "shakespeare", "en", shakespeare.load_text(split)
    films = reviews.load_reviews()
    wanted = ("train", "neutral") if split == "train" else ("dev",)
    sentences = [text for text, part in zip(films.text, films.split, strict=True) if part in wanted]
    texts["reviews"] = "reviews", "en", "".join(sentence + "\n" for sentence in sentences)
    return {
        name: Part(DOMAINS.index(domain), LANGUAGES.index(language), to_bytes(text))
        for name, (domain, language, text) in texts.items()
    }


def _of(split: str, documents: tuple[str, ...]) -> list[str]:
    """The documents of one split, in their order."""
    return [name for name in documents if (name in DEV_CATALOGUES + DEV_MODULES) == (split == "dev")]


def load_messages(language: str) -> dict[str, str]:
    """Return the new messages of every catalogue of a language, one after the other, each with a line break.

    Raises:
        ValueError: if there are no messages in that language.
        SourceError: if the data have not been prepared.
    """
    if language not in MESSAGE_LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(MESSAGE_LANGUAGES)}, got {language!r}")
    catalogues, seen = {}, set()
    for name in CATALOGUES:
        content = sources.path("django", f"{language}.{name}.po").read_text(encoding="utf-8")
        new = [text for text in dict.fromkeys(parse_catalogue(content)) if text not in seen]
        seen.update(new)
        catalogues[name] = "".join(text + "\n" for text in new)
    return catalogues


def load_modules() -> dict[str, str]:
    """Return the 22 Python modules by the name of their file, as they stand.

    Raises:
        SourceError: if the data have not been prepared.
    """
    names = [file.name for file in sources.load_sources()["django"].files if file.name.endswith(".py")]
    return {name: sources.path("django", name).read_text(encoding="utf-8") for name in names}


def parse_catalogue(content: str) -> list[str]:
    """Return the translations of a gettext catalogue (.po) in their order, every plural form by itself.

    Entries stand between empty lines. Left out are the header, what has no translation, what is marked fuzzy (a guess)
    and what is obsolete (a comment).

    Raises:
        ValueError: if a line is no comment and no quoted text behind a keyword or another quoted text, or if an entry
            has two originals.
    """
    texts = []
    for entry in re.split(r"\n\s*\n", content):
        lines = entry.strip().split("\n")
        fields: list[list[str]] = []  # keyword, text
        for line in lines:
            matched = _FIELD.fullmatch(line)
            if line.startswith("#") or not line:
                continue
            if not matched or not (matched[1] or fields):
                raise ValueError(f"a line must be a comment or a quoted text behind its keyword, got {line!r}")
            if matched[1]:
                fields.append([matched[1], ""])
            fields[-1][1] += json.loads(matched[2])  # the escapes of a catalogue are JSON's
        originals = [text for keyword, text in fields if keyword == "msgid"]
        if len(originals) > 1:
            raise ValueError(f"an empty line must stand between two entries, missing before {originals[1]!r}")
        fuzzy = any(line.startswith("#,") and "fuzzy" in line for line in lines)
        if originals != [""] and not fuzzy:
            texts += [text for keyword, text in fields if keyword.startswith("msgstr") and text]
    return texts


def to_bytes(text: str) -> UInt8[Tensor, " bytes"]:
    """Return the UTF-8 bytes of a text."""
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8) if text else torch.empty(0).byte()


def to_text(token_ids: Tensor) -> str:
    """Return the text of bytes; where a character was cut, the replacement character stands."""
    return bytes(token_ids.tolist()).decode("utf-8", errors="replace")


def sample(parts: dict[str, Part], batch: int, length: int, generator: torch.Generator) -> Batch:
    """Draw pieces of text: a domain, a language it has, a place, each with equal chances.

    Raises:
        ValueError: if batch or length is < 1, or `length` is longer than a part.
    """
    _check(parts, batch=batch, length=length)
    domains = sorted({part.domain for part in parts.values()})
    drawn, starts = [], []

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    for _ in range(batch):
        domain = domains[draw(len(domains))]
        choices = [part for part in parts.values() if part.domain == domain]
        drawn.append(choices[draw(len(choices))])
        starts.append(draw(len(drawn[-1].text) - length + 1))
    return _batch(drawn, starts, length)


def windows(parts: dict[str, Part], count: int, length: int) -> Batch:
    """Return `count` pieces of every part, part after part, spread evenly from its first byte to its last.

    Nothing is drawn: an evaluation reads the same pieces every time.

    Raises:
        ValueError: if count or length is < 1, or `length` is longer than a part.
    """
    _check(parts, count=count, length=length)
    drawn, starts = [], []
    for part in parts.values():
        last = len(part.text) - length
        drawn += [part] * count
        starts += [last * i // max(1, count - 1) for i in range(count)]
    return _batch(drawn, starts, length)


def _check(parts: dict[str, Part], length: int, **sizes: int) -> None:
    for name, size in {**sizes, "length": length}.items():
        if size < 1:
            raise ValueError(f"{name} must be >= 1, got {size}")
    for name, part in parts.items():
        if len(part.text) < length:
            raise ValueError(f"length must be at most the {len(part.text)} bytes of {name!r}, got {length}")


def _batch(drawn: list[Part], starts: list[int], length: int) -> Batch:
    pieces = [part.text[start : start + length] for part, start in zip(drawn, starts, strict=True)]
    domains, languages = ([getattr(part, name) for part in drawn] for name in ("domain", "language"))
    return Batch(torch.stack(pieces).long(), torch.tensor(domains), torch.tensor(languages))
