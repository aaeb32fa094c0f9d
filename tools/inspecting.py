"""What is in data files, in numbers: what `inspect_data.py` shows in a terminal and on a page.

Every finding is a table. Dialogues are compared as sets of letter triples, without what differs between copies of one
dialogue: white space and punctuation, speakers' names, and the particles 은/는, 이/가, 을/를.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from pages import needed

from engine.data.encode import TextEncoder, encode_all
from engine.data.rows import Example
from engine.scoring.baselines import turns_of
from engine.scoring.endings import ends_properly
from engine.scoring.rouge import PLACEHOLDER, squeeze

SOURCE_LIMITS, TARGET_LIMITS = (256, 512, 1024), (64, 100, 128)
NEAR = 0.25  # Jaccard similarity of letter triples; of 404,000 pairs of real dialogues the 7 above it are the same ones
UNLIKE = 0.1  # of letter pairs; 99 % of pairs of summaries that belong to different real dialogues are below it
SHORTEST, LEAST_KOREAN = 10, 0.25  # characters of a summary, and their share of Hangul: names may be in Latin letters
# MinHash: 64 bands of 2 of 128 values make a candidate of 98 % of the pairs at NEAR and of 2 % at a tenth of it. What
# the sketches then put below _SKETCHED (2.6 standard deviations under NEAR) is not looked at more closely, nor are more
# than the nearest few of a split: dialogues made from one frame would all be candidates of all others.
_VALUES, _BANDS, _SKETCHED, _LOOKED_AT = 128, (64, 2), 0.15, 8
_NAME = re.compile(r"#\w{1,20}#")
_LOOSE = re.compile(r"[은는이가을를\W_]")
_HANGUL = re.compile(r"[가-힣]")


class Row(NamedTuple):
    split: str
    example: Example

    @property
    def place(self) -> str:
        return f"{self.split} {self.example.id}"

    @property
    def summary(self) -> str:
        return self.example.references[0] if self.example.references else ""


class Pair(NamedTuple):
    """Two dialogues that are nearly the same, by the share of letter triples that they have in common."""

    similarity: float
    first: Row
    second: Row


class Finding(NamedTuple):
    """A table under a title. `texts` are the rows' (title, text) in full length, where they help a reader to judge."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Sequence[Sequence[tuple[str, str]]] = ()


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


# --- the same dialogue twice ------------------------------------------------------------------------------------------


def bare(dialogue: str) -> str:
    """The letters that copies of a dialogue share: no names of speakers, spaces, punctuation or changing particles."""
    turns = turns_of(dialogue)
    text = _NAME.sub("", " ".join(text for _, text in turns))
    for name in {speaker for speaker, _ in turns if len(speaker) > 1 and not _NAME.fullmatch(speaker)}:
        text = text.replace(name, "")
    return _LOOSE.sub("", text)


