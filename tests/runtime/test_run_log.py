"""The log of a run, and how its lines are wrapped."""

from __future__ import annotations

import logging

from runtime_toys import recipe_for

from engine.errors import EngineError
from engine.runtime import console, process


def test_the_log_holds_early_lines_and_no_colours(tmp_path, capsys):
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))
    with process.start(recipe) as started:
        logging.getLogger("engine").warning("said before there was a folder")
        started.open_run(recipe)
        logging.getLogger("engine.train").info("가나다 " * 60)
    text = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert "said before there was a folder" in text and "가나다" in text and "\x1b" not in text
    shown = capsys.readouterr().err
    assert "warning: said before" in shown and max(map(len, shown.splitlines())) <= 100


def test_wrapping_counts_columns():
    from unicodedata import east_asian_width

    text = "  " + "요약은 짧고 정확하게 " * 20 + "x" * 130 + " end"
    lines = console.wrap(text, 100)
    assert " ".join(line.strip() for line in lines) == text.strip() and lines[0].startswith("  요약은")
    widths = [sum(2 if east_asian_width(letter) in "WF" else 1 for letter in line) for line in lines]
    assert [width for width in widths if width > 100] == [132], "a word longer than a line stays whole"
    assert console.wrap("", 100) == [""] and console.wrap("a  b   c", 100) == ["a  b   c"]


def test_escape_sequences_of_others_reach_no_terminal(tmp_path, capsys):
    """Dialogues, ids and names of models are other people's: a bell, a cleared screen, another colour, half a character."""
    recipe = recipe_for(tmp_path, output_dir=str(tmp_path / "run"))
    with process.start(recipe) as started:
        started.open_run(recipe)
        logging.getLogger("engine.train").info("  prediction: \x1b[2J\x07요약 \u202e \ud800")
    error = str(EngineError("E3.5", "row \x1b]0;x\x07 is bad", "\x9b31m"))
    text = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    for shown in (capsys.readouterr().err, error, text):
        assert all(letter.isprintable() or letter in "\n\t" for letter in shown)
    assert "\\x1b[2J" in text and "요약" in text
