"""Tiny models with adapters for tests: built from a folder, run on one fixed batch, trained for a few updates."""

from __future__ import annotations

import torch

from engine.loss.cross_entropy import summed_cross_entropy
from engine.models import adapters
from engine.models.build import build_model
from engine.recipe.schema import Recipe

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16}  # whole blocks for 4-bit weights
IDS = torch.tensor([[5, 6, 7, 300, 301, 9], [8, 376, 10, 377, 12, 3]])  # 374 and up: tokens that the base has not seen


def build(folder, precision="fp32", device=CPU, **sections):
    sections["lora"] = {"enabled": True, "r": 4} | sections.get("lora", {})
    recipe = Recipe(model={"name_or_path": str(folder)}, **sections)
    return build_model(recipe, device=device, precision=precision)


def batch_of(family, device=CPU):
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS.clone()}
    batch |= {"decoder_input_ids": IDS.roll(1, 1)} if family in ("bart", "t5") else {}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def logits(model, family, precision="fp32"):
    device = next(model.parameters()).device
    inputs = {name: tensor for name, tensor in batch_of(family, device).items() if name != "labels"}
    dtype = adapters.DTYPES[precision]
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32"):
        return model.eval()(**inputs).logits.float()


def train(bundle, family, updates=3, precision="fp32", learning_rate=1e-2):
    parameters = [p for p in bundle.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    device = parameters[0].device
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16", init_scale=2.0**10)
    bundle.model.train()
    losses = []
    for _ in range(updates):
        with torch.autocast(device.type, dtype=adapters.DTYPES[precision], enabled=precision != "fp32"):
            loss = summed_cross_entropy(bundle.model, batch_of(family, device)) / IDS.numel()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
