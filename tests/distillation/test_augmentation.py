"""TinyBERT's augmentation with a small tokenizer and models whose answers are known: candidates, sampling, limits."""

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from effnlp_lessons.datasets import tokenizer as minilm_tokenizer
from effnlp_lessons.distillation.augmentation import (
    ROWS,
    STOP_WORDS,
    WordVectors,
    augment,
    mean_piece_vectors,
    nearest_words,
    split_words,
    word_candidates,
)
from effnlp_lessons.heads import MaskedLanguageModel
from effnlp_lessons.transformer import Encoder, TransformerConfig

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    "the",
    "film",
    "is",
    "good",
    "bad",
    "movie",
    "a",
    "not",
    "un",
    "##watch",
    "##able",
    "##ed",
    "90",
    "!",
    "great",
]
IDS = {piece: i for i, piece in enumerate(SPECIAL + PIECES)}
CLS, SEP, MASK = IDS["[CLS]"], IDS["[SEP]"], IDS["[MASK]"]
SENTENCE = "The film is good, unwatchable!"  # the, film, is, good, [UNK] for the comma, un ##watch ##able, !


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(WordPiece(IDS, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    made.add_special_tokens(SPECIAL)
    return made


class Ranking:
    """A masked-word model that always ranks these pieces first, and remembers what it was asked."""

    def __init__(self, *best):
        self.logits, self.asked = torch.zeros(len(IDS)), []
        for rank, piece in enumerate(best):
            self.logits[IDS[piece]] = 10.0 - rank

    def __call__(self, token_ids, key_padding_mask):
        assert key_padding_mask.dtype == torch.bool and key_padding_mask.all()
        self.asked.append(token_ids)
        return self.logits.expand(*token_ids.shape, -1)


VECTORS = WordVectors(
    ("unwatchable", "bad", "good", "dull"),
    F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [0.5, 0.5]]), dim=-1),
)


# ----------------------------------------------------------------------------------------- word vectors


def test_vector_of_a_word_is_the_mean_of_its_pieces(tokenizer):
    table = torch.randn(len(IDS), 5, generator=torch.Generator().manual_seed(0))
    vectors = mean_piece_vectors(["film", "unwatchable", "film"], tokenizer, table)
    assert vectors.words == ("film", "unwatchable")
    pieces = [table[IDS[piece]] for piece in ("un", "##watch", "##able")]
    torch.testing.assert_close(vectors.vectors[0], table[IDS["film"]] / table[IDS["film"]].norm())
    torch.testing.assert_close(vectors.vectors[1], F.normalize(sum(pieces) / 3, dim=0))
    with pytest.raises(ValueError, match="words must hold at least one word"):
        mean_piece_vectors([], tokenizer, table)
    with pytest.raises(ValueError, match="words must have pieces, got ' '"):
        mean_piece_vectors([" "], tokenizer, table)


def test_nearest_words_by_cosine_without_the_word_itself():
    assert nearest_words("unwatchable", VECTORS, 2) == ["bad", "dull"]
    assert nearest_words("unwatchable", VECTORS, 9) == ["bad", "dull", "good"]
    assert nearest_words("never seen", VECTORS, 2) == []
    words = WordVectors(tuple("abcdefgh"), F.normalize(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))))
    for i, word in enumerate(words.words):
        cosines = {w: F.cosine_similarity(words.vectors[i], v, dim=0).item() for w, v in zip(*words, strict=True)}
        expected = sorted(cosines, key=cosines.get, reverse=True)[1:4]
        assert nearest_words(word, words, 3) == expected


# ------------------------------------------------------------------------------------------- candidates


def test_words_are_the_tokenizers(tokenizer):
    assert split_words(SENTENCE, tokenizer) == ["the", "film", "is", "good", ",", "unwatchable", "!"]
    real = minilm_tokenizer.load_tokenizer()
    text = "Café-going, it doesn't hang together (2 stars)!"
    pieces = [piece for word in split_words(text, real) for piece in real.encode(word, add_special_tokens=False).ids]
    assert [minilm_tokenizer.CLS, *pieces, minilm_tokenizer.SEP] == minilm_tokenizer.encode([text])[0]


