#!/usr/bin/env python3
"""Combine models: by consensus over their predictions (mbr), or by the mean of their token probabilities (average).

    python tools/ensemble.py mbr PREDICTIONS.csv PREDICTIONS.csv [...] --output FILE [--references dev.csv]
    python tools/ensemble.py average RUN RUN [...] --output FILE [--input test.csv] [generation.num_beams=5 ...]

mbr takes CSV or JSONL files with ids and texts, from any models; several rows with one id are n-best lists, and share their
file's weight. For each id it writes the candidate with the greatest expected ROUGE under all candidates. Nothing is
decoded, so the texts may come from other dialogue versions (turn subsets) or prompts as well.

average decodes with all models at once; they must share a vocabulary. Time and memory are the members' added up.

Where there are references both print the gain over each member with its interval, and the cost.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402

if TYPE_CHECKING:
    from trials import Decoding, Subject

NOTHING_WRITTEN = "nothing was written"
ID_COLUMNS, TEXT_COLUMNS = ("id", "fname"), ("prediction", "summary")
METRICS = ("rouge1", "rouge2", "rougeL", "rouge_sum", "rouge_mean")


# --- consensus over files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """One file: candidates by id in the file's order, and the names of its two columns."""

    path: Path
    id_column: str
    text_column: str
    candidates: dict[str, list[str]]
    references: dict[str, str]  # from a `reference` column, where there is one


def read_predictions(path: Path, id_column: str | None, text_column: str | None) -> Predictions:
    """Raises EngineError E3 naming file and row for a missing column or an empty id."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = [json.loads(line) for line in handle if line.strip()] if path.suffix == ".jsonl" else []
            reader = csv.DictReader(handle)
            rows = rows or list(reader)
            columns = list(rows[0] if rows else reader.fieldnames or [])
    except (OSError, ValueError, csv.Error) as error:
        advice = "give a UTF-8 CSV or JSONL file"
        raise EngineError("E3.50", f"unreadable: {error}", str(path), advice, safe=NOTHING_WRITTEN) from error
    ids = pick(path, columns, id_column, ID_COLUMNS, "--id-column")
    texts = pick(path, columns, text_column, TEXT_COLUMNS, "--text-column")
    found = Predictions(path, ids, texts, {}, {})
    for number, row in enumerate(rows, start=1):
        if row.get(ids) in (None, "") or not isinstance(row.get(texts), str):
            raise EngineError(
                "E3.52", "no id or no text cell", f"{path} row {number}", "repair the row", safe=NOTHING_WRITTEN
            )
        found.candidates.setdefault(str(row[ids]), []).append(row[texts])
        if row.get("reference"):
            found.references[str(row[ids])] = row["reference"]
    return found


def pick(path: Path, columns: Sequence[str], wanted: str | None, usual: Sequence[str], option: str) -> str:
    names = [wanted] if wanted else usual
    for name in names:
        if name in columns:
            return name
    what = f"no column {' or '.join(names)}; there are {', '.join(columns) or 'none'}"
    raise EngineError("E3.51", what, str(path), f"give {option}", safe=NOTHING_WRITTEN)


def check_ids(files: Sequence[Predictions]) -> list[str]:
    """The ids, in the first file's order. Raises EngineError E3 where another file holds others."""
    ids = list(files[0].candidates)
    for other in files[1:]:
        if odd := set(ids) ^ set(other.candidates):
            first = min(odd)
            what = f"ids differ from those of {files[0].path}: {len(odd)}, such as {first}"
            raise EngineError("E3.53", what, str(other.path), "give predictions of the same rows", safe=NOTHING_WRITTEN)
    if not ids:
        raise EngineError("E3.53", "no rows", str(files[0].path), "give files with rows", safe=NOTHING_WRITTEN)
    return ids


def consensus(files: Sequence[Predictions], ids: Sequence[str], weights: Sequence[float], metric: str, tokenizer: str):
    """The choice for each id; a file's candidates share its weight. Returns texts, and how many came from each file."""
    from ensembling import choose_by_consensus

    texts, taken = [], [0] * len(files)
    for one in ids:
        candidates, shares, owners = [], [], []
        for number, file in enumerate(files):
            own = file.candidates[one]
            candidates += own
            shares += [weights[number] / len(own)] * len(own)
            owners += [number] * len(own)
        chosen = choose_by_consensus(candidates, shares, metric=metric, tokenizer=tokenizer).index
        if not candidates[chosen].strip():  # no other has weight, or a word to agree in
            chosen = next((place for place, text in enumerate(candidates) if text.strip()), chosen)
        texts.append(candidates[chosen])
        taken[owners[chosen]] += 1
    return texts, taken


