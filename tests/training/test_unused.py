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

from engine.data.encode import Feature
from engine.errors import EngineError
from engine.models import weights
from engine.models.build import build_model
from engine.models.bundle import save_model
from engine.recipe.schema import Recipe
from engine.runtime.process import start
from engine.training import unused

pytestmark = pytest.mark.slow

IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
SWITCH = {
    "num_decoder_layers": 2,
    "num_experts": 4,
    "expert_capacity": 64,
    "num_sparse_encoder_layers": 1,
    "router_jitter_noise": 0.0,
}
LED = {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128, "attention_window": 16}
PROPHETNET = {
    "hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_encoder_layers": 2, "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
TOYS = {
    "bart": BART,
    "pegasus": BART,
    "led": BART | LED,
    "marian": BART,
    "m2m_100": BART,
    "bigbird_pegasus": BART | {"attention_type": "original_full"},  # the sparse kind draws which places it looks at
    "longt5": T5,
    "switch_transformers": T5 | SWITCH,
    "prophetnet": PROPHETNET,
    "fsmt": BART | {"langs": ["ko", "ko"]},
}
ALWAYS = ("pegasus", "led")
UNTRAINED = ("bart", "switch_transformers", "fsmt")  # of no interest here, or refused when a run begins


def families(*names):
    full = bool(os.environ.get("FULL_TESTS"))
    return [name for name in names if full or name in ALWAYS]


def save(family, folder, **changes):
    tokenizer = tiny.tokenizer("bart")
    sizes = dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size"), len(tokenizer))
    config = AutoConfig.for_model(family, **sizes | IDS | TOYS[family] | changes)
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(folder, *, ranks, accumulation=1, **changes):
    """Three updates of the folder's model in windows of 8 rows; the run folder."""
    run_dir = folder / f"ranks{ranks}"
    settings = {
        "model__dropout": 0.0,
        "training__max_steps": 3,
        "training__adam_epsilon": 1e-4,  # far above rounding, which decides the sign of the smallest gradients
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
@pytest.mark.parametrize("family", families(*(name for name in TOYS if name not in UNTRAINED)))
def test_two_ranks_train_what_one_does(family, tmp_path):
    save(family, tmp_path / "model")
    # What transformers computes for a row of ProphetNet depends a little (1e-6) on how far its target is padded: none is.
    changes = {"data__max_target_length": 8} if family == "prophetnet" else {}
    folders = train(tmp_path, ranks=1, accumulation=2, **changes), train(tmp_path, ranks=2, **changes)
    losses = [[row["loss"] for row in runs.rows_of(run_dir)] for run_dir in folders]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    weights = [load_file(run_dir / "final_model" / "model.safetensors") for run_dir in folders]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("FULL_TESTS"), reason="FULL_TESTS=1 launches more families")
def test_each_rank_may_drop_layers_of_its_own(tmp_path):
    save("m2m_100", tmp_path / "model", encoder_layerdrop=0.3, decoder_layerdrop=0.3)
    rows = runs.rows_of(train(tmp_path, ranks=2, training__max_steps=8, training__num_train_epochs=4))
    assert len(rows) == 8


def kept_out(family, folder, **changes):
    """`keep_out` on two rows: the model, the names of its frozen weights, and the answer."""
    save(family, folder, **changes)
    recipe = Recipe(model={"name_or_path": str(folder)}, runtime={"device": "cpu"}, training={"precision": "fp32"})
    features = [Feature(list(range(5, 9 + index)), [7, 8, 3], index) for index in range(2)]
    with start(recipe) as runtime:
        bundle = build_model(recipe, device=runtime.device, precision="fp32")
        bundle.model.train()
        before = torch.get_rng_state()
        irregular = unused.keep_out(bundle, features, runtime)
        assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in bundle.model.modules())
    assert all(parameter.grad is None for parameter in bundle.model.parameters())
    named = dict(bundle.model.named_parameters())
    trainable = sum(parameter.numel() for parameter in named.values() if parameter.requires_grad)
    assert bundle.report["trainable_parameters"] == trainable
    return [name for name, parameter in named.items() if not parameter.requires_grad], irregular


def test_tables_and_projections_without_a_gradient_are_frozen_and_named(tmp_path, capsys):
    frozen, irregular = kept_out("pegasus", tmp_path)
    tables = [f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")]
    assert (sorted(frozen), irregular) == (sorted(tables), False)
    told = " ".join(capsys.readouterr().err.split())
    assert f"kept out of training, as no gradient reaches them: {', '.join(tables)}" in told


def test_dropped_layers_and_experts_are_not_taken_for_unused(tmp_path):
    assert kept_out("m2m_100", tmp_path / "layers", encoder_layerdrop=0.99, decoder_layerdrop=0.99) == ([], True)
    assert kept_out("switch_transformers", tmp_path / "experts", num_experts=16) == ([], True)
    frozen, _ = kept_out("led", tmp_path / "global")
    assert frozen and all("global" in name for name in frozen)


def test_an_ordinary_model_trains_as_if_nobody_had_looked(tmp_path, monkeypatch):
    assert kept_out("bart", tmp_path / "model") == ([], False)
    recipe = runs.write_recipe(tmp_path, training__max_steps=3, evaluation__strategy="no")  # with dropout
    runs.train(recipe, f"experiment.output_dir={tmp_path / 'looked'}")
    monkeypatch.setattr(unused, "keep_out", lambda *parts: False)
    runs.train(recipe, f"experiment.output_dir={tmp_path / 'blind'}")
    looked, blind = (runs.rows_of(tmp_path / name) for name in ("looked", "blind"))
    assert [row["loss"] for row in looked] == [row["loss"] for row in blind]
    assert [row["grad_norm"] for row in looked] == [row["grad_norm"] for row in blind]


def test_a_model_that_cannot_take_our_batches_is_refused_in_one_line(tmp_path):
    """FSMT has no head of its own: it names its decoder's embeddings as such."""
    with pytest.raises(EngineError) as caught:
        kept_out("fsmt", tmp_path)
    assert caught.value.code == "E4.19" and "\n" not in str(caught.value) and "fsmt" in str(caught.value)


def test_adapters_that_are_frozen_are_saved_all_the_same(tmp_path):
    """LED's global attention gets no gradient here; without its adapters no checkpoint would load again."""
    save("led", tmp_path / "base")
    sections = {"model": {"name_or_path": str(tmp_path / "base")}, "training": {"precision": "fp32"}}
    recipe = Recipe(lora={"enabled": True, "target_modules": "all-linear", "bias": "all"}, **sections)
    bundle = build_model(recipe, device=torch.device("cpu"), precision="fp32")
    with start(Recipe(runtime={"device": "cpu"}, **sections)) as runtime:
        unused.keep_out(bundle, [Feature(list(range(5, 30)), [7, 8, 3], 0)], runtime)
    frozen = [name for name, p in bundle.model.named_parameters() if "lora_" in name and not p.requires_grad]
    assert frozen
    save_model(bundle, tmp_path / "saved", state_dict=weights.weights_of(bundle.model))
    weights.load_weights(bundle.model, tmp_path / "saved")
