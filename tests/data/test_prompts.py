from __future__ import annotations

import dataclasses
import unicodedata

import pytest

from engine.data.prompts import (
    INSTRUCTION_VARIANTS,
    PromptSettings,
    chat_messages,
    clean_summary,
    instruction_variants,
    normalise,
    source_text,
    split_turns,
)
from engine.recipe.schema import Prompt

DIALOGUE = "#Person1#: 몇 시예요?\n#Person2#: 세 시요."


def test_defaults_are_the_recipes_defaults():
    recipe = PromptSettings(**Prompt().model_dump())
    assert recipe.instruction == INSTRUCTION_VARIANTS[0] == PromptSettings().instruction
    assert {field.name for field in dataclasses.fields(PromptSettings)} == set(Prompt.model_fields)


def test_plain_is_the_prefix_and_the_dialogue():
    assert source_text(DIALOGUE, PromptSettings(prefix="summarize: ")) == f"summarize: {DIALOGUE}"
    assert source_text(DIALOGUE, PromptSettings(), topic="시간") == f"주제: 시간\n\n{DIALOGUE}"


def test_instruction_has_three_parts_in_order():
    text = source_text(DIALOGUE, PromptSettings(style="instruction", instruction="요약!"))
    assert text == f"### Instruction:\n요약!\n\n### Input:\n{DIALOGUE}\n\n### Response:\n"


def test_braces_in_a_dialogue_are_just_text():
    text = source_text("{instruction} {0} {", PromptSettings(style="instruction", instruction="요약 {content}"))
    assert "{instruction} {0} {" in text and "요약 {content}" in text


def test_a_template_is_filled_once_and_says_where_everything_stands():
    settings = PromptSettings(
        style="template", template='{"a": {}} {topic}|{instruction}|{dialogue}<', instruction="줄여."
    )
    assert source_text("{topic} {x}", settings, topic="날씨") == '{"a": {}} 날씨|줄여.|{topic} {x}<'
    assert source_text("네", settings, instruction="짧게.") == '{"a": {}} |짧게.|네<'


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (None, "is missing"),
        ("요약하세요.", "once, not 0 times"),
        ("{dialogue} {dialogue}", "once, not 2 times"),
        ("{dialogue} {summary}", "what the model writes"),
        ("{dialogue} {Topic}", "names {Topic}; there are {dialogue}, {topic}, {instruction}"),
        ("{dialogue!r} {0}", "names {0}"),
    ],
)
def test_a_template_that_cannot_be_is_refused(template, fault):
    with pytest.raises(ValueError, match="prompt template") as caught:
        PromptSettings(style="template", template=template)
    assert fault in str(caught.value)


def test_chat_has_a_system_message_unless_it_is_none():
    with_system = chat_messages(DIALOGUE, PromptSettings(style="chat", system="도우미"), instruction="줄여 주세요.")
    assert with_system == [
        {"role": "system", "content": "도우미"},
        {"role": "user", "content": f"줄여 주세요.\n\n{DIALOGUE}"},
    ]
    assert [m["role"] for m in chat_messages(DIALOGUE, PromptSettings(style="chat", system=None))] == ["user"]


def test_five_different_instructions_the_settings_own_first():
    assert len(set(INSTRUCTION_VARIANTS)) == 5
    assert instruction_variants(PromptSettings()) == INSTRUCTION_VARIANTS
    own = instruction_variants(PromptSettings(instruction="한 줄로 줄여."))
    assert own[0] == "한 줄로 줄여." and len(set(own)) == 5


@pytest.mark.parametrize("text", ["", "한 줄", DIALOGUE, "\n\n가\n"])
def test_turns_join_to_the_dialogue(text):
    assert "\n".join(split_turns(text)) == text


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  #Person1#은\n 갑니다. ", "#Person1#은 갑니다."),
        ("#Person1# 는 간다", "#Person1# 는 간다"),
        ("세 시\ufffd", "세 시"),
        ("<think>\n\n</think>\n\n요약", "요약"),
        ("<think>음…</think>요약 <think> 은 남는다", "요약 <think> 은 남는다"),
        ("요약: 답변은 그대로 둔다.", "요약: 답변은 그대로 둔다."),
        ("\t\u3000\n", ""),
        ("가\u00a0나", "가 나"),
    ],
)
def test_clean_summary(raw, clean):
    assert clean_summary(raw) == clean
    assert clean_summary(clean) == clean


def test_normalise_composes_hangul_and_line_ends():
    assert normalise(unicodedata.normalize("NFD", "안녕하세요")) == "안녕하세요"
    assert normalise("가\r\n나\r다") == "가\n나\n다"


def test_settings_round_trip_and_refuse_what_they_do_not_know():
    settings = PromptSettings(style="chat", system=None, enable_thinking=True)
    assert PromptSettings.from_dict(settings.to_dict()) == settings
    for wrong in ({"style": "haiku"}, {"colour": 1}, {"prefix": None}, {"enable_thinking": "no"}, {"system": 3}):
        with pytest.raises(ValueError):
            PromptSettings.from_dict(PromptSettings().to_dict() | wrong)


@pytest.mark.parametrize(
    ("style", "used"),
    [
        ("plain", {"prefix"}),
        ("instruction", {"instruction"}),
        ("chat", {"instruction", "system", "date_string", "enable_thinking", "chat template"}),
        ("template", {"instruction", "template"}),
    ],
)
def test_fingerprint_depends_on_what_the_style_uses_and_on_nothing_else(style, used):
    base = PromptSettings(style=style, system="도우미", template="{instruction} {dialogue}D")
    changes = {"prefix": "p: ", "instruction": "i", "system": None, "date_string": "x", "enable_thinking": True}
    changes["template"] = "{instruction} D{dialogue}"
    found = {n for n, v in changes.items() if _print(base, "t") != _print(dataclasses.replace(base, **{n: v}), "t")}
    found |= {"chat template"} if _print(base, "t") != _print(base, "u") else set()
    assert found == used
    assert len(_print(base, None)) == 64


def _print(settings: PromptSettings, template: str | None) -> str:
    return settings.fingerprint(template)
