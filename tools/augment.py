#!/usr/bin/env python3
"""More training rows from those that are there: a new file, each row with where it comes from. Dev rows are never touched.

    python tools/augment.py train.csv --output more.csv --methods speakers window --recipe recipes/mine.yaml --keep-original
    python tools/augment.py train.csv --output more.csv --methods rewrite --model models/paraphraser --prompt "바꿔 쓰기: "
    python tools/augment.py train.csv --output more.csv --methods rewrite --model models/ko-en models/en-ko --dev dev.csv

speakers  permutes #Person1#, #Person2# ... in dialogue and summary alike, with the particles behind them. That the first
          speaker is #Person1# no longer holds.
window    keeps consecutive turns, at least --least of them, with every placeholder and number (in digits) of the summary.
          The summary stays, and may say what no turn says any more: keep --least high.
merge     joins turns of one speaker that follow each other (there are none in data whose speakers take strict turns).
cut       cuts turns of several sentences in two, the reverse of merge.
rewrite   puts turns into the words of a local model, of several one after the other (there and back: back-translation). A
          turn whose placeholders, numbers or length change stays as it is; that the sense stays is up to the model.

The columns source_id, method, parameters and seed say where a row comes from; the columns of the recipe (or data.key=value)
name the others, and what they do not name is left out. The same command gives the same file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from augmenting import METHODS  # noqa: E402

from engine.errors import EngineError  # noqa: E402

if TYPE_CHECKING:
    from augmenting import Rewrite, Versions

    from engine.data.rows import Example
    from engine.recipe.schema import Data, Recipe


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from engine.recipe.flags import parse_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="CSV, JSONL or parquet file with dialogues and summaries: training rows")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="data: columns; generation: the model"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a new CSV or JSONL file")
    parser.add_argument(
        "--methods", nargs="+", required=True, choices=METHODS, metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--copies", type=int, default=1, help="versions of a row by each method (default: 1)")
    parser.add_argument("--least", type=float, default=0.8, help="share of the turns in a window (default: 0.8)")
    parser.add_argument("--model", nargs="+", default=[], metavar="FOLDER", help="rewrite: models, one after the other")
    parser.add_argument(
        "--prompt", nargs="+", default=[], metavar="TEXT", help="rewrite: one for each model that needs one"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="rewrite: where models run")
    parser.add_argument("--recipe", metavar="RECIPE", help="its columns; its dev and test rows are held out")
    parser.add_argument("--dev", nargs="+", default=[], metavar="FILE", help="more files whose rows are held out")
    parser.add_argument("--keep-original", action="store_true", help="the input's own rows first")
    parser.add_argument("--seed", type=int, default=42, help="of what is drawn (default: 42)")
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    options = parse_options(parser, arguments, ("data", "generation"))
    if options.copies < 1 or not 0.5 <= options.least < 1:
        parser.error("--copies is at least 1, --least at least 0.5 and below 1")
    if ("rewrite" in options.methods) != bool(options.model):
        parser.error("--methods rewrite and --model go together")
    if options.prompt and len(options.prompt) != len(options.model):
        parser.error("give --prompt once for each --model")
    return options


def held_out_rows(options: argparse.Namespace, recipe: Recipe) -> list[Example]:
    """Rows of the recipe's dev and test file and of --dev.

    Raises: EngineError E2.92 where one of these files is the input or would be the output, or overlap is asked for.
    """
    from written_rows import files_named, same_file

    from engine.data.rows import read_examples

    if any(text.startswith("data.allow_overlap=") for text in options.overrides):
        what = "dev and test rows are held out: no new row may come of them"
        raise EngineError("E2.92", what, "data.allow_overlap", "leave it out", safe="nothing was written")
    files = list(files_named(recipe, ("validation_file", "test_file")).values()) if options.recipe else []
    files += options.dev
    for file in files:
        if same_file(file, options.input) or same_file(file, options.output):
            what = "dev and test rows are held out: they are neither augmented nor written"
            raise EngineError("E2.92", what, file, "name the training file", safe="nothing was written")
    return [row for file in files for row in read_examples(file, recipe.data, require_summary=False)]


def rewriter(options: argparse.Namespace) -> Rewrite:
    """All models, one after the other. Raises: EngineError E4 for a folder without a model, E2 for settings it cannot take."""
    import torch

    from engine.prediction.predictor import Predictor, model_folder, recipe_of
    from engine.recipe.load import with_overrides

    changes = [text for text in options.overrides if text.startswith("generation.")]
    steps: list[Callable[[list[str]], list[str]]] = []
    for folder, prompt in zip(options.model, options.prompt or [None] * len(options.model), strict=True):
        predictor = Predictor.from_run(folder, device=options.device)
        recipe = with_overrides(recipe_of(model_folder(Path(folder))), changes, ("generation",))
        if prompt is not None:
            chat = bool(getattr(predictor.bundle.tokenizer, "chat_template", None))
            causal = {"prompt.style": "chat" if chat else "instruction", "prompt.instruction": prompt}
            own = causal if predictor.bundle.family == "causal" else {"prompt.style": "plain", "prompt.prefix": prompt}
            recipe = with_overrides(recipe, own, ("prompt",))
        predictor.override(recipe)
        steps.append(predictor.predict_batch)

    def write(texts: Sequence[str]) -> Sequence[str]:
        torch.manual_seed(options.seed)
        for step in steps:
            lines = [text or "." for text in texts]  # a model that wrote nothing is not asked about it again
            texts = step(lines)
        return texts

    return write


def new_rows(versions: Versions, options: argparse.Namespace, settings: Data) -> Iterator[dict[str, Any]]:
    """Rows as they are written: the input's own where they are wanted, then method by method."""
    from augmenting import method, rewriting
    from written_rows import as_row

    def row(example: Example, source: Example, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
        said = json.dumps(parameters, ensure_ascii=False)
        return as_row(example, settings, source_id=source.id, method=name, parameters=said, seed=options.seed)

    if options.keep_original:
        yield from (row(example, example, "original", {}) for example in versions.examples)
    for name in dict.fromkeys(options.methods):
        if name == "rewrite":
            make, more = rewriting(versions.examples, rewriter(options)), {"model": options.model}
        else:
            make, more = method(name, options.least), {}
        for new, source, parameters in versions.of(name, make, options.copies):
            yield row(new, source, name, parameters | more)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)

    from written_rows import check_output, spaced, write_rows

    from engine.data.rows import check_splits, read_examples
    from engine.recipe.load import load_recipe, with_overrides
    from engine.recipe.schema import Recipe

    check_output(options.output)
    recipe = load_recipe(options.recipe) if options.recipe else Recipe()
    recipe = with_overrides(recipe, options.overrides, ("data", "generation"))
    held_out = held_out_rows(options, recipe)
    examples = read_examples(options.input, recipe.data, require_summary=True)
    try:
        check_splits(examples, held_out, allow_overlap=False)
    except EngineError as error:
        error.next = "take them out of the training file"
        raise

    from augmenting import Versions

    versions = Versions(examples, {spaced(row.dialogue) for row in held_out}, options.seed)
    rows = new_rows(versions, options, recipe.data)
    first = next(rows, None)
    if first is None:
        what = "no row allows any of these methods"
        raise EngineError("E3.76", what, options.input, "choose other --methods", safe="nothing was written")
    count = write_rows(options.output, chain([first], rows))

    from compare import table

    head = ["method", "new rows", "not possible", "there already", "held out"]
    cells = [[t.name, *map(str, (t.made, t.impossible, t.repeated, t.held_out))] for t in versions.tallies]
    print(*table([head, *cells]), f"{options.output}: {count} rows from {len(examples)}", sep="\n")
    if not held_out:
        print("no dev or test rows were named (--recipe, --dev): the rows are checked against none")
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
