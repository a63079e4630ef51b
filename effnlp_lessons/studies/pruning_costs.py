"""What is faster and smaller after pruning, on one thread, one text of 128 tokens: matrices, layers, the classifier.

In one run, in turns: dense; the same with zeros in the dense kernel; torch's sparse kernels for scattered weights (CSR)
and for 32 x 32 blocks (BSR); 2:4; smaller dense matrices, without half or three quarters of the heads and neurons;
int8; a smaller one in int8. A layer is one of MiniLM's size (384 / 1,536) or of BERT-base's (768 / 3,072) with random
weights. Which head or neuron goes does not matter to the clock, so the first ones go; scattered weights go by size.

Bytes are closed forms for matrices and layers (`pruning.storage.matrix_bytes`; int8 one byte a weight and a float32
scale a row), and the size of the file for the classifier.

NOTE torch's sparse kernels are quick one way round only: W x^T, with the sparse matrix on the left. `F.linear(x, W)`
with a sparse W takes another kernel; it is timed beside the first, as "through F.linear".
NOTE torch has no 2:4 kernel for a CPU: two of four zeros run in the dense kernel.
NOTE int8 is `quantization.dynamic_int8`, with the pooler and the head left in float32.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from time import thread_time
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.layers import block_linears, with_layers
from effnlp_lessons.measure import Timing, bytes_on_disk, crossing
from effnlp_lessons.pretrained import load_teacher
from effnlp_lessons.pruning.masks import apply_masks_, block_sums, keep_top, n_of_m, prunable, spread_blocks
from effnlp_lessons.pruning.storage import matrix_bytes, save_pruned
from effnlp_lessons.pruning.structured import blocks_of, remove_heads, remove_layers, remove_neurons, save_shrunken
from effnlp_lessons.quantization.dynamic_int8 import DynamicInt8Linear
from effnlp_lessons.studies.runner import Outcome, Study
from effnlp_lessons.transformer import BERT_BASE, MINILM_L6, Encoder, TransformerConfig

BLOCK = (32, 32)
DENSE, TWO_OF_FOUR, INT8 = "dense", "2:4 in the dense kernel", "int8"
HALF, QUARTER, HALF_INT8 = "half of the heads and neurons", "a quarter of the heads and neurons", "half, in int8"
LAYERS = "half of the layers"
SIZES = {"MiniLM": MINILM_L6, "BERT-base": BERT_BASE}


def zeros(sparsity: float) -> str:
    """The name of zeros in the dense kernel."""
    return f"{100 * sparsity:.3g} % zeros in the dense kernel"


def csr(sparsity: float) -> str:
    """The name of scattered weights in torch's CSR kernel."""
    return f"CSR, {100 * sparsity:.3g} % zeros"


def bsr(sparsity: float) -> str:
    """The name of 32 x 32 blocks in torch's BSR kernel."""
    return f"32 x 32 blocks, {100 * sparsity:.3g} % zeros"


def rows(share: float) -> str:
    """The name of a smaller dense matrix."""
    return f"{100 * share:.3g} % of the rows"


def through_linear(name: str) -> str:
    """The same sparse matrix through `F.linear`."""
    return f"{name}, through F.linear"


class SparseLinear(nn.Module):
    """`linear` with what is not in `mask` left out, in torch's CSR or, with `block`, BSR kernel; for inference.

    y = (W x^T)^T + b, the sparse matrix on the left; indices are int32; blocks must be square for this kernel. With
    `through_linear` it is `F.linear(x, W, b)`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        mask: Bool[Tensor, "out in"],
        block: tuple[int, int] | None = None,
        through_linear: bool = False,
    ) -> None:
        super().__init__()
        weight = linear.weight.detach() * mask
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # "in beta state"
            sparse = weight.to_sparse_csr() if block is None else weight.to_sparse_bsr(block)
            places = sparse.crow_indices().int(), sparse.col_indices().int()
            make = torch.sparse_csr_tensor if block is None else torch.sparse_bsr_tensor
            self.weight = make(*places, sparse.values(), sparse.shape)
        self.bias, self.through_linear = linear.bias.detach(), through_linear

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product, dense (..., out)."""
        flat = x.flatten(0, -2)
        if self.through_linear:
            return F.linear(flat, self.weight, self.bias).view(*x.shape[:-1], -1)
        return (self.weight @ flat.T).T.add(self.bias).view(*x.shape[:-1], -1)


