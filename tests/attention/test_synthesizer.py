"""Synthesizer: every kind written out in loops, factor indices by hand, slicing, causality, counts, the mixture."""

import pytest
import torch
from torch import Tensor

from effnlp_lessons.attention.synthesizer import Synthesizer, factorized_scores, square_factors
from effnlp_lessons.dense_attention import dense_attention
from effnlp_lessons.transformer import Decoder, Encoder, SelfAttention, TransformerConfig

N = 12
CONFIG = TransformerConfig(vocab_size=40, max_length=N, d_model=12, layers=2, heads=3, d_ff=16, segments=0)
SINGLE = ["dense", "random", "factorized dense", "factorized random"]
every_kind = pytest.mark.parametrize("kind", [*SINGLE, "mixture"])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixer(kind: str, causal: bool = False, config: TransformerConfig = CONFIG, **options) -> Synthesizer:
    """In float64, all its parameters random."""
    options = {"rank": 2, "factors": (3, 4)} | options
    if kind == "mixture":
        options = {"components": [*SINGLE, "dot product"]} | options
    built = Synthesizer(config, N, kind, causal, **options).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return built


def one_score(part: torch.nn.Module, name: str, x: Tensor, head: int, i: int, j: int) -> Tensor:
    """S_ij of one head and one text (length, d_model): the definition, number by number."""
    d = x.shape[1] // 3
    own = slice(head * d, (head + 1) * d)
    if name == "random":
        return part.scores[head, i, j]
    if name == "factorized random":
        return part.factors[0, head, i] @ part.factors[1, head, j]
    if name == "dot product":
        return part.query(x[i])[own] @ part.key(x[j])[own] / d**0.5
    hidden = torch.clamp(part.hidden.weight[own] @ x[i] + part.hidden.bias[own], min=0)
    numbers = hidden @ part.weight[head] + part.bias[head, 0]
    if name == "dense":
        return numbers[j]
    (a, b), first, second = part.factors, numbers[: part.factors[0]], numbers[part.factors[0] :]
    assert len(first) == a and len(second) == b
    return first[j // b] * second[j % b]


def by_loops(layer: Synthesizer, names: list[str], x: Tensor, real: Tensor) -> Tensor:
    batch, length, d_model = x.shape
    d = d_model // 3
    exponentials = torch.ones(1) if layer.mixing is None else torch.exp(layer.mixing)
    shares = exponentials / exponentials.sum()
    mixed = 0 * x
    for text in range(batch):
        values = layer.value(x[text])
        for head in range(3):
            for i in real[text].nonzero().flatten().tolist():
                keys = [j for j in range(length) if real[text, j] and (j <= i or not layer.causal)]
                row = [
                    sum(
                        share * one_score(part, name, x[text], head, i, j)
                        for share, part, name in zip(shares, layer.scores, names, strict=True)
                    )
                    for j in keys
                ]
                own = slice(head * d, (head + 1) * d)
                mixed[text, i, own] = torch.stack(row).softmax(0) @ values[keys, own]
    return layer.output(mixed)


# ----------------------------------------------------------------------------- the definitions


def test_factorized_index_by_hand():
    """a = (2, 3), b = (5, 7, 11): the first three columns are from a_0, and b runs through in each block."""
    a, b = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0, 11.0])
    assert factorized_scores(a, b).tolist() == [10, 14, 22, 15, 21, 33]
    # tiled in the same way, with a = b = 2, columns 0 and 2 would be equal: a_0 b_0
    assert len(set(factorized_scores(torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0])).tolist())) == 4


def test_square_factors():
    assert [square_factors(n) for n in (1, 7, 12, 16, 512)] == [(1, 1), (1, 7), (3, 4), (4, 4), (16, 32)]


