"""Versions of training rows that still fit their summary: other speakers, other turn boundaries, windows, other words.

Every method takes a row and a source of random numbers, and gives a version or None where the row allows none. A turn is
one line here. What a version must keep are the row's *marks*: placeholders (`#Person1#`) and numbers in digits. That is
what a program can check; who did what, and numbers in words, it cannot.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from written_rows import spaced

from engine.data.prompts import split_turns
from engine.data.rows import Example
from engine.scoring.baselines import turns_of
from engine.scoring.rouge import PLACEHOLDER, squeeze

FEWEST_TURNS = 4  # of a dialogue that a window is cut from: below, every turn counts
_TRIES = 10  # windows drawn until one keeps what the summary names
_LENGTHS = (0.5, 2.0)  # of a rewritten turn, as a share of the turn's own characters
_SPEAKER = re.compile(r"#Person(\d{1,3})#")
_NUMBER = re.compile(r"\d+")
_HANGUL = re.compile(r"[가-힣]")
_SENTENCE_END = re.compile(r"(?<=[.?!…])\s+")
# After a final consonant, and after a vowel: #Person1# is read 원, #Person2# 투, so people write #Person1#은 and #Person2#는.
_PARTICLES = (("은", "는"), ("이", "가"), ("을", "를"), ("과", "와"), ("으로", "로"), ("이랑", "랑"))
_FINAL = {1, 7, 9, 10, 11}  # 원, 세븐, 나인, 텐, 일레븐
_NAMED = re.compile(r"#Person(\d{1,3})#(으로|이랑|은|는|이|가|을|를|과|와|로|랑)?(?![가-힣])|#Person(\d{1,3})#")


@dataclass(frozen=True)
class Version:
    """A row's new texts, and what the method did, for the provenance columns."""

    dialogue: str
    references: tuple[str, ...]
    parameters: dict[str, Any]


Method = Callable[[Example, random.Random], "Version | None"]


def marks(text: str) -> Counter[str]:
    """Placeholders and numbers of a text; a placeholder's own number is none."""
    return Counter(PLACEHOLDER.findall(text)) + Counter(_NUMBER.findall(PLACEHOLDER.sub(" ", text)))


def head_and_text(line: str) -> tuple[str, str]:
    """The speaker with its colon as written (`#Person1#: `, or ""), and what is said."""
    line = line.strip()
    text = turns_of(line)[0][1] if line else ""
    return line[: len(line) - len(text)], text


# --- methods ----------------------------------------------------------------------------------------------------------


def speakers(example: Example, draw: random.Random) -> Version | None:
    """#Person1#, #Person2# ... permuted in dialogue and summaries alike; particles behind them follow the new name."""
    names = sorted({int(number) for number in _SPEAKER.findall(example.dialogue)})
    if len(names) < 2:
        return None
    new = names
    while new == names:
        new = draw.sample(names, len(names))
    renamed = dict(zip(names, new, strict=True))
    texts = [_renamed(text, renamed) for text in (example.dialogue, *example.references)]
    return Version(
        texts[0], tuple(texts[1:]), {"to": {f"#Person{old}#": f"#Person{own}#" for old, own in renamed.items()}}
    )


def _renamed(text: str, names: dict[int, int]) -> str:
    def written(found: re.Match[str]) -> str:
        old, particle = int(found[1] or found[3]), found[2] or ""
        new = names.get(old, old)
        if (old in _FINAL) != (new in _FINAL):
            pair = next((pair for pair in _PARTICLES if particle in pair), (particle, particle))
            particle = pair[new not in _FINAL]
        return f"#Person{new}#{particle}"

    return _NAMED.sub(written, text)


def window(example: Example, draw: random.Random, *, least: float) -> Version | None:
    """Consecutive turns, at least a share `least` of them, that hold every mark that summary and dialogue share."""
    turns = [turn for turn in split_turns(example.dialogue) if turn.strip()]
    fewest = math.ceil(least * len(turns))
    if len(turns) < FEWEST_TURNS or fewest >= len(turns):
        return None
    needed = set(marks("\n".join(example.references))) & set(marks(example.dialogue))
    for _ in range(_TRIES):
        count = draw.randint(fewest, len(turns) - 1)
        first = draw.randint(0, len(turns) - count)
        kept = "\n".join(turns[first : first + count])
        if needed <= set(marks(kept)):
            return Version(kept, example.references, {"turns": [first + 1, first + count], "of": len(turns)})
    return None


