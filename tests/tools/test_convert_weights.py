"""Pickle weights become safetensors on request, give the same model, and cannot run code on the way."""

from __future__ import annotations

import importlib.util
import os
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BartConfig, LlamaConfig

from engine.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("convert_weights", ROOT / "tools" / "convert_weights.py")
convert_weights = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert_weights)

BART = BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                  decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32)  # fmt: skip
LLAMA = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip


def pickled(folder: Path, config: BartConfig | LlamaConfig) -> torch.nn.Module:
    """A model as old hub repositories hold it."""
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config).eval()
    folder.mkdir()
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "notes.md").write_text("not copied")
    return model


@pytest.mark.parametrize("config", [BART, LLAMA], ids=["bart", "llama"])
def test_the_same_model_comes_out(tmp_path: Path, config: BartConfig | LlamaConfig) -> None:
    model = pickled(tmp_path / "old", config)
    assert convert_weights.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    names = {file.name for file in (tmp_path / "new").iterdir()}
    assert "model.safetensors" in names and "tokenizer_config.json" in names
    assert not any(name.endswith((".bin", ".md")) for name in names)
    again = type(model).from_pretrained(tmp_path / "new", use_safetensors=True).eval()
    ids = torch.arange(8).reshape(1, 8)
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


class Planted:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled(tmp_path / "old", BART)
    for payload in ({"x": Planted(tmp_path / "canary")}, Planted(tmp_path / "canary")):
        torch.save(payload, tmp_path / "old" / "pytorch_model.bin")
        assert convert_weights.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 4
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(pickle.dumps(Planted(tmp_path / "canary")))
    assert convert_weights.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error E4.3: the weights cannot be read safely") for line in lines)
    assert not (tmp_path / "canary").exists() and not (tmp_path / "new").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["old"], "no leftovers"


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pickled(tmp_path / "old", BART)
    (tmp_path / "there").mkdir()
    with pytest.raises(EngineError, match=r"E2\.63"):
        convert_weights.convert(str(tmp_path / "old"), tmp_path / "there")
    with pytest.raises(EngineError, match=r"E4\.1"):
        convert_weights.convert("nobody/nothing", tmp_path / "new")
    state = model.state_dict()
    state.pop("model.encoder.layers.0.fc1.weight")
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(EngineError, match=r"E4\.8.*lack model\.encoder\.layers\.0\.fc1\.weight"):
        convert_weights.convert(str(tmp_path / "old"), tmp_path / "new")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(EngineError, match=r"E2\.40"):
        convert_weights.convert(str(tmp_path / "old"), tmp_path / "new")
