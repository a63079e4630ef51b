"""Exercise 1 of notebook 00: count the parameters of a decoder block. Blanks in a worked example.

d: d_model, f: d_ff. An attention has 4 (d² + d) parameters, a feed-forward 2 d f + f + d, a norm 2 d.
"""

from effnlp_lessons.homework.exercise import Answer, Exercise, Mistake, Property, whole_number


def block_parameters(d_model: int, d_ff: int) -> int:
    """Parameters of one decoder block: self-attention, cross-attention, feed-forward and three norms.

    Every linear layer has a weight matrix and a bias vector, every norm a weight and a bias per channel.
    """
    attention = 4 * (d_model * d_model + d_model)
    feed_forward = (d_model * d_ff + d_ff) + (d_ff * d_model + d_model)
    norm = 2 * d_model
    return 2 * attention + feed_forward + 3 * norm


def _decoder_block(
    attentions: int = 2, feed_forward_biases: int = 1, norms: int = 3, vectors_per_norm: int = 2
) -> Answer:
    """The count with its ingredients exchanged, for the mistakes."""

    def count(d_model: int, d_ff: int) -> int:
        attention = 4 * (d_model * d_model + d_model)
        feed_forward = 2 * d_model * d_ff + feed_forward_biases * (d_ff + d_model)
        return attentions * attention + feed_forward + norms * vectors_per_norm * d_model

    return count


BLOCK_PARAMETERS = Exercise(
    id="start.block_parameters",
    title="parameters of a decoder block",
    minutes=10,
    difficulty=1,
    reference=block_parameters,
    properties=(
        Property("a block to count by hand: d_model = 2, d_ff = 3", lambda generator: (2, 3), times=1),
        Property(
            "MiniLM's sizes: d_model = 384, d_ff = 1,536",
            lambda generator: (384, 1536),
            times=1,
        ),
        Property(
            "d_ff = 4 d_model, at other sizes",
            lambda generator: (d_model := whole_number(3, 90, generator), 4 * d_model),
        ),
        Property(
            "d_ff that is no multiple of d_model",
            lambda generator: (
                d_model := whole_number(5, 90, generator),
                d_model * whole_number(1, 3, generator) + 1,
            ),
        ),
    ),
    mistakes=(
        Mistake(
            "An encoder block is counted",
            "A decoder block has a second attention, to the encoder's output, and a third norm.",
            _decoder_block(attentions=1, norms=2),
        ),
        Mistake(
            "The feed-forward is counted twice",
            "Only the attention comes twice. The feed-forward is the same as in an encoder block.",
            lambda d_model, d_ff: block_parameters(d_model, d_ff) + 2 * d_model * d_ff + d_ff + d_model,
        ),
        Mistake(
            "Cross-attention is not counted",
            "This is an encoder block with one norm more. A decoder block attends twice: to itself and to "
            "the encoder. Count the attention twice.",
            _decoder_block(attentions=1),
        ),
        Mistake(
            "The feed-forward's biases are left out",
            "A linear layer from a to b has a*b weights and b biases: d_ff after the first, d_model after the second.",
            _decoder_block(feed_forward_biases=0),
        ),
        Mistake(
            "One feed-forward matrix is missing",
            "A feed-forward is two linear layers: d_model to d_ff, and d_ff back to d_model.",
            lambda d_model, d_ff: block_parameters(d_model, d_ff) - (d_ff * d_model + d_model),
        ),
        Mistake(
            "Both feed-forward biases have the same length",
            "A bias is as long as its layer's output: d_ff after the first layer, d_model after the second.",
            lambda d_model, d_ff: block_parameters(d_model, d_ff) + d_ff - d_model,
        ),
        Mistake(
            "Norms have a weight and no bias",
            "A layer norm has two vectors of d_model: it scales and it shifts.",
            _decoder_block(vectors_per_norm=1),
        ),
        Mistake(
            "The norms are left out",
            "There are three, one after each part, with 2 d_model parameters each.",
            _decoder_block(norms=0),
        ),
        Mistake(
            "Two norms instead of three",
            "An encoder block has two norms. A decoder block has three parts, so it has three.",
            _decoder_block(norms=2),
        ),
        Mistake(
            "d_ff is taken to be 4 d_model",
            "That holds for BERT and MiniLM. Use the argument d_ff.",
            lambda d_model, d_ff: block_parameters(d_model, 4 * d_model),
        ),
    ),
    hints=(
        "The attention line is done for you. A decoder block has it twice. What else stands in the block?",
        "Write one line for the feed-forward (two linear layers, each with its bias) and one for a norm. "
        "Then add: attention twice, feed-forward once, the norm three times.",
        "A neighbour: a bottleneck that goes from 10 channels to 3 and back, with one norm at the end.\n"
        "  down:  10 * 3 weights + 3 biases  = 33\n"
        "  up:    3 * 10 weights + 10 biases = 40\n"
        "  norm:  10 scales + 10 shifts      = 20\n"
        "  together                            93",
    ),
)
