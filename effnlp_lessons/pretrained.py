"""The two trained models of the course: MiniLM-L6 as published, and the teacher, MiniLM on movie reviews.

MiniLM-L6 is all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957; Reimers and Gurevych 2019, 1908.10084).
The teacher is MiniLM plus a small difference, kept in `data/checkpoints/teacher.safetensors`: for every
linear layer a low-rank product W + up @ down (Hu et al. 2021, LoRA, 2106.09685), and the new head whole.
It was trained by `python -m effnlp_lessons.studies teacher`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from effnlp_lessons import paths
from effnlp_lessons.datasets import sources
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.transformer import MINILM_L6, Encoder, MixerFactory

if TYPE_CHECKING:
    from collections.abc import Callable

# transformers' BERT names, piece by piece -> ours
BERT_NAMES = {
    "encoder.layer.": "blocks.",
    "embeddings.word_embeddings": "embeddings.tokens",
    "embeddings.position_embeddings": "embeddings.positions",
    "embeddings.token_type_embeddings": "embeddings.segments",
    "embeddings.LayerNorm": "embeddings.norm",
    "attention.self": "token_mixer",
    "attention.output.dense": "token_mixer.output",
    "attention.output.LayerNorm": "token_norm",
    "intermediate.dense": "channel_mixer.expand",
    "output.dense": "channel_mixer.contract",
    "output.LayerNorm": "channel_norm",
    "pooler.dense": "pooler",
}


def rename_bert_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' `BertModel` under the names of our `Encoder`; no tensor is copied."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in BERT_NAMES.items():  # in this order: attention's output before the block's
            name = name.replace(theirs, ours)
        if not name.endswith("position_ids"):  # 0, 1, 2, ...: a buffer of older files
            renamed[name] = tensor
    return renamed


def load_minilm(
    *,
    attention: Callable[..., Tensor] | None = None,
    token_mixer: MixerFactory | None = None,
    channel_mixer: MixerFactory | None = None,
) -> Encoder:
    """MiniLM-L6 with its published weights (float32), in evaluation mode.

    `attention` may exchange the attention method: it has no weights, so the published ones stay in use.
    With another token or channel mixer the weights that no longer have a place are left out, and the new
    mixer keeps its own initialisation.

    Raises:
        SourceError: if the weights were not prepared yet.
    """
    encoder = Encoder(MINILM_L6, attention=attention, token_mixer=token_mixer, channel_mixer=channel_mixer)
    state = rename_bert_state(load_file(sources.path("minilm", "model.safetensors")))
    encoder.load_state_dict(state, strict=token_mixer is None and channel_mixer is None)
    return encoder.eval()


def teacher_path() -> Path:
    return paths.checkpoints_dir() / "teacher.safetensors"


def apply_difference_(model: SentenceClassifier, file: Path) -> None:
    """Add the stored difference to `model` in place: low-rank pairs are added, other tensors replaced.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file names a parameter that the model does not have.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file.name} is missing: record it with `python -m effnlp_lessons.studies teacher`")
    stored, parameters = load_file(file), dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in stored.items():
            target = name.removesuffix(".down").removesuffix(".up")
            if target not in parameters:
                raise ValueError(f"{file.name} changes {target!r}, which the model does not have")
            if name.endswith(".up"):
                parameters[target] += tensor.float() @ stored[target + ".down"].float()  # W + up @ down
            elif not name.endswith(".down"):
                parameters[target].copy_(tensor)


def load_teacher(*, attention: Callable[..., Tensor] | None = None) -> SentenceClassifier:
    """The course's teacher: logits (batch, 2) for negative, positive; float32, in evaluation mode.

    `attention` exchanges the attention method, as in `load_minilm`: it has no weights.
    """
    model = SentenceClassifier(load_minilm(attention=attention), classes=2)
    apply_difference_(model, teacher_path())
    return model.eval()


def teacher_logits() -> Tensor:
    """The teacher's cached logits (10605, 2) float32, row by row in the order of `load_reviews()`."""
    return load_file(paths.checkpoints_dir() / "teacher_logits.safetensors")["logits"].float()
