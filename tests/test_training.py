"""The training loop: batches, schedule, exact resume, and what happens when it is killed or misused."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effnlp_lessons.training import TrainingPlan, bucketed_batches, learning_rate_at, train, write_atomically

PLAN = TrainingPlan(epochs=3, batch_size=4, learning_rate=3e-2, seed=5)


class Points:
    """Sixty points of a noisy linear rule, as examples of unequal length."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(60, 6, generator=generator)
        self.y = (self.x.sum(1) > 0).long()
        self.lengths = [3 + i % 7 for i in range(60)]

    def batch(self, indices):
        return self.x[indices], self.y[indices]


def make_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, 2))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=300),
    batch_size=st.integers(1, 40),
    pool=st.integers(1, 5),
)
def test_every_example_comes_once(lengths, batch_size, pool):
    batches = bucketed_batches(lengths, batch_size, torch.Generator().manual_seed(1), pool)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)


def test_buckets_save_padding_and_change_with_the_seed():
    lengths = torch.randint(3, 60, (2_000,), generator=torch.Generator().manual_seed(3)).tolist()

    def slots(batches):
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    bucketed = bucketed_batches(lengths, 32, torch.Generator().manual_seed(1))
    shuffled = bucketed_batches(lengths, 32, torch.Generator().manual_seed(1), pool=1)
    assert slots(bucketed) < 1.1 * sum(lengths) < 1.6 * sum(lengths) < slots(shuffled)
    assert bucketed != bucketed_batches(lengths, 32, torch.Generator().manual_seed(2))
    assert bucketed == bucketed_batches(lengths, 32, torch.Generator().manual_seed(1))


def test_learning_rate_climbs_then_falls_to_zero():
    plan = TrainingPlan(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate_at(step, 100, plan) for step in range(100)]
    assert rates.index(max(rates)) == 10 and max(rates) == 1.0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.1 and 0 < rates[-1] < 0.02
    assert [learning_rate_at(s, 4, TrainingPlan(learning_rate=1.0, warmup=0)) for s in range(4)] == [
        1,
        0.75,
        0.5,
        0.25,
    ]


