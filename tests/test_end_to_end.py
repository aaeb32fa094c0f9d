"""Whole runs through the command line and the Python API: what they leave behind, on toy and on real data."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import runs
import tiny

from engine import Predictor, load_recipe
from engine.errors import EngineError

CHECK = runs.ROOT.parent / "shared" / "checks" / "check_run.py"


def hold_against_contract(run_dir):
    if CHECK.is_file():
        done = subprocess.run([sys.executable, str(CHECK), str(run_dir)], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "contract holds", done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of a tiny Bart: two epochs, with a test split and TensorBoard."""
    folder = tmp_path_factory.mktemp("trained")
    test = tiny.write_rows(folder / "test.jsonl", 5)
    recipe = runs.write_recipe(
        folder,
        training__num_train_epochs=2,
        data__test_file=str(test),
        tracking__report_to=["tensorboard"],
        checkpoint__save_total_limit=1,
    )
    results = runs.train(recipe)
    return folder, results


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


def test_resolved_recipe_trains_the_same_again(trained, tmp_path):
    folder, _ = trained
    again = load_recipe(folder / "run" / "recipe.yaml", {"experiment.output_dir": str(tmp_path / "again")})
    from engine.train import run

    run(again)
    losses = [row["loss"] for row in runs.rows_of(folder / "run")]
    assert [row["loss"] for row in runs.rows_of(tmp_path / "again")] == losses


