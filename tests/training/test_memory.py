"""The memory estimate against what tiny models really hold."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
from generation_toys import one_thread  # noqa: F401

from engine.errors import EngineError
from engine.loss.cross_entropy import summed_cross_entropy
from engine.models import adapters, build, size
from engine.recipe.load import load_recipe
from engine.recipe.schema import Recipe
from engine.training import memory, optim

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
B, S, T = 4, 48, 12
ACTIVATION_FACTOR = 1.25  # attention saves differ a little between kernels


def recipe(folder, **sections):
    data = {"max_source_length": S, "max_target_length": T}
    training = {"per_device_train_batch_size": B} | sections.pop("training", {})
    model = {"name_or_path": str(folder)} | sections.pop("model", {})
    return Recipe(model=model, data=data, training=training, **sections)


def full_batch(family, rows=400):
    ids = torch.randint(4, rows - 30, (B, S if family in ("bart", "t5") else S + T))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in ("bart", "t5"):
        labels = torch.randint(4, rows - 30, (B, T))
        return batch | {"labels": labels, "decoder_input_ids": labels.roll(1, 1)}
    labels = ids.clone()
    labels[:, :S] = -100
    return batch | {"labels": labels}


def one_update(bundle, settings, batch):
    groups = optim.parameter_groups(bundle.model, 0.01)
    optimizer = optim.build_optimizer(groups, settings.training, CPU)
    summed_cross_entropy(bundle.model.train(), batch).backward()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in bundle.model.parameters() if p.grad is not None)
    optimizer.step()
    return gradients, optimizer


def tensor_bytes(model):
    """Weights, scales and tables of a model as they lie in memory."""
    total = sum(b.numel() * b.element_size() for b in model.buffers())
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            parts = [state.absmax, state.code]
            parts += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            total += sum(part.numel() * part.element_size() for part in parts)
    return total


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_weights_gradients_and_optimizer_are_exact(tmp_path, family, lora):
    settings = recipe(tiny.save(family, tmp_path), lora={"enabled": lora, "r": 4})
    expected = memory.estimate(settings, precision="fp32")
    bundle = build.build_model(settings, device=CPU, precision="fp32")
    gradients, optimizer = one_update(bundle, settings, full_batch(family))
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert expected["weights"] == tensor_bytes(bundle.model)
    assert expected["gradients"] == gradients
    assert expected["optimizer"] == sum(t.numel() * t.element_size() for t in states)
    assert expected["parameters"] == bundle.report["parameters"]
    assert expected["trainable_parameters"] == bundle.report["trainable_parameters"]


@pytest.mark.parametrize("double", [False, True])
def test_four_bit_weights_are_exact(tmp_path, double):
    folder = tiny.save("llama", tmp_path, hidden_size=64, intermediate_size=160, head_dim=16)
    settings = recipe(
        folder, quantization={"load_in_4bit": True, "bnb_4bit_use_double_quant": double}, lora={"use_dora": True}
    )
    expected = memory.estimate(settings, precision="bf16")
    bundle = build.build_model(settings, device=CPU, precision="bf16")
    assert expected["weights"] == tensor_bytes(bundle.model)
    assert expected["gradients"] == 4 * bundle.report["trainable_parameters"]


def test_8bit_optimizer_state_within_two_percent(tmp_path):
    folder = tiny.save("llama", tmp_path, hidden_size=128, intermediate_size=512, head_dim=32)
    settings = recipe(folder, training={"optim": "adamw_8bit"})
    bundle = build.build_model(settings, device=CPU, precision="fp32")
    _, optimizer = one_update(bundle, settings, full_batch("llama"))
    names = {"state1", "state2", "absmax1", "absmax2"}
    states = [t for state in optimizer.state.values() for name, t in state.items() if name in names]
    measured = sum(t.numel() * t.element_size() for t in states)
    assert memory.estimate(settings, precision="fp32")["optimizer"] == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_within_a_factor(tmp_path, family, lora, precision):
    depth = {"bart": {"encoder_layers": 3, "decoder_layers": 4}, "t5": {"num_layers": 3, "num_decoder_layers": 4}}
    folder = tiny.save(family, tmp_path, **depth.get(family, {"num_hidden_layers": 4}))
    settings = recipe(folder, lora={"enabled": lora})
    bundle = build.build_model(settings, device=CPU, precision=precision)
    kept = memory.SavedTensors({p.untyped_storage()._cdata for p in bundle.model.parameters()})
    head = bundle.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: (args[0].reshape(-1, args[0].shape[-1])[: B * T],))
    batch = {name: tensor for name, tensor in full_batch(family).items() if name != "labels"}
    dtype = adapters.DTYPES[precision]
    with kept, torch.autocast("cpu", dtype=dtype, enabled=precision != "fp32"):
        bundle.model.train()(**batch, use_cache=False)
    estimated = memory.estimate(settings, precision=precision)["activations"]
    assert kept.total / ACTIVATION_FACTOR < estimated < kept.total * ACTIVATION_FACTOR


def test_checkpointing_keeps_less_and_the_peak_tells(tmp_path):
    folder = tiny.save("llama", tmp_path, num_hidden_layers=12)
    plain = memory.estimate(recipe(folder), precision="fp32")
    thrifty = memory.estimate(recipe(folder, training={"gradient_checkpointing": True}), precision="fp32")
    assert thrifty["activations"] < plain["activations"] / 3
    assert thrifty["weights"] == plain["weights"]
    text = memory.table(plain, CPU)
    assert "activations" in text and "warning" not in text
    assert "warning" in memory.table(plain | {"peak": 2**60}, CPU)


def test_distributed_ranks_hold_gradient_buckets(tmp_path):
    settings = recipe(tiny.save("bart", tmp_path))
    estimate = memory.estimate(settings, precision="fp32", world_size=2)
    assert estimate["gradient_buckets"] == estimate["gradients"]


def test_a_budget_of_tokens_decides_the_estimate(tmp_path):
    folder = tiny.save("bart", tmp_path)

    def examples(steps=4, **data):
        made = recipe(folder, training={"gradient_accumulation_steps": steps})
        made.data = made.data.model_copy(update={"batching": "tokens"} | data)
        return memory.estimate(made, precision="fp32", device=CPU)["shape"]["examples"]

    assert examples() == B, "without a number: what a micro-batch of the longest rows holds"
    assert examples(tokens_per_batch=2 * B * (S + T)) == 2 * B
    assert examples(tokens_per_batch=10**6) == 4 * B, "no more than an update has"
    assert examples(tokens_per_batch=1) == 1, "a longer row goes alone"
    fixed = memory.estimate(recipe(folder, training={"per_device_train_batch_size": 2 * B}), device=CPU)
    made = recipe(folder, training={"gradient_accumulation_steps": 4})
    made.data = made.data.model_copy(update={"batching": "tokens", "tokens_per_batch": 2 * B * (S + T)})
    assert memory.estimate(made, device=CPU)["peak"] == fixed["peak"]


def test_lists_with_an_entry_per_layer_are_as_long_as_the_layers():
    """LED's attention windows: a model of one layer was refused a configuration for two."""
    from transformers import LEDConfig

    sizes = {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 400}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2}
    size.check_weights_fit(LEDConfig(**sizes, attention_window=[16, 32]), CPU, trust_remote_code=False)


