"""TinyBERT: a student that is narrower as well as shallower learns layer by layer (Jiao et al. 2019, arXiv 1909.10351).

Student layer m learns from teacher layer g(m); 0 is the embeddings, M + 1 and N + 1 the prediction:

    L_embd = MSE(E_S W_e, E_T)                                          m = 0
    L_hidn = MSE(H_S W_h, H_T)                                          m = 1 .. M
    L_attn = 1/h sum_i MSE(A_S,i, A_T,i),   A = Q K^T / sqrt(d_head)    m = 1 .. M, scores before the softmax
    L_pred = CE(softmax(z_T / t), z_S / t),   t = 1                     m = M + 1

In two stages: general, from an un-fine-tuned teacher on plain text, without L_pred; then for the task, from
a fine-tuned teacher on augmented text (`augmentation`), first the layers, then the prediction. All weights are 1.
The projections W_e, W_h are thrown away afterwards.

NOTE `projection`: the paper has two matrices, W_e and one W_h for all layers, and needs none where the widths agree.
The released code has one linear layer with a bias for embeddings and all layers, used at any width.
NOTE `padding`: the paper's A is as large as the sentence. In the released code hidden states of padding count like
others, scores of padded keys are set to 0 on both sides but stay in the denominator, and the rows of padded queries
count. Its loss therefore depends on what stands in the padding; ours by default does not.
NOTE `average`: the released L_pred divides by rows times classes. For regression it takes the true score instead of
the teacher's.
NOTE the released scripts never call `eval()` on the teacher, so its dropout is active and the targets are noisy. Here
the teacher is put into evaluation mode. Its classifier reads ReLU(pooled), ours (`heads`) pooled.
NOTE the released task stage keeps the learning rate constant while it learns layers; `training.train` lets it decay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.dense_attention import check_key_padding_mask
from effnlp_lessons.distillation.hinton import soft_cross_entropy
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.transformer import Encoder, EncoderOutput, TransformerConfig, initialise_

TINYBERT_4 = TransformerConfig(d_model=312, layers=4, heads=12, d_ff=1_200)
TINYBERT_6 = TransformerConfig(d_model=768, layers=6, heads=12, d_ff=3_072)

LAYER_LOSSES = ("embedding", "hidden", "attention")
# which losses each stage adds up; the first two differ in their teacher and text
STAGES = {"general": LAYER_LOSSES, "task, layers": LAYER_LOSSES, "task, prediction": ("prediction",)}

Padding = Literal["excluded", "released"]


def layer_mapping(
    student_layers: int, teacher_layers: int, strategy: Literal["uniform", "top", "bottom"] = "uniform"
) -> tuple[int, ...]:
    """g(0) .. g(M + 1): the teacher layer that each student layer learns from, by one of the paper's strategies.

    0 is the embeddings, 1 .. N are layers, N + 1 is the prediction; M student and N teacher layers.
    uniform: g(m) = m N / M. top: g(m) = m + N - M. bottom: g(m) = m. Always g(0) = 0 and g(M + 1) = N + 1.

    Raises:
        ValueError: more student than teacher layers, a strategy of another name, or a uniform mapping where the
            student's layers do not divide the teacher's.
    """
    m, n = student_layers, teacher_layers
    if not 1 <= m <= n:
        raise ValueError(f"student_layers must be in 1 .. {n} (the teacher's), got {m}")
    if strategy == "uniform" and n % m:
        raise ValueError(f"student_layers must divide teacher_layers for a uniform mapping, got {m} and {n}")
    layers = {
        "uniform": [i * (n // m) for i in range(1, m + 1)],
        "top": [i + n - m for i in range(1, m + 1)],
        "bottom": list(range(1, m + 1)),
    }
    if strategy not in layers:
        raise ValueError(f"strategy must be one of {sorted(layers)}, got {strategy!r}")
    return (0, *layers[strategy], n + 1)


# --------------------------------------------------------------------------------------------- the losses


def _check(padding: str, key_padding_mask: Tensor | None, student: Tensor, teacher: Tensor, length_dim: int) -> None:
    if padding not in ("excluded", "released"):
        raise ValueError(f"padding must be 'excluded' or 'released', got {padding!r}")
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have equal shapes")
    check_key_padding_mask(key_padding_mask, student.shape[0], student.shape[length_dim])


def _mean_squared(difference: Tensor, counts: Tensor) -> Float[Tensor, ""]:
    """Mean of the squares where `counts` (broadcast to `difference`) is True; 0 where it is nowhere."""
    counts = counts.expand_as(difference)
    return difference.masked_fill(~counts, 0.0).square().sum() / counts.sum().clamp(min=1)


def hidden_loss(
    student: Float[Tensor, "batch length d_model"],
    teacher: Float[Tensor, "batch length d_model"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    padding: Padding = "excluded",
) -> Float[Tensor, ""]:
    """Mean squared error of hidden states or embeddings, the student's already projected (L_hidn, L_embd).

    The mean is over real tokens and channels; with "released" over padded tokens too.

    Raises:
        ValueError: unequal shapes, a mask of another shape or dtype, another word for `padding`.
    """
    _check(padding, key_padding_mask, student, teacher, 1)
    difference = student - teacher.detach()
    if key_padding_mask is None or padding == "released":
        return difference.square().mean()
    return _mean_squared(difference, key_padding_mask[..., None])


def attention_loss(
    student: Float[Tensor, "batch heads length length"],
    teacher: Float[Tensor, "batch heads length length"],
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    padding: Padding = "excluded",
) -> Float[Tensor, ""]:
    """Mean squared error of the raw attention scores, before mask and softmax (L_attn).

    "excluded": the mean is over heads and the pairs of real tokens. "released": -10,000 is added at padded keys, what
    is then <= -100 is set to 0 on both sides, and the mean is over all pairs.

    Raises:
        ValueError: unequal shapes (also of heads), a mask of another shape or dtype, another word for `padding`.
    """
    _check(padding, key_padding_mask, student, teacher, 2)
    teacher = teacher.detach()
    if padding == "released":
        if key_padding_mask is not None:
            bias = torch.where(key_padding_mask, 0.0, -10_000.0)[:, None, None, :]
            student, teacher = student + bias, teacher + bias
        student, teacher = (torch.where(x <= -100, torch.zeros_like(x), x) for x in (student, teacher))
        return (student - teacher).square().mean()
    if key_padding_mask is None:
        return (student - teacher).square().mean()
    pairs = key_padding_mask[:, None, :, None] & key_padding_mask[:, None, None, :]
    return _mean_squared(student - teacher, pairs)


def prediction_loss(
    student_logits: Float[Tensor, "rows classes"],
    teacher_logits: Float[Tensor, "rows classes"],
    temperature: float = 1.0,
    average: Literal["rows", "released"] = "rows",
) -> Float[Tensor, ""]:
    """Soft cross-entropy in nats, -sum softmax(z_T / t) log softmax(z_S / t), mean over the rows (L_pred).

    Its smallest value is the teacher's entropy, not 0. There is no factor t^2. "released": the mean over rows and
    classes, smaller by the number of classes.

    Raises:
        ValueError: unequal shapes, a temperature that is not > 0, another word for `average`.
    """
    if average not in ("rows", "released"):
        raise ValueError(f"average must be 'rows' or 'released', got {average!r}")
    loss = soft_cross_entropy(student_logits, teacher_logits, temperature, rescale=False)
    return loss / student_logits.shape[-1] if average == "released" else loss


# ------------------------------------------------------------------------- projections, and the two stages


class LayerLosses(nn.Module):
    """The losses of all layers, with the projections from the student's width to the teacher's.

    Args:
        mapping: g(0) .. g(M + 1) from `layer_mapping`, or any of that form; None: uniform.
        projection: "paper", W_e for the embeddings and one W_h for all layers, no bias, none where the widths agree;
            "released", one linear layer with a bias for both, at any width.
        seed: the projections are drawn from it, normal(0, 0.02).

    Raises:
        ValueError: a mapping that does not fit, unequal numbers of heads, another word for `projection`.
    """

    def __init__(
        self,
        student: TransformerConfig,
        teacher: TransformerConfig,
        mapping: Sequence[int] | None = None,
        *,
        projection: Literal["paper", "released"] = "paper",
        padding: Padding = "excluded",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if student.heads != teacher.heads:
            raise ValueError(f"heads must be equal, to compare scores head by head: {student.heads}, {teacher.heads}")
        if projection not in ("paper", "released"):
            raise ValueError(f"projection must be 'paper' or 'released', got {projection!r}")
        m, n = student.layers, teacher.layers
        self.mapping = tuple(layer_mapping(m, n) if mapping is None else mapping)
        inner, ends = self.mapping[1:-1], (self.mapping[0], self.mapping[-1])
        if len(inner) != m or ends != (0, n + 1) or not all(1 <= layer <= n for layer in inner):
            raise ValueError(f"mapping must be 0, then {m} layers in 1 .. {n}, then {n + 1}, got {self.mapping}")
        self.padding = padding
        widths = (student.d_model, teacher.d_model)
        with torch.random.fork_rng(devices=[]):  # linear layers would draw from torch's global generator
            if projection == "released":
                self.embedding_projection = self.hidden_projection = nn.Linear(*widths)
            else:
                make = nn.Identity if widths[0] == widths[1] else lambda: nn.Linear(*widths, bias=False)
                self.embedding_projection, self.hidden_projection = make(), make()  # W_e, W_h
        initialise_(self, torch.Generator().manual_seed(seed))

    def forward(
        self,
        student: EncoderOutput,
        teacher: EncoderOutput,
        key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses by name; "hidden" and "attention" are sums over the student's layers, "embedding" is one.

        Both outputs come from `Encoder.forward(..., return_scores=True)` on the same tokens.

        Raises:
            ValueError: outputs without scores or with another number of layers.
        """
        layers = {"student": (student, len(self.mapping) - 2), "teacher": (teacher, self.mapping[-1] - 1)}
        for name, (output, wanted) in layers.items():
            if output.scores is None:
                raise ValueError(f"{name} has no scores: call its encoder with return_scores=True")
            if len(output.scores) != wanted:
                raise ValueError(f"{name} must have {wanted} layers, got {len(output.scores)}")

        def compare(project: nn.Module, mine: Tensor, theirs: Tensor) -> Tensor:
            return hidden_loss(project(mine), theirs, key_padding_mask, self.padding)

        pairs = list(enumerate(self.mapping))[1:-1]  # (m, g(m))
        hidden = [compare(self.hidden_projection, student.hidden[m], teacher.hidden[g]) for m, g in pairs]
        attention = [  # layer m's scores are number m - 1: the embeddings have none
            attention_loss(student.scores[m - 1], teacher.scores[g - 1], key_padding_mask, self.padding)
            for m, g in pairs
        ]
        return {
            "embedding": compare(self.embedding_projection, student.hidden[0], teacher.hidden[0]),
            "hidden": torch.stack(hidden).sum(),
            "attention": torch.stack(attention).sum(),
        }