def test_tensorboard_holds_the_rows(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    events = EventAccumulator(str(folder / "run" / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= set(tags["scalars"])
    assert {"eval/loss", "eval/rouge1", "eval/rouge_sum", "train/peak_memory_gib"} <= set(tags["scalars"])
    assert "eval/samples/text_summary" in tags["tensors"]
    rows = {row["step"]: row["loss"] for row in runs.rows_of(folder / "run")}
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx(rows, rel=1e-6)


def test_best_weights_are_the_final_model(trained):
    from safetensors.torch import load_file

    folder, results = trained
    run_dir = folder / "run"
    best = load_file(run_dir / f"checkpoint-{results['best_step']}" / "model.safetensors")
    final = load_file(run_dir / "final_model" / "model.safetensors")
    assert best.keys() == final.keys() and all((best[name] == final[name]).all() for name in best)
    assert not (run_dir / "final_model" / "engine_state").exists()


def test_predictor_agrees_with_the_run(trained):
    folder, results = trained
    predictor = Predictor.from_run(folder / "run")
    with (folder / "run" / "predictions" / f"test-step{results['best_step']}.csv").open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    dialogues = [row["dialogue"] for row in rows]
    assert predictor.predict_batch(dialogues, show_progress=False) == [row["prediction"] for row in rows]
    assert predictor.predict_single(dialogues[0]) == rows[0]["prediction"]
    frame = pd.DataFrame({"fname": ["b", "a"], "dialogue": dialogues[:2]}, index=[7, 3])
    predicted = predictor.predict_dataframe(frame, show_progress=False)
    assert list(predicted.index) == [7, 3] and list(predicted["summary"]) == [row["prediction"] for row in rows[:2]]
    assert "summary" not in frame.columns


def test_predictor_takes_settings_by_name(trained):
    folder, _ = trained
    predictor = Predictor.from_run(folder / "run")
    short = predictor.summarize(["#Person1#: 안녕하세요?"], max_new_tokens=2)
    assert short[0].tokens <= 2
    with pytest.raises(EngineError, match="max_new_tokens"):
        predictor.predict_single("안녕", max_new_token=3)
    with pytest.raises(EngineError) as caught:
        predictor.predict_batch(["안녕", ""])
    assert caught.value.exit_code == 3


def test_predictor_refuses_what_it_cannot_read(trained):
    folder, _ = trained
    predictor = Predictor.from_run(folder / "run")
    assert predictor.predict_batch(text for text in ["안녕?"]) == [predictor.predict_single("안녕?")]
    for dialogues, batch_size in (["\ud800"], 4), ([None], 4), ("안녕", 4), (["안녕"], 0):
        with pytest.raises(EngineError) as caught:
            predictor.predict_batch(dialogues, batch_size=batch_size)
        assert caught.value.exit_code == (3 if batch_size else 2)


def test_a_submission_is_checked_before_and_never_lost_after_decoding(trained, tmp_path, monkeypatch):
    from engine.prediction import summarizer as prediction_summarizer

    folder, _ = trained
    predictor, target = Predictor.from_run(folder / "run"), tmp_path / "out.csv"
    frame = pd.DataFrame({"fname": ["a", "b"], "dialogue": ["#Person1#: 안녕?\n#Person2#: 네.", "뭐 해?"]})
    sample = tmp_path / "sample.csv"
    sample.write_text("fname,summary\na,x\nc,y\n", encoding="utf-8")

    def decode(self, model, rows, mask):
        return [prediction_summarizer.Summary(row.index, ["" if row.index else "요약"], [0.0], 1, True) for row in rows]

    monkeypatch.setattr(prediction_summarizer.Summarizer, "_decode", decode)
    assert list(predictor.create_submission(frame, target, show_progress=False)["summary"]) == ["요약", "뭐 해?"]
    monkeypatch.setattr(prediction_summarizer.Summarizer, "_decode", lambda *_: pytest.fail("decoded too early"))
    for wrong, given in ((frame.drop(columns="fname"), None), (frame, sample), (frame.assign(fname="a"), None)):
        with pytest.raises(EngineError) as caught:
            predictor.create_submission(wrong, target, sample_submission=given)
        assert caught.value.exit_code == 3


def test_script_rules_reach_the_text(trained):
    """No Latin letter outside placeholders, unless the dialogue has the word and the rule spares it."""
    folder, _ = trained
    predictor = Predictor.from_run(folder / "run")
    dialogues = ["#Person1#: Mr. Smith 씨 안녕하세요?", "#Person1#: 오늘 뭐 해요?"]
    free = [mask.isfinite().sum() for mask in _masks(predictor, dialogues, keep_source_words=True)]
    strict = [mask.isfinite().sum() for mask in _masks(predictor, dialogues, keep_source_words=False)]
    assert free[0] > strict[0] and free[1] == strict[1]
    for text in predictor.predict_batch(dialogues, show_progress=False, block_scripts=["latin", "kana", "han"]):
        assert not re.search(r"[A-Za-z]", re.sub(r"#\w+#", "", text))


def _masks(predictor, dialogues, keep_source_words):
    summarizer = predictor.summarizer(2, block_scripts=["latin"], keep_source_words=keep_source_words)
    mask = summarizer.masks(predictor.features(dialogues), dict(enumerate(dialogues)))
    return mask if mask.dim() == 2 else [mask] * len(dialogues)


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


@pytest.mark.parametrize(
    ("output", "code"), [("-", 2), ("out.parquet", 2), ("in.csv", 2), (".", 2), ("/dev/null", 2), ("in.csv/out.csv", 6)]
)
def test_outputs_are_refused_before_anything_is_decoded(trained, tmp_path, output, code):
    from engine import predict

    folder, _ = trained
    source = tmp_path / "in.csv"
    source.write_text('fname,dialogue\na,"#Person1#: 안녕?"\n', encoding="utf-8")
    before = source.read_bytes()
    target = output if output in ("-", "/dev/null") else str(tmp_path / output)
    with pytest.raises(EngineError) as caught:
        predict.main([str(folder / "run"), "--input", str(source), "--output", target])
    assert caught.value.exit_code == code and "nothing was decoded" in str(caught.value)
    assert source.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_a_prediction_goes_on_where_it_stopped(trained, monkeypatch, capsys):
    """Batches that a side file holds are not decoded again, and the file comes out the same."""
    from engine import predict
    from engine.prediction import summarizer as prediction_summarizer

    folder, _ = trained
    whole, resumed = folder / "whole.csv", folder / "resumed.csv"
    arguments = [str(folder / "run"), "--input", str(folder / "test.jsonl")]
    batch = "evaluation.per_device_eval_batch_size=2"
    assert predict.main([*arguments, "--output", str(whole), batch]) == 0

    decoded: list[int] = []
    plain = prediction_summarizer.Summarizer._decode

    def counted(self, model, rows, mask):
        if len(decoded) >= 2 and not counted.alive:
            raise KeyboardInterrupt
        decoded.extend(row.index for row in rows)
        return plain(self, model, rows, mask)

    counted.alive = False
    monkeypatch.setattr(prediction_summarizer.Summarizer, "_decode", counted)
    with pytest.raises(KeyboardInterrupt):
        predict.main([*arguments, "--output", str(resumed), batch])
    assert not resumed.exists() and len(decoded) == 2
    side = next(folder.glob("resumed.csv.partial-rank0.jsonl"))
    side.write_text(side.read_text(encoding="utf-8") + 'no JSON\n{"fingerprint": "torn', encoding="utf-8")
    counted.alive = True
    capsys.readouterr()
    assert predict.main([*arguments, "--output", str(resumed), batch]) == 0
    assert "2 of 5 rows were decoded before" in capsys.readouterr().err
    assert sorted(decoded) == list(range(5)), "every row once"
    assert resumed.read_bytes() == whole.read_bytes()


def test_resume_of_a_finished_run_changes_nothing(trained):
    folder, results = trained
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    assert runs.train(folder / "recipe.yaml", resume="auto") == results
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}


def test_debug_serves_any_recipe(tmp_path):
    recipe = runs.write_recipe(tmp_path, rows=60, tracking__report_to=["tensorboard"])
    done = runs.launch("engine/train.py", recipe, "--debug", f"experiment.output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(runs.rows_of(tmp_path / "run")) == 25, "50 rows in batches of 2"
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_dry_run_writes_nothing(tmp_path):
    recipe = runs.write_recipe(tmp_path)
    done = runs.launch("engine/train.py", recipe, "--dry-run")
    assert done.returncode == 0, done.stderr[-2000:]
    for word in ("updates: 6", "parameters", "first batch"):
        assert word in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train_on_the_cpu(tmp_path, precision):
    recipe = runs.write_recipe(tmp_path, training__precision=precision, runtime__emulate_fp16_on_cpu=True)
    runs.train(recipe)
    rows = runs.rows_of(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert ("loss_scale" in rows[0]) == (precision == "fp16")


def test_wandb_offline_gets_the_same_rows(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs.train(runs.write_recipe(tmp_path, tracking__report_to=["wandb"]))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_early_stopping_and_best_by_loss(tmp_path):
    recipe = runs.write_recipe(
        tmp_path,
        training__num_train_epochs=20,
        training__learning_rate=1e-12,  # nothing changes: no evaluation is better than the first
        training__early_stopping_patience=2,
        evaluation__metric="loss",
    )
    results = runs.train(recipe)
    assert results["best_step"] == 6 and results["last_step"] == 18
    assert "no better loss in 2 evaluations" in results["stop_reason"]


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


@pytest.mark.parametrize("family", ["bart", "gpt2"])
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


PASSED_ON = [
    *("do_sample=true min_p=0.1", "do_sample=true top_h=0.4", "do_sample=true typical_p=0.9"),
    *("do_sample=true epsilon_cutoff=0.001", "do_sample=true eta_cutoff=0.001"),
    *("encoder_repetition_penalty=1.2", "encoder_no_repeat_ngram_size=2", "bad_words_ids=[[5],[6,7]]"),
    *("sequence_bias=[[[5],2],[[6,7],-1.5]]", "suppress_tokens=[9,10]", "begin_suppress_tokens=[9]"),
    *("exponential_decay_length_penalty=[2,1.1]", "renormalize_logits=true", "remove_invalid_values=true"),
    *("guidance_scale=1.0", "max_time=30", "stop_strings=[다,.]", "use_cache=false", "min_length=2", "early_stopping=never"),
    *("pad_token_id=1", "bos_token_id=2", "eos_token_id=[3,5]", "decoder_start_token_id=2", "forced_bos_token_id=5"),
    *("forced_eos_token_id=-1", "forced_eos_token_id=[3]"),
]  # fmt: skip


@pytest.mark.parametrize("settings", PASSED_ON)
def test_every_name_of_generate_decodes(trained, settings):
    """Whatever transformers' `generate` takes by name, a recipe may say; what our search lacks runs there."""
    import yaml

    folder, _ = trained
    predictor = Predictor.from_run(folder / "run")
    pairs = (part.split("=", 1) for part in settings.split())
    found = predictor.predict_single(tiny.TEXTS[0], **{name: yaml.safe_load(value) for name, value in pairs})
    assert isinstance(found, str)


@pytest.mark.parametrize(
    "setting",
    [
        *("eos_token_id=[]", "eos_token_id=1e300", "pad_token_id=-1", "forced_bos_token_id=100000", "eos_token_id=100000"),
        *("bad_words_ids=[]", "bad_words_ids=[[]]", "bad_words_ids=[[100000]]", "sequence_bias=[1]", "sequence_bias=[x]"),
        *("sequence_bias=[[[100000],1.0]]", "stop_strings=[]", "stop_strings=['']", "length_penalty=1e9"),
        *("encoder_no_repeat_ngram_size=1e9", "suppress_tokens=[-4]", "forced_eos_token_id=[]", "forced_eos_token_id=-2"),
        "guidance_scale=1.5",
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(trained, setting):
    import yaml

    folder, _ = trained
    predictor = Predictor.from_run(folder / "run")
    name, value = setting.split("=", 1)
    with pytest.raises(EngineError) as caught:
        predictor.predict_single(tiny.TEXTS[0], **{name: yaml.safe_load(value.replace("1e300", "1.0e300"))})
    assert caught.value.exit_code == 2 and f"generation.{name}" in str(caught.value)
