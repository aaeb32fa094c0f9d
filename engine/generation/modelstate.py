"""Changes to a model that last for one decoding call, each undone on the way out, errors included."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_locks: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


@contextmanager
def exclusive(model: torch.nn.Module) -> Iterator[None]:
    """One decoding call at a time per model: calls change it while they run."""
    with _locks_guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 31 MB for the next request, instead of giving each back to the system.

    Every step allocates the logits anew (10 MB for 80 rows of 30,000), and having fresh pages mapped in costs ten times
    the arithmetic on them. glibc raises its own limits when it first frees a large block; this only makes it do so now.
    The block is never touched, so it costs nothing; on other systems nothing happens.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """No dropout; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def attention(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Let all attention layers of a transformers model use the registered function `name`.

    Sets the field behind `set_attn_implementation` directly: that method also validates, warns, and cannot restore
    submodels that differ from their parent.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [
        (c, c._attn_implementation_internal) for c in configs.values() if hasattr(c, "_attn_implementation_internal")
    ]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """The model without DistributedDataParallel and torch.compile around it; PEFT's wrapper stays."""
    while hasattr(model, "module") or hasattr(model, "_orig_mod"):
        model = model.module if hasattr(model, "module") else model._orig_mod
    return model


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside DDP, compile and PEFT wrappers. LoRA adapters sit in its layers and stay active.

    Raises: ValueError: for adapters that prepend to the prompt, which need PEFT's own `generate`.
    """
    model = bare(model)
    if not hasattr(model, "peft_config"):
        return model
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise ValueError(
            "prompt-learning adapters are not supported by engine.generation: merge or call model.generate"
        )
    return model.get_base_model()
