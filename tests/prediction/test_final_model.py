"""`final_model/` in plain transformers: `generate` with nothing but the inputs writes what Predictor writes.

The four main families, with adapters and merged; `test_plain_generate.py` has many more in their plainest form.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from contextlib import contextmanager

import generation_toys
import pytest
import runs
import tiny
from built import build
from generation_toys import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from engine import Predictor
from engine.data.rows import Example

pytestmark = pytest.mark.slow

SETTINGS = {
    "num_beams": 4,
    "no_repeat_ngram_size": 2,
    "length_penalty": 1.4,
    "early_stopping": True,
    "repetition_penalty": 1.2,
    "min_new_tokens": 3,
    "max_new_tokens": 14,
    "repetition_scope": "all",  # what plain `generate` does
    "bad_words_ids": [[20], [30, 31]],
    "suppress_tokens": [40, 41],
}
WORDS = "회의 시간 자료 주말 친구 날씨 예약 전화번호 금요일 커피 책 산 내일 오후".split()
DIALOGUES = [
    f"#Person1#: {word} 이야기예요{'. 정말이에요' * (at % 4)}.\n#Person2#: {word}, {WORDS[at - 5]} 그리고 {WORDS[at - 3]}?"
    for at, word in enumerate(WORDS)
]


SEQ2SEQ = ("bart", "t5")


def save_model(family, folder):
    """Wide random weights, so that texts differ from dialogue to dialogue and scores are well apart."""
    tokenizer = tiny.tokenizer("bart" if family in SEQ2SEQ else "llama")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family in SEQ2SEQ:
        ids["decoder_start_token_id"] = 3 if family == "bart" else 0
    if family == "bart":
        ids |= {"max_position_embeddings": 256, "forced_eos_token_id": 3}
    generation_toys.build(family, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trained(folder, family="bart", own=None, **changes):
    """The folder of a run of two updates with SETTINGS. own: what the model's generation_config.json says besides."""
    save_model(family, folder / "model")
    path = folder / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | (own or {})), encoding="utf-8")
    prompt = "plain" if family in SEQ2SEQ else "instruction"
    settings = {f"generation__{name}": value for name, value in SETTINGS.items()}
    recipe = runs.write_recipe(folder, family, rows=8, **({"prompt__style": prompt} | settings | changes))
    runs.train(recipe)
    return folder / "run"


def auto(family):
    return AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForCausalLM


