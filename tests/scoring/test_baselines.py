"""The lead baseline and the share of facts."""

from __future__ import annotations

import pytest

from engine.scoring import baselines


def test_lead_baseline():
    dialogue = "#Person1#: 안녕하세요.\n#Person2#: 네,\n반갑습니다.\n#Person1#: 그럼 시작하죠."
    assert baselines.lead_baseline(dialogue) == "안녕하세요. 네, 반갑습니다."
    assert baselines.lead_baseline(dialogue, turns=1) == "안녕하세요."
    assert baselines.lead_baseline("첫 줄\n둘째 줄\n셋째 줄") == "첫 줄 둘째 줄"
    assert baselines.lead_baseline("민수: 10:30에 만나요.\n영희: 네.") == "10:30에 만나요. 네."
    assert baselines.lead_baseline("") == ""


def test_turns_and_their_speakers():
    dialogue = "#Person1#: 안녕\n하세요\n\n민수 : 네.\n#Person1#:끝"
    assert baselines.turns_of(dialogue) == [("#Person1#", "안녕 하세요"), ("민수", "네."), ("#Person1#", "끝")]
    assert baselines.turns_of("하나\n둘") == [("", "하나"), ("", "둘")] and baselines.turns_of("") == []


def test_fact_share():
    predictions = ["회의는 오후 12시에 열립니다.", "커피 두잔을 주문합니다."]
    assert baselines.fact_share(predictions, [["오후 12시", "회의실"], ["커피", "두 잔"]]) == 0.75
    assert baselines.fact_share(predictions, [["2시"], []]) == 0.0  # not the 2시 of 12시
    with pytest.raises(ValueError, match="no facts"):
        baselines.fact_share(predictions, [[], []])
    with pytest.raises(ValueError, match="2 predictions but 1"):
        baselines.fact_share(predictions, [["커피"]])