def test_it_learns_and_is_repeatable():
    first, second, other = make_model(), make_model(), make_model()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    history = train(first, Points(), loss, PLAN, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's generator is left alone
    torch.manual_seed(2)
    train(second, Points(), loss, PLAN, progress=False)
    train(other, Points(), loss, replace(PLAN, seed=6), progress=False)
    assert torch.equal(weights(first), weights(second)) and not torch.equal(weights(first), weights(other))
    whole = Points().batch(list(range(60)))
    assert loss(first, whole) < 0.6 * loss(make_model().eval(), whole)
    assert len(history.loss) == 45 and not first.training


def test_only_what_requires_a_gradient_is_trained():
    model = make_model()
    model[0].requires_grad_(False)
    frozen, head = model[0].weight.clone(), model[3].weight.clone()
    train(model, Points(), loss, PLAN, progress=False)
    assert torch.equal(model[0].weight, frozen) and not torch.equal(model[3].weight, head)


def test_every_epoch_has_an_order_of_its_own():
    points, orders = Points(), []

    class Watched:
        lengths = points.lengths

        def batch(self, indices):
            orders.append(tuple(indices))
            return points.batch(indices)

    train(make_model(), Watched(), loss, PLAN, progress=False)
    epochs = [orders[start : start + 15] for start in (0, 15, 30)]
    assert len(orders) == 45 and all(sorted(i for b in epoch for i in b) == list(range(60)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_clipping_bounds_the_gradient():
    free, clipped = make_model(), make_model()
    train(free, Points(), loss, replace(PLAN, clip=0), progress=False)
    train(clipped, Points(), loss, replace(PLAN, clip=1e-12, weight_decay=0), progress=False)
    start = weights(make_model())
    assert (weights(clipped) - start).abs().max() < 0.01 < (weights(free) - start).abs().max()


def test_weights_decay_and_biases_do_not():
    model, start = make_model(), make_model()
    plan = replace(PLAN, weight_decay=0.5)
    train(model, Points(), lambda m, b: 0 * loss(m, b), plan, progress=False)  # no gradient: decay alone acts
    assert torch.equal(model[0].bias, start[0].bias)
    ratio = model[0].weight / start[0].weight
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    assert ratio.mean() < 0.9


class Stop(Exception):
    pass


def interrupt_at(step):
    def after_step(model, done):
        if done == step:
            raise Stop

    return after_step


@pytest.mark.parametrize("stopped_at", [3, 15, 16, 31, 44])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path, stopped_at):
    whole, part = make_model(), make_model()
    expected = train(whole, Points(), loss, PLAN, progress=False)
    file = tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        train(part, Points(), loss, PLAN, checkpoint=file, checkpoint_every=3,
              after_step=interrupt_at(stopped_at), progress=False)  # fmt: skip
    resumed = make_model()
    history = train(resumed, Points(), loss, PLAN, checkpoint=file, checkpoint_every=3, progress=False)
    assert torch.equal(weights(resumed), weights(whole)) and history.loss == expected.loss


def test_finished_run_is_loaded_not_repeated(tmp_path):
    file, model = tmp_path / "run.safetensors", make_model()
    train(model, Points(), loss, PLAN, checkpoint=file, progress=False)
    again = make_model()
    history = train(again, Points(), lambda *_: pytest.fail("trained again"), PLAN, checkpoint=file, progress=False)
    assert torch.equal(weights(again), weights(model)) and len(history.loss) == 45


KILLED = """
    import sys, time, torch
    sys.path.insert(0, {tests!r})
    from test_training import PLAN, Points, loss, make_model
    from effnlp_lessons.training import train
    def slowly(model, done):
        print(done, flush=True)
        time.sleep(0.05)
    train(make_model(), Points(), loss, PLAN, checkpoint={file!r}, checkpoint_every=1,
          after_step=slowly, progress=False)
"""


def test_killed_run_goes_on_where_it_was(tmp_path):
    """SIGKILL at an arbitrary moment: a readable checkpoint is left, and the end is the same to the bit."""
    file = tmp_path / "run.safetensors"
    script = textwrap.dedent(KILLED.format(tests=os.path.dirname(__file__), file=str(file)))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != "10":
        assert process.poll() is None
    time.sleep(0.07)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert left == ["run.safetensors"]
    whole, resumed = make_model(), make_model()
    train(whole, Points(), loss, PLAN, progress=False)
    steps = []
    train(
        resumed,
        Points(),
        loss,
        PLAN,
        checkpoint=file,
        after_step=lambda m, done: steps.append(done),
        progress=False,
    )
    assert torch.equal(weights(resumed), weights(whole))
    assert 10 < steps[0] <= 14  # it did not start again


def test_damaged_or_foreign_checkpoint_is_refused_and_kept(tmp_path):
    file = tmp_path / "run.safetensors"
    train(make_model(), Points(), loss, PLAN, checkpoint=file, progress=False)
    good = file.read_bytes()
    with pytest.raises(ValueError, match="belongs to another run"):
        train(make_model(), Points(), loss, replace(PLAN, learning_rate=0.5), checkpoint=file, progress=False)
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="not a readable checkpoint.*delete it to start again"):
        train(make_model(), Points(), loss, PLAN, checkpoint=file, progress=False)
    assert file.read_bytes() == good[: len(good) // 2]


def test_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x"
    write_atomically(file, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, half)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_after_step_can_keep_a_mask():
    model = make_model()
    mask = torch.rand(16, 6, generator=torch.Generator().manual_seed(0)) < 0.5

    def put_zeros_back(model, done):
        with torch.no_grad():
            model[0].weight.mul_(mask)

    train(model, Points(), loss, PLAN, after_step=put_zeros_back, progress=False)
    assert (model[0].weight[~mask] == 0).all() and (model[0].weight[mask] != 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TrainingPlan(epochs=0), "epochs must be >= 1, got 0"),
        (lambda: TrainingPlan(warmup=1.0), "warmup must be in"),
        (lambda: bucketed_batches([], 4, torch.Generator()), "at least one example"),
        (lambda: bucketed_batches([1], 0, torch.Generator()), "batch_size must be >= 1, got 0"),
        (
            lambda: train(make_model().requires_grad_(False), Points(), loss, PLAN),
            "no parameter that requires",
        ),
        (
            lambda: train(make_model(), Points(), lambda m, b: loss(m, b) * torch.nan, PLAN, progress=False),
            "the loss is nan at step 0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