@every_kind
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, N])
def test_output_and_gradients_are_the_definition(kind, causal, length):
    layer = mixer(kind, causal)
    names = [*SINGLE, "dot product"] if kind == "mixture" else [kind]
    real = torch.arange(length) < torch.tensor([[length], [length // 2]])  # for length 1 a padded text
    direction, results = random(2, length, 12, seed=3), []
    for path in (lambda x: layer(x, real)[0], lambda x: by_loops(layer, names, x, real)):
        x = random(2, length, 12).requires_grad_()
        y = path(x)
        inputs = [x, *layer.parameters()]
        results.append([y, *torch.autograd.grad((y * direction).sum(), inputs, materialize_grads=True)])
    for fast, truth in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_a_mixture_that_is_all_dot_product_is_attention(causal):
    layer = mixer("mixture", causal, components=("random", "dot product"))
    with torch.no_grad():
        layer.mixing.copy_(torch.tensor([-1e3, 1e3]))
    split = SelfAttention(CONFIG).split_heads
    x = random(2, 9, 12)
    q, k, v = (split(project(x)) for project in (layer.scores[1].query, layer.scores[1].key, layer.value))
    truth = layer.output(dense_attention(q, k, v, causal=causal).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x)[0], truth, rtol=1e-10, atol=1e-10)


def test_factorized_random_of_full_rank_is_random():
    random_kind, factorized = mixer("random"), mixer("factorized random", rank=N)
    with torch.no_grad():
        identity = torch.eye(N, dtype=torch.float64).expand(3, -1, -1)
        factorized.scores[0].factors.copy_(torch.stack([random_kind.scores[0].scores, identity]))
    factorized.load_state_dict(
        {name: p for name, p in random_kind.state_dict().items() if "scores" not in name}, strict=False
    )
    x = random(2, 9, 12)
    torch.testing.assert_close(factorized(x)[0], random_kind(x)[0], rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------- slices, causality, padding


@every_kind
def test_a_shorter_text_uses_the_first_rows_and_columns(kind):
    layer, x = mixer(kind), random(2, N, 12)
    whole = layer.synthesized_scores(x)
    for length in (1, 5, 7):
        part = layer.synthesized_scores(x[:, :length])
        torch.testing.assert_close(part, whole[..., :length, :length], rtol=1e-10, atol=1e-10)
    assert whole.shape == (1 if "random" in kind else 2, 3, N, N)


@every_kind
def test_strictly_causal_by_intervention_and_not_without(kind):
    layer, x = mixer(kind, causal=True), random(2, N, 12)
    before = layer(x)[0]
    for moment in (1, 2, 7, N - 1):
        changed = x.clone()
        changed[:, moment:] += 1
        assert torch.equal(layer(changed)[0][:, :moment], before[:, :moment])
    layer.causal = False
    assert (layer(changed)[0] != layer(x)[0]).any(-1).all()


@every_kind
@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing(kind, causal):
    layer, x = mixer(kind, causal), random(3, 9, 12)
    real = torch.arange(9) < torch.tensor([[9], [5], [0]])
    before = layer(x, real)[0]
    torch.testing.assert_close(before[1:2, :5], layer(x[1:2, :5])[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(before[~real], layer.output.bias.expand(13, -1))
    x[~real] = 1e3
    assert torch.equal(layer(x, real)[0], before)
    x.requires_grad_()
    layer(x, real)[0].sum().backward()
    assert x.grad.isfinite().all() and not x.grad[~real].any()


@pytest.mark.parametrize("kind", ["random", "factorized random"])
def test_a_random_kind_has_the_same_weights_for_every_text(kind):
    layer = mixer(kind)
    assert torch.equal(layer.synthesized_scores(random(1, 7, 12)), layer.synthesized_scores(random(4, 7, 12, seed=9)))


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    layer, x = mixer(kind), random(2, 9, 12)
    truth = layer(x)[0]
    found = layer.to(dtype)(x.to(dtype))[0]
    assert found.dtype == dtype
    # weights and inputs are rounded as well, to 2**-8 and 2**-11, and the scores are products of a few of them
    bound = {torch.bfloat16: 0.15, torch.float16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), truth, rtol=bound, atol=bound)


# ----------------------------------------------------------------------------- parameters, the mixture


def count(parameters) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize(
    ("kind", "weights", "biases"),
    # a head of the table: d² counts d_model d_head, what its own share of a projection has
    [
        ("dense", 12 * 4 + 4 * N, 4 + N),
        ("random", N**2, 0),
        ("factorized dense", 12 * 4 + 4 * (3 + 4), 4 + 3 + 4),
        ("factorized random", 2 * N * 2, 0),
    ],
)
def test_parameters_of_a_head(kind, weights, biases):
    layer = mixer(kind)
    assert count(layer.scores.parameters()) == 3 * (weights + biases)
    projections = count(layer.value.parameters()) + count(layer.output.parameters())
    assert count(layer.parameters()) == count(layer.scores.parameters()) + projections
    assert count(layer.scores.parameters()) - 3 * biases == 3 * weights


def test_parameters_of_a_mixture_are_its_components_and_alphas():
    layer = mixer("mixture", components=("dense", "dot product"))
    dot_product = count(layer.scores[1].parameters())
    assert dot_product == 3 * (2 * 12 * 4 + 2 * 4)
    assert count(layer.parameters()) == count(mixer("dense").parameters()) + dot_product + 2


def test_alphas_sum_to_one_start_equal_and_learn():
    layer = Synthesizer(CONFIG, N, "mixture", components=("dense", "random", "dot product"))
    assert layer.alphas().tolist() == pytest.approx([1 / 3] * 3)
    layer = mixer("mixture", components=("dense", "random", "dot product"))
    before = layer.alphas().detach().clone()
    layer(random(2, 9, 12))[0].square().sum().backward()
    torch.optim.SGD([layer.mixing], lr=0.1).step()
    assert layer.alphas().sum().item() == pytest.approx(1) and (layer.alphas() != before).all()
    # of two components the first alpha is the sigmoid of a difference
    two = mixer("mixture", components=("random", "dot product"))
    assert two.alphas()[0].item() == pytest.approx(torch.sigmoid(two.mixing[0] - two.mixing[1]).item())
    assert mixer("dense").alphas().tolist() == [1]


@pytest.mark.parametrize("kind", ["random", "factorized random"])
def test_fixed_scores_are_saved_moved_and_never_learned(kind):
    fixed, learned = (Synthesizer(CONFIG, N, kind, trainable=trainable, seed=2) for trainable in (False, True))
    assert not list(fixed.scores.parameters()) and len(list(learned.scores.parameters())) == 1
    assert set(fixed.state_dict()) == set(learned.state_dict())
    name = next(name for name in fixed.state_dict() if name.startswith("scores"))
    assert torch.equal(fixed.state_dict()[name], learned.state_dict()[name])
    other = Synthesizer(CONFIG, N, kind, trainable=False, seed=3)
    assert not torch.equal(fixed.state_dict()[name], other.state_dict()[name])
    mixed = Synthesizer(CONFIG, N, "mixture", trainable=False, components=(kind, "dot product"))
    assert not list(mixed.scores[0].parameters()) and list(mixed.scores[1].parameters())


# ----------------------------------------------------------------------------- in the course's models


@every_kind
@pytest.mark.parametrize("model", [Encoder, Decoder])
def test_in_the_courses_transformer(kind, model):
    built = model(
        CONFIG, token_mixer=lambda config, layer: Synthesizer(config, N, kind, causal=model is Decoder, seed=layer)
    ).eval()
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
    real = torch.arange(9) < torch.tensor([[9], [5]])
    output = built(ids, real)[0]
    torch.testing.assert_close(output[1:, :5], built(ids[1:, :5])[0], rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    for name, parameter in built.named_parameters():
        assert "pooler" in name or (parameter.grad is not None and parameter.grad.isfinite().all()), name
        assert "token_mixer.scores" not in name or "key.bias" in name or parameter.grad.any(), name
    if model is Decoder:
        changed = ids.clone()
        changed[:, 6:] = (changed[:, 6:] + 1) % 40
        assert torch.equal(built(changed).logits[:, :6], built(ids).logits[:, :6])
        with pytest.raises(ValueError, match="keeps no state"):
            built(ids[:, :1], state=built(ids).state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dot product"}, "kind must be one of 'dense', 'random', 'factorized dense', 'factorized random', "),
        ({"kind": "mixture", "components": ("random",)}, "components must be two or more of 'dense'"),
        ({"kind": "mixture", "components": ("random", "vanilla")}, "components must be two or more of 'dense'"),
        ({"kind": "dense", "trainable": False}, "trainable=False needs a random kind, got 'dense'"),
        ({"kind": "factorized dense", "factors": (3, 5)}, "factors must be two numbers a, b >= 1 with a b = 12"),
        ({"kind": "factorized dense", "factors": (12,)}, "factors must be two numbers a, b >= 1 with a b = 12"),
        ({"kind": "factorized random", "rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"max_length": 0}, "max_length must be an integer >= 1, got 0"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Synthesizer(CONFIG, **({"max_length": N} | arguments))


@every_kind
def test_bad_input_is_refused_by_name(kind):
    layer = mixer(kind)
    with pytest.raises(ValueError, match=r"x must hold 1 to 12 tokens \(max_length\), got 13"):
        layer(random(1, 13, 12))
    with pytest.raises(ValueError, match=r"x must hold 1 to 12 tokens \(max_length\), got 0"):
        layer(random(1, 0, 12))
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        layer(random(2, 7, 12), torch.ones(2, 7))
    with pytest.raises(ValueError, match="state must be None"):
        layer(random(2, 7, 12), None, ())
