"""One model spread over all ranks by torch's FSDP2: each rank keeps a part of every weight, gradient and moment.

`shard` changes the model in place; the training loop stays what it is. A layer's weights are gathered just before it runs
and dropped just after. Whatever leaves this room is plain again: whole tensors under the names of the unsharded model, so
that a checkpoint does not show how many ranks wrote it, nor how they held the model.

No rank but the first needs the model whole to begin with: the others lay it out on the meta device, where tensors have shapes
and no content, and get each layer's weights from the first just before they are cut. Gathering goes tensor by tensor. So there
is nothing that must be gathered whole, and one form of checkpoint.

Every function that gathers or fills is collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.generation.modelstate import bare


def shard(
    model: nn.Module,
    device: torch.device,
    *,
    param_dtype: torch.dtype | None,
    cpu_offload: bool,
    from_first: bool = False,
) -> None:
    """Spread the weights of `model`, which lies whole in host memory, over the ranks; parts and buffers go to `device`.

    Args:
        from_first: only rank 0 has it whole; on the others it is laid out on the meta device, and filled from there.
        param_dtype: type in which weights are gathered; None gathers them as they are kept. Gradients are summed in
            float32 either way.
        cpu_offload: keep the parts, and the optimizer's work, in host memory.
    """
    world = dist.get_world_size()
    settings = {
        "mesh": init_device_mesh(device.type, (world,)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type != "cpu") if cpu_offload else OffloadPolicy(),
    }
    for module in (*layers(model), model):  # last what is left: embeddings, the head that may be tied to them, a norm
        if from_first:
            for tensor in (*module.parameters(), *(model.buffers() if module is model else ())):
                _fill(tensor, device)
        fully_shard(module, **settings)


def layers(model: nn.Module) -> list[nn.Module]:
    """The modules that a model class must not split: its layers."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]


def layout(model: nn.Module) -> str:
    """A digest of everything but the content: names, shapes, types, what is trainable, what is tied.

    A tensor without content that a module keeps as a plain attribute makes it unlike any other: `shard` would not fill it.
    """
    named = (*model.named_parameters(), *model.named_buffers())  # tied ones once
    facts = [(name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad) for name, tensor in named]
    kept = [value for module in model.modules() for value in vars(module).values()]
    facts.append(any(isinstance(value, Tensor) and value.is_meta for value in kept))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@torch.no_grad()
def _fill(tensor: Tensor, device: torch.device) -> None:
    """Give a tensor the content that it has on rank 0, on `device`, in place; what is spread already keeps its own."""
    if isinstance(tensor, DTensor):
        return
    content = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor.to(device)
    content = content.contiguous()
    dist.broadcast(content.view(-1).view(torch.uint8), 0)  # as bytes: not every backend knows every type
    if not tensor.is_meta:
        tensor.data = content
    elif isinstance(tensor, nn.Parameter):
        torch.utils.swap_tensors(tensor, nn.Parameter(content, tensor.requires_grad))
    else:
        torch.utils.swap_tensors(tensor, content)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(bare(model), FSDPModule)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank; a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; of a part, this rank's own."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()


def gathered(
    tree: Any, keep: Callable[[Tensor], Tensor] | None = None, known: dict[int, Tensor | None] | None = None
) -> Any:
    """Nested dicts and lists with every part replaced by the whole tensor, on rank 0 only: None elsewhere.

    One tensor at a time, so that no other rank, and no GPU, ever holds the model whole; tied weights once, so that whoever
    writes them sees that they are one.

    Args:
        keep: where rank 0 puts a tensor before the next one comes, plain ones too. Default: in host memory, and plain ones
            stay. It must not raise, for the others would wait for rank 0.
    """
    known = {} if known is None else known
    if isinstance(tree, Mapping):
        return {key: gathered(value, keep, known) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gathered(value, keep, known) for value in tree]
    if not isinstance(tree, DTensor):
        return keep(tree) if keep and isinstance(tree, Tensor) and dist.get_rank() == 0 else tree
    place = address(tree)
    if place not in known or tree.to_local().numel() == 0:  # of small tensors this rank may have nothing
        whole = tree.full_tensor()
        known[place] = (keep or Tensor.cpu)(whole) if dist.get_rank() == 0 else None
    return known[place]


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that every rank has, laid out as `like`; without communication."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def parts_of_moments(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """An optimizer's saved state with whole moments, cut to the parts of its parameters. `saved` is left as it is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def cut(index: int, moments: Mapping[str, Any]) -> dict[str, Any]:
        own = parameters[index]
        return {
            name: part_of(value, own) if isinstance(value, Tensor) and value.shape == own.shape else value
            for name, value in moments.items()
        }

    return dict(saved) | {"state": {index: cut(index, moments) for index, moments in saved["state"].items()}}


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """While open, every rank holds the model whole and computes on its own, however many batches the others have."""
    if not is_sharded(model):
        yield
        return
    parts = [module for module in bare(model).modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not parts[0], recurse=False)
