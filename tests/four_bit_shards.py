"""4-bit weights of a tiny Llama, spread over the ranks of a torchrun by FSDP2 and gathered: does any byte change?

torchrun --nproc-per-node 2 tests/four_bit_shards.py cuda|cpu FOLDER        FOLDER holds the base
"""

from __future__ import annotations

import os
import sys

import adapted
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from engine.models import sharding


def main(kind: str, folder: str) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cuda:nccl,cpu:gloo" if kind == "cuda" else "gloo")
    model = adapted.build(folder, precision="bf16", device=device, quantization={"load_in_4bit": True}).model
    before = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
    packed = [name for name, tensor in before.items() if tensor.dtype == torch.uint8]
    sharding.shard(model, device, param_dtype=None, cpu_offload=False)
    after = dict(model.named_parameters())
    assert packed and all(isinstance(after[name], DTensor) for name in packed)
    changed = [name for name, tensor in before.items() if not torch.equal(sharding.full(after[name]).cpu(), tensor)]
    dist.destroy_process_group()
    sys.exit(f"changed: {', '.join(changed)}" if changed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
