#!/usr/bin/env python3
"""Find decoding settings for a trained model: decode its dev split under each setting of a grid and keep the best.

    python tools/tune_decoding.py RUN --grid "num_beams=[3,5,8] length_penalty=[0.5,1.0,1.5]"

Every setting is compared with the run's own by a paired bootstrap over rows. Written to RUN/tuning/: trials.jsonl
(finished settings with their texts; a second call decodes only what is missing), tuning.csv, and best.yaml, which a
recipe can name under `base:`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import itertools
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError  # noqa: E402

if TYPE_CHECKING:
    from trials import Decoding, Subject

    from engine.scoring.intervals import Difference, Interval

MOST_SETTINGS = 2000
METRICS = ("rouge1", "rouge2", "rougeL", "rouge_sum", "rouge_mean")


@dataclass(frozen=True)
class Trial:
    """One setting and what came of it. `changes`: values of the grid's keys; {} for the run's own settings."""

    changes: dict[str, Any]
    decoding: Decoding
    rows: list[dict[str, float]]
    interval: Interval
    difference: Difference
    report: dict[str, Any]

    def mean(self, metric: str) -> float:
        return sum(row[metric] for row in self.rows) / len(self.rows)


def parse_grid(text: str) -> list[dict[str, Any]]:
    """`a=[1,2] b=x` -> every combination, the last key changing fastest. Values are written as in a recipe.

    Raises: EngineError: E2 for text that is not of this form, a key twice, or more than MOST_SETTINGS combinations.
    """
    from engine.recipe.yaml_subset import parse

    parts = re.split(r"(?:^|\s+)(?:generation\.)?([A-Za-z_]\w*)=", text.strip())
    if len(parts) < 3 or parts[0].strip():
        raise EngineError(
            "E2.61", f"not a grid: {text!r}", "--grid", "write key=[value,value] key=[...]", safe="nothing was decoded"
        )
    axes: dict[str, list[Any]] = {}
    for key, written in zip(parts[1::2], parts[2::2], strict=True):
        document = parse(written)
        if document.problems or key in axes or document.value == []:
            why = (
                document.problems[0][1]
                if document.problems
                else "the key is there twice"
                if key in axes
                else "no value"
            )
            raise EngineError(
                "E2.61",
                f"{key}={written.strip()}: {why}",
                "--grid",
                "write key=[value,value]",
                safe="nothing was decoded",
            )
        axes[key] = document.value if isinstance(document.value, list) else [document.value]
    settings = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(settings) > MOST_SETTINGS:
        raise EngineError(
            "E2.61",
            f"{len(settings)} settings",
            "--grid",
            f"at most {MOST_SETTINGS} at once",
            safe="nothing was decoded",
        )
    return settings


class Ledger:
    """Finished decodings by key, one JSON line each; a line cut off by a crash is left out and decoded again."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.identity = path, identity
        self.known: dict[str, dict[str, Any]] = {}
        # Not splitlines(): a summary may hold characters that it takes for line ends.
        for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = entry["decoding"]
            except (ValueError, KeyError, TypeError):
                continue

    def key(self, generation: Any) -> str:
        """Of everything that decides the texts: settings, weights, rows and prompts, precision."""
        idle = {"length_penalty", "early_stopping"} if generation.num_beams == 1 else None  # they only rank beams
        text = json.dumps([self.identity, generation.model_dump(mode="json", exclude=idle)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def add(self, key: str, decoding: Decoding, changes: dict[str, Any]) -> None:
        from engine.runtime.atomic import append_text

        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = self.path.exists() and self.path.read_bytes()[-1:] not in (b"\n", b"")
        line = json.dumps({"key": key, "changes": changes, "decoding": asdict(decoding)}, ensure_ascii=False)
        append_text(self.path, ("\n" if cut_off else "") + line + "\n")


def identity_of(subject: Subject) -> str:
    """What a decoding depends on apart from its settings, in a few hashes."""
    from engine.models.hub import weights_hash

    prompts = hashlib.sha256(json.dumps([feature.input_ids for feature in subject.prompts]).encode()).hexdigest()
    weight = next(subject.bundle.model.parameters())
    base = json.dumps(subject.bundle.base.to_dict(), sort_keys=True)
    batch = subject.recipe.evaluation.per_device_eval_batch_size
    return f"{weights_hash(subject.folder)} {base} {prompts} {weight.dtype} {weight.device.type} {batch}"


def run_trials(
    subject: Subject, grid: list[dict[str, Any]], ledger: Ledger, *, metric: str, tokenizer: str, seed: int
) -> list[Trial]:
    """The run's own settings first, then the grid; settings equal to an earlier one are left out.

    The first one decoded also runs the encoder, so its seconds are not those of the others.
    """
    from trials import encoder_remembered

    from engine.scoring import endings, intervals

    planned: dict[str, tuple[dict[str, Any], Any]] = {}
    for changes in ({}, *grid):
        section = subject.generation({f"generation.{key}": value for key, value in changes.items()})
        planned.setdefault(ledger.key(section), (changes, section))
    # All settings are checked before the first is decoded.
    summarizers = {key: subject.summarizer(section) for key, (_, section) in planned.items()}
    own: list[float] | None = None
    trials: list[Trial] = []
    with encoder_remembered(subject.bundle.model):
        for key, (changes, _) in planned.items():
            decoding = decode(subject, ledger, key, changes, summarizers[key])
            rows = subject.score(decoding.texts, tokenizer)
            values = [row[metric] for row in rows]
            own = values if own is None else own
            trial = Trial(
                changes,
                decoding,
                rows,
                intervals.bootstrap_interval(values, seed),
                intervals.paired_difference(values, own, seed),
                endings.ending_report(decoding.texts, subject.references, [not end for end in decoding.ended]),
            )
            trials.append(trial)
            print(f"[{len(trials)}/{len(planned)}] {progress_line(trial, metric)}", flush=True)
    return trials


def decode(subject: Subject, ledger: Ledger, key: str, changes: dict[str, Any], summarizer: Any) -> Decoding:
    from trials import Decoding

    if key in ledger.known:
        return Decoding(**ledger.known[key])
    decoding = subject.decode(summarizer)
    ledger.add(key, decoding, changes)
    return decoding


# --- what people read -----------------------------------------------------------------------------------------------


def name(changes: dict[str, Any]) -> str:
    from engine.recipe.yaml_subset import flow

    return " ".join(f"{key}={flow(value)}" for key, value in changes.items()) or "the run's own settings"


def progress_line(trial: Trial, metric: str) -> str:
    low, high = trial.interval.low, trial.interval.high
    text = f"{metric} {trial.interval.mean:6.2f} [{low:.2f}, {high:.2f}]"
    if trial.changes:
        d = trial.difference
        text += f"  {d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"
    return f"{text}  {trial.decoding.seconds:6.1f} s  {name(trial.changes)}"


def table(trials: list[Trial], metric: str) -> str:
    """All trials, best first; differences are to the run's own settings over the same rows."""
    columns = [
        f"{metric:>10}",
        f"{'95 % interval':>16}",
        f"{'difference':>24}",
        "    R1     R2     RL",
        "  cap length       s",
    ]
    lines = ["  ".join([*columns, "settings"])]
    for t in ranked(trials):
        d = t.difference
        interval = f"[{t.interval.low:.2f}, {t.interval.high:.2f}]"
        difference = f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]" if t.changes else "-"
        rouge = " ".join(f"{t.mean(m):6.2f}" for m in METRICS[:3])
        ends = f"{t.report['capped_rate']:5.1%} {t.report['mean_length_ratio']:6.2f} {t.decoding.seconds:7.1f}"
        cells = [f"{t.interval.mean:>10.2f}", f"{interval:>16}", f"{difference:>24}", rouge, ends, name(t.changes)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def ranked(trials: list[Trial]) -> list[Trial]:
    """Best first; of equal scores the quicker one, and the run's own settings before all others."""
    return sorted(trials, key=lambda t: (-round(t.interval.mean, 6), bool(t.changes), t.decoding.seconds))


def csv_text(trials: list[Trial], keys: list[str], own: dict[str, Any], metric: str, tokenizer_id: str) -> str:
    """One line per trial, best first, with every grid key's value (the run's own where a trial does not change it)."""
    numbers = ("capped_rate", "mean_length_ratio", "proper_ending_rate", "hangul_ratio", "foreign_rate")
    rows = []
    for t in ranked(trials):
        row: dict[str, Any] = {key: json.dumps(t.changes.get(key, own[key]), ensure_ascii=False) for key in keys}
        row |= {m: round(t.mean(m), 4) for m in METRICS} | {"rouge_tokenizer": tokenizer_id, "metric": metric}
        row |= {"low": round(t.interval.low, 4), "high": round(t.interval.high, 4)}
        row |= {f"difference_{n}": round(v, 4) for n, v in t.difference._asdict().items()}
        row |= {n: round(t.report[n], 4) for n in numbers}
        row |= {"seconds": round(t.decoding.seconds, 2), "tokens": t.decoding.tokens, "own_settings": not t.changes}
        rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def verdict(trials: list[Trial], metric: str, seed: int) -> list[str]:
    """What the best setting is worth, with the optimism of choosing among many taken off."""
    from engine.scoring.intervals import selection_gain

    best, own = ranked(trials)[0], trials[0]
    if not best.changes:
        return [f"The run's own settings are the best of {len(trials)}: {metric} {own.interval.mean:.2f}."]
    d = best.difference
    values = [[row[metric] for row in t.rows] for t in trials]
    honest = selection_gain(values, values[0], seed)
    means = f"{metric} {best.interval.mean:.2f}, own settings {own.interval.mean:.2f}"
    return [
        f"Best of {len(trials)} settings: {name(best.changes)}: {means}.",
        f"Difference {d.mean:+.2f}, 95 % interval [{d.low:+.2f}, {d.high:+.2f}]: "
        + ("zero lies outside." if d.low > 0 else "zero lies inside, so it may be chance."),
        f"Gain to expect on new rows when the best of these settings is picked on these rows: {honest:+.2f}.",
    ]


def overlay(best: Trial, keys: list[str], own: dict[str, Any], comments: list[str]) -> str:
    """A recipe with nothing but the best values of the grid's keys."""
    from engine.recipe.yaml_subset import flow

    values = [f"  {key}: {flow(best.changes.get(key, own[key]))}" for key in keys]
    return "\n".join([*(f"# {comment}" for comment in comments), "generation:", *values, ""])


# --- command line ---------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, checkpoint or model folder")
    parser.add_argument("--grid", required=True, help='"key=[value,value] key=[...]" of the generation section')
    parser.add_argument("--input", help="file with references (default: the validation file of the run's recipe)")
    parser.add_argument("--output", help="folder for the results (default: RUN/tuning)")
    parser.add_argument(
        "--metric", choices=METRICS, help="what decides (default: the run's evaluation.metric, or rouge_sum)"
    )
    parser.add_argument("--rouge-tokenizer", choices=("mecab", "char", "whitespace"), help="default: the run's")
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: the GPU, where there is one"
    )
    parser.add_argument("--seed", type=int, default=42, help="of the bootstrap")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    grid = parse_grid(args.grid)
    from trials import open_subject

    from engine.runtime.atomic import write_text_atomically
    from engine.runtime.run_folder import refuse_link
    from engine.scoring.rouge import tokenizer_id

    subject = open_subject(args.run, input_file=args.input, device=args.device, limit=args.limit)
    own_metric = subject.recipe.evaluation.metric
    metric = args.metric or (own_metric if own_metric in METRICS else "rouge_sum")
    tokenizer = args.rouge_tokenizer or subject.recipe.evaluation.rouge_tokenizer
    output = Path(args.output) if args.output else subject.home / "tuning"
    for path in (output / "trials.jsonl", *(() if args.output else (output,))):  # the run may be a stranger's
        refuse_link(path)
    ledger = Ledger(output / "trials.jsonl", identity_of(subject))
    trials = run_trials(subject, grid, ledger, metric=metric, tokenizer=tokenizer, seed=args.seed)

    keys = list(grid[0])
    own = subject.generation().model_dump()
    scored_on = f"{len(subject.examples)} rows of {subject.source}, {tokenizer_id(tokenizer)}"
    comments = [*verdict(trials, metric, args.seed), f"Scored on {scored_on}."]
    output.mkdir(parents=True, exist_ok=True)
    write_text_atomically(output / "tuning.csv", csv_text(trials, keys, own, metric, tokenizer_id(tokenizer)))
    write_text_atomically(output / "best.yaml", overlay(ranked(trials)[0], keys, own, comments))
    print("", table(trials, metric), "", *comments, f"Written: {output}/tuning.csv, {output}/best.yaml", sep="\n")
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
