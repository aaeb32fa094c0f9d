"""Flags as other trainers have them, and arguments that are missing: what the command line says to them."""

from __future__ import annotations

import importlib

import pytest

from engine import predict, train


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--learning_rate", "3e-5"], "--learning_rate: write training.learning_rate=3e-5"),
        (["--learning-rate=3e-5"], "--learning-rate: write training.learning_rate=3e-5"),
        (
            ["--lr", "3e-5", "--epochs", "4"],
            "--lr: write training.learning_rate=3e-5; --epochs: write training.num_train_epochs=4",
        ),
        (["--num_beams", "4"], "--num_beams: write generation.num_beams=4"),
        (["--fp16"], "--fp16: write training.precision=fp16"),
        (["--bf16", "true"], "--bf16: write training.precision=bf16"),
        (["--load_in_4bit"], "--load_in_4bit: write quantization.load_in_4bit=true"),
        (["--load_best_model_at_end"], "--load_best_model_at_end: not needed: final_model/ always holds the best"),
        (["--flash"], "--flash: no such option"),
    ],
)
def test_flags_of_other_trainers_are_answered_with_our_keys(arguments, says, capsys):
    with pytest.raises(SystemExit) as done:
        train.parse(["recipes/kobart.yaml", *arguments])
    assert done.value.code == 2 and says in capsys.readouterr().err


def test_prediction_thinks_of_its_own_keys_first(capsys):
    with pytest.raises(SystemExit):
        predict.parse(["run", "--input", "a", "--output", "b", "--batch_size", "8", "--num_beams", "4"])
    said = capsys.readouterr().err
    assert "write evaluation.per_device_eval_batch_size=8" in said and "write generation.num_beams=4" in said


@pytest.mark.parametrize(("parse", "name"), [(train.parse, "RECIPE.yaml"), (predict.parse, "--input, --output")])
def test_only_what_is_required_is_called_so(parse, name, capsys):
    with pytest.raises(SystemExit) as done:
        parse([])
    said = capsys.readouterr().err.splitlines()[-1]
    assert done.value.code == 2 and name in said and "key=value" not in said


def test_overrides_and_options_may_stand_in_any_order():
    options = train.parse(["--debug", "a.yaml", "training.seed=1", "--resume", "auto", "training.optim=x"])
    assert (options.recipe, options.overrides) == ("a.yaml", ["training.seed=1", "training.optim=x"])
    assert options.debug and options.resume == "auto" and train.parse(["a.yaml"]).overrides == []


BEHIND = "data.text_column=대화"


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("augment", ["a.csv", "--output", "o.csv", "--methods", "speakers", "window", BEHIND]),
        ("augment", ["a.csv", "--output", "o.csv", "--methods", "speakers", "--dev", "d.csv", BEHIND, "--seed", "1"]),
        ("pseudo_label", ["run", "--input", "a.csv", "--output", "o.csv", "--exclude", "d.csv", BEHIND]),
        ("kfold", ["a.yaml", BEHIND, "--folds", "3"]),
        ("sweep", ["a.yaml", "--set", "training.seed=1,2", "--trials", "2", BEHIND]),
    ],
)
def test_settings_may_stand_behind_any_option(tool, arguments):
    options = importlib.import_module(tool).parse(arguments)
    assert options.overrides == [BEHIND]


def test_an_option_keeps_the_settings_that_it_wants():
    sweep = importlib.import_module("sweep").parse
    options = sweep(["a.yaml", "training.seed=7", "--set", "lora.r=8,16", "training.learning_rate=1e-4,2e-4"])
    assert options.overrides == ["training.seed=7"]
    assert options.set == ["lora.r=8,16", "training.learning_rate=1e-4,2e-4"]
    options = predict.parse(["run", "--input", "data.csv=1", "--output", "data.x=2"])
    assert (options.input, options.output, options.overrides) == ("data.csv=1", "data.x=2", [])
    assert train.parse(["a.yaml", "modell.name=x"]).overrides == ["modell.name=x"], "the recipe answers a wrong section"