def test_one_piece_words_are_masked_one_a_row(tokenizer):
    model = Ranking("movie", "##ed", "[UNK]", "great", "bad")
    words = split_words(SENTENCE, tokenizer)
    found = word_candidates(words, tokenizer, model, VECTORS, candidates=4)
    # of the four best, ##ed continues a word and [UNK] is no word
    assert found == {1: ["movie", "great"], 3: ["movie", "great"], 5: ["bad", "dull", "good"]}
    (asked,) = model.asked
    film = [CLS, IDS["the"], MASK, IDS["is"], IDS["good"], IDS["[UNK]"], IDS["un"], IDS["##watch"], IDS["##able"],
            IDS["!"], SEP]  # fmt: skip
    good = [*film[:2], IDS["film"], IDS["is"], MASK, *film[5:]]
    assert asked.tolist() == [film, good]


def test_original_sentence_can_be_appended(tokenizer):
    model = Ranking("movie")
    word_candidates(["good", "film"], tokenizer, model, append_original=True)
    good, film = IDS["good"], IDS["film"]
    assert model.asked[0].tolist() == [[CLS, MASK, film, SEP, good, film, SEP], [CLS, good, MASK, SEP, good, film, SEP]]


def test_the_models_answer_is_read_where_the_mask_is(tokenizer):
    """A model that knows the next piece's id: at each mask it answers with what stands to its right."""

    def right_neighbour(token_ids, key_padding_mask):
        return F.one_hot(token_ids.roll(-1, dims=1), len(IDS)).float()

    found = word_candidates(["film", "good", "bad", "movie"], tokenizer, right_neighbour, candidates=1)
    assert found == {0: ["good"], 1: ["bad"], 2: ["movie"], 3: ["movie"]}  # right of the last is [SEP]: itself


def test_stop_words_and_what_is_not_letters_stay(tokenizer):
    model = Ranking("movie")
    words = ["the", "film", "is", "not", "90", "!", "a", "naïve", "x1"]
    assert set(word_candidates(words, tokenizer, model)) == {1}
    assert set(word_candidates(words, tokenizer, model, stop_words=frozenset())) == {0, 1, 2, 3, 6}
    assert {"the", "not", "never", "very"} <= STOP_WORDS and "good" not in STOP_WORDS
    assert word_candidates(["the", "!"], tokenizer, model) == {} and len(model.asked) == 2


def test_a_word_without_candidates_is_its_own(tokenizer):
    found = word_candidates(["film", "unwatchable"], tokenizer, Ranking("##ed", "##able"), VECTORS, candidates=2)
    assert found == {0: ["film"], 1: ["bad", "dull"]}
    no_vector = WordVectors(("bad",), torch.ones(1, 2))
    assert word_candidates(["unwatchable"], tokenizer, Ranking(), no_vector) == {0: ["unwatchable"]}
    assert word_candidates(["unwatchable"], tokenizer, Ranking(), None) == {}


def test_long_sentences_are_cut_and_read_in_parts(tokenizer):
    model, words = Ranking("movie"), ["film"] * (2 * ROWS + 3)
    assert len(word_candidates(words, tokenizer, model)) == len(words)
    assert [len(asked) for asked in model.asked] == [ROWS, ROWS, 3]
    rows = torch.cat(model.asked)
    assert torch.equal(
        (rows == MASK).nonzero(), torch.stack([torch.arange(len(words)), 1 + torch.arange(len(words))], 1)
    )
    model.asked.clear()
    assert set(word_candidates(words, tokenizer, model, max_length=5)) == {0, 1, 2, 3}
    assert model.asked[0].shape == (4, 5)


# ------------------------------------------------------------------------------------------- Algorithm 1


