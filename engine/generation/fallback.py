"""One `generate` call: our search where model and call are verified, transformers' own loop for all else.

What is handed back runs as if `generate` had been called without us: inputs as given, encoder and cache of its own, and
`generate`'s own words for what it refuses. Only what `generate` does not know is added: the scope of the repetition
rules, the vocabulary mask and the source of sampling draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation import logits_process as hf
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.modeling_outputs import BaseModelOutput

from engine.generation.encoder import encode
from engine.generation.processors import OutputOnly, VocabularyMask
from engine.generation.search import Decoded, HandedBack, Search, logger, unverified

_told: set[str] = set()


def decode(model: torch.nn.Module, arguments: dict[str, Any], search: Search, tokenizer: Any = None) -> Decoded:
    """`model.generate(**arguments)`, by `search` if it can. tokenizer: only `stop_strings` needs it."""
    arguments = arguments | {"return_dict_in_generate": True}
    strings = arguments.get("stop_strings") or model.generation_config.stop_strings
    reason = "stop strings" if strings else unverified(model)
    if reason is None:
        try:
            return model.generate(**arguments, **_encoded(model, arguments), custom_generate=search)
        except HandedBack as handed_back:
            reason = str(handed_back)
    _tell(reason)
    return _decode_in_transformers(model, arguments, search, strings, tokenizer)


def _encoded(model: torch.nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The encoder's states, where that is ours to compute."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if not model.config.is_encoder_decoder or ids is None or mask is None or "encoder_outputs" in arguments:
        return {}
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=encode(model, ids, mask))}


def _tell(reason: str) -> None:
    """Once per process and reason."""
    if reason not in _told:
        _told.add(reason)
        logger.warning("decoding is left to transformers, which is slower: %s", reason)


def _decode_in_transformers(model, arguments: dict[str, Any], search: Search, strings, tokenizer) -> Decoded:
    with _global_draws(search.generator):
        out = None
        if search.scope == "output" or search.vocabulary_mask is not None:
            try:
                out = model.generate(
                    **_with_own_criteria(arguments, strings, tokenizer), custom_generate=_TheirLoop(search)
                )
            except HandedBack:
                pass  # a mode without a loop in transformers: `generate` says so itself
        if out is None:
            out = model.generate(**arguments, tokenizer=tokenizer)
    prompt_length = 1 if model.config.is_encoder_decoder else _width(arguments)
    scores, indices = getattr(out, "sequences_scores", None), getattr(out, "beam_indices", None)
    return Decoded(out.sequences, scores, indices, prompt_length, native=False)


def _with_own_criteria(arguments: dict[str, Any], strings, tokenizer) -> dict[str, Any]:
    """`generate` makes the criteria of stop strings itself, but loses the tokenizer on its way to a loop of one's own."""
    if not strings or tokenizer is None:
        return arguments
    criteria = StoppingCriteriaList(
        [*(arguments.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)]
    )
    return arguments | {"stop_strings": None, "stopping_criteria": criteria}


def _width(arguments: dict[str, Any]) -> int:
    ids = arguments.get("input_ids")
    return 0 if ids is None else ids.shape[1]


class _TheirLoop:
    """transformers' loop of a call's mode, with our scope and vocabulary mask as ordinary processors."""

    def __init__(self, search: Search):
        self.search = search

    def __call__(self, model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        name = GENERATION_MODES_MAPPING[generation_config.get_generation_mode()]
        if not hasattr(type(model), name):
            raise HandedBack(name)
        return getattr(type(model), name)(
            model,
            input_ids,
            logits_processor=self._processors(logits_processor, input_ids),
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )

    def _processors(self, given, input_ids: torch.Tensor):
        processors = type(given)(given)
        if self.search.scope == "output":
            for i, processor in enumerate(processors):
                if isinstance(processor, (hf.RepetitionPenaltyLogitsProcessor, hf.NoRepeatNGramLogitsProcessor)):
                    processor.prompt_ignore_length = None
                    processors[i] = OutputOnly(processor, input_ids.shape[1])
        mask = self.search.vocabulary_mask
        if mask is not None:
            if mask.dim() == 2:
                mask = mask.repeat_interleave(input_ids.shape[0] // mask.shape[0], dim=0)
            processors.append(VocabularyMask(mask))
        return processors


@contextmanager
def _global_draws(generator: torch.Generator | None) -> Iterator[None]:
    """Let torch's global generator of that device draw from `generator`, and put it back where it was."""
    if generator is None:
        yield
        return
    if generator.device.type == "cuda":
        index = generator.device.index
        shared = torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]
    else:
        shared = torch.default_generator
    before = shared.get_state()
    shared.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(shared.get_state())
        shared.set_state(before)
