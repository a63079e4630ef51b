"""DistilBERT: half the layers of a BERT, started from the teacher's own weights (Sanh, Debut, Chaumond, Wolf 2019).

The student has the teacher's width and every other of its layers, and learns on plain text from three signals
(arXiv 1910.01108, sec. 2 and 3): the teacher's distribution over words, the masked word, and the direction of the
teacher's last hidden states.

    L = a_ce L_ce + a_mlm L_mlm + a_cos L_cos
    L_ce  = T^2 KL(softmax(z_teacher / T) || softmax(z_student / T))    words, softened by the temperature T
    L_mlm = -log softmax(z_student)[word]                               at masked tokens
    L_cos = 1 - cos(h_student, h_teacher)                               last hidden states

NOTE the paper prints L_ce = sum t_i log s_i, without the minus sign. T^2, T = 2 and the weights 5, 2, 1 are those of
the released code and its published command; the paper gives none. KL and cross-entropy have the same gradient.
NOTE "one layer out of two" is 0, 2, 4, 7, 9, 11 in the released code, not 0, 2, 4, 6, 8, 10: evenly spread with the
first and the last layer kept, which is the rule of `alternate_layers`.
NOTE the student has no segment (token type) embeddings and no pooler. The released script drops the teacher's segment
vectors, so its student begins a little off the teacher's layers. `segments="add to positions"` loses nothing.
NOTE L_ce counts all real tokens in the released code, though only the masked ones have something to guess.

To train with `effnlp_lessons.training.train`, mask inside the loss with torch's default generator, which the training
loop seeds and stores, so that a stopped run goes on exactly:

    def loss(student, batch):
        masked = mask_tokens(batch[0], batch[1], torch.default_generator, token_counts=counts)
        return triple_loss(student, teacher, masked, batch[1]).weighted()
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnlp_lessons.dense_attention import check_key_padding_mask
from effnlp_lessons.distillation.hinton import soft_divergence
from effnlp_lessons.heads import MaskedLanguageModel
from effnlp_lessons.transformer import Encoder, TransformerConfig

MASK_ID = 103  # [MASK] of BERT's uncased vocabulary
SPECIAL_IDS = (0, 100, 101, 102, MASK_ID)  # [PAD] [UNK] [CLS] [SEP] [MASK]: never to be guessed


# ----------------------------------------------------------------------------------------- the student


def alternate_layers(teacher_layers: int, student_layers: int) -> tuple[int, ...]:
    """The teacher layers (from 0) that a student is started with: evenly spread, with the first and the last.

    Student layer i takes teacher layer i (n - 1) / (k - 1) of n, rounded, a half downwards; a student of one layer
    takes the first. For 12 and 6 layers these are the released 0, 2, 4, 7, 9, 11.

    Raises:
        ValueError: `student_layers` that is not in 1 .. teacher_layers.
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(f"student_layers must be in 1 .. {teacher_layers} (the teacher's), got {student_layers}")
    gaps, span = max(student_layers - 1, 1), teacher_layers - 1
    # ceil(x - 1/2) in whole numbers, for x = i span / gaps
    return tuple(-((gaps - 2 * i * span) // (2 * gaps)) for i in range(student_layers))


def student_config(teacher: TransformerConfig, layers: int) -> TransformerConfig:
    """The teacher's sizes with `layers` layers, no segment embeddings and no pooler (sec. 3)."""
    return replace(teacher, layers=layers, segments=0, pooler=False)


def student_from_teacher(
    teacher: Encoder,
    layers: int | Sequence[int] | None = None,
    *,
    segments: Literal["drop", "add to positions"] = "drop",
    freeze_positions: bool = False,
) -> Encoder:
    """A student that begins as a part of `teacher`: its embeddings and some of its layers, copied (sec. 3).

    Copied are the token and position tables, the norm after them and the blocks (whatever mixers they hold); shared
    is nothing. The student is in the teacher's mode (training or evaluation).

    Args:
        layers: how many (then spread by `alternate_layers`), or which ones (from 0, increasing); None: half of them.
        segments: what becomes of the teacher's vector of segment 0, which it adds to every token of a single
            sentence. "drop" as released; "add to positions" adds it to every row of the position table. The vectors
            of other segments are lost. Without segments in the teacher the two are the same.
        freeze_positions: keep the position table as it is. The released training configuration does, by asking for
            sinusoidal positions, which cannot be trained, and then loading the teacher's over them.

    Raises:
        ValueError: layers that the teacher does not have, repeated, or out of order; another word for `segments`.
    """
    if segments not in ("drop", "add to positions"):
        raise ValueError(f"segments must be 'drop' or 'add to positions', got {segments!r}")
    total = teacher.config.layers
    if layers is None or isinstance(layers, int):
        layers = alternate_layers(total, total // 2 if layers is None else layers)
    layers = tuple(layers)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= total:
        raise ValueError(f"layers must be increasing numbers in 0 .. {total - 1}, got {layers}")
    with torch.device("meta"):  # every part is replaced below: nothing is drawn
        student = Encoder(student_config(teacher.config, len(layers)))
    for name in ("tokens", "positions", "norm"):
        setattr(student.embeddings, name, copy.deepcopy(getattr(teacher.embeddings, name)))
    student.blocks = nn.ModuleList(copy.deepcopy(teacher.blocks[i]) for i in layers)
    student.last_norm = copy.deepcopy(teacher.last_norm)
    if segments == "add to positions" and teacher.embeddings.segments is not None:
        student.embeddings.positions.weight.data += teacher.embeddings.segments.weight.data[0]
    student.requires_grad_(True)
    student.embeddings.positions.requires_grad_(not freeze_positions)
    return student.train(teacher.training)


def masked_language_student(
    teacher: MaskedLanguageModel,
    layers: int | Sequence[int] | None = None,
    *,
    copy_transform: bool = False,
    segments: Literal["drop", "add to positions"] = "drop",
    freeze_positions: bool = False,
    seed: int = 0,
) -> MaskedLanguageModel:
    """`student_from_teacher` with a masked-word head: tied to the copied token table, the bias of every word copied.

    Args:
        copy_transform: also copy the head's linear transform and its norm. The released script does so on demand
            only; else the transform is drawn from `seed`, and the norm begins as the identity.

    Raises:
        ValueError: what `student_from_teacher` raises.
    """
    encoder = student_from_teacher(teacher.encoder, layers, segments=segments, freeze_positions=freeze_positions)
    with torch.random.fork_rng(devices=[]):  # torch's own start of a layer, replaced at once, draws from its generator
        student = MaskedLanguageModel(encoder, seed)
    student.to(teacher.bias.device, teacher.bias.dtype)
    student.bias.data.copy_(teacher.bias.data)
    if copy_transform:
        student.transform.load_state_dict(teacher.transform.state_dict())
        student.norm.load_state_dict(teacher.norm.state_dict())
    return student.train(teacher.training)


# -------------------------------------------------------------------------------------- dynamic masking


class MaskedTokens(NamedTuple):
    token_ids: Int[Tensor, "batch length"]  # what both models read
    targets: Int[Tensor, "batch length"]  # what stood there
    chosen: Bool[Tensor, "batch length"]  # where the word is to be guessed


def count_tokens(sentences: Iterable[Sequence[int]], vocab_size: int = 30_522) -> Int[Tensor, " vocab"]:
    """How often each token id occurs in the sentences, int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for sentence in sentences:
        counts += torch.bincount(torch.as_tensor(sentence, dtype=torch.int64), minlength=vocab_size)
    return counts


def mask_tokens(
    token_ids: Int[Tensor, "batch length"],
    key_padding_mask: Bool[Tensor, "batch length"] | None,
    generator: torch.Generator,
    *,
    token_counts: Int[Tensor, " vocab"] | None = None,
    vocab_size: int = 30_522,
    share: float = 0.15,
    exponent: float = 0.7,
    actions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    mask_id: int = MASK_ID,
    special_ids: Sequence[int] = SPECIAL_IDS,
) -> MaskedTokens:
    """Choose tokens to guess and hide them, anew at every call (dynamic masking, sec. 3; BERT, sec. 3.1).

    ceil(share * real tokens of the whole batch) tokens are chosen without replacement, special ones never; fewer if
    there are not so many others. Of the chosen, about 80 % become [MASK], 10 % stay, 10 % become a random token of
    the vocabulary, which may be any.

    Args:
        token_counts: how often each token occurs in the corpus. A token is then chosen with a probability
            proportional to count^-exponent (released code; a count of 0 is taken as 1), so rare words are guessed
            more often. None: all alike, as in BERT; the paper speaks of no other way.
        actions: shares of [MASK], kept and random tokens; their sum is 1.

    Raises:
        ValueError: a share outside [0, 1], actions that are no shares, token ids or counts that do not fit the
            vocabulary, a mask of another shape or dtype.
    """
    check_key_padding_mask(key_padding_mask, *token_ids.shape)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    if len(actions) != 3 or min(actions) < 0 or abs(sum(actions) - 1) > 1e-6:
        raise ValueError(f"actions must be three shares that sum to 1 (mask, keep, random), got {actions}")
    if token_counts is not None and tuple(token_counts.shape) != (vocab_size,):
        raise ValueError(f"token_counts must have shape ({vocab_size},), got {tuple(token_counts.shape)}")
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size:
        raise ValueError(f"token_ids must be in 0 .. {vocab_size - 1} (vocab_size), got {int(token_ids.max())}")
    real = torch.ones_like(token_ids, dtype=torch.bool) if key_padding_mask is None else key_padding_mask
    weights = torch.ones(vocab_size, dtype=torch.float64)
    if token_counts is not None:
        weights = token_counts.double().clamp(min=1) ** -exponent
    weights[[i for i in special_ids if i < vocab_size]] = 0.0
    weights = (weights[token_ids] * real).flatten()
    number = min(math.ceil(share * int(real.sum())), int((weights > 0).sum()))
    chosen = torch.zeros(token_ids.numel(), dtype=torch.bool)
    if number:
        chosen[torch.multinomial(weights, number, generator=generator)] = True
    chosen = chosen.view_as(token_ids)

    original = token_ids[chosen]
    draw = torch.rand(number, generator=generator)
    anything = torch.randint(vocab_size, (number,), generator=generator).to(token_ids.dtype)
    kept_or_random = torch.where(draw < actions[0] + actions[1], original, anything)
    hidden = token_ids.clone()
    hidden[chosen] = torch.where(draw < actions[0], mask_id, kept_or_random)
    return MaskedTokens(hidden, token_ids, chosen)


# --------------------------------------------------------------------------------------- the three losses
# L_ce is `hinton.soft_divergence`


def _mean_of_rows(values: Float[Tensor, " rows"]) -> Float[Tensor, ""]:
    return values.sum() / max(len(values), 1)  # no row: 0, and a gradient of zeros


def _check_rows(name: str, rows: Tensor, student: Tensor, teacher: Tensor | None = None) -> None:
    if rows.dtype != torch.bool or rows.shape != student.shape[:2]:
        wanted, got = tuple(student.shape[:2]), f"{rows.dtype} {tuple(rows.shape)}"
        raise ValueError(f"{name} must be bool of shape {wanted}, got {got}")
    if teacher is not None and teacher.shape != student.shape:
        raise ValueError(f"teacher has shape {tuple(teacher.shape)}, student {tuple(student.shape)}: must be equal")


def masked_word_loss(
    student_logits: Float[Tensor, "batch length vocab"],
    targets: Int[Tensor, "batch length"],
    chosen: Bool[Tensor, "batch length"],
) -> Float[Tensor, ""]:
    """L_mlm, the cross-entropy (nats) of the word that stood there, mean over the chosen tokens."""
    _check_rows("chosen", chosen, student_logits)
    log_words = student_logits[chosen].log_softmax(-1)
    return _mean_of_rows(-log_words.gather(-1, targets[chosen].long()[:, None])[:, 0])


def cosine_loss(
    student_hidden: Float[Tensor, "batch length d_model"],
    teacher_hidden: Float[Tensor, "batch length d_model"],
    rows: Bool[Tensor, "batch length"],
) -> Float[Tensor, ""]:
    """L_cos, 1 - cos(student, teacher) in [0, 2], mean over the tokens where `rows` is True; lengths do not matter."""
    _check_rows("rows", rows, student_hidden, teacher_hidden)
    return _mean_of_rows(1 - F.cosine_similarity(student_hidden[rows], teacher_hidden.detach()[rows], dim=-1))


class TripleLoss(NamedTuple):
    soft_targets: Float[Tensor, ""]  # L_ce
    masked_words: Float[Tensor, ""]  # L_mlm
    cosine: Float[Tensor, ""]  # L_cos

    def weighted(self, soft_targets: float = 5.0, masked_words: float = 2.0, cosine: float = 1.0) -> Float[Tensor, ""]:
        """The weighted sum; the weights are those of the released command."""
        return soft_targets * self.soft_targets + masked_words * self.masked_words + cosine * self.cosine


def _logits_and_hidden(model: MaskedLanguageModel, token_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `model(token_ids, mask)` gives, and the last hidden states that it was made from."""
    last = model.encoder(token_ids, mask).last
    return model.words(last), last


def triple_loss(
    student: MaskedLanguageModel,
    teacher: MaskedLanguageModel,
    masked: MaskedTokens,
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    *,
    temperature: float = 2.0,
    soft_rows: Literal["real", "masked"] = "real",
) -> TripleLoss:
    """The three losses of one batch; both models read the same masked tokens. Padding counts nowhere.

    The teacher is put into evaluation mode (its dropout would be noise in the targets) and gets no gradient.

    Args:
        soft_rows: where L_ce is taken: at all "real" tokens (as released), or at the "masked" ones only.

    Raises:
        ValueError: another word for `soft_rows`, models of different width or vocabulary, a temperature <= 0.
    """
    if soft_rows not in ("real", "masked"):
        raise ValueError(f"soft_rows must be 'real' or 'masked', got {soft_rows!r}")
    teacher.eval()
    with torch.no_grad():
        teacher_logits, teacher_hidden = _logits_and_hidden(teacher, masked.token_ids, key_padding_mask)
    logits, hidden = _logits_and_hidden(student, masked.token_ids, key_padding_mask)
    real = torch.ones_like(masked.chosen) if key_padding_mask is None else key_padding_mask
    return TripleLoss(
        soft_divergence(logits, teacher_logits, temperature, real if soft_rows == "real" else masked.chosen),
        masked_word_loss(logits, masked.targets, masked.chosen),
        cosine_loss(hidden, teacher_hidden, real),
    )