def merge(example: Example, draw: random.Random) -> Version | None:
    """Turns of one speaker that follow each other joined to one; None where there are none."""
    joined: list[str] = []
    for line in filter(str.strip, split_turns(example.dialogue)):
        head, text = head_and_text(line)
        if joined and head and head == head_and_text(joined[-1])[0]:
            joined[-1] += f" {text}"
        else:
            joined.append(line.strip())
    before = sum(bool(line.strip()) for line in split_turns(example.dialogue))
    if len(joined) == before:
        return None
    return Version("\n".join(joined), example.references, {"turns": len(joined), "of": before})


def cut(example: Example, draw: random.Random) -> Version | None:
    """Turns of several sentences cut in two at a sentence's end, each by a chance of a half, one at least."""
    lines = [line.strip() for line in split_turns(example.dialogue) if line.strip()]
    parts = [head_and_text(line) for line in lines]
    places = [n for n, (head, text) in enumerate(parts) if head and _SENTENCE_END.search(text)]
    if not places:
        return None
    chosen = {place for place in places if draw.random() < 0.5} or {draw.choice(places)}
    turns = []
    for place, (head, text) in enumerate(parts):
        end = draw.choice(list(_SENTENCE_END.finditer(text))) if place in chosen else None
        turns += [lines[place]] if end is None else [head + text[: end.start()], head + text[end.end() :]]
    return Version("\n".join(turns), example.references, {"turns": len(turns), "of": len(lines)})


Rewrite = Callable[[Sequence[str]], Sequence[str]]  # texts to texts, one for each: what a model makes of them


def rewriting(examples: Sequence[Example], write: Rewrite) -> Method:
    """Turns in a model's words (a paraphrase, or there and back by a translator); the summary stays.

    All turns of all rows are written at once. A turn stays as it was where the model's text is no fit one: other marks, less
    than half or more than twice as long, no Hangul where there was some, or the same. None where no turn changes.
    """
    said = {head_and_text(line)[1] for row in examples for line in split_turns(row.dialogue)}
    texts = sorted(text for text in said if _HANGUL.search(text))
    written = {old: new for old, new in zip(texts, map(spaced, write(texts)), strict=True) if fits(old, new)}

    def rewritten(example: Example, draw: random.Random) -> Version | None:
        parts = [head_and_text(line) for line in split_turns(example.dialogue) if line.strip()]
        changed = sum(text in written for _, text in parts)
        if not changed:
            return None
        lines = [head + written.get(text, text) for head, text in parts]
        return Version("\n".join(lines), example.references, {"changed": changed, "of": len(lines)})

    return rewritten


def fits(old: str, new: str) -> bool:
    """Whether a model's text may stand for a turn."""
    low, high = _LENGTHS
    same = squeeze(old) == squeeze(new)
    return not same and marks(old) == marks(new) and low <= len(new) / len(old) <= high and bool(_HANGUL.search(new))


METHODS = ("speakers", "window", "merge", "cut", "rewrite")


def method(name: str, least: float) -> Method:
    """A method that needs no model."""
    return {"speakers": speakers, "window": partial(window, least=least), "merge": merge, "cut": cut}[name]


# --- all rows ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of a method: versions, rows that allow none, versions that were there already or are held out."""

    name: str
    made: int = 0
    impossible: int = 0
    repeated: int = 0
    held_out: int = 0


class Versions:
    """Versions of rows that are new: no dialogue twice, none that is held out, ids that are nobody's.

    Args:
        held_out: dialogues that must not be trained on, with single spaces.
    """

    def __init__(self, examples: Sequence[Example], held_out: set[str], seed: int) -> None:
        self.examples, self.held_out, self.seed = examples, held_out, seed
        self._known = {spaced(example.dialogue) for example in examples}
        self._ids = {example.id for example in examples}
        self.tallies: list[Tally] = []

    def of(self, name: str, make: Method, copies: int) -> Iterator[tuple[Example, Example, dict[str, Any]]]:
        """(new row, its source, parameters). What is drawn depends on seed, method, copy and the row's id alone."""
        tally = Tally(name)
        self.tallies.append(tally)
        for example, copy in product(self.examples, range(1, copies + 1)):
            version = make(example, random.Random(f"{self.seed}/{name}/{copy}/{example.id}"))
            if self._is_new(version, tally):
                texts = {"dialogue": version.dialogue, "references": version.references}
                new = replace(example, id=self._id(f"{example.id}-{name}{copy}"), **texts)
                yield new, example, version.parameters

    def _is_new(self, version: Version | None, tally: Tally) -> bool:
        """Whether it is to be written; counted either way, and known from then on."""
        if version is None:
            tally.impossible += 1
        elif (key := spaced(version.dialogue)) in self.held_out:
            tally.held_out += 1
        elif key in self._known:
            tally.repeated += 1
        else:
            self._known.add(key)
            tally.made += 1
            return True
        return False

    def _id(self, wanted: str) -> str:
        while wanted in self._ids:
            wanted += "x"
        self._ids.add(wanted)
        return wanted
