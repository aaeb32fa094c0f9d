"""What a score is held against: the lead baseline, and facts that a right summary must hold."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from engine.scoring.rouge import squeeze

_SPEAKER = re.compile(r"^\s*(?:#[A-Za-z]+\d*#\s*[:：]?|[^\s:：\d]{1,20}\s?[:：](?=\s))\s*")


def turns_of(dialogue: str) -> list[tuple[str, str]]:
    """Speaker and text of each turn.

    A turn is a line that starts with a speaker (`#Person1#:`) and the lines up to the next one; where no line starts
    with a speaker, each line is a turn of the speaker "".
    """
    lines = [line.strip() for line in dialogue.splitlines() if line.strip()]
    found = [_SPEAKER.match(line) for line in lines]
    turns: list[tuple[str, str]] = []
    for line, match in zip(lines, found, strict=True):
        text = _SPEAKER.sub("", line, count=1)
        if match or not any(found) or not turns:
            turns.append((match.group().strip(" \t:：") if match else "", text))
        else:
            turns[-1] = (turns[-1][0], f"{turns[-1][1]} {text}")
    return turns


def lead_baseline(dialogue: str, turns: int = 2) -> str:
    """Text of the first turns without the speakers' names, joined by spaces: the summary that costs nothing."""
    return " ".join(text for _, text in turns_of(dialogue)[:turns] if text)


def fact_share(predictions: Sequence[str], facts: Sequence[Sequence[str]]) -> float:
    """Share (0..1) of all facts that stand in their row's prediction word for word; white space does not count.

    `facts` lists for each row what a right summary must hold (times, places, things, amounts). A fact that begins or
    ends with a digit is not found inside a longer number (`2시` in `12시`). Raises ValueError where there is no fact.
    """
    if len(predictions) != len(facts):
        raise ValueError(f"{len(predictions)} predictions but {len(facts)} rows of facts")
    total = sum(len(row) for row in facts)
    if not total:
        raise ValueError("no facts to look for")
    found = 0
    for prediction, row in zip(predictions, facts, strict=True):
        text = unicodedata.normalize("NFC", prediction)
        found += sum(_fact_pattern(fact).search(text) is not None for fact in row)
    return found / total


@lru_cache(maxsize=65536)
def _fact_pattern(fact: str) -> re.Pattern[str]:
    characters = squeeze(fact)
    start = r"(?<!\d)" if characters[:1].isdigit() else ""
    end = r"(?!\d)" if characters[-1:].isdigit() else ""
    return re.compile(start + r"\s*".join(map(re.escape, characters)) + end)
