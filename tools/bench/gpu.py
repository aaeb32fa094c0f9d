#!/usr/bin/env python3
"""Everything that needs a CUDA GPU, in one call of at most ten minutes: the GPU part of the tests, benches at real shapes.

    bash tools/bench/gpu.sh [--wheels FOLDER] [--limit 600] [--only PART ...] [--output FILE.json]
    bash tools/bench/gpu.sh --list                 # the plan
    bash tools/bench/gpu.sh --device cpu --tiny    # the same parts on toys: shows that they run, measures nothing

Needs torch, transformers and accelerate; a part that needs more is skipped, and the result says for want of what. Wheels of
what is missing may lie in `--wheels`; nothing is fetched. Each part is a process of its own with a limit of its own, the most
important first: one that fails, crashes or hangs is named and the next one starts. The JSON file is written after each part.
Ends with 1 where a part failed or ran out of time, with 4 where there is no GPU. A missed goal is told, and no failure.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LEAST = 15.0  # seconds under which no part is worth starting
PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "pytest", "pydantic", "triton")
MACHINE = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"cuda": torch.version.cuda, "gpus": [{"name": g.name, "gib": g.total_memory / 2**30} for g in gpus]}))
"""


@dataclass(frozen=True)
class Part:
    """One process. It leaves its figures as JSON files, or pytest's report, in the folder that stands for `{out}`.

    Attributes:
        seconds: at most.
        needs: modules without which it is skipped.
        gpus: how many it takes.
        goals: figure by its path, "<=" or ">=", and the value.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    gpus: int = 1
    goals: tuple[tuple[str, str, float], ...] = field(default=())


def tests(name: str, seconds: float, *files: str, needs: Iterable[str] = (), gpus: int = 1) -> Part:
    paths = [f"tests/{file}" for file in files]
    options = ["-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--junitxml={out}/tests.xml"]
    return Part(f"tests of {name}", seconds, (*options, *paths), ("pytest", *needs), gpus)


def bench(
    name: str, seconds: float, script: str, *arguments: str, needs: Iterable[str] = (), goals: Iterable = ()
) -> Part:
    return Part(name, seconds, (str(HERE / script), *arguments), tuple(needs), goals=tuple(goals))


def plan(device: str, tiny: bool) -> list[Part]:
    """All parts, the most important first. Together they are within ten minutes, and each may use all of its own time."""
    recipe = ("pydantic", "yaml")
    qlora = (*recipe, "peft", "bitsandbytes")
    small = ("--tiny",) if tiny else ()
    place = ("--device", device, *small)
    half = ("--dtype", "bfloat16" if device == "cuda" else "float32")
    decode = ("--random", *place, "--output", "{out}/decoding.json", "--rounds", "1" if tiny else "3")
    decode += ("--only", "ours", "graphs")  # without a GPU there are no graphs
    train = (*place, "--results", "{out}", *(("--rows", "2", "--length", "32", "--answer", "8") if tiny else ()))
    loop = ("--shape", "kobart", "--output", "{out}/training.json", "--rounds", "1", *small)
    loop += ("--updates", "3" if tiny else "60", "--precision", "bf16" if device == "cuda" else "fp32")
    twice = ("times_ours/graphs", "<=", 0.5)
    return [
        tests("decoding", 80, "generation/test_search.py"),
        tests("training", 80, "test_train_step.py", "checkpoints", "training/test_optim.py", "loss", needs=recipe),
        tests("adapters", 50, "models/test_adapters.py", "models/test_sharding.py", needs=(*recipe, "peft")),
        bench(
            "KoBART trains in bf16", 80, "train.py", *loop, "--contenders", "ours", "trainer", needs=recipe,
            goals=[("medians/ours/samples_per_second", ">=", 1500.0)],
        ),
        bench(
            "KoBART decodes 499 dialogues", 50, "generate.py", "kobart", "--beams", "4", "--examples",
            "6" if tiny else "499", *decode, goals=[("median_seconds/graphs", "<=", 5.0), twice],
        ),
        bench(
            "Llama-3.2-3B trains in 4 bits", 60, "gpu_train.py", "llama-3.2-3b", *train, needs=qlora,
            goals=[("peak_gib", "<=", 6.0)],
        ),
        bench(
            "Llama-3.2-3B against TRL", 70, "gpu_train.py", "llama-3.2-3b", *train, "--peer", needs=(*qlora, "trl"),
            goals=[("times_trl", ">=", 1.3)],
        ),
        bench("Llama-3.2-3B decodes", 50, "generate.py", "llama-3.2-3b", *decode, *half, goals=[twice]),
        bench(
            "Qwen3-4B trains in 4 bits", 40, "gpu_train.py", "qwen3-4b", *train, needs=qlora,
            goals=[("peak_gib", "<=", 8.0)],
        ),
        bench("Qwen3-4B decodes", 30, "generate.py", "qwen3-4b", *decode, *half, goals=[twice]),
    ]  # fmt: skip


# --- one part -------------------------------------------------------------------------------------------------------


def obstacle(part: Part, gpus: int, left: float) -> str | None:
    """Why this part is not started; None where it is."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if part.gpus > max(gpus, 1):
        return f"needs {part.gpus} GPUs"
    return None if left >= LEAST else f"only {max(left, 0.0):.0f} s of the limit were left"


