"""Importance against finite differences of the gates and against a dL/da; the choice of the least important."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from effnlp_lessons.classification import ReviewExamples
from effnlp_lessons.datasets import reviews
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.pruning.importance import Importance, importance, least_important, normalised, shrink
from effnlp_lessons.pruning.structured import remove_heads, remove_layers, remove_neurons, zero_heads
from effnlp_lessons.transformer import Encoder, TransformerConfig

CONFIG = TransformerConfig(vocab_size=50, max_length=16, d_model=20, layers=3, heads=5, d_ff=14, dropout=0.0)


@pytest.fixture
def model():
    model = SentenceClassifier(Encoder(CONFIG, seed=1), 3, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


def batch_of(size, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (size, length), generator=generator)
    real = torch.randint(1, length + 1, (size,), generator=generator)
    return ids, torch.arange(length) < real[:, None], torch.randint(0, 3, (size,), generator=generator)


BATCHES = [batch_of(4, 11, 0), batch_of(1, 5, 1), batch_of(3, 1, 2)]


def turned(model, batch, layer, kind, index, gate):
    """The losses of a batch with one gate turned, without any of the module's hooks."""
    block = model.encoder.blocks[layer]
    if kind == "layer":

        def turn(module, inputs, output):
            return (gate * output[0] + (1 - gate) * inputs[0], *output[1:])

        handle = block.register_forward_hook(turn)
    else:
        width = 4 if kind == "head" else 1
        linear = block.token_mixer.output if kind == "head" else block.channel_mixer.contract

        def turn(module, inputs):
            x = inputs[0].clone()
            x[..., index * width : (index + 1) * width] *= gate
            return (x,)

        handle = linear.register_forward_pre_hook(turn)
    try:
        with torch.no_grad():
            return F.cross_entropy(model(*batch[:2]), batch[2], reduction="none")
    finally:
        handle.remove()


def test_importance_is_the_mean_size_of_the_slope_at_every_gate(model):
    found, eps = importance(model, BATCHES), 1e-5
    assert [len(values) for values in found.heads] == [5] * 3 and [len(v) for v in found.neurons] == [14] * 3
    for layer in range(3):
        for kind, count, values in (
            ("head", 5, found.heads[layer]),
            ("neuron", 14, found.neurons[layer]),
            ("layer", 1, found.layers[layer : layer + 1]),
        ):
            for index in range(count):
                slopes = [
                    (turned(model, b, layer, kind, index, 1 + eps) - turned(model, b, layer, kind, index, 1 - eps))
                    / (2 * eps)
                    for b in BATCHES
                ]
                expected = torch.cat(slopes).abs().mean()
                torch.testing.assert_close(values[index], expected, rtol=1e-6, atol=1e-8)


def test_importance_is_the_size_of_a_times_its_gradient(model):
    """The other side of the equation, by hooks that keep gradients; one sentence at a time."""
    sums = {(layer, kind): 0.0 for layer in range(3) for kind in ("heads", "neurons")}
    for ids, mask, labels in BATCHES:
        for i in range(len(ids)):
            kept = {}

            def keep(module, inputs, name, kept=kept):
                inputs[0].retain_grad()
                kept[name] = inputs[0]

            handles = []
            for layer, block in enumerate(model.encoder.blocks):
                for kind, linear in (("heads", block.token_mixer.output), ("neurons", block.channel_mixer.contract)):
                    hook = lambda module, inputs, name=(layer, kind), keep=keep: keep(module, inputs, name)  # noqa: E731
                    handles.append(linear.register_forward_pre_hook(hook))
            F.cross_entropy(model(ids[i : i + 1], mask[i : i + 1]), labels[i : i + 1]).backward()
            for handle in handles:
                handle.remove()
            for (layer, kind), a in kept.items():
                product = (a * a.grad)[0].detach()  # (length, channels)
                per = product.unflatten(-1, (5, 4)).sum((0, 2)) if kind == "heads" else product.sum(0)
                sums[layer, kind] = sums[layer, kind] + per.abs() / 8
    model.zero_grad()
    found = importance(model, BATCHES)
    for (layer, kind), expected in sums.items():
        torch.testing.assert_close(getattr(found, kind)[layer], expected, rtol=1e-10, atol=1e-14)


