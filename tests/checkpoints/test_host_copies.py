"""Copies in host memory."""

from __future__ import annotations

import pytest
import torch

from engine.checkpoints.host_copies import HostCopies


def test_tied_tensors_share_their_copy():
    weight = torch.randn(3, 3)
    copies = HostCopies().take("model", {"a": weight, "b": weight, "c": weight.clone()})
    assert copies["a"] is copies["b"] and copies["a"] is not copies["c"] and copies["a"] is not weight
    assert torch.equal(copies["a"], weight)


@pytest.mark.gpu
def test_copies_from_a_gpu_are_pinned_complete_and_made_over(gpu):
    weight, copies = torch.randn(1024, 1024, device=gpu), HostCopies()
    expected = weight.to("cpu", copy=True)
    taken = copies.take("model", {"a": weight})["a"]
    weight.zero_()  # training goes on while the copy is written
    assert torch.equal(taken, expected) and taken.device.type == "cpu"
    assert taken.is_pinned() == (gpu.type == "cuda")
    assert copies.take("model", {"a": weight})["a"].data_ptr() == taken.data_ptr() and not taken.any()
