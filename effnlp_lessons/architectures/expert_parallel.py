"""Expert parallelism: every rank holds a part of the experts, and tokens travel to them (Lepikhin et al. 2020).

"GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding" (arXiv 2006.16668, sec. 3). W ranks
hold E/W experts each. A rank routes its own tokens into a buffer (E, rows, d_model), as one process would. Then
    all-to-all: block j of the buffer, the rows for the experts of rank j, goes to rank j
    the rank's E/W experts work on the W blocks that arrived
    all-to-all back, and every rank combines the answers for its own tokens
An all-to-all of equal blocks transposes the table (sending rank, receiving rank). A transposition is its own inverse
and its own transpose, so the backward pass is the same exchange again: two forward, two backward.

Run the demonstration, two processes against one, on one machine (NCCL if there is a GPU for each, else gloo):
    torchrun --nproc-per-node 2 -m effnlp_lessons.architectures.expert_parallel
On two machines, the same command on both, HOST being the name of one of them:
    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id 12 \\
        -m effnlp_lessons.architectures.expert_parallel

NOTE of torch's own differentiable all-to-alls one is deprecated (`torch.distributed.nn.functional`), the other private
(`_functional_collectives`). The ten lines of `AllToAll` use public functions and show what the backward pass is.
NOTE the paper's compiler knows all sizes beforehand. Here padding is no token, so that ranks may need different numbers
of rows. They agree on the largest at every call, one number in an all-reduce; gloo would end the process otherwise.
NOTE every rank must call the layer, and run its backward pass, equally often, be it on padding alone: who does not
come is waited for.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnlp_lessons.architectures.experts import Experts, MoEFeedForward
from effnlp_lessons.architectures.gshard import Routing, gshard_routing
from effnlp_lessons.transformer import TransformerConfig

# ------------------------------------------------------------------------------------------- the exchange


class AllToAll(torch.autograd.Function):
    """`apply(x, process_group)`: block j of rank i becomes block i of rank j; `x` (ranks, ...), a block for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
        ctx.process_group = process_group
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(y, x.contiguous(), group=process_group)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return AllToAll.apply(g, ctx.process_group), None


