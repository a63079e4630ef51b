"""One training loop for the whole course: seeded, in batches of similar length, resumable to the bit.

`train` minimises any loss over any examples that can say how long they are. Its random numbers come from
the plan's seed alone (the caller's generator is left as it was), a checkpoint is written atomically, and a
run that was killed goes on from it and ends with exactly the weights of a run that was not.
The optimizer is AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) with warm-up and linear decay, as BERT.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm


class Examples(Protocol):
    """What can be trained on: how long each example is (tokens), and how to make a batch of some."""

    lengths: Sequence[int]

    def batch(self, indices: list[int]) -> Any: ...


@dataclass(frozen=True)
class TrainingPlan:
    """How to train. `learning_rate` is the peak, `warmup` the share of steps that climb to it.

    `clip` bounds the gradient's norm (0: no bound). `bfloat16` runs the forward pass under CPU autocast.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    bfloat16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")


@dataclass
class History:
    """The loss of every step, in the unit of the loss (nats for cross-entropy)."""

    loss: list[float] = field(default_factory=list)


def bucketed_batches(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator, pool: int = 50
) -> list[list[int]]:
    """Random batches of examples of similar length, so that little is padded.

    The examples are shuffled, cut into pools of `pool` batches, sorted by length inside each pool, and
    the batches are shuffled again. Every example comes exactly once.
    """
    if not len(lengths):
        raise ValueError("lengths must hold at least one example, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), pool * batch_size):
        bucket = sorted(order[start : start + pool * batch_size], key=lambda i: lengths[i])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def learning_rate_at(step: int, steps: int, plan: TrainingPlan) -> float:
    """Linear warm-up to `plan.learning_rate`, then linear decay that reaches 0 after the last step."""
    warmup = round(plan.warmup * steps)
    if step < warmup:
        return plan.learning_rate * (step + 1) / (warmup + 1)
    return plan.learning_rate * (steps - step) / (steps - warmup)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    Whoever reads `path` finds the old file or the new one, never half of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, done: int, history: History, run: str
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    tensors["random"] = torch.random.get_rng_state()
    tensors["loss"] = torch.tensor(history.loss, dtype=torch.float64)
    # clones: safetensors refuses tensors that share memory, and tied weights do
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: save_file(tensors, file, {"run": run, "done": str(done)}))


def _load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: str) -> tuple[int, History]:
    try:
        file = safe_open(path, "pt")
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own kind for a damaged file
        raise ValueError(f"{path} is not a readable checkpoint ({error}); delete it to start again") from None
    if metadata.get("run") != run:
        raise ValueError(
            f"{path} belongs to another run: it has {metadata.get('run')}, this run is {run}; "
            "delete it or name another checkpoint"
        )
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.random.set_rng_state(tensors["random"])
    return int(metadata["done"]), History(tensors["loss"].tolist())


def train(
    model: nn.Module,
    examples: Examples,
    loss: Callable[[nn.Module, Any], Tensor],
    plan: TrainingPlan,
    *,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 50,
    after_step: Callable[[nn.Module, int], None] | None = None,
    progress: bool = True,
) -> History:
    """Train the parameters of `model` that require a gradient, in place; leaves it in evaluation mode.

    Args:
        loss: `loss(model, batch)` gives a scalar; `batch` is what `examples.batch(indices)` returned.
        checkpoint: file to write every `checkpoint_every` steps, and to go on from if it is there.
        after_step: called after each optimizer step with the model and the number of steps done (a mask
            puts its zeros back here). It must not keep state of its own: a resumed run would miss it.

    Raises:
        ValueError: a checkpoint that is damaged or was made by another plan, model or data; no parameters
            to train; a loss that is not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model has no parameter that requires a gradient")
    decayed = [p for p in parameters if p.ndim > 1]  # biases and norms are not decayed, as in BERT
    rest = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate)
    checkpoint = None if checkpoint is None else Path(checkpoint)
    shapes = sum(p.numel() for p in parameters)
    run = json.dumps(asdict(plan) | {"examples": len(examples.lengths), "parameters": shapes}, sort_keys=True)
    autocast = torch.autocast("cpu", torch.bfloat16) if plan.bfloat16 else nullcontext()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        done, history = 0, History()
        if checkpoint is not None and checkpoint.exists():
            done, history = _load_checkpoint(checkpoint, model, optimizer, run)
        per_epoch = len(bucketed_batches(examples.lengths, plan.batch_size, torch.Generator()))
        steps = per_epoch * plan.epochs
        bar = tqdm(total=steps, initial=done, disable=not progress, unit="step", leave=False)
        model.train()
        for epoch in range(done // per_epoch, plan.epochs):
            # the order of an epoch depends on (seed, epoch) alone: a resumed run finds its place again
            generator = torch.Generator().manual_seed(plan.seed * 100_003 + epoch)
            batches = bucketed_batches(examples.lengths, plan.batch_size, generator)
            for indices in batches[done - epoch * per_epoch :]:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(done, steps, plan)
                with autocast:
                    value = loss(model, examples.batch(indices))
                if not torch.isfinite(value):
                    raise ValueError(f"the loss is {value.item()} at step {done}; try a lower learning rate")
                optimizer.zero_grad()
                value.backward()
                if plan.clip:
                    nn.utils.clip_grad_norm_(parameters, plan.clip)
                optimizer.step()
                done += 1
                history.loss.append(value.item())
                if after_step is not None:
                    after_step(model, done)
                if checkpoint is not None and (done % checkpoint_every == 0 or done == steps):
                    _save_checkpoint(checkpoint, model, optimizer, done, history, run)
                bar.update()
                bar.set_postfix(loss=f"{value.item():.3f}")
        bar.close()
    model.eval()
    return history
