#!/usr/bin/env python3
"""Compare finished runs: what their recipes differ in, what it was worth, and where they go wrong.

    python tools/compare.py RUN RUN ... [--html FILE] [--split dev]

Prints a table: scores with 95 % bootstrap intervals, and each run's gain over the first one by a paired bootstrap over
rows. --html also writes one page that opens from the disk without a network: curves, errors by kind of dialogue, and all
dialogues with the runs' summaries side by side. Runs must have been scored on the same rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import printable  # noqa: E402

if TYPE_CHECKING:
    from comparing import Run, Score

TEMPLATE = "compare.html.j2"
MOST_SHOWN = 2000  # dialogues on a page; a browser holds these with ease
_WIDEST = 32  # columns of a recipe's value in the terminal


# --- the terminal -----------------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns: the first one to the left, numbers and the rest to the right."""
    from engine.runtime.console import columns_of

    rows = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(columns_of(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        spaces = [" " * (width - columns_of(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [
            cell + pad if place == 0 else pad + cell for place, (cell, pad) in enumerate(zip(row, spaces, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def summary(runs: Sequence[Run], scores: Sequence[dict[str, Score]], split: str) -> list[str]:
    from comparing import best_of, floors_of, recipe_differences

    from engine.scoring.rouge import tokenizer_id

    first, best = runs[0], best_of(scores)
    lines = [f"{len(first.rows)} {split} rows; ROUGE F1 x 100, {tokenizer_id(first.tokenizer)}", ""]
    rows = [["", "step", "rouge1", "rouge2", "rougeL", "mean", "95 % interval", ""]]
    gains = [[f"gain over {first.name}", "mean, 95 % interval", "p"]]
    for number, (run, own) in enumerate(zip(runs, scores, strict=True)):
        mean, mark = own["rouge_mean"], "best" if number == best else ""
        cells = [f"{own[metric].interval.mean:.2f}" for metric in ("rouge1", "rouge2", "rougeL", "rouge_mean")]
        words = " ".join(filter(None, (run.kind if run.kind != "done" else "", mark)))
        rows.append([run.name, str(run.step), *cells, span(mean.interval), words])
        gains += [[run.name, gain(mean), p_value(mean)]] if mean.gain else []
    for name, floor in floors_of(runs, split):
        cells = [f"{floor[metric]:.2f}" for metric in ("rouge1", "rouge2", "rougeL", "rouge_mean")]
        rows.append([cut(name), "", *cells, "", ""])
    lines += [*table(rows), "", *table(gains)]
    differences = recipe_differences(runs)
    lines += ["", "recipes differ in:" if differences else "the recipes are the same"]
    if differences:
        body = [[key, *map(cut, values)] for key, values in differences]
        lines += table([["", *(run.name for run in runs)], *body])
    return lines


def span(interval: Any) -> str:
    return f"[{interval.low:.2f}, {interval.high:.2f}]"


def gain(score: Score) -> str:
    return "" if score.gain is None else f"{score.gain.mean:+.2f} [{score.gain.low:+.2f}, {score.gain.high:+.2f}]"


def p_value(score: Score) -> str:
    return "" if score.gain is None else "< 0.001" if score.gain.p < 0.001 else f"{score.gain.p:.3f}"


def cut(text: str, widest: int = _WIDEST) -> str:
    from engine.runtime.console import columns_of

    if columns_of(text) <= widest:
        return text
    while columns_of(text) >= widest:
        text = text[:-1]
    return text + "…"


# --- the page ---------------------------------------------------------------------------------------------------------


def page(runs: Sequence[Run], scores: Sequence[dict[str, Score]], split: str) -> str:
    """One HTML file with everything in it. Raises: EngineError E2.78 where Jinja2 or Plotly is not installed."""
    import pages

    plotly = pages.needed("plotly.offline", "compare")
    import comparing

    from engine.scoring.rouge import tokenizer_id

    topics = comparing.topics_of(runs[0], split)
    errors = comparing.errors_of(runs, topics)
    keys = comparing.sort_keys(runs)
    dialogues = comparing.dialogues_of(runs, topics)
    shown = sorted(range(len(dialogues)), key=lambda i: -dialogues[i].disagreement)[:MOST_SHOWN]
    return pages.fill(
        TEMPLATE,
        "compare",
        runs=runs,
        scores=scores,
        best=comparing.best_of(scores),
        split=split,
        tokenizer=tokenizer_id(runs[0].tokenizer),
        floors=comparing.floors_of(runs, split),
        differences=comparing.recipe_differences(runs),
        charts=[*line_charts(runs), *error_charts(errors)],
        placeholders=comparing.placeholders_of(runs),
        dialogues=[(number, dialogues[number]) for number in sorted(shown)],
        total=len(dialogues),
        sort_keys=[(name, title) for name, title, _ in keys],
        sort_values=[{name: round(value(dialogues[i]), 4) for name, _, value in keys} for i in sorted(shown)],
        plotly=plotly.get_plotlyjs().replace("</script", "<\\/script"),
        **{"span": span, "gain": gain, "p_value": p_value},
    )


def line_charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Curves as the page's script takes them: colours and fonts are the style sheet's."""
    from comparing import curves_of

    notes = {"Loss": "solid: training, dashed: dev", "ROUGE mean on dev": "dotted: first turns; one sentence for all"}
    words = {"train": "", "dev": " dev", "lead": "first turns", "constant": "one sentence for all"}
    charts = []
    for number, (title, curves) in enumerate(curves_of(runs).items()):
        lines = [
            {
                "run": None if curve.split in ("lead", "constant") else curve.run,
                "name": words[curve.split]
                if curve.split in ("lead", "constant")
                else runs[curve.run].name + words[curve.split],
                "dash": {"train": "solid", "dev": "dash" if title == "Loss" else "solid"}.get(curve.split, "dot"),
                "points": curve.split == "dev" or len(curve.x) == 1,
                "x": curve.x,
                "y": curve.y,
            }
            for curve in curves
        ]
        note = notes.get(title, "") if len({curve.split for curve in curves}) > 1 else ""
        charts.append({"id": f"curve-{number}", "kind": "lines", "title": title, "note": note, "lines": lines})
    return charts


def error_charts(errors: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars with the half-widths of their intervals, downwards and upwards."""
    charts = []
    for number, (title, buckets) in enumerate(errors.items()):
        bars = [
            {
                "run": run,
                "y": [bucket.intervals[run].mean for bucket in buckets],
                "down": [bucket.intervals[run].mean - bucket.intervals[run].low for bucket in buckets],
                "up": [bucket.intervals[run].high - bucket.intervals[run].mean for bucket in buckets],
            }
            for run in range(len(buckets[0].intervals))
        ]
        labels = [f"{bucket.label}<br>{bucket.rows} rows" for bucket in buckets]
        charts.append(
            {"id": f"errors-{number}", "kind": "bars", "title": title, "note": "", "x": labels, "lines": bars}
        )
    return charts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; the first is the baseline")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page there")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="rows to compare on (default: dev)")
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    options = parser.parse_args(arguments)
    if len(options.runs) < 2:
        parser.error("name at least two runs")

    from comparing import read_runs, scores_of

    runs = read_runs(options.runs, options.split)
    scores = scores_of(runs)
    print("\n".join(summary(runs, scores, options.split)))
    if options.html is not None:
        import pages

        pages.write(options.html, page(runs, scores, options.split), "the runs are untouched")
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
