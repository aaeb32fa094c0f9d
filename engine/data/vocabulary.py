"""A tokenizer for a model that starts from nothing: SentencePiece trained on the dialogues, as a fast tokenizer."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from engine.errors import EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of tokenizers trained here, with the ids 0 to 3 in this order.
SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
DEFAULT_VOCABULARY = 8000
_BYTES = 256  # byte pieces that stand in for characters outside the vocabulary
_MAX_TRAINING_SENTENCES = 2_000_000


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocabulary_size: int | None = None,
    kind: str = "unigram",
    added_tokens: Sequence[str] = (),
    causal: bool,
) -> PreTrainedTokenizerFast:
    """Train SentencePiece on `texts`, wrapped as a fast tokenizer; the same texts give the same tokenizer.

    Characters outside the vocabulary are spelled in UTF-8 bytes, newlines are kept, text is brought to Unicode NFKC.

    Args:
        vocabulary_size: bytes, special and added tokens included; lower where the texts do not hold that many pieces.
        kind: unigram or bpe.
        causal: begin each text with `<s>`; otherwise end each source with `</s>`.

    Raises:
        EngineError: E3.33 where there is no text to train on, E2.55 where the vocabulary is too small for it.
    """
    sentences = _training_sentences(texts, added_tokens)
    if not sentences:
        raise EngineError("E3.33", "no text to train a tokenizer on", "data.train_file", "check the file")
    wanted = (vocabulary_size or DEFAULT_VOCABULARY) - len(added_tokens) - 1  # and the newline
    too_small = f"tokenizer.train_vocab_size={vocabulary_size} is too small"
    if wanted < len(SPECIAL_TOKENS) + _BYTES + 1:
        least = len(SPECIAL_TOKENS) + _BYTES + len(added_tokens) + 2
        what = f"{too_small}: bytes, special and added tokens alone take {least}"
        raise EngineError("E2.55", what, "recipe", "raise it")
    characters = len(set("".join(sentences)))
    # Cover all characters where there is room, else the frequent ones; the rest is spelled in bytes.
    coverage = 1.0 if characters < (wanted - _BYTES) // 2 else 0.9995
    try:
        model = _train_pieces(sentences, kind, wanted, coverage)
    except RuntimeError as error:  # its only word on a vocabulary without room for the characters
        what = f"{too_small} for the {characters} characters of the texts"
        raise EngineError("E2.55", what, "recipe", "raise it") from error
    return _fast_tokenizer(model, kind, added_tokens, causal)


def _train_pieces(sentences: list[str], kind: str, size: int, coverage: float) -> bytes:
    """A SentencePiece model of `size` pieces. Raises: RuntimeError where they are too few for the characters."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type=kind,
        vocab_size=size,
        character_coverage=coverage,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",  # done by the fast tokenizer's own normaliser and by _training_sentences
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentence_length=65536,
        num_threads=1,  # more threads add up frequencies in another order
        minloglevel=2,
        **{f"{name}_id": place for place, name in enumerate(("pad", "unk", "bos", "eos"))},
        **{f"{name}_piece": SPECIAL_TOKENS[f"{name}_token"] for name in ("pad", "unk", "bos", "eos")},
    )
    return model.getvalue()


def _training_sentences(texts: Iterable[str], added_tokens: Sequence[str]) -> list[str]:
    """Texts cut where the tokenizer will cut them, at newlines and added tokens; a text's first word gets a space."""
    sentences: list[str] = []
    for text in texts:
        marked = " " + unicodedata.normalize("NFKC", text).replace("\r\n", "\n").strip()
        for token in added_tokens:
            marked = marked.replace(token, "\n")
        sentences += [line for line in marked.split("\n") if line.strip()]
    return sentences[:_MAX_TRAINING_SENTENCES]


def _fast_tokenizer(model: bytes, kind: str, added_tokens: Sequence[str], causal: bool) -> PreTrainedTokenizerFast:
    """The SentencePiece model as a `tokenizers` pipeline with the same segmentation."""
    import sentencepiece
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    scored = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    if kind == "unigram":
        core = models.Unigram(scored, unk_id=1, byte_fallback=True)
    else:
        ids = {piece: i for i, (piece, _) in enumerate(scored)}
        core = models.BPE(ids, _merges(scored, ids), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(core)
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\r\n", "\n")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=True),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme="first", split=True), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS.values()])
    backend.add_tokens([AddedToken(token, normalized=False) for token in ("\n", *added_tokens)])
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A" if causal else "$A </s>",
        pair="<s> $A $B" if causal else "$A $B </s>",
        special_tokens=[("<s>", bos), ("</s>", eos)],
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL_TOKENS)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def _merges(scored: Sequence[tuple[str, float]], ids: dict[str, int]) -> list[tuple[str, str]]:
    """BPE merges of a SentencePiece vocabulary: every way to build a piece of two others, best-scored piece first."""
    merges = []
    for piece, score in scored:
        if piece.startswith("<") and piece.endswith(">"):
            continue
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in ids and piece[i:] in ids]
        halves.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(-score, pair) for pair in halves]
    return [pair for _, pair in sorted(merges, key=lambda entry: entry[0])]
