"""Predict: a trained model and a file of dialogues in, summaries out.

    python engine/predict.py RUN_OR_MODEL_DIR --input test.csv --output predictions.csv [generation.key=value ...]

The rows are checked in one pass over the file and then read, decoded and kept some thousand at a time, so memory does not grow
with their number. Under `accelerate launch` they are shared among the ranks; `--shard 3/16` decodes a part of them, and
`--merge-shards 16` puts the parts together. What is decoded is kept in side files next to the output, so a prediction that was
killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run as a script, Python puts engine/ itself on the path, where the package cannot be found.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if TYPE_CHECKING:
    from engine.data.stream import ExampleFile, ExampleList
    from engine.prediction.partial import PartialResults
    from engine.prediction.predictor import Predictor
    from engine.prediction.shards import Shard
    from engine.prediction.summarizer import Summarizer, Summary
    from engine.recipe.schema import Recipe
    from engine.runtime.lock import FolderLock
    from engine.runtime.process import Runtime

log = logging.getLogger("engine.predict")
_OPEN_TO_OVERRIDES = (
    "generation",
    "prompt",
    "runtime",
    "data.text_column",
    "data.summary_column",
    "data.id_column",
    "data.topic_column",
    "data.encoding",
    "data.on_bad_row",
    "data.max_bad_rows",
    "data.max_source_length",
    "data.max_target_length",
    "evaluation.per_device_eval_batch_size",
    "evaluation.rouge_tokenizer",
)

_EXAMPLES = """\
examples:
  %(prog)s RUN --input test.csv --output summaries.csv
  %(prog)s RUN --input test.csv --output submission.csv --sample-submission sample.csv
  %(prog)s RUN --input dev.csv --output dev.csv generation.num_beams=8
  accelerate launch engine/predict.py RUN --input test.csv --output summaries.csv   on several GPUs