def run_part(part: Part, seconds: float, out: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run a part for at most `seconds`; what it says goes to `log` in `out`. Nothing that it started outlives it."""
    command = [sys.executable, *(word.replace("{out}", str(out)) for word in part.command)]
    started = time.monotonic()
    with open(out / "log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also where this process is told to end
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = {"status": status_of(code), "seconds": round(time.monotonic() - started, 1)}
    if code is not None and code < 0:
        found["reason"] = f"killed by {signal.Signals(-code).name}"
    try:
        return found | outcome(part, out, found["status"])
    except (ValueError, ElementTree.ParseError) as error:  # ended while it wrote
        return found | {"status": "timed out" if code is None else "failed", "reason": f"broken figures: {error}"}


def status_of(code: int | None) -> str:
    return "timed out" if code is None else "failed" if code else "passed"


def outcome(part: Part, out: Path, status: str) -> dict[str, Any]:
    """Figures that a part left, and the end of its log where it did not pass."""
    found: dict[str, Any] = {}
    report, files = out / "tests.xml", sorted(out.glob("*.json"))
    if report.exists():
        found["figures"] = outcomes_of(report)
        if status == "passed" and not found["figures"]["passed"]:
            found |= {"status": "skipped", "reason": "; ".join(found["figures"]["skipped"])}
    elif files:
        found["figures"] = json.loads(files[-1].read_text(encoding="utf-8"))
    elif status == "passed":
        found |= {"status": "failed", "reason": "it left no figures"}
    if part.goals and "figures" in found:
        found["goals"] = {" ".join(map(str, goal)): met(found["figures"], goal) for goal in part.goals}
    if found.get("status", status) in ("failed", "timed out"):
        found["log"] = (out / "log").read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
    return found


def outcomes_of(report: Path) -> dict[str, Any]:
    """pytest's report: how many tests passed, which ones failed, and the skipped ones by reason."""
    passed, failed, skipped = 0, [], {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name', '')}".removeprefix("tests.")
        if (reason := case.find("skipped")) is not None:
            skipped.setdefault(reason.get("message", ""), []).append(name)
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}


def met(figures: dict[str, Any], goal: tuple[str, str, float]) -> bool | None:
    """Whether a goal is reached; None where its figure was not measured."""
    path, relation, value = goal
    found: Any = figures
    for key in path.split("/"):
        found = found.get(key) if isinstance(found, dict) else None
    if found is None:
        return None
    return found <= value if relation == "<=" else found >= value


# --- the whole call -------------------------------------------------------------------------------------------------


def run_parts(
    parts: list[Part], limit: float, gpus: int, environment: dict[str, str], result: dict[str, Any], output: Path
) -> bool:
    """Run what can be run before `limit` seconds are over; whether nothing failed. `result["parts"]` grows with each."""
    end = time.monotonic() + limit
    result["parts"] = {}
    for part in parts:
        left = end - time.monotonic()
        with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
            if (reason := obstacle(part, gpus, left)) is not None:
                found: dict[str, Any] = {"status": "skipped", "reason": reason, "seconds": 0.0}
            else:
                print(f"== {part.name}", flush=True)
                found = run_part(part, min(part.seconds, left), Path(folder), environment)
        result["parts"][part.name] = found
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        told = [found.get("reason"), *(f"{goal}: {reached}" for goal, reached in found.get("goals", {}).items())]
        print(f"{part.name}: {found['status']}, {found['seconds']:.0f} s", *filter(None, told), sep="; ", flush=True)
        for line in found.get("log", []):
            print(f"    {line}", flush=True)
    return all(found["status"] in ("passed", "skipped") for found in result["parts"].values())


def install(wheels: Path, folder: str) -> str | None:
    """Unpack a folder of wheels where the parts find them, before installed packages of the same name; what went wrong."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder]
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    done = subprocess.run([*pip, *files], capture_output=True, text=True, check=False)
    sys.path.insert(0, folder)
    return f"{len(files)} wheels in {wheels}: {done.stderr.strip()[-500:]}" if done.returncode or not files else None


def environment_of(device: str, site: str) -> dict[str, str]:
    path = [str(ROOT), site, os.environ.get("PYTHONPATH", "")]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    told = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "TEST_DEVICE": "cuda:0" if device == "cuda" else device}
    return os.environ | quiet | told | hidden | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def about(environment: dict[str, str]) -> dict[str, Any]:
    """The machine and what is installed on it. Asked in a process of its own, which leaves no memory taken on the GPU."""
    done = subprocess.run(
        [sys.executable, "-c", MACHINE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        sys.exit(f"torch does not start here:\n{done.stderr[-2000:]}")
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return json.loads(done.stdout.splitlines()[-1]) | {"versions": versions, "commit": commit()}


def commit() -> str | None:
    """The checkout's; None in a copy without its history."""
    with suppress(OSError):
        told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        return told.stdout.strip() or None
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use where packages are missing")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose names hold one of these words")
    parser.add_argument("--output", type=Path, help="default: tools/bench/results/gpu-<name of the GPU>.json")
    parser.add_argument("--commit", help="what to write down as the commit, where this is a copy without its history")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--list", action="store_true", help="show the plan and end")
    options = parser.parse_args(argv)
    started = time.monotonic()
    parts = [p for p in plan(options.device, options.tiny) if any(word in p.name for word in options.only or [""])]
    if options.list:
        print("\n".join(f"{part.seconds:4.0f} s  {part.name}: {' '.join(part.command)}" for part in parts))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu-site-") as site:
        unusable = install(options.wheels, site) if options.wheels else None
        environment = environment_of(options.device, site)
        result = about(environment) | {"device": options.device, "tiny": options.tiny, "unusable_wheels": unusable}
        result["commit"] = options.commit or result["commit"]
        if options.device == "cuda" and not result["gpus"]:
            print("no CUDA GPU here: nothing was run and nothing was written", file=sys.stderr)
            return 4
        name = result["gpus"][0]["name"] if options.device == "cuda" else "cpu"
        output = options.output or HERE / "results" / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
        left = options.limit - (time.monotonic() - started) - 5.0  # for the end itself
        well = run_parts(parts, left, len(result["gpus"]), environment, result, output)
    print(unusable or "", f"-> {output}", sep="\n")
    return 0 if well and not unusable else 1


if __name__ == "__main__":
    raise SystemExit(main())
