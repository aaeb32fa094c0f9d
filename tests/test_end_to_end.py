"""Whole runs through the command line and the Python API: what they leave behind, on toy and on real data."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import runs
import tiny

from engine import load_recipe
from engine.errors import EngineError

CHECK = runs.ROOT.parent / "shared" / "checks" / "check_run.py"


def hold_against_contract(run_dir):
    if CHECK.is_file():
        done = subprocess.run([sys.executable, str(CHECK), str(run_dir)], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "contract holds", done.stdout


def test_run_folder_keeps_the_contract(trained):
    folder, results = trained
    run_dir = folder / "run"
    hold_against_contract(run_dir)
    assert results == json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    steps = [row["step"] for row in runs.rows_of(run_dir)]
    assert steps == list(range(1, 13)), "24 rows in batches of 4 for two epochs are 12 updates"
    assert [row["step"] for row in runs.rows_of(run_dir, "dev")] == [6, 12]
    assert json.loads((run_dir / "run_status.json").read_text())["code"] == 0
    with (folder / "experiments" / "results.csv").open(encoding="utf-8", newline="") as handle:
        assert [row["run"] for row in csv.DictReader(handle)] == ["run"]


@pytest.mark.slow
def test_resolved_recipe_trains_the_same_again(trained, tmp_path):
    folder, _ = trained
    again = load_recipe(folder / "run" / "recipe.yaml", {"experiment.output_dir": str(tmp_path / "again")})
    from engine.train import run

    run(again)
    losses = [row["loss"] for row in runs.rows_of(folder / "run")]
    assert [row["loss"] for row in runs.rows_of(tmp_path / "again")] == losses


@pytest.mark.slow
def test_predict_command_on_one_and_two_ranks(trained):
    folder, _ = trained
    sample = folder / "sample.csv"
    sample.write_text(",fname,summary\n" + "".join(f"{i},row_{i},x\n" for i in range(5)), encoding="utf-8")
    outputs = []
    for ranks in (1, 2):
        out = folder / f"submission-{ranks}.csv"
        done = runs.launch(
            "engine/predict.py",
            folder / "run",
            "--input",
            folder / "test.jsonl",
            "--output",
            out,
            "--sample-submission",
            sample,
            "generation.num_beams=3",
            ranks=ranks,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "rouge1" in done.stdout, "scores are told where the input has summaries"
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]
    assert outputs[0].decode().splitlines()[0] == ",fname,summary"
    assert not list(folder.glob("*.partial*"))


def test_a_model_folder_without_a_recipe_predicts(trained, tmp_path):
    """Any Hugging Face folder will do: no training file is asked for, columns and settings come from the command line."""
    from engine import predict

    folder, _ = trained
    foreign = tmp_path / "model"
    own = ("recipe.yaml", "prompt_settings.json")
    shutil.copytree(folder / "run" / "final_model", foreign, ignore=shutil.ignore_patterns(*own))
    source = tmp_path / "rows.csv"
    source.write_text('번호,대화\n가,"#Person1#: 안녕?"\n나,"#Person1#: 뭐 해?"\n', encoding="utf-8")
    columns = ["data.id_column=번호", "data.text_column=대화", "data.summary_column=요약"]
    arguments = [str(foreign), "--input", str(source), "--output", str(tmp_path / "out.csv"), *columns]
    assert predict.main([*arguments, "generation.max_new_tokens=4"]) == 0
    written = (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[0] for line in written[1:]] == ["가", "나"]
    with pytest.raises(EngineError, match="num_return_sequences"):
        predict.main([*arguments, "generation.num_return_sequences=9"])


def test_a_model_of_ours_that_lost_its_prompt_settings(trained, tmp_path, capsys):
    """The recipe beside it knows them as well."""
    from engine import predict

    folder, _ = trained
    bare = tmp_path / "model"
    shutil.copytree(folder / "run" / "final_model", bare, ignore=shutil.ignore_patterns("prompt_settings.json"))
    outputs = [tmp_path / "whole.csv", tmp_path / "bare.csv"]
    for model, output in zip((folder / "run", bare), outputs, strict=True):
        assert predict.main([str(model), "--input", str(folder / "test.jsonl"), "--output", str(output)]) == 0
    assert "prompt_settings.json is missing" in " ".join(capsys.readouterr().err.split())
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_run_of_any_precision_predicts_on_the_cpu(trained, tmp_path, precision):
    """Trained in fp16 on a GPU, read on a laptop: in float32, unless the command says otherwise."""
    from engine import predict

    folder, _ = trained
    moved = tmp_path / "model"
    shutil.copytree(folder / "run" / "final_model", moved)
    text = (moved / "recipe.yaml").read_text(encoding="utf-8")
    assert "precision: fp32" in text
    (moved / "recipe.yaml").write_text(text.replace("precision: fp32", f"precision: {precision}"), encoding="utf-8")
    outputs = []
    for model in (folder / "run", moved):
        outputs.append(tmp_path / f"{len(outputs)}.csv")
        arguments = ["--input", str(folder / "test.jsonl"), "--output", str(outputs[-1])]
        assert predict.main([str(model), *arguments]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_overrides_of_a_prediction_work_or_are_refused(trained, tmp_path, monkeypatch, capsys):
    """None is taken and then dropped: lengths reach the prompt, the prompt of a trained model is its own."""
    from engine import predict
    from engine.prediction import summarizer as prediction_summarizer

    folder, _ = trained
    seen: list[list[int]] = []

    def decode(self, model, rows, mask):
        seen.append([len(row.input_ids) for row in rows])
        limits.append(self.settings.max_new_tokens)
        return [prediction_summarizer.Summary(row.index, ["요약"], [0.0], 1, True) for row in rows]

    limits: list[int] = []
    monkeypatch.setattr(prediction_summarizer.Summarizer, "_decode", decode)
    arguments = [str(folder / "run"), "--input", str(folder / "test.jsonl"), "--output", str(tmp_path / "out.csv")]
    free = ["generation.max_new_tokens=null"]
    assert predict.main([*arguments, *free]) == predict.main([*arguments, "data.max_source_length=7", *free]) == 0
    assert max(seen[0]) > 7 and max(seen[1]) == 7
    assert predict.main([*arguments, "data.max_target_length=5", *free]) == 0 and limits[-1] == 5
    for refused in ("prompt.style=instruction", "data.max_test_samples=1", "evaluation.metric=loss", "training.seed=1"):
        with pytest.raises(EngineError) as caught:
            predict.main([*arguments, refused])
        assert caught.value.exit_code == 2 and refused.partition("=")[0].partition(".")[0] in str(caught.value)
    foreign = tmp_path / "model"
    own = shutil.ignore_patterns("recipe.yaml", "prompt_settings.json")
    shutil.copytree(folder / "run" / "final_model", foreign, ignore=own)
    capsys.readouterr()
    assert predict.main([str(foreign), *arguments[1:]]) == 0
    assert "came without prompt settings: prompt.style is plain" in capsys.readouterr().err
    assert predict.main([str(foreign), *arguments[1:], "prompt.prefix=요약: "]) == 0
    assert max(seen[-1]) > max(seen[-2])


def test_resume_of_a_finished_run_changes_nothing(trained):
    folder, results = trained
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    assert runs.train(folder / "recipe.yaml", resume="auto") == results
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_debug_serves_any_recipe(tmp_path):
    recipe = runs.write_recipe(tmp_path, rows=60, tracking__report_to=["tensorboard"])
    done = runs.launch("engine/train.py", recipe, "--debug", f"experiment.output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(runs.rows_of(tmp_path / "run")) == 25, "50 rows in batches of 2"
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_other_precisions_train_on_the_cpu(tmp_path, precision):
    recipe = runs.write_recipe(tmp_path, training__precision=precision, runtime__emulate_fp16_on_cpu=True)
    runs.train(recipe)
    rows = runs.rows_of(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert ("loss_scale" in rows[0]) == (precision == "fp16")


@pytest.mark.slow
def test_real_data_kobart_at_reduced_width(tmp_path, shared_data):
    """KoBART's tokenizer and config, narrow and random: trains, evaluates, and writes the competition's submission."""
    data = shared_data / "dialogsum_ko"
    recipe = runs.write_recipe(
        tmp_path,
        model__name_or_path=str(shared_data / "tokenizers" / "kobart"),
        model__init="random",
        model__config={
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        },
        tokenizer__added_tokens=load_recipe(runs.ROOT / "recipes" / "kobart.yaml").tokenizer.added_tokens,
        data__train_file=str(data / "train.csv"),
        data__validation_file=str(data / "dev.csv"),
        data__max_source_length=256,
        data__max_target_length=64,
        data__batching="random",
        training__num_train_epochs=6,
        training__per_device_train_batch_size=16,
        training__learning_rate=5e-3,
        evaluation__strategy="steps",
        evaluation__steps=120,
        evaluation__rouge_tokenizer="mecab",
        generation__max_new_tokens=16,
        checkpoint__strategy="no",
    )
    runs.train(recipe)
    run_dir = tmp_path / "run"
    rows = runs.rows_of(run_dir)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    with next((run_dir / "predictions").glob("dev-step*.csv")).open(encoding="utf-8", newline="") as handle:
        predictions = [row["prediction"] for row in csv.DictReader(handle)]
    assert len(predictions) == 80
    assert any("#Person1#" in text or "#Person2#" in text for text in predictions), "speakers stand in the text"
    assert not any("# 는" in text or "# 은" in text for text in predictions), "spaced as in the references"

    out, sample = tmp_path / "submission.csv", data / "sample_submission.csv"
    from engine import predict

    arguments = [
        str(run_dir),
        "--input",
        str(data / "test.csv"),
        "--output",
        str(out),
        "--sample-submission",
        str(sample),
    ]
    assert predict.main([*arguments, "generation.num_beams=1", "generation.max_new_tokens=8"]) == 0
    ours, theirs = pd.read_csv(out), pd.read_csv(sample)
    assert list(ours.columns) == list(theirs.columns) and list(ours["fname"]) == list(theirs["fname"])
    assert ours["summary"].notna().all() and len(ours) == 499


@pytest.mark.parametrize("family", ["bart", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_dialogues_and_summaries_longer_than_the_model(tmp_path, capsys, family):
    """Position embeddings are a table: beyond its end there is nothing to look up. Told, cut, and never an IndexError."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from engine import predict

    causal, folder = family == "gpt2", tmp_path / "model"
    if causal:
        tokenizer = tiny.tokenizer("llama")
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=150, n_embd=32, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    else:
        tiny.save("bart", folder, max_position_embeddings=24)
    recipe = runs.write_recipe(
        tmp_path, "llama" if causal else "bart", rows=4, data__max_source_length=140, generation__max_new_tokens=90
    )
    runs.train(recipe)
    told = " ".join(capsys.readouterr().err.split())
    wanted = ["data.max_source_length is 140, the model has room for 118"] if causal else [
        "data.max_source_length is 140, the model has room for 24",
        "data.max_target_length is 32, the model has room for 24",
    ]  # fmt: skip
    wanted.append(f"generation.max_new_tokens is 90, the model has room for {32 if causal else 24}")
    assert all(line in told for line in wanted), told
    foreign = tmp_path / "foreign"
    own = shutil.ignore_patterns("recipe.yaml", "prompt_settings.json")
    shutil.copytree(tmp_path / "run" / "final_model", foreign, ignore=own)
    arguments = ["--input", str(tmp_path / "dev.jsonl"), "--output", str(tmp_path / "out.csv")]
    assert predict.main([str(foreign), *arguments, "generation.min_new_tokens=1"]) == 0
    assert predict.main([str(foreign), *arguments, "data.max_source_length=200", "generation.max_length=300"]) == 0