Rows that have summaries are scored. What is decoded lies beside the output until it is whole: the same command goes on
after a kill."""


def predict(options: argparse.Namespace, recipe: Recipe, runtime: Runtime) -> None:
    """Read, decode what is not decoded yet, write; with `--shard` a part of it, with `--merge-shards` the writing alone."""
    from engine.evaluation.evaluate import try_scoring
    from engine.prediction import files, shards
    from engine.prediction.partial import PartialResults, all_in_order
    from engine.prediction.predictor import Predictor

    output, shard = Path(options.output), options.shard
    with runtime.ranks.together("reading the input"):
        files.check_names(options)
        source = files.open_input(options.input, recipe, runtime.ranks)
        # What cannot be written or scored is refused before anything is decoded.
        sample = files.check_target(source, options)
        if source.scored and not shard:
            try_scoring(recipe.evaluation.rouge_tokenizer)
        if runtime.is_main:
            runtime.hold(_lock_of(shard.base(output) if shard else output))
    runtime.ranks.require_equal({"--input": source.fingerprint})  # several machines may hold several files of a name
    if options.merge_shards:
        with runtime.ranks.together("merging the shards"):
            if runtime.is_main:
                rows = shards.merged(output, options.merge_shards, source)
                files.write(source, rows, options, recipe, sample)
                shards.remove(output, options.merge_shards)
        return
    with runtime.ranks.together("loading the model"):
        predictor = Predictor.from_run(
            options.model, device=runtime.device, precision=options.precision, base=options.base
        )
        predictor.override(recipe)
        summarizer = predictor.summarizer(recipe.evaluation.per_device_eval_batch_size)
        settings = settings_of(options, runtime, summarizer, predictor)
    fingerprint = shards.fingerprint_of(settings, source)
    if shard is None:
        rows, partial = range(source.count), PartialResults(output, runtime.rank, fingerprint=fingerprint)
    else:
        rows, kept = shard.rows(source.count), shard.kept(output)
        partial = PartialResults(shard.base(output), runtime.rank, fingerprint=fingerprint, windows=kept)
        finished = runtime.is_main and shards.is_finished(shard, output, source, settings)
        if runtime.ranks.broadcast(finished):
            log.info("shard %d of %d is finished: %d rows in %s", shard.number, shard.of, len(rows), kept)
            return
    with runtime.autocast():
        decode_rest(predictor, summarizer, source, rows, partial, runtime)
    with runtime.ranks.together("writing the output"):
        if runtime.is_main and shard is None:
            files.write(source, lambda: all_in_order(partial.windows, rows), options, recipe, sample)
            partial.remove()
        elif runtime.is_main:
            shards.finish(shard, output, source, settings)
            log.info("shard %d of %d: %d of %d rows in %s", shard.number, shard.of, len(rows), source.count, kept)


def decode_rest(
    predictor: Predictor,
    summarizer: Summarizer,
    source: ExampleFile | ExampleList,
    rows: range,
    partial: PartialResults,
    runtime: Runtime,
) -> None:
    """Decode those of `rows` that no side file holds, window by window; the ranks meet at the end of each."""
    import torch

    from engine.prediction import shards
    from engine.prediction.summarizer import Summary, gather_summaries

    with runtime.ranks.together("reading what is decoded already"):
        state = _decoded_before(partial, rows) if runtime.is_main else None
    done, records = runtime.ranks.broadcast(state)
    known = {record["index"]: Summary(**record) for record in records}
    if done or known:
        log.info("%d of %d rows were decoded before; going on with the others", done + len(known), len(rows))
    settings = {"total": len(rows), "initial": done + len(known), "desc": "summarise", "unit": "row"}
    examples = source.examples(rows.start + done, rows.stop)
    with runtime.progress(**settings) as bar, torch.no_grad():

        def keep(summaries: list[Summary]) -> None:
            partial.batches.append(summaries)
            bar.update(len(summaries) * runtime.world_size)

        for start in range(rows.start + done, rows.stop, shards.WINDOW):
            with runtime.ranks.together("tokenising"):
                window = list(islice(examples, shards.WINDOW))
                features = predictor.features(window, start)
            mine = summarizer.summarize(
                predictor.bundle.model,
                features,
                [row.dialogue for row in window],
                skip=known.keys(),
                # Batches come longest first: taking turns, the ranks have as much to do.
                rank=(runtime.rank + start // shards.WINDOW) % runtime.world_size,
                world_size=runtime.world_size,
                on_batch=keep,
            )
            mine = [*known.values(), *mine] if runtime.is_main else mine
            summaries = gather_summaries(mine, [feature.index for feature in features], runtime)
            known = {}
            with runtime.ranks.together("keeping what is decoded"):
                partial.finish_window(summaries)
        next(examples, None)  # at its end the file must still be what was checked


def _decoded_before(partial: PartialResults, rows: range) -> tuple[int, list[dict[str, Any]]]:
    """How many rows stand in finished windows, and the records of the window after them."""
    from engine.prediction.shards import WINDOW

    first = rows.start + sum(len(window) for window in partial.windows.in_order(rows))
    begun = range(first, min(first + WINDOW, rows.stop))
    return first - rows.start, [record for record in partial.begun() if record["index"] in begun]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see README.md for what it prints and its exit codes."""
    options = parse(arguments)

    from engine.prediction.predictor import model_folder, recipe_of
    from engine.recipe.load import with_overrides
    from engine.runtime.process import start

    recipe = with_overrides(recipe_of(model_folder(Path(options.model))), options.overrides, _OPEN_TO_OVERRIDES)
    # A run trained in fp16 on a GPU must be readable on a laptop: the precision of a prediction is its own.
    precision = recipe.training.model_copy(update={"precision": options.precision or "auto"})
    with start(recipe.model_copy(update={"training": precision})) as runtime:
        predict(options, recipe, runtime)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from engine.recipe.flags import parse_options

    parser = argparse.ArgumentParser(
        prog="engine/predict.py",
        description="Summarise a file of dialogues with a trained model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="RUN_OR_MODEL_DIR", help="a run folder, a checkpoint, or a model or adapter folder"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="generation.key=value", help="settings that win over the run's"
    )
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="CSV, JSONL or parquet; - reads dialogues from stdin"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="CSV, or JSONL by its suffix")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--shard", metavar="I/N", type=_shard, help="decode part I of N only, such as 3/16; side files keep it"
    )
    parts.add_argument(
        "--merge-shards", metavar="N", type=_count, help="decode nothing: write the output from N finished shards"
    )
    parser.add_argument("--sample-submission", metavar="FILE", help="write in this sample's format")
    parser.add_argument(
        "--escape-formulas", action="store_true", help="quote CSV cells that a spreadsheet would compute (=, +, -, @)"
    )
    parser.add_argument("--base", metavar="DIR_OR_ID", help="base model of an adapter, instead of the one it names")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="default: bf16 where the GPU has it, else fp32"
    )
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    options = parse_options(parser, arguments, ("generation", "evaluation", "data"))
    if options.input == "-" and (options.shard or options.merge_shards):
        parser.error("standard input has no shards: give a file with --input")
    return options


def _shard(text: str) -> Shard:
    from engine.prediction.shards import Shard

    try:
        return Shard.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, such as 3/16") from None


def _count(text: str) -> int:
    try:
        return _shard(f"1/{text}").of
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of shards") from None


def _lock_of(base: Path) -> FolderLock:
    from engine.runtime.lock import FolderLock

    advice = "wait for it, or choose another --output"
    return FolderLock(base.parent, f".{base.name}.lock", thing="and writes this output", advice=advice)


def settings_of(options: argparse.Namespace, runtime: Runtime, summarizer: Summarizer, predictor: Predictor) -> str:
    """sha256 of everything but the input that decides a decoded row: model files, prompt, settings, windows."""
    from engine.prediction.predictor import model_folder
    from engine.prediction.shards import WINDOW
    from engine.runtime.atomic import add_samples

    digest = hashlib.sha256()
    for path in sorted(path for path in model_folder(Path(options.model)).iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        add_samples(digest, path)  # copies on other machines have other times
    parts = (options.base, runtime.precision, predictor.bundle.prompt_record(), summarizer.describe(), WINDOW)
    digest.update(repr(parts).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
