"""What stands on the encoder: masked words, classes of sentences, sentence vectors.

Sources: Devlin et al. 2018 (BERT, arXiv 1810.04805) for the masked-word head and the classifier on the
pooled first token; Reimers and Gurevych 2019 (Sentence-BERT, 1908.10084) for mean pooling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.dense_attention import check_key_padding_mask
from effnlp_lessons.transformer import ACTIVATIONS, Encoder, initialise_


class MaskedLanguageModel(nn.Module):
    """An encoder with BERT's masked-word head: transform (drawn from `seed`), norm, the tied token table, biases."""

    def __init__(self, encoder: Encoder, seed: int = 0) -> None:
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        self.transform = nn.Linear(config.d_model, config.d_model)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialise_(self.transform, torch.Generator().manual_seed(seed))

    def words(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        """Logits of every word, from the encoder's last hidden states."""
        x = self.norm(self.activation(self.transform(hidden)))
        return F.linear(x, self.encoder.embeddings.tokens.weight, self.bias)

    def forward(
        self,
        token_ids: Int[Tensor, "batch length"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length vocab"]:
        return self.words(self.encoder(token_ids, key_padding_mask).last)


class SentenceClassifier(nn.Module):
    """An encoder with a linear head on the pooled first token (BERT's way of classifying a sentence)."""

    def __init__(self, encoder: Encoder, classes: int, seed: int = 0) -> None:
        super().__init__()
        if encoder.pooler is None:
            raise ValueError("encoder must have a pooler: build it with TransformerConfig(pooler=True)")
        self.encoder = encoder
        self.dropout = nn.Dropout(encoder.config.dropout)
        self.head = nn.Linear(encoder.config.d_model, classes)
        initialise_(self.head, torch.Generator().manual_seed(seed))

    def forward(
        self,
        token_ids: Int[Tensor, "batch length"],
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        return self.head(self.dropout(self.encoder(token_ids, key_padding_mask).pooled))


def mean_pool(
    hidden: Float[Tensor, "batch length d_model"], key_padding_mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch d_model"]:
    """Mean over the real tokens; zeros for a row that is all padding."""
    check_key_padding_mask(key_padding_mask, *hidden.shape[:2])
    weights = key_padding_mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def sentence_vectors(
    encoder: Encoder, token_ids: Int[Tensor, "batch length"], key_padding_mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch d_model"]:
    """Unit-length sentence vectors, the mean of the last layer over real tokens (Reimers and Gurevych 2019)."""
    return F.normalize(mean_pool(encoder(token_ids, key_padding_mask).last, key_padding_mask), dim=-1)
