"""The card of a finished model is what the hub reads, whatever names and settings a recipe holds."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import tiny
from huggingface_hub import ModelCard

from engine.models.hub import BaseIdentity
from engine.prediction.card import card, table
from engine.prediction.export import code
from engine.recipe.schema import Recipe

NASTY = 'a"b\n---\nlicense: mit\n# `c` | <script>: {} &x *y [z](w) hf_abcdefghijklmnop \x1b[31m'


def card_of(base: str = "some/base", record=None, **sections) -> str:
    bundle = SimpleNamespace(
        model=tiny.model("bart"),
        family="seq2seq",
        base=BaseIdentity(base, None, ""),
        lengths={"max_source_length": 96},
    )
    return card(Recipe(**sections), bundle, record)


def test_a_runs_card_is_read_by_the_hub(trained):
    folder, results = trained
    made = ModelCard((folder / "run" / "final_model" / "README.md").read_text(encoding="utf-8"))
    data = made.data
    front = {"language": "ko", "license": "unknown", "library_name": "transformers", "pipeline_tag": "summarization"}
    front |= {"metrics": ["rouge"], "base_model": None}  # the base is a folder
    assert {name: getattr(data, name) for name in front} == front
    scores = {(result.dataset_split, result.metric_name): result.metric_value for result in data.eval_results}
    assert len(scores) == 6 and data.model_name == "run"
    for split, metrics in (("validation", results["metrics"]), ("test", results["test_metrics"])):
        assert scores[split, "ROUGE-2 (F1 x 100, whitespace)"] == pytest.approx(metrics["rouge2"], abs=1e-4)
    revisions = {result.dataset_split: result.dataset_revision for result in data.eval_results}
    assert revisions == {"validation": results["data"]["dev_sha256"], "test": results["data"]["test_sha256"]}

    (row,) = [line for line in made.text.splitlines() if line.startswith("| dev |")]
    low, high = results["intervals"]["dev"]
    floors = [results["baselines"]["dev"][name]["rouge_mean"] for name in ("lead", "constant")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    mean = results["metrics"]["rouge_mean"]
    assert cells[1] == "6" and cells[5:] == [f"{mean:.2f}", f"{low:.2f} to {high:.2f}", *(f"{f:.2f}" for f in floors)]
    assert f"`train.jsonl`, 24 rows, SHA-256 {results['data']['train_sha256']}" in made.text
    assert str(folder) not in made.content.replace(str(folder / "model"), ""), "no path but the base's"
    assert not any(text in made.content for text in tiny.TEXTS), "no row of the data"


def test_a_base_on_the_hub_is_named_and_an_unscored_model_names_no_results():
    data = ModelCard(card_of()).data
    assert (data.base_model, data.base_model_relation, data.eval_results) == ("some/base", "finetune", None)
    assert "It was not evaluated." in card_of() and "merged from an adapter" in card_of()


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_names_of_files_and_models_stay_text(name):
    """Rendered by a Markdown parser, nothing but code is made of them; the front matter's keys are ours."""
    markdown_it = pytest.importorskip("markdown_it")
    sections = {"data": {f"{name}_file": f"/secret/place/{NASTY}"}, "generation": {"stop_strings": [NASTY]}}
    text = card_of(base=NASTY, **sections)
    plain = card_of(base="base", data={f"{name}_file": "f"}, generation={"stop_strings": ["s"]})
    data = ModelCard(text).data
    assert data.license == "unknown" and data.to_dict() == ModelCard(plain).data.to_dict()
    assert "hf_abcdefghijklmnop" not in text and "\x1b" not in text and "/secret/place" not in text

    def shape(content: str) -> list[str]:
        kinds = [kind for token in markdown_it.MarkdownIt().enable("table").parse(content) for kind in kinds_of(token)]
        return [kind for kind in kinds if kind != "text"]

    def kinds_of(token) -> list[str]:
        return [token.type, *(kind for child in token.children or [] for kind in kinds_of(child))]

    assert shape(ModelCard(text).text) == shape(ModelCard(plain).text)


def test_results_of_files_with_such_names_are_read_too():
    metrics = {"rouge1": 1.0, "rouge2": 2.0, "rougeL": 3.0, "rouge_mean": 2.0, "loss": 1.0, "rouge_tokenizer": "char"}
    record = {
        "metrics": metrics | {"rouge_tokenizer_version": "char"},
        "data": {"train_rows": 4, "train_sha256": "0", "dev_rows": 3, "dev_sha256": "1"},
        "intervals": {"dev": [1.0, 3.0]},
        "baselines": {},
        "best_value": 2.0,
        "best_step": 4,
        "best_metric": "rouge_mean",
        "code": {"version": "1", "commit": "abc", "dirty": True},
        "versions": {"torch": "1", "transformers": "2", "peft": "3"},
    }
    made = ModelCard(card_of(record=record, data={"validation_file": NASTY}))
    assert [result.metric_value for result in made.data.eval_results] == [1.0, 2.0, 3.0]
    assert made.data.license == "unknown" and "at abc, changed" in made.text
    assert "hf_abc" not in made.content


@pytest.mark.parametrize("text", ["plain", "`", "a``b`", "\n", "```\n# x"])
def test_a_code_span_holds_any_text(text):
    markdown_it = pytest.importorskip("markdown_it")
    tokens = markdown_it.MarkdownIt().parse(f"x {code(text)} y")
    kinds = [child.type for token in tokens for child in token.children or []]
    assert kinds == ["text", "code_inline", "text"] or not text.strip(), kinds
    assert re.fullmatch("[^\n]*", code(text))


def test_a_cell_ends_where_its_column_does():
    """A machine may be named with a bar in it."""
    assert table(["machine", "mean"], [["CPU | 2 cores", "1.00"]]).splitlines()[-1] == "| CPU \\| 2 cores | 1.00 |"
