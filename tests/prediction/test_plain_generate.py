"""Family by family, decoded by our search or handed back: `final_model/` in plain transformers writes Predictor's texts.

The models are random, their weights so wide that hardly two dialogues get the same summary. Two families run always, the
others are slow.
"""

from __future__ import annotations

import csv
from functools import lru_cache

import every_class
import pytest
import runs
import tiny
from generation_toys import one_thread  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from engine import Predictor
from engine.data.rows import Example
from engine.data.vocabulary import train_tokenizer
from engine.generation import fallback

OURS = {
    "seq2seq": ("bart", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5"),
    "causal": ("gemma", "gpt2", "gpt_neox", "llama", "olmo2", "phi3", "qwen3"),
}
HANDED_BACK = {
    "seq2seq": ("blenderbot", "led", "longt5", "nllb-moe", "switch_transformers"),
    "causal": ("bloom", "cohere", "falcon", "gemma2", "gemma3_text", "granite", "opt", "qwen2_moe"),
}
SEQ2SEQ = OURS["seq2seq"] + HANDED_BACK["seq2seq"]
CAUSAL = OURS["causal"] + HANDED_BACK["causal"]
ALWAYS = ("bart", "opt")
SETTINGS = {
    "num_beams": 2,
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.2,
    "length_penalty": 1.4,
    "min_new_tokens": 3,
    "max_new_tokens": 8,
    "bad_words_ids": [[20], [300, 301]],
    "repetition_scope": "all",  # what plain `generate` does
}
DIALOGUES = 99
BATCH = 50


@pytest.fixture(scope="session")
def dialogues(shared_data):
    with (shared_data / "dialogsum_ko" / "test.csv").open(encoding="utf-8-sig", newline="") as file:
        return tuple(row["dialogue"] for row, _ in zip(csv.DictReader(file), range(DIALOGUES), strict=False))


@lru_cache
def tokenizer_of(dialogues, causal):
    return train_tokenizer(dialogues, vocabulary_size=1500, added_tokens=tiny.ADDED, causal=causal)


def trained(folder, family, dialogues):
    """The folder of a run of one update."""
    tokenizer = tokenizer_of(dialogues, family in CAUSAL)
    width = 0.15 if family in ("gemma2", "gemma3_text") else 0.5  # these two scale their embeddings up
    wide = {"initializer_range": width, "init_std": width, "initializer_factor": 3.0}  # families name it differently
    model = every_class.build(family, family in SEQ2SEQ, seed=1, vocab_size=len(tokenizer), **wide).float()
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 2, 3
        config.forced_eos_token_id = None
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = {f"generation__{name}": value for name, value in SETTINGS.items()}
    settings |= {"evaluation__strategy": "no", "evaluation__generate": False, "data__validation_file": None}
    lengths = {"data__max_source_length": 48, "data__max_target_length": 12}
    runs.train(runs.write_recipe(folder, rows=4, **settings | lengths))
    return folder / "run"


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in ALWAYS else pytest.mark.slow) for f in SEQ2SEQ + CAUSAL]
)
def test_plain_generate_writes_the_same_texts(tmp_path, family, dialogues, monkeypatch):
    monkeypatch.setattr(fallback, "_told", set())
    run = trained(tmp_path, family, dialogues)
    predictor = Predictor.from_run(run)
    auto = AutoModelForSeq2SeqLM if family in SEQ2SEQ else AutoModelForCausalLM
    model = auto.from_pretrained(run / "final_model").eval()
    ours = family in OURS["seq2seq"] + OURS["causal"]
    if ours:  # two loops round differently, which decides where hypotheses tie; in float64 none do
        model, _ = model.double(), predictor.bundle.model.double()
    summaries = predictor.predict_batch(dialogues, batch_size=BATCH, show_progress=False)
    assert bool(fallback._told) != ours

    features = predictor.features([Example(str(at), text, (), None, at + 1) for at, text in enumerate(dialogues)])
    tokenizer = AutoTokenizer.from_pretrained(run / "final_model")
    tokenizer.padding_side = "right" if family in SEQ2SEQ else "left"
    texts = {}
    for batch in predictor.summarizer(BATCH).plan(features):  # so that what is handed back is the very same call
        ids = tokenizer.pad({"input_ids": [features[row].input_ids for row in batch]}, return_tensors="pt")
        written = model.generate(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
        new = written if family in SEQ2SEQ else written[:, ids["input_ids"].shape[1] :]
        texts |= zip(batch, map(predictor.encoder.decode, new.tolist()), strict=True)
    assert [texts[row] for row in range(DIALOGUES)] == summaries
    assert len(set(summaries)) >= 90, sorted(summaries)
