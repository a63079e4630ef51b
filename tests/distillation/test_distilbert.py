"""DistilBERT's start, masking and losses against transformers' classes, torch's losses and statistics of the masks."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM, DistilBertModel

from effnlp_lessons.distillation.distilbert import (
    MASK_ID,
    SPECIAL_IDS,
    MaskedTokens,
    TripleLoss,
    alternate_layers,
    cosine_loss,
    count_tokens,
    mask_tokens,
    masked_language_student,
    masked_word_loss,
    student_config,
    student_from_teacher,
    triple_loss,
)
from effnlp_lessons.heads import MaskedLanguageModel
from effnlp_lessons.measure import count_parameters
from effnlp_lessons.pretrained import rename_bert_state
from effnlp_lessons.training import TrainingPlan, train
from effnlp_lessons.transformer import BERT_BASE, Encoder, FeedForward, TransformerConfig

VOCAB = 120
RELEASED = (0, 2, 4, 7, 9, 11)
TEACHER = TransformerConfig(
    vocab_size=VOCAB, max_length=24, d_model=16, layers=12, heads=4, d_ff=40, pooler=False, dropout=0.3
)


def shaken(module, seed=0, scale=0.3):
    """All parameters random, also biases and norms, which otherwise begin alike everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def teacher_model(seed=0, **changes):
    model = MaskedLanguageModel(Encoder(TransformerConfig(**vars(TEACHER) | changes), seed=seed))
    return shaken(model, seed).eval()


def padded_batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(104, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids * mask, mask


# ------------------------------------------------------------------------------------------ the student


def test_which_layers():
    assert alternate_layers(12, 6) == RELEASED
    assert alternate_layers(12, 12) == tuple(range(12)) and alternate_layers(12, 1) == (0,)
    assert alternate_layers(6, 3) == (0, 2, 5) and alternate_layers(6, 2) == (0, 5)
    for teacher in range(1, 30):
        for student in range(2, teacher + 1):
            layers = alternate_layers(teacher, student)
            even = [i * (teacher - 1) / (student - 1) for i in range(student)]
            assert len(layers) == student and list(layers) == sorted(set(layers))
            assert (layers[0], layers[-1]) == (0, teacher - 1)
            assert max(abs(a - b) for a, b in zip(layers, even, strict=True)) <= 0.5
    for wrong in (0, 13):
        with pytest.raises(ValueError, match=f"student_layers must be in 1 .. 12 .*, got {wrong}"):
            alternate_layers(12, wrong)


@pytest.mark.parametrize("layers", [None, 6, RELEASED, (1, 3)])
def test_student_equals_the_truncated_teacher(layers):
    """The reference is the teacher itself, its other blocks taken out and its segment table zeroed."""
    teacher = teacher_model().encoder
    student = student_from_teacher(teacher, layers)
    teacher.embeddings.segments.weight.data.zero_()
    kept = RELEASED if layers in (None, 6) else layers
    teacher.blocks = nn.ModuleList(teacher.blocks[i] for i in kept)
    ids, mask = padded_batch([9, 5, 1])
    with torch.no_grad():
        ours, theirs = student(ids, mask), teacher(ids, mask)
    assert len(ours.hidden) == len(kept) + 1 and ours.pooled is None
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden, theirs.hidden, strict=True))
    assert student.config == student_config(teacher.config, len(kept))


