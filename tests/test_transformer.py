"""The Transformer of the course against transformers' BERT and GPT-2, torch's SDPA, and its own promises."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from effnlp_lessons.datasets import reviews, sources, tokenizer
from effnlp_lessons.dense_attention import attention_scores, causal_mask, dense_attention, masked_softmax
from effnlp_lessons.heads import MaskedLanguageModel, SentenceClassifier, mean_pool, sentence_vectors
from effnlp_lessons.measure import count_parameters, transformer_parameters
from effnlp_lessons.pretrained import load_minilm, rename_bert_state
from effnlp_lessons.transformer import (
    BERT_BASE,
    BERT_LARGE,
    GPT2,
    MINILM_L6,
    Decoder,
    Encoder,
    SelfAttention,
    TransformerConfig,
)

SMALL = TransformerConfig(vocab_size=50, max_length=24, d_model=16, layers=2, heads=4, d_ff=40, dropout=0.3)
SMALL_DECODER = TransformerConfig(
    vocab_size=50, max_length=24, d_model=16, layers=2, heads=4, d_ff=40, segments=0, pooler=False,
    norm_first=True, activation="gelu_tanh", norm_eps=1e-5,
)  # fmt: skip


def padded_batch(lengths, vocab=30_522, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids * mask, mask


@pytest.fixture(scope="module")
def minilm():
    return load_minilm()


@pytest.fixture(scope="module")
def reference():
    folder = sources.path("minilm", "model.safetensors").parent
    return BertModel.from_pretrained(folder, attn_implementation="eager").eval()


# ------------------------------------------------------------------ the encoder against transformers


@pytest.mark.parametrize("lengths", [[1], [7], [31, 12, 1], [512, 500]])
def test_encoder_equals_bert_on_minilm_weights(minilm, reference, lengths):
    ids, mask = padded_batch(lengths)
    with torch.no_grad():
        ours, theirs = (
            minilm(ids, mask),
            reference(ids, attention_mask=mask.long(), output_hidden_states=True),
        )
    torch.testing.assert_close(ours.pooled, theirs.pooler_output, atol=1e-5, rtol=0)
    for mine, other in zip(ours.hidden, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine[mask], other[mask], atol=1e-5, rtol=0)


def test_segments_reach_the_embeddings(minilm, reference):
    ids, mask = padded_batch([9, 5])
    segments = (torch.arange(9) > 3).long().expand(2, 9)
    with torch.no_grad():
        ours = minilm(ids, mask, segments).pooled
        theirs = reference(ids, attention_mask=mask.long(), token_type_ids=segments).pooler_output
        assert not torch.allclose(ours, minilm(ids, mask).pooled, atol=1e-3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_raw_scores_equal_a_hooked_reference(minilm, reference):
    """transformers hands out weights after the softmax; the raw scores are rebuilt from hooked q and k.

    In float64: the scores are as large as 20, where float32 rounds at 1e-5.
    """
    minilm, reference = copy.deepcopy(minilm).double(), copy.deepcopy(reference).double()
    ids, mask = padded_batch([13, 6])
    seen = {}
    for i, layer in enumerate(reference.encoder.layer):
        for name in ("query", "key"):
            module = getattr(layer.attention.self, name)
            module.register_forward_hook(lambda m, a, out, key=(i, name): seen.__setitem__(key, out))
    with torch.no_grad():
        ours = minilm(ids, mask, return_scores=True).scores
        probabilities = reference(ids, attention_mask=mask.long(), output_attentions=True).attentions
    assert len(ours) == len(probabilities) == 6
    for i, scores in enumerate(ours):
        q, k = (seen[i, name].view(2, 13, 12, 32).permute(0, 2, 1, 3) for name in ("query", "key"))
        expected = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(32)
        torch.testing.assert_close(scores, expected, atol=1e-10, rtol=0)
        weights = scores.masked_fill(~mask[:, None, None, :], -math.inf).softmax(-1)
        torch.testing.assert_close(weights, probabilities[i], atol=1e-10, rtol=0)


def test_sentence_vectors_rank_the_same_neighbours(minilm, reference):
    texts = reviews.load_reviews().text[:150]
    ids, mask = tokenizer.pad(tokenizer.encode(texts))
    with torch.no_grad():
        ours = sentence_vectors(minilm, ids, mask)
        hidden = reference(ids, attention_mask=mask.long()).last_hidden_state
    theirs = F.normalize(torch.stack([h[m].mean(0) for h, m in zip(hidden, mask, strict=True)]), dim=-1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert torch.equal((ours @ ours.T).topk(10).indices, (theirs @ theirs.T).topk(10).indices)


def test_padding_changes_nothing(minilm):
    ids, mask = padded_batch([11, 4])
    with torch.no_grad():
        alone = minilm(ids[1:, :4], mask[1:, :4])
        together = minilm(ids, mask)
    torch.testing.assert_close(together.last[1:, :4], alone.last, atol=1e-5, rtol=0)


def test_masked_language_model_equals_bert():
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=24, attn_implementation="eager",
    )  # fmt: skip
    theirs = BertForMaskedLM(config).eval()
    nn.init.normal_(theirs.cls.predictions.bias)
    model = MaskedLanguageModel(Encoder(TransformerConfig(**vars(SMALL) | {"pooler": False}))).eval()
    state = theirs.state_dict()
    model.encoder.load_state_dict(
        rename_bert_state({n.removeprefix("bert."): t for n, t in state.items() if n.startswith("bert.")})
    )
    head = "cls.predictions.transform."
    model.transform.load_state_dict({n: state[f"{head}dense.{n}"] for n in ("weight", "bias")})
    model.norm.load_state_dict({n: state[f"{head}LayerNorm.{n}"] for n in ("weight", "bias")})
    with torch.no_grad():
        model.bias.copy_(state["cls.predictions.bias"])
        ids, mask = padded_batch([9, 5], vocab=50)
        expected = theirs(ids, attention_mask=mask.long()).logits
        torch.testing.assert_close(model(ids, mask)[mask], expected[mask], atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------- the decoder


def gpt2_pair():
    config = GPT2Config(
        vocab_size=50, n_positions=24, n_embd=16, n_layer=2, n_head=4, n_inner=40, attn_implementation="eager"
    )
    theirs = GPT2LMHeadModel(config).eval()
    state, ours = theirs.transformer.state_dict(), {}
    ours["embeddings.tokens.weight"], ours["embeddings.positions.weight"] = (
        state["wte.weight"],
        state["wpe.weight"],
    )
    for i in range(2):
        for part in ("weight", "bias"):
            q, k, v = state[f"h.{i}.attn.c_attn.{part}"].chunk(3, dim=-1)
            mixer = {"query": q, "key": k, "value": v, "output": state[f"h.{i}.attn.c_proj.{part}"]}
            ours |= {f"blocks.{i}.token_mixer.{name}.{part}": t if t.ndim == 1 else t.T for name, t in mixer.items()}
            ours[f"blocks.{i}.channel_mixer.expand.{part}"] = state[f"h.{i}.mlp.c_fc.{part}"]
            ours[f"blocks.{i}.channel_mixer.contract.{part}"] = state[f"h.{i}.mlp.c_proj.{part}"]
            ours[f"blocks.{i}.token_norm.{part}"] = state[f"h.{i}.ln_1.{part}"]
            ours[f"blocks.{i}.channel_norm.{part}"] = state[f"h.{i}.ln_2.{part}"]
    # GPT-2 keeps its linear layers as (inputs, outputs)
    ours = {name: t.T if "channel_mixer" in name and t.ndim == 2 else t for name, t in ours.items()}
    ours |= {f"last_norm.{part}": state[f"ln_f.{part}"] for part in ("weight", "bias")}
    decoder = Decoder(SMALL_DECODER)
    decoder.load_state_dict(ours)
    return decoder.eval(), theirs


def test_decoder_equals_gpt2():
    decoder, theirs = gpt2_pair()
    ids, _ = padded_batch([17, 17], vocab=50)
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("changed", [1, 7, 16])
def test_decoder_is_causal_by_intervention(norm_first, changed):
    """Other tokens from `changed` on must leave every earlier output as it was, bit for bit."""
    decoder = Decoder(TransformerConfig(**vars(SMALL_DECODER) | {"norm_first": norm_first}), seed=3).eval()
    ids, _ = padded_batch([17], vocab=50)
    other = ids.clone()
    other[:, changed:] = (other[:, changed:] + 1) % 50
    with torch.no_grad():
        before, after = decoder(ids).logits, decoder(other).logits
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


@pytest.mark.parametrize("cuts", [[1] * 11, [4, 7], [10, 1]])
def test_decoding_in_pieces_equals_decoding_at_once(cuts):
    decoder = Decoder(SMALL_DECODER, seed=1).eval()
    ids, _ = padded_batch([11, 11], vocab=50)
    with torch.no_grad():
        pieces, state = [], None
        for piece in ids.split(cuts, dim=1):
            logits, state = decoder(piece, state=state)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, 1), decoder(ids).logits, atol=1e-5, rtol=0)
    assert state.position == 11


# ------------------------------------------------------------------------------------ dense attention


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)),
    causal=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60)
def test_dense_attention_equals_sdpa(shape, causal, padded, seed):
    batch, heads, queries, keys, d_head = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, d_head, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(batch, heads, keys, d_head, generator=generator, dtype=torch.float64) for _ in "kv")
    mask = torch.rand(batch, keys, generator=generator) < 0.6 if padded else None
    if padded:
        mask[0] = False  # one row is padding only
    allowed = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if causal:
        for i in range(queries):
            allowed[:, :, i, :] = torch.arange(keys) <= i + keys - queries  # bottom-right, written out
    if padded:
        allowed &= mask[:, None, None, :]
    ours = dense_attention(q, k, v, mask, causal=causal)
    some = allowed.any(-1, keepdim=True)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | ~some)
    torch.testing.assert_close(ours, theirs * some, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(ours.square().sum(), q)
    (expected,) = torch.autograd.grad((theirs * some).square().sum(), q)
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=0)


def test_attention_mask_is_the_definition():
    q, k, v = (torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(9)) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask & causal_mask(6, 6))
    torch.testing.assert_close(dense_attention(q, k, v, attention_mask=mask, causal=True), expected)


def test_query_without_keys_gets_zeros_and_finite_derivatives():
    """Also the second derivatives, which the lectures on Hessians take."""
    ids, mask = padded_batch([5, 5], vocab=50)
    mask[1] = False
    encoder = Encoder(SMALL, seed=2).eval()
    output = encoder(ids, mask)
    query = encoder.blocks[0].token_mixer.query.weight
    (first,) = torch.autograd.grad(output.last.square().sum(), query, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), query)
    assert torch.isfinite(output.last).all() and torch.isfinite(first).all() and torch.isfinite(second).all()
    assert second.abs().sum() > 0
    assert torch.equal(mean_pool(output.last, mask)[1], torch.zeros(16))


# -------------------------------------------------------------------------------------- exchange parts


def test_attention_method_plugs_in_by_one_argument(minilm):
    def sdpa(q, k, v, key_padding_mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=key_padding_mask[:, None, None, :])

    ids, mask = padded_batch([14, 9])
    with torch.no_grad():
        exchanged = load_minilm(attention=sdpa)(ids, mask).last
        torch.testing.assert_close(exchanged[mask], minilm(ids, mask).last[mask], atol=1e-5, rtol=0)
        lazy = load_minilm(attention=lambda q, k, v, mask: torch.zeros_like(v))(ids, mask).last
    assert not torch.allclose(lazy[mask], exchanged[mask], atol=0.1)


class Shift(nn.Module):
    """A token mixer without attention: every token reads its left neighbour."""

    def forward(self, x, key_padding_mask=None, state=None):
        return F.pad(x[:, :-1], (0, 0, 1, 0)), state


class Twice(nn.Module):
    """A channel mixer without weights."""

    def forward(self, x, key_padding_mask=None):
        return 2 * x


def test_token_and_channel_mixers_plug_in_by_one_argument():
    layers = []
    encoder = Encoder(
        SMALL,
        token_mixer=lambda config, layer: layers.append(layer) or Shift(),
        channel_mixer=lambda config, layer: Twice(),
    )
    assert layers == [0, 1]
    ids, _ = padded_batch([6], vocab=50)
    first = encoder.embeddings.eval()(ids)
    block = encoder.blocks[0].eval()
    mixed = block.token_norm(first + F.pad(first[:, :-1], (0, 0, 1, 0)))
    torch.testing.assert_close(encoder.eval()(ids).hidden[1], block.channel_norm(mixed + 2 * mixed))
    with pytest.raises(ValueError, match="Shift has no scores to hand out"):
        encoder(ids, return_scores=True)


# ------------------------------------------------------------------------------------ parameter counts

TURC = {  # (layers, d_model) -> BertModel parameters (Turc et al. 2019; counted from transformers' class)
    (2, 128): 4_385_920, (4, 128): 4_782_464, (6, 128): 5_179_008, (8, 128): 5_575_552, (10, 128): 5_972_096,
    (12, 128): 6_368_640, (2, 256): 9_591_040, (4, 256): 11_170_560, (6, 256): 12_750_080, (8, 256): 14_329_600,
    (10, 256): 15_909_120, (12, 256): 17_488_640, (2, 512): 22_458_880, (4, 512): 28_763_648,
    (6, 512): 35_068_416, (8, 512): 41_373_184, (10, 512): 47_677_952, (12, 512): 53_982_720,
    (2, 768): 38_603_520, (4, 768): 52_779_264, (6, 768): 66_955_008, (8, 768): 81_130_752,
    (10, 768): 95_306_496, (12, 768): 109_482_240,
}  # fmt: skip


def sized(layers, d_model, **changes):
    given = {"d_model": d_model, "layers": layers, "heads": max(1, d_model // 64), "d_ff": 4 * d_model}
    return TransformerConfig(**given | changes)


ENCODERS = {f"turc-{layers}-{d}": (sized(layers, d), count) for (layers, d), count in TURC.items()} | {
    "bert-base": (BERT_BASE, 109_482_240),
    "bert-base without pooler": (sized(12, 768, pooler=False), 108_891_648),
    "bert-large": (BERT_LARGE, 335_141_888),
    "distilbert": (sized(6, 768, segments=0, pooler=False), 66_362_880),
    "distilbert cased": (sized(6, 768, segments=0, pooler=False, vocab_size=28_996), 65_190_912),
    "distilbert multilingual": (sized(6, 768, segments=0, pooler=False, vocab_size=119_547), 134_734_080),
    "distilbert, 4 layers": (sized(4, 768, segments=0, pooler=False), 52_187_136),
    "roberta": (sized(12, 768, segments=1, vocab_size=50_265, max_length=514), 124_645_632),
    "distilroberta": (sized(6, 768, segments=1, vocab_size=50_265, max_length=514), 82_118_400),
    "tinybert-4": (sized(4, 312, heads=12, d_ff=1_200), 14_350_248),
    "tinybert-6": (sized(6, 768), 66_955_008),
}


@pytest.mark.parametrize(("config", "count"), ENCODERS.values(), ids=ENCODERS.keys())
def test_encoder_parameter_counts(config, count):
    with torch.device("meta"):
        encoder = Encoder(config)
    assert count_parameters(encoder) == count == sum(transformer_parameters(config).values())


def test_counts_equal_transformers_own_classes():
    """The recorded numbers above are not taken on trust: two classes are built and counted here."""
    with torch.device("meta"):
        assert BertModel(BertConfig()).num_parameters() == ENCODERS["bert-base"][1]
        assert DistilBertModel(DistilBertConfig()).num_parameters() == ENCODERS["distilbert"][1]


@pytest.mark.parametrize(
    ("config", "pretraining", "count"),
    [
        (sized(12, 768, pooler=False), False, 109_514_298),  # BertForMaskedLM
        (sized(6, 768, segments=0, pooler=False), False, 66_985_530),  # DistilBertForMaskedLM
        (sized(2, 128), True, 4_433_468),  # BertForPreTraining: masked words and next sentence
        (sized(12, 768), True, 110_106_428),
        (sized(4, 312, heads=12, d_ff=1_200), True, 14_479_676),
    ],
)
def test_masked_language_model_parameter_counts(config, pretraining, count):
    with torch.device("meta"):
        model = MaskedLanguageModel(Encoder(config))
        next_sentence = nn.Linear(config.d_model, 2) if pretraining else nn.Identity()
    assert count_parameters(model) + count_parameters(next_sentence) == count


def test_classifier_and_decoder_parameter_counts():
    with torch.device("meta"):
        distilbert = SentenceClassifier(Encoder(sized(6, 768, segments=0)), 2)  # its pre-classifier is our pooler
        assert count_parameters(distilbert) == 66_955_010
        assert count_parameters(Decoder(GPT2)) == 124_439_808
        assert count_parameters(Decoder(TransformerConfig(**vars(GPT2) | {"layers": 6}))) == 81_912_576


# ------------------------------------------------------------------------------------------- bad input


def test_seed_decides_the_weights_and_leaves_the_callers_generator_alone():
    weights = [Encoder(SMALL, seed=s).blocks[0].token_mixer.query.weight for s in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_initial_weights_are_small_and_biases_zero():
    encoder = Encoder(TransformerConfig(vocab_size=500, layers=1), seed=0)
    linear = encoder.blocks[0].channel_mixer.expand
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02) and not linear.bias.any()
    assert encoder.embeddings.tokens.weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads must divide d_model, got heads=5, d_model=16"),
        ({"d_model": 0}, "d_model must be an integer >= 1, got 0"),
        ({"layers": 2.0}, "layers must be an integer >= 0, got 2.0"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**vars(SMALL) | change)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), "key_padding_mask must be bool"),
        (
            torch.zeros(2, 3, dtype=torch.long),
            torch.ones(2, 4, dtype=torch.bool),
            r"must have shape \(2, 3\)",
        ),
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(3, dtype=torch.bool), r"must have shape \(2, 3\)"),
        (torch.zeros(2, 3), None, "token_ids must be integers"),
        (torch.zeros(3, dtype=torch.long), None, r"of shape \(batch, length\)"),
        (torch.zeros(1, 25, dtype=torch.long), None, "25 tokens are more than the max_length of 24"),
    ],
)
def test_bad_encoder_input_is_named(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        Encoder(SMALL)(ids, mask)


def test_without_a_position_table_a_text_may_have_any_length_and_order_is_the_mixers_affair():
    model = Encoder(replace(SMALL, max_length=0, dropout=0.0)).eval()
    assert model.embeddings.positions is None and not any("positions" in name for name in model.state_dict())
    ids = torch.arange(40)[None]
    assert torch.allclose(model(ids).last.flip(1), model(ids.flip(1)).last, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == sum(transformer_parameters(model.config).values())


def test_decoder_refuses_the_state_of_a_method_that_keeps_none():
    decoder = Decoder(SMALL_DECODER, attention=lambda q, k, v, mask: v)
    ids = torch.zeros(1, 3, dtype=torch.long)
    state = decoder(ids).state
    with pytest.raises(ValueError, match="keeps no state: give all tokens at once"):
        decoder(ids, state=state)


def test_bad_attention_input_is_named():
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match="do not fit together"):
        dense_attention(q, k, torch.zeros(1, 2, 6, 4))
    with pytest.raises(ValueError, match="do not fit together"):
        dense_attention(q, torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4))
    with pytest.raises(ValueError, match="attention_mask must be bool"):
        dense_attention(q, k, k, attention_mask=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="attention_mask must be bool"):
        masked_softmax(q, torch.zeros(3, 4))
    for shape in ((3, 4), (2, 1, 3, 5), (1, 1, 2, 3, 5)):
        with pytest.raises(ValueError, match=r"attention_mask must broadcast to \(1, 2, 3, 5\), got"):
            dense_attention(q, k, k, attention_mask=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be"):
        dense_attention(q[0], k[0], k[0])
    with pytest.raises(ValueError, match="not both"):
        Encoder(SMALL, attention=dense_attention, token_mixer=lambda c, i: Shift())
    with pytest.raises(ValueError, match="state needs causal attention"):
        SelfAttention(SMALL)(torch.zeros(1, 3, 16), state=(k, k))
    with pytest.raises(ValueError, match="must have a pooler"):
        SentenceClassifier(Encoder(SMALL_DECODER), 2)
    with pytest.raises(ValueError, match="no segment embeddings"):
        ids = torch.zeros(1, 3, dtype=torch.long)
        Encoder(SMALL_DECODER)(ids, segment_ids=ids)


def test_attention_scores_are_scaled():
    q = torch.ones(1, 1, 1, 9)
    assert attention_scores(q, q).item() == pytest.approx(3.0)


def test_minilm_sizes():
    assert MINILM_L6.d_head == 32 and count_parameters(Encoder(MINILM_L6)) == 22_713_216


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_nan_where_very_low_scores_meet_a_row_without_keys(dtype):
    """In float16 the smallest finite number plus a score of -40 would be -inf, and its softmax NaN."""
    scores = torch.full((1, 1, 2, 3), -40.0, dtype=dtype, requires_grad=True)
    allowed = torch.tensor([[False, False, False], [True, False, True]])
    weights = masked_softmax(scores, allowed)
    weights.sum().backward()
    assert weights[0, 0].tolist() == [[0, 0, 0], [0.5, 0, 0.5]] and scores.grad.isfinite().all()
