"""The one yardstick of the course: parameters, bytes on disk, MACs, latency, peak memory.

MACs are counted by running the model: every tensor operation that torch executes is looked up, the matrix
products have a formula, the rest of the known ones cost none, and an unknown one raises instead of being
taken for free. 1 MAC (multiply-accumulate) = 2 FLOPs; papers that print FLOPs print twice our numbers.
Not counted, as in the papers' tables: biases, softmax, norms, activations, look-ups.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from effnlp_lessons.transformer import TransformerConfig

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler otherwise prints a line per start and stop

# ---------------------------------------------------------------------------------- counting by running


class UncountedOperation(RuntimeError):
    """An operation without a MAC formula ran inside `count_macs`."""


def _product(a: Tensor, out: Tensor) -> int:
    """MACs of a matrix product: one per output element and element of the summed dimension."""
    real = 4 if a.is_complex() else 1  # a complex multiplication is four real ones
    return real * out.numel() * a.shape[-1]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> int:
    """MACs of dense attention: q kᵀ and weights v, for every pair (a causal kernel may skip half)."""
    pairs = q.shape[:-1].numel() * k.shape[-2]
    return pairs * (q.shape[-1] + v.shape[-1])


def _fft(x: Tensor, dims: list[int]) -> int:
    """About 5 n log2 n FLOPs for a complex transform of n points, half for real input or output."""
    points = math.prod(x.shape[d] for d in dims)
    return round(x.numel() * 5 * math.log2(max(points, 2)) / 4 * (2 if x.is_complex() else 1))


# operation -> MACs from (arguments, result)
FORMULAS: dict[str, Callable[[tuple, Any], int]] = {
    "aten::mm": lambda a, out: _product(a[0], out),
    "aten::bmm": lambda a, out: _product(a[0], out),
    "aten::addmm": lambda a, out: _product(a[1], out),
    "aten::baddbmm": lambda a, out: _product(a[1], out),
    "aten::baddbmm_": lambda a, out: _product(a[1], out),
    "aten::mv": lambda a, out: _product(a[0], out),
    "aten::dot": lambda a, out: _product(a[0], out),
    "aten::_int_mm": lambda a, out: _product(a[0], out),
    "aten::convolution": lambda a, out: (a[0] if a[6] else out).numel() * a[1][0].numel(),
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda a, out: _attention(*a[:3]),
    "aten::_scaled_dot_product_flash_attention": lambda a, out: _attention(*a[:3]),
    "aten::_scaled_dot_product_efficient_attention": lambda a, out: _attention(*a[:3]),
    "aten::_scaled_dot_product_attention_math": lambda a, out: _attention(*a[:3]),
    "quantized::linear": lambda a, out: _product(a[0], out),
    "quantized::linear_dynamic": lambda a, out: _product(a[0], out),
    "aten::_fft_r2c": lambda a, out: _fft(a[0], a[1]),
    "aten::_fft_c2c": lambda a, out: _fft(a[0], a[1]),
    "aten::_fft_c2r": lambda a, out: _fft(out, a[1]),
}

# operations that multiply nothing together, beside torch's views and pointwise operations
FREE = frozenset(
    """
    alias all amax amin aminmax any arange argmax argmin argsort as_strided bernoulli bernoulli_ bincount bucketize cat
    clone constant_pad_nd contiguous copy_ count_nonzero cummax cummin cumprod cumsum dequantize detach diag_embed
    embedding empty empty_like empty_strided equal exponential_ eye fill_ flip floor_divide full full_like gather index
    index_add index_add_ index_copy index_fill index_put index_put_ index_select isin item lift_fresh linalg_vector_norm
    linspace _local_scalar_dense _log_softmax logcumsumexp logsumexp masked_fill_ masked_scatter masked_select max
    max_pool2d_with_indices mean median min multinomial native_batch_norm native_dropout native_group_norm
    native_layer_norm new_empty new_full new_ones new_zeros nll_loss_forward nonzero normal_ ones ones_like prod
    promote_types quantize_per_channel quantize_per_tensor rand rand_like randint randn randn_like randperm repeat
    repeat_interleave _reshape_alias resize_ roll scalar_tensor scatter scatter_ scatter_add scatter_add_ scatter_reduce
    searchsorted select_scatter slice_scatter _softmax sort split_with_sizes stack std sum _to_copy topk tril tril_ triu
    unbind unfold uniform_ _unique2 unique_dim _unsafe_view var var_mean zero_ zeros zeros_like
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class MacCount:
    """`total` MACs, and `by_module`: the module whose own code ran them (dotted name, "" for the outermost)."""

    total: int
    by_module: dict[str, int]

    def by_part(self) -> dict[str, int]:
        """The count of a Transformer of this course by part, named as in `transformer_macs`."""
        parts: Counter[str] = Counter()
        for name, macs in self.by_module.items():
            parts[_part(name)] += macs
        return dict(parts)