def transformers_pair():
    """A BERT with zero token types, and the DistilBERT that the released script makes of it, names written out."""
    sizes = {"vocab_size": VOCAB, "attn_implementation": "eager", "max_position_embeddings": 24}
    bert = BertForMaskedLM(
        BertConfig(hidden_size=16, num_hidden_layers=12, num_attention_heads=4, intermediate_size=40, **sizes)
    )
    shaken(bert, 5)
    bert.bert.embeddings.token_type_embeddings.weight.data.zero_()
    theirs = bert.state_dict()
    names = {"attention.self.query": "attention.q_lin", "attention.self.key": "attention.k_lin"}
    names |= {"attention.self.value": "attention.v_lin", "attention.output.dense": "attention.out_lin"}
    names |= {"attention.output.LayerNorm": "sa_layer_norm", "intermediate.dense": "ffn.lin1"}
    names |= {"output.dense": "ffn.lin2", "output.LayerNorm": "output_layer_norm"}
    state = {}
    for part in ("word_embeddings.weight", "position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias"):
        state[f"distilbert.embeddings.{part}"] = theirs[f"bert.embeddings.{part}"]
    for part in ("weight", "bias"):
        for i, layer in enumerate(RELEASED):
            for a, b in names.items():
                state[f"distilbert.transformer.layer.{i}.{b}.{part}"] = theirs[f"bert.encoder.layer.{layer}.{a}.{part}"]
        state[f"vocab_transform.{part}"] = theirs[f"cls.predictions.transform.dense.{part}"]
        state[f"vocab_layer_norm.{part}"] = theirs[f"cls.predictions.transform.LayerNorm.{part}"]
        state[f"vocab_projector.{part}"] = theirs[f"cls.predictions.decoder.{part}"]
    distilbert = DistilBertForMaskedLM(DistilBertConfig(dim=16, n_layers=6, n_heads=4, hidden_dim=40, **sizes))
    distilbert.load_state_dict(state)
    return bert.eval(), distilbert.eval()


def ours_from_bert(bert):
    """Our masked language model with the weights of transformers' BERT."""
    model, state = MaskedLanguageModel(Encoder(TEACHER)).eval(), bert.state_dict()
    model.encoder.load_state_dict(
        rename_bert_state({n.removeprefix("bert."): t for n, t in state.items() if n.startswith("bert.")})
    )
    head = "cls.predictions.transform."
    model.transform.load_state_dict({n: state[f"{head}dense.{n}"] for n in ("weight", "bias")})
    model.norm.load_state_dict({n: state[f"{head}LayerNorm.{n}"] for n in ("weight", "bias")})
    model.bias.data.copy_(state["cls.predictions.bias"])
    return model


def test_student_equals_transformers_distilbert_exactly():
    """Difference 0: the same operations in the same order; sqrt(d_head) = 2 divides without rounding."""
    bert, theirs = transformers_pair()
    assert isinstance(theirs.distilbert, DistilBertModel)
    teacher = ours_from_bert(bert)
    student = masked_language_student(teacher, copy_transform=True)
    ids, mask = padded_batch([13, 6, 2])
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long(), output_hidden_states=True)
        hidden = student.encoder(ids, mask).hidden
        for mine, other in zip(hidden, expected.hidden_states, strict=True):
            assert torch.equal(mine[mask], other[mask])
        assert torch.equal(student(ids, mask)[mask], expected.logits[mask])
        assert not torch.allclose(teacher(ids, mask)[mask], expected.logits[mask], atol=0.1)


def test_what_becomes_of_the_segment_vector():
    """Added to the positions the student is the truncated teacher, segments and all; dropped it is not."""
    teacher = teacher_model().encoder.double()
    kept = student_from_teacher(teacher, segments="add to positions")
    dropped = student_from_teacher(teacher)
    teacher.blocks = nn.ModuleList(teacher.blocks[i] for i in RELEASED)
    ids, mask = padded_batch([9, 5])
    with torch.no_grad():
        expected = teacher(ids, mask).last[mask]
        # tokens + (positions + segment) against (tokens + positions) + segment: the last bit of a float64
        torch.testing.assert_close(kept(ids, mask).last[mask], expected, atol=1e-12, rtol=0)
        assert not torch.allclose(dropped(ids, mask).last[mask], expected, atol=1e-2)
    without = teacher_model(segments=0).encoder
    same = student_from_teacher(without, segments="add to positions")
    assert torch.equal(same.embeddings.positions.weight, without.embeddings.positions.weight)


