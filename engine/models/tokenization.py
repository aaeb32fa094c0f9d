"""Tokenizers: load one or train one, keep placeholder tokens whole, and give back the text that went in.

What the rest relies on, checked here at start-up: there is an end token and a pad token; an added token is one id, not
a special one; and `decode(encode(text)) == text` around added tokens, `#Person1#는` and not `#Person1# 는`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.vocabulary import train_tokenizer
from engine.errors import EngineError
from engine.models import hub
from engine.runtime.atomic import storage_error
from engine.runtime.faults import blaming

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.recipe.schema import Recipe

log = logging.getLogger("engine.models")


def for_recipe(recipe: Recipe, model_folder: Path | None, family: str) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer, or the model's, or one trained on the training file for a random model."""
    settings = recipe.tokenizer
    if settings.name_or_path is not None:
        return load_tokenizer(hub.resolve(settings.name_or_path, weights=False))
    random, train = recipe.model.init == "random", settings.train_vocab_size
    if train and not random:
        what = "a pretrained model keeps its own tokenizer"
        raise EngineError("E2.50", what, "tokenizer.train_vocab_size", "drop it, or set model.init=random")
    if not random or (model_folder is not None and has_tokenizer(model_folder) and not train):
        return load_tokenizer(model_folder, trust_remote_code=recipe.model.trust_remote_code)
    return train_tokenizer(
        _training_texts(recipe),
        vocabulary_size=settings.train_vocab_size,
        kind=settings.train_model_type,
        added_tokens=settings.added_tokens,
        causal=family == "causal",
    )


def has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any((folder / name).is_file() for name in names)


def _training_texts(recipe: Recipe) -> Iterator[str]:
    from engine.data.rows import read_examples

    settings = recipe.data
    for example in read_examples(settings.train_file, settings, require_summary=True):
        yield from (example.dialogue, example.references[0])


def with_added_tokens(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], model_type: str
) -> tuple[PreTrainedTokenizerFast, dict[int, list[int]]]:
    """The tokenizer prepared for training with `tokens` in it, and for each new id the ids that it was spelled with."""
    known = tokenizer.get_vocab()
    spelled = {token: tokenizer.encode(token, add_special_tokens=False) for token in tokens if token not in known}
    name = tokenizer.name_or_path or "trained here"
    tokenizer = prepare(tokenizer, tokens, name=name, model_type=model_type)
    return tokenizer, {tokenizer.convert_tokens_to_ids(token): ids for token, ids in spelled.items()}


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder.

    `tokenizer.json` is taken as it stands: transformers' tokenizer classes rebuild parts of it from fixed rules, which
    turns some Korean tokenizers (byte-level BPE under a T5 class) into other ones.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with blaming("E4.12", "no usable tokenizer", folder, "set tokenizer.name_or_path"):
        if (folder / "tokenizer.json").is_file() and not trust_remote_code:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    tokenizer.clean_up_tokenization_spaces = False  # it would turn " ." into "." in decoded Korean text as well
    return tokenizer


def prepare(
    tokenizer: PreTrainedTokenizerFast, added_tokens: Sequence[str], *, name: str, model_type: str | None = None
) -> PreTrainedTokenizerFast:
    """Give the tokenizer a pad token and the added tokens, and make sure that both do what training relies on.

    Args:
        name: what error messages call the tokenizer.
        model_type: of the config that will lie beside the tokenizer; it decides which class AutoTokenizer picks.

    Raises:
        EngineError: E4.6 without an end token, E4.7 where text around added tokens does not survive.
    """
    ensure_end_and_pad(tokenizer, name)
    add_tokens(tokenizer, added_tokens)
    if any(token in tokenizer.get_added_vocab() for token in added_tokens):
        tokenizer = _keep_spacing_around_added_tokens(tokenizer)
    check_round_trip(tokenizer, added_tokens, name)
    return _as_reloadable(tokenizer, added_tokens, name, model_type)


