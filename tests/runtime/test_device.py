"""What the machine cannot serve is refused or told; `auto` becomes something concrete."""

from __future__ import annotations

import logging

import pytest
from accelerate.utils import DistributedType

from engine.errors import EngineError
from engine.runtime import device


def test_a_missing_gpu_is_a_warning(monkeypatch, caplog):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, logger="engine"):
        assert device.choose_device("cuda:1") == "cpu" and device.choose_device("auto") == "cpu"
    assert sum("no usable CUDA" in record.message for record in caplog.records) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert device.choose_device("auto") == "cuda" and device.choose_device("cuda:0") == "cuda:0"
    with pytest.raises(EngineError, match=r"error E2\.41"):
        device.choose_device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineError, match=r"error E2\.42"):
        device.choose_device("cuda:0")


@pytest.mark.parametrize(("capabilities", "told"), [({"avx2": True, "avx512_bf16": False}, 1), ({"amx_bf16": True}, 0)])
def test_bf16_is_slow_on_a_cpu_without_it(monkeypatch, caplog, capabilities, told):
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    with caplog.at_level(logging.WARNING, logger="engine"):
        assert device.choose_precision("bf16", "cpu", False) == "bf16"
    assert caplog.text.count("has no instructions") == told


def test_precision_is_resolved(monkeypatch):
    import torch

    assert device.choose_precision("auto", "cpu", False) == "fp32"
    assert device.choose_precision("fp16", "cpu", True) == "fp16"
    for has_bf16, resolved in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has_bf16, **kw: has)
        assert device.choose_precision("auto", "cuda", False) == resolved
    with pytest.raises(EngineError, match=r"error E2\.43"):
        device.choose_precision("bf16", "cuda", False)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"])
def test_other_kinds_of_parallelism_are_refused_by_name(monkeypatch, name):
    """On a CPU Accelerate would silently deliver plain data parallelism instead."""
    monkeypatch.setenv(name, "true")
    with pytest.raises(EngineError, match=rf"E2\.45.*FSDP2 \| {name} .*distributed.strategy=fsdp"):
        device.build_accelerator("cpu", 60)


def test_ranks_that_did_not_join_are_refused(monkeypatch):
    """Each would train alone, over the same run folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    joined = type("Alone", (), {"distributed_type": DistributedType.NO, "num_processes": 1})
    monkeypatch.setattr("accelerate.Accelerator", lambda **settings: joined)
    with pytest.raises(EngineError, match=r"E2\.74.*2 processes were launched, but Accelerate joined 1"):
        device.build_accelerator("cpu", 60)
