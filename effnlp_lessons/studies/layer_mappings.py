"""Which teacher layer should each student layer learn from? All 20 mappings of three layers into six.

Three-layer students of MiniLM, all from one start (the layers that DistilBERT would copy), learn TinyBERT's hidden
states and attention scores (Jiao et al. 2019, sec. 3.1) on the same sentences for as many steps; only g(m) differs.
They are judged as in `layer_losses`.

NOTE the losses of two mappings have different targets: which is smaller says nothing of which student is better.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from effnlp_lessons.distillation.distilbert import alternate_layers
from effnlp_lessons.studies.layer_losses import METHODS, answered, judge, start, teach
from effnlp_lessons.studies.runner import Outcome, Study

MAPPINGS = tuple(combinations(range(1, 7), 3))
LOSS = "hidden states + scores (TinyBERT)"


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers: "results", `{"2-4-6": {"agreement", "accuracy": per cent, "loss": mean of the last 20 steps}}`."""
    text, results = answered(setting, seed), {}
    mappings = setting.get("mappings", MAPPINGS)
    for mapping in map(tuple, mappings):
        student = start(alternate_layers(6, 3))
        losses = teach(student, text, METHODS[LOSS], mapping, setting["epochs"], setting["learning_rate"], seed)
        last = losses[-20:]
        results["-".join(map(str, mapping))] = judge(student.eval()) | {"loss": round(sum(last) / len(last), 5)}
    return Outcome({"steps": setting["epochs"] * len(text.lengths), "results": results})


def scores(summary: dict[str, Any]) -> dict[tuple[int, int, int], dict[str, list[float]]]:
    """Of a recorded summary: by mapping, "agreement" and "accuracy" (per cent) and "loss", one number a seed."""
    runs = [run["results"] for run in summary["runs"]]
    return {
        tuple(map(int, name.split("-"))): {what: [run[name][what] for run in runs] for what in runs[0][name]}
        for name in runs[0]
    }


STUDY = Study(
    name="layer_mappings",
    question="Three student layers, six teacher layers: which mapping gives the best student? The lowest loss?",
    run=run,
    recorded=({"sentences": 1_600, "tokens": 32, "batch": 16, "epochs": 1, "learning_rate": 1e-3},),
    full=({"sentences": 12_951, "tokens": 48, "batch": 32, "epochs": 1, "learning_rate": 1e-3},),
    seeds=(0, 1, 2),
    minutes=25,
)