def test_student_shares_no_memory_and_can_be_trained():
    teacher = teacher_model().requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    student = masked_language_student(teacher, copy_transform=True)
    assert all(parameter.requires_grad for parameter in student.parameters()) and not student.training
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    frozen = student_from_teacher(teacher.encoder.train(), freeze_positions=True)
    assert frozen.training and not frozen.embeddings.positions.weight.requires_grad
    assert frozen.embeddings.tokens.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_head_is_tied_its_bias_copied_and_its_transform_only_on_demand():
    teacher, state = teacher_model(), torch.random.get_rng_state()
    first, again, other = (masked_language_student(teacher, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.bias, teacher.bias)
    assert torch.equal(first.transform.weight, again.transform.weight)
    assert not torch.equal(first.transform.weight, other.transform.weight)
    assert first.norm.weight.eq(1).all() and not first.transform.bias.any()
    copied = masked_language_student(teacher, copy_transform=True)
    assert torch.equal(copied.transform.weight, teacher.transform.weight)
    assert torch.equal(copied.norm.bias, teacher.norm.bias)


def test_a_teacher_with_other_mixers_keeps_them():
    class Half(FeedForward):
        def forward(self, x, key_padding_mask=None):
            return super().forward(x) / 2

    config = TransformerConfig(**vars(TEACHER) | {"segments": 0, "norm_first": True})
    teacher = shaken(Encoder(config, channel_mixer=lambda config, layer: Half(config))).eval()
    student = student_from_teacher(teacher, 4)
    teacher.blocks = nn.ModuleList(teacher.blocks[i] for i in alternate_layers(12, 4))
    ids, mask = padded_batch([7, 3])
    assert torch.equal(student(ids, mask).last, teacher(ids, mask).last)


def test_parameter_counts():
    with torch.device("meta"):
        teacher = MaskedLanguageModel(Encoder(BERT_BASE))
        assert count_parameters(student_from_teacher(teacher.encoder)) == 66_362_880
        assert count_parameters(DistilBertModel(DistilBertConfig())) == 66_362_880
        student = masked_language_student(teacher)
        assert count_parameters(student) == 66_985_530


@pytest.mark.parametrize("layers", [(), (0, 12), (2, 1), (1, 1), (-1, 3)])
def test_bad_layers_are_named(layers):
    with pytest.raises(ValueError, match=r"layers must be increasing numbers in 0 .. 11, got \("):
        student_from_teacher(teacher_model().encoder, layers)


# -------------------------------------------------------------------------------------- dynamic masking


def sentences(count, length, seed=0):
    """[CLS] words [SEP] [PAD] [PAD], and an [UNK] in every second sentence."""
    ids = torch.randint(104, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -3], ids[:, -2:] = 101, 102, 0
    ids[::2, 3] = 100
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -2:] = False
    return ids, mask


def test_share_is_of_the_whole_batch_and_special_tokens_stay():
    for seed, (count, length) in enumerate([(1, 9), (3, 17), (40, 23)]):
        ids, mask = sentences(count, length)
        masked = mask_tokens(ids, mask, torch.Generator().manual_seed(seed), vocab_size=VOCAB)
        assert int(masked.chosen.sum()) == math.ceil(0.15 * count * (length - 2))
        assert not torch.isin(ids[masked.chosen], torch.tensor(SPECIAL_IDS)).any()
        assert torch.equal(masked.token_ids[~masked.chosen], ids[~masked.chosen])
        assert torch.equal(masked.targets, ids)
    # more is wanted than there is: everything but the special tokens
    everything = mask_tokens(ids, mask, torch.Generator(), vocab_size=VOCAB, share=1.0)
    assert torch.equal(everything.chosen, ~torch.isin(ids, torch.tensor(SPECIAL_IDS)))
    for nothing in (mask_tokens(ids, mask, torch.Generator(), vocab_size=VOCAB, share=0.0),
                    mask_tokens(ids, torch.zeros_like(mask), torch.Generator(), vocab_size=VOCAB)):  # fmt: skip
        assert not nothing.chosen.any() and torch.equal(nothing.token_ids, ids)


