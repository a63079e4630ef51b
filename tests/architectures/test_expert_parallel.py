"""Expert parallelism: four, two and one rank equal one process; the exchange, its bytes, and what is refused.

The ranks are processes of their own: torchrun starts this file four times, `work` writes down what each rank found,
and the tests read it. Groups of two ranks and of one are parts of the four.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from effnlp_lessons.architectures import expert_parallel
from effnlp_lessons.architectures.expert_parallel import (
    AllToAll,
    ExpertParallelFeedForward,
    all_to_all_bytes,
    average_gradients_,
    link_seconds,
    rank_and_size,
)
from effnlp_lessons.architectures.experts import MoEFeedForward, auxiliary_loss
from effnlp_lessons.transformer import Decoder, FeedForward, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=17, max_length=16, d_model=12, layers=2, heads=3, d_ff=20, segments=0, pooler=False, dropout=0.0
)
EXPERTS = 8
RANKS = (4, 2, 1)
NAMES = ("expand", "expand_bias", "contract", "contract_bias")
# batches of 3 x 7 tokens a rank
LAYERS = {
    "everything has room": {"capacity_factor": float("inf"), "policy": "all"},
    "tokens dropped": {"capacity_factor": 0.3, "policy": "all"},
    "second experts drawn": {"capacity_factor": 1.0, "policy": "random"},
    "three groups a rank": {"capacity_factor": 0.6, "policy": "random", "group": 7},
    "first experts alone": {"capacity_factor": 0.5, "policy": "none"},
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Large random numbers in all parameters, biases among them, in float64."""
    module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=1000 * seed + number))
    return module


