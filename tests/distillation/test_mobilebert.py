"""MobileBERT and IB-BERT: transformers' class, published sizes, the trigram, what flows where in a block."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import MobileBertConfig as TheirConfig
from transformers import MobileBertForMaskedLM as TheirMaskedLM
from transformers import MobileBertModel as TheirModel

from effnlp_lessons.distillation.mobilebert import (
    IB_BERT_LARGE,
    MOBILEBERT,
    MOBILEBERT_TINY,
    BottleneckBlock,
    MobileBert,
    MobileBertMaskedLM,
    NoNorm,
    TrigramEmbeddings,
    rename_mobilebert_state,
    trigrams,
)
from effnlp_lessons.measure import count_macs, count_parameters

# d_head 4, a power of 4: 1 / sqrt(d_head) has no rounding error
SMALL = replace(MOBILEBERT, vocab_size=50, max_length=24, d_embedding=8, d_model=24, d_bottleneck=16, layers=3, d_ff=20)
TINY = replace(SMALL, feed_forwards=2, attention_input="bottleneck")
INVERTED = replace(
    SMALL, d_bottleneck=48, d_ff=56, feed_forwards=1, attention_input="block", activation="gelu", norm="layer_norm",
    dropout=0.1,
)  # fmt: skip


def padded_batch(lengths=(9, 5, 1), vocab=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids * mask, mask


def shaken(model, seed=0):
    """Random values in every parameter, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def their_config(config):
    return TheirConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, intermediate_size=config.d_ff, hidden_act=config.activation,
        max_position_embeddings=config.max_length, embedding_size=config.d_embedding,
        intra_bottleneck_size=config.d_bottleneck, num_feedforward_networks=config.feed_forwards,
        use_bottleneck_attention=config.attention_input == "bottleneck",
        key_query_shared_bottleneck=config.attention_input == "shared",
        normalization_type=config.norm, classifier_activation=config.pooler, attn_implementation="eager",
    )  # fmt: skip


def assert_same_maps(ours, theirs, tolerance=0.0):
    """Compares every map, at padded positions too: both models compute the same numbers everywhere."""
    assert len(ours.hidden) == len(theirs.hidden_states)
    for a, b in zip(ours.hidden, theirs.hidden_states, strict=True):
        assert (a - b).abs().max() <= tolerance


# ---------------------------------------------------------------------------------- transformers' class


@pytest.mark.parametrize("config", [SMALL, TINY, replace(SMALL, feed_forwards=1), replace(SMALL, pooler=True)])
def test_every_map_is_that_of_transformers(config):
    theirs = shaken(TheirModel(their_config(config)))
    ours = MobileBert(config).eval()
    ours.load_state_dict(rename_mobilebert_state(theirs.state_dict()))
    ids, mask = padded_batch()
    segments = (torch.arange(ids.shape[1]) > 3).long().expand_as(ids)
    with torch.no_grad():
        wanted = theirs(ids, mask, segments, output_hidden_states=True, output_attentions=True)
        got = ours(ids, mask, segments, return_scores=True)
    assert_same_maps(got, wanted)
    for scores, weights in zip(got.scores, wanted.attentions, strict=True):
        raw = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        torch.testing.assert_close(raw.softmax(-1), weights, rtol=0, atol=1e-6)
    if config.pooler:
        assert torch.equal(got.pooled, wanted.pooler_output)
    else:
        assert got.pooled is None and torch.equal(got.last[:, 0], wanted.pooler_output)


def test_published_widths_agree_with_transformers():
    config = replace(MOBILEBERT, vocab_size=300, layers=2)
    torch.manual_seed(0)
    theirs = TheirModel(their_config(config)).eval()
    ours = MobileBert(config).eval()
    ours.load_state_dict(rename_mobilebert_state(theirs.state_dict()))
    ids, mask = padded_batch((17, 6), vocab=300)
    with torch.no_grad():
        got, wanted = ours(ids, mask), theirs(ids, mask, output_hidden_states=True)
    # d_head 32: they multiply by 32 ** -0.5, we divide by sqrt(32), which rounds differently
    assert_same_maps(got, wanted, tolerance=1e-6)


