"""Setting a run up: the dry run, and what a resume fills."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import own_code
import pytest
import runs
import tiny
import torch
from runtime_toys import in_ranks

from engine import train
from engine.errors import EngineError
from engine.recipe.load import load_recipe
from engine.recipe.schema import Recipe
from engine.runtime.exits import main_guard
from engine.runtime.ranks import RankGroup
from engine.scoring import rouge
from engine.training import setup

ALONE = SimpleNamespace(
    ranks=RankGroup(),
    is_main=True,
    random_state=lambda: None,
    restore_random_state=lambda state: None,
)


def test_dry_run_writes_nothing(tmp_path, capsys):
    recipe = runs.write_recipe(tmp_path)
    assert main_guard(lambda: train.main([str(recipe), "--dry-run"])) == 0
    told = capsys.readouterr().out
    for word in ("updates: 6", "parameters", "first batch"):
        assert word in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_dry_run_needs_no_weights(tmp_path, family):
    recipe = runs.write_recipe(tmp_path, family, lora__enabled=family == "llama")
    with_weights = runs.train(recipe, dry_run=True)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert runs.train(recipe, dry_run=True) == with_weights
    with pytest.raises(EngineError, match="E4.3.*no weights"):
        runs.train(recipe)


def test_dry_run_on_more_ranks_than_rows(tmp_path):
    """The second rank has no row of the first update."""
    recipe = load_recipe(runs.write_recipe(tmp_path, rows=1), ["distributed.strategy=ddp"])
    second = {"rank": 1, "world_size": 2, "is_main": False, "device": torch.device("cpu"), "precision": "fp32"}
    found = setup.dry_run(recipe, SimpleNamespace(ranks=RankGroup(), **second))
    assert found["updates_per_epoch"] == 1 and found["first_batch"]["labels"][0] == 1


@pytest.mark.parametrize(("line", "known"), [("pass", True), ("int(input_ids.max())", False)])
def test_dry_run_of_a_model_with_code_of_its_own(tmp_path, monkeypatch, capsys, line, known):
    """Its memory is estimated where its code runs on shapes alone; it does not where it looks at a value."""
    own_code.save(tmp_path / "model", tmp_path / "ran", monkeypatch, line=line)
    recipe = runs.write_recipe(tmp_path, "llama")
    with pytest.raises(EngineError, match="E4.2"):
        runs.train(recipe, dry_run=True)
    assert not (tmp_path / "ran").exists()
    flags = ("model.trust_remote_code=true", f"model.revision={own_code.PINNED}")
    assert (runs.train(recipe, *flags, dry_run=True)["memory"] is not None) is known
    told = capsys.readouterr()
    assert (tmp_path / "ran").exists() and "dry run: nothing was trained" in told.out
    assert ("memory estimate for one device" in told.out) is known
    assert ("no memory estimate" in told.err) is not known


def test_only_the_files_that_the_run_uses_are_read(tmp_path):
    data = {"train_file": str(tiny.write_rows(tmp_path / "train.jsonl", 5)), "validation_file": "nowhere.csv"}
    splits = setup.read_splits(Recipe(data=data, evaluation={"strategy": "no"}), ALONE)
    assert (len(splits.train), splits.dev, splits.test) == (5, [], [])
    with pytest.raises(EngineError, match=r"nowhere\.csv"):
        setup.read_splits(Recipe(data=data), ALONE)


def test_validation_dialogues_must_not_be_training_dialogues(tmp_path):
    files = {f"{name}_file": str(tiny.write_rows(tmp_path / f"{name}.jsonl", 5)) for name in ("train", "validation")}
    with pytest.raises(EngineError, match=r"E3\.7"):
        setup.read_splits(Recipe(data=files), ALONE)
    assert len(setup.read_splits(Recipe(data=files | {"allow_overlap": True}), ALONE).dev) == 5


@pytest.fixture
def without_dictionary(monkeypatch):
    def broken():
        raise RuntimeError("no dictionary")

    monkeypatch.setattr(rouge, "_mecab", broken)
    rouge.tokenize.cache_clear()


@pytest.mark.parametrize("test_file", ["dev.jsonl", "bare.jsonl"])
def test_scoring_is_tried_where_only_the_test_split_is_scored(tmp_path, without_dictionary, test_file):
    files = {f"{name}_file": str(tiny.write_rows(tmp_path / f"{name}.jsonl", 3)) for name in ("train", "dev")}
    (tmp_path / "bare.jsonl").write_text('{"fname": "a", "dialogue": "안녕?"}\n', encoding="utf-8")
    data = {"train_file": files["train_file"], "test_file": str(tmp_path / test_file)}
    recipe = Recipe(data=data, evaluation={"strategy": "no"})
    with nullcontext() if test_file == "bare.jsonl" else pytest.raises(EngineError, match=r"E3\.40.*no dictionary"):
        setup.read_splits(recipe, ALONE)
    silent = Recipe(data=data, evaluation={"strategy": "no", "generate": False, "metric": "loss"})
    assert len(setup.read_splits(silent, ALONE).test) > 0


def test_metrics_are_tried_where_only_the_test_split_is_scored(tmp_path):
    path = str(tiny.write_rows(tmp_path / "rows.jsonl", 3))
    recipe = Recipe(data={"train_file": path, "test_file": path}, evaluation={"strategy": "no"})
    with pytest.raises(EngineError, match=r"E3\.41.*metric typo"):
        setup.read_splits(recipe, ALONE, {"typo": lambda predictions, references: {}["x"]})


def test_ranks_with_unequal_test_files_are_told(tmp_path):
    train = str(tiny.write_rows(tmp_path / "train.jsonl", 3))

    def task(ranks):
        test = tiny.write_rows(tmp_path / f"{ranks.rank}.jsonl", 3 + ranks.rank)
        data = {"train_file": train, "test_file": str(test)}
        recipe = Recipe(data=data, evaluation={"strategy": "no", "rouge_tokenizer": "char"})
        return setup.read_splits(recipe, SimpleNamespace(ranks=ranks, is_main=ranks.is_main))

    assert [getattr(error, "code", None) for error in in_ranks(2, task)] == ["E9.3"] * 2


@pytest.mark.slow
def test_bf16_on_a_cpu_trains_as_fp32_does_within_its_precision(tmp_path):
    recipe = runs.write_recipe(tmp_path, evaluation__strategy="no", checkpoint__strategy="no")
    losses = {}
    for precision in ("fp32", "bf16"):
        run = tmp_path / precision
        runs.train(recipe, f"training.precision={precision}", f"experiment.output_dir={run}")
        losses[precision] = [row["loss"] for row in runs.rows_of(run)]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01) and losses["bf16"] != losses["fp32"]


@pytest.fixture
def by_tokens(tmp_path):
    """A recipe of two epochs of three updates of 8 rows, cut by a budget that holds one to three rows."""
    return runs.write_recipe(
        tmp_path,
        data__batching="tokens",
        data__tokens_per_batch=200,
        training__num_train_epochs=2,
        training__gradient_accumulation_steps=2,
        checkpoint__strategy="steps",
        checkpoint__steps=1,
        checkpoint__save_total_limit=None,
        evaluation__generate=False,
        evaluation__metric="loss",
    )


@pytest.mark.slow
def test_a_run_by_tokens_says_its_batch_and_resumes_to_the_bit(by_tokens, tmp_path):
    runs.train(by_tokens)
    run = tmp_path / "run"
    told = (run / "train.log").read_text(encoding="utf-8")
    assert "each update trains on 8 rows, in micro-batches of at most 200 tokens; padding: " in told
    first = runs.rows_of(run)
    assert len(first) == 6
    for row in first:
        assert 0 <= row["source_padding_share"] < 0.5 and 0 < row["padding_share"] < 0.5 > row["target_padding_share"]
    shutil.rmtree(run / "final_model")
    (run / "run_status.json").unlink()
    runs.train(by_tokens, resume=str(run / "checkpoint-4"))  # in the second epoch
    bits = ("loss", "grad_norm", "padding_share", "sample_ids_sha256")
    assert [[row[key] for key in bits] for row in runs.rows_of(run)] == [[row[key] for key in bits] for row in first]
