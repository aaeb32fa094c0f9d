"""Run a recipe and keep the gradients of every update: record_gradients.py RECIPE OUT.safetensors [override ...]."""

from __future__ import annotations

import os
import sys

import torch
from safetensors.torch import save_file

from engine import load_recipe
from engine.train import run


def main() -> None:
    recipe, out, *overrides = sys.argv[1:]
    kept: dict[str, torch.Tensor] = {}
    plain_step = torch.optim.AdamW.step

    def step(optimizer, *arguments):
        update = len({name.split(".")[0] for name in kept})
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                kept[f"{update}.{len(kept)}"] = parameter.grad.detach().clone()
        return plain_step(optimizer, *arguments)

    torch.optim.AdamW.step = step
    run(load_recipe(recipe, overrides))
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(kept, out)


if __name__ == "__main__":
    main()
