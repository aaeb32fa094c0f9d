"""Repairs of decoded summaries: each rule on its own, off by default, and counted.

A repair hides a defect of the model or of the settings, it does not remove it; so every rule reports its name when it
changed a text. Pure: strings in, strings out.
"""

from __future__ import annotations

import re
from collections import Counter

RULES = ("fix_placeholders", "fix_cut_word", "fix_full_stop", "fix_particles")

# A `#` and what may follow it in a placeholder, at the very end. After a letter or digit `#` closes one (`#Person1#`).
_UNFINISHED = re.compile(r"(?<![A-Za-z0-9])#(?:[A-Z][A-Za-z]*\d*)?$")
_ENDS_SENTENCE = re.compile(r"[.!?。…][\"'”’)\]]*$")
_CLOSERS = "\"'”’)]"
# Ends of a last word that lacks only its full stop. Where the length limit cut the text, the last word may be half a
# word (`다` of `다음`, `까` of `까지`), so only endings that are hardly the beginning of another word count there.
_WHOLE_ENDING = re.compile(r"(?:다|요|죠|까|음|함|됨|임|것)$|^(?:네|예)$")
_CUT_ENDING = re.compile(r"(?:니다|[었았했였됐졌갔왔]다|한다|된다|어요|아요|해요)$")

# Particles that follow a name or pronoun; compounds are spelled out because `와의` is one word to a writer.
_PARTICLE_WORDS = """
    에게서는 에게서도 으로부터 한테서는 이라면 이라고 이라는 에게서 에게는 에게도 에게만 에게로 한테서 한테는 한테도
    께서는 께서도 에서는 에서도 로부터 로서는 으로서 으로써 으로는 으로도 까지는 까지도 부터는 만으로 이라도 들에게 와의
    과의 와는 과는 와도 과도 에게 한테 께서 에서 에는 에도 으로 로서 로써 로는 로도 까지 부터 처럼 보다 만큼 마다
    조차 마저 이나 이며 이랑 하고 라고 라는 라면 라도 만은 만이 만을 들은 들이 들을 들의 은 는 이 가 을 를 의 와
    과 도 에 로 께 만 며 랑
"""
PARTICLES = tuple(_PARTICLE_WORDS.split())
_PARTICLE = re.compile(
    r"(#[A-Za-z]+\d*#)[ \t]+(" + "|".join(sorted(PARTICLES, key=lambda p: (-len(p), p))) + r")(?=[\s.,!?;:…)\"'”’\]]|$)"
)


def postprocess(
    text: str,
    *,
    fix_placeholders: bool = False,
    fix_cut_word: bool = False,
    fix_full_stop: bool = False,
    fix_particles: bool = False,
    capped: bool = False,
) -> tuple[str, list[str]]:
    """Apply the chosen rules in a fixed order and name those that changed the text.

    Args:
        text: a cleaned summary.
        fix_placeholders: drop an unfinished placeholder at the end (`... #Pers`).
        fix_cut_word: drop the last word, only where the length limit stopped the text (`capped`) inside a sentence.
        fix_full_stop: add the missing full stop (question mark after a question) to a finished last sentence.
        fix_particles: close the space between a placeholder and its particle (`#Person1# 는`).
        capped: the length limit, not the end token, ended this text.

    Returns:
        The text, and the names of the rules that fired. No rule empties a text: what would remain must hold a letter.
    """
    fired: list[str] = []

    def apply(name: str, changed: str) -> None:
        nonlocal text
        if changed != text and any(c.isalnum() for c in changed):
            text = changed
            fired.append(name)

    if fix_placeholders:
        apply("fix_placeholders", drop_unfinished_placeholder(text))
    if fix_cut_word and capped and not fired:  # a dropped placeholder was the cut word
        apply("fix_cut_word", drop_cut_word(text))
    if fix_full_stop:
        apply("fix_full_stop", add_full_stop(text, cut=capped and not fired))
    if fix_particles:
        apply("fix_particles", close_particles(text))
    return text, fired


def drop_unfinished_placeholder(text: str) -> str:
    """`... 는 #Pers` -> `... 는`. A lone `#` at the end goes too; `C#` and a finished `#Person1#` stay."""
    return _UNFINISHED.sub("", text.rstrip()).rstrip()


def drop_cut_word(text: str) -> str:
    """Drop the last word of a text that does not end a sentence; after it also a comma that would hang at the end."""
    text = text.rstrip()
    if _ENDS_SENTENCE.search(text):
        return text
    return text.rpartition(" ")[0].rstrip(" ,;:·")


def add_full_stop(text: str, *, cut: bool = False) -> str:
    """Add `.` (`?` after 까) where the last word ends a sentence; `cut`: the last word may be half a word."""
    text = text.rstrip()
    bare = text.rstrip(_CLOSERS)
    ending = _CUT_ENDING if cut else _WHOLE_ENDING
    if _ENDS_SENTENCE.search(text) or not ending.search(bare):
        return text
    return text + ("?" if bare.endswith("까") else ".")


def close_particles(text: str) -> str:
    """`#Person1# 는` -> `#Person1#는`, only for whole words that are particles: `#Person1# 이미 갔다` stays.

    Words that are particles in one place and something else in another (`나`, `밖에`) are not in the list; `이` is,
    because right after a speaker it is the subject's particle far more often than "this".
    """
    return _PARTICLE.sub(r"\1\2", text)


def repairs_text(counts: Counter[str], rows: int) -> str:
    """How often each rule changed one of `rows` texts; empty where none did."""
    told = ", ".join(f"{rule} {counts[rule]}" for rule in RULES if counts[rule])
    return f"post-processing of {rows} texts: {told}" if told else ""
