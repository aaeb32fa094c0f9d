"""Text encoders over small tokenizers, and an example to encode, for tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import tiny

from engine.data.encode import TextEncoder
from engine.data.prompts import PromptSettings
from engine.data.rows import Example
from engine.models import tokenization
from engine.recipe.schema import PLACEHOLDERS, Prompt

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside the checkout, where it is at hand
DIALOGUE = tiny.TEXTS[0]
SUMMARY = tiny.TEXTS[5]
TEMPLATE = "[질문] {instruction}\n<<{dialogue}>>\n[답]\n"


def example(dialogue: str = DIALOGUE, *references: str, topic: str | None = None) -> Example:
    return Example("id_1", dialogue, references or (SUMMARY,), topic, 1, "rows.csv")


def settings(style: str = "plain", **changes) -> PromptSettings:
    template = {"template": TEMPLATE} if style == "template" else {}
    return PromptSettings(**Prompt(style=style).model_dump() | template | changes)


def encoder(family: str, style: str = "plain", *, source: int = 512, target: int = 128, tokenizer=None) -> TextEncoder:
    kind = "causal" if family in tiny.CAUSAL else "seq2seq"
    return TextEncoder(tokenizer or tiny.tokenizer(family), kind, settings(style), source, target)


def tiny_llama(kind: str):
    made = tiny.tokenizer("llama", kind=kind)
    made.chat_template = tiny.CHAT_TEMPLATE
    return made


@cache
def real_tokenizer(name: str):
    """A real tokenizer as a run prepares it. Made once, as Qwen3's takes seconds: nobody changes it."""
    made = tokenization.load_tokenizer(SHARED / "tokenizers" / name)
    model_type = {"kobart": "bart", "qwen3": "qwen3"}[name]
    return tokenization.prepare(made, PLACEHOLDERS, name=name, model_type=model_type)
