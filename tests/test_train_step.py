"""One update: what an overflow, a NaN and an empty window do to weights, scale and schedule."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.collate import IGNORE_INDEX
from engine.errors import EngineError
from engine.loss.cross_entropy import supervised_positions, supervised_tokens
from engine.recipe.schema import Training
from engine.train import train_step
from engine.training import optim
from engine.training.state import Update, Window

CPU = torch.device("cpu")


class OneRank:
    """What `train_step` needs of the runtime."""

    world_size = 1
    accelerator = SimpleNamespace(no_sync=lambda model: nullcontext())
    ranks = SimpleNamespace(sum_across_ranks=lambda tensor: tensor)

    def __init__(self, device, dtype=None):
        self.device, self.dtype = device, dtype

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def to_device(self, batch):
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


class Parts:
    """A model, its optimizer and schedule, and windows of two micro-batches."""

    def __init__(self, *, scaler=None, device=CPU, dtype=None, **training):
        self.training = Training(learning_rate=1e-2, warmup_steps=0, lr_scheduler_type="linear", **training)
        self.model = tiny.model("bart", dropout=0.0).train().to(device)
        groups = optim.parameter_groups(self.model, 0.1)
        self.optimizer = optim.build_optimizer(groups, self.training, device)
        self.schedule = optim.build_schedule(self.optimizer, self.training, 10)
        self.scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
        self.runtime = OneRank(device, torch.float16 if self.scaler.is_enabled() else dtype)

    def window(self, masked=False):
        batches = [tiny.batch_for("bart"), tiny.batch_for("bart")]
        if masked:
            for batch in batches:
                batch["labels"].fill_(IGNORE_INDEX)
        tokens = sum(int(supervised_tokens(batch)) for batch in batches)
        return Window(batches, tokens, all_tokens=60, ids=["row_1", "row_2"])

    def step(self, window=None) -> Update:
        window = window or self.window()
        return train_step(self.model, window, self.optimizer, self.schedule, self.scaler, self.runtime, self.training)

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


def poison(parts, value):
    """Give one parameter's gradient a bad value in the next backward pass."""
    parameter = next(iter(parts.model.parameters()))

    def spoil(gradient):
        handle.remove()
        return gradient * value

    handle = parameter.register_hook(spoil)


def test_an_update_moves_weights_and_schedule():
    parts = Parts()
    before, rate = parts.weights(), parts.schedule.get_last_lr()[0]
    update = parts.step()
    assert update.applied and math.isfinite(update.loss) and update.grad_norm > 0
    assert update.learning_rate == rate and parts.schedule.get_last_lr()[0] < rate
    assert not torch.equal(before, parts.weights())
    assert all(parameter.grad is None for parameter in parts.model.parameters())


class Waits(TorchDispatchMode):
    """Operators whose result has a shape that only the device knows: the host waits for it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        name = function.overloadpacket.__name__
        if name in ("nonzero", "masked_select", "_unique2", "repeat_interleave"):
            self.names.append(name)
        return function(*arguments, **(settings or {}))


def test_no_shape_of_an_update_waits_for_the_device():
    """The places of the labels come with the batch."""
    parts = Parts()
    parts.step()  # the first one also tries the head
    window = parts.window()
    for expected in (["nonzero"] * 2, []):
        with Waits() as waits:
            parts.step(window)
        assert waits.names == expected
        for batch in window.batches:
            batch["supervised"] = supervised_positions(batch)


def test_gradients_are_clipped_to_the_norm_that_is_told():
    free, clipped = Parts(max_grad_norm=None), Parts(max_grad_norm=0.01)
    seen = []
    clipped.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(
            torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]).norm().item()
        )
    )
    torch.manual_seed(1)
    window = free.window()
    assert free.step(window).grad_norm == pytest.approx(clipped.step(window).grad_norm, rel=1e-6)
    assert seen[0] == pytest.approx(0.01, rel=1e-3)


def test_an_fp16_overflow_skips_the_update_lowers_the_scale_and_leaves_the_schedule():
    overflow_on(CPU)


@pytest.mark.gpu
def test_an_fp16_overflow_on_a_gpu(gpu):
    overflow_on(gpu)


def overflow_on(device):
    parts = Parts(scaler=torch.amp.GradScaler(device.type, init_scale=1024.0), device=device)
    assert parts.step().applied
    before, rate, scale = parts.weights(), parts.schedule.get_last_lr()[0], parts.scaler.get_scale()
    poison(parts, float("inf"))
    update = parts.step()
    assert not update.applied and not math.isfinite(update.grad_norm)
    assert torch.equal(before, parts.weights())
    assert parts.scaler.get_scale() == scale / 2
    assert parts.schedule.get_last_lr()[0] == rate
    assert parts.step().applied, "the next update goes on"


def test_fp16_learns_like_fp32():
    half_learns_like_full(Parts(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)), Parts())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_gpu_learns_like_fp32(gpu, precision):
    scaler = torch.amp.GradScaler(gpu.type, init_scale=1024.0, enabled=precision == "fp16")
    half_learns_like_full(Parts(scaler=scaler, device=gpu, dtype=torch.bfloat16), Parts(device=gpu))


def half_learns_like_full(half, full):
    window = full.window()
    losses = [(half.step(window).loss, full.step(window).loss) for _ in range(5)]
    assert all(ours == pytest.approx(theirs, rel=2e-2) for ours, theirs in losses)
    assert losses[-1][0] < losses[0][0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_gradient_aborts_before_the_weights_are_touched(value):
    parts = Parts()
    before = parts.weights()
    poison(parts, value)
    with pytest.raises(EngineError, match="row_1, row_2") as caught:
        parts.step()
    assert caught.value.exit_code == 7
    assert torch.equal(before, parts.weights())


def test_a_bad_gradient_is_skipped_on_request(caplog):
    parts = Parts(on_nonfinite="skip")
    before, rate = parts.weights(), parts.schedule.get_last_lr()[0]
    poison(parts, float("nan"))
    assert not parts.step().applied
    assert torch.equal(before, parts.weights()) and parts.schedule.get_last_lr()[0] == rate
    assert parts.step().applied


@pytest.mark.parametrize("enabled", [False, True])
def test_a_window_without_supervised_tokens_makes_no_update(enabled):
    parts = Parts(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled))
    before = parts.weights()
    update = parts.step(parts.window(masked=True))
    assert not update.applied and update.loss == 0.0
    assert torch.equal(before, parts.weights())
    assert parts.step().applied
