"""Tensors on their way into a checkpoint: the same to the bit, in no file that anybody sees, and failures told late."""

from __future__ import annotations

import errno

import pytest
import torch

from engine.checkpoints import spool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (300, 400)])
def test_a_kept_tensor_is_a_copy(tmp_path, dtype, shape):
    tensor = torch.randn(shape).mul(100).to(dtype)
    before = tensor.clone()
    kept = spool.Spool(tmp_path).keep(tensor)
    tensor.zero_()
    assert kept.dtype == dtype and torch.equal(kept, before)
    assert not list(tmp_path.iterdir())


def test_what_is_transposed_is_kept_as_it_reads(tmp_path):
    tensor = torch.randn(300, 400).t()
    assert torch.equal(spool.Spool(tmp_path).keep(tensor), tensor)


def test_a_full_disk_is_told_when_all_have_met(tmp_path, monkeypatch):
    def full(**settings):
        raise OSError(errno.ENOSPC, "no space left")

    own, tensor = spool.Spool(tmp_path), torch.randn(300, 400)
    own.check()
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", full)
    own.keep(tensor)
    own.keep(tensor)
    with pytest.raises(OSError, match="no space left"):
        own.check()
