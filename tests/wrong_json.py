"""Every value of every JSON file in a model, adapter or run folder, replaced by each of twenty wrong ones.

    python tests/wrong_json.py WORK_FOLDER [--all | --sample N] [--seed N] [--only TEXT]

A case is one wrong value in one place. It is used the way a user does: predicted with, trained on, resumed from. It may
work (nobody reads the value), or end as an `EngineError` of the folder's exit code, in one line, in seconds, within bounded
memory. All else is a finding, printed as one JSON line. Cases run in forked children of a process that has everything
imported and no threads, so a case that hangs, eats memory or dies costs nobody else anything.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

REMOVED, DEEP = object(), "@deep@"
WRONG: dict[str, Any] = {
    "removed": REMOVED,
    "null": None,
    "true": True,
    "-1": -1,
    "0": 0,
    "10^9": 10**9,
    "2^63": 2**63,
    "1e308": 1e308,
    "nan": float("nan"),
    "infinity": float("inf"),
    "empty text": "",
    "x": "x",
    "((": "((",
    "half character": "\ud800",
    "long text": "x" * 10_000,
    "path": "../x",
    "[]": [],
    "[[]]": [[]],
    "{}": {},
    "{a: 1}": {"a": 1},
    "deep": DEEP,
}
_DEPTH = 20_000
_MANY_ITEMS, _MANY_KEYS, _KEPT = 8, 60, 3  # of a vocabulary, an index, moments of weights a few entries stand for all
_SECONDS, _BYTES = 60, 3 << 30  # what a case may take, beyond what the process has when it starts
_LONGEST = 500  # characters of an error's line
DIALOGUE = "#Person1#: 안녕하세요, 오늘 회의는 몇 시에 시작하나요?\n#Person2#: 오후 세 시에 시작합니다."


@dataclass(frozen=True)
class Case:
    kind: str  # which folder
    file: str
    place: tuple[str | int, ...]
    wrong: str

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.file}: {'.'.join(map(str, self.place))} = {self.wrong}"


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where values stand in a JSON value: the whole, its entries, theirs; of very many alike the first few and the last."""
    yield at
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if len(keys) > (_MANY_KEYS if isinstance(value, dict) else _MANY_ITEMS):
        keys = [*keys[: _KEPT - 1], keys[-1]]
    for key in keys:
        yield from places(value[key], (*at, key))


def with_wrong(value: Any, place: tuple[str | int, ...], wrong: str) -> str:
    """The file's text with that value put there."""
    value = copy.deepcopy(value)
    put = WRONG[wrong]
    if not place:
        value = put
    else:
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        if put is REMOVED:
            del holder[place[-1]]
        else:
            holder[place[-1]] = put
    text = "" if value is REMOVED else json.dumps(value)
    return text.replace(json.dumps(DEEP), "[" * _DEPTH + "]" * _DEPTH)


# The folders


def make_folders(work: Path) -> dict[str, Path]:
    """Another maker's Bart in shards, our Llama prompted by its chat template, an adapter, a run finished and stopped."""
    import runs
    import tiny
    import torch

    from engine.models.build import build_model
    from engine.models.bundle import save_model
    from engine.recipe.schema import Recipe

    folders = {kind: work / kind for kind in USES}
    tokenizer = tiny.tokenizer("bart")
    model = tiny.model("bart", len(tokenizer))
    model.save_pretrained(folders["bart"], max_shard_size="60KB")
    tokenizer.save_pretrained(folders["bart"])
    special = json.dumps(tokenizer.special_tokens_map)
    (folders["bart"] / "special_tokens_map.json").write_text(special, encoding="utf-8")

    base = tiny.save("llama", work / "base")
    for kind, lora in (("llama", False), ("adapter", True)):
        recipe = Recipe(model={"name_or_path": str(base)}, lora={"enabled": lora, "r": 2}, prompt={"style": "chat"})
        bundle = build_model(recipe, device=torch.device("cpu"), precision="fp32")
        save_model(bundle, folders[kind])
    runs.train(run_recipe(work))
    shutil.copytree(folders["run"], folders["stopped"])
    for name in ("final_model", "run_status.json", "results.json"):
        left = folders["stopped"] / name
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return folders


