#!/usr/bin/env python3
"""Cross-validation: a training run for each fold, a prediction of every training row, and the test rows by consensus.

    python tools/kfold.py RECIPE.yaml --folds 5
    python tools/kfold.py RECIPE.yaml --folds 5 --test test.csv --sample-submission sample.csv training.num_train_epochs=3

The recipe's data.train_file is divided; rows whose dialogues are equal or nearly equal (a quarter of their letter triples)
stay together, and folds get dialogues of like lengths. data.validation_file is not used: each run's dev rows are the fold
that it does not train on, so its best checkpoint is chosen on them, which flatters the score a little.

Written to the folder: folds.json (who is where), two data files, a run folder and a log for each fold, folds.csv,
out_of_fold.csv (every training row in the file's order with the prediction of the run that has not seen it), and for a
test file test.csv (of the folds' summaries of a row, the one that agrees best with the others) and submission.csv. The
same command goes on with what was killed or failed; other data, settings or seeds are refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402

if TYPE_CHECKING:
    from folding import Folds

    from engine.recipe.schema import Recipe


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from engine.recipe.flags import parse_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="what each fold is trained by")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of every fold")
    parser.add_argument("--folds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--seed", type=int, default=42, help="of the division into folds (default: 42)")
    parser.add_argument(
        "--alike", type=float, metavar="SHARE", help="of letter triples, for near-duplicates: 0.25 to 1"
    )
    parser.add_argument("--test", metavar="FILE", help="rows to predict; default: the recipe's data.test_file")
    parser.add_argument("--sample-submission", metavar="FILE", help="also write submission.csv in this file's format")
    parser.add_argument("--parallel", type=int, help="folds at once; default: one for each GPU")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: experiments/kfold_<recipe>")
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    options = parse_options(parser, arguments)
    if options.folds < 2 or (options.parallel or 1) < 1:
        parser.error("--folds is at least 2, --parallel at least 1")
    if options.alike is not None and not 0.25 <= options.alike <= 1:
        parser.error("--alike is between 0.25 and 1")
    return options


def read_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe of every fold, but for its data; every held-out row is decoded.

    Raises: EngineError E2 for one whose folds would not be scored, or that names code.
    """
    from training_process import refuse_code

    from engine.recipe.load import load_recipe

    if options.test:
        options.overrides.append(f"data.test_file={options.test}")
    if not any(text.startswith("evaluation.max_samples=") for text in options.overrides):
        options.overrides.append("evaluation.max_samples=null")  # recipes decode a subset to choose a checkpoint by
    recipe = load_recipe(options.recipe, options.overrides)
    refuse_code(recipe)
    evaluation, what = recipe.evaluation, None
    if any(text.startswith("experiment.output_dir=") for text in options.overrides):
        what = "experiment.output_dir: each fold has a folder of its own; use --output"
    elif evaluation.strategy == "no" or not evaluation.generate or evaluation.max_samples is not None:
        what = "evaluation: every held-out row is decoded; set strategy and generate=true, and leave max_samples out"
    elif options.sample_submission and recipe.data.test_file is None:
        what = "--sample-submission: there are no test rows; give --test"
    if what:
        raise EngineError("E2.94", what, options.recipe)
    return recipe


def in_words(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table for a terminal; a failed fold's reason stands below it."""
    from compare import table

    head = ["fold", "status", "train", "held out", "step", "rouge1", "rouge2", "rougeL", "mean", "95 % interval"]
    cells = [head]
    for row in rows:
        scores = [row[key] for key in ("rouge1", "rouge2", "rougeL", "rouge_mean")]
        cell = [row["fold"], row["status"], *(str(row[key] or "") for key in ("train_rows", "dev_rows", "step"))]
        cell += ["" if score is None else f"{score:.2f}" for score in scores]
        cells.append([*cell, "" if row["low"] is None else f"[{row['low']:.2f}, {row['high']:.2f}]"])
    return table(cells) + [f"fold {row['fold']} failed: {row['reason']}" for row in rows if row["reason"]]


def write_test(folds: Folds, sample: str | None) -> None:
    """test.csv and, with a sample, submission.csv: for each test row the summary that agrees best with the other folds'."""
    from ensemble import Predictions, consensus
    from trials import Scored, comparison
    from written_rows import as_row, write_rows

    from engine.prediction.submission import submission_table, without_empty, write_submission
    from engine.scoring import rouge

    rows, data, tokenizer = folds.test, folds.recipe.data, folds.recipe.evaluation.rouge_tokenizer
    ids = [row.id for row in rows]
    members = [
        Predictions(
            folds.folder, "id", "prediction", {name: [text] for name, text in zip(ids, fold.test, strict=True)}, {}
        )
        for fold in folds.folds
    ]
    weights = [1 / len(members)] * len(members)
    texts, taken = consensus(members, ids, weights, "rouge_mean", tokenizer)
    path = folds.folder / "test.csv"
    write_rows(path, (as_row(row, data, prediction=text) for row, text in zip(rows, texts, strict=True)))
    print(f"{path}: {len(ids)} rows; taken from folds {', '.join(f'{n}: {count}' for n, count in enumerate(taken, 1))}")
    if sample:
        filled = without_empty(ids, [row.dialogue for row in rows], texts)
        write_submission(submission_table(ids, filled, sample), folds.folder / "submission.csv")
        print(folds.folder / "submission.csv")
    if all(row.references for row in rows):
        references = [row.references for row in rows]
        systems = [
            Scored(f"fold {number}", rouge.rouge_rows(fold.test, references, tokenizer))
            for number, fold in enumerate(folds.folds, start=1)
        ]
        print(
            *comparison(Scored("consensus", rouge.rouge_rows(texts, references, tokenizer)), systems, "rouge_mean"),
            sep="\n",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    recipe = read_recipe(options)

    from engine.data.rows import read_examples
    from engine.prediction.submission import Sample

    data = recipe.data
    examples = read_examples(data.train_file, data, require_summary=True, limit=data.max_train_samples)
    test = []
    if data.test_file is not None:
        test = read_examples(data.test_file, data, require_summary=False, limit=data.max_test_samples)
    if options.sample_submission:
        Sample(options.sample_submission, [row.id for row in test])  # refused now, not after the training
    folder = options.output or Path(recipe.experiment.output_root) / f"kfold_{Path(options.recipe).stem}"

    from folding import Folds  # torch: what is refused is refused before it is loaded
    from inspecting import NEAR
    from sweep import devices

    gpus = devices()
    settings = {"folds": options.folds, "seed": options.seed, "least": options.alike or NEAR}
    with Folds(folder, recipe, examples, test, **settings) as folds:
        folds.run(gpus, options.parallel or len(gpus) or 1)
        folds.write()
        print("\n".join(["", *in_words(folds.table()), f"written to {folder / 'folds.csv'}"]))
        failed = [fold for fold in folds.folds if not fold.done]
        if failed:
            what = f"{len(failed)} of {options.folds} folds failed"
            safe = "the others are kept"
            raise EngineError("E2.91", what, str(folder), "mend what they say; the same command trains them", safe=safe)
        print(folder / "out_of_fold.csv")
        if test:
            write_test(folds, options.sample_submission)
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
