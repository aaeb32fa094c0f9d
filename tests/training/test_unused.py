"""Weights that no gradient reaches are kept out of training, so that two ranks train what one does.

A launch takes about fifteen seconds; the default run tries Pegasus and LED, FULL_TESTS=1 the other families too.
"""

from __future__ import annotations

import os

import pytest
import runs
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
LED = {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128, "attention_window": 16}
PROPHETNET = {
    "hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_encoder_layers": 2, "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
TOYS = {
    "pegasus": BART,
    "led": BART | LED,
    "marian": BART,
    "m2m_100": BART,
    "bigbird_pegasus": BART | {"attention_type": "original_full"},  # the sparse kind draws which places it looks at
    "longt5": T5,
    "switch_transformers": T5 | {"num_experts": 4, "expert_capacity": 64, "num_sparse_encoder_layers": 1},
    "prophetnet": PROPHETNET,
}
ALWAYS = ("pegasus", "led")


def families(*names):
    full = bool(os.environ.get("FULL_TESTS"))
    return [name for name in names if full or name in ALWAYS]


def save(family, folder, **changes):
    tokenizer = tiny.tokenizer("bart")
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **IDS | TOYS[family] | changes)
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(folder, *, ranks, accumulation=1, **changes):
    """Three updates of the folder's model in windows of 8 rows; the run folder."""
    run_dir = folder / f"ranks{ranks}"
    settings = {
        "model__dropout": 0.0,
        "training__max_steps": 3,
        "training__gradient_accumulation_steps": accumulation,
        "evaluation__strategy": "no",
        "experiment__output_dir": str(run_dir),
    }
    recipe = runs.write_recipe(folder, **settings | changes)
    if ranks == 1:
        runs.train(recipe)
    else:
        done = runs.launch("engine/train.py", recipe, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("family", families(*(name for name in TOYS if name != "prophetnet")))
def test_two_ranks_train_what_one_does(family, tmp_path):
    save(family, tmp_path / "model")
    folders = train(tmp_path, ranks=1, accumulation=2), train(tmp_path, ranks=2)
    losses = [[row["loss"] for row in runs.rows_of(run_dir)] for run_dir in folders]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    weights = [load_file(run_dir / "final_model" / "model.safetensors") for run_dir in folders]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-5, msg=name)