def run_recipe(work: Path) -> Path:
    import runs

    shape = {"training__max_steps": 4, "checkpoint__strategy": "steps", "checkpoint__steps": 2}
    path = runs.write_recipe(work, rows=16, evaluation__generate=False, evaluation__metric="loss", **shape)
    return path


def json_files(kind: str, folder: Path) -> list[str]:
    """Relative paths of the files that this kind of folder is there for; a tokenizer is the same in all of them."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))
    if kind == "run":
        return [name for name in names if "/" not in name]
    names = [name for name in names if not name.startswith("checkpoint-2/")]
    return names if kind in ("bart", "llama") else [name for name in names if not name.endswith("tokenizer.json")]


def cases(folders: dict[str, Path], seed: int) -> list[Case]:
    """All cases, in an order drawn by the seed in which the files take turns: the first ones are of different files."""
    draw, files = random.Random(seed), []
    for kind, folder in folders.items():
        for file in json_files(kind, folder):
            value = json.loads((folder / file).read_text(encoding="utf-8"))
            found = [Case(kind, file, place, wrong) for place in places(value) for wrong in WRONG]
            draw.shuffle(found)
            files.append(found)
    draw.shuffle(files)
    return [case for turn in zip_longest(*files) for case in turn if case is not None]


# Using a folder


def predict(folder: Path, work: Path) -> None:
    from engine.prediction.predictor import Predictor

    Predictor.from_run(folder, device="cpu").predict_single(DIALOGUE, max_new_tokens=2)


def train_on(folder: Path, work: Path, *, lora: bool = False, style: str = "plain") -> None:
    """The parts of a run up to its first update and its first evaluation."""
    import torch

    from engine.data.rows import Example
    from engine.models import build
    from engine.prediction.summarizer import Summarizer
    from engine.recipe.schema import Recipe

    sections = {"lora": {"enabled": lora}, "prompt": {"style": style}, "generation": {"max_new_tokens": 2}}
    recipe = Recipe(model={"name_or_path": str(folder)}, **sections)
    bundle = build.build_model(recipe, device=torch.device("cpu"), precision="fp32")
    encoder = bundle.text_encoder()
    example = Example(id="1", dialogue=DIALOGUE, references=("회의는 세 시에 시작한다.",), topic=None, row=1)
    summarizer = Summarizer(bundle, encoder, recipe.generation, batch_size=1)
    feature = encoder.training_feature(example, 0)
    bundle.model(**bundle.collate([feature])).loss.backward()
    summarizer.summarize(bundle.model.eval(), [encoder.prompt_feature(example, 0)], {0: DIALOGUE})


def resume(folder: Path, work: Path) -> None:
    import runs

    overrides = [f"experiment.output_dir={folder}", "training.max_steps=5"]
    runs.train(work / "recipe.yaml", *overrides, resume="auto", allow_change=["training.max_steps"])


USES: dict[str, list[Callable[[Path, Path], None]]] = {
    "bart": [predict, train_on],
    "llama": [predict, lambda folder, work: train_on(folder, work, style="chat")],
    "adapter": [predict, lambda folder, work: train_on(folder, work, lora=True, style="chat")],
    "run": [resume, predict],
    "stopped": [resume, predict],
}
# Exit codes with which a wrong folder may be refused: its own, memory, and for runs what the README says of each file.
CODES = dict.fromkeys(("bart", "llama", "adapter"), {4, 8}) | dict.fromkeys(("run", "stopped"), {2, 4, 5, 6, 8})
_RUNS = ("run", "stopped")


def place_case(case: Case, source: Path, target: Path) -> None:
    """A copy of the folder with the case's value in it, and a manifest that vouches for it as a faulty writer's would."""
    shutil.copytree(source, target, copy_function=shutil.copy if case.kind in _RUNS else os.link)
    value = json.loads((source / case.file).read_text(encoding="utf-8"))
    text = with_wrong(value, case.place, case.wrong)
    (target / case.file).unlink()
    (target / case.file).write_text(text, encoding="utf-8")
    checkpoint = case.file.partition("/")[0]
    if checkpoint.startswith("checkpoint-") and not case.file.endswith("manifest.json"):
        sign(target / checkpoint)


def sign(checkpoint: Path) -> None:
    from engine.checkpoints.manifest import digest_of
    from engine.runtime.atomic import file_record

    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    del manifest["manifest_sha256"]
    manifest["files"] = {name: file_record(checkpoint / name) for name in manifest["files"]}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"manifest_sha256": digest_of(manifest)}))


def attempt(case: Case, use: Callable[[Path, Path], None], folder: Path, work: Path) -> dict[str, Any]:
    """How one use of the folder ended, in this process: what a command line would have told, and its exit code."""
    from engine.runtime.exits import Outcome

    try:
        use(folder, work)
    except BaseException as error:
        outcome = Outcome.of(error)
        last = traceback.extract_tb(error.__traceback__)
        trail = [f"{Path(f.filename).name}:{f.lineno}" for f in last if "/engine/" in f.filename or f is last[-1]]
        return {"code": outcome.code, "reason": outcome.reason, "trail": " ".join(trail[-4:])}
    return {"code": 0}


def fault(case: Case, ended: dict[str, Any]) -> str | None:
    """What is wrong with how a case ended, if anything."""
    if "lost" in ended:
        return ended["lost"]
    if ended["code"] == 0:
        return None
    if ended["code"] not in CODES[case.kind]:
        return f"code {ended['code']}"
    if len(ended["reason"].splitlines()) != 1 or len(ended["reason"]) > _LONGEST:
        return f"a message of {len(ended['reason'])} characters, {len(ended['reason'].splitlines())} lines"
    try:
        ended["reason"].encode()
    except UnicodeEncodeError:
        return "a message that cannot be printed"
    return None


def in_child(do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run in a forked child under limits of time and memory; returns its answer, or how it was lost."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            os.close(reader)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * os.sysconf("SC_PAGE_SIZE") + _BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            os.write(writer, json.dumps(do()).encode("ascii"))
        finally:
            os._exit(0)
    os.close(writer)
    answer, deadline = b"", time.monotonic() + _SECONDS
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            break
        answer += part
    late = time.monotonic() >= deadline
    if late:
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if late:
        return {"lost": f"not done in {_SECONDS} s"}
    return json.loads(answer) if answer else {"lost": f"died (status {status})"}


def findings(todo: list[Case], folders: dict[str, Path], work: Path) -> Iterator[dict[str, Any]]:
    """Every use of every case's folder that ended in another way than it may; progress on stderr."""
    began = time.monotonic()
    for number, case in enumerate(todo, start=1):
        for position, use in enumerate(USES[case.kind]):
            target = work / "case"
            shutil.rmtree(target, ignore_errors=True)
            place_case(case, folders[case.kind], target)
            ended = in_child(lambda case=case, use=use, target=target: attempt(case, use, target, work))
            if what := fault(case, ended):
                yield {"case": case.name, "use": position, "fault": what} | ended
        if number % 100 == 0:
            print(f"{number} of {len(todo)} cases, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sample", type=int, help="this many cases, drawn by the seed; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    work = options.work.resolve()
    folders = make_folders(work)
    for kind, folder in folders.items():  # everything is imported once, here; and whole folders work
        for use in USES[kind]:
            whole = work / "whole"
            shutil.rmtree(whole, ignore_errors=True)
            shutil.copytree(folder, whole)
            use(whole, work)
    todo = [case for case in cases(folders, options.seed) if options.only in case.name]
    total = len(todo)
    todo = todo[: options.sample]
    began, count = time.monotonic(), 0
    for finding in findings(todo, folders, work):
        count += 1
        print(json.dumps(finding), flush=True)
    seconds = time.monotonic() - began
    print(f"seed {options.seed}: {len(todo)} of {total} cases in {seconds:.0f} s, {count} findings", file=sys.stderr)
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