def test_sharded_ranks_hold_their_part(tmp_path):
    settings = recipe(tiny.save("llama", tmp_path, num_hidden_layers=12))
    whole = memory.estimate(settings, precision="fp32", world_size=4)
    part = memory.estimate(settings, precision="fp32", world_size=4, sharded=True)
    for name in ("weights", "gradients", "optimizer"):
        assert part[name] == -(-whole[name] // 4)
    assert part["gradient_buckets"] == 0 < part["gathered"] < whole["weights"]
    assert part["training_peak"] < whole["training_peak"]
    assert "gathered from the other ranks" in memory.table(part, CPU)


def test_real_shapes_cost_nothing(tmp_path):
    """Llama-3.2-3B's shape: nothing of 13 GB is made, and the numbers are those of the model's card."""
    values = {
        "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    settings = Recipe(
        model={"name_or_path": str(tmp_path)},
        quantization={"load_in_4bit": True},
        tokenizer={"added_tokens": []},
        training={"gradient_checkpointing": True},
    )
    estimate = memory.estimate(settings, precision="bf16")
    assert estimate["parameters"] - estimate["trainable_parameters"] == 3_212_749_824
    assert estimate["trainable_parameters"] == 24_313_856  # rank 16 on the seven linears
    assert 2.0 < estimate["weights"] / 2**30 < 2.4


_LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256}
_QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
_LLAMA_3B = _LLAMA | dict(zip(_KEYS, (3072, 8192, 28, 24, True), strict=True))
PUBLISHED = {
    "llama3b_lora": _LLAMA_3B,
    "llama3b_qlora": _LLAMA_3B,
    "qwen3_4b_qlora": _QWEN3 | dict(zip(_KEYS, (2560, 9728, 36, 32, True), strict=True)),
    "llama3_8b_qlora": _LLAMA | dict(zip(_KEYS, (4096, 14336, 32, 32, False), strict=True)),
}


