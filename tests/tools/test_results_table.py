"""The table of results is written from records, and recipes/README.md holds what its records say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import results_table

from engine.errors import EngineError


def test_the_readmes_table_is_what_the_program_writes(root):
    records = sorted((root / "recipes" / "records").glob("*.json"))
    text = (root / "recipes" / "README.md").read_text(encoding="utf-8")
    table = results_table.table_of([results_table.read_record(path) for path in records])
    assert records and text == results_table.replaced(text, table, root)
    for path in records:
        assert (root / "recipes" / f"{json.loads(path.read_text(encoding='utf-8'))['recipe']['name']}.yaml").is_file()


def test_a_run_becomes_a_record_and_a_row(trained, tmp_path, capsys):
    folder, results = trained
    page = tmp_path / "README.md"
    page.write_text(f"# 앞\n\n{results_table.BEGIN}\nold\n{results_table.END}\n뒤\n", encoding="utf-8")
    assert results_table.main([str(folder / "run"), "--keep", str(tmp_path), "--write", str(page)]) == 0
    printed = capsys.readouterr().out
    record = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert str(folder) not in record and results["baselines"]["dev"]["constant"]["text"] not in record
    assert results_table.main([str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out == printed, "the record says what the run says"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# 앞\n\n") and text.endswith("뒤\n") and "old" not in text and printed.strip() in text
    row = printed.splitlines()[2]
    low, high = results["intervals"]["dev"]
    assert f"{results['metrics']['rouge_mean']:.2f} | {low:.2f} to {high:.2f}" in row and "dev, 6 rows" in row
    assert results["code"]["commit"] is None or results["code"]["commit"][:12] in row


def test_runs_of_one_recipe_are_kept_beside_each_other(trained, tmp_path, capsys):
    record, kept = json.loads((trained[0] / "run" / "results.json").read_text(encoding="utf-8")), tmp_path / "kept"
    for seed in (1, 2, 3):
        (tmp_path / f"{seed}.json").write_text(json.dumps(record | {"best_step": seed}), encoding="utf-8")
    assert results_table.main([str(tmp_path / "1.json"), "--keep", str(kept)]) == 0
    assert [path.name for path in kept.iterdir()] == ["run.json"]
    assert results_table.main([*(str(tmp_path / f"{seed}.json") for seed in (1, 2, 3)), "--keep", str(kept)]) == 0
    steps = {path.name: json.loads(path.read_text(encoding="utf-8"))["best_step"] for path in kept.iterdir()}
    assert sorted(steps.values()) == [1, 2, 3] and steps["run.json"] == 1
    assert all(re.fullmatch(r"run(-[0-9a-f]{8})?\.json", name) for name in steps)
    # what is kept already stays as it is; the same record is found again
    capsys.readouterr()
    assert results_table.main([str(tmp_path / "2.json"), "--keep", str(kept)]) == 0
    (told,) = capsys.readouterr().err.splitlines()
    assert steps[Path(told.split()[-1]).name] == 2 and len(list(kept.iterdir())) == 3
    with pytest.raises(EngineError, match=r"E2\.77"):
        results_table.main([str(tmp_path / "3.json")] * 2 + ["--keep", str(kept)])


@pytest.mark.parametrize("name", ["../../x", "", ".x", "a/b", None, 7])
def test_a_name_that_no_recipe_has_is_no_records(name, trained, tmp_path):
    record = json.loads((trained[0] / "run" / "results.json").read_text(encoding="utf-8"))
    path = tmp_path / "a" / "b" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record | {"recipe": record["recipe"] | {"name": name}}), encoding="utf-8")
    with pytest.raises(EngineError, match=r"E5\.62"):
        results_table.main([str(path), "--keep", str(path.parent)])
    assert [path.name for path in tmp_path.rglob("*.json")] == ["results.json"]


@pytest.mark.parametrize("text", ["", "{begin}\n", "{end}\n{begin}\n", "{begin}\n{end}\n{begin}\n{end}\n"])
def test_a_page_without_one_place_for_it_is_left_alone(text, trained, tmp_path):
    page = tmp_path / "README.md"
    text = text.format(begin=results_table.BEGIN, end=results_table.END)
    page.write_text(text, encoding="utf-8")
    with pytest.raises(EngineError, match="E2.132"):
        results_table.main([str(trained[0] / "run"), "--write", str(page)])
    assert page.read_text(encoding="utf-8") == text


def test_what_is_no_result_is_refused(trained, tmp_path):
    record = json.loads((trained[0] / "run" / "results.json").read_text(encoding="utf-8"))
    path = tmp_path / "results.json"
    for change, code in (({"kind": "debug"}, "E2.131"), ({"metrics": None}, "E5.62"), ({"data": {}}, "E5.62")):
        path.write_text(json.dumps(record | change), encoding="utf-8")
        with pytest.raises(EngineError, match=code):
            results_table.main([str(tmp_path)])
    shutil.rmtree(tmp_path)
    with pytest.raises(EngineError, match="E5.62"):
        results_table.main([str(path)])
