"""A recipe without a model, and threads that stand in for ranks."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

from engine.recipe.schema import Recipe
from engine.runtime.ranks import RankGroup


def recipe_for(tmp_path: Path, **experiment) -> Recipe:
    recipe = Recipe()
    recipe.experiment.output_root = str(tmp_path / "experiments")
    recipe.runtime.device = "cpu"
    for key, value in experiment.items():
        setattr(recipe.experiment, key, value)
    return recipe


def in_ranks(world: int, task, timeout: float = 5.0, run_out: float = 30.0):
    """Call task(group) on `world` ranks at once; returns each one's result or exception."""
    from torch.distributed import HashStore

    store = HashStore()
    store.set_timeout(timedelta(seconds=2))
    results = [None] * world

    def rank_main(rank):
        group = RankGroup(rank, world, timeout=timeout, store=store)
        try:
            results[rank] = task(group)
        except BaseException as error:
            results[rank] = error
        finally:
            group.close()

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(run_out)
    return results
