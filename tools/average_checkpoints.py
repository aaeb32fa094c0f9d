#!/usr/bin/env python3
"""Make one model whose weights are the mean of several checkpoints', and say what it gains on the dev split.

    python tools/average_checkpoints.py RUN --last 3
    python tools/average_checkpoints.py FOLDER FOLDER [...] --weights 2 1 --output FOLDER

The result is a plain Hugging Face folder (safetensors), as large and as fast as one of its members. Of adapters the two
factors are averaged one by one, which comes near the mean of their products only while the adapters are close together,
as checkpoints of one run are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402
from engine.runtime.run_folder import CHECKPOINT  # noqa: E402

if TYPE_CHECKING:
    from engine.recipe.schema import Recipe

NOTHING_WRITTEN = "nothing was written"
# The card tells of other scores.
_NOT_THE_MODEL = {"manifest.json", "averaging.json", "trainer_state.json", "README.md"}


def last_checkpoints(run: Path, count: int) -> list[Path]:
    """The run's latest finished checkpoints, oldest first. Raises EngineError E5 where there are fewer."""
    if not run.is_dir():
        raise EngineError("E5.61", "no such run folder", str(run), "check the path", safe=NOTHING_WRITTEN)
    found = sorted(
        (int(match[1]), folder)
        for folder in run.iterdir()
        if (match := CHECKPOINT.fullmatch(folder.name)) and (folder / "manifest.json").is_file()
    )
    if len(found) < count:
        there = ", ".join(folder.name for _, folder in found) or "none"
        advice = "ask for fewer, or train with a greater checkpoint.save_total_limit"
        raise EngineError("E5.60", f"--last {count}, but the run holds {there}", str(run), advice, safe=NOTHING_WRITTEN)
    return [folder for _, folder in found[-count:]]


def average(folders: Sequence[Path], weights: Sequence[float] | None, output: Path) -> None:
    """Write the mean of `folders` to `output`, in the last one's layout and types, one tensor at a time.

    Raises: EngineError: E4 for folders that are not the same model, or that our loader would refuse as well.
    """
    import ensembling
    from safetensors.torch import save_file

    from engine.models import hub
    from engine.recipe.dump import dump
    from engine.runtime.atomic import new_folder, write_json_atomically

    for folder in folders:
        hub.check_folder(folder)
    try:
        with new_folder(output) as partial, ExitStack() as stack:
            members = [Tensors(folder, stack) for folder in folders]
            ensembling.check_names([list(member.files) for member in members])
            for shard, names in members[-1].shards.items():
                mean = {name: ensembling.average_tensors([m.read(name) for m in members], weights) for name in names}
                save_file(mean, partial / shard, metadata={"format": "pt"})
            copy_the_rest(folders[-1], partial)
            if (recipe := recipe_beside(folders[-1])) is not None:
                (partial / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
            shares = ensembling.normalised(weights, len(folders))
            record = {"members": [str(folder) for folder in folders], "weights": shares}
            write_json_atomically(partial / "averaging.json", record)
    except ValueError as error:
        where = ", ".join(map(str, folders))
        raise EngineError(
            "E4.60", str(error), where, "average checkpoints of one model", safe=NOTHING_WRITTEN
        ) from error


class Tensors:
    """The tensors of one model folder, read when asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import safe_open

        self.files = {}
        self.shards: dict[str, list[str]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            handle = stack.enter_context(safe_open(path, framework="pt"))
            self.shards[path.name] = list(handle.keys())
            self.files |= dict.fromkeys(handle.keys(), handle)
        if not self.files:
            raise EngineError("E4.61", "no safetensors weights", str(folder), "check the path", safe=NOTHING_WRITTEN)

    def read(self, name: str):
        return self.files[name].get_tensor(name)


def copy_the_rest(source: Path, target: Path) -> None:
    """Configuration, tokenizer and prompt settings; no training state, and no manifest of other weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _NOT_THE_MODEL:
            shutil.copyfile(path, target / path.name)


def recipe_beside(folder: Path) -> Recipe | None:
    """What the members were trained by: the mean is decoded and scored by it too, wherever it lies."""
    from engine.recipe.load import load_recipe

    places = (place / "recipe.yaml" for place in (folder, folder.parent))
    return next((load_recipe(place) for place in places if place.is_file()), None)


def compare(folders: Sequence[Path], output: Path, args: argparse.Namespace) -> list[str]:
    """Decode the dev split with every member and with the mean, under the run's own settings."""
    from trials import METRICS, Scored, comparison, open_subject, refuse_other_rows

    systems, first = [], None
    for folder in (*folders, output):
        subject = open_subject(folder, input_file=args.input, device=args.device, limit=args.limit)
        first = first or subject.examples
        refuse_other_rows(subject.examples, folder, first, folders[0])
        decoding = subject.decode(subject.summarizer(subject.generation()))
        systems.append(Scored(folder.name, subject.score(decoding.texts), decoding.seconds))
        print(f"scored {folder.name}", flush=True)
    metric = subject.recipe.evaluation.metric
    metric = metric if metric in METRICS else "rouge_sum"
    lines = comparison(systems[-1], systems[:-1], metric, args.seed)
    return [*lines, f"{len(subject.examples)} rows of {subject.source}; predicting costs what one member costs"]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="a run folder with --last, or the model folders to average")
    parser.add_argument("--last", type=int, help="average the run's latest checkpoints, this many")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each member (default: equal)")
    parser.add_argument("--output", help="folder to write (default: RUN/averaged-<steps>)")
    parser.add_argument("--input", help="file with references to score on (default: the recipe's validation file)")
    parser.add_argument("--no-score", action="store_true", help="write the folder and do not decode anything")
    parser.add_argument("--limit", type=int, help="score only the first rows")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: the GPU, where there is one"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the bootstrap")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> tuple[list[Path], Path]:
    """(members, folder to write). Raises EngineError E2 for arguments that do not go together."""
    from ensembling import normalised

    from engine.runtime.atomic import refuse_existing

    given = [Path(folder) for folder in args.folders]
    folders = last_checkpoints(given[0], args.last) if args.last and len(given) == 1 else given
    problem = None
    if args.last and len(given) > 1:
        problem = "--last wants one run folder"
    elif len(folders) < 2:
        problem = "fewer than two members; name a run with --last N, or several model folders"
    elif not args.output and not args.last:
        problem = "--output is missing"
    if problem is None:
        try:
            normalised(args.weights, len(folders))
        except ValueError as error:
            problem = str(error)
    if problem:
        raise EngineError("E2.62", problem, "command line", "see --help", safe=NOTHING_WRITTEN)
    steps = "-".join(folder.name.removeprefix("checkpoint-") for folder in folders)
    output = Path(args.output) if args.output else given[0] / f"averaged-{steps}"
    refuse_existing(output)
    return folders, output


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    folders, output = chosen(args)
    started = time.perf_counter()
    average(folders, args.weights, output)
    record = json.loads((output / "averaging.json").read_text(encoding="utf-8"))
    weights = ", ".join(f"{weight:.3f}" for weight in record["weights"])
    print(f"{output}: mean of {len(folders)} models, weights {weights}, {time.perf_counter() - started:.1f} s")
    if not args.no_score:
        if args.input is None and (recipe := recipe_beside(output)) is not None:
            args.input = recipe.data.validation_file  # one file for all, also where members come from several runs
        print(*compare(folders, output, args), sep="\n")
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
