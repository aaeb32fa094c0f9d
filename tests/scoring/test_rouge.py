"""Scores against an independent computation, and the rules that scores of other systems broke."""

from __future__ import annotations

import random
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest

from engine.scoring import rouge as scoring_rouge
from engine.scoring.rouge import METRICS, rouge, rouge_rows, tokenize

PAIRS = [
    (
        "#Person1#는 월요일 오후 2시에 이비인후과 진료를 예약합니다.",
        "#Person2#는 이비인후과 진료를 금요일 오후 2시로 예약하고, 진료 의뢰서를 가져갑니다.",
    ),
    ("Mr. Smith는 #PhoneNumber#로 전화했다.", "#Person1#이 Mr. Smith에게 #PhoneNumber#로 전화하라고 말한다."),
    ("네 네 네 그래요", "그래요 네 네 좋아요 네 네"),
    ("회의는 내일 3시입니다.", "회의는 내일 3시입니다."),
]


# --- the same numbers computed another way: no table, no counters of n-gram tuples ---


def f1(hits: float, predicted: int, wanted: int) -> float:
    return 200.0 * hits / (predicted + wanted) if hits else 0.0


def plain_rouge_n(prediction: list, reference: list, n: int) -> float:
    left = [" ".join(reference[i : i + n]) for i in range(len(reference) - n + 1)]
    grams = [" ".join(prediction[i : i + n]) for i in range(len(prediction) - n + 1)]
    wanted, hits = len(left), 0
    for gram in grams:
        if gram in left:
            left.remove(gram)  # each n-gram of the reference may be matched once
            hits += 1
    return f1(hits, len(grams), wanted)


