"""`make bench`: the students of the lectures on distillation beside transformers' classes, the soft loss beside kl_div.

Published widths and vocabulary with few layers, same weights, 8 texts of 64 tokens, float32, one thread, no dropout,
in turns. A training step is forward and backward; the optimizer, which would be the same, is left out.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DistilBertConfig, DistilBertModel, MobileBertModel
from transformers import MobileBertConfig as TheirMobileBertConfig

from effnlp_lessons.distillation.distilbert import student_config
from effnlp_lessons.distillation.hinton import soft_divergence
from effnlp_lessons.distillation.mobilebert import MOBILEBERT, MobileBert, rename_mobilebert_state
from effnlp_lessons.transformer import BERT_BASE, Encoder

BATCH, LENGTH, VOCAB = 8, 64, 30_522
RUNS, WARMUP = 7, 2
# transformers' DistilBERT, piece by piece -> ours
NAMES = {
    "transformer.layer.": "blocks.",
    "word_embeddings": "tokens",
    "position_embeddings": "positions",
    "embeddings.LayerNorm": "embeddings.norm",
    "attention.q_lin": "token_mixer.query",
    "attention.k_lin": "token_mixer.key",
    "attention.v_lin": "token_mixer.value",
    "attention.out_lin": "token_mixer.output",
    "sa_layer_norm": "token_norm",
    "ffn.lin1": "channel_mixer.expand",
    "ffn.lin2": "channel_mixer.contract",
    "output_layer_norm": "channel_norm",
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    gc.collect()


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of every call, in turns, gradients as the call sets them (`measure.latencies` allows none)."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP + RUNS):
        for name, call in calls.items():
            start = perf_counter()
            call()
            if turn >= WARMUP:
                seconds[name].append(perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def compare(title: str, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Print a table and return every call's time as a multiple of that of "ours"."""
    times = medians(calls)
    print(f"\n{title}: median of {RUNS} turns, ratio to ours")
    for name, value in times.items():
        print(f"  {name:22} {1e3 * value:8.1f} ms   {value / times['ours']:5.2f} x")
    return {name: value / times["ours"] for name, value in times.items()}


def compare_models(title: str, models: dict[str, nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1_000, VOCAB, (BATCH, LENGTH), generator=generator)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)

    def last(model: nn.Module) -> torch.Tensor:
        output = model(ids, mask)
        return output.last if hasattr(output, "last") else output.last_hidden_state

    def forward(model: nn.Module) -> Callable[[], object]:
        return torch.no_grad()(lambda: last(model))

    def step(model: nn.Module) -> Callable[[], object]:
        def call() -> None:
            model.zero_grad(set_to_none=True)
            last(model).square().mean().backward()

        return call

    expected = forward(models["ours"])()
    for model in models.values():
        # the same: float32 sums in another order
        torch.testing.assert_close(forward(model)(), expected, rtol=1e-4, atol=1e-4)
    for what, of in (("forward", forward), ("training step", step)):
        ratios = compare(f"{title}, {what}", {name: of(model) for name, model in models.items()})
        assert ratios["transformers, eager"] > 0.75  # ours may take a third more, at most


def test_distilbert():
    layers = 2
    models: dict[str, nn.Module] = {"ours": Encoder(replace(student_config(BERT_BASE, layers), dropout=0.0))}
    state = models["ours"].state_dict()
    for name in ("eager", "sdpa"):
        config = DistilBertConfig(n_layers=layers, dropout=0.0, attention_dropout=0.0, attn_implementation=name)
        theirs = DistilBertModel(config).train()
        theirs.load_state_dict({of_theirs: state[ours_of(of_theirs)] for of_theirs in theirs.state_dict()})
        models[f"transformers, {name}"] = theirs
    compare_models(f"DistilBERT, {layers} layers", models)


def ours_of(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def test_mobilebert():
    layers = 4
    ours = MobileBert(replace(MOBILEBERT, layers=layers, attention_dropout=0.0))
    models: dict[str, nn.Module] = {"ours": ours}
    for name in ("eager", "sdpa"):
        config = TheirMobileBertConfig(
            num_hidden_layers=layers, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
            classifier_activation=False, attn_implementation=name,
        )  # fmt: skip
        theirs = MobileBertModel(config).train()
        if len(models) == 1:
            ours.load_state_dict(rename_mobilebert_state(theirs.state_dict()))
            state = theirs.state_dict()
        theirs.load_state_dict(state)
        models[f"transformers, {name}"] = theirs
    compare_models(f"MobileBERT, {layers} layers", models)


def test_soft_loss_over_the_vocabulary():
    """Ours has Eq. 2 as its backward, which computes q once more; kl_div takes the logarithm of p, or is given it."""
    temperature = 2.0
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, BATCH * LENGTH, VOCAB, generator=generator).unbind()
    student.requires_grad_()

    def kl_div() -> torch.Tensor:
        log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
        return F.kl_div(log_q, p, reduction="batchmean") * temperature**2

    def kl_div_of_logarithms() -> torch.Tensor:
        log_q, log_p = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2

    losses = {
        "ours": lambda: soft_divergence(student, teacher, temperature),
        "F.kl_div": kl_div,
        "F.kl_div, log_target": kl_div_of_logarithms,
    }
    gradients = []
    for loss in losses.values():
        gradients.append(torch.autograd.grad(loss(), student)[0])
        # the same: float32 sums in another order; gradients are about 1e-7
        torch.testing.assert_close(loss(), losses["F.kl_div"](), rtol=1e-4, atol=0)
        torch.testing.assert_close(gradients[-1], gradients[0], rtol=0, atol=1e-9)
    del gradients
    title = f"soft loss, {BATCH * LENGTH} rows of {VOCAB:,} words"
    ratios = compare(f"{title}, forward", {name: torch.no_grad()(loss) for name, loss in losses.items()})
    assert ratios["F.kl_div"] > 0.6
    steps = {name: lambda loss=loss: torch.autograd.grad(loss(), student) for name, loss in losses.items()}
    assert compare(f"{title}, forward and backward", steps)["F.kl_div"] > 0.6
