"""Homework of notebook 02: seven exercises on distilling a pre-trained model.

The exercises climb from the layers that DistilBERT copies, TinyBERT's loss on scores and on hidden states, and
DistilBERT's loss on the words, to a block of MobileBERT, a bug in its progressive transfer, and MiniLM's loss, which
the library does not have. One module each.
"""

from effnlp_lessons.homework.exercise import Prediction
from effnlp_lessons.homework.pretraining.bottleneck import BOTTLENECK_BLOCK
from effnlp_lessons.homework.pretraining.hidden import HIDDEN_LOSS
from effnlp_lessons.homework.pretraining.layers import ALTERNATE_LAYERS
from effnlp_lessons.homework.pretraining.relations import RELATION_LOSS
from effnlp_lessons.homework.pretraining.scores import SCORE_LOSS
from effnlp_lessons.homework.pretraining.stage import TRANSFER_STEP
from effnlp_lessons.homework.pretraining.words import WORD_DIVERGENCE

EXERCISES = (
    ALTERNATE_LAYERS,
    SCORE_LOSS,
    HIDDEN_LOSS,
    WORD_DIVERGENCE,
    BOTTLENECK_BLOCK,
    TRANSFER_STEP,
    RELATION_LOSS,
)

PREDICTIONS = (
    Prediction(
        id="pretraining.loss",
        question="Two layer mappings: the student with the smaller training loss is",
        choices=("better", "worse", "cannot be said"),
        recorded="better",
    ),
    Prediction(
        id="pretraining.mapping",
        question="Which strategy of mapping three layers to six gives the best agreement with the teacher?",
        choices=("uniform", "top", "bottom", "tie"),
        recorded="uniform",
    ),
    Prediction(
        id="pretraining.losses",
        question="Which single loss gives the best agreement with the teacher?",
        choices=("last layer", "hidden states", "attention"),
        recorded="hidden states",
    ),
    Prediction(
        id="pretraining.mobile",
        question="MACs of MobileBERT's 24 layers for 128 tokens, compared with BERT-base's 12",
        unit="per cent",
        low=0,
        high=1000,
        recorded=60,
    ),
)