def test_mask_alone_keeps_padding_out():
    """Padding of another id than [PAD], which only the mask tells from words."""
    ids, mask = sentences(20, 12)
    ids[:, -2:] = 110
    masked = mask_tokens(ids, mask, torch.Generator().manual_seed(0), vocab_size=VOCAB, share=0.5)
    assert not masked.chosen[:, -2:].any()


def test_eighty_ten_ten():
    ids, mask = sentences(1000, 24)
    masked = mask_tokens(ids, mask, torch.Generator().manual_seed(0), vocab_size=VOCAB, share=0.5)
    new, old = masked.token_ids[masked.chosen], ids[masked.chosen]
    assert len(new) == 11_000
    hidden, other = new == MASK_ID, (new != MASK_ID) & (new != old)
    # four standard deviations of a share of 11,000: 0.8 -> 0.015, 0.1 -> 0.012; a random token is the old one or
    # [MASK] in 2 of 120 cases
    assert hidden.double().mean().item() == pytest.approx(0.8 + 0.1 / VOCAB, abs=0.015)
    assert other.double().mean().item() == pytest.approx(0.1 * (1 - 2 / VOCAB), abs=0.012)
    assert torch.unique(new[other]).numel() > 0.95 * VOCAB - 2  # from the whole vocabulary
    for actions, expected in [((1, 0, 0), MASK_ID), ((0, 1, 0), old)]:
        again = mask_tokens(ids, mask, torch.Generator().manual_seed(0), vocab_size=VOCAB, share=0.5, actions=actions)
        assert (again.token_ids[masked.chosen] == expected).all()


def test_rare_words_are_chosen_more_often_in_the_stated_proportion():
    """Two words alternate in a long text; each choice picks one of 4,000 tokens, so it is nearly with replacement."""
    ids = torch.tensor([110, 111]).repeat(1, 2000)
    counts = torch.ones(VOCAB, dtype=torch.int64)
    counts[110], counts[111] = 10_000, 100
    generator = torch.Generator().manual_seed(0)

    def share_of_rare(**options):
        masks = [mask_tokens(ids, None, generator, vocab_size=VOCAB, share=0.002, **options) for _ in range(400)]
        return sum((m.targets[m.chosen] == 111).double().mean().item() for m in masks) / 400

    weights = 10_000**-0.7, 100**-0.7
    # 400 x 8 choices: three standard deviations are 0.02 and 0.027
    assert share_of_rare(token_counts=counts) == pytest.approx(weights[1] / sum(weights), abs=0.02)
    assert share_of_rare() == pytest.approx(0.5, abs=0.027)
    assert share_of_rare(token_counts=counts, exponent=0.0) == pytest.approx(0.5, abs=0.027)
    counts[110], counts[111] = 10, 0  # a word that was never counted is taken as seen once
    assert share_of_rare(token_counts=counts) == pytest.approx(1 / (1 + 10**-0.7), abs=0.02)


def test_fresh_mask_each_call_and_the_seed_decides():
    ids, mask = sentences(8, 20)
    before = ids.clone()
    generator = torch.Generator().manual_seed(3)
    first, second = (mask_tokens(ids, mask, generator, vocab_size=VOCAB) for _ in range(2))
    again = mask_tokens(ids, mask, torch.Generator().manual_seed(3), vocab_size=VOCAB)
    assert not torch.equal(first.chosen, second.chosen) and torch.equal(ids, before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_token_counts():
    counts = count_tokens([[101, 105, 105, 102], [101, 110, 102], []], VOCAB)
    assert {i: int(n) for i, n in enumerate(counts) if n} == {101: 2, 102: 2, 105: 2, 110: 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, r"share must be in \[0, 1\], got 1.5"),
        ({"actions": (0.8, 0.1, 0.2)}, "actions must be three shares that sum to 1"),
        ({"actions": (1.1, 0.0, -0.1)}, "actions must be three shares that sum to 1"),
        ({"token_counts": torch.ones(5)}, r"token_counts must have shape \(120,\), got \(5,\)"),
        ({"vocab_size": 100}, "token_ids must be in 0 .. 99"),
    ],
)
def test_bad_masking_is_named(options, message):
    ids, mask = sentences(2, 9)
    with pytest.raises(ValueError, match=message):
        mask_tokens(ids, mask, torch.Generator(), **{"vocab_size": VOCAB} | options)
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        mask_tokens(ids, mask.long(), torch.Generator(), vocab_size=VOCAB)


