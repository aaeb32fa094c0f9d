#!/usr/bin/env python3
"""Summaries for dialogues that have none, by a trained model, kept where the model is sure of them.

    python tools/pseudo_label.py RUN --input unlabelled.csv --output pseudo.csv --keep-share 0.5
    python tools/pseudo_label.py RUN --input unlabelled.csv --output pseudo.csv --min-confidence 0.5 generation.num_beams=8
    python tools/pseudo_label.py RUN --input dev.csv --check

How sure it is comes from the n-best list of its beam search: `score`, the geometric mean of the probabilities of the best
summary's tokens; `agreement`, the mean ROUGE of the best with the other hypotheses, as a share; `confidence`, the
geometric mean of these two; `margin`, by how much the search ranks the best above the second. --by chooses which of
them --min-confidence and --keep-share mean: the score, unless --check, which writes nothing and decodes rows that have
summaries, shows that another one is worth more.

Left out, and counted: dialogues of the run's train, dev and test files and of --exclude, dialogues met before, summaries
that are empty or reached the length limit. The columns model, step, score, margin, agreement and confidence say where a
row comes from. What is decoded is kept beside the output, so a call that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from confidence import MEASURES  # noqa: E402

from engine.errors import EngineError  # noqa: E402

if TYPE_CHECKING:
    from confidence import Confidence

    from engine.data.rows import Example
    from engine.data.stream import ExampleList
    from engine.prediction.predictor import Predictor
    from engine.prediction.summarizer import Summary
    from engine.recipe.schema import Recipe
    from engine.runtime.process import Runtime

_OPEN = (
    "generation",
    "prompt",
    "runtime",
    "data",
    "evaluation.per_device_eval_batch_size",
    "evaluation.rouge_tokenizer",
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from engine.recipe.flags import parse_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run folder, a checkpoint, or a model or adapter folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the run's")
    parser.add_argument("--input", required=True, metavar="FILE", help="CSV, JSONL or parquet with dialogues")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a new CSV or JSONL file")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--min-confidence", type=float, metavar="X", help="keep rows with at least this much")
    kept.add_argument("--keep-share", type=float, metavar="SHARE", help="keep this share of the rows, the surest ones")
    parser.add_argument("--by", choices=MEASURES, default="score", help="what is filtered by (default: score)")
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="FILE", help="more files whose dialogues are left out"
    )
    parser.add_argument("--check", action="store_true", help="write nothing: show the measures on rows with summaries")
    parser.add_argument("--base", metavar="DIR_OR_ID", help="base model of an adapter, instead of the one it names")
    parser.set_defaults(precision=None)
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    options = parse_options(parser, arguments, ("generation", "evaluation", "data"))
    if options.check == (options.output is not None):
        parser.error("give --output, or --check")
    if options.keep_share is not None and not 0 < options.keep_share <= 1:
        parser.error("--keep-share is above 0 and at most 1")
    return options


def read_recipe(options: argparse.Namespace) -> Recipe:
    """The model's recipe, told to return every beam. Raises: EngineError E2.93 for a search without beams."""
    from engine.prediction.predictor import model_folder, recipe_of
    from engine.recipe.load import with_overrides

    recipe = with_overrides(recipe_of(model_folder(Path(options.model))), options.overrides, _OPEN)
    if (beams := recipe.generation.num_beams) < 2:
        what = "confidence comes from the beams of a search, and generation.num_beams is 1"
        raise EngineError("E2.93", what, options.model, "add generation.num_beams=4", safe="nothing was decoded")
    recipe = with_overrides(recipe, {"generation.num_return_sequences": beams}, _OPEN)
    training = recipe.training.model_copy(update={"precision": "auto"})  # of a prediction, as predict.py has it
    return recipe.model_copy(update={"training": training})


def unlabelled(options: argparse.Namespace, recipe: Recipe) -> list[Example]:
    """The rows to decode; what is left out is told. Raises: EngineError E3 for bad rows and files, E3.77 for none left."""
    from written_rows import files_named, spaced

    from engine.data.rows import read_examples

    files = files_named(recipe, ("train_file", "validation_file", "test_file"))
    files |= dict.fromkeys(options.exclude)
    seen: dict[str, str] = {}
    for name, file in files.items():
        for row in read_examples(file or name, recipe.data, require_summary=False):
            seen.setdefault(spaced(row.dialogue), name)
    rows, dropped = [], dict.fromkeys([*files, "an earlier row"], 0)
    for row in read_examples(options.input, recipe.data, require_summary=False):
        key = spaced(row.dialogue)
        if key in seen:
            dropped[seen[key]] += 1
        else:
            seen[key] = "an earlier row"
            rows.append(row)
    said = ", ".join(f"{count} of {name}" for name, count in dropped.items() if count)
    print(f"{len(rows)} rows to label" + (f"; left out, by dialogue: {said}" if said else ""), flush=True)
    if not rows:
        raise EngineError("E3.77", "no row is left to label", options.input, "give other dialogues")
    return rows


def decoder(options: argparse.Namespace, recipe: Recipe, device: Any) -> Predictor:
    from engine.prediction.predictor import Predictor

    predictor = Predictor.from_run(options.model, device=device, base=options.base)
    predictor.override(recipe)
    return predictor


