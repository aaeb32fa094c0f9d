"""Weight decay groups, schedules against transformers' own, optimizers on the CPU."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from engine.errors import EngineError
from engine.recipe.schema import Training
from engine.training import optim


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_decay_groups_are_those_of_the_trainer(family, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny.model(family)
    trainer = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), report_to=[]))
    decayed = set(trainer.get_decay_parameter_names(model)) & {
        name for name, _ in model.named_parameters()
    }  # tied: once
    groups = optim.parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {names[id(p)] for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    everything = {names[id(p)] for group in groups for p in group["params"]}
    assert ours == decayed and everything == set(names.values())


def test_frozen_parameters_are_left_out():
    model = tiny.model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    groups = optim.parameter_groups(model, 0.1)
    assert not any(p is model.model.embed_tokens.weight for group in groups for p in group["params"])


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [{"warmup_steps": 0}, {"warmup_steps": 7}, {"warmup_ratio": 0.15}])
def test_schedule_equals_transformers(kind, warmup):
    from transformers import get_scheduler

    total = 41
    training = Training(lr_scheduler_type=kind, learning_rate=1e-3, **warmup)

    def rates(build) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        schedule = build(optimizer)
        values = []
        for _ in range(total + 5):
            values.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return values

    ours = rates(lambda optimizer: optim.build_schedule(optimizer, training, total))
    steps = optim.warmup_updates(training, total)
    theirs = rates(lambda optimizer: get_scheduler(kind, optimizer, num_warmup_steps=steps, num_training_steps=total))
    assert ours[:total] == pytest.approx(theirs[:total], rel=1e-12, abs=1e-18)


def test_warmup_ratio_is_rounded_up_and_steps_win():
    assert optim.warmup_updates(Training(warmup_ratio=0.1), 41) == 5
    assert optim.warmup_updates(Training(warmup_ratio=0.1, warmup_steps=2), 41) == 2
    assert optim.warmup_updates(Training(warmup_ratio=0.1, warmup_steps=0), 41) == 0


def test_8bit_optimizer_steps_on_the_cpu():
    model = tiny.model("llama")
    groups = optim.parameter_groups(model, 0.0)
    optimizer = optim.build_optimizer(groups, Training(optim="adamw_8bit"), torch.device("cpu"))
    before = model.lm_head.weight.detach().clone()
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    assert not torch.equal(before, model.lm_head.weight)


def stepped(optimizer, model) -> None:
    for _ in range(3):
        model(torch.ones(1, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def copied(optimizer, *, fused) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer that have taken a saved state over."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    other = optim.build_optimizer(
        optim.parameter_groups(model, 0.1), Training(learning_rate=0.1), torch.device("cpu"), fused=fused
    )
    if optimizer is not None:
        other.load_state_dict(optim.as_saved(other, copy.deepcopy(optimizer.state_dict())))
    return model, other


@pytest.mark.parametrize(("saved", "able", "goes_on"), [(1, 1, True), (0, 1, None), (1, 0, None), (0, 0, None)])
def test_a_resumed_optimizer_keeps_its_kernel_where_the_run_can(saved, able, goes_on):
    """Fused and unfused steps round differently: a checkpoint of an earlier version goes on unfused."""
    first, optimizer = copied(None, fused=bool(saved))
    stepped(optimizer, first)
    second, resumed = copied(optimizer, fused=bool(able))
    assert [group["fused"] for group in resumed.param_groups] == [goes_on] * 2
    second.load_state_dict(first.state_dict())
    stepped(optimizer, first)
    stepped(resumed, second)
    exact = (goes_on or None) == (saved or None)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other) if exact else torch.allclose(one, other, atol=1e-6)


def test_a_kernel_that_is_none_is_refused():
    _, optimizer = copied(None, fused=True)
    saved = optimizer.state_dict()
    for value in (False, 1, "yes"):
        saved["param_groups"][0]["fused"] = value
        with pytest.raises(ValueError, match="fused"):
            optim.as_saved(optimizer, saved)


@pytest.mark.parametrize(("precision", "device", "fuses"), [("fp32", "cpu", 1), ("bf16", "cpu", 1), ("fp16", "cpu", 0)])
def test_a_loss_scaler_must_see_skipped_steps(precision, device, fuses):
    assert optim.may_fuse(torch.nn.Linear(2, 2), precision, torch.device(device)) == bool(fuses)


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_paged_optimizers_need_cuda(name):
    with pytest.raises(EngineError, match="CUDA") as caught:
        optim.build_optimizer([], Training(optim=name), torch.device("cpu"))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_moments_of_every_optimizer_come_back(kind):
    """8-bit moments of a large parameter are a mapping of six tensors, of a small one of two."""
    model = torch.nn.Linear(128, 64)
    optimizer = optim.build_optimizer([{"params": list(model.parameters())}], Training(optim=kind), torch.device("cpu"))
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    optim.check_moments(optimizer, saved)
    saved["state"][0]["step"] = "x"
    with pytest.raises(ValueError, match="no number"):
        optim.check_moments(optimizer, saved)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("paged_adamw_32bit", 1e-5), ("paged_adamw_8bit", 2e-3), ("adamw_8bit", 2e-3)],
)
def test_optimizers_on_a_gpu_follow_adamw(gpu, kind, tolerance):
    """8-bit moments follow it from afar: each of three updates of 1e-3 may differ by a part."""
    pytest.importorskip("bitsandbytes")
    if gpu.type != "cuda" and kind.startswith("paged"):
        pytest.skip("unified memory needs a GPU")
    weights = []
    for name in ("adamw", kind):
        torch.manual_seed(0)
        model = torch.nn.Linear(128, 64).to(gpu)  # 8,192 weights: large enough for 8-bit moments
        groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
        optimizer = optim.build_optimizer(groups, Training(optim=name, learning_rate=1e-3), gpu)
        for _ in range(3):
            model(torch.randn(16, 128).to(gpu)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        optim.check_moments(optimizer, optimizer.state_dict())
        weights.append(model.weight.detach().cpu())
    assert float((weights[0] - weights[1]).abs().max()) < tolerance
