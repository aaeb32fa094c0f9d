"""Tokenizers: loaded or trained, placeholders kept whole, every text given back."""

from __future__ import annotations

import pytest
import tiny
from built import SPOKEN
from encoders import real_tokenizer

from engine.errors import EngineError
from engine.models import tokenization


def test_placeholders_of_real_summaries_survive_real_tokenizers(shared_data):
    import csv

    with (shared_data / "dialogsum_ko" / "train.csv").open(encoding="utf-8-sig", newline="") as file:
        summaries = [row["summary"] for row in csv.DictReader(file)]
    for name in ("kobart", "qwen3"):
        tokenizer = real_tokenizer(name)
        for text in summaries:
            ids = tokenizer.encode(text, add_special_tokens=False)
            back = tokenizer.decode(ids, skip_special_tokens=True)
            for tag in ("#Person1#", "#Person2#"):
                assert [part[:2] for part in back.split(tag)[1:]] == [part[:2] for part in text.split(tag)[1:]]
            if tokenizer.unk_token_id not in ids and name == "qwen3":
                assert back == text


def test_a_missing_pad_token_is_replaced_and_a_missing_end_is_refused():
    tokenizer = tiny.tokenizer("bart")
    tokenizer.pad_token = None
    tokenization.ensure_end_and_pad(tokenizer, "x")
    assert tokenizer.pad_token == "<unk>"
    tokenizer.unk_token = tokenizer.pad_token = None
    tokenization.ensure_end_and_pad(tokenizer, "x")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(EngineError, match=r"E4\.6"):
        tokenization.ensure_end_and_pad(tokenizer, "x")


def test_t5_style_splitting_keeps_spaces_around_added_tokens():
    from tokenizers import decoders, pre_tokenizers

    tokenizer = tiny.tokenizer("t5")
    backend = tokenizer.backend_tokenizer
    marks = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**marks)]
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(**marks), decoders.Fuse()])
    assert tokenizer.decode(tokenizer.encode(SPOKEN), skip_special_tokens=True) != SPOKEN
    fixed = tokenization.prepare(tokenizer, ["#Person1#", "#Address#"], name="x", model_type="t5")
    assert fixed.decode(fixed.encode(SPOKEN), skip_special_tokens=True) == SPOKEN


def test_a_tokenizer_that_loses_added_tokens_is_refused():
    from tokenizers import decoders

    tokenizer = tiny.tokenizer("bart")
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(EngineError, match=r"E4\.7"):
        tokenization.prepare(tokenizer, ["#Person1#"], name="x", model_type="bart")