def label(options: argparse.Namespace, recipe: Recipe, runtime: Runtime) -> None:
    """Decode what is not decoded yet, and write the rows that are kept."""
    from engine.data.stream import ExampleList
    from engine.predict import decode_rest, settings_of
    from engine.prediction.partial import PartialResults, all_in_order
    from engine.prediction.shards import fingerprint_of
    from engine.runtime.lock import FolderLock

    output: Path = options.output
    with runtime.ranks.together("reading the input"):
        source = ExampleList(unlabelled(options, recipe))
        output.parent.mkdir(parents=True, exist_ok=True)
        if runtime.is_main:
            advice = "wait for it, or choose another --output"
            runtime.hold(
                FolderLock(output.parent, f".{output.name}.lock", thing="and writes this output", advice=advice)
            )
    with runtime.ranks.together("loading the model"):
        predictor = decoder(options, recipe, runtime.device)
        summarizer = predictor.summarizer(recipe.evaluation.per_device_eval_batch_size)
        settings = settings_of(options, runtime, summarizer, predictor)
    partial = PartialResults(output, runtime.rank, fingerprint=fingerprint_of(settings, source))
    rows = range(source.count)
    with runtime.autocast():
        decode_rest(predictor, summarizer, source, rows, partial, runtime)
    with runtime.ranks.together("writing the output"):
        if runtime.is_main:
            penalty = summarizer.settings.length_penalty
            write(options, recipe, source, lambda: chain.from_iterable(all_in_order(partial.windows, rows)), penalty)
            partial.remove()


def write(
    options: argparse.Namespace,
    recipe: Recipe,
    source: ExampleList,
    decoded: Callable[[], Iterable[Summary]],
    penalty: float,
) -> None:
    """The rows that are kept, and how many they are. Raises: EngineError E3.78 where none is."""
    from confidence import Confidence, limit_of
    from written_rows import as_row, write_rows

    tokenizer = recipe.evaluation.rouge_tokenizer
    measured = [Confidence.of(summary, penalty, tokenizer) for summary in decoded()]
    values = [getattr(one, options.by) for one in measured if one is not None]
    least = options.min_confidence
    if options.keep_share is not None and values:
        least = limit_of(values, options.keep_share)
    kept = [one is not None and (least is None or getattr(one, options.by) >= least) for one in measured]
    if not any(kept):
        said = f", and the surest has {max(values):.3f}" if values else ": each is empty or reached the length limit"
        what = f"no summary of {len(measured)} is kept{said}"
        raise EngineError(
            "E3.78", what, options.input, "lower --min-confidence", safe="decoded rows are kept beside it"
        )
    origin = {"model": options.model, "step": step_of(Path(options.model))}
    rows = (
        as_row(
            replace(row, references=(summary.text,)),
            recipe.data,
            **origin,
            **{name: round(getattr(own, name), 6) for name in MEASURES},
        )
        for row, summary, own, keep in zip(source.examples(), decoded(), measured, kept, strict=True)
        if keep
    )
    count = write_rows(options.output, rows)
    limit = "" if least is None else f", {len(values) - count} below {options.by} {least:.3f}"
    print(f"{options.output}: {count} of {len(measured)} rows kept; {len(measured) - len(values)} unusable{limit}")
    if source.scored:
        done = (summary.text for summary in decoded())
        show_worth(measured, list(done), [row.references for row in source.examples()], tokenizer)


def step_of(model: Path) -> int | str:
    """The update after which the weights were saved, as far as their folder tells."""
    from engine.prediction.predictor import model_folder
    from engine.runtime.atomic import read_json

    folder = model_folder(model)
    if folder.name == "final_model" and (folder.parent / "results.json").is_file():
        return read_json(folder.parent / "results.json")["best_step"]
    return folder.name.removeprefix("checkpoint-") if folder.name.startswith("checkpoint-") else ""


def show_worth(
    measured: Sequence[Confidence | None], texts: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str
) -> None:
    """Print what each measure says about the ROUGE of rows that have summaries."""
    from compare import table
    from confidence import worth

    from engine.scoring import rouge

    rows = [place for place, one in enumerate(measured) if one is not None]
    scores = rouge.rouge_rows([texts[place] for place in rows], [references[place] for place in rows], tokenizer)
    print(f"\nrouge_mean of {len(rows)} rows with summaries, and of the surest of them:")
    print(*table(worth([measured[place] for place in rows], [row["rouge_mean"] for row in scores])), sep="\n")


def check(options: argparse.Namespace, recipe: Recipe) -> None:
    """Decode rows that have summaries, and show what the measures are worth on them."""
    from confidence import Confidence

    from engine.data.rows import read_examples

    examples = read_examples(options.input, recipe.data, require_summary=True)
    predictor = decoder(options, recipe, "auto")
    batch = recipe.evaluation.per_device_eval_batch_size
    topics = [row.topic for row in examples]
    done = predictor.summarize([row.dialogue for row in examples], batch, topics=topics)
    penalty, tokenizer = predictor.summarizer(batch).settings.length_penalty, recipe.evaluation.rouge_tokenizer
    measured = [Confidence.of(summary, penalty, tokenizer) for summary in done]
    if sum(one is not None for one in measured) < 2:
        what = "too few summaries ended before the length limit to tell"
        raise EngineError("E3.78", what, options.input, "give more rows, or raise generation.max_new_tokens")
    show_worth(measured, [summary.text for summary in done], [row.references for row in examples], tokenizer)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.output is not None:
        from written_rows import check_output

        check_output(options.output)
    recipe = read_recipe(options)
    if options.check:
        check(options, recipe)
        return 0

    from engine.runtime.process import start

    with start(recipe) as runtime:
        label(options, recipe, runtime)
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
