"""The teacher: MiniLM-L6 fine-tuned to tell positive from negative movie reviews, as a small difference.

The published weights stay frozen. Beside every linear layer of the blocks runs a low-rank one, and only
W + up @ down is trained, with the biases, the norms, the pooler and the head (Hu et al. 2021, LoRA, arXiv
2106.09685). Several seeds are trained, the best on the dev split is shipped, and only its test accuracy
is ever read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn

from effnlp_lessons.classification import ReviewExamples, accuracy, logits_of
from effnlp_lessons.datasets import reviews, tokenizer
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.pretrained import apply_difference_, load_minilm
from effnlp_lessons.studies.runner import Outcome, Run, Study
from effnlp_lessons.training import TrainingPlan, train, write_atomically


class LowRankLinear(nn.Module):
    """A frozen linear layer plus a low-rank one: y = x Wᵀ + b + (x downᵀ) upᵀ; `up` starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        base.weight.requires_grad_(False)
        down = torch.randn(rank, base.in_features, generator=generator) / base.in_features**0.5
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def add_low_rank_(model: SentenceClassifier, rank: int, seed: int) -> None:
    """Put a low-rank layer beside every linear layer of the blocks, in place; freeze those and the embeddings."""
    generator = torch.Generator().manual_seed(seed)
    model.encoder.embeddings.requires_grad_(False)
    for parent in list(model.encoder.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LowRankLinear(child, rank, generator))


def difference(model: SentenceClassifier) -> dict[str, Tensor]:
    """What training changed, in float16, under the names that `pretrained.apply_difference_` reads."""
    changed = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # ...query.up -> ...query.weight.up; ...query.base.bias -> ...query.bias
            name = name.replace(".base.", ".")
            for kind in (".up", ".down"):
                name = name.removesuffix(kind) + ".weight" + kind if name.endswith(kind) else name
            changed[name] = parameter.detach().half().contiguous()
    return changed


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Train one teacher. Numbers: dev accuracy (per cent), loss (nats); file: its difference to MiniLM.

    `setting`: rank, epochs, learning_rate, and optionally `sentences`, how many of each split to use.
    """
    data, limit = reviews.load_reviews(), setting.get("sentences")
    model = SentenceClassifier(load_minilm(), classes=2, seed=seed)
    add_low_rank_(model, setting["rank"], seed)
    plan = TrainingPlan(
        epochs=setting["epochs"],
        learning_rate=setting["learning_rate"],
        batch_size=32,
        bfloat16=True,
        seed=seed,
    )

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        token_ids, key_padding_mask, labels = batch
        return F.cross_entropy(model(token_ids, key_padding_mask).float(), labels)

    history = train(model, ReviewExamples(data.subset("train"), limit), loss, plan, progress=False)
    stored, last = save(difference(model)), history.loss[-50:]
    numbers = {
        "dev accuracy": accuracy(model, ReviewExamples(data.subset("dev"), limit)),
        "last training loss": sum(last) / len(last),
        "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bytes": len(stored),
    }
    return Outcome(numbers, {"teacher.safetensors": stored})


def finish(runs: list[Run], artefacts: Path) -> dict[str, Any]:
    """Ship the best run on dev: its difference, its accuracies, its logits on every sentence.

    The float16 file is loaded back before anything is measured: what is reported is what is shipped.
    """
    best = max(runs, key=lambda r: r.outcome.numbers["dev accuracy"])
    file = artefacts / "teacher.safetensors"
    write_atomically(file, lambda path: path.write_bytes(best.outcome.files["teacher.safetensors"]))
    teacher = SentenceClassifier(load_minilm(), classes=2).eval()
    apply_difference_(teacher, file)
    data = reviews.load_reviews()
    logits = logits_of(teacher, tokenizer.encode(data.text))
    content = save({"logits": logits.half()})
    write_atomically(artefacts / "teacher_logits.safetensors", lambda path: path.write_bytes(content))
    right = logits.argmax(-1).numpy() == data.label
    shipped = {f"{split} accuracy": 100 * float(right[data.split == split].mean()) for split in ("dev", "test")}
    return {"shipped": {"setting": best.setting, "seed": best.seed, "bytes": file.stat().st_size} | shipped}


STUDY = Study(
    name="teacher",
    question="How well does MiniLM-L6 tell good from bad movie reviews, after training a low-rank difference?",
    run=run,
    recorded=({"rank": 8, "epochs": 3, "learning_rate": 1e-3},),
    full=tuple(
        {"rank": rank, "epochs": 3, "learning_rate": rate} for rank in (4, 8, 16) for rate in (5e-4, 1e-3, 2e-3)
    ),
    seeds=(0, 1, 2, 3),
    minutes=20,
    finish=finish,
)
