"""Copies of tensors in host memory, so that a checkpoint can be written while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class HostCopies:
    """Copies of tensors in host memory, whose buffers are kept from save to save.

    From a GPU they are pinned: the copy then runs at the speed of the bus. Tensors that share memory (tied
    embeddings) share their copy too, so that whoever writes them still sees that they are one.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A snapshot of `tensors`; the one before of the same kind is overwritten."""
        import torch

        copies, seen, on_gpu = {}, {}, False
        for name, tensor in tensors.items():
            identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if identity in seen and tensor.numel():
                copies[name] = copies[seen[identity]]
                continue
            seen[identity], on_gpu = name, on_gpu or tensor.is_cuda
            buffer = self._buffer(kind, name, tensor)
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _buffer(self, kind: str, name: str, tensor: Tensor) -> Tensor:
        import torch

        buffer = self._buffers.get((kind, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[(kind, name)] = buffer
        return buffer
