"""Predict: a trained model and a file of dialogues in, summaries out.

    python engine/predict.py RUN_OR_MODEL_DIR --input test.csv --output predictions.csv [generation.key=value ...]

Under `accelerate launch` the rows are shared among the ranks. Decoded batches are kept in a side file next to the output, so a
prediction that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Run as a script, Python puts engine/ itself on the path, where the package cannot be found.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if TYPE_CHECKING:
    from engine.data.encode import Feature
    from engine.data.rows import Example
    from engine.prediction.partial import PartialResults
    from engine.prediction.predictor import Predictor
    from engine.prediction.summarizer import Summarizer, Summary
    from engine.recipe.schema import Recipe
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


def predict(options: argparse.Namespace, recipe: Recipe, runtime: Runtime) -> list[Summary]:
    """Read, decode what is not decoded yet, gather, write. Returns the summaries in the order of the input."""
    from engine.prediction.files import check_target, read_input, write
    from engine.prediction.partial import PartialResults
    from engine.prediction.predictor import Predictor

    with runtime.ranks.together("reading the input"):
        examples = read_input(options.input, recipe)
        check_target(examples, options)  # what cannot be written is refused before anything is decoded
    with runtime.ranks.together("loading the model"):
        predictor = Predictor.from_run(
            options.model, device=runtime.device, precision=options.precision, base=options.base
        )
        predictor.override(recipe)
        summarizer = predictor.summarizer(recipe.evaluation.per_device_eval_batch_size)
    with runtime.ranks.together("tokenising"):
        features = predictor.features(examples)
    decided_by = _decided_by(options, examples, summarizer, predictor)
    partial = PartialResults(options.output, runtime.rank, fingerprint=decided_by)
    dialogues = [row.dialogue for row in examples]
    with runtime.autocast():
        summaries = decode_rest(predictor, summarizer, dialogues, features, partial, runtime)
    with runtime.ranks.together("writing the output"):
        if runtime.is_main:
            write(examples, summaries, options, recipe)
            partial.remove()
    return summaries


def decode_rest(
    predictor: Predictor,
    summarizer: Summarizer,
    dialogues: list[str],
    features: list[Feature],
    partial: PartialResults,
    runtime: Runtime,
) -> list[Summary]:
    """Decode what no side file holds; no collective until all ranks have decoded."""
    import torch

    from engine.prediction.summarizer import Summary, gather_summaries

    with runtime.ranks.together("reading what is decoded already"):
        records = partial.read_all() if runtime.is_main else None
    known = {record["index"]: Summary(**record) for record in runtime.ranks.broadcast(records)}
    if known:
        log.info("%d of %d rows were decoded before; going on with the others", len(known), len(features))
    with (
        runtime.progress(total=len(features), initial=len(known), desc="summarise", unit="row") as bar,
        torch.no_grad(),
    ):

        def keep(summaries: list[Summary]) -> None:
            partial.append(summaries)
            bar.update(len(summaries) * runtime.world_size)

        mine = summarizer.summarize(
            predictor.bundle.model,
            features,
            dialogues,
            skip=known.keys(),
            rank=runtime.rank,
            world_size=runtime.world_size,
            on_batch=keep,
        )
    if runtime.is_main:
        mine = [*known.values(), *mine]
    return gather_summaries(mine, [feature.index for feature in features], runtime)


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
        epilog="Share the rows among several GPUs with: accelerate launch engine/predict.py ...",
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
    parser.add_argument("--sample-submission", metavar="FILE", help="write in this sample's format")
    parser.add_argument(
        "--escape-formulas", action="store_true", help="quote CSV cells that a spreadsheet would compute (=, +, -, @)"
    )
    parser.add_argument("--base", metavar="DIR_OR_ID", help="base model of an adapter, instead of the one it names")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="default: bf16 where the GPU has it, else fp32"
    )
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    return parse_options(parser, arguments, ("generation", "evaluation", "data"))


def _decided_by(
    options: argparse.Namespace, examples: list[Example], summarizer: Summarizer, predictor: Predictor
) -> str:
    """sha256 of everything that decides a decoded row: model files, prompt, settings, input."""
    from engine.data.rows import rows_fingerprint
    from engine.prediction.predictor import model_folder

    folder = model_folder(Path(options.model))
    files = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()
    )
    prompt = predictor.bundle.prompt_record()
    parts = (files, options.base, options.precision, prompt, summarizer.describe(), rows_fingerprint(examples))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