def references_for(args: argparse.Namespace, files: Sequence[Predictions], ids: Sequence[str]) -> list[Any] | None:
    """References by id: from --references, else from a `reference` column of one of the files, else None."""
    if args.references is None:
        for file in files:
            if len(file.references) == len(ids):
                return references_in(file, ids)
        return None
    known = read_predictions(Path(args.references), args.reference_id_column, args.reference_column)
    if missing := [one for one in ids if one not in known.candidates]:
        what = f"no reference for {len(missing)} ids, such as {missing[0]}"
        raise EngineError("E3.54", what, args.references, "give references for every prediction", safe=NOTHING_WRITTEN)
    return [known.candidates[one] for one in ids]  # several rows of one id are several references


def references_in(file: Predictions, ids: Sequence[str]) -> list[list[str]]:
    """References of a file's `reference` column; the recipe of the run that it lies in says whether a cell holds several."""
    from comparing import recipe_of, references_of

    cells, run = [file.references[one] for one in ids], file.path.absolute().parent.parent
    if (run / "recipe.yaml").is_file():
        return references_of(cells, recipe_of(run))
    if any("\n" in cell for cell in cells):
        what = "`reference` cells of several lines count as one reference; are they several, name them by --references"
        print(f"{file.path}: {what}", file=sys.stderr)
    return references_of(cells, {})


def mbr(args: argparse.Namespace) -> int:
    from trials import Scored, comparison

    from engine.prediction.submission import Sample, refuse_empty
    from engine.scoring import rouge

    files = [read_predictions(Path(path), args.id_column, args.text_column) for path in args.files]
    weights = checked_weights(args.weights, len(files))
    ids = check_ids(files)
    references = references_for(args, files, ids)
    if args.sample_submission:
        said = ["".join(text for file in files for text in file.candidates[one]) for one in ids]
        Sample(args.sample_submission, ids)
        refuse_empty(ids, said, args.sample_submission)
    started = time.perf_counter()
    texts, taken = consensus(files, ids, weights, args.utility, args.rouge_tokenizer)
    seconds = time.perf_counter() - started
    write(args, files[0].id_column, files[0].text_column, ids, texts)
    shares = ", ".join(f"{file.path} {count}" for file, count in zip(files, taken, strict=True))
    print(f"{args.output}: {len(ids)} rows; taken from {shares}")
    print(f"cost: the predictions of {len(files)} files, and {seconds:.1f} s for the consensus")
    if references is not None:
        firsts = [[file.candidates[one][0] for one in ids] for file in files]
        systems = [
            Scored(str(file.path), rouge.rouge_rows(first, references, args.rouge_tokenizer))
            for file, first in zip(files, firsts, strict=True)
        ]
        combined = Scored("consensus", rouge.rouge_rows(texts, references, args.rouge_tokenizer), seconds)
        print(
            *comparison(combined, systems, args.metric, args.seed), rouge.tokenizer_id(args.rouge_tokenizer), sep="\n"
        )
    return 0


# --- mean of token probabilities ------------------------------------------------------------------------------------


def average(args: argparse.Namespace) -> int:
    from trials import Scored, comparison, open_subject

    from engine.prediction.submission import Sample, without_empty

    weights = checked_weights(args.weights, len(args.runs))
    given = {"device": args.device, "limit": args.limit, "labelled": args.input is None}
    first = open_subject(args.runs[0], input_file=args.input, **given)
    source = args.input or first.recipe.data.validation_file
    subjects = [first, *(open_subject(run, input_file=source, **given) for run in args.runs[1:])]
    check_members(subjects, args.runs)
    ids = [example.id for example in first.examples]
    if args.sample_submission:
        Sample(args.sample_submission, ids)
    combined = decode_together(subjects, weights, args.overrides)
    texts = without_empty(ids, first.dialogues, combined.texts) if args.sample_submission else combined.texts
    write(args, first.recipe.data.id_column or "id", "summary", ids, texts)
    print(f"{args.output}: {len(combined.texts)} rows in {combined.seconds:.1f} s")
    if not first.labelled or args.no_members:
        return 0
    systems = []
    for subject, run in zip(subjects, args.runs, strict=True):
        alone = subject.decode(subject.summarizer(first.generation(args.overrides)))
        systems.append(Scored(str(run), first.score(alone.texts), alone.seconds))
        print(f"scored {run}", flush=True)
    together = Scored("together", first.score(combined.texts), combined.seconds)
    print(*comparison(together, systems, args.metric, args.seed), sep="\n")
    return 0


