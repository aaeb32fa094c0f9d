"""Recipes: what is read is what was written, and whatever is wrong is one line each, with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from written import GOOD, errors, write

from engine import load_recipe
from engine.errors import EngineError
from engine.recipe.load import with_overrides
from engine.recipe.schema import Recipe

# --- reading and merging ---------------------------------------------------------------------------------------------


def test_numbers_and_words_are_yaml_1_2(good: Path, tmp_path: Path) -> None:
    text = GOOD + (
        "training:\n  learning_rate: 1e-5\n  weight_decay: 1.0E-2\n  num_train_epochs: 3\n  max_steps: 1e3\n"
        "  seed: 7.0\nevaluation:\n  strategy: no\nexperiment:\n  notes: 12:30\n  name: off\n"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.training.learning_rate, recipe.training.weight_decay) == (1e-5, 0.01)
    assert (recipe.training.num_train_epochs, recipe.training.max_steps, recipe.training.seed) == (3.0, 1000, 7)
    assert type(recipe.training.max_steps) is int and type(recipe.training.num_train_epochs) is float
    assert (recipe.evaluation.strategy, recipe.experiment.notes, recipe.experiment.name) == ("no", "12:30", "off")


def test_overrides_win_and_parse_like_yaml(good: Path) -> None:
    recipe = load_recipe(
        good,
        [
            "training.learning_rate=2e-4",
            "lora.enabled=true",
            "lora.target_modules=[q_proj, v_proj]",
            "model.config.d_model=64",
            "model.config.label={a: 1, b: [x, 2]}",
            "prompt.prefix=요약: ",
            "experiment.notes=half: a # b",
            "experiment.output_dir='1e5'",
            "checkpoint.save_total_limit=null",
            "tracking.report_to=[]",
        ],
    )
    assert recipe.training.learning_rate == 2e-4 and recipe.lora.enabled is True
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert recipe.model.config == {"d_model": 64, "label": {"a": 1, "b": ["x", 2]}}
    assert (recipe.prompt.prefix, recipe.experiment.notes) == ("요약: ", "half: a # b")
    assert recipe.experiment.output_dir == "1e5" and recipe.checkpoint.save_total_limit is None
    assert recipe.tracking.report_to == []


def test_overrides_from_python(good: Path, tmp_path: Path) -> None:
    flat = load_recipe(good, {"training.max_steps": 3, "experiment.output_dir": tmp_path / "x", "lora.r": 4})
    nested = load_recipe(
        good, {"training": {"max_steps": 3}, "experiment": {"output_dir": str(tmp_path / "x")}, "lora": {"r": 4}}
    )
    assert flat == nested and flat.training.max_steps == 3 and flat.experiment.output_dir == str(tmp_path / "x")


def test_base_files_merge_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    write(tmp_path, GOOD + "training:\n  seed: 1\n  logging_steps: 5\n", "sub/one.yaml")
    write(tmp_path, "base: [one.yaml]\ntraining:\n  seed: 2\n", "sub/two.yaml")
    write(tmp_path, "model:\n  config: {a: 1, deep: {x: 1, y: 2}}\nlora:\n  target_modules: [a, b]\n", "three.yaml")
    path = write(
        tmp_path,
        """\
        base:
          - sub/two.yaml
          - three.yaml
        model:
          config:
            deep: {y: 3}
        lora:
          target_modules: [c]
        training:
          learning_rate: 1e-4
        """,
    )
    recipe = load_recipe(path)
    assert (recipe.training.seed, recipe.training.logging_steps, recipe.model.name_or_path) == (2, 5, "some/model")
    assert recipe.model.config == {"a": 1, "deep": {"x": 1, "y": 3}}
    assert recipe.lora.target_modules == ["c"]
    assert recipe.origin("training.seed") == "sub/two.yaml:3"
    assert recipe.origin("training.logging_steps") == "sub/one.yaml:8"
    assert recipe.origin("model.config.a") == "three.yaml:2"
    assert recipe.origin("model.config.deep.x") == "three.yaml:2"
    assert recipe.origin("model.config.deep.y") == "r.yaml:6"
    assert recipe.origin("training.learning_rate") == "r.yaml:10"
    assert recipe.origin("training.weight_decay") == "default"


def test_origins_of_command_line_and_debug(good: Path) -> None:
    recipe = load_recipe(good, ["training.logging_steps=7", "model.config.d_model=1"], debug=True)
    assert recipe.origin("training.logging_steps") == "command line"  # above debug.yaml, which sets it too
    assert recipe.origin("model.config.d_model") == recipe.origin("model.config") == "command line"
    assert "base/debug.yaml:" in recipe.origin("data.max_train_samples")
    assert recipe.origin("data.train_file") == "r.yaml:4"


def test_debug_is_what_the_contract_says(good: Path) -> None:
    recipe = load_recipe(good, debug=True)
    assert (recipe.data.max_train_samples, recipe.data.max_validation_samples) == (50, 10)
    assert (recipe.training.num_train_epochs, recipe.training.per_device_train_batch_size) == (1, 2)
    assert recipe.tracking.report_to == []


def test_replacing_a_dictionary_forgets_old_origins(good: Path) -> None:
    first = load_recipe(good, ["model.config={a: 1}"])
    second = with_overrides(first, ["model.config=null"])
    assert second.model.config is None and second.origin("model.config.a") == "command line"


def test_with_overrides_touches_only_what_it_may(good: Path) -> None:
    recipe = load_recipe(good)
    changed = with_overrides(recipe, {"generation": {"num_beams": 1}}, ("generation",))
    assert changed.generation.num_beams == 1 and recipe.generation.num_beams == 4
    assert changed.origin("data.train_file") == "r.yaml:4" and changed.origin("training.seed") == "default"
    assert (
        with_overrides(Recipe(), ["generation.top_k=5", "generation.do_sample=true"], ("generation",)).generation.top_k
        == 5
    )
    with pytest.raises(EngineError, match=r"training\.\* cannot be changed here"):
        with_overrides(recipe, ["training.seed=1"], ("generation",))
    with pytest.raises(EngineError, match="did you mean generation.num_beams"):
        with_overrides(recipe, {"generation": {"beam_size": 1}}, ("generation",))


# --- everything wrong at once ----------------------------------------------------------------------------------------


def test_all_problems_are_listed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "training:\n  lr: 1e-5\n", "base.yaml")
    text = """\
    base: base.yaml
    model:
      name_or_path: paust/pko-t5-base
    trainig:
      seed: 1
    training:
      precision: fp16
      seed: '5'
    data:
      train_file: a.csv
    """
    assert errors(write(tmp_path, text), ["generation.num_beams=0", "oops"]) == [
        "error E2.2: command line: 'oops' is not section.key=value",
        "error E2.2: base.yaml:2: training.lr is not a key of training; did you mean training.learning_rate?",
        "error E2.2: r.yaml:4: trainig is not a section; did you mean training?",
        "error E2.2: r.yaml:8: training.seed must be a whole number at least 0; got '5'; write it without quotes",
        "error E2.2: command line: generation.num_beams must be a whole number above 0; got 0",
        "error E2.2: r.yaml:7: training.precision is fp16, in which T5 models overflow; use bf16, fp32 or auto",
        "error E2.2: r.yaml: data.validation_file is missing; name a file, or set evaluation.strategy: no",
    ]


def test_a_flood_of_problems_is_cut(good: Path) -> None:
    lines = errors(good, [f"training.k{i}=1" for i in range(200)])
    assert len(lines) == 51 and lines[-1].endswith("and 150 more")


def test_bases_that_double_at_each_level_are_refused_at_once(tmp_path: Path) -> None:
    for level in range(16):
        (tmp_path / f"{level}.yaml").write_text(f"base: [{level + 1}.yaml, {level + 1}.yaml]\n")
    (tmp_path / "16.yaml").write_text("model: {name_or_path: m}\n")
    with pytest.raises(EngineError, match=r"E2\.1.*more than (16 base files in a row|64 base files in all)"):
        load_recipe(tmp_path / "1.yaml")
