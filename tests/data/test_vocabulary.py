"""Tokenizers trained here give every text back, and cut as SentencePiece does."""

from __future__ import annotations

import pytest
import tiny
from built import SPOKEN

from engine.data import vocabulary
from engine.recipe.schema import PLACEHOLDERS


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_trained_tokenizer_gives_every_text_back(kind):
    tokenizer = vocabulary.train_tokenizer(
        tiny.TEXTS, vocabulary_size=420, kind=kind, added_tokens=PLACEHOLDERS, causal=False
    )
    for text in [*tiny.TEXTS, SPOKEN, "뷁쉙 😀 café\n\nend", "a  b   c", "#Person1# #Person2#"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_trained_tokenizer_cuts_like_sentencepiece(kind, monkeypatch):
    import sentencepiece

    kept = {}
    original = vocabulary._fast_tokenizer
    monkeypatch.setattr(
        vocabulary, "_fast_tokenizer", lambda model, *rest: kept.update(model=model) or original(model, *rest)
    )
    tokenizer = vocabulary.train_tokenizer(tiny.TEXTS, vocabulary_size=420, kind=kind, causal=False)
    reference = sentencepiece.SentencePieceProcessor(model_proto=kept["model"])
    for text in tiny.TEXTS:
        line = text.replace("\n", " ").replace("#", "")
        assert tokenizer.encode(line, add_special_tokens=False) == reference.encode(" " + line)