# ------------------------------------------------------------------------------------------- the losses


@pytest.fixture(scope="module")
def case():
    """A teacher, another student of half its layers, a masked batch with padding; float64."""
    teacher, student = teacher_model(1).double(), masked_language_student(teacher_model(2).double(), seed=4)
    ids, mask = padded_batch([9, 4, 6])
    chosen = torch.zeros_like(mask)
    chosen[0, 2] = chosen[0, 7] = chosen[2, 5] = True
    hidden = ids.clone()
    hidden[chosen] = torch.tensor([MASK_ID, MASK_ID, 110])
    return teacher, student, MaskedTokens(hidden, ids, chosen), mask


def by_hand(logits, rows):
    """The rows that count, picked one by one."""
    return torch.stack([logits[i, j] for i, j in rows])


@pytest.mark.parametrize("soft_rows", ["real", "masked"])
@pytest.mark.parametrize("temperature", [2.0, 1.0])
def test_each_loss_equals_torchs_on_hand_picked_rows(case, soft_rows, temperature):
    teacher, student, masked, mask = case
    losses = triple_loss(student, teacher, masked, mask, temperature=temperature, soft_rows=soft_rows)
    real = [(0, j) for j in range(9)] + [(1, j) for j in range(4)] + [(2, j) for j in range(6)]
    hidden = [(0, 2), (0, 7), (2, 5)]
    ours, theirs = student(masked.token_ids, mask), teacher(masked.token_ids, mask)
    soft = [by_hand(x, real if soft_rows == "real" else hidden) / temperature for x in (ours, theirs)]
    expected = F.kl_div(soft[0].log_softmax(-1), soft[1].softmax(-1), reduction="batchmean") * temperature**2
    torch.testing.assert_close(losses.soft_targets, expected, atol=1e-12, rtol=0)
    expected = F.cross_entropy(by_hand(ours, hidden), by_hand(masked.targets, hidden))
    torch.testing.assert_close(losses.masked_words, expected, atol=1e-12, rtol=0)
    last = [by_hand(model.encoder(masked.token_ids, mask).last, real) for model in (student, teacher)]
    expected = F.cosine_embedding_loss(*last, torch.ones(len(real), dtype=torch.float64))
    torch.testing.assert_close(losses.cosine, expected, atol=1e-10, rtol=0)  # torch adds 1e-12 to the squares
    assert 0 < losses.cosine < 2 and losses.soft_targets > 0


def test_weighted_sum():
    losses = TripleLoss(*torch.tensor([1.0, 10.0, 100.0]))
    assert losses.weighted() == 5 + 20 + 100
    assert losses.weighted(soft_targets=0.5, masked_words=0.0, cosine=2.0) == 200.5


def test_padding_changes_nothing(case):
    teacher, student, masked, mask = case
    plain = triple_loss(student, teacher, masked, mask)
    wider = MaskedTokens(*(F.pad(x, (0, 5), value=0) for x in masked))
    wider.token_ids[~F.pad(mask, (0, 5))] = 117
    padded = triple_loss(student, teacher, wider, F.pad(mask, (0, 5)))
    torch.testing.assert_close(torch.stack(padded), torch.stack(plain), atol=1e-12, rtol=0)
    unmasked = MaskedTokens(*(x[:1] for x in masked))  # the first sentence fills its row: no mask is needed
    torch.testing.assert_close(
        torch.stack(triple_loss(student, teacher, unmasked)),
        torch.stack(triple_loss(student, teacher, unmasked, mask[:1])),
    )


