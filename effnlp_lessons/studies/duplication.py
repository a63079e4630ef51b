"""Reformer's duplication task, 0w0w: how many rounds of hashing does it take to copy (Kitaev et al. 2020, sec. 2.1).

A text is 0 w 0 w with a random word w, and the loss counts on the second w alone: each symbol of it stands somewhere
in the first, and nothing but attention can fetch it. The model has one layer, so a token must find the one place that
matters by its own vector; if the two are never in one chunk or its neighbour, the symbol is lost. Each model is
trained with full attention or with some rounds of LSH attention, and then tested with full attention and with 8, 4, 2
and 1 rounds. The weights are the same in every test: only the hashing changes (arXiv 2001.04451, Table 2).

NOTE the paper's words have 511 symbols of 127 kinds, the model d_model = d_ff = 256 and 4 heads, 150,000 steps. Here
all of it is smaller, with d_ff = 2 d_model: what is compared are the methods at one small number of steps.
NOTE LSH attention is causal in its gradient only: a test that reads the whole text, as the paper's does, cuts the
chunks with the later symbols in them, which writing symbol by symbol could not.
NOTE new rotations are drawn at every step and for every batch of the test, as in the authors' code, so that no model
learns its way around one fixed hash.
NOTE full attention is `LSHSelfAttention` with a chunk as long as the text: the same shared query-key projection.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from effnlp_lessons.attention.lsh import LSHSelfAttention, draw_rotations, unit_keys
from effnlp_lessons.dense_attention import causal_mask, masked_softmax
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.training import TrainingPlan, train
from effnlp_lessons.transformer import Decoder, TransformerConfig

FULL = "full"
TRAINED = (FULL, 4, 2, 1)  # rounds of hashing
TESTED = (FULL, 8, 4, 2, 1)


def duplicated_words(texts: int, word: int, symbols: int, generator: torch.Generator) -> Int[Tensor, "texts 2*word+2"]:
    """Texts 0 w 0 w: each w has `word` symbols, uniform from 1 to `symbols` (sec. 2.1)."""
    words = torch.randint(1, symbols + 1, (texts, word), generator=generator)
    marker = torch.zeros(texts, 1, dtype=torch.long)
    return torch.cat([marker, words, marker, words], dim=1)


class Words:
    """Texts 0 w 0 w as examples for `train`: a batch is the texts themselves."""

    def __init__(self, texts: Int[Tensor, "texts length"]) -> None:
        self.texts, self.lengths = texts, [texts.shape[1]] * len(texts)

    def batch(self, indices: list[int]) -> Int[Tensor, "batch length"]:
        return self.texts[indices]


def second_word(
    model: Decoder, texts: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, "batch word symbols+1"], Int[Tensor, "batch word"]]:
    """The logits (nats before softmax) that a model gives for the symbols of the second w, and these symbols."""
    first = texts.shape[1] // 2 + 1  # where the second w begins
    return model(texts).logits[:, first - 1 : -1], texts[:, first:]


def make_model(setting: dict[str, Any], seed: int) -> Decoder:
    """A decoder of one layer with LSH attention and one position for every token of a text."""
    config = TransformerConfig(
        vocab_size=setting["symbols"] + 1, max_length=2 * setting["word"] + 2, d_model=setting["d_model"],
        layers=1, heads=setting["heads"], d_ff=2 * setting["d_model"], segments=0, pooler=False,
        norm_first=True, dropout=0.0,
    )  # fmt: skip

    def mixer(config: TransformerConfig, layer: int) -> LSHSelfAttention:
        return LSHSelfAttention(config, setting["chunk"], 1, setting["buckets"], causal=True, seed=seed)

    return Decoder(config, token_mixer=mixer, seed=seed)


def hash_anew_(model: Decoder, hashes: int | str, setting: dict[str, Any], generator: torch.Generator) -> None:
    """Give the layer `hashes` rounds with new rotations, or, with "full", a chunk as long as the text."""
    mixer, config = model.blocks[0].token_mixer, model.config
    mixer.chunk = config.max_length if hashes == FULL else setting["chunk"]
    if hashes != FULL:
        mixer.rotations = draw_rotations(hashes, config.d_head, setting["buckets"], generator)


@torch.inference_mode()
def test_accuracy(
    model: Decoder,
    texts: Int[Tensor, "texts length"],
    hashes: int | str,
    setting: dict[str, Any],
    generator: torch.Generator,
) -> float:
    """Share of the second w's symbols that have the largest logit, each given all tokens before it."""
    right = []
    for batch in texts.split(setting["batch"]):
        hash_anew_(model, hashes, setting, generator)
        logits, symbols = second_word(model, batch)
        right.append(logits.argmax(-1) == symbols)
    return torch.cat(right).float().mean().item()


