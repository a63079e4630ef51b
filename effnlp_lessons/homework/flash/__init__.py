"""Homework of notebook 11: six exercises on attention in tiles.

Softmax in one pass; which tiles are computed; forward and backward pass of one head in tiles; the bytes they move; and
the masks of a Triton kernel.
"""

from effnlp_lessons.homework.exercise import Prediction
from effnlp_lessons.homework.flash.backward import BACKWARD
from effnlp_lessons.homework.flash.kinds import TILE_KINDS
from effnlp_lessons.homework.flash.masks import MASKED_TAIL, interpreted
from effnlp_lessons.homework.flash.online import ONLINE_SOFTMAX
from effnlp_lessons.homework.flash.tiled import FORWARD
from effnlp_lessons.homework.flash.traffic import BYTES

__all__ = ["EXERCISES", "PREDICTIONS", "interpreted"]

EXERCISES = (
    ONLINE_SOFTMAX,
    TILE_KINDS,
    FORWARD,
    BACKWARD,
    BYTES,
    MASKED_TAIL,
)

PREDICTIONS = (
    Prediction(
        id="flash.small_sram",
        question="512 tokens, 64 channels, float16: how many queries must a tile have at least, in powers of two, so "
        "that attention in tiles moves fewer bytes than standard attention?",
        unit="queries",
        low=1,
        high=512,
        recorded=2,
    ),
    Prediction(
        id="flash.causal_share",
        question="1,000 tokens, tiles of 64 x 64, causal: which share of the tiles is skipped?",
        unit="per cent",
        low=0,
        high=100,
        recorded=50,
    ),
    Prediction(
        id="flash.exact",
        question="In float32, how does the output of attention in tiles differ from dense attention's?",
        choices=("not at all", "in the last digits", "by a few per cent"),
        recorded="by a few per cent",
    ),
)