def test_layer_norm_variant_agrees_with_transformers():
    """The student without operational optimizations. Two of transformers' norms keep torch's eps, 1e-5."""
    config = replace(SMALL, norm="layer_norm", activation="gelu")
    theirs = shaken(TheirModel(their_config(config)))
    ours = MobileBert(config).eval()
    ours.load_state_dict(rename_mobilebert_state(theirs.state_dict()))
    ours.embeddings.norm.eps = 1e-5
    for block in ours.blocks:
        block.channel_mixer[-1].contract.norm.eps = 1e-5
    ids, mask = padded_batch()
    with torch.no_grad():
        assert_same_maps(ours(ids, mask), theirs(ids, mask, output_hidden_states=True))


def test_inverted_bottleneck_agrees_with_transformers_repaired():
    """transformers makes IB-BERT's query and key as wide as the bottleneck, and fails: give it the right ones."""
    theirs = TheirModel(their_config(INVERTED))
    for layer in theirs.encoder.layer:
        layer.attention.self.query = nn.Linear(INVERTED.d_model, INVERTED.d_bottleneck)
        layer.attention.self.key = nn.Linear(INVERTED.d_model, INVERTED.d_bottleneck)
    shaken(theirs)
    ours = MobileBert(INVERTED).eval()
    ours.load_state_dict(rename_mobilebert_state(theirs.state_dict()))
    ours.embeddings.norm.eps = 1e-5
    for block in ours.blocks:
        block.channel_mixer[-1].contract.norm.eps = 1e-5
    ids, mask = padded_batch()
    with torch.no_grad():
        # d_head 12: see test_published_widths_agree_with_transformers
        assert_same_maps(ours(ids, mask), theirs(ids, mask, output_hidden_states=True), tolerance=1e-5)


def test_masked_word_head_agrees_with_transformers():
    theirs = shaken(TheirMaskedLM(their_config(SMALL)))
    ours = MobileBertMaskedLM(MobileBert(SMALL)).eval()
    ours.load_state_dict(rename_mobilebert_state(theirs.state_dict()))
    ids, mask = padded_batch()
    with torch.no_grad():
        logits, wanted = ours(ids, mask), theirs(ids, mask).logits
    # two products added up here, one over the joined matrix there; logits up to about 10
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_head_reads_the_tied_table_and_the_free_matrix():
    model = shaken(MobileBertMaskedLM(MobileBert(SMALL)))
    hidden = torch.randn(4, SMALL.d_model, generator=torch.Generator().manual_seed(1))
    x = model.norm(F.relu(model.transform(hidden)))
    table = torch.cat([model.encoder.embeddings.tokens.weight, model.extra.weight], dim=1)
    assert table.shape == (SMALL.vocab_size, SMALL.d_model)
    torch.testing.assert_close(model.logits(hidden), x @ table.T + model.bias)


# --------------------------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("config", "total", "block"),
    [
        (MOBILEBERT, 24_581_888, 842_240),
        (MOBILEBERT_TINY, 15_485_696, 463_232),
        (IB_BERT_LARGE, 294_205_184, 12_076_544),
        (replace(MOBILEBERT, pooler=True), 24_844_544, 842_240),
    ],
)
def test_published_sizes(config, total, block):
    with torch.device("meta"):
        model = MobileBert(config)
    assert count_parameters(model) == total
    assert {count_parameters(one) for one in model.blocks} == {block} and len(model.blocks) == 24


def test_head_adds_the_free_matrix():
    with torch.device("meta"):
        model = MobileBertMaskedLM(MobileBert(MOBILEBERT))
    transform_norm_bias = 512 * 512 + 512 + 2 * 512 + 30_522
    assert count_parameters(model.extra) == 30_522 * 384 == 11_720_448
    assert count_parameters(model) == 24_581_888 + transform_norm_bias + 11_720_448


def test_flops_at_length_128():
    """5.39 billion FLOPs at 128 tokens, 1 MAC = 2 FLOPs (the paper prints 5.7)."""
    with torch.device("meta"):
        model, ids = MobileBert(MOBILEBERT).eval(), torch.zeros(1, 128, dtype=torch.long)
    inner = 128 * (2 * 512 * 128 + 3 * 128 * 128 + 512 * 128 + 4 * 2 * 128 * 512 + 128 * 512)
    products = 24 * (inner + 2 * 128 * 128 * 128) + 128 * 384 * 512
    assert count_macs(model, ids).total == products
    assert round(2 * products / 1e9, 2) == 5.39


