"""Exported models write what the original writes, or there is no folder."""

from __future__ import annotations

import json
import shutil

import export
import pytest
import runs
import tiny
import torch
from generation_toys import one_thread  # noqa: F401

from engine.errors import EngineError


def greedy(folder, causal: bool, ids=((5, 6, 7, 300, 301, 9),)) -> list[list[int]]:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model = (AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM).from_pretrained(folder)
    return model.generate(torch.tensor(ids), num_beams=1, do_sample=False, max_new_tokens=8).tolist()


def test_a_full_model_is_copied_and_compared(trained, tmp_path, capsys):
    run, out = trained[0] / "run", tmp_path / "out"
    assert export.main([str(run), "--format", "safetensors", "--output", str(out)]) == 0
    report = json.loads((out / export.REPORT).read_text(encoding="utf-8"))
    assert report["dialogues"] == 6 and report["equal_tokens"] == report["tokens"] > 0
    assert f"{report['tokens']} of {report['tokens']} greedy tokens" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {path.name for path in (run / "final_model").iterdir()} | {
        export.REPORT
    }
    assert greedy(out, causal=False) == greedy(run / "final_model", causal=False)
    with pytest.raises(EngineError, match="E2.63"):
        export.main([str(run), "--format", "safetensors", "--output", str(out)])


@pytest.mark.slow
def test_an_adapter_is_merged_with_its_template_and_settings(tmp_path, capsys):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    recipe = runs.write_recipe(tmp_path, "llama", rows=8, lora__enabled=True, training__learning_rate=1e-2)
    runs.train(recipe)
    final, out = tmp_path / "run" / "final_model", tmp_path / "out"
    assert export.main([str(tmp_path / "run"), "--format", "safetensors", "--output", str(out), "--samples", "3"]) == 0
    assert "on 3 dialogues" in capsys.readouterr().out
    assert not (out / "adapter_config.json").exists() and not (out / "plain").exists()
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny.CHAT_TEMPLATE
    assert json.loads((out / "generation_config.json").read_text(encoding="utf-8"))["num_beams"] == 2
    adapted = AutoPeftModelForCausalLM.from_pretrained(final)
    ids = torch.tensor([[5, 6, 7, 300, 301, 9]])
    expected = adapted.generate(input_ids=ids, num_beams=1, do_sample=False, max_new_tokens=8).tolist()
    assert greedy(out, causal=True) == expected


def test_another_model_is_refused_and_nothing_stays(trained, tmp_path, monkeypatch):
    """The copy is spoilt on the way: its greedy tokens are not the original's."""
    write = export.write_plain

    def spoil(model, folder):
        write(model, folder)
        tiny.model("bart", 374, seed=9, init_std=0.5).save_pretrained(folder)

    monkeypatch.setattr(export, "write_plain", spoil)
    with pytest.raises(EngineError, match="E4.70"):
        export.main([str(trained[0] / "run"), "--format", "safetensors", "--output", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_samples_come_from_the_file_that_is_named(trained, tmp_path):
    run = trained[0] / "run"
    rows = tiny.write_rows(tmp_path / "rows.jsonl", 5)
    assert len(export.samples(run / "final_model", rows, 3)) == 3
    assert len(export.samples(run / "final_model", None, 4)) == 4
    shutil.copytree(run / "final_model", tmp_path / "alone")
    assert len(export.samples(tmp_path / "alone", None, 8)) == 3
    (tmp_path / "empty.csv").write_text("dialogue\n", encoding="utf-8")
    with pytest.raises(EngineError, match="E3.63"):
        export.samples(run / "final_model", tmp_path / "empty.csv", 3)


@pytest.mark.parametrize(
    "words",
    [["--quantization", "int8"], ["--samples", "0"], ["--at-least", "2"]],
)
def test_options_that_make_no_sense_are_refused(words, trained, tmp_path):
    with pytest.raises(SystemExit):
        export.main([str(trained[0]), "--format", "safetensors", "--output", str(tmp_path / "out"), *words])


def test_ctranslate2_is_asked_for_where_it_is_missing(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ctranslate2", None)
    with pytest.raises(EngineError, match=r"E2.78.*\[bench\]"):
        export.main([str(trained[0] / "run"), "--format", "ctranslate2", "--output", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["bart", "t5", pytest.param("llama", marks=pytest.mark.slow)])
def test_ctranslate2_writes_the_same_texts(family, tmp_path, capsys):
    ctranslate2 = pytest.importorskip("ctranslate2")
    # Wide random weights: candidates are far apart, and texts are no single repeated token.
    model = tiny.save(family, tmp_path / "model", **({"init_std": 0.5} if family == "bart" else {}))
    out = tmp_path / "out"
    assert export.main([str(model), "--format", "ctranslate2", "--output", str(out), "--at-least", "1"]) == 0
    assert "3 of 3 greedy texts" in capsys.readouterr().out
    assert ctranslate2.contains_model(str(out)) and not list(out.rglob("*.safetensors"))
    assert (out / "tokenizer.json").is_file() and not (out / "plain").exists()
    small = tmp_path / "small"
    words = [str(model), "--format", "ctranslate2", "--output", str(small), "--quantization", "int8", "--at-least", "0"]
    assert export.main(words) == 0
    assert (small / "model.bin").stat().st_size < (out / "model.bin").stat().st_size


def test_a_class_that_ctranslate2_does_not_know_is_refused(tmp_path):
    pytest.importorskip("ctranslate2")
    from transformers import LEDConfig, LEDForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "attention_window": 8}
    model = LEDForConditionalGeneration(LEDConfig(vocab_size=400, **sizes, **heads))
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer("bart").save_pretrained(tmp_path / "model")
    with pytest.raises(EngineError, match="E4.71"):
        export.main([str(tmp_path / "model"), "--format", "ctranslate2", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
