"""Homework with feedback in the student's own cell: check an answer, ask for a hint, make a prediction.

`check("start.encoder_macs", encoder_macs)` tries a function on fresh random inputs and says what fails;
`hint("start.encoder_macs")` gives the next of three hints; `predict("start.share", 40)` stores a guess, and
`reveal("start.share")` hands it to the cell that draws it beside the result. One module of exercises per
lecture, found by `lectures.py`; nothing of a lecture is imported before its first exercise is used.
"""

from effnlp_lessons.homework.exercise import HomeworkError
from effnlp_lessons.homework.grader import check, hint
from effnlp_lessons.homework.predictions import predict, reveal

__all__ = ["HomeworkError", "check", "hint", "predict", "reveal"]