def ensure_end_and_pad(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """An end token is needed; for a missing pad token the unknown or the end token stands in."""
    if tokenizer.eos_token_id is None:
        what = "the tokenizer has no end token, so a model could never learn to stop"
        raise EngineError("E4.6", what, name, "choose another tokenizer, or add eos_token to its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id
        tokenizer.pad_token = tokenizer.unk_token if unknown else tokenizer.eos_token
        log.info("tokenizer %s has no pad token; using %r", name, tokenizer.pad_token)


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> None:
    """Add the tokens that are not yet a single id, as ordinary tokens: special ones would vanish from summaries."""
    from transformers import AddedToken

    known, registered = tokenizer.get_vocab(), tokenizer.added_tokens_encoder
    added = [AddedToken(token, normalized=False, special=False) for token in tokens if token not in registered]
    # Tokens of the vocabulary itself are registered too: before, they were found only where the merges led there.
    tokenizer.add_tokens([token for token in added if token.content in known])
    tokenizer.add_tokens([token for token in added if token.content not in known])


def _keep_spacing_around_added_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Word-start marks only at the start of the text, so that no space appears behind an added token.

    SentencePiece-style tokenizers put a mark before every stretch of text; an added token splits the text, and the
    particle behind it would come back as a new word.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if not _prepend_only_first(state):
        return tokenizer
    return _as_plain_class(tokenizer, Tokenizer.from_str(json.dumps(state)))


def _prepend_only_first(state: dict[str, Any]) -> bool:
    """Edit a serialised tokenizer in place; True where something had to change."""
    before = json.dumps([state["pre_tokenizer"], state["decoder"], state["normalizer"]])
    for part in ("pre_tokenizer", "decoder"):
        for step in _steps(state[part]):
            if step["type"] == "Metaspace" and step.get("prepend_scheme") == "always":
                step["prepend_scheme"] = "first"
    steps = _steps(state["pre_tokenizer"])
    kinds = [step["type"] for step in steps]
    if "Metaspace" in kinds and "WhitespaceSplit" in kinds:
        # Splitting at white space drops it, and the marks of later words with it; fold it to single spaces instead.
        state["pre_tokenizer"] = next(step for step in steps if step["type"] == "Metaspace")
        fold = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
        state["normalizer"] = {"type": "Sequence", "normalizers": [*_steps(state["normalizer"]), fold]}
    return json.dumps([state["pre_tokenizer"], state["decoder"], state["normalizer"]]) != before


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = next(part[key] for key in ("pretokenizers", "decoders", "normalizers") if key in part)
        return [step for child in inner for step in _steps(child)]
    return [part]


def _as_plain_class(tokenizer: PreTrainedTokenizerFast, backend: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer as a class that loads `tokenizer.json` as it stands; other classes rebuild their own."""
    from transformers import PreTrainedTokenizerFast

    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    special = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name, None) is not None}
    extra = [token for token in tokenizer.all_special_tokens if token not in special.values()]
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=extra,
        **special,
    )
    plain.chat_template = tokenizer.chat_template
    plain.name_or_path = tokenizer.name_or_path
    plain.model_input_names = ["input_ids", "attention_mask"]
    return plain


def check_round_trip(tokenizer: PreTrainedTokenizerFast, added_tokens: Sequence[str], name: str) -> None:
    """Every added token is one id, ordinary, and the text around it comes back letter for letter.

    Raises:
        EngineError: E4.7
    """
    unknown = tokenizer.unk_token_id
    for token in added_tokens:
        for text in (f"{token}는 {token}에게 말한다.", f"a {token}b {token}"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if unknown is not None and unknown in ids:
                continue  # letters outside the vocabulary are lost with or without added tokens
            back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if ids.count(tokenizer.convert_tokens_to_ids(token)) != 2 or back.strip() != text:
                what = f"added token {token!r} does not survive: {text!r} comes back as {back!r}"
                advice = "take the token out of tokenizer.added_tokens, or use another tokenizer"
                raise EngineError("E4.7", what, f"tokenizer of {name}", advice)


def _as_reloadable(
    tokenizer: PreTrainedTokenizerFast, added_tokens: Sequence[str], name: str, model_type: str | None
) -> PreTrainedTokenizerFast:
    """Make sure that AutoTokenizer alone, from a saved folder, gives this very tokenizer."""
    if _reloads_alike(tokenizer, added_tokens, model_type):
        return tokenizer
    plain = _as_plain_class(tokenizer, copy.deepcopy(tokenizer.backend_tokenizer))
    if not _reloads_alike(plain, added_tokens, model_type):
        what = "the tokenizer does not come back the same from a saved folder"
        raise EngineError("E4.7", what, f"tokenizer of {name}", "use another tokenizer")
    return plain


def _reloads_alike(tokenizer: PreTrainedTokenizerFast, added_tokens: Sequence[str], model_type: str | None) -> bool:
    from transformers import AutoTokenizer

    tags = "".join(f"{token}는 {token}: " for token in added_tokens[:4])
    probe = f"{tags}안녕하세요, 오늘 3시에 만나요.\nHello  world! 뷁 …"
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            if model_type is not None:
                (Path(folder) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
            again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers tells a full disk by a plain Exception
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        place, free = Path(os.environ.get("TMPDIR", "/tmp")), "set TMPDIR to a folder with some room, then run again"
        raise storage_error(error, place, "writing a temporary file", "nothing was started", free) from error
    same_ids = again(probe)["input_ids"] == tokenizer(probe)["input_ids"]
    ids = tokenizer.encode(probe, add_special_tokens=False)
    same_text = again.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
    ends = (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return same_ids and same_text and ends and len(again) == len(tokenizer)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of everything that decides token ids: vocabulary, merges, added tokens, normalisation, chat template."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    parts |= {"truncation": None, "padding": None, "chat_template": tokenizer.chat_template}  # set per call, not fixed
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
