"""A student's own text as the heads of MiniLM read it: tokens, weights and values, from one run of the model."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from effnlp_lessons.attention.patterns import read_heads
from effnlp_lessons.datasets.tokenizer import load_tokenizer
from effnlp_lessons.pretrained import load_minilm

SHORTEST, LONGEST = 10, 48  # tokens with [CLS] and [SEP]: some beside ETC's eight global ones; names still legible


class Reading(NamedTuple):
    """A text as the model's heads read it."""

    tokens: list[str]
    weights: Float[Tensor, "layers heads length length"]
    values: Float[Tensor, "layers heads length d_head"]


@functools.cache
def _tokenizer_and_encoder() -> tuple:
    return load_tokenizer(), load_minilm()


def read_text(text: str) -> Reading:
    """Tokens of `text`, and the weights and values of every head of MiniLM on it; the model runs once.

    Raises:
        ValueError: a text that is empty, too short or too long, in a sentence for the student.
    """
    if not text.strip():
        raise ValueError("The text is empty: write a sentence.")
    tokenizer, encoder = _tokenizer_and_encoder()
    encoding = tokenizer.encode(text)
    if not SHORTEST <= len(encoding.ids) <= LONGEST:
        counted = f"The text has {len(encoding.ids):,} tokens with [CLS] and [SEP]"
        raise ValueError(f"{counted}; it must have {SHORTEST} to {LONGEST}.")
    return Reading(encoding.tokens, *read_heads(encoder, torch.tensor([encoding.ids])))
