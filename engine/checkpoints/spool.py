"""Whole tensors of a sharded model on their way into a checkpoint: on the disk, so that host memory holds one at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1 << 16  # bytes; what is smaller is kept in memory


class Spool:
    """Copies of tensors in nameless files of a folder, mapped into memory: read when used, gone when the tensor is.

    The system may drop their pages at any time, so a model need not fit in host memory to be saved; and a killed process
    leaves nothing behind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._failure: OSError | None = None

    def keep(self, tensor: Tensor) -> Tensor:
        """The copy. It never raises, as other ranks may be waiting: `check` does, later."""
        import torch

        tensor = tensor.detach()
        if tensor.nbytes < _SMALL or self._failure is not None:
            return tensor.to("cpu", copy=self._failure is None)
        content = tensor.cpu().contiguous()
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(memoryview(content.view(-1).view(torch.uint8).numpy()))
                file.flush()
                storage = torch.UntypedStorage.from_file(f"/dev/fd/{file.fileno()}", False, content.nbytes)
        except OSError as error:
            self._failure = error
            return content
        return torch.empty(0, dtype=content.dtype).set_(storage, 0, content.shape)

    def check(self) -> None:
        """Raises: OSError where a tensor could not be written."""
        if self._failure is not None:
            raise self._failure
