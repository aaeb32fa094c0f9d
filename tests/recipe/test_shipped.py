"""Recipes by name, from any folder, with their bases and their data."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.recipe import shipped
from engine.recipe.load import load_recipe


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["kobart", "kobart.yaml", "recipes/kobart.yaml"])
def test_a_name_is_enough_anywhere(name):
    recipe = load_recipe(name)
    assert recipe == load_recipe(shipped.RECIPES / "kobart.yaml")
    assert recipe.origin("model.name_or_path").partition(":")[0].endswith("kobart.yaml")


def test_a_file_of_that_name_comes_first(tmp_path):
    (tmp_path / "kobart.yaml").write_text("base: base/seq2seq.yaml\nmodel: {name_or_path: mine}\n", encoding="utf-8")
    recipe = load_recipe("kobart.yaml")
    assert recipe.model.name_or_path == "mine" and load_recipe("kobart").model.name_or_path != "mine"
    assert str(shipped.RECIPES) in recipe.origin("data.train_file"), "its base lies with the shipped ones"


def test_the_quickstart_brings_its_data(tmp_path):
    data = load_recipe("quickstart").data
    assert [Path(name).is_file() for name in (data.train_file, data.validation_file, data.test_file)] == [True] * 3
    own = tmp_path / "recipes" / "quickstart" / "train.csv"
    own.parent.mkdir(parents=True)
    own.write_text("fname,dialogue,summary\n", encoding="utf-8")
    assert load_recipe("quickstart").data.train_file == "recipes/quickstart/train.csv", "what lies here comes first"


def test_a_name_that_is_none_lists_those_that_are():
    with pytest.raises(EngineError, match="kobart, kullm_12_8b_qlora") as error:
        load_recipe("kobert")
    assert error.value.code == "E2.1"
