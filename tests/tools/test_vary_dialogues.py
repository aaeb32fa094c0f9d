"""Shortened versions of dialogues: same rows, fewer turns, repeatable."""

from __future__ import annotations

import csv
import importlib.util
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("vary_dialogues", ROOT / "tools" / "vary_dialogues.py")
vary_dialogues = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vary_dialogues)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.mark.parametrize(("turns", "share", "left"), [(3, 0.5, 3), (4, 0.01, 3), (10, 0.2, 8), (20, 0.5, 10)])
def test_a_share_of_the_turns_goes_and_the_rest_keeps_its_order(turns, share, left):
    dialogue = [f"#Person{1 + n % 2}#: {n}번째 말" for n in range(turns)]
    kept = vary_dialogues.without_some_turns("\n".join(dialogue), share, random.Random(1)).split("\n")
    assert len(kept) == left and kept == [turn for turn in dialogue if turn in kept]


def test_versions_of_a_file(tmp_path, root, capsys):
    source = root / "recipes" / "quickstart" / "dev.csv"
    arguments = [str(source), "--output-dir", str(tmp_path / "v"), "--copies", "2"]
    assert vary_dialogues.main(arguments) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    given, (one, two) = rows(source), [rows(path) for path in paths]
    for old, first, second in zip(given, one, two, strict=True):
        assert old["fname"] == first["fname"] == second["fname"] and old["summary"] == first["summary"]
        turns = set(old["dialogue"].split("\n"))
        assert set(first["dialogue"].split("\n")) <= turns and (len(turns) < 4 or first["dialogue"] != old["dialogue"])
    assert [row["dialogue"] for row in one] != [row["dialogue"] for row in two]
    before = [path.read_bytes() for path in paths]
    assert vary_dialogues.main(arguments) == 0
    assert [path.read_bytes() for path in paths] == before


def test_several_references_stay(tmp_path):
    source = tmp_path / "many.csv"
    source.write_text('fname,dialogue,summary1,summary2\nx,"가\n나\n다\n라",하나,둘\n', encoding="utf-8")
    columns = "data.summary_column=[summary1,summary2]"
    assert vary_dialogues.main([str(source), columns, "--output-dir", str(tmp_path), "--copies", "1"]) == 0
    (row,) = rows(tmp_path / "many-1.csv")
    assert (row["summary1"], row["summary2"]) == ("하나", "둘") and len(row["dialogue"].split("\n")) == 3


def test_columns_keep_their_names_so_that_the_run_reads_them(tmp_path):
    source = tmp_path / "test.csv"
    source.write_text('번호,대화\nx,"가\n나\n다\n라"\n', encoding="utf-8")
    names = ["data.id_column=번호", "data.text_column=대화"]
    assert vary_dialogues.main([str(source), *names, "--output-dir", str(tmp_path), "--copies", "1"]) == 0
    (row,) = rows(tmp_path / "test-1.csv")
    assert list(row) == ["번호", "대화"] and len(row["대화"].split("\n")) == 3
