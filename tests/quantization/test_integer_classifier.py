"""The classifier on integers: guarded, indifferent to padding and batching, and close to the real model."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn

from effnlp_lessons.classification import ReviewExamples, logits_of
from effnlp_lessons.datasets import reviews
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.measure import bytes_on_disk, count_macs
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.quantization import integer_classifier
from effnlp_lessons.quantization.float_guard import FloatInIntegerPath, no_floats
from effnlp_lessons.quantization.integer_classifier import (
    FINE,
    IntegerBlock,
    IntegerClassifier,
    IntegerEmbeddings,
    activation_ranges,
    int8_grid,
    integer_linear,
    narrow,
)
from effnlp_lessons.quantization.integer_only import IntegerLinear
from effnlp_lessons.quantization.ranges import percentile
from effnlp_lessons.transformer import Encoder, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=50, max_length=21, d_model=24, layers=2, heads=3, d_ff=40, segments=2, norm_eps=1e-5
)


def random_model(config=CONFIG, seed=0) -> SentenceClassifier:
    """A small classifier whose numbers are not all near 0, norms included."""
    model, generator = SentenceClassifier(Encoder(config), classes=3), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
            parameter.normal_(0.0, spread, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(1.0)
    return model.eval()


def random_batch(rows=5, length=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[0] = length
    return torch.randint(0, 50, (rows, length), generator=generator), torch.arange(length) < lengths[:, None]


def build(model, seed=7) -> IntegerClassifier:
    return IntegerClassifier.from_float(model, [random_batch(40, 21, seed + i) for i in range(3)])


def relative_error(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def small():
    model = random_model()
    return model, build(model)


# ------------------------------------------------------------------------------------------------ integers


def test_from_ids_to_logits_there_is_no_float(small):
    model, integer = small
    ids, mask = random_batch()
    with no_floats():
        logits = integer.integer_logits(ids, mask)
        without_mask = integer.integer_logits(ids.to(torch.int32))
    assert logits.dtype == torch.int32 and logits.shape == (5, 3)
    assert torch.equal(without_mask, integer.integer_logits(ids, torch.ones_like(mask)))
    real = integer(ids, mask)
    assert real.dtype == torch.float32
    assert torch.equal(real.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(real, (logits * integer.output_scale).float())


@pytest.mark.parametrize("part", ["gelu", "softmax", "token_norm"])
def test_the_guard_fires_when_one_operation_turns_to_floats(part):
    integer, (ids, mask) = build(random_model()), random_batch()
    block = integer.blocks[1]
    owner = {"gelu": block.channel_mixer, "softmax": block.token_mixer, "token_norm": block}[part]

    class Cheat(nn.Module):
        def __init__(self, honest):
            super().__init__()
            self.honest = honest

        def forward(self, q, *rest):
            return self.honest((q.float() * 1.0).to(torch.int32), *rest)

    before = integer.integer_logits(ids, mask)
    setattr(owner, part, Cheat(getattr(owner, part)))
    assert torch.equal(integer.integer_logits(ids, mask), before)  # the same numbers, and yet
    with no_floats(), pytest.raises(FloatInIntegerPath, match="float32"):
        integer.integer_logits(ids, mask)


def test_the_state_is_integers_and_one_file_holds_all(small, tmp_path):
    model, integer = small
    assert not list(integer.parameters())
    floats = {name for name, value in integer.state_dict().items() if value.is_floating_point()}
    assert all(name.endswith(("input_scale", "output_scale")) for name in floats)
    save_model(integer, str(tmp_path / "model.safetensors"))
    other = build(random_model(seed=1), seed=30)  # other weights, other ranges
    ids, mask = random_batch()
    expected = integer.integer_logits(ids, mask)
    assert not torch.equal(other.integer_logits(ids, mask), expected)
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other.integer_logits(ids, mask), expected)
    assert torch.equal(other(ids, mask), integer(ids, mask))


def test_as_many_products_as_the_real_model(small):
    model, integer = small
    ids, mask = random_batch()
    assert count_macs(integer, ids, mask).total == count_macs(model, ids, mask).total


# ---------------------------------------------------------------------------------- padding, batches, shapes


def test_padding_changes_no_bit(small):
    _, integer = small
    ids, mask = random_batch(length=13)
    longer = F.pad(ids, (0, 6), value=17)  # not [PAD]: what stands there must not matter
    assert torch.equal(
        integer.integer_logits(ids, mask), integer.integer_logits(longer, F.pad(mask, (0, 6), value=False))
    )


def test_a_sentence_alone_and_in_a_batch_and_in_parts(small, monkeypatch):
    _, integer = small
    ids, mask = random_batch(rows=7)
    together = integer.integer_logits(ids, mask)
    alone = [integer.integer_logits(ids[i : i + 1, mask[i]]) for i in range(7)]
    assert torch.equal(together, torch.cat(alone))
    for tokens in (1, 30, 10_000):
        monkeypatch.setattr(integer_classifier, "TOKENS_AT_ONCE", tokens)
        assert torch.equal(together, integer.integer_logits(ids, mask))


@pytest.mark.parametrize("length", [1, 2, 17, 21])
def test_any_length(small, length):
    model, integer = small
    ids, _ = random_batch(3, length, seed=length)
    # logits of size 1 from 24 channels: int8 moves them by 0.04 or so, the polynomials by a tenth of that
    assert (integer(ids) - model(ids)).abs().max() < 0.1


def test_a_row_that_is_all_padding_harms_nobody(small):
    _, integer = small
    ids, mask = random_batch()
    mask[3] = False
    with no_floats():
        found = integer.integer_logits(ids, mask)
    others = [0, 1, 2, 4]
    assert torch.equal(found[others], integer.integer_logits(ids[others], mask[others]))


def test_a_model_without_segments_and_with_extreme_inputs():
    model = random_model(TransformerConfig(**(CONFIG.__dict__ | {"segments": 0, "layers": 1})))
    integer = build(model)
    with torch.no_grad():  # ten times what was calibrated: clamped, not wrapped around
        model.encoder.embeddings.norm.weight.mul_(10)
    other = IntegerClassifier(model, activation_ranges(random_model(model.encoder.config), [random_batch(40, 21)]))
    ids, mask = random_batch()
    for candidate in (integer, other):
        assert candidate(ids, mask).isfinite().all()
    assert (other(ids, mask) - model(ids, mask)).abs().max() < 5 * model(ids, mask).abs().max()


# -------------------------------------------------------------------------------------------------- closeness


def test_a_linear_layer_is_jacobs_up_to_its_second_rounding():
    """Ours rounds once, `IntegerLinear` twice: a code apart at most, and seldom."""
    generator = torch.Generator().manual_seed(0)
    linear = random_model().encoder.blocks[0].channel_mixer.expand
    grid, output = int8_grid((-3.0, 2.0)), int8_grid((-1.5, 2.5), symmetric=False)
    codes = torch.randint(-127, 128, (4, 9, 24), generator=generator, dtype=torch.int8)
    ours = integer_linear(linear, grid, output)(codes)
    theirs = IntegerLinear.build(linear.weight, linear.bias, grid, output)(codes)
    apart = (ours.int() - theirs.int()).abs()
    assert ours.dtype == torch.int8 and apart.max() <= 1 and apart.float().mean() < 0.15
    real = output.quantize(F.linear(grid.dequantize(codes), linear.weight.double(), linear.bias.double()))
    # weights are rounded to 127 levels: 24 of them, each off by up to half a level
    assert (ours.int() - real.int()).abs().max() <= 2


def test_the_table_is_tanh_of_every_code(small):
    """What the head reads is tanh of what the pooler gives, to half a code of 1 / 127."""
    _, integer = small
    pooler, seen = integer.pooler[1], {}
    handles = [
        pooler.register_forward_hook(lambda module, _, output: seen.update(before=output)),
        integer.head.register_forward_pre_hook(lambda module, inputs: seen.update(after=inputs[0])),
    ]
    integer.integer_logits(*random_batch(rows=7))
    for handle in handles:
        handle.remove()
    assert seen["before"].unique().numel() > 50
    exact = torch.tanh(pooler.dequantize(seen["before"]))
    assert (seen["after"] / 127 - exact).abs().max() <= 0.5 / 127 + 1e-9


def test_narrow_rounds_to_the_grid():
    fine = torch.tensor([0, 127, 128, -128, -129, 32_512, 40_000, -40_000], dtype=torch.int32)
    assert narrow(fine).tolist() == [0, 0, 1, 0, -1, 127, 127, -127]


def test_ranges_count_real_tokens_only_and_grow_with_batches():
    model, (ids, mask) = random_model(), random_batch()
    mask &= torch.arange(13) < 2  # most tokens are padding, and the smallest number is among them
    found = activation_ranges(model, [(ids, mask)])
    outputs = []
    handle = model.encoder.blocks[0].channel_mixer.expand.register_forward_hook(lambda *call: outputs.append(call[2]))
    with torch.no_grad():
        model(ids, mask)
    handle.remove()
    real = outputs[0][mask]
    assert outputs[0].min() < real.min() - 1
    assert found["encoder.blocks.0.channel_mixer.expand.output"] == (real.min().item(), real.max().item())
    more = activation_ranges(model, [(ids, mask), random_batch(seed=1)])
    assert all(more[key][0] <= low and high <= more[key][1] for key, (low, high) in found.items())
    clipped = activation_ranges(model, [(ids, mask)], percentile(0.9))
    key = "encoder.embeddings.norm.output"
    assert found[key][0] < clipped[key][0] and clipped[key][1] < found[key][1]
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="batch"):
        activation_ranges(model, [])


@pytest.fixture(scope="module")
def teacher():
    """The teacher, its ranges on 64 sentences, and 160 others."""
    model, data = load_teacher(), reviews.load_reviews()
    train = ReviewExamples(data.subset("train"), limit=64)
    ranges = activation_ranges(model, [train.batch(list(range(i, i + 16))) for i in range(0, 64, 16)])
    return model, ranges, ReviewExamples(data.subset("test"), limit=160)


def test_every_layer_alone_is_close_to_the_real_one(teacher):
    model, ranges, examples = teacher
    ids, mask, _ = examples.batch(list(range(12)))
    with torch.inference_mode():
        hidden = model.encoder(ids, mask).hidden
        grid = int8_grid(ranges["encoder.embeddings.norm.output"])
        embeddings = IntegerEmbeddings(model.encoder.embeddings, grid.scale.item() / FINE)
        found = embeddings(ids) * (grid.scale / FINE)
        assert relative_error(found[mask], hidden[0][mask]) < 0.03  # int8 tables, one scale each
        for i, block in enumerate(model.encoder.blocks):
            below = f"encoder.blocks.{i}."
            own = {key.removeprefix(below): value for key, value in ranges.items() if key.startswith(below)}
            integer = IntegerBlock(block, grid, own)
            codes = torch.round(hidden[i] / grid.scale * FINE).to(torch.int32)
            with no_floats():
                out = integer(codes, mask)
            error = relative_error((out * (integer.grid.scale / FINE))[mask], hidden[i + 1][mask])
            # int8 in every product, and norms whose largest number is 28 times their deviation
            assert error < 0.12, i
            grid = integer.grid


def test_the_teacher_on_integers(teacher):
    model, ranges, examples = teacher
    integer = IntegerClassifier(model, ranges)
    expected, found = logits_of(model, examples.token_ids), logits_of(integer, examples.token_ids)
    agreement = (expected.argmax(-1) == found.argmax(-1)).double().mean()
    assert agreement > 0.95  # 0.97 on all 2,000 test sentences: see the study
    assert relative_error(found, expected) < 0.2
    ids, mask, _ = examples.batch(list(range(9)))
    with torch.inference_mode(), no_floats():
        integer.integer_logits(ids, mask)
    assert bytes_on_disk(model) / bytes_on_disk(integer) > 3.8


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("change", [{"norm_first": True}, {"activation": "gelu_tanh"}, {"activation": "relu"}])
def test_other_architectures_are_refused(change):
    model = random_model(TransformerConfig(**(CONFIG.__dict__ | change)))
    with pytest.raises(ValueError, match="block must have|norm"):
        build(model)


def test_other_attention_is_refused():
    encoder = Encoder(CONFIG, attention=lambda q, k, v, mask: v)
    with pytest.raises(ValueError, match="dense attention"):
        build(SentenceClassifier(encoder, classes=2).eval())


def test_bad_ids_are_refused(small):
    _, integer = small
    ids, mask = random_batch()
    for wrong, message in ((ids.float(), "integers"), (ids[0], "batch, length"), (torch.zeros(1, 22).long(), "length")):
        with pytest.raises(ValueError, match=message):
            integer(wrong)
    with pytest.raises(ValueError, match="key_padding_mask"):
        integer(ids, mask[:, :-1])


def test_score_scale_is_that_of_attention(small):
    _, integer = small
    attention = integer.blocks[0].token_mixer
    scales = [getattr(attention, name)[1].output_scale.item() for name in ("query", "key")]
    # q_ln2 of the softmax is floor(ln 2 / S)
    assert attention.softmax.exp.q_ln2.item() == math.floor(math.log(2) / (scales[0] * scales[1] / math.sqrt(8)))
