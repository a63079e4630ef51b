"""TinyBERT's data augmentation: new sentences by exchanging words (Jiao et al. 2019, 1909.10351, Algorithm 1).

For every word of a sentence K candidates are found once. A word that is one piece for the tokenizer is masked and the
masked-word model's K most probable pieces are taken; a word of several pieces has the K words with the nearest word
vectors. Then N_a new sentences are drawn: every word becomes, with probability p_t, one of its candidates. The teacher
labels them; the label of the original sentence is not used.

NOTE as in the released code, stop words and words that are not all letters a to z stay, candidates that continue a
word (##) are dropped from the K, and a sentence that came before is dropped. Special pieces such as [UNK] are dropped
too, which the released code does not do.
NOTE the released code lets the model read the original sentence after the masked one (`append_original`). The word to
be guessed then stands there, and tends to be the first candidate. It also marks that second sentence by segment 1;
here `masked_model` sees the token ids only.
NOTE the paper's vectors are GloVe's. Here they are an argument; `mean_piece_vectors` makes them from any token table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor

MaskedModel = Callable[[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]], Float[Tensor, "batch length vocab"]]

ROWS = 16  # sentences a call of the model: its logits are rows x length x vocabulary numbers

# words that carry grammar rather than content; exchanging them breaks sentences, or (not, never) turns them around
STOP_WORDS = frozenset(
    """
    a an the this that these those i you he she it we they me him her us them my your his its our their mine yours
    who whom whose which what where when why how be am is are was were been being have has had do does did done
    can could will would shall should may might must not no nor never and or but if then than because while although
    though as until of at by for with about against between into through during before after above below to from up
    down in out on off over under again here there all any both each few more most other some such only own same so
    too very just also s t d m ll re ve don didn doesn isn wasn aren won couldn wouldn shouldn hasn haven hadn
    """.split()  # noqa: SIM905
)


# ----------------------------------------------------------------------------------------- word vectors


class WordVectors(NamedTuple):
    words: tuple[str, ...]
    vectors: Float[Tensor, "words d_model"]  # of length 1


def mean_piece_vectors(
    words: Iterable[str], tokenizer: Tokenizer, token_table: Float[Tensor, "vocab d_model"]
) -> WordVectors:
    """A vector for every word: the mean of its pieces' rows in `token_table`, scaled to length 1.

    Raises:
        ValueError: no word, or one without any piece.
    """
    words = tuple(dict.fromkeys(words))
    if not words:
        raise ValueError("words must hold at least one word, got none")
    means = []
    for word in words:
        pieces = tokenizer.encode(word, add_special_tokens=False).ids
        if not pieces:
            raise ValueError(f"words must have pieces, got {word!r}")
        means.append(token_table.detach()[pieces].mean(0))
    return WordVectors(words, F.normalize(torch.stack(means), dim=-1))


def nearest_words(word: str, word_vectors: WordVectors, number: int) -> list[str]:
    """The `number` words of largest cosine with `word`, nearest first, without itself; none if it has no vector."""
    if word not in word_vectors.words:
        return []
    own = word_vectors.words.index(word)
    cosines = word_vectors.vectors @ word_vectors.vectors[own]
    order = [i for i in cosines.argsort(descending=True, stable=True).tolist() if i != own]
    return [word_vectors.words[i] for i in order[:number]]


# ------------------------------------------------------------------------------------------- candidates


def split_words(sentence: str, tokenizer: Tokenizer) -> list[str]:
    """The words and punctuation marks that the tokenizer cuts into pieces, normalised as it does (BERT: lower case)."""
    if tokenizer.normalizer is not None:
        sentence = tokenizer.normalizer.normalize_str(sentence)
    if tokenizer.pre_tokenizer is None:
        raise ValueError("tokenizer must have a pre_tokenizer, which splits a sentence into words")
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(sentence)]


def _special(tokenizer: Tokenizer, name: str) -> int:
    token = tokenizer.token_to_id(name)
    if token is None:
        raise ValueError(f"tokenizer must have the token {name}")
    return token


def word_candidates(
    words: list[str],
    tokenizer: Tokenizer,
    masked_model: MaskedModel,
    word_vectors: WordVectors | None = None,
    *,
    candidates: int = 15,
    stop_words: frozenset[str] = STOP_WORDS,
    append_original: bool = False,
    max_length: int = 512,
) -> dict[int, list[str]]:
    """What every word may become: index of the word -> its candidates (K = `candidates` at most, at least one).

    Words that stay as they are have no entry. Where nothing is left, the word is its own only candidate. Every
    word of one piece is a row of a batch, with that word masked. A word beyond `max_length` tokens stays.

    Args:
        words: of one sentence, from `split_words`.
        masked_model: logits (batch, length, vocab) of `masked_model(token_ids, key_padding_mask)`; its mode is the
            caller's. A `heads.MaskedLanguageModel` is one.
        word_vectors: for words of several pieces; None: these words stay.
        append_original: let the model read the original sentence after the masked one.

    Raises:
        ValueError: a number of candidates < 1, a tokenizer without [CLS], [SEP] or [MASK].
    """
    if candidates < 1:
        raise ValueError(f"candidates must be >= 1, got {candidates}")
    cls, sep, mask = (_special(tokenizer, name) for name in ("[CLS]", "[SEP]", "[MASK]"))
    pieces = [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
    starts = list(accumulate(map(len, pieces), initial=1))  # token 0 is [CLS]
    flat = [piece for word in pieces for piece in word]
    sentence = [cls, *flat, sep, *([*flat, sep] if append_original else [])][:max_length]
    replaceable = [
        i for i, word in enumerate(words)
        if word.isascii() and word.isalpha() and word.lower() not in stop_words and starts[i] < max_length
    ]  # fmt: skip
    one_piece = [i for i in replaceable if len(pieces[i]) == 1]
    found = {
        i: nearest_words(words[i], word_vectors, candidates)
        for i in replaceable
        if len(pieces[i]) > 1 and word_vectors is not None
    }
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    for first in range(0, len(one_piece), ROWS):
        some = one_piece[first : first + ROWS]
        token_ids = torch.tensor(sentence).repeat(len(some), 1)
        rows, columns = torch.arange(len(some)), torch.tensor([starts[i] for i in some])
        token_ids[rows, columns] = mask
        with torch.no_grad():
            logits = masked_model(token_ids, torch.ones_like(token_ids, dtype=torch.bool))[rows, columns]
        best = logits.topk(min(candidates, logits.shape[-1])).indices.tolist()
        for i, likely in zip(some, best, strict=True):
            tokens = [tokenizer.id_to_token(token) for token in likely if token not in special]
            found[i] = [token for token in tokens if token is not None and not token.startswith("##")]
    return {i: found[i] or [words[i]] for i in sorted(found)}


# ------------------------------------------------------------------------------------------- Algorithm 1


def augment(
    sentence: str,
    tokenizer: Tokenizer,
    masked_model: MaskedModel,
    generator: torch.Generator,
    word_vectors: WordVectors | None = None,
    *,
    threshold: float = 0.4,
    samples: int = 20,
    candidates: int = 15,
    stop_words: frozenset[str] = STOP_WORDS,
    append_original: bool = False,
    max_length: int = 512,
) -> list[str]:
    """The sentence and up to `samples` variants of it, without duplicates (Algorithm 1 of the paper).

    The original comes first, unchanged; a variant is its words joined by blanks. Variants are compared word by word,
    so one that differs from the original only in spaces or case is a duplicate.

    Args:
        threshold: p_t, the probability with which a word becomes one of its candidates, all alike.
        samples: N_a, how often a variant is drawn. Duplicates are not drawn again.
        candidates, stop_words, append_original, max_length: see `word_candidates`.

    Raises:
        ValueError: a threshold outside [0, 1], samples < 0, and what `word_candidates` raises.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if samples < 0:
        raise ValueError(f"samples must be >= 0, got {samples}")
    words = split_words(sentence, tokenizer)
    choices = word_candidates(
        words, tokenizer, masked_model, word_vectors,
        candidates=candidates, stop_words=stop_words, append_original=append_original, max_length=max_length,
    )  # fmt: skip
    seen, variants = {tuple(words)}, [sentence]
    for _ in range(samples):
        variant = list(words)
        for i, options in choices.items():
            if torch.rand((), generator=generator) < threshold:
                variant[i] = options[int(torch.randint(len(options), (), generator=generator))]
        if tuple(variant) not in seen:
            seen.add(tuple(variant))
            variants.append(" ".join(variant))
    return variants
