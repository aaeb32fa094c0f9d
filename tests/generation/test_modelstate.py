"""Models that are not plain: adapters, 4-bit weights, autocast, half precision, threads, the real KoBART shape."""

from __future__ import annotations

import csv
import threading
from pathlib import Path

import pytest
import torch
from generation_toys import (
    assert_equal,
    batch,
    build,
    decode,
    each,
    one_thread,  # noqa: F401
    reference,
    shared,
)
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, GenerationConfig

from engine.generation import linears
from engine.generation.api import generate, generate_all
from engine.generation.settings import GenerationSettings

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
RULES = {"num_beams": 4, "max_new_tokens": 12, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
TARGETS = {
    "bart": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "llama": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
}


def resolved(model, **values) -> GenerationSettings:
    return GenerationSettings.resolve(
        {"repetition_scope": "all"} | values,
        model_generation_config=model.generation_config,
        is_encoder_decoder=model.config.is_encoder_decoder,
    )


def new_tokens(model, inputs, **arguments) -> list[list[int]]:
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return reference(model, **inputs, **arguments).sequences[:, start:].tolist()


@pytest.mark.parametrize("family", each())
def test_lora(family):  # 92
    peft = pytest.importorskip("peft")
    kind = "SEQ_2_SEQ_LM" if family in ("bart", "t5") else "CAUSAL_LM"
    config = peft.LoraConfig(r=4, target_modules=TARGETS[family], task_type=kind, init_lora_weights=False)
    model = peft.get_peft_model(build(family), config).eval()
    plain = new_tokens(shared(family), batch(shared(family)), **RULES)
    inputs = batch(model)
    expected = new_tokens(model, inputs, **RULES)
    assert generate(model, **inputs, settings=resolved(model, **RULES)).sequences.tolist() == expected
    with model.disable_adapter():
        assert generate(model, **inputs, settings=resolved(model, **RULES)).sequences.tolist() == plain
    assert expected != plain


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("llama"), config)
    with pytest.raises(ValueError, match="prompt-learning"):
        generate(model, **batch(model), settings=GenerationSettings(max_new_tokens=3))


def test_adapter_on_four_bit_layers_takes_part():
    """peft's layer around a 4-bit one has the same class name; decoding once went on with the bare base."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    model = build("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            plain = getattr(layer.self_attn, name)
            packed = bitsandbytes.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, quant_type="nf4")
            packed.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
            setattr(layer.self_attn, name, packed.to("cpu"))
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=4, target_modules=TARGETS["llama"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    inputs = batch(model)
    ours = generate(model, **inputs, settings=resolved(model, **RULES)).sequences.tolist()
    assert ours == new_tokens(model, inputs, **RULES)
    with model.disable_adapter():
        assert ours != new_tokens(model, inputs, **RULES)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_four_bit(family):  # 92
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = build(family, hidden_size=64, intermediate_size=128, head_dim=16)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and name != "lm_head":
                layer = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
                )
                layer.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", module=layer
                )
                setattr(parent, name, layer.to("cpu"))
    inputs = batch(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight.quant_state is not None
    assert generate(model, **inputs, settings=resolved(model, **RULES)).sequences.tolist() == new_tokens(
        model, inputs, **RULES
    )
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("family", each())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(family, dtype):
    """Half precision makes ties, so only the score of what was found is compared."""
    model = shared(family)
    inputs = batch(model)
    arguments = {"num_beams": 4, "max_new_tokens": 10, "min_new_tokens": 10}
    with torch.autocast("cpu", dtype=dtype):
        ours = generate(model, **inputs, settings=resolved(model, **arguments))
        theirs = reference(model, **inputs, **arguments)
    assert (ours.scores - theirs.sequences_scores).mean() > -0.1


@pytest.mark.parametrize("family", each())
def test_bfloat16_weights(family):
    model = build(family).to(torch.bfloat16)
    inputs = batch(model)
    arguments = {"num_beams": 4, "max_new_tokens": 10, "min_new_tokens": 10}
    ours = generate(model, **inputs, settings=resolved(model, **arguments))
    theirs = reference(model, **inputs, **arguments)
    assert (ours.scores - theirs.sequences_scores).mean() > -0.1


def test_model_inside_ddp():
    from torch.nn.parallel import DistributedDataParallel

    model = build("bart")
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)  # no process group needed to look through it
    torch.nn.Module.__init__(wrapped)
    wrapped.module = model
    inputs = batch(model)
    assert generate(wrapped, **inputs, settings=resolved(model, **RULES)).sequences.tolist() == new_tokens(
        model, inputs, **RULES
    )


def test_threads():  # 93
    model = build("bart")
    settings = resolved(model, **RULES)
    cases = [batch(model, seed=seed) for seed in range(4)]
    expected = [generate(model, **inputs, settings=settings).sequences.tolist() for inputs in cases]
    found: list = [None] * 4

    def work(i: int) -> None:
        found[i] = generate(model, **cases[i], settings=settings).sequences.tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.parametrize("family", each())
def test_packed_layers(family, monkeypatch):
    monkeypatch.setattr(linears, "MIN_WEIGHTS_TO_PACK", 0)
    model = build(family)
    inputs = batch(model)
    used = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, *_: used.append("forward" in module.__dict__)
    )
    ours = generate(model, **inputs, settings=resolved(model, **RULES))
    hook.remove()
    assert all(used) == linears._packing_works()
    assert ours.sequences.tolist() == new_tokens(model, inputs, **RULES)


def test_cache_is_small():
    """Cells per layer: B*(P + K*(T-1)), where transformers holds B*K*(P+T-1), twice while it reorders."""
    model = shared("qwen3")
    inputs = batch(model, lengths=(200, 180))
    ours = decode(model, **inputs, num_beams=5, max_new_tokens=20)
    cell = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, bytes
    assert ours.cache_bytes == 2 * (200 + 5 * 19) * cell
    assert ours.cache_bytes < 0.4 * 2 * 5 * (200 + 19) * cell


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data")
@pytest.mark.slow
def test_kobart_with_its_real_tokenizer_and_config():
    folder = SHARED / "tokenizers" / "kobart"
    config = BartConfig.from_pretrained(folder, decoder_layers=1, encoder_layers=1, init_std=0.08)
    torch.manual_seed(0)
    model = BartForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(SHARED / "dialogsum_ko" / "dev.csv", encoding="utf-8") as file:
        dialogues = [row["dialogue"] for row in csv.DictReader(file)][:3]
    sources = tokenizer(dialogues, truncation=True, max_length=200)["input_ids"]
    values = {"num_beams": 3, "max_new_tokens": 12, "no_repeat_ngram_size": 3, "repetition_penalty": 1.5}
    settings = resolved(model, **values)
    assert settings.describe()["forced_eos_token_id"] == 2
    found = generate_all(model, sources, settings, pad_token_id=tokenizer.pad_token_id)
    inputs = tokenizer.pad({"input_ids": sources}, return_tensors="pt", padding_side="right")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    theirs = reference(model, **inputs, **values)
    assert [h[0].token_ids for h in found] == [row.tolist() for row in theirs.sequences[:, 1:]]
    assert all(h[0].token_ids[-1] == 2 and not h[0].ended for h in found)
    assert_equal(decode(model, **inputs, **values), theirs)
