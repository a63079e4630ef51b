"""The byte corpus: counts, catalogues against Babel, no document in two splits, balanced draws."""

import hashlib

import pytest
import torch
from babel.messages.pofile import read_po  # comes with JupyterLab

from effnlp_lessons.datasets import byte_corpus, reviews, shakespeare, sources
from effnlp_lessons.datasets.byte_corpus import DOMAINS, LANGUAGES, MESSAGE_LANGUAGES, Part


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, Part]]:
    return {split: byte_corpus.load_parts(split) for split in byte_corpus.SPLITS}


def numbered(**sizes: int) -> dict[str, Part]:
    """Parts whose bytes are their places; the domain is the first letter's, the language the last letter's."""
    return {
        name: Part("ab".index(name[0]), int(name[1]), torch.arange(size, dtype=torch.uint8))
        for name, size in sizes.items()
    }


def test_counts(parts):
    sizes = {split: {name: len(part.text) for name, part in found.items()} for split, found in parts.items()}
    assert sizes == {
        "train": {
            "ar": 28_968, "de": 22_709, "el": 35_695, "es": 22_632, "fr": 24_632, "ja": 25_830, "pl": 23_729,
            "ru": 39_166, "python": 1_422_518, "shakespeare": 4_532_374, "reviews": 861_221,
        },
        "dev": {
            "ar": 8_364, "de": 5_084, "el": 9_808, "es": 6_075, "fr": 6_531, "ja": 6_811, "pl": 5_814, "ru": 10_182,
            "python": 133_949, "shakespeare": 271_173, "reviews": 109_896,
        },
    }  # fmt: skip
    for split, fingerprint in {"train": "1d853600d1a699cc", "dev": "9eb14d507261846f"}.items():
        content = b"".join(bytes(part.text.tolist()) for part in parts[split].values())
        assert hashlib.sha256(content).hexdigest()[:16] == fingerprint


def test_domains_and_languages(parts):
    for found in parts.values():
        labels = {name: (DOMAINS[part.domain], LANGUAGES[part.language]) for name, part in found.items()}
        assert labels == {language: ("messages", language) for language in MESSAGE_LANGUAGES} | {
            "python": ("python", "code"), "shakespeare": ("shakespeare", "en"), "reviews": ("reviews", "en"),
        }  # fmt: skip
    with pytest.raises(ValueError, match="split must be one of train, dev, got 'test'"):
        byte_corpus.load_parts("test")


def test_scripts_are_those_of_the_languages(parts):
    """Most letters are of the language's own block of Unicode, and no other language has one of them."""
    blocks = {
        "ar": ("\u0600", "\u06ff"),
        "el": ("\u0370", "\u03ff"),
        "ja": ("\u3040", "\u9fff"),
        "ru": ("\u0400", "\u04ff"),
    }
    for name, (first, last) in blocks.items():
        for language in MESSAGE_LANGUAGES:
            letters = [c for c in byte_corpus.to_text(parts["train"][language].text) if c.isalpha()]
            share = sum(first <= c <= last for c in letters) / len(letters)
            assert share > 0.7 if language == name else share == 0
    assert all("ä" in byte_corpus.to_text(found["de"].text) for found in parts.values())


def test_messages_are_babels():
    """Babel throws the third plural form of Spanish and French away, so that these two are not compared."""
    texts = 0
    for language in set(MESSAGE_LANGUAGES) - {"es", "fr"}:
        for name in byte_corpus.CATALOGUES:
            file = sources.path("django", f"{language}.{name}.po")
            expected = []
            with open(file, "rb") as catalogue:
                for message in read_po(catalogue):
                    forms = [message.string] if isinstance(message.string, str) else message.string
                    expected += [form for form in forms if form and message.id and not message.fuzzy]
            assert byte_corpus.parse_catalogue(file.read_text(encoding="utf-8")) == expected
            texts += len(expected)
    assert texts == 5_240


def test_no_document_is_in_two_splits(parts):
    texts = {split: {name: byte_corpus.to_text(part.text) for name, part in parts[split].items()} for split in parts}
    for language in MESSAGE_LANGUAGES:
        catalogues = byte_corpus.load_messages(language)
        for split in parts:
            names = [name for name in catalogues if (name in byte_corpus.DEV_CATALOGUES) == (split == "dev")]
            assert texts[split][language] == "".join(catalogues[name] for name in names)
    modules = byte_corpus.load_modules()
    assert len(modules) == 22 and set(byte_corpus.DEV_MODULES) < set(modules)
    for name, source in modules.items():
        compile(source, name, "exec")
        assert [split for split in texts if source in texts[split]["python"]] == [
            "dev" if name in byte_corpus.DEV_MODULES else "train"
        ]
    for split in parts:
        assert texts[split]["shakespeare"] == shakespeare.load_text(split)
    films = reviews.load_reviews()
    sentences = {split: set(texts[split]["reviews"].splitlines()) for split in parts}
    assert sentences["train"] == set(films.subset("train").text) | set(films.subset("neutral").text)
    assert sentences["dev"] == set(films.subset("dev").text)
    assert not sentences["dev"] & sentences["train"]
    assert not set(films.subset("test").text) & (sentences["train"] | sentences["dev"])


@pytest.mark.parametrize("language", ["de", "ja"])
def test_messages_that_came_before_are_left_out(language):
    """In the order of the catalogues, those of dev being the last: so no message of dev is in train."""
    assert byte_corpus.CATALOGUES[-2:] == byte_corpus.DEV_CATALOGUES
    seen: list[str] = []
    for name, text in byte_corpus.load_messages(language).items():
        file = sources.path("django", f"{language}.{name}.po")
        before = len(seen)
        for message in byte_corpus.parse_catalogue(file.read_text(encoding="utf-8")):
            if message not in seen:
                seen.append(message)
        assert text == "".join(f"{message}\n" for message in seen[before:])


