"""Control over the scripts of the output: vocabulary masks made once from a tokenizer.

A token is judged by its bytes. Pieces of byte-level vocabularies may be parts of characters, and two harmless halves
can join into a blocked one, so:

* whole characters in a piece must all be permitted;
* a character that a piece begins but does not finish must be permitted *whatever* bytes follow (lead byte 0xEB is fine
  when Hangul is, for all of U+B000..BFFF is Hangul; 0xE3 alone may become Kana and is blocked with it, while 0xE3 0x85
  can only become a Hangul letter);
* bytes that finish a character begun by an earlier piece are always permitted: that piece has been judged.

So no sequence of permitted pieces can spell a blocked character, and the mask needs no state. What it costs are
spellings byte by byte of characters whose first byte is shared with a blocked script. With Qwen3's vocabulary and Latin
blocked these are 8 of the 11,172 Hangul syllables, all of them rare; the others have pieces of their own or begin with
a piece of two bytes.

Spared in any case: special tokens, added placeholders (`#Person1#`) and `keep_tokens`. A kept token that the tokenizer
splits is spared piece by piece, so its pieces may turn up elsewhere too: add placeholders to the tokenizer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache

import torch

SCRIPTS = (
    "hangul",
    "latin",
    "kana",
    "han",
    "cyrillic",
    "greek",
    "arabic",
    "hebrew",
    "thai",
    "devanagari",
    "digits",
    "punctuation",
    "emoji",
    "other",
)
_NAMED = {"CJK": "han", "IDEOGRAPHIC": "han", "HIRAGANA": "kana", "KATAKANA": "kana"} | {
    script.upper(): script for script in SCRIPTS[:10]
}
_PLACEHOLDER = re.compile(r"#\w+#")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_EMOJI_BLOCKS = ((0x1F000, 0x1FAFF), (0x2600, 0x27BF), (0xFE00, 0xFE0F), (0x200D, 0x200D))


def script_mask(
    tokenizer,
    vocab_size: int,
    *,
    block_scripts: Iterable[str] | None = None,
    allow_scripts: Iterable[str] | None = None,
    keep_tokens: Sequence[str] = (),
) -> torch.Tensor:
    """Additive mask `[vocab_size]`: 0 for permitted tokens, -inf for the others and for ids that no token has.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: width of the model's head (may exceed the tokenizer's size).
        block_scripts: names out of `SCRIPTS` that must not appear. Or else
        allow_scripts: the only names that may appear. White space always may.
        keep_tokens: strings to spare besides special tokens and placeholders.
    Raises: ValueError: for an unknown name, or unless exactly one of the two lists is given.
    """
    blocked = blocked_scripts(block_scripts, allow_scripts)
    mask = torch.full((vocab_size,), float("-inf"))
    pieces = _pieces(tokenizer)
    permitted = [i for i, piece in pieces.items() if i < vocab_size and not _can_spell(piece, blocked)]
    spared = _spared(tokenizer, keep_tokens)
    mask[torch.tensor(sorted({*permitted, *(i for i in spared if i < vocab_size)}), dtype=torch.long)] = 0.0
    return mask


def blocked_scripts(block: Iterable[str] | None, allow: Iterable[str] | None) -> frozenset[str]:
    """The names that must not appear, from either list. Raises ValueError as `script_mask` does."""
    if bool(block) == bool(allow):
        raise ValueError("give either block_scripts or allow_scripts")
    names = frozenset(block or allow)
    if unknown := sorted(names - set(SCRIPTS)):
        raise ValueError(f"unknown script {unknown[0]!r}: use {', '.join(SCRIPTS)}")
    return names if block else frozenset(SCRIPTS) - names


def keep_source_words(mask: torch.Tensor, tokenizer, sources: Sequence[str], blocked: frozenset[str]) -> torch.Tensor:
    """Masks `[B, V]`: `mask` `[V]`, with the pieces of each source's own blocked words (`Mr.`, `Smith`) spared.

    Pieces may join into words that the source does not have. Placeholders are no words. sources: B texts.
    """
    rows = mask.repeat(len(sources), 1)
    for row, source in zip(rows, sources, strict=True):
        words = {w for w in _PLACEHOLDER.sub(" ", source).split() if any(script_of(c) in blocked for c in w)}
        # A word's pieces differ after a space and at the start of a text.
        texts = [text for word in sorted(words) for text in (word, f" {word}", word.strip(".,!?;:\"'()[]"))]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ():
            row[torch.tensor([i for i in ids if i < mask.numel()], dtype=torch.long)] = 0.0
    return rows


@cache
def script_of(character: str) -> str:
    """One of `SCRIPTS`, or "" for white space and control characters."""
    category = unicodedata.category(character)
    code = ord(character)
    if any(low <= code <= high for low, high in _EMOJI_BLOCKS):
        return "emoji"
    if category in ("Zs", "Zl", "Zp", "Cc", "Cf"):
        return ""
    if category == "Nd":
        return "digits"
    if category[0] in "PS" or category == "No":
        return "punctuation"
    # Full-width, mathematical and roman-numeral forms are judged by the plain letter that they stand for.
    plain = unicodedata.normalize("NFKC", character)
    names = unicodedata.name(plain[0], "").replace("-", " ").split()
    return next((_NAMED[name] for name in names if name in _NAMED), "other")


# --- pieces as bytes ------------------------------------------------------------------------------------------------


def _pieces(tokenizer) -> dict[int, bytes]:
    """Bytes that each token id stands for."""
    vocabulary = tokenizer.get_vocab()
    added = set(tokenizer.get_added_vocab())
    alphabet = _byte_alphabet()
    byte_level = all(c in alphabet for token in vocabulary if token not in added for c in token)
    pieces = {}
    for token, i in vocabulary.items():
        if token in added:
            pieces[i] = token.encode()
        elif byte_level:
            pieces[i] = bytes(alphabet[c] for c in token)
        elif match := _BYTE_PIECE.fullmatch(token):
            pieces[i] = bytes([int(match[1], 16)])
        else:
            pieces[i] = token.replace("\u2581", " ").encode(errors="surrogatepass")
    return pieces


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins for the 256 bytes that byte-level vocabularies are written in (GPT-2's scheme).

    Printable Latin-1 bytes stand for themselves; the others follow from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(rest)}


def _can_spell(piece: bytes, blocked: frozenset[str]) -> bool:
    """Whether this piece, with any pieces around it, can put a blocked character into the text.

    Bytes at its start that only continue a character were judged with the piece that began it; a character cut short
    within the piece, and bytes that begin none, come out as U+FFFD.
    """
    with suppress(UnicodeDecodeError):  # nearly all pieces are whole characters, which are judged ten times as fast
        return any(script_of(character) in blocked for character in piece.decode())
    start = 0
    while start < len(piece):
        size = _length_of(piece[start])
        rest = piece[start + 1 : start + size]
        complete = next((n for n, byte in enumerate(rest) if byte & 0xC0 != 0x80), len(rest))
        if size and complete == len(rest):
            if not blocked.isdisjoint(_scripts_between(*_code_points(piece[start : start + size], size))):
                return True
        start += 1 + complete
    return False


def _length_of(lead: int) -> int:
    """Bytes of the UTF-8 character that begins with `lead`, 0 for a byte that begins none."""
    ends = ((0x80, 1), (0xC2, 0), (0xE0, 2), (0xF0, 3), (0xF5, 4))
    return next((size for end, size in ends if lead < end), 0)


def _code_points(part: bytes, size: int) -> tuple[int, int]:
    """First and last code point of which `part` is the beginning."""
    if size == 1:
        return part[0], part[0]
    value = part[0] & (0x7F >> size)
    for byte in part[1:]:
        value = value << 6 | byte & 0x3F
    open_bits = 6 * (size - len(part))
    return value << open_bits, min((value + 1 << open_bits) - 1, 0x10FFFF)


@cache
def _scripts_between(first: int, last: int) -> frozenset[str]:
    """Scripts of a code point, or of all assigned ones in a range."""
    if first == last:
        return frozenset({script_of(chr(first))})
    characters = map(chr, range(first, last + 1))
    return frozenset(script_of(c) for c in characters if unicodedata.category(c) not in ("Cn", "Cs"))


def _spared(tokenizer, keep_tokens: Sequence[str]) -> set[int]:
    spared = set(tokenizer.all_special_ids)
    spared |= {i for token, i in tokenizer.get_added_vocab().items() if _PLACEHOLDER.fullmatch(token)}
    for ids in tokenizer(list(keep_tokens), add_special_tokens=False)["input_ids"] if keep_tokens else ():
        spared |= set(ids)
    return spared
