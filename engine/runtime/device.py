"""What the machine can serve: the device, the precision, and the Accelerator on that device."""

from __future__ import annotations

import datetime
import logging
import os
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("engine")


def choose_device(wanted: str) -> str:
    """The recipe's device made concrete: "cpu", "cuda" (the local rank's GPU) or "cuda:N"."""
    import torch

    if wanted == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        if wanted != "auto":
            log.warning("runtime.device is %s, but there is no usable CUDA GPU: running on the CPU", wanted)
        return "cpu"
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") and wanted == "auto":
        return "cpu"
    if wanted in ("auto", "cuda"):
        return "cuda"
    index, count = int(wanted.removeprefix("cuda:")), torch.cuda.device_count()
    if index >= count:
        what = f"runtime.device is {wanted}, but the GPUs are numbered 0 to {count - 1}"
        raise EngineError("E2.41", what, "runtime.device", "choose one of them")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        what = f"runtime.device is {wanted}, but each of several ranks needs its own GPU"
        raise EngineError("E2.42", what, "runtime.device", "use runtime.device=auto")
    return wanted


def choose_precision(wanted: str, device: str, emulate: bool) -> str:
    """The recipe's precision made concrete: fp32, bf16 or fp16."""
    import torch

    has_bf16 = device != "cpu" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if has_bf16 else "fp32"
    if wanted == "bf16" and device == "cpu" and not _cpu_has_bf16():
        log.warning(
            "training.precision is bf16, for which this CPU has no instructions: updates take many times as long"
        )
    if wanted == "bf16" and device != "cpu" and not has_bf16:
        raise EngineError("E2.43", "this GPU has no bf16", "precision", "use fp16 or fp32")
    if wanted == "fp16" and device == "cpu" and not emulate:
        what = "fp16 needs a GPU: on the CPU it would be slower than fp32 and no smaller"
        raise EngineError("E2.44", what, "precision", "use fp32 or bf16")
    return wanted


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself (x86 by AVX-512 or AMX, ARM); yes where this torch cannot tell."""
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def build_accelerator(device: str, timeout: int, *, host_too: bool = False) -> Accelerator:
    """Accelerate's part: processes, devices, gradient exchange.

    Args:
        timeout: seconds that a rank waits for another in a collective.
        host_too: GPU ranks exchange tensors in host memory as well (offloaded weights).

    Raises: EngineError E2.45 for other kinds of launch, E2.74 where the launched processes did not find each other.
    """
    _refuse_other_launches()
    # Accelerate lets the environment override the constructor here; the loop does its own accumulation.
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    if PartialState._shared_state and not torch.distributed.is_initialized():
        # An earlier run of this process, perhaps on another device.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    exchange: dict[str, Any] = {"timeout": datetime.timedelta(seconds=timeout)}
    if host_too and device != "cpu":
        exchange["backend"] = "cuda:nccl,cpu:gloo"
    try:
        accelerator = Accelerator(
            cpu=device == "cpu",
            # The loop opens autocast and owns the scaler; Accelerate's wrapper would add fp32 copies of the logits.
            mixed_precision="no",
            gradient_accumulation_steps=1,
            kwargs_handlers=[InitProcessGroupKwargs(**exchange)],
        )
    finally:
        if device.startswith("cuda:"):
            del os.environ["ACCELERATE_TORCH_DEVICE"]
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        what = f"launched for {accelerator.distributed_type.value}, which this engine does not run"
        raise EngineError("E2.45", what, "accelerate launch", "launch plain data parallelism (--multi_gpu)")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:  # each process would train alone, over the others' run folder
        what = f"{launched} processes were launched, but Accelerate joined {accelerator.num_processes}"
        raise EngineError("E2.74", what, "WORLD_SIZE", "launch with accelerate launch --multi_gpu, or with torchrun")
    return accelerator


def _refuse_other_launches() -> None:
    """Kinds of parallelism that a launch file may ask for and Accelerate, on some set-ups, silently leaves out."""
    others = {
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
        "ACCELERATE_USE_FSDP": "Accelerate's FSDP",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "Accelerate's parallelism config",
    }
    for name, kind in others.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            what = (
                f"launched for {kind}, which this engine does not run; it shards models by itself, with torch's FSDP2"
            )
            advice = "launch with --multi_gpu or torchrun, and set distributed.strategy=fsdp"
            raise EngineError("E2.45", what, name, advice)
