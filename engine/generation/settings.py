"""Generation settings: one place where a user's values, a model's own generation config and our rules meet."""

from __future__ import annotations

import copy
import logging
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

logger = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 100
_STRONGEST_PENALTY = 100  # a length to this power is still a float
_NAMES_OF_TOKENS = (
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    "sequence_bias",
)
_WRITTEN = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OURS = (
    *("repetition_scope", "block_scripts", "allow_scripts", "keep_source_words", "output_scores", "extra"),
    "cuda_graphs",
)


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of one decoding run, under the names that `transformers` gives them.

    None means "not set": the model's own generation config, then transformers' default, applies. Build one with
    `resolve`, which merges and checks; the constructor checks nothing.

    max_new_tokens: most tokens after the prompt. max_length: the same limit counted with the prompt (causal models) or
    with the decoder start (encoder-decoders); used only where max_new_tokens is None.
    repetition_scope: what `repetition_penalty` and `no_repeat_ngram_size` look at, "output" or "all" (prompt too).
    block_scripts, allow_scripts, keep_source_words: what `engine/prediction/constraints.py` turns into a vocabulary mask.
    cuda_graphs: decode on a CUDA GPU by replaying captured steps (see `graphs`).
    extra: further names of `generate` that transformers handles (`encoder_no_repeat_ngram_size`, `sequence_bias`, ...).
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    repetition_scope: str = "all"
    block_scripts: tuple[str, ...] = ()
    allow_scripts: tuple[str, ...] = ()
    keep_source_words: bool = False
    output_scores: bool = True
    cuda_graphs: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def resolve(
        cls, values: Mapping[str, Any], *, model_generation_config, is_encoder_decoder: bool
    ) -> GenerationSettings:
        """Merge a user's values over the model's own generation config, and check the result.

        Precedence is transformers': given value > model's config > default; a value of None counts as not given. A
        negative `forced_bos_token_id` / `forced_eos_token_id` switches off what the model forces.

        Args: values: settings by name. model_generation_config: the model's `GenerationConfig`.
        Raises: ValueError: one line with key and value, for an unknown name or an impossible value.
        """
        given = {name: value for name, value in values.items() if value is not None}
        own = {name for name in (f.name for f in fields(cls)) if name != "extra"}
        known = own | set(model_generation_config.to_dict())
        if unknown := sorted(set(given) - known - {"extra"}):
            raise ValueError(f"generation.{unknown[0]}: no such setting of `generate`")
        inherited = {n: v for n in own if (v := getattr(model_generation_config, n, None)) is not None}
        merged = inherited | {n: v for n, v in given.items() if n in own}
        _settle_lengths(merged, given)
        merged.setdefault("repetition_scope", "all" if is_encoder_decoder else "output")
        for name in ("block_scripts", "allow_scripts"):
            merged[name] = tuple(merged.get(name, ()))
        for name in ("temperature", "top_p", "length_penalty", "repetition_penalty"):
            if isinstance(merged.get(name), int):
                merged[name] = float(merged[name])
        extra = {n: v for n, v in given.items() if n not in own and n != "extra"} | dict(given.get("extra", {}))
        if isinstance(extra.get("sequence_bias"), (list, tuple)):  # transformers insists on floats
            extra["sequence_bias"] = [[list(ids), float(bias)] for ids, bias in extra["sequence_bias"]]
        settings = cls(**merged, extra=extra)
        _check(settings, given, is_encoder_decoder)
        return settings

    def describe(self, model_generation_config=None) -> dict[str, Any]:
        """Settings in force, without those left at None; with `model_generation_config`, also whatever else it sets."""
        shown = {}
        if model_generation_config is not None:
            shown.update(
                {k: v for k, v in model_generation_config.to_diff_dict().items() if k != "transformers_version"}
            )
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "extra" and value not in (None, ()):
                shown[f.name] = list(value) if isinstance(value, tuple) else value
        if _switched_off(self.forced_eos_token_id):
            shown["forced_eos_token_id"] = None
        if _switched_off(self.forced_bos_token_id):
            shown["forced_bos_token_id"] = None
        if self.max_new_tokens is not None:
            shown.pop("max_length", None)
        return shown | dict(self.extra)

    def check_token_ids(self, vocabulary: int, given: Container[str]) -> None:
        """Raises: ValueError: a token id that a model of this vocabulary does not have.

        Only what was `given` is looked at, and what is written into the output in any case: configurations name end tokens
        that their models lack, and nothing comes of it.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)} | dict(self.extra)
        bias = values.get("sequence_bias") or ()
        values["sequence_bias"] = [list(ids) for ids in bias] if isinstance(bias, dict) else [ids for ids, _ in bias]
        for name in (name for name in _NAMES_OF_TOKENS if name in given or name in _WRITTEN):
            if beyond := [token for token in _leaves(values.get(name)) if token >= vocabulary]:
                raise ValueError(f"generation.{name}: the model has no token {beyond[0]}, only 0 to {vocabulary - 1}")

    def new_token_limit(self, prompt_length: int) -> int:
        """Most new tokens after a prompt of `prompt_length` tokens (decoder start for encoder-decoders)."""
        return self.max_new_tokens if self.max_new_tokens is not None else self.max_length - prompt_length

    def generate_arguments(self, prompt_length: int) -> dict[str, Any]:
        """Keyword arguments for `model.generate`, given the width of the prompt in tokens.

        The limit is passed as max_length alone: next to a max_length in the model's config, max_new_tokens would make
        transformers warn at every batch about a choice that `resolve` has made.
        """
        arguments = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in _OURS and value is not None:
                arguments[f.name] = value
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            if _switched_off(arguments.get(name)):
                arguments[name] = None
        arguments["max_length"] = prompt_length + self.new_token_limit(prompt_length)
        arguments["max_new_tokens"] = None
        if self.num_beams == 1:  # these mean nothing then, and transformers would warn of any other value
            arguments |= {"early_stopping": False, "length_penalty": 1.0}
        if not self.do_sample and "penalty_alpha" not in self.extra:  # a chat model's own temperature, for one
            arguments |= dict.fromkeys(_OF_SAMPLING)
        return arguments | dict(self.extra)

    def written_into(self, model_generation_config: GenerationConfig) -> GenerationConfig:
        """A copy of the model's own config that says what these settings say, for a plain `generate` without arguments.

        What only our search knows (`_OURS`) is not in it, nor `stop_strings`, which need a tokenizer at each call.
        """
        made = copy.deepcopy(model_generation_config)
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OURS} | dict(self.extra)
        values |= self.generate_arguments(0) | {"max_new_tokens": self.max_new_tokens, "stop_strings": None}
        values["max_length"] = self.max_length if self.max_new_tokens is None else None  # of two, transformers warns
        if not self.do_sample:  # transformers does not save what has no effect
            values |= dict.fromkeys(_OF_SAMPLING)
        for name, value in values.items():
            setattr(made, name, value)
        return made


def _settle_lengths(merged: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Leave one upper limit in `merged`. A limit the user gave beats any that the model's config sets."""
    if "max_new_tokens" in given and "max_length" in given:
        logger.warning(
            "generation.max_new_tokens=%s and generation.max_length=%s are both set: max_new_tokens wins",
            given["max_new_tokens"],
            given["max_length"],
        )
        _positive("max_length", given["max_length"])
    if "max_length" in given and "max_new_tokens" not in given:
        merged.pop("max_new_tokens", None)
    elif "max_new_tokens" in merged:
        merged.pop("max_length", None)
    elif "max_length" not in merged:
        merged["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
    # The same for the lower limit: transformers lets min_new_tokens overwrite min_length.
    if "min_length" in given and "min_new_tokens" not in given:
        merged.pop("min_new_tokens", None)


def _check(s: GenerationSettings, given: Mapping[str, Any], is_encoder_decoder: bool) -> None:
    for name in ("max_new_tokens", "max_length", "num_beams", "num_return_sequences"):
        _positive(name, getattr(s, name))
    for name in ("min_new_tokens", "min_length", "top_k", "no_repeat_ngram_size"):
        value = getattr(s, name)
        if value is not None and (not _is_int(value) or value < 0):
            raise ValueError(f"generation.{name}={value!r}: must be a whole number, 0 or more")
    for name in ("repetition_penalty", "temperature"):
        value = getattr(s, name)
        if value is not None and not (_is_number(value) and value > 0):
            raise ValueError(f"generation.{name}={value!r}: must be greater than 0")
    if s.top_p is not None and not (_is_number(s.top_p) and 0 < s.top_p <= 1):
        raise ValueError(f"generation.top_p={s.top_p!r}: must be in (0, 1]")
    if not (_is_number(s.length_penalty) and abs(s.length_penalty) <= _STRONGEST_PENALTY):
        limit = _STRONGEST_PENALTY
        raise ValueError(f"generation.length_penalty={s.length_penalty!r}: must be a number from -{limit} to {limit}")
    for name in ("eos_token_id", "forced_eos_token_id", "bad_words_ids"):
        if getattr(s, name) == []:
            raise ValueError(f"generation.{name}=[]: must name a token")
    if s.early_stopping not in (True, False, "never"):
        raise ValueError(f"generation.early_stopping={s.early_stopping!r}: must be true, false or 'never'")
    if s.repetition_scope not in ("output", "all"):
        raise ValueError(f"generation.repetition_scope={s.repetition_scope!r}: must be 'output' or 'all'")
    if not s.do_sample and s.num_return_sequences > s.num_beams:
        raise ValueError(f"generation.num_return_sequences={s.num_return_sequences}: more than num_beams={s.num_beams}")
    _check_order(s, given, is_encoder_decoder)


def _check_order(s: GenerationSettings, given: Mapping[str, Any], is_encoder_decoder: bool) -> None:
    """A lower limit above the upper one is an error; its message says so if the model's config set it."""
    if s.max_new_tokens is not None:
        upper_name, upper, lower = "max_new_tokens", s.max_new_tokens, s.min_new_tokens
    else:
        upper_name, upper = "max_length", s.max_length
        start = 1 if is_encoder_decoder else 0
        lower = None if s.min_new_tokens is None else s.min_new_tokens + start
    pairs = [("min_new_tokens", lower, s.min_new_tokens)]
    if s.min_new_tokens is None and (s.max_new_tokens is None or is_encoder_decoder):
        start = 0 if s.max_new_tokens is None else 1
        pairs.append(("min_length", None if s.min_length is None else s.min_length - start, s.min_length))
    for name, limit, shown in pairs:
        if limit is not None and limit > upper:
            source = "" if name in given else " (set by the model's generation config)"
            raise ValueError(f"generation.{name}={shown}{source}: more than {upper_name}={upper}")


def _positive(name: str, value: Any) -> None:
    if value is not None and (not _is_int(value) or value < 1):
        raise ValueError(f"generation.{name}={value!r}: must be a whole number, 1 or more")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _leaves(value: Any) -> Iterator[int]:
    """Whole numbers in a value of nested lists."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif _is_int(value):
        yield value


def _switched_off(token_id: Any) -> bool:
    return _is_int(token_id) and token_id < 0
