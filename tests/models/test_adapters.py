"""LoRA, QLoRA and their relatives on tiny models: what is trained, what stays, what comes back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
import torch
from adapted import CPU, IDS, WIDE, batch_of, build, logits, train
from generation_toys import each, one_thread  # noqa: F401

from engine.errors import EngineError
from engine.loss.cross_entropy import summed_cross_entropy
from engine.models import adapters
from engine.models import weights as models_weights
from engine.models.build import build_model
from engine.models.bundle import save_model
from engine.models.load import load_trained
from engine.recipe.schema import Lora, Quantization, Recipe


def frozen_state(model):
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}  # shared rows go by several names
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.data_ptr() not in trained}


# What is trained


@pytest.mark.parametrize("family", each(tiny.FAMILIES))
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}, {"use_dora": True}, {"bias": "lora_only"}])
def test_training_moves_adapters_and_new_rows_and_nothing_else(tmp_path, family, variant):
    bundle = build(tiny.save(family, tmp_path / "base"), lora=variant)
    before = frozen_state(bundle.model)
    start = {name: p.detach().clone() for name, p in bundle.model.named_parameters() if p.requires_grad}
    losses = train(bundle, family)
    assert losses[-1] < losses[0]
    for name, tensor in frozen_state(bundle.model).items():
        assert torch.equal(tensor, before[name]), name
    moved = {name for name, p in bundle.model.named_parameters() if p.requires_grad and not torch.equal(p, start[name])}
    assert any("lora_A" in name for name in moved) and any("lora_B" in name for name in moved)
    assert any("trainable_tokens_delta" in name for name in moved)
    assert variant.get("use_dora", False) == any("magnitude" in name for name in moved)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_of_seen_tokens_stay_and_rows_of_new_ones_learn(tmp_path, family):
    """Also through tied embeddings (bart, t5, qwen3), and in the output head of untied models (llama)."""
    bundle = build(tiny.save(family, tmp_path))
    before = bundle.model.get_input_embeddings().weight.detach().clone()
    train(bundle, family)
    rows = [p for name, p in bundle.model.named_parameters() if "trainable_tokens_delta" in name]
    tied = family != "llama"
    assert len(rows) == (1 if tied else 2)
    merged = bundle.model.merge_and_unload()
    after = merged.get_input_embeddings().weight
    known = bundle.report["vocabulary_before"]
    assert torch.equal(after[:known], before[:known])
    assert not torch.equal(after[376], before[376])  # in the batch
    if not tied:
        assert not torch.equal(merged.get_output_embeddings().weight[376], merged.get_input_embeddings().weight[376])
    else:
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cheap_token_rows_compute_what_peft_computes(tmp_path, family):
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    bundle = build(tiny.save(family, tmp_path), lora={"dropout": 0.0})
    train(bundle, family)
    results = []
    for cheap in (True, False):
        for module in bundle.model.modules():
            if isinstance(module, TrainableTokensLayer):
                module.__class__ = adapters._cheap_class() if cheap else TrainableTokensLayer
        bundle.model.zero_grad()
        loss = summed_cross_entropy(bundle.model.eval(), batch_of(family))
        loss.backward()
        results.append([loss.detach()] + [p.grad.clone() for p in bundle.model.parameters() if p.requires_grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_frozen_rows_of_new_tokens_are_still_saved(tmp_path):
    """Rows that are not trained must come back too: the base does not have them."""
    bundle = build(tiny.save("llama", tmp_path / "base"), lora={"train_added_tokens": False})
    rows = {name: p.clone() for name, p in bundle.model.named_parameters() if "trainable_tokens_delta" in name}
    assert rows and not any(bundle.model.get_parameter(name).requires_grad for name in rows)
    train(bundle, "llama")
    snapshot = {name: tensor.clone() for name, tensor in models_weights.weights_of(bundle.model).items()}
    for state in (None, snapshot):
        save_model(bundle, tmp_path / "saved", state_dict=state)
        again = load_trained(tmp_path / "saved", device=CPU)
        assert torch.equal(logits(bundle.model, "llama"), logits(again.model, "llama"))


def test_modules_to_save_are_trained_in_full_and_come_back(tmp_path):
    bundle = build(
        tiny.save("llama", tmp_path / "base"),
        precision="bf16",
        lora={"modules_to_save": ["norm"]},
    )
    train(bundle, "llama", precision="bf16")
    save_model(bundle, tmp_path / "saved")
    again = load_trained(tmp_path / "saved", device=CPU, precision="bf16")
    expected, found = (logits(b.model, "llama", "bf16") for b in (bundle, again))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    fresh = build(tmp_path / "base", precision="bf16", lora={"modules_to_save": ["norm"]})
    models_weights.load_weights(fresh.model, tmp_path / "saved")
    assert torch.equal(logits(fresh.model, "llama", "bf16"), expected)


# Saving, reloading, going on


@pytest.mark.parametrize("family", each(tiny.FAMILIES))
def test_an_adapter_folder_is_small_complete_and_loads_without_us(tmp_path, family):
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM

    base = tiny.save(family, tmp_path / "base")
    bundle = build(base)
    train(bundle, family)
    saved = tmp_path / "saved"
    save_model(bundle, saved)
    assert sorted(p.name for p in saved.glob("*.safetensors")) == ["adapter_model.safetensors"]
    trainable = bundle.report["trainable_parameters"]
    assert (saved / "adapter_model.safetensors").stat().st_size < 4 * trainable + 20_000
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)

    auto = AutoPeftModelForCausalLM if family in tiny.CAUSAL else AutoPeftModelForSeq2SeqLM
    alone = auto.from_pretrained(saved)
    again = load_trained(saved, device=CPU)
    expected = logits(bundle.model, family)
    assert torch.equal(logits(again.model, family), expected)
    torch.testing.assert_close(logits(alone, family), expected, rtol=1e-5, atol=1e-5)

    fresh = build(base)
    models_weights.load_weights(fresh.model, saved)
    assert torch.equal(logits(fresh.model, family), expected)
    for (name, ours), theirs in zip(
        models_weights.trainable_state(fresh.model).items(),
        models_weights.trainable_state(bundle.model).values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_goes_on_from_an_adapter_folder(tmp_path, precision):
    first = build(tiny.save("llama", tmp_path / "base"), precision=precision)
    train(first, "llama", precision=precision)
    save_model(first, tmp_path / "saved")
    second = build(tmp_path / "saved", precision=precision, lora={"r": 64})  # the adapter's own rank holds
    assert second.report["trainable_parameters"] == first.report["trainable_parameters"]
    for (name, ours), theirs in zip(
        models_weights.trainable_state(second.model).items(),
        models_weights.trainable_state(first.model).values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs), name
    before = torch.cat([p.detach().flatten().clone() for p in second.model.parameters() if p.requires_grad])
    train(second, "llama", precision=precision)
    assert not torch.equal(
        before, torch.cat([p.detach().flatten() for p in second.model.parameters() if p.requires_grad])
    )
    with pytest.raises(EngineError, match=r"E2\.46"):
        build(tmp_path / "saved", lora={"enabled": False})


def test_another_base_is_refused_and_the_right_one_found_again(tmp_path):
    base = tiny.save("llama", tmp_path / "base")
    save_model(build(base), tmp_path / "saved")
    retrained = tiny.save("llama", tmp_path / "other", seed=1)
    with pytest.raises(EngineError, match=r"E4\.11.*weights_sha256"):
        load_trained(tmp_path / "saved", device=CPU, base=str(retrained))
    base.rename(tmp_path / "moved")
    with pytest.raises(EngineError, match=r"E4\.1"):
        load_trained(tmp_path / "saved", device=CPU)
    load_trained(tmp_path / "saved", device=CPU, base=str(tmp_path / "moved"))


# 4 bits

QLORA_AT_A_DESK = {("fp32", "llama"), ("bf16", "qwen3"), ("fp16", "bart")}  # each precision and each family once


@pytest.mark.parametrize(
    ("trained", "family"),
    [
        pytest.param(trained, family, marks=() if (trained, family) in QLORA_AT_A_DESK else pytest.mark.slow)
        for trained in ("fp32", "bf16", "fp16")
        for family in ("llama", "qwen3", "bart")
    ],
)
def test_qlora_trains_and_predicts_under_every_pair_of_precisions(tmp_path, family, trained):
    """fp16 uses a real GradScaler; nothing may crash in generate afterwards, whatever type the base is loaded in."""
    changes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128} if family == "bart" else WIDE
    folder = tiny.save(family, tmp_path / "base", **changes)
    bundle = build(folder, precision=trained, quantization={"load_in_4bit": True})
    assert bundle.report["quantized"]
    assert {p.dtype for p in bundle.model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(bundle, family, updates=6, precision=trained)
    assert losses[-1] < losses[0]
    save_model(bundle, tmp_path / "saved")
    expected = logits(bundle.model, family, trained)
    for precision in ("fp32", "bf16", "fp16"):
        again = load_trained(tmp_path / "saved", device=CPU, precision=precision)
        assert again.report["quantized"]
        again.model.generate(input_ids=IDS, max_new_tokens=3)
        with torch.autocast("cpu", dtype=adapters.DTYPES[precision], enabled=precision != "fp32"):
            again.model.generate(input_ids=IDS, max_new_tokens=3)
        if precision == trained == "fp32":
            assert torch.equal(logits(again.model, family), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "family"), sorted(QLORA_AT_A_DESK))
def test_qlora_on_a_gpu(tmp_path, gpu, precision, family):
    """Learns, comes back to the bit on the GPU, and gives nearly the same logits on a CPU."""
    pytest.importorskip("bitsandbytes")
    changes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128} if family == "bart" else WIDE
    folder = tiny.save(family, tmp_path / "base", **changes)
    bundle = build(folder, precision=precision, device=gpu, quantization={"load_in_4bit": True})
    losses = train(bundle, family, updates=6, precision=precision)
    assert bundle.report["quantized"] and losses[-1] < losses[0]
    save_model(bundle, tmp_path / "saved")
    expected = logits(bundle.model, family, precision)
    again = load_trained(tmp_path / "saved", device=gpu, precision=precision)
    assert torch.equal(logits(again.model, family, precision), expected)
    again.model.generate(input_ids=IDS.to(gpu), max_new_tokens=3)
    elsewhere = load_trained(tmp_path / "saved", device=CPU, precision=precision)
    apart = (logits(elsewhere.model, family, precision) - expected.cpu()).abs().max()
    assert apart < (1e-3 if precision == "fp32" else 0.1) * expected.abs().max()


def test_evaluating_a_4bit_model_changes_nothing(tmp_path):
    """bitsandbytes repacks 4-bit weights, with loss, when a CPU model is first used in eval mode; ours are left alone."""
    folder = tiny.save("llama", tmp_path, **WIDE)
    losses = []
    for evaluating in (False, True):
        bundle = build(folder, quantization={"load_in_4bit": True}, lora={"dropout": 0.0})
        if evaluating:
            logits(bundle.model, "llama")
            bundle.model.generate(input_ids=IDS, max_new_tokens=2)
        losses.append(train(bundle, "llama"))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantisation_settings_reach_the_weights(tmp_path, kind, double):
    folder = tiny.save("llama", tmp_path, **WIDE)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    model = build(folder, precision="bf16", quantization=settings).model
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    assert len(states) == 2 * 7
    assert {(state.quant_type, state.nested) for state in states} == {(kind, double)}
    assert {m.compute_dtype for m in model.modules() if hasattr(m, "compute_dtype")} == {torch.bfloat16}


def test_compute_type_follows_the_precision_unless_named(monkeypatch, caplog):
    assert adapters.compute_dtype("auto", "bf16", CPU) == torch.bfloat16
    assert adapters.compute_dtype("auto", "fp16", CPU) == torch.float16
    assert adapters.compute_dtype("fp32", "bf16", CPU) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old GPU")
    assert adapters.compute_dtype("bf16", "fp16", torch.device("cuda")) == torch.float16
    assert "no bf16 arithmetic" in caplog.text
    config = adapters.quantization_config(Quantization(load_in_4bit=True), "fp16", CPU)
    assert config.bnb_4bit_compute_dtype == torch.float16


def test_gradient_checkpointing_reaches_adapters_below_frozen_embeddings(tmp_path):
    folder = tiny.save("llama", tmp_path, **WIDE)
    gradients = []
    for checkpointing in (False, True):
        bundle = build(
            folder,
            quantization={"load_in_4bit": True},
            lora={"dropout": 0.0},
            training={"gradient_checkpointing": checkpointing},
        )
        summed_cross_entropy(bundle.model.train(), batch_of("llama")).backward()
        gradients.append({name: p.grad for name, p in bundle.model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


# Settings


@pytest.mark.parametrize(
    ("setting", "count"), [("auto", 7), ("all-linear", 7), (["q_proj"], 1), (["self_attn.v_proj", "gate_proj"], 2)]
)
def test_target_modules(tmp_path, setting, count):
    bundle = build(tiny.save("llama", tmp_path), lora={"target_modules": setting})
    adapted = {name.split(".lora_A")[0] for name, _ in bundle.model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 2 * count


def test_unknown_target_modules_are_named(tmp_path):
    folder = tiny.save("llama", tmp_path)
    with pytest.raises(EngineError, match=r"E2\.57.*no module named q_prj .*q_proj"):
        build(folder, lora={"target_modules": ["q_prj"]})
    model = tiny.model("llama")
    model.config.model_type = "unheard_of"
    with pytest.raises(EngineError, match=r"E2\.57.*unheard_of"):
        adapters.target_modules("auto", model)


def test_gpt_neox_targets(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    expected = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    assert adapters.target_modules("auto", GPTNeoXForCausalLM(config)) == expected


def test_loraplus_groups_hold_every_trainable_weight_once(tmp_path):
    from engine.training import setup

    training, lora = {"learning_rate": 1e-4, "weight_decay": 0.1}, {"enabled": True, "loraplus_lr_ratio": 16.0}
    recipe = Recipe(model={"name_or_path": str(tiny.save("llama", tmp_path))}, lora=lora, training=training)
    bundle = build_model(recipe, device=CPU, precision="fp32")
    groups = setup.parameter_groups(recipe, bundle)
    names = {id(p): name for name, p in bundle.model.named_parameters() if p.requires_grad}
    seen = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in groups:
        for parameter in group["params"]:
            fast = "lora_B" in names[id(parameter)]
            assert group["lr"] == pytest.approx(1.6e-3 if fast else 1e-4), names[id(parameter)]
            assert group["weight_decay"] == 0.1


def test_adapters_are_on_by_default_only_with_4_bits():
    assert not adapters.enabled(Recipe())
    assert adapters.enabled(Recipe(quantization={"load_in_4bit": True}))
    assert adapters.enabled(Recipe(lora=Lora(enabled=True)))


@pytest.mark.slow
def test_peft_and_bitsandbytes_are_imported_only_when_asked_for(root):
    code = (
        "import sys, torch\nsys.path.insert(0, 'tests')\nimport tiny\n"
        "from engine.models import adapters, build\nfrom engine.training import optim\n"
        "from engine.recipe.schema import Recipe\nimport tempfile\nfrom pathlib import Path\n"
        "folder = tiny.save('llama', Path(tempfile.mkdtemp()))\n"
        "build.build_model(Recipe(model={'name_or_path': str(folder)}), device=torch.device('cpu'), precision='fp32')\n"
        "print([name for name in ('bitsandbytes', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "incomplete"])
def test_a_damaged_adapter_is_refused(tmp_path, damage):
    """Left to itself, peft raises what nobody catches, or draws the missing weights and says nothing."""
    from safetensors.torch import load_file, save_file

    bundle = build(tiny.save("llama", tmp_path / "base"))
    save_model(bundle, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    weights = load_file(path)
    weights.pop(next(name for name in weights if "lora_B" in name))
    if damage == "incomplete":
        save_file(weights, path)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\xff" * 200}[damage])
    with pytest.raises(EngineError, match=r"E4\.8: (unreadable weight file|1 weights of the adapter are missing)"):
        load_trained(tmp_path / "adapter", device=CPU)
