"""A model with all that must stay with it, and the folder it is saved as.

What differs between encoder-decoders and causal LMs leaves this package as data: `ModelBundle.family` and `.collate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.data.collate import collate_causal, collate_seq2seq
from engine.data.encode import TextEncoder
from engine.data.prompts import PromptSettings
from engine.generation.modelstate import bare
from engine.models import adapters, configuration, hub, weights
from engine.models.hub import BaseIdentity
from engine.runtime.atomic import write_json_atomically

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    from engine.data.encode import Feature
    from engine.recipe.schema import Recipe

PROMPT_FILE = "prompt_settings.json"
LENGTHS = ("max_source_length", "max_target_length")


@dataclass
class ModelBundle:
    """A model and all that must stay with it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    family: str  # "seq2seq" or "causal"
    base: BaseIdentity
    report: dict[str, Any]
    prompt: PromptSettings
    lengths: dict[str, int]  # max_source_length, max_target_length
    quantization: dict[str, Any] | None = None  # settings of a 4-bit base
    prompt_is_known: bool = True  # False: a foreign folder, whose training prompt nobody told

    def __post_init__(self) -> None:
        self.set_lengths()

    def set_lengths(self, **changed: int) -> None:
        """Change `lengths`, as far as the model's position embeddings reach."""
        self.lengths = configuration.fit_lengths(self.lengths | changed, self.model, self.family)

    @property
    def generation_config(self) -> GenerationConfig:
        return self.model.generation_config

    @property
    def collate(self) -> Callable[[list[Feature]], dict[str, Tensor]]:
        """The family's collator: features -> padded batch (B, S), (B, T)."""
        pad = self.tokenizer.pad_token_id
        if self.family == "causal":
            return partial(collate_causal, pad_token_id=pad)
        start = self.model.config.decoder_start_token_id
        return partial(collate_seq2seq, pad_token_id=pad, decoder_start_token_id=start)

    def text_encoder(self) -> TextEncoder:
        """Dialogues to token ids and back, with this model's prompt settings and lengths."""
        return TextEncoder(tokenizer=self.tokenizer, family=self.family, settings=self.prompt, **self.lengths)

    def prompt_record(self) -> dict[str, Any]:
        """What PROMPT_FILE holds: the settings under which the model was trained, and their fingerprint."""
        return {
            "prompt": self.prompt.to_dict(),
            "data": self.lengths,
            "fingerprint": self.prompt.fingerprint(self.tokenizer.chat_template),
        }


def prompt_of(recipe: Recipe) -> tuple[PromptSettings, dict[str, int]]:
    """How a recipe prompts its model: the settings, and the lengths that texts are cut to."""
    return PromptSettings(**recipe.prompt.model_dump()), {name: getattr(recipe.data, name) for name in LENGTHS}


def describe(
    model: nn.Module, vocabulary_before: int, vocabulary: int, device: torch.device, precision: str
) -> dict[str, Any]:
    """The start-up report: parameters, vocabulary, device and precision."""
    parameters = list(model.parameters())
    return {
        "model_type": model.config.model_type,
        "parameters": sum(_count(p) for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "vocabulary_before": vocabulary_before,
        "vocabulary": vocabulary,
        "embedding_rows": model.get_input_embeddings().weight.shape[0],
        "device": str(device),
        "precision": precision,
        "quantized": adapters.is_4bit(model),
    }


def _count(parameter: nn.Parameter) -> int:
    """Weights of a parameter; two 4-bit weights share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def save_model(bundle: ModelBundle, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write a model or PEFT adapter folder that Hugging Face classes load without this package. safetensors only.

    Args:
        state_dict: weights to write in place of the live ones, which may be moving on.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with weights.quiet_transformers():
        save_weights(bundle, folder, state_dict)
        bundle.tokenizer.save_pretrained(folder)
    write_json_atomically(folder / PROMPT_FILE, bundle.prompt_record(), durable=False)


def save_weights(bundle: ModelBundle, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    model = bare(bundle.model)
    if weights.is_adapted(model):
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=state_dict)
        (folder / "README.md").unlink(missing_ok=True)  # peft's model card has no content of its own
        model.generation_config.save_pretrained(folder)
        record = bundle.base.to_dict() | {"quantization": bundle.quantization}
        write_json_atomically(folder / hub.BASE_FILE, record, durable=False)
    else:
        model.save_pretrained(folder, state_dict=state_dict)
