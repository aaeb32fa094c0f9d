"""How summaries end, in numbers and in words."""

from __future__ import annotations

import pytest

from engine.scoring import endings


def test_ending_report():
    predictions = ["#Person1#는 갔습니다.", "Tom은 東京에 갔다", "カフェ에 가요!", ""]
    references = ["#Person1#는 갔습니다.", ["그는 도쿄에 갔다.", "그는 갔다."], "카페에 가요.", "네 좋아요."]
    report = endings.ending_report(predictions, references, capped=[False, True, False, False])
    assert report["capped_rate"] == 0.25 and report["eos_rate"] == 0.75
    assert report["proper_ending_rate"] == 0.5 and report["empty_rate"] == 0.25
    assert report["foreign_rate"] == 0.5 and report["latin_rate"] == report["han_rate"] == report["kana_rate"] == 0.25
    assert report["reference_foreign_rate"] == 0.0 and report["reference_proper_ending_rate"] == 1.0
    # Hangul letters 5 + 4 + 3 of all letters 5 + 9 + 6
    assert report["hangul_ratio"] == pytest.approx(12 / 20)
    # lengths without spaces: 15, 9, 7, 0; references 15, 8, 5, 6, 5
    assert report["mean_length_ratio"] == pytest.approx((31 / 4) / (39 / 5))
    assert report["length_histogram"][0] == 4 and sum(report["reference_histogram"]) == 5
    assert set(endings.ENDING_KEYS) <= set(report)
    metrics = endings.ending_metrics(predictions, [True, False, True, True], references)
    assert metrics == {key: report[key] for key in endings.ENDING_KEYS}
    text = endings.ending_text(report)
    assert len(text.splitlines()) <= 12 and "25.0%" in text


def test_ending_report_without_references_or_ends():
    report = endings.ending_report(["네, 알겠습니다."])
    assert "capped_rate" not in report and "mean_length_ratio" not in report
    assert endings.ending_text(report)
    with pytest.raises(ValueError, match="no predictions"):
        endings.ending_report([])
    with pytest.raises(ValueError, match="1 predictions but 2 ends"):
        endings.ending_report(["네."], capped=[True, False])


@pytest.mark.parametrize(
    ("text", "proper"),
    [
        ("합니다.", True),
        ("가요!", True),
        ("그렇죠?", True),
        ("될까?", True),
        ('"갑니다."', True),
        ("합니다", False),
        ("#Pers", False),
        ("가고", False),
        ("", False),
    ],
)
def test_proper_endings(text, proper):
    assert endings.ends_properly(text) is proper
