"""Every YAML under recipes/ is a recipe: it resolves, with --debug too, and says what the documentation says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine import load_recipe
from engine.errors import EngineError
from engine.recipe.dump import dump, print_recipe
from engine.recipe.schema import SECTIONS

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))
# Fragments name no model; these stand in for what a recipe adds.
FRAGMENT = ["model.name_or_path=some/model", "data.train_file=train.csv", "data.validation_file=dev.csv"]


def overrides(path: Path) -> list[str]:
    return FRAGMENT if path.parent.name == "base" else []


def test_there_are_recipes() -> None:
    names = {path.relative_to(RECIPES).as_posix() for path in FILES}
    assert names >= {
        *("base/seq2seq.yaml", "base/causal.yaml", "base/debug.yaml", "kobart.yaml", "pko_t5.yaml", "quickstart.yaml"),
        *("llama3b_qlora.yaml", "llama3b_lora.yaml", "qwen3_4b_qlora.yaml", "qwen2_5_7b_qlora.yaml"),
        *("llama3_8b_qlora.yaml", "solar_10_7b_qlora.yaml", "kullm_12_8b_qlora.yaml"),
    }
    assert not list(RECIPES.rglob("*.yml")), "one suffix"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_recipe_resolves_and_round_trips(path: Path, debug: bool, tmp_path: Path) -> None:
    recipe = load_recipe(path, overrides(path), debug=debug)
    if debug:
        assert (recipe.data.max_train_samples, recipe.training.num_train_epochs) == (50, 1)
        assert recipe.tracking.report_to == [] and recipe.experiment.output_dir is None
    for text in (dump(recipe), print_recipe(recipe)):
        (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
        assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_is_a_page_and_explains_itself(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 80 and lines[0].startswith("# ")


def test_kobart_is_the_original_baseline() -> None:
    recipe = load_recipe(RECIPES / "kobart.yaml")
    training, data, generation = recipe.training, recipe.data, recipe.generation
    assert recipe.model.name_or_path == "digit82/kobart-summarization"
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (20, 50)
    assert (training.learning_rate, training.weight_decay, training.warmup_steps) == (1e-5, 0.01, 500)
    assert (data.max_source_length, data.max_target_length) == (512, 100)
    assert (training.early_stopping_patience, recipe.checkpoint.save_total_limit) == (3, 3)
    assert (generation.num_beams, generation.max_new_tokens, generation.min_new_tokens) == (5, 100, 30)
    assert (generation.no_repeat_ngram_size, generation.length_penalty, generation.repetition_penalty) == (3, 1.0, 1.5)


@pytest.mark.parametrize(
    "name", [path.stem for path in FILES if path.stem.endswith("lora") and "quickstart" not in path.stem]
)
def test_causal_recipes_share_the_original_settings(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    training, lora = recipe.training, recipe.lora
    assert (lora.r, lora.alpha, lora.dropout) == (16, 32, 0.05)
    assert (training.learning_rate, training.weight_decay, training.max_grad_norm) == (2e-5, 0.1, 1.2)
    assert (training.lr_scheduler_type, training.warmup_ratio) == ("cosine", 0.1)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 64
    assert (recipe.data.max_source_length, recipe.generation.max_new_tokens) == (1024, 200)
    assert recipe.quantization.load_in_4bit == name.endswith("qlora")


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_readme_recipe_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (RECIPES.parent / name).read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(block.splitlines()) == 5, "the README promises five lines"
    (tmp_path / "base").symlink_to(RECIPES / "base")
    (tmp_path / "mine.yaml").write_text(block, encoding="utf-8")
    assert load_recipe(tmp_path / "mine.yaml", ["data.text_column=대화"]).experiment.name == "mine"


@pytest.mark.parametrize(
    "name", ["README.md", "README.ko.md", "SECURITY.md", "recipes/README.md", "recipes/docs/extending.md"]
)
def test_documents_name_files_and_keys_that_exist(name: str) -> None:
    root = RECIPES.parent
    text = (root / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (root / name).parent.joinpath(link).exists(), link
    for path in re.findall(r"(?:engine|tools|tests|recipes)/[\w./]+\.(?:py|sh|yaml|md)", text):
        assert (root / path).exists() or path == "recipes/mine.yaml", path
    for section, key in re.findall(r"(?<![\w/])([a-z]+)\.([a-z_0-9]+)\b(?!\()", text):
        if section in SECTIONS and key not in ("yaml", "py", "csv"):
            assert key in SECTIONS[section].model_fields, f"{section}.{key}"


def test_both_readmes_show_the_same_commands() -> None:
    def commands(name: str) -> list[str]:
        blocks = re.findall(
            r"```(?:bash|yaml)\n(.*?)```", (RECIPES.parent / name).read_text(encoding="utf-8"), re.DOTALL
        )
        return [line.split("  #")[0].split("   #")[0].strip() for block in blocks for line in block.splitlines()]

    assert commands("README.md") == commands("README.ko.md")


def test_t5_refuses_fp16() -> None:
    with pytest.raises(EngineError, match="T5 models overflow"):
        load_recipe(RECIPES / "pko_t5.yaml", ["training.precision=fp16"])