def test_seed_decides_and_the_original_comes_first(tokenizer):
    model = Ranking("movie", "great", "bad", "film", "good")

    def run(seed, **options):
        return augment(SENTENCE, tokenizer, model, torch.Generator().manual_seed(seed), VECTORS, **options)

    state = torch.random.get_rng_state()
    assert run(1) == run(1) != run(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    variants = run(1)
    assert variants[0] == SENTENCE and 2 < len(variants) <= 21 and len(set(variants)) == len(variants)
    for variant in variants[1:]:
        words = variant.split()
        assert [words[i] for i in (0, 2, 4, 6)] == ["the", "is", ",", "!"] and len(words) == 7
        assert words[5] in ("unwatchable", "bad", "dull", "good")
    assert run(1, samples=0) == run(1, threshold=0.0) == [SENTENCE]
    assert len(run(1, samples=3)) <= 4


def test_every_sample_begins_from_the_original(tokenizer):
    """Three words with two candidates each: all 27 sentences are reached, those with old words to the last."""
    model, generator = Ranking("movie", "great"), torch.Generator().manual_seed(0)
    variants = augment("film good bad", tokenizer, model, generator, candidates=2, samples=3000)
    assert len(variants) == 27


def test_unchanged_samples_are_duplicates_in_spite_of_case_and_spaces(tokenizer):
    variants = augment("The  FILM!", tokenizer, Ranking("film"), torch.Generator(), candidates=1, threshold=1.0)
    assert variants == ["The  FILM!"]


def test_every_word_is_replaced_with_the_given_probability_by_all_candidates_alike(tokenizer):
    model = Ranking("movie", "great", "bad")
    generator, counts, changed = torch.Generator().manual_seed(0), {}, 0
    for _ in range(3000):
        (*_, variant) = augment("film", tokenizer, model, generator, candidates=3, samples=1)
        changed += variant != "film"
        counts[variant] = counts.get(variant, 0) + 1
    # four standard deviations of 3,000 trials
    assert changed / 3000 == pytest.approx(0.4, abs=0.036)
    assert all(counts[word] / 3000 == pytest.approx(0.4 / 3, abs=0.025) for word in ("movie", "great", "bad"))
    both = [augment("film good", tokenizer, model, generator, candidates=3, samples=1)[-1] for _ in range(3000)]
    independent = sum(not variant.startswith("film") and not variant.endswith("good") for variant in both)
    assert independent / 3000 == pytest.approx(0.16, abs=0.027)


def test_works_with_the_masked_language_model_of_the_course(tokenizer):
    config = TransformerConfig(vocab_size=len(IDS), max_length=24, d_model=16, layers=1, heads=4, d_ff=40)
    model = MaskedLanguageModel(Encoder(config)).eval()
    found = word_candidates(["film", "good"], tokenizer, model, candidates=5)
    with torch.no_grad():
        logits = model(torch.tensor([[CLS, IDS["film"], MASK, SEP]]))[0, 2]
    expected = [tokenizer.id_to_token(i) for i in logits.topk(5).indices.tolist()]
    assert found[1] == [token for token in expected if token not in SPECIAL and not token.startswith("##")]
    assert augment("film good", tokenizer, model, torch.Generator(), threshold=1.0)[0] == "film good"


def test_bad_input_is_named(tokenizer):
    def call(**options):
        augment("film", tokenizer, Ranking(), torch.Generator(), **options)

    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.2"):
        call(threshold=1.2)
    with pytest.raises(ValueError, match="samples must be >= 0, got -1"):
        call(samples=-1)
    with pytest.raises(ValueError, match="candidates must be >= 1, got 0"):
        call(candidates=0)
    bare = Tokenizer(WordPiece({"film": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="tokenizer must have a pre_tokenizer"):
        split_words("film", bare)
    with pytest.raises(ValueError, match=r"tokenizer must have the token \[CLS\]"):
        word_candidates(["film"], bare, Ranking())
