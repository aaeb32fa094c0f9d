"""Where a run's numbers come from: its recipe, the code, the libraries and the machine, and how fast it went.

All of it goes into `results.json`, so that a table or a model card can be written from the record alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import __version__
from engine.data.files import read_table
from engine.errors import EngineError
from engine.recipe.dump import without_secrets
from engine.runtime.peak_memory import measured_peak
from engine.scoring.intervals import bootstrap_interval
from engine.scoring.rouge import METRICS

if TYPE_CHECKING:
    import torch

    from engine.recipe.schema import Recipe

log = logging.getLogger("engine.train")
_ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "korouge-score",
)
_LIBRARIES += ("python-mecab-ko", "python-mecab-ko-dic")
_GIB = 2**30


def recipe_sha256(recipe: Recipe) -> str:
    """Of what the recipe sets apart from the defaults, without its name, its places and its secrets.

    Two runs with the same hash trained under the same settings; a key that a later version adds does not change it.
    """
    settings = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"experiment"})
    text = json.dumps(without_secrets(settings), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def code_state(root: Path = _ROOT) -> dict[str, Any]:
    """The package's version and, where it runs from a checkout, its commit and whether tracked files differ from that.

    An installed package has no `.git` beside it: the repository that it may lie in is the user's, and no business of ours.
    """
    known: dict[str, Any] = {"version": __version__, "commit": None, "dirty": None}
    if not (root / ".git").exists():
        return known
    # A watcher of files that the checkout configures is a program, and none is run here.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(root)]
    asked = {"commit": ["rev-parse", "HEAD"], "dirty": ["status", "--porcelain", "--untracked-files=no"]}
    try:
        found = {
            name: subprocess.run([*command, *words], capture_output=True, text=True, timeout=20, check=True).stdout
            for name, words in asked.items()
        }
    except (OSError, subprocess.SubprocessError):  # no git, a repository of somebody else's, an empty one
        return known
    return known | {"commit": found["commit"].strip(), "dirty": bool(found["dirty"].strip())}


def versions() -> dict[str, str]:
    """Of Python and of each library that has a part in the numbers; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device, world_size: int) -> dict[str, Any]:
    """The main rank's machine. `gpus`: one for each rank; memory in GiB."""
    import torch

    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": device.type,
        "gpu": gpu and gpu.name,
        "gpus": world_size if gpu else 0,
        "gpu_memory_gib": gpu and round(gpu.total_memory / _GIB, 1),
        "cpu": _cpu_name(),
        "cpus": allowed,
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1),
        "peak_memory_gib": round(measured_peak(device), 3),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    """As Linux tells it; elsewhere what Python knows of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def speeds(rows: Iterable[Mapping[str, Any]], test_metrics: Mapping[str, Any] | None) -> dict[str, float | None]:
    """Means over the whole run, from the rows of metrics.jsonl.

    Args:
        test_metrics: of the test split, which is decoded after the last row.

    Returns:
        train_samples_per_second, train_tokens_per_second (source and target, without padding), eval_samples_per_second
        (loss, decoding and scores), and wall_seconds: updates and evaluations, without loading and saving.
    """
    timed = [row for row in rows if row.get("seconds")]
    train = [row for row in timed if row["split"] == "train"]
    scored = [row for row in [*timed, test_metrics or {}] if row.get("seconds") and row.get("split") != "train"]
    return {
        "train_samples_per_second": _mean_rate(train, "samples_per_second"),
        "train_tokens_per_second": _mean_rate(train, "tokens_per_second"),
        "eval_samples_per_second": _mean_rate(scored, "samples_per_second"),
        "wall_seconds": sum(row["seconds"] for row in [*train, *scored]),
    }


def _mean_rate(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    seconds = sum(row["seconds"] for row in rows)
    return sum(row[name] * row["seconds"] for row in rows) / seconds if seconds else None


def interval(rows: Iterable[Mapping[str, Any]]) -> list[float] | None:
    """The 95 % bootstrap interval of rouge_mean over the rows of a prediction file; None where they have no scores."""
    means = [sum(float(row[name]) for name in METRICS) / len(METRICS) for row in rows if METRICS[0] in row]
    if not means:
        return None
    found = bootstrap_interval(means)
    return [found.low, found.high]


def interval_of(path: Path) -> list[float] | None:
    """The same of a prediction file; None also where it is gone or damaged, as a finished training does not fail for that."""
    try:
        return interval(record.values for record in read_table(path, encoding="utf-8", columns=METRICS).records)
    except (EngineError, ValueError, KeyError) as error:
        log.warning("no interval for the scores of %s: %s", path, error)
        return None