def _part(module: str) -> str:
    if module.endswith("token_mixer"):
        return "attention scores and mixing"
    if ".token_mixer." in module:
        return "attention projections"
    if "channel_mixer" in module:
        return "feed-forward"
    return "pooler" if module.endswith("pooler") else "head"


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.stack = [""]
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in FORMULAS:
            self.macs[self.stack[-1]] += FORMULAS[name](args, out)
        elif not (func.is_view or torch.Tag.pointwise in func.tags or name.removeprefix("aten::") in FREE):
            raise UncountedOperation(
                f"{name} has no MAC formula: add one to effnlp_lessons.measure.FORMULAS, or to FREE"
            )
        return out


def count_macs(model: Callable[..., Any], *inputs: Any) -> MacCount:
    """MACs of `model(*inputs)`, counted by running it once without gradients. 1 MAC = 2 FLOPs.

    `model` is a module or any function of tensors. A kernel that hides its products from torch's
    dispatcher (Triton) is not seen.

    Raises:
        UncountedOperation: an operation ran that has no formula and is not known to be free.
    """
    counter, handles = _Counter(), []

    def leave(*_: Any) -> None:
        counter.stack.pop()

    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: counter.stack.append(name)))
            handles.append(module.register_forward_hook(leave))
    try:
        with torch.no_grad(), counter:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return MacCount(counter.macs.total(), dict(counter.macs))


# ------------------------------------------------------------------------------------------ closed forms


def block_macs(config: TransformerConfig, length: int) -> dict[str, int]:
    """MACs of one block on one sequence of `length` tokens, by part (n: length, d: d_model).

    Projections 4 n d², scores and mixing 2 n² d, feed-forward 2 n d d_ff. They do not depend on the
    number of heads. Scores and mixing pass the feed-forward at n = d_ff.
    """
    if length < 0:
        raise ValueError(f"length must be >= 0 tokens, got {length}")
    d = config.d_model
    return {
        "attention projections": 4 * length * d * d,
        "attention scores and mixing": 2 * length * length * d,
        "feed-forward": 2 * length * d * config.d_ff,
    }


def transformer_macs(config: TransformerConfig, batch: int, length: int) -> dict[str, int]:
    """MACs of an encoder's forward pass over a batch of full-length sequences, by part; look-ups cost none."""
    macs = {part: batch * config.layers * count for part, count in block_macs(config, length).items()}
    return macs | ({"pooler": batch * config.d_model**2} if config.pooler else {})


def transformer_parameters(config: TransformerConfig) -> dict[str, int]:
    """Parameters of an encoder by part: weights and biases (a norm has both, per channel)."""
    d, layers = config.d_model, config.layers
    norms = 2 * layers + 1  # two a block, and one after the embeddings or after the last block
    parts = {
        "embeddings": (config.vocab_size + config.max_length + config.segments) * d,
        "attention": layers * 4 * (d * d + d),
        "feed-forward": layers * (d * config.d_ff + config.d_ff + config.d_ff * d + d),
        "norms": norms * 2 * d,
    }
    return parts | ({"pooler": d * d + d} if config.pooler else {})


# -------------------------------------------------------------------------------- size, time and memory


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def bytes_on_disk(model: nn.Module) -> int:
    """Size in bytes of the safetensors file that holds the model, found by writing it (shared tensors once)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_model(model, str(file))
        return file.stat().st_size


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one call: median and quartiles over `runs` calls."""

    median: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{1e3 * self.median:.1f} ms [{1e3 * self.low:.1f}, {1e3 * self.high:.1f}]"


