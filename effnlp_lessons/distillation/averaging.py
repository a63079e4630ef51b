"""A student that is no Transformer: a deep averaging network (Iyyer, Manjunatha, Boyd-Graber, Daume III 2015, ACL).

The vectors of all words, and of all pairs of neighbours, are averaged; two linear layers stand on the average. A
teacher's logits are all that such a student can learn from: it has no layers, heads or attention like its teacher's.

NOTE the paper averages words alone and drops whole words in training. The pairs, hashed into a table of fixed size, are
those of Joulin, Grave, Bojanowski, Mikolov 2016 (arXiv 1607.01759, sec. 2); dropout here is on the average.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.heads import mean_pool

MULTIPLIER = 1_000_003  # a prime: spreads the pairs over the table


class AveragingNetwork(nn.Module):
    """Token ids (batch, length) and mask to logits (batch, classes): mean of word and pair vectors, then two layers.

    Weights are drawn from `seed`: vectors normal(0, 0.1), linear layers as torch draws them.

    Raises:
        ValueError: a size below 1, a dropout outside [0, 1).
    """

    def __init__(
        self,
        classes: int = 2,
        *,
        width: int = 64,
        pairs: int = 2**15,
        vocab_size: int = 30_522,
        dropout: float = 0.3,
        seed: int = 0,
    ) -> None:
        for name, value in {"classes": classes, "width": width, "pairs": pairs, "vocab_size": vocab_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words, self.pairs = nn.Embedding(vocab_size, width), nn.Embedding(pairs, width)
            self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, classes)
            for table in (self.words, self.pairs):
                nn.init.normal_(table.weight, std=0.1)
        self.dropout = nn.Dropout(dropout)

    def pair_ids(self, token_ids: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
        """The row of the pair (token before, token), in 0 .. pairs - 1; the first token's neighbour is itself."""
        before = torch.cat([token_ids[:, :1], token_ids[:, :-1]], dim=1)
        return (before * MULTIPLIER + token_ids) % self.pairs.num_embeddings

    def forward(
        self, token_ids: Int[Tensor, "batch length"], key_padding_mask: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch classes"]:
        vectors = self.words(token_ids) + self.pairs(self.pair_ids(token_ids))
        average = self.dropout(mean_pool(vectors, key_padding_mask))
        return self.head(torch.relu(self.hidden(average)))
