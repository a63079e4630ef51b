"""MiniLM's word pieces: text to token ids and back to a padded batch.

The vocabulary is the one of BERT base uncased, 30,522 pieces. A sentence becomes [CLS] pieces [SEP].
"""

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Bool, Int64
from tokenizers import Tokenizer
from torch import Tensor

from effnlp_lessons.datasets import sources

PAD, CLS, SEP = 0, 101, 102  # token ids
MAX_LENGTH = 512  # positions that MiniLM has embeddings for


def load_tokenizer() -> Tokenizer:
    """Return a new copy of MiniLM's tokenizer, which neither truncates nor pads.

    Raises:
        SourceError: if the data have not been prepared.
    """
    tokenizer = Tokenizer.from_file(str(sources.path("minilm", "tokenizer.json")))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@cache
def _tokenizer() -> Tokenizer:
    """Return the one tokenizer of this module; it is never changed."""
    return load_tokenizer()


def encode(texts: Sequence[str], max_length: int = MAX_LENGTH) -> list[list[int]]:
    """Return the token ids of every text, [CLS] first and [SEP] last, at most `max_length` of them.

    A longer text keeps its first pieces. The empty text is [CLS] [SEP].

    Raises:
        ValueError: if `texts` is one string or holds something else than strings, or `max_length` is not in
        2 .. 512.
    """
    if isinstance(texts, str):
        raise ValueError("texts must be a list of strings, got one string: put it in a list")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"texts must hold strings only, got {type(text).__name__}")
    if not 2 <= max_length <= MAX_LENGTH:
        raise ValueError(f"max_length must be in 2 .. {MAX_LENGTH}, got {max_length}")
    encoded = _tokenizer().encode_batch(texts)
    return [ids if len(ids) <= max_length else [*ids[: max_length - 1], SEP] for ids in (e.ids for e in encoded)]


def pad(
    token_ids: Sequence[Sequence[int]],
) -> tuple[Int64[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Return the batch filled with [PAD] on the right to its longest row, and its mask.

    Returns:
        token_ids: int64 (batch, length).
        key_padding_mask: bool (batch, length), True = a real token.

    Raises:
        ValueError: if there is no row.
    """
    if len(token_ids) == 0:
        raise ValueError("token_ids must have at least one row, got none")
    lengths = torch.tensor([len(row) for row in token_ids])
    padded = torch.full((len(token_ids), int(lengths.max())), PAD)
    for index, row in enumerate(token_ids):
        padded[index, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
