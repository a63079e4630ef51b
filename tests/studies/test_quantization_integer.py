"""The study of the teacher on integers: its instruments on a small model, and the recorded summary."""

import pytest
import torch
import torch.nn.functional as F

from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.quantization.integer_classifier import FINE, IntegerClassifier, narrow
from effnlp_lessons.studies import integer_only
from effnlp_lessons.studies.runner import load_results
from effnlp_lessons.transformer import Encoder, TransformerConfig

CONFIG = TransformerConfig(vocab_size=40, max_length=12, d_model=24, layers=2, heads=3, d_ff=40)


@pytest.fixture(scope="module")
def small():
    model, generator = SentenceClassifier(Encoder(CONFIG), classes=2), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    ids = torch.randint(0, 40, (30, 9), generator=generator)
    batches = [(ids, torch.ones_like(ids, dtype=torch.bool))]
    return model, IntegerClassifier.from_float(model, batches), batches


def test_an_error_is_that_of_the_part_alone(small):
    model, integer, batches = small
    ids = batches[0][0][:3].tolist()
    errors = integer_only.own_errors(model, integer, ids)
    assert all(len(values) == 2 for values in errors.values())
    # by hand: the GELU of the second layer on the very codes that it gets
    seen, expand = [], integer.blocks[1].channel_mixer.expand
    gelu = integer.blocks[1].channel_mixer.gelu
    handle = gelu.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    for row in ids:
        integer.integer_logits(torch.tensor([row]))
    handle.remove()
    fine, codes = (torch.cat(tensors) for tensors in zip(*seen, strict=True))
    exact = F.gelu(expand[1].dequantize(fine))
    expected = ((gelu.dequantize(codes) - exact).norm() / exact.norm()).item()
    assert errors["GELU"][1] == pytest.approx(expected, rel=1e-9)
    # and what the feed-forward reads of the first norm
    norm, inputs = integer.blocks[0].token_norm, []
    handle = norm.register_forward_hook(lambda module, _, output: inputs.append(output))
    for row in ids:
        integer.integer_logits(torch.tensor([row]))
    handle.remove()
    codes = torch.cat(inputs).double()
    expected = ((narrow(torch.cat(inputs)).double() * FINE - codes).norm() / codes.norm()).item()
    assert errors["first norm's output in int8"][0] == pytest.approx(expected, rel=1e-9)
    assert max(errors["norms"]) < 0.002 and min(errors["weights in int8"]) > 0.002


def test_shares_of_time_add_up_and_leave_no_hooks(small):
    _, integer, batches = small
    shares = integer_only.shares_of_time(integer, *batches[0])
    assert set(shares) == set(integer_only.PARTS.values()) | {integer_only.REST}
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in integer.modules())


@pytest.mark.parametrize("part", integer_only.NON_LINEAR)
def test_int8_before_a_part_is_255_codes_there_and_nowhere_else(small, part):
    _, integer, batches = small
    largest = integer_only.largest_inputs(integer, batches)
    before = integer.integer_logits(*batches[0])
    module = {
        "softmax": integer.blocks[0].token_mixer.softmax,
        "GELU": integer.blocks[0].channel_mixer.gelu,
        "norms": integer.blocks[0].token_norm,
    }[part]
    codes = []
    with integer_only.int8_before(integer, part, largest):
        handle = module.register_forward_pre_hook(lambda module, inputs: codes.append(inputs[0]))
        inside = integer.integer_logits(*batches[0])
        handle.remove()
    values = torch.cat([tensor.flatten() for tensor in codes]).unique()
    step = values.diff().min()
    assert len(values) <= 255 and (values % step == 0).all() and step > 1
    assert not torch.equal(inside, before) and torch.equal(integer.integer_logits(*batches[0]), before)


def test_comparison_by_hand():
    real = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    found = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    result = integer_only.compare(found, real, torch.tensor([0, 0, 1]))
    assert result == {"accuracy": 66.67, "agreement": 66.67, "logit_error": round((2 / 6) ** 0.5, 4)}


# --------------------------------------------------------------------------------------------- as recorded


def test_what_the_lecture_says_of_integers_holds_on_every_seed():
    runs = load_results("integer_only")["runs"]
    assert len({run["seed"] for run in runs}) >= 3
    for run in runs:
        real, integer, variants = run["real"], run["integer"], run["variants"]
        assert abs(integer["accuracy"] - real["accuracy"]) < 1 and integer["agreement"] > 96
        assert real["bytes"] / integer["bytes"] > 3.8
        # int8 is enough before softmax and GELU, and not before the norms: the residual sums have huge channels
        assert variants["int8 before norms"]["accuracy"] < variants["as it is"]["accuracy"] - 10
        for part in ("softmax", "GELU"):
            assert abs(variants[f"int8 before {part}"]["accuracy"] - variants["as it is"]["accuracy"]) < 3
        assert variants["clipped at 0.999"]["logit_error"] > 1.3 * variants["as it is"]["logit_error"]
        assert sum(run["time"].values()) == pytest.approx(1, abs=0.01)  # seven shares of three digits
        assert run["time"]["changes of scale"] > run["time"]["products with weights"]