def test_another_language_is_refused():
    with pytest.raises(ValueError, match="language must be one of ar, de, .*, got 'en'"):
        byte_corpus.load_messages("en")


CATALOGUE = r"""# Translators
#, fuzzy
msgid ""
msgstr ""
"Language: xx\n"

#. a comment
#, python-format
msgctxt "noun"
msgid "One"
msgstr "Un \"%s\"\n"
"o\\\t"

msgid ""
"Two "
"lines"
msgid_plural "Lines"
msgstr[0] "a"
msgstr[1] ""
msgstr[2] "ccc"

#, fuzzy, c-format
msgid "Guess"
msgstr "guessed"
BLANK
msgid "Nothing"
msgstr ""

msgid "Last"
msgstr "é # no comment"

#~ msgid "Old"
#~ msgstr "old"
""".replace("BLANK", " \t")


def test_catalogue():
    expected = ['Un "%s"\no\\\t', "a", "ccc", "é # no comment"]
    assert byte_corpus.parse_catalogue(CATALOGUE) == expected
    assert byte_corpus.parse_catalogue(CATALOGUE.rstrip("\n")) == expected
    assert byte_corpus.parse_catalogue("") == []


@pytest.mark.parametrize(
    "line", ["msgid One", 'message "One"', '"no keyword"', 'msgid "One', r'msgid "\q"', 'msgid"One"']
)
def test_a_broken_catalogue_is_refused(line):
    with pytest.raises(ValueError, match="a line must be a comment or a quoted text behind its keyword, got"):
        byte_corpus.parse_catalogue(f'msgid ""\nmsgstr ""\n\n{line}\nmsgstr "x"')
    with pytest.raises(ValueError, match="an empty line must stand between two entries, missing before 'b'"):
        byte_corpus.parse_catalogue('msgid "a"\nmsgstr "x"\nmsgid "b"\nmsgstr "y"')


def test_bytes_and_back():
    ids = byte_corpus.to_bytes("aé\n語")
    assert ids.tolist() == [97, 0xC3, 0xA9, 10, 0xE8, 0xAA, 0x9E] and ids.dtype == torch.uint8
    assert byte_corpus.to_text(ids.long()) == "aé\n語"
    assert byte_corpus.to_text(ids[:2]) == "a\ufffd"
    assert byte_corpus.to_bytes("").shape == (0,) and byte_corpus.to_text(byte_corpus.to_bytes("")) == ""


def test_sample_is_balanced_and_repeatable(parts):
    """A quarter of the pieces is of each domain and a 32nd of each message language, within 5 standard deviations."""
    batch = byte_corpus.sample(parts["train"], 4_000, 3, generator())
    assert batch.token_ids.shape == (4_000, 3) and batch.token_ids.dtype == torch.int64
    domains = batch.domains.bincount(minlength=4)
    assert (domains - 1_000).abs().max() < 5 * (4_000 * 3 / 16) ** 0.5
    languages = batch.languages.bincount(minlength=10)
    assert (languages[:8] - 125).abs().max() < 5 * (4_000 * 31 / 1_024) ** 0.5
    assert languages[LANGUAGES.index("en")] == domains[2] + domains[3]
    again = byte_corpus.sample(parts["train"], 4_000, 3, generator())
    assert all(torch.equal(x, y) for x, y in zip(batch, again, strict=True))
    assert not torch.equal(batch.token_ids, byte_corpus.sample(parts["train"], 4_000, 3, generator(1)).token_ids)


def test_sample_reaches_every_place_and_carries_its_labels():
    parts = numbered(a0=9, b1=6, b2=4)
    batch = byte_corpus.sample(parts, 2_000, 4, generator())
    assert torch.equal(batch.token_ids - batch.token_ids[:, :1], torch.arange(4).expand(2_000, 4))
    starts = {
        (domain, language): set(batch.token_ids[(batch.domains == domain) & (batch.languages == language), 0].tolist())
        for domain, language in ((0, 0), (1, 1), (1, 2))
    }
    assert starts == {(0, 0): set(range(6)), (1, 1): {0, 1, 2}, (1, 2): {0}}


def test_windows_are_spread_from_the_first_byte_to_the_last():
    batch = byte_corpus.windows(numbered(a0=9, b1=4), 3, 3)
    assert batch.token_ids[:, 0].tolist() == [0, 3, 6, 0, 0, 1]
    assert batch.token_ids[2].tolist() == [6, 7, 8] and batch.token_ids[5].tolist() == [1, 2, 3]
    assert batch.domains.tolist() == [0, 0, 0, 1, 1, 1] and batch.languages.tolist() == [0, 0, 0, 1, 1, 1]
    assert byte_corpus.windows(numbered(a0=9), 1, 9).token_ids.tolist() == [list(range(9))]


def test_impossible_pieces_are_refused():
    parts = numbered(a0=9, b1=4)
    for call in (
        lambda size, n: byte_corpus.sample(parts, size, n, generator()),
        lambda s, n: byte_corpus.windows(parts, s, n),
    ):
        with pytest.raises(ValueError, match="length must be at most the 4 bytes of 'b1', got 5"):
            call(2, 5)
        with pytest.raises(ValueError, match="length must be >= 1, got 0"):
            call(2, 0)
        with pytest.raises(ValueError, match="(batch|count) must be >= 1, got 0"):
            call(0, 2)


def test_what_is_returned_may_be_changed():
    byte_corpus.load_parts("dev").clear()
    assert len(byte_corpus.load_parts("dev")) == 11