def test_teacher_and_student_can_be_compared_map_by_map():
    ids, mask = padded_batch((7, 4), vocab=300)
    outputs = []
    for config in (MOBILEBERT, IB_BERT_LARGE):
        model = MobileBert(replace(config, vocab_size=300, layers=1)).eval()
        with torch.no_grad():
            outputs.append(model(ids, mask, return_scores=True))
    for output in outputs:
        assert [tuple(x.shape) for x in output.hidden] == [(2, 7, 512)] * 2
        assert [tuple(x.shape) for x in output.scores] == [(2, 4, 7, 7)]


# ------------------------------------------------------------------------------------------- the trigram


@pytest.mark.parametrize("length", [1, 2, 7])
def test_trigrams_are_next_current_previous(length):
    x = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(0))
    got = trigrams(x)
    for text in range(2):
        for t in range(length):
            following = x[text, t + 1] if t + 1 < length else torch.zeros(3)
            previous = x[text, t - 1] if t else torch.zeros(3)
            assert torch.equal(got[text, t], torch.cat([following, x[text, t], previous]))


def test_linear_on_trigrams_is_a_convolution():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 7, 3, generator=generator), torch.randn(5, 9, generator=generator)
    following, current, previous = weight.split(3, dim=1)  # each (5, 3)
    kernel = torch.stack([previous, current, following], dim=-1)
    wanted = F.conv1d(x.transpose(1, 2), kernel, padding=1).transpose(1, 2)
    torch.testing.assert_close(F.linear(trigrams(x), weight), wanted)


# ---------------------------------------------------------------------------------- what flows in a block


@pytest.mark.parametrize("attention_input", ["shared", "bottleneck", "block"])
def test_a_block_is_the_equations(attention_input):
    """Written out with plain matrices: inputs of q, k, v, residuals, number of feed-forwards."""
    config = replace(SMALL, attention_input=attention_input, feed_forwards=3)
    block = shaken(BottleneckBlock(config))
    x = torch.randn(2, 5, config.d_model, generator=torch.Generator().manual_seed(1))
    w = block.state_dict()

    def normed(name, y, residual=0.0):
        y = y @ w[f"{name}.linear.weight"].T + w[f"{name}.linear.bias"] + residual
        return y * w[f"{name}.norm.weight"] + w[f"{name}.norm.bias"]

    u = normed("bottleneck", x)
    if attention_input == "shared":
        inputs = {"query": normed("shared_bottleneck", x), "key": normed("shared_bottleneck", x), "value": x}
    else:
        inputs = dict.fromkeys(("query", "key", "value"), u if attention_input == "bottleneck" else x)
    q, k, v = (y @ w[f"token_mixer.{n}.weight"].T + w[f"token_mixer.{n}.bias"] for n, y in inputs.items())
    heads, scores = [], []
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        scores.append(q[..., part] @ k[..., part].transpose(1, 2) / 2)
        heads.append(scores[-1].softmax(-1) @ v[..., part])
    a = normed("token_mixer.output", torch.cat(heads, -1), u)
    for i in range(3):
        name = f"channel_mixer.{i}"
        middle = (a @ w[f"{name}.expand.weight"].T + w[f"{name}.expand.bias"]).clamp(min=0)
        a = normed(f"{name}.contract", middle, a)
    y, raw = block(x)
    torch.testing.assert_close(y, normed("output_bottleneck", a, x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(raw, torch.stack(scores, 1), rtol=1e-5, atol=1e-4)


def test_no_norm_scales_and_shifts():
    norm = NoNorm(3)
    h = torch.tensor([[1.0, 2.0, 30.0]])
    assert torch.equal(norm(h), h)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 0.0, -1.0]))
        norm.bias.copy_(torch.tensor([1.0, 5.0, 0.5]))
    assert torch.equal(norm(h), torch.tensor([[3.0, 5.0, -29.5]]))


# ------------------------------------------------------------------------------------------- the encoder


