"""Trained folders loaded for prediction, with the prompt settings they were trained with."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from built import CPU, build, logits
from generation_toys import one_thread  # noqa: F401

from engine.errors import EngineError
from engine.models import build as build_room
from engine.models import load as load_room
from engine.models import weights
from engine.models.bundle import PROMPT_FILE, save_model
from engine.models.load import load_trained


def test_changed_prompt_settings_are_refused(tmp_path):
    bundle = build(tiny.save("llama", tmp_path / "base"), prompt={"style": "chat"})
    save_model(bundle, tmp_path / "saved")
    path = tmp_path / "saved" / PROMPT_FILE
    record = json.loads(path.read_text(encoding="utf-8"))
    assert load_trained(tmp_path / "saved", device=CPU).prompt.style == "chat"
    for change in ({"instruction": "다른 지시"}, {"style": "plain"}, {"surprise": 1}):
        path.write_text(json.dumps(record | {"prompt": record["prompt"] | change}), encoding="utf-8")
        with pytest.raises(EngineError, match=r"E4\.10"):
            load_trained(tmp_path / "saved", device=CPU)
    path.write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "saved" / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    with pytest.raises(EngineError, match=r"E4\.10"):
        load_trained(tmp_path / "saved", device=CPU)


def test_a_spread_model_gives_the_same_logits(tmp_path, monkeypatch):
    folder = tiny.save("llama", tmp_path / "m")
    monkeypatch.setattr(weights, "too_large", lambda *arguments: True)
    spread = load_trained(folder, device=CPU, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(spread.model, "llama"), logits(tiny.model("llama", len(spread.tokenizer)), "llama"))


@pytest.mark.parametrize("family", ["bart", "t5", "llama"])
def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path, family):
    """Training makes room for added tokens; a folder to predict from has learnt nothing about them."""
    folder = tiny.save(family, tmp_path / "model")
    tokenizer = tiny.tokenizer(family)
    tokenizer.add_tokens(["안녕하세요", "회의는"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(EngineError, match=rf"E4\.15: the tokenizer has {len(tokenizer)} tokens, the model only"):
        load_trained(folder, device=torch.device("cpu"))


@pytest.mark.parametrize(("room", "use"), [(load_room, lambda at: load_trained(at, device=CPU)), (build_room, build)])
def test_a_bug_of_ours_is_no_fault_of_the_folder(tmp_path, monkeypatch, room, use):
    monkeypatch.setattr(room, "describe", None)
    with pytest.raises(TypeError):
        use(tiny.save("bart", tmp_path))


@pytest.mark.parametrize("value", ["x", 7, [1], {"load_in_4bit": "x"}])
def test_a_wrong_record_of_the_base_is_the_folders_fault(tmp_path, value):
    save_model(build(tiny.save("llama", tmp_path / "base"), lora={"enabled": True}), tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "base_model.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter" / "base_model.json").write_text(json.dumps(record | {"quantization": value}))
    with pytest.raises(EngineError, match=r"E4\.16"):
        load_trained(tmp_path / "adapter", device=CPU)
