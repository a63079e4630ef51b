"""Homework of notebook 09: eight exercises on attention that chooses its pairs or shortens its keys.

The exercises follow the notebook: the hash, the sort, the rounds, a bug to repair, the tokens of a cluster, compressed
slots without the future, projected keys, factorised scores. One module each.
"""

from effnlp_lessons.homework.buckets.factorized import FACTORIZED_SCORES
from effnlp_lessons.homework.buckets.hashing import HASH
from effnlp_lessons.homework.buckets.projected import PROJECT_KEYS
from effnlp_lessons.homework.buckets.rounds import COMBINE_ROUNDS
from effnlp_lessons.homework.buckets.routed import CLUSTER_MEMBERS
from effnlp_lessons.homework.buckets.shared import SHARED_ATTENTION
from effnlp_lessons.homework.buckets.slots import VISIBLE_SLOTS
from effnlp_lessons.homework.buckets.sorting import SORTED_CHUNKS
from effnlp_lessons.homework.exercise import Prediction

EXERCISES = (
    HASH,
    SORTED_CHUNKS,
    COMBINE_ROUNDS,
    SHARED_ATTENTION,
    CLUSTER_MEMBERS,
    VISIBLE_SLOTS,
    PROJECT_KEYS,
    FACTORIZED_SCORES,
)

PREDICTIONS = (
    Prediction(
        id="buckets.rounds",
        question="Two vectors at 25 degrees, 16 buckets: in what share of draws do four rounds never let them meet?",
        unit="per cent",
        low=0,
        high=100,
        recorded=40,
    ),
    Prediction(
        id="buckets.future",
        question="Hashed attention with a causal mask: how many earlier outputs change when later tokens do?",
        choices=("none", "a few", "many"),
        recorded="none",
    ),
    Prediction(
        id="buckets.pooled",
        question="Keys averaged over four neighbours, no training: how large is the error of a head's output?",
        unit="error (0 perfect, 1 as bad as zeros)",
        low=0,
        high=10,
        recorded=0.1,
    ),
)
