"""Seeds and the state of random generators: Python's, NumPy's, torch's, and the GPU's of this rank."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (NumPy takes 32 bits)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def read_random_state(device: torch.device) -> dict[str, Any]:
    """The generators' states: "python", "numpy", "torch", and "cuda" on a GPU."""
    import numpy
    import torch

    state = {"python": random.getstate(), "numpy": numpy.random.get_state(legacy=True), "torch": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def write_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Inverse of `read_random_state`."""
    import numpy
    import torch

    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