def check_members(subjects: Sequence[Subject], names: Sequence[str]) -> None:
    """The same token must mean the same text in every member, and all have the same rows. Raises EngineError E3, E4."""
    from trials import refuse_other_rows

    vocabulary = subjects[0].bundle.tokenizer.get_vocab()
    for subject, name in zip(subjects[1:], names[1:], strict=True):
        refuse_other_rows(subject.examples, name, subjects[0].examples, names[0])
        if subject.bundle.tokenizer.get_vocab() != vocabulary:
            what = f"its vocabulary is not that of {names[0]}, so probabilities cannot be averaged"
            raise EngineError(
                "E4.62", what, str(name), "combine their predictions with mbr instead", safe=NOTHING_WRITTEN
            )


def decode_together(subjects: Sequence[Subject], weights: Sequence[float], overrides: Sequence[str]) -> Decoding:
    """All rows with all models, under the first one's settings."""
    from ensembling import generate_together
    from trials import Decoding

    first = subjects[0]
    summarizer = first.summarizer(first.generation(overrides))
    started = time.perf_counter()
    try:
        n_best = generate_together(
            [subject.bundle.model for subject in subjects],
            [[feature.input_ids for feature in subject.prompts] for subject in subjects],
            summarizer.settings,
            pad_token_id=first.bundle.tokenizer.pad_token_id,
            weights=weights,
            max_batch_size=first.recipe.evaluation.per_device_eval_batch_size,
            vocabulary_mask=summarizer.mask_for(first.dialogues),
        )
    except ValueError as error:
        raise EngineError(
            "E4.63", str(error), "average", "combine predictions with mbr instead", safe=NOTHING_WRITTEN
        ) from error
    summaries = [summarizer.summary_of(index, hypotheses) for index, hypotheses in enumerate(n_best)]
    return Decoding.of(summaries, time.perf_counter() - started)


# --- both -----------------------------------------------------------------------------------------------------------


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    from ensembling import normalised

    try:
        return normalised(weights, count)
    except ValueError as error:
        raise EngineError("E2.64", str(error), "--weights", "give one for each member", safe=NOTHING_WRITTEN) from error


def write(args: argparse.Namespace, id_column: str, text_column: str, ids: list[str], texts: list[str]) -> None:
    """Two columns, or the sample submission's own format. Raises EngineError E3 where ids do not fit the sample."""
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.sample_submission:
        from engine.prediction.submission import submission_table, write_submission

        write_submission(submission_table(ids, texts, args.sample_submission), path)
        return
    from engine.runtime.atomic import write_text_atomically

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([id_column, text_column])
    writer.writerows(zip(ids, texts, strict=True))
    write_text_atomically(path, out.getvalue())


def arguments(argv: list[str] | None) -> argparse.Namespace:
    from engine.recipe.flags import settings_apart

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--output", required=True, help="CSV file to write")
    both.add_argument("--sample-submission", help="write in this file's format, and refuse other ids")
    both.add_argument("--weights", type=float, nargs="+", help="one for each member (default: equal)")
    both.add_argument("--metric", default="rouge_sum", choices=METRICS, help="what the comparison shows")
    both.add_argument("--seed", type=int, default=42, help="of the bootstrap")
    both.add_argument("--traceback", action="store_true", help="show where an error came from")

    one = kinds.add_parser("mbr", parents=[both], help="consensus over prediction files")
    one.add_argument("files", nargs="+", help="CSV files with ids and texts")
    one.add_argument("--id-column", help="default: id or fname")
    one.add_argument("--text-column", help="default: prediction or summary")
    one.add_argument("--references", help="CSV file with references (default: a `reference` column of the predictions)")
    one.add_argument("--reference-id-column", help="default: id or fname")
    one.add_argument("--reference-column", help="default: prediction or summary")
    one.add_argument("--utility", default="rouge_mean", choices=METRICS, help="what candidates agree by")
    one.add_argument(
        "--rouge-tokenizer", default="mecab", choices=("mecab", "char", "whitespace"), help="default: mecab"
    )
    one.set_defaults(run=mbr)

    two = kinds.add_parser("average", parents=[both], help="mean of token probabilities inside the beam search")
    two.add_argument("runs", nargs="+", help="run, checkpoint or model folders, and generation.key=value overrides")
    two.add_argument(
        "--input", help="rows to decode of all members (default: the validation file of the first run's recipe)"
    )
    two.add_argument("--no-members", action="store_true", help="do not decode with each member alone")
    two.add_argument("--limit", type=int, help="only the first rows")
    two.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: the GPU, where there is one"
    )
    two.set_defaults(run=average)

    words, settings = settings_apart(two, sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    args.overrides = settings
    odd = [setting for setting in settings if args.kind == "mbr" or not setting.startswith("generation.")]
    if odd:
        parser.error(f"unrecognized arguments: {' '.join(odd)}")
    if len(args.runs if args.kind == "average" else args.files) < 2:
        parser.error("at least two members")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return args.run(args)


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