def plain_rouge_l(prediction: list, reference: list) -> float:
    row = [0] * (len(reference) + 1)
    for word in prediction:
        diagonal = 0
        for j, other in enumerate(reference, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return f1(row[-1], len(prediction), len(reference))


def plain_tokens(text: str, tokenizer: str) -> list[str]:
    if tokenizer == "mecab":
        from mecab import MeCab

        return [morpheme for morpheme, _ in MeCab().pos(text)]
    return text.split() if tokenizer == "whitespace" else [c for c in text if c.strip()]


@pytest.mark.parametrize("tokenizer", scoring_rouge.TOKENIZERS)
def test_golden_values_against_a_plain_computation(tokenizer):
    rows = rouge_rows([p for p, _ in PAIRS], [r for _, r in PAIRS], tokenizer)
    for row, (prediction, reference) in zip(rows, PAIRS, strict=True):
        p, r = plain_tokens(prediction, tokenizer), plain_tokens(reference, tokenizer)
        expected = (plain_rouge_n(p, r, 1), plain_rouge_n(p, r, 2), plain_rouge_l(p, r))
        assert [row[m] for m in METRICS] == pytest.approx(expected, abs=1e-9)
        assert row["rouge_sum"] == pytest.approx(sum(expected))
        assert row["rouge_mean"] == pytest.approx(sum(expected) / 3)


def test_values_worked_out_by_hand():
    # 4 shared words of 4 and 5; no shared pair; the longest common subsequence is a b d (or a c d)
    row = rouge_rows(["a b c d"], ["a c b d e"], "whitespace")[0]
    assert row["rouge1"] == pytest.approx(200 * 4 / 9)
    assert row["rouge2"] == 0.0
    assert row["rougeL"] == pytest.approx(200 * 3 / 9)
    # repeated words count only as often as the reference has them
    assert rouge_rows(["네 네 네"], ["네 예"], "whitespace")[0]["rouge1"] == pytest.approx(200 * 1 / 5)


def test_random_texts_against_the_plain_computation():
    rng = random.Random(7)
    for _ in range(60):
        texts = [" ".join(rng.choice("가나다라마") for _ in range(rng.randint(1, 14))) for _ in range(2)]
        row = rouge_rows(texts[:1], texts[1:], "whitespace")[0]
        p, r = texts[0].split(), texts[1].split()
        assert row["rouge1"] == pytest.approx(200.0 * (Counter(p) & Counter(r)).total() / (len(p) + len(r)))
        assert row["rouge2"] == pytest.approx(plain_rouge_n(p, r, 2))
        assert row["rougeL"] == pytest.approx(plain_rouge_l(p, r))


def test_rouge_l_is_sentence_level():
    """Newlines change nothing: rougeLsum would join the best matches of single lines."""
    prediction, reference = "라 마\n가 나", "가 나\n라 마"
    row = rouge_rows([prediction], [reference], "whitespace")[0]
    assert row["rougeL"] == pytest.approx(50.0)


# --- what must hold for every tokenizer ---


@pytest.mark.parametrize("tokenizer", scoring_rouge.TOKENIZERS)
def test_identity_disjoint_and_empty(tokenizer):
    text = "#Person1#는 #Person2#에게 회의가 내일 3시라고 말합니다."
    same = rouge([text], [text], tokenizer)
    assert [same[m] for m in METRICS] == [100.0] * 3 and same["rouge_sum"] == 300.0 and same["rouge_mean"] == 100.0
    other = rouge(["커피"], ["도서관 책 반납"], tokenizer)
    assert [other[m] for m in (*METRICS, "rouge_sum", "rouge_mean")] == [0.0] * 5
    for nothing in ("", "  \n"):
        assert rouge([nothing], [text], tokenizer)["rouge_sum"] == 0.0


def test_hangul_counts_and_shared_speakers_alone_do_not_make_a_match():
    a, b = "#Person1#는 커피를 마신다", "#Person1#는 도서관에 간다"
    assert rouge(["가나다 라마바"], ["가나다 라마바"])["rouge1"] == 100.0
    assert 0 < rouge([a], [b])["rouge1"] < 80


def test_placeholders_are_plain_morphemes_under_mecab():
    assert tokenize("#Person1#는 갔다.") == ("#", "Person", "1", "#", "는", "갔", "다", ".")
    assert tokenize("#Person1#는 갔다.", "whitespace") == ("#Person1#는", "갔다.")
    assert tokenize(" 가 나\n", "char") == ("가", "나")


def test_best_reference_counts_for_each_metric_on_its_own():
    prediction, first, second = "a b c d", "d c b a", "a b x y"
    one, two = (rouge_rows([prediction], [r], "whitespace")[0] for r in (first, second))
    assert one["rouge1"] > two["rouge1"] and one["rouge2"] < two["rouge2"]
    both = rouge_rows([prediction], [[first, second]], "whitespace")[0]
    assert all(both[m] == max(one[m], two[m]) for m in METRICS)
    assert both["rouge_sum"] == sum(both[m] for m in METRICS)


def test_means_over_rows_and_the_tokenizers_name():
    predictions, references = [p for p, _ in PAIRS], [r for _, r in PAIRS]
    rows, means = rouge_rows(predictions, references), rouge(predictions, references)
    for metric in METRICS:
        assert means[metric] == pytest.approx(sum(row[metric] for row in rows) / len(rows))
    assert means["rouge_mean"] == pytest.approx(means["rouge_sum"] / 3)
    assert means["rouge_tokenizer"] == "mecab"
    assert means["rouge_tokenizer_version"].startswith("mecab (python-mecab-ko ")
    assert rouge(predictions, references, "char")["rouge_tokenizer"] == "char"


def test_a_tokenizer_that_finds_nothing_is_an_error():
    good, blank = "회의는 내일입니다.", "\u3000"
    assert rouge([good] * 20, [good] * 19 + [blank])["rouge1"] == pytest.approx(95.0)  # 5 % is still allowed
    with pytest.raises(ValueError, match="no token in the references of 2 of 20"):
        rouge([good] * 20, [good] * 18 + [blank] * 2)
    assert rouge([good], [[blank, good]])["rouge1"] == 100.0  # a blank second reference is no reason to stop


@pytest.mark.parametrize(
    ("predictions", "references", "tokenizer", "message"),
    [
        (["가"], ["가", "나"], "mecab", "1 predictions but 2"),
        (["가"], [[]], "mecab", "row 1 has no reference"),
        (["가", None], ["가", "나"], "mecab", "row 2 holds something that is not text"),
        (["가"], [[float("nan")]], "mecab", "not text"),
        (["가"], ["가"], "english", "unknown ROUGE tokenizer 'english'"),
        ([], [], "mecab", "no rows"),
    ],
)
def test_refusals(predictions, references, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        rouge(predictions, references, tokenizer)


def test_odd_characters_are_scored_not_dropped():
    decomposed = unicodedata.normalize("NFD", "회의는 내일입니다")
    assert rouge([decomposed], ["회의는 내일입니다"])["rouge1"] == 100.0
    assert tokenize("안녕\0하세요")[-1] == "세요"
    assert tokenize("가\ud800")  # half of a pair, as broken JSON may hold it
    assert len(tokenize("가나다 " * 3000)) >= 3000


def test_scoring_imports_nothing_heavy():
    heavy = ("torch", "nltk", "mecab", "numpy", "pandas")
    code = f"import sys, engine.scoring; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
