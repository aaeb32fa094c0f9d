"""recipes/docs/extending.md: its code runs as it stands, over a tiny recipe."""

from __future__ import annotations

import json
import re
import sys

import pytest
import runs
import tiny
import yaml

from engine import Predictor, load_recipe
from engine.train import main, run

TEXT = (runs.ROOT / "recipes" / "docs" / "extending.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
YAML = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]


@pytest.fixture
def recipe(tmp_path):
    return runs.write_recipe(tmp_path, rows=8)


def executed(block: str, recipe, names: dict | None = None) -> dict:
    names = {} if names is None else names
    code = block.replace('"recipes/mine.yaml"', repr(str(recipe)))
    exec(compile(code, "extending.md", "exec"), names)  # noqa: S102 - our own document
    return names


def test_the_page_has_the_blocks_that_are_tried_here():
    assert [len(PYTHON), len(YAML)] == [3, 2]


@pytest.mark.slow
def test_metric_and_callbacks_from_python(recipe, tmp_path, capsys):
    names = executed(PYTHON[0], recipe)
    results = names["results"]
    assert results["best_value"] == results["metrics"]["length_error"] > 0
    assert str(results["metrics"]["length_error"]) in capsys.readouterr().out
    again = runs.write_recipe(tmp_path, rows=8, experiment__output_dir=str(tmp_path / "again"))
    diary = executed(PYTHON[1], again, names)["diary"]
    assert diary.lines[0].startswith("step 2: ROUGE-1 ") and diary.lines[-1] == "saved checkpoint-2"


@pytest.mark.slow
def test_a_metric_that_a_recipe_names(recipe, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "korean_metrics.py").write_text(PYTHON[2], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (command,) = re.findall(r"recipes/mine.yaml (--allow-code) \"(.*)\"", TEXT)
    assert main([str(recipe), *command]) == 0
    sys.modules.pop("korean_metrics")
    assert 0 <= runs.rows_of(tmp_path / "run", "dev")[0]["polite_share"] <= 100


@pytest.mark.slow
def test_bertscore(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.bert(tmp_path / YAML[0]["evaluation"]["bertscore_model"])
    results = run(load_recipe(recipe, _layer(YAML[0], 1)))
    assert 0 < results["metrics"]["bertscore"] <= 100


def _layer(sections: dict, layer: int) -> dict:
    """The page's keys, for an encoder of two layers."""
    return {"evaluation": sections["evaluation"] | {"bertscore_layer": layer}}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bart", "llama"])
def test_a_template_trains_and_predicts_the_same_from_the_run_folder(tmp_path, family):
    recipe = runs.write_recipe(tmp_path, family, rows=8, data__test_file=str(tmp_path / "test.jsonl"))
    for name in ("train", "dev", "test"):
        rows = [json.loads(line) for line in tiny.write_rows(tmp_path / f"{name}.jsonl", 8).read_text().splitlines()]
        text = "\n".join(json.dumps(row | {"topic": f"주제 {i}"}, ensure_ascii=False) for i, row in enumerate(rows))
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    run(load_recipe(recipe, YAML[1]))
    written = (tmp_path / "run" / "predictions").glob("test-step*.csv")
    import pandas as pd

    table = pd.read_csv(next(written), keep_default_na=False)
    predictor = Predictor.from_run(tmp_path / "run", device="cpu")
    kept = json.loads((tmp_path / "run" / "final_model" / "prompt_settings.json").read_text())["prompt"]
    assert kept["template"] == YAML[1]["prompt"]["template"] and kept["style"] == "template"
    rows = pd.read_json(tmp_path / "test.jsonl", lines=True)
    assert list(predictor.predict_dataframe(rows, batch_size=8)["summary"]) == list(table["prediction"])
    prompt = predictor.encoder.prompt_text("#Person1#: 네.")
    assert prompt == "[주제] \n[대화]\n#Person1#: 네.\n[할 일] 두 문장 이내로 요약하세요.\n[요약]\n"
