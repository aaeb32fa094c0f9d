"""Copies in host memory."""

from __future__ import annotations

import torch

from engine.checkpoints.host_copies import HostCopies


def test_tied_tensors_share_their_copy():
    weight = torch.randn(3, 3)
    copies = HostCopies().take("model", {"a": weight, "b": weight, "c": weight.clone()})
    assert copies["a"] is copies["b"] and copies["a"] is not copies["c"] and copies["a"] is not weight
    assert torch.equal(copies["a"], weight)
