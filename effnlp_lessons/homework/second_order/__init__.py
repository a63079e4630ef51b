"""Homework of notebook 05: five exercises on pruning by magnitude and by second derivatives.

The exercises climb from a worked example with blanks (an exact count of what goes) and a wrong sign in a recursion of
second derivatives to the inverse Hessian, a step of Optimal Brain Surgeon, and pruning to a byte budget, which the
library does not do. One module each.
"""

from effnlp_lessons.homework.exercise import Prediction
from effnlp_lessons.homework.second_order.budget import PRUNE_TO_BUDGET
from effnlp_lessons.homework.second_order.curvature import OBD_SALIENCY
from effnlp_lessons.homework.second_order.inverse import INVERSE_HESSIAN
from effnlp_lessons.homework.second_order.magnitude import KEEP_TOP
from effnlp_lessons.homework.second_order.surgeon import SURGEON_STEP

EXERCISES = (
    KEEP_TOP,
    OBD_SALIENCY,
    INVERSE_HESSIAN,
    SURGEON_STEP,
    PRUNE_TO_BUDGET,
)

PREDICTIONS = (
    Prediction(
        id="second_order.csr_growth",
        question="A float32 matrix loses half of its weights, and is saved in CSR form with 64-bit indices. "
        "How large is this file, measured by that of the dense matrix?",
        unit="per cent",
        low=0,
        high=300,
        recorded=50,
    ),
    Prediction(
        id="second_order.xor",
        question="Of 100 nets that have learned XOR, one weight is deleted by Optimal Brain Surgeon, without training "
        "afterwards. How many still solve XOR?",
        unit="nets",
        low=0,
        high=100,
        recorded=90,
    ),
)