def pieces(text: str, size: int) -> set[str]:
    return {text[place : place + size] for place in range(max(1, len(text) - size + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def _spaced(row: Row) -> str:
    """The dialogue with single spaces; texts are composed already (NFC)."""
    return " ".join(row.example.dialogue.split())


def equal_groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows with the same dialogue, white space aside. Groups over splits come first."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[_spaced(row)].append(row)
    several = [group for group in groups.values() if len(group) > 1]
    return sorted(several, key=lambda group: -len({row.split for row in group}))


def near_pairs(rows: Sequence[Row]) -> list[Pair]:
    """Dialogues that are alike but not equal, the most alike first: for each one the closest found in every split."""
    firsts = {(row.split, _spaced(row)): row for row in reversed(rows)}  # of equal ones in a split, the first
    rows = list(reversed(firsts.values()))
    closest: dict[tuple[int, str], tuple[float, int]] = {}
    for similar, number, other in alike(rows):
        for one, two in ((number, other), (other, number)):
            key = (one, rows[two].split)
            closest[key] = max(closest.get(key, (0.0, 0)), (similar, two))
    pairs = {(min(one, two), max(one, two)): similar for (one, _), (similar, two) in closest.items()}
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [Pair(similar, rows[one], rows[two]) for (one, two), similar in ordered]


def alike(rows: Sequence[Row]) -> Iterator[tuple[float, int, int]]:
    """(similarity, place, earlier place) of dialogues that are alike but not equal.

    Candidates come from MinHash and locality-sensitive hashing, their similarity from the texts.
    """
    datasketch = needed("datasketch", "inspect", "finding near-duplicates")
    spaced, texts = [_spaced(row) for row in rows], [bare(row.example.dialogue) for row in rows]
    batches = ([piece.encode() for piece in pieces(text, 3)] for text in texts)
    index = datasketch.MinHashLSH(num_perm=_VALUES, params=_BANDS)
    sketches: list = []
    for number, sketch in enumerate(datasketch.MinHash.generator(batches, num_perm=_VALUES, hashfunc=zlib.crc32)):
        own = pieces(texts[number], 3)
        looked_at: Counter[str] = Counter()
        found = [other for other in index.query(sketch) if spaced[other] != spaced[number]]
        for estimate, other in sorted(((sketch.jaccard(sketches[it]), it) for it in found), reverse=True):
            looked_at[rows[other].split] += 1
            if estimate < _SKETCHED or looked_at[rows[other].split] > _LOOKED_AT:
                continue
            similar = jaccard(own, pieces(texts[other], 3))
            if similar >= NEAR:
                yield similar, number, other
        index.insert(number, sketch)
        sketches.append(sketch)


def families(rows: Sequence[Row], least: float = NEAR) -> list[int]:
    """A number for each row, the same where dialogues are equal or alike, directly or over others between them."""
    heads = list(range(len(rows)))

    def head(row: int) -> int:
        while heads[row] != row:
            heads[row] = row = heads[heads[row]]
        return row

    firsts: dict[str, int] = {}
    for number, row in enumerate(rows):
        heads[number] = firsts.setdefault(_spaced(row), number)
    distinct = list(firsts.values())
    for similar, one, two in alike([rows[number] for number in distinct]):
        if similar >= least:
            one, two = head(distinct[one]), head(distinct[two])
            heads[max(one, two)] = min(one, two)
    return [head(number) for number in range(len(rows))]


def duplicates(groups: Sequence[Sequence[Row]]) -> Finding:
    rows = [[str(len(group)), " = ".join(row.place for row in group), group[0].example.dialogue] for group in groups]
    count = sum(len(group) - 1 for group in groups)
    note = f"{_count(count, 'row')} with the dialogue of an earlier one, white space aside."
    return Finding("Duplicates", note, ("rows", "where", "dialogue"), rows)


def near_duplicates(pairs: Sequence[Pair]) -> Finding:
    rows = [
        [f"{pair.similarity:.2f}", pair.first.place, pair.second.place, pair.first.example.dialogue] for pair in pairs
    ]
    texts = [[(row.place, row.example.dialogue) for row in pair[1:]] for pair in pairs]
    note = (
        f"{_count(len(pairs), 'pair')} with a quarter or more of the letter triples in common, names, spaces and particles "
        "aside. Near 1: a copy; below: mostly the same dialogue in other words."
    )
    return Finding("Near-duplicates", note, ("alike", "row", "row", "dialogue"), rows, texts)


def between_splits(rows: Sequence[Row], groups: Sequence[Sequence[Row]], pairs: Sequence[Pair]) -> Finding:
    """How many rows of one split are in another: scores on them say nothing about new dialogues."""
    found = []
    for one, two in combinations(dict.fromkeys(row.split for row in rows), 2):
        shared = [group for group in groups if {one, two} <= {row.split for row in group}]
        equal = sum(row.split == two for group in shared for row in group)
        near = {
            row.place
            for pair in pairs
            if {pair.first.split, pair.second.split} == {one, two}
            for row in pair[1:]
            if row.split == two
        }
        found.append([f"{two} in {one}", str(equal), str(len(near))])
    note = "Rows whose dialogue also stands in another split: scores on them are too good."
    return Finding("Between splits", note, ("", "equal", "nearly"), found)


def contradictions(groups: Sequence[Sequence[Row]], pairs: Sequence[Pair]) -> Finding:
    """The same dialogue with summaries that have next to nothing in common."""
    couples = [(group[0], other) for group in (_summarised(group) for group in groups) for other in group[1:]]
    couples += [(first, second) for first, second in (_summarised(pair[1:]) for pair in pairs if _both(pair))]
    rows, texts = [], []
    for first, second in couples:
        if jaccard(*(pieces(_LOOSE.sub("", _NAME.sub("", row.summary)), 2) for row in (first, second))) < UNLIKE:
            rows.append([first.place, second.place, f"{first.summary} ↔ {second.summary}"])
            texts.append([(row.place, f"{row.summary}\n\n{row.example.dialogue}") for row in (first, second)])
    note = f"{_count(len(rows), 'pair')} of equal or nearly equal dialogues whose summaries have next to nothing in common."
    return Finding("Contradicting summaries", note, ("row", "row", "summaries"), rows, texts)


def _summarised(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.summary]


def _both(pair: Pair) -> bool:
    return bool(pair.first.summary and pair.second.summary)


# --- summaries --------------------------------------------------------------------------------------------------------


def doubt(example: Example) -> str | None:
    """What is wrong with a row's first summary, or None."""
    summary = example.references[0].strip()
    letters = [letter for letter in PLACEHOLDER.sub("", summary) if letter.isalpha()]
    first = example.dialogue.strip().split("\n")[0]
    if len(_HANGUL.findall(summary)) < max(1, LEAST_KOREAN * len(letters)):
        return "no Korean"
    if len(summary) < SHORTEST:
        return f"{len(summary)} characters"
    if squeeze(summary) in {squeeze(first), squeeze(turns_of(example.dialogue)[0][1])}:
        return "the dialogue's first line"
    return None if _ends(summary) else "breaks off"


def _ends(summary: str) -> bool:
    """Whether a sentence ends there: with a mark, as 다, 요, 죠, 까, 음, 함, 됨 ... or with a noun of notes (것, 중, 예정)."""
    last = summary.rstrip("\"'”’)] ")[-1:]
    nominal = "가" <= last <= "힣" and (ord(last) - ord("가")) % 28 == 16  # a last ㅁ
    return not last.isalnum() or nominal or last in "다요죠까기것중정" or ends_properly(f"{summary}.")


def doubtful(rows: Sequence[Row]) -> Finding:
    found = [(reason, row) for row in rows if row.summary and (reason := doubt(row.example))]
    counts = Counter("short" if reason[0].isdigit() else reason for reason, _ in found)
    note = "".join(f"{count} {reason}, " for reason, count in counts.most_common()).removesuffix(", ") or "None."
    return Finding(
        "Doubtful summaries",
        note,
        ("row", "what", "summary"),
        [[row.place, reason, row.summary] for reason, row in found],
        [[(row.place, row.example.dialogue)] for _, row in found],
    )


def placeholders(rows: Sequence[Row]) -> Iterator[Finding]:
    """How often each one stands in dialogues and summaries, and the rows whose summary names one that was not there."""
    counts: defaultdict[str, Counter] = defaultdict(Counter)
    strangers = []
    for row in rows:
        spoken, named = (set(PLACEHOLDER.findall(text)) for text in (row.example.dialogue, row.summary))
        for name in spoken | named if row.summary else ():
            here = {
                "dialogue": name in spoken,
                "summary": name in named,
                "lost": name not in named,
                "new": name not in spoken,
            }
            counts[name].update({key: int(value) for key, value in here.items()})
        if row.summary and named - spoken:
            strangers.append([row.place, " ".join(sorted(named - spoken)), row.summary])
    table = [
        [name, *(str(own[key]) for key in ("dialogue", "summary", "lost", "new"))]
        for name, own in sorted(counts.items(), key=lambda item: (-item[1]["dialogue"], item[0]))
    ]
    head = ("", "in dialogue", "in summary", "not in summary", "only in summary")
    yield Finding("Placeholders", "Rows with a summary, by what they name.", head, table)
    note = f"{_count(len(strangers), 'row')} whose summary names somebody whom the dialogue does not."
    yield Finding("Strangers in summaries", note, ("row", "who", "summary"), strangers)


# --- lengths ----------------------------------------------------------------------------------------------------------


def lengths(
    rows: Sequence[Row], name: str, encoder: TextEncoder | None, limits: tuple[Sequence[int], Sequence[int]]
) -> Finding:
    """Tokens of sources and summaries, and the rows that each limit would cut; without an encoder, characters."""
    table = []
    for split in dict.fromkeys(row.split for row in rows):
        examples = [row.example for row in rows if row.split == split]
        for what, own, most in zip(("dialogue", "summary"), _measured(examples, encoder), limits, strict=True):
            if own:
                cuts = [f"{limit}: {_share(own, limit)}" for limit in most] if encoder else []
                table.append([f"{split} {what}", *(str(value) for value in _spread(own)), "  ".join(cuts)])
    note = "Tokens with end and start tokens; behind each limit the rows that it cuts."
    note = note if encoder else "Characters. --tokenizer FOLDER counts tokens and what a limit cuts."
    head = ("", "median", "90 %", "99 %", "longest", "cut at" if encoder else "")
    return Finding(f"Lengths ({name})", note, head, table)


def _measured(examples: Sequence[Example], encoder: TextEncoder | None) -> tuple[list[int], list[int]]:
    told = [example for example in examples if example.references]
    if encoder is None:
        return [len(example.dialogue) for example in examples], [len(example.references[0]) for example in told]
    features = encode_all(encoder, told)
    untold = [encoder.prompt_feature(example, 0) for example in examples if not example.references]
    sources = [feature.source_tokens for feature in [*features, *untold]]
    return sources, [feature.target_tokens for feature in features]


def _spread(values: Sequence[int]) -> tuple[int, ...]:
    ordered = sorted(values)
    return tuple(ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99, 1.0))


def _share(values: Sequence[int], limit: int) -> str:
    count = sum(value > limit for value in values)
    return f"{count} ({100 * count / len(values):.1f} %)" if count else "0"


def everything(
    splits: Mapping[str, Sequence[Example]],
    encoders: Mapping[str, TextEncoder],
    limits: tuple[Sequence[int], Sequence[int]],
) -> list[Finding]:
    """All findings about the splits, in the order in which they are shown."""
    rows = [Row(split, example) for split, examples in splits.items() for example in examples]
    sizes = [[name, str(len(own)), str(sum(bool(row.references) for row in own))] for name, own in splits.items()]
    groups, pairs = equal_groups(rows), near_pairs(rows)
    found = [Finding("Rows", "", ("", "rows", "with summary"), sizes)]
    found += [lengths(rows, name, encoder, limits) for name, encoder in (encoders or {"characters": None}).items()]
    found += [between_splits(rows, groups, pairs)] if len(splits) > 1 else []
    found += [duplicates(groups), near_duplicates(pairs), contradictions(groups, pairs), doubtful(rows)]
    return [*found, *placeholders(rows)]