def test_readme_says_what_the_estimator_says(root, tmp_path, shared_data):
    folders = {"quickstart": None, "kobart": shared_data / "tokenizers" / "kobart"}
    for name, values in PUBLISHED.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "config.json").write_text(json.dumps(values), encoding="utf-8")
    for name, folder in folders.items():
        given = [f"model.name_or_path={folder}"] if folder else []
        settings = load_recipe(root / "recipes" / f"{name}.yaml", given)
        peak = memory.estimate(settings, precision="bf16", device=CPU)["peak"] / 2**30
        for readme in ("README.md", "README.ko.md"):
            row = re.search(rf"\| \[{name}\].*", (root / readme).read_text(encoding="utf-8")).group()
            assert float(re.search(r"([\d.]+) GiB", row).group(1)) == round(peak, 1), (readme, row, peak)


def test_measured_peak_is_this_process_own(root):
    """Not that of a large parent, which Linux hands on to children in `getrusage`."""
    ballast = np.ones(200_000_000)  # 1.5 GiB
    script = (
        "import torch; from engine.runtime.peak_memory import measured_peak; print(measured_peak(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert 0.05 < float(done.stdout) < ballast.nbytes / 2**30


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"encoder_layers": 100_000}, r"E2\.59.*encoder_layers is 100,000; at most 1,000"),
        ({"decoder_layers": 2_000_000}, r"E2\.59.*decoder_layers is 2,000,000"),
        ({"d_model": 200_000}, r"E8\.3.*weights take .* GiB in float32; cpu has"),
        ({"vocab_size": 2_000_000_000}, r"E8\.3"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_seconds(change, match, tmp_path):
    began = time.monotonic()
    rows = tiny.write_rows(tmp_path / "train.jsonl")
    made = Recipe(
        model={"init": "random", "config": tiny.config_values("bart", **change)},
        tokenizer={"train_vocab_size": 400, "added_tokens": []},
        data={"train_file": str(rows)},
    )
    with pytest.raises(EngineError, match=match):
        build.build_model(made, device=CPU, precision="fp32")
    assert time.monotonic() - began < 30  # seconds, on a busy machine


def test_a_limit_on_memory_counts_as_this_machines(monkeypatch):
    monkeypatch.setattr(size.resource, "getrlimit", lambda kind: (1 << 30, 1 << 30))
    assert size.device_bytes(CPU) == 1 << 30
