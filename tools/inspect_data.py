#!/usr/bin/env python3
"""Look at data before training on it: lengths, duplicates, leaks between splits, doubtful summaries, placeholders.

    python tools/inspect_data.py train.csv dev.csv test.csv [--tokenizer FOLDER ...] [--html FILE]
    python tools/inspect_data.py --recipe recipes/mine.yaml [data.key=value ...]

A split is called like its file; --recipe names the files (train, dev, test), the columns, the limits and the tokenizer.
Nothing is changed: the files stay as they are. --html writes everything to one page that opens without a network.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it also runs without the package installed

from engine.errors import EngineError, printable  # noqa: E402

if TYPE_CHECKING:
    from inspecting import Finding

    from engine.data.encode import TextEncoder
    from engine.recipe.schema import Recipe

WIDTH = 100  # columns of a line
SHOWN, MOST_SHOWN = 10, 500  # rows of a finding in the terminal and on the page
_NUMBER = re.compile(r"[\d.,]*")
_OVERRIDE = re.compile(r"data\.\w+=")


def lines_of(finding: Finding) -> list[str]:
    """A finding within WIDTH columns: numbers to the right, words to the left; the last column gets the room that is left."""
    from compare import cut

    from engine.runtime.console import columns_of, wrap

    lines = ["", f"{finding.title}", *(wrap(finding.note, WIDTH) if finding.note else [])]
    if not finding.rows:
        return lines
    shown = (finding.head, *finding.rows[:SHOWN])
    cells = [[printable(cell[: 2 * WIDTH]).replace("\n", " / ") for cell in row] for row in shown]
    *most, last = zip(*cells, strict=True)
    widths = [min(36, max(map(columns_of, column))) for column in most]
    rest = WIDTH - sum(widths) - 2 * len(widths)
    right = [all(map(_NUMBER.fullmatch, column[1:])) for column in (*most, last)]
    widths.append(max(columns_of(cut(cell, rest)) for cell in last))
    for row in cells:
        line = []
        for cell, width, number in zip(row, widths, right, strict=True):
            cell = cut(cell, width)
            space = " " * (width - columns_of(cell))
            line.append(space + cell if number else cell + space)
        lines.append("  ".join(line).rstrip())
    more = len(finding.rows) - SHOWN
    return lines + ([f"... and {more} more"] if more > 0 else [])


def files_of(names: Sequence[str], recipe: Recipe) -> dict[str, str]:
    """Split -> file: those of the command line under their own names, or those of the recipe."""
    data = recipe.data
    known = {"train": data.train_file, "dev": data.validation_file, "test": data.test_file}
    if not names:
        return {split: file for split, file in known.items() if file}
    stems = [Path(name).name.split(".")[0] for name in names]
    return dict(zip(stems if len(set(stems)) == len(names) else names, names, strict=True))


def encoders_of(folders: Sequence[str], recipe: Recipe, named: bool) -> dict[str, TextEncoder]:
    """Tokenizers by name: of the folders, for the dialogue alone; or the recipe's, with its prompt. Nothing is cut."""
    from dataclasses import replace

    from show_batch import text_encoder

    from engine.data.encode import TextEncoder
    from engine.data.prompts import PromptSettings
    from engine.models import hub, tokenization

    endless = {"max_source_length": sys.maxsize, "max_target_length": sys.maxsize}
    if named and not folders:
        own = replace(text_encoder(recipe)[0], **endless)
        return {f"{recipe.model.name_or_path or 'tokenizer trained on the file'}, with the recipe's prompt": own}
    found = {}
    for folder in folders:
        tokenizer = tokenization.load_tokenizer(hub.resolve(folder, weights=False))
        tokenization.ensure_end_and_pad(tokenizer, folder)
        name = Path(folder).name
        found[folder if name in found else name] = TextEncoder(tokenizer, "seq2seq", PromptSettings(), **endless)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="CSV, JSONL or parquet; also data.key=value")
    parser.add_argument(
        "--tokenizer", action="append", default=[], metavar="FOLDER", help="count its tokens; repeatable"
    )
    parser.add_argument("--recipe", metavar="RECIPE", help="its files (unless named), columns, limits and tokenizer")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page there")
    parser.add_argument("--traceback", action="store_true", help="print a traceback for every error")
    options = parser.parse_intermixed_args(arguments)
    overrides = [name for name in options.files if _OVERRIDE.match(name)]
    names = list(dict.fromkeys(name for name in options.files if name not in overrides))
    if not names and not options.recipe:
        parser.error("name files, or a recipe that does")

    from inspecting import SOURCE_LIMITS, TARGET_LIMITS, everything

    from engine.data.rows import read_examples
    from engine.recipe.load import load_recipe, with_overrides
    from engine.recipe.schema import Recipe

    recipe = load_recipe(options.recipe) if options.recipe else Recipe()
    recipe = with_overrides(recipe, overrides, ("data",))
    data = recipe.data
    files = files_of(names, recipe)
    if not files:
        raise EngineError("E3.1", "the recipe names no data file", options.recipe, "name files on the command line")
    splits = {split: read_examples(file, data, require_summary=False) for split, file in files.items()}
    limits = (
        ((data.max_source_length,), (data.max_target_length,)) if options.recipe else (SOURCE_LIMITS, TARGET_LIMITS)
    )
    findings = everything(splits, encoders_of(options.tokenizer, recipe, bool(options.recipe)), limits)
    print("\n".join(line for finding in findings for line in lines_of(finding)).lstrip("\n"))
    if options.html is not None:
        import pages

        text = pages.fill("inspect_data.html.j2", "inspect", findings=findings, files=files, most=MOST_SHOWN)
        pages.write(options.html, text, "the data files are untouched")
    return 0


if __name__ == "__main__":
    from engine.runtime.exits import main_guard

    sys.exit(main_guard(main))