def take_part_(part: nn.Module, whole: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Give `part` the parameters of `whole`, of the experts those of this rank."""
    part.double()
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(own_part(name, whole.get_parameter(name), group))
    return part


def own_part(name: str, values: Tensor, group: dist.ProcessGroup) -> Tensor:
    rank, ranks = rank_and_size(group)
    return values.chunk(ranks)[rank] if ".experts." in f".{name}" else values


def gradients(part: nn.Module, whole: nn.Module, group: dist.ProcessGroup) -> dict[str, tuple[Tensor, Tensor]]:
    expected = dict(whole.named_parameters())
    return {name: (p.grad, own_part(name, expected[name].grad, group)) for name, p in part.named_parameters()}


# ------------------------------------------------------------------------------------------- on every rank


def step(group: dist.ProcessGroup, settings: dict, train: bool = True) -> dict:
    """One layer and one backward pass, by the ranks of `group` and by one process."""
    rank, ranks = rank_and_size(group)
    shape = (3, 7, CONFIG.d_model)
    whole = MoEFeedForward(CONFIG, EXPERTS, seed=5, **{"group": 21, **settings}).train(train)
    part = ExpertParallelFeedForward(CONFIG, EXPERTS, seed=5, process_group=group, **settings).train(train)
    drawn = all(torch.equal(p, own_part(name, whole.get_parameter(name), group)) for name, p in part.named_parameters())
    fill_(whole)
    take_part_(part, whole, group)
    x = random(ranks, *shape, seed=1).requires_grad_()
    own = random(ranks, *shape, seed=1)[rank].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weights = random(ranks, *shape, seed=2)
    y = whole(x.flatten(0, 1)).unflatten(0, (ranks, 3))
    ((y * weights).sum() / ranks + 3 * whole.auxiliary_loss).backward()
    y_own = part(own)
    ((y_own * weights[rank]).sum() + 3 * part.auxiliary_loss).backward()
    average_gradients_(part, group)
    positions = part.last_routing.positions
    return {
        "same draw": drawn,
        "outputs": (y_own.detach(), y[rank].detach()),
        "input gradients": (own.grad / ranks, x.grad[rank]),  # the mean of the ranks' losses
        "gradients": gradients(part, whole, group),
        "dropped": int((positions < 0).sum()),
        "of dropped tokens": y_own.detach().flatten(0, 1)[(positions < 0).all(dim=1)],
    }


def counted(group: dist.ProcessGroup) -> dict:
    """Bytes that torch was asked to send to other ranks, and the formula's."""
    rank, ranks = rank_and_size(group)
    sent: list[int] = []
    send = dist.all_to_all_single

    def counting(output: Tensor, x: Tensor, **kwargs: object) -> None:
        sent.append(x.nbytes // ranks * (ranks - 1))
        send(output, x, **kwargs)

    layer = ExpertParallelFeedForward(CONFIG, EXPERTS, group=5, process_group=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counting)
        y = layer(random(3, 7, CONFIG.d_model, seed=rank).float().requires_grad_())
        forward = sum(sent)
        y.sum().backward()
    rows = layer.last_routing.rows
    formula = [all_to_all_bytes(EXPERTS, rows, CONFIG.d_model, ranks, training=t) for t in (False, True)]
    return {"counted": [forward, sum(sent)], "formula": formula, "exchanges": len(sent), "rows": rows}


def language_model(group: dist.ProcessGroup) -> dict:
    """Two steps of SGD of a decoder with experts, on texts of unlike lengths; the last rank has padding alone."""
    rank, ranks = rank_and_size(group)
    settings = {"capacity_factor": 0.5, "policy": "all", "seed": 3}

    def mixers(expert_mixer: Callable[[TransformerConfig], nn.Module]) -> Callable:
        return lambda config, layer: expert_mixer(config) if layer % 2 else FeedForward(config)

    whole = fill_(Decoder(CONFIG, channel_mixer=mixers(lambda c: MoEFeedForward(c, EXPERTS, **settings))))
    own = Decoder(
        CONFIG,
        channel_mixer=mixers(lambda c: ExpertParallelFeedForward(c, EXPERTS, process_group=group, **settings)),
    )
    take_part_(own, whole, group)
    ids = torch.randint(CONFIG.vocab_size, (ranks, 2, 9), generator=torch.Generator().manual_seed(4))
    lengths = torch.randint(1, 10, (ranks, 2), generator=torch.Generator().manual_seed(5))
    lengths[-1] = 0 if ranks > 1 else 9
    masks = torch.arange(9) < lengths[..., None]

    def loss(model: nn.Module, r: int) -> Tensor:
        """The rank's part of the mean over all predictions of all ranks."""
        real = masks[r, :, 1:]
        logits = model(ids[r], masks[r]).logits[:, :-1][real]
        nll = nn.functional.cross_entropy(logits, ids[r, :, 1:][real], reduction="sum")
        return nll / masks[:, :, 1:].sum() + 0.1 * auxiliary_loss(model) / ranks

    found = {}
    for _ in range(2):
        for model in (whole, own):
            model.zero_grad()
        for r in range(ranks):  # one process takes the ranks' batches one after the other
            loss(whole, r).backward()
        (ranks * loss(own, rank)).backward()
        average_gradients_(own, group)
        found = gradients(own, whole, group)
        with torch.no_grad():
            for parameter in (*whole.parameters(), *own.parameters()):
                parameter -= 0.1 * parameter.grad
    pairs = {name: (p.detach(), own_part(name, whole.get_parameter(name), group)) for name, p in own.named_parameters()}
    return {"gradients": found, "parameters": {n: (p, w.detach()) for n, (p, w) in pairs.items()}}


def exchange(group: dist.ProcessGroup) -> dict:
    """`AllToAll` on a tensor that is not contiguous, against the transposed table of all blocks; two derivatives."""
    rank, ranks = rank_and_size(group)
    table = random(ranks, ranks, 5, 3)  # sending rank, receiving rank
    weights = random(ranks, ranks, 5, 3, seed=1)
    x = table[rank].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    y = AllToAll.apply(x, group)
    (first,) = torch.autograd.grad((y * weights[rank]).sum(), x, retain_graph=True)
    (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((g**2).sum(), x)
    return {
        "outputs": (y.detach(), table[:, rank]),
        "gradients": (first, weights[:, rank]),
        "second derivatives": (second, 36 * table[rank] ** 3),  # of (3 x²)²
    }


def refusals(group: dist.ProcessGroup, strangers: dist.ProcessGroup) -> list[str]:
    """What is raised for 6 experts on 4 ranks, and on a rank that is not in the group."""
    messages = []
    for experts, where in ((6, group), (EXPERTS, strangers)):
        try:
            ExpertParallelFeedForward(CONFIG, experts, process_group=where)
        except (ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def work(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    pairs, single = [dist.new_group([0, 1]), dist.new_group([2, 3])], [dist.new_group([r]) for r in range(4)]
    groups = {4: dist.group.WORLD, 2: pairs[rank // 2], 1: single[rank]}
    found: dict = {"refusals": refusals(groups[4], pairs[1 - rank // 2])}
    for ranks, group in groups.items():
        found[ranks] = {name: step(group, settings) for name, settings in LAYERS.items()}
        found[ranks]["evaluation"] = step(group, LAYERS["second experts drawn"], train=False)
        found[ranks] |= {f.__name__: f(group) for f in (counted, language_model, exchange)}
    found["no gradient"] = without_gradient(groups[4])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def without_gradient(group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """One of two parameters has a gradient on rank 0 alone."""
    module = nn.Linear(2, 1)
    module.bias.grad = torch.full((1,), 1.0 + dist.get_rank())
    if dist.get_rank() == 0:
        module.weight.grad = torch.tensor([[4.0, -8.0]])
    average_gradients_(module, group)
    return module.weight.grad, module.bias.grad


# ------------------------------------------------------------------------------------------------ the tests


def torchrun(processes: int, *command: str) -> str:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.run([*start, *command], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the four ranks wrote down."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(4, __file__, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


def assert_equal(pair: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(*pair, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", [*LAYERS, "evaluation"])
def test_ranks_equal_one_process(found, name, ranks):
    steps = [rank[ranks][name] for rank in found]
    for step in steps:
        assert step["same draw"]
        assert_equal(step["outputs"])
        assert_equal(step["input gradients"])
        assert set(step["gradients"]) == {"router", *(f"experts.{p}" for p in NAMES)}
        for pair in step["gradients"].values():
            assert pair[1].abs().max() > 1e-4
            assert_equal(pair)
    nothing = [step["of dropped tokens"] for step in steps]
    assert all((y == 0).all() for y in nothing)
    assert (sum(step["dropped"] for step in steps) > 0) == (name != "everything has room")
    if name == "tokens dropped":
        assert sum(len(y) for y in nothing) > 4  # both choices


@pytest.mark.parametrize("ranks", RANKS)
def test_training_with_padding_equals_one_process(found, ranks):
    """The ranks have unlike numbers of tokens, so that their buffers differ, and one rank has none."""
    for rank in found:
        for kind in ("gradients", "parameters"):
            assert sum("experts" in name for name in rank[ranks]["language_model"][kind]) == 4
            for pair in rank[ranks]["language_model"][kind].values():
                assert_equal(pair)


@pytest.mark.parametrize("ranks", RANKS)
def test_exchange_transposes_and_is_its_own_backward(found, ranks):
    for rank in found:
        for pair in rank[ranks]["exchange"].values():
            assert_equal(pair)


@pytest.mark.parametrize("ranks", RANKS)
def test_bytes_are_those_of_the_formula(found, ranks):
    for rank in found:
        result = rank[ranks]["counted"]
        assert result["counted"] == result["formula"]
        assert result["exchanges"] == 4
    assert result["rows"] == 5 * 2  # 21 tokens in 5 groups of 5; C = 2 * 5 / 8, rounded up
    # half of the experts' rows of 12 float32 go to each other rank of two
    assert result["formula"] == {4: [2 * 5_760 // 2, 4 * 2_880], 2: [2 * 1_920, 4 * 1_920], 1: [0, 0]}[ranks]


def test_gradients_are_averaged_where_some_are_missing(found):
    for rank in found:
        weight, bias = rank["no gradient"]
        assert weight.tolist() == [[1.0, -2.0]] and bias.tolist() == [2.5]


def test_refusals_on_ranks(found):
    for number, rank in enumerate(found):
        assert rank["refusals"] == [
            "ValueError: experts must be a multiple of the 4 ranks, got 6",
            f"RuntimeError: process {number} is not in the process_group that was given",
        ]


def test_without_a_process_group():
    for call in (
        rank_and_size,
        lambda: ExpertParallelFeedForward(CONFIG, EXPERTS),
        lambda: average_gradients_(nn.Linear(1, 1)),
    ):
        with pytest.raises(RuntimeError, match="needs a process group: start with torchrun, call init_process_group"):
            call()
    with pytest.raises(SystemExit, match="start with: torchrun --nproc-per-node 2 -m effnlp_lessons"):
        expert_parallel.main()


def test_bytes_do_not_depend_on_the_number_of_experts():
    """C = 2 S / E rows: with E experts or 8 E, a rank sends 2 numbers per token and channel, less its own share."""
    for experts in (4, 8, 64):
        sent = all_to_all_bytes(experts, 2 * 1024 // experts, 512, 4, bytes_per_number=2)
        assert sent == 4 * 3 * (2 * 1024 * 512 * 2) // 4
    assert all_to_all_bytes(8, 3, 5, 1) == 0
    for name, sizes in {
        "experts": (0, 1, 1, 1),
        "rows": (2, 0, 1, 1),
        "d_model": (2, 1, 1.5, 1),
        "ranks": (2, 1, 1, 0),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
            all_to_all_bytes(*sizes)
    with pytest.raises(ValueError, match="experts must be a multiple of the 4 ranks, got 6"):
        all_to_all_bytes(6, 1, 1, 4)


def test_link_seconds_counts_bits():
    assert link_seconds(10**9, 8.0) == 1.0
    with pytest.raises(ValueError, match="gigabits_per_second must be > 0, got 0"):
        link_seconds(1, 0)


def test_demonstration():
    lines = torchrun(2, "-m", "effnlp_lessons.architectures.expert_parallel").splitlines()
    assert lines[0] == "2 ranks against one process (gloo), float64, one training step:"
    assert lines[-1] == "equal"


if __name__ == "__main__":
    work(Path(sys.argv[1]))