def latencies(calls: dict[str, Callable[[], Any]], runs: int = 20, warmup: int = 3) -> dict[str, Timing]:
    """Time several calls side by side: `warmup` rounds unmeasured, then `runs` rounds of each in turn.

    Taking turns spreads a disturbance of the machine over all of them, so that ratios can be trusted
    more than the seconds. Runs without gradients, with torch's current number of threads.

    Raises:
        ValueError: fewer than two runs: there would be no spread.
    """
    if runs < 2:
        raise ValueError(f"runs must be >= 2, got {runs}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(warmup + runs):
            for name, call in calls.items():
                start = perf_counter()
                call()
                if turn >= warmup:
                    seconds[name].append(perf_counter() - start)
    timings = {}
    for name, values in seconds.items():
        low, _, high = quantiles(values, n=4, method="inclusive")
        timings[name] = Timing(median(values), low, high, runs)
    return timings


def latency(call: Callable[[], Any], runs: int = 20, warmup: int = 3) -> Timing:
    """Time one call: median and quartiles of its wall-clock seconds (see `latencies`)."""
    return latencies({"call": call}, runs, warmup)["call"]


def crossing(lengths: Sequence[int], first: Sequence[float], second: Sequence[float]) -> float | None:
    """Length from which `first` exceeds `second` for good, the measured points joined on log-log axes.

    None if `first` is not above at the end, or is above from the start.

    Raises:
        ValueError: lists of unequal length, or values that have no logarithm.
    """
    if not len(lengths) == len(first) == len(second):
        raise ValueError(f"lists must be equally long, got {len(lengths)}, {len(first)}, {len(second)}")
    if min((*lengths, *first, *second), default=0) <= 0:
        raise ValueError("lengths, first and second must be positive")
    gaps = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    below = [i for i, gap in enumerate(gaps) if gap < 0]
    if not below or below[-1] == len(gaps) - 1:
        return None
    left = below[-1]
    share = gaps[left] / (gaps[left] - gaps[left + 1])
    return lengths[left] * (lengths[left + 1] / lengths[left]) ** share


def peak_memory(call: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator held at once for `call()`, beyond what was held before.

    Includes temporary buffers inside the kernels and the result, not the weights and inputs that
    existed before. It repeats from run to run, unlike the process's resident memory. Runs without gradients.
    """
    with torch.inference_mode():
        call()  # lazy set-up inside the libraries is not this call's
        with profile(profile_memory=True) as recorded:
            result = call()
    del result
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@dataclass(frozen=True)
class Cost:
    """What a model costs on one input: the row of every cost table in the course."""

    parameters: int
    bytes_on_disk: int
    macs: int
    latency: Timing
    peak_memory: int

    def row(self) -> dict[str, str]:
        """Formatted for a table; the header carries the units."""
        return {
            "parameters (M)": f"{self.parameters / 1e6:.2f}",
            "on disk (MB)": f"{self.bytes_on_disk / 1e6:.1f}",
            "MACs (M)": f"{self.macs / 1e6:.1f}",
            "latency (ms) [quartiles]": str(self.latency).replace(" ms", ""),
            "peak memory (MB)": f"{self.peak_memory / 1e6:.1f}",
        }


def cost(model: nn.Module, *inputs: Any, runs: int = 20) -> Cost:
    """Measure `model(*inputs)` with the whole yardstick. MB = 10⁶ bytes; latency as it is on this machine."""
    return Cost(
        parameters=count_parameters(model),
        bytes_on_disk=bytes_on_disk(model),
        macs=count_macs(model, *inputs).total,
        latency=latency(lambda: model(*inputs), runs),
        peak_memory=peak_memory(lambda: model(*inputs)),
    )


def table(costs: dict[str, Cost]) -> str:
    """A plain-text table, one model a row."""
    rows = [{"": name} | cost.row() for name, cost in costs.items()]
    if not rows:
        raise ValueError("costs must hold at least one model")
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = ["  ".join(key.rjust(width) if key else " " * width for key, width in widths.items())]
    lines += ["  ".join(r[k].rjust(w) if k else r[k].ljust(w) for k, w in widths.items()) for r in rows]
    return "\n".join(lines)