@torch.inference_mode()
def right_keys(
    model: Decoder, texts: Int[Tensor, "texts length"]
) -> tuple[Float[Tensor, " heads"], Float[Tensor, " heads"]]:
    """How each head sees the key that holds the wanted symbol: its weight under full attention, and its cosine.

    Means over the queries of the second w. The nearer the cosine is to 1, the more often the two share a bucket.
    """
    block, word = model.blocks[0], texts.shape[1] // 2 - 1
    mixer, x = block.token_mixer, block.token_norm(model.embeddings(texts))
    qk = mixer.query_key(x).unflatten(-1, (mixer.heads, -1)).transpose(1, 2)
    keys = unit_keys(qk)
    wanted = torch.arange(1, word + 1)
    queries = wanted + word  # the 0 or the symbol that comes before the wanted one
    before = causal_mask(*[texts.shape[1]] * 2).tril(-1)
    weights = masked_softmax(qk @ keys.transpose(-1, -2), before)[:, :, queries, wanted]
    cosines = (keys[:, :, queries] * keys[:, :, wanted]).sum(-1)
    return weights.mean((0, 2)), cosines.mean((0, 2))


test_accuracy.__test__ = False  # its name is not that of a test


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Train one model with `setting["hashes"]` rounds, or "full", and test it with each of `TESTED`.

    `setting`: hashes, word, symbols, d_model, heads, chunk, buckets, steps, batch, learning_rate, tested (how
    many texts). The same seed gives the same first weights and the same texts whatever `hashes` is.

    Numbers: "accuracy", `{tested with: share of the second w's symbols}`; "loss", nats a symbol, the means of twenty
    equal parts of the training; "weight" and "cosine" of `right_keys`, one a head.
    """
    data, rotate = (torch.Generator().manual_seed(2 * seed + part) for part in range(2))
    word, symbols, batch = setting["word"], setting["symbols"], setting["batch"]
    examples = Words(duplicated_words(setting["steps"] * batch, word, symbols, data))
    model, hashes = make_model(setting, seed), setting["hashes"]

    def loss(model: Decoder, texts: Tensor) -> Tensor:
        hash_anew_(model, hashes, setting, rotate)
        logits, symbols = second_word(model, texts)
        return F.cross_entropy(logits.flatten(0, 1), symbols.flatten())

    plan = TrainingPlan(epochs=1, batch_size=batch, learning_rate=setting["learning_rate"], weight_decay=0.0, seed=seed)
    history = train(model, examples, loss, plan, progress=False)
    texts = duplicated_words(setting["tested"], word, symbols, data)
    accuracy = {str(rounds): round(test_accuracy(model, texts, rounds, setting, rotate), 4) for rounds in TESTED}
    parts = torch.tensor(history.loss).chunk(20)
    weights, cosines = ([round(value, 4) for value in part.tolist()] for part in right_keys(model, texts))
    losses = [round(part.mean().item(), 4) for part in parts]
    return Outcome({"accuracy": accuracy, "loss": losses, "weight": weights, "cosine": cosines})


# --------------------------------------------------------------------------------------- reading what was recorded


def accuracies(summary: dict[str, Any], trained: int | str, tested: int | str) -> list[float]:
    """Accuracy on the second w, 0 to 1, one a seed, of the models trained with some rounds and tested with others.

    Raises:
        ValueError: rounds that are not recorded.
    """
    found = [run for run in summary["runs"] if run["setting"]["hashes"] == trained]
    if not found or str(tested) not in found[0]["accuracy"]:
        raise ValueError(f"trained must be in {TRAINED} and tested in {TESTED}, got {trained!r} and {tested!r}")
    return [run["accuracy"][str(tested)] for run in found]


def table(summary: dict[str, Any]) -> dict[int | str, dict[int | str, tuple[float, float, float]]]:
    """`{trained with: {tested with: (mean, smallest, largest accuracy of the seeds)}}`, the paper's Table 2."""
    return {
        trained: {
            tested: (mean(shares), min(shares), max(shares))
            for tested in TESTED
            for shares in [accuracies(summary, trained, tested)]
        }
        for trained in TRAINED
    }


SIZES = {
    "word": 63, "symbols": 32, "d_model": 64, "heads": 2, "chunk": 8, "buckets": 32,
    "steps": 800, "batch": 16, "learning_rate": 3e-3, "tested": 256,
}  # fmt: skip
# a few seconds, for a notebook
LIVE = SIZES | {"word": 15, "symbols": 16, "chunk": 4, "buckets": 16, "steps": 200, "tested": 64}
STUDY = Study(
    name="duplication",
    question="A model that copies a word with hashed attention: how many rounds in training, and how many in a test?",
    run=run,
    recorded=tuple({"hashes": hashes, **SIZES} for hashes in TRAINED),
    seeds=(0, 1, 2, 3, 4),
    minutes=4,
)