def plain_texts(predictor, model, tokenizer):
    """What a program without this package decodes, in padded batches of seven."""
    features = predictor.features([Example(str(at), text, (), None, at + 1) for at, text in enumerate(DIALOGUES)])
    tokenizer.padding_side = "left" if predictor.bundle.family == "causal" else "right"
    texts = []
    for start in range(0, len(features), 7):
        ids = {"input_ids": [feature.input_ids for feature in features[start : start + 7]]}
        inputs = tokenizer.pad(ids, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        written = model.eval().generate(**inputs)
        if predictor.bundle.family == "causal":
            written = written[:, inputs["input_ids"].shape[1] :]
        texts += [predictor.encoder.decode(row) for row in written.tolist()]
    return texts


def agreed(predictor, model, folder, caplog):
    """The summaries, the same by both. Nothing is warned of."""
    ours = predictor.predict_batch(DIALOGUES, batch_size=5, show_progress=False)
    caplog.clear()
    with transformers_heard():
        assert plain_texts(predictor, model, AutoTokenizer.from_pretrained(folder)) == ours
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(set(ours)) >= 6, ours
    return ours


@contextmanager
def transformers_heard():
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_warning()
    hf_logging.enable_propagation()
    try:
        yield
    finally:
        hf_logging.disable_propagation()
        hf_logging.set_verbosity(level)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_plain_generate_writes_the_same_texts(tmp_path, family, caplog):
    final = trained(tmp_path, family) / "final_model"
    agreed(Predictor.from_run(tmp_path / "run"), auto(family).from_pretrained(final), final, caplog)
    says = json.loads((final / "generation_config.json").read_text(encoding="utf-8"))
    assert {name: says[name] for name in SETTINGS if name in says} == {
        name: value for name, value in SETTINGS.items() if name != "repetition_scope"
    }
    assert says["pad_token_id"] == 0 and says.get("max_length") is None


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_an_adapter_and_its_merged_model_write_them_too(tmp_path, family, caplog):
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM

    final = trained(tmp_path, family, lora__enabled=True, training__learning_rate=1e-2) / "final_model"
    kind = AutoPeftModelForSeq2SeqLM if family in SEQ2SEQ else AutoPeftModelForCausalLM
    model = kind.from_pretrained(final)
    model.get_base_model().generation_config = GenerationConfig.from_pretrained(final)  # as the card says
    texts = agreed(Predictor.from_run(tmp_path / "run"), model, final, caplog)
    card = (final / "README.md").read_text(encoding="utf-8")
    assert kind.__name__ in card and "GenerationConfig.from_pretrained" in card

    spec = importlib.util.spec_from_file_location("merge_adapter", runs.ROOT / "tools" / "merge_adapter.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    merged = tmp_path / "merged"
    tool.merge(final, merged)
    assert auto(family).__name__ in (merged / "README.md").read_text(encoding="utf-8")
    assert agreed(Predictor.from_run(merged), auto(family).from_pretrained(merged), merged, caplog) == texts


def test_greedy_search_with_a_model_that_would_sample_is_saved_without_a_warning(tmp_path, caplog):
    own = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_length": 300}  # as Llama's and Qwen's say
    final = trained(tmp_path, "llama", own=own, generation__num_beams=1) / "final_model"
    agreed(Predictor.from_run(tmp_path / "run"), auto("llama").from_pretrained(final), final, caplog)


def test_a_run_without_evaluation_says_its_settings_too(tmp_path, caplog):
    run = trained(tmp_path, evaluation__strategy="no", evaluation__generate=False, data__validation_file=None)
    agreed(Predictor.from_run(run), auto("bart").from_pretrained(run / "final_model"), run / "final_model", caplog)
    assert "It was not evaluated." in (run / "final_model" / "README.md").read_text(encoding="utf-8")


def test_settings_that_cannot_be_do_not_cost_a_trained_model(tmp_path):
    changes = {"evaluation__strategy": "no", "evaluation__generate": False, "data__validation_file": None}
    final = trained(tmp_path, generation__suppress_tokens=[10**6], **changes) / "final_model"
    assert json.loads((final / "generation_config.json").read_text(encoding="utf-8")).get("num_beams") in (None, 1)


def test_a_recipe_that_leaves_a_setting_out_is_not_overruled_by_the_folder(tmp_path):
    """Predictor, and a second training from final_model, see the model's own settings below the recipe's."""
    run = trained(tmp_path, generation__bad_words_ids=[[id] for id in range(20, 60)], generation__min_new_tokens=12)
    predictor = Predictor.from_run(run)
    assert predictor.bundle.generation_config.bad_words_ids is None
    assert predictor.bundle.generation_config.min_new_tokens is None
    bundle = build(run / "final_model")
    assert bundle.generation_config.num_beams in (None, 1) and bundle.generation_config.bad_words_ids is None


def test_the_card_tells_what_the_model_is(tmp_path):
    changes = {"generation__block_scripts": ["han"], "generation__fix_full_stop": True}
    run = trained(tmp_path, "llama", generation__repetition_scope="auto", experiment__name="small", **changes)
    card = (run / "final_model" / "README.md").read_text(encoding="utf-8")
    ours = ("`block_scripts`: `['han']`", "`fix_full_stop`: True", "`repetition_scope: output`")
    made = ("# small", str(tmp_path / "model"), "train.jsonl", "dev.jsonl", "tokenizer whitespace")
    for told in (*made, "AutoModelForCausalLM", "predict.py", *ours):
        assert told in card, told
    assert str(tmp_path / "train.jsonl") not in card