def test_batches_do_not_matter_and_the_model_is_left_alone(model):
    model.encoder.blocks[1].requires_grad_(False)
    found = importance(model, BATCHES)
    one_by_one = [tuple(part[i : i + 1] for part in batch) for batch in BATCHES for i in range(len(batch[0]))]
    again = importance(model, iter(one_by_one))
    torch.testing.assert_close(again.layers, found.layers, rtol=1e-10, atol=0)
    for kind in ("heads", "neurons"):
        for a, b in zip(getattr(found, kind), getattr(again, kind), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        ungated = importance(model, BATCHES)  # it needs gradients and switches them on
    assert torch.equal(ungated.layers, found.layers)


def test_a_head_that_does_nothing_has_no_importance_and_a_shrunken_layer_its_own_number(model):
    found = importance(zero_heads(model, {1: [2]}), BATCHES)
    assert found.heads[1][2] == 0 and (found.heads[1] > 0).sum() == 4
    smaller = remove_neurons(remove_heads(model, {0: [1]}), {2: [0, 1]})
    found = importance(smaller, BATCHES)
    assert [len(values) for values in found.heads] == [4, 5, 5] and [len(v) for v in found.neurons] == [14, 14, 12]


def test_the_importance_of_the_teacher():
    teacher, data = load_teacher(), ReviewExamples(reviews.load_reviews().subset("train"), 8)
    found = importance(teacher, [data.batch(list(range(8)))])
    assert found.layers.shape == (6,) and all(len(v) == 12 for v in found.heads)
    for values in (*found.heads, *found.neurons):
        assert torch.isfinite(values).all() and (values >= 0).all() and values.max() > 0
    for values in (*found.normalised_heads, *found.normalised_neurons):
        assert values.norm() == pytest.approx(1)


def test_losses_of_ones_own(model):
    """Twice the loss is twice the importance; a mean over the batch is refused."""

    def twice(model, batch):
        return 2 * F.cross_entropy(model(*batch[:2]), batch[2], reduction="none")

    torch.testing.assert_close(importance(model, BATCHES, twice).layers, 2 * importance(model, BATCHES).layers)
    with pytest.raises(ValueError, match=r"losses must be one a sentence, \(4,\), got \(\)"):
        importance(model, BATCHES, lambda model, batch: twice(model, batch).mean())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_input(model):
    with pytest.raises(ValueError, match="batches must hold at least one sentence"):
        importance(model, [])
    with pytest.raises(ValueError, match="at least one block"):
        importance(remove_layers(model, range(3)), BATCHES)
    with pytest.raises(ValueError, match="evaluation mode"):
        importance(model.train(), BATCHES)


# ------------------------------------------------------------------------ the choice


def test_the_least_important_of_each_layer_and_of_all():
    scores = [torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.1, 0.1, 0.3, 0.2])]
    assert least_important(scores, [1, 2]) == {0: [1], 1: [0, 1]}
    assert least_important(scores, [0, 3]) == {0: [], 1: [0, 1, 3]}  # not the largest, 2
    assert least_important(scores, 2) == {0: [], 1: [0, 1]}
    assert least_important(scores, 4) == {0: [1], 1: [0, 1, 3]}  # layer 1 keeps its best
    assert least_important(scores, 5) == {0: [1, 2], 1: [0, 1, 3]}
    assert least_important(scores, 0) == {0: [], 1: []}
    for count in (6, -1):
        with pytest.raises(ValueError, match="count must be in 0 .. 5"):
            least_important(scores, count)
    for counts in ([1], [3, 0], [0, -1]):
        with pytest.raises(ValueError, match="one for each of 2 layers and leave each at least one"):
            least_important(scores, counts)


def test_the_norm_of_a_layer_makes_layers_comparable():
    big, small = 100 * torch.tensor([1.0, 5.0, 5.0]), torch.tensor([3.0, 4.0, 4.0])
    assert least_important([big, small], 2) == {0: [], 1: [0, 1]}
    assert least_important([normalised(big), normalised(small)], 1) == {0: [0], 1: []}
    assert torch.equal(normalised(torch.zeros(3)), torch.zeros(3))


def test_shrink_keeps_the_most_important(model):
    generator = torch.Generator().manual_seed(0)
    found = Importance(
        tuple(torch.rand(5, generator=generator) for _ in range(3)),
        tuple(torch.rand(14, generator=generator) for _ in range(3)),
        torch.rand(3, generator=generator),
    )
    small = shrink(model, found, 2, [14, 1, 7])
    for layer, (block, was) in enumerate(zip(small.encoder.blocks, model.encoder.blocks, strict=True)):
        heads = sorted(sorted(range(5), key=lambda h, s=found.heads[layer]: -s[h])[:2])
        assert torch.equal(
            block.token_mixer.value.weight, was.token_mixer.value.weight.view(5, 4, 20)[heads].flatten(0, 1)
        )
        n = [14, 1, 7][layer]
        neurons = sorted(sorted(range(14), key=lambda i, s=found.neurons[layer]: -s[i])[:n])
        assert torch.equal(block.channel_mixer.contract.weight, was.channel_mixer.contract.weight[:, neurons])
    for heads, neurons, name in ((0, 7, "heads"), (6, 7, "heads"), (2, 0, "neurons"), (2, [1, 2], "neurons")):
        with pytest.raises(ValueError, match=f"{name} must be in 1 .. {5 if name == 'heads' else 14} for each of 3"):
            shrink(model, found, heads, neurons)


def test_important_heads_matter_more_than_unimportant_ones():
    """On the teacher: without the half that counts least the loss grows less than without the half that counts most."""
    teacher, data = load_teacher(), ReviewExamples(reviews.load_reviews().subset("train"), 128)
    batches = [data.batch(list(range(i, i + 32))) for i in range(0, 128, 32)]
    found = importance(teacher, batches[:2])
    least = least_important(found.normalised_heads, [6] * 6)
    most = {layer: sorted(set(range(12)) - set(heads)) for layer, heads in least.items()}

    def loss(model):
        with torch.no_grad():
            return sum(F.cross_entropy(model(*batch[:2]), batch[2]).item() for batch in batches[2:])

    assert loss(teacher) < loss(remove_heads(teacher, least)) < loss(remove_heads(teacher, most))


def test_dropout_does_not_matter_in_evaluation():
    model = SentenceClassifier(Encoder(dataclasses.replace(CONFIG, dropout=0.5), seed=1), 3, seed=1).eval()
    one, two = (importance(model, BATCHES) for _ in range(2))
    assert torch.equal(one.layers, two.layers)
