"""The course's task: is a movie review positive or negative? Its examples, its logits, its accuracy.

Every lecture that compresses the teacher trains and measures with these three. The sentences and their
split are `datasets.reviews` (Hutto and Gilbert 2014); 1 = positive, 0 = negative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from effnlp_lessons.datasets import reviews, tokenizer


class ReviewExamples:
    """Reviews as examples for `training.train`: a batch is (token_ids, key_padding_mask, labels).

    `limit` keeps so many of them, always the same random sample.
    """

    def __init__(self, subset: reviews.Reviews, limit: int | None = None) -> None:
        order = torch.randperm(len(subset), generator=torch.Generator().manual_seed(0))
        chosen = order[:limit].sort().values.tolist()
        self.token_ids = tokenizer.encode([subset.text[i] for i in chosen])
        self.labels = torch.as_tensor(subset.label)[chosen]
        self.lengths = [len(ids) for ids in self.token_ids]

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        token_ids, key_padding_mask = tokenizer.pad([self.token_ids[i] for i in indices])
        return token_ids, key_padding_mask, self.labels[indices]


def logits_of(
    model: Callable[[Tensor, Tensor], Tensor], token_ids: list[list[int]], batch_size: int = 64
) -> Float[Tensor, "examples classes"]:
    """Logits of `model(token_ids, key_padding_mask)` for every sentence, in the order given.

    Sentences of similar length share a batch, so little is padded. No gradients; the model's mode
    (training or evaluation) is the caller's.
    """
    if not token_ids:
        raise ValueError("token_ids must hold at least one sentence, got none")
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    with torch.inference_mode():
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        logits = torch.cat([model(*tokenizer.pad([token_ids[i] for i in batch])) for batch in batches])
        return logits[torch.tensor(order).argsort()]


def accuracy(model: Callable[[Tensor, Tensor], Tensor], examples: ReviewExamples) -> float:
    """Per cent of the examples whose largest logit is at the label."""
    right = logits_of(model, examples.token_ids).argmax(-1) == examples.labels
    return 100 * right.double().mean().item()
