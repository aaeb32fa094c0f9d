"""Settings of a recipe reach the search, or are refused; script rules and batches are planned for all rows."""

from __future__ import annotations

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import yaml

from engine import Predictor
from engine.data.encode import Feature
from engine.errors import EngineError
from engine.generation import api
from engine.generation.settings import GenerationSettings
from engine.prediction.postprocess import RULES
from engine.prediction.summarizer import Summarizer


def planner(family: str = "seq2seq", *, batch_size: int = 3, tokens: int | None = None, **settings) -> Summarizer:
    """A summarizer that plans and decodes without a model."""
    made = object.__new__(Summarizer)
    made.bundle = SimpleNamespace(family=family, model=None, tokenizer=SimpleNamespace(pad_token_id=0))
    made.encoder = SimpleNamespace(decode=lambda token_ids: " ".join(map(str, token_ids)))
    made.settings = GenerationSettings(**({"max_new_tokens": 5, "num_beams": 2} | settings))
    made.batch_size, made.tokens_per_batch = batch_size, tokens
    made.fixes, made.mask = dict.fromkeys(RULES, False), None
    return made


def features(*lengths: int) -> list[Feature]:
    return [Feature([7] * length, None, 10 * i) for i, length in enumerate(lengths)]


def test_batches_are_planned_longest_first_within_their_budget():
    rows = features(4, 9, 4, 2, 9, 6)
    assert planner().plan(rows) == [[1, 4, 5], [0, 2, 3]]
    assert planner(tokens=40).plan(rows) == [
        [1, 4],
        [5, 0],
        [2, 3],
    ]  # 9 + 2 beams of 5: two rows; 6 + 10: two; 4 + 10: two
    assert planner(tokens=1).plan(rows) == [[1], [4], [5], [0], [2], [3]]


def test_a_limit_that_counts_the_prompt_parts_rows_of_different_lengths():
    rows, limit = features(4, 9, 4, 2, 9, 6), {"max_new_tokens": None, "max_length": 20}
    assert planner("causal", **limit).plan(rows) == [[1, 4], [5], [0, 2], [3]]
    assert planner("seq2seq", **limit).plan(rows) == [[1, 4, 5], [0, 2, 3]]


@pytest.mark.parametrize("skip", [(), (10, 40), (0, 10, 20, 30, 40, 50)])
def test_rows_meet_the_same_neighbours_on_any_number_of_ranks_and_after_an_interruption(monkeypatch, skip):
    met = []

    def generate_batch(base, prompts, *others, **settings):
        met.append([len(prompt) for prompt in prompts])
        return [[api.Hypothesis([len(prompt)], -1.0, True)] for prompt in prompts]

    monkeypatch.setattr(api, "prepared", lambda model, steps: nullcontext())
    monkeypatch.setattr(api, "generate_batch", generate_batch)
    rows, summarizer = features(4, 9, 4, 2, 9, 6), planner(batch_size=2)
    done = [
        summary
        for rank in range(2)
        for summary in summarizer.summarize(None, rows, ["대화"] * 6, skip=skip, rank=rank, world_size=2)
    ]
    assert sorted(summary.index for summary in done) == [row.index for row in rows if row.index not in skip]
    assert all(summary.text == str(len(rows[summary.index // 10].input_ids)) for summary in done)
    planned = [[i for i in batch if 10 * i not in skip] for batch in summarizer.plan(rows)]
    assert sorted(met) == sorted([len(rows[i].input_ids) for i in batch] for batch in planned if batch)


def test_script_rules_reach_the_text(trained):
    """No Latin letter outside placeholders, unless the dialogue has the word and the rule spares it."""
    folder, _ = trained
    predictor = Predictor.from_run(folder / "run")
    dialogues = ["#Person1#: Mr. Smith 씨 안녕하세요?", "#Person1#: 오늘 뭐 해요?"]
    free = [mask.isfinite().sum() for mask in _masks(predictor, dialogues, keep_source_words=True)]
    strict = [mask.isfinite().sum() for mask in _masks(predictor, dialogues, keep_source_words=False)]
    assert free[0] > strict[0] and free[1] == strict[1]
    for text in predictor.predict_batch(dialogues, show_progress=False, block_scripts=["latin", "kana", "han"]):
        assert not re.search(r"[A-Za-z]", re.sub(r"#\w+#", "", text))


def _masks(predictor, dialogues, keep_source_words):
    summarizer = predictor.summarizer(2, block_scripts=["latin"], keep_source_words=keep_source_words)
    mask = summarizer.mask_for(dialogues)
    return mask if mask.dim() == 2 else [mask] * len(dialogues)


PASSED_ON = [
    *("do_sample=true min_p=0.1", "do_sample=true top_h=0.4", "do_sample=true typical_p=0.9"),
    *("do_sample=true epsilon_cutoff=0.001", "do_sample=true eta_cutoff=0.001"),
    *("encoder_repetition_penalty=1.2", "encoder_no_repeat_ngram_size=2", "bad_words_ids=[[5],[6,7]]"),
    *("sequence_bias=[[[5],2],[[6,7],-1.5]]", "suppress_tokens=[9,10]", "begin_suppress_tokens=[9]"),
    *("exponential_decay_length_penalty=[2,1.1]", "renormalize_logits=true", "remove_invalid_values=true"),
    *("guidance_scale=1.0", "max_time=30", "stop_strings=[다,.]", "use_cache=false", "min_length=2", "early_stopping=never"),
    *("pad_token_id=1", "bos_token_id=2", "eos_token_id=[3,5]", "decoder_start_token_id=2", "forced_bos_token_id=5"),
    *("forced_eos_token_id=-1", "forced_eos_token_id=[3]"),
]  # fmt: skip


@pytest.mark.parametrize("settings", PASSED_ON)
def test_every_name_of_generate_decodes(trained, settings):
    """Whatever transformers' `generate` takes by name, a recipe may say; what our search lacks runs there."""
    folder, _ = trained
    predictor = Predictor.from_run(folder / "run")
    pairs = (part.split("=", 1) for part in settings.split())
    found = predictor.predict_single(tiny.TEXTS[0], **{name: yaml.safe_load(value) for name, value in pairs})
    assert isinstance(found, str)


@pytest.mark.parametrize(
    "setting",
    [
        *("eos_token_id=[]", "eos_token_id=1e300", "pad_token_id=-1", "forced_bos_token_id=100000", "eos_token_id=100000"),
        *("bad_words_ids=[]", "bad_words_ids=[[]]", "bad_words_ids=[[100000]]", "sequence_bias=[1]", "sequence_bias=[x]"),
        *("sequence_bias=[[[100000],1.0]]", "stop_strings=[]", "stop_strings=['']", "length_penalty=1e9"),
        *("encoder_no_repeat_ngram_size=1e9", "suppress_tokens=[-4]", "forced_eos_token_id=[]", "forced_eos_token_id=-2"),
        "guidance_scale=1.5",
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(trained, setting):
    folder, _ = trained
    predictor = Predictor.from_run(folder / "run")
    name, value = setting.split("=", 1)
    with pytest.raises(EngineError) as caught:
        predictor.predict_single(tiny.TEXTS[0], **{name: yaml.safe_load(value.replace("1e300", "1.0e300"))})
    said = str(caught.value)
    assert caught.value.exit_code == 2 and (f"argument {name}" in said or f"generation.{name}" in said)
