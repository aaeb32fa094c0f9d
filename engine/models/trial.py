"""A short dialogue through a model that has just been loaded, from its template to a decoded token.

Files can be wrong in ways that loading does not see: a length that is text, a bias that is no number, a probability of -1, a
template that writes no text or never ends. They show here, in milliseconds and with the folder's name, and not hours later
in an evaluation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from engine.data.rows import Example
from engine.errors import DATA, EngineError
from engine.generation.api import generate_all
from engine.generation.settings import GenerationSettings
from engine.models import adapters, configuration
from engine.runtime import bounded

if TYPE_CHECKING:
    from engine.models.bundle import ModelBundle

_DIALOGUE = "#Person1#: 안녕하세요?\n#Person2#: 네."
_TOKENS = 8  # of the prompt that the model reads
_TURNS = 200  # what a template does only with long dialogues shows here too
_APPETITE = {"seconds": 2, "mebibytes": 512}  # of a template; real ones take milliseconds
_ONE_TOKEN = {"max_new_tokens": 1, "num_beams": 1, "num_return_sequences": 1, "do_sample": False}


@torch.no_grad()
def try_out(bundle: ModelBundle) -> None:
    """Render, tokenise, decode one token and turn it back into text. Leaves no trace in the model.

    Raises: whatever goes wrong; the caller stands inside `faults.blaming`.
    """
    encoder = bundle.text_encoder()
    encoder = replace(encoder, max_source_length=1 << 30)  # whether a prompt fits is a question for each dialogue
    _try_template(encoder)
    ids = _prompt(encoder)
    room, _ = configuration.most_tokens(bundle.model, bundle.family)
    was_training = bundle.model.training
    try:
        token_ids = _decode(bundle, ids[: int(min(room - 1, _TOKENS))])
    finally:
        bundle.model.train(was_training)
    encoder.decode(token_ids)


def _try_template(encoder: Any) -> None:
    """A chat template is a program of somebody else's: whether it ends is found out where it can do no harm."""
    if encoder.settings.style != "chat":
        return
    dialogues = (_DIALOGUE, "\n".join([_DIALOGUE] * (_TURNS // 2)))
    if fault := bounded.fault_of(lambda: [encoder.prompt_text(text) for text in dialogues], **_APPETITE):
        what, where = f"the chat template cannot be used: it {fault}", encoder.tokenizer.name_or_path
        raise EngineError("E4.18", what, where, "mend it, or set prompt.style=instruction")


def _prompt(encoder: Any) -> list[int]:
    example = Example(id="trial", dialogue=_DIALOGUE, references=(), topic=None, row=1)
    try:
        return encoder.prompt_feature(example, 0).input_ids
    except EngineError as error:
        if error.exit_code != DATA:
            raise
        raise ValueError(f"a dialogue of two turns has no token: {error.what}") from error


def _decode(bundle: ModelBundle, ids: list[int]) -> list[int]:
    model = bundle.model.eval()
    if getattr(model.config, "attention_type", None) == "block_sparse":
        return ids  # a text this short turns BigBird to full attention for good
    try:
        settings = GenerationSettings.resolve(
            _ONE_TOKEN, model_generation_config=model.generation_config, is_encoder_decoder=bundle.family == "seq2seq"
        )
    except ValueError:
        return ids  # a setting out of its range, which the user's own may replace: the summarizer judges what is left
    pad = bundle.tokenizer.pad_token_id
    # Adapters are float32 on a base in the compute type; only autocast brings them together.
    dtype = adapters.DTYPES[bundle.report["precision"]]
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
        ((best, *_),) = generate_all(model, [ids], settings, pad_token_id=pad, tokenizer=bundle.tokenizer)
    return best.token_ids
