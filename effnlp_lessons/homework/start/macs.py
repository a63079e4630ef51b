"""Exercise 2 of notebook 00: count the MACs of an encoder on a padded batch.

n: padded length, d: d_model, f: d_ff. 1 MAC = one multiplication with its addition = 2 FLOPs.
"""

from collections.abc import Callable

from torch import Generator

from effnlp_lessons.homework.exercise import Exercise, Mistake, Property, whole_number


def encoder_macs(layers: int, d_model: int, d_ff: int, lengths: list[int]) -> int:
    """MACs of an encoder's forward pass on a batch of sentences that is padded to its longest.

    Per layer and sentence of n positions: projections 4 n d², scores and mixing n² d each, feed-forward
    2 n d f. Padding is computed like any token. Look-ups, norms and softmax count as none.
    """
    return _batch_macs(layers, d_model, d_ff, len(lengths), max(lengths))


def _batch_macs(
    layers: int,
    d_model: int,
    d_ff: int,
    batch: int,
    length: int,
    projections: int = 4,
    products: int = 2,
    ff: int = 2,
) -> int:
    """MACs of `batch` sequences of `length` positions; `products` of n x n x d, `ff` matrices of d x f."""
    per_sequence = (
        projections * length * d_model * d_model + products * length * length * d_model + ff * length * d_model * d_ff
    )
    return layers * batch * per_sequence


def _draw_batch(sentences: tuple[int, int], equal: bool = False) -> Callable[[Generator], tuple]:
    """Sizes and sentence lengths of a batch; `sentences`: the smallest and the largest batch."""

    def draw(generator: Generator) -> tuple:
        lengths = [whole_number(3, 60, generator) for _ in range(whole_number(*sentences, generator))]
        if equal:
            lengths = lengths[:1] * len(lengths)
        d_model = whole_number(3, 40, generator)
        return whole_number(2, 7, generator), d_model, whole_number(3, 120, generator), lengths

    return draw


ENCODER_MACS = Exercise(
    id="start.encoder_macs",
    title="MACs of a padded batch",
    minutes=20,
    difficulty=2,
    reference=encoder_macs,
    properties=(
        Property("one sentence", _draw_batch((1, 1))),
        Property("a batch of sentences of one length", _draw_batch((2, 5), equal=True)),
        Property("a batch of sentences of different lengths", _draw_batch((2, 5))),
        Property(
            "MiniLM on sentences of 12, 40 and 128 tokens",
            lambda generator: (6, 384, 1536, [12, 40, 128]),
            times=1,
        ),
    ),
    mistakes=(
        Mistake(
            "Padding is taken to be free",
            "You count every sentence at its own length. The batch is one tensor: each sentence is "
            "computed at the length of the longest.",
            lambda layers, d_model, d_ff, lengths: sum(
                _batch_macs(layers, d_model, d_ff, 1, length) for length in lengths
            ),
        ),
        Mistake(
            "The batch is taken to be one long sentence",
            "Adding the lengths first lets every token attend to the other sentences. Count one padded "
            "sentence, then multiply by the number of sentences.",
            lambda layers, d_model, d_ff, lengths: _batch_macs(layers, d_model, d_ff, 1, len(lengths) * max(lengths)),
        ),
        Mistake(
            "The sentences are put one behind the other, without padding",
            "Then every token attends to the other sentences, and nothing is padded. Count one padded sentence, "
            "then multiply by the number of sentences.",
            lambda layers, d_model, d_ff, lengths: _batch_macs(layers, d_model, d_ff, 1, sum(lengths)),
        ),
        Mistake(
            "d_ff is taken to be 4 d_model",
            "That holds for BERT and MiniLM. Use the argument d_ff.",
            lambda layers, d_model, d_ff, lengths: encoder_macs(layers, d_model, 4 * d_model, lengths),
        ),
        Mistake(
            "Only one sentence is counted",
            "The count of one padded sentence is right. There are len(lengths) of them.",
            lambda layers, d_model, d_ff, lengths: _batch_macs(layers, d_model, d_ff, 1, max(lengths)),
        ),
        Mistake(
            "Only one layer is counted",
            "The count of one layer is right. Multiply by the number of layers.",
            lambda layers, d_model, d_ff, lengths: _batch_macs(1, d_model, d_ff, len(lengths), max(lengths)),
        ),
        Mistake(
            "FLOPs are counted, not MACs",
            "Your answer is twice the count. One MAC is a multiplication together with its addition: two FLOPs.",
            lambda *inputs: 2 * encoder_macs(*inputs),
        ),
        Mistake(
            "Mixing is left out",
            "Scores cost n² d MACs, and so does mixing: the weights times the values. Your count has one n² d.",
            lambda layers, d_model, d_ff, lengths: _batch_macs(
                layers, d_model, d_ff, len(lengths), max(lengths), products=1
            ),
        ),
        Mistake(
            "Scores and mixing are left out",
            "Your count has the matrices with weights alone. Attention also multiplies activations with "
            "activations: n² d for the scores and n² d for mixing.",
            lambda layers, d_model, d_ff, lengths: _batch_macs(
                layers, d_model, d_ff, len(lengths), max(lengths), products=0
            ),
        ),
        Mistake(
            "The output projection is left out",
            "Attention has four projections: query, key, value, and output.",
            lambda layers, d_model, d_ff, lengths: _batch_macs(
                layers, d_model, d_ff, len(lengths), max(lengths), projections=3
            ),
        ),
        Mistake(
            "One feed-forward matrix is missing",
            "The feed-forward goes up to d_ff and back to d_model: two matrices, 2 n d f.",
            lambda layers, d_model, d_ff, lengths: _batch_macs(layers, d_model, d_ff, len(lengths), max(lengths), ff=1),
        ),
    ),
    hints=(
        "Start with one sentence and one layer. Which matrices are multiplied, and how large are they? "
        "An (a, b) times a (b, c) matrix costs a*b*c MACs.",
        "One layer on n positions: four projections (n, d) x (d, d); scores (n, d) x (d, n); mixing (n, n) "
        "x (n, d); feed-forward (n, d) x (d, f) and (n, f) x (f, d). Padding makes n the same for every "
        "sentence.",
        "A neighbour: two linear layers, 5 to 7 and 7 to 2, on 3 sequences of 4, 9 and 6 steps, padded.\n"
        "  padded length: 9\n"
        "  one sequence:  9*5*7 + 9*7*2 = 315 + 126 = 441\n"
        "  three of them: 3 * 441                   = 1,323\n"
        "Nothing here is quadratic in the length. In attention, two products are.",
    ),
)
