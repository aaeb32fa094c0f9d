from __future__ import annotations

import importlib.util
import json
import sys

import own_code
import pytest
import runs
import tiny

from engine.errors import EngineError


@pytest.fixture(scope="module")
def tool():
    from conftest import ROOT

    spec = importlib.util.spec_from_file_location("show_batch", ROOT / "tools" / "show_batch.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["show_batch"] = module
    spec.loader.exec_module(module)
    return module


def recipe(folder, family: str, style: str, **data):
    tokenizer = tiny.tokenizer(family)
    tokenizer.save_pretrained(folder / "tokenizer")
    values = {
        "model": {"init": "random", "config": tiny.config_values(family)},
        "tokenizer": {"name_or_path": str(folder / "tokenizer"), "added_tokens": tiny.ADDED},
        "data": {"train_file": str(tiny.write_rows(folder / "rows.jsonl")), **data},
        "prompt": {"style": style},
        "training": {"per_device_train_batch_size": 4},
        "evaluation": {"strategy": "no"},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.mark.parametrize(("family", "style"), [("t5", "plain"), ("llama", "chat"), ("llama", "instruction")])
def test_marks_the_supervised_span(tool, tmp_path, capsys, family, style):
    assert tool.main([str(recipe(tmp_path, family, style)), "--rows", "2", "--ids"]) == 0
    printed = capsys.readouterr().out
    assert f"【{tiny.TEXTS[5]}‹</s>›】" in printed and f"【{tiny.TEXTS[6]}‹</s>›】" in printed
    assert "row 2 (id row_1)" in printed and "row 3" not in printed and "target [" in printed
    assert "8 rows, 8 training examples" in printed and "input_ids (4, " in printed
    assert ("‹<s>›" in printed) == (family == "llama")


def test_says_what_is_cut(tool, tmp_path, capsys):
    path = recipe(tmp_path, "t5", "plain", max_source_length=12, max_target_length=6)
    assert tool.main([str(path), "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    assert "source cut from" in printed and "target cut from" in printed and "‹</s>›】" in printed


def test_augmentation_and_errors(tool, tmp_path, capsys):
    path = recipe(tmp_path, "llama", "instruction", instruction_augmentation=True)
    assert tool.main([str(path), "--rows", "5"]) == 0
    printed = capsys.readouterr().out
    assert "8 rows, 40 training examples" in printed and printed.count("--- ") == 5
    with pytest.raises(EngineError, match=r"E2.*data.train_file"):
        tool.main([str(path), "data.train_file=null"])


def test_a_model_with_code_of_its_own_needs_the_flag(tool, tmp_path, monkeypatch, capsys):
    own_code.save(tmp_path / "model", tmp_path / "ran", monkeypatch)
    path = str(runs.write_recipe(tmp_path, "llama"))
    with pytest.raises(EngineError, match=r"E4\.2"):
        tool.main([path])
    assert tool.main([path, "model.trust_remote_code=true", f"model.revision={own_code.PINNED}"]) == 0
    assert "training examples" in capsys.readouterr().out
