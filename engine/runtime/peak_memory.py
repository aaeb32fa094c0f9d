"""How much memory this process has held at most."""

from __future__ import annotations

import resource
from pathlib import Path

import torch


def measured_peak(device: torch.device) -> float:
    """GiB that this process has held at most: of the GPU where it uses one, else of resident memory.

    `getrusage` answers for the parent of a forked process as well, so Linux's own count of this process is asked first.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    fallback = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), fallback) / 2**20
