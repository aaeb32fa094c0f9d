"""Each repair on its own: what it changes, what it must leave alone, and that it is counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from engine.prediction.postprocess import PARTICLES, RULES, postprocess, repairs_text

ALL = dict.fromkeys(RULES, True)
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "dialogsum_ko" / "train.csv"


def only(rule: str, text: str, *, capped: bool = False) -> str:
    changed, fired = postprocess(text, **{rule: True}, capped=capped)
    assert fired == ([rule] if changed != text else [])
    return changed


def test_everything_is_off_by_default():
    text = "#Person1# 는 갔다 #Pers"
    assert postprocess(text, capped=True) == (text, [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#Person1#는 갔다. #Pers", "#Person1#는 갔다."),
        ("#Person1#과 #Person2", "#Person1#과"),
        ("#Person1#과#Person2", "#Person1#과"),
        ("전화번호는 #", "전화번호는"),
        ("#Person1#는 #Person2#", "#Person1#는 #Person2#"),
        ("#Person1#", "#Person1#"),
        ("그는 C#", "그는 C#"),
        ("#Person1#는 #여행", "#Person1#는 #여행"),
        ("#Pers", "#Pers"),  # nothing would be left
        ("", ""),
    ],
)
def test_unfinished_placeholder(text, expected):
    assert only("fix_placeholders", text) == expected


@pytest.mark.parametrize(
    ("text", "capped", "expected"),
    [
        ("#Person1#는 회의를 내일 오", True, "#Person1#는 회의를 내일"),
        ("커피, 차, 그", True, "커피, 차"),
        ("#Person1#는 회의를 내일 오", False, "#Person1#는 회의를 내일 오"),
        ("회의는 내일이다.", True, "회의는 내일이다."),
        ('그는 "가요."', True, '그는 "가요."'),
        ("한단어", True, "한단어"),
    ],
)
def test_cut_word(text, capped, expected):
    assert only("fix_cut_word", text, capped=capped) == expected


@pytest.mark.parametrize(
    ("text", "capped", "expected"),
    [
        ("회의는 내일입니다", False, "회의는 내일입니다."),
        ("같이 갈까", False, "같이 갈까?"),
        ("회의에 참석하기로 함", False, "회의에 참석하기로 함."),
        ('그는 "가요"', False, '그는 "가요".'),
        ("회의는 내일입니다.", False, "회의는 내일입니다."),
        ("회의는 내일입니다!", False, "회의는 내일입니다!"),
        ("회의가 끝나고", False, "회의가 끝나고"),
        ("회의는 내일입니다", True, "회의는 내일입니다."),
        ("회의는 월요일까", True, "회의는 월요일까"),  # half of 까지
        ("회의는 다", True, "회의는 다"),  # half of 다음
        ("", False, ""),
    ],
)
def test_full_stop(text, capped, expected):
    assert only("fix_full_stop", text, capped=capped) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#Person1# 는 #Person2# 에게 말한다.", "#Person1#는 #Person2#에게 말한다."),
        ("#Person1# 와 #Person2# 의 집", "#Person1#와 #Person2#의 집"),
        ("전화는 #PhoneNumber# 로.", "전화는 #PhoneNumber#로."),
        ("#Person1#  에게서", "#Person1#에게서"),
        ("#Person1# 이나 #Person2# 가", "#Person1#이나 #Person2#가"),
        ("#Person1# 은, #Person2# 도", "#Person1#은, #Person2#도"),
        ("#Person1# 이미 갔다.", "#Person1# 이미 갔다."),
        ("#Person1# 가족이 왔다.", "#Person1# 가족이 왔다."),
        ("#Person1# 밖에 있다.", "#Person1# 밖에 있다."),
        ("#Person1# 씨는 #Person2# 나", "#Person1# 씨는 #Person2# 나"),
        ("민수 는 갔다.", "민수 는 갔다."),
        ("#Person1#\n는", "#Person1#\n는"),
    ],
)
def test_particles(text, expected):
    assert only("fix_particles", text) == expected


def test_particles_are_listed_once():
    assert len(set(PARTICLES)) == len(PARTICLES)


def test_rules_together():
    # the placeholder was the cut word, so no second word goes
    text, fired = postprocess("#Person1# 는 내일 간다. #Person2# 는 #Per", **ALL, capped=True)
    assert text == "#Person1#는 내일 간다. #Person2#는" and fired == ["fix_placeholders", "fix_particles"]
    # once the half word is gone the last word is whole, and ends a sentence
    text, fired = postprocess("#Person1# 는 내일 간다 그리", **ALL, capped=True)
    assert text == "#Person1#는 내일 간다." and fired == ["fix_cut_word", "fix_full_stop", "fix_particles"]
    assert postprocess(text, **ALL, capped=False) == (text, [])


def test_repairs_are_counted():
    fired = [postprocess(text, **ALL)[1] for text in ("#Person1# 는 간다", "#Person1#는 간다.", "#Person1# 가 온다.")]
    counts = Counter(rule for rules in fired for rule in rules)
    assert repairs_text(counts, len(fired)) == "post-processing of 3 texts: fix_full_stop 1, fix_particles 2"
    assert repairs_text(Counter(), 1) == ""


@pytest.mark.skipif(not DATA.exists(), reason="the real data is not here")
def test_real_references_are_left_alone_and_repaired_back():
    import re

    import pandas as pd

    references = pd.read_csv(DATA)["summary"].tolist()
    assert [postprocess(text, **ALL, capped=True) for text in references] == [(text, []) for text in references]
    spaced = [re.sub(r"(#[A-Za-z]+\d*#)(?=[가-힣])", r"\1 ", text) for text in references]
    repaired = [postprocess(text, fix_particles=True)[0] for text in spaced]
    assert sum(a == b for a, b in zip(repaired, references, strict=True)) >= 0.99 * len(references)
