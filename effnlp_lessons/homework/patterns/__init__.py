"""Homework of notebook 08: ten exercises on attention patterns.

The exercises climb from a window mask with blanks, the memory of local attention and relative labels, over the
reach of a stack, the Sparse Transformer's two masks, BigBird's list of blocks and permuted blocks, to window
attention in linear memory, a bug to repair, and a pattern that the library does not have. One module each.
"""

from effnlp_lessons.homework.exercise import Prediction
from effnlp_lessons.homework.patterns.blocks import BLOCK_PERMUTED_ATTENTION
from effnlp_lessons.homework.patterns.chunks import WINDOW_ATTENTION
from effnlp_lessons.homework.patterns.global_tokens import WINDOW_WITH_GLOBALS
from effnlp_lessons.homework.patterns.labels import RELATIVE_LABELS
from effnlp_lessons.homework.patterns.memory import MEMORY_BLOCK
from effnlp_lessons.homework.patterns.multiplicity import BIGBIRD_MULTIPLICITY
from effnlp_lessons.homework.patterns.reach import REACH
from effnlp_lessons.homework.patterns.sinks import SINK_PAIRS
from effnlp_lessons.homework.patterns.sparse import STRIDED_AND_FIXED
from effnlp_lessons.homework.patterns.window import WINDOW_MASK

EXERCISES = (
    WINDOW_MASK,
    MEMORY_BLOCK,
    RELATIVE_LABELS,
    REACH,
    STRIDED_AND_FIXED,
    BIGBIRD_MULTIPLICITY,
    BLOCK_PERMUTED_ATTENTION,
    WINDOW_ATTENTION,
    WINDOW_WITH_GLOBALS,
    SINK_PAIRS,
)

PREDICTIONS = (
    Prediction(
        id="patterns.masked",
        question="A mask hides 94 % of the pairs from dense attention: how many times faster does it get?",
        unit="times as fast",
        low=0,
        recorded=10,
    ),
    Prediction(
        id="patterns.order",
        question="Fixed pattern, two layers: which set must the lower layer use to reach all of the past?",
        choices=("first", "second", "either"),
        recorded="either",
    ),
    Prediction(
        id="patterns.layers",
        question="Windows of 8 to each side: how many layers until token 127 can know about token 0?",
        unit="layers",
        low=1,
        recorded=9,
    ),
    Prediction(
        id="patterns.columns",
        question="How large is the error of a head's output when only [CLS] and [SEP] may be looked at?",
        unit="error (0 perfect, 1 as bad as zeros)",
        low=0,
        high=10,
        recorded=0.6,
    ),
    Prediction(
        id="patterns.faster",
        question="From which length is a window of 128 to each side faster than fused dense attention?",
        unit="tokens",
        low=1,
        recorded=4096,
    ),
)
