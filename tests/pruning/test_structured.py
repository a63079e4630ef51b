"""Removing equals zeroing; transformers' own slices of a layer; the files of models with layers of any size."""

import copy
import dataclasses

import pytest
import torch
from transformers.pytorch_utils import prune_linear_layer

from effnlp_lessons.heads import MaskedLanguageModel, SentenceClassifier
from effnlp_lessons.measure import bytes_on_disk, count_macs, count_parameters
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.pruning.structured import (
    blocks_of,
    load_shrunken,
    remove_heads,
    remove_layers,
    remove_neurons,
    save_shrunken,
    zero_heads,
    zero_neurons,
)
from effnlp_lessons.quantization.dynamic_int8 import with_dynamic_int8
from effnlp_lessons.transformer import Decoder, Encoder, TransformerConfig

CONFIG = TransformerConfig(vocab_size=50, max_length=16, d_model=20, layers=3, heads=5, d_ff=14, dropout=0.0)
HEADS = {0: [4], 2: [0, 1, 3]}  # uneven; layer 1 keeps all
NEURONS = {0: list(range(13)), 1: [13, 0, 5, 0]}  # one left; out of order, twice


def lively(model, seed=3):
    """Biases and norms that are not 0 and 1, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make(config=CONFIG, classes=3):
    return lively(SentenceClassifier(Encoder(config, seed=1), classes, seed=1))


@pytest.fixture
def model():
    return make()


@pytest.fixture
def batch():
    ids = torch.randint(0, 50, (4, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(11) < torch.tensor([11, 3, 1, 7])[:, None]
    return ids, mask


def outputs(model, batch):
    with torch.no_grad():
        found = model(*batch)
        encoded = model.encoder(*batch) if hasattr(model, "encoder") else found
    return [found, *encoded.hidden] if hasattr(encoded, "hidden") else [found.logits]


def assert_same(one, two, batch, tolerance=1e-6):
    for a, b in zip(outputs(one, batch), outputs(two, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------ removing equals zeroing


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_removing_equals_zeroing(activation, norm_first, batch):
    model = make(dataclasses.replace(CONFIG, activation=activation, norm_first=norm_first)).double()
    before = copy.deepcopy(model.state_dict())
    for remove, zero, chosen in ((remove_heads, zero_heads, HEADS), (remove_neurons, zero_neurons, NEURONS)):
        removed, zeroed = remove(model, chosen), zero(model, chosen)
        assert_same(removed, zeroed, batch, 1e-12)
        assert (outputs(removed, batch)[0] - outputs(model, batch)[0]).abs().max() > 1e-3  # and it is no copy
        assert count_parameters(zeroed) == count_parameters(model) > count_parameters(removed)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_removing_equals_zeroing_in_the_teacher():
    """float32, and one head, one neuron, many of both in another layer."""
    teacher = load_teacher()
    ids = torch.randint(1_000, 30_000, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = ids, torch.arange(40) < torch.tensor([40, 23])[:, None]
    heads, neurons = {0: [11], 3: range(11)}, {1: [0], 5: range(1_535)}
    removed = remove_neurons(remove_heads(teacher, heads), neurons)
    zeroed = zero_neurons(zero_heads(teacher, heads), neurons)
    # relative to hidden states of up to 10, the order of the sums differs
    assert max(hidden.abs().max().item() for hidden in outputs(teacher, batch)) < 20
    assert_same(removed, zeroed, batch, 1e-5)
    logits = [outputs(m, batch)[0] for m in (removed, zeroed)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)


def test_a_decoder_with_its_state(batch):
    config = dataclasses.replace(CONFIG, norm_first=True, segments=0, pooler=False)
    model = lively(Decoder(config, seed=2)).double()
    removed = remove_neurons(remove_heads(model, HEADS), NEURONS)
    assert_same(removed, zero_neurons(zero_heads(model, HEADS), NEURONS), (batch[0],), 1e-12)
    with torch.no_grad():
        whole = removed(batch[0]).logits
        first = removed(batch[0][:, :4])
        rest = removed(batch[0][:, 4:], state=first.state).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=0, atol=1e-12)


def test_the_bias_of_a_neuron_leaks_where_only_rows_are_zeroed(model, batch):
    """GELU(b) W2 stays. The error is that constant: the same vector for every token, before the norm."""
    neurons = {1: [2, 3]}
    half = copy.deepcopy(model)
    expand, contract = half.encoder.blocks[1].channel_mixer.expand, half.encoder.blocks[1].channel_mixer.contract
    with torch.no_grad():
        expand.weight[[2, 3]] = 0.0
    right = zero_neurons(model, neurons)
    assert (outputs(half, batch)[0] - outputs(right, batch)[0]).abs().max() > 1e-2
    x = torch.randn(7, 20)
    with torch.no_grad():
        difference = half.encoder.blocks[1].channel_mixer(x) - right.encoder.blocks[1].channel_mixer(x)
        leak = contract.weight[:, [2, 3]] @ torch.nn.functional.gelu(expand.bias[[2, 3]])
    torch.testing.assert_close(difference, leak.expand(7, -1), rtol=0, atol=1e-5)
    assert leak.abs().max() > 1e-2
    # with the bias at 0 the rows are enough
    with torch.no_grad():
        expand.bias[[2, 3]] = 0.0
    assert_same(half, right, batch)


def test_zeroed_is_what_is_named_and_no_more(model):
    zeroed = zero_neurons(zero_heads(model, HEADS), NEURONS)
    for layer in range(3):
        heads, neurons = HEADS.get(layer, []), sorted(set(NEURONS.get(layer, [])))
        channels = [4 * h + i for h in heads for i in range(4)]
        was, now = (m.encoder.blocks[layer] for m in (model, zeroed))
        for name, gone, axis in (
            *((f"token_mixer.{part}", channels, 0) for part in ("query", "key", "value")),
            ("token_mixer.output", channels, 1),
            ("channel_mixer.expand", neurons, 0),
            ("channel_mixer.contract", neurons, 1),
        ):
            expected = was.get_submodule(name).weight.detach().clone()
            expected.index_fill_(axis, torch.tensor(gone, dtype=torch.long), 0.0)
            assert torch.equal(now.get_submodule(name).weight, expected), (layer, name)
            bias = was.get_submodule(name).bias.detach().clone()
            if axis == 0:
                bias[gone] = 0.0
            assert torch.equal(now.get_submodule(name).bias, bias)


# ------------------------------------------------------------------------ independent references


def test_the_slices_are_those_of_transformers(model):
    removed = remove_neurons(remove_heads(model, HEADS), NEURONS)
    for layer in range(3):
        was, now = (m.encoder.blocks[layer] for m in (model, removed))
        heads = [h for h in range(5) if h not in HEADS.get(layer, [])]
        channels = torch.arange(20).view(5, 4)[heads].flatten()
        neurons = torch.tensor([n for n in range(14) if n not in NEURONS.get(layer, [])])
        for name, kept, dim in (
            *((f"token_mixer.{part}", channels, 0) for part in ("query", "key", "value")),
            ("token_mixer.output", channels, 1),
            ("channel_mixer.expand", neurons, 0),
            ("channel_mixer.contract", neurons, 1),
        ):
            theirs = prune_linear_layer(copy.deepcopy(was.get_submodule(name)), kept, dim)
            ours = now.get_submodule(name)
            assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
            assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features)
            assert ours.weight.is_contiguous()
        assert now.token_mixer.heads == len(heads)


def test_removed_heads_are_heads_silenced_by_hooks(model, batch):
    """Another way: what each head has mixed is set to 0 on its way to Wo."""
    silenced = copy.deepcopy(model)
    for layer, heads in HEADS.items():

        def silence(module, inputs, heads=tuple(heads)):
            mixed = inputs[0].unflatten(-1, (5, 4)).clone()
            mixed[..., list(heads), :] = 0.0
            return (mixed.flatten(-2),)

        silenced.encoder.blocks[layer].token_mixer.output.register_forward_pre_hook(silence)
    assert_same(remove_heads(model, HEADS), silenced, batch, 1e-5)  # hidden states of up to 10


def test_the_scale_of_the_scores_stays_that_of_d_head(model, batch):
    """The scores of the heads that stay in the first layer do not change: they are divided by sqrt(d_head)."""
    removed = remove_heads(model, {0: [0, 2]})
    with torch.no_grad():
        was, now = (m.encoder(*batch, return_scores=True).scores[0] for m in (model, removed))
    torch.testing.assert_close(now, was[:, [1, 3, 4]], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------ sizes


def test_half_of_the_teachers_heads_and_neurons_are_half_of_its_matrices():
    teacher = load_teacher()
    half = remove_neurons(
        remove_heads(teacher, {i: range(6) for i in range(6)}), {i: range(0, 1_536, 2) for i in range(6)}
    )
    ids = torch.ones(1, 128, dtype=torch.long)
    was, now = (count_macs(m, ids).by_part() for m in (teacher, half))
    for part in ("attention projections", "attention scores and mixing", "feed-forward"):
        assert 2 * now[part] == was[part]
    assert was["pooler"] == now["pooler"]
    matrices = 6 * (4 * 384 * 384 + 2 * 384 * 1_536)
    biases = 6 * (3 * 192 + 768)
    assert count_parameters(teacher) - count_parameters(half) == matrices // 2 + biases
    assert bytes_on_disk(teacher) - bytes_on_disk(half) == pytest.approx(2 * matrices + 4 * biases, abs=200)


def test_layers_that_are_removed_are_left_out(model, batch):
    removed = remove_layers(model, [1])
    with torch.no_grad():
        x = model.encoder.embeddings(batch[0])
        for i in (0, 2):
            x = model.encoder.blocks[i](x, batch[1])[0]
        assert torch.equal(removed.encoder(*batch).last, x)
    assert removed.encoder.config.layers == 2 and model.encoder.config.layers == 3
    assert removed.encoder.embeddings.config == removed.encoder.config
    assert len(remove_layers(model, []).encoder.blocks) == 3
    none = remove_layers(model, range(3))
    assert len(outputs(none, batch)) == 2  # logits, and the embeddings as the only hidden state


def test_shrinking_in_steps_is_shrinking_at_once(model, batch):
    twice = remove_heads(remove_heads(model, {0: [1]}), {0: [2]})  # the old 3
    assert_same(twice, remove_heads(model, {0: [1, 3]}), batch)
    assert_same(
        remove_heads(remove_layers(model, [0]), {0: [4]}), remove_layers(remove_heads(model, {1: [4]}), [0]), batch
    )


def test_what_is_frozen_stays_frozen_and_all_modes_stay(model):
    model.encoder.blocks[0].requires_grad_(False)
    removed = remove_neurons(remove_heads(model, {0: [0], 1: [0]}), {0: [0], 1: [0]})
    for layer, wanted in ((0, False), (1, True)):
        assert all(p.requires_grad == wanted for p in removed.encoder.blocks[layer].parameters())
    assert not any(m.training for m in removed.modules())
    assert all(m.training for m in remove_heads(model.train(), {0: [0]}).modules())


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("function", [remove_heads, zero_heads, remove_neurons, zero_neurons])
def test_bad_choices(function, model):
    what, count = ("head", 5) if "heads" in function.__name__ else ("neuron", 14)
    for chosen, words in (
        ({3: [0]}, "layer must be in 0 .. 2, got 3"),
        ({-1: [0]}, "layer must be in"),
        ({1: [count]}, f"{what}s of layer 1 must be in 0 .. {count - 1}"),
        ({1: [-1, 0]}, f"{what}s of layer 1 must be in"),
        ({2: range(count)}, f"layer 2 would have no {what} left: remove the layer, or keep one"),
    ):
        with pytest.raises(ValueError, match=words):
            function(model, chosen)
    assert torch.equal(function(model, {0: []}).state_dict()["head.weight"], model.head.weight)


def test_bad_models(model):
    with pytest.raises(ValueError, match="layers must be in 0 .. 2, got"):
        remove_layers(model, [0, 3])
    with pytest.raises(ValueError, match="one list of blocks, got 0"):
        blocks_of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="one list of blocks, got 2"):
        blocks_of(torch.nn.ModuleList([model, copy.deepcopy(model)]))
    with pytest.raises(ValueError, match="prune before quantizing"):
        remove_heads(with_dynamic_int8(model), {0: [0]})
    other = Encoder(CONFIG, channel_mixer=lambda config, layer: torch.nn.Linear(20, 20))
    with pytest.raises(ValueError, match="layer 0 must have SelfAttention and FeedForward"):
        remove_neurons(other, {0: [0]})


# ------------------------------------------------------------------------ files


@pytest.mark.parametrize("kind", ["classifier", "encoder", "bare encoder", "norm first"])
def test_a_shrunken_model_comes_back_from_its_file(kind, model, batch, tmp_path):
    if kind == "bare encoder":
        model = lively(Encoder(dataclasses.replace(CONFIG, pooler=False, segments=0)))
    elif kind == "norm first":
        model = make(dataclasses.replace(CONFIG, norm_first=True, activation="relu", norm_eps=1e-3), classes=2)
    elif kind == "encoder":
        model = model.encoder
    shrunken = remove_layers(remove_neurons(remove_heads(model, HEADS), NEURONS), [1])
    file = tmp_path / "small.safetensors"
    assert save_shrunken(shrunken, file) == file.stat().st_size
    loaded = load_shrunken(file)
    assert type(loaded) is type(model) and not loaded.training
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {
        n: t.shape for n, t in shrunken.state_dict().items()
    }
    with torch.no_grad():
        one, two = (m(*batch) for m in (shrunken, loaded))
    pairs = zip(one.hidden, two.hidden, strict=True) if kind in ("encoder", "bare encoder") else [(one, two)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    again = remove_heads(loaded, {0: [0]})  # it can be pruned further
    assert [block.token_mixer.heads for block in blocks_of(again)] == [3, 2]


def test_the_file_of_a_pruned_model_is_as_much_smaller(model, tmp_path):
    was, now = (
        save_shrunken(m, tmp_path / f"{i}.safetensors")
        for i, m in enumerate((model, remove_neurons(model, {i: range(7) for i in range(3)})))
    )
    assert was - now == pytest.approx(4 * 3 * 7 * (20 + 1 + 20), abs=100)  # the header differs a little


def test_files_that_are_none(model, tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_shrunken(file)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_shrunken(file)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not written by save_shrunken: its format is None"):
        load_shrunken(file)
    with pytest.raises(ValueError, match="model must be an Encoder or a SentenceClassifier, got MaskedLanguageModel"):
        save_shrunken(MaskedLanguageModel(model.encoder), file)
