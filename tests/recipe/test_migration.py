"""recipes/docs/migration.md agrees with the synonyms and with transformers; run as a script, it writes its last table."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from engine.recipe.schema import SECTIONS
from engine.recipe.synonyms import _THEIRS, NOT_NEEDED, keys_of

PAGE = Path(__file__).resolve().parents[2] / "recipes" / "docs" / "migration.md"
_TABLE = re.compile(r"(?<=writes it -->\n).*(?=<!-- end -->)", re.DOTALL)


def table() -> str:
    lines = ["| here | elsewhere |", "| --- | --- |"]
    lines += [f"| `{ours}` | {', '.join(f'`{name}`' for name in names.split())} |" for ours, names in _THEIRS.items()]
    lines += [f"| not needed: {why} | `{name}` |" for name, why in NOT_NEEDED.items()]
    return "\n".join([*lines, ""])


def rows(heading: str) -> list[tuple[str, str]]:
    """(their name, our key) of the table under a heading."""
    part = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| (`.*`) \| `(\S+)` \|$", part, re.MULTILINE)
    return [(name, ours) for names, ours in found for name in re.findall(r"`(\w+)`", names)]


HEADINGS = ("HF `Seq2SeqTrainer`", "TRL `SFTTrainer`", "LLaMA-Factory")


@pytest.mark.parametrize("heading", HEADINGS)
def test_each_name_is_answered_with_the_key_beside_it(heading):
    assert len(rows(heading)) >= 10
    for theirs, ours in rows(heading):
        section, _, key = ours.partition(".")
        assert key in SECTIONS[section].model_fields, ours
        assert ours in keys_of(theirs), f"{theirs}: the command line would answer {keys_of(theirs)}"


def test_the_last_table_is_the_synonyms():
    assert _TABLE.findall(PAGE.read_text(encoding="utf-8")) == [table()], "python tests/recipe/test_migration.py"


@pytest.mark.slow
def test_the_names_of_transformers_and_peft_exist():
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, Seq2SeqTrainingArguments

    theirs = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    assert {name for name, _ in rows(HEADINGS[0])} <= theirs
    theirs |= {field.name for field in dataclasses.fields(LoraConfig)} | BitsAndBytesConfig(
        load_in_4bit=True
    ).to_dict().keys()
    assert {name for name, _ in rows(HEADINGS[1])} - {"max_seq_length"} <= theirs, "the rest is TRL's"


if __name__ == "__main__":
    PAGE.write_text(_TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