class Apprentice(nn.Module):
    """The student with its projections: one module, so that one optimizer trains both. Keep `student` afterwards.

    The teacher is not a part of it: `training.train` would put it into training mode and store it.
    """

    def __init__(self, student: Encoder | SentenceClassifier, layer_losses: LayerLosses) -> None:
        super().__init__()
        self.student, self.layer_losses = student, layer_losses


def _read(model: Encoder | SentenceClassifier, token_ids: Tensor, mask: Tensor, scores: bool) -> tuple:
    """The encoder's output and, if `model` has a head, its logits, from one pass."""
    if isinstance(model, Encoder):
        return model(token_ids, mask, return_scores=scores), None
    output = model.encoder(token_ids, mask, return_scores=scores)
    return output, model.head(model.dropout(output.pooled))


def stage_loss(
    teacher: Encoder | SentenceClassifier, names: Sequence[str] = STAGES["general"]
) -> Callable[[Apprentice, Any], Float[Tensor, ""]]:
    """The sum of some losses as `loss(apprentice, batch)` for `training.train`.

    `batch` is (token_ids, key_padding_mask, ...); labels, if there are any, are not read. Give `STAGES[stage]` or any
    of "embedding", "hidden", "attention", "prediction". The teacher is put into evaluation mode and gets no gradient.

    Raises:
        ValueError: no name, or one that is no loss; "prediction" with a teacher or a student without a head.
    """
    known = (*LAYER_LOSSES, "prediction")
    if isinstance(names, str) or not names or not set(names) <= set(known):
        raise ValueError(f"names must be some of {known}, got {names!r}")
    layers = any(name in LAYER_LOSSES for name in names)

    def loss(apprentice: Apprentice, batch: Any) -> Float[Tensor, ""]:
        token_ids, key_padding_mask = batch[0], batch[1]
        teacher.eval()
        with torch.no_grad():
            target, target_logits = _read(teacher, token_ids, key_padding_mask, layers)
        output, logits = _read(apprentice.student, token_ids, key_padding_mask, layers)
        losses = apprentice.layer_losses(output, target, key_padding_mask) if layers else {}
        if "prediction" in names:
            if logits is None or target_logits is None:
                raise ValueError("the prediction loss needs a student and a teacher with a head (SentenceClassifier)")
            losses["prediction"] = prediction_loss(logits, target_logits)
        return torch.stack([losses[name] for name in names]).sum()

    return loss
