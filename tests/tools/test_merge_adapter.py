"""Merging adapters: the same logits and text as the adapter, or no folder at all."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import tiny
import torch
from adapted import IDS, WIDE, build, logits, train
from generation_toys import one_thread  # noqa: F401

from engine.models.bundle import save_model
from engine.models.load import load_trained

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tool(root):
    spec = importlib.util.spec_from_file_location("merge_adapter", root / "tools" / "merge_adapter.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def trained_adapter(folder, base, family, *, precision="fp32", **sections):
    bundle = build(base, precision=precision, **sections)
    train(bundle, family, precision=precision)
    save_model(bundle, folder)
    return bundle


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("variant", [{}, {"use_dora": True, "use_rslora": True}])
def test_merged_and_adapter_folders_load_alone_and_agree(tmp_path, tool, family, variant, capsys):
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    trained_adapter(tmp_path / "adapter", tiny.save(family, tmp_path / "base"), family, lora=variant)
    assert tool.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert "merged in fp32" in capsys.readouterr().out

    causal = family in tiny.CAUSAL
    merged = (AutoModelForCausalLM if causal else AutoModelForSeq2SeqLM).from_pretrained(tmp_path / "merged")
    adapted = (AutoPeftModelForCausalLM if causal else AutoPeftModelForSeq2SeqLM).from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(merged, family), logits(adapted, family), rtol=1e-4, atol=1e-5)
    ours = [load_trained(tmp_path / name, device=CPU) for name in ("merged", "adapter")]
    texts = [b.model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False).tolist() for b in ours]
    assert texts[0] == texts[1]
    assert ours[0].prompt == ours[1].prompt
    text = "#Person1#는 #PhoneNumber#"
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged").decode(
            ours[1].tokenizer.encode(text, add_special_tokens=False)
        )
        == text
    )


def test_a_4bit_base_is_merged_in_full_precision(tmp_path, tool, monkeypatch, capsys):
    from safetensors.torch import load_file

    base = tiny.save("llama", tmp_path / "base", **WIDE)
    trained_adapter(tmp_path / "adapter", base, "llama", quantization={"load_in_4bit": True})
    reports = []
    merge = tool.merge
    monkeypatch.setattr(tool, "merge", lambda *arguments: reports.append(merge(*arguments)) or reports[0])
    assert tool.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "greedy tokens equal" in said[1] and "no fault of the merge" in said[2]
    report = reports[0]
    assert report["precision"] == "fp32" and report["logit_difference"] < 1e-4
    assert 1e-3 < report["four_bit"]["logit_difference"] < 5.0  # the rounding that merging leaves behind
    merged, original = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "base"))
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        assert torch.equal(merged[name], original[name])
    assert not [name for name in merged if "absmax" in name]
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_the_bases_own_type_is_kept(tmp_path, tool, dtype, name):
    from safetensors.torch import load_file

    base = tiny.save("llama", tmp_path / "base", **WIDE)
    load_trained(base, device=CPU).model.to(dtype).save_pretrained(base)
    trained_adapter(tmp_path / "adapter", base, "llama", precision="bf16")
    assert tool.merge(tmp_path / "adapter", tmp_path / "merged")["precision"] == name
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {dtype}


def test_a_merge_that_changes_the_model_is_refused(tmp_path, tool, monkeypatch, capsys):
    from peft import PeftModel

    trained_adapter(tmp_path / "adapter", tiny.save("llama", tmp_path / "base"), "llama")
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    assert tool.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 4
    assert "error E4.14" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_wrong_arguments(tmp_path, tool, capsys):
    base = tiny.save("llama", tmp_path / "base")
    assert tool.main([str(base), str(tmp_path / "merged")]) == 4
    assert "no adapter" in capsys.readouterr().err
    trained_adapter(tmp_path / "adapter", base, "llama")
    assert tool.main([str(tmp_path / "adapter"), str(base)]) == 2
    assert tool.main([str(tmp_path / "nothing"), str(tmp_path / "merged")]) == 4
    assert "Traceback" not in capsys.readouterr().err