def rank_and_size(process_group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """This process's rank in `process_group` and the number of ranks; None is the group of all processes.

    Raises:
        RuntimeError: if there is no process group, or this process is not in it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("expert parallelism needs a process group: start with torchrun, call init_process_group")
    rank = dist.get_rank(process_group)
    if rank < 0:
        raise RuntimeError(f"process {dist.get_rank()} is not in the process_group that was given")
    return rank, dist.get_world_size(process_group)


class ParallelExperts(Experts):
    """The experts of this rank, r E/W ... (r + 1) E/W - 1, and the way to those of the other ranks.

    Called like `Experts` and equal to it; `len` is E. The parameters have the names of `Experts` and E/W rows.

    Raises:
        RuntimeError: what `rank_and_size` raises.
        ValueError: if E is no multiple of the number of ranks.
    """

    def __init__(self, whole: Experts, process_group: dist.ProcessGroup | None = None) -> None:
        nn.Module.__init__(self)
        rank, ranks = rank_and_size(process_group)
        if len(whole) % ranks:
            raise ValueError(f"experts must be a multiple of the {ranks} ranks, got {len(whole)}")
        self.total, self.process_group, self.activation = len(whole), process_group, whole.activation
        for name, weights in whole.named_parameters():
            self.register_parameter(name, nn.Parameter(weights.detach().chunk(ranks)[rank].clone()))

    def __len__(self) -> int:
        return self.total

    def forward(self, x: Float[Tensor, "experts rows d_model"]) -> Float[Tensor, "experts rows d_model"]:
        """Rows of `x[e]` through expert e, wherever it is."""
        _, ranks = rank_and_size(self.process_group)
        rows = torch.tensor(x.shape[1], device=x.device)
        dist.all_reduce(rows, dist.ReduceOp.MAX, group=self.process_group)
        padded = F.pad(x, (0, 0, 0, int(rows) - x.shape[1]))
        blocks = AllToAll.apply(padded.unflatten(0, (ranks, -1)), self.process_group)  # (from rank, own expert, ...)
        y = super().forward(blocks.transpose(0, 1).flatten(1, 2))  # (own expert, all ranks' rows, d_model)
        blocks = y.unflatten(1, (ranks, -1)).transpose(0, 1)
        return AllToAll.apply(blocks, self.process_group).flatten(0, 1)[:, : x.shape[1]]


class ExpertParallelFeedForward(MoEFeedForward):
    """`MoEFeedForward` over several ranks, each with its own tokens: the weights and draws of one process.

    W ranks equal one process with the same seed that has the ranks' tokens one after the other, if no group of it
    holds tokens of two ranks. Gradients do so after `average_gradients_`. All E experts are drawn, and W - 1 of W parts
    thrown away.

    Args:
        process_group: the ranks that share the experts; None = all. The other arguments are `MoEFeedForward`'s.

    Raises:
        RuntimeError, ValueError: what `ParallelExperts` raises.
    """

    def __init__(
        self,
        config: TransformerConfig,
        experts: int,
        *,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float | None = None,
        group: int | None = None,
        policy: str = "random",
        aux_scale: str = "paper",
        seed: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            config, experts, capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor,
            group=group, policy=policy, aux_scale=aux_scale, seed=seed,
        )  # fmt: skip
        self.experts = ParallelExperts(self.experts, process_group)

    def route(
        self, logits: Float[Tensor, "groups size experts"], capacity: int, mask: Bool[Tensor, "groups size"]
    ) -> Routing:
        """`MoEFeedForward.route`, with the rank's own part of the draws that one process would make."""
        if self.policy != "random" or not self.training:
            return super().route(logits, capacity, mask)
        rank, ranks = rank_and_size(self.experts.process_group)
        draws = torch.rand(ranks, *mask.shape, generator=self.generator)[rank].to(logits.device)
        return gshard_routing(logits, capacity, draws=draws, mask=mask, aux_scale=self.aux_scale)


def average_gradients_(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Turn the gradients of the ranks' own losses into those of their mean, in place; every rank calls it.

    Parameters that every rank holds: the mean over the ranks, a missing gradient being 0. Experts: the sum over all
    ranks' losses has come through the exchange already, and there is no other copy, so it is only divided by W.
    The mean over the ranks is the mean over all tokens if each has equally many; otherwise scale each rank's loss.

    Raises:
        RuntimeError: what `rank_and_size` raises.
    """
    _, ranks = rank_and_size(process_group)
    own = [part for part in module.modules() if isinstance(part, ParallelExperts)]
    experts = {parameter for part in own for parameter in part.parameters()}
    shared = [p for p in module.parameters() if p.requires_grad and p not in experts]
    for parameter in experts:
        if parameter.grad is not None:
            parameter.grad /= ranks
    if not shared:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
    flat = torch.cat([grad.flatten() for grad in grads])  # one message for all
    dist.all_reduce(flat, group=process_group)
    for parameter, mean in zip(shared, (flat / ranks).split([p.numel() for p in shared]), strict=True):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype)


# ------------------------------------------------------------------------------------------ what it costs


def all_to_all_bytes(
    experts: int, rows: int, d_model: int, ranks: int, *, bytes_per_number: int = 4, training: bool = True
) -> int:
    """Bytes that one rank sends to the others, and receives, in one layer: exchanges (W - 1) / W E rows d_model bytes.

    There are 4 exchanges in training, 2 in evaluation. With rows = groups C and C = factor 2 S / E, a rank with N
    tokens sends (W - 1) / W 2 N factor d_model numbers an exchange: however many experts there are.

    Args:
        rows: of an expert's buffer, `Routing.rows`, on the rank that has most.

    Raises:
        ValueError: a number that is no integer >= 1, or experts that are no multiple of the ranks.
    """
    sizes = {"experts": experts, "rows": rows, "d_model": d_model, "ranks": ranks, "bytes_per_number": bytes_per_number}
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if experts % ranks:
        raise ValueError(f"experts must be a multiple of the {ranks} ranks, got {experts}")
    block = experts // ranks * rows * d_model * bytes_per_number
    return (4 if training else 2) * (ranks - 1) * block


def link_seconds(sent: int, gigabits_per_second: float) -> float:
    """Seconds that `sent` bytes need on a link of that speed in each direction: 8 bits a byte, no latency.

    Raises:
        ValueError: a speed that is not positive.
    """
    if not gigabits_per_second > 0:
        raise ValueError(f"gigabits_per_second must be > 0, got {gigabits_per_second}")
    return 8 * sent / (1e9 * gigabits_per_second)


# ------------------------------------------------------------------------------------- the demonstration


COMPARED = ("outputs", "router gradient", "expert gradients")


def relative_difference(pairs: list[tuple[Tensor, Tensor]]) -> Float[Tensor, ""]:
    """Largest absolute difference of any pair, relative to the largest number of its second."""
    return torch.stack([(a - b).detach().abs().max() / b.detach().abs().max() for a, b in pairs]).max()


def compare(process_group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> dict[str, float]:
    """One training step of W ranks against the same step of one process, in float64, on random tokens.

    Half of the usual capacity, so that tokens are dropped.

    Returns:
        The largest differences over all ranks, relative to the largest number, of what `COMPARED` names; the
        choices "dropped" on all ranks; the bytes "sent" by this rank.
    """
    rank, ranks = rank_and_size(process_group)
    config, experts, batch, length = TransformerConfig(d_model=48, heads=4, d_ff=96), 4 * ranks, 2, 65
    settings = {"capacity_factor": 0.5, "group": batch * length, "seed": 1}
    whole = MoEFeedForward(config, experts, **settings).double().to(device)
    layer = ExpertParallelFeedForward(config, experts, process_group=process_group, **settings).double().to(device)
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(2, ranks, batch, length, config.d_model, generator=generator).double().to(device)

    y = whole(x.flatten(0, 1)).unflatten(0, (ranks, batch))
    ((y - target).square().mean() + whole.auxiliary_loss).backward()
    y_rank = layer(x[rank])
    ((y_rank - target[rank]).square().mean() + layer.auxiliary_loss).backward()
    average_gradients_(layer, process_group)

    expected = {name: part.grad.chunk(ranks)[rank] for name, part in whole.experts.named_parameters()}
    gradients = [(part.grad, expected[name]) for name, part in layer.experts.named_parameters()]
    differences = torch.stack([
        relative_difference([(y_rank, y[rank])]),
        relative_difference([(layer.router.grad, whole.router.grad)]),
        relative_difference(gradients),
    ])  # fmt: skip
    dist.all_reduce(differences, dist.ReduceOp.MAX, group=process_group)
    return dict(zip(COMPARED, differences.tolist(), strict=True)) | {
        "dropped": int((whole.last_routing.positions < 0).sum()),
        "sent": all_to_all_bytes(experts, layer.last_routing.rows, config.d_model, ranks, bytes_per_number=8),
    }


def exchange_seconds(numbers: int, process_group: dist.ProcessGroup | None, device: torch.device | str) -> float:
    """Seconds of one all-to-all of `numbers` float32 per pair of ranks, the median of 5."""
    _, ranks = rank_and_size(process_group)
    x, seconds = torch.zeros(ranks, numbers, device=device), []
    for _ in range(6):
        dist.barrier(process_group)
        start = time.perf_counter()
        float(AllToAll.apply(x, process_group)[-1, -1])  # reading a number waits for a GPU
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[2]


def main() -> None:
    """Compare the ranks that torchrun started with one process; rank 0 prints."""
    if not dist.is_torchelastic_launched():
        raise SystemExit("start with: torchrun --nproc-per-node 2 -m effnlp_lessons.architectures.expert_parallel")
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        rank, ranks = rank_and_size()
        found = compare(device=device)
        seconds = exchange_seconds(2**18, None, device)
    finally:
        dist.destroy_process_group()
    equal = all(found[name] < 1e-10 for name in COMPARED)
    if rank == 0:
        print(f"{ranks} ranks against one process ({'nccl' if on_gpu else 'gloo'}), float64, one training step:")
        for name in COMPARED:
            print(f"  {name:<17} differ by at most {found[name]:.1e} of the largest")
        print(f"  {found['dropped']} choices found no place; each rank sent {found['sent']:,} bytes")
        if ranks > 1:
            print(f"  an exchange of 1 MiB with each rank: {1e3 * seconds:.2f} ms, {ranks - 1} MiB sent")
        print("equal" if equal else "NOT EQUAL")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
