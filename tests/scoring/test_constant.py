"""The best constant is the best: held against the real scorer on every candidate."""

from __future__ import annotations

import random

import pytest

from engine.scoring import constant, rouge

WORDS = "#Person1# #Person2# 은 는 에게 회의 시간 을 말 합니다 . 산 에 가 자고 합니다 묻습니다 친구".split()


def sentences(count: int, seed: int) -> list[str]:
    """Short texts over few words, so that n-grams repeat within a text and bigrams can outdo tokens."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS[: rng.randint(2, len(WORDS))], k=rng.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("tokenizer", ["whitespace", "char"])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_best_of_all_by_the_real_scorer(tokenizer, seed):
    summaries = sentences(40, seed)
    texts = sentences(30, seed + 100)
    references = [texts[i] if i % 3 else [texts[i], texts[i + 1]] for i in range(29)]
    found = constant.best_constant(summaries, references, tokenizer)

    def mean(text: str) -> float:
        return rouge.rouge([text] * len(references), references, tokenizer)["rouge_mean"]

    candidates = constant._candidates(summaries, 0)
    assert set(summaries) < set(candidates) and mean(found.text) == pytest.approx(max(map(mean, candidates)), abs=1e-9)
    assert found.rows == 29


def test_its_scores_are_those_of_the_scorer():
    references = [[line] if number % 2 else [line, line[::-1]] for number, line in enumerate(sentences(20, 7))]
    against = constant._References([[rouge.tokenize(text, "whitespace") for text in row] for row in references])
    for text in sentences(20, 8):
        tokens = rouge.tokenize(text, "whitespace")
        true = rouge.rouge([text] * 20, references, "whitespace")
        found = (against.unigrams.f1(tokens), against.bigrams.f1(list(zip(tokens, tokens[1:], strict=False))))
        assert [100 * score for score in (*found, against.lcs_f1(tokens))] == pytest.approx(
            [true[key] for key in rouge.METRICS]
        )
        assert true["rouge_mean"] <= true["rouge1"] * against.most_over_rouge1(len(tokens)) + 1e-9


def test_a_sentence_of_a_summary_is_a_candidate():
    found = constant.best_constant(
        ["산에 가자고 한다. 그리고 아주 길고 긴 이야기가 이어진다."], ["산에 가자고 한다."] * 3, "char"
    )
    assert found == ("산에 가자고 한다.", 3, 3)


def test_the_search_is_bounded_and_repeatable(monkeypatch):
    monkeypatch.setattr(constant, "MOST_CANDIDATES", 10)
    monkeypatch.setattr(constant, "MOST_ROWS", 5)
    summaries, references = sentences(50, 1), sentences(20, 2)
    first = constant.best_constant(summaries, references, "whitespace")
    assert (first.candidates, first.rows) == (10, 5) and any(first.text in text for text in summaries)
    assert constant.best_constant(summaries, references, "whitespace") == first
    assert len({constant.best_constant(summaries, references, "whitespace", seed=seed).text for seed in range(9)}) > 1
    with pytest.raises(ValueError, match="needs candidates"):
        constant.best_constant([" "], references, "whitespace")


def test_a_hand_made_sentence_does_not_beat_it_by_much(shared_data):
    """On real rows a sentence that says nothing scores 33 by mecab, more than twice what the first turns have."""
    import csv

    pytest.importorskip("mecab")
    train, dev = (
        [row["summary"] for row in csv.DictReader((shared_data / "dialogsum_ko" / name).open(encoding="utf-8"))]
        for name in ("train.csv", "dev.csv")
    )
    found = constant.best_constant(train, dev)
    score = rouge.rouge([found.text] * len(dev), dev)["rouge_mean"]
    assert score > rouge.rouge(["#Person1#은 #Person2#에게 말합니다."] * len(dev), dev)["rouge_mean"] > 30
