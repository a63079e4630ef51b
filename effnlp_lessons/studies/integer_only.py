"""The teacher on integers alone: what is lost, where, and what takes the time (Kim et al. 2021, arXiv 2101.01321).

A run calibrates on its own 256 training sentences and classifies the test sentences with integers from ids to logits.
Then, on some of them, it puts int8 where I-BERT keeps 32 bits: before the softmax, the GELU, the norms.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import thread_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnlp_lessons.classification import ReviewExamples, logits_of
from effnlp_lessons.datasets import reviews, tokenizer
from effnlp_lessons.heads import SentenceClassifier
from effnlp_lessons.measure import bytes_on_disk
from effnlp_lessons.pretrained import load_teacher, teacher_logits
from effnlp_lessons.quantization.ibert import IntegerExp, IntegerGelu, IntegerLayerNorm, IntegerSoftmax, Rescale
from effnlp_lessons.quantization.integer_classifier import (
    FINE,
    IntegerClassifier,
    IntegerSelfAttention,
    activation_ranges,
    narrow,
)
from effnlp_lessons.quantization.integer_only import IntegerLinear
from effnlp_lessons.quantization.ranges import percentile
from effnlp_lessons.studies.runner import Outcome, Study

# kind of module -> the part of the time that its own code takes
PARTS = {
    IntegerLinear: "products with weights",
    IntegerSelfAttention: "products of attention",
    Rescale: "changes of scale",
    IntegerGelu: "GELU",
    IntegerSoftmax: "softmax",
    IntegerExp: "softmax",
    IntegerLayerNorm: "norms",
}
REST = "sums, look-ups, fine codes to int8"
NON_LINEAR = {"softmax": IntegerSoftmax, "GELU": IntegerGelu, "norms": IntegerLayerNorm}


@contextmanager
def _hooks(handles: Iterable[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shares_of_time(model: IntegerClassifier, token_ids: Tensor, key_padding_mask: Tensor) -> dict[str, float]:
    """The share of the time of one call that each part takes (1 in all), largest first.

    A module's time is its own, without that of the modules inside it, in the thread's time and not on the clock, which
    would count the machine's other work. One warm-up, then the mean of five calls.
    """
    seconds: dict[str, float] = defaultdict(float)
    inner = [0.0]  # time of the modules inside, one entry for every open call

    def enter(module: nn.Module, inputs: tuple) -> None:
        inner.append(0.0)
        module.started = thread_time()

    def leave(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        taken = thread_time() - module.started
        seconds[PARTS.get(type(module), REST)] += taken - inner.pop()
        inner[-1] += taken

    modules = list(model.modules())
    handles = [m.register_forward_pre_hook(enter) for m in modules] + [m.register_forward_hook(leave) for m in modules]
    with torch.inference_mode(), _hooks(handles):
        model(token_ids, key_padding_mask)
        seconds.clear()
        for _ in range(5):
            model(token_ids, key_padding_mask)
    total = sum(seconds.values())
    return {part: seconds[part] / total for part in sorted(seconds, key=seconds.get, reverse=True)}


def _exact(module: nn.Module, real: nn.Module | None, x: Tensor) -> Tensor | None:
    """The real function of a module on real numbers, None if it has none."""
    match module:
        case IntegerLinear():
            return F.linear(x, real.weight.double(), real.bias.double())
        case IntegerLayerNorm():
            return F.layer_norm(x, x.shape[-1:], real.weight.double(), real.bias.double(), real.eps)
        case IntegerGelu():
            return F.gelu(x)
        case IntegerSoftmax():
            return x.softmax(-1)
        case Rescale():
            return x
    return None


def part_of(name: str) -> str | None:
    """The part that a module of a block belongs to, by its name there; None: its error is that of its own parts."""
    owner, _, leaf = name.rpartition(".")
    if owner.endswith(("query", "key", "value", "output", "expand", "contract")):
        if leaf == "0":
            return "weights in int8"
        return "queries, keys, values in int8" if owner.endswith(("query", "key", "value")) else None
    names = {"softmax": "softmax", "gelu": "GELU", "mixed": "mixed values in int8", "hidden": "GELU's output in int8"}
    return names.get(leaf, "norms" if leaf.endswith("norm") else None)


def own_errors(
    real: SentenceClassifier, model: IntegerClassifier, token_ids: list[list[int]]
) -> dict[str, list[float]]:
    """The relative error that each part makes by itself, layer by layer: |found - exact| / |exact|.

    A part's output is compared with the real function, in float64, of the very codes that it got. So what came with
    the input does not count. Where a part stands several times in a layer, all count together.
    """
    squares: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(part: str, layer: int, found: Tensor, exact: Tensor) -> None:
        both = squares[part, layer]
        both[0] += (found - exact).square().sum().item()
        both[1] += exact.square().sum().item()

    def watch(layer: int, name: str, part: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        linear = isinstance(module, IntegerLinear)
        place = name.removesuffix(".0") if linear else name
        of_real = real.encoder.blocks[layer].get_submodule(place) if linear or part == "norms" else None

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            x = module.input.dequantize(inputs[0]) if linear else inputs[0] * module.input_scale
            found = output * module.accumulator_scale if linear else module.dequantize(output)
            add(part, layer, found, _exact(module, of_real, x))
            if part == "norms":  # what the linear layers read of it
                int8 = module.dequantize(narrow(output).to(torch.int32) * FINE)
                add(f"{'first' if name == 'token_norm' else 'second'} norm's output in int8", layer, int8, found)

        return module.register_forward_hook(hook)

    handles = [
        watch(layer, name, part, module)
        for layer, block in enumerate(model.blocks)
        for name, module in block.named_modules()
        if (part := part_of(name)) is not None
    ]
    with torch.inference_mode(), _hooks(handles):
        for ids in token_ids:  # one by one: no padding
            model.integer_logits(torch.tensor([ids]))
    parts = dict.fromkeys(part for part, _ in squares)
    return {
        part: [(squares[part, i][0] / squares[part, i][1]) ** 0.5 for i in range(len(model.blocks))] for part in parts
    }


def accumulated_errors(real: SentenceClassifier, model: IntegerClassifier, token_ids: list[list[int]]) -> list[float]:
    """The relative error of the hidden states, after the embeddings and after every layer."""
    norms = [model.embeddings.norm, *(block.channel_norm for block in model.blocks)]
    squares = [[0.0, 0.0] for _ in norms]
    found: dict[int, Tensor] = {}

    def watch(place: int, norm: IntegerLayerNorm) -> torch.utils.hooks.RemovableHandle:
        return norm.register_forward_hook(lambda module, _, output: found.update({place: module.dequantize(output)}))

    with torch.inference_mode(), _hooks(watch(*pair) for pair in enumerate(norms)):
        for ids in token_ids:
            model.integer_logits(torch.tensor([ids]))
            for place, exact in enumerate(real.encoder(torch.tensor([ids])).hidden):
                squares[place][0] += (found[place] - exact).square().sum().item()
                squares[place][1] += exact.square().sum().item()
    return [(difference / size) ** 0.5 for difference, size in squares]


def largest_inputs(model: IntegerClassifier, batches: list[tuple[Tensor, Tensor]]) -> dict[str, int]:
    """The largest code, in absolute value, that enters each softmax, GELU and norm of the blocks on some batches."""
    largest: dict[str, int] = defaultdict(int)

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple) -> None:
            largest[name] = max(largest[name], int(inputs[0].abs().max()))

        return module.register_forward_pre_hook(hook)

    kinds = tuple(NON_LINEAR.values())
    with (
        torch.inference_mode(),
        _hooks(watch(n, m) for n, m in model.blocks.named_modules() if isinstance(m, kinds)),
    ):
        for token_ids, mask in batches:
            model.integer_logits(token_ids, mask)
    return dict(largest)


@contextmanager
def int8_before(model: IntegerClassifier, part: str, largest: dict[str, int]) -> Iterator[None]:
    """Inside, what enters every softmax, GELU or norm keeps 8 bits: it is a multiple of a 127th of its largest code."""

    def coarsen(step: int) -> Callable[[nn.Module, tuple], tuple]:
        def hook(module: nn.Module, inputs: tuple) -> tuple:
            q = torch.div(inputs[0] + step // 2, step, rounding_mode="floor").clamp_(-127, 127) * step
            return (q, *inputs[1:])

        return hook

    kind = NON_LINEAR[part]
    modules = [(name, module) for name, module in model.blocks.named_modules() if isinstance(module, kind)]
    with _hooks(m.register_forward_pre_hook(coarsen(max(1, -(-largest[n] // 127)))) for n, m in modules):
        yield


def compare(found: Tensor, real: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy in per cent, agreement with the real model's classes in per cent, relative error of the logits."""
    classes = found.argmax(-1)
    return {
        "accuracy": round(100 * (classes == labels).double().mean().item(), 2),
        "agreement": round(100 * (classes == real.argmax(-1)).double().mean().item(), 2),
        "logit_error": round(((found - real).norm() / real.norm()).item(), 4),
    }


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Numbers: "real" and "integer" on all test sentences, with bytes on disk.

    On the first some of them: "variants", int8 before a part or clipped activations; "errors" by part and layer;
    "hidden", errors of the states; "time", shares by part.
    """
    data = reviews.load_reviews()
    train, test = ReviewExamples(data.subset("train")), ReviewExamples(data.subset("test"))
    model, real = load_teacher(), teacher_logits()[torch.from_numpy(data.split == "test")]
    chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    chosen = sorted(chosen[: setting["calibration"]].tolist(), key=train.lengths.__getitem__)
    batches = [train.batch(chosen[i : i + 32])[:2] for i in range(0, len(chosen), 32)]

    integer = IntegerClassifier(model, activation_ranges(model, batches))
    numbers: dict[str, Any] = {
        "real": compare(real, real, test.labels) | {"bytes": bytes_on_disk(model)},
        "integer": compare(logits_of(integer, test.token_ids), real, test.labels) | {"bytes": bytes_on_disk(integer)},
    }
    count = setting["sentences"]
    ids, some, labels = test.token_ids[:count], real[:count], test.labels[:count]
    variants = {"as it is": compare(logits_of(integer, ids), some, labels)}
    largest = largest_inputs(integer, batches)
    for part in NON_LINEAR:
        with int8_before(integer, part, largest):
            variants[f"int8 before {part}"] = compare(logits_of(integer, ids), some, labels)
    share = setting["clipped"]
    clipped = IntegerClassifier(model, activation_ranges(model, batches, percentile(share)))
    variants[f"clipped at {share}"] = compare(logits_of(clipped, ids), some, labels)
    errors = own_errors(model, integer, ids[:32])
    shares = shares_of_time(integer, *tokenizer.pad([row[:32] for row in ids if len(row) >= 32][:8]))
    return Outcome(
        numbers
        | {
            "variants": variants,
            "errors": {part: [round(value, 4) for value in values] for part, values in errors.items()},
            "hidden": [round(value, 4) for value in accumulated_errors(model, integer, ids[:32])],
            "time": {part: round(value, 3) for part, value in shares.items()},
        }
    )


STUDY = Study(
    name="integer_only",
    question="What does a classifier lose on integers alone, in which part, and what takes its time?",
    run=run,
    recorded=({"calibration": 256, "sentences": 500, "clipped": 0.999},),
    seeds=(0, 1, 2),
    minutes=10,
    timed=True,
)
