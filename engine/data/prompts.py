"""From a dialogue to what the model reads, and from decoded text to a summary; one code for training and prediction.

Pure: strings in, strings out. Token counts, and so truncation, belong to `engine/data/encode.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from engine import prompt_template

STYLES = ("plain", "instruction", "chat", "template")

# Ways in which a person may ask for a summary. The first is the recipe's default.
INSTRUCTION_VARIANTS: tuple[str, ...] = (
    "다음 대화를 읽고 핵심 내용을 한국어로 요약하세요.",
    "아래 대화에서 오간 중요한 내용을 간결하게 정리해 주세요.",
    "다음 대화의 요점을 빠짐없이, 짧은 글로 요약해 주세요.",
    "두 사람 이상이 나눈 아래 대화를 읽고, 누가 무엇을 말하거나 했는지 요약하세요.",
    "아래 대화를 읽지 않은 사람도 알 수 있도록 내용을 한두 문장으로 요약하세요.",
)

# Layout of the instruction style. A causal model's answer begins right after the last line.
_INSTRUCTION_LAYOUT = "### Instruction:\n{instruction}\n\n### Input:\n{content}\n\n### Response:\n"
# After a plain source, for causal LMs: without a cue the model could as well go on with the dialogue.
PLAIN_ANSWER_CUE = "\n\n요약:\n"

_THINKING = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class PromptSettings:
    """How a dialogue becomes a prompt. Stored with every model; fields as in the recipe's `prompt` section."""

    style: str = "plain"
    prefix: str = ""
    instruction: str = INSTRUCTION_VARIANTS[0]
    system: str | None = None
    date_string: str = "01 Jan 2025"
    enable_thinking: bool = False
    template: str | None = None

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"prompt style {self.style!r} is none of {', '.join(STYLES)}")
        for field in fields(self):
            value, kind = getattr(self, field.name), bool if field.name == "enable_thinking" else str
            if not isinstance(value, kind) and not (field.name in ("system", "template") and value is None):
                raise ValueError(f"prompt {field.name} must be {kind.__name__}, not {type(value).__name__}")
        if self.style == "template" and (fault := prompt_template.fault_of(self.template)):
            raise ValueError(f"prompt template {fault}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptSettings:
        """The inverse of `to_dict`. Raises: ValueError for unknown names or wrong types."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown prompt settings: {', '.join(unknown)}")
        return cls(**values)

    def fingerprint(self, chat_template: str | None) -> str:
        """sha256 of everything that shapes a prompt, and of nothing else.

        It is taken from a rendered example, so a changed layout in this module changes it too; settings that the style
        does not use (the system message of a plain prompt) do not.
        """
        if self.style == "chat":
            shape = [chat_messages("D", self, topic="T"), chat_template, self.date_string, self.enable_thinking]
        else:
            shape = [source_text("D", self, topic="T"), PLAIN_ANSWER_CUE if self.style == "plain" else ""]
        if self.style == "template":
            shape.append(self.template)  # the example alone does not tell which of its letters are the dialogue
        return hashlib.sha256(json.dumps([self.style, shape], ensure_ascii=False).encode("utf-8")).hexdigest()


def source_text(
    dialogue: str, settings: PromptSettings, topic: str | None = None, instruction: str | None = None
) -> str:
    """The source of the plain style, or the whole prompt of the instruction style (ending in `### Response:\\n`) and of a
    template of one's own.

    Args:
        topic: given to the model above the dialogue, or where the template says so; None leaves it out.
        instruction: replaces the settings' instruction (augmentation); the plain style has none.
    """
    if settings.style == "template":
        values = {"dialogue": dialogue, "topic": topic or "", "instruction": instruction or settings.instruction}
        return prompt_template.fill(settings.template, values)
    content = _with_topic(dialogue, topic)
    if settings.style == "plain":
        return settings.prefix + content
    return _INSTRUCTION_LAYOUT.format(instruction=instruction or settings.instruction, content=content)


def chat_messages(
    dialogue: str, settings: PromptSettings, topic: str | None = None, instruction: str | None = None
) -> list[dict[str, str]]:
    """Messages for a tokenizer's chat template: system (unless None) and user."""
    content = f"{instruction or settings.instruction}\n\n{_with_topic(dialogue, topic)}"
    system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    return [*system, {"role": "user", "content": content}]


def _with_topic(dialogue: str, topic: str | None) -> str:
    return dialogue if topic is None else f"주제: {topic}\n\n{dialogue}"


def instruction_variants(settings: PromptSettings) -> tuple[str, ...]:
    """Five instructions for augmentation, the settings' own first: prediction asks with that one."""
    others = [variant for variant in INSTRUCTION_VARIANTS if variant != settings.instruction]
    return (settings.instruction, *others)[: len(INSTRUCTION_VARIANTS)]


def split_turns(dialogue: str) -> list[str]:
    """The turns of a dialogue, one per line; `"\\n".join(split_turns(d)) == d`."""
    return dialogue.split("\n")


def normalise(text: str) -> str:
    """One way to write the same text: composed Hangul (Unicode NFC) and `\\n` line ends.

    Files made on macOS can hold decomposed syllables, which look alike, cost several times the tokens and never match a
    reference.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def clean_summary(text: str) -> str:
    """Decoded text as one line: no outer or repeated white space, no half characters, no leading `<think>` block.

    Words are never removed; repairs of wording are `engine/prediction/postprocess.py`'s, and optional.
    """
    text = _THINKING.sub("", text).replace("\ufffd", "").replace("\x00", "")
    return _SPACES.sub(" ", text).strip()
