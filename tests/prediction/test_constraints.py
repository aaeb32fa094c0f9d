"""Script masks: characters, parts of characters, placeholders, source words; on real vocabularies where at hand."""

from __future__ import annotations

import os
import random
import re
import unicodedata

import pytest
import torch
from generation_toys import (
    build,
    one_thread,  # noqa: F401
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.generation.api import generate
from engine.generation.settings import GenerationSettings
from engine.prediction import constraints as rules

BLOCK = {"block_scripts": ["latin", "kana", "han"]}
ALLOW = {"allow_scripts": ["hangul", "digits", "punctuation"]}


@pytest.fixture(scope="module", params=[pytest.param("qwen3", marks=pytest.mark.slow), "kobart"])
def tokenizer(request, shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / request.param)


@pytest.fixture(scope="module")
def qwen(shared_data):
    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen3")


_MASKS: dict[tuple, torch.Tensor] = {}


def mask_of(tokenizer, **lists) -> torch.Tensor:
    """The mask as wide as the tokenizer, made once: Qwen3's 150,000 pieces take seconds. Nobody writes into it."""
    key = (tokenizer.name_or_path, len(tokenizer), *lists)
    if key not in _MASKS:
        _MASKS[key] = rules.script_mask(tokenizer, len(tokenizer), **lists)
    return _MASKS[key]


def foreign(text: str, blocked: frozenset[str]) -> list[str]:
    return [c for c in text if rules.script_of(c) in blocked and unicodedata.category(c) != "Cn" and c != "\ufffd"]


@pytest.mark.parametrize(
    ("script", "characters"),
    [
        ("hangul", "가힣ㄱㅋ\u1100ㅠ"),
        ("latin", "aZéßＡｚⅣªĸ\u212a𝐀"),
        ("kana", "あアｱーゝ"),
        ("han", "漢字々〇豈"),
        ("cyrillic", "Жя"),
        ("greek", "Ωπ"),
        ("arabic", "ع"),
        ("hebrew", "א"),
        ("thai", "ไ"),
        ("devanagari", "ह"),
        ("digits", "07９٣"),
        ("punctuation", ".,?!~%+=$₩“”·…。、℃①#"),
        ("emoji", "😀🇰☀✅"),
        ("", " \n\t\u3000\u200b"),
    ],
)
def test_script_of(script, characters):
    assert {c: rules.script_of(c) for c in characters} == dict.fromkeys(characters, script)


@pytest.mark.parametrize(
    ("piece", "can"),
    [
        ("가".encode(), False),
        (b"a", True),
        ("가a".encode(), True),
        (b"\xeb", False),  # lead byte of Hangul alone
        (b"\xea", True),  # may become Latin Extended-D
        (b"\xea\xb0", False),  # can only become Hangul
        (b"\xe3", True),  # may become Kana
        (b"\xe3\x85", False),  # can only become a Hangul letter
        (b"\xe3\x81", True),  # Hiragana
        (b"\xe4", True),  # Han
        (b"\xc3", True),  # Latin-1 letters
        (b"\x80", False),  # the end of what an earlier piece began
        (b"\x80\xbf.", False),
        (b"\x80a", True),
        (b"\xf0\x9f", False),  # emoji
        (b"\xf0", True),  # may become Han
        (b"\xeb\x80.\xec", False),
        (b"\xe3.", False),  # cut short: no character at all
        (b"\xff", False),
    ],
)
def test_parts_of_characters(piece, can):
    assert rules._can_spell(piece, frozenset({"latin", "kana", "han"})) is can


@pytest.mark.parametrize("arguments", [{}, BLOCK | ALLOW, {"block_scripts": ["klingon"]}, {"allow_scripts": []}])
def test_wrong_lists(arguments):
    with pytest.raises(ValueError):
        rules.blocked_scripts(arguments.get("block_scripts"), arguments.get("allow_scripts"))


@pytest.mark.parametrize("lists", [BLOCK, ALLOW])
def test_permitted_pieces_never_join_into_foreign_letters(tokenizer, lists):
    blocked = rules.blocked_scripts(lists.get("block_scripts"), lists.get("allow_scripts"))
    mask = mask_of(tokenizer, **lists)
    pieces = rules._pieces(tokenizer)
    special = set(tokenizer.all_special_ids)
    permitted = [p for i, p in pieces.items() if mask[i] == 0 and i not in special]
    parts = [p for p in permitted if "\ufffd" in p.decode(errors="replace")] or permitted
    draw = random.Random(0)
    for pool in (parts, permitted):
        for _ in range(10_000):
            text = b"".join(draw.choices(pool, k=8)).decode(errors="replace")
            assert not foreign(text, blocked), text


def test_hangul_can_still_be_written(tokenizer):
    mask = mask_of(tokenizer, **BLOCK)
    syllables = [chr(code) for code in range(0xAC00, 0xD7A4)]
    encoded = tokenizer(syllables, add_special_tokens=False)["input_ids"]
    lost = [c for c, ids in zip(syllables, encoded, strict=True) if any(mask[i] < 0 for i in ids)]
    assert len(lost) <= 8, lost


def test_placeholders_and_special_tokens_are_spared(tokenizer):
    tokenizer.add_tokens(["#Person1#", "#PhoneNumber#"])
    mask = rules.script_mask(tokenizer, len(tokenizer) + 7, **ALLOW)
    assert all(mask[i] == 0 for i in tokenizer.convert_tokens_to_ids(["#Person1#", "#PhoneNumber#"]))
    assert all(mask[i] == 0 for i in tokenizer.all_special_ids)
    assert (mask[len(tokenizer) :] < 0).all()
    (split,) = tokenizer(["LOL"], add_special_tokens=False)["input_ids"]
    assert any(mask[i] < 0 for i in split)
    kept = rules.script_mask(tokenizer, len(tokenizer), **ALLOW, keep_tokens=["LOL"])
    assert all(kept[i] == 0 for i in split)


def test_words_of_the_source(qwen):
    mask = mask_of(qwen, **BLOCK)
    blocked = rules.blocked_scripts(**{"block": BLOCK["block_scripts"], "allow": None})
    sources = ["#Person1#: Mr. Smith는 어디 있나요?", "#Person2#: 여기 있어요."]
    rows = rules.keep_source_words(mask, qwen, sources, blocked)
    for word in ("Mr.", " Mr.", " Smith"):
        ids = qwen(word, add_special_tokens=False)["input_ids"]
        assert all(rows[0, i] == 0 for i in ids)
        assert any(rows[1, i] < 0 for i in ids)
    assert torch.equal(rows[1], mask)
    assert rows[0].ne(mask).sum() < 20


def generations(tokenizer, count: int, rows: int, **lists) -> list[str]:
    """Samples of a random model with that vocabulary: nothing but the mask keeps it from any token."""
    model = build("qwen3", vocab_size=len(tokenizer), hidden_size=16, head_dim=4, num_hidden_layers=1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    mask = mask_of(tokenizer, **lists)
    settings = GenerationSettings(
        do_sample=True, top_k=0, temperature=2.0, max_new_tokens=10, num_return_sequences=rows
    )
    generator = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(count // rows):
        prompt = torch.randint(0, 1000, (1, 4), generator=generator)
        out = generate(model, prompt, torch.ones_like(prompt), settings, vocabulary_mask=mask, generator=generator)
        texts += tokenizer.batch_decode(out.sequences, skip_special_tokens=True)
    return texts


@pytest.mark.parametrize(
    ("count", "lists"),
    [
        (20, BLOCK),
        pytest.param(60, ALLOW, marks=pytest.mark.slow),
        pytest.param(1000 if "FULL_TESTS" in os.environ else 200, BLOCK, marks=pytest.mark.slow),
    ],
)
def test_no_foreign_letters_in_random_output(qwen, count, lists):
    qwen.add_tokens(["#Person1#", "#Person2#"])
    blocked = rules.blocked_scripts(lists.get("block_scripts"), lists.get("allow_scripts"))
    texts = generations(qwen, count, 20, **lists)
    assert len(texts) == count
    for text in texts:
        assert not foreign(re.sub(r"#\w+#", "", text), blocked), text


def test_a_vocabulary_with_byte_pieces():
    """SentencePiece's way: words with a mark for the space, and single bytes as a last resort."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    pieces = ["<unk>", "\u2581안녕", "hello", "漢", "<0xE3>", "<0xEB>", "<0x80>", "1", "#"]
    inner = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    permitted = [p for p, value in zip(pieces, rules.script_mask(tokenizer, 9, **BLOCK), strict=True) if value == 0]
    assert permitted == ["<unk>", "\u2581안녕", "<0xEB>", "<0x80>", "1", "#"]