def test_a_student_equal_to_its_teacher_has_only_the_masked_word_loss(case):
    teacher, _, masked, mask = case
    twin = copy.deepcopy(teacher)
    losses = triple_loss(twin, teacher, masked, mask)
    assert losses.soft_targets == 0 and losses.masked_words > 0
    torch.testing.assert_close(losses.cosine, torch.tensor(0.0, dtype=torch.float64), atol=1e-14, rtol=0)
    losses.soft_targets.backward()
    assert all(p.grad is None or not p.grad.any() for p in twin.parameters())


def test_teacher_gets_no_gradient_and_no_dropout(case):
    teacher, student, masked, mask = (copy.deepcopy(x) for x in case)
    expected = triple_loss(student.eval(), teacher, masked, mask)
    with_graph = []
    teacher.encoder.register_forward_hook(lambda module, inputs, output: with_graph.append(output.last.requires_grad))
    losses = triple_loss(student, teacher.train(), masked, mask)
    assert torch.equal(torch.stack(losses), torch.stack(expected)) and not teacher.training
    losses.weighted().backward()
    assert all(p.grad is None for p in teacher.parameters()) and with_graph == [False]
    assert all(p.grad.any() for p in student.parameters())
    hidden = torch.ones(1, 2, 3, requires_grad=True)
    assert not cosine_loss(torch.ones(1, 2, 3), hidden, torch.ones(1, 2, dtype=torch.bool)).requires_grad


def test_no_row_gives_zero_with_a_gradient():
    logits = torch.randn(2, 3, 7, requires_grad=True, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(2, 3, dtype=torch.bool)
    for loss in (
        masked_word_loss(logits, torch.zeros(2, 3, dtype=torch.long), none),
        cosine_loss(logits, logits, none),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and torch.equal(gradient, torch.zeros_like(logits))


def test_bad_losses_are_named(case):
    teacher, student, masked, mask = case
    with pytest.raises(ValueError, match="soft_rows must be 'real' or 'masked', got 'all'"):
        triple_loss(student, teacher, masked, mask, soft_rows="all")
    with pytest.raises(ValueError, match="segments must be 'drop' or 'add to positions', got 'keep'"):
        student_from_teacher(teacher.encoder, segments="keep")
    x, rows = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"rows must be bool of shape \(2, 3\)"):
        cosine_loss(x, x, rows.long())
    with pytest.raises(ValueError, match=r"chosen must be bool of shape \(2, 3\)"):
        masked_word_loss(x, torch.zeros(2, 3, dtype=torch.long), rows[:1])
    with pytest.raises(ValueError, match=r"teacher has shape \(2, 3, 5\), student \(2, 3, 4\)"):
        cosine_loss(x, torch.zeros(2, 3, 5), rows)


# ----------------------------------------------------------------------------------------------- training


class Sentences:
    def __init__(self, count):
        self.ids, self.mask = sentences(count, 12)
        self.lengths = [10] * count

    def batch(self, indices):
        return self.ids[indices], self.mask[indices]


def test_training_with_fresh_masks_falls_and_goes_on_exactly_where_it_stopped(tmp_path):
    teacher = teacher_model(layers=4)
    counts = torch.arange(VOCAB)

    def loss(student, batch):
        masked = mask_tokens(*batch, torch.default_generator, vocab_size=VOCAB, token_counts=counts)
        return triple_loss(student, teacher, masked, batch[1]).weighted()

    def run(**options):
        student = masked_language_student(teacher, 2)
        plan = TrainingPlan(epochs=6, batch_size=8, learning_rate=1e-2)
        return student, train(student, Sentences(40), loss, plan, progress=False, **options)

    def stop(model, step):
        if step == 17:
            raise KeyboardInterrupt

    whole, history = run()
    assert sum(history.loss[-5:]) < 0.8 * sum(history.loss[:5])
    file = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=file, checkpoint_every=5, after_step=stop)
    resumed, again = run(checkpoint=file)
    assert again.loss == history.loss
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