def test_padding_reaches_real_tokens_by_the_trigram_alone():
    model = shaken(MobileBert(SMALL))
    ids, mask = padded_batch((9, 5))
    other = ids.clone()
    other[1, 6:] = 7  # all padding but the one next to the last real token
    neighbour = ids.clone()
    neighbour[1, 5] = 7
    with torch.no_grad():
        first, second, third = (model(x, mask).last for x in (ids, other, neighbour))
    assert torch.equal(first[mask], second[mask])
    assert not torch.equal(first[1, :5], third[1, :5])


def test_stopping_early_gives_the_same_maps():
    model = shaken(MobileBert(replace(SMALL, pooler=True)))
    ids, mask = padded_batch()
    whole, part = model(ids, mask, return_scores=True), model(ids, mask, return_scores=True, blocks=2)
    assert len(part.hidden) == 3 and len(part.scores) == 2 and part.pooled is None and whole.pooled is not None
    assert all(torch.equal(a, b) for a, b in zip(part.hidden, whole.hidden, strict=False))
    assert torch.equal(part.last, whole.hidden[2])
    assert model(ids, mask).scores is None


def test_a_text_without_any_token_gives_no_nan():
    model = shaken(MobileBert(SMALL))
    ids, mask = padded_batch((4, 4))
    mask[1] = False
    assert model(ids, mask).last.isfinite().all()


def test_the_seed_alone_decides_the_weights():
    models = []
    with torch.random.fork_rng():
        for of_torch, ours in ((1, 1), (2, 1), (1, 2)):
            torch.manual_seed(of_torch)
            models.append(MobileBertMaskedLM(MobileBert(SMALL, seed=ours), seed=ours))
    first, second, third = models
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
        if name.endswith(("tokens.weight", "query.weight", "extra.weight", "transform.weight")):
            assert not torch.equal(tensor, third.state_dict()[name])
            assert 0.015 < tensor.std() < 0.025


def test_dropout_acts_in_training_only():
    ids, mask = padded_batch()
    for config in (replace(SMALL, attention_dropout=0.5), replace(SMALL, dropout=0.5, attention_dropout=0.0)):
        model = shaken(MobileBert(config))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            assert torch.equal(model(ids, mask).last, model(ids, mask).last)
            model.train()
            assert not torch.equal(model(ids, mask).last, model(ids, mask).last)
    for part, x in ((BottleneckBlock, torch.ones(3, 9, 24)), (TrigramEmbeddings, ids)):  # each on its own
        module = part(replace(SMALL, dropout=0.5, attention_dropout=0.0)).train()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            first, second = (module(x)[0] for _ in range(2))
        assert not torch.equal(first, second)
    quiet = shaken(MobileBert(replace(SMALL, dropout=0.0, attention_dropout=0.0)))
    assert torch.equal(quiet(ids, mask).last, quiet.train()(ids, mask).last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads must divide d_bottleneck"),
        ({"d_embedding": 24}, "d_embedding must be below d_model"),
        ({"attention_input": "values"}, "attention_input must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"norm": "none"}, "norm must be one of"),
        ({"feed_forwards": 0}, "feed_forwards must be an integer >= 1, got 0"),
        ({"d_ff": 2.5}, "d_ff must be an integer"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"attention_dropout": -0.1}, "attention_dropout must be in"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_ids": torch.ones(5, dtype=torch.long)}, "token_ids must be integers of shape"),
        ({"token_ids": torch.ones(1, 5)}, "token_ids must be integers"),
        ({"token_ids": torch.ones(1, 25, dtype=torch.long)}, "1 to 24 tokens a text, got 25"),
        ({"token_ids": torch.ones(1, 0, dtype=torch.long)}, "1 to 24 tokens a text, got 0"),
        ({"key_padding_mask": torch.ones(1, 5)}, "key_padding_mask must be bool"),
        ({"key_padding_mask": torch.ones(1, 4, dtype=torch.bool)}, "key_padding_mask must have shape"),
        ({"blocks": 4}, "blocks must be from 0 to 3, got 4"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MobileBert(SMALL)(**({"token_ids": torch.ones(1, 5, dtype=torch.long)} | arguments))