def scattered(weight: Tensor, sparsity: float) -> Bool[Tensor, "out in"]:
    """The mask of the largest weights of a matrix."""
    return keep_top(weight.detach().abs(), sparsity)


def blocky(weight: Tensor, sparsity: float) -> Bool[Tensor, "out in"]:
    """The mask of the blocks with the largest sums of |w|."""
    return spread_blocks(keep_top(block_sums(weight.detach().abs(), BLOCK), sparsity), BLOCK)


def with_zeros(model: nn.Module, choose: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy, the weights of its blocks that `choose(weight)` does not keep at 0."""
    model = with_layers(model, {})
    apply_masks_(model, {name: choose(weight) for name, weight in prunable(model).items()})
    return model


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy with all linear layers of its blocks replaced by `make(linear)`."""
    return with_layers(model, {name: make(model.get_submodule(name)) for name in block_linears(model)})


def without(model: nn.Module, share: float) -> nn.Module:
    """A copy without this share of the heads and of the neurons of every layer, the first ones."""
    blocks = blocks_of(model)
    model = remove_heads(model, {i: range(round(share * b.token_mixer.heads)) for i, b in enumerate(blocks)})
    neurons = {i: range(round(share * b.channel_mixer.contract.in_features)) for i, b in enumerate(blocks)}
    return remove_neurons(model, neurons)


def forms(model: nn.Module, setting: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    """`model`, a Transformer, in every form: (name, model), one after the other."""
    yield DENSE, model
    yield zeros(0.9), with_zeros(model, lambda weight: scattered(weight, 0.9))
    for sparsity in setting["csr"]:
        yield (
            csr(sparsity),
            replaced(model, lambda linear, s=sparsity: SparseLinear(linear, scattered(linear.weight, s))),
        )
    turned = replaced(model, lambda linear: SparseLinear(linear, scattered(linear.weight, 0.9), through_linear=True))
    yield through_linear(csr(0.9)), turned
    for sparsity in setting["bsr"]:
        yield (
            bsr(sparsity),
            replaced(model, lambda linear, s=sparsity: SparseLinear(linear, blocky(linear.weight, s), BLOCK)),
        )
    yield TWO_OF_FOUR, with_zeros(model, lambda weight: n_of_m(weight.detach().abs()))
    half = without(model, 0.5)
    yield HALF, half
    yield QUARTER, without(model, 0.75)
    yield INT8, replaced(model, DynamicInt8Linear)
    yield HALF_INT8, replaced(half, DynamicInt8Linear)


def in_turns(calls: Mapping[str, Callable[[], Any]], runs: int, seed: int, warmup: int = 3) -> dict[str, Timing]:
    """Seconds of the thread's own time, `runs` rounds of all calls, each round in another order.

    As `measure.latencies`, but on one thread the clock on the wall would count the machine's other work, and what a
    call finds in the caches depends on the call before it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(seed)
    with torch.inference_mode():
        for turn in range(warmup + runs):
            for name in order.sample(list(calls), len(calls)):
                start = thread_time()
                calls[name]()
                if turn >= warmup:
                    seconds[name].append(thread_time() - start)
    return {
        name: Timing(median(values), *quantiles(values, n=4, method="inclusive")[::2], runs)
        for name, values in seconds.items()
    }


def form_bytes(shapes: list[tuple[int, int]], setting: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of the matrices of layers in every form, as closed forms; zeros in a dense kernel are dense bytes."""
    found = {name: dense_bytes(shapes) for name in (DENSE, zeros(0.9))}
    for sparsity in setting["csr"]:
        found[csr(sparsity)] = sum(matrix_bytes("csr", n, m, kept_of(n * m, sparsity)) for n, m in shapes)
    for sparsity in setting["bsr"]:
        found[bsr(sparsity)] = sum(bsr_bytes(n, m, sparsity) for n, m in shapes)
    found[TWO_OF_FOUR] = sum(matrix_bytes("2:4", n, m, n * m // 2) for n, m in shapes)
    return found | {
        HALF: dense_bytes(shapes) // 2,
        QUARTER: dense_bytes(shapes) // 4,
        INT8: sum(n * m + 4 * n for n, m in shapes),
        HALF_INT8: sum(n * m + 4 * n for n, m in half_of(shapes)),
    }


def half_of(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Shapes of the six matrices of a layer (query, key, value, output, W1, W2) with half of its heads and neurons."""
    return [(n, m // 2) if place % 6 in (3, 5) else (n // 2, m) for place, (n, m) in enumerate(shapes)]


def dense_bytes(shapes: list[tuple[int, int]]) -> int:
    """float32."""
    return sum(matrix_bytes("dense", n, m, n * m) for n, m in shapes)


def kept_of(count: int, sparsity: float) -> int:
    """How many of `count` are kept, as `masks.keep_top` rounds."""
    return count - round(sparsity * count)


def bsr_bytes(n: int, m: int, sparsity: float, block: tuple[int, int] = BLOCK) -> int:
    """Values of the kept blocks, an int32 column for each, and where each row of blocks begins."""
    blocks = kept_of(n // block[0] * (m // block[1]), sparsity)
    return 4 * blocks * block[0] * block[1] + 4 * blocks + 4 * (n // block[0] + 1)


def matrix_calls(
    out: int, inner: int, tokens: int, setting: Mapping[str, Any], generator: torch.Generator
) -> dict[str, Callable[[], Tensor]]:
    """One matrix (out, inner) on the same `tokens` rows in every form."""
    linear = torch.nn.utils.skip_init(nn.Linear, inner, out)
    with torch.no_grad():
        linear.weight.normal_(0, 0.05, generator=generator)
        linear.bias.normal_(0, 0.05, generator=generator)
    x = torch.randn(tokens, inner, generator=generator)
    layers: dict[str, nn.Module] = {DENSE: linear, INT8: DynamicInt8Linear(linear)}
    for sparsity in setting["csr of a matrix"]:
        mask = scattered(linear.weight, sparsity)
        layers[csr(sparsity)] = SparseLinear(linear, mask)
        layers[through_linear(csr(sparsity))] = SparseLinear(linear, mask, through_linear=True)
        layers[bsr(sparsity)] = SparseLinear(linear, blocky(linear.weight, sparsity), BLOCK)
        layers[zeros(sparsity)] = nn.Linear(inner, out)
        layers[zeros(sparsity)].weight, layers[zeros(sparsity)].bias = nn.Parameter(linear.weight * mask), linear.bias
    for share in setting["rows"]:
        layers[rows(share)] = nn.Linear(inner, round(share * out))
    return {name: lambda layer=layer: layer(x) for name, layer in layers.items()}


def one_layer(config: TransformerConfig, seed: int) -> Encoder:
    """An encoder of one layer with random weights and as good as no embeddings."""
    return Encoder(replace(config, layers=1, vocab_size=1, max_length=1, segments=0, pooler=False), seed=seed).eval()


def file_bytes(model: nn.Module, setting: Mapping[str, Any]) -> dict[str, int]:
    """Bytes on disk of the classifier in those forms that have a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        found = {DENSE: save_shrunken(model, file), zeros(0.9): save_shrunken(model, file)}
        for sparsity in setting["csr"]:
            masks = {name: scattered(weight, sparsity) for name, weight in prunable(model).items()}
            found[csr(sparsity)] = save_pruned(model, masks, file, "csr")
            found[f"bit mask, {100 * sparsity:.3g} % zeros"] = save_pruned(model, masks, file, "bit mask")
        masks = {name: n_of_m(weight.detach().abs()) for name, weight in prunable(model).items()}
        found[TWO_OF_FOUR] = save_pruned(model, masks, file, "2:4")
        half = without(model, 0.5)
        found |= {HALF: save_shrunken(half, file), QUARTER: save_shrunken(without(model, 0.75), file)}
        found[LAYERS] = save_shrunken(remove_layers(model, range(0, len(blocks_of(model)), 2)), file)
        found[INT8] = bytes_on_disk(replaced(model, DynamicInt8Linear))
        found[HALF_INT8] = bytes_on_disk(replaced(half, DynamicInt8Linear))
    return found


def run(setting: dict[str, Any], seed: int) -> Outcome:
    """Time everything in turns, `setting["runs"]` times: float32, one text of `setting["tokens"]` tokens, one thread.

    `setting`: runs, tokens, matrices (a list of [out, inner]), csr and bsr (sparsities, for layers and classifier),
    "csr of a matrix" (sparsities), rows (shares), sizes (names of `SIZES`), and classifier (whether to time it).

    Numbers: "seconds", {what: {form: [median, lower quartile, upper quartile]}}, and "bytes", {what: {form: bytes}},
    for "384 x 1536" and so on (out x inner), "a layer of MiniLM", "a layer of BERT-base", "the classifier".
    """
    generator = torch.Generator().manual_seed(seed)
    seconds: dict[str, dict[str, list[float]]] = {}
    sizes: dict[str, dict[str, int]] = {}

    def time(what: str, calls: dict[str, Callable[[], Any]]) -> None:
        timings = in_turns(calls, setting["runs"], seed)
        seconds[what] = {name: [round(t, 7) for t in (v.median, v.low, v.high)] for name, v in timings.items()}

    for out, inner in setting["matrices"]:
        time(f"{out} x {inner}", matrix_calls(out, inner, setting["tokens"], setting, generator))
    for name in setting["sizes"]:
        config = SIZES[name]
        encoder = one_layer(config, seed)
        x = torch.randn(1, setting["tokens"], config.d_model, generator=generator)
        time(
            f"a layer of {name}",
            {form: lambda b=m.blocks[0], x=x: b(x) for form, m in forms(encoder, setting)},
        )
        shapes = [tuple(weight.shape) for weight in prunable(encoder).values()]
        sizes[f"a layer of {name}"] = form_bytes(shapes, setting)
    if setting["classifier"]:
        teacher = load_teacher()
        ids = torch.randint(1_000, 30_000, (1, setting["tokens"]), generator=generator)
        mask = torch.ones_like(ids, dtype=torch.bool)
        models = {LAYERS: remove_layers(teacher, range(0, 6, 2))}
        for form, model in forms(teacher, setting):
            model.encoder.embeddings = teacher.encoder.embeddings  # one table for all of them
            models[form] = model
        time("the classifier", {form: lambda m=m: m(ids, mask) for form, m in models.items()})
        sizes["the classifier"] = file_bytes(teacher, setting)
    return Outcome({"seconds": seconds, "bytes": sizes})


# ------------------------------------------------------------------------------------- what was recorded


def speedups(summary: Mapping[str, Any], what: str) -> dict[str, tuple[float, float, float]]:
    """{form: how many times as fast as dense}: (median of the runs, smallest, largest); dense and form in one run.

    Raises:
        ValueError: `what` that was not recorded.
    """
    runs = [run["seconds"] for run in summary["runs"]]
    if not all(what in run for run in runs):
        raise ValueError(f"what must be one of {sorted(runs[0])}, got {what!r}")
    found = {}
    for form in runs[0][what]:
        ratios = [run[what][DENSE][0] / run[what][form][0] for run in runs]
        found[form] = (median(ratios), min(ratios), max(ratios))
    return found


def seconds_of(summary: Mapping[str, Any], what: str) -> dict[str, float]:
    """{form: seconds}, the median of the runs' medians."""
    runs = [run["seconds"][what] for run in summary["runs"]]
    return {form: median(run[form][0] for run in runs) for form in runs[0]}


def csr_crossing(summary: Mapping[str, Any], what: str) -> float | None:
    """The sparsity from which the CSR kernel is faster than the dense one, for a matrix ("1536 x 384").

    The measured points are joined on log-log axes of time and share kept. None if it does not cross.
    """
    seconds, sparsities = seconds_of(summary, what), summary["runs"][0]["setting"]["csr of a matrix"]
    kept = sorted(1 - sparsity for sparsity in sparsities)
    by_kept = [seconds[csr(1 - share)] for share in kept]
    share = crossing(kept, by_kept, [seconds[DENSE]] * len(kept))
    return None if share is None else 1 - share


SETTING = {
    "tokens": 128,
    "matrices": [[384, 384], [1_536, 384], [384, 1_536], [3_072, 768]],
    "csr": [0.5, 0.8, 0.9, 0.95, 0.99],
    "csr of a matrix": [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99],
    "bsr": [0.5, 0.8, 0.9],
    "rows": [0.75, 0.5, 0.25, 0.1],
    "sizes": ["MiniLM", "BERT-base"],
    "classifier": True,
}
# a few seconds, for a notebook: one layer of MiniLM's size
LIVE = SETTING | {"runs": 9, "matrices": [], "csr": [0.5, 0.9], "bsr": [0.5], "sizes": ["MiniLM"], "classifier": False}
STUDY = Study(
    name="pruning_costs",
    question="Which form of pruning makes a matrix, a layer, a classifier faster or smaller on a CPU, and by how much?",
    run=run,
    recorded=(SETTING | {"runs": 25},),
    full=(SETTING | {"runs": 100},),
    seeds=(0, 1, 2),
    minutes=4,
    threads=1,
    timed=True,
)
