"""Text encoders over small tokenizers, and an example to encode, for tests."""

from __future__ import annotations

import tiny

from engine.data.encode import TextEncoder
from engine.data.prompts import PromptSettings
from engine.data.rows import Example
from engine.recipe.schema import Prompt

DIALOGUE = tiny.TEXTS[0]
SUMMARY = tiny.TEXTS[5]


def example(dialogue: str = DIALOGUE, *references: str, topic: str | None = None) -> Example:
    return Example("id_1", dialogue, references or (SUMMARY,), topic, 1, "rows.csv")


def settings(style: str = "plain", **changes) -> PromptSettings:
    return PromptSettings(**Prompt(style=style).model_dump() | changes)


def encoder(family: str, style: str = "plain", *, source: int = 512, target: int = 128, tokenizer=None) -> TextEncoder:
    kind = "causal" if family in tiny.CAUSAL else "seq2seq"
    return TextEncoder(tokenizer or tiny.tokenizer(family), kind, settings(style), source, target)


def tiny_llama(kind: str):
    made = tiny.tokenizer("llama", kind=kind)
    made.chat_template = tiny.CHAT_TEMPLATE
    return made
